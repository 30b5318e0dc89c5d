"""``steer compare`` and ``steer capability`` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from persona_lens.reports.catalogue import find_runs
from persona_lens.reports.result import Result as Stored
from persona_lens.traits import Arm, load_trait
from tests.ledger import ledger
from tests.shell import Shell

TINY = ("--dtype", "float32", "--device", "cpu")
SHORT = (*TINY, "--max-new-tokens", "8")
ONE, BAND = "optimistic@1:+4", "optimistic@all:increments(+4)"

SHELL = Shell()
run, refused = SHELL.done, SHELL.refused


def compare(made: tuple[str, str], *more: str) -> tuple[str, ...]:
    return ("steer", "compare", *made, "--questions", "3", "--random-directions", "2", *SHORT, *more)


def test_steerings_are_compared_with_the_unsteered_model_and_their_nulls(made: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "comparison"
    command = compare(made, "--edits", ONE, "--edits", BAND, "--out", str(out), "--json")
    summary = json.loads(run(*command).stdout)
    assert list(summary["arms"]) == [ONE, BAND]
    assert summary["questions"] == 3
    rows = [json.loads(line) for line in (out / "arms-scores.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * (1 + 2 * 2)

    def mean(arm: str, direction: str) -> float:
        return fmean(row["score"] for row in rows if (row["arm"], row["direction"]) == (arm, direction))

    plain = mean("unsteered", "none")
    assert summary["unsteered"]["score"]["mean"] == pytest.approx(plain)
    for arm in (ONE, BAND):
        effect = summary["arms"][arm]["effect"]
        assert effect["score"]["mean"] == pytest.approx(mean(arm, "vector"))
        assert effect["change"]["mean"] == pytest.approx(mean(arm, "vector") - plain)
        assert effect["random"]["mean"] == pytest.approx(mean(arm, "random") - plain)
    files = {p.name: p.read_bytes() for p in out.iterdir() if p.name != ".lock"}
    assert json.loads(run(*command).stdout) == summary  # gone on with: nothing is left to do
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.name != ".lock"} == files
    assert "seed: 0 -> 1" in refused(*command, "--seed", "1")
    shown = run(*command[:-1]).stdout
    assert "surprise" in shown
    assert ONE in shown
    assert "unsteered" in shown


def test_a_system_prompt_stands_beside_steerings(made: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "comparison"
    command = compare(made, "--edits", ONE, "--prompted", "less", "--out", str(out), "--json")
    summary = json.loads(run(*command).stdout)
    asked = load_trait("optimistic").middle_prompt(Arm.NEGATIVE)
    assert summary["arms"]["prompted"]["system"] == asked
    assert summary["arms"]["prompted"]["effect"]["random"] is None
    said = [json.loads(line) for line in (out / "arms-rollouts.jsonl").read_text().splitlines()]
    assert {row["system"] for row in said if row["arm"] == "prompted"} == {asked}
    assert {row["system"] for row in said if row["arm"] != "prompted"} == {None}
    (found,) = find_runs(out)
    assert found.planned == len(said) == 3 * 4
    assert "prompted, a system prompt and no steering: " in " ".join(Stored.load(out).headline.sentences)
    alone = json.loads(run(*compare(made, "--edits", ONE, "--json")).stdout)
    assert alone["arms"][ONE] == summary["arms"][ONE]
    assert "prompted" in run(*command[:-1]).stdout
    assert "--prompted takes more, less; got 'up'" in refused(*compare(made, "--edits", ONE, "--prompted", "up"))


def test_a_comparison_is_planned_and_refused_where_it_means_nothing(made: tuple[str, str]) -> None:
    work = json.loads(run(*compare(made, "--edits", ONE, "--dry-run", "--json")).stdout)["work"]
    assert [each["rows"] for each in work] == [3 * 3, 3 * 3 * 5]
    assert "name what to compare" in refused(*compare(made))
    assert "expected a number" in refused(*compare(made, "--edits", "optimistic@1:+"))
    assert "no vectors for 'evil'" in refused(*compare(made, "--edits", "evil@1:+1"))
    assert "has 20 for evaluation" in refused(*compare(made, "--edits", ONE, "--questions", "21"))
    for planned in ((), ("--dry-run",)):
        assert "there is no thinking to edit" in refused(*compare(made, "--edits", f"{ONE} on thinking", *planned))


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    from tests.analysis.capability.tasks import write_tasks

    write_tasks(tmp_path)
    return tmp_path


def test_capability_is_measured_unsteered_steered_and_in_a_random_direction(
    made: tuple[str, str], tasks: Path, tmp_path: Path
) -> None:
    from tests.analysis.capability.tasks import write_tasks

    name, *_ = write_tasks(tasks)
    out = tmp_path / "capability.json"
    command = ("steer", "capability", *made, "--edits", ONE, "--task", name, "--include-path", str(tasks), *TINY)
    planned = json.loads(run(*command, "--out", str(out), "--dry-run", "--json").stdout)["work"]
    assert not out.exists()
    with ledger() as ran:
        figures = json.loads(run(*command, "--out", str(out), "--json").stdout)
    reading, generating = planned
    assert (reading["label"], reading["tokens"]) == ("reading in tasks", ran["weighed"])
    assert generating["at_most"]
    assert 0 < ran["generated"] <= generating["tokens"]
    assert json.loads(out.read_text()) == figures
    found: dict[str, dict[str, Any]] = {each["arm"]: each for each in figures["changes"] if each["metric"] == "acc"}
    assert set(found) == {"unsteered", ONE}
    assert found["unsteered"]["change"] is None
    change = found[ONE]["value"] - found["unsteered"]["value"]
    assert found[ONE]["change"]["mean"] == pytest.approx(change)
    assert found[ONE]["random"]["n"] == found[ONE]["samples"] > 1
    assert "unsteered" in run(*command).stdout


def test_capability_that_cannot_be_measured_is_said(made: tuple[str, str], tasks: Path) -> None:
    command = ("steer", "capability", *made, "--layer", "1", *TINY)
    assert "no task 'persona_lens_basic'; did you mean persona_lens_basics" in refused(
        *command, "--task", "persona_lens_basic"
    )
    assert "limit is a whole number" in refused(*command, "--limit", "2.5")
    assert "no layer was tuned" in refused("steer", "capability", *made, *TINY)
