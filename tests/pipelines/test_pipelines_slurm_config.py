"""What a stage asks of Slurm: the config, the defaults, the devices, and what a dry run says and writes."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from contracts.config import Role
from contracts.errors import UserError
from pipelines.config.executor import minutes_of
from pipelines.config.load import load_run_config
from pipelines.config.run import RunConfig
from pipelines.execution.executors.slurm.checks import check_slurm
from pipelines.execution.executors.slurm.resources import (
    Resources,
    device_hours,
    finalizing_resources,
    resources_of,
    submitit_parameters,
)
from pipelines.execution.executors.slurm.scripts import make_executor, script, write_dry_run
from pipelines.execution.executors.slurm.task import FAILED, RETRIED, restart_lines
from pipelines.graph import Graph
from pipelines.iteration import build_graph
from pipelines.machine import gpu_count
from pipelines.main import main
from pipelines.planning.entries import check_entries, choose_variant
from pipelines.planning.placement import placed_graph

TRAINING = "iteration-001/training"
GENERATION = "iteration-001/generation"


@pytest.fixture(autouse=True)
def no_gpus_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has no GPUs, and the user has chosen no variant; what a command sets is undone."""
    monkeypatch.setenv("RATCHET_VARIANT", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def load(path: Path, *overrides: str) -> RunConfig:
    return load_run_config(path, ["executor=slurm", *overrides])


def planned(path: Path, *overrides: str) -> tuple[RunConfig, Graph]:
    config = load(path, *overrides)
    return config, placed_graph(config, 1)


def asked(path: Path, stage: str, *overrides: str) -> Resources:
    config, graph = planned(path, *overrides)
    return resources_of(graph.nodes[stage], config.executor, graph)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90), ("2:00:00", 120), ("02:00:01", 121), ("45:00", 45), ("45:01", 46), ("1-12", 2160),
        ("1-12:30", 2190), ("2-00:00:00", 2880), ("0", 0),
        ("", None), ("1-", None), ("-5", None), ("1:2:3:4", None), ("1-2:3:4:5", None), ("an hour", None),
    ],
)  # fmt: skip
def test_a_time_limit_is_read_as_slurm_reads_it(text: str, minutes: int | None) -> None:
    assert minutes_of(text) == minutes


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("executor.kind=cloud", "'executor.kind' is 'cloud': there is no such executor. Known: inline, local, slurm"),
        ("executor=cloud", "'executor.kind' is 'cloud'"),
        ("executor.resources.time=an hour", "'an hour': it must be a time limit of Slurm"),
        ('executor.resources.time="0"', "more than 0"),
        ("executor.resources.time=0", "more than 0"),
        ("executor.resources.time=true", "'executor.resources.time' is True"),
        ("executor.resources.memory=64", "'executor.resources.memory' is 64"),
        ("executor.resources.memory=64GB", 'number with its unit, for example "64G"'),
        ("executor.resources.nodes=0", "'executor.resources.nodes' is 0"),
        ("executor.resources.gpus=-1", "'executor.resources.gpus' is -1"),
        ("executor.resources.partiton=gpu", "Did you mean 'executor.resources.partition'?"),
        ("executor.resources.directives={array: 0-3}", "array has its own key next to `directives`: set `tasks`"),
        ("executor.resources.directives={mem-per-cpu: 4G}", "set `memory`"),
        ("executor.resources.directives={gpus_per_node: 4}", "set `gpus`"),
        ("executor.resources.directives={--time: 30}", "set `time`"),
        ("executor.resources.directives={no-requeue: true}", "set `requeue`"),
        ("executor.resources.directives={dependency: 'afterok:1'}", "dependency is set by Ratchet itself"),
        ("executor.resources.directives={output: log}", "output is set by Ratchet itself"),
        ("executor.resources.directives={signal: TERM@60}", "signal is set by Ratchet itself"),
        ("executor.resources.directives={gres: 'gpu:a100:2'}", "asks for GPUs, which have keys of their own"),
        ("executor.resources.directives={C: h100}", "'C' is not the long name of an sbatch option"),
        ("executor.stages={generation: {nodes: 2}}", "stages.generation.nodes is 2, but only training stages"),
        ("executor.stages={training: {tasks: 2}}", "stages.training.tasks is 2, but only generation and scoring"),
        ("executor.stages={light: {tasks: 2}}", "stages.light.tasks is 2"),
        ("executor.stages={light: cloud}", "'executor.stages.light.kind' is 'cloud'"),
    ],
)
def test_a_mistake_is_named_with_its_fix(smallest: Path, override: str, complaint: str) -> None:
    with pytest.raises(UserError) as error:
        load_run_config(smallest, [override])
    assert complaint in str(error.value)


def test_a_word_is_short_for_the_kind_and_leaves_the_section_as_it_is(smallest: Path) -> None:
    content = yaml.safe_load(smallest.read_text())
    smallest.write_text(yaml.safe_dump({**content, "executor": "slurm"}))
    assert load_run_config(smallest, []).executor.kind == "slurm"
    config = load_run_config(smallest, ["executor.resources.time=02:00:00", "executor.retries=1"])
    assert (config.executor.kind, config.executor.retries, config.executor.resources.time) == ("slurm", 1, "02:00:00")
    smallest.write_text(yaml.safe_dump({**content, "executor": {"retries": 1, "stages": {"light": "local"}}}))
    config = load_run_config(smallest, ["executor=slurm"])
    assert (config.executor.kind, config.executor.retries) == ("slurm", 1)
    assert config.executor.stages["light"].kind == "local"


def test_later_entries_win_key_by_key_over_earlier_ones_and_the_run_wide(smallest: Path) -> None:
    stages = {
        "generation": {"partition": "gpu", "time": "1:00:00", "directives": {"constraint": "a100"}},
        "iteration-*/generation": {"time": "2:00:00", "directives": {"exclusive": False}},
        TRAINING: {"kind": "local"},
    }
    common = {"partition": "any", "account": "ours", "memory": "9G", "directives": {"exclusive": True, "nice": 5}}
    content = yaml.safe_load(smallest.read_text())
    smallest.write_text(yaml.safe_dump({**content, "executor": {"resources": common, "stages": stages}}))
    found = asked(smallest, GENERATION)
    assert (found.partition, found.account, found.memory, found.minutes) == ("gpu", "ours", "9G", 120)
    assert found.directives == {"constraint": "a100", "nice": 5}
    assert asked(smallest, "iteration-000/heldout/generation").minutes == 120  # * takes in what is below as well
    assert asked(smallest, "setup/reward-model/generation").minutes == 60
    assert asked(smallest, TRAINING).executor == "local"
    light = asked(smallest, "iteration-001/pairs")
    assert (light.partition, light.account, light.memory) == ("any", "ours", "4G")
    last = finalizing_resources(load(smallest).executor)
    assert (last.partition, last.account, last.memory, last.cpus, last.minutes) == ("any", "ours", "4G", 1, 30)


@pytest.mark.parametrize(
    ("overrides", "generation", "scoring", "training", "light"),
    [
        # tasks, nodes, gpus, cpus, minutes, memory
        ((), (4, 1, 0, 1, 240, None), (4, 1, 0, 1, 240, None), (1, 1, 0, 1, 1440, None), (1, 1, 0, 1, 30, "4G")),
        (
            ("executor.resources={gpus: 8, nodes: 2, tasks: 16, cpus: 48, memory: 100G, time: '90'}",),
            (16, 1, 1, 48, 90, "100G"),
            (16, 1, 1, 48, 90, "100G"),
            (1, 2, 8, 48, 90, "100G"),
            (1, 1, 0, 1, 30, "4G"),
        ),
        (
            ("hardware={gpus: 4, gib: 80}", "generation.tensor_parallel=2", "executor.stages={scoring: {gpus: 0}}"),
            (4, 1, 2, 16, 240, None),
            (4, 1, 0, 1, 240, None),
            (1, 1, 4, 32, 1440, None),
            (1, 1, 0, 1, 30, "4G"),
        ),
        (
            ("training.parallel.dp=4", "executor.stages={'iteration-*': {nodes: 2, tasks: 3, memory: 1G}}"),
            (3, 1, 0, 1, 240, "1G"),
            (3, 1, 0, 1, 240, "1G"),
            (1, 2, 0, 2, 1440, "1G"),
            (1, 1, 0, 1, 30, "1G"),
        ),
    ],
)  # fmt: skip
def test_what_each_kind_asks_for(
    smallest: Path,
    overrides: tuple[str, ...],
    generation: tuple[object, ...],
    scoring: tuple[object, ...],
    training: tuple[object, ...],
    light: tuple[object, ...],
) -> None:
    config, graph = planned(smallest, *overrides)
    for stage, kind, expected in (
        (GENERATION, "generation", generation),
        ("iteration-001/reward", "scoring", scoring),
        ("iteration-001/reference", "scoring", scoring),
        (TRAINING, "training", training),
        ("iteration-001/pairs", "light", light),
        ("iteration-001/heldout/gold", "light", light),
    ):
        found = resources_of(graph.nodes[stage], config.executor, graph)
        assert found.kind == kind
        assert (found.tasks, found.nodes, found.gpus, found.cpus, found.minutes, found.memory) == expected, stage


def test_a_rule_asks_for_a_core_for_each_of_its_processes(smallest: Path) -> None:
    assert asked(smallest, "iteration-001/heldout/gold", "scorers.gold.replicas=3").cpus == 3


def test_a_light_stage_with_a_large_model_asks_for_its_memory(smallest: Path, tmp_path: Path) -> None:
    """As estimated, and a quarter more: three fp32 copies of a billion numbers for the mean of policies."""
    model = tmp_path / "large"
    model.mkdir()
    shape = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "vocab_size": 32000,
             "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
             "max_position_embeddings": 2048}  # fmt: skip
    (model / "config.json").write_text(json.dumps(shape))
    overrides = (f"policy={model}", "sft=null", "reference=ema", "reward_model=null",
                 "scorers.reward={kind: rule, function: embedded.reviews:well_formed}")  # fmt: skip
    memory = asked(smallest, "iteration-001/ema", *overrides).memory
    assert memory is not None
    assert 1.2 * 12 * 1.1e9 / 2**30 < int(memory.removesuffix("G")) < 1.5 * 12 * 1.1e9 / 2**30


def test_a_training_is_spread_over_what_it_asks_for(smallest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ("training.parallel.tp=2", "executor.resources.gpus=8", "executor.resources.nodes=2")
    _, graph = planned(smallest, *overrides)
    parallel = graph.nodes[TRAINING].config.model_dump()["parallel"]
    assert (parallel["dp"], parallel["tp"], parallel["nodes"]) == (8, 2, 2)
    assert graph.nodes[GENERATION].config.model_dump()["replicas"] == 1
    _, graph = planned(smallest, "training.parallel.dp=4", "executor.stages={training: {nodes: 2}}",
                       "sft.parallel.dp=2", "reward_model.training.parallel.dp=2")  # fmt: skip
    assert (
        graph.nodes[TRAINING].config.model_dump()["parallel"] | {"dp": 4, "nodes": 2}
        == (graph.nodes[TRAINING].config.model_dump()["parallel"])
    )
    monkeypatch.setenv("RATCHET_VARIANT", "cpu")  # the devices are asked for, but nobody computes on them
    config, graph = planned(smallest, "executor.resources.gpus=8")
    assert graph.nodes[TRAINING].config.model_dump()["parallel"]["dp"] == 1
    assert resources_of(graph.nodes[TRAINING], config.executor).gpus == 8


@pytest.mark.parametrize("gpus_here", ["", "0,1,2"])
def test_the_gpus_of_this_machine_are_for_local_stages(
    smallest: Path, monkeypatch: pytest.MonkeyPatch, gpus_here: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus_here)
    count = gpu_count()
    _, graph = planned(smallest, "executor.stages={generation: local}", "executor.resources.gpus=8")
    assert graph.nodes[TRAINING].config.model_dump()["parallel"]["dp"] == 8
    assert graph.nodes["iteration-001/reference"].config.model_dump()["replicas"] == 1
    assert graph.nodes[GENERATION].config.model_dump()["replicas"] == max(1, count)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (
            ["training.parallel.dp=3", "executor.stages={'*/training': {nodes: 2}, 'setup/*': {nodes: 1}}"],
            "nodes=2 does not divide the 3 processes of parallel (dp=3)",
        ),
        (["executor.resources.nodes=2"], "stage setup/sft: nodes=2 does not divide the 1 processes of parallel (dp=1)"),
        (
            ["training.parallel.dp=16", "executor.resources.gpus=8"],
            "has 16 processes, but the job has 8 GPUs (nodes=1, gpus=8)",
        ),
        (["training.parallel={dp: 4, nodes: 4}", "executor.stages={training: {nodes: 2}}", "sft=null",
          "reward_model=null", "scorers.reward={kind: rule, function: embedded.reviews:well_formed}"],
         "parallel.nodes is 4, but the executor's `nodes` is 2"),
        (["generation.replicas=3"], "set executor.stages.generation.tasks=3"),
        (["scorers.reward.replicas=2"], "set executor.stages.scoring.tasks=2"),
        (
            ["generation.tensor_parallel=4", "executor.stages={generation: {gpus: 2}}"],
            "asks slurm for 2 GPU, but its model takes 4",
        ),
        (["executor=local", "training.parallel={dp: 2, nodes: 2}"], "it runs on this machine alone"),
    ],
)  # fmt: skip
def test_what_cannot_be_placed_is_refused(smallest: Path, overrides: list[str], complaint: str) -> None:
    config = load(smallest, *overrides)
    with pytest.raises(UserError) as error:
        placed_graph(config, 1)
    assert complaint in str(error.value)


def test_where_a_stage_runs_changes_no_key(smallest: Path) -> None:
    here = placed_graph(load_run_config(smallest, []), 1)
    _, there = planned(smallest, "executor.resources={gpus: 4, nodes: 2}", "executor.stages={generation: {tasks: 9}}")
    assert here.nodes.keys() == there.nodes.keys()
    assert here.nodes[TRAINING].config != there.nodes[TRAINING].config
    for name, node in here.nodes.items():
        for role in (Role.IDENTITY, Role.INPUT):
            assert node.config.select(role) == there.nodes[name].config.select(role), name


@pytest.mark.parametrize(
    ("before", "overrides", "after"),
    [
        ("", ["executor.resources.gpus=1"], "gpu"),
        ("auto", ["executor.stages={training: {gpus: 8}}"], "gpu"),
        ("cpu", ["executor.resources.gpus=1"], "cpu"),
        ("", [], "cpu"),
        ("", ["executor.stages={light: local}"], "cpu"),
        ("", ["executor.stages={training: local}"], ""),
        ("", ["executor=local", "executor.resources.gpus=8"], ""),
        ("", ["executor=local", "executor.stages={training: {kind: slurm, gpus: 8}}"], "gpu"),
    ],
)
def test_the_environments_are_those_of_the_nodes(
    smallest: Path, monkeypatch: pytest.MonkeyPatch, before: str, overrides: list[str], after: str
) -> None:
    monkeypatch.setenv("RATCHET_VARIANT", before)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    choose_variant(load(smallest, *overrides).executor)
    assert os.environ["RATCHET_VARIANT"] == after


@pytest.mark.parametrize(
    ("stages", "complaint"),
    [
        ("{generaton: {gpus: 1}}", "no such stage. Did you mean 'generation'"),
        ("{iteration-001/trainng: {gpus: 1}}", "Did you mean 'iteration-001/training'"),
        ("{refrence: {gpus: 1}}", "Did you mean 'reference'"),
        (
            "{'iteration-007/*': {gpus: 1}}",
            "the role or the name of a stage, or a pattern with",
        ),
        ("{'iteration-*/heldout/*': {nodes: 2}}", "only training stages can have `nodes`, and iteration-000/heldout/"),
        ("{'*/pairs': {tasks: 2}}", "only generation and scoring stages can have `tasks`"),
    ],
)
def test_an_entry_for_no_stage_is_refused(smallest: Path, stages: str, complaint: str) -> None:
    config, graph = planned(smallest, f"executor.stages={stages}")
    with pytest.raises(UserError) as error:
        check_entries(graph, config)
    assert complaint in str(error.value)


def test_an_entry_for_a_kind_that_the_run_lacks_is_no_mistake(smallest: Path) -> None:
    config = load(smallest, "executor.stages={training: {nodes: 2, gpus: 1}, 'prompts/*': local, '*': {qos: high}}")
    check_entries(build_graph(config, 0), config)


FULL = Resources(
    "training", "slurm", nodes=2, gpus=8, gpu_type="h100", cpus=64, minutes=600, memory="900G", partition="big",
    account="rlhf", qos="high", setup=("module load cuda", "ulimit -n 65536"),
    directives={"constraint": "ib", "exclusive": True, "mail-type": "END"},
)  # fmt: skip


def test_the_script_says_what_was_asked_for(tmp_path: Path) -> None:
    parameters = submitit_parameters(
        FULL, name="run/training", comment="mark", grace_seconds=20.5, dependency="afterok:7:8",
        begin=12.2,
    )  # fmt: skip
    text = script(make_executor(tmp_path / "jobs", parameters), FULL.tasks)
    lines = {line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert lines == {
        "account=rlhf", "begin=now+13", "comment=mark", "constraint=ib", "cpus-per-task=64", "dependency=afterok:7:8",
        "exclusive", "gpus-per-node=h100:8", "job-name=run/training", "kill-on-invalid-dep=yes", "mail-type=END",
        "mem=900G", "nodes=2", "ntasks-per-node=1", "open-mode=append", "partition=big", "qos=high", "requeue",
        "signal=USR2@81", "time=600", f"output={tmp_path}/jobs/%j_0_log.out",
    }  # fmt: skip
    before, _, command = text.partition("srun ")
    assert before.index("module load cuda\nulimit -n 65536") < before.index("export SUBMITIT_EXECUTOR")
    assert {"--kill-on-bad-exit=1", "--cpus-per-task=64"} <= set(command.split())
    assert not (tmp_path / "jobs").exists()
    assert device_hours(FULL) == 160


def test_an_array_without_gpus_asks_for_none(tmp_path: Path) -> None:
    resources = Resources("generation", "slurm", tasks=300, cpus=2, minutes=60, requeue=False)
    parameters = submitit_parameters(resources, name="a", comment="c", grace_seconds=20)
    text = script(make_executor(tmp_path, parameters), resources.tasks)
    text = "".join(line for line in text.splitlines() if "#SBATCH" in line and "--output" not in line)
    assert "--array=0-299%300" in text
    assert "--no-requeue" in text
    for absent in ("gpu", "gres", "dependency", "kill-on-invalid-dep", "begin", "partition", "--mem", "--requeue"):
        assert absent not in text
    assert device_hours(resources) == 600


DRY = ("--iters", "1", "--dry-run", "executor=slurm", "executor.resources.gpus=2")


def tree(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix != ".pyc" and path.is_file()
    }


def test_a_dry_run_writes_what_would_be_submitted_and_nothing_else(
    smallest: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RATCHET_VARIANT", "cpu")  # the environments that tests have
    monkeypatch.setenv("PATH", "/nowhere")  # no Slurm here
    before = tree(smallest.parent)
    assert main(["run", str(smallest), *DRY, "executor.stages={light: local}"]) == 0
    runs = smallest.parent / "runs"
    assert [path.name for path in runs.iterdir()] == ["smallest.dry-run"]
    folder = runs / "smallest.dry-run"
    assert tree(smallest.parent) - before == {f"runs/smallest.dry-run/{name}" for name in tree(folder)}
    content = json.loads((folder / "graph.json").read_text())
    heavy = [stage for stage in content["stages"] if stage["executor"] == "slurm"]
    numbers = {stage["name"]: number for number, stage in enumerate(content["stages"], start=1)}
    expected = {f"sbatch/{numbers[stage['name']]:03d}-{stage['name'].replace('/', '-')}.sbatch" for stage in heavy}
    arrays = [stage for stage in heavy if stage["kind"] != "training"]
    expected |= {f"sbatch/{numbers[it['name']]:03d}-{it['name'].replace('/', '-')}.finish.sbatch" for it in arrays}
    assert tree(folder) == {"graph.json", "resolved.yaml", *expected}
    # 4 generations and 5 scorings of 4 tasks with one GPU, and 3 trainings of two GPUs.
    assert content["total"] == {"jobs": 9 * 5 + 3, "gpu_hours": 9 * 4 * 4 + 3 * 2 * 24, "cpu_hours": 9 * 0.5}
    assert sum(stage["gpu_hours"] for stage in content["stages"]) == content["total"]["gpu_hours"]
    assert content["stages"][numbers[GENERATION] - 1]["needs"] == ["setup/sft", "prompts/train"]
    assert content["stages"][numbers[GENERATION] - 1]["resources"]["tasks"] == 4
    assert all(stage["resources"] is None for stage in content["stages"] if stage["kind"] == "light")
    printed = capsys.readouterr().out
    assert f"run    {GENERATION}" in printed
    assert "memory, estimated" in printed
    total = next(line for line in printed.splitlines() if "total" in line)
    assert [word for word in total.split() if word[0].isalnum()] == ["total", "12", "48", "288.0", "4.5"]
    assert str(folder) in printed
    assert load_run_config(folder / "resolved.yaml", []) == load_run_config(
        folder / "resolved.yaml", ["executor=slurm"]
    )


def test_a_dry_run_is_fresh_each_time_and_spares_what_is_not_its_own(
    smallest: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RATCHET_VARIANT", "cpu")
    folder = smallest.parent / "runs" / "smallest.dry-run"
    assert main(["run", str(smallest), *DRY]) == 0
    first = tree(folder)
    (folder / "sbatch" / "999-old.sbatch").touch()
    assert main(["run", str(smallest), *DRY]) == 0
    assert tree(folder) == first
    (folder / "run.json").write_text("{}")
    assert main(["run", str(smallest), *DRY]) == 2
    assert "was not created by a dry run" in capsys.readouterr().err
    assert tree(folder) == first | {"run.json"}


def test_a_dry_run_of_a_local_run_writes_nothing(smallest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(smallest), "--iters", "1", "--dry-run", "executor.resources.gpus=2"]) == 0
    assert not (smallest.parent / "runs").exists()
    assert "Slurm" not in capsys.readouterr().out


def test_a_chain_of_jobs_shows_what_each_waits_for(smallest: Path) -> None:
    config, graph = planned(smallest, "executor.resources.gpus=1")
    runs = {name: "new" for name in graph.nodes if name != "setup/sft"}
    write_dry_run(Console(quiet=True), graph, config, runs, detached=True)
    folder = smallest.parent / "runs" / "smallest.dry-run" / "sbatch"

    def dependency(pattern: str) -> str:
        (path,) = folder.glob(pattern)
        lines = [line for line in path.read_text().splitlines() if "--dependency=" in line]
        return lines[0].partition("=")[2].strip("'") if lines else ""

    assert not list(folder.glob("*-setup-sft.*"))
    assert dependency("*-setup-world.sbatch") == ""
    assert dependency("*-iteration-001-generation.sbatch") == "afterok:<job of prompts/train>"
    wanted = "afterok:<job of iteration-001/pairs>:<job of iteration-001/reference>"
    assert dependency("*-iteration-001-training.sbatch") == wanted
    assert dependency("*-iteration-001-training.finish.sbatch") == f"afterany:<work of {TRAINING}>,{wanted}"
    assert not list(folder.glob("*-iteration-001-pairs.finish.sbatch"))
    assert "kill-on-invalid-dep=yes" in next(folder.glob("*-iteration-001-training.sbatch")).read_text()
    start = "\n".join(restart_lines(config.executor.retries, config.executor.backoff_seconds))
    finalizing = {path.name.partition("-")[2] for path in folder.iterdir() if path.read_text().endswith(start)}
    assert {"setup-world.sbatch", "iteration-001-pairs.sbatch", "iteration-001-training.finish.sbatch"} <= finalizing
    assert not finalizing & {"iteration-001-training.sbatch", "iteration-001-generation.sbatch"}


@pytest.mark.parametrize(("code", "starts"), [(0, 1), (2, 1), (FAILED, 1), (RETRIED, 1), (1, 4), (137, 4)])
def test_a_finalizing_job_starts_its_process_again_unless_that_has_finished(
    tmp_path: Path, code: int, starts: int
) -> None:
    path = tmp_path / "job"
    lines = ["set -u", f"echo \"${{RATCHET_ENDED:-}}\" >> '{tmp_path}/starts'", f"(exit {code})", "", "# teardown"]
    path.write_text("\n".join([*lines, *restart_lines(3, 0)]))
    assert subprocess.run(["bash", path], check=False).returncode == code
    assert (tmp_path / "starts").read_text().split("\n")[:-1] == [f" {code}" * number for number in range(starts)]


def make_programs(folder: Path, **answers: str) -> None:
    """Programs named like Slurm's; `answers`: what some of them run."""
    folder.mkdir()
    for name in ("sbatch", "squeue", "sacct", "sinfo", "scancel", "scontrol", "srun"):
        path = folder / name
        path.write_text(f"#!/bin/sh\n{answers.get(name, ':')}\n")
        path.chmod(0o755)


PARTITIONS = "printf 'cpu*|2:00:00\\nbig|infinite\\nshort|30:00\\nmonth|30-00:00:00\\n'"
"""As sinfo prints them."""


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["executor.resources.time='2:00:00'"], None),
        (["executor.resources.partition=big"], None),
        (["executor.resources.partition='month,short'"], None),
        (["executor.resources.qos=long"], None),
        (["executor.stages={generation: local, scoring: local, training: local}"], None),
        ([], "asks for 1440 minutes, but the default partition allows 120 at most"),
        (
            ["executor.resources.partition=short"],
            "but the partition short allows 30 at most. Set `time` to less, for example "
            "executor.stages.training.time=00:30:00",
        ),
        (["executor.resources.partition=gup"], "the partition 'gup' does not exist. Set executor.resources.partition "
         "to one of cpu, big, short, month"),
        (["executor.resources.partition='big,gup'"], "the partition 'gup' does not exist"),
        (["executor.resources.partition=big", "executor.stages={light: {partition: x}}"], "the partition 'x' does not"),
    ],
)  # fmt: skip
def test_a_cluster_that_cannot_run_it_is_named_before_anything_is_submitted(
    smallest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], complaint: str | None
) -> None:
    make_programs(tmp_path / "bin", sinfo=PARTITIONS)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    config, graph = planned(smallest, *overrides)
    if complaint is None:
        check_slurm(config.executor, graph)
        return
    with pytest.raises(UserError) as error:
        check_slurm(config.executor, graph)
    assert complaint in str(error.value)


def test_a_machine_without_slurm_or_its_accounting_is_refused(
    smallest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_programs(tmp_path / "bin", sacct="echo 'Slurm accounting storage is disabled' >&2; exit 1", sinfo=PARTITIONS)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert main(["run", str(smallest), "executor=slurm"]) == 2
    message = capsys.readouterr().err
    assert "Slurm accounting storage is disabled. Ratchet needs Slurm's accounting (slurmdbd)" in message
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin" / "sbatch").unlink()
    assert main(["run", str(smallest), "executor=slurm"]) == 2
    assert "executor is slurm, but sbatch is not on PATH" in capsys.readouterr().err
    assert not (smallest.parent / "runs").exists()


def test_the_keys_of_slurm_and_their_defaults_are_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = capsys.readouterr().out
    for key in ("partition", "account", "qos", "time", "nodes", "gpus", "cpus", "memory", "tasks", "setup"):
        assert f"\n  {key:<22} " in text
    assert "By default 4 hours for generation and scoring, 24 for training, 30 minutes for light stages" in text
