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
from typing import TYPE_CHECKING
from urllib.parse import urldefrag, urljoin, urlsplit

if TYPE_CHECKING:
    import httpx

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
