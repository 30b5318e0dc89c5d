"""A limit on thinking, compared with a loop that takes plain passes token by token and puts in the closing mark."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch

from persona_lens.backend import (
    Backend,
    Edit,
    Part,
    Parts,
    Positions,
    Read,
    ReadKind,
    Sampling,
    TokenBatch,
    TokenError,
    Watch,
    WatchedTokens,
    watched_generation,
)
from persona_lens.backend.continuous import continuous
from persona_lens.backend.single_rows import SingleRowsBackend
from persona_lens.backend.tokens import TokenIds
from persona_lens.models import ChatFormat
from tests.backends.fixtures import (
    ADAPTERS,
    ALL_ACTIVATIONS,
    PROMPTS,
    REFERENCE,
    assert_close,
    backend_of,
    direction,
    encode,
    thinking_backend,
    tiny_backend,
)
from tests.families import FAMILIES, Family
from tests.tiny import thinking_tokenizer, tiny_model

NEW = 16
READS = (Read(ReadKind.THINKING_MEAN), Read(ReadKind.ANSWER_MEAN), Read(ReadKind.RESPONSE_MEAN), ALL_ACTIVATIONS)
# What the templates of families write behind what closes thinking.
BEHIND = {"qwen3": "\n\n", "magistral_2506": "\n", "glm_45": "\n", "glm_46": "\n", "smollm3": "\n"}
TOLD = [name for name, family in FAMILIES.items() if family.told]
OWN = ("qwen3", "gpt_oss", "nemotron")  # what adapters besides the reference run; all of them in `make test-all`


def due(family: Family, closing: str, tokenizer: Any, so_far: Sequence[int]) -> list[int]:
    """The ids that close thinking: of a mark that is being written what is left, if that can be told from the text."""
    mark = family.marks[1]
    if not family.written:
        return list(tokenizer.encode(closing, add_special_tokens=False))
    text = tokenizer.decode(so_far)
    there = next(end for end in range(len(mark) - 1, -1, -1) if text.endswith(mark[:end]))
    return list(tokenizer.encode(closing[there:], add_special_tokens=False))


def by_hand(
    module: Any,
    tokenizer: Any,
    prompt: TokenIds,
    sampling: Sampling,
    row: int,
    ends: Sequence[int],
    family: Family = FAMILIES["phi4_reasoning"],
    behind: str = "",
) -> tuple[TokenIds, bool]:
    """A row's response, and whether its thinking was closed for it."""
    parts, (letter,) = Parts.of(tokenizer), tokenizer.encode("b", add_special_tokens=False)
    generator = torch.Generator().manual_seed(sampling.seeds[row]) if sampling.seeds else None
    said: list[int] = []
    pending: list[int] = []
    closed = False
    assert sampling.thinking_budget is not None
    while len(said) < sampling.max_new_tokens:
        with torch.inference_mode():
            logits = module(torch.tensor([[*prompt, *said]])).logits[0, -1].float()
        if generator is not None:
            drawn = torch.empty_like(logits).exponential_(generator=generator)
            logits = (logits - logits.max()) / sampling.temperature - drawn.log()
        token = int(logits.argmax())
        spent = parts.of_response(prompt, said).count(Part.THINKING)
        is_open = parts.of_response(prompt, [*said, letter])[-1] is Part.THINKING
        if not pending and is_open and spent >= sampling.thinking_budget:
            pending, closed = due(family, family.marks[1] + behind, tokenizer, [*prompt, *said]), True
        if pending:
            token = pending.pop(0)
        if token in ends:
            break
        said.append(token)
    return tuple(said), closed


@cache
def module_of(name: str) -> Any:
    """A tiny model with a family's tokens, which by itself closes the thinking of the third of `prompts_of`."""
    family = FAMILIES[name]
    tokenizer, model = family.tokenizer(), tiny_model()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    own: Any = model
    own.config.eos_token_id = own.generation_config.eos_token_id = 1
    prompt, closes = prompts_of(family)[2], tokenizer.encode(family.marks[1], add_special_tokens=False)
    said: list[int] = []
    while len(said) < (1 if family.written else 3):
        with torch.inference_mode():
            said.append(int(own(torch.tensor([[*prompt, *said]])).logits[0, -1].argmax()))
    weights = own.get_output_embeddings().weight
    with torch.no_grad():  # so that the mark ends where a token of its own stood
        weights[closes[0 if family.heads else -1]] = 1.001 * weights[said[-1]]
    return own


@cache
def family_backend(adapter: str, name: str) -> Backend:
    module_of.cache_clear()  # TransformerLens changes it
    return backend_of(adapter, module_of(name), FAMILIES[name].tokenizer())


def prompts_of(family: Family) -> list[TokenIds]:
    """Thinking that is open, a closing mark that is nearly there, none yet, and thinking that is over."""
    tokenizer = family.tokenizer()
    asked = ChatFormat.from_tokenizer(tokenizer, thinking=True).encode(None, "Why?")
    head = "" if family.opened else family.marks[0]
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in (head, f"{head}So\n", f"{head}Hm.", "")]
    closing = tokenizer.encode(family.marks[1], add_special_tokens=False)
    rows[2] += closing[:-1] if family.written else []
    return [(*asked, *row) for row in (*rows, [*rows[0], *closing])]


FAMILY_CASES = [
    pytest.param(
        adapter,
        name,
        id=f"{adapter}-{name}",
        marks=[] if adapter == REFERENCE or name in OWN else pytest.mark.exhaustive,
    )
    for adapter in ADAPTERS
    # An engine for each would take long, and TransformerLens loads tokenizers again, which these cannot be.
    if adapter not in ("vllm", "transformer_lens")
    for name in TOLD
]


@pytest.mark.parametrize(("adapter", "name"), FAMILY_CASES)
def test_every_family_is_closed_as_by_hand(adapter: str, name: str) -> None:
    family, backend = FAMILIES[name], family_backend(adapter, name)
    tokenizer, prompts = family.tokenizer(), prompts_of(family)
    module_of.cache_clear()
    module, parts, seen = module_of(name), Parts.of(tokenizer), set[str]()
    letter = tokenizer.encode("b", add_special_tokens=False)
    for budget in (0, 6):
        seeds = tuple(range(len(prompts)))
        for sampling in (
            Sampling(NEW, thinking_budget=budget),
            Sampling(NEW, 1.0, seeds=seeds, thinking_budget=budget),
        ):
            made = backend.generate(prompts, sampling, (), READS)
            for row, prompt in enumerate(prompts):
                want, closed = by_hand(
                    module, tokenizer, prompt, sampling, row, backend.end_ids, family, BEHIND.get(name, "")
                )
                assert made.responses[row] == want, (budget, sampling.temperature, row)
                thinks = Part.THINKING in (*parts.of_response(prompt, want), *parts.of_response(prompt, letter))
                seen.add("closed" if closed else "by itself" if thinks else "never")
            check_reads(made.reads, backend, TokenBatch.of(prompts, made.responses))
    assert seen == {"closed", "by itself", "never"}


def check_reads(reads: Any, backend: Backend, text: TokenBatch) -> None:
    """Means of parts are those of a plain pass over the same ids, under masks."""
    every = backend.forward(text, (), [ALL_ACTIVATIONS]).reads["activations"]
    assert_close(reads["activations"], every)
    parts = Parts.of(backend.tokenizer)
    for row, (prompt, response) in enumerate(zip(text.prompts, text.responses, strict=True)):
        kinds = parts.of_response(prompt, response)
        own = every[row, :, every.shape[2] - len(response) :]
        for part, name in ((Part.THINKING, "thinking_mean"), (Part.ANSWER, "answer_mean")):
            some = [at for at, kind in enumerate(kinds) if kind is part]
            assert_close(reads[name][row], own[:, some].mean(dim=1))


OPEN, CLOSE = (thinking_tokenizer().get_vocab()[token] for token in ("<think>", "</think>"))
(HEAD,) = encode("<|im_start|>assistant\n")
HEADS = tuple((*prompt, *HEAD) for prompt in PROMPTS)
ROWS = (*HEADS, (*HEADS[0], OPEN), (*HEADS[1], OPEN), (*HEADS[2], OPEN, CLOSE))
HOW = (Sampling(16), Sampling(16, 1.0, seeds=tuple(range(6))), Sampling(16, 0.7, 0.9, seeds=tuple(range(6, 12))))


@pytest.fixture(params=[(adapter, architecture) for adapter in ADAPTERS for architecture in ("llama", "gemma2")])
def thinking(request: pytest.FixtureRequest) -> tuple[Backend, Any]:
    """A backend, and its model by itself."""
    return thinking_backend(*request.param), tiny_model(request.param[1], thinks=True)


def limited(sampling: Sampling, budget: int, **more: Any) -> Sampling:
    return Sampling(**{**vars(sampling), "thinking_budget": budget, **more})


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_rows_are_closed_as_by_hand(thinking: tuple[Backend, Any], use_cache: bool) -> None:
    backend, module = thinking
    for budget in (0, 3):
        for how in HOW[:2]:
            sampling = limited(how, budget, use_cache=use_cache)
            made = backend.generate(ROWS, sampling, (), READS)
            hand = [by_hand(module, backend.tokenizer, p, sampling, i, backend.end_ids) for i, p in enumerate(ROWS)]
            assert list(made.responses) == [response for response, _ in hand]
            assert any(closed for _, closed in hand)
            check_reads(made.reads, backend, TokenBatch.of(ROWS, made.responses))


def test_what_ends_by_itself_is_as_without_a_budget(thinking: tuple[Backend, Any]) -> None:
    backend, _ = thinking
    for how in HOW:
        free = backend.generate(ROWS, how)
        kinds = [Parts.of(backend.tokenizer).of_response(p, r) for p, r in zip(ROWS, free.responses, strict=True)]
        spent = [row.count(Part.THINKING) for row in kinds]
        budget = sorted(spent)[len(spent) // 2] + 1
        some = backend.generate(ROWS, limited(how, budget))
        for row, count in enumerate(spent):
            if count < budget:
                assert some.responses[row] == free.responses[row]
        assert backend.generate(ROWS, limited(how, 16)).responses == free.responses


def test_rows_alone_and_rows_that_come_and_go(thinking: tuple[Backend, Any]) -> None:
    backend, _ = thinking
    edits = [Edit(1, direction(3), coefficient=0.7, positions=Positions.THINKING)]
    for how in HOW[:2]:
        sampling = limited(how, 2)
        whole = backend.generate(ROWS, sampling, edits, READS)
        for other in (SingleRowsBackend(backend, cached=True), continuous(backend, 2)):
            made = other.generate(ROWS, sampling, edits, READS)
            assert made.responses == whole.responses
            assert_close(dict(made.reads), dict(whole.reads))


@pytest.mark.parametrize("kind", [Positions.THINKING, Positions.ANSWER])
def test_edits_go_on_over_what_is_put_in(thinking: tuple[Backend, Any], kind: Positions) -> None:
    """The text that an edited generation makes is edited and read in the same way once it is there."""
    backend, _ = thinking
    edits = [Edit(1, direction(3), coefficient=0.7, positions=kind)]
    for how in HOW[:2]:
        made = backend.generate(ROWS, limited(how, 2), edits, READS)
        want = backend.forward(TokenBatch.of(ROWS, made.responses), edits, READS).reads
        assert_close(dict(made.reads), dict(want))


def test_a_stream_tells_what_is_put_in(thinking: tuple[Backend, Any]) -> None:
    backend, _ = thinking
    parts = Parts.of(backend.tokenizer)
    for other in (backend, continuous(backend, 3)):
        told: list[WatchedTokens] = []
        watch = Watch(direction()[None], told.append, (1,), parts=parts)
        sampling = limited(HOW[1], 2)
        made = watched_generation(other, ROWS, sampling, watch)
        assert made.responses == backend.generate(ROWS, sampling).responses
        for row, response in enumerate(made.responses):
            heard = [each for each in told[1:] if not bool(each.finished[row])]
            assert tuple(int(each.ids[row, -1]) for each in heard) == response
            assert tuple(each.parts[row] for each in heard if each.parts) == parts.of_response(ROWS[row], response)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_model_that_never_thinks_has_no_thinking_to_limit(adapter: str) -> None:
    for backend in (tiny_backend(adapter), continuous(tiny_backend(adapter), 2)):
        with pytest.raises(TokenError, match=r"no thinking to limit.*no marks of reasoning.*--thinking-budget"):
            backend.generate(PROMPTS, Sampling(4, thinking_budget=3))


def test_fewer_than_none_cannot_be_thought() -> None:
    with pytest.raises(TokenError, match="0 tokens"):
        Sampling(4, thinking_budget=-1)


def test_what_closes_thinking_is_what_templates_write() -> None:
    for name in TOLD:
        tokenizer = FAMILIES[name].tokenizer()
        found = {tokenizer.decode(list(ids)) for ids in Parts.of(tokenizer).closing.values()}
        assert FAMILIES[name].marks[1] + BEHIND.get(name, "") in found
    assert not Parts.of(FAMILIES["kimi_vl"].tokenizer()).closing
