"""The command line as its users meet it: whole processes where that matters, the same application in here elsewhere."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import webbrowser
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationMixin
from typer.testing import CliRunner

import persona_lens as pl
from persona_lens import PersonaLensError
from persona_lens.backend import wrap_model
from persona_lens.cli import app
from persona_lens.cli.commands import COMMANDS as ALL
from persona_lens.cli.commands import Group
from persona_lens.cli.settings import layer_numbers, numbers
from persona_lens.models.chat import chat_format
from persona_lens.steering import Steering
from persona_lens.steering.preview import preview_tokens
from persona_lens.traits import Arm, load_trait
from persona_lens.vectors import PersonaVectors, Tuned, load_vectors
from tests.shell import Shell
from tests.tiny import D_MODEL, N_LAYERS, saved_model, tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    (),
    ("bake",),
    ("demo",),
    ("extract",),
    ("axis",),
    ("axis", "extract"),
    ("axis", "cap"),
    ("steer",),
    ("steer", "sweep"),
    ("steer", "tune"),
    ("steer", "compare"),
    ("steer", "capability"),
    ("steer", "effects"),
    ("steer", "persist"),
    ("steer", "methods"),
    ("bench-steer",),
    ("vectors",),
    ("vectors", "show"),
    *(("vectors", name) for name in ("cosines", "layers", "pca", "agree", "halves", "forecast", "lens", "attribute")),
    *(("vectors", name) for name in ("export", "import", "push", "pull", "fit", "methods")),
    ("dissect",),
    ("screen",),
    ("serve",),
    ("finetune",),
    ("finetune-study",),
    ("shift",),
    ("reproduce",),
    ("runs",),
    ("generate",),
    ("responses",),
    ("judge",),
    ("judge", "sample"),
    ("judge", "compare"),
    ("judge", "score"),
    ("monitor",),
    ("monitor", "study"),
    ("monitor", "baseline"),
    ("monitor", "transcript"),
    ("monitor", "prompt"),
    ("monitor", "chat"),
    ("monitor", "drift"),
    ("traits",),
    *(("traits", name) for name in ("list", "show", "path", "check", "new", "import", "schema")),
    ("roles",),
    *(("roles", name) for name in ("list", "show", "path", "check", "new", "default", "schema")),
    ("backends",),
    ("backends", "list"),
    ("backends", "check"),
    ("remote",),
    ("remote", "status"),
)
HEAVY = ("torch", "transformers", "transformer_lens", "nnsight", "scipy", "matplotlib", "rich.progress", "httpx")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
MAIN = "import sys; sys.argv[0] = 'persona-lens'; from persona_lens.cli import main; main()"
# Whole processes take seconds to import torch, so most commands run in this one.
TINY = ("--dtype", "float32", "--device", "cpu", "--max-new-tokens", "8")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same size, with other weights."""
    return saved_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="module")
def extracted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of an extraction, and what it wrote to standard output."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, parsed(*extraction(model, out), "--json")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, so that nothing is written into the checkout."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def extraction(model: Path, out: Path, *more: str) -> tuple[str, ...]:
    return ("extract", str(model), "optimistic", "--out", str(out), "--questions", "4", "--unpaired", *TINY, *more)


SHELL = Shell(columns=80)
run, ok, parsed, refused = SHELL.run, SHELL.ok, SHELL.parsed, SHELL.refused


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", MAIN, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=300
    )


# Help, and what it costs


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(command: tuple[str, ...]) -> None:
    said = ok(*command, "--help")
    assert "Usage:" in said
    assert len(said.splitlines()) > 8


def test_every_command_is_in_the_list() -> None:
    """Else a new one would go without tests."""
    named = {(name,) for name in ALL}
    within = {(name, inner) for name, each in ALL.items() if isinstance(each, Group) for inner in each.commands}
    assert named | within == {command for command in COMMANDS if command}


def test_every_option_is_explained_and_no_command_needs_torch_for_that() -> None:
    script = (
        "import sys, typer.main\n"
        "from persona_lens.cli import app\n"
        "def walk(command, path):\n"
        "    for each in command.params:\n"
        "        assert each.help, (path, each.name)\n"
        "    context = command.context_class(command)\n"
        "    for name in getattr(command, 'commands', ()):\n"
        "        short = command.commands[name].help\n"
        "        found = command.resolve_command(context, [name])[1]\n"
        "        assert ' '.join(found.help.split('\\n\\n')[0].split()) == short, name\n"
        "        walk(found, [*path, name])\n"
        "walk(typer.main.get_command(app), [])\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_a_server_says_which_option_names_layers_before_it_loads_a_model(extracted: tuple[Path, Any]) -> None:
    assert "`--layers` on the command line" in refused("serve", "no such model", str(extracted[0]))


@pytest.mark.parametrize("command", ["extract", "steer sweep", "generate"])
def test_options_are_explained(command: str) -> None:
    said = " ".join(CliRunner(env={"COLUMNS": "300"}).invoke(app, [*command.split(), "--help"]).stdout.split())
    for option in ("--backend", "--dtype", "--device", "--seed", "--json", "--max-new-tokens", "--temperature"):
        assert option in said


def loaded(statement: str) -> list[str]:
    script = (
        f"import sys\ntry:\n    {statement}\nexcept SystemExit: pass\nprint([m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    return list(json.loads(done.stdout.splitlines()[-1].replace("'", '"')))


@pytest.mark.parametrize(
    "statement",
    [
        "import persona_lens",
        "import persona_lens.cli",
        "sys.argv[1:] = ['--help']; from persona_lens.cli import main; main()",
        "sys.argv[1:] = ['extract', '--help']; from persona_lens.cli import main; main()",
        "sys.argv[1:] = ['--version']; from persona_lens.cli import main; main()",
        "sys.argv[1:] = ['traits', 'list']; from persona_lens.cli import main; main()",
        "from persona_lens.traits import load_trait; load_trait('evil')",
    ],
)
def test_what_needs_no_model_loads_nothing_heavy(statement: str) -> None:
    assert loaded(statement) == []


def test_the_check_for_heavy_modules_sees_them() -> None:
    assert "torch" in loaded("import persona_lens; persona_lens.Edit")


def test_the_version_is_the_installed_one() -> None:
    from importlib.metadata import version

    assert ok("--version").strip() == f"persona-lens {version('persona-lens')}"


def test_the_installed_command_runs() -> None:
    command = shutil.which("persona-lens", path=str(Path(sys.executable).parent))
    assert command is not None
    done = subprocess.run([command, "--help"], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert "extract" in done.stdout
    module = [sys.executable, "-m", "persona_lens.cli", "--help"]
    done = subprocess.run(module, capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert "extract" in done.stdout


# Errors


def test_an_error_is_one_sentence_without_a_traceback() -> None:
    done = process("traits", "show", "evill")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "did you mean evil?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [("--debug", "traits", "show", "evill"), ("traits", "show", "evill", "--debug")])
def test_debug_adds_the_traceback_wherever_it_stands(arguments: tuple[str, ...]) -> None:
    done = process(*arguments)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "did you mean" in done.stderr


def test_an_unknown_trait_is_guessed(model: Path) -> None:
    said = refused("extract", str(model), "optimisitc")
    assert "optimisitc" in said
    assert "optimistic" in said.replace("optimisitc", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("extract", "M", "optimistic", "--sample", "3"), "--samples"),
        (("steer", "sweep", "M", "V", "--layers", "1", "--coefficient", "3"), "--coefficients"),
        (("generate", "M", "V", "Hi", "--layer", "1", "--positons", "all"), "--positions"),
        (("extrct",), "extract"),
    ],
)
def test_a_mistyped_option_or_command_is_refused_with_the_right_one(arguments: tuple[str, ...], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("extract", "M"), "TRAIT"),
        (("steer", "sweep", "M", "V"), "--layers"),
        (("generate", "M", "V"), "PROMPT"),
        (("extract", "M", "optimistic", "--samples", "many"), "samples"),
    ],
)
def test_a_missing_or_wrong_value_is_named(arguments: tuple[str, ...], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert said.casefold() in result.output.casefold()


def test_models_that_are_not_there(tmp_path: Path) -> None:
    assert "did you mean 'smollm2-135m'" in refused("extract", "smollm2-135n", "optimistic")
    assert "there is no folder" in refused("extract", str(tmp_path / "none"), "optimistic")
    assert "neither a folder here nor a hub id" in refused("extract", "no model", "optimistic")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--backend", "transformer"), "did you mean transformer"),
        (("--dtype", "float8"), "dtype 'float8' is not one of: auto, float32, bfloat16, float16"),
        (("--device", "tpu9"), "is not a device"),
        (("--samples", "0"), "samples must be at least 1"),
        (("--questions", "30"), "30 questions asked for, trait optimistic has 20"),
        (("--max-new-tokens", "0"), "max_new_tokens must be at least 1"),
        (("--temperature", "-1"), "temperature must be 0"),
        (("--temperature", "0", "--top-p", "0.5"), "top_p do nothing at temperature 0"),
        (("--threshold", "100"), "threshold must be between 0 and 100"),
        (("--batch-size", "0"), "at least 1 row"),
        (("--revision", "main"), "a revision ('main') belongs to a hub model"),
        (("--chat-template", "none.jinja"), "cannot read the chat template none.jinja"),
        (("--traits-dir", "nowhere"), "nowhere"),
    ],
)
def test_values_that_cannot_be_used_are_refused_and_claim_no_folder(
    model: Path, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    out = tmp_path / "run"
    assert said in refused("extract", str(model), "optimistic", "--out", str(out), *options)
    assert not out.exists()


def test_an_option_that_a_backend_does_not_have_is_refused_with_those_it_has(model: Path, tmp_path: Path) -> None:
    options = ("--backend", "transformer_lens", "--device-map", "auto")
    said = refused("extract", str(model), "optimistic", "--out", str(tmp_path / "run"), *options)
    assert "backend transformer_lens has no option 'device_map'" in said
    assert "It takes: revision, dtype, device" in said


def test_a_folder_that_cannot_be_used(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "is a file; give a folder" in refused(*extraction(model, tmp_path / "file"))
    assert "cannot be made" in refused(*extraction(model, tmp_path / "file" / "run"))
    assert "holds other files (file" in refused(*extraction(model, tmp_path))


# Numbers and layers in an option


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("2", [2]),
        ("0,3", [0, 3]),
        ("3, 1", [1, 3]),
        ("1-3", [1, 2, 3]),
        ("1-2,2-4,0", [0, 1, 2, 3, 4]),
        ("all", [0, 1, 2, 3, 4]),
        ("4-4", [4]),
    ],
)
def test_layers(text: str, layers: list[int]) -> None:
    assert layer_numbers(text, 5) == layers


@pytest.mark.parametrize("text", ["", "x", "1,", "-1", "1-", "1-2-3", "1.5", "all,1", "1;2", "5", "3-5", "3-1", "²"])
def test_layers_that_are_none(text: str) -> None:
    with pytest.raises(PersonaLensError, match=r"--layers takes|layer 5 does not exist: the model has layers 0 to 4"):
        layer_numbers(text, 5)


def test_numbers() -> None:
    assert numbers("-2,-1,.5, 2e0", "--coefficients") == [-2.0, -1.0, 0.5, 2.0]
    for text in ("", "1,", "one", "1;2", "1 2"):
        with pytest.raises(PersonaLensError, match="--coefficients takes numbers with commas between them"):
            numbers(text, "--coefficients")


# From extraction to steered replies


def test_extraction_writes_a_run_and_its_summary(model: Path, extracted: tuple[Path, dict[str, Any]]) -> None:
    out, said = extracted
    assert said == {"folder": str(out), **json.loads((out / "summary.json").read_text())}
    assert said["responses"] == 40
    assert said["model"]["model"] == "tiny"
    assert said["model"]["backend"].startswith("transformers ")
    assert len(said["separation"]) == N_LAYERS
    vectors = load_vectors(out)
    assert vectors.directions["response_mean"].shape == (N_LAYERS, D_MODEL)
    assert vectors.norms().tolist() == pytest.approx(said["norms"]["response_mean"])
    vectors.check_model(wrap_model(tiny_model(), tiny_tokenizer()))  # the same weights, loaded another way


def test_the_same_command_again_does_nothing_new(model: Path, extracted: tuple[Path, dict[str, Any]]) -> None:
    out, said = extracted
    before = {path: path.stat().st_mtime_ns for path in (out / "activations").iterdir()}
    assert parsed(*extraction(model, out), "--json") == said
    assert {path: path.stat().st_mtime_ns for path in (out / "activations").iterdir()} == before


def test_extraction_for_people(model: Path, extracted: tuple[Path, dict[str, Any]]) -> None:
    out, said = extracted
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, list(extraction(model, out))).stdout
    assert f"{said['mean_score']['positive']:.1f}" in shown
    assert f"vectors: {out / 'vectors.safetensors'}" in shown


def test_the_default_folder_is_named_after_trait_and_model(model: Path, tmp_path: Path) -> None:
    arguments = list(extraction(model, tmp_path))
    del arguments[arguments.index("--out") : arguments.index("--out") + 2]
    assert parsed(*arguments, "--json")["folder"] == "runs/optimistic-tiny"
    assert (tmp_path / "here" / "runs" / "optimistic-tiny" / "vectors.safetensors").exists()


def test_a_folder_of_another_run_is_refused_with_the_difference(
    model: Path, other_model: Path, extracted: tuple[Path, dict[str, Any]]
) -> None:
    out, _ = extracted
    said = refused(*extraction(model, out, "--seed", "7", "--threshold", "40"))
    assert "settings.seed: 0 -> 7" in said
    assert "settings.threshold: 50.0 -> 40.0" in said
    assert "model" not in said.split("configuration:")[1]
    assert 'model.model: "tiny" -> "other"' in refused(*extraction(other_model, out))


def steering(model: Path, out: Path, *more: str) -> tuple[str, ...]:
    return (
        "steer",
        "sweep",
        str(model),
        str(out),
        "--layers",
        "0,2",
        "--questions",
        "3",
        "--random-directions",
        "2",
        *TINY,
        *more,
    )


def test_steering_reports_curves_and_effects(
    model: Path, extracted: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, _ = extracted
    sweep = tmp_path / "sweep"
    said = parsed(*steering(model, out, "--coefficients", "-2,2", "--out", str(sweep), "--json"))
    assert [(each["layer"], kind) for each in said["layers"] for kind in each["curves"]] == [
        (layer, direction) for layer in (0, 2) for direction in ("vector", "random")
    ]
    for points in (curve for each in said["layers"] for curve in each["curves"].values()):
        assert [point["coefficient"] for point in points] == [-2.0, 0.0, 2.0]
        assert all(p["score"]["low"] <= p["score"]["mean"] <= p["score"]["high"] for p in points)
    assert [each["effect"]["layer"] for each in said["layers"]] == [0, 2]
    rows = [json.loads(line) for line in (sweep / "sweep-scores.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * (1 + 2 * 2 * 2)
    by_hand = [r["score"] for r in rows if (r["direction"], r["layer"], r["coefficient"]) == ("vector", 2, 2.0)]
    assert said["layers"][1]["curves"]["vector"][-1]["score"]["mean"] == pytest.approx(sum(by_hand) / len(by_hand))
    again = parsed(*steering(model, out, "--coefficients", "-2,2", "--json"))  # in memory
    assert again == said
    assert "settings.questions: 3 -> 2" in refused(
        *steering(model, out, "--coefficients", "-2,2", "--out", str(sweep), "--questions", "2")
    )


def test_steering_for_people(model: Path, extracted: tuple[Path, dict[str, Any]]) -> None:
    runner = CliRunner(env={"COLUMNS": "200"})
    shown = runner.invoke(app, list(steering(model, extracted[0], "--coefficients=1", "--random-directions", "0")))
    assert shown.exit_code == 0, shown.output
    assert "Layer 0" in shown.stdout
    assert "Layer 2" in shown.stdout
    assert "+1" in shown.stdout
    assert "random" not in shown.stdout.split("Effect")[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--layers", "3"), "layer 3 does not exist: the model has layers 0 to 2"),
        (("--layers", "middle"), "--layers takes 18, 12,15,18, 10-20 or all; got 'middle'"),
        (("--coefficients", "a lot"), "--coefficients takes numbers"),
        (("--coefficients", "0"), "at least one of them not 0"),
        (("--coefficients", "nan"), "finite"),
        (
            ("--positions", "reply"),
            "--positions takes all, prompt, response, generating, thinking, answer; got 'reply'",
        ),
        (("--reduction", "mean"), "no reduction 'mean'; there are"),
        (("--questions", "21"), "21 questions asked for"),
        (("--random-directions", "-1"), "random_directions at least 0"),
        (("--backend", "nosuch"), "no backend named 'nosuch'"),
    ],
)
def test_steering_that_cannot_be_done_is_refused(
    model: Path, extracted: tuple[Path, dict[str, Any]], tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    out = tmp_path / "sweep"
    assert said in refused(*steering(model, extracted[0], "--out", str(out), *options))
    assert not out.exists()


def test_replies_stand_side_by_side(model: Path, extracted: tuple[Path, dict[str, Any]]) -> None:
    generate = ("generate", str(model), str(extracted[0]), "What is new?", "--layer", "1", *TINY)
    said = parsed(*generate, "--coefficients", "-3,3,-3", "--json")
    assert said["prompt"] == "What is new?"
    assert [(row["coefficient"], row["edits"]) for row in said["responses"]] == [
        (-3.0, "optimistic@1:-3"),
        (0.0, None),
        (3.0, "optimistic@1:+3"),
    ]
    assert len({row["response"] for row in said["responses"]}) > 1
    backend = wrap_model(tiny_model(), tiny_tokenizer())
    from persona_lens import reply

    for row in said["responses"]:
        edit = load_vectors(extracted[0]).edit(1, row["coefficient"])
        assert row["response"] == reply(backend, "What is new?", edits=[edit], max_new_tokens=8)
    shown = ok(*generate, "--coefficients", "3")
    assert "+3" in shown


@pytest.fixture(scope="module")
def others(extracted: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of more: a run of another trait, vectors with a layer that was tuned, and steerings in files."""
    folder = tmp_path_factory.mktemp("others")
    loaded = load_vectors(extracted[0])
    turned = {name: rows.flip(1).contiguous() for name, rows in loaded.directions.items()}
    evil = replace(loaded, trait="evil", directions=turned)
    evil.save(folder / "evil" / "vectors.safetensors")
    loaded.with_tuned(Tuned(2, 2.5, "prompt_mean"), {}).save(folder / "tuned.safetensors")
    (folder / "calm.yaml").write_text("format_version: 1\nvectors: {evil: evil}\nedits: [evil@1:-2, optimistic@2:+1]\n")
    Steering.parse("evil@1:+2 on response", evil).save(folder / "bad.safetensors")
    return folder


def test_steerings_that_are_written_stand_side_by_side(
    model: Path, extracted: tuple[Path, dict[str, Any]], others: Path
) -> None:
    specs = ["optimistic@1:+3, evil@all:ablate", str(others / "calm.yaml"), str(others / "bad.safetensors")]
    edits = [part for spec in specs for part in ("--edits", spec)]
    generate = ("generate", str(model), str(extracted[0]), "What is new?", *edits, "--with", str(others / "evil"))
    rows = parsed(*generate, *TINY, "--json")["responses"]
    vectors = [load_vectors(extracted[0]), load_vectors(others / "evil")]
    steerings = [
        Steering.parse(text, vectors)
        for text in ("optimistic@1:+3, evil@all:ablate", "evil@1:-2, optimistic@2:+1", "evil@1:+2 on response")
    ]
    assert [row["edits"] for row in rows] == [None, *map(str, steerings)]
    backend = wrap_model(tiny_model(), tiny_tokenizer())
    answers = pl.generate(backend, "What is new?", [None, *steerings], max_new_tokens=8)
    assert [row["response"] for row in rows] == answers
    assert len(set(answers)) > 2
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*generate, *TINY]).stdout
    assert "optimistic@1:+3, evil@all:ablate" in shown
    assert "unsteered" in shown


def test_vectors_can_go_by_another_name(model: Path, extracted: tuple[Path, dict[str, Any]], others: Path) -> None:
    generate = ("generate", str(model), str(extracted[0]), "Hi", *TINY, "--json")
    renamed = parsed(*generate, "--edits", "bad@1:+2", "--with", f"bad={others / 'evil'}")["responses"]
    plain = parsed(*generate, "--edits", "evil@1:+2", "--with", str(others / "evil" / "vectors.safetensors"))[
        "responses"
    ]
    assert [row["edits"] for row in renamed] == [None, "bad@1:+2"]
    assert [row["response"] for row in renamed] == [row["response"] for row in plain]


def test_what_was_tuned_is_taken_where_nothing_is_given(model: Path, others: Path) -> None:
    def rows(*more: str) -> list[str | None]:
        found = parsed("generate", str(model), str(others / "tuned.safetensors"), "Hi", *TINY, *more, "--json")
        return [row["edits"] for row in found["responses"]]

    assert rows() == [None, "optimistic.prompt_mean@2:+2.5"]
    assert rows("--coefficients", "1") == [None, "optimistic.prompt_mean@2:+1"]
    assert rows("--layer", "1", "--positions", "prompt") == [
        "optimistic@1:-2 on prompt",
        None,
        "optimistic@1:+2 on prompt",
    ]
    assert rows("--reduction", "prompt_last") == [None, "optimistic.prompt_last@2:+2.5"]
    assert rows("--edits", "optimistic:-1") == [None, "optimistic@2:-1"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "no layer was tuned for the vectors of 'optimistic'; give one with --layer, write --edits"),
        (("--edits", "optimistic@1:+1", "--layer", "1"), "--edits says everything that --layer would"),
        (("--edits", "optimistic@1:+1", "--positions", "all"), "--edits says everything that --positions would"),
        (("--layer", "1", "--with", "{others}/evil"), "--with brings vectors for --edits to name"),
        (("--edits", "optimistic@1:+1", "--with", "{others}/evil"), "vectors of 'evil', which no --edits names"),
        (
            ("--edits", "optimistic@1:+1", "--with", "optimistic={others}/evil"),
            "two vectors go by the name 'optimistic'; rename one, --with NAME=PATH",
        ),
        (("--edits", "a@1:+1", "--with", "a={others}/evil", "--with", "a={others}/evil"), "go by the name 'a'"),
        (("--edits", "evil@1:+1"), "there are no vectors for 'evil'; there are vectors for: optimistic"),
        (("--edits", "optimistic@1:+"), "optimistic@1:+\n               ^ expected a number"),
        (("--edits", "optimistic@9:+1"), "layer 9 does not exist"),
        (("--edits", "nowhere.yaml"), "there is no steering file nowhere.yaml"),
        (("--edits", "evil@1:+1", "--with", "nowhere"), "nowhere does not exist"),
        (("--layer", "1", "--coefficients", "much"), "--coefficients takes numbers"),
        (("--layer", "1", "--coefficients", ""), "--coefficients takes numbers"),
        (("--layer", "1", "--coefficients", "inf"), "coefficient holds NaN or infinity"),
        (
            ("--layer", "1", "--positions", "reply"),
            "--positions takes all, prompt, response, generating, thinking, answer",
        ),
        (("--layer", "1", "--preview", "--max-new-tokens", "-1"), "0 tokens or more, got -1"),
    ],
)
def test_steerings_that_cannot_be_read_are_refused(
    model: Path, extracted: tuple[Path, dict[str, Any]], others: Path, given: tuple[str, ...], said: str
) -> None:
    arguments = [part.replace("{others}", str(others)) for part in given]
    assert said in refused("generate", str(model), str(extracted[0]), "Hi", *TINY, *arguments)


def test_a_preview_shows_each_steering_and_generates_nothing(
    model: Path, extracted: tuple[Path, dict[str, Any]], others: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GenerationMixin, "generate", None)
    specs = ("optimistic@1:+3 on response[2:] if evil@0>3", "evil@all:ablate")
    generate = ("generate", str(model), str(extracted[0]), "Hi", "--with", str(others / "evil"), *TINY, "--preview")
    edits = [part for spec in specs for part in ("--edits", spec)]
    previews = parsed(*generate, *edits, "--json")["previews"]
    assert [each["title"] for each in previews] == list(specs)
    backend = wrap_model(tiny_model(), tiny_tokenizer())
    vectors = [load_vectors(extracted[0]), load_vectors(others / "evil")]
    ids = chat_format(backend).encode(None, "Hi")
    for spec, each in zip(specs, previews, strict=True):
        expected = preview_tokens(backend, ids, 8, edits=Steering.parse(spec, vectors)).to_json()
        assert {"title": spec, **json.loads(json.dumps(expected))} == each
    shown = CliRunner(env={"COLUMNS": "160"}).invoke(app, [*generate, *edits]).stdout
    for part in ("<|im_start|>", "+3 if evil@0>3", "ablate", "response token 2", "all layers", "sink at"):
        assert part in shown


def test_a_preview_of_a_sweep_and_of_an_extraction(
    model: Path, extracted: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Module, "__call__", None)
    sweep = steering(model, extracted[0], "--coefficients", "-2,2", "--positions", "generating", "--preview")
    (preview,) = parsed(*sweep, "--out", str(tmp_path / "sweep"), "--json")["previews"]
    assert [(edit["text"], edit["layers"]) for edit in preview["edits"]] == [
        ("vector:-2 on generating", [0, 2]),
        ("vector:+2 on generating", [0, 2]),
    ]
    monkeypatch.undo()
    monkeypatch.setattr(GenerationMixin, "generate", None)  # one pass tells attention sinks
    trait = load_trait("optimistic")
    assert trait.evaluation_questions[0] in preview["title"]
    assert [token["factors"] for token in preview["tokens"]][-5:] == [[0, 0], *[[-2, 2]] * 4]
    found = parsed(*extraction(model, tmp_path / "run"), "--preview", "--json")["previews"]
    assert [each["title"].split(",")[0] for each in found] == ["positive", "negative"]
    for arm, each in zip(Arm, found, strict=True):
        text = "".join(token["text"] for token in each["tokens"] if token["part"] == "prompt")
        assert trait.system_prompt(arm, 0) in text
        assert [token["reads"] for token in each["tokens"]][-4:] == [
            [False, True, True],
            *[[True, False, False]] * 3,
        ]
        assert each["rest"] == 5
    file = tmp_path / "given.jsonl"
    rows = [
        {"arm": arm, "question_number": question, "pair": pair, "response": f"{arm} {question} {pair}"}
        for arm in Arm
        for question in range(4)
        for pair in range(5)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    read = ("extract", str(model), "optimistic", "--responses", str(file), "--questions", "4", *TINY[:4])
    for each, arm in zip(parsed(*read, "--preview", "--json")["previews"], Arm, strict=True):
        response = [token for token in each["tokens"] if token["part"] == "response"]
        assert "".join(token["text"] for token in response) == f"{arm} 0 0"
        assert [token["reads"] for token in response] == [[True, False, False]] * len(response)
        assert each["rest"] == 0
    assert not (tmp_path / "sweep").exists()
    assert not (tmp_path / "run").exists()
    for command in (sweep, (*extraction(model, tmp_path / "run"), "--preview")):
        assert "give one of them" in refused(*command, "--dry-run")


def test_vectors_of_another_model_are_refused_unless_allowed(
    other_model: Path, extracted: tuple[Path, dict[str, Any]]
) -> None:
    out = extracted[0]
    generate = ("generate", str(other_model), str(out), "Hi", "--layer", "1", *TINY)
    steer = steering(other_model, out, "--coefficients", "1")
    for command in (generate, steer):
        said = refused(*command)
        assert "belong to another model than the one opened: weights: sha256:" in said
        assert "--allow-other-model" in said
        ok(*command, "--allow-other-model")


def test_files_that_are_no_vectors(model: Path, tmp_path: Path) -> None:
    generate = ("generate", str(model))
    rest = ("Hi", "--layer", "1", *TINY)
    assert "does not exist; make it with" in refused(*generate, str(tmp_path / "none.safetensors"), *rest)
    assert "vectors.safetensors does not exist" in refused(*generate, str(tmp_path), *rest)
    assert "persona vectors" in refused(*generate, str(model / "model.safetensors"), *rest)
    torch.save({}, tmp_path / "v.pt")
    assert "not a safetensors file" in refused(*generate, str(tmp_path / "v.pt"), *rest)
    backend = wrap_model(tiny_model(), tiny_tokenizer())
    rows = {"response_mean": torch.ones(N_LAYERS, D_MODEL)}
    bare = PersonaVectors("bare", replace(backend.info), rows).save(tmp_path / "bare.safetensors")
    assert "carry no trait" in refused("steer", "sweep", str(model), str(bare), "--layers", "1", *TINY)
    ok(*generate, str(bare), *rest)


@pytest.mark.parametrize("backend", ["transformer_lens", "nnsight"])
def test_every_backend_extracts(
    model: Path, extracted: tuple[Path, dict[str, Any]], tmp_path: Path, backend: str
) -> None:
    said = parsed(*extraction(model, tmp_path / "run", "--backend", backend), "--json")
    assert said["model"]["backend"].startswith(backend.replace("_", "-"))
    expected = extracted[1]
    assert said["counts"] == expected["counts"]
    assert said["norms"]["response_mean"] == pytest.approx(expected["norms"]["response_mean"], rel=1e-3)


# A whole process


def test_progress_and_results_do_not_mix(model: Path, tmp_path: Path) -> None:
    done = process(*extraction(model, tmp_path / "run"), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["responses"] == 40
    assert "extraction rollouts: 40 of 40" in done.stderr
    assert "extraction judging: 40 of 40" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_that_it_goes_on(model: Path, tmp_path: Path, number: int, code: int) -> None:
    out = tmp_path / "run"
    arguments = extraction(model, out, "--samples", "20", "--batch-size", "4")
    running = subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    deadline = time.monotonic() + 120
    while not (out / "rollouts.jsonl").exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(number)
    _, said = running.communicate(timeout=60)
    assert running.returncode == code, said
    assert "stopped; what was finished is saved, and the same command goes on from there" in said
    assert "Traceback" not in said
    assert (out / "rollouts.jsonl").exists()


def test_what_begins_anew_does_not_say_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from persona_lens import cli
    from persona_lens.core import progress

    def stopped(_: list[str]) -> None:
        raise SystemExit(cli.INTERRUPTED)

    monkeypatch.setattr(progress._Kept, "yes", False)  # whatever other tests kept
    monkeypatch.setattr(cli, "app", stopped)
    monkeypatch.setattr(sys, "argv", ["persona-lens", "bake"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == "stopped\n"


def test_errors_of_the_system_are_sentences(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from persona_lens import cli

    def full(arguments: list[str]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a/checkpoint")

    monkeypatch.setattr(cli, "app", full)
    monkeypatch.setattr(sys, "argv", ["persona-lens", "extract"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert said == (
        "error: runs/a/checkpoint cannot be used: No space left on device; make room there, or choose another place\n"
    )


# Plans and servers


def test_a_dry_run_says_what_is_asked_for_and_does_nothing(
    model: Path, extracted: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "planned"
    work = parsed(*extraction(model, out, "--batch-size", "16"), "--dry-run", "--json")["work"]
    assert not out.exists()
    rollouts, judging = work
    # Four questions, five pairs of instructions, two arms; five prompts judge each response, of two pairs and of none.
    assert (rollouts["label"], rollouts["calls"], rollouts["rows"], rollouts["traffic"]) == ("rollouts", 3, 40, None)
    assert (judging["label"], judging["rows"]) == ("judging", 200)
    steer = (
        "steer",
        "sweep",
        str(model),
        str(extracted[0]),
        "--layers",
        "1",
        "--questions",
        "2",
        "--coefficients",
        "1",
    )
    work = parsed(*steer, "--random-directions", "1", *TINY, "--dry-run", "--json")["work"]
    assert [each["rows"] for each in work] == [2 * 3, 2 * 3 * 5]
    assert "judging" in ok(*steer, "--coefficients", "1", *TINY, "--dry-run")


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    from persona_lens_nnsight.library import nnsight

    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", "http://127.0.0.1:9")
    assert "nothing answers at http://127.0.0.1:9; set NDIF_HOST" in refused("remote", "status")
    assert "has no server" in refused("remote", "status", "--backend", "transformers")
    remote = ("extract", str(model), "optimistic", "--backend", "nnsight", "--remote")
    assert "nothing answers at http://127.0.0.1:9" in refused(*remote)
    assert "has no option 'remote'" in refused("extract", str(model), "optimistic", "--remote")


def test_instruction_pairs_are_of_the_likelihood_judge(model: Path, tmp_path: Path) -> None:
    work = parsed(*extraction(model, tmp_path / "planned"), "--judge-pairs", "5", "--dry-run", "--json")["work"]
    assert work[1]["rows"] == 40 * 11
    said = refused(*extraction(model, tmp_path / "planned"), "--judge-pairs", "5", "--judge", "local")
    assert said.startswith("--judge-pairs is for the likelihood judge, and this is 'local'")


def test_the_demonstration_shows_its_report_where_there_is_a_browser(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shown: list[str] = []
    ran: list[bool] = []

    def browser(address: str) -> bool:
        shown.append(address)
        return True

    def no_browser(address: str) -> bool:
        raise webbrowser.Error("could not locate runnable browser")

    def run_demo(folder: Path, settings: Any, progress: Any) -> SimpleNamespace:
        ran.append(settings.quick)
        return SimpleNamespace(summary={"folder": str(folder)})

    monkeypatch.setattr("persona_lens.models.resolve", lambda *_, **__: None)
    monkeypatch.setattr("persona_lens.analysis.demo.run_demo", run_demo)
    monkeypatch.setattr(webbrowser, "open", browser)
    ok("demo", "--json", "--out", str(tmp_path))
    assert shown == []
    assert ok("demo", "--quick", "--open", "--json", "--out", str(tmp_path))
    assert (shown, ran) == ([(tmp_path / "report.html").as_uri()], [False, True])
    for none in (no_browser, lambda address: False):
        monkeypatch.setattr(webbrowser, "open", none)
        result = run("demo", "--open", "--json", "--out", str(tmp_path))
        assert (result.exit_code, "there is no browser here" in result.stderr) == (0, True)
