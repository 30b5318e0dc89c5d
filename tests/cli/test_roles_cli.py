"""``persona-lens roles`` as its users meet it; what it shares with ``traits`` is tested there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import persona_lens.traits.generate
from persona_lens.cli import commands
from persona_lens.core.errors import PersonaLensError
from persona_lens.traits import load_default, load_role
from persona_lens.traits.role import ROLES
from tests.scripted import Good, ScriptedAuthor

app = commands.app_of("roles", commands.COMMANDS["roles"])

REPOSITORY = Path(__file__).resolve().parents[2]
COMMANDS = ("list", "show", "path", "check", "new", "default", "schema")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and an empty user's folder."""
    (tmp_path / "user").mkdir()
    monkeypatch.setenv(ROLES.variable, str(tmp_path / "user"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def ok(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str) -> str:
    result = run(*arguments)
    assert isinstance(result.exception, PersonaLensError), result.output
    return str(result.exception)


def test_list(elsewhere: Path) -> None:
    lines = ok("list").splitlines()
    assert lines[0].split() == ["name", "tags", "from"]
    assert len(lines) == 1 + 60
    (elsewhere / "mine").mkdir()
    (elsewhere / "mine" / "pirate.yaml").write_text("x")
    result = run("list", "--roles-dir", "mine")
    assert "pirate          broken: 1 problem" in result.stdout
    assert "error: mine/pirate.yaml:1: a role is a mapping of fields" in result.stderr
    assert "warning: role pirate: mine/pirate.yaml (option) is used; it hides" in result.stderr
    data = json.loads(run("list", "--json").stdout)
    assert {row["name"]: row["content_hash"] for row in data["roles"]}["ghost"] == load_role("ghost").content_hash()
    assert data["shadowed"] == data["problems"] == []


def test_show_has_everything() -> None:
    page, role = " ".join(ok("show", "hive").split()), load_role("hive")
    for text in (role.description, role.content_hash(), *role.system_prompts, *role.grades):
        assert " ".join(text.split()) in page
    data = json.loads(ok("show", "hive", "--json"))
    assert (data["content_hash"], data["grades"]) == (role.content_hash(), list(role.grades))
    assert "there is no role 'hives'; did you mean hive?" in refused("show", "hives")


def test_path() -> None:
    assert Path(ok("path", "wolf").strip()).samefile(REPOSITORY / "roles" / "wolf.yaml")


def test_check(elsewhere: Path) -> None:
    assert [line.partition(":")[2] for line in ok("check", "--strict").splitlines()] == [" ok"] * 60
    text = (REPOSITORY / "roles" / "pirate.yaml").read_text()
    file = elsewhere / "pirate.yaml"
    file.write_text(text.replace("license: MIT", "licence: MIT"))
    result = run("check", str(file), "ghost")
    assert result.exit_code == 1
    assert "licence: is no field of a role; did you mean `license`?" in result.stdout
    assert "ghost: ok" in result.stdout
    file.write_text(text.replace("You know reefs", "reef " * 80))
    assert run("check", str(file)).exit_code == 0
    failed = run("check", str(file), "--strict", "--json")
    assert failed.exit_code == 1
    (row,) = json.loads(failed.stdout)["roles"]
    assert row["warnings"][0]["field"] == "system_prompts #5"


def test_new_writes_a_template_that_check_leads_through(elsewhere: Path) -> None:
    said = ok("new", "inn_keeper", "--description", 'Keeps an inn: "The Goat".')
    assert "persona-lens roles check roles/inn_keeper.yaml" in said
    assert "--roles-dir" not in said
    result = run("check", "inn_keeper")
    assert result.exit_code == 1
    assert "system_prompts #1: 5 of 5 texts are still to be written" in result.stdout
    assert "grades #3: 2 of 4 texts are still to be written" in result.stdout
    file = elsewhere / "roles" / "inn_keeper.yaml"
    assert "nothing in it is of the inn keeper." in file.read_text()
    lines = file.read_text().splitlines()
    prompts = ["Pour the ale.", "Talk of guests.", "Care for the hearth.", "A storm outside.", "Roads you know well."]
    for text in (*prompts, "A bed is on offer.", "Hosts throughout."):
        at = next(i for i, line in enumerate(lines) if line.startswith("  - ") and "TODO:" in line)
        lines[at] = f"  - {text}"
    file.write_text("\n".join(lines))
    assert ok("check", "inn_keeper", "--strict") == "inn_keeper: ok\n"
    assert "exists already" in refused("new", "inn_keeper")
    assert "'Inn Keeper' cannot name a role" in refused("new", "Inn Keeper")
    assert "there is a role pirate already" in run("new", "pirate", "--dir", "mine").stderr


def test_default(elsewhere: Path) -> None:
    page = " ".join(ok("default").split())
    for text in (*load_default().system_prompts, *load_default().questions, "5 (no system prompt)"):
        assert " ".join(text.split()) in page
    mine = elsewhere / "mine.yaml"
    mine.write_text("format_version: 1\nsystem_prompts: [a, b, c, d]\nquestions: [e]\n")
    assert f"{mine}:3: questions: needs at least 2 questions: add some" in refused("default", str(mine))
    mine.write_text("format_version: 1\nsystem_prompts: [a, b, c, d]\nquestions: [e, f]\n")
    assert json.loads(ok("default", str(mine), "--json"))["questions"] == ["e", "f"]


def test_schema_is_json_schema() -> None:
    assert json.loads(ok("schema"))["properties"]["system_prompts"]["maxItems"] == 5


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example(command: str) -> None:
    assert "Example:" in ok(command, "--help")
    assert command in ok("--help")


def test_a_model_writes_a_role(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    author = ScriptedAuthor(Good())
    monkeypatch.setattr(persona_lens.traits.generate, "open_author", lambda *_, **__: author)
    given = ("new", "inn_keeper", "--author-model", "m", "--description", "Keeps an inn on a mountain road.")
    plan = json.loads(ok(*given, "--dry-run", "--json"))
    assert plan["total"] == {"at_least": 2, "at_most": 5 + 3 + 2 * 3}
    assert author.requests == []
    said = ok(*given)
    assert "Wrote roles/inn_keeper.yaml in 2 requests, with no warnings" in said
    assert "persona-lens roles check roles/inn_keeper.yaml\n" in said
    assert ok("check", "--strict", "roles/inn_keeper.yaml") == "inn_keeper: ok\n"
    assert "exists already" in refused(*given)
    assert "--seed is for a role that a model writes: give --author-model too" in refused("new", "x", "--seed", "1")
