"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from persona_lens.core import files
from persona_lens.core.errors import PersonaLensError


def test_a_file_is_written_and_synced_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    if Path("/proc/self/fd").exists():
        monkeypatch.setattr(os, "fsync", fsync)
    files.write_bytes(tmp_path / "deep" / "file", b"x" * 3_000_000)
    assert (tmp_path / "deep" / "file").read_bytes() == b"x" * 3_000_000
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file"]
    if synced:
        assert [Path(each).name for each in synced] == ["file.part", "deep"]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize(
    ("code", "advice"),
    [(errno.ENOSPC, "make room there"), (errno.EIO, "check the disk"), (errno.EROFS, "choose a place")],
)
def test_an_error_of_the_disk_is_a_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, advice: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(PersonaLensError, match=rf"file cannot be written: {os.strerror(code)}; {advice}"):
        files.write_bytes(tmp_path / "file", b"new")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, bytes(content)[:7]))
    files.write_bytes(tmp_path / "file", bytes(range(100)))
    files.append(tmp_path / "file", bytes(range(100, 200)))
    assert (tmp_path / "file").read_bytes() == bytes(range(200))


def test_what_cannot_be_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, words in [("link", "symbolic link"), ("folder", "is a folder"), ("pipe", "is no ordinary file")]:
        for write in (files.write_bytes, files.append):
            with pytest.raises(PersonaLensError, match=words):
                write(tmp_path / name, b"")
    with pytest.raises(PersonaLensError, match="File name too long; choose a shorter name"):
        files.write_bytes(tmp_path / ("x" * 253), b"")
    with pytest.raises(PersonaLensError, match=r"the folder .* cannot be made"):
        files.write_bytes(tmp_path / ("x" * 300) / "file", b"")
    files.write_bytes(tmp_path / "new", b"1", new=True)
    with pytest.raises(PersonaLensError, match="exists already"):
        files.write_bytes(tmp_path / "new", b"2", new=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link", "new", "pipe"]


def test_an_error_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), files.writing(tmp_path / "file") as stream:  # noqa: PT012
        stream.write(b"half")
        _ = 1 / 0
    with pytest.raises(ZeroDivisionError), files.writing_folder(tmp_path / "folder") as part:  # noqa: PT012
        (part / "half").touch()
        _ = 1 / 0
    assert not list(tmp_path.iterdir())
