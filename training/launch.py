"""Starts the ranks of a training: processes that run the same command, forked from one that has imported the libraries.

    python -m training policy …            the launcher: starts and watches the ranks, without torch
      python -m contracts.warm training …    imports the libraries once; the driver's, if it keeps one for this stage
        python -m training policy …            a fork per rank

The ranks find each other as those of torchrun do, by its environment variables. Exit codes of ranks propagate to the
launcher: 2 is a user's mistake, 143 a stop by SIGTERM. Stop requests propagate to all ranks, and each process dies with
its parent.

With several nodes, each node runs all of these, and the launchers coordinate (training/nodes.py): a stop request or a
failure on one node ends all nodes, with the same exit code. Rank 0, on node 0, publishes.
"""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from contracts import stopping
from contracts.attempt import report_failure
from contracts.config import read_yaml
from contracts.declaration import stages_of
from contracts.errors import UserError
from contracts.files import write_atomically
from contracts.forks import IMPORT_SECONDS, KILLED, WARM_SOCKET, Process, socket_folder, start_or_fork, start_warm
from contracts.processes import die_with_parent, end_groups, name_process, wait_for_end
from training.config import TrainingConfig
from training.nodes import Nodes, Rendezvous
from training.parallel import ParallelConfig, check_layout

POLL_SECONDS = 0.1
STOP_CODES = {128 + number for number in (*stopping.SIGNALS, *stopping.TERMINAL)}
"""Exit codes of ranks that were asked to stop."""
THREADS = "OMP_NUM_THREADS"
RENDEZVOUS_FILE = "RATCHET_RENDEZVOUS"
"""Environment variable of the ranks of a single node: the file to which rank 0 writes the port of its store."""

_stores: list[Any] = []
"""The store that this process serves, which must live as long as the process."""


def launch(config: TrainingConfig) -> bool:
    """Run the stage in worker processes and return True; False if this process is to run it itself.

    With several nodes, starts the ranks of this node.

    Raises:
        UserError: the model does not support the layout, or the rendezvous variables are missing.
        SystemExit: ranks failed; the message and the exit code are theirs.
    """
    if "RANK" in os.environ:
        return False
    refuse_single_process()
    parallel = config.parallel
    check_layout(parallel, config.model)
    if parallel.processes == 1 and not parallel.deepspeed_stage:
        return False
    with tempfile.TemporaryDirectory(prefix="ratchet-launch-") as directory:
        folder = Path(directory)
        file = folder / "stage.json"
        file.write_text(config.model_dump_json(), encoding="utf-8")
        command = [sys.executable, "-m", "training", config.stage, "--config", str(file)]
        with _warm_socket(config) as (socket, variables):
            if parallel.nodes == 1:
                rendezvous = {"MASTER_ADDR": "127.0.0.1", RENDEZVOUS_FILE: str(folder / "port")}
                code = exit_code(_run_ranks(parallel, command, socket, variables | rendezvous, 0))
            else:
                code = _run_node(config, command, socket, variables)
    if code:
        raise SystemExit(code)
    return True


def _run_node(config: TrainingConfig, command: Sequence[str], socket: Path, variables: Mapping[str, str]) -> int:
    """Run the ranks of one of several nodes; returns the exit code of the whole training.

    Raises:
        UserError: this node does not belong to the others, or the port is taken.
        TransientError: other nodes did not join in time.
    """
    parallel = config.parallel
    rendezvous = Rendezvous.read(parallel)
    nodes = Nodes(rendezvous, parallel.nodes, f"{config.stage} {config.output}, parallel {parallel}")
    nodes.join()
    variables = {**variables, "MASTER_ADDR": rendezvous.address, "MASTER_PORT": str(rendezvous.port)}
    with stopping.deferred():  # a stopped node ends together with the others
        codes = _run_ranks(parallel, command, socket, variables, rendezvous.node, nodes)
        return exit_code(nodes.finish(codes), nodes.stop)


@contextlib.contextmanager
def _warm_socket(config: TrainingConfig) -> Iterator[tuple[Path, dict[str, str]]]:
    """Provide a process to fork ranks from: its socket, and the environment variables with which it has started.

    It is the one that this stage was forked from, or else a new one, which ends with the block.
    """
    variables = dict(os.environ)
    if given := variables.get(WARM_SOCKET):
        yield Path(given), variables
        return
    per_node = config.parallel.processes // config.parallel.nodes
    variables.setdefault(THREADS, str(max(1, (os.cpu_count() or 1) // per_node)))
    folder = socket_folder()
    path = folder / "training"
    libraries = stages_of("training")[config.stage].libraries(config)
    process = start_warm(path, "training", sys.executable, variables, libraries=libraries)
    try:
        yield path, variables
    finally:
        with stopping.deferred():
            assert process.stdin is not None
            process.stdin.close()
            end_groups([process], 0)
            shutil.rmtree(folder, ignore_errors=True)


def _run_ranks(
    parallel: ParallelConfig,
    command: Sequence[str],
    socket: Path,
    variables: Mapping[str, str],
    node: int,
    nodes: Nodes | None = None,
) -> set[int]:
    """Run the ranks of this node to their end, and return their exit codes; the first failure ends the others.

    Args:
        socket: of the process to fork them from.
        variables: environment variables of all ranks.
        node: this node's rank.
        nodes: all nodes, if there are several; the failure of another one ends these ranks too.
    """
    per_node = parallel.processes // parallel.nodes
    ranks: list[Process] = []
    try:
        for local in range(per_node):
            own = rank_variables(parallel, node, local)
            ranks.append(start_or_fork(socket, command, {**variables, **own}, patience=IMPORT_SECONDS))
        while not any(codes := [rank.poll() for rank in ranks]) and None in codes:
            if nodes is not None and (number := stopping.requested()):
                stopping.ignore()
                nodes.ask_to_stop(number)
                break
            if nodes is not None and nodes.others_failed:
                break
            wait_for_end((rank.pid for rank, code in zip(ranks, codes, strict=True) if code is None), POLL_SECONDS)
    finally:
        with stopping.deferred():  # a second stop request does not end the wait for the ranks
            end_groups(ranks, stopping.grace_seconds() + 2)
    for local, code in enumerate(codes):
        name = f"process {node * per_node + local} of the training"
        if code is not None and code < 0 and -code != signal.SIGTERM:
            text = f"{name} was killed by signal {-code}"
            print(text, file=sys.stderr)
            report_failure("transient", text)
        elif code and code > 0 and code != UserError.exit_code and code not in STOP_CODES:
            print(f"{name} ended with exit code {code}, before the others", file=sys.stderr)
    return {code if code >= 0 else 128 - code for code in (_final_code(rank) for rank in ranks)}


def _final_code(rank: Process) -> int:
    """The exit code of a rank that was ended; that of a killed process if it does not end."""
    code = rank.poll()
    return KILLED if code is None else code


def rank_variables(parallel: ParallelConfig, node: int, local: int) -> dict[str, str]:
    """The variables that torchrun sets for a rank: its place among all ranks, and that they use the launcher's store.

    Args:
        node: the rank of its node.
        local: its rank on this node.
    """
    per_node = parallel.processes // parallel.nodes
    return {
        "RANK": str(node * per_node + local),
        "WORLD_SIZE": str(parallel.processes),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(per_node),
        "GROUP_RANK": str(node),
        "GROUP_WORLD_SIZE": str(parallel.nodes),
        "TORCHELASTIC_RUN_ID": "ratchet",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def join_ranks() -> None:
    """In a rank, name the process; and on a single node, agree on the store by which the ranks find each other.

    Rank 0 serves it at a port that the system chooses, so no other program can have taken it.
    """
    rank = os.environ.get("RANK")
    if rank is not None:
        name_process(f"rank {rank}")
    if RENDEZVOUS_FILE not in os.environ:
        return
    die_with_parent()  # which would otherwise be waited for in vain
    file = Path(os.environ.pop(RENDEZVOUS_FILE))
    if rank == "0":
        from torch.distributed import TCPStore

        _stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        write_atomically(file, str(_stores[0].port).encode())
    while not file.exists():
        time.sleep(0.01)
    os.environ["MASTER_PORT"] = file.read_text(encoding="utf-8")


def refuse_single_process() -> None:
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


def exit_code(codes: set[int], stop: int = 0) -> int:
    """The exit code of a training whose ranks exited with `codes`; `stop`: the signal that asked them to, or 0."""
    bad = codes - {0}
    if not bad or UserError.exit_code in bad:
        return UserError.exit_code if bad else 0
    if stop:
        return 128 + stop
    # A rank that learned of the stop from another one exits as if by SIGTERM, which has the highest number.
    return min(bad) if bad <= STOP_CODES else 1
