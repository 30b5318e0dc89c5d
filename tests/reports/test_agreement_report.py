"""The page that compares two judges, and the commands that make ratings and compare them."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from persona_lens.judging.agreement import Agreement, Measure, Scored, compare, read_scored, response_id
from persona_lens.reports.agreement import render_agreement
from persona_lens.reports.page import measured
from tests.judging.test_agreement import noisy, scored
from tests.judging.test_agreement_blind import HOSTILE
from tests.reports.test_report import Page
from tests.shell import Shell


def agreement(n: int = 40, names: tuple[str, str] = ("machine.jsonl", "people.csv")) -> Agreement:
    x, y = noisy(n)
    return compare(scored(x, questions=10), scored(y, questions=10), names=names)


# The page


def test_the_page_shows_every_measure_with_its_interval() -> None:
    found = agreement()
    page = Page(render_agreement(found))
    text = " ".join(" ".join(page.words).split())
    for measure, digits, sign in ((found.pearson, 2, False), (found.spearman, 2, False), (found.upper_limit, 1, True)):
        assert measured(asdict(measure), digits, sign=sign) in text
    assert measured(asdict(found.pairwise_first), 1, percent=True) in text
    assert "40 responses to 10 questions with both scores" in text
    assert "machine.jsonl" in text
    assert "people.csv" in text
    outside = sum(
        not (found.lower_limit.value or 0) <= pair.difference <= (found.upper_limit.value or 0) for pair in found.pairs
    )
    assert re.search(rf"\b{outside} responses? lies? outside the limits", text)


def test_the_largest_disagreements_are_on_the_page_in_order() -> None:
    found = agreement()
    html = render_agreement(found)
    places = [html.index(pair.id) for pair in found.most_disagreed(10)]
    assert places == sorted(places)
    assert len(re.findall(r"\br[0-9a-f]{16}\b", html)) == 10


@pytest.mark.usefixtures("drawing")
def test_the_page_is_complete_in_itself_and_repeats() -> None:
    html = render_agreement(agreement())
    page = Page(html)
    assert not [tag for tag, _ in page.tags if tag in ("script", "img", "iframe", "object")]
    links = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("href", "src") and value]
    assert all(link.startswith(("#", "data:,", "data:image/svg+xml;base64,")) for link in links)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert html == render_agreement(agreement())


def test_texts_and_names_of_others_do_no_harm() -> None:
    texts = [*HOSTILE, "</p></main><script>alert(1)</script>", '" onmouseover="alert(1)']
    first = [Scored(response_id(text, text), text, text, float(i)) for i, text in enumerate(texts)]
    second = [Scored(each.id, each.question, each.response, 50.0) for each in first]
    html = render_agreement(compare(first, second, names=("<script>\x1b[0m", "\x00&amp;")))
    page = Page(html)
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e\ud800-\udfff]", html)
    html.encode()


@pytest.mark.usefixtures("drawing")
def test_a_page_without_measures_says_why() -> None:
    html = render_agreement(compare(scored([1.0, 2.0]), scored([2.0, 3.0])))
    assert "only 2 of the responses have both scores; 3 are needed" in html
    assert "too few responses for limits of agreement" in html
    assert "nan" not in re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL).lower()
    constant = render_agreement(compare(scored([5.0, 5.0, 5.0]), scored([1.0, 2.0, 3.0])))
    assert "No correlation can be given: all scores of first are the same" in constant


@pytest.mark.usefixtures("drawing")
def test_a_page_does_not_grow_with_equal_scores() -> None:
    few, many = ([float(i % 10) * 10 for i in range(n)] for n in (50, 1500))
    sizes = [len(render_agreement(compare(scored(x, questions=4), scored(x, questions=4)))) for x in (few, many)]
    assert sizes[1] < 1.1 * sizes[0]


def test_measures_in_words() -> None:
    assert measured(asdict(Measure(0.5, 0.25, 0.75, 9))) == "0.50 (0.25 to 0.75)"
    assert measured(asdict(Measure(-2.0, -4.0, 3.0, 9)), 1, sign=True) == "−2.0 (−4.0 to +3.0)"
    assert measured(asdict(Measure(0.947, 0.9, 1.0, 9)), 1, percent=True) == "94.7% (90.0% to 100.0%)"
    assert measured(asdict(Measure(0.5, None, None, 9, "one question only"))) == "0.50 (one question only)"
    assert measured(asdict(Measure(None, None, None, 9, "all\x00same"))) == "– (all␀same)"


# The command line


SHELL = Shell("judge")
run, ok, refused = SHELL.run, SHELL.ok, SHELL.refused


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Forty responses with two judges' scores."""
    x, y = noisy()
    rows = [
        {"question": f"question {i % 10}", "response": f"=response {i}", "score": a, "other": b}
        for i, (a, b) in enumerate(zip(x, y, strict=True))
    ]
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fill_in(table: Path, source: Path) -> dict[str, float]:
    """Rate every response with the other judge's score, as a spreadsheet with semicolons."""
    others = {each.id: each.score or 0.0 for each in read_scored(source, column="other")}
    with table.open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        row["rating"] = str(others[row["id"]]).replace(".", ",")
    with table.open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=";")
        writer.writeheader()
        writer.writerows(rows)
    return {row["id"]: others[row["id"]] for row in rows}


def test_from_a_sample_to_a_comparison(source: Path, tmp_path: Path) -> None:
    table, report = tmp_path / "ratings.csv", tmp_path / "new" / "agreement.html"
    said = ok("sample", source, "--out", table, "-n", 25, "--trait", "optimistic")
    assert f"25 of 40 responses: {table}" in said
    assert "optimistic" in (tmp_path / "ratings.csv.instructions.txt").read_text()
    assert f"{table} exists already" in refused("sample", source, "--out", table)
    rated = fill_in(table, source)
    assert len(rated) == 25
    found: dict[str, Any] = json.loads(ok("compare", source, table, "--report", report, "--json"))
    scores = {each.id: each.score for each in read_scored(source)}
    expected = compare(
        [Scored(key, "", "", scores[key]) for key in rated],
        [Scored(key, "", "", value) for key, value in rated.items()],
    )
    assert found["pearson"]["value"] == pytest.approx(expected.pearson.value)
    assert found["mean_difference"]["value"] == pytest.approx(expected.mean_difference.value)
    assert (found["counts"]["matched"], found["counts"]["only_first"]) == (25, 15)
    assert found["names"] == [str(source), str(table)]
    assert "=response" in report.read_text(encoding="utf-8")


def test_two_columns_of_one_file(source: Path) -> None:
    found = json.loads(ok("compare", source, source, "--second-column", "other", "--json"))
    assert found["names"] == [str(source), f"{source}, other"]
    assert found["counts"]["scored"] == 40
    exchanged = ok("compare", source, source, "--first-column", "other", "--json")
    assert json.loads(exchanged)["mean_difference"]["value"] == pytest.approx(-found["mean_difference"]["value"])
    assert ok("compare", source, source, "--second-column", "other", "--json", "--seed", 5) != json.dumps(found) + "\n"


def test_a_comparison_for_people(source: Path, tmp_path: Path) -> None:
    odd = source.rename(tmp_path / "[red]x.jsonl")
    said = ok("compare", odd, odd, "--second-column", "other")
    assert "[red]x.jsonl, other" in said.replace("\n", "")
    found = compare(read_scored(odd), read_scored(odd, column="other"))
    pearson = found.pearson
    assert f"{pearson.value:.2f} [{pearson.low:.2f}, {pearson.high:.2f}]" in said
    assert "over 10 questions" in said


def test_the_seed_draws_other_responses(source: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        ok("sample", source, "--out", tmp_path / f"{name}.csv", "-n", 10, "--seed", seed)
    a, b, c = ((tmp_path / f"{name}.csv").read_text() for name in "abc")
    assert a == b
    assert a != c


def test_sampling_without_scores_says_so(tmp_path: Path) -> None:
    path = tmp_path / "plain.jsonl"
    path.write_text('{"question": "q", "response": "a"}\n')
    result = run("sample", path, "--out", tmp_path / "r.csv")
    assert f"note: {path} has no scores to draw by" in result.stderr
    assert "1 of 1 response:" in result.stdout
    assert "no column 'score'" in refused("sample", path, "--out", tmp_path / "s.csv", "--column", "score")


def test_what_cannot_be_done_is_refused(source: Path, tmp_path: Path) -> None:
    assert "there is no file" in refused("compare", source, tmp_path / "none.csv")
    assert "must end in .html" in refused("compare", source, source, "--report", source)
    assert "at least 1 response" in refused("sample", source, "--out", tmp_path / "r.csv", "-n", 0)
    assert "nosuch" in refused("sample", source, "--out", tmp_path / "r.csv", "--trait", "nosuch")
    assert not (tmp_path / "r.csv").exists()
    (tmp_path / "file").write_text("")
    assert "cannot be made" in refused("compare", source, source, "--report", tmp_path / "file" / "x.html")
