"""Fetching one file over HTTP so that an interruption costs nothing: what arrived is never sent again."""

from __future__ import annotations

import hashlib
import os
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from persona_lens.core.errors import PersonaLensError
from persona_lens.core.progress import Progress, no_progress

if TYPE_CHECKING:
    import httpx

__all__ = ["ModelError"]


class ModelError(PersonaLensError):
    """A model cannot be found, fetched, loaded or talked to; the message says what to do about it."""


__all__ = ["DownloadError", "RemoteFile", "fetch", "http_client", "sha256_of"]

_ATTEMPTS = 5
_SECONDS = 60.0
"""Until an answer begins; and how often a download has to have brought `_LEAST_BYTES` more."""
_LEAST_BYTES = 2**14
_LEAST_OF_CONNECTION = 2**10  # bytes, below which a connection counts as failed


class DownloadError(ModelError):
    """A file could not be fetched from one particular place; another place may still have it."""


@dataclass(frozen=True)
class RemoteFile:
    """A file known by its content."""

    name: str
    """File name."""
    sha256: str
    """SHA-256 of the content, in hexadecimal."""
    size: int
    """Length in bytes."""


def http_client(certificates: str | None = None, proxy: str | None = None) -> httpx.Client:
    """Make a client that follows redirects and trusts what this machine trusts.

    Args:
        certificates: A file of further certificate authorities.
        proxy: A proxy address; the usual environment variables apply without it.

    Raises:
        DownloadError: The certificate file cannot be read.
    """
    import httpx

    context = httpx.create_ssl_context()
    extra = certificates or os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    if extra:
        try:
            context.load_verify_locations(**{"capath" if Path(extra).is_dir() else "cafile": extra})
        except (OSError, ssl.SSLError) as error:
            raise DownloadError(f"cannot read the certificates in {extra}: {error}") from error
    from persona_lens.core.transport import BoundedClient, Bounds

    timeout = httpx.Timeout(_SECONDS, connect=15.0)
    return BoundedClient(Bounds(_SECONDS), verify=context, proxy=proxy, follow_redirects=True, timeout=timeout)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch(
    client: httpx.Client,
    url: str,
    file: RemoteFile,
    folder: Path,
    progress: Progress = no_progress,
    *,
    pause: float = 0.5,
) -> Path:
    """Fetch a file into a folder, going on from ``<name>.part`` where an earlier try left one.

    Args:
        client: The HTTP client.
        url: Where the file is.
        file: What it must be.
        folder: Where to put it. The file appears under its own name only when it is complete and checked.
        progress: Told of every chunk.
        pause: Seconds before the first retry; doubled for each further one.

    Returns:
        The path of the finished file.

    Raises:
        DownloadError: The server cannot be reached, or what it sends is not the file. A partial download is
            kept in the first case and deleted in the second.
    """
    part = folder / f"{file.name}.part"
    resumed = part.exists()
    _complete(client, url, file, part, progress, pause)
    if sha256_of(part) != file.sha256 and resumed:
        # The part kept from an earlier run may be what is wrong, and this server blameless: give it one fresh
        # try.
        part.unlink()
        _complete(client, url, file, part, progress, pause)
    found = sha256_of(part)
    if found != file.sha256:
        part.unlink()
        raise DownloadError(
            f"{file.name} from {url} is not the file expected (SHA-256 {found[:12]}…, "
            f"expected {file.sha256[:12]}…); it was deleted"
        )
    finished = folder / file.name
    os.replace(part, finished)
    return finished


def _complete(client: httpx.Client, url: str, file: RemoteFile, part: Path, progress: Progress, pause: float) -> None:
    """Bring the part to its full size, through as many connections as that takes."""
    import httpx

    failures = 0
    while True:
        before = _size(part)
        if before == file.size:
            return
        try:
            _one_connection(client, url, file, part, progress)
            reason = f"{_size(part)} of {file.size} bytes came"
        except httpx.TransportError as error:
            reason = f"{type(error).__name__}: {error}"
        except httpx.HTTPStatusError as error:
            code = error.response.status_code
            if code == 416:
                part.unlink(missing_ok=True)  # longer than what the server has: not a part of this file
            if code not in (408, 429) and code < 500:
                raise DownloadError(f"{url} answered {code}") from None  # its text has the whole address
            reason = f"the server answered {code}"
        if (after := _size(part)) >= file.size:
            return
        # A connection that brought something is not a failed one: a slow, flaky line gets there in the end.
        failures = 0 if after - before >= _LEAST_OF_CONNECTION else failures + 1
        if failures >= _ATTEMPTS:
            raise DownloadError(f"the download of {url} failed ({reason})")
        time.sleep(pause * 2**failures)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _one_connection(client: httpx.Client, url: str, file: RemoteFile, part: Path, progress: Progress) -> None:
    have = _size(part)
    if have > file.size:
        part.unlink()
        have = 0
    # Without "identity" a server may compress on the fly, and byte offsets would no longer be those of the
    # file.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with client.stream("GET", url, headers=headers) as response:
        response.raise_for_status()
        if not (response.status_code == 206 and _starts_at(response, have)):
            have = 0
        begun, had = time.monotonic(), have
        with part.open("ab" if have else "wb") as out:
            progress(have, file.size, f"downloading {file.name}")
            # As they come: gathered into larger chunks, what had gathered would be lost with the connection.
            for chunk in response.iter_raw():
                out.write(chunk)
                have += len(chunk)
                if have > file.size:
                    # Not the file: the checksum will say so, and an endless answer must not fill the disk.
                    break
                if time.monotonic() - begun > _SECONDS:
                    if have - had < _LEAST_BYTES:
                        return
                    begun, had = time.monotonic(), have
                progress(have, file.size, f"downloading {file.name}")


def _starts_at(response: httpx.Response, offset: int) -> bool:
    content_range: str = response.headers.get("content-range", "")
    return content_range.replace("bytes", "").strip().startswith(f"{offset}-")
