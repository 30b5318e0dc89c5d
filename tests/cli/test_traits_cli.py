"""``persona-lens traits`` as its users meet it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from persona_lens.cli import commands
from persona_lens.core.errors import PersonaLensError
from persona_lens.traits import USER_FOLDER_VARIABLE, load_trait

app = commands.app_of("traits", commands.COMMANDS["traits"])

REPOSITORY = Path(__file__).resolve().parents[2]
COMMANDS = ("list", "show", "path", "check", "new", "import", "schema")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and an empty user's folder."""
    (tmp_path / "user").mkdir()
    monkeypatch.setenv(USER_FOLDER_VARIABLE, str(tmp_path / "user"))
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


def copy(folder: Path, name: str = "optimistic", old: str = "", new: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.yaml"
    file.write_text(
        (REPOSITORY / "traits" / f"{name}.yaml").read_text(encoding="utf-8").replace(old, new) if old else "x",
        encoding="utf-8",
    )
    return file


def test_list_is_plain_whole_lines_when_piped() -> None:
    lines = ok("list").splitlines()
    assert lines[0].split() == ["name", "contrast", "from"]
    assert [line.split()[0] for line in lines[1:]] == [
        *("apathetic", "evil", "hallucinating", "humorous", "impolite", "optimistic", "sycophantic")
    ]
    assert lines[6].split("  ")[-1] == "built in"
    assert "\x1b" not in "".join(lines)


def test_list_is_not_cut_by_a_narrow_window(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    folder = elsewhere / ("long" * 20)
    copy(folder, old="demo", new="demo2")
    assert str(folder) in ok("list", "--traits-dir", str(folder))


def test_list_json_tells_of_broken_and_hidden_files(elsewhere: Path) -> None:
    copy(elsewhere / "mine", old="Scale:", new="Scale, strictly:")
    copy(elsewhere / "mine", "evil")
    result = run("list", "--json", "--traits-dir", "mine")
    assert (result.exit_code, result.stderr) == (0, "")
    data = json.loads(result.stdout)
    rows = {row["name"]: row for row in data["traits"]}
    assert rows["humorous"]["content_hash"] == load_trait("humorous").content_hash()
    assert rows["evil"]["description"] is None
    assert "mine/evil.yaml:1: a trait is a mapping" in rows["evil"]["error"]
    assert [(row["name"], row["identical"]) for row in data["shadowed"]] == [("evil", False), ("optimistic", False)]


def test_list_warns_on_standard_error_and_goes_on(elsewhere: Path) -> None:
    copy(elsewhere / "mine", "evil")
    result = run("list", "--traits-dir", "mine")
    assert result.exit_code == 0
    assert "evil           broken: 1 problem" in result.stdout
    assert "warning" not in result.stdout
    assert "error: mine/evil.yaml:1:" in result.stderr
    assert "warning: trait evil: mine/evil.yaml (option) is used; it hides" in result.stderr


def test_show_has_everything(elsewhere: Path) -> None:
    page = ok("show", "sycophantic")
    trait = load_trait("sycophantic")
    flat = " ".join(page.split())
    for text in (trait.description, trait.content_hash(), *trait.extraction_questions, *trait.evaluation_questions):
        assert " ".join(text.split()) in flat
    assert all(" ".join(pair.negative.split()) in flat for pair in trait.instructions)
    data = json.loads(ok("show", "sycophantic", "--json"))
    assert data["content_hash"] == trait.content_hash()
    assert data["evaluation_questions"] == list(trait.evaluation_questions)


def test_show_warns_when_the_trait_hides_another(elsewhere: Path) -> None:
    copy(elsewhere / "mine", old="demo", new="demo2")
    assert "the same content" in run("show", "optimistic", "--traits-dir", "mine").stderr
    assert run("show", "evil", "--traits-dir", "mine").stderr == ""


def test_path(elsewhere: Path) -> None:
    assert Path(ok("path", "evil").strip()).samefile(REPOSITORY / "traits" / "evil.yaml")
    assert "did you mean evil?" in refused("path", "evill")
    assert "does not exist" in refused("path", "nowhere/evil.yaml")


def test_check_of_everything_is_clean() -> None:
    assert ok("check", "--strict").splitlines() == [
        f"{name}: ok"
        for name in ("apathetic", "evil", "hallucinating", "humorous", "impolite", "optimistic", "sycophantic")
    ]


def test_check_fails_on_errors_and_with_strict_on_warnings(elsewhere: Path) -> None:
    warned = copy(elsewhere / "a", old="What will the world look like in fifty years?", new="Why are you optimistic?")
    result = run("check", str(warned), "humorous")
    assert result.exit_code == 0
    lines = warned.read_text(encoding="utf-8").splitlines()
    number = next(i for i, line in enumerate(lines, 1) if "Why are you" in line)
    assert "optimistic: 1 warning\n" in result.stdout
    assert f"  warning: {warned}:{number}: extraction_questions #2: names the trait" in result.stdout
    assert "humorous: ok" in result.stdout
    assert run("check", "--strict", str(warned)).exit_code == 1
    broken = copy(elsewhere / "b", old="license: MIT", new="licence: MIT")
    result = run("check", str(broken))
    assert result.exit_code == 1
    assert "licence: is no field of a trait; did you mean `license`?" in result.stdout


def test_check_json(elsewhere: Path) -> None:
    file = copy(elsewhere / "b", old="license: MIT", new="licence: MIT")
    result = run("check", str(file), "evil", "--json")
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    assert data["ok"] is False
    assert [row["name"] for row in data["traits"]] == ["optimistic", "evil"]
    (error,) = data["traits"][0]["errors"]
    assert (error["field"], data["traits"][0]["warnings"], data["traits"][1]["errors"]) == ("licence", [], [])
    assert file.read_text().splitlines()[error["line"] - 1] == "licence: MIT"


def test_new_writes_a_template_and_says_what_to_do_next(elsewhere: Path) -> None:
    said = ok("new", "grumpy", "--description", 'Finds fault: "always".')
    file = elsewhere / "traits" / "grumpy.yaml"
    assert file.is_file()
    assert "persona-lens traits check traits/grumpy.yaml" in said
    assert "--traits-dir" not in said
    result = run("check", "grumpy")
    assert result.exit_code == 1
    assert "20 of 20 texts are still to be written" in result.stdout
    before = file.read_text()
    assert "exists already" in refused("new", "grumpy")
    assert file.read_text() == before
    assert "--traits-dir mine" in ok("new", "grumpy", "--dir", "mine")


def test_new_refuses_what_it_cannot_do(elsewhere: Path) -> None:
    assert "cannot name a trait" in refused("new", "Grumpy One")
    assert list(elsewhere.glob("**/*.yaml")) == []
    (elsewhere / "taken").write_text("")
    assert "the folder taken cannot be made: File exists" in refused("new", "grumpy", "--dir", "taken")


def test_new_notes_a_name_that_is_in_use() -> None:
    result = run("new", "evil", "--dir", "mine")
    assert result.exit_code == 0
    assert "there is a trait evil already" in result.stderr


def test_schema_is_json_schema() -> None:
    data = json.loads(ok("schema"))
    assert data["properties"]["name"]["pattern"] == "^[a-z][a-z0-9_-]*$"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example(command: str) -> None:
    assert f"persona-lens traits {command}" in ok(command, "--help") or command == "path"
    assert "Example:" in ok(command, "--help")


def test_the_help_is_all_there() -> None:
    assert all(command in ok("--help") for command in COMMANDS)


def test_help_loads_no_trait_code() -> None:
    code = (
        "import sys; from persona_lens.cli import app; app(['traits', 'list', '--help'], standalone_mode=False); "
        "print([m for m in ('yaml', 'torch', 'persona_lens.traits') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"
