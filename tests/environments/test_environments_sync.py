"""Building environments, by the real command and the real uv."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from environments_checkout import Checkout, make_wheel

pytestmark = pytest.mark.slow


def test_builds_what_is_missing_and_reuses_what_is_there(checkout: Checkout) -> None:
    first = checkout.env("sync")
    assert first.returncode == 0, first.stderr
    assert [f"{name}: ready" in first.stdout for name in ("generation", "annotation", "training")] == [True] * 3
    lock = checkout.path / "configs" / "environments" / "annotation-cpu.txt"
    lock.write_text("# Another comment changes nothing.\n" + lock.read_text())
    second = checkout.env("sync")
    assert second.stdout.count("up to date") == 3
    assert "installing" not in second.stdout
    listing = checkout.env("list").stdout.splitlines()
    assert [line.split()[2] for line in listing] == ["ready"] * 3 + ["not"], (
        "trackers are built where they are asked for"
    )


def test_an_environment_holds_its_lock_and_nothing_of_the_driver(checkout: Checkout) -> None:
    checkout.env("sync", "training")
    python = checkout.env("python", "training").stdout.strip()
    program = (
        "import importlib.metadata as m, sys; print(sorted(d.name for d in m.distributions()));"
        "print([p for p in sys.path if 'site-packages' in p])"
    )
    result = subprocess.run([python, "-I", "-c", program], capture_output=True, text=True, check=True)
    installed, paths = map(eval, result.stdout.splitlines())
    assert installed == ["torch", "transformers", "trl", "vllm"]
    assert len(paths) == 1
    assert paths[0].startswith(str(checkout.home))


def test_another_checkout_with_the_same_lock_uses_the_same_environment(
    checkout: Checkout, root: Path, tmp_path: Path
) -> None:
    checkout.env("sync", "annotation")
    other = Checkout(root, tmp_path / "other", tmp_path)
    result = other.env("sync", "annotation")
    assert "up to date" in result.stdout
    other.write_lock("annotation-cpu", ["torch==1.0"])
    assert "not built" in other.env("list").stdout.splitlines()[1]
    assert other.env("python", "annotation").returncode == 2


def test_a_killed_build_is_built_again(checkout: Checkout) -> None:
    process = checkout.start("sync", "training", SLOW_TORCH="3")
    wait_for(lambda: list(checkout.home.glob("environments/training-*/lib/*/site-packages/trl")))
    process.kill()
    process.communicate()
    assert checkout.env("python", "training").returncode == 2, "half an environment counts as built"
    again = checkout.env("sync", "training")
    assert again.returncode == 0, again.stderr
    assert "training: ready" in again.stdout
    assert checkout.env("python", "training").returncode == 0


def test_two_builders_of_one_environment_do_not_collide(checkout: Checkout) -> None:
    processes = [checkout.start("sync", "training", SLOW_TORCH="2") for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted("waiting" in output for output in outputs) == [False, True], outputs
    assert sorted("training: ready" in output for output in outputs) == [False, True], outputs


def test_a_removed_python_is_noticed(checkout: Checkout) -> None:
    checkout.env("sync", "training")
    python = Path(checkout.env("python", "training").stdout.strip())
    python.unlink()
    python.symlink_to("/nonexistent/python")
    assert checkout.env("python", "training").returncode == 2
    assert checkout.env("sync", "training").returncode == 0
    assert python.exists()


def test_a_failing_installation_shows_the_command_and_the_reason(checkout: Checkout) -> None:
    checkout.write_lock("annotation-cpu", ["torch==1.0", "no-such-thing==7"])
    result = checkout.env("sync", "annotation")
    assert result.returncode == 1
    assert "pip install" in result.stderr
    assert "no-such-thing" in result.stderr
    assert "Traceback" not in result.stderr
    assert checkout.env("python", "annotation").returncode == 2


def test_one_failure_does_not_stop_the_others(checkout: Checkout) -> None:
    checkout.write_lock("annotation-cpu", ["no-such-thing==7"])
    assert checkout.env("sync").returncode == 1
    assert checkout.env("python", "training").returncode == 0


def test_a_torch_for_cuda_is_explained(checkout: Checkout) -> None:
    (checkout.wheels / "torch-1.0+cpu-py3-none-any.whl").unlink()
    make_wheel(checkout.wheels, "torch", "1.0", "raise ImportError('libcudart.so.13: cannot open shared object file')")
    result = checkout.env("sync", "annotation")
    assert result.returncode == 1
    assert "libcudart" in result.stderr
    assert "not a CPU build" in result.stderr


def test_missing_environment_names_the_fix(checkout: Checkout) -> None:
    result = checkout.env("python", "generation")
    assert result.returncode == 2
    assert "pipeline env sync generation" in result.stderr
    assert result.stderr.count("\n") == 1


def test_unknown_name(checkout: Checkout) -> None:
    result = checkout.env("sync", "trainnig")
    assert result.returncode == 2
    assert "'trainnig'" in result.stderr
    assert "training" in result.stderr
    assert not checkout.home.exists()


@pytest.mark.parametrize(
    ("listing", "more", "expected"),
    [
        ("GPU 0: A device (UUID: GPU-0)", {}, "gpu"),
        ("No devices were found", {}, "cpu"),
        ("GPU 0: A device (UUID: GPU-0)", {"RATCHET_VARIANT": "cpu"}, "cpu"),
        ("No devices were found", {"RATCHET_VARIANT": "gpu"}, "gpu"),
    ],
)
def test_variant(checkout: Checkout, tmp_path: Path, listing: str, more: dict[str, str], expected: str) -> None:
    """nvidia-smi is a double: the machines that run the tests have no GPU."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho '{listing}'\n")
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    result = checkout.env("list", **({"RATCHET_VARIANT": "", "PATH": path} | more))
    assert [line.split()[1] for line in result.stdout.splitlines()] == [expected] * 4


def test_unknown_variant(checkout: Checkout) -> None:
    result = checkout.env("list", RATCHET_VARIANT="tpu")
    assert result.returncode == 2
    assert "'tpu'" in result.stderr


@pytest.mark.parametrize("everybody", [True, False])
def test_an_interrupt_leaves_nothing_running(checkout: Checkout, everybody: bool) -> None:
    """Also where it reaches the command alone, because it comes between two of its steps."""
    process = checkout.start("sync", "training", SLOW_TORCH="600")
    wait_for(lambda: list(checkout.home.glob("environments/training-*/lib/*/site-packages/trl")))
    (os.killpg if everybody else os.kill)(process.pid, signal.SIGINT)
    process.communicate(timeout=200)
    assert process.returncode == 130
    again = checkout.env("sync", "training")
    assert "training: ready" in again.stdout
    assert "waiting" not in again.stdout, "a process of the interrupted command still holds the lock"


def wait_for(condition: Callable[[], object], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
