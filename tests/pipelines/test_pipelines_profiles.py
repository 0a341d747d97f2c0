"""Profiles: what stages took by their manifests, what they would take by data sheets, and predictions by both."""

import json
import math
import multiprocessing
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from pipelines_cluster import Slurm
from pipelines_slurm_run import SlurmRun
from pipelines_smallest import FinishedRun, pipeline, write_pretended

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.model_size import Size
from contracts.operations import ModelLayout, Operations
from pipelines.config.load import load_run_config
from pipelines.execution.profiling import predictor_for, profiles_of, timing_of
from pipelines.execution.supervisor import DECISION, REQUEST, AttemptRequest
from pipelines.planning.placement import placed_graph
from pipelines.planning.profiles.analytic import (
    BANDWIDTH_SHARE,
    COMPUTE_SHARE,
    compute_seconds,
    decode_seconds,
    forward_operations,
    matrix_parameters,
    training_seconds,
)
from pipelines.planning.profiles.datasheets import data_sheet, data_sheets, matching_sheet
from pipelines.planning.profiles.predict import (
    ASSUMED_ERRORS,
    FINISH_SECONDS,
    QUEUE_SECONDS,
    ProfilePredictor,
    StageFeatures,
    _line,
)
from pipelines.planning.profiles.rows import Profile, Timing, _spent
from pipelines.planning.profiles.store import MAX_PER_GROUP, ProfileStore, decode_profiles, latest_of_each
from pipelines.run.directory import RunDirectory
from pipelines.run.events import ListenerFailed, StagePublished

LLAMA_8B = Size(*(8_030_000_000, 4096, 32, 14336, 4096, 1024, 128256), tied=False)
SAMPLING = Operations(
    kind="sampling",
    model=LLAMA_8B,
    number=2,
    layout=ModelLayout(),
    sequences=1024,
    prompt_tokens=256 * 200,
    answer_tokens=1024 * 500,
    length=700,
    logits=1024 * 500,
    batch=256,
)
TRAINING = replace(
    SAMPLING, kind="training", sequences=2048, batch=16384, steps=16, trained=LLAMA_8B.parameters, logits=1024 * 500
)


def row(number: int, compute: float = 10.0, **changes: object) -> Profile:
    """A training of an 8B model on an H100, one of many."""
    fields = {
        "version": 1, "id": f"{number:032x}", "created": f"2026-01-01T00:00:{number:02d}Z", "stage": "policy",
        "variant": "dpo", "code": 2, "package": "training", "device": "NVIDIA H100 80GB HBM3", "work": TRAINING,
        "start": 3.0, "load": 2.0, "compute": compute, "handoff": 1.0,
    }  # fmt: skip
    return Profile(**{**fields, **changes})  # type: ignore[arg-type]


def task(**changes: object) -> StageFeatures:
    fields = {
        "stage": "policy", "variant": "dpo", "code": 2, "package": "training", "executor": "local",
        "device": "H100-SXM", "threads": 0, "work": TRAINING, "rows": None, "bytes": None,
        "first": False, "loaded": True,
    }  # fmt: skip
    return StageFeatures(**{**fields, **changes})  # type: ignore[arg-type]


class TestStore:
    def test_a_stage_counts_once_and_what_cannot_be_read_is_passed_over(self, tmp_path: Path) -> None:
        store = ProfileStore(tmp_path / "profiles")
        assert store.read() == []
        assert store.append([row(1), row(2)]) == 2
        assert store.append([row(2), row(3, device="AMD EPYC")]) == 1
        file = tmp_path / "profiles" / "nvidia-h100-80gb-hbm3.jsonl"
        newer = msgspec.json.encode(row(4, version=99))
        file.write_bytes(file.read_bytes() + newer + b'\nnothing\n{"version": 1, "id": "torn')
        assert {found.id for found in store.read()} == {row(number).id for number in (1, 2, 3)}
        assert store.append([row(5)]) == 1
        assert file.read_bytes().endswith(msgspec.json.encode(row(5)) + b"\n"), "the torn line was cut off"
        assert {found.id for found in store.read()} == {row(number).id for number in (1, 2, 3, 5)}

    def test_several_runs_append_at_once(self, tmp_path: Path) -> None:
        processes = [multiprocessing.Process(target=_append, args=(tmp_path, first)) for first in range(0, 40, 10)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        content = (tmp_path / "nvidia-h100-80gb-hbm3.jsonl").read_bytes()
        assert len(content.splitlines()) == len(decode_profiles(content)) == 40

    def test_a_large_store_keeps_the_latest_of_each_kind(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = [row(number, work=TRAINING if number % 2 else SAMPLING) for number in range(59)]
        assert [found.id for found in latest_of_each(rows)] == [found.id for found in rows[-2 * MAX_PER_GROUP :]]
        store = ProfileStore(tmp_path)
        store.append(rows)
        monkeypatch.setattr("pipelines.planning.profiles.store.MAX_BYTES", 1000)
        store.append([row(59)])
        assert [found.id for found in store.read()] == [found.id for found in latest_of_each([*rows, row(59)])]


def _append(folder: Path, first: int) -> None:
    for number in range(first, first + 10):
        ProfileStore(folder).append([row(number)])


class TestDataSheets:
    @pytest.mark.parametrize(
        ("device", "name"),
        [
            ("NVIDIA H100 80GB HBM3", "H100-SXM"),
            ("NVIDIA H100 PCIe", "H100-PCIe"),
            ("NVIDIA A100-SXM4-40GB", "A100-40"),
            ("NVIDIA A100 80GB PCIe", "A100-80"),
            ("NVIDIA H200", "H200"),
            ("NVIDIA B200", "B200"),
            ("NVIDIA L40S", "L40S"),
            ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ],
    )
    def test_a_gpu_is_known_by_what_its_driver_calls_it(self, device: str, name: str) -> None:
        assert data_sheet(device).name == name

    @pytest.mark.parametrize(
        ("written", "name"), [("h100-sxm", "H100-SXM"), ("H100-PCIE", "H100-PCIe"), ("a100", "A100-40")]
    )
    def test_a_name_is_known_in_capitals_or_not(self, written: str, name: str) -> None:
        assert data_sheet(written).name == name

    @pytest.mark.parametrize("name", ["H1000", "NVIDIA H1000 80GB", "H100-SMX", "h100x"])
    def test_what_only_looks_like_one_is_refused(self, name: str) -> None:
        with pytest.raises(UserError, match=re.escape(f"no data sheet of {name!r}. Did you mean") + ".*'H100"):
            data_sheet(name)

    def test_every_one_says_where_it_is_from(self) -> None:
        assert matching_sheet("AMD EPYC 7763 64-Core Processor") is None
        for sheet in data_sheets().values():
            assert "data sheet" in sheet.source or "white paper" in sheet.source
            assert sheet.bf16 >= sheet.fp32 > sheet.bandwidth > 0
        with pytest.raises(UserError, match=r"no data sheet of 'H10-SXM'.*H100-SXM"):
            data_sheet("H10-SXM")


class TestAnalytic:
    H100 = data_sheet("H100-SXM")

    def test_a_forward_pass_takes_two_operations_for_each_parameter_and_token(self) -> None:
        embedding = LLAMA_8B.vocabulary * LLAMA_8B.hidden
        assert matrix_parameters(LLAMA_8B) == pytest.approx(LLAMA_8B.parameters - 2 * embedding, rel=0.01)
        without_attention = forward_operations(LLAMA_8B, 1000, 0, 1000)
        assert without_attention == pytest.approx(2 * 1000 * (LLAMA_8B.parameters - embedding), rel=0.01)

    def test_decoding_alone_reads_the_weights_for_each_token(self) -> None:
        alone = replace(SAMPLING, sequences=1, answer_tokens=1000, batch=1, length=0)
        read = 1000 * 2 * LLAMA_8B.parameters / (BANDWIDTH_SHARE * self.H100.bandwidth)
        assert decode_seconds(alone, self.H100) == pytest.approx(read, rel=0.3)
        together = replace(alone, sequences=16, answer_tokens=16000, batch=16)
        assert decode_seconds(together, self.H100) < 1.1 * decode_seconds(alone, self.H100)

    def test_training_takes_three_forward_passes_and_four_where_activations_are_computed_again(self) -> None:
        operations = 3 * forward_operations(LLAMA_8B, TRAINING.tokens, TRAINING.length, TRAINING.logits)
        expected = operations / (COMPUTE_SHARE * self.H100.bf16)
        assert training_seconds(TRAINING, self.H100) == pytest.approx(expected, rel=0.2)
        again = training_seconds(replace(TRAINING, recomputes=True), self.H100)
        assert again / training_seconds(TRAINING, self.H100) == pytest.approx(4 / 3, rel=0.05)

    def test_a_pipeline_has_a_bubble(self) -> None:
        def seconds(pp: int, batch: int) -> float:
            return training_seconds(replace(TRAINING, layout=ModelLayout(pp=pp), batch=batch), self.H100)

        micro = math.ceil(TRAINING.tokens / TRAINING.steps / 8192)
        bubble = (micro + 3) / micro
        assert seconds(4, 8192) / seconds(1, 8192) == pytest.approx(bubble / 4, rel=0.1)

    def test_layouts_cost_what_they_exchange(self) -> None:
        def seconds(**layout: object) -> float:
            return training_seconds(replace(TRAINING, layout=ModelLayout(**layout)), self.H100)  # type: ignore[arg-type]

        alone = seconds()
        assert alone / 8 < seconds(dp=8, zero=1) < seconds(dp=8, zero="fsdp2") < alone / 4
        assert alone / 8 < seconds(tp=8) < alone / 4
        assert seconds(dp=8, zero=3) < seconds(dp=8, zero=3, offload=("optimizer", "param"))
        assert seconds(dp=16, nodes=2) > seconds(dp=16) / 2
        far = replace(self.H100, network=self.H100.network / 100)
        slow = training_seconds(replace(TRAINING, layout=ModelLayout(dp=16, nodes=2)), far)
        assert slow > 2 * seconds(dp=16, nodes=2)

    def test_more_engines_share_the_work(self) -> None:
        one, four = SAMPLING, replace(SAMPLING, layout=ModelLayout(dp=4))
        assert compute_seconds(one, self.H100) == pytest.approx(4 * compute_seconds(four, self.H100), rel=0.05)
        split = replace(SAMPLING, layout=ModelLayout(tp=4))
        assert compute_seconds(split, self.H100) > compute_seconds(four, self.H100)


class TestPredictions:
    def judged(self, predictor: ProfilePredictor, wanted: StageFeatures) -> tuple[float, str, float, str]:
        found = predictor._estimate(wanted)
        assert found is not None
        judged, error, source = found
        return judged.costs.compute, judged.basis, error, source

    def test_stages_alike_are_the_measure(self) -> None:
        predictor = ProfilePredictor([row(1, 10.0), row(2, 12.0), row(3, 11.0), row(4, 99.0, device="H200")], "H100")
        assert self.judged(predictor, task())[:2] == (11.0, "measured")

    def test_other_amounts_and_layouts_are_scaled_by_their_costs(self) -> None:
        predictor = ProfilePredictor([row(1, 10.0), row(2, 10.0)], "H100")
        twice = replace(TRAINING, prompt_tokens=2 * TRAINING.prompt_tokens, answer_tokens=2 * TRAINING.answer_tokens,
                        logits=2 * TRAINING.logits, steps=32)  # fmt: skip
        compute, basis, _, source = self.judged(predictor, task(work=twice))
        assert (compute, basis) == (pytest.approx(20.0, rel=0.01), "scaled")
        assert "2 runs of other sizes or layouts" in source
        sheet = data_sheet("H100")
        split = replace(TRAINING, layout=ModelLayout(dp=4))
        compute, basis, _, _ = self.judged(predictor, task(work=split))
        assert basis == "scaled"
        assert compute == pytest.approx(10 * compute_seconds(split, sheet) / compute_seconds(TRAINING, sheet))

    def test_of_several_amounts_what_is_the_same_for_any_is_told_apart(self) -> None:
        sheet = data_sheet("H100")
        works = [replace(TRAINING, steps=steps, prompt_tokens=51200 * steps, answer_tokens=0, logits=0)
                 for steps in (1, 2, 4, 16)]  # fmt: skip
        rows = [row(number, 5.0 + 2 * compute_seconds(work, sheet), work=work) for number, work in enumerate(works[:3])]
        compute, basis, _, _ = self.judged(ProfilePredictor(rows, "H100"), task(work=works[3]))
        assert (compute, basis) == (pytest.approx(5.0 + 2 * compute_seconds(works[3], sheet)), "scaled")
        assert _line([1.0, 2.0], [5.0, 4.0])[1] == 0.0, "more never takes less"
        assert _line([1.0, 2.0], [1.0, 5.0])[0] == 0.0

    def test_without_runs_there_is_the_data_sheet_and_without_numbers_nothing(self) -> None:
        predictor = ProfilePredictor([row(1, device="A100")], "H100")
        compute, basis, error, source = self.judged(predictor, task())
        assert (compute, basis) == (compute_seconds(TRAINING, data_sheet("H100")), "analytic")
        assert error == ASSUMED_ERRORS["analytic"]
        assert "NVIDIA H100 Tensor Core GPU data sheet" in source
        assert "error is assumed" in source
        made = task(stage="value-head", work=None, bytes=10**11)
        found = predictor._estimate(made)
        assert found is not None
        assert found[0].costs.load > 10
        light = task(stage="pairs", work=None, rows=1000)
        assert self.judged(predictor, light)[1] == "analytic"
        assert predictor._estimate(replace(light, rows=None)) is None

    def test_light_stages_of_another_processor_are_no_measure(self) -> None:
        light = {"stage": "pairs", "variant": "", "work": None}
        rows = [row(1, device="AMD EPYC", **light, rows=1000)]
        wanted = task(**light, rows=1000, device="AMD EPYC")
        assert self.judged(ProfilePredictor(rows, "H100"), wanted)[:2] == (10.0, "measured")
        assert self.judged(ProfilePredictor(rows, "H100"), replace(wanted, device=""))[:2] == (10.0, "scaled")

    def test_the_error_is_what_leaving_one_out_shows(self) -> None:
        seconds = [10.0, 12.0, 14.0, 8.0]
        predictor = ProfilePredictor([row(number, value) for number, value in enumerate(seconds)], "H100")
        shares = []
        for number, value in enumerate(seconds):
            others = sorted(seconds[:number] + seconds[number + 1 :])
            shares.append((6 + value) / (6 + others[1]) - 1)
        expected = math.sqrt(sum(share**2 for share in shares) / len(shares))
        assert self.judged(predictor, task())[2] == pytest.approx(expected)
        few = ProfilePredictor([row(1, 10.0), row(2, 20.0)], "H100")
        assert self.judged(few, task())[2] == ASSUMED_ERRORS["measured"]

    def test_what_was_loaded_already_says_nothing_of_loading(self) -> None:
        cold, warm = row(1, load=30.0), row(2, load=0.1, loaded=False, expected=False)
        predictor = ProfilePredictor([cold, warm], "H100")
        loads = [predictor._estimate(task(loaded=loaded))[0].costs.load for loaded in (True, False)]  # type: ignore[index]
        assert loads == [30.0, 0.1]
        only_warm = ProfilePredictor([warm], "H100")._estimate(task(loaded=True))
        assert only_warm is not None
        assert only_warm[0].costs.load > 10
        assert only_warm[0].basis == "scaled"

    def test_a_job_has_its_own_queue_processes_and_where_it_is_an_array_another_that_publishes(self) -> None:
        job = {"executor": "slurm"}
        rows = [
            row(1, queue=90.0, finish=0.2, start=8.0, **job),
            row(2, stage="generation", variant="vllm", work=SAMPLING, queue=30.0, finish=45.0, **job),
            row(3, stage="pairs", variant="", work=None, rows=9, queue=20.0, finish=0.1, **job),
            row(4, queue=500.0, start=500.0, **job),  # of an earlier version
            row(5, start=3.0),
        ]
        predictor = ProfilePredictor(rows, "H100")
        asked = task(executor="slurm", first=True)
        assert (predictor._queue(asked), predictor._queue(task(stage="sft", **job))) == (90.0, 30.0)
        assert predictor._finish(asked) == 45.0, "that of an array, whose job is the same"
        judged = predictor._estimate(asked)
        assert judged is not None
        assert (judged[0].costs.start, judged[0].basis) == (8.0, "measured")
        nobody = ProfilePredictor(rows[4:], "H100")
        assert (nobody._queue(asked), nobody._finish(asked)) == (QUEUE_SECONDS, FINISH_SECONDS)
        known = nobody._estimate(asked)
        assert known is not None
        assert known[0].basis == "scaled", "no job has shown how it starts"

    def test_several_processes_import_anew_and_share_the_cores(self) -> None:
        rows = [row(1, start=6.0, first=True), row(2, start=0.5), row(3, start=0.5)]
        four = replace(TRAINING, layout=ModelLayout(dp=4))

        def start(work: Operations, rows: list[Profile]) -> float:
            found = ProfilePredictor(rows, "H100", cores=2)._estimate(task(work=work))
            assert found is not None
            return found[0].costs.start

        assert start(TRAINING, rows) == 0.5
        assert start(four, rows) == 2 * 6.0
        assert start(four, [*rows, row(4, start=9.0, work=four)]) == 9.0


SECONDS = {"prepare": 0.1, "import": 0.4, "load": 2.0, "compute": 10.0, "save": 0.5, "check": 0.2, "total": 14.0}


class TestTimes:
    """Where a stage's time went, by its manifest and by what its supervisors saw."""

    def test_all_of_it_is_somewhere(self) -> None:
        spent = _spent(SECONDS, Timing(queue=0.3, life=15.0, lag=0.1), copies=1, here=True)
        assert spent is not None
        assert spent["start"] == pytest.approx(0.3 + 1.0 + 0.5)
        assert spent["compute"] == pytest.approx(10.8), "what nothing else was measured for is counted as computing"
        assert sum(spent.values()) == pytest.approx(0.3 + 15.0 + 0.1)
        queued = _spent(SECONDS, Timing(queue=60.0, life=15.0, lag=0.1), copies=1, here=False)
        assert queued is not None
        assert queued["queue"] == 60.0
        assert queued["start"] == pytest.approx(1.5)

    def test_waiting_for_a_stage_that_it_follows_is_apart(self) -> None:
        followed = {**SECONDS, "wait": 5.0, "total": 19.0}
        spent = _spent(followed, Timing(queue=0.0, life=19.0, lag=0.0), copies=1, here=True)
        assert spent is not None
        assert (spent["wait"], spent["compute"]) == (5.0, pytest.approx(10.8))

    def test_copies_share_what_they_measured_together(self) -> None:
        four = {**SECONDS, "load": 8.0, "compute": 36.0, "save": 0.4, "total": 13.0}
        spent = _spent(four, Timing(queue=0.0, life=13.0, lag=0.0), copies=4, here=True)
        assert spent is not None
        assert spent["load"] == 2.0
        assert 9.0 <= spent["compute"] <= 11.0
        tasks = _spent(four, Timing(queue=30.0, life=100.0, lag=1.0, tasks=4), copies=1, here=False)
        assert tasks is not None
        assert (tasks["load"], tasks["compute"]) == (2.0, 9.0)
        assert tasks["finish"] == 1.0
        assert sum(tasks.values()) == pytest.approx(30.0 + 100.0 + 1.0)

    def test_what_a_killed_attempt_had_made_is_not_counted_as_fast(self) -> None:
        assert _spent({**SECONDS, "total": 6.0}, Timing(queue=0.0, life=6.0, lag=0.0), copies=1, here=True) is None

    def test_the_files_of_all_supervisors_are_read(self, tmp_path: Path, smallest: Path) -> None:
        config = load_run_config(str(smallest), [])
        graph = placed_graph(config, 1)
        attempt = tmp_path / "attempt-1"
        now = time.time()
        for name, start, end in (("task-0", 5, 20), ("task-1", 8, 30), ("publisher", 30, 33)):
            (attempt / name).mkdir(parents=True)
            (attempt / name / "exit.json").write_text(
                json.dumps({"code": 0, "started": now + start, "ended": now + end})
            )
        request = AttemptRequest(
            argv=[], environment={"OMP_NUM_THREADS": "3"}, unset=[], directory="", run="", driver=None
        )
        (attempt / REQUEST).write_bytes(msgspec.json.encode(request))
        (attempt / DECISION).write_bytes(b"{}")
        os.utime(attempt / REQUEST, (now, now))
        timing = timing_of(graph.nodes["iteration-001/generation"], graph, attempt, now + 34)
        assert timing is not None
        assert (timing.tasks, timing.threads) == (2, 3)
        seen = (timing.queue, timing.life, timing.lag)
        assert seen == (pytest.approx(5, abs=0.01), pytest.approx(25), pytest.approx(4, abs=0.01))
        assert timing.is_array, "the last of them has published what the others made"
        (attempt / "task-1" / "exit.json").write_text("torn")
        assert timing_of(graph.nodes["iteration-001/generation"], graph, attempt, now + 34) is None


@pytest.mark.slow
def test_what_a_run_took_is_found_again_in_its_directory(finished_run: FinishedRun) -> None:
    run = RunDirectory.existing(finished_run.path)
    rows = {found.id: found for found in profiles_of(run)}
    published = {event.stage: event.seconds for event in run.events() if isinstance(event, StagePublished)}
    manifests = {name: Artifact.open(run.path / name).manifest for name in published}
    assert rows.keys() == {manifest.checksum[:32] for manifest in manifests.values()}
    for name, manifest in manifests.items():
        found = rows[manifest.checksum[:32]]
        assert found.seconds == pytest.approx(published[name], abs=0.2), name
        assert found.stage == manifest.stage
        assert found.memory is not None
        assert found.cpu is not None
    sampled = next(found for found in rows.values() if found.role == "generation")
    assert sampled.work is not None
    assert sampled.work.sequences == sampled.counts["completions"] == 48


@pytest.mark.slow
def test_every_stage_of_a_run_is_predicted(finished_run: FinishedRun) -> None:
    run = RunDirectory.existing(finished_run.path)
    graph = placed_graph(run.config, 3)
    predictor = predictor_for(run.config, stored=False)
    found = {name: predictor.predict(node, graph) for name, node in graph.nodes.items()}
    assert all(found.values())
    by_basis = {name: prediction.basis for name, prediction in found.items() if prediction is not None}
    assert by_basis["iteration-003/training"] == "measured"
    rows = profiles_of(run)
    trained = sorted(row.compute for row in rows if row.role == "training")
    prediction = found["iteration-003/training"]
    assert prediction is not None
    assert trained[0] <= prediction.compute <= trained[-1]
    longer = placed_graph(run.config.model_copy(update={"generation": _longer(run)}), 3)
    other = predictor.predict(longer.nodes["iteration-003/generation"], longer)
    same = found["iteration-003/generation"]
    assert other is not None
    assert same is not None
    assert (other.basis, same.basis) == ("scaled", "measured")


def _longer(run: RunDirectory) -> object:
    return run.config.generation.model_copy(update={"max_new_tokens": 2 * run.config.generation.max_new_tokens})


def test_a_run_that_is_not_there_yet_is_predicted_by_data_sheets(smallest: Path) -> None:
    config = load_run_config(str(smallest), [])
    graph = placed_graph(config, 2)
    predictor = predictor_for(config, device="H100-SXM", stored=False)
    for name, node in graph.nodes.items():
        prediction = predictor.predict(node, graph)
        assert prediction is not None, name
        assert prediction.basis == "analytic"
        assert prediction.seconds > 0


def test_stages_are_added_as_they_are_published_and_once(tmp_path: Path) -> None:
    config = write_pretended(tmp_path, executor={"kind": "inline"})
    environment = {**os.environ, "RATCHET_PROFILES": str(tmp_path / "profiles")}
    result = pipeline("run", str(config), "--iters", "1", env=environment)
    assert result.returncode == 0, result.stderr
    run = RunDirectory.existing(tmp_path / "runs" / "pretended")
    stages = [event.stage for event in run.events() if isinstance(event, StagePublished)]
    rows = ProfileStore(tmp_path / "profiles").read()
    assert len(rows) == len(stages)
    pipeline("run", str(config), "--iters", "1", env=environment)
    assert len(ProfileStore(tmp_path / "profiles").read()) == len(stages)
    assert {found.id for found in profiles_of(run)} == {found.id for found in rows}


def test_a_store_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    config = write_pretended(tmp_path, executor={"kind": "inline"})
    (tmp_path / "profiles").write_text("in the way")
    environment = {**os.environ, "RATCHET_PROFILES": str(tmp_path / "profiles")}
    result = pipeline("run", str(config), "--iters", "0", env=environment)
    assert result.returncode == 0, result.stderr
    events = RunDirectory.existing(tmp_path / "runs" / "pretended").events()
    assert [event.listener for event in events if isinstance(event, ListenerFailed)] == ["profiles"]


def test_what_stages_took_is_listed(pretended_run: Path, tmp_path: Path) -> None:
    listed = pipeline("profile", "list", str(pretended_run), "--json")
    rows = json.loads(listed.stdout)["profiles"]
    assert {found["role"] for found in rows} >= {"generation", "reward", "evaluation"}
    assert "generation transformers" in pipeline("profile", "list", str(pretended_run), "--plain").stdout
    nothing = pipeline("profile", "list", env={**os.environ, "RATCHET_PROFILES": str(tmp_path)})
    assert nothing.returncode == 2
    assert "there are no profiles" in nothing.stderr


@pytest.mark.slow
def test_a_short_run_fills_in_what_no_run_has_shown(tmp_path: Path) -> None:
    environment = {**os.environ, "RATCHET_PROFILES": str(tmp_path / "profiles"), "RATCHET_HOME": str(tmp_path / "home")}
    config = write_pretended(tmp_path, executor={"kind": "inline"})
    before = pipeline("profile", str(config), "--list", "--json", env=environment)
    assert before.returncode == 0, before.stderr
    known = json.loads(before.stdout)
    assert {group["basis"] for group in known["stages"]} <= {"", "analytic"}
    assert "prompts.per_iteration=12" in known["short_run"], "no more than the run itself has"
    filled = pipeline("profile", str(config), "--prompts", "8", "--json", env=environment)
    assert filled.returncode == 0, filled.stderr
    after = {name: group for group in json.loads(filled.stdout)["stages"] for name in group["stages"]}
    assert {group["basis"] for group in after.values()} == {"measured", "scaled"}
    assert not any(group["is_hole"] for group in after.values())
    assert list((tmp_path / "home" / "profiling").iterdir()) == [], "the short run is gone"
    assert not (tmp_path / "runs").exists(), "the run itself has not begun"
    again = pipeline("profile", str(config), env=environment)
    assert "Runs have shown how long all of these take." in again.stdout
    off = pipeline("profile", str(config), env={**environment, "RATCHET_PROFILES": "off"})
    assert off.returncode == 2
    assert "no profiles are kept" in off.stderr


@pytest.mark.slow
def test_jobs_of_a_detached_run_add_what_they_took(tmp_path: Path, fake_cluster: Slurm) -> None:
    run = SlurmRun.pretended(tmp_path, fake_cluster)
    run.environment["RATCHET_PROFILES"] = str(tmp_path / "profiles")
    run.detach(iterations=0)
    run.wait()
    rows = ProfileStore(tmp_path / "profiles").read()
    assert {found.id for found in rows} == {found.id for found in profiles_of(RunDirectory.existing(run.path))}
    assert {found.executor for found in rows} == {"slurm"}
    assert all(found.finish is not None for found in rows)
    assert min(found.finish or 0 for found in rows if found.role == "heldout/generation") > 0, "it has a job more"
    assert {found.role for found in rows} >= {"heldout/generation", "evaluation"}
    # Jobs are submitted at once and wait for each other, which is no time in a queue.
    events = RunDirectory.existing(run.path).events()
    whole = max(event.time for event in events) - min(event.time for event in events)
    assert sum(found.queue for found in rows) < whole
