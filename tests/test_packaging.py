"""What is shipped, and how the house is built: the wheel, the imports between modules, their size, a light start."""

from __future__ import annotations

import ast
import email
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from graphlib import TopologicalSorter
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from persona_lens.backend import Backend, BackendSpec
from persona_lens.core.plugins import install_command

ROOT = Path(__file__).resolve().parents[1]
ENGINE = ROOT / "persona_lens"
ADAPTERS = ("persona_lens_nnsight", "persona_lens_transformer_lens", "persona_lens_transformers", "persona_lens_vllm")
# As in CONTRIBUTING.md: data flows one way, and nothing imports what stands further down.
ORDER = (
    "core",
    "backend",
    "models",
    "data",
    "traits",
    "runs",
    "judging",
    "vectors",
    "reports",
    "extraction",
    "steering",
    "monitoring",
    "screening",
    "analysis",
    "finetuning",
    "reproduction",
    "serve",
    "cli",
)
LIBRARIES = ("transformer_lens", "nnsight", *ADAPTERS)
MAX_MODULE, MAX_ADAPTER, MAX_FUNCTION = 400, 300, 60

# Runs the command line out of an installed wheel in a process that cannot see the checkout.
ELSEWHERE = """
import sys
wheel, checkout, *sys.argv = sys.argv[1:]
sys.argv.insert(0, "persona-lens")
sys.path[:] = [wheel] + [p for p in sys.path if p not in (checkout, checkout + "/backends")]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
from persona_lens.cli import main
main()
"""
# A command line as small as can be, with the same library: what it loads, ours may load too.
BASELINE = """
import typer
app = typer.Typer(name="small", no_args_is_help=True, rich_markup_mode="markdown")
@app.callback()
def _options() -> None: ...
@app.command()
def command(name: str = "x") -> None: ...
"""
LOADED = """
import sys
try:
    app(["--help"])
except SystemExit as stop:
    assert not stop.code, stop.code
print("\\n" + " ".join(sys.modules))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the checkout without isolation: the build backend is among the development tools."""
    folder = tmp_path_factory.mktemp("dist")
    _run("-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT))
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed by itself."""
    target = tmp_path_factory.mktemp("installed")
    options = ("--no-deps", "--no-index", "--quiet", "--disable-pip-version-check", "--target", str(target))
    _run("-m", "pip", "install", *options, str(wheel))
    return target


def _run(*arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def _files_in(folder: str, suffix: str = "") -> set[str]:
    """What stands in a folder of the checkout, caches left out."""
    files = (path for path in (ROOT / folder).rglob(f"*{suffix}") if path.is_file())
    return {path.relative_to(ROOT / folder).as_posix() for path in files if "__pycache__" not in path.parts}


def test_the_wheel_holds_the_engine_the_adapters_the_traits_the_roles_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {f"persona_lens/{name}" for name in _files_in("persona_lens")}
    expected |= {f"{adapter}/{name}" for adapter in ADAPTERS for name in _files_in(f"backends/{adapter}")}
    traits = {f"persona_lens/builtin_traits/{name}" for name in _files_in("traits")}
    roles = {f"persona_lens/builtin_roles/{name}" for name in _files_in("roles")}
    assert names == expected | traits | roles
    assert (len(traits), len(roles)) == (7, 60 + 1)
    assert {
        "persona_lens/py.typed",
        "persona_lens/data/demonstrations/impolite.jsonl",
        "persona_lens/data/demonstrations/optimistic.jsonl",
        "persona_lens/vectors/card.md.j2",
        "persona_lens/monitoring/heatmap.css",
        "persona_lens/monitoring/heatmap.html.j2",
        "persona_lens/reports/agreement.html.j2",
        "persona_lens/reports/dissection.html.j2",
        "persona_lens/reports/effects.css",
        "persona_lens/reports/effects.html.j2",
        "persona_lens/reports/finetuning.html.j2",
        "persona_lens/reports/parts.html.j2",
        "persona_lens/reports/vector.html.j2",
        "persona_lens/reports/tuning.html.j2",
        "persona_lens/reports/report.css",
        "persona_lens/reports/report.mplstyle",
        "persona_lens/reports/screening.html.j2",
        "persona_lens/reports/session.html.j2",
        "persona_lens/reports/study.html.j2",
        "persona_lens/serve/page/index.html",
        "persona_lens/serve/page/main.js",
        "persona_lens/serve/page/style.css",
    } <= names


def test_the_metadata_names_the_extras_the_licence_and_the_readme(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (described,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        content = email.message_from_bytes(archive.read(described))
        entry_points = archive.read(described.replace("METADATA", "entry_points.txt")).decode()
    assert {"transformer-lens", "nnsight", "all"} <= set(content.get_all("Provides-Extra", []))
    assert content["Requires-Python"] == ">=3.11"
    assert content["License-Expression"] == "MIT"
    assert described.replace("METADATA", "licenses/LICENSE") in names
    assert str(content.get_payload()).lstrip().startswith("# persona-lens")
    # The libraries of the adapters are extras, never dependencies of everybody.
    always = [line for line in content.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert not [line for line in always if line.startswith(("transformer-lens", "transformer_lens", "nnsight"))]
    for adapter in ADAPTERS:
        assert f"= {adapter}:SPEC" in entry_points


def _from_wheel(installed: Path, cwd: Path, *arguments: str) -> Any:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PERSONA_LENS"))}
    environment |= {"HOME": str(cwd), "XDG_CONFIG_HOME": str(cwd / "config")}
    command = ("-I", "-c", ELSEWHERE, str(installed), str(ROOT), *arguments)
    return json.loads(_run(*command, cwd=cwd, env=environment))


def test_the_installed_wheel_finds_its_traits(installed: Path, tmp_path: Path) -> None:
    listed = _from_wheel(installed, tmp_path, "traits", "list", "--json")
    assert listed["problems"] == listed["shadowed"] == []
    shipped = {trait["name"]: trait["path"] for trait in listed["traits"]}
    home = installed / "persona_lens" / "builtin_traits"
    assert shipped == {path.stem: str(home / path.name) for path in (ROOT / "traits").glob("*.yaml")}
    assert all(trait["error"] is None and trait["source"] == "built-in" for trait in listed["traits"])


def test_the_installed_wheel_finds_its_roles_and_the_default_assistant(installed: Path, tmp_path: Path) -> None:
    home = installed / "persona_lens" / "builtin_roles"
    listed = _from_wheel(installed, tmp_path, "roles", "list", "--json")
    assert listed["problems"] == listed["shadowed"] == []
    shipped = {role["name"]: role["path"] for role in listed["roles"]}
    assert shipped == {path.stem: str(home / path.name) for path in (ROOT / "roles").glob("*.yaml")}
    default = _from_wheel(installed, tmp_path, "roles", "default", "--json")
    assert (default["path"], len(default["questions"])) == (str(home / "shared" / "assistant.yaml"), 40)


def test_the_installed_wheel_finds_its_backends(installed: Path, tmp_path: Path) -> None:
    backends = _from_wheel(installed, tmp_path, "backends", "list", "--json")["backends"]
    assert [backend["name"] for backend in backends] == ["nnsight", "transformer_lens", "transformers", "vllm"]
    assert [backend["broken"] for backend in backends] == [None] * len(backends)


def test_the_wheel_runs_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    """With the dependencies of this one in reach, which `pip` would take from an index."""
    environment, here = tmp_path / "venv", Path(sysconfig.get_path("purelib"))
    _run("-m", "venv", "--without-pip", str(environment))
    python, command = environment / "bin" / "python", environment / "bin" / "persona-lens"
    _run("-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet", str(wheel))
    (place,) = environment.glob("lib/python*/site-packages")
    (place / "dependencies.pth").write_text(f"{here}\n")  # whose own .pth files, such as the checkout's, are not read
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PERSONA_LENS"))}
    for arguments in (["--version"], ["traits", "check", "optimistic"], ["steer", "tune", "--help"]):
        done = subprocess.run(
            [command, *arguments], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    code = "import persona_lens, persona_lens_nnsight; print(persona_lens.__file__, persona_lens_nnsight.__file__)"
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=variables, capture_output=True, text=True, check=True)
    assert all(Path(file).is_relative_to(environment) for file in done.stdout.split())


def test_the_command_for_an_extra_names_what_it_needs_and_never_persona_lens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On an index that name may be anybody's."""
    stated = metadata.requires("persona-lens") or []
    extras = [extra for extra in metadata.metadata("persona-lens").get_all("Provides-Extra") or [] if extra != "all"]
    assert {"nnsight", "openai", "sae"} <= set(extras)
    for extra in extras:
        command = install_command(extra)
        assert command.startswith("pip install ")
        assert "persona-lens" not in command
        for requirement in shlex.split(command)[2:]:
            assert [line for line in stated if line.startswith(requirement) and extra in line], requirement
    assert install_command("nnsight") == "pip install 'nnsight>=0.8.1'"
    assert install_command("none-such") == "pip install -e '.[none-such]' in the checkout"

    def missing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert install_command("nnsight") == "pip install -e '.[nnsight]' in the checkout"


def test_the_checkout_is_out_of_reach_of_the_installed_wheel(installed: Path, tmp_path: Path) -> None:
    """Otherwise the tests above would prove nothing."""
    look = ELSEWHERE.partition("from persona_lens.cli")[0] + (
        "import importlib, json\n"
        f"names = {['persona_lens', 'persona_lens.cli', *ADAPTERS]}\n"
        "print(json.dumps([importlib.import_module(name).__file__ for name in names]))\n"
    )
    files = json.loads(_run("-I", "-c", look, str(installed), str(ROOT), cwd=tmp_path))
    assert all(Path(file).is_relative_to(installed) for file in files)


@dataclass(frozen=True)
class Import:
    """One import of a module."""

    importer: str
    imported: str
    line: int
    at_once: bool
    """Whether it happens when the importer is imported, rather than in a function or for type checkers only."""


@cache
def _modules() -> dict[str, Path]:
    """Every module of the engine and the adapters, by its dotted name."""
    found = {}
    for base in (ROOT, ROOT / "backends"):
        for package in (ENGINE,) if base == ROOT else (base / adapter for adapter in ADAPTERS):
            for path in sorted(package.rglob("*.py")):
                parts = path.relative_to(base).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _imports() -> tuple[Import, ...]:
    return tuple(found for name, path in _modules().items() for found in _imports_of(name, _tree(path), True))


def _imports_of(importer: str, node: ast.AST, at_once: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        lazily = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _for_type_checkers(child)
        match child:
            case ast.Import(names=aliases):
                yield from (Import(importer, alias.name, child.lineno, at_once) for alias in aliases)
            case ast.ImportFrom(module=str(module), names=aliases, level=0):
                for alias in aliases:
                    submodule = f"{module}.{alias.name}"
                    yield Import(importer, submodule if submodule in _modules() else module, child.lineno, at_once)
            case ast.ImportFrom():
                raise AssertionError(f"{importer}:{child.lineno}: relative imports are not used here")
            case _:
                yield from _imports_of(importer, child, at_once and not lazily)


def _for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_the_engine_imports_no_adapter_and_none_of_their_libraries() -> None:
    """Nor does it name an adapter's package anywhere: entry points alone lead there."""
    for found in _imports():
        if found.importer.partition(".")[0] == "persona_lens":
            assert found.imported.partition(".")[0] not in LIBRARIES, found
    for path in ENGINE.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            text = path.read_text(encoding="utf-8")
            assert not [adapter for adapter in ADAPTERS if adapter in text], path


def test_adapters_do_not_know_each_other() -> None:
    for found in _imports():
        importer, imported = found.importer.partition(".")[0], found.imported.partition(".")[0]
        assert importer not in ADAPTERS or imported not in ADAPTERS or importer == imported, found


def test_data_flows_one_way() -> None:
    """Imports inside functions and for type checkers count too."""
    nouns = {path.stem if path.is_file() else path.name for path in ENGINE.iterdir() if path.name[0] not in "_."}
    assert nouns - {"builtin_traits", "builtin_roles", "py"} == set(ORDER)
    wrong = []
    for found in _imports():
        importer, imported = found.importer.split("."), found.imported.split(".")
        if importer[0] != "persona_lens" or imported[0] != "persona_lens" or len(importer) == 1:
            continue
        if len(imported) == 1:  # the version, which everything may ask for
            assert importer[1] == "cli", found
        elif ORDER.index(imported[1]) > ORDER.index(importer[1]):
            wrong.append(f"{found.importer}:{found.line} imports {found.imported}")
    assert wrong == []


def test_the_order_is_the_one_that_contributors_read() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("```text\n")[2].partition("```")[0]
    assert tuple(line.split()[0] for line in section.splitlines()) == ORDER


def test_the_specification_that_contributors_read_is_the_one_there_is() -> None:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    example = ast.parse(text.partition("```python\n")[2].partition("```")[0])
    (call,) = (node for node in ast.walk(example) if isinstance(node, ast.Call))
    assert [keyword.arg for keyword in call.keywords] == [field.name for field in fields(BackendSpec)]
    members = {name for name in vars(Backend) if name[0] != "_"}
    table = {
        name
        for line in text.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)", line.split("|")[1])
    }
    assert members == table


def test_no_module_imports_itself_in_a_circle() -> None:
    """Imports inside functions and for type checkers count too."""
    graph: dict[str, set[str]] = {name: set() for name in _modules()}
    for found in _imports():
        if found.imported in graph and found.imported != found.importer:
            graph[found.importer].add(found.imported)
    TopologicalSorter(graph).prepare()  # raises CycleError, with the circle


def test_importing_the_engine_imports_nothing_of_it_but_itself() -> None:
    assert not [
        found
        for found in _imports()
        if found.importer == "persona_lens" and found.at_once and "persona" in found.imported
    ]


@pytest.mark.parametrize("name", _modules())
def test_modules_and_functions_are_of_a_size_that_can_be_read(name: str) -> None:
    path = _modules()[name]
    limit = MAX_ADAPTER if path.name == "adapter.py" else MAX_MODULE
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert _length(name, node) <= MAX_FUNCTION, f"{node.name} in line {node.lineno}"


def _length(module: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    if not module.startswith("persona_lens.cli"):
        return node.end_lineno - node.lineno + 1
    # The signature and docstring of a command are the table of its options and its help.
    first = node.body[1] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body[0]
    return node.end_lineno - first.lineno + 1


def _loaded(code: str) -> set[str]:
    output = _run("-c", code + LOADED)
    return {name.partition(".")[0] for name in output.splitlines()[-1].split()}


def test_help_loads_nothing_that_the_smallest_command_line_does_not() -> None:
    ours = _loaded("from persona_lens.cli import app\n") - set(sys.stdlib_module_names)
    small = _loaded(BASELINE)
    assert "typer" in small
    assert ours - small == {"persona_lens"}


@pytest.mark.parametrize("code", ["import persona_lens", "import persona_lens.traits", "import persona_lens.models"])
def test_light_imports_load_neither_torch_nor_transformers(code: str) -> None:
    loaded = _run("-c", f"{code}\nimport sys\nprint(' '.join(sys.modules))").split()
    assert not {"torch", "transformers", "numpy", "jinja2", "matplotlib"} & set(loaded)


@pytest.mark.parametrize(
    ("package", "unloaded"),
    [
        ("vectors", {"transformers", "scipy"}),
        ("steering", {"transformers"}),
        ("screening", {"transformers", "ray", "datasets"}),
    ],
)
def test_what_runs_no_model_does_not_load_its_library(package: str, unloaded: set[str]) -> None:
    loaded = _run("-c", f"import persona_lens.{package}\nimport sys\nprint(' '.join(sys.modules))").split()
    assert not unloaded & set(loaded)


def test_import_persona_lens_loads_nothing_but_itself() -> None:
    code = "import sys\nbefore = set(sys.modules)\nimport persona_lens\nprint(' '.join(set(sys.modules) - before))"
    loaded = {name.partition(".")[0] for name in _run("-c", code).split()}
    assert loaded - set(sys.stdlib_module_names) == {"persona_lens"}
