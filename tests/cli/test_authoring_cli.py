"""``persona-lens traits new --author-model`` as its users meet it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import persona_lens.traits.generate
from persona_lens.cli import commands
from persona_lens.core.errors import PersonaLensError
from persona_lens.traits import USER_FOLDER_VARIABLE, read_trait
from tests.scripted import QUESTIONS, Good, ScriptedAuthor

app = commands.app_of("traits", commands.COMMANDS["traits"])

DESCRIPTION = "Complains about everything, without wishing anybody ill."
NEW = ("new", "grumpy", "--author-model", "some-model")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(USER_FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def given(monkeypatch: pytest.MonkeyPatch, author: ScriptedAuthor) -> list[dict[str, Any]]:
    """Let a scripted author be found under any name; returns what it was opened with."""
    opened: list[dict[str, Any]] = []

    def open_author(spec: str, **options: Any) -> ScriptedAuthor:
        del options["open_model"], options["open_server"]
        opened.append({"spec": spec, **options})
        return author

    monkeypatch.setattr(persona_lens.traits.generate, "open_author", open_author)
    return opened


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def refused(*arguments: str) -> str:
    result = run(*arguments)
    assert isinstance(result.exception, PersonaLensError), result.output
    return str(result.exception)


def test_a_model_writes_a_trait(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = given(monkeypatch, ScriptedAuthor(Good()))
    options = ("--description", DESCRIPTION, "--seed", "5", "--temperature", "0", "--dir", "mine")
    result = run(*NEW, *options, "--max-new-tokens", "99")
    assert result.exit_code == 0, result.output
    assert "Wrote mine/grumpy.yaml in 7 requests, with no warnings" in result.stdout
    expected = {"spec": "some-model", "seed": 5, "temperature": 0.0, "max_new_tokens": 99, "first_request": 0}
    assert opened == [expected]
    file = elsewhere / "mine/grumpy.yaml"
    trait = read_trait(file)
    assert trait.author == "scripted via persona-lens authoring"
    assert {"# model: scripted", "# seed: 5", "# temperature: 0.0", "# requests: 7"} <= set(
        file.read_text().splitlines()
    )
    assert [path.name for path in (elsewhere / "mine").iterdir()] == ["grumpy.yaml"]
    assert run("check", str(file), "--deep", "--strict").exit_code == 0
    assert "exists already" in refused(*NEW, *options)
    assert len(opened) == 1  # found out before a model is opened


def test_json(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, ScriptedAuthor(Good(["Why is bread so grumpy?", *QUESTIONS[1:]])))
    result = run(*NEW, "--description", DESCRIPTION, "--json")
    data = json.loads(result.stdout)
    assert (data["path"], data["model"], data["seed"]) == ("traits/grumpy.yaml", "scripted", 0)
    (warning,) = data["warnings"]
    lines = Path("traits/grumpy.yaml").read_text().splitlines()
    assert "bread so grumpy" in lines[warning["line"] - 1]


def test_a_failure_leaves_a_draft_from_which_the_same_command_goes_on(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Good()

    def write(number: int, kind: str, request: str) -> str:
        if number == 5:
            raise OSError("the line is dead")
        return good(number, kind, request)

    author = ScriptedAuthor(write)
    opened = given(monkeypatch, author)
    said = refused(*NEW, "--description", DESCRIPTION)
    draft = elsewhere / "traits/grumpy.partial.json"
    assert "the line is dead" in said
    assert f"What there is stands in {draft.relative_to(elsewhere)}" in said
    assert json.loads(draft.read_text())["questions"] == QUESTIONS[:20]
    assert not (elsewhere / "traits/grumpy.yaml").exists()
    other = refused(*NEW, "--description", "Something else.")
    assert (
        "description: 'Complains about everything, without wishing anybody ill.' there, 'Something else.' now" in other
    )
    assert "seed: '0' there, '1' now" in refused(*NEW, "--description", DESCRIPTION, "--seed", "1")
    result = run(*NEW, "--description", DESCRIPTION)
    assert result.exit_code == 0, result.output
    assert "going on from traits/grumpy.partial.json, after 5 requests" in result.stderr
    assert opened[-1]["first_request"] == 5
    assert not draft.exists()
    assert list(read_trait(elsewhere / "traits/grumpy.yaml").extraction_questions) == QUESTIONS[::2]


def test_an_author_of_no_use_says_what_is_missing(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, ScriptedAuthor(lambda *_: "No."))
    said = refused(*NEW, "--description", DESCRIPTION)
    assert "Still missing: the adjectives, 5 of 5 instruction pairs, 40 of 40 questions, the rubric" in said
    assert (elsewhere / "traits/grumpy.partial.json").is_file()


def test_an_interrupted_run_keeps_what_it_has(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Good()

    def write(number: int, kind: str, request: str) -> str:
        if number == 4:
            raise KeyboardInterrupt
        return good(number, kind, request)

    given(monkeypatch, ScriptedAuthor(write))
    run(*NEW, "--description", DESCRIPTION)
    assert json.loads((elsewhere / "traits/grumpy.partial.json").read_text())["questions"] == QUESTIONS[:10]


def test_dry_run_asks_nobody(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = given(monkeypatch, ScriptedAuthor(Good()))
    data = json.loads(run(*NEW, "--dry-run", "--json").stdout)
    assert data["total"] == {
        "at_least": sum(step["at_least"] for step in data["steps"]),
        "at_most": sum(step["at_most"] for step in data["steps"]),
    }
    assert data["total"]["at_least"] == 7
    assert "in all" in run(*NEW, "--dry-run").stdout
    assert "cannot name a trait" in refused("new", "Grumpy One", "--author-model", "m", "--dry-run")
    assert opened == []
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--author-model", "m"), "needs a description"),
        (("--author-model", "m", "--description", " "), "needs a description"),
        (("--author-model", "m", "--description", "TODO: this"), '"TODO: this" cannot be used'),
        (("--author-model", "m", "--description", "a\x07"), "cannot be used: write up to 2,000 plain characters"),
        (("--author-model", "m", "--temperature", "-1"), "--temperature must be 0 or more; got -1.0"),
        (("--author-model", "m", "--temperature", "nan"), "--temperature must be 0 or more; got nan"),
        (("--author-model", "m", "--max-new-tokens", "0"), "--max-new-tokens must be 1 or more; got 0"),
        (("--seed", "3"), "--seed is for a trait that a model writes: give --author-model too"),
        (("--temperature", "0"), "--temperature is for"),
        (("--dry-run",), "--dry-run is for"),
        (("--max-new-tokens", "5"), "--max-new-tokens is for"),
    ],
)
def test_options_that_do_not_fit(elsewhere: Path, arguments: tuple[str, ...], expected: str) -> None:
    assert expected in refused("new", "grumpy", *arguments)
    assert list(elsewhere.iterdir()) == []


def test_what_cannot_be_done_is_said_first(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = given(monkeypatch, ScriptedAuthor(Good()))
    said = refused("new", "Grumpy One", "--author-model", "m", "--description", DESCRIPTION)
    assert "cannot name a trait" in said
    assert opened == []
    (elsewhere / "taken").write_text("")
    author = ScriptedAuthor(Good())
    given(monkeypatch, author)
    assert "the folder taken cannot be made" in refused(*NEW, "--description", DESCRIPTION, "--dir", "taken")
    assert author.requests == []
    (elsewhere / "traits").mkdir()
    (elsewhere / "traits/grumpy.partial.json").write_text("[]")
    assert "put it right, or remove the file" in refused(*NEW, "--description", DESCRIPTION)


def test_a_template_in_json() -> None:
    assert json.loads(run("new", "grumpy", "--json").stdout) == {"path": "traits/grumpy.yaml"}
