"""Reads: what they bring, in which shape, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from persona_lens.backend import Backend, Edit, Operation, Read, ReadError, ReadKind, Sampling, TokenBatch, TokenError
from persona_lens.backend.intervention import Intervention
from persona_lens.backend.tokens import cut_responses, pad_left
from tests.backends.fixtures import (
    ALL_ACTIVATIONS,
    D_MODEL,
    N_LAYERS,
    PROMPTS,
    TEXT,
    activations,
    assert_close,
    direction,
    greedy,
)

pytestmark = pytest.mark.cuda

rows = st.lists(
    st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.lists(st.integers(1, 9), max_size=4)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(rows, st.integers(0, 9))
def test_masks_are_counted_never_recognised_by_the_pad_id(batch: list[tuple[list[int], list[int]]], pad: int) -> None:
    text = TokenBatch.of([p for p, _ in batch], [r for _, r in batch])
    padded = pad_left(text, pad)
    for row, (prompt, response) in enumerate(batch):
        assert padded.ids[row][padded.prompt[row]].tolist() == prompt
        assert padded.ids[row][padded.response[row]].tolist() == response
        assert padded.ids[row][~padded.attention[row]].tolist() == [pad] * (max(text.lengths) - text.lengths[row])
        assert padded.position_ids[row][padded.attention[row]].tolist() == list(range(text.lengths[row]))
    assert bool(padded.attention[:, -1].all())  # on the left


@settings(max_examples=60, deadline=None)
@given(rows, st.integers(0, 2**31))
def test_the_means_are_those_of_each_row_alone(batch: list[tuple[list[int], list[int]]], seed: int) -> None:
    """Of random residuals with NaN at padding, taken in one pass."""
    text = TokenBatch.of([p for p, _ in batch], [r for _, r in batch])
    padded = pad_left(text, 0)
    h = torch.randn(*padded.ids.shape, 4, generator=torch.Generator().manual_seed(seed))
    h[~padded.attention] = torch.nan
    intervention = Intervention(padded, (), Read.means(), n_layers=1)
    intervention.begin_pass(padded.ids)
    intervention.block(0, h)
    results = intervention.results()
    for row, (prompt, response) in enumerate(batch):
        tokens = h[row, -len(prompt) - len(response) :]
        head = tokens[: len(prompt)]
        assert_close(results["prompt_mean"][row, 0], head[1:].mean(dim=0))  # the first token is an attention sink
        assert_close(results["prompt_last"][row, 0], head[-1])
        if response:
            assert_close(results["response_mean"][row, 0], tokens[len(prompt) :].mean(dim=0))
        else:
            assert results["response_mean"][row, 0].isnan().all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), min_size=6, max_size=6), min_size=1, max_size=3), st.integers(1, 6))
def test_responses_are_cut_at_the_first_end_or_the_limit(generated: list[list[int]], limit: int) -> None:
    responses, ended = cut_responses(torch.tensor(generated), (4, 5), limit)
    for row, response, end in zip(generated, responses, ended, strict=True):
        assert list(response) == row[: len(response)]
        assert not {4, 5} & set(response)
        assert end == (len(response) < limit)
        assert not end or row[len(response)] in (4, 5)


def test_shapes_and_precision(backend: Backend) -> None:
    width = max(TEXT.lengths)
    reads = (*Read.means((0, 2)), Read.projections(torch.stack([direction(), direction(1)]), (1,)), ALL_ACTIVATIONS)
    results = backend.forward(TEXT, (), reads).reads
    assert {name: tuple(value.shape) for name, value in results.items()} == {
        "response_mean": (3, 2, D_MODEL),
        "prompt_mean": (3, 2, D_MODEL),
        "prompt_last": (3, 2, D_MODEL),
        "projections": (3, 1, width, 2),
        "activations": (3, N_LAYERS, width, D_MODEL),
    }
    assert all(value.dtype == torch.float32 and value.device.type == "cpu" for value in results.values())
    for row, length in enumerate(TEXT.lengths):
        assert results["activations"][row, :, : width - length].isnan().all()
        assert results["activations"][row, :, width - length :].isfinite().all()


def test_means_are_means_of_the_activations(backend: Backend) -> None:
    results = backend.forward(TEXT, (), (*Read.means(), ALL_ACTIVATIONS)).reads
    every = results["activations"]
    for row, response in enumerate(TEXT.responses):
        tokens, n = every[row, :, -TEXT.lengths[row] :], len(response)
        assert_close(results["response_mean"][row], tokens[:, -n:].mean(dim=1))
        assert_close(results["prompt_mean"][row], tokens[:, 1:-n].mean(dim=1))  # but for the first, a sink
        assert_close(results["prompt_last"][row], tokens[:, -n - 1])


def test_the_norm_is_the_mean_length_over_the_response_as_text_and_while_generating(backend: Backend) -> None:
    reads = (Read(ReadKind.RESPONSE_NORM), ALL_ACTIVATIONS)
    generated = backend.generate(PROMPTS, Sampling(5), reads=reads).reads
    for results, responses in (
        (backend.forward(TEXT, (), reads).reads, TEXT.responses),
        (generated, backend.generate(PROMPTS, Sampling(5)).responses),
    ):
        assert results["response_norm"].shape == (3, N_LAYERS)
        for row, response in enumerate(responses):
            norms = results["activations"][row, :, -len(response) :].norm(dim=-1)
            assert_close(results["response_norm"][row], norms.mean(dim=1))


def test_one_layer_equals_that_layer_of_all(backend: Backend) -> None:
    every = backend.forward(TEXT, (), Read.means()).reads
    for layer in range(N_LAYERS):
        one = backend.forward(TEXT, (), Read.means((layer,))).reads
        assert_close(one, {name: value[:, layer : layer + 1] for name, value in every.items()})


def test_a_row_without_a_response_has_no_mean_and_the_others_do(backend: Backend) -> None:
    text = TokenBatch.of(PROMPTS, [TEXT.responses[0], (), TEXT.responses[2]])
    result = backend.forward(text, (), Read.means(), logprobs=True)
    assert result.reads["response_mean"][1].isnan().all()
    assert result.reads["response_mean"][[0, 2]].isfinite().all()
    assert result.reads["prompt_mean"][[0, 2]].isfinite().all()
    assert result.logprobs is not None
    assert [len(row) for row in result.logprobs] == [len(r) for r in text.responses]


def test_reads_see_the_edit_of_their_own_layer(backend: Backend) -> None:
    v = direction()
    edit = Edit(1, v, Operation.ABLATE, sinks=True)
    read = backend.forward(TEXT, [edit], [Read.projections(v.unsqueeze(0), (1,))]).reads["projections"]
    assert float(read.nan_to_num().abs().max()) < 1e-4


def test_directions_may_differ_by_layer(backend: Backend) -> None:
    each = torch.stack([direction(i).unsqueeze(0) for i in range(2)])
    result = backend.forward(TEXT, (), [Read.projections(each, (0, 2)), ALL_ACTIVATIONS]).reads
    for index, layer in enumerate((0, 2)):
        unit = each[index, 0] / each[index, 0].norm()
        assert_close(result["projections"][:, index, :, 0], result["activations"][:, layer] @ unit)


def test_logprobs_are_those_of_the_softmax(backend: Backend) -> None:
    """Against the sum over the whole vocabulary, put together from single continuations."""
    prompt = PROMPTS[1]
    vocabulary = range(len(backend.tokenizer))
    every = TokenBatch.of([prompt] * len(vocabulary), [(token,) for token in vocabulary])
    logprobs = backend.forward(every, logprobs=True).logprobs
    assert logprobs is not None
    values = torch.cat(logprobs)
    assert_close(values.exp().sum(), torch.tensor(1.0))
    first = backend.generate([prompt], Sampling(1)).responses[0][0]
    assert int(values.argmax()) == first


def test_logprobs_do_not_depend_on_the_batch_and_feel_edits(backend: Backend) -> None:
    edits = [Edit.add(1, direction(), torch.tensor([0.0, 1.0, 2.0]))]
    batch = backend.forward(TEXT, edits, logprobs=True).logprobs
    plain = backend.forward(TEXT, logprobs=True).logprobs
    assert batch is not None
    assert plain is not None
    for row in range(3):
        alone = backend.forward(TEXT.rows(row, row + 1), [edits[0].rows(row, row + 1)], logprobs=True).logprobs
        assert alone is not None
        assert_close(batch[row], alone[0])
    assert_close(batch[0], plain[0])
    assert (batch[2] - plain[2]).abs().max() > 0.1


def test_generating_without_reads_gives_the_same_tokens(backend: Backend) -> None:
    assert backend.generate(PROMPTS, Sampling(6)).responses == greedy(backend, new=6).responses


def test_one_new_token_is_read_too(backend: Backend) -> None:
    out = greedy(backend, new=1)
    text = TokenBatch.of(PROMPTS, out.responses)
    assert [len(response) for response in out.responses] == [1, 1, 1]
    assert_close(out.reads["activations"], activations(backend, text))


INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "no directions": ({"kind": ReadKind.PROJECTIONS}, "projections needs directions"),
    "directions in vain": (
        {"kind": ReadKind.PROMPT_MEAN, "directions": torch.ones(1, 4)},
        "prompt_mean takes no directions",
    ),
    "no layers": ({"layers": ()}, r"layers must be ascending, without repeats, from 0: got \(\)"),
    "descending": ({"layers": (2, 1)}, r"layers must be ascending.*got \(2, 1\)"),
    "twice": ({"layers": (1, 1)}, r"layers must be ascending.*got \(1, 1\)"),
    "negative": ({"layers": (-1, 1)}, r"layers must be ascending.*got \(-1, 1\)"),
}


@pytest.mark.parametrize(("parts", "message"), INVALID.values(), ids=INVALID.keys())
def test_a_read_that_cannot_mean_anything_is_refused(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ReadError, match=message):
        Read(**{"kind": ReadKind.PROMPT_MEAN, **parts})


UNFIT: dict[str, tuple[list[Read], str]] = {
    "layer": ([Read(ReadKind.PROMPT_MEAN, (0, 3))], "layer 3 does not exist: the model has layers 0 to 2"),
    "twice": (
        [Read(ReadKind.PROMPT_MEAN, (0,)), Read(ReadKind.PROMPT_MEAN, (1,))],
        "prompt_mean is asked for twice; put all its layers into one read",
    ),
    "size": ([Read.projections(torch.ones(2, 5))], r"directions must be \[k, 32\] or \[3, k, 32\].*got \[2, 5\]"),
    "other layers": (
        [Read.projections(torch.ones(2, 1, D_MODEL), (1,))],
        r"directions must be \[k, 32\] or \[1, k, 32\] for 1 layers, got \[2, 1, 32\]",
    ),
    "zero": ([Read.projections(torch.zeros(1, D_MODEL))], "directions must be finite and not zero"),
    "nan": ([Read.projections(torch.full((1, D_MODEL), torch.nan))], "directions must be finite and not zero"),
}


@pytest.mark.parametrize(("reads", "message"), UNFIT.values(), ids=UNFIT.keys())
def test_a_read_that_does_not_fit_the_model_is_refused(adapter: str, reads: list[Read], message: str) -> None:
    from tests.backends.fixtures import tiny_backend

    backend = tiny_backend(adapter)
    with pytest.raises(ReadError, match=message):
        backend.forward(TEXT, (), reads)
    with pytest.raises(ReadError, match=message):
        backend.generate(PROMPTS, Sampling(2), (), reads)


@pytest.mark.usefixtures("unchecked")
def test_one_direction_has_to_stand_in_a_list(adapter: str) -> None:
    from tests.backends.fixtures import tiny_backend

    with pytest.raises(ReadError, match=r"got \[32\]"):
        tiny_backend(adapter).forward(TEXT, (), [Read.projections(direction())])


BATCHES: dict[str, tuple[Any, str]] = {
    "no rows": (lambda: TokenBatch.of([]), "the batch has no rows"),
    "unlike": (lambda: TokenBatch.of([(1,)], [(1,), (2,)]), "1 prompts but 2 responses"),
    "empty prompt": (lambda: TokenBatch.of([(1,), ()]), "row 1 has an empty prompt"),
    "no tokens": (lambda: Sampling(0), "max_new_tokens must be at least 1, got 0"),
    "cold": (lambda: Sampling(1, -0.5), r"temperature must be 0 \(greedy\) or more, got -0.5"),
    "hot": (lambda: Sampling(1, float("inf")), "temperature must be 0"),
    "top_p 0": (lambda: Sampling(1, 1.0, 0.0), "top_p must be above 0 and at most 1, got 0.0"),
    "top_p 2": (lambda: Sampling(1, 1.0, 2.0), "top_p must be above 0 and at most 1, got 2.0"),
    "no seeds": (lambda: Sampling(1, 1.0), "sampling at a temperature needs seeds, one for each row"),
    "seeds in vain": (lambda: Sampling(1, seeds=(1,)), "seeds and top_p do nothing at temperature 0"),
    "negative seed": (lambda: Sampling(1, 1.0, seeds=(-1,)), "seeds must be whole numbers from 0 to 2"),
    "large seed": (lambda: Sampling(1, 1.0, seeds=(2**63,)), "seeds must be whole numbers from 0 to 2"),
}


@pytest.mark.parametrize(("make", "message"), BATCHES.values(), ids=BATCHES.keys())
def test_tokens_and_settings_that_cannot_be_used_are_refused(make: Any, message: str) -> None:
    with pytest.raises(TokenError, match=message):
        make()


def test_seeds_of_another_number_than_the_rows_are_refused(backend: Backend) -> None:
    with pytest.raises(TokenError, match="2 seeds for 3 prompts; give one for each"):
        backend.generate(PROMPTS, Sampling(1, 1.0, seeds=(1, 2)))


def test_an_unreached_layer_is_an_error_and_not_a_zero() -> None:
    padded = pad_left(TEXT, 0)
    intervention = Intervention(padded, (), Read.means((0, 1)), n_layers=2)
    intervention.begin_pass(padded.ids)
    intervention.block(0, torch.zeros(*padded.ids.shape, 4))
    with pytest.raises(RuntimeError, match="layers that were to be read or edited never ran"):
        intervention.results()


def test_sums_of_many_tokens_stay_exact_in_float32() -> None:
    """25000 and its bfloat16 neighbours, 2000 tokens one by one as a generation brings them."""
    values = (25_000 + 128 * (torch.arange(2000) % 7)).bfloat16()
    padded = pad_left(TokenBatch.of([(1,)]), 0)
    intervention = Intervention(padded, (), [Read(ReadKind.RESPONSE_MEAN)], n_layers=1, max_new_tokens=2000)
    intervention.begin_pass(padded.ids)
    intervention.block(0, torch.zeros(1, 1, 2, dtype=torch.bfloat16))
    for value in values:
        intervention.begin_pass(torch.ones(1, 1, dtype=torch.long))
        intervention.block(0, value.reshape(1, 1, 1).expand(1, 1, 2).clone())
    mean: Tensor = intervention.results()["response_mean"][0, 0]
    exact = float(values.double().mean())
    assert abs(float(mean[0]) - exact) / exact < 1e-6
