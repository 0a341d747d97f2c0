"""Prepares a process, regardless of where and how it was started; every entry point calls `prepare` first.

Ratchet's and the libraries' modules take precedence over files of the same name in the working directory or on
PYTHONPATH, which stay importable after them. Rank variables are honoured if a launcher has set them, and ignored if a
notebook or a cluster's prologue left them behind. Output that a terminal cannot show is replaced.

Imports only modules that Python has loaded already, and modules of this package.
"""

import gc
import os
import signal
import sys
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import NoReturn

from contracts.limits import exit_if_limit, raise_open_files

USER_PATH = "RATCHET_PYTHONPATH"
"""Environment variable: the user's own folders with modules, which come after the libraries."""
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""The directory that holds Ratchet's packages."""
INSTALLED = os.path.basename(ROOT) in ("site-packages", "dist-packages")
"""Whether Ratchet is installed among other libraries, where every process of the same interpreter finds it."""
PYTHON_KEPT = (
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONFAULTHANDLER",
    "PYTHONHASHSEED",
    "PYTHONMALLOC",
    "PYTHONNOUSERSITE",
    "PYTHONPYCACHEPREFIX",
    "PYTHONUNBUFFERED",
)
"""Python's variables that affect neither imports nor results nor exit messages."""
RANK_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "CROSS_RANK",
    "CROSS_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_NAME",
    "ROLE_WORLD_SIZE",
    "TORCHELASTIC_",
    "OMPI_",
    "PMI_",
    "PMIX_",
    "MV2_",
    "MPI_LOCALRANKID",
    "MPI_LOCALNRANKS",
)
"""Variables (and prefixes, which end with an underscore) by which launchers set a process's rank."""
FOREIGN = (
    *RANK_VARIABLES,
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "ACCELERATE_",
    "FSDP_",
    "DEEPSPEED_",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_NTASKS",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_NPROCS",
    "SLURM_STEPID",
    "SLURM_STEP_",
    "SLURM_TASK_PID",
    "SLURM_TASKS_PER_NODE",
    "SLURM_GTIDS",
    "SLURM_MPI_TYPE",
    "SLURM_LAUNCH_NODE_IPADDR",
    "SLURM_SRUN_COMM_",
    "SLURM_PMI_",
    "SLURM_PMIX_",
)
"""Further variables of launchers; the driver removes all of these from its stages' environments."""
LAUNCHER_RANKS = (
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)
"""Rank and world size as set by srun and mpirun."""
GC_THRESHOLD = gc.get_threshold()
"""Python's default thresholds of garbage collection."""
IMPORT_GC_THRESHOLD = (200_000, 10, 10)
"""Thresholds during imports: the objects of libraries stay, and collecting among them takes a sixth of the time."""
runs_many_stages = False
"""Whether this process runs one stage after another, so that the garbage of the previous stage must be collected."""
INTERRUPTED = 128 + signal.SIGINT
PIPE_GONE = 128 + signal.SIGPIPE
NO_DIRECTORY = "the working directory does not exist any more. Change to one that does, for example with `cd`."


def prepare(*, stage: bool = True) -> None:
    """Prepare this process and its future children: signals, limits, output, import paths, launcher variables.

    Call `imported` after the libraries are imported.

    Args:
        stage: whether this is a stage, which a launcher may have started as one of several processes; the driver is
            always a single process.
    """
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)  # until the command installs its own handler
    open_closed_streams()
    sys.excepthook = _excepthook
    importing()
    raise_open_files()
    replace_unencodable()
    try:
        os.getcwd()
    except FileNotFoundError:
        _refuse(NO_DIRECTORY)
    _order_paths()
    if stage and "RATCHET_ROLE" not in os.environ:
        _check_launcher()


def importing() -> None:
    """Collect garbage rarely, until `imported` is called."""
    gc.set_threshold(*IMPORT_GC_THRESHOLD)


def imported() -> None:
    """Return to Python's default garbage collection, but exempt the imported objects."""
    if not runs_many_stages:
        gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)


def open_closed_streams() -> None:
    """Open the null device for each of standard input, output and error that is closed when this process starts.

    Otherwise the next file that is opened would get the descriptor of a closed one, and prints would go into it.
    """
    for number in range(3):  # all of them before any other file is opened, which would get a closed one's number
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number, this one
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115


def print_error(message: str) -> None:
    """Print an error to stderr if possible: the terminal may be closed by now, or the disk of its file full."""
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:
        return


def replace_unencodable() -> None:
    """Replace characters that the terminal's encoding cannot express, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")


def is_foreign(name: str) -> bool:
    """Whether a variable belongs to a launcher or changes Python's behaviour, so that stages must not inherit it."""
    if name.startswith("PYTHON"):
        return name not in PYTHON_KEPT
    return _is_one_of(name, FOREIGN)


def is_launcher_variable(name: str) -> bool:
    """Whether launchers use this variable for ranks or for the rendezvous."""
    return _is_one_of(name, RANK_VARIABLES) or name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


def inherited_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that the driver's stages inherit: all but those of launchers and of Python.

    An unusable TMPDIR is removed as well: libraries that read it themselves would fail instead of falling back to /tmp.
    """
    kept = {name: value for name, value in environment.items() if not is_foreign(name)}
    for name in ("TMPDIR", "TEMP", "TMP"):
        if name in kept and not os.access(kept[name], os.W_OK | os.X_OK):
            del kept[name]
    return kept


def _order_paths() -> None:
    """Move the user's folders behind the libraries on sys.path, here and in child processes."""
    named = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    users = [path for path in os.environ.get(USER_PATH, "").split(os.pathsep) if path]
    users += [path for path in named if not _same(path, ROOT)]
    if not sys.flags.safe_path:
        users.append(os.getcwd())
    users = [path for path in dict.fromkeys(map(os.path.abspath, users)) if not _same(path, ROOT)]
    ours = [path for path in sys.path if path and os.path.abspath(path) not in users]
    if INSTALLED:  # keep its place among the libraries, after Python's own modules, not the one the entry point gave it
        ours = list(reversed(dict.fromkeys(reversed(ours))))
    else:
        ours = [ROOT, *(path for path in dict.fromkeys(ours) if not _same(path, ROOT))]
    sys.path[:] = [*ours, *users]
    for name in [name for name in os.environ if name.startswith("PYTHON") and is_foreign(name)]:
        del os.environ[name]
    os.environ |= python_variables(None if INSTALLED else ROOT, users)


def python_variables(code: str | None, users: list[str]) -> dict[str, str]:
    """The variables by which a Python process finds Ratchet's code first and the user's modules last.

    `code` is the directory of Ratchet's packages, or None if the process's interpreter finds them on its own.
    """
    return {
        **({} if code is None else {"PYTHONPATH": code}),
        "PYTHONSAFEPATH": "1",
        "PYTHONUTF8": "1",
        USER_PATH: os.pathsep.join(users),
    }


def _same(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _check_launcher() -> None:
    """Keep rank variables set by a launcher, drop stray ones, and refuse those that would make a collective hang."""
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if (rank is None and size is None) or not _has_launcher():
        if size not in (None, "", "1") or rank not in (None, "", "0"):
            found = ", ".join(f"{name}={os.environ[name]}" for name in ("RANK", "WORLD_SIZE") if name in os.environ)
            _refuse(
                f"{found} in the environment would make this one of several processes, but no launcher has started it "
                "(torchrun, accelerate launch, deepspeed, or srun or mpirun with the same numbers). Run "
                "`unset RANK WORLD_SIZE LOCAL_RANK` first, or start it with the launcher."
            )
        for name in [name for name in os.environ if _is_one_of(name, RANK_VARIABLES)]:
            del os.environ[name]
        return
    if not (rank and size and rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        _refuse(f"RANK={rank}, WORLD_SIZE={size}: RANK must be from 0 to WORLD_SIZE - 1. Unset both, or correct them.")


def _is_one_of(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a variable is listed, or starts with a listed prefix (which ends with an underscore)."""
    return name in patterns or name.startswith(tuple(item for item in patterns if item.endswith("_")))


def _has_launcher() -> bool:
    """Whether RANK and WORLD_SIZE were set by a launcher."""
    if "TORCHELASTIC_RUN_ID" in os.environ or "CROSS_SIZE" in os.environ:  # torchrun and accelerate; deepspeed
        return True
    given = (os.environ.get("RANK"), os.environ.get("WORLD_SIZE"))
    return any((os.environ.get(rank), os.environ.get(size)) == given for rank, size in LAUNCHER_RANKS)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Exit silently when interrupted during imports: no work has started."""
    os._exit(INTERRUPTED)


def _excepthook(error_type: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The excepthook for errors outside of the command's own error handling."""
    if issubclass(error_type, KeyboardInterrupt):
        os._exit(INTERRUPTED)
    exit_if_limit(error)
    sys.__excepthook__(error_type, error, trace)


def _refuse(message: str) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)


def output_is_closed() -> bool:
    """Whether the reader of standard output has gone, as after `| head -1`."""
    import select

    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):
        return False


def finish(code: int) -> NoReturn:
    """Exit without Python's own messages; with 141, as shells report SIGPIPE, if standard output is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not runs_many_stages:
        gc.freeze()  # otherwise the final collection spends most of a second on torch's objects
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            code = code or PIPE_GONE
        except (OSError, ValueError):
            code = code or 1
    sys.exit(code)
