"""Files: written whole or not at all and never through a link, with errors that name them; and the cache's folder."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from persona_lens.core.errors import PersonaLensError

if TYPE_CHECKING:
    from typing_extensions import Buffer

Failed = type[PersonaLensError]
PART = ".part"
CONFIG = "run.json"  # what a run folder was made with
REPORT = "report.html"  # the page in a run folder
BUFFER = 1 << 20

_ADVICE = {
    errno.ENOSPC: "make room there, or choose another place",
    errno.EDQUOT: "make room there, or choose another place",
    errno.EFBIG: "choose a place that takes files of that size",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "choose another place, or have its permissions changed",
    errno.EPERM: "choose another place, or have its permissions changed",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "check the disk, or choose another place",
    errno.ELOOP: "files are never written through a symbolic link; give the file that it leads to",
    errno.ENOENT: "check the name",
}
# What file systems answer that cannot sync a folder; those that can have nothing to say.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM)


def sentence(error: OSError, path: Path | str, doing: str = "written") -> str:
    """What an error of the system means for a file, and what to do about it."""
    advice = _ADVICE.get(error.errno or 0, "choose another place")
    if doing == "read" and error.errno not in (errno.EIO, errno.ENOENT):
        advice = "check that it may be read"
    return f"{path} cannot be {doing}: {error.strerror or error}; {advice}"


@contextmanager
def named(path: Path | str, failed: Failed = PersonaLensError, doing: str = "written") -> Iterator[None]:
    """Errors of the system as errors of the project that name a file.

    Args:
        path: The file or folder that is worked on.
        failed: Class of the error.
        doing: What cannot be done with it then.
    """
    try:
        yield
    except OSError as error:
        raise failed(sentence(error, path, doing)) from error


@contextmanager
def writing(
    target: Path,
    *,
    new: bool = False,
    shared: bool = False,
    failed: Failed = PersonaLensError,
) -> Iterator[BinaryIO]:
    """Write a file bit by bit; it is there, whole and on the disk, once the context ends without an error.

    Args:
        target: The file; its folder is made.
        new: Whether it must not be there yet.
        shared: Whether other processes and threads may be writing the same file.
        failed: Class of the errors.

    Raises:
        PersonaLensError: Of the class ``failed``, if it cannot be written, or is a link, a folder or a device.
    """
    make_folder(target.parent, failed)
    _check_target(target, new, failed)
    apart = f".{os.getpid()}-{threading.get_ident()}" if shared else ""
    part = target.with_name(f"{target.name}{apart}{PART}")
    with _removing(part):
        with named(target, failed):
            raw = _Raw(_created(part))
        with io.BufferedWriter(raw, BUFFER) as stream:
            try:
                yield cast(BinaryIO, stream)
                with named(target, failed):
                    stream.flush()
                    os.fsync(raw.fileno())
            except BaseException as error:
                raw.discard()
                if isinstance(error, OSError) and error is raw.error:
                    raise failed(sentence(error, target)) from error
                raise
        if new:
            _check_target(target, new, failed)
        with named(target, failed):
            os.replace(part, target)
            sync_folder(target.parent)


def write_bytes(
    target: Path,
    content: bytes,
    *,
    new: bool = False,
    shared: bool = False,
    failed: Failed = PersonaLensError,
) -> Path:
    """Write a file whole or not at all; arguments and errors as for `writing`."""
    with writing(target, new=new, shared=shared, failed=failed) as stream:
        stream.write(content)
    return target


def write_text(target: Path, text: str, *, new: bool = False, failed: Failed = PersonaLensError) -> Path:
    """Write text as UTF-8, its ends of lines as they are; arguments and errors as for `writing`."""
    return write_bytes(target, text.encode(), new=new, failed=failed)


def append(target: Path, content: bytes, failed: Failed = PersonaLensError) -> None:
    """Add to a file, and have it on the disk when this returns; after an error the file is as long as it was."""
    make_folder(target.parent, failed)
    _check_target(target, False, failed)
    with named(target, failed):
        there = target.exists()
        with _Raw(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _NO_FOLLOW, 0o666)) as raw:
            size = os.fstat(raw.fileno()).st_size
            try:
                rest = memoryview(content)
                while rest:
                    rest = rest[raw.write(rest) :]
                os.fsync(raw.fileno())
            except BaseException:
                with suppress(OSError):
                    os.ftruncate(raw.fileno(), size)
                raise
        if not there:
            sync_folder(target.parent)


def cut(target: Path, size: int, failed: Failed = PersonaLensError) -> None:
    """Shorten a file."""
    _check_target(target, False, failed)
    with named(target, failed):
        os.truncate(target, size)


def read_bytes(file: Path, failed: Failed = PersonaLensError) -> bytes:
    """The content of a file.

    Raises:
        PersonaLensError: Of the class ``failed``, if it cannot be read.
    """
    with named(file, failed, "read"):
        return file.read_bytes()


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal; memory does not grow with it."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def writing_folder(target: Path, failed: Failed = PersonaLensError) -> Iterator[Path]:
    """A folder to fill, which takes its place, whole and on the disk, once the context ends without an error.

    One that was there before goes.
    """
    make_folder(target.parent, failed)
    _check_target(target, False, failed, folder=True)
    part = target.with_name(target.name + PART)
    with _removing(part):
        with named(target, failed):
            remove(part)
            os.mkdir(part)
        yield part
        with named(target, failed):
            for file in sorted(part.rglob("*")):
                sync_folder(file)
            sync_folder(part)
            if target.exists():
                shutil.rmtree(target)
            os.replace(part, target)
            sync_folder(target.parent)


def make_folder(folder: Path, failed: Failed = PersonaLensError) -> Path:
    """Make a folder and those above it, as far as they are not there."""
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise failed(sentence(error, f"the folder {folder}", "made")) from error
    return folder


def remove(path: Path) -> None:
    """Remove a file, a link or a folder; it need not be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have a folder's entries, or a file, on the disk, where the file system can."""
    try:
        opened = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # Windows opens no folders
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(opened)


class Comparison(io.RawIOBase):
    """Takes what would be written to a file, and compares it with what the file holds; writes nothing.

    Args:
        file: It is there.
    """

    def __init__(self, file: Path) -> None:
        self._stream = file.open("rb")
        self._place = 0
        self._same = True

    def writable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """How much was taken."""
        return self._place

    def write(self, content: object) -> int:
        """Compare the next bytes."""
        taken = bytes(memoryview(content))  # type: ignore[arg-type]
        self._same = self._same and self._stream.read(len(taken)) == taken
        self._place += len(taken)
        return len(taken)

    def same(self) -> bool:
        """Whether all of it was the same; to be asked at the end."""
        return self._same and not self._stream.read(1)

    def close(self) -> None:
        """Let go of the file."""
        self._stream.close()
        super().close()


_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)


class _Raw(io.FileIO):
    """A file that is open for writing, and remembers the error that ended it."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb")
        self._discarded = False
        self.error: OSError | None = None

    def write(self, content: Buffer) -> int:
        if self._discarded:  # what the buffer still holds when it is closed
            return memoryview(content).nbytes
        try:
            return os.write(self.fileno(), content)
        except OSError as error:
            self.error = error
            raise

    def discard(self) -> None:
        """Take no more: the file will not be kept."""
        self._discarded = True


def _created(part: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW | getattr(os, "O_BINARY", 0)
    remove(part)  # of a process that was killed; a link goes, and not what it leads to
    return os.open(part, flags, 0o666)


@contextmanager
def _removing(part: Path) -> Iterator[None]:
    """Whatever goes wrong, what was written so far goes."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            remove(part)
        raise


def _check_target(target: Path, new: bool, failed: Failed, folder: bool = False) -> None:
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise failed(sentence(error, target)) from error
    kinds: list[tuple[Callable[[int], bool], str]] = [
        (stat.S_ISLNK, "is a symbolic link, and nothing is written through one; give what it leads to, or remove it"),
        *([] if folder else [(stat.S_ISDIR, "is a folder; give a file")]),
    ]
    for is_kind, words in kinds:
        if is_kind(mode):
            raise failed(f"{target} {words}")
    if not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)):
        raise failed(f"{target} is no ordinary {'folder' if folder else 'file'}; choose another name")
    if new:
        raise failed(f"{target} exists already; choose another name, or remove it")


CACHE_VARIABLE = "PERSONA_LENS_CACHE"


def cache_folder() -> Path:
    """The folder of ``PERSONA_LENS_CACHE``, or one in the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return platformdirs.user_cache_path("persona-lens")
