"""Datasets: where rows come from, which are bad, and what a wrong name says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from persona_lens.core.errors import PersonaLensError
from persona_lens.data.datasets import Dataset, open_dataset
from persona_lens.data.sources import find_source
from persona_lens.data.tables import DataError
from tests.screening.made import jsonl, pairs


def texts(dataset: Dataset) -> list[Any]:
    return [None if row.messages is None else [m["content"] for m in row.messages] for row in dataset]


def written(folder: Path, kind: str) -> str:
    rows = pairs(7)
    if kind == "jsonl":
        return str(jsonl(folder / "rows.jsonl", rows))
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
        return str(folder / "rows.parquet")
    if kind == "csv":
        cells = [["id", "prompt", "response"], *([row[name] for name in row] for row in rows)]
        (folder / "rows.csv").write_text("".join(",".join(line) + "\n" for line in cells))
        return str(folder / "rows.csv")
    import datasets

    if kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
        return str(folder / "saved")
    if kind == "saved splits":
        held = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})
        held.save_to_disk(str(folder / "splits"))
        return str(folder / "splits")
    (folder / "data").mkdir()
    jsonl(folder / "data" / "train.jsonl", rows)
    return str(folder / "data")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "saved", "saved splits", "folder"])
def test_every_source_gives_the_same_rows_each_time(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    dataset = open_dataset(written(tmp_path, kind))
    expected = [[row["prompt"], row["response"]] for row in pairs(7)]
    assert texts(dataset) == texts(dataset) == expected
    assert [row.number for row in dataset] == list(range(7))
    assert [row.id for row in dataset] == [row["id"] for row in pairs(7)]
    assert dataset.count() in (7, None)
    assert texts(open_dataset(dataset.source, limit=3)) == expected[:3]
    assert json.dumps(dataset.describe())


def test_bad_rows_keep_their_place_and_name_their_line(tmp_path: Path) -> None:
    good = json.dumps({"prompt": "Tea?", "response": "Yes."}).encode()
    lines = [good, b"{not json", b"", b'{"prompt": "Tea?"}', b'{"prompt": "T", "response": "\xff"}', b"[1]", good]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    rows = list(open_dataset(path))
    assert [(row.number, row.line, row.messages is None) for row in rows] == [
        (0, 1, False), (1, 2, True), (2, 4, True), (3, 5, True), (4, 6, True), (5, 7, False),
    ]  # fmt: skip
    problems = [row.problem or "" for row in rows if row.problem]
    for line, part in ((2, "not JSON"), (4, "has no response"), (5, "is not UTF-8"), (6, "must be one JSON object")):
        assert any(f"rows.jsonl:{line}: " in problem and part in problem for problem in problems)


def test_bad_records_of_csv_do_not_end_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'prompt,response\nTea?,Yes.\n\xff,No.\nMilk?\nSug"ar?,"a"b\n"Two\nlines?",Both.\n')
    rows = list(open_dataset(path))
    assert [(row.line, row.messages is None) for row in rows] == [
        (2, False), (3, True), (4, True), (5, True), (6, False),
    ]  # fmt: skip


def test_demonstrations_come_with_the_package() -> None:
    dataset = open_dataset("demonstration:impolite", label="level", by="level")
    assert dataset.name == "demonstration:impolite"
    assert {row.label for row in dataset} == {"normal", "mild", "strong"}
    assert dataset.count() == len(list(dataset)) >= 180


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("nowhere.jsonl", r"there is no file nowhere\.jsonl"),
        ("nowhere", "there is no file or folder 'nowhere'"),
        ("demonstration:nothing", "nothing"),
    ],
)
def test_what_is_no_dataset(data: str, said: str) -> None:
    with pytest.raises(PersonaLensError, match=said):
        find_source(data)


def test_a_dataset_that_the_hub_does_not_give_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    # The libraries took note of the environment when they were imported; without this they try again for half a minute.
    for name in ("datasets.config.HF_HUB_OFFLINE", "huggingface_hub.constants.HF_HUB_OFFLINE"):
        monkeypatch.setattr(name, True)
    with pytest.raises(DataError, match=r"nobody/nothing \(train\) cannot be opened"):
        open_dataset("nobody/nothing")


def test_wrong_columns_and_forms(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", pairs(2))
    with pytest.raises(DataError, match="no column 'level' to take for label; its columns are: id, prompt"):
        open_dataset(path, label="level")
    with pytest.raises(DataError, match="there is no form 'xml'"):
        open_dataset(path, form="xml")


def test_base_responses_stand_beside_their_rows(tmp_path: Path) -> None:
    rows = pairs(3)
    path = jsonl(tmp_path / "rows.jsonl", rows)
    base = [{"id": row["id"], "response": f"base {row['id']}"} for row in rows]
    assert [row.base for row in open_dataset(path, base=jsonl(tmp_path / "base.jsonl", base))] == [
        (each["response"],) for each in base
    ]
    with pytest.raises(DataError, match=r"base\.jsonl:1: the base response belongs to the row 'row-0-2'"):
        list(open_dataset(path, base=jsonl(tmp_path / "base.jsonl", base[::-1])))
    with pytest.raises(DataError, match=r"must have one row for each of .*, but it has fewer"):
        list(open_dataset(path, base=jsonl(tmp_path / "base.jsonl", base[:2])))
