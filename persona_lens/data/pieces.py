"""`TokenPiece`: what tokens show, and which way they run. A character spread over several tokens is one piece."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from typing import TYPE_CHECKING, Literal

import regex

from persona_lens.core.text import code_of, printable
from persona_lens.data.tables import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from persona_lens.backend.tokens import TokenIds

MAX_JOINED = 48  # tokens of one character: a family emoji has about 40 bytes; endless accents are cut here
NO_ID = -1  # of a token whose id is not known, only its text
_IDS = 2**32  # what a tokenizer can be asked about
_WINDOW = 8  # tokens without a whole character, after which all that stands before them is decoded too
_MARKS = {" ": "␣", "\t": "⇥"}
_INVISIBLE = ("Zs", "Zl", "Zp", "Cc", "Cf", "Cs")
_CHARACTERS = regex.compile(r"\X")


@dataclass(frozen=True)
class TokenPiece:
    """A run of tokens that show whole characters; almost always one token.

    Attributes:
        text: What they decode to. The texts of all pieces, put together, are the decoded ids.
        start: Index of the first token.
        ids: The tokens' ids, at least one; `NO_ID` where one is not known.
        special: A control token, whose text is its name.
    """

    text: str
    start: int
    ids: tuple[int, ...]
    special: bool = False

    @property
    def stop(self) -> int:
        """Index behind the last token."""
        return self.start + len(self.ids)

    @cached_property
    def shown(self) -> str:
        """The text with everything visible in it, to be shown where spaces and line feeds are kept.

        Line feeds are marked by ``↵`` and kept. A piece of nothing but spaces shows ``␣``, one without any text its
        id. Invisible characters stand there by code, and marks that belong on another character on a dotted circle.
        """
        if not self.text:
            return " ".join("∅" if token == NO_ID else f"[id {token}]" for token in self.ids)
        if not self.text.strip(" \t"):
            return "".join(map(_MARKS.__getitem__, self.text))
        if not any(map(_is_visible, self.text)):
            return "".join("↵\n" if c == "\n" else _MARKS.get(c) or _by_code(c) for c in self.text)
        text = printable(self.text.replace("\r\n", "\N{SYMBOL FOR CARRIAGE RETURN}\n"))
        text = text.replace("\t", _MARKS["\t"]).replace("\n", "↵\n")
        return f"\N{DOTTED CIRCLE}{text}" if unicodedata.category(text[0]) in ("Mn", "Mc", "Me") else text


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[TokenPiece, ...]:
    """Split token ids into pieces of text, each token in exactly one.

    Tokens are never decoded one by one: an emoji or an ideograph is often spread over several, none of which has a
    text of its own. They are joined until their text is whole and does not change any more, and further until it ends
    between characters as readers see them: a letter with its accents, an emoji with its modifiers. Control tokens, and
    ids that the tokenizer does not know, stand alone.

    Args:
        tokenizer: The model's own.
        ids: Token ids.

    Raises:
        DataError: If an id is none.
    """
    pieces: list[TokenPiece] = []
    for piece in whole_pieces(tokenizer, ids):
        if pieces and _continues(pieces[-1], piece):
            last = pieces.pop()
            piece = TokenPiece(last.text + piece.text, last.start, last.ids + piece.ids)
        pieces.append(piece)
    return tuple(pieces)


def whole_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[TokenPiece, ...]:
    """Like `token_pieces`, but split between any two code points, so that an accent may stand alone."""
    tokens = tuple(int(token) for token in ids)
    for place, token in enumerate(tokens):
        if not 0 <= token < _IDS:
            raise DataError(f"token {place} has the id {token}, which no tokenizer has; ids count from 0")
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    unknown = {token for token in set(tokens) if tokenizer.convert_ids_to_tokens(token) is None}
    text = _decode(tokenizer, tokens)
    cuts = _cuts(tokenizer, tokens, text, special | unknown)
    pieces = []
    for (start, begin), (stop, end) in pairwise(cuts):
        alone = stop == start + 1 and tokens[start] in special
        pieces.append(TokenPiece(text[begin:end], start, tokens[start:stop], alone))
    return tuple(pieces)


def _cuts(tokenizer: PreTrainedTokenizerBase, tokens: TokenIds, text: str, alone: set[int]) -> list[tuple[int, int]]:
    """Between which tokens a text can be cut, each with its place in the text, from (0, 0) to the end.

    A text can be cut where that of the tokens so far is what the whole begins with: within a character it ends in a
    replacement character instead. Where several places in a row have the same text, the tokens between them are parts
    of a character that is a replacement character itself, or have no text, and the last of the places is taken.
    """
    cuts = [(0, 0)]
    pending: tuple[int, int] | None = None  # may still move, while tokens come that add no text
    for stop in range(1, len(tokens) + 1):
        length = _length(tokenizer, tokens, text, cuts, stop)
        if length is None:
            continue
        if tokens[stop - 1] in alone:
            before = [pending] if pending is not None and pending[0] == stop - 1 else []
            cuts += [*before, (stop, length)]
            pending = None
        elif pending is not None and length > pending[1]:
            cuts.append(pending)
            pending = (stop, length)
        elif pending is not None or length > cuts[-1][1]:
            pending = (stop, length)
    cuts += [pending] if pending is not None else []
    if cuts[-1][0] < len(tokens):  # what is left adds no text, or none that can be told apart
        start, length = cuts[-1]
        if len(cuts) > 1 and length == len(text) and tokens[start - 1] not in alone:
            cuts.pop()
        cuts.append((len(tokens), len(text)))
    return cuts


def _length(
    tokenizer: PreTrainedTokenizerBase, tokens: TokenIds, text: str, cuts: Sequence[tuple[int, int]], stop: int
) -> int | None:
    """How much of the text the tokens before ``stop`` have; None if that is not what the text begins with."""
    start, position = cuts[-1]
    # A tokenizer may write the first word of a text otherwise than the same word later, hence some tokens before it.
    head = cuts[-2][0] if len(cuts) > 1 and stop - start <= _WINDOW else 0
    before, now = _decode(tokenizer, tokens[head:start]), _decode(tokenizer, tokens[head:stop])
    added = now[len(before) :]
    return position + len(added) if now.startswith(before) and text.startswith(added, position) else None


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: TokenIds) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _continues(last: TokenPiece, piece: TokenPiece) -> bool:
    """Whether a piece begins within the character that the last one ends with."""
    if last.special or piece.special or not (last.text and piece.text) or piece.stop - last.start > MAX_JOINED:
        return False
    tail = _CHARACTERS.findall(last.text[-2 * MAX_JOINED :])[-1]
    return len(_CHARACTERS.match(tail + piece.text)[0]) > len(tail)


def _is_visible(character: str) -> bool:
    return unicodedata.category(character) not in _INVISIBLE and not 0xFE00 <= ord(character) <= 0xFE0F


def _by_code(character: str) -> str:
    shown = printable(character)
    return shown if shown != character else code_of(character)


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
    # For each piece its own direction, or that of the nearest one before it, or behind it, that has any.
    before = list(accumulate(found, lambda last, own: own or last, initial=base))[1:]
    behind = list(accumulate(found[::-1], lambda last, own: own or last, initial=base))[:0:-1]
    resolved = [one if one == other else base for one, other in zip(before, behind, strict=True)]
    runs = groupby(zip(resolved, pieces, strict=True), key=lambda pair: pair[0])
    return Line(base, tuple(Run(direction, tuple(piece for _, piece in members)) for direction, members in runs))


def _kinds(piece: TokenPiece) -> Iterator[str]:
    """Bidirectional classes of what is shown; control tokens have names, which are no part of the text."""
    return iter(()) if piece.special else map(unicodedata.bidirectional, piece.shown)
