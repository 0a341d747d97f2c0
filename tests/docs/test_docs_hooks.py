"""The examples of docs/hooks.md, as they are, in a run whose stages pretend to work."""

import http.server
import json
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from pipelines_smallest import pipeline, write_pretended

from contracts.points import read_points
from pipelines.config.run import RunConfig
from pipelines.config.sections import EnvironmentsSection

LM_EVAL = '''
"""A stand-in for lm-eval, whose results have the form of the real one's (lm_eval/evaluator.py)."""


def simple_evaluate(model, model_args, tasks, limit=None):
    assert (model, limit) == ("hf", 200)
    assert model_args.startswith("pretrained=/")
    values = {"alias": "it", "acc,none": 0.25, "acc_stderr,none": "N/A", "acc_norm,none": 0.5}
    return {"results": {task: values for task in tasks}, "config": {}}
'''


def blocks(root: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (root / "docs/hooks.md").read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_hook_and_the_evaluation_run_as_they_stand_there(tmp_path: Path, root: Path) -> None:
    hook, evaluation, *_ = [yaml.safe_load(block) for block in blocks(root, "yaml")]
    (tmp_path / "hooks.py").write_text(blocks(root, "python")[0])
    (tmp_path / "evals.py").write_text(blocks(root, "python")[1])
    (tmp_path / "lm_eval.py").write_text(LM_EVAL)
    received: list[str] = []

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        path = write_pretended(tmp_path)
        config = yaml.safe_load(path.read_text())
        hook["hooks"]["notify"]["settings"]["url"] = f"http://127.0.0.1:{server.server_port}/"
        own = evaluation["environments"]["own"]
        own["lm-eval"] = {"python": sys.executable}
        config["environments"]["own"] = own
        path.write_text(yaml.safe_dump({**config, **hook, "evaluations": evaluation["evaluations"]}))
        result = pipeline("run", str(path), "--iters", "0", cwd=tmp_path)
    finally:
        server.shutdown()
    assert result.returncode == 0, result.stderr
    assert received == [
        "pretended: run started",
        "pretended: iteration 0, reward 0.500",
        "pretended: run finished",
    ]
    run = tmp_path / "runs" / "pretended"
    point = next(point for point in read_points(run) if point.stage == "iteration-000/evaluations/lm_eval")
    assert {name: value for name, value in point.metrics.items() if name.startswith("eval/")} == {
        f"eval/lm_eval/{task}/{name}": value
        for task in ("arc_easy", "hellaswag")
        for name, value in (("acc", 0.25), ("acc_norm", 0.5))
    }
    assert (run / "iteration-000/evaluations/lm_eval/files/results.json").is_file()


def test_every_key_there_is_one_of_a_run(root: Path) -> None:
    sections = [section for block in blocks(root, "yaml") for section in yaml.safe_load(block).items()]
    assert len(sections) == 6
    assert {name for name, _ in sections} <= RunConfig.model_fields.keys()
    for name, section in sections:
        if name == "environments":
            EnvironmentsSection.model_validate(section)
        else:
            fields = RunConfig.model_fields[name]
            assert section.keys() <= getattr(fields.annotation, "model_fields", section).keys()


def test_the_stage_by_hand(tmp_path: Path, root: Path) -> None:
    (command,) = re.findall(r"`python -m annotation (evaluate-checkpoint .*?)`", (root / "docs/hooks.md").read_text())
    (tmp_path / "evals.py").write_text(blocks(root, "python")[1].replace("limit=None", "limit=200"))
    (tmp_path / "lm_eval.py").write_text(LM_EVAL)
    model = tmp_path / "DIR"
    model.mkdir()
    (model / "config.json").write_text("{}")
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"init")
    command = command.replace("checkpoint=DIR", f"checkpoint={model}")
    arguments = [sys.executable, "-m", "annotation", *shlex.split(command)]
    result = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "OUT/evaluation.json").read_text())
    assert found == {"arc_easy/acc": 0.25, "arc_easy/acc_norm": 0.5}
