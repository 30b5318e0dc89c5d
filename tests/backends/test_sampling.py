"""The one sampler: its distribution, its seeds, and what it does with extreme logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from transformers import TopPLogitsWarper

from persona_lens.backend import Backend, Edit, Read, Sampling
from persona_lens.backend.sampling import Noise, RowSampler, keep_nucleus
from tests.backends.fixtures import PROMPTS, direction, tiny_backend

pytestmark = pytest.mark.cuda

CPU = torch.device("cpu")
LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def draws(logits: Tensor, n: int, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0) -> Tensor:
    """``n`` tokens: many rows, each with a seed of its own, and several steps of each."""
    rows, steps = n // 4, 4
    sampler = RowSampler(Sampling(1, temperature, top_p, tuple(range(seed, seed + rows))), CPU)
    return torch.cat([sampler(logits.expand(rows, -1)).argmax(dim=-1) for _ in range(steps)])


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.8)])
def test_tokens_are_drawn_from_the_softmax(temperature: float, top_p: float) -> None:
    n = 8000
    scaled = LOGITS.unsqueeze(0) / temperature
    if top_p < 1:
        scaled = TopPLogitsWarper(top_p)(torch.zeros(1, 1, dtype=torch.long), scaled)
    expected = scaled[0].double().softmax(dim=-1) * n
    counts = torch.bincount(draws(LOGITS, n, temperature, top_p), minlength=len(LOGITS))
    inside = expected > 0
    assert int(counts[~inside].sum()) == 0
    # The seeds are fixed, so this either always passes or never does.
    assert stats.chisquare(counts[inside].double().numpy(), expected[inside].double().numpy()).pvalue > 0.01


def test_on_a_cpu_a_seed_stands_for_one_draw_after_another() -> None:
    """What runs have recorded their seeds for; whatever is asked for again."""
    generator, noise = torch.Generator().manual_seed(5), Noise(5)
    drawn = [torch.empty(259).exponential_(generator=generator) for _ in range(5)]
    for number in (0, 1, 1, 2, 4, 0, 3):
        assert torch.equal(noise.draw(number, 259, CPU), drawn[number])


def test_steps_and_rows_are_independent() -> None:
    rows = 4000
    sampler = RowSampler(Sampling(1, 1.0, seeds=tuple(range(rows))), CPU)
    first, second = (sampler(torch.zeros(rows, 2)).argmax(dim=-1) for _ in range(2))
    table = torch.zeros(2, 2)
    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        table[a, b] += 1
    assert stats.chi2_contingency(table.numpy()).pvalue > 0.01


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**63 - 1), min_size=2, max_size=6), st.integers(0, 1000))
def test_a_rows_noise_depends_on_its_seed_alone(seeds: list[int], logits_seed: int) -> None:
    logits = torch.randn(len(seeds), 7, generator=torch.Generator().manual_seed(logits_seed))
    together = RowSampler(Sampling(1, 1.0, seeds=tuple(seeds)), CPU)
    alone = [RowSampler(Sampling(1, 1.0, seeds=(seed,)), CPU) for seed in seeds]
    for _ in range(3):
        batch = together(logits)
        for row, sampler in enumerate(alone):
            assert torch.equal(batch[row : row + 1], sampler(logits[row : row + 1]))


def test_other_seeds_give_other_tokens_and_the_same_seed_the_same() -> None:
    assert not torch.equal(draws(LOGITS, 400), draws(LOGITS, 400, seed=10_000))
    assert torch.equal(draws(LOGITS, 400), draws(LOGITS, 400))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=12, unique=True),
    st.floats(0.01, 0.999),
)
def test_the_nucleus_is_that_of_transformers(values: list[float], top_p: float) -> None:
    logits = torch.tensor([values])
    ordered = logits.softmax(dim=-1).sort(descending=True).values.cumsum(dim=-1)
    if float((ordered - top_p).abs().min()) < 1e-5:
        return  # on the very edge either order of adding up is right
    theirs = TopPLogitsWarper(top_p)(torch.zeros(1, 1, dtype=torch.long), logits)
    assert torch.equal(keep_nucleus(logits, top_p).isfinite(), theirs.isfinite())


def test_the_nucleus_never_is_empty() -> None:
    kept = keep_nucleus(torch.tensor([[0.0, 5.0, 1.0]]), 1e-9)
    assert kept.isfinite().tolist() == [[False, True, False]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_huge_logits_do_not_overflow(dtype: torch.dtype, top_p: float) -> None:
    """Divided by a small temperature they would all be infinite, and the first of them would always win."""
    largest = torch.finfo(dtype).max
    logits = torch.tensor([[-largest, 0.0, 0.5 * largest, largest, -torch.inf]], dtype=dtype)
    for seed in range(20):
        noisy = RowSampler(Sampling(1, 1e-3, top_p, seeds=(seed,)), CPU)(logits)
        assert noisy.dtype == torch.float32
        assert not noisy.isnan().any()
        assert int(noisy.argmax()) == 3


def test_two_tokens_alike_are_equally_likely_however_large_their_logits() -> None:
    logits = torch.tensor([60_000.0, 60_000.0, 0.0]).half()
    counts = torch.bincount(draws(logits, 2000, temperature=0.1), minlength=3)
    assert counts[2] == 0
    assert stats.binomtest(int(counts[0]), 2000).pvalue > 0.01


def test_sampled_logits_are_float32_of_bfloat16_ones() -> None:
    """Noise of bfloat16 has so few values that ties would be common."""
    logits = torch.zeros(1, 1000, dtype=torch.bfloat16)
    noisy = RowSampler(Sampling(1, 1.0, seeds=(0,)), CPU)(logits)
    assert len(set(noisy[0].tolist())) > 990


def test_a_seeded_sample_is_the_same_in_every_batch(backend: Backend) -> None:
    prompts = (*PROMPTS, PROMPTS[0])
    sampling = Sampling(6, 1.0, 0.95, seeds=(5, 6, 7, 8))
    edits = [Edit.add(1, direction(), torch.tensor([0.0, 1.0, 2.0, 0.0]))]
    whole = backend.generate(prompts, sampling, edits, Read.means())
    for start, stop in ((0, 1), (1, 4), (2, 3)):
        part = backend.generate(
            prompts[start:stop], sampling.rows(start, stop), [e.rows(start, stop) for e in edits], Read.means()
        )
        assert part.responses == whole.responses[start:stop]
    assert whole.responses[0] != whole.responses[3]  # the same prompt, another seed
    again = backend.generate(prompts, sampling, edits)
    assert again.responses == whole.responses


@pytest.mark.parametrize("adapter_name", ["transformer_lens", "nnsight"])
def test_a_seeded_sample_is_the_same_on_every_backend(adapter_name: str) -> None:
    sampling = Sampling(12, 0.8, 0.9, seeds=(1, 2, 3))
    reference = tiny_backend("transformers").generate(PROMPTS, sampling)
    assert tiny_backend(adapter_name).generate(PROMPTS, sampling).responses == reference.responses
    assert reference.responses != tiny_backend("transformers").generate(PROMPTS, Sampling(12)).responses


def test_the_first_token_follows_the_models_own_probabilities(adapter: str) -> None:
    """The whole way through the generation loop, 600 seeds in one batch."""
    backend, n = tiny_backend(adapter), 600
    hot = 3.0
    out = backend.generate([PROMPTS[1]] * n, Sampling(1, hot, seeds=tuple(range(n))))
    counts = torch.bincount(
        torch.tensor([row[0] if row else backend.end_ids[0] for row in out.responses]), minlength=len(backend.tokenizer)
    )
    expected = (first_logprobs(backend) / hot).softmax(dim=-1) * n
    order = expected.argsort(descending=True)
    # Rare tokens are put together, as the test needs five expected of each kind.
    bins = [order[i : i + 1] for i in range(20)] + list(order[20:].chunk(6))
    got = torch.stack([counts[b].sum() for b in bins]).double()
    want = torch.stack([expected[b].sum() for b in bins]).double()
    assert stats.chisquare(got.numpy(), (want / want.sum() * n).numpy()).pvalue > 0.01


def first_logprobs(backend: Backend) -> Tensor:
    from persona_lens.backend import TokenBatch

    tokens = range(len(backend.tokenizer))
    batch = TokenBatch.of([PROMPTS[1]] * len(tokens), [(token,) for token in tokens])
    logprobs = backend.forward(batch, logprobs=True).logprobs
    assert logprobs is not None
    return torch.cat(logprobs)
