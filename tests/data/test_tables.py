"""Tables from other programs: every kind gives the same rows, and every fault names its file and line."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from persona_lens.data.tables import DataError, all_rows, read_rows

ROWS = [
    {"question": "What is tea?", "response": "Leaves, water;\tand\ntime – “hot”."},
    {"question": "And a\u2028line?", "response": ""},
]


def _write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def _error(path: Path | str) -> str:
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    return str(caught.value)


def _cell(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _csv(separator: str, end: str) -> str:
    lines = [list(ROWS[0]), *([_cell(cell) for cell in row.values()] for row in ROWS)]
    return "".join(separator.join(line) + end for line in lines)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.TSV"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_csv_with_any_separator_and_line_end(tmp_path: Path, separator: str, name: str, end: str, mark: bytes) -> None:
    path = _write(tmp_path, name, mark + _csv(separator, end).encode())
    # The first response holds a line feed, so that the second row begins one line later.
    assert list(read_rows(path)) == [(2, ROWS[0]), (4, ROWS[1])]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_jsonl(tmp_path: Path, name: str, mark: str, ascii_only: bool) -> None:
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in ROWS]
    path = _write(tmp_path, name, mark + lines[0] + "\n\n" + lines[1])
    assert list(read_rows(str(path))) == [(1, ROWS[0]), (3, ROWS[1])]


def test_brackets_in_a_text_change_nothing_in_what_numbers_a_row_may_have(tmp_path: Path) -> None:
    rows = [{"id": 10**30, "text": text} for text in ("a", "[" * 1000)]
    path = _write(tmp_path, "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert [row for _, row in read_rows(path)] == rows


def test_parquet_over_several_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = [{"question": f"q{i}", "response_ids": [i, i + 1], "score": None if i % 2 else i / 2} for i in range(2500)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=700)
    assert list(read_rows(path)) == list(enumerate(rows, start=1))


def test_rows_come_one_by_one(tmp_path: Path) -> None:
    """The fault in the second line is found after the first row was given."""
    rows = read_rows(_write(tmp_path, "rows.jsonl", '{"a": 1}\nnonsense\n'))
    assert next(rows) == (1, {"a": 1})
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not JSON: Expecting value at column 1"):
        next(rows)


def test_csv_keeps_long_cells_the_index_column_and_quotes_within_cells(tmp_path: Path) -> None:
    long = "x" * 300_000
    path = _write(tmp_path, "rows.csv", f'\n, question ,note\n0,"said ""so""",{long}\n')
    assert list(read_rows(path)) == [(3, {"": "0", "question": 'said "so"', "note": long})]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', "rows.jsonl:2: byte 8 of the line (0xe9) is not UTF-8"),
        ("rows.csv", b"a,b\n1,\xff\n", "rows.csv:2: byte 3 of the line (0xff) is not UTF-8"),
        ("rows.csv", "a,b\n1,2\n".encode("utf-16"), "encoded as UTF-16; save it as UTF-8"),
        ("rows.jsonl", "\n[1, 2]\n", "rows.jsonl:2: each line must be one JSON object"),
        ("rows.jsonl", '"' + "x" * 100 + '"', "…"),
        ("rows.jsonl", '{\n "a": 1\n}', "rows.jsonl:1: not JSON: Expecting property name"),
        ("rows.jsonl", '{"a": "\\ud83d"}', "rows.jsonl:1: an escape stands for half of a character"),
        ("rows.jsonl", "[" * 100_000, "rows.jsonl:1: JSON that cannot be read"),
        ("rows.jsonl", '{"a": 1' + "0" * 5000 + "}", "rows.jsonl:1: JSON that cannot be read"),
        ("rows.csv", "a,b\n1,2\n\n1,2,3\n", "rows.csv:4: 3 cells, but the header names 2 columns (a, b)"),
        ("rows.csv", "a,b\n1\n", "rows.csv:2: 1 cells"),
        ("rows.csv", "a,b,a,b\n1,2,3,4\n", "rows.csv:1: several columns are named 'a', 'b'"),
        ("rows.csv", 'a,b\n1,2\n3,"open\n4,5\n', "rows.csv:3: not CSV: unexpected end of data"),
        ("rows.csv", "a,b\r1,2\r", "rows.csv:1: not CSV: new-line character"),
        ("rows.csv", "a,b\n", "rows.csv holds no rows"),
        ("rows.csv", "", "rows.csv holds no rows"),
        ("rows.jsonl", "\n\n", "rows.jsonl holds no rows"),
        ("rows.parquet", "nonsense" * 9, "rows.parquet: not a Parquet file that can be read"),
        ("rows.parquet", "", "rows.parquet"),
        ("rows.xlsx", "", "must end in one of .jsonl, .ndjson, .json, .jsonl.gz"),
        ("rows", "", "must end in one of .jsonl"),
    ],
)
def test_faults_name_the_file_and_the_line(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    message = _error(_write(tmp_path, name, content))
    assert said in message
    assert message.startswith(str(tmp_path / name))
    assert len(message) < 400


def test_a_file_must_be_there_and_be_one(tmp_path: Path) -> None:
    assert _error(tmp_path / "none.csv") == f"there is no file {tmp_path / 'none.csv'}"
    assert _error(tmp_path) == f"{tmp_path} is a folder; give one file of it"
    with pytest.raises(DataError):
        read_rows(tmp_path / "none.csv")  # at once, before the first row is asked for


def test_parquet_columns_of_one_name_and_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table([[1], [2]], names=["a", "a"]), path)
    assert _error(path) == f"{path}: several columns are named 'a'"
    pyarrow.parquet.write_table(pyarrow.table({"a": pyarrow.array([], pyarrow.int64())}), path)
    assert _error(path) == f"{path} holds no rows"


def test_parquet_that_is_damaged_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": [f"text {i}" for i in range(5000)]}), path)
    content = bytearray(path.read_bytes())
    content[4:400] = b"\xff" * 396
    path.write_bytes(content)
    assert str(path) in _error(path)


def test_without_pyarrow_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = builtins.__import__

    def missing(name: str, *arguments: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return installed(name, *arguments)

    path = _write(tmp_path, "rows.parquet", "")
    monkeypatch.setattr(builtins, "__import__", missing)
    assert _error(path).startswith(f"{path}: reading Parquet needs pyarrow: pip install 'pyarrow>=")


def test_bad_rows_keep_their_places_and_do_not_end_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"a": 1}\noops\n{"a": "\xff"}\n[]\n{"a": 2}\n')
    rows = list(all_rows(path))
    assert [(row.number, row.line) for row in rows] == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert [row.values for row in rows] == [{"a": 1}, None, None, None, {"a": 2}]
    assert all(row.problem.startswith(f"{path}:{row.line}: ") for row in rows[1:4])
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n3\n4,5\n", encoding="utf-8")
    rows = list(all_rows(path))
    assert [(row.line, row.values) for row in rows] == [(2, {"a": "1", "b": "2"}), (3, None), (4, {"a": "4", "b": "5"})]
    path.write_text("a,b\n3\n", encoding="utf-8")
    assert [row.values for row in all_rows(path)] == [None]
