"""Several processes for one training: this command, started again under `accelerate launch`.

    python -m training policy …            the parent: no torch, starts
      python -m training.launch …       `accelerate launch` with its exit codes mended, starts
        python -m training policy …        one process per rank

A rank's exit code reaches the parent: 2 stays the user's mistake, 143 a stop by SIGTERM. A request to stop goes the
other way, to all ranks; and each process dies with the one above it.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from contracts import stopping
from contracts.attempt import report_failure
from contracts.errors import UserError
from contracts.processes import die_with_parent, end_groups
from training.config import TrainingConfig
from training.parallel import ParallelConfig, check_layout

PLAIN = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "num_machines": 1, "machine_rank": 0}
"""Plain data parallelism. On CPUs as well, with use_cpu: under MULTI_CPU accelerate starts one process only."""
LAUNCHER = "RATCHET_LAUNCHER"
"""Environment variable of a rank: the process id of its launcher."""


def launch(config: TrainingConfig) -> bool:
    """Run the stage in the processes of its layout and return True; False where this process is to run it itself.

    Raises:
        UserError: the model cannot be divided as declared.
        SystemExit: the processes failed; the message and the exit code are theirs.
    """
    if "RANK" in os.environ:
        return False
    check_layout(config.parallel, config.model)
    if config.parallel.processes == 1 and not config.parallel.deepspeed_stage:
        return False
    with tempfile.TemporaryDirectory(prefix="ratchet-launch-") as directory:
        folder = Path(directory)
        (folder / "stage.json").write_text(config.model_dump_json())
        (folder / "accelerate.json").write_text(json.dumps(launcher_settings(config.parallel)))
        command = [sys.executable, "-m", "training.launch", str(os.getpid()), config.stage, directory]
        process = subprocess.Popen(command, start_new_session=True)
        try:
            code = process.wait()
        finally:
            with stopping.deferred():  # asked a second time, it goes on waiting for the ranks
                end_groups([process], stopping.grace_seconds() + 5)
    if code:
        raise SystemExit(code if code > 0 else 128 - code)
    return True


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
            "gradient_accumulation_steps": 1,  # training decides by itself where a step ends
            "deepspeed_multinode_launcher": "standard",
        },
    }


def die_with_launcher() -> None:
    """In a rank that `launch` has started: end when the launcher ends, also if it has ended already."""
    if launcher := os.environ.get(LAUNCHER):
        die_with_parent(int(launcher))


@contextlib.contextmanager
def leaves_without_teardown() -> Iterator[None]:
    """End a rank at once when its work is done and flushed.

    Destroying a process group at exit aborts now and then (gloo and DeepSpeed: 2 of 10 runs), after everything has
    been published.
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
    """The middle process: `accelerate launch`."""
    parent, stage, directory = sys.argv[1:]
    die_with_parent(int(parent))
    stopping.listen()
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    folder = Path(directory)
    settings = json.loads((folder / "accelerate.json").read_text())
    if not torch.cuda.is_available():
        settings["use_cpu"] = True
        os.environ["DS_ACCELERATOR"] = "cpu"
        (folder / "accelerate.json").write_text(json.dumps(settings))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // settings["num_processes"])))
    os.environ[LAUNCHER] = str(os.getpid())
    # The ranks have reported their own failures; the launcher's table of exit codes adds nothing.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    words = ["--config_file", str(folder / "accelerate.json"), "--main_process_port", "0", "-m", "training", stage]
    arguments = launch_command_parser().parse_args([*words, "--config", str(folder / "stage.json")])
    # torch's handlers would let go of the ranks when a second signal comes, as it does where all processes get one.
    arguments.signals_to_handle = "SIGINT"
    arguments.shutdown_timeout = math.ceil(stopping.grace_seconds()) + 2

    def pass_on(number: int, frame: Any) -> NoReturn:
        """Have torch's launcher send the signal to all ranks and wait for them; that happens once."""
        for each in stopping.SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise SignalException(f"asked to stop by signal {number}", signal.Signals(number))

    for number in stopping.SIGNALS:
        signal.signal(number, pass_on)
    try:
        launch_command(arguments)
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        return _code_of(error.failures)
    return 0


def _code_of(failures: dict[int, Any]) -> int:
    """The exit code of a training some of whose ranks have failed, from torch's records of them."""
    first = min(failure.timestamp for failure in failures.values())
    for rank, failure in failures.items():
        # Those that followed the first were ended by the launcher itself.
        if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM and failure.timestamp <= first + 1:
            text = f"process {rank} of the training was killed by signal {-failure.exitcode}"
            print(text, file=sys.stderr)
            report_failure("transient", text)
    codes = {code if code > 0 else 128 - code for code in (failure.exitcode for failure in failures.values())}
    if UserError.exit_code in codes:
        return UserError.exit_code
    # A rank that heard of the stop from another one leaves as if by SIGTERM, which has the highest number.
    return min(codes) if codes <= {128 + number for number in stopping.SIGNALS} else 1


if __name__ == "__main__":
    sys.exit(main())
