"""Models that users have already loaded are wrapped, and left exactly as they were."""

from __future__ import annotations

import hashlib
import threading
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from persona_lens.backend import Backend, BackendError, Edit, Read, Sampling, open_backend, wrap_model
from persona_lens.backend.blocks import UnsupportedModelError, find_blocks, weights_digest
from persona_lens.backend.hooked import evaluating
from tests.backends.fixtures import (
    ADAPTERS,
    N_LAYERS,
    PROMPTS,
    TEXT,
    activations,
    assert_close,
    direction,
    greedy,
    matrix,
    tiny_backend,
    tokenizer,
    wrapped_for,
)
from tests.tiny import device, tiny_model

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs")


def state(module: Any) -> dict[str, Any]:
    """Everything about a module that a careless wrapper changes."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode() + value.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return {
        "weights": digest.hexdigest(),
        "training": [m.training for m in module.modules()],
        "hooks": [{name: list(getattr(m, name)) for name in HOOKS} for m in module.modules()],
        "grads": [p.requires_grad for p in module.parameters()],
        "classes": [type(m) for m in module.modules()],
        "forwards": ["forward" in vars(m) for m in module.modules()],
        "generation": (id(module.generation_config), module.generation_config.to_json_string()),
        "config": module.config.to_json_string(),
    }


def use(backend: Backend) -> None:
    """Everything a backend does, a run that fails included."""
    edits = [Edit.add(1, direction()), Edit.ablate(2, direction())]
    backend.forward(TEXT, edits, Read.means(), logprobs=True)
    backend.forward(TEXT, (), Read.means((0,)))
    backend.generate(PROMPTS, Sampling(2, 1.0, seeds=(1, 2, 3)), edits, Read.means())

    class Failing(Edit):
        def plain(self) -> dict[str, Any]:
            return {**super().plain(), "operation": "fail on purpose"}

    with pytest.raises(Exception, match="on purpose"):
        backend.generate(PROMPTS, Sampling(2), [Failing(1, direction(), coefficient=1.0)])


@pytest.mark.module
@pytest.mark.parametrize("training", [False, True])
def test_a_wrapped_object_is_left_exactly_as_it_was(adapter: str, training: bool) -> None:
    tok = tokenizer()
    module: Any = tiny_model()
    held = wrapped_for(adapter, module, tok)
    # Some modules in training and others not, a frozen weight, and a hook of the user's own.
    module.train(training)
    find_blocks(module)[1][1].eval()
    next(module.parameters()).requires_grad_(False)
    calls: list[int] = []
    find_blocks(module)[1][0].register_forward_hook(lambda *_: calls.append(1))
    # A bridge sets up hooks of its own when it first runs.
    if adapter == "transformer_lens":
        with torch.no_grad():
            held(torch.tensor([PROMPTS[0]], device=device))
    before = state(module)
    backend = wrap_model(held, tok)
    assert backend.info.backend.startswith({"transformer_lens": "transformer-lens"}.get(adapter, adapter))
    use(backend)
    del backend
    assert state(module) == before
    assert calls  # the user's hook is still there, and ran
    if adapter == "transformer_lens":
        assert not any(point.fwd_hooks for point in held.hook_dict.values())


@pytest.mark.parametrize("adapter_name", ["transformers", "nnsight"])
def test_the_plain_module_gives_the_same_logits_afterwards(adapter_name: str) -> None:
    module: Any = tiny_model()
    ids = torch.tensor([PROMPTS[0]], device=device)
    with torch.no_grad():
        before = module(input_ids=ids).logits
        use(wrap_model(wrapped_for(adapter_name, module, tokenizer()), tokenizer()))
        assert torch.equal(module(input_ids=ids).logits, before)


def test_a_users_own_hooks_on_a_bridge_stay_and_act() -> None:
    tok = tokenizer()
    bridge = wrapped_for("transformer_lens", tiny_model(), tok)
    plain = activations(wrap_model(bridge, tok))
    bridge.add_hook("blocks.0.hook_out", lambda h, hook: h + 1.0)
    backend = wrap_model(bridge, tok)
    first, second = activations(backend), activations(backend)
    assert_close(first, second)
    assert_close(first[:, 0], plain[:, 0] + 1.0)


@pytest.mark.module
def test_a_model_in_training_gives_the_numbers_of_evaluation(adapter: str) -> None:
    module: Any = tiny_model("gpt2")
    assert module.config.attn_pdrop > 0  # dropout would show
    held = wrapped_for(adapter, module, tokenizer())
    module.train()
    assert_close(activations(wrap_model(held, tokenizer())), activations(tiny_backend("transformers", "gpt2")))


def test_evaluating_restores_after_an_exception() -> None:
    module: Any = tiny_model().train()
    config = module.generation_config

    def fail() -> None:
        assert not any(m.training for m in module.modules())
        raise LookupError

    with pytest.raises(LookupError), evaluating(module):
        fail()
    assert all(m.training for m in module.modules())
    assert module.generation_config is config


@pytest.mark.parametrize(("adapter", "architecture"), matrix())
def test_the_weights_digest_is_that_of_the_reference(adapter: str, architecture: str) -> None:
    info, reference = (tiny_backend(name, architecture).info for name in (adapter, "transformers"))
    assert info.weights is not None
    assert info.weights == reference.weights
    assert info.differences(reference) == []


def test_the_weights_digest_tells_models_apart_and_not_precisions() -> None:
    base = weights_digest(find_blocks(tiny_model())[1])
    assert base != weights_digest(find_blocks(tiny_model(seed=1))[1])
    assert base == weights_digest(find_blocks(tiny_model().bfloat16())[1])
    tuned: Any = tiny_model()
    with torch.no_grad():
        tuned.model.layers[1].mlp.down_proj.weight.add_(0.05)
    assert base != weights_digest(find_blocks(tuned)[1])


def test_info_says_what_runs(adapter: str) -> None:
    info = tiny_backend(adapter).info
    assert (info.n_layers, info.d_model, info.dtype) == (N_LAYERS, 32, "float32")
    assert info.device.partition(":")[0] == device
    assert info.architecture == "LlamaForCausalLM"
    assert not info.remote
    assert info.fingerprint.startswith("sha256:")


@pytest.mark.parametrize(
    ("thing", "name"),
    [("gpt2", "builtins.str"), (None, "builtins.NoneType"), (nn.Linear(2, 2), "torch.nn.modules.linear.Linear")],
)
def test_what_cannot_be_wrapped_is_named(thing: object, name: str) -> None:
    with pytest.raises(BackendError, match=f"no installed backend can wrap a {name}; give a Hugging Face causal"):
        wrap_model(thing, tokenizer())


def test_a_backend_asked_by_name_refuses_what_is_not_its_own() -> None:
    with pytest.raises(BackendError, match=r"backend transformer_lens cannot wrap a transformers\..*LlamaForCausalLM"):
        wrap_model(tiny_model(), tokenizer(), backend="transformer_lens")


def test_a_missing_tokenizer_is_asked_for() -> None:
    with pytest.raises(BackendError, match="does not hold its tokenizer; pass tokenizer="):
        wrap_model(tiny_model())
    bridge = wrapped_for("transformer_lens", tiny_model(), tokenizer())
    bridge.tokenizer = None
    with pytest.raises(BackendError, match="this TransformerBridge holds no tokenizer; pass tokenizer="):
        wrap_model(bridge)
    model = wrapped_for("nnsight", tiny_model(), tokenizer())
    model.tokenizer = None
    with pytest.raises(BackendError, match="this nnsight model holds no tokenizer; pass tokenizer="):
        wrap_model(model)


def test_an_object_that_holds_its_tokenizer_needs_no_other() -> None:
    for adapter in ("transformer_lens", "nnsight"):
        backend = wrap_model(wrapped_for(adapter, tiny_model(), tokenizer()))
        assert backend.tokenizer.encode("a") == list(PROMPTS[1])


def test_an_nnsight_model_without_weights_is_refused(tmp_path: Any) -> None:
    from persona_lens_nnsight.library import nnsight

    tiny_model().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = nnsight.TransformersModel(str(tmp_path), tokenizer=tokenizer(), task="text-generation")
    with pytest.raises(BackendError, match="this nnsight model has no weights yet; load it with dispatch=True"):
        wrap_model(model)


def test_a_bridge_in_compatibility_mode_is_refused() -> None:
    bridge = wrapped_for("transformer_lens", tiny_model(), tokenizer())
    bridge.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(BackendError, match="in compatibility mode, which changes the residual stream; boot it anew"):
        wrap_model(bridge)


def test_encoder_decoders_and_models_without_blocks_are_refused() -> None:
    sizes: dict[str, Any] = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 300}
    with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration is an encoder-decoder"):
        wrap_model(T5ForConditionalGeneration(T5Config(**sizes)), tokenizer())
    config = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=300)
    bert: Any = BertModel(config)  # type: ignore[no-untyped-call]
    bert.config.num_hidden_layers = 5
    with pytest.raises(UnsupportedModelError, match="no list of 5 blocks was found in BertModel"):
        find_blocks(bert)


def test_several_end_tokens_end_rows(adapter: str) -> None:
    """Of the generation configuration's list, each one ends; and the tokenizer's own beside them."""
    plain = tiny_backend("transformers").generate(PROMPTS, Sampling(8)).responses
    ends = [plain[0][2], plain[1][4]]
    module: Any = tiny_model()
    module.generation_config.eos_token_id = ends
    backend = wrap_model(wrapped_for(adapter, module, tokenizer()), tokenizer())
    assert set(ends) | {tokenizer().eos_token_id} <= set(backend.end_ids)
    out = greedy(backend, new=8)
    for row, full in enumerate(plain):
        stop = next((i for i, token in enumerate(full) if token in backend.end_ids), None)
        assert out.responses[row] == full[:stop]
        assert out.ended[row] == (stop is not None)
    assert sum(out.ended) >= 2


def test_a_model_that_knows_no_end_runs_to_the_limit(adapter: str) -> None:
    module: Any = tiny_model()
    module.generation_config.eos_token_id = None
    tok = tokenizer()
    tok.eos_token = None
    tok.chat_template = None
    # A bridge gives the tokenizer that it is booted with an end token, so this one is not that.
    backend = wrap_model(wrapped_for(adapter, module, tokenizer()), tok)
    assert backend.end_ids == ()
    assert [len(r) for r in backend.generate(PROMPTS, Sampling(4)).responses] == [4, 4, 4]


def test_opening_a_folder_gives_the_same_tokenizer_and_ends_in_every_backend(tmp_path: Any) -> None:
    """A library that sets up a tokenizer its own way must not change what a prompt is."""
    tok = tokenizer()
    tok.eos_token = None
    tok.chat_template = None
    module: Any = tiny_model()
    module.config.eos_token_id = module.generation_config.eos_token_id = None
    module.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    opened = [open_backend(adapter, str(tmp_path), dtype="float32", device="cpu") for adapter in ADAPTERS]
    for backend in opened:
        assert backend.end_ids == ()
        assert backend.tokenizer.eos_token is None
        assert backend.tokenizer.encode("a prompt") == tok.encode("a prompt")
        assert backend.tokenizer.padding_side == "left"
        assert backend.info.differences(opened[0].info) == []
        assert backend.info.revision == opened[0].info.revision is not None
    responses = {backend.generate(PROMPTS, Sampling(4)).responses for backend in opened}
    assert len(responses) == 1


def test_two_threads_on_one_backend_do_not_edit_each_other(adapter: str) -> None:
    backend = tiny_backend(adapter)
    strengths = [0.0, 1.0, -2.0, 4.0]
    expected = [greedy(backend, [Edit.add(1, direction(), c)], new=4) for c in strengths]
    results: dict[tuple[int, int], Any] = {}
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for turn in range(4):
                results[index, turn] = greedy(backend, [Edit.add(1, direction(), strengths[index])], new=4)
        except BaseException as error:  # noqa: BLE001 - reported by the test below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(strengths))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(results) == 16
    for (index, _), result in results.items():
        assert result.responses == expected[index].responses
        assert_close(result.reads, expected[index].reads)


def test_a_model_stays_on_the_device_it_was_opened_on(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """nnsight has a pipeline of transformers around the model, which by itself moves it to the first GPU there is."""
    tiny_model().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.pipelines.base.is_torch_cuda_available", lambda: True)
    assert open_backend("nnsight", str(tmp_path), device="cpu").info.device == "cpu"
