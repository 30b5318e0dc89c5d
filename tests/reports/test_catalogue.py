"""The list of runs: what each is and came to, whatever stands in its folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from persona_lens.cli import app
from persona_lens.core.errors import PersonaLensError
from persona_lens.reports.catalogue import FoundRun, find_runs, render_index
from persona_lens.reports.result import Result
from persona_lens.reports.tuning import headline
from tests.core.test_foreign_text import ACTS, NASTY
from tests.reports.test_report import Page, assert_loads_nothing, make_summary
from tests.reports.test_tuning_report import make_tuning

SETTINGS = {"layers": [3, 5], "coefficients": [-1.0, 0.0, 1.0], "questions": 4, "samples": 2, "random_directions": 5}


def made(folder: Path, kind: Any, summary: Any = None, **config: Any) -> Path:
    """A run folder."""
    folder.mkdir(parents=True)
    own = {"model": {"model": "a-model"}, "trait": {"name": "grumpy"}, **config}
    (folder / "run.json").write_text(json.dumps({"kind": kind, **own}))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def home(folder: Path) -> Path:
    """Runs of all sorts, and what is none."""
    tuned = made(folder / "a-tuned", "tune", make_tuning())
    (tuned / "report.html").write_text("<p>a page</p>")
    swept = made(folder / "b" / "swept", "sweep", settings=SETTINGS)
    (swept / "sweep-rollouts.jsonl").write_text("{}\n{}\n{}\nhalf a l")
    demo = made(folder / "c-demo", "demo", make_summary(), settings={"trait": "optimistic"}, trait=None)
    made(demo / "extraction", "extraction")
    (folder / "d-cut").mkdir()
    (folder / "d-cut" / "run.json").write_text('{"kind": "sw')
    made(folder / "e-lacking", "tune", {"trait": "grumpy"})
    made(folder / "f-list", "tune", [1])
    made(folder / "g-nothing", None)
    made(folder / "h-other", "of another program", {"found": 1})
    (folder / "notes").mkdir()
    (folder / "notes" / "summary.json").write_text("{}")
    (folder / "i-pipe").mkdir()
    os.mkfifo(folder / "i-pipe" / "run.json")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, FoundRun]:
    folder = home(tmp_path / "runs")
    return {Path(run.path).relative_to(folder).as_posix(): run for run in find_runs(folder)}


def test_every_run_is_listed_with_what_it_came_to_and_nothing_else_is(runs: dict[str, FoundRun]) -> None:
    names = ["a-tuned", "b/swept", "c-demo", "d-cut", "e-lacking", "f-list", "g-nothing", "h-other"]
    assert sorted(runs) == names
    assert {name: run.state for name, run in runs.items()} == {
        **dict.fromkeys(names, "damaged"),
        **dict.fromkeys(("a-tuned", "c-demo", "h-other"), "finished"),
        "b/swept": "unfinished",
    }
    tuned = runs["a-tuned"]
    assert (tuned.kind, tuned.trait, tuned.model) == ("tune", "optimistic", "smollm2-135m")
    assert tuned.verdict == Result.load(tuned.path).verdict == headline(make_tuning()).sentence
    assert "12 held-out questions, judged by" in str(tuned.verdict)
    assert tuned.report == str(Path(tuned.path) / "report.html")
    assert runs["c-demo"].trait == "optimistic"
    assert "A clear effect: steering from" in str(runs["c-demo"].verdict)
    assert "20 held-out questions, judged by the likelihood judge, a proxy" in str(runs["c-demo"].verdict)


def test_an_unfinished_run_says_how_far_it_is(runs: dict[str, FoundRun]) -> None:
    swept = runs["b/swept"]
    # Two layers, two coefficients besides 0, along the vector and along random directions; and unsteered.
    assert (swept.rows, swept.planned) == (3, 4 * 2 * (1 + 2 * 2 * 2))
    assert swept.progress == "unfinished, 3 of 72 rows"
    assert (swept.verdict, swept.problem) == (None, None)


def test_a_damaged_run_says_why(runs: dict[str, FoundRun]) -> None:
    for name, reason in {
        "d-cut": "run.json is not JSON",
        "e-lacking": "is not what such a run writes (KeyError",
        "f-list": "it holds no object",
        "g-nothing": "does not say what kind of run it is",
    }.items():
        assert reason in str(runs[name].problem), name
    assert runs["h-other"].problem == "nothing more is known of this kind of run"


def test_the_index_links_to_the_reports_and_loads_nothing(runs: dict[str, FoundRun], tmp_path: Path) -> None:
    page = render_index(runs.values(), tmp_path / "index.html")
    assert [tag["href"] for tag in Page(page).all("a") if "skip" not in str(tag.get("class"))] == [
        "runs/a-tuned/report.html"
    ]
    assert "unfinished, 3 of 72 rows" in page
    assert_loads_nothing(page.replace('href="runs/a-tuned/report.html"', ""))


def test_texts_of_others_do_no_harm(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    hostile = f"{NASTY}<script>alert(1)</script>"
    summary = {**make_tuning(), "trait": hostile, "judge": {"judge": hostile}}
    (made(folder / "javascript:alert(1)", "tune", summary, trait={"name": hostile}) / "report.html").write_text("")
    made(folder / "<b>bold", hostile, settings={**SETTINGS, "questions": "x", "samples": 10**15})
    found = list(find_runs(folder))
    page = render_index(found, folder / "index.html")
    assert "<script" not in page
    assert not ACTS.search(page)
    assert 'href="javascript%3Aalert%281%29/report.html"' in page
    shown = CliRunner().invoke(app, ["runs", str(folder)])
    assert shown.exit_code == 0, shown.exception
    assert not ACTS.search(shown.stdout)


def test_the_command_lists_prints_json_and_writes_the_index(tmp_path: Path) -> None:
    folder = home(tmp_path / "runs")
    shown = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["runs", str(folder), "--html", str(tmp_path / "index.html")])
    assert shown.exit_code == 0, shown.exception
    assert "unfinished, 3 of 72 rows" in shown.stdout
    assert "runs/a-tuned/report.html" in (tmp_path / "index.html").read_text()
    listed = json.loads(CliRunner().invoke(app, ["runs", str(folder), "--json"]).stdout)["runs"]
    assert listed == [run.to_json() for run in find_runs(folder)]
    (tmp_path / "empty").mkdir()
    assert "there are no runs in" in CliRunner().invoke(app, ["runs", str(tmp_path / "empty")]).stdout
    refused = CliRunner().invoke(app, ["runs", str(tmp_path / "nowhere")])
    assert isinstance(refused.exception, PersonaLensError)


def test_the_file_system_is_taken_as_it_is(tmp_path: Path) -> None:
    made(tmp_path / "empty", "sweep", {})
    odd = made(tmp_path / "odd", "sweep")
    (odd / "summary.json").symlink_to(odd / "summary.json")
    (odd / "rollouts.jsonl").symlink_to(tmp_path / "nowhere")
    (odd / "up").symlink_to(tmp_path)
    os.utime(odd / "run.json", (2.0**33, 2.0**33))
    os.makedirs(os.fsencode(tmp_path) + b"/\xff")
    os.replace(tmp_path / "empty" / "run.json", os.fsencode(tmp_path) + b"/\xff/run.json")
    (tmp_path / "empty" / "run.json").write_text('{"kind": "sweep"}')
    found = list(find_runs(tmp_path))
    assert [run.state for run in found] == ["damaged", "unfinished", "unfinished"]
    assert "remove it, and the command" in str(found[0].problem)
    assert render_index(found, tmp_path / "index.html").encode()
    with pytest.raises(PersonaLensError, match="cannot be read"):
        list(find_runs("x" * 5000))
