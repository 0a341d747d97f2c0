"""Several processes for one training: this command, started again under `accelerate launch`.

    python -m training dpo …            the parent: no torch, starts
      python -m training.launch …       `accelerate launch` with its exit codes mended, starts
        python -m training dpo …        one process per rank

A rank's exit code reaches the parent: 2 stays the user's mistake.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contracts.config import read_yaml
from contracts.errors import UserError
from contracts.processes import die_with_parent, end_groups
from contracts.stopping import grace_seconds
from training.config import TrainingConfig

PLAIN = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "num_machines": 1, "machine_rank": 0}
"""Plain data parallelism. On CPUs as well, with use_cpu: under MULTI_CPU accelerate starts one process only."""


def launch(config: TrainingConfig) -> bool:
    """Run the stage in `config.processes` processes and return True; False where this process is to run it itself.

    Raises:
        SystemExit: the processes failed; the message and the exit code are theirs.
    """
    if "RANK" in os.environ or (config.processes == 1 and config.accelerate_config is None):
        return False
    settings = launcher_settings(config)
    with tempfile.TemporaryDirectory(prefix="ratchet-launch-") as directory:
        folder = Path(directory)
        (folder / "stage.json").write_text(config.model_dump_json())
        (folder / "accelerate.json").write_text(json.dumps(settings))
        command = [sys.executable, "-m", "training.launch", config.stage, directory]
        process = subprocess.Popen(command, start_new_session=True)
        try:
            code = process.wait()
        finally:
            end_groups([process], grace_seconds() + 5)
    if code:
        raise SystemExit(code)
    return True


def launcher_settings(config: TrainingConfig) -> dict[str, Any]:
    """The settings for `accelerate launch`: the config's file, or plain data parallelism, for `config.processes`.

    Raises:
        UserError: the file contradicts the config.
    """
    settings = read_yaml(config.accelerate_config) if config.accelerate_config else dict(PLAIN)
    if "distributed_type" not in settings:
        raise UserError(
            f"{config.accelerate_config} is no file for `accelerate launch`: it has no distributed_type. Use one like "
            "configs/accelerate/zero2.yaml."
        )
    declared = settings.get("num_processes", config.processes)
    if declared != config.processes:
        raise UserError(
            f"{config.accelerate_config} has num_processes: {declared}, but processes={config.processes}. Set "
            f"processes={declared}, or take the line out of the file."
        )
    return {**settings, "num_processes": config.processes}


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
    die_with_parent()
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    stage, directory = sys.argv[1:]
    folder = Path(directory)
    settings = json.loads((folder / "accelerate.json").read_text())
    if not torch.cuda.is_available():
        settings["use_cpu"] = True
        os.environ["DS_ACCELERATOR"] = "cpu"
    if settings.get("distributed_type") == "MULTI_GPU" and settings["num_processes"] == 1:
        settings["distributed_type"] = "NO"
    (folder / "accelerate.json").write_text(json.dumps(settings))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // settings["num_processes"])))
    # The ranks have reported their own failures; the launcher's table of exit codes adds nothing.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    arguments = ["--config_file", str(folder / "accelerate.json"), "--main_process_port", "0", "-m", "training", stage]
    try:
        launch_command(launch_command_parser().parse_args([*arguments, "--config", str(folder / "stage.json")]))
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        for rank, failure in error.failures.items():
            if failure.exitcode < 0:
                print(f"process {rank} of the training was killed by signal {-failure.exitcode}", file=sys.stderr)
        return UserError.exit_code if UserError.exit_code in codes else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
