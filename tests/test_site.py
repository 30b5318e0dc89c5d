"""The site as it is built: every link leads somewhere, nothing comes from another host, the reference is complete."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest

import persona_lens
from persona_lens.cli.commands import COMMANDS, Group
from tests.pages import ROOT, SITE

HERE = "https://site.test/"  # where its pages are taken to stand


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does: a dead link in a page's source is an error there."""
    folder = tmp_path_factory.mktemp("site")
    command = (sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class _Page(HTMLParser):
    """The anchors of a page, what it links to, and what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors, self.links, self.loads = {""}, set[str](), set[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        elif "href" in given and given.get("rel") != "canonical":
            self.loads.add(given["href"])
        self.loads |= {given[name] for name in ("src", "srcset", "poster", "data") if name in given}


@cache
def _page(file: Path) -> _Page:
    page = _Page()
    page.feed(file.read_text(encoding="utf-8"))
    return page


def _pages(site: Path) -> Iterator[tuple[str, _Page]]:
    for file in sorted(site.rglob("*.html")):
        yield urljoin(HERE, file.relative_to(site).as_posix()), _page(file)


def test_every_link_and_anchor_leads_somewhere(site: Path) -> None:
    dead = []
    for address, page in _pages(site):
        if address.endswith("/404.html"):  # its links begin at the root
            continue
        for link in page.links | page.loads:
            target, anchor = urldefrag(urljoin(address, link))
            if not target.startswith(HERE):
                continue
            file = site / unquote(target.removeprefix(HERE))
            file = file / "index.html" if file.is_dir() else file
            if not file.is_file() or (file.suffix == ".html" and unquote(anchor) not in _page(file).anchors):
                dead.append(f"{address}: {link}")
    assert dead == []


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    for address, page in _pages(site):
        for link in page.loads:
            assert urljoin(address, link).startswith((HERE, "data:")), f"{address}: {link}"
    for style in site.rglob("*.css"):
        for link in re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", style.read_text(encoding="utf-8")):
            assert not "".join(link).startswith(("http:", "https:", "//")), f"{style}: {link}"


def test_the_reference_holds_what_can_be_imported(site: Path) -> None:
    anchors = _page(site / "reference" / "python" / "index.html").anchors
    found = {name.removeprefix("persona_lens.") for name in anchors if name.startswith("persona_lens.")}
    assert {name for name in found if "." not in name} == set(dir(persona_lens)) - {"__version__"}


def test_the_reference_holds_every_command(site: Path) -> None:
    for name, entry in COMMANDS.items():
        text = (site / "reference" / "commands" / name / "index.html").read_text(encoding="utf-8")
        words = [f"{name} {word}" for word in entry.commands] if isinstance(entry, Group) else [name]
        for command in words:
            assert f"persona-lens {command}" in re.sub(r"<[^>]+>", "", text)


def test_every_page_is_there(site: Path) -> None:
    built = {file.parent.relative_to(site).as_posix() for file in site.rglob("index.html")}
    written = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in SITE} - {"index"}
    notebooks = {f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert written | notebooks | {"changelog", "reference/python", "reference/commands"} <= built
