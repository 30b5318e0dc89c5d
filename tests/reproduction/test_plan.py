"""Plans: what they may hold, what is said of those that cannot be carried out, and the words of their commands."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from persona_lens.cli.reproduce import _check, _command
from persona_lens.reproduction import Plan, PlanError, built_in_plans, read_plan
from persona_lens.reproduction.places import Places
from persona_lens.reproduction.plan import plan_text
from persona_lens.reproduction.run import wanted
from persona_lens.reproduction.tables import CLAIMS, TABLES
from persona_lens.vectors import PersonaVectors, Tuned
from tests.screening import made

TWO = "traits: [impolite, optimistic]\n"


def plan_of(text: str, folder: Path, **given: str) -> Plan:
    file = folder / "plan.yaml"
    file.write_text(text)
    return read_plan(file, None, given)


def words_of(plan: Plan, name: str, folder: Path) -> list[str]:
    places = Places(plan, "a model", folder)
    return places.words(next(task for task in plan.tasks() if task.name == name))


@pytest.mark.parametrize("scale", ["tiny", "small", "paper"])
def test_the_plans_that_come_with_the_package_can_be_carried_out(scale: str) -> None:
    """Every command of them is read by its own parser, and every claim has its steps."""
    plan = read_plan(scale, None, {"data": "chats.jsonl", "sae": "release/id"})
    assert plan.scale == scale
    _check(plan, "smollm2-135m")
    assert {step for claim in CLAIMS for step in claim.steps} <= set(plan.steps)
    assert set(wanted(plan, tuple(TABLES))) == set(plan.tasks())


def test_there_are_three_scales() -> None:
    assert built_in_plans() == ("tiny", "small", "paper")


def test_every_table_has_claims_and_every_claim_a_name_of_its_own() -> None:
    assert {claim.table for claim in CLAIMS} == set(TABLES)
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)
    assert [claim.table for claim in CLAIMS] == sorted((claim.table for claim in CLAIMS), key=list(TABLES).index)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: [", "not YAML"),
        ("- extract", "must be fields by name"),
        (TWO, "1 to 200 steps"),
        ("steps: {extract: 'extract {model}'}", "traits must be a list of names"),
        ("traits: []\nsteps: {extract: extract}", "give traits by their names"),
        ("traits: [a/b]\nsteps: {extract: extract}", "give traits by their names"),
        (TWO + "stages: {}", "no field 'stages'"),
        (TWO + "steps: {Extract: extract}", "small letters"),
        (TWO + "steps: {extract: {rum: extract}}", "no field 'rum'"),
        (TWO + "steps: {extract: {once: true}}", "needs a command"),
        (TWO + "steps: {extract: ''}", "needs a command"),
        (TWO + "steps: {extract: persona-lens extract}", "without persona-lens"),
        (TWO + "steps: {extract: 'extract \"'}", "cannot be read"),
        (TWO + "steps: {tune: 'steer tune {extract}'}", "no such step, value or file"),
        (TWO + "steps: {tune: 'steer tune {extract.folder}'}", "not how a plan names something"),
        (TWO + "steps: {a: 'a {b}', b: 'b {a}'}", "circle: a needs b needs a"),
        (TWO + "steps: {a: 'a', b: {once: true, run: 'b {a}'}}", r"write \{a.all\}"),
        (TWO + "steps: {a: {once: true, run: 'a {trait}'}}", "leave out `once`"),
        (TWO + "steps: {a: {traits: [impolite], run: a}, b: 'b {a}'}", "not run for the trait 'optimistic'"),
        (TWO + "steps: {a: a}\nvalues: {a: b}", "a step and a value"),
        (TWO + "steps: {a: a}\nvalues: {b: [1]}", "must be a text, a number or null"),
        (TWO + "steps: {a: a}\nvalues: {b: it's}", "'b' cannot be read as words"),
        (TWO + "steps: {a: 'a {b}'}\nvalues: {b: '{c}', c: '{b}'}", "'b' stands for itself"),
        (TWO + "steps: {a: 'a {b}'}\nvalues: {b: '{c}', c: '{d}'}", "no such step, value or file"),
        (
            TWO + "steps: {a: {traits: [sycophantic], run: a}, b: {once: true, run: 'b {a.60%}'}}",
            "'a' is run for none of the traits",
        ),
        (TWO + "steps: {a: a}\nfiles: {recipe: {}}", "such as recipe.yaml"),
    ],
)
def test_what_is_wrong_with_a_plan_is_said(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=said):
        plan_of(text, tmp_path)


def test_a_plan_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="enormous"):
        read_plan(tmp_path / "enormous.yaml")


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ("extrakt {model} {trait}", "step 'a'.*No such command 'extrakt'"),
        ("steer twiddle {model}", "step 'a'"),
        ("extract {model} {trait} --quetsions 2", "--quetsions"),
        ("extract {model} {trait} --questions two", "--questions.*valid integer"),
        ("reproduce {model}", "in its reproduction"),
        ("{nothing}", "needs a command that does something"),
        ("extract {model} {trait} --help", "needs a command that does something"),
    ],
)
def test_a_command_that_is_none_is_known_before_anything_runs(run: str, said: str, tmp_path: Path) -> None:
    plan = plan_of(f"{TWO}values: {{nothing: ''}}\nsteps: {{a: '{run}'}}", tmp_path)
    with pytest.raises(PlanError, match=f"(?s){said}"):
        _check(plan, "smollm2-135m")


def test_steps_run_behind_those_that_they_name_for_their_traits(tmp_path: Path) -> None:
    steps = ("b: b {a}", "c: {once: true, run: 'c {b.all}'}", "a: a {trait}", "d: {traits: [impolite], run: d}")
    text = TWO + "\n  ".join(("steps:", *steps))
    plan = plan_of(text, tmp_path)
    names = ["a-impolite", "a-optimistic", "b-impolite", "b-optimistic", "c", "d-impolite"]
    assert [task.name for task in plan.tasks()] == names
    needs = {task.name: [each.name for each in plan.needs(task)] for task in plan.tasks()}
    assert needs["b-optimistic"] == ["a-optimistic"]
    assert needs["c"] == ["b-impolite", "b-optimistic"]
    assert [task.name for task in replace(plan, traits=("optimistic",)).tasks()] == [
        "a-optimistic",
        "b-optimistic",
        "c",
    ]


def test_words_are_what_a_user_would_type(tmp_path: Path) -> None:
    text = f"""{TWO}
values: {{brief: '--new 8 --hot {{model}}', data: null}}
files: {{recipe.yaml: {{rate: 1}}}}
steps:
  a: 'a {{model}} {{trait}} {{brief}} --config {{recipe.yaml}} --out {{out}}'
  b: {{once: true, run: 'b {{a.all}} {{data}}/x'}}
  c: 'c {{trait}}@{{a.layer}}:{{a.coefficient}} x:{{a.coefficient*-0.5}} --layers {{a.50%}},{{a.layer}}'
"""
    plan = plan_of(text, tmp_path, data="my chats")
    assert words_of(plan, "b", tmp_path)[3:] == ["my chats/x"]
    steps = tmp_path / "steps"
    file = str(tmp_path / "files" / "recipe.yaml")
    out = str(steps / "a-impolite")
    first = ["a", "a model", "impolite", "--new", "8", "--hot", "a model", "--config", file, "--out", out]
    assert words_of(plan, "a-impolite", tmp_path) == first
    assert words_of(plan, "b", tmp_path)[1:3] == [out, str(steps / "a-optimistic")]
    vectors = PersonaVectors("impolite", made.backend().info, {"response_mean": torch.ones(3, 32)}, {})
    (steps / "a-impolite").mkdir(parents=True)
    vectors.with_tuned(Tuned(2, 3.8), {}).save(steps / "a-impolite" / "vectors.safetensors")
    assert words_of(plan, "c-impolite", tmp_path) == ["c", "impolite@2:+3.8", "x:-1.9", "--layers", "1,2"]


def test_a_value_that_nobody_gave_is_missing(tmp_path: Path) -> None:
    text = f"{TWO}values: {{data: null}}\nsteps: {{a: 'a {{data}}', b: b}}"
    without, given = plan_of(text, tmp_path), plan_of(text, tmp_path, data="x.jsonl")
    assert [without.missing(step) for step in without.steps.values()] == [["data"], []]
    assert [given.missing(step) for step in given.steps.values()] == [[], []]


def test_a_plan_is_printed_as_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(plan_text("tiny"))
    assert read_plan(file) == read_plan("tiny")


def test_the_parser_is_that_of_the_commands() -> None:
    command, _ = _command(["steer", "tune", "smollm2-135m", "runs/x"])
    assert command.name == "tune"
