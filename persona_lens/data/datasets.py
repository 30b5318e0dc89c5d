"""`Dataset`: a source whose form is known, with the columns that its rows are told apart and grouped by."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_lens.core.progress import note
from persona_lens.data.forms import (
    SIDES,
    SampleForm,
    conversation_of,
    detect_form,
    ignored_columns,
    responses_of,
)
from persona_lens.data.sources import RawRow, Source, find_source
from persona_lens.data.tables import DataError
from persona_lens.data.transcripts import IDS, LOOKED_AT, id_of, note_unread

if TYPE_CHECKING:
    from persona_lens.models import Message


@dataclass(frozen=True)
class GivenRow:
    """A row with what was made of it.

    Attributes:
        number: Which row of the dataset it is, from 0.
        line: Line on which it begins, from 1.
        id: The row's own (``id``, ``conversation_id``, ``uuid``), or its line.
        messages: The conversation up to the answer that counts; None if there is none.
        problem: Why there is none, in a sentence that begins with file and line.
        label: Its value in the column of labels, as text.
        group: Its value in the column by which results are grouped, as text.
        base: The base model's responses that were supplied for it.
    """

    number: int
    line: int
    id: str
    messages: tuple[Message, ...] | None
    problem: str | None = None
    label: str | None = None
    group: str | None = None
    base: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """What is screened; iterating over it reads it row by row, the bad rows too.

    Attributes:
        source: Where the rows come from.
        form: How they write conversations.
        label: Column of labels.
        by: Column by which results are grouped.
        limit: Rows that are taken at most.
        base: Where base responses come from, in the same order.
        side: Of preference pairs: which answer is taken.
    """

    source: Source
    form: SampleForm
    label: str | None = None
    by: str | None = None
    limit: int | None = None
    base: Source | None = None
    side: str | None = None

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return self.source.name

    def __iter__(self) -> Iterator[GivenRow]:
        rows = self.source.rows()
        if self.base is None:
            yield from (self._given(row) for row in islice(rows, self.limit))
            return
        pairs = zip_longest(rows, self.base.rows())
        for row, supplied in islice(pairs, self.limit):
            if row is None or supplied is None:
                raise DataError(
                    f"{self.base.name} must have one row for each of {self.name}, in the same order, but it has "
                    f"{'more' if row is None else 'fewer'}"
                )
            yield self._given(row, self._responses_of(row, supplied))

    def count(self) -> int | None:
        """How many rows there are, if that is quickly told."""
        found = self.source.count()
        return found if found is None or self.limit is None else min(found, self.limit)

    def describe(self) -> dict[str, Any]:
        """What determines the rows, as JSON values."""
        return {
            **self.source.describe(),
            "form": self.form.value,
            "label": self.label,
            "by": self.by,
            "limit": self.limit,
            "base": self.base.describe() if self.base else None,
            **({"side": self.side} if self.side else {}),
        }

    def _given(self, row: RawRow, base: tuple[str, ...] = ()) -> GivenRow:
        place = f"{self.name}:{row.line}"
        if row.values is None:
            return GivenRow(row.number, row.line, f"line {row.line}", None, row.problem)
        about: dict[str, Any] = {
            "id": id_of(row.values, row.line),
            "label": _cell(row.values, self.label),
            "group": _cell(row.values, self.by),
            "base": base,
        }
        try:
            messages = conversation_of(row.values, self.form, self.side)
            if any("\ud800" <= c <= "\udfff" for message in messages for c in message["content"]):
                raise DataError("a text holds half of a character")
            return GivenRow(row.number, row.line, messages=messages, **about)
        except DataError as error:
            return GivenRow(row.number, row.line, messages=None, problem=f"{place}: {error}", **about)

    def _responses_of(self, row: RawRow, supplied: RawRow) -> tuple[str, ...]:
        """The base responses beside a row; where both have an id of their own, these must agree."""
        assert self.base is not None
        if supplied.values is None or row.values is None:
            return ()
        own, other = (
            next((str(values[name]) for name in IDS if values.get(name) not in (None, "")), None)
            for values in (row.values, supplied.values)
        )
        if own is not None and other is not None and own != other:
            raise DataError(
                f"{self.base.name}:{supplied.line}: the base response belongs to the row {other!r}, but stands beside "
                f"the row {own!r} of {self.name}; put them into the same order"
            )
        return responses_of(supplied.values)


def open_dataset(
    data: str | Path | Source,
    *,
    form: SampleForm | str | None = None,
    label: str | None = None,
    by: str | None = None,
    limit: int | None = None,
    base: str | Path | None = None,
    split: str = "train",
    subset: str | None = None,
    side: str | None = None,
) -> Dataset:
    """Find a dataset and how it writes conversations; `Dataset.form` shows what was found.

    Args:
        data: See `find_source`.
        form: Its form, if it should not be told by the columns of the first rows.
        label: Column of labels, for AUC.
        by: Column by which results are grouped.
        limit: Take no more rows than this.
        base: A file of base responses, one row for each of the dataset's, in their order.
        split: Of a folder or a dataset of the hub.
        subset: Configuration, of the same.
        side: Of preference pairs: ``chosen`` or ``rejected``; it has to be said. Other datasets have no sides.

    Raises:
        DataError: If there is no such dataset or column, or it has none of the forms;
            or if a file cannot be read at all.
    """
    if form is not None and str(form) not in list(SampleForm):
        raise DataError(f"there is no form {str(form)!r} of datasets; take one of {', '.join(SampleForm)}")
    source = data if isinstance(data, Source) else find_source(data, split=split, subset=subset)
    readable = (row.values for row in source.rows() if row.values is not None)
    found = SampleForm(form) if form is not None else detect_form(readable, source.name)
    first = next((row.values for row in source.rows() if row.values is not None), {})
    for option, column in (("label", label), ("by", by)):
        if column is not None and column not in first:
            raise DataError(
                f"{source.name} has no column {column!r} to take for {option}; its columns are: {', '.join(first)}"
            )
    if found is SampleForm.PREFERENCE and side not in SIDES:
        raise DataError(
            f"{source.name} holds preference pairs; say which side of them is meant: chosen or rejected (--side)"
        )
    if found is not SampleForm.PREFERENCE and side is not None:
        note(f"{source.name} holds no preference pairs, so that {side!r} is no side of it")
        side = None
    _name_ignored(source, found, {*IDS, label, by})
    return Dataset(source, found, label, by, limit, find_source(base) if base is not None else None, side)


def _name_ignored(source: Source, form: SampleForm, used: Collection[str | None]) -> None:
    """Say which columns of text the first rows have that are not read."""
    rows = (row.values for row in islice(source.rows(), LOOKED_AT) if row.values is not None)
    note_unread(source.name, (name for row in rows for name in ignored_columns(row, form) if name not in used))


def _cell(values: Mapping[str, Any], column: str | None) -> str | None:
    value = values.get(column) if column is not None else None
    return None if value is None else str(value)
