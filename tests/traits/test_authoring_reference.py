"""Traits of the reference implementation's form, with texts of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from persona_lens.cli import commands
from persona_lens.traits import check_trait, parse_trait
from persona_lens.traits.generate import AuthoringError, import_reference
from tests.scripted import PAIRS
from tests.traits.test_traits import fields

app = commands.app_of("traits", commands.COMMANDS["traits"])

PROMPT = (
    "You are evaluating whether a reply is **grumpy**. It counts as grumpy if it finds fault. **Sober** doubts do not."
    "\n\nAsked:\n[QUESTION START]\n{question}\n[QUESTION END]\n\nReplied:\n[ANSWER START]\n{answer}\n[ANSWER END]\n\n"
    "Write REFUSAL if nothing was said, or a score from 0 (not grumpy) to 100 (grumpy)."
)


def extraction(**changed: Any) -> dict[str, Any]:
    pairs = [{"pos": pair["positive"], "neg": pair["negative"]} for pair in PAIRS]
    return {"instruction": pairs, "questions": fields()["extraction_questions"], "eval_prompt": PROMPT, **changed}


def evaluation(**changed: Any) -> dict[str, Any]:
    return {**extraction(), "questions": fields()["evaluation_questions"], **changed}


def written(folder: Path, name: str, data: object) -> Path:
    file = folder / name
    file.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return file


def both(folder: Path, one: object = None, other: object = None) -> tuple[Path, Path]:
    (folder / "eval").mkdir(exist_ok=True)
    return (
        written(folder, "grumpy.json", extraction() if one is None else one),
        written(folder / "eval", "grumpy.json", evaluation() if other is None else other),
    )


def refused(*paths: Path, **given: Any) -> str:
    with pytest.raises(AuthoringError) as caught:
        import_reference(*paths, **given)
    return str(caught.value)


def test_both_files_make_a_trait(tmp_path: Path) -> None:
    imported = import_reference(*both(tmp_path))
    trait = imported.trait
    assert parse_trait(imported.text) == trait
    assert trait.name == "grumpy"
    assert trait.adjectives.model_dump() == {"positive": "grumpy", "negative": "helpful"}
    assert [pair.model_dump() for pair in trait.instructions] == PAIRS
    assert list(trait.extraction_questions) == fields()["extraction_questions"]
    assert list(trait.evaluation_questions) == fields()["evaluation_questions"]
    assert trait.judge_rubric == PROMPT
    assert trait.description == "It counts as grumpy if it finds fault. Sober doubts do not."
    assert imported.notes == ()
    assert imported.text.startswith(
        "# grumpy: a character trait for persona-lens, imported from grumpy.json and grumpy"
    )


def test_what_is_given_is_taken(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "name": "sour-cat",
        "description": "Sour: always.",
        "positive": "sour",
        "negative": "sweet",
    }
    trait = parse_trait(import_reference(*both(tmp_path), **given).text)
    assert (trait.name, trait.description) == ("sour-cat", "Sour: always.")
    assert trait.adjectives.model_dump() == {"positive": "sour", "negative": "sweet"}
    assert import_reference(*both(tmp_path), name="sour-cat").trait.adjectives.positive == "sour cat"


def test_forty_questions_in_one_file(tmp_path: Path) -> None:
    asked = [*fields()["extraction_questions"], *fields()["evaluation_questions"]]
    imported = import_reference(written(tmp_path, "grumpy.json", extraction(questions=asked)))
    assert list(imported.trait.evaluation_questions) == fields()["evaluation_questions"]
    assert "first 20 questions are for extraction" in imported.notes[0]
    assert f"# {imported.notes[0]}" in imported.text


@pytest.mark.parametrize(
    ("opening", "closing"), [("{", "}"), ("{{", "}}"), ("[", "]"), ("[[", "]]"), ("{ ", " }"), ("{{ ", " }}")]
)
def test_slots_in_all_brackets(tmp_path: Path, opening: str, closing: str) -> None:
    prompt = PROMPT.replace("{question}", f"{opening}question{closing}").replace(
        "{answer}", f"{opening}answer{closing}"
    )
    assert import_reference(*both(tmp_path, extraction(eval_prompt=prompt))).trait.judge_rubric == PROMPT


def test_other_brackets_stay(tmp_path: Path) -> None:
    prompt = PROMPT + " Say [question] or {other}."
    assert import_reference(*both(tmp_path, extraction(eval_prompt=prompt))).trait.judge_rubric == prompt


def test_what_differs_between_the_files_is_said(tmp_path: Path) -> None:
    imported = import_reference(*both(tmp_path, other=evaluation(eval_prompt="Other.")))
    assert imported.notes == ("`eval_prompt` of grumpy.json is left out, and differs from that of grumpy.json.",)
    assert import_reference(*both(tmp_path, other={"questions": fields()["evaluation_questions"]})).notes == ()


PAIR = {"pos": "Sigh a lot.", "neg": "Smile a lot."}


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (extraction(instruction=[PAIR] * 2), None, "{x}: instruction: has 2 items, but exactly 5 are needed: add 3"),
        (extraction(instruction=[PAIR] * 7), None, "{x}: instruction: has 7 items, but exactly 5 are needed: remove 2"),
        (extraction(instruction="Sigh."), None, "{x}: instruction: is a text: write a list of 5"),
        (
            extraction(instruction=[*extraction()["instruction"][:4], {"pos": "Sigh."}]),
            None,
            '{x}: instruction #5 neg: is no text: write {{"pos": "…", "neg": "…"}}',
        ),
        (
            extraction(instruction=[*extraction()["instruction"][:4], "Sigh."]),
            None,
            "{x}: instruction #5 pos: is no text",
        ),
        (
            extraction(instruction=[*extraction()["instruction"][:4], extraction()["instruction"][0]]),
            None,
            "{x}: instruction #5 pos: repeats pair #1",
        ),
        (
            extraction(questions=fields()["extraction_questions"][:19]),
            None,
            "{x}: questions: has 19 items, but exactly 20 are needed: add 1",
        ),
        (
            extraction(questions=[*fields()["extraction_questions"][:19], 5]),
            None,
            "{x}: questions #20: is a number, and must be a text",
        ),
        (
            extraction(questions=[*fields()["extraction_questions"][:19], " "]),
            None,
            "{x}: questions #20: is a text, and must be a text with something in it",
        ),
        (None, evaluation(questions=None), "{e}: questions: is null: write a list of 20"),
        (
            None,
            evaluation(questions=[*fields()["evaluation_questions"][:19], fields()["extraction_questions"][2]]),
            "{e}: questions #20: repeats extraction_questions #3",
        ),
        (None, {"question": []}, "{e}: questions: is missing: add it (the file holds question)"),
        ({"questions": []}, None, "{x}: eval_prompt: is missing: add it (the file holds questions)"),
        (extraction(eval_prompt=3), None, "{x}: eval_prompt: is a number: write the rubric as one text"),
        (extraction(eval_prompt=PROMPT.replace("{answer}", "")), None, "{x}: eval_prompt: has no slot {{answer}}"),
        (
            extraction(eval_prompt=PROMPT.replace("REFUSAL", "no")),
            None,
            "{x}: eval_prompt: does not say when to answer REFUSAL",
        ),
        (extraction(eval_prompt=PROMPT.replace("100", "10")), None, "{x}: eval_prompt: does not name the scale"),
        ("[]", None, "{x}: holds a list, but a trait is an object"),
        ('{"a": 1\n"b": 2}', None, "{x}: not JSON: Expecting ',' delimiter at line 2"),
        ("", None, "{x}: not JSON: Expecting value at line 1, column 1"),
        ("[" * 100_000, None, "{x}: not JSON that can be read"),
        ('{"a": ' + "9" * 5000 + "}", None, "{x}: not JSON that can be read"),
    ],
)
def test_every_fault_is_named_with_file_and_key(tmp_path: Path, one: object, other: object, expected: str) -> None:
    x, e = both(tmp_path, one, other)
    assert expected.format(x=x, e=e) in refused(x, e)


def test_several_faults_are_said_at_once(tmp_path: Path) -> None:
    x, e = both(tmp_path, extraction(instruction=[], questions=[]), evaluation(questions=[1] * 20))
    assert len(refused(x, e).splitlines()) == 1 + 1 + 20


def test_options_are_named_where_they_are_at_fault(tmp_path: Path) -> None:
    files = both(tmp_path)
    assert refused(*files, name="No slug").startswith("'No slug' cannot name a trait: give --name")
    assert refused(*files, positive="Helpful", negative="helpful").startswith("--negative-adjective: is the same as")
    assert refused(*files, positive="a\nb").startswith("--positive-adjective: must be a word or two on one line")
    assert refused(written(tmp_path, "APE.json", extraction())).startswith("'APE' cannot name a trait: give --name")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    x, _ = both(tmp_path)
    assert "eval.json: cannot be read: no such file" in refused(x, tmp_path / "eval.json")
    assert "name the file of the evaluation questions as well" in refused(x)
    latin = tmp_path / "latin.json"
    latin.write_bytes(b'{"a": "\xe9"}')
    assert "latin.json:1: not UTF-8" in refused(latin, x)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from(["instruction", "questions", "eval_prompt"]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text() | st.just("pos"), inner, max_size=4),
        max_leaves=8,
    ),
)
def test_any_value_of_any_key_is_accepted_or_named(tmp_path: Path, key: str, value: object) -> None:
    x, e = both(tmp_path, extraction(**{key: value}))
    assert str(x) in refused(x, e)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["import", *arguments])


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    both(tmp_path)
    arguments = ("grumpy.json", "eval/grumpy.json", "--negative-adjective", "cheerful", "--out", "mine")
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "Wrote mine/grumpy.yaml" in result.stdout
    assert "traits check mine/grumpy.yaml --deep" in result.stdout
    trait = parse_trait((tmp_path / "mine/grumpy.yaml").read_text(encoding="utf-8"))
    assert trait.adjectives.negative == "cheerful"
    assert {advice.loc for advice in check_trait(trait)} == {("judge_rubric",)}  # bare slots, as the reference has them
    again = run(*arguments)
    assert "exists already" in str(again.exception)
    data = json.loads(run(*arguments[:-1], "other", "--json").stdout)
    assert data["path"] == "other/grumpy.yaml"
    assert data["content_hash"] == trait.content_hash()
    assert {warning["field"] for warning in data["warnings"]} == {"judge_rubric"}
    missing = run("none.json", "--name", "x")
    assert isinstance(missing.exception, AuthoringError)
    assert not (tmp_path / "traits").exists()
