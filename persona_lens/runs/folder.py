"""`RunFolder`: a folder that one run fills, and that the same command continues after any interruption.

Nothing in it depends on the time, the machine's load or how often the run was stopped: a run that was killed and
started again ends with the same bytes as one that was not. What a finished run wrote is never replaced by something
else, unless changes are accepted, and a finished run can be read where nothing can be written.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

from persona_lens.core.documents import json_lines
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.files import (
    CONFIG,
    PART,
    Comparison,
    append,
    cut,
    make_folder,
    named,
    read_bytes,
    remove,
    sentence,
    writing,
    writing_folder,
)
from persona_lens.core.progress import keeping

ACCEPTED, BOUND, VERIFIED = "accepted_changes", "bound", "edits_verified"
_ACCEPTING: ContextVar[bool] = ContextVar("accepting changes", default=False)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class RunError(PersonaLensError):
    """A run folder that cannot be used for this run."""


@contextmanager
def accepting_changes() -> Iterator[None]:
    """Within it, runs go on with another configuration than they began with, and replace what comes out otherwise.

    The configuration stays what it was, with what was accepted noted beside it, in ``run.json`` and wherever the
    configuration goes.
    """
    token = _ACCEPTING.set(True)
    try:
        yield
    finally:
        _ACCEPTING.reset(token)


class RunFolder:
    """A run's folder, held by one process at a time; a context manager.

    A run that is refused before anything of it is kept leaves the folder free for another.

    Args:
        path: The folder; created if it is not there.
        config: Everything that determines the result, as JSON values. Kept in ``run.json``.

    Attributes:
        config: As it was when the run began: another device number or patch version since then changes nothing.

    Raises:
        RunError: If the folder holds another run (the difference is in the message), holds something that is no run, or
            another process works in it.
    """

    def __init__(self, path: Path | str, config: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = json.loads(json.dumps(config))
        self._readable_only = self._began = False
        with named(self.path, RunError, "used"):
            self._check_kind()
        make_folder(self.path, RunError)
        from filelock import FileLock  # here: `--help` does without

        self._lock = FileLock(self.path / ".lock")

    def __enter__(self) -> RunFolder:
        from filelock import Timeout

        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunError(
                f"another process is working in {self.path}; wait for it, or choose another folder"
            ) from None
        except OSError as error:
            if error.errno not in _READ_ONLY or not (self.path / CONFIG).exists():
                raise RunError(sentence(error, self.path)) from error
            self._readable_only = True  # enough for a run that is finished
        try:
            self._claim()
            if not self._readable_only:
                self._clean()
                keeping()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._began and isinstance(error, PersonaLensError):
                self._give_up()
        finally:
            self._lock.release()

    def _give_up(self) -> None:
        """Let go of a folder in which a run was refused before it kept anything, so that it may begin otherwise."""
        with suppress(OSError):  # why it was refused is to be told
            if {each.name for each in self.path.iterdir()} <= {CONFIG, ".lock"}:
                remove(self.path / CONFIG)

    def _check_kind(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; give a folder for the run")
        if self.path.is_dir() and not (self.path / CONFIG).exists():
            strangers = [p.name for p in self.path.iterdir() if p.name != ".lock" and not p.name.endswith(PART)]
            if strangers:
                raise RunError(
                    f"{self.path} holds other files ({strangers[0]}, …) and no run; give a new or empty folder"
                )

    def _claim(self) -> None:
        file = self.path / CONFIG
        verified = {VERIFIED: True} if _was_verified(self.config) else {}
        if not file.exists():
            self.write_bytes(CONFIG, json_bytes({**self.config, **verified}), replace=True)
            self._began = True
            return
        stored = self._stored()
        accepted, bound = stored.pop(ACCEPTED, []), stored.pop(BOUND, {})
        known = {VERIFIED: stored.pop(VERIFIED)} if VERIFIED in stored else {}
        lines = [line for line in differences(stored, self.config) if line not in accepted]
        if lines:
            self._accept(lines, stored)
        accepted += lines
        self.config = {**stored, **({ACCEPTED: accepted} if accepted else {})}
        if lines or (verified and not known and not self._readable_only):
            more = {**({BOUND: bound} if bound else {}), **(known or verified)}
            self.write_bytes(CONFIG, json_bytes({**self.config, **more}), replace=True)

    def _accept(self, lines: Sequence[str], stored: Mapping[str, Any]) -> None:
        """Refuse a configuration that differs, unless changes are accepted and it is the same kind of run."""
        if _ACCEPTING.get() and stored.get("kind") == self.config.get("kind"):
            return
        shown = "\n  ".join(lines)
        raise RunError(
            f"{self.path} holds a run with another configuration:\n  {shown}\nChoose another folder, or repeat the "
            "command that began this one; --accept-changes goes on all the same, and notes it."
        )

    def _stored(self) -> dict[str, Any]:
        return self.read_json(CONFIG, f"remove {self.path} and start the run again")

    def _clean(self) -> None:
        """Remove what a killed process had half written; runs inside of this one see to themselves."""
        for folder, inner, names in os.walk(self.path):
            here = Path(folder)
            if here != self.path and CONFIG in names:
                inner.clear()
                continue
            for name in [each for each in (*inner, *names) if each.endswith(PART)]:
                with named(here / name, RunError, "removed"):
                    remove(here / name)
            inner[:] = [each for each in inner if not each.endswith(PART)]

    def bind(self, name: str, value: Any) -> None:
        """Make something part of the configuration that is known only now, such as a model that was just opened.

        Raises:
            RunError: If it was something else when the run began.
        """
        value, whole = json.loads(json.dumps(value)), self._stored()
        bound = whole.setdefault(BOUND, {})
        if name in bound:
            accepted = whole.get(ACCEPTED, [])
            lines = [line for line in differences({name: bound[name]}, {name: value}) if line not in accepted]
            if not lines:
                return
            self._accept(lines, whole)
            self.config[ACCEPTED] = whole[ACCEPTED] = [*accepted, *lines]
        else:
            bound[name] = value
        self.write_bytes(CONFIG, json_bytes(whole), replace=True)

    def write_bytes(self, name: str, content: bytes, *, replace: bool = False) -> Path:
        """Write a file whole or not at all; ``replace`` as for `writing`."""
        with self.writing(name, replace=replace) as stream:
            stream.write(content)
        return self.path / name

    @contextmanager
    def writing(self, name: str, *, replace: bool = False) -> Iterator[BinaryIO]:
        """Write a file bit by bit; it is there, whole, once the context ends without an error.

        Nothing is written if it is there with the same content.

        Args:
            name: The file.
            replace: Whether it may have had another content.

        Raises:
            RunError: If it has another content and may not be replaced.
        """
        target = self.path / name
        if not (replace or _ACCEPTING.get()) and target.is_file() and not target.is_symlink():
            with named(target, RunError, "read"):
                comparison = Comparison(target)
            with comparison:
                yield cast(BinaryIO, comparison)
                if not comparison.same():
                    raise RunError(
                        f"{target} is there, and what this run gives now is something else: it, or what it was made "
                        "of, was changed or damaged, or another machine rounds otherwise. It stays as it is. Remove it "
                        "to have it written anew, or replace it with --accept-changes"
                    )
            return
        self._check_writable(name)
        with writing(target, failed=RunError) as stream:
            yield stream

    @contextmanager
    def writing_folder(self, name: str) -> Iterator[Path]:
        """A folder to fill, that takes its place once the context ends without an error."""
        self._check_writable(name)
        with writing_folder(self.path / name, RunError) as part:
            yield part

    def _check_writable(self, name: str) -> None:
        if self._readable_only:
            raise RunError(
                f"{self.path / name} cannot be written: the folder {self.path} can only be read, and the run in it is "
                "not finished; copy the folder to where it can be written, and go on there"
            )
        for folder in (self.path / name).parents:
            if folder == self.path:
                return
            if folder.is_symlink():
                raise RunError(f"{folder} is a symbolic link, and nothing is written through one; remove it")

    def write_json(self, name: str, value: Mapping[str, Any], *, free: Sequence[str] = ()) -> Path:
        """Write a JSON file whole or not at all, its bytes a function of the value.

        Args:
            name: The file.
            value: The object. A file that differs in nothing that can change a result stays.
            free: Keys of the object that say nothing of the result either.
        """
        if self.keeps(name) and not (self.path / name).is_symlink():
            objects = self.read_json(name), json.loads(json.dumps(value))
            stored, wanted = ({key: one[key] for key in one if key not in free} for one in objects)
            if not differences(stored, wanted):
                return self.path / name
        return self.write_bytes(name, json_bytes(value))

    def read_json(self, name: str, advice: str = "remove it, and the same command makes it again") -> dict[str, Any]:
        """The object in a JSON file of the run.

        Raises:
            RunError: If it is damaged.
        """
        file = self.path / name
        try:
            found = json.loads(read_bytes(file, RunError))
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise RunError(f"{file} is damaged; {advice}")
        return found

    def write_lines(self, name: str, rows: Iterable[Mapping[str, Any]], *, replace: bool = False) -> Path:
        """Write a JSONL file whole or not at all; ``replace`` as for `writing`."""
        return self.write_bytes(name, json_lines(rows), replace=replace)

    def write_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Write a JSONL file with the number of each row, in the order of the plan, in front of it."""
        return self.write_lines(name, ({"row": number, **row} for number, row in enumerate(rows)))

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows to a JSONL file and have them on the disk when this returns."""
        self._check_writable(name)
        append(self.path / name, json_lines(rows), RunError)

    def rows(self, name: str) -> Iterator[dict[str, Any]]:
        """The rows of a JSONL file one at a time, without that of an interrupted write, which is cut from the file."""
        return (row for _, row in self.each_line(name))

    def each_line(self, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows of a JSONL file with the numbers of their lines, from 1."""
        file = self.path / name
        if not file.exists():
            return
        whole = 0
        with named(file, RunError, "read"), file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if not isinstance(row, dict):
                    raise self.damaged(name, number)
                yield number, row
            size = os.fstat(stream.fileno()).st_size
        if whole < size:
            self._check_writable(name)
            cut(file, whole, RunError)

    def damaged(self, name: str, line: int, *, below: bool = False) -> RunError:
        """The error about a line that is not what this run wrote; ``below`` if those below it rest on it."""
        which = "that line and all below it" if below else "that line"
        return RunError(
            f"line {line} of {self.path / name} is damaged, or not what this run wrote there; remove {which}, and the "
            "same command does again what stood there"
        )

    def keeps(self, name: str) -> bool:
        """Whether a file or folder that was written whole is there and stays."""
        return (self.path / name).exists() and not _ACCEPTING.get()


def _was_verified(config: Mapping[str, Any]) -> bool:
    """Whether it was made sure, in this process, that edits act on the model of a run."""
    if not isinstance(config.get("model"), Mapping):
        return False
    from persona_lens.backend.verification import was_verified  # which loads torch; so has whoever opened the model

    return was_verified(config["model"])


def json_bytes(value: Any) -> bytes:
    """A JSON value as it is written."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def file_prefix(number: int, *names: str) -> str:
    """What the names of files about something begin with: different for every number, whatever the names are."""
    plain = "-".join(re.sub(r"[^\w-]+", "_", name, flags=re.ASCII)[:40] for name in names)
    return f"{number:02d}-{plain}-"


def differences(stored: Any, wanted: Any, path: str = "") -> list[str]:
    """Where two configurations differ, one line a place, as ``path: stored -> wanted``.

    What cannot change a result is no difference: which of several devices, and the patch versions of libraries.
    """
    if isinstance(stored, dict) and isinstance(wanted, dict):
        pairs = [
            (f"{path}.{key}".lstrip("."), stored.get(key, _ABSENT), wanted.get(key, _ABSENT))
            for key in {**stored, **wanted}
        ]
    elif isinstance(stored, list) and isinstance(wanted, list) and len(stored) == len(wanted):
        pairs = [(f"{path}[{i}]", one, other) for i, (one, other) in enumerate(zip(stored, wanted, strict=True))]
    else:
        alike = type(stored) is type(wanted) and _binding(path, stored) == _binding(path, wanted)
        return [] if alike or stored == wanted else [f"{path}: {_shown(stored)} -> {_shown(wanted)}"]
    return [line for place, one, other in pairs for line in differences(one, other, place)]


def _binding(path: str, value: Any) -> Any:
    """What of a value binds a run."""
    if not isinstance(value, str):
        return value
    parent, _, key = path.rpartition(".")
    if key == "device":
        return re.sub(r":\d+$", "", value)
    if key == "backend" or parent.rpartition(".")[2] == "versions":
        return re.sub(r"\b(\d+\.\d+)\.\d[\w.+]*", r"\1", value)
    return value


_ABSENT = object()


def _shown(value: Any) -> str:
    return "(absent)" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
