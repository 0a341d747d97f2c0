"""Explains errors that are caused by resource limits (ulimit) which a shell or a scheduler has set on the process."""

import errno
import os
import resource
import signal

OUT_OF_MEMORY = ("allocate memory", "failed to map segment", "can't start new thread", "bad_alloc")
"""Parts of the messages of libraries whose allocation has failed."""


def limit_message(error: BaseException) -> str | None:
    """The message for an error that one of this process's limits explains; None for any other error."""
    code = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if code == errno.EMFILE or "(os error 24)" in text:
        return _message(resource.RLIMIT_NOFILE, "have {} files open", "-n 4096")
    if code == errno.EFBIG or "(os error 27)" in text:
        return _message(resource.RLIMIT_FSIZE, "write {} bytes to one file", "-f unlimited")
    refused = code == errno.ENOMEM or isinstance(error, MemoryError) or any(word in text for word in OUT_OF_MEMORY)
    return _address_space() if refused else None


def limit_message_for_signal(number: int) -> str | None:
    """The message for a process that a signal ended, if one of the limits that it shares with this one explains it."""
    if number == signal.SIGXFSZ:
        return _message(resource.RLIMIT_FSIZE, "write {} bytes to one file", "-f unlimited")
    if number == signal.SIGXCPU:
        return _message(resource.RLIMIT_CPU, "use {} s of a processor", "-t unlimited")
    return _address_space() if number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS) else None


def raise_open_files() -> None:
    """Raise the soft limit of open files, of this process and its children, to the hard limit."""
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


def exit_if_limit(error: BaseException) -> None:
    """Exit with a message and code 2 if a limit explains this uncaught error; otherwise return."""
    if message := limit_message(error):
        os.write(2, f"error: {message}\n".encode())
        os._exit(2)
