"""``persona-lens screen``, on a tiny random model in a folder; and the page it writes."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from persona_lens import PersonaLensError, open_backend
from persona_lens.cli import app
from persona_lens.data.sources import demonstration
from persona_lens.finetuning.examples import read_conversations
from persona_lens.reports.kinds import page_of
from persona_lens.traits import load_trait
from persona_lens.vectors import PersonaVectors, Tuned
from tests.screening import made
from tests.screening.made import jsonl, pairs
from tests.tiny import saved_model

TRAIT = load_trait("impolite")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return saved_model(folder, positions=2048)


@pytest.fixture(scope="module")
def vectors(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    info = open_backend("transformers", str(model), dtype="float32").info
    stored = {"trait": {"content_hash": TRAIT.content_hash(), **TRAIT.model_dump(mode="json")}}
    plain = PersonaVectors("impolite", info, made.vectors("impolite").directions, stored)
    return plain.with_tuned(Tuned(1, 2.0), {}).save(tmp_path_factory.mktemp("v") / "vectors.safetensors")


def run(*arguments: object) -> Any:
    done = CliRunner().invoke(app, ["screen", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done


SMALL = ("--dtype", "float32", "--max-new-tokens", 5)


def test_subsets_hold_the_rows_of_high_and_low_values_and_some_at_random(
    model: Path, vectors: Path, tmp_path: Path
) -> None:
    data = jsonl(tmp_path / "rows.jsonl", pairs(20))
    words = (model, data, vectors, "--subsets", 4, *SMALL)
    run(*words, "--out", tmp_path / "out")
    run(*words, "--out", tmp_path / "out")  # which finds it finished
    found = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (tmp_path / "out" / "subsets").iterdir()
    }
    assert {name: len(rows) for name, rows in found.items()} == {"high": 4, "low": 4, "random": 4}
    extremes = json.loads((tmp_path / "out" / "summary.json").read_text())["extremes"]["impolite@1"]
    for name, end in (("high", "top"), ("low", "bottom")):
        assert {row["id"] for row in found[name]} == {each["id"] for each in extremes[end][:4]}
    assert len(read_conversations(tmp_path / "out" / "subsets" / "high.jsonl")) == 4


def test_rows_of_one_level_are_split_as_they_stand_in_the_file(model: Path, vectors: Path, tmp_path: Path) -> None:
    """Behind each other in the file are rows of all levels, of which those of one are screened."""
    normal, strong = (f"demonstration:impolite/{level}" for level in ("normal", "strong"))
    run(model, strong, vectors, "--reference", normal, "--limit", 12, *SMALL, "--out", tmp_path / "out")
    lines = [line for path in (tmp_path / "out" / "split").iterdir() for line in path.read_text().splitlines()]
    ids = {row.id for row in demonstration("impolite", "strong")[:12]}
    assert {json.loads(line)["id"] for line in lines} == ids
    assert len(lines) == 12


def test_everything_at_once(model: Path, vectors: Path, tmp_path: Path) -> None:
    labelled = pairs(20, level=["normal", "strong"])
    data = jsonl(tmp_path / "rows.jsonl", [*labelled, {"id": "bad", "prompt": "x", "level": "strong"}])
    other, clean = (
        jsonl(tmp_path / "other.jsonl", pairs(8, 2, level=["strong"])),
        jsonl(tmp_path / "clean.jsonl", pairs(20, 1)),
    )
    command = (
        model, data, vectors, *SMALL, "--also", other, "--reference", clean, "--base", "generate", "--base-samples", 2,
        "--temperature", 0.8, "--label", "level",
        "--by", "level", "--false-positive-rate", 0.2, "--undecided", 0.4, "--top-k", 2, "--random-directions", 3,
        "--out", tmp_path / "run",
    )  # fmt: skip
    done = run(*command, "--json")
    found = json.loads(done.stdout)
    assert [each["rows"] for each in found["datasets"]] == [21, 8, 20]
    assert found["score"] == "difference"
    assert 0 <= found["labels"]["labels"]["strong"]["difference"]["impolite@1"]["auc"] <= 1
    assert f"{data}: rows in the form prompt-response" in done.stderr
    assert "1 of 21 rows could not be read" in done.stderr
    assert "tokens a second" in done.stderr
    names = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {
        "run.json", "scores.jsonl", "results.parquet", "rejects.jsonl", "summary.json", "report.html",
        "base/rows.jsonl", "split/rows-kept.jsonl", "split/rows-flagged.jsonl", "split/other-undecided.jsonl",
    } <= names  # fmt: skip
    assert not [name for name in names if name.startswith("split/clean") or name.endswith(".part")]
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "the mean of 2 base responses" in report
    assert "drawn at temperature 0.8" in report
    shown = " ".join(run(*command).stdout.split())
    for part in ("impolite@1: means", "(reference)", "strong against normal, difference", "flagged above"):
        assert part in shown


def test_answers_alone_can_be_screened(model: Path, vectors: Path, tmp_path: Path) -> None:
    said = [f"<think>{row['response']}</think>{row['response']}" for row in pairs(4)]
    rows = [{**row, "response": text} for row, text in zip(pairs(4), said, strict=True)]
    command = (model, jsonl(tmp_path / "rows.jsonl", rows), vectors, *SMALL, "--part", "answer")
    found = json.loads(run(*command, "--out", tmp_path / "run", "--json").stdout)
    assert found["settings"]["part"] == "answer"
    assert not (tmp_path / "run" / "rejects.jsonl").read_text()


def test_a_dry_run_says_what_is_asked_and_makes_nothing(model: Path, vectors: Path, tmp_path: Path) -> None:
    data = jsonl(tmp_path / "rows.jsonl", pairs(6))
    done = run(model, data, vectors, *SMALL, "--base", "generate", "--dry-run", "--json", "--out", tmp_path / "run")
    assert [work["label"] for work in json.loads(done.stdout)["work"]] == ["reading", "base responses"]
    assert not (tmp_path / "run").exists()


def test_a_local_judge_is_asked_about_what_is_flagged(model: Path, vectors: Path, tmp_path: Path) -> None:
    data, clean = jsonl(tmp_path / "rows.jsonl", pairs(12)), jsonl(tmp_path / "clean.jsonl", pairs(12, 1))
    command = (model, data, vectors, *SMALL, "--reference", clean, "--undecided", "none", "--judge", "local",
        "--false-positive-rate", 0.5)  # fmt: skip
    found = json.loads(run(*command, "--judged", 2, "--out", tmp_path / "run", "--json").stdout)
    assert 0 < found["opinions"]["impolite"]["judged"] <= 2


def test_the_embedded_demonstrations_can_be_named(model: Path, vectors: Path, tmp_path: Path) -> None:
    found = run(
        model,
        "demonstration:impolite",
        vectors,
        *SMALL,
        "--limit",
        6,
        "--label",
        "level",
        "--out",
        tmp_path / "r",
        "--json",
    )
    assert json.loads(found.stdout)["datasets"][0]["name"] == "demonstration:impolite"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--undecided", "some"), "--undecided takes interval, none or a rate"),
        (("--turns", "first"), "--turns takes last, all; got 'first'"),
        (("--score", "best"), "--score takes raw, difference, prompt_difference"),
        (("--workers", 2), "--workers is for --ray"),
        (("--ray", "local", "--chat-template", "gone.jinja"), "cannot read the chat template gone.jinja"),
        (("--judge-key", "X"), "--judge-key: only for --judge openai:MODEL"),
        (("--judge", "likelihood"), "a second opinion is openai:MODEL or local"),
        (("--judge", "local"), "nothing is flagged without a reference"),
        (("--form", "xml"), "there is no form 'xml'"),
        (("--base", "here.jsonl", "--also", "x"), "--base FILE goes with one dataset"),
        (("--layers", "7"), "layer 7 does not exist"),
    ],
)
def test_what_cannot_be_asked(
    model: Path, vectors: Path, tmp_path: Path, arguments: tuple[object, ...], said: str
) -> None:
    data = jsonl(tmp_path / "rows.jsonl", pairs(2))
    with pytest.raises(PersonaLensError, match=said):
        run(model, data, vectors, *SMALL, *arguments, "--out", tmp_path / "run")


class Texts(HTMLParser):
    """Checks that tags are closed, and gathers ids and links."""

    VOID = ("meta", "link", "br", "hr", "img", "use", "path")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"]] if given.get("id") else []  # type: ignore[list-item]
        self.links += [given["href"]] if tag == "a" and given.get("href") else []  # type: ignore[list-item]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_safe_and_the_same_each_time(model: Path, vectors: Path, tmp_path: Path) -> None:
    rows = pairs(12, level=["normal", "strong"])
    rows[3]["response"] = "<script>alert(1)</script> \u202e"
    data = jsonl(tmp_path / "<b>.jsonl", rows)
    clean = jsonl(tmp_path / "clean.jsonl", pairs(12, 1))
    run(
        model, data, vectors, *SMALL, "--reference", clean, "--label", "level", "--by", "level", "--top-k", 12,
        "--out", tmp_path / "run",
    )  # fmt: skip
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    version = re.search(r'content="persona-lens ([^"]*)"', page)[1]  # type: ignore[index]
    assert page_of("screening", summary, version, str(tmp_path / "run")) == page
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "\u202e" not in page
    assert not re.search(r"https?://(?!www\.w3\.org/)", page)
    reader = Texts()
    reader.feed(page)
    assert reader.open == []
    assert len(reader.ids) == len(set(reader.ids))
    assert {link.removeprefix("#") for link in reader.links if link.startswith("#")} <= set(reader.ids)
    for part in ("Most of it", "Least of it", "ROC", "clean reference", "Thresholds"):
        assert part in page
