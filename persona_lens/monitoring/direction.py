"""Which way tokens run: parts of a text from left to right, and others from right to left."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from persona_lens.monitoring.tokens import TokenPiece

Direction = Literal["ltr", "rtl"]
# Digits run from left to right everywhere.
_STRONG: dict[str, Direction] = {"L": "ltr", "EN": "ltr", "AN": "ltr", "R": "rtl", "AL": "rtl"}
_LETTERS = ("L", "R", "AL")


@dataclass(frozen=True)
class Run:
    """Pieces next to each other that run in the same direction."""

    direction: Direction
    pieces: tuple[TokenPiece, ...]


@dataclass(frozen=True)
class Line:
    """Pieces up to a line feed.

    Attributes:
        direction: That of its first letter.
        runs: Its pieces in logical order.
    """

    direction: Direction
    runs: tuple[Run, ...]


def lines_of(pieces: Sequence[TokenPiece]) -> Iterator[Line]:
    """Lay out pieces as the Unicode bidirectional algorithm would lay out their text, but with no piece torn apart.

    Each line has the direction of its first letter. Within it, pieces follow the direction of their own first letter
    or digit; those without any, such as spaces, that of their neighbours where these agree, and else that of the line.
    """
    line: list[TokenPiece] = []
    for piece in pieces:
        line.append(piece)
        if "\n" in piece.text:
            yield _line(line)
            line = []
    if line:
        yield _line(line)


def is_mixed(piece: TokenPiece) -> bool:
    """Whether a piece holds letters of both directions, so that its neighbours need protection from it."""
    return len({_STRONG[kind] for kind in _kinds(piece) if kind in _STRONG}) > 1


def _line(pieces: Sequence[TokenPiece]) -> Line:
    first = next((kind for piece in pieces for kind in _kinds(piece) if kind in _LETTERS), "L")
    base = _STRONG[first]
    found = [next((_STRONG[kind] for kind in _kinds(piece) if kind in _STRONG), None) for piece in pieces]
    left = _carried(found, base)
    right = _carried(found[::-1], base)[::-1]
    resolved = [one if one == other else base for one, other in zip(left, right, strict=True)]
    runs = groupby(zip(resolved, pieces, strict=True), key=lambda pair: pair[0])
    return Line(base, tuple(Run(direction, tuple(piece for _, piece in members)) for direction, members in runs))


def _carried(found: Iterable[Direction | None], base: Direction) -> list[Direction]:
    """Each piece's direction, or that of the nearest piece before it that has one, or the line's."""
    carried: list[Direction] = []
    for direction in found:
        carried.append(direction or (carried[-1] if carried else base))
    return carried


def _kinds(piece: TokenPiece) -> Iterator[str]:
    """Bidirectional classes of what is shown; control tokens have names, which are no part of the text."""
    return iter(()) if piece.special else map(unicodedata.bidirectional, piece.shown)
