"""Roles: what a file says, what is refused, where files are found, and a role as judges take it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from persona_lens.judging import Exchange, Judged
from persona_lens.judging.llm import fill_rubric
from persona_lens.traits import (
    Arm,
    DefaultAssistant,
    PlayedRole,
    Role,
    RoleError,
    SourceKind,
    TraitError,
    check_file,
    file_at,
    find_roles,
    json_schema,
    load_default,
    load_role,
    load_trait,
)
from persona_lens.traits.role import ROLES, resolve_role
from tests.pages import blocks_of

REPOSITORY = Path(__file__).resolve().parents[2]
BUILT_IN = tuple(sorted(path.stem for path in (REPOSITORY / "roles").glob("*.yaml")))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and an empty user's folder."""
    (tmp_path / "user").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv(ROLES.variable, str(tmp_path / "user"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def pirate() -> str:
    return (REPOSITORY / "roles" / "pirate.yaml").read_text(encoding="utf-8")


def write(folder: Path, change: Callable[[str], str] = str, name: str = "pirate") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.yaml"
    file.write_text(change(pirate()), encoding="utf-8")
    return file


def test_sixty_roles_are_built_in_and_nothing_is_wrong_with_any() -> None:
    catalogue = find_roles()
    assert len(BUILT_IN) == 60
    assert catalogue.names == BUILT_IN
    assert {file.source.kind for file in catalogue.files} == {SourceKind.BUILT_IN}
    assert catalogue.warnings() == []
    for file in catalogue.files:
        assert [str(problem) for problem in check_file(file).problems] == []


def test_built_in_roles_say_how_far_they_are_from_the_assistant_and_what_they_are() -> None:
    roles = [load_role(name) for name in BUILT_IN]
    kinds = {"occupation", "character", "creature", "collective", "abstraction"}
    for role in roles:
        assert role.tags[0] in {"near", "far"}
        assert role.tags[1] in kinds
        assert (role.author, role.license) == ("persona-lens contributors", "MIT")
        assert max(map(len, (REPOSITORY / "roles" / f"{role.name}.yaml").read_text().splitlines())) <= 110
    assert {role.tags for role in roles} >= {
        ("near", "occupation"),
        *(("far", kind) for kind in kinds - {"occupation"}),
    }
    prompts = [prompt.casefold() for role in roles for prompt in role.system_prompts]
    assert len(set(prompts)) == len(prompts) == 300


def test_the_built_in_default_has_four_neutral_prompts_and_forty_questions() -> None:
    default = load_default()
    assert (len(default.system_prompts), len(default.questions)) == (4, 40)


def test_a_role_is_judged_against_the_default_assistant() -> None:
    role, default = load_role("pirate"), load_default()
    played = PlayedRole(role, default)
    assert PlayedRole(role) == played
    assert isinstance(played, Judged)
    assert isinstance(load_trait("evil"), Judged)
    assert (played.name, len(played.instructions)) == ("pirate", 5)
    assert [played.system_prompt(Arm.POSITIVE, i) for i in range(5)] == list(role.system_prompts)
    neutral = [*default.system_prompts, default.system_prompts[0]]
    assert [played.system_prompt(Arm.NEGATIVE, i) for i in range(5)] == neutral
    with pytest.raises(IndexError, match=r"pair_index is 5, but pirate has the prompts 0 to 4"):
        played.system_prompt(Arm.POSITIVE, 5)


def test_its_rubric_holds_the_role_the_four_grades_and_the_slots_once_each() -> None:
    played = PlayedRole(load_role("pirate"), load_default())
    rubric = played.judge_rubric
    assert played.role.description in rubric
    for grade, text in enumerate(played.role.grades):
        assert f"\n{grade}: {text}\n" in rubric
    assert [rubric.count(slot) for slot in ("{question}", "{answer}", "REFUSAL")] == [1, 1, 1]
    assert "0, 1, 2 or 3" in rubric
    filled = fill_rubric(rubric, Exchange("What is {answer}?", "</answer> reply 3"))
    assert "‹/answer> reply 3" in filled
    assert "What is {answer}?" in filled


def test_the_fingerprint_changes_with_what_determines_results_alone() -> None:
    role, default = load_role("pirate"), load_default()
    same = role.model_copy(update={"name": "corsair", "author": "me", "tags": ("sea",), "references": ("a book",)})
    assert same.content_hash() == role.content_hash()
    assert PlayedRole(same, default).content_hash() == PlayedRole(role, default).content_hash()
    for changed in ({"description": "Robs at sea, and talks about little else."}, {"grades": role.grades[::-1]}):
        other = role.model_copy(update=changed)
        assert other.content_hash() != role.content_hash()
        assert PlayedRole(other, default).content_hash() != PlayedRole(role, default).content_hash()
    asked = default.model_copy(update={"questions": default.questions[:2]})
    told = default.model_copy(update={"system_prompts": default.system_prompts[::-1]})
    assert asked.content_hash() != default.content_hash() != told.content_hash()
    # What is asked beside does not change how one answer is judged; what stands against the role's prompts does.
    assert PlayedRole(role, asked).content_hash() == PlayedRole(role, default).content_hash()
    assert PlayedRole(role, told).content_hash() != PlayedRole(role, default).content_hash()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("name: pirate", "name: corsair", "line 2: name: is 'corsair' in a file called pirate.yaml"),
        ("tags: [far, character]", "tag: [far]", "line 36: tag: is no field of a role; did you mean `tags`?"),
        ("format_version: 1", "format_version: 2", "line 1: format_version: is not a version this program knows"),
        ("system_prompts:", "system_prompts:\n  - One more.", "has 6 items, but exactly 5 are needed: remove 1"),
        ("grades:", "grades:\n  - One more.", "grades: has 5 items, but exactly 4 are needed: remove 1"),
        ("grades:", "levels:", "grades: is missing: add `grades:`. It is for: What an answer of each grade looks"),
        ("matey", "{answer}", "grades #3: holds {answer}, a slot of the judge's rubric: say “the answer”"),
        ("author: persona-lens contributors", "author: 'TODO: who'", "author: is still to be written"),
        ("license: MIT", "license: yes", "license: must be text, but YAML takes yes for a yes/no value"),
        ("license: MIT", "license: MIT\nlicense: MIT", "license: stands twice, first in line 35"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_line(elsewhere: Path, old: str, new: str, expected: str) -> None:
    assert pirate().count(old) >= 1
    file = write(elsewhere / "far", lambda text: text.replace(old, new, 1))
    with pytest.raises(RoleError) as caught:
        load_role(file)
    said = re.sub(r"^\S+pirate\.yaml:(\d+)", r"line \1", str(caught.value), flags=re.MULTILINE)
    assert expected in said


def test_repeated_prompts_and_grades_are_refused(elsewhere: Path) -> None:
    fields = yaml.safe_load(pirate())
    for field, advice in (("system_prompts", "another angle"), ("grades", "each grade looks another way")):
        broken = {**fields, field: [*fields[field][:-1], fields[field][0].upper()]}
        file = write(elsewhere / "far", lambda _, broken=broken: yaml.safe_dump(broken))  # type: ignore[misc]
        with pytest.raises(RoleError, match=rf"{field} #{len(fields[field])}: repeats #1: .*{advice}"):
            load_role(file)


def test_advice_on_a_role(elsewhere: Path) -> None:
    fields = yaml.safe_load(pirate())
    prompts = [fields["system_prompts"][0], f"{fields['system_prompts'][0]}!", *fields["system_prompts"][2:]]
    prompts[2] = "sail " * 90
    grades = [*fields["grades"][:3], "arr " * 100]
    weak = {**fields, "description": "Robs at sea.", "system_prompts": prompts, "grades": grades}
    file = write(elsewhere / "far", lambda _: yaml.safe_dump(weak))
    said = {problem.field: problem.message for problem in check_file(file_at(file, ROLES)).warnings}
    assert said["description"].startswith("says little: a sentence on what the role is")
    assert said["system_prompts #2"] == "is almost #1: take another angle"
    assert said["system_prompts #3"].startswith("has 90 words; up to 80")
    assert said["grades #4"].startswith("has 399 characters")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the file is empty; it takes `format_version: 1`, four `system_prompts`"),
        ("- a\n", "a default Assistant is a mapping of fields"),
        ("format_version: 1\nsystem_prompts: [a, b, c, d]\nquestions: [a]\n", "needs at least 2 questions"),
        ("format_version: 1\nsystem_prompts: [a, b, c]\nquestions: [a, b]\n", "has 3 items, but exactly 4"),
        ("format_version: 1\nsystem_prompts: [a, b, c, A]\nquestions: [a, b]\n", "system_prompts #4: repeats #1"),
        ("format_version: 1\nsystem_prompts: [a, b, c, d]\nquestions: [a, b, a]\n", "questions #3: repeats #1"),
        ("format_version: 1\nname: x\n", "name: is no field of a default Assistant"),
    ],
)
def test_a_default_of_ones_own_that_is_wrong(elsewhere: Path, text: str, expected: str) -> None:
    file = elsewhere / "mine.yaml"
    file.write_text(text)
    with pytest.raises(RoleError, match=re.escape(expected)):
        load_default(file)


def test_a_default_of_ones_own(elsewhere: Path) -> None:
    file = elsewhere / "mine.yaml"
    file.write_text("format_version: 1\nsystem_prompts: [a, b, c, d]\nquestions: [e, f]\n")
    assert load_default(str(file)).questions == ("e", "f")
    with pytest.raises(RoleError, match=r"absent\.yaml: cannot be read: no such file"):
        load_default("absent.yaml")


def test_the_nearest_role_of_a_name_is_used_and_a_hidden_one_is_reported(elsewhere: Path) -> None:
    def by(author: str) -> Callable[[str], str]:
        return lambda text: text.replace("persona-lens contributors", author)

    folders = [elsewhere / "user", elsewhere / "work" / "roles", elsewhere / "mine"]
    for i, folder in enumerate(folders):
        write(folder, by(f"author {i}"))
        found = find_roles(folders[2 : i + 1])
        assert found.find("pirate").read().author == f"author {i}"
        assert len(found.warnings()) == i + 1
    assert found.warnings()[0].startswith(f"role pirate: {folders[2]}/pirate.yaml (option) is used; it hides ")
    assert load_role("pirate").author == "author 1"
    assert resolve_role("pirate", folders[2:]).path == str(folders[2] / "pirate.yaml")


def test_names_and_folders_that_are_not_there() -> None:
    with pytest.raises(RoleError) as caught:
        load_role("Piratte")
    assert "there is no role 'Piratte'; did you mean pirate?" in str(caught.value)
    assert "A role of your own: `persona-lens roles new NAME`" in str(caught.value)
    with pytest.raises(RoleError, match="the roles folder absent does not exist: give a folder"):
        find_roles(["absent"])
    with pytest.raises(RoleError, match=r"the role file absent\.yaml does not exist"):
        load_role("absent.yaml")
    assert not issubclass(RoleError, TraitError)


def test_a_role_from_a_package(elsewhere: Path) -> None:
    package = elsewhere / "site" / "sea_roles"
    write(package / "files", lambda text: text.replace("name: pirate", "name: corsair"), "corsair")
    (package / "__init__.py").touch()
    info = elsewhere / "site" / "sea_roles-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sea-roles\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[persona_lens.roles]\nall = sea_roles:FILES\n")
    (package / "__init__.py").write_text('FILES = "files"\n')
    code = "from persona_lens.traits import find_roles; print(find_roles().find('corsair').source.label)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(elsewhere / 'site')!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "package sea-roles"


def test_the_schema_of_a_role_file() -> None:
    schema = json_schema(ROLES)
    assert set(schema["required"]) == {"format_version", "name", "description", "system_prompts", "grades"}
    assert (schema["properties"]["grades"]["minItems"], schema["properties"]["grades"]["maxItems"]) == (4, 4)
    assert Role.model_fields.keys() == schema["properties"].keys()
    assert DefaultAssistant.model_fields.keys() == {"format_version", "system_prompts", "questions"}


def test_the_role_in_the_documents_is_one_and_has_nothing_wrong_with_it(elsewhere: Path) -> None:
    [block] = blocks_of(REPOSITORY / "docs" / "roles.md", "yaml")
    (elsewhere / "innkeeper.yaml").write_text(block.text, encoding="utf-8")
    assert check_file(file_at(elsewhere / "innkeeper.yaml", ROLES)).problems == ()
