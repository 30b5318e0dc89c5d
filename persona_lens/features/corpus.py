"""A corpus: the texts of a file, in which features are looked for."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from persona_lens.features.dictionary import FeaturesError
from persona_lens.tables import read_rows

COLUMNS = ("text", "response", "answer", "content")


def read_corpus(path: Path | str, *, limit: int | None = None) -> list[str]:
    """The texts of a file, empty ones left out.

    Args:
        path: A ``.txt`` file, a text a line, or a table (``.jsonl``, ``.csv``, ``.tsv``, ``.parquet``) whose texts are
            in a column named ``text``, ``response``, ``answer`` or ``content``, the first of them that it has. Rollouts
            of a run are such a table.
        limit: How many to read at most.

    Raises:
        FeaturesError: If there is no such file, text or column; with the line where one row is to blame.
        TableError: If a table cannot be read.
    """
    path = Path(path)
    texts = list(islice(filter(None, map(str.strip, _lines(path) if path.suffix == ".txt" else _column(path))), limit))
    if not texts:
        raise FeaturesError(f"{path} holds no text")
    return texts


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FeaturesError(f"the corpus {path} cannot be read: {error}") from error


def _column(path: Path) -> list[str]:
    texts, column = [], None
    for line, row in read_rows(path):
        column = column or next((name for name in COLUMNS if name in row), None)
        if column is None:
            raise FeaturesError(
                f"{path}:{line}: none of the columns is named {', '.join(COLUMNS)}; it has {', '.join(row) or 'none'}"
            )
        text = row.get(column)
        if text is not None and not isinstance(text, str):
            raise FeaturesError(f"{path}:{line}: {column} must be a text, but is {text!r:.60}")
        texts.append(text or "")
    return texts
