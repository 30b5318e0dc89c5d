"""The documents and their fenced blocks: what the tests of documents look at."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
SITE = sorted((ROOT / "docs").rglob("*.md"))
"""Pages of the site that are written by hand; docs/generated.py makes the others."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: str
    language: str
    text: str
    line: int

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks_of(path: Path, *languages: str) -> list[Block]:
    """The blocks of a document in these languages, in their order."""
    text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    everything = [Block(name, m[1], m[2], text.count("\n", 0, m.start()) + 2) for m in found]
    return [block for block in everything if block.language in languages]
