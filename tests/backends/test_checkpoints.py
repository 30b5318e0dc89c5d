"""A folder's files tell which model they hold, as the loaded module would, and never tell of another one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from persona_lens.backend import open_backend
from persona_lens.backend.blocks import find_blocks, recorded_base, weights_digest
from persona_lens.backend.checkpoint import INDEX, WHOLE, checkpoint_digest
from persona_lens.core.files import CONFIG
from persona_lens.models import resolve
from tests.tiny import ARCHITECTURES, tiny_model

PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)
LOADER: Any = AutoModelForCausalLM
SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# Experts under other names, tensors with a prefix that the module has not, and layers that are tied to one another.
OTHERS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_key_value_heads": 2, "intermediate_size": 16, "num_local_experts": 11},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "granitemoe": {"num_key_value_heads": 2, "intermediate_size": 16, "num_local_experts": 3},
    "gemma3": {
        "text_config": {**SIZES, "head_dim": 8, "num_key_value_heads": 2, "intermediate_size": 64},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
    },
}


def made(architecture: str) -> Any:
    """A random model of an architecture."""
    if architecture not in OTHERS:
        return tiny_model(architecture)
    extra = OTHERS[architecture]
    torch.manual_seed(0)
    config: Any = AutoConfig.for_model(architecture, **(extra if "text_config" in extra else {**SIZES, **extra}))
    return LOADER.from_config(config, dtype=torch.float32)


def loaded_digest(folder: Path, dtype: torch.dtype) -> str | None:
    """The digest of the module that transformers loads."""
    return weights_digest(find_blocks(LOADER.from_pretrained(folder, dtype=dtype))[1])


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *OTHERS, "gpt_oss", "llama4_text", "mpt", "qwen3_5_text"])
def test_the_files_have_the_digest_of_the_module(architecture: str, tmp_path: Path) -> None:
    model = made(architecture)
    for stored, size in zip(PRECISIONS, ("5GB", "20KB", "5GB"), strict=True):
        folder = tmp_path / str(stored)
        model.to(stored).save_pretrained(folder, max_shard_size=size)
        assert (folder / INDEX).exists() == (size == "20KB")
        assert (found := checkpoint_digest(folder)) is not None
        assert found == checkpoint_digest(folder, stored) == loaded_digest(folder, stored)


@pytest.mark.parametrize("stored", PRECISIONS)
@pytest.mark.parametrize("running", PRECISIONS)
def test_a_model_may_run_in_another_precision(stored: torch.dtype, running: torch.dtype, tmp_path: Path) -> None:
    tiny_model("qwen2_moe").to(stored).save_pretrained(tmp_path)  # type: ignore[arg-type]
    assert checkpoint_digest(tmp_path, running) == loaded_digest(tmp_path, running)


def test_shards_are_found_without_an_index(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    found = checkpoint_digest(tmp_path)
    (tmp_path / INDEX).unlink()
    assert found is not None
    assert checkpoint_digest(tmp_path) == found


@pytest.mark.parametrize("architecture", ["llama", "qwen2_moe"])
def test_another_weight_makes_another_digest(architecture: str, tmp_path: Path) -> None:
    tiny_model(architecture).save_pretrained(tmp_path)
    before = checkpoint_digest(tmp_path)
    tensors = load_file(tmp_path / WHOLE)
    name = next(name for name in sorted(tensors) if "layers.1" in name and "down_proj" in name)
    for place, seen in ((0, True), (1, False)):  # the first value of a parameter is among those sampled
        changed = {**tensors, name: tensors[name].clone()}
        changed[name].view(-1)[place] += 1
        save_file(changed, tmp_path / WHOLE, {"format": "pt"})
        found = checkpoint_digest(tmp_path)
        assert found == loaded_digest(tmp_path, torch.float32)
        assert (found != before) == seen


def cut(folder: Path) -> None:
    (folder / WHOLE).write_bytes((folder / WHOLE).read_bytes()[:-100])


def without(part: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WHOLE)
        left = {name: tensor for name, tensor in tensors.items() if part not in name}
        assert len(left) < len(tensors)
        save_file(left, folder / WHOLE, {"format": "pt"})

    return change


def of_other_sizes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "moe_intermediate_size": 8}))


def in_whole_numbers(folder: Path) -> None:
    tensors = {name: tensor.to(torch.int8) for name, tensor in load_file(folder / WHOLE).items()}
    save_file(tensors, folder / WHOLE, {"format": "pt"})


def twice(folder: Path) -> None:
    (folder / WHOLE).rename(folder / "one.safetensors")
    (folder / "two.safetensors").write_bytes((folder / "one.safetensors").read_bytes())


def quantised(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))


def indexed(weight_map: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / WHOLE).rename(folder / "model-1.safetensors")
        (folder / INDEX).write_text(json.dumps(weight_map))

    return change


DAMAGES: dict[str, Callable[[Path], object]] = {
    "nothing there": lambda folder: [*map(Path.unlink, folder.iterdir())],
    "no weights": lambda folder: (folder / WHOLE).unlink(),
    "no configuration": lambda folder: (folder / "config.json").unlink(),
    "a configuration of something else": lambda folder: (folder / "config.json").write_text('{"model_type": "what"}'),
    "a configuration that is a list": lambda folder: (folder / "config.json").write_text("[]"),
    "an adapter": lambda folder: (folder / "adapter_config.json").write_text("{}"),
    "an empty file": lambda folder: (folder / WHOLE).write_bytes(b""),
    "a header without end": lambda folder: (folder / WHOLE).write_bytes(b"\xff" * 64),
    "text": lambda folder: (folder / WHOLE).write_text("version https://git-lfs.github.com/spec/v1"),
    "cut short": cut,
    "an expert is missing": without("experts.2.up_proj"),
    "a parameter is missing": without("layers.1.self_attn.o_proj"),
    "of other sizes": of_other_sizes,
    "in whole numbers": in_whole_numbers,
    "all tensors twice": twice,
    "quantised": quantised,
    "an index that is a list": indexed([]),
    "an index of another folder's files": indexed({"weight_map": {"a": "../model-1.safetensors"}}),
    "an index of numbers": indexed({"weight_map": {"a": 1}}),
    "an index of files that are missing": indexed({"weight_map": {"a": "model-2.safetensors"}}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_the_files_do_not_say_is_not_known(damage: str, tmp_path: Path) -> None:
    tiny_model("qwen2_moe").save_pretrained(tmp_path)
    assert checkpoint_digest(tmp_path) is not None
    DAMAGES[damage](tmp_path)
    assert checkpoint_digest(tmp_path) is None


def test_a_finetuned_folder_says_what_it_came_from(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    assert recorded_base(model) is None
    (tmp_path / CONFIG).write_text(json.dumps({"kind": "finetune", "model": {"weights": "sha256:0:0"}}))
    assert recorded_base(model) == "sha256:0:0"


@pytest.mark.real
def test_the_embedded_model_has_the_digest_that_the_reference_gives() -> None:
    backend = open_backend("transformers", "smollm2-135m", dtype="bfloat16", device="cpu")
    assert checkpoint_digest(Path(resolve("smollm2-135m").location), torch.bfloat16) == backend.info.weights
