"""The command `score`: scores a user's texts with one of the run's scorers."""

import argparse
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from annotation.scorers.base import ScoreConfig
from annotation.stages.rlhflow import RLHFLOW_IMPORT
from contracts.artifacts import Artifact
from contracts.conversations import read_messages
from contracts.errors import UserError, did_you_mean
from contracts.jsonl import read_jsonl, write_jsonl
from contracts.manifest import MANIFEST
from contracts.processes import kill_with_variable
from contracts.prompts import prompt_id
from contracts.records import SCORES, Score
from pipelines.commands.declaring import CONFIG, OVERRIDES, argument, command
from pipelines.config.run import RunConfig
from pipelines.environments.launch import launch_command, stage_environment
from pipelines.graph import Node
from pipelines.iteration import Recipe
from pipelines.run.plan import read_run

ANSWER = "answer"
STAGE_VARIABLE = "RATCHET_SCORED_BY"
"""Environment variable that marks the processes of a stage of this command."""
ResponseKey = tuple[str, int]
"""Key of an imported response: its prompt_id and its sample number."""


@command(
    "score",
    "score your own texts with a run's scorer; prints the rows with their scores as JSONL",
    CONFIG,
    argument("scorer", help="its name in the section `scorers`"),
    argument(
        "file", help='JSONL with {"prompt" or "messages", "response"}, optionally "answer", per line; - reads stdin'
    ),
    OVERRIDES,
    argument("--tokenizer", type=Path, metavar="MODEL", help="tokenizer for the responses; by default the policy's"),
    group="read",
)
def _score(options: argparse.Namespace) -> int:
    config, _, _ = read_run(options.config, options.overrides, 0, download=True)
    if options.scorer not in config.scorers:
        raise UserError(
            f"the run has no scorer {options.scorer!r}.{did_you_mean(options.scorer, config.scorers)} It has "
            f"{', '.join(config.scorers)}."
        )
    rows = list(_rows(options.file))
    with tempfile.TemporaryDirectory(prefix="ratchet-score-") as folder:
        texts = Path(folder, "texts.jsonl")
        places = _write(rows, texts)
        user_lines = _UserLines(texts, [place for place, _ in rows], places)
        nodes = _stages(config, options.scorer, options.tokenizer, Path(folder), options.overrides)
        for node in nodes:
            if code := _run(node, config, user_lines):
                return code
        scores = {
            (score.prompt_id, score.sample): score for score in Artifact.open(nodes[-1].output, SCORES).rows(Score)
        }
        reasons = _reasons(nodes)
        ledgers = [Artifact.open(node.output, node.stage.schema).manifest.ledger for node in nodes]
        for node, ledger in zip(nodes, ledgers, strict=True):
            if ledger.dropped:
                print(f"{node.output.name}: {ledger}", file=sys.stderr)
    not_imported = " or ".join(sorted(ledgers[0].dropped))
    for (_, row), place in zip(rows, places, strict=True):
        row = {name: value for name, value in row.items() if name not in ADDED_COLUMNS}
        print(json.dumps(row | _score_columns(scores.get(place), reasons.get(place, not_imported)), ensure_ascii=False))
    return 0


def _rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The user's rows, each with its file and line for error messages."""
    path = Path("/dev/stdin" if source == "-" else source)
    if not path.exists():
        raise UserError(f"{path} does not exist. Give a JSONL file, or - for standard input.")
    for number, row in enumerate(read_jsonl(path, dict), 1):
        place = f"{'stdin' if source == '-' else path}, line {number}"
        if not isinstance(row.get("response"), str) or ("prompt" in row) == ("messages" in row):
            raise UserError(f'{place}: a row needs "response", a text, and either "prompt" or "messages".')
        yield place, row


def _write(rows: list[tuple[str, dict[str, Any]]], target: Path) -> list[ResponseKey]:
    """Write the rows in RLHFlow's format, grouped by prompt. Returns the key of each row's response."""
    if not rows:
        raise UserError("there are no rows to score.")
    prompts: dict[str, dict[str, Any]] = {}
    places = []
    for place, row in rows:
        column = "prompt" if "prompt" in row else "messages"
        messages = read_messages(row[column], place, column, set())
        identity = prompt_id(messages)
        known = prompts.setdefault(identity, {"prompt": messages, "responses": [], ANSWER: row.get(ANSWER)})
        if known[ANSWER] != row.get(ANSWER):
            raise UserError(f"{place}: the same prompt has another answer in an earlier row. Give it one known answer.")
        places.append((identity, len(known["responses"])))
        known["responses"].append(row["response"])
    write_jsonl(target, prompts.values())
    return places


class _UserLines:
    """Rewrites messages so that they name lines of the user's file, instead of the file that the stages read."""

    def __init__(self, texts: Path, rows: list[str], places: list[ResponseKey]) -> None:
        self.pattern = re.compile(rf"{re.escape(str(texts))}, line ([0-9]+)")
        lines: dict[str, list[str]] = {}
        for row, (identity, _) in zip(rows, places, strict=True):
            lines.setdefault(identity, []).append(row)
        self.lines = [" or ".join(found) for found in lines.values()]

    def __call__(self, text: str) -> str:
        """The message with line references to the user's file."""
        return self.pattern.sub(lambda found: self.lines[int(found[1]) - 1], text)


def _stages(config: RunConfig, scorer: str, tokenizer: Path | None, folder: Path, overrides: list[str]) -> list[Node]:
    """The nodes of the import, the scorers that `scorer` is composed of, and `scorer` itself.

    The run's limits on dropped rows are meant for its own responses: here all rows may be dropped, unless the command
    line sets a limit.
    """
    recipe = Recipe(config)
    recipe.prepare()
    known = set(recipe.graph.nodes)
    section = config.scorers[scorer]
    if section.standardised:
        raise UserError(f"scorer {scorer!r} is standardised by an initial policy's responses, which do not exist here.")
    candidates = [tokenizer] if tokenizer is not None else [recipe.resolve(config.policy), section.model_path]
    if (found := next((path for path in candidates if path is not None and path.is_dir()), None)) is None:
        raise UserError(
            f"{candidates[0]} is no model's directory, but the responses need its tokenizer. Give --tokenizer."
        )
    fields: dict[str, Any] = {"source": folder / "texts.jsonl", "tokenizer": found, "answer_column": ANSWER}
    fields |= {**recipe.rendering_fields(found, config.chat_template_kwargs), "max_dropped": 1.0}
    rollouts = recipe.graph.add(RLHFLOW_IMPORT, str(folder / "rollouts"), fields)
    recipe.score(str(folder / scorer), scorer, rollouts)
    nodes = [node for name, node in recipe.graph.nodes.items() if name not in known]
    for place, node in enumerate(nodes):
        if isinstance(node.config, ScoreConfig):
            changes: dict[str, Any] = {"reasons": _reasons_file(node)}
            if not any(override.startswith(f"scorers.{node.config.name}.max_dropped=") for override in overrides):
                changes["max_dropped"] = 1.0
            nodes[place] = replace(node, config=node.config.model_copy(update=changes))
    for node in nodes:
        for name in node.needs:
            if name in known and not (recipe.graph.nodes[name].output / MANIFEST).is_file():
                raise UserError(f"scorer {scorer!r} needs {name}, which the run has not published yet. Run it first.")
    return nodes


def _run(node: Node, config: RunConfig, user_lines: Callable[[str], str]) -> int:
    """Run a stage in the foreground. Its output goes to standard error with the user's lines. Returns the exit code."""
    fields: Mapping[str, Any] = node.config.model_dump(mode="json", exclude_unset=True)
    argv = [*node.argv, *(f"{name}={json.dumps(value)}" for name, value in fields.items())]
    command, variables = launch_command(config.environments.of(node.environment), node.environment, argv)
    variables.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    token = secrets.token_hex(8)
    environment = stage_environment(variables) | {STAGE_VARIABLE: token}
    with (
        ThreadPoolExecutor(1) as pool,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        assert process.stdout is not None
        printed = pool.submit(_print_lines, process.stdout, user_lines)
        try:
            code = process.wait()
        finally:
            kill_with_variable(f"{STAGE_VARIABLE}={token}")  # what a scorer left behind would keep the pipe open
        printed.result()
    return code if code >= 0 else 1


def _print_lines(lines: Iterable[str], user_lines: Callable[[str], str]) -> None:
    for line in lines:
        sys.stderr.write(user_lines(line))


def _reasons_file(node: Node) -> Path:
    """The file in which a scorer records why it did not score a response."""
    return node.output.with_name(f"{node.output.name}.reasons.jsonl")


def _reasons(nodes: list[Node]) -> dict[ResponseKey, str]:
    """By response, the reason why the last scorer did not score it, with the reasons of its components."""
    found: dict[ResponseKey, str] = {}
    for node in nodes:
        before, found = found, {}
        if (file := _reasons_file(node)).is_file():
            for row in read_jsonl(file, dict):
                place = row["prompt_id"], row["sample"]
                found[place] = row["reason"] + (f" ({before[place]})" if place in before else "")
        found = before | found
    return found


ADDED_COLUMNS = ("score", "why", "parts", "extras")
"""Columns that the command adds to a row; those of an earlier call are replaced."""


def _score_columns(score: Score | None, reason: str) -> dict[str, Any]:
    """The columns for a score; without one, `score` is null and `why` gives the reason."""
    if score is None:
        return {"score": None, "why": reason}
    return {"score": score.score} | {name: found for name in ("parts", "extras") if (found := getattr(score, name))}
