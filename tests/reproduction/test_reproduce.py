"""Reproductions: on made-up figures, on a tiny model by real commands, and on the embedded model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from typer.testing import Result as Ran

import persona_lens.backend
from persona_lens import PersonaLensError
from persona_lens.cli import INTERRUPTED, app
from persona_lens.cli.reproduce import _execute, _takes
from persona_lens.models import DEFAULT_MODEL
from persona_lens.reports.result import Result
from persona_lens.reproduction import PlanError, read_plan, reproduce
from persona_lens.reproduction.places import Places
from persona_lens.reproduction.plan import built_in_plans
from persona_lens.runs import RunError
from tests.reproduction import made
from tests.tiny import saved_model

HOW = "--dtype float32 --device cpu --max-new-tokens 8"
PLAN = f"""
scale: test
traits: [optimistic, impolite]
values: {{how: {HOW}, data: null}}
steps:
  extract: extract {{model}} {{trait}} --questions 4 --unpaired {{how}} --out {{out}}
  tune: >-
    steer tune {{model}} {{extract}} --layers 1 --strengths 0.1 --search-questions 2 --confirm-questions 2
    --confirm-samples 1 --random-directions 1 {{how}} --out {{out}}
  sweep: >-
    steer sweep {{model}} {{tune}} --layers {{tune.layer}} --coefficients=-1,1 --questions 2 --random-directions 1
    {{how}} --out {{out}}
  cosines: {{once: true, run: 'vectors cosines {{extract.all}} --layers {{extract.50%}} --intervals'}}
  subsets: 'shift {{model}} {{data}} {{tune}} --out {{out}}'
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, so that nothing is written into the checkout."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def run(*words: str) -> Ran:
    return CliRunner().invoke(app, list(words))


def parsed(*words: str) -> Any:
    result = run(*words)
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


def planned(folder: Path, text: str = PLAN) -> str:
    (folder / "plan.yaml").write_text(text)
    return str(folder / "plan.yaml")


# On made-up figures


class Counting:
    """Carries out commands as `made.execute` does, and counts them; some may fail or be stopped."""

    def __init__(self, fails: Sequence[str] = (), stops: str | None = None) -> None:
        self.fails, self.stops = fails, stops
        self.asked: list[str] = []

    def __call__(self, words: Sequence[str]) -> Any:
        self.asked.append(words[0])
        if words[0] == self.stops:
            raise KeyboardInterrupt
        if words[0] in self.fails:
            raise PersonaLensError("the disk is full")
        return made.execute(words)


def test_one_that_was_stopped_goes_on_and_ends_as_one_that_was_not(tmp_path: Path) -> None:
    plan = read_plan(planned(tmp_path, made.PLAN))
    first, again, whole = Counting(stops="shift"), Counting(), Counting()
    with pytest.raises(KeyboardInterrupt):
        reproduce(plan, "a-model", first, tmp_path / "stopped")
    stopped = reproduce(plan, "a-model", again, tmp_path / "stopped")
    straight = reproduce(plan, "a-model", whole, tmp_path / "straight")
    assert len(first.asked) + len(again.asked) == len(whole.asked) + 1  # only what was stopped began twice
    files = [{path.relative_to(each.folder): path.read_bytes() for path in each.folder.rglob("*.json")}
             for each in (stopped, straight)]  # fmt: skip
    assert files[0] == files[1]
    third = Counting()
    assert reproduce(plan, "a-model", third, tmp_path / "stopped").summary == stopped.summary
    assert third.asked == []


def test_what_stands_on_another_basis_is_run_again(tmp_path: Path) -> None:
    plan = read_plan(planned(tmp_path, made.PLAN))
    reproduce(plan, "a-model", made.execute, tmp_path / "run")
    (tmp_path / "run" / "steps" / "tune-impolite.json").unlink()
    asked: list[str] = []

    def execute(words: Sequence[str]) -> Any:
        asked.append(words[0])
        said = made.execute(words)
        return {**said, "more": 1} if words[0] == "tune" else said

    reproduce(plan, "a-model", execute, tmp_path / "run")
    # The broken ones are tried again anyway; screens need the vectors of both traits.
    assert sorted(each for each in asked if each != "broken") == ["cliff", "screen", "screen", "shift", "sweep", "tune"]


def test_a_step_that_fails_ends_only_those_that_need_it(tmp_path: Path) -> None:
    plan = read_plan(planned(tmp_path, made.PLAN))
    found = reproduce(plan, "a-model", Counting(fails=("tune",)), tmp_path / "run")
    steps = {step["name"]: step["reason"] for step in found.summary["steps"]}
    assert steps["tune-impolite"] == "the disk is full"
    assert steps["sweep-impolite"] == "needs tune-impolite, which failed: the disk is full"
    assert steps["study-impolite"] is None
    rows = {(row["claim"], row["trait"]): row for row in found.summary["rows"]}
    assert rows["prompts-overall", "impolite"]["verdict"] == "shown"
    assert "tune-impolite failed: the disk is full" in rows["layer", "impolite"]["note"]
    mended = reproduce(plan, "a-model", Counting(), tmp_path / "run")
    assert mended.summary["counts"]["missing"] < found.summary["counts"]["missing"]


def test_only_some_tables_need_only_their_steps(tmp_path: Path) -> None:
    plan = read_plan(planned(tmp_path, made.PLAN))
    some, rest = Counting(), Counting()
    found = reproduce(plan, "a-model", some, tmp_path / "run", only=("monitoring",))
    assert some.asked == ["study", "study"]
    assert {row["table"] for row in found.summary["rows"]} == {"monitoring"}
    whole = reproduce(plan, "a-model", rest, tmp_path / "run")
    assert "study" not in rest.asked
    assert {row["table"] for row in whole.summary["rows"]} > {"monitoring"}
    with pytest.raises(PlanError, match="no table 'montoring'; there are extraction"):
        reproduce(plan, "a-model", some, tmp_path / "run", only=("montoring",))


def test_some_tables_run_again_leave_those_that_are_there(tmp_path: Path) -> None:
    plan = read_plan(planned(tmp_path, made.PLAN))
    whole = reproduce(plan, "a-model", Counting(fails=("cliff",)), tmp_path / "run")
    steps = tmp_path / "run" / "steps"
    (steps / "study-impolite.json").unlink()
    (steps / "shift-impolite.json").write_text("damaged")  # what is not run does not fail
    again = Counting()
    found = reproduce(plan, "a-model", again, tmp_path / "run", only=("monitoring",))
    assert again.asked == ["study"]
    assert found.summary["tables"] == whole.summary["tables"]
    rows = [{**row, "steps": []} for row in whole.summary["rows"]]
    kept = [{**row, "steps": []} for row in found.summary["rows"] if "which is to be run" not in row["note"]]
    assert kept == [row for row in rows if row in kept]
    assert {row["table"] for row in kept if row["verdict"] == "shown"} >= {"steering", "monitoring", "finetuning"}
    lost = {step["name"] for step in whole.summary["steps"]} - {step["name"] for step in found.summary["steps"]}
    assert lost == {"cliff-impolite", "cliff-optimistic", "shift-impolite"}
    assert {step["reason"] for step in found.summary["steps"]} == {None}
    notes = {row["note"] for row in found.summary["rows"] if row["table"] == "cliff" and row["trait"] == "impolite"}
    assert notes == {"needs cliff-impolite, which is to be run for it; leave out --only"}


def test_what_is_there_is_not_shown_where_what_it_stands_on_is_another(tmp_path: Path) -> None:
    plan = read_plan(planned(tmp_path, made.PLAN))
    reproduce(plan, "a-model", made.execute, tmp_path / "run")
    (tmp_path / "run" / "steps" / "tune-impolite.json").unlink()

    def execute(words: Sequence[str]) -> Any:
        return {**made.execute(words), **({"more": 1} if words[0] == "tune" else {})}

    found = reproduce(plan, "a-model", execute, tmp_path / "run", only=("steering",))
    rows = {(row["claim"], row["trait"]): row for row in found.summary["rows"]}
    assert rows["promotion", "impolite"]["verdict"] == "shown"
    assert rows["holds", "impolite"]["verdict"] == "missing"
    assert rows["holds", "impolite"]["note"].startswith("needs cliff-impolite, which is to be run")
    assert rows["holds", "optimistic"]["verdict"] == "shown"


def test_another_plan_is_refused_in_the_folder_of_one(tmp_path: Path) -> None:
    made.reproduced(tmp_path / "run")
    other = read_plan(planned(tmp_path, made.PLAN.replace("study {trait}", "study {trait} more")))
    with pytest.raises(RunError, match=r"study\.run"):
        reproduce(other, "a-model", made.execute, tmp_path / "run")


# By the commands


def test_the_numbers_are_those_of_the_single_commands(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the steps are run once, and the model is opened once for all of them."""
    opened: list[str] = []
    real = persona_lens.backend.open_backend

    def counting(*given: Any, **how: Any) -> Any:
        opened.append(given[1])
        return real(*given, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(persona_lens.backend, "open_backend", counting)
        words = ("reproduce", str(model), "--plan", planned(tmp_path), "--out", str(tmp_path / "run"), "--json")
        found = parsed(*words)
        assert opened == [str(model)]
        assert parsed(*words) == found
        assert opened == [str(model)]
    how = HOW.split()
    steps = {step["name"]: step["words"] for step in found["steps"]}
    assert all(step["reason"] is None for step in found["steps"] if not step["name"].startswith("subsets"))
    alone = str(tmp_path / "alone")
    parsed(
        "extract", str(model), "impolite", "--questions", "4", "--unpaired", *how, "--out", f"{alone}-extract", "--json"
    )
    tuned = [f"{alone}-extract" if word.endswith("extract-impolite") else word for word in steps["tune-impolite"][:-1]]
    parsed(*tuned, f"{alone}-tune", "--json")
    swept = [f"{alone}-tune" if word.endswith("tune-impolite") else word for word in steps["sweep-impolite"][:-1]]
    (layer,) = parsed(*swept, f"{alone}-sweep", "--json")["layers"]
    row = next(row for row in found["rows"] if (row["claim"], row["trait"]) == ("promotion", "impolite"))
    assert row["value"]["mean"] == layer["effect"]["promotion"]["vector"]["mean"]
    assert row["null"]["low"] == layer["effect"]["promotion"]["random"]["low"]
    pair = next(row for row in found["rows"] if row["claim"] == "cosine")
    monkeypatch.chdir(tmp_path / "run")  # where the commands are typed as the page has them
    cosines = parsed(*steps["cosines"], "--json")
    assert abs(cosines["intervals"][0]["cosine"]) == pair["value"]["mean"]
    assert cosines["cosines"][0][0][1] == pytest.approx(cosines["intervals"][0]["cosine"], abs=1e-5)
    needs = {row["note"] for row in found["rows"] if row["table"] == "subsets"}
    assert needs == {"needs --data, which was not given"}


def test_the_folder_is_a_run_whose_pages_lead_to_each_other(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    plan = planned(tmp_path, PLAN.replace("[optimistic, impolite]", "[optimistic]"))
    result = run("reproduce", str(model), "--plan", plan, "--only", "steering", "--out", str(out))
    assert result.exit_code == 0, (result.output, result.exception)
    assert all(word in result.stdout for word in ("Steering, by layer", "Adding the", "not shown", "report: "))
    assert Result.load(out).report() == (out / "report.html").read_text(encoding="utf-8")
    for name in ("extract", "tune", "sweep"):
        assert (out / "steps" / f"{name}-optimistic" / "report.html").is_file()
        assert f'href="steps/{name}-optimistic/report.html"' in (out / "report.html").read_text(encoding="utf-8")
    assert not (out / "steps" / "cosines.json").exists()


def test_a_dry_run_counts_every_step_and_measures_the_device(model: Path, tmp_path: Path) -> None:
    told = parsed("reproduce", str(model), "--plan", planned(tmp_path), "--dry-run", "--json")
    steps = {step["task"]: step for step in told["steps"]}
    # 4 questions, 5 pairs and 2 arms; each answer is judged, too.
    assert steps["extract-impolite"]["rows"] > 40
    assert steps["sweep-impolite"]["tokens"] > 0
    assert (steps["cosines"]["tokens"], steps["cosines"]["reason"]) == (0, None), "no model is asked"
    assert steps["tune-impolite"]["reason"] is None
    assert "--data" in steps["subsets-impolite"]["reason"]
    assert told["all"]["rows"] == sum(step["rows"] for step in told["steps"])
    assert told["all"]["hours"] == pytest.approx(sum(step["hours"] or 0 for step in told["steps"]))
    assert told["all"]["hours"] > 0
    assert not list(Path().iterdir()), "nothing is written"


def test_a_dry_run_counts_what_stands_on_data_that_is_ranked_first(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Why {n}?", "response": "So."}) + "\n" for n in range(6)))
    text = PLAN.partition("  cosines:")[0] + (
        f"  rank: 'screen {{model}} {{data}} {{tune}} --subsets 2 {HOW} --base generate --out {{out}}'\n"
        "  finetune-high: 'finetune {model} {rank}/subsets/high.jsonl --out {out}'\n"
        "  subsets: 'shift {model} {finetune-high} {tune} --questions 2 {how} --out {out}'\n"
    )
    words = ("reproduce", str(model), "--plan", planned(tmp_path, text), "--only", "subsets", "--dry-run", "--json")
    given = {step["task"]: step for step in parsed(*words, "--data", str(data))["steps"]}
    assert given["rank-impolite"]["rows"] == 12  # six rows, and as many answers of the model itself
    assert given["finetune-high-impolite"]["rows"] == 4  # trained on, and read for their loss
    assert given["subsets-impolite"]["reason"] is None
    without = {step["task"]: step["reason"] for step in parsed(*words)["steps"]}
    assert without["subsets-impolite"] == without["rank-impolite"] == "needs --data, which was not given"


def test_a_dry_run_counts_what_judges_and_tasks_are_asked(model: Path, tmp_path: Path) -> None:
    """Judges are asked about answers that are not there yet."""
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    pytest.importorskip("peft")
    place = "--dtype float32 --device cpu"
    text = PLAN.partition("  cosines:")[0].replace("[optimistic, impolite]", "[impolite]") + (
        f"  increments: 'steer compare {{model}} {{tune}} --edits {{trait}}@1:+1 --questions 2 {HOW} --out {{out}}'\n"
        f"  capability: 'steer capability {{model}} {{tune}} --edits {{trait}}@1:+1 --limit 6 {place}'\n"
        f"  judges: 'judge compare {{increments}}/arms-scores.jsonl openai:some --trait {{trait}} --judge-url "
        "http://127.0.0.1:9/v1 --prices 1,2 --report {out}.html'\n"
        "  protection: 'finetune-study {model} demonstration:{trait}/strong {tune} --seeds 1 --questions 2 {how} "
        "--out {out}'\n"
    )
    words = ("reproduce", str(model), "--plan", planned(tmp_path, text), "--dry-run", "--json")
    steps = {step["task"].removesuffix("-impolite"): step for step in parsed(*words)["steps"]}
    assert {step["reason"] for step in steps.values()} == {None}
    assert steps["judges"]["rows"] == 2 * 6  # for trait and coherence, of 2 questions unsteered, steered and at random
    assert steps["judges"]["dollars"] > 0
    assert steps["capability"]["rows"] == 3 * (24 + 6)  # of 6 questions with 4 answers, 3 times, and written greedily
    assert steps["capability"]["hours"] > 0
    assert steps["protection"]["hours"] > steps["sweep"]["hours"]


@pytest.mark.parametrize("scale", built_in_plans())
def test_every_step_of_a_plan_says_beforehand_what_it_asks_or_opens_no_model(scale: str) -> None:
    plan = read_plan(scale)
    places = Places(plan, "a-model", Path("runs"))
    for task in plan.tasks():
        if not plan.missing(task.step):
            words = places.words(task, read_only=True)
            told = _takes(words, "--dry-run") and _takes(words, "--json")
            assert told or task.step.name in ("halves", "cosines"), task.name
            assert told == _takes(words, "--device"), task.name


def test_the_plan_is_printed_and_taken_again(model: Path, tmp_path: Path) -> None:
    printed = run("reproduce", str(model), "--scale", "tiny", "--print-plan").stdout
    assert read_plan(planned(tmp_path, printed)) == read_plan("tiny")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--scale", "huge"), "--scale takes tiny, small, paper, got 'huge'"),
        (("--scale", "tiny", "--traits", "impolite,implite"), "implite"),
        (("--scale", "tiny", "--traits", "impolite,impolite"), "each once"),
        (("--scale", "tiny", "--only", "montoring"), "there are extraction"),
    ],
)
def test_what_cannot_be_reproduced_is_said(model: Path, words: tuple[str, ...], said: str) -> None:
    result = run("reproduce", str(model), *words)
    assert isinstance(result.exception, PersonaLensError), (result.output, result.exception)
    assert said in str(result.exception)


def test_a_command_that_is_stopped_stops_the_plan_and_is_not_finished(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a real command: typer makes an exit code of an interruption, and hands that back where it runs in another."""
    plan = planned(tmp_path, PLAN)
    words = ("reproduce", str(model), "--plan", str(plan), "--only", "cosines", "--out", str(tmp_path / "run"))

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("persona_lens.extraction.extract", stop)
        assert run(*words).exit_code == INTERRUPTED
    assert list((tmp_path / "run" / "steps").glob("*.json")) == []
    assert {step["reason"] for step in parsed(*words, "--json")["steps"]} == {None}


def test_a_command_that_ends_with_an_error_code_is_not_finished(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\n")
    with pytest.raises(PersonaLensError, match="exit code 1"):
        _execute(["traits", "check", str(file)])


@pytest.mark.real
@pytest.mark.slow
def test_the_smallest_plan_fills_every_table_on_the_embedded_model(tmp_path: Path) -> None:
    """What continuous integration sees of the paper: every step runs, and what has data has a number."""
    found = parsed("reproduce", DEFAULT_MODEL, "--scale", "tiny", "--out", str(tmp_path / "run"), "--json")
    failed = [step for step in found["steps"] if step["reason"] and not step["reason"].startswith("needs --")]
    assert failed == []
    measured = {row["table"] for row in found["rows"] if row["verdict"] != "missing"}
    assert set(found["tables"]) - measured <= {"subsets", "features"}
    unmeasured = {row["claim"] for row in found["rows"] if row["verdict"] == "missing"}
    assert unmeasured <= {"high", "low", "feature", "ability", "agreement"}  # few scores may be all alike
