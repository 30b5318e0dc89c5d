"""Examples of the README and of the site are run as they stand there, smaller where that changes nothing but the time.

One story runs on the embedded model: the README and `STORY`, but for `NOT_RUN`. The Python of all other pages runs on a
tiny model (`tests/test_guides.py`). Every command line on any page, run or not, is read by the parser of the commands.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import pytest
import torch
import typer
import yaml

from persona_lens.backend import ModelInfo
from persona_lens.cli import app
from persona_lens.steering import load_steering, parse_terms
from persona_lens.traits import Trait, TraitError, parse_trait, resolve_trait
from persona_lens.vectors import PersonaVectors
from tests.pages import README, ROOT, SITE, Block, blocks_of
from tests.tiny import saved_model
from tests.warm import warm_command

DOCS = ROOT / "docs"
MAKING, STEERING = DOCS / "making.md", DOCS / "steering.md"
WITHOUT_PYTHON = ("steering", "judging", "dissection", "monitoring", "screening")  # theirs is in tests/test_guides.py
STORY = [README, MAKING, DOCS / "python.md", DOCS / "concepts.md", *(DOCS / f"{name}.md" for name in WITHOUT_PYTHON)]

# What cannot be run in the story, by its first words; command lines in it are read by the parser all the same.
NOT_RUN = (
    "make demo ",
    ". .venv/bin/activate",
    "pip install -e",
    "persona-lens extract Qwen/Qwen2.5-7B-Instruct evil --samples",
    "persona-lens extract Qwen/Qwen3-8B optimistic --thinking",
    "persona-lens generate Qwen/Qwen3-0.6B ",
    "persona-lens extract Qwen/Qwen2.5-7B-Instruct evil --judge",
    "vllm serve ",
    'persona-lens traits new pedantic --description "Corrects every trifle." --author-model openai:',
    "persona-lens extract smollm2-135m impolite --temperature",
    "persona-lens steer tune ",
    "persona-lens bake ",
    "persona-lens steer compare ",
    "persona-lens bench-steer ",
    "persona-lens vectors fit runs/optimistic-smollm2-135m --without runs/impolite-smollm2-135m \\\n",
    "persona-lens monitor baseline ",
    "persona-lens steer capability ",
    "inspect eval ",
    "persona-lens extract smollm2-135m optimistic --judge-pairs 5 ",
    "python -m benchmarks.judging ",
    "python -m benchmarks.judge_bias ",
    "persona-lens dissect ",
    "persona-lens screen smollm2-135m chats.jsonl ",
)
# What other programs do: the first words of lines that are none of ours.
OTHERS = {"make", "pip", ".", "export", "vllm", "hf", "inspect", "llama-cli", "mkdir", "cp", "for", "done", "python"}

SMALL = "--questions 2 --max-new-tokens 16"
SMALL_SETTINGS = "pl.ExtractionSettings(questions=6, rollouts=pl.RolloutSettings(max_new_tokens=16))"
FEW = "random_directions=1, questions=2, rollouts=pl.RolloutSettings(max_new_tokens=16)"
# Text of an example -> what is run in its place. Only sizes and the model of the parity check may differ.
SUBSTITUTIONS = {
    "extract smollm2-135m optimistic\n": "extract smollm2-135m optimistic --questions 6 --max-new-tokens 16\n",
    "extract smollm2-135m impolite\n": f"extract smollm2-135m impolite {SMALL}\n",
    "--coefficient 2 --out runs/effects\n": "--coefficient 2 --questions 1 --max-new-tokens 16 --random-directions 1"
    " --out runs/effects\n",
    "extract smollm2-135m my-traits/grumpy.yaml\n": f"extract smollm2-135m my-traits/grumpy.yaml {SMALL}\n",
    "--out runs/read\n": "--out runs/read --questions 6\n",
    "--layers 18 --out": f"--coefficients=-2,2 --random-directions 1 {SMALL} --layers 18 --out",
    '"How will my exam go?" --layer 18\n': '"How will my exam go?" --layer 18 --max-new-tokens 8\n',
    'optimistic@all:floor(-40)"\n': 'optimistic@all:floor(-40)" --max-new-tokens 8\n',
    'steering.on(backend), "How will my exam go?")': 'steering.on(backend), "How will my exam go?", max_new_tokens=8)',
    "--out runs/study\n": f"--out runs/study {SMALL} --samples 1 --random-directions 2\n",
    "--label level \\\n": "--label level --limit 48 \\\n",
    "backends check smollm2-135m\n": "backends check tiny\n",
    '"optimistic", "runs/optimistic-smollm2-135m")': '"optimistic", "runs/optimistic-smollm2-135m",'
    f" settings={SMALL_SETTINGS})",
    "edits=[edit])": "edits=[edit], max_new_tokens=8)",
    "coefficients=(-2.0, 2.0))": f"coefficients=(-2.0, 2.0), {FEW})",
    "layers=(18,)), folder": f"layers=(18,), coefficients=(-2.0, 2.0), {FEW}), folder",
    "vectors=found.vectors))": "vectors=found.vectors, max_new_tokens=8))",
}

# Reads the paths of scripts and runs them in one namespace, as a notebook does. Scripts are files, since nnsight reads
# the source of its traces; they run in a process of their own, since nnsight changes it.
SESSION = """
import json, os, sys, traceback
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
names = {"__name__": "__main__"}
for path in map(str.strip, sys.stdin):
    try:
        exec(compile(open(path, encoding="utf-8").read(), path, "exec"), names)
        error = None
    except BaseException:
        error = traceback.format_exc()
    print(json.dumps(error), file=answers, flush=True)
"""


def runnable() -> list[Block]:
    """The story, in its order."""
    told = [
        block
        for path in STORY
        for block in blocks_of(path, "bash", *(() if path.stem in WITHOUT_PYTHON else ("python",)))
    ]
    return [block for block in told if not block.text.startswith(NOT_RUN)]


def reduced(text: str) -> str:
    for shown, run in SUBSTITUTIONS.items():
        text = text.replace(shown, run)
    return text


@pytest.mark.parametrize("path", [README, *SITE], ids=lambda path: path.name)
def test_every_block_has_a_language_that_is_run_or_checked(path: Path) -> None:
    text, known = path.read_text(encoding="utf-8"), ("bash", "python", "yaml", "toml", "bibtex", "text")
    assert len(re.findall(r"^ *```", text, re.MULTILINE)) == 2 * len(blocks_of(path, *known))


@pytest.mark.parametrize("words", NOT_RUN)
def test_what_is_not_run_is_there(words: str) -> None:
    assert any(block.text.startswith(words) for path in STORY for block in blocks_of(path, "bash"))


@pytest.mark.parametrize("path", [README, *SITE], ids=lambda path: path.name)
def test_every_command_line_can_be_read(path: Path) -> None:
    """By the commands themselves: their names, options and values."""
    for block in blocks_of(path, "bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "persona-lens":
                _read(words[1:], block)
            else:
                assert not words or words[0] in OTHERS, f"{block}: {line}"
                if words[:2] == ["python", "-m"]:
                    assert find_spec(words[2]) is not None, f"{block}: {line}"


def _read(words: list[str], block: Block) -> None:
    command: Any = typer.main.get_command(app)
    try:
        context = command.make_context("persona-lens", list(words))
        while hasattr(command, "resolve_command"):
            name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
            context = command.make_context(name, rest, parent=context)
    except typer.Exit:  # --version
        return
    except Exception as error:
        raise AssertionError(f"{block}: {shlex.join(words)}: {error}") from error


@pytest.mark.parametrize("shown", SUBSTITUTIONS)
def test_every_substitution_matches(shown: str) -> None:
    assert any(shown in block.text for block in runnable())


def test_substitutions_only_reduce() -> None:
    """No example is replaced: all that is shown runs, with more options."""
    for block in runnable():
        lines = reduced(block.text).splitlines()
        for line in block.text.splitlines():
            words = re.findall(r"[\w./\[\]-]+", line.replace("check smollm2-135m", "check"))
            assert any(all(word in candidate for word in words) for candidate in lines), line


@pytest.mark.real
@pytest.mark.slow
def test_every_example_runs(tmp_path: Path) -> None:
    saved_model(tmp_path / "tiny")
    environment = _environment(tmp_path)
    with (
        TemporaryDirectory() as short,  # the name of a socket may have a hundred characters
        warm_command(Path(short), environment) as commands,
        _python_session(tmp_path, environment) as run_python,
    ):
        environment["PATH"] = f"{commands}{os.pathsep}{environment['PATH']}"
        for block in runnable():
            if "traits check my-traits/grumpy.yaml" in block.text:
                _write_the_missing_texts(tmp_path / "my-traits/grumpy.yaml")
            if "judge compare" in block.text:
                _fill_in_the_ratings(tmp_path / "ratings.csv")
            where = f"the example at {block}"
            if block.language == "python":
                run_python(block, where)
                continue
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", reduced(block.text)],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{where} fails:\n{done.stdout}\n{done.stderr}"
            assert done.stdout.strip(), f"{where} says nothing"
    assert _listed_files() == _files(tmp_path / "runs/optimistic-smollm2-135m")
    steered = {"run.json", "sweep-rollouts.jsonl", "sweep-judgements.jsonl", "sweep-scores.jsonl", "summary.json"}
    assert _files(tmp_path / "runs/steered") == steered
    assert all(f"`{name}`" in STEERING.read_text(encoding="utf-8") for name in steered)
    assert (tmp_path / "runs/grumpy-smollm2-135m/vectors.safetensors").is_file()


def _environment(folder: Path) -> dict[str, str]:
    (folder / "user-traits").mkdir()
    scripts = Path(sys.executable).parent
    return {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PERSONA_LENS_TRAITS_DIR": str(folder / "user-traits"),
        "TOKENIZERS_PARALLELISM": "false",
    }


class _Session:
    def __init__(self, process: subprocess.Popen[str], folder: Path, log: Path) -> None:
        self.process, self.folder, self.log = process, folder, log

    def __call__(self, block: Block, where: str) -> None:
        script = self.folder / f"{Path(block.document).stem.lower()}_{block.line}.py"
        script.write_text(reduced(block.text), encoding="utf-8")
        print(script, file=_open(self.process.stdin), flush=True)
        answer = _open(self.process.stdout).readline()
        assert answer, f"{where} ends the process:\n{self.log.read_text()}"
        error = json.loads(answer)
        assert error is None, f"{where} fails:\n{error}"


@contextmanager
def _python_session(folder: Path, environment: dict[str, str]) -> Iterator[_Session]:
    log = folder / "python.log"
    with (
        log.open("w") as stream,
        subprocess.Popen(
            [sys.executable, "-c", SESSION],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
        ) as process,
    ):
        try:
            yield _Session(process, folder, log)
            _open(process.stdin).close()
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()


def _open(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def _write_the_missing_texts(file: Path) -> None:
    """What the page tells the reader to do with the template that `traits new` wrote."""
    with pytest.raises(TraitError, match="TODO:"):
        parse_trait(file.read_text(encoding="utf-8"))
    written = Path(resolve_trait("optimistic").path).read_text(encoding="utf-8")
    file.write_text(written.replace("name: optimistic", "name: grumpy"), encoding="utf-8")


def _fill_in_the_ratings(file: Path) -> None:
    """What the page has people do with the table that `judge sample` wrote."""
    with file.open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))
    with file.open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "rating": str(10 * (i % 11))} for i, row in enumerate(rows))


def _listed_files() -> set[str]:
    section = MAKING.read_text(encoding="utf-8").partition("## What a run folder holds\n")[2].partition("\n## ")[0]
    return {name.rstrip("/") for name in re.findall(r"^\| `([\w./]+)` \|", section, re.MULTILINE)}


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != ".lock"}


def test_the_trait_shown_is_right_but_for_its_length() -> None:
    (block,) = blocks_of(MAKING, "yaml")
    required = {name for name, field in Trait.model_fields.items() if field.is_required()}
    assert set(yaml.safe_load(block.text)) == required
    with pytest.raises(TraitError) as caught:
        parse_trait(block.text)
    assert len(caught.value.problems) == 3
    for problem, needed in zip(caught.value.problems, (5, 20, 20), strict=True):
        assert re.fullmatch(f"has 1 items, but exactly {needed} are needed: add {needed - 1}", problem.message)


def test_the_steering_shown_can_be_read(tmp_path: Path) -> None:
    (block,) = blocks_of(STEERING, "yaml")
    named = yaml.safe_load(block.text)["vectors"]
    model = ModelInfo("smollm2-135m", None, "LlamaForCausalLM", 30, 4, None, "float32", "cpu", "transformers")
    for trait, folder in named.items():
        rows = {"response_mean": torch.ones(30, 4)}
        PersonaVectors(trait, model, rows).save(tmp_path / folder / "vectors.safetensors")
    (tmp_path / "steering.yaml").write_text(block.text)
    steering = load_steering(tmp_path / "steering.yaml")
    assert [term.trait for term in steering.terms] == list(named)


def test_all_that_the_notation_is_said_to_have_can_be_read() -> None:
    section = STEERING.read_text(encoding="utf-8").partition("| part | written |")[2].partition("\n\n")[0]
    forms = [form for form in re.findall(r"`([^`]+)`", section) if not form.isalpha()]
    assert len(forms) > 20
    for form in forms:
        head = {"@": f"optimistic{form}:+1", ":": f"optimistic@1{form}"}
        (term,) = parse_terms(head.get(form[0], f"optimistic@1:+1 {form}"))
        assert form in str(term) or form in {"on all"}, form
