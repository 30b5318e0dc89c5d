"""The demonstration on the embedded model: its claims are in its numbers, and hold by a measure that is not ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from persona_lens.reports.result import Result

pytestmark = [pytest.mark.real, pytest.mark.slow]


STRETCHES = (
    "loading libraries",
    "opening smollm2-135m through transformers",
    "extraction rollouts",
    "extraction judging",
    "layer-choice rollouts",
    "layer-choice judging",
    "steering rollouts",
    "steering judging",
    "report",
)


def run_demo(folder: Path, *size: str) -> list[str]:
    """The lines that it says on standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "persona_lens.cli", "demo", "--out", str(folder), "--json", *size],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module", params=["--quick", pytest.param("whole", marks=pytest.mark.exhaustive)])
def size(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return (request.param,) if request.param == "--quick" else ()


@pytest.fixture(scope="module")
def said(size: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("demo") / "run"
    return folder, run_demo(folder, *size)


@pytest.fixture(scope="module")
def demo(said: tuple[Path, list[str]]) -> Path:
    return said[0]


@pytest.fixture(scope="module")
def summary(demo: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((demo / "summary.json").read_text(encoding="utf-8"))
    return loaded


def test_steering_moves_the_score_clear_of_zero_and_of_random_directions(summary: dict[str, Any]) -> None:
    effect = summary["steering"]["effect"]
    assert (effect["low"], effect["high"]) == (-2, 2)
    assert effect["vector"]["low"] > 0
    assert effect["difference"]["low"] > 0
    assert effect["vector"]["low"] > effect["random"]["high"]


def test_a_sentiment_lexicon_sees_the_same_order(demo: Path, summary: dict[str, Any]) -> None:
    analyzer = SentimentIntensityAnalyzer()
    lines = (demo / "steering" / "steering-scores.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]

    def sentiment(coefficient: float) -> float:
        chosen = [r["text"] for r in rows if r["coefficient"] == coefficient and r["direction"] != "random"]
        assert len(chosen) == summary["steering"]["questions"]
        return fmean(analyzer.polarity_scores(text)["compound"] for text in chosen)

    assert sentiment(2) > sentiment(0) > sentiment(-2)


def test_the_layer_was_chosen_on_other_questions_than_it_is_shown_on(demo: Path, summary: dict[str, Any]) -> None:
    def questions(name: str) -> set[str]:
        text = (demo / name / f"{name}-rollouts.jsonl").read_text(encoding="utf-8")
        return {json.loads(line)["question"] for line in text.splitlines()}

    assert not questions("layer-choice") & questions("steering")
    assert summary["layer_choice"]["chosen"] == summary["steering"]["layer"]


def test_every_stretch_says_how_far_it_is(size: tuple[str, ...], said: tuple[Path, list[str]]) -> None:
    comparing = () if size else ("comparing backends", "checking transformer_lens", "checking nnsight")
    begun = [line.rpartition(":")[0] for line in said[1] if line.endswith(": 0") or ": 0 of " in line]
    assert set(begun) >= {*STRETCHES, *comparing}


def test_every_backend_agrees(size: tuple[str, ...], summary: dict[str, Any]) -> None:
    if size:
        assert summary["agreement"] == []
        return
    assert {row["backend"] for row in summary["agreement"]} == {"transformer_lens", "nnsight"}
    for row in summary["agreement"]:
        assert [check["name"] for check in row["checks"] if not check["passed"]] == []


def test_the_report_shows_the_summary(size: tuple[str, ...], demo: Path, summary: dict[str, Any]) -> None:
    page = (demo / "report.html").read_text(encoding="utf-8")
    assert f"{summary['steering']['effect']['vector']['mean']:.1f}" in page
    assert summary["trait"]["content_hash"] in page
    assert 'src="http' not in page
    assert ("This is the quick demonstration" in page) == bool(size)
    assert (summary["quick"] is not None) == bool(size)


def test_its_folder_is_a_result(demo: Path) -> None:
    result = Result.load(demo)
    assert result.summary == json.loads((demo / "summary.json").read_text())
    assert result.verdict.startswith(result.headline.title)
    assert {row["direction"] for row in result.rows} == {"none", "vector", "random"}
    assert result.plot().axes


def test_a_second_run_changes_no_byte(demo: Path, size: tuple[str, ...]) -> None:
    before = contents(demo)
    run_demo(demo, *size)
    assert contents(demo) == before
