"""What an algorithm keeps from step to step, and what it draws: the same in every layout, and after a stop."""

from pathlib import Path

import msgspec
import pytest
from conftest import dpo_settings, interrupted_after, make_pairs, make_reference, publish, run_here, training_log

from contracts.errors import UserError
from contracts.fingerprint import file_sha256
from contracts.records import PAIRS, SCORES

ALGORITHM = """\
READS = "pairs"
NEEDS = ("reference", "tokens", "entropy")
STATE = {"seen": 0.0}

def statistics(batch):
    return {"rows": batch.gather(batch.chosen.length + batch.step), "count": batch.mean(batch.weights)}

def update(step, *, wrong: str = ""):
    rows = step.statistics["rows"]
    assert abs(step.statistics["count"] - 1) < 1e-6 and step.step < step.steps == 12
    if wrong == "state":
        return {"draw": 1.0}
    if wrong == "nan":
        return {"seen": float("nan")}
    if wrong == "name":
        return {"seen": 0.0, "loss": 1.0, "double": 2 * rows}
    return {"seen": step.state["seen"] + float(rows.sum()), "draw": float(step.step), "double": 2 * rows}

def loss(batch):
    own = batch.chosen.length + batch.step
    assert (batch.own(batch.statistics["double"]) == 2 * own).all()
    assert (batch.chosen.position < batch.chosen.length[batch.chosen.answer_of_token]).all()
    noise = batch.chosen.sum(batch.chosen.random().float() * batch.chosen.logprobs)
    entropy = batch.rejected.sum(batch.rejected.entropy) + batch.chosen.sum(batch.chosen.reference)
    return {"loss": batch.mean(-noise - 0.01 * entropy), "noise": batch.mean(noise.detach()),
            "truncated": batch.mean(batch.chosen.truncated.float()), "math": batch.mean(batch.tagged("math").float())}
"""


@pytest.fixture(scope="module")
def algorithm(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("own") / "mine.py"
    path.write_text(ALGORITHM)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mine", "beta_dpo", "ld_dpo", "sampo"])
def test_a_stop_and_another_layout_change_nothing(
    name: str, algorithm: str, models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path
) -> None:
    name = algorithm if name == "mine" else name
    whole, torn, small = (
        dpo_settings(models, pairs, tmp_path / folder, algorithm=name, checkpoint_seconds=0)
        for folder in ("whole", "torn", "small")
    )
    run_here("policy", **whole)
    with interrupted_after(5):
        run_here("policy", **torn)
    assert run_here("policy", **torn).manifest.facts["resumed_steps"] == 5
    for file in ("training-log.jsonl", "model.safetensors"):
        assert file_sha256(tmp_path / "torn" / file) == file_sha256(tmp_path / "whole" / file)
    run_here("policy", **small, micro_batch_tokens=24, packing="padded")
    for line, other in zip(training_log(tmp_path / "whole"), training_log(tmp_path / "small"), strict=True):
        assert other == pytest.approx(line, rel=1e-3, abs=1e-5)


def test_tags_and_truncation_of_pairs_reach_an_algorithm(
    algorithm: str, models: dict[str, Path], tmp_path: Path
) -> None:
    rows = [
        msgspec.structs.replace(pair, tags=("math", "hard") if number % 3 else msgspec.UNSET)
        for number, pair in enumerate(make_pairs(22))
    ]
    publish(tmp_path / "pairs", PAIRS, rows)
    publish(tmp_path / "reference", SCORES, make_reference(rows))
    paths = {name: tmp_path / name for name in ("pairs", "reference")}
    output = tmp_path / "out"
    settings = {"algorithm": algorithm, "global_batch": 22, "epochs": 12, "micro_batch_tokens": 100}
    run_here("policy", **dpo_settings(models, paths, output, **settings))
    line = training_log(output)[0]
    assert line["math"] == pytest.approx(sum(number % 3 > 0 for number in range(22)) / 22)
    assert line["truncated"] == pytest.approx(sum(row.chosen_finish_reason == "length" for row in rows) / 22)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("state", "update did not return the number 'seen', which is in STATE"),
        ("nan", "update returned 'seen' as nan; it must be finite"),
        ("name", "loss and its update both return a metric 'loss'. Rename one"),
    ],
)
def test_an_update_that_does_not_keep_its_word(
    wrong: str, message: str, algorithm: str, models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path
) -> None:
    settings = {"wrong": wrong}
    with pytest.raises(UserError, match=message):
        run_here("policy", **dpo_settings(models, pairs, tmp_path / "out", algorithm=algorithm, settings=settings))
    assert not (tmp_path / "out").exists()


def test_a_reference_model_is_asked_for_where_it_is_needed_and_nowhere_else(
    models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path
) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text('READS = "pairs"\nNEEDS = ("reference_model",)\ndef loss(batch): ...\n')
    settings = {"model": models["tied"], "pairs": [pairs["pairs"]], "output": tmp_path / "out", "algorithm": str(mine)}
    with pytest.raises(UserError, match="needs a reference model: set reference_model=DIRECTORY"):
        run_here("policy", **settings)
    with pytest.raises(UserError, match=r"hold the whole policy, but parallel .*divides the policy"):
        run_here("policy", **settings, reference_model=models["tied"], parallel={"dp": 2, "zero": 3})
    with pytest.raises(UserError, match="algorithm=dpo needs no reference model: leave reference_model out"):
        run_here("policy", **dpo_settings(models, pairs, tmp_path / "out", reference_model=models["tied"]))


def test_what_an_algorithm_reads_is_part_of_what_it_makes(
    algorithm: str, models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path
) -> None:
    words = tmp_path / "words.json"
    found = []
    for content in ("1", "2"):
        words.write_text(content)
        settings = dpo_settings(models, pairs, tmp_path / content, algorithm=algorithm, inputs=[words], epochs=2)
        found.append(run_here("policy", **settings).manifest)
    assert found[0].key != found[1].key
    with pytest.raises(UserError, match="inputs is for files that your own algorithm reads; algorithm=dpo reads none"):
        run_here("policy", **dpo_settings(models, pairs, tmp_path / "out", inputs=[words]))
