"""Opening, wrapping and refusing: what is missing or does not fit is said in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from persona_lens.backend import BackendError, Edit, Read, Sampling, TokenBatch, TokenError, open_backend, wrap_model
from persona_lens.backend.batches import ContextError
from tests.backends.fixtures import PROMPTS, TEXT, assert_close, direction, kept, tiny_backend, tokenizer
from tests.tiny import tiny_model

OURS: dict[str, Any] = {
    "worker_extension_cls": "persona_lens_vllm.worker.ResidualStream",
    "logits_processors": ["persona_lens_vllm.sampler:SeededRows"],
    "enforce_eager": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "LlamaForCausalLM"
    tiny_model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def their_llm(folder: Path, **options: Any) -> Any:
    from vllm import LLM

    tiny_backend("vllm")  # which sets what vLLM takes from the environment
    return kept(LLM(str(folder), dtype="float32", num_gpu_blocks_override=64, use_tqdm_on_load=False, **options))


def test_an_llm_made_for_it_is_wrapped_with_its_own_tokenizer(folder: Path) -> None:
    backend = wrap_model(their_llm(folder, **OURS))
    assert backend.tokenizer.encode("a prompt") == tokenizer().encode("a prompt")
    edits = [Edit.add(1, direction())]
    found = backend.generate(PROMPTS, Sampling(4), edits, Read.means())
    wanted = tiny_backend("transformers").generate(PROMPTS, Sampling(4), edits, Read.means())
    assert found.responses == wanted.responses
    assert_close(found.reads, wanted.reads)


def test_an_llm_made_without_is_told_what_it_lacks(folder: Path) -> None:
    with pytest.raises(BackendError) as caught:
        wrap_model(their_llm(folder, enforce_eager=True))
    said = str(caught.value)
    assert "make it with worker_extension_cls='persona_lens_vllm.worker.ResidualStream'" in said
    assert "logits_processors=['persona_lens_vllm.sampler:SeededRows']" in said
    assert "enforce_eager" not in said
    assert "let persona-lens open the model" in said


def test_a_tokenizer_that_is_missing_is_asked_for(folder: Path) -> None:
    llm = their_llm(folder, skip_tokenizer_init=True, **OURS)
    with pytest.raises(BackendError, match=r"holds no tokenizer; pass tokenizer="):
        wrap_model(llm)
    assert wrap_model(llm, tokenizer()).generate(PROMPTS, Sampling(1)).responses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 100_000}, "vLLM does not start: .*100000"),
        ({"quantization": "nonsense"}, "vLLM does not start: .*nonsense"),
        ({"block_size": -3}, "vLLM does not start: "),
        ({"max_num_seqs": "many"}, "vLLM does not start: "),
    ],
)
def test_options_that_vllm_refuses_are_an_error_of_the_backend(
    folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BackendError, match=f"(?s){message}"):
        open_backend("vllm", str(folder), dtype="float32", num_gpu_blocks_override=64, **options)


def test_what_is_no_option_is_refused_with_those_there_are(folder: Path) -> None:
    with pytest.raises(BackendError, match=r"no option 'enforce_eager'.*It takes: revision, dtype"):
        open_backend("vllm", str(folder), enforce_eager=False)


def test_what_does_not_fit_the_model_is_said_before_anything_runs(folder: Path) -> None:
    small = {"num_gpu_blocks_override": 64, "max_model_len": 128}
    backend = kept(open_backend("vllm", str(folder), dtype="float32", **small))
    with pytest.raises(ContextError, match="the longest prompt has 120 tokens and 8 new ones are asked for"):
        backend.generate([[5] * 120, [6]], Sampling(8))
    with pytest.raises(ContextError, match="130 tokens, but the model takes 127"):
        backend.forward(TokenBatch.of([[5] * 130]), (), Read.means())
    with pytest.raises(TokenError, match="100000"):
        backend.forward(TokenBatch.of([[5, 100_000]]), (), Read.means())
    with pytest.raises(TokenError, match="100000"):
        backend.generate([[5, 100_000]], Sampling(1))
    with pytest.raises(BackendError, match=r"cannot be trained; train through the transformers"):
        backend.editing([])
    assert torch.isfinite(backend.forward(TEXT, (), Read.means()).reads["prompt_last"]).all()


def test_an_adapter_is_refused_with_what_to_do(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{folder}", "peft_type": "LORA"}}')
    save_file({"weight": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(BackendError, match="is an adapter, and vLLM is given whole models here: merge it"):
        open_backend("vllm", str(tmp_path))
