"""The limits that a shell or a scheduler sets on a process (ulimit), as the reason of what goes wrong under them."""

import errno
import os
import resource
import signal

TOO_LITTLE_MEMORY = ("allocate memory", "failed to map segment", "can't start new thread", "bad_alloc")
"""What libraries say where the system has refused them memory."""


def limit_behind(error: BaseException) -> str | None:
    """What to say of an error that one of this process's limits explains; None for every other."""
    code = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if code == errno.EMFILE or "(os error 24)" in text:
        return _message(resource.RLIMIT_NOFILE, "have {} files open", "-n 4096")
    if code == errno.EFBIG or "(os error 27)" in text:
        return _message(resource.RLIMIT_FSIZE, "write {} bytes to one file", "-f unlimited")
    refused = code == errno.ENOMEM or isinstance(error, MemoryError) or any(word in text for word in TOO_LITTLE_MEMORY)
    return _address_space() if refused else None


def limit_behind_signal(number: int) -> str | None:
    """The same of a process that a signal has ended, under the limits of this one."""
    if number == signal.SIGXFSZ:
        return _message(resource.RLIMIT_FSIZE, "write {} bytes to one file", "-f unlimited")
    if number == signal.SIGXCPU:
        return _message(resource.RLIMIT_CPU, "use {} s of a processor", "-t unlimited")
    return _address_space() if number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS) else None


def raise_open_files() -> None:
    """Let this process and its children open as many files as it may allow itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _address_space() -> str | None:
    return _message(resource.RLIMIT_AS, "have {} bytes of address space", "-v unlimited")


def _message(limit: int, what: str, option: str) -> str | None:
    value = resource.getrlimit(limit)[0]
    if value == resource.RLIM_INFINITY:
        return None
    return (
        f"this process may {what.format(f'only {value:,}')} (ulimit {option[:2]}), which is too little. Run "
        f"`ulimit {option}` first, or ask whoever set the limit (`ulimit -a` shows all)."
    )


def explain_and_leave(error: BaseException) -> None:
    """End this process with the message and exit code 2 where a limit explains an error that nobody has answered."""
    if message := limit_behind(error):
        os.write(2, f"error: {message}\n".encode())
        os._exit(2)
