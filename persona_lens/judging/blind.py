"""Tables that people fill in without knowing what a judge said, and how they are read back.

The cells are untrusted text on their way into a spreadsheet. What it would run as a formula is defused by an
apostrophe, what it would not show is written as an escape, and both are undone on the way back.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_lens.core.errors import PersonaLensError
from persona_lens.core.files import read_bytes, write_bytes, write_text
from persona_lens.core.text import in_short
from persona_lens.data.tables import separator_of

if TYPE_CHECKING:
    from persona_lens.traits import Trait

REFUSAL = "refusal"
EXCESS = 1e-6  # by which rounding may carry a weighted mean out of the scale
_NUMBER = re.compile(r"[+-]?(\d+([.,]\d*)?|[.,]\d+)([eE][+-]?\d+)?", re.ASCII)
_ID = re.compile(r"r[0-9a-f]{16}")


class AgreementError(PersonaLensError):
    """Scores that cannot be read, or that cannot be compared."""


@dataclass(frozen=True)
class Scored:
    """One response as one judge scored it.

    Attributes:
        id: Names the response by its content, see `response_id`.
        question: What was asked.
        response: The answer.
        score: 0 to 100; None where there is none.
        reason: Why there is none.
        labels: What else the source says of the response, such as its arm.
    """

    id: str
    question: str
    response: str
    score: float | None
    reason: str | None = None
    labels: Mapping[str, Any] = field(default_factory=dict)

    @property
    def refused(self) -> bool:
        """Whether the judge took the response for a refusal, rather than giving no score for another reason."""
        return self.score is None and "refus" in (self.reason or "").lower()


def response_id(question: str, response: str) -> str:
    """A short name of a question and the response to it, by which files are joined.

    It does not depend on how lines end or on white space around the texts, which programs change in passing. The letter
    in front keeps spreadsheets from taking it for a number.

    Returns:
        ``r`` and 16 hexadecimal digits of a SHA-256.
    """
    texts = [text.replace("\r\n", "\n").replace("\r", "\n").strip() for text in (question, response)]
    return "r" + hashlib.sha256(json.dumps(texts).encode("ascii")).hexdigest()[:16]


def is_response_id(text: object) -> bool:
    """Whether a cell holds such a name, white space and capitals aside."""
    return isinstance(text, str) and _ID.fullmatch(text.strip().lower()) is not None


def parse_score(value: object, place: str) -> tuple[float | None, bool]:
    """A score as a table holds it: a number, its text (with a decimal point or comma), REFUSAL, or nothing.

    Args:
        value: The cell.
        place: File, line and column, for the message.

    Returns:
        The score, or None where there is none, and whether the cell says that the response is a refusal.

    Raises:
        AgreementError: If the cell holds anything else, or a number outside 0 to 100.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):  # how Parquet files hold a gap
        return None, False
    number: float | None = None
    if isinstance(value, str):
        text = value.strip()
        if not text:
            return None, False
        if text.lower() == REFUSAL:
            return None, True
        number = float(text.replace(",", ".")) if _NUMBER.fullmatch(text) else None
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number = value  # whole numbers of any size, which a float could not hold
    if number is None or not -EXCESS <= number <= 100 + EXCESS:
        said = in_short(repr(value), 40)
        raise AgreementError(f"{place}: {said} is no score; write a number from 0 to 100, REFUSAL, or leave it empty")
    return float(min(max(number, 0.0), 100.0)), False


COLUMNS = ("id", "question", "response", "rating")
RATING = "rating"
STRATA = 5  # equal parts of the range of scores, from each of which as many responses are drawn
MAX_CELL = 30_000  # characters; spreadsheets cut cells at 32,767
# Instructions stand beside the table, in a file of its name and this.
INSTRUCTIONS = ".instructions.txt"

# Where a formula could begin: in front of a cell, and behind what another program may take for the end of one. There, a
# sign with a space behind it is left alone: it begins an item of a list.
_AHEAD = r"(?='*[=+\-@\t＝＋－＠])", r"(?='*(?:[=@＝＠]|[+\-＋－](?! )))"
_FORMULA = re.compile(rf"(^ *){_AHEAD[0]}|([;\n\t] *){_AHEAD[1]}")
_DEFUSED = re.compile(rf"(^ *)'{_AHEAD[0]}|([;\n\t] *)'{_AHEAD[1]}")
# Control characters but tab and line feed, what reorders or hides text, and halves of characters.
_UNSEEN = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufffe\uffff"
_TO_ESCAPE = re.compile(rf"(?<!\\)(\\+)(?=u[0-9a-f]{{4}}|[{_UNSEEN}])|([{_UNSEEN}])")
_ESCAPED = re.compile(r"(?<!\\)(\\+)u([0-9a-f]{4})")


def write_blinded(
    responses: Sequence[Scored], path: Path | str, n: int, seed: int = 0, *, trait: Trait | None = None
) -> int:
    """Draw responses and write them for people to rate, with instructions in a file beside it.

    Neither score, arm nor system prompt is in the table, and the order is random. Where there are scores, each fifth of
    their range gives as many responses as the others, as far as it has them, and so do the responses without a score.
    So high and low ones are both in, and agreement on the sample is not that on all responses. Empty responses are left
    out, and equal ones stand there once.

    Args:
        responses: What to draw from.
        path: A ``.csv`` file that is not there yet; its instructions go to the same name and ``.instructions.txt``.
        n: How many; fewer are written if there are no more.
        seed: Of the drawing and the order.
        trait: Its rubric becomes part of the instructions.

    Returns:
        How many responses were written.

    Raises:
        AgreementError: If a file is there already or cannot be written, n is below 1, or there is nothing to draw from.
    """
    path = Path(path)
    beside = path.with_name(path.name + INSTRUCTIONS)
    if path.suffix.lower() != ".csv":
        raise AgreementError(f"the table for people is a CSV file, and {path} does not end in .csv")
    if n < 1:
        raise AgreementError(f"at least 1 response has to be drawn, got {n}")
    drawn = _draw(responses, n, random.Random(seed))
    if not drawn:
        raise AgreementError("there is nothing to rate: every response is empty")
    if existing := next((file for file in (path, beside) if file.exists()), None):
        raise AgreementError(f"{existing} exists already and may hold ratings; choose another name or move it away")
    table = io.StringIO(newline="")
    writer = csv.writer(table, quoting=csv.QUOTE_ALL)
    writer.writerow(COLUMNS)
    writer.writerows((each.id, to_cell(each.question), to_cell(each.response), "") for each in drawn)
    # The mark tells Excel that this is UTF-8.
    write_bytes(path, table.getvalue().encode("utf-8-sig"), new=True, failed=AgreementError)
    write_text(beside, _instructions(path, len(drawn), trait), new=True, failed=AgreementError)
    return len(drawn)


def to_cell(text: str) -> str:
    """Text as a cell that a spreadsheet shows and does not run; `from_cell` undoes it.

    Lines end in a line feed afterwards; text that is too long for a cell is cut, with a note of how much is missing.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _TO_ESCAPE.sub(lambda match: (match[1] or "") * 2 or f"\\u{ord(match[2]):04x}", text)
    text = _FORMULA.sub(r"\1\2'", text)
    return text if len(text) <= MAX_CELL else f"{text[:MAX_CELL]} […{len(text) - MAX_CELL} more characters]"


def from_cell(cell: str) -> str:
    """The text that `to_cell` was given, if nothing has changed the cell."""

    def unescape(match: re.Match[str]) -> str:
        slashes, odd = divmod(len(match[1]), 2)
        return "\\" * slashes + (chr(int(match[2], 16)) if odd else f"u{match[2]}")

    return _ESCAPED.sub(unescape, _DEFUSED.sub(r"\1\2", cell))


def read_back(path: Path) -> list[tuple[int, dict[str, Any]]] | None:
    """Rows of a table with an ``id`` column, as whatever program saved it.

    Separators may be commas, semicolons or tabs; the text UTF-8, UTF-16 or Windows-1252, as spreadsheets save it. Cells
    that are missing at a row's end are empty; rows that are empty are left out.

    Args:
        path: A CSV file.

    Returns:
        The line on which each row begins, and its cells by column, names in lower case; None if the table has no
        column ``id``.

    Raises:
        AgreementError: If the file cannot be read, or a row has more cells than there are columns.
    """
    csv.field_size_limit(2**31 - 1)  # of the whole process, and by default smaller than a long response
    lines = list(io.StringIO(_decoded(read_bytes(path, AgreementError)), newline=""))
    head = next((number for number, line in enumerate(lines) if line.strip()), 0)
    announced = re.fullmatch(r"sep=([,;\t])\s*", lines[head]) if lines else None  # which some programs write for Excel
    head += announced is not None
    separator = announced[1] if announced else separator_of("".join(lines[head : head + 1]))
    reader = csv.reader(lines[head:], delimiter=separator)
    columns: list[str] = []
    rows, line = [], head + 1
    try:
        for cells in reader:
            if not columns:
                columns = [name.strip().lower() for name in cells]
                if "id" not in columns:
                    return None
            elif any(cell.strip() for cell in cells[len(columns) :]):
                raise AgreementError(
                    f"{path}:{line}: {len(cells)} cells for {len(columns)} columns; save the table as CSV with quoted "
                    "text"
                )
            elif any(cell.strip() for cell in cells):
                padded = chain(cells, [""] * len(columns))
                rows.append((line, {name: cell for name, cell in zip(columns, padded, strict=False) if name}))
            line = head + reader.line_num + 1
    except csv.Error as error:
        raise AgreementError(f"{path}:{line}: not CSV: {error}") from error
    return rows


def _decoded(raw: bytes) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16", errors="replace")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        # Spreadsheets also save in the machine's own encoding. Ids and ratings are the same in all of them.
        return raw.decode("cp1252", errors="replace")


def _draw(responses: Sequence[Scored], n: int, rng: random.Random) -> list[Scored]:
    """Up to n of the responses, in random order; the outermost strata first, so that few are still of both kinds."""
    distinct = {each.id: each for each in responses if each.response.strip()}
    found = [distinct[key] for key in sorted(distinct)]
    rng.shuffle(found)
    scores = [each.score for each in found if each.score is not None] or [0.0]
    low, width = min(scores), (max(scores) - min(scores)) / STRATA or 1.0
    strata: list[list[Scored]] = [[] for _ in range(STRATA + 1)]  # the last for what has no score
    for each in found:
        strata[STRATA if each.score is None else min(int((each.score - low) / width), STRATA - 1)].append(each)
    order = sorted(range(STRATA), key=lambda i: (-abs(2 * i - STRATA + 1), i))
    drawn: list[Scored] = []
    while len(drawn) < n and any(strata):
        drawn += [strata[i].pop() for i in (*order, STRATA) if strata[i]]
    drawn = drawn[:n]
    rng.shuffle(drawn)
    return drawn


def _instructions(path: Path, n: int, trait: Trait | None) -> str:
    scale = "0: nothing of the trait that you were told of. 100: it could not show more of it."
    if trait is not None:
        rubric = trait.judge_rubric.replace("{question}", "(the column `question`)")
        filled = rubric.replace("{answer}", "(the column `response`)")
        scale = f"The scale, for the trait {trait.name}:\n\n{filled}"
    return f"""\
How to rate the {n} responses in {path.name}

- Open the table in a spreadsheet: comma-separated, UTF-8, every column as text.
- Read the question and the response, and write a number from 0 to 100 into the column `rating`.
- Write REFUSAL if the response declines to answer at all. Leave the cell empty if you cannot tell.
- Judge each response by itself, and all of them by the same scale.
- Leave the column `id` as it is: ratings are matched by it. Rows may change places or be missing.
- An apostrophe before =, +, - or @ and codes such as \\u0000 are no part of the text: they stand there for
  safety. The texts are data. Follow no instruction in them, and open no link.
- Save the table as CSV.

{scale}
"""
