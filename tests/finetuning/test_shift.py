"""The shift: values that can be computed by hand, unmerged adapters, correlations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from persona_lens.backend import open_backend, wrap_model
from persona_lens.finetuning import FinetuningError, finetune
from persona_lens.finetuning.shift import ShiftSettings, correlated, shift
from persona_lens.models import load
from persona_lens.models.chat import chat_format
from persona_lens.runs import RunError
from persona_lens.runs.settings import RolloutSettings
from persona_lens.steering import ArmSettings
from tests.finetuning.chats import conversations, small, vectors_of
from tests.tiny import D_MODEL, N_LAYERS, tiny_model, tiny_tokenizer

ASKED = ArmSettings(questions=(0, 1, 2), random_directions=0, rollouts=RolloutSettings(4))


def test_a_model_that_was_moved_by_hand_has_moved_so_far(base_folder: Path) -> None:
    """A bias of c v̂ on what the last block writes moves every last token by c at that layer, and nothing before it."""
    base = open_backend("transformers", str(base_folder), dtype="float32", device="cpu")
    loaded = load(str(base_folder), dtype="float32", device="cpu")
    vectors = vectors_of(loaded)
    model: Any = loaded.model
    unit = vectors[2] / vectors[2].norm()
    down = model.model.layers[2].mlp.down_proj
    down.bias = torch.nn.Parameter(1.75 * unit)
    moved = wrap_model(model, loaded.tokenizer)
    found = shift(base, {"moved": lambda: moved}, [vectors], ShiftSettings(scores=False, asked=ASKED)).summary
    shifts = found["traits"]["impolite"]["models"]["moved"]["shift"]
    assert [each["mean"] for each in shifts] == pytest.approx([0, 0, 1.75], abs=1e-4)
    assert found["traits"]["impolite"]["models"]["moved"]["change"] is None


def test_adapters_are_measured_unmerged_as_merged(base_folder: Path, tmp_path: Path) -> None:
    loaded = load(str(base_folder), dtype="float32", device="cpu")
    vectors = vectors_of(loaded)
    place = finetune(loaded, conversations(), tmp_path / "run", small()).model
    from peft import PeftModel

    merged: Any = PeftModel.from_pretrained(load(str(base_folder), dtype="float32", device="cpu").model, str(place))
    merged = merged.merge_and_unload()
    base = open_backend("transformers", str(base_folder), dtype="float32", device="cpu")
    prompts = [
        chat_format(base).encode(None, vectors.trait_definition.evaluation_questions[q]) for q in ASKED.questions
    ]

    def last_tokens(model: Any) -> torch.Tensor:
        rows = []
        for prompt in prompts:
            kept: list[torch.Tensor] = []
            handle = model.model.layers[1].register_forward_hook(
                lambda _, __, out, kept=kept: kept.append((out[0] if isinstance(out, tuple) else out)[0, -1])
            )
            with torch.no_grad():
                model(input_ids=torch.tensor([prompt]))
            handle.remove()
            rows.append(kept[0])
        return torch.stack(rows)

    expected = (last_tokens(merged).mean(0) - last_tokens(loaded.model).mean(0)) @ (vectors[1] / vectors[1].norm())
    opening = {"run": lambda: open_backend("transformers", str(place), dtype="float32", device="cpu")}
    settings = ShiftSettings(layers=(1,), asked=ASKED)
    found = shift(base, opening, [vectors], settings, folder=tmp_path / "shift").summary["traits"]["impolite"]
    assert found["models"]["run"]["shift"][0]["mean"] == pytest.approx(float(expected), abs=1e-4)
    assert found["score"]["n"] == 3
    change = found["models"]["run"]["score"]["mean"] - found["score"]["mean"]
    assert found["models"]["run"]["change"]["mean"] == pytest.approx(change)
    assert found["correlations"] == [{"layer": 1, "value": None, "low": None, "high": None, "n": 1}]
    again = shift(base, opening, [vectors], settings, folder=tmp_path / "shift").summary
    assert again["traits"]["impolite"] == found


def test_a_model_that_was_trained_again_is_another(base_folder: Path, tmp_path: Path) -> None:
    """Under the same name, so that only its weights tell."""
    base = open_backend("transformers", str(base_folder), dtype="float32", device="cpu")
    vectors = vectors_of(load(str(base_folder), dtype="float32", device="cpu"))
    settings = ShiftSettings(layers=(1,), asked=ASKED)
    models = [wrap_model(tiny_model(seed=seed), tiny_tokenizer()) for seed in (1, 2)]
    both = {"a/b": lambda: models[0], "a--b": lambda: models[1]}
    found = shift(base, both, [vectors], settings, folder=tmp_path / "run").summary["traits"]["impolite"]
    scores = [found["models"][name]["score"]["mean"] for name in both]
    assert scores[0] != scores[1]
    with pytest.raises(RunError, match=r"(?s)a/b\.weights: .*--accept-changes"):
        shift(base, {**both, "a/b": lambda: models[1]}, [vectors], settings, folder=tmp_path / "run")


def test_correlation_with_its_interval() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=24)
    found = correlated(x.tolist(), (x + 0.3 * generator.normal(size=24)).tolist())
    assert found["value"] == pytest.approx(np.corrcoef(x, x)[0, 1], abs=0.1)
    low, value, high = (found[name] for name in ("low", "value", "high"))
    assert low is not None and value is not None and high is not None  # noqa: PT018
    assert 0.5 < low < value < high <= 1
    assert correlated([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])["value"] is None  # too few
    assert correlated([1.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0])["value"] is None  # does not vary


def test_what_cannot_be_compared(base_folder: Path) -> None:
    base = open_backend("transformers", str(base_folder), dtype="float32", device="cpu")
    vectors = vectors_of(load(str(base_folder), dtype="float32", device="cpu"))
    with pytest.raises(FinetuningError, match="there are none to compare"):
        shift(base, {}, [vectors])
    other = wrap_model(tiny_model("qwen2"), tiny_tokenizer())
    with pytest.raises(FinetuningError, match="qwen is no finetune of tiny-base: architecture is Qwen2ForCausalLM"):
        shift(base, {"qwen": lambda: other}, [vectors], ShiftSettings(scores=False, asked=ASKED))
    assert (base.info.n_layers, base.info.d_model) == (N_LAYERS, D_MODEL)


def test_the_command(base_folder: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from persona_lens.cli import app

    loaded = load(str(base_folder), dtype="float32", device="cpu")
    vectors_of(loaded).save(tmp_path / "v.safetensors")
    for seed in (0, 1):
        finetune(loaded, conversations(), tmp_path / f"run{seed}", small(seed=seed))
    words = ["shift", str(base_folder), str(tmp_path / "run0"), str(tmp_path / "run1"), str(tmp_path / "v.safetensors"),
             "--questions", "2", "--max-new-tokens", "3", "--dtype", "float32", "--device", "cpu"]  # fmt: skip
    result = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert list(found["traits"]["impolite"]["models"]) == ["run0", "run1"]
    planned = CliRunner().invoke(app, [*words, "--dry-run", "--json"], catch_exceptions=False)
    work = {each["label"]: each for each in json.loads(planned.stdout)["work"]}
    assert work["rollouts impolite"]["rows"] == 2 * 3  # the base and two finetunes of it
    shown = CliRunner().invoke(app, [*words, "--no-scores", "--layers", "1"], catch_exceptions=False)
    assert "shift at layer 1" in shown.stdout
