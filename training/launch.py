"""Starts the ranks of a training, each with the same command, under `accelerate launch`.

    python -m training policy …            the parent, without torch, starts
      python -m training.launch …            `accelerate launch`, with exit codes corrected, which starts
        python -m training policy …            one process per rank

Exit codes of ranks propagate to the parent: 2 is a user's mistake, 143 a stop by SIGTERM. Stop requests propagate to
all ranks, and each process dies with its parent.

On several nodes each node runs all three, and the middle processes coordinate (training/nodes.py): a stop request or a
failure on one node ends all nodes, with the same exit code. Rank 0, on node 0, publishes.
"""

import contextlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contracts import stopping
from contracts.attempt import fail, report_failure
from contracts.config import read_yaml
from contracts.errors import TransientError, UserError
from contracts.processes import die_with_parent, end_groups
from training.config import TrainingConfig
from training.nodes import Nodes, Rendezvous
from training.parallel import ParallelConfig, check_layout

PLAIN = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "num_machines": 1, "machine_rank": 0}
"""Launcher settings for DDP. Also used on CPUs, with use_cpu: under MULTI_CPU accelerate starts a single process."""
RENDEZVOUS_SECONDS = 60
"""Timeout of torch's rendezvous, which starts when all nodes have joined."""
LAUNCHER = "RATCHET_LAUNCHER"
"""Environment variable that tells a rank the process id of its launcher."""


def launch(config: TrainingConfig) -> bool:
    """Run the stage in worker processes and return True; False if this process is to run it itself.

    With several nodes, starts the ranks of this node.

    Raises:
        UserError: the model does not support the layout, or the rendezvous variables are missing.
        SystemExit: ranks failed; the message and the exit code are theirs.
    """
    if "RANK" in os.environ:
        return False
    refuse_lone_process()
    check_layout(config.parallel, config.model)
    if config.parallel.processes == 1 and not config.parallel.deepspeed_stage:
        return False
    with tempfile.TemporaryDirectory(prefix="ratchet-launch-") as directory:
        folder = Path(directory)
        (folder / "stage.json").write_text(config.model_dump_json(), encoding="utf-8")
        (folder / "accelerate.json").write_text(json.dumps(launcher_settings(config.parallel)), encoding="utf-8")
        command = [sys.executable, "-m", "training.launch", str(os.getpid()), config.stage, directory]
        process = subprocess.Popen(command, start_new_session=True)
        try:
            code = process.wait()
        finally:
            with stopping.deferred():  # a second stop request does not end the wait for the ranks
                end_groups([process], stopping.grace_seconds() + 5)
    if code:
        raise SystemExit(code if code > 0 else 128 - code)
    return True


def refuse_lone_process() -> None:
    """Check that `accelerate launch` did not start a single process instead of several, as it does on CPUs.

    Raises:
        UserError: it did.
    """
    wanted = processes_of_accelerate(_command_line(os.getppid()))
    if wanted > 1:
        raise UserError(
            f"`accelerate launch` was asked for {wanted} processes, but has started one (as on CPUs, with --cpu or "
            "MULTI_CPU). Ratchet starts its processes itself: run the same without it, with "
            f"parallel={{dp: {wanted}}}."
        )


def _command_line(process: int) -> list[str]:
    """The command line of a process; empty where /proc does not have it."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def processes_of_accelerate(words: list[str]) -> int:
    """The number of processes that an `accelerate launch` command line asks for; 0 for any other command."""
    programs = ("accelerate", "accelerate-launch", "accelerate.commands.launch")
    if not any(Path(word).name in programs for word in words[:4]):
        return 0
    options: dict[str, str] = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.lstrip("-").replace("-", "_", 1).partition("=")
        if word.startswith("--"):
            options.setdefault(name, value if equals else following)
    if (count := options.get("num_processes", "")).isdecimal():
        return int(count)
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    file = Path(options.get("config_file", home / "accelerate/default_config.yaml"))
    found = read_yaml(file).get("num_processes") if file.is_file() and file.suffix != ".json" else None
    return found if isinstance(found, int) else 0


def is_worker_node(config: TrainingConfig) -> bool:
    """Whether this is one of several nodes other than node 0, which publishes.

    Raises:
        UserError: the rendezvous variables are missing.
    """
    return "RANK" not in os.environ and config.parallel.nodes > 1 and Rendezvous.read(config.parallel).node > 0


def launcher_settings(parallel: ParallelConfig) -> dict[str, Any]:
    """The settings for `accelerate launch`, which starts the processes of every layout."""
    settings = {**PLAIN, "num_processes": parallel.processes}
    if not parallel.deepspeed_stage:
        return settings
    whole = parallel.deepspeed_stage == 3
    return settings | {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {
            "zero_stage": parallel.deepspeed_stage,
            "zero3_init_flag": whole,
            "zero3_save_16bit_model": whole,  # the published checkpoint is gathered from all processes
            "offload_optimizer_device": "cpu" if "optimizer" in parallel.offload else "none",
            "offload_param_device": "cpu" if "param" in parallel.offload else "none",
            "gradient_accumulation_steps": 1,  # the training loop accumulates
            "deepspeed_multinode_launcher": "standard",
        },
    }


def die_with_launcher() -> None:
    """Make a rank started by `launch` exit when the launcher exits, even if it already has."""
    if launcher := os.environ.get(LAUNCHER):
        die_with_parent(int(launcher))


@contextlib.contextmanager
def exit_without_teardown() -> Iterator[None]:
    """Exit a rank immediately after its work, with all output flushed.

    Destroying a process group at exit sometimes aborts the process (gloo and DeepSpeed: 2 of 10 runs), after everything
    has been published.
    """
    code = 1
    try:
        yield
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        if "RANK" not in os.environ:
            raise
    finally:
        if "RANK" in os.environ:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def main() -> int:
    """Run `accelerate launch` in the middle process, and return the exit code of the training."""
    parent, stage, directory = sys.argv[1:]
    die_with_parent(int(parent))
    stopping.listen()
    import accelerate.utils.launch
    import psutil  # type: ignore[import-untyped]
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    folder = Path(directory)
    config = json.loads((folder / "stage.json").read_bytes())
    parallel = ParallelConfig(**config["parallel"])
    settings = json.loads((folder / "accelerate.json").read_bytes())
    if not torch.cuda.is_available():
        settings["use_cpu"] = True
        os.environ["DS_ACCELERATOR"] = "cpu"
        (folder / "accelerate.json").write_text(json.dumps(settings), encoding="utf-8")
    here = parallel.processes // parallel.nodes
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // here)))
    os.environ[LAUNCHER] = str(os.getpid())
    # The ranks have reported their own failures; the launcher's table of exit codes adds nothing.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)

    ended: set[int] = set()

    def end_ranks() -> None:
        """Ask each rank of this node to exit, once; torch's launcher records their exit codes."""
        for process in psutil.Process().children():
            if process.pid not in ended:
                ended.add(process.pid)
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.terminate()

    nodes: Nodes | None = None
    words = ["--config_file", str(folder / "accelerate.json")]
    if parallel.nodes == 1:
        words += ["--main_process_port", "0"]
    else:
        nodes = Nodes(
            Rendezvous.read(parallel), parallel.nodes, f"{stage} {config['output']}, parallel {parallel}", end_ranks
        )
        # At the end torch's launcher would wait for the other nodes for at most five minutes, ignoring signals.
        LocalElasticAgent._exit_barrier = lambda agent: None  # type: ignore[method-assign]
        accelerate.utils.launch.is_port_in_use = lambda port: False  # our store uses it, and torch shares the store
        try:
            nodes.join()
        except (UserError, TransientError) as error:
            return fail(error)
        rendezvous = nodes.rendezvous
        words += ["--num_machines", str(parallel.nodes), "--machine_rank", str(rendezvous.node), "--same_network"]
        words += ["--main_process_ip", rendezvous.address, "--main_process_port", str(rendezvous.port)]
        words += ["--rdzv_conf", f"timeout={RENDEZVOUS_SECONDS}"]
    words += ["-m", "training", stage, "--config", str(folder / "stage.json")]
    arguments = launch_command_parser().parse_args(words)
    # At a second signal, usual where all processes of a job get one, torch's handlers would abandon the ranks.
    arguments.signals_to_handle = "SIGINT"
    arguments.shutdown_timeout = math.ceil(stopping.grace_seconds()) + 2

    def forward_signal(number: int, frame: Any) -> None:
        """Make torch's launcher forward the first signal to all ranks and wait for them; ignore further ones."""
        stopping.ignore()
        if nodes is not None:
            nodes.ask_to_stop(number)
            if nodes.finishing:
                return
        raise SignalException(f"asked to stop by signal {number}", signal.Signals(number))

    for number in stopping.SIGNALS:
        signal.signal(number, forward_signal)
    codes = {0}
    try:
        launch_command(arguments)
    except SignalException as error:
        codes = {128 + int(error.sigval)}
    except ChildFailedError as error:
        codes = _codes_of(error.failures)
    except Exception:
        if nodes is None:
            raise
        traceback.print_exc()
        codes = {1}
    if nodes is None:
        return exit_code(codes)
    return exit_code(nodes.finish(codes), nodes.stop)


def _codes_of(failures: dict[int, Any]) -> set[int]:
    """The exit codes of the failed ranks, from torch's error files."""
    first = min(failure.timestamp for failure in failures.values())
    for rank, failure in failures.items():
        # Ranks that were killed later than the first failure were ended by the launcher itself.
        if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM and failure.timestamp <= first + 1:
            text = f"process {rank} of the training was killed by signal {-failure.exitcode}"
            print(text, file=sys.stderr)
            report_failure("transient", text)
    return {code if code > 0 else 128 - code for code in (failure.exitcode for failure in failures.values())}


def exit_code(codes: set[int], stop: int = 0) -> int:
    """The exit code of a training whose ranks exited with `codes`; `stop`: the signal that asked them to, or 0."""
    bad = codes - {0}
    if not bad or UserError.exit_code in bad:
        return UserError.exit_code if bad else 0
    if stop:
        return 128 + stop
    # A rank that learned of the stop from another one exits as if by SIGTERM, which has the highest number.
    return min(bad) if bad <= {128 + number for number in stopping.SIGNALS} else 1


if __name__ == "__main__":
    sys.exit(main())
