"""`steer tune` as its users meet it, on a model of three layers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from persona_lens.reports.kinds import page_of
from persona_lens.reports.tuning import headline
from persona_lens.vectors import load_vectors
from tests.shell import Shell
from tests.tiny import saved_model

TINY = ("--dtype", "float32", "--device", "cpu", "--max-new-tokens", "8")
SMALL = ("--layers", "0,1", "--strengths", "0.05,0.1", "--search-questions", "17", "--confirm-samples", "1")
FILES = {
    *("run.json", "norms-rollouts.jsonl", "activations", "summary.json", "vectors.safetensors", "report.html"),
    *(f"confirm-{kind}.jsonl" for kind in ("rollouts", "judgements", "scores")),
    "search-scores.jsonl",
}


SHELL = Shell()
ok, refused = SHELL.ok, SHELL.refused


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and with vectors that were extracted from it."""
    folder = tmp_path_factory.mktemp("home")
    saved_model(folder / "tiny")
    ok("extract", folder / "tiny", "optimistic", "--out", folder / "run", "--questions", 4, "--unpaired", *TINY)
    return folder


@pytest.fixture(scope="module")
def tuned(home: Path) -> tuple[Path, str]:
    """The run folder of a tuning, and what was said."""
    out = home / "tuned"
    return out, ok("steer", "tune", home / "tiny", home / "run", "--out", out, *SMALL, *TINY)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_the_folder_holds_the_choice_and_the_page_and_says_so(tuned: tuple[Path, str]) -> None:
    out, said = tuned
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    rounds = {
        f"search-{number:02d}-{kind}.jsonl"
        for number in range(1, summary["race"]["rounds"] + 1)
        for kind in ("rollouts", "judgements")
    }
    there = {path.name for path in out.iterdir() if path.name != ".lock"}
    assert there == FILES | rounds | {"norms-judgements.jsonl"}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page == page_of("tune", summary, folder=str(out))
    stored = load_vectors(out).tuned
    assert stored is not None
    assert (stored.layer, stored.coefficient) == (summary["chosen"]["layer"], summary["chosen"]["coefficient"])
    assert f"chosen: {summary['chosen']['steering']}" in said
    assert f"report: {out / 'report.html'}" in said
    assert headline(summary).title in said
    steered, rounds_run = summary["race"]["steered"], summary["race"]["rounds"]
    assert re.search(rf"the race took {steered} steered responses at \d+ places, in {rounds_run} rounds", said)
    assert re.search(r"on 3 questions of 3 that the search left: [+-]\d", said)


def test_the_command_on_the_page_is_the_one_that_was_given(home: Path, tuned: tuple[Path, str]) -> None:
    summary = json.loads((tuned[0] / "summary.json").read_text(encoding="utf-8"))
    words = str(summary["command"]).split()
    assert words[:5] == ["persona-lens", "steer", "tune", str(home / "tiny"), str(home / "run")]
    given = [str(word) for word in ("--out", tuned[0], *SMALL, *TINY)]
    assert sorted(words[5:]) == sorted(given)


def test_it_is_gone_on_with_and_ends_with_the_same_bytes(home: Path, tuned: tuple[Path, str]) -> None:
    out, _ = tuned
    before = contents(out)
    for name in ("report.html", "summary.json", "confirm-judgements.jsonl", "vectors.safetensors"):
        (out / name).unlink()
    (out / "search-01-rollouts.jsonl").write_bytes(before["search-01-rollouts.jsonl"][:-30])
    found: dict[str, Any] = json.loads(
        ok("steer", "tune", home / "tiny", home / "run", "--out", out, *SMALL, *TINY, "--json")
    )
    assert contents(out) == before
    assert found.pop("folder") == str(out)
    assert found == json.loads(before["summary.json"])


def test_an_exhaustive_search_asks_everything_everywhere(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = ok("steer", "tune", home / "tiny", home / "run", "--out", out, *SMALL, *TINY, "--exhaustive")
    there = {path.name for path in out.iterdir() if path.name != ".lock"}
    assert there == FILES | {"search-rollouts.jsonl", "search-judgements.jsonl"}
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["race"] is None
    assert [point["questions"] for point in summary["surface"]] == [17] * 4
    assert all(point["effect"]["random"] for point in summary["surface"] if point["effect"])
    assert "the race" not in said
    assert "random" in said


def test_another_tuning_does_not_take_its_folder(home: Path, tuned: tuple[Path, str]) -> None:
    out, _ = tuned
    before = contents(out)
    said = refused("steer", "tune", home / "tiny", home / "run", "--out", out, *SMALL, *TINY, "--seed", 1)
    assert "settings.seed: 0 -> 1" in said
    assert contents(out) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--layers", "7"), "layer 7 does not exist: the model has layers 0 to 2"),
        (("--layers", "one"), "--layers takes 18, 12,15,18, 10-20 or all; got 'one'"),
        (("--strengths", "much"), "--strengths takes numbers with commas between them"),
        (("--strengths", "-0.2"), r"strengths are step lengths in residual norms, such as 0.1 to 1: got [-0.2]"),
        (("--towards", "mor"), "--towards takes more, less; got 'mor'"),
        (("--search-questions", "20"), "has 20 held-out questions, of which a search on 20 leaves 0"),
        (("--samples", "0"), "must be at least 1"),
        (("--budget", "7"), "a budget of 7 carries no layer through, which takes 36 responses; give at least so many"),
        (("--budget", "99", "--exhaustive"), "leave out the budget, or exhaustive"),
        (("--judge", "likelyhood"), "got 'likelyhood'"),
    ],
)
def test_what_cannot_be_tuned_is_refused_and_leaves_nothing(
    home: Path, tmp_path: Path, options: tuple[str, str], said: str
) -> None:
    out = tmp_path / "out"
    assert said in refused("steer", "tune", home / "tiny", home / "run", "--out", out, *SMALL, *TINY, *options)
    assert not out.exists()


def test_vectors_that_are_not_there_are_refused(home: Path, tmp_path: Path) -> None:
    assert str(tmp_path) in refused("steer", "tune", home / "tiny", tmp_path, *TINY)


def test_a_dry_run_writes_nothing(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = ok("steer", "tune", home / "tiny", home / "run", "--out", out, *SMALL, *TINY, "--dry-run", "--json")
    work = json.loads(said)["work"]
    assert {"rollouts", "judging"} <= {each["label"] for each in work}
    assert [each["at_most"] for each in work] == [False, False, True, True, True, True]
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    tasks = ("--capability", "persona_lens_basics", "--dry-run", "--json")
    more = json.loads(ok("steer", "tune", home / "tiny", home / "run", "--out", out, *SMALL, *TINY, *tasks))["work"]
    assert more[: len(work)] == work
    reading, generating = more[len(work) :]
    assert (reading["label"], reading["rows"]) == ("reading in tasks", 480 * 4)  # unsteered, and at three strengths
    assert (generating["label"], generating["rows"]) == ("generating in tasks", 120 * 4)
    said = ok("steer", "tune", home / "tiny", home / "run", "--out", out, *SMALL, *TINY, "--dry-run")
    assert re.search(r"rollouts +│ +at most \d+ +│ +at most 72 ", said)
    said = ok("steer", "tune", home / "tiny", home / "run", "--out", out, *SMALL, *TINY, "--dry-run", "--exhaustive")
    assert re.search(
        r"rollouts +│ +\d+ +│ +153 ", said
    )  # 17 questions, unsteered, and along and beside the vector at 4 places
    assert not out.exists()
