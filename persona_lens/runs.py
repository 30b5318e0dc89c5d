"""`RunFolder`: a folder that one run fills, and that the same command continues after any interruption.

Nothing in it depends on the time, the machine's load or how often the run was stopped: a run that was killed and
started again ends with the same bytes as one that was not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from persona_lens.errors import PersonaLensError

CONFIG = "run.json"


class RunError(PersonaLensError):
    """A run folder that cannot be used for this run."""


class RunFolder:
    """A run's folder, held by one process at a time; a context manager.

    Args:
        path: The folder; created if it is not there.
        config: Everything that determines the result, as JSON values. Kept in ``run.json``.

    Raises:
        RunError: If the folder holds another run (the difference is in the message), holds something that is no run, or
            another process works in it.
    """

    def __init__(self, path: Path | str, config: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.config = json.loads(json.dumps(config))
        self._check_kind()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"the folder {self.path} cannot be made: {error}") from error
        self._lock = FileLock(self.path / ".lock")

    def __enter__(self) -> RunFolder:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunError(
                f"another process is working in {self.path}; wait for it, or choose another folder"
            ) from None
        try:
            self._claim()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()

    def _check_kind(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; give a folder for the run")
        if self.path.is_dir() and not (self.path / CONFIG).exists():
            strangers = [p.name for p in self.path.iterdir() if p.name != ".lock" and not p.name.endswith(".part")]
            if strangers:
                raise RunError(
                    f"{self.path} holds other files ({strangers[0]}, …) and no run; give a new or empty folder"
                )

    def _claim(self) -> None:
        file = self.path / CONFIG
        if not file.exists():
            self.write_json(CONFIG, self.config)
            return
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise RunError(f"{file} is damaged; remove {self.path} and start the run again") from None
        if stored != self.config:
            lines = "\n  ".join(differences(stored, self.config))
            raise RunError(
                f"{self.path} holds a run with another configuration:\n  {lines}\n"
                "Choose another folder, or repeat the command that began this one."
            )

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Write a file whole or not at all."""
        with self.writing(name) as stream:
            stream.write(content)
        return self.path / name

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """Write a file bit by bit; it is there, whole, once the context ends without an error."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        with part.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(target)

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON file whole or not at all, its bytes a function of the value."""
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        return self.write_bytes(name, (text + "\n").encode())

    def write_lines(self, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Write a JSONL file whole or not at all."""
        return self.write_bytes(name, _lines(rows))

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows to a JSONL file and have them on the disk when this returns."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab") as stream:
            stream.write(_lines(rows))
            stream.flush()
            os.fsync(stream.fileno())

    def remove(self, name: str) -> None:
        """Remove a file, and its folder if that is empty then; neither need be there."""
        target = self.path / name
        target.unlink(missing_ok=True)
        if target.parent != self.path and target.parent.is_dir() and not any(target.parent.iterdir()):
            target.parent.rmdir()

    def rows(self, name: str, batch_sizes: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """The rows of a JSONL file, without those of an interrupted write, which are cut from the file.

        Args:
            name: The file; one that is not there has no rows.
            batch_sizes: Rows of each batch, in the order they were to be appended: rows of an unfinished batch are
                cut too.
        """
        found = list(self.each_row(name))
        whole = len(found) if batch_sizes is None else _whole_rows(len(found), batch_sizes)
        if whole < len(found):
            with (self.path / name).open("rb") as stream:
                size = sum(map(len, islice(stream, whole)))
            os.truncate(self.path / name, size)
        return found[:whole]

    def each_row(self, name: str) -> Iterator[dict[str, Any]]:
        """The rows of a JSONL file one at a time, as `rows` has them; memory does not grow with their number."""
        file = self.path / name
        if not file.exists():
            return
        whole = 0
        with file.open("rb") as stream:
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                try:
                    row = json.loads(line)
                except ValueError:
                    raise RunError(f"{file} is damaged; remove {self.path} and start the run again") from None
                yield row
        if whole < file.stat().st_size:
            os.truncate(file, whole)


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()


def _whole_rows(rows: int, batch_sizes: Sequence[int]) -> int:
    whole = 0
    for size in batch_sizes:
        if whole + size > rows:
            break
        whole += size
    return whole


def differences(stored: Any, wanted: Any, path: str = "") -> list[str]:
    """Where two JSON values differ, one line a place, as ``path: stored -> wanted``."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        keys = [*stored, *(key for key in wanted if key not in stored)]
        return [
            line
            for key in keys
            for line in differences(stored.get(key, _ABSENT), wanted.get(key, _ABSENT), f"{path}.{key}".lstrip("."))
        ]
    return [] if stored == wanted else [f"{path}: {_shown(stored)} -> {_shown(wanted)}"]


_ABSENT = object()


def _shown(value: Any) -> str:
    return "(absent)" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
