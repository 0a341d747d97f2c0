"""Locates Ratchet's code and files, in a checkout or installed, and RATCHET_HOME."""

import contextlib
import functools
import os
import shutil
import tempfile
import time
from pathlib import Path

import contracts
from contracts.callables import OWN_PACKAGES
from contracts.errors import UserError
from contracts.fingerprint import digest, file_sha256

HOME = "RATCHET_HOME"
UNUSED_SECONDS = 60 * 24 * 3600.0
"""Time after which an unused copy of the code is deleted."""
IN_WHEEL = "pipelines/configs"
"""The place of the folder configs/ in a wheel, as set in pyproject.toml."""


def home() -> Path:
    """The directory of environments, downloads and jobs: RATCHET_HOME, or ~/.cache/ratchet."""
    try:
        return Path(os.environ.get(HOME) or "~/.cache/ratchet").expanduser().absolute()
    except RuntimeError as error:
        raise UserError(f"this user has no home directory ({error}). Set {HOME}=PATH.") from error


def require_home() -> None:
    """Raise UserError if RATCHET_HOME is not writable."""
    try:
        home().mkdir(parents=True, exist_ok=True)
        writable, why = os.access(home(), os.W_OK | os.X_OK), "no permission"
    except OSError as error:
        writable, why = False, error.strerror or str(error)
    if not writable:
        raise UserError(
            f"{home()} cannot be written to ({why}), but environments and jobs are stored there. Set {HOME}=PATH."
        )


def source_root() -> Path:
    """The directory that contains Ratchet's packages."""
    return Path(contracts.__file__).resolve().parent.parent


def is_installed() -> bool:
    """Whether Ratchet is installed rather than run from a checkout."""
    return (source_root() / IN_WHEEL).is_dir()


def configs() -> Path:
    """The directory of recipes, their data, and the environments' locks."""
    return source_root() / (IN_WHEEL if is_installed() else "configs")


def packaged(name: str) -> Path:
    """The file below `configs` that a config calls `ratchet:NAME`.

    Raises:
        UserError: there is none of that name.
    """
    path = configs() / name
    if not path.is_file():
        known = sorted(file.relative_to(configs()).as_posix() for file in (configs() / "data").iterdir())
        raise UserError(f"ratchet:{name} does not exist. Known: {', '.join(known)}.")
    return path


def code_path() -> Path:
    """A directory for PYTHONPATH with the stages' code and without the driver's libraries.

    A checkout is used as it is. Installed packages are copied, so that a container can mount the copy, and that it does
    not change when Ratchet is upgraded during a run.
    """
    return _copied(source_root()) if is_installed() else source_root()


@functools.cache
def _copied(root: Path) -> Path:
    packages = [package for package in OWN_PACKAGES if package != "pipelines"]
    files = sorted(file for package in packages for file in (root / package).rglob("*.py"))
    names = [file.relative_to(root).as_posix() for file in files]
    version = digest({name: file_sha256(root / name) for name in names})[:12]
    copy = home() / "code" / version
    if not copy.is_dir():
        copy.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=copy.parent, prefix=".") as folder:
            for name in names:
                file = Path(folder, version, name)
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / name, file)
            try:
                Path(folder, version).rename(copy)
            except OSError:
                if not copy.is_dir():  # otherwise another process or thread was faster
                    raise
    os.utime(copy)
    delete_unused(copy.parent)
    return copy


def delete_unused(copies: Path) -> None:
    """Delete copies of the code that have not been used for UNUSED_SECONDS; their stages have ended."""
    for path in copies.iterdir():
        if time.time() - path.stat().st_mtime > UNUSED_SECONDS:
            trash = Path(tempfile.mkdtemp(dir=copies, prefix="."))
            with contextlib.suppress(OSError):  # another process was faster
                path.rename(trash / path.name)  # atomic: a process that needs the copy now makes a new one
            shutil.rmtree(trash, ignore_errors=True)
