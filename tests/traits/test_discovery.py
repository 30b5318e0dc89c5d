"""Where traits are found, which one wins, and that nothing broken stands in the way of the rest."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from persona_lens.traits import (
    USER_FOLDER_VARIABLE,
    Arm,
    SourceKind,
    TraitError,
    check_file,
    find_traits,
    load_trait,
    resolve_trait,
    user_folder,
)

REPOSITORY = Path(__file__).resolve().parents[2]
BUILT_IN = ("apathetic", "evil", "hallucinating", "humorous", "impolite", "optimistic", "sycophantic")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and an empty user's folder."""
    (tmp_path / "user").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv(USER_FOLDER_VARIABLE, str(tmp_path / "user"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def optimistic() -> str:
    return (REPOSITORY / "traits" / "optimistic.yaml").read_text(encoding="utf-8")


def write_trait(folder: Path, name: str, ending: str = "yaml", author: str = "someone", rubric: str = "") -> Path:
    """Write a trait that differs from the built-in optimistic one in name, author and, if wished, content."""
    text = optimistic().replace("name: optimistic", f"name: {name}").replace("persona-lens contributors", author)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.{ending}"
    file.write_text(text.replace("  Scale:", f"  Scale{rubric}:"), encoding="utf-8")
    return file


def test_the_seven_built_in_traits_are_found() -> None:
    catalogue = find_traits()
    assert catalogue.names == BUILT_IN
    assert {file.source.kind for file in catalogue.files} == {SourceKind.BUILT_IN}
    assert catalogue.warnings() == []


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_trait_has_nothing_to_complain_of(name: str) -> None:
    file = resolve_trait(name)
    assert [str(problem) for problem in check_file(file).problems] == []
    trait = file.read()
    assert (trait.author, trait.license) == ("persona-lens contributors", "MIT")
    assert any("2507.21509" in reference for reference in trait.references)
    prompts = {trait.system_prompt(arm, i) for arm in Arm for i in range(5)}
    assert len(prompts) == 10
    assert all(trait.judge_rubric.count(slot) == 1 for slot in ("{question}", "{answer}"))
    assert all(f"\n{score}: " in trait.judge_rubric for score in (0, 25, 50, 75, 100))


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_instructions_are_short_and_files_fit_a_screen(name: str) -> None:
    trait = load_trait(name)
    for pair in trait.instructions:
        for text in (pair.positive, pair.negative):
            assert text.count(". ") <= 2, "one to three sentences"
            assert len(text.split()) <= 40
    questions = (*trait.extraction_questions, *trait.evaluation_questions)
    assert max(len(question.split()) for question in questions) <= 35
    lines = (REPOSITORY / "traits" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert max(map(len, lines)) <= 110
    assert lines[0].startswith("# ")


def test_no_question_is_shared_between_built_in_traits() -> None:
    traits = [load_trait(name) for name in BUILT_IN]
    questions = [q.casefold() for trait in traits for q in (*trait.extraction_questions, *trait.evaluation_questions)]
    assert len(set(questions)) == len(questions) == 7 * 40


def test_load_by_name_and_by_path(elsewhere: Path) -> None:
    file = write_trait(elsewhere / "far", "grumpy")
    assert load_trait("optimistic").name == "optimistic"
    assert load_trait(file).name == load_trait(str(file)).name == "grumpy"
    os.chdir(elsewhere / "far")
    assert load_trait("grumpy.yaml").name == "grumpy"
    assert load_trait("./grumpy.yaml").name == "grumpy"
    assert load_trait("grumpy", traits_dirs=["."]).name == "grumpy"


def test_an_unknown_name_lists_the_names_there_are() -> None:
    with pytest.raises(TraitError) as caught:
        load_trait("Optimstic")
    assert "there is no trait 'Optimstic'; did you mean optimistic?" in str(caught.value)
    assert f"Available: {', '.join(BUILT_IN)}" in str(caught.value)


@pytest.mark.parametrize(("path", "expected"), [("absent.yaml", "does not exist"), ("./", "is a folder")])
def test_a_path_that_leads_nowhere(path: str, expected: str) -> None:
    with pytest.raises(TraitError, match=expected):
        load_trait(path)


def test_the_nearest_source_wins_and_every_hidden_one_is_reported(elsewhere: Path) -> None:
    chain = [elsewhere / "user", elsewhere / "work" / "traits", elsewhere / "one", elsewhere / "two"]
    for i, folder in enumerate(chain):
        write_trait(folder, "optimistic", author=f"author {i}", rubric=", strictly" if i == 3 else "")
        dirs = chain[2 : i + 1]
        catalogue = find_traits(dirs)
        assert load_trait("optimistic", dirs).author == f"author {i}"
        used = {shadowed.used.path for shadowed in catalogue.shadowed}
        assert used == {catalogue.find("optimistic").path}
        assert len(catalogue.shadowed) == i + 1
        assert {shadowed.identical for shadowed in catalogue.shadowed} == {i != 3}
    warning = find_traits(chain[2:]).warnings(["optimistic"])[0]
    assert str(chain[3] / "optimistic.yaml") in warning
    assert "is used; it hides" in warning
    assert "other content" in warning
    assert find_traits(chain[2:]).warnings(["evil"]) == []
    assert "the same content" in find_traits().warnings()[0]


def test_one_file_reached_in_two_ways_is_no_conflict(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    catalogue = find_traits(["traits", REPOSITORY / "traits"])
    assert catalogue.shadowed == ()
    assert catalogue.find("evil").source.kind is SourceKind.BUILT_IN
    link = elsewhere / "link"
    link.symlink_to(REPOSITORY / "traits")
    assert find_traits([link]).shadowed == ()


def test_the_same_file_again_still_beats_what_lies_between(elsewhere: Path) -> None:
    write_trait(elsewhere / "user", "optimistic")
    assert find_traits().find("optimistic").source.kind is SourceKind.USER
    catalogue = find_traits([REPOSITORY / "traits"])
    assert catalogue.find("optimistic").read().author == "persona-lens contributors"
    assert [s.hidden.source.kind for s in catalogue.shadowed] == [SourceKind.USER]


def test_both_endings_are_found_and_yaml_goes_first(elsewhere: Path) -> None:
    folder = elsewhere / "traits-here"
    write_trait(folder, "grumpy", "yml")
    write_trait(folder, "cross", "yml")
    write_trait(folder, "cross", "yaml", author="the other")
    (folder / ".hidden.yaml").write_text("x", encoding="utf-8")
    (folder / "README.md").write_text("x", encoding="utf-8")
    (folder / "folder.yaml").mkdir()
    catalogue = find_traits([folder])
    assert set(catalogue.names) - set(BUILT_IN) == {"grumpy", "cross"}
    assert catalogue.find("cross").path.endswith("cross.yaml")
    assert catalogue.shadowed[0].hidden.path.endswith("cross.yml")


def test_a_broken_file_is_an_error_only_for_those_who_ask_for_it(elsewhere: Path) -> None:
    folder = elsewhere / "mine"
    write_trait(folder, "grumpy")
    (folder / "broken.yaml").write_text("name: broken\ntags: [\n", encoding="utf-8")
    (folder / "evil.yaml").write_bytes(b"\xff\xfe")
    catalogue = find_traits([folder])
    assert "broken" in catalogue.names
    assert catalogue.find("grumpy").read().name == "grumpy"
    for name, expected in (("broken", r"broken\.yaml:\d+: not YAML"), ("evil", r"evil\.yaml:1: not UTF-8")):
        with pytest.raises(TraitError, match=expected):
            load_trait(name, [folder])
        assert check_file(catalogue.find(name)).errors
    assert [(s.used.name, s.identical) for s in catalogue.shadowed] == [("evil", False)]


def test_folders_that_are_not_there(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TraitError, match="nowhere does not exist"):
        find_traits(["nowhere"])
    (elsewhere / "file").write_text("", encoding="utf-8")
    with pytest.raises(TraitError, match="is a file, not a folder"):
        find_traits([elsewhere / "file"])
    monkeypatch.setenv(USER_FOLDER_VARIABLE, str(elsewhere / "gone"))
    (problem,) = find_traits().problems
    assert f"{elsewhere / 'gone'}: {USER_FOLDER_VARIABLE} names no folder" in problem


def test_the_users_folder_follows_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(USER_FOLDER_VARIABLE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    if sys.platform == "linux":
        assert user_folder() == tmp_path / "config" / "persona-lens" / "traits"
        write_trait(user_folder(), "grumpy")
        assert load_trait("grumpy").name == "grumpy"


def test_a_file_may_change_between_finding_and_reading(elsewhere: Path) -> None:
    file = write_trait(elsewhere / "mine", "grumpy")
    found = find_traits([elsewhere / "mine"]).find("grumpy")
    file.unlink()
    with pytest.raises(TraitError, match="cannot be read: no such file"):
        found.read()


def copy_as_installed(folder: Path) -> None:
    """Lay the package out as the wheel does: without the repository around it."""
    package = folder / "persona_lens"
    shutil.copytree(REPOSITORY / "persona_lens", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__init__.py").write_text("", encoding="utf-8")


def test_an_installed_package_finds_the_traits_it_ships(tmp_path: Path) -> None:
    target = tmp_path / "site-packages"
    copy_as_installed(target)
    # Another project's folder of this name, beside the package, is nobody's built-in folder.
    write_trait(target / "traits", "stranger")
    code = "from persona_lens.traits import find_traits; c = find_traits(); print(*c.names, *c.warnings())"
    assert run_with(target, code) == "built in: the built-in traits are missing: reinstall persona-lens"
    shutil.copytree(REPOSITORY / "traits", target / "persona_lens" / "builtin_traits")
    assert run_with(target, code) == " ".join(BUILT_IN)


# --- packs of traits that others publish ---


def install_pack(tmp_path: Path, name: str, files: dict[str, str], entry_points: dict[str, str]) -> Path:
    """Build a package as an outsider would, and install it with pip into a folder of its own."""
    project, target = tmp_path / f"{name}-source", tmp_path / "installed"
    points = "\n".join(f'{key} = "{value}"' for key, value in entry_points.items())
    pyproject = textwrap.dedent(
        f"""
        [build-system]
        requires = ["hatchling"]
        build-backend = "hatchling.build"
        [project]
        name = "{name}"
        version = "1.0"
        [tool.hatch.build.targets.wheel]
        only-include = ["{name}"]
        [project.entry-points."persona_lens.traits"]
        """
    )
    for path, text in {**files, "../pyproject.toml": pyproject + points}.items():
        file = project / name / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    (project / "pyproject.toml").write_text(pyproject + points, encoding="utf-8")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(project)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


def lay_out_pack(tmp_path: Path, name: str, files: dict[str, str], entry_points: dict[str, str]) -> Path:
    """What installing a package leaves behind."""
    target = tmp_path / "installed"
    points = "".join(f"{key} = {value}\n" for key, value in entry_points.items())
    about = {"METADATA": f"Name: {name}\nVersion: 1.0\n", "entry_points.txt": f"[persona_lens.traits]\n{points}"}
    for folder, texts in ((name, files), (f"{name}-1.0.dist-info", about)):
        (target / folder).mkdir(parents=True)
        for path, text in texts.items():
            (target / folder / path).write_text(text, encoding="utf-8")
    return target


def run_with(target: Path, code: str) -> str:
    path = os.pathsep.join([str(target), str(REPOSITORY)])
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def named(name: str) -> str:
    return optimistic().replace("name: optimistic", f"name: {name}")


def test_traits_of_an_installed_package_are_found(tmp_path: Path) -> None:
    target = install_pack(
        tmp_path,
        "moody_pack",
        {
            "__init__.py": "from pathlib import Path\nHERE = Path(__file__).parent\nMORE = 'more'\n"
            "def several():\n    yield HERE / 'lone' / 'brooding.yaml'\n    yield 'more'\n",
            "grumpy.yaml": named("grumpy"),
            "more/cross.yml": named("cross"),
            "lone/brooding.yaml": named("brooding"),
            "lone/unlisted.yaml": named("unlisted"),
            "single.py": "",
        },
        {"package": "moody_pack", "attribute": "moody_pack:MORE", "function": "moody_pack:several"},
    )
    code = """
from persona_lens.traits import find_traits, load_trait
names = ("grumpy", "cross", "brooding")
print([load_trait(name).name for name in names])
catalogue = find_traits()
print({catalogue.find(name).source.label for name in names}, "unlisted" in catalogue.names)
print(catalogue.warnings(), catalogue.find("evil").source.label)
"""
    loaded, labels, rest = run_with(target, code).splitlines()
    assert loaded == "['grumpy', 'cross', 'brooding']"
    assert labels == "{'package moody_pack'} False"
    assert rest == "[] built in"


def test_a_package_beats_the_built_in_and_loses_to_the_user(tmp_path: Path) -> None:
    pack = {"__init__.py": "", "optimistic.yaml": optimistic().replace("persona-lens contributors", "a stranger")}
    target = lay_out_pack(tmp_path, "other_pack", pack, {"pack": "other_pack"})
    code = "from persona_lens.traits import load_trait; print(load_trait('optimistic').author)"
    assert run_with(target, code) == "a stranger"
    write_trait(tmp_path / "user", "optimistic", author="the user")
    assert run_with(target, code) == "the user"


def test_a_broken_package_is_reported_and_breaks_nothing(tmp_path: Path) -> None:
    target = lay_out_pack(
        tmp_path,
        "broken_pack",
        {"__init__.py": "", "raises.py": "raise RuntimeError('oh no')", "leaves.py": "raise SystemExit(3)"},
        {
            "absent": "no_such_module",
            "attribute": "broken_pack:missing",
            "leaves": "broken_pack.leaves",
            "number": "broken_pack.__init__:__doc__",
            "raises": "broken_pack.raises",
        },
    )
    code = """
from persona_lens.traits import TraitError, find_traits, load_trait
print(load_trait("evil").name)
for warning in find_traits().warnings():
    print(warning)
try:
    load_trait("absent")
except TraitError as error:
    print("RuntimeError: oh no" in str(error))
"""
    first, *warnings, last = run_with(target, code).splitlines()
    assert (first, last) == ("evil", "True")
    assert len(warnings) == 5
    assert all(warning.startswith("package broken_pack: its entry point `") for warning in warnings)
    expected = ("ModuleNotFoundError", "AttributeError", "SystemExit: 3", "TypeError", "RuntimeError: oh no")
    for warning, kind in zip(warnings, expected, strict=True):
        assert kind in warning


def test_a_pack_inside_a_zip_file_can_be_read(tmp_path: Path) -> None:
    import zipfile

    archive = tmp_path / "pack.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("zipped_pack/__init__.py", "")
        packed.writestr("zipped_pack/grumpy.yaml", named("grumpy"))
        packed.writestr("zipped_pack-1.0.dist-info/METADATA", "Name: zipped-pack\nVersion: 1.0\n")
        packed.writestr("zipped_pack-1.0.dist-info/entry_points.txt", "[persona_lens.traits]\np = zipped_pack\n")
    code = "from persona_lens.traits import *; print(load_trait('grumpy').name, resolve_trait('grumpy').path)"
    assert run_with(archive, code).startswith(f"grumpy {archive}")
