"""Builds handmade runs for tests of the report, with chosen lengths, scores and texts of their answers."""

import json
import zlib
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from handmade import HandmadeRun

from contracts.records import Rollout, Score
from pipelines.commands.declaring import open_run
from pipelines.insight.report.data import RunReport
from pipelines.insight.report.gather import gather
from pipelines.insight.report.sample_cache import SampleCache
from pipelines.main import main

Length = Callable[[int, int], int]
"""A function from iteration and sample to the number of tokens of the answer."""
Scoring = Callable[[int, int], float]
"""A function from iteration and answer length to the score."""


class ReportedRun(HandmadeRun):
    """A run of two iterations whose answers consist of one "word" per token."""

    def __init__(
        self,
        folder: Path,
        length: Length = lambda iteration, sample: 4 + sample,
        score: Scoring = lambda iteration, length: length % 2 + iteration,
        texts: Callable[[str], str] = lambda text: text,
    ) -> None:
        super().__init__(folder, self._mutated)
        self._length, self._score, self._texts = length, score, texts
        self._answered: dict[str, dict[tuple[str, int], int]] = {}

    def _mutated(self, name: str, rows: list[Any]) -> list[Any]:
        iteration, place = int(name[10:13]) if name.startswith("iteration") else 0, name.rpartition("/")[0]
        if rows and isinstance(rows[0], Rollout):
            rows = [self._answers(row, iteration) for row in rows]
            self._answered[place] = {
                (row.prompt_id, one.sample): len(one.response_ids) for row in rows for one in row.completions
            }
        elif rows and isinstance(rows[0], Score) and name.endswith(("reward", "gold")):
            lengths = self._answered[place]
            rows = [
                msgspec.structs.replace(row, score=float(self._score(iteration, lengths[row.prompt_id, row.sample])))
                for row in rows
            ]
            if name.endswith("reward"):
                details = {"parts": {"half": 0.5}, "extras": {"why": self._texts("because")}}
                rows = [msgspec.structs.replace(row, **details) for row in rows]
        return rows

    def _answers(self, row: Rollout, iteration: int) -> Rollout:
        completions = []
        for one in row.completions:
            count = self._length(iteration, one.sample)
            completions.append(
                msgspec.structs.replace(
                    one,
                    response_ids=tuple(range(3, 3 + count)),
                    logprobs=(-0.5,) * count,
                    text=self._texts(" ".join(["word"] * count)),
                    finish_reason="length" if one.sample == 0 else "stop",
                )
            )
        return msgspec.structs.replace(row, completions=tuple(completions))

    def build(self) -> "ReportedRun":
        """Publish everything."""
        super().build()
        source = {"source": str(self.source)}
        rule = {"kind": "rule", "function": "embedded.reviews:well_formed"}
        settings = {
            "name": "handmade",
            "policy": str(self.model),
            "prompts": {"train": source, "heldout": source},
            "scorers": {"reward": rule, "gold": rule},
            "generation": {"k": 3},
        }
        (self.path / "run.json").write_text(json.dumps({"config": "x.yaml", "iterations": 2, "settings": settings}))
        return self


def gathered(path: Path) -> RunReport:
    """The report of a run."""
    return gather(*open_run(path), SampleCache())


def answers(report: RunReport) -> dict[str, str]:
    """The statements of the first screen by topic."""
    return {one.topic: one.answer for one in report.statements}


def page_of(path: Path) -> str:
    """The report page of a run, written by the command."""
    assert main(["report", str(path)]) == 0
    return (path / "report.html").read_text()


def unpacked(content: str) -> Any:
    """The content of a chunk."""
    return json.loads(zlib.decompress(b64decode(content)))
