"""`pipeline doctor`: each kind of fault is found and named with its fix, whatever else is wrong."""

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forked import run_forked

from pipelines.config.load import load_run_config
from pipelines.doctor import checks, machine
from pipelines.doctor.checks import at_once
from pipelines.doctor.machine import check_file_system, mount_of
from pipelines.environments.locked import interpreter
from pipelines.graph import Placement
from pipelines.iteration import build_graph
from pipelines.main import main

Found = list[dict[str, Any]]


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("warm_asking")]


NEW = 'exec "$@"'


def doctor(*arguments: object, shell: str | None = None, **variables: str) -> Found:
    """The findings of the command.

    Args:
        shell: the command that starts it, in "$@", in a new process; if it mounts, with its own network.
    """
    environment = {**os.environ, **variables}
    command = ["doctor", *map(str, arguments), "--json"]
    if shell is None:
        result = run_forked("pipelines", *command, env=environment, timeout=300)
    else:
        start = ["unshare", "--map-root-user", "--mount", "--net"] if "mount " in shell else []
        command = [*start, "bash", "-ec", shell, "bash", sys.executable, "-m", "pipelines", *command]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode in (0, 2), result.stderr
    found: Found = json.loads(result.stdout)
    assert result.returncode == (2 if any(finding["level"] == "error" for finding in found) else 0)
    return found


def one(found: Found, text: str) -> dict[str, Any]:
    """The only finding that says `text`."""
    (finding,) = [finding for finding in found if text in finding["found"]]
    return finding


def reported(found: Found, level: str, text: str, fix: str) -> None:
    """Check that one finding says `text` at `level`, and how to fix it."""
    finding = one(found, text)
    assert finding["level"] == level
    assert fix in (finding["fix"] or finding["found"])


def bad(found: Found) -> list[str]:
    """What is not ok."""
    return [finding["found"] for finding in found if finding["level"] != "ok"]


def test_a_run_that_can_start(smallest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(smallest), "--iters", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines[:-1]} <= {"ok", "warning", "→"}  # of a small machine it may warn
    text = "\n".join(lines)
    for expected in (
        "configuration: ",
        "25 stages in 1 iteration",
        "environments: annotation, locked, ",
        "torch ",
        "devices: ",
        "processors: ",
        "memory: iteration-001/training: about ",
        "memory: setup/reward-model/generation, ",
        "models: made by stages of the run, and not checked: setup/world",
        "models: max_new_tokens=12: within the policy's context of 128 tokens",
        "disk: 25 stages will write about ",
        "inodes are free",
        "file system: the run's directory (",
        "file system: RATCHET_HOME (",
        "tokens: the configuration holds no access token",
        "network: processes can listen",
        "limits: a process may open",
    ):
        assert expected in text
    assert lines[-1].startswith("0 errors, ")
    assert lines[-1].endswith("Nothing that would stop the run was found.")
    left = {path.name for path in smallest.parent.iterdir()} - {"__pycache__"}  # of the rules that were tried
    assert left == {"rules.py", "smallest.yaml"}


def test_a_wrong_configuration_is_reported_as_by_run(smallest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["training.settings.bta=0.2"], ["--iters", "-1"], ["policy=hf:no/such/name"]):
        assert main(["doctor", str(smallest), *arguments]) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith("error: ")
    assert main(["doctor", str(smallest.parent / "nothing.yaml")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_all_mistakes_are_told_at_once(smallest: Path) -> None:
    found = doctor(
        smallest,
        "policy=models/nowhere",
        "prompts.train.source=nowhere.jsonl",
        "scorers.gold.function=embedded.reviews:nothere",
        "generation.max_new_tokens=200",
    )
    for text in (
        "models/nowhere does not exist. Give a path",
        "nowhere.jsonl does not exist. Give a path",
        "has no function 'nothere'",
    ):
        assert one(found, text)["level"] == "error"
    assert {finding["check"] for finding in found} >= {"disk", "environments", "file system", "limits", "network"}


def test_environments_that_are_not_built(smallest: Path) -> None:
    found = doctor(smallest, shell=NEW, RATCHET_HOME=str(smallest.parent / "home"))
    for name in ("annotation", "generation", "training"):
        reported(found, "error", f"environment of {name} is not built", f"pipeline env sync {name}")
    assert one(found, "stages will write about")["level"] == "ok"


def test_an_environment_that_lacks_libraries(smallest: Path) -> None:
    overrides = [f"environments.{name}.python={sys.executable}" for name in ("generation", "training")]
    found = doctor(smallest, *overrides, "generation.engine=vllm")
    reported(found, "error", f"generation, your own ({sys.executable}), lacks torch, transformers, vllm", "configs/")
    reported(
        found, "error", f"training, your own ({sys.executable}), lacks torch, transformers, accelerate", "configs/"
    )


def fake_gpus(folder: Path, free: int) -> str:
    """A PATH with an nvidia-smi that lists two GPUs of 80 GiB."""
    program = folder / "bin" / "nvidia-smi"
    program.parent.mkdir()
    rows = "".join(f"{index}, GPU-{index}aaa, 81920, {free}, NVIDIA Test\\n" for index in range(2))
    listed = "".join(f"GPU {index}: NVIDIA Test (UUID: GPU-{index}aaa)\\n" for index in range(2))
    program.write_text(f'#!/bin/sh\nif [ "$1" = -L ]; then printf "{listed}"; else printf "{rows}"; fi\n')
    program.chmod(0o755)
    return f"{program.parent}{os.pathsep}{os.environ['PATH']}"


def test_gpus_that_torch_does_not_see(smallest: Path) -> None:
    names = ("generation", "annotation", "training")
    own = [f"environments.{name}.python={interpreter(name, 'cpu')}" for name in names]
    variables = {"PATH": fake_gpus(smallest.parent, 70000), "RATCHET_VARIANT": "", "CUDA_VISIBLE_DEVICES": "0,1,7"}
    found = doctor(smallest, *own, "executor.parallel=3", **variables)
    one(found, "3 GPUs: NVIDIA Test (68.4 GiB of 80.0 GiB free), NVIDIA Test (68.4 GiB of 80.0 GiB free)")
    reported(found, "error", "CUDA_VISIBLE_DEVICES names 3 GPUs, but nvidia-smi has 2", "nvidia-smi -L")
    for name in names:
        reported(found, "error", f"of {name} sees 0 GPUs, the driver 3", "RATCHET_VARIANT=cpu")
    reported(found, "warning", "another process has memory of a GPU", "CUDA_VISIBLE_DEVICES")
    reported(found, "warning", "every stage uses all GPUs", "executor.parallel=1")
    assert " of 68.4 GiB" in one(found, "iteration-001/training, iteration-002/training and 1 more: about")["found"]


def test_the_gpu_variant_without_a_gpu(smallest: Path) -> None:
    own = [
        f"environments.{name}.python={interpreter(name, 'cpu')}" for name in ("generation", "annotation", "training")
    ]
    variables = {"RATCHET_VARIANT": "gpu", "CUDA_VISIBLE_DEVICES": ""}
    reported(
        doctor(smallest, *own, **variables), "warning", "of training sees 0 GPUs, the driver 0", "right on a login node"
    )


def test_more_threads_than_cores(smallest: Path) -> None:
    found = doctor(smallest, "executor.parallel=2", OMP_NUM_THREADS="512")
    reported(found, "warning", "more threads than cores", "Set OMP_NUM_THREADS=")


def test_models_that_do_not_fit_the_memory(smallest: Path) -> None:
    found = doctor(smallest, "world.hidden_size=32768", "world.layers=80")
    reported(found, "error", "iteration-001/training, iteration-002/training and 1 more: about", "parallel.zero=3")
    assert "its weights and their state alone do not fit" in one(found, "iteration-002/training and 1 more: ")["found"]
    reported(found, "error", "stages will write about", "directory=PATH")


def test_activations_that_may_not_fit(smallest: Path) -> None:
    batch = ("training.global_batch=4000000", "training.micro_batch_tokens=400000000")
    reported(doctor(smallest, *batch), "warning", "may not fit", "micro_batch_tokens")


def test_stages_at_once_do_not_wait_for_each_other(smallest: Path) -> None:
    graph = build_graph(load_run_config(smallest, []), 2)
    needs = dict.fromkeys(graph.nodes, 10) | {"iteration-001/training": 100, "iteration-002/training": 90}
    assert at_once(needs, graph, 1) == ["iteration-001/training"]
    # Neither the second training, which waits for the first, nor anything that the first waits for.
    assert at_once(needs, graph, 2) == ["iteration-001/training", "iteration-000/heldout/generation"]


# Models.


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_each_fault_of_a_model(smallest: Path, world: Path) -> None:
    def spoiled(name: str) -> Path:
        return Path(shutil.copytree(world, smallest.parent / name))

    template = spoiled("template")
    (template / "chat_template.jinja").unlink()
    turn = spoiled("turn")
    edit(turn / "generation_config.json", eos_token_id=[4])
    edit(turn / "tokenizer_config.json", eos_token="<system>")
    turn_template = (turn / "chat_template.jinja").read_text().replace("{{ eos_token }}", "</s>")
    (turn / "chat_template.jinja").write_text(turn_template)
    beyond = spoiled("beyond")
    edit(beyond / "tokenizer_config.json", eos_token="<|unknown|>")
    pickled = spoiled("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    code = spoiled("code")
    edit(code / "config.json", model_type="its_own", auto_map={"AutoConfig": "its_own.Config"})
    paths = {"turn": turn, "beyond": beyond, "code": code, "pickled": pickled}
    scorers = [f"scorers.{name}={{kind: logprobs, model: {path}}}" for name, path in paths.items()]
    found = doctor(
        smallest, f"policy={template}", "sft=null", "reward_model=null", f"scorers.reward.model={world}", *scorers
    )
    reported(found, "error", f"the tokenizer of {template} has no chat template", "chat_template.jinja")
    reported(found, "error", f"reward model {world} is a LlamaForCausalLM with no classifier", "num_labels=1")
    reported(found, "error", f"{turn}: its chat template ends an assistant's turn with '</s>'", "eos_token_id")
    reported(found, "error", f"{beyond}: its tokenizer has", "resize_token_embeddings")
    reported(found, "error", f"{pickled} has no *.safetensors", "save_pretrained")
    reported(found, "error", f"{code}: it needs its own code", "never run")


def test_a_policy_that_is_right_and_lengths_that_are_not(smallest: Path, world: Path) -> None:
    arguments = [f"policy={world}", "sft=null", "generation.max_prompt_tokens=60"]
    found = doctor(smallest, *arguments, "training.max_length=40")
    one(found, f"{world}: an assistant's turn ends with '</s>', EOS")
    one(found, "max_prompt_tokens=60 and max_new_tokens=12: within the policy's context of 128 tokens")
    reported(found, "warning", "max_length=40 of a training is less than the 72 tokens", "Raise max_length")
    assert len(bad(found)) == 1
    found = doctor(smallest, *arguments, "generation.max_new_tokens=100", "training.parallel.tp=3")
    reported(found, "error", "prompt and answer together is 160 tokens, but the context", "Lower it")
    # Also of models that a stage of the run makes from it: the second iteration's.
    reported(found, "error", "parallel.tp · sp is 3, which does not divide num_attention_heads (2)", "to a divisor")
    found = doctor(smallest, "generation.max_prompt_tokens=60", "generation.max_new_tokens=100")
    reported(found, "error", "more than the policy's context of 128 tokens", "Lower them")


def test_a_system_message_that_the_template_refuses(smallest: Path, world: Path) -> None:
    model = Path(shutil.copytree(world, smallest.parent / "model"))
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    path = model / "chat_template.jinja"
    path.write_text(refusal + path.read_text())
    found = doctor(
        smallest,
        f"policy={model}",
        "sft=null",
        "prompts.train.system=Be brief",
        "reward_model=null",
        "scorers.reward={kind: rule, function: embedded.reviews:well_formed}",
    )
    reported(found, "error", "no system role", "Use conversations with the roles")


def test_models_of_the_hub(smallest: Path, world: Path) -> None:
    """In new processes, because the Hub's library reads its variables when it is imported."""
    cache = smallest.parent / "cache"
    folder = cache / "models--maker--model"
    shutil.copytree(world, folder / "snapshots" / "0123")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123")
    variables = {"HF_HUB_CACHE": str(cache), "HF_TOKEN": "", "HF_TOKEN_PATH": str(cache / "token")}
    found = doctor(smallest, "policy=hf:maker/model", "sft=null", shell=NEW, **variables)
    one(found, f"{folder / 'snapshots' / '0123'}: an assistant's turn ends with")
    remote = ("policy=hf:maker/other", "sft=null")
    found = doctor(smallest, *remote, shell=NEW, **variables)
    assert one(found, "hf:maker/other is not in the local cache")["level"] == "ok"
    reported(found, "warning", "no token of the Hugging Face Hub", "HF_TOKEN")
    variables |= {"HF_TOKEN": "hf_" + "a" * 34, "HF_HUB_OFFLINE": "1"}
    found = doctor(smallest, *remote, shell=NEW, **variables)
    reported(found, "error", "forbids the Hub", "HF_HUB_OFFLINE")
    assert one(found, "there is a token of the Hugging Face Hub")["level"] == "ok"
    assert "hf_aaaa" not in json.dumps(found)


# The machine.

needs_namespaces = pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(
        ["unshare", "--map-root-user", "--mount", "--net", "bash", "-c", "mount -t tmpfs tmpfs /tmp"],
        capture_output=True,
        check=False,
    ).returncode
    != 0,
    reason="THIS MACHINE ALLOWS NO NAMESPACES (unshare --map-root-user --mount --net): NOT TESTED",
)


@needs_namespaces
def test_a_machine_with_little_of_everything(smallest: Path) -> None:
    """A small disk, little shared memory, and no loopback: what that means depends on the run."""
    runs = smallest.parent / "runs"
    runs.mkdir()

    def mounted(disk: str) -> str:
        return f'mount -t tmpfs -o {disk}; mount -t tmpfs -o size=64m tmpfs /dev/shm; exec "$@"'

    found = doctor(smallest, shell=mounted(f"size=1m,nr_inodes=50 tmpfs '{runs}'"))
    reported(found, "error", "stages will write about", "directory=PATH")
    reported(found, "warning", "inodes are free in", "directory=PATH")
    reported(found, "warning", "no stage of this run needs it", "ip link set lo up")
    assert "/dev/shm" not in json.dumps(found)
    needs = ("training.parallel.dp=2", "generation.engine=vllm", "generation.servers=2")
    full = f"size=64k tmpfs '{runs}'; cat /dev/zero > '{runs}/full' || true"
    found = doctor(smallest, *needs, shell=mounted(full))
    reported(found, "error", "stages will write about", "Free some space")
    assert any("No space left" in text for text in bad(found))
    reported(found, "error", "setup/reward-model/generation (servers=2) needs it", "ip link set lo up")
    reported(found, "warning", "64 MiB of shared memory (/dev/shm) for stages of up to 2 processes", "--shm-size")


def test_few_open_files(smallest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (512, 4096))
    (finding,) = machine.check_limits(1)
    assert finding.level == "warning"
    assert finding.fix is not None
    assert "ulimit -n" in finding.fix


def test_a_file_system_with_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trouble() -> dict[str, str]:
        found = check_file_system("the run's directory", tmp_path / "not" / "there")
        return {finding.level: f"{finding.found} {finding.fix}" for finding in found}

    assert list(trouble()) == ["ok"]
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", lambda *_: None)
        assert "locking: another process does not see it Put the run's directory on a local disk" in trouble()["error"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse)
        assert "hard links: Operation not permitted Nothing has to be done" in trouble()["warning"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        assert "renaming a directory: Operation not permitted" in trouble()["error"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        assert "replacing a file: Operation not permitted" in trouble()["error"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        assert "flushing: Operation not permitted" in trouble()["error"]
    with monkeypatch.context() as patch:
        now = time.time()
        patch.setattr(time, "time", lambda: now - 100)
        assert "clock: it is +" in trouble()["warning"]
    assert list(tmp_path.iterdir()) == []


def refuse(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_types_of_file_systems() -> None:
    mounts = (
        "/dev/sda1 / ext4 rw 0 0\n"
        "server:/export /data nfs4 rw,vers=4.2,local_lock=none 0 0\n"
        "ost@tcp:/scratch /data/big\\040data lustre rw,localflock 0 0\n"
    )
    assert mount_of(Path("/srv/x"), mounts) == ("ext4", ["rw"])
    assert mount_of(Path("/data/me/runs"), mounts)[0] == "nfs4"
    assert mount_of(Path("/database"), mounts)[0] == "ext4"
    assert mount_of(Path("/data/big data/runs"), mounts) == ("lustre", ["rw", "localflock"])


def test_locks_of_one_machine_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "mount_of", lambda *_: ("lustre", ["rw", "localflock"]))
    (finding,) = check_file_system("RATCHET_HOME", tmp_path)
    assert finding.level == "warning"
    assert "lustre) is mounted with localflock" in finding.found
    assert finding.fix is not None
    assert "two machines at once" in finding.fix
    monkeypatch.setattr(machine, "mount_of", lambda *_: ("nfs4", ["rw"]))
    (finding,) = check_file_system("RATCHET_HOME", tmp_path)
    assert finding.level == "ok"
    assert "is nfs4, a network file system" in finding.found


def test_a_kill_leaves_nothing(smallest: Path) -> None:
    command = [sys.executable, "-m", "pipelines", "doctor", str(smallest)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list(smallest.parent.glob(".ratchet-doctor-*")) and process.poll() is None:
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) in (0, 128 + signal.SIGTERM)
    left = {path.name for path in smallest.parent.iterdir()} - {"__pycache__"}  # of the rules that were tried
    assert left == {"rules.py", "smallest.yaml"}


# Access tokens.


@pytest.mark.parametrize(
    ("key", "value", "wrap"),
    [
        ("environments.training.variables.HF_TOKEN", "hf_" + "b" * 34, "{}"),
        ("environments.training.variables.SOME_SERVICE", "sk-" + "c1" * 20, "{}"),
        ("environments.training.variables.TRACKER_KEY", "01234abcde" * 4, "{}"),
        ("environments.training.prologue", "0123abcdef" * 4, "export TRACKER_API_KEY='{}'"),
        ("generation.seed_token", "0123abcdef" * 4, "{}"),
        ("hf_" + "d" * 34, "", "{}"),
    ],
)
def test_a_token_in_the_configuration(
    smallest: Path, capsys: pytest.CaptureFixture[str], key: str, value: str, wrap: str
) -> None:
    assert main(["doctor", str(smallest), f"{key}={wrap.format(value)}" if value else key]) == 2
    output = capsys.readouterr()
    assert (value or key) not in output.out + output.err
    if value and not key.startswith("generation."):
        said = " ".join((output.out + output.err).split())
        assert f"the value of {key!r} looks like" in said
        assert "export NAME=" in said


def test_a_revision_is_no_token_and_a_trackers_key_is_not_shown(smallest: Path) -> None:
    found = doctor(smallest, f"policy=hf:maker/model@{'0123abcdef' * 4}", "sft=null", WANDB_API_KEY="fedcba3210" * 4)
    assert "looks like an access token" not in json.dumps(found)
    one(found, "WANDB_API_KEY is set")
    assert "fedcba3210" not in json.dumps(found)


@pytest.mark.parametrize(("exclusive", "warned"), [(False, True), (True, False)])
def test_stages_at_once_share_gpus_unless_each_has_its_own(
    exclusive: bool, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "gpu_count", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    nodes = {
        name: SimpleNamespace(config=None, placement=Placement("local", (device,), exclusive=exclusive))
        for device, name in enumerate(("generation", "training"))
    }
    plan: Any = SimpleNamespace(parallel=2, graph=SimpleNamespace(nodes=nodes))
    found = " ".join(finding.found for finding in checks.check_processors(plan))
    assert ("every stage uses all GPUs" in found) == warned
