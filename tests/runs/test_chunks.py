"""Pieces of a run: each done once, saved in order, in whatever order and however many at a time they come."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from persona_lens.runs import RunError, RunFolder
from persona_lens.runs.chunks import Pieces, Row

CUT = ((0, 2), (1,), (5, 6, 3), (4,), (7, 8))
COUNT = 9
PURPOSES = [f"row {number}" for number in range(COUNT)]
CONFIG = {"kind": "test"}


def rows_of(number: int) -> list[Row]:
    return [{"piece": number, "value": row / 7} for row in CUT[number]]


ALL = [
    {"row": row, "piece": number, "value": row / 7}
    for row in range(COUNT)
    for number, piece in enumerate(CUT)
    if row in piece
]


def pieces(folder: RunFolder | None, **options: Any) -> Pieces:
    return Pieces(folder, "rows.jsonl", CUT, PURPOSES, **options)


class Latecomer:
    """Does all pieces at once but the first, which waits until all others are done."""

    def __init__(self) -> None:
        self.others = threading.Barrier(len(CUT))
        self.done: list[int] = []

    def __call__(self, number: int) -> list[Row]:
        if number == 0:
            self.others.wait(10)
            return rows_of(number)
        self.done.append(number)
        threading.Thread(target=self.others.wait, args=(10,), daemon=True).start()
        return rows_of(number)


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize("at_once", [1, 3, 10])
def test_rows_come_in_the_order_of_the_plan(tmp_path: Path, at_once: int) -> None:
    reported: list[int] = []
    with RunFolder(tmp_path / "run", CONFIG) as folder:
        assert pieces(folder).run(rows_of, at_once=at_once, report=reported.append) == ALL
        assert [{k: v for k, v in row.items() if k != "check"} for row in folder.rows("rows.jsonl")] == ALL
    assert reported[0] == 0
    assert reported == sorted(reported)
    assert reported[-1] == len(ALL)
    assert sorted(files(tmp_path / "run")) == ["rows.jsonl", "run.json"]
    assert pieces(None).run(rows_of, at_once=at_once) == ALL


def test_a_late_first_piece_changes_nothing(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "calm", CONFIG) as folder:
        pieces(folder).run(rows_of)
    with RunFolder(tmp_path / "late", CONFIG) as folder:
        work = Latecomer()
        assert pieces(folder).run(work, at_once=len(CUT)) == ALL
    assert sorted(work.done) == [1, 2, 3, 4]
    assert files(tmp_path / "late") == files(tmp_path / "calm")


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    """An error in the first piece: the others that ran are kept, out of turn, and the next run does only the rest."""
    begun = threading.Barrier(3)

    def failing(number: int) -> list[Row]:
        begun.wait(10)
        if number == 0:
            raise ConnectionError("the line went dead")
        return rows_of(number)

    with RunFolder(tmp_path, CONFIG) as folder, pytest.raises(ConnectionError, match="went dead"):
        pieces(folder).run(failing, at_once=3)
    again: list[int] = []

    def counting(number: int) -> list[Row]:
        again.append(number)
        return rows_of(number)

    with RunFolder(tmp_path, CONFIG) as folder:
        kept = pieces(folder)
        assert kept.done == len(CUT[1]) + len(CUT[2])
        assert kept.run(counting) == ALL
    assert again == [0, 3, 4]
    assert sorted(files(tmp_path)) == ["rows.jsonl", "run.json"]


def test_a_piece_that_lacks_what_belongs_to_it_is_done_again(tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG) as folder:
        pieces(folder).run(rows_of)
        before = files(tmp_path)
        again: list[int] = []

        def counting(number: int) -> list[Row]:
            again.append(number)
            return rows_of(number)

        assert pieces(folder, whole=lambda number: number != 2).run(counting) == ALL
    assert again == [2]
    assert files(tmp_path) == before


def test_rows_for_something_else_are_said(tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG) as folder:
        pieces(folder).run(rows_of)
        with pytest.raises(RunError, match=r"line 5 of .*rows\.jsonl is damaged, or not what this run wrote there"):
            Pieces(folder, "rows.jsonl", CUT, [*PURPOSES[:4], "another", *PURPOSES[5:]])
        with pytest.raises(RunError, match=r"line 9 of .*rows\.jsonl"):
            Pieces(folder, "rows.jsonl", [range(8)], PURPOSES[:8])


@pytest.mark.parametrize("value", ["1", None, 10**400])
def test_a_row_of_another_form_is_an_error_though_its_checksum_is_right(value: object, tmp_path: Path) -> None:
    def form(row: Row) -> object:
        return row["value"] + 1.0

    def of_another_version(number: int) -> list[Row]:
        return [{**row, "value": value} for row in rows_of(number)]

    with RunFolder(tmp_path / "run", CONFIG) as folder:
        pieces(folder).run(of_another_version)
        with pytest.raises(RunError, match=r"line 1 of .*rows\.jsonl is damaged, or not what this run wrote there"):
            pieces(folder, form=form)
