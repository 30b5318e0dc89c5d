"""Work in a fork of this process, whose calls of the system are counted, and end or fail where one says."""

from __future__ import annotations

import errno
import os
import resource
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from persona_lens.errors import PersonaLensError

CALLS = ("write", "fsync", "replace", "rename", "mkdir", "ftruncate", "truncate", "unlink", "open")
FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def counted(before: Callable[[int, str, tuple[Any, ...]], Any]) -> list[int]:
    """Have ``before(number, call, arguments)`` called before every call of the system that changes a file.

    What it returns, if not None, is the call's result. The list holds how many calls there were.
    """
    seen = [0]

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if (name == "open" and not arguments[1] & FLAGS) or (name == "write" and arguments[0] <= 2):
                return real(*arguments, **options)
            seen[0] += 1
            found = before(seen[0], name, arguments)
            return real(*arguments, **options) if found is None else found

        return call

    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))
    return seen


def child(work: Callable[[], None], said: Path, kill_after: float | None = None) -> int:
    """Run in a fork.

    Args:
        work: What.
        said: A file for the error: one line for the project's own, with a traceback behind it for any other.
        kill_after: Seconds until it is killed.

    Returns:
        0, 1 for an error of the project's, 2 for another, or minus the signal that ended it.
    """
    said.unlink(missing_ok=True)
    process = os.fork()
    if process == 0:
        code = 3
        for kind in tqdm.__mro__[:2]:  # their own lock is one for all forks, and one that is killed may hold it
            kind.set_lock(threading.RLock())
        write = _plain_writer(said)
        try:
            code = _outcome(work, write)
        finally:
            os._exit(code)
    if kill_after is not None:
        until = time.monotonic() + kill_after
        while time.monotonic() < until and not os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.002)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def limited(size: int) -> None:
    """No file of this process gets longer than so many bytes, whoever writes it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def fault(number: int, at: int, code: int, lasting: bool) -> None:
    """Fail at a call, and at all behind it if that is to last."""
    if number == at or (lasting and number > at):
        raise OSError(code, os.strerror(code))


def torn(arguments: tuple[Any, ...], real: Callable[..., Any]) -> int:
    """Write the first half only; how much that was."""
    return int(real(arguments[0], bytes(arguments[1])[: max(1, len(arguments[1]) // 2)]))


FAULTS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG, errno.EDQUOT)


def _outcome(work: Callable[[], None], say: Callable[[str], None]) -> int:
    try:
        work()
    except PersonaLensError as error:
        say(str(error))
        return 1
    except BaseException:  # noqa: BLE001 - whatever it is, it is what is looked for
        say(traceback.format_exc())
        return 2
    return 0


def _plain_writer(said: Path) -> Callable[[str], None]:
    """Writes the error with the calls as they were before any were counted."""
    opened, write = os.open(said, os.O_WRONLY | os.O_CREAT, 0o600), os.write

    def say(text: str) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        write(opened, text.encode())

    return say
