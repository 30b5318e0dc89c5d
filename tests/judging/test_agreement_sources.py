"""Where scores come from: run folders, tables, the reference implementation's files, and what is wrong with them."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from persona_lens import PersonaLensError
from persona_lens.extraction import ExtractionSettings, extract
from persona_lens.judging.agreement import AgreementError, read_scored, response_id
from persona_lens.steering import SweepRow, SweepSettings, sweep
from persona_lens.traits import load_trait
from tests.planted import PlantedBackend

TRAIT = load_trait("optimistic")
ROWS: tuple[dict[str, Any], ...] = (
    {"question": "What now?", "response": "Wait, and\nsee.", "score": 12.5, "arm": "positive"},
    {"question": "What now?", "response": "Ümlaut; “quoted”, =1", "score": 100, "arm": "negative"},
    {"question": "And then?", "response": "", "score": None, "arm": "negative"},
)


def write(path: Path, rows: Sequence[Mapping[str, Any]], encoding: str = "utf-8") -> Path:
    """A table of the kind that the name says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding=encoding)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)
    else:
        with path.open("w", encoding=encoding, newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sequence[SweepRow]]:
    """A folder with an extraction and a sweep in it, and the sweep's rows."""
    folder = tmp_path_factory.mktemp("runs")
    backend = PlantedBackend(TRAIT, noise=0.5)
    settings = ExtractionSettings(questions=4, samples=2)
    found = extract(backend, TRAIT, folder / "extraction", settings=settings)
    steps = SweepSettings(layers=(1,), coefficients=(-2.0, 2.0), questions=3, samples=2, random_directions=1)
    return folder, sweep(backend, found.vectors, steps, folder=folder / "steering", name="steering").answers


# Runs


def test_an_extraction_has_each_response_with_its_own_score(runs: tuple[Path, list[SweepRow]], tmp_path: Path) -> None:
    folder = shutil.copytree(runs[0] / "extraction", tmp_path / "extraction")
    settings = ExtractionSettings(questions=4, samples=2)
    again = extract(PlantedBackend(TRAIT, noise=0.5), TRAIT, settings=settings)
    # As many different scores as responses, so that none can be taken for another's.
    write(folder / "scores.jsonl", [{"row": i, "score": float(i), "reason": None} for i in range(80)])
    found = read_scored(folder)
    assert read_scored(folder / "scores.jsonl") == found
    by_score = sorted(found, key=lambda each: each.score or 0)
    assert [each.score for each in by_score] == list(range(80))
    for each, rollout in zip(by_score, again.rollouts, strict=True):
        assert (each.question, each.response) == (rollout.request.question, rollout.response)
        assert rollout.request.labels.items() <= each.labels.items()
        assert each.id == response_id(each.question, each.response)
    assert list(found) == by_score  # all files of a run stand in the order of its plan


def test_a_sweep_has_each_response_with_its_question_and_score(runs: tuple[Path, list[SweepRow]]) -> None:
    folder, rows = runs
    found = read_scored(folder / "steering" / "steering-scores.jsonl")
    assert read_scored(folder / "steering") == found
    expected = {
        (row.direction, row.layer, row.coefficient, row.question, row.sample): (row.text, row.score) for row in rows
    }
    names = ("direction", "layer", "coefficient", "question_number", "sample")
    assert {tuple(each.labels[name] for name in names): (each.response, each.score) for each in found} == expected
    for each in found:
        assert each.question == TRAIT.evaluation_questions[each.labels["question_number"]]


def test_folders_that_are_no_runs_say_where_there_are_some(runs: tuple[Path, list[SweepRow]], tmp_path: Path) -> None:
    with pytest.raises(AgreementError, match=r"give a folder in it, such as .*extraction, .*steering"):
        read_scored(runs[0])
    with pytest.raises(AgreementError, match=r"is no run folder with one set of responses$"):
        read_scored(tmp_path)


def test_runs_that_do_not_fit_together(runs: tuple[Path, list[SweepRow]], tmp_path: Path) -> None:
    folder = shutil.copytree(runs[0], tmp_path / "runs")
    scores = folder / "extraction" / "scores.jsonl"
    lines = scores.read_text().splitlines(keepends=True)
    scores.write_text("".join(lines[:-1]))
    with pytest.raises(AgreementError, match=r"\(79 rows\) is not a score for each of the 80 responses"):
        read_scored(folder / "extraction")
    scores.unlink()
    with pytest.raises(AgreementError, match="the command that began this run goes on with it"):
        read_scored(folder / "extraction")
    unscored = read_scored(folder / "extraction", scores_required=False)
    assert {(each.score, each.reason) for each in unscored} == {(None, "not scored yet")}
    sweeps = folder / "steering" / "steering-scores.jsonl"
    rows = [json.loads(line) for line in sweeps.read_text().splitlines()]
    write(sweeps, [*rows[:2], {**rows[2], "text": "changed"}, *rows[3:]])
    with pytest.raises(AgreementError, match=r"steering-scores\.jsonl:3: the response is another one"):
        read_scored(sweeps)
    write(sweeps, rows[1:])
    with pytest.raises(AgreementError, match=r"\(29 rows\) is not a score for each of the 30 responses"):
        read_scored(sweeps)
    write(sweeps, [{name: value for name, value in rows[0].items() if name != "row"}])
    with pytest.raises(AgreementError, match=r"steering-scores\.jsonl:1: the row does not say what it answers"):
        read_scored(sweeps)
    write(sweeps, rows)
    with pytest.raises(AgreementError, match="no column 'grade'; there are row, direction, layer"):
        read_scored(sweeps, column="grade")
    shutil.copy(folder / "steering" / "steering-rollouts.jsonl", folder / "steering" / "more-rollouts.jsonl")
    with pytest.raises(AgreementError, match=r"give one of its more-scores\.jsonl, steering-scores\.jsonl"):
        read_scored(folder / "steering")


# Tables


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_tables_of_every_kind(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"scores.{kind}"
    if kind == "tsv":
        content = write(tmp_path / "x.csv", ROWS).read_text()
        rows = list(csv.reader(content.splitlines(keepends=True)))
        with path.open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream, delimiter="\t").writerows(rows)
    else:
        write(path, ROWS)
    found = read_scored(path)
    assert [(each.question, each.response, each.score) for each in found] == [
        (row["question"], row["response"], row["score"]) for row in ROWS
    ]
    assert [each.reason for each in found] == [None, None, "no score"]
    assert [each.labels for each in found] == [{"arm": row["arm"]} for row in ROWS]


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    assert read_scored(write(tmp_path / "r.csv", ROWS, "utf-8-sig"))[0].score == 12.5


def test_sources_are_joined_by_content(tmp_path: Path) -> None:
    kinds = [write(tmp_path / f"r.{kind}", ROWS) for kind in ("jsonl", "csv", "parquet")]
    assert len({tuple(each.id for each in read_scored(path)) for path in kinds}) == 1


def test_gaps_and_refusals(tmp_path: Path) -> None:
    cells = [None, float("nan"), "", "REFUSAL", 0, "99,5", 100.00000000000001]
    rows = [{"question": "q", "answer": f"a{i}", "grade": cell} for i, cell in enumerate(cells)]
    found = read_scored(write(tmp_path / "r.jsonl", rows), column="grade")
    assert [each.score for each in found] == [None, None, None, None, 0, 99.5, 100]
    assert [each.refused for each in found] == [False, False, False, True, False, False, False]
    gaps = [{"question": "q", "answer": "a", "score": None, "reason": "refusal: 0.1 of the mass"}]
    assert read_scored(write(tmp_path / "g.jsonl", gaps))[0].refused


@pytest.mark.parametrize("score", [True, [1], {"a": 1}, "fifty", -0.1, 100.1, 10**400, "1 0", "٥"])
def test_what_is_no_score(tmp_path: Path, score: object) -> None:
    path = write(tmp_path / "r.jsonl", [ROWS[0], {**ROWS[1], "score": score}])
    with pytest.raises(AgreementError, match=r"r\.jsonl:2, score: .* is no score"):
        read_scored(path)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question": "q", "score": 1}], "the columns question and response (or answer) are needed; there are quest"),
        ([{"question": " ", "response": "a", "score": 1}], "r.jsonl:1: the question is missing"),
        ([{"question": 5, "response": "a", "score": 1}], "r.jsonl:1: the question is missing or no text"),
        ([{"question": "q", "response": ["a"], "score": 1}], "r.jsonl:1: the response is no text: ['a']"),
        ([{"question": "q", "response": "a"}], "there is no column score; name the one that holds the scores"),
        ([], "holds no rows"),
    ],
)
def test_tables_that_are_no_scores(tmp_path: Path, rows: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(PersonaLensError) as caught:
        read_scored(write(tmp_path / "r.jsonl", rows))
    assert said in str(caught.value)


def test_what_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("score: 1")
    for name, said in (
        ("none.csv", "there is no file"),
        ("none-scores.jsonl", "there is no file"),
        ("r.xlsx", "save the sheet as CSV"),
        ("r.yaml", "told by its name"),
    ):
        with pytest.raises(PersonaLensError, match=said):
            read_scored(tmp_path / name)
    assert len(read_scored(write(tmp_path / "my-scores.jsonl", ROWS))) == 3
    with pytest.raises(AgreementError, match="no column 'grade'; there are question, response, score, arm"):
        read_scored(tmp_path / "my-scores.jsonl", column="grade")


def test_tables_without_scores_can_be_read_on_demand(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [{"question": "q", "answer": "a"}])
    assert [each.score for each in read_scored(path, scores_required=False)] == [None]


def test_ratings_in_another_kind_of_table(tmp_path: Path) -> None:
    name = response_id("q", "a")
    path = write(tmp_path / "r.jsonl", [{"id": name, "rating": 5}, {"id": name, "rating": None}])
    assert [(each.id, each.score, each.reason) for each in read_scored(path)] == [
        (name, 5, None),
        (name, None, "not rated"),
    ]


def test_ids_of_others_are_not_ours(tmp_path: Path) -> None:
    row = {"id": "item-17", "question": "q", "response": "a", "rating": 5}
    for path in (write(tmp_path / "r.jsonl", [row]), write(tmp_path / "r.csv", [row])):
        (found,) = read_scored(path)
        assert (found.id, found.score, found.labels["id"]) == (response_id("q", "a"), 5, "item-17")


# The reference implementation


REFERENCE: list[dict[str, Any]] = [
    {"question": "q", "prompt": "<|im_start|>…", "answer": "a", "question_id": "evil_0_pos_0", "evil": 61.5},
    {"question": "q", "prompt": "<|im_start|>…", "answer": "b", "question_id": "evil_0_pos_1", "evil": ""},
]


def test_files_of_the_reference_implementation(tmp_path: Path) -> None:
    rows = [{**row, "coherence": 97.25} for row in REFERENCE]
    found = read_scored(write(tmp_path / "evil.csv", rows))
    assert [(each.response, each.score, each.reason) for each in found] == [("a", 61.5, None), ("b", None, "refusal")]
    assert found[0].labels["question_id"] == "evil_0_pos_0"
    assert read_scored(tmp_path / "evil.csv", column="coherence")[1].score == 97.25
    more = write(tmp_path / "more.csv", [{**row, "sycophantic": 1, "kl": -0.5, "note": "x"} for row in rows])
    with pytest.raises(AgreementError, match=r"name the one that holds the scores \(columns: evil, sycophantic\)"):
        read_scored(more)
    assert read_scored(more, column="sycophantic")[0].score == 1


def test_reading_a_table_loads_nothing_heavy(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", ROWS)
    code = f"import sys; from persona_lens.judging.agreement import read_scored; read_scored({str(path)!r})\n"
    check = "assert not {'torch', 'transformers', 'pandas', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code + check], check=True, timeout=60)


def test_rows_of_a_sweep_are_what_is_read_here() -> None:
    """The fields that `read_scored` relies on."""
    row = asdict(SweepRow(0, 0, None, None, None, "", "none", None, 0.0))
    assert {"score", "text"} <= set(row)
