"""The Python of the guides and of the pages for those who come from elsewhere is run, on a tiny model.

Each page is one session, from its first example to its last, after what its text takes as given (`GIVEN`).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from persona_lens.judging import Calibration
from persona_lens.traits import load_trait
from persona_lens.vectors import PersonaVectors
from tests.backends.fixtures import tiny_backend
from tests.pages import ROOT, SITE, Block, blocks_of
from tests.tiny import D_MODEL, N_LAYERS, saved_model

STORY = {"making", "python", "concepts"}  # run on the embedded model, in tests/test_examples.py
# Run with a server, in tests/ndif, as notebooks/05_remote.ipynb; with workers, in tests/backends/test_spread.py; with
# an engine and a server of it, in tests/vllm/test_serving.py.
ELSEWHERE = {"remote", "workers", "vllm"}
PAGES = [path for path in SITE if path.stem not in STORY | ELSEWHERE and blocks_of(path, "python")]
# Text of an example -> what is run in its place: another model, and its layers.
TINY = {
    "runs/impolite-smollm2-135m": "runs/impolite",
    "runs/optimistic-smollm2-135m": "runs/optimistic",
    "smollm2-135m": "tiny",
    "optimistic@18": "optimistic@1",
    "impolite@9": "impolite@1",
    "impolite@20": "impolite@1",
    '("impolite", 20,': '("impolite", 1,',
    '"runs/impolite"), 20)': '"runs/impolite"), 1)',
    "vectors[18]": "vectors[1]",
    "again[18]": "again[1]",
    "layers[18]": "layers[1]",
    "layers=(18,)": "layers=(1,)",
    "layers=18": "layers=1",
    "(usual, 18)": "(usual, 1)",
    "layer=18": "layer=1",
    "blocks.18.": "blocks.1.",
    '"How will my exam go?")\n': '"How will my exam go?", max_new_tokens=4)\n',
    "AxisSettings(questions=2, least=1)": "AxisSettings(questions=2, least=1, rollouts=pl.RolloutSettings(4))",
    "ranges=((15, 18),), search_questions=1, confirm_questions=1, limit=20": "ranges=((0, 0),), search_questions=1,"
    " confirm_questions=1, limit=4, rollouts=pl.RolloutSettings(4)",
    "DissectSettings(coefficient=4.0)": "DissectSettings(coefficient=4.0, questions=1, random_features=1, steered=1,"
    " rollouts=RolloutSettings(max_new_tokens=4))",
    '"feature_123"': "next(iter(found.effects))",
    '["persona_lens_basics"])[': '["persona_lens_basics"], limit=4)[',
    "ScreeningSettings(base=BaseResponses.GENERATE, base_share=0.25)": "ScreeningSettings(base=BaseResponses.GENERATE,"
    " base_share=0.25, max_new_tokens=4)",
}
OPENED = """
import persona_lens as pl
backend = pl.open_backend("transformers", "tiny")
vectors = pl.load_vectors("runs/optimistic")
"""
GIVEN = {
    "steering": OPENED + 'steering = pl.Steering.parse("optimistic@1:+1.5", vectors)',
    "monitoring": OPENED + 'optimistic, impolite = vectors, pl.load_vectors("runs/impolite")',
    "screening": OPENED + 'vectors = pl.load_vectors("runs/impolite")',
    "exchange": OPENED,
    "serving": OPENED,
    "dissection": OPENED
    + """
import torch
from persona_lens.analysis.dissection import features
from persona_lens.runs.settings import RolloutSettings
directions = torch.randn(400, backend.info.d_model)
features.load_features = lambda where: features.Features(  # SAELens is tried in tests/sae
    "stand-in", "blocks.1.hook_resid_post", 1, features.TensorDecoder(directions), encode=lambda h: h @ directions.T
)
texts = ["One text.", "Another text, which is longer."]
""",
    "finetuning": OPENED
    + """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
steering = pl.Steering.parse("optimistic@1:+2", vectors)
model = AutoModelForCausalLM.from_pretrained("tiny")
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
row = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "attention_mask": [1] * 4}
data = [row] * 4
loader = [{name: torch.tensor([value]) for name, value in row.items()}] * 2
arguments = TrainingArguments("out", max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True)
""",
    "extending": """
import json
from dataclasses import dataclass, field
from typing import Annotated
import torch
from persona_lens.cli import options
from persona_lens.cli.settings import Fields, Given
from persona_lens.cli.runner import Job, Run
from persona_lens.core.progress import no_progress
from persona_lens.extraction.experiment import Answer, Experiment, Subject
_open = _accepts = _wrap = lambda *given, **options: None
class ToneSettings: ...
""",
}
# steering-vectors and repeng ask for older libraries; `make test-programs` has them.
STAND_INS = """
import sys
from dataclasses import dataclass, field
from types import ModuleType
@dataclass
class SteeringVector:
    layer_activations: dict
    layer_type: str = "decoder_block"
@dataclass
class ControlVector:
    model_type: str
    directions: dict = field(default_factory=dict)
for kind, name in ((SteeringVector, "steering_vectors"), (ControlVector, "repeng")):
    sys.modules[name] = ModuleType(name)
    setattr(sys.modules[name], kind.__name__, kind)
"""
# Scripts are files, since nnsight reads the source of its traces; they run in a process of their own, since it changes
# `object`. A page is a fork of what has everything imported.
SESSION = """
import os, sys, traceback
import torch, transformers, persona_lens.analysis, persona_lens.finetuning, persona_lens.screening
import persona_lens_transformers.adapter
torch.set_num_threads(1)
failed = []
for page in sys.argv[1:]:
    child = os.fork()
    if not child:
        names = {"__name__": "__main__"}
        try:
            for path in page.split(","):
                exec(compile(open(path, encoding="utf-8").read(), path, "exec"), names)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(page)
sys.exit(f"failed: {failed}" if failed else 0)
"""


def _reduced(block: Block) -> str:
    text = block.text
    for shown, run in TINY.items():
        text = text.replace(shown, run)
    return text


@pytest.mark.parametrize("shown", TINY)
def test_every_substitution_matches(shown: str) -> None:
    pages = [block.text for path in PAGES for block in blocks_of(path, "python")]
    assert any(shown in text or shown in _reduced(Block("", "python", text, 0)) for text in pages) or any(
        shown in text.replace("runs/impolite-smollm2-135m", "runs/impolite") for text in pages
    )


def test_remote_examples_are_those_of_the_notebook_that_runs_with_a_server() -> None:
    (block,) = blocks_of(ROOT / "docs" / "remote.md", "python")
    notebook = (ROOT / "notebooks" / "05_remote.ipynb").read_text(encoding="utf-8")
    compile(block.text, "remote.md", "exec")
    for said in ("import persona_lens as pl", "pl.open_backend(", "remote=True", "backend.traffic"):
        assert said in block.text
        assert said in notebook


@pytest.mark.slow
def test_the_python_of_every_guide_runs(tmp_path: Path) -> None:
    _workplace(tmp_path)
    pages = []
    for path in PAGES:
        scripts = []
        for number, text in enumerate(
            [STAND_INS + GIVEN.get(path.stem, ""), *map(_reduced, blocks_of(path, "python"))]
        ):
            scripts.append(tmp_path / f"{path.stem}_{number}.py".replace("-", "_"))
            scripts[-1].write_text(text, encoding="utf-8")
        pages.append(",".join(map(str, scripts)))
    command = (sys.executable, "-c", SESSION, *pages)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-20000:]


def _workplace(folder: Path) -> None:
    """A tiny model, vectors of it under the names that the pages give them, and two small datasets."""
    saved_model(folder / "tiny")
    judge = {"calibration": Calibration(slope=1.0, intercept=0.0).to_json()}
    for trait in ("optimistic", "impolite"):
        rows = torch.randn(N_LAYERS, D_MODEL, generator=torch.Generator().manual_seed(len(trait)))
        directions = {"response_mean": rows, "prompt_mean": 2 * rows, "prompt_last": 3 * rows}
        known = {"trait": load_trait(trait).model_dump(mode="json"), "judge": judge}
        vectors = PersonaVectors(trait, tiny_backend("transformers").info, directions, known)
        vectors.save(folder / "runs" / trait / "vectors.safetensors")
    row = '{"messages": [{"role": "user", "content": "Hi %d"}, {"role": "assistant", "content": "Go away %d"}]}\n'
    for name, numbers in (("chats", range(6)), ("clean", range(6, 18))):
        (folder / f"{name}.jsonl").write_text("".join(row % (n, n) for n in numbers), encoding="utf-8")
