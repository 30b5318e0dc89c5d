"""Pieces of a run: each done once, saved in order, in whatever order and however many at a time they come."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from persona_lens.pieces import Pieces, Row
from persona_lens.runs import RunFolder

SIZES = (2, 1, 3, 1, 2)
CONFIG = {"kind": "test"}


def rows_of(number: int) -> list[Row]:
    return [{"piece": number, "row": row} for row in range(SIZES[number])]


ALL = [row for number in range(len(SIZES)) for row in rows_of(number)]


class Latecomer:
    """Does all pieces at once but the first, which waits until all others are done."""

    def __init__(self) -> None:
        self.others = threading.Barrier(len(SIZES))
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
def test_rows_come_in_the_order_of_the_pieces(tmp_path: Path, at_once: int) -> None:
    reported: list[int] = []
    with RunFolder(tmp_path / "run", CONFIG) as folder:
        rows = Pieces(folder, "rows.jsonl", SIZES).run(rows_of, at_once=at_once, report=reported.append)
        assert rows == ALL
        assert folder.rows("rows.jsonl") == ALL
    assert reported[0] == 0
    assert reported == sorted(reported)
    assert reported[-1] == len(ALL)
    assert sorted(files(tmp_path / "run")) == ["rows.jsonl", "run.json"]
    assert not (tmp_path / "run" / "waiting").exists()
    assert Pieces(None, "rows.jsonl", SIZES).run(rows_of, at_once=at_once) == ALL


def test_a_late_first_piece_changes_nothing(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "calm", CONFIG) as folder:
        Pieces(folder, "rows.jsonl", SIZES).run(rows_of)
    with RunFolder(tmp_path / "late", CONFIG) as folder:
        work = Latecomer()
        assert Pieces(folder, "rows.jsonl", SIZES).run(work, at_once=len(SIZES)) == ALL
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

    with RunFolder(tmp_path, CONFIG) as folder:
        with pytest.raises(ConnectionError, match="went dead"):
            Pieces(folder, "rows.jsonl", SIZES).run(failing, at_once=3)
        assert folder.rows("rows.jsonl") == []
    again: list[int] = []

    def counting(number: int) -> list[Row]:
        again.append(number)
        return rows_of(number)

    with RunFolder(tmp_path, CONFIG) as folder:
        pieces = Pieces(folder, "rows.jsonl", SIZES)
        assert pieces.done == SIZES[1] + SIZES[2]
        assert pieces.run(counting) == ALL
    assert again == [0, 3, 4]
    assert sorted(files(tmp_path)) == ["rows.jsonl", "run.json"]


@pytest.mark.parametrize("saved", range(len(SIZES) + 1))
def test_killed_between_the_move_of_a_piece_and_its_removal(tmp_path: Path, saved: int) -> None:
    with RunFolder(tmp_path, CONFIG) as folder:
        for number in range(saved):
            folder.append("rows.jsonl", rows_of(number))
        for number in range(len(SIZES)):  # as if none of them had been removed
            folder.write_lines(f"waiting/rows.jsonl-{number:05d}", rows_of(number))
    with RunFolder(tmp_path, CONFIG) as folder:
        assert Pieces(folder, "rows.jsonl", SIZES).run(lambda number: pytest.fail(f"piece {number} again")) == ALL
    assert sorted(files(tmp_path)) == ["rows.jsonl", "run.json"]
