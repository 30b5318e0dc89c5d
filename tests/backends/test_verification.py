"""Whether edits act: every seeded fault of steering is found, and nothing is found where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, TypeVar
from unittest.mock import patch

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from persona_lens.backend import (
    Backend,
    Edit,
    ForwardResult,
    Generation,
    ModelInfo,
    Positions,
    Read,
    Sampling,
    Span,
    TokenBatch,
)
from persona_lens.backend.trial import WATCHED
from persona_lens.backend.verification import VerificationError, is_engine, try_edits, verify, was_verified
from tests.backends.fixtures import (
    ADAPTERS,
    ARCHITECTURES,
    FEW_ARCHITECTURES,
    Delegating,
    backend_of,
    matrix,
    tiny_backend,
)
from tests.tiny import EXTRA, tiny_model


def failed(backend: Backend) -> list[str]:
    return [f"{point.name}: {point.in_short}" for point in try_edits(backend) if not point.passed]


# No alarm where nothing is wrong


def test_edits_act_on_every_architecture(every_backend: Backend) -> None:
    assert failed(every_backend) == []


@pytest.mark.parametrize("architecture", [name for name in EXTRA if name not in ARCHITECTURES])
def test_edits_act_on_odd_architectures(architecture: str) -> None:
    if "transformers" not in ADAPTERS:
        pytest.skip("the reference's own")
    assert failed(tiny_backend("transformers", architecture)) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("adapter", "architecture"), matrix(adapters=ADAPTERS[:1]))
def test_edits_act_in_16_bits(adapter: str, architecture: str, dtype: torch.dtype) -> None:
    if adapter == "vllm" and architecture.startswith("gemma") and dtype is torch.float16:
        pytest.skip("vLLM does not run Gemma in float16")
    for seed in range(2):
        module: Any = tiny_model(architecture, seed)
        assert failed(backend_of(adapter, module.to(dtype))) == []


@pytest.mark.parametrize(
    ("architecture", "config"),
    [("granite", {"logits_scaling": 8.0, "residual_multiplier": 0.5}), ("cohere", {}), ("olmo2", {}), ("mixtral", {})],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edits_act_where_logits_are_scaled_or_norms_come_after(
    architecture: str, config: dict[str, Any], dtype: torch.dtype
) -> None:
    if "transformers" not in ADAPTERS:
        pytest.skip("the reference's own")
    with patch.dict(EXTRA, {architecture: config}):
        module: Any = tiny_model(architecture)
    assert failed(backend_of("transformers", module.to(dtype))) == []


def test_a_model_whose_layers_know_the_token_is_tried_at_the_last_one() -> None:
    if "transformers" not in ADAPTERS:
        pytest.skip("the reference's own")
    layers = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "num_kv_shared_layers": 0}
    embedded = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 259}
    with patch.dict(EXTRA, {"gemma4_text": {"head_dim": 8, "global_head_dim": 8, **embedded, **layers}}):
        backend = backend_of("transformers", tiny_model("gemma4_text"))
    assert failed(backend) == []
    assert failed(Scaled(backend))
    assert failed(GenerationForgets(backend))


def few_words() -> PreTrainedTokenizerFast:
    """One to which every word of a text is unknown, as to one of amino acids or of moves."""
    ids = {"<unk>": 0, "<|im_end|>": 2, **{chr(ord("A") + number): 3 + number for number in range(20)}}
    made = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    loader: Any = PreTrainedTokenizerFast
    found: PreTrainedTokenizerFast = loader(tokenizer_object=made, unk_token="<unk>", eos_token="<|im_end|>")
    found.pad_token = found.unk_token
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_tokens_are_tried_where_all_words_are_unknown(dtype: torch.dtype) -> None:
    if "transformers" not in ADAPTERS:
        pytest.skip("the reference's own")
    module: Any = tiny_model("llama")
    backend = backend_of("transformers", module.to(dtype), few_words())
    assert {*backend.tokenizer.encode("The people of this town have always")} == {0}
    points = try_edits(backend)
    assert [point.name for point in points if not point.passed] == []
    assert len(points) > 10
    assert failed(GenerationForgets(backend))


def test_a_model_of_which_nothing_can_be_told_is_not_said_to_be_at_fault() -> None:
    if "transformers" not in ADAPTERS:
        pytest.skip("the reference's own")
    module: Any = tiny_model("llama")
    with torch.no_grad():
        module.lm_head.weight.zero_()
    with pytest.raises(VerificationError, match=r"cannot be told: the model goes on alike .*--no-verify") as caught:
        verify(backend_of("transformers", module))
    assert "trusted" not in str(caught.value)


@pytest.mark.parametrize("limit", [9, 10, 11])
def test_a_short_context_is_no_fault(limit: int) -> None:
    if "transformers" not in ADAPTERS:
        pytest.skip("the reference's own")
    module: Any = tiny_model("gpt2", seed=limit)
    module.config.n_positions = limit
    module.transformer.wpe.weight = torch.nn.Parameter(module.transformer.wpe.weight[:limit].detach().clone())
    backend = backend_of("transformers", module)
    assert failed(backend) == []
    assert failed(GenerationForgets(backend))


def test_a_context_too_short_for_any_text_is_not_said_to_be_at_fault() -> None:
    if "transformers" not in ADAPTERS:
        pytest.skip("the reference's own")
    module: Any = tiny_model("gpt2")
    module.config.n_positions = 8
    with pytest.raises(VerificationError, match=r"cannot be told: it takes 8 tokens, .* texts of 9; .*--no-verify"):
        verify(backend_of("transformers", module))


# Seeded faults


class Faulty(Delegating):
    """Changes edits on their way to another backend."""

    def edited(self, edits: Sequence[Edit], call: str, prompts: Sequence[Sequence[int]]) -> Sequence[Edit]:
        return edits

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        edits: Sequence[Edit] = (),
        reads: Sequence[Read] = (),
    ) -> Generation:
        return self.inner.generate(prompts, sampling, self.edited(edits, "generate", prompts), reads)

    def generate_watched(
        self, prompts: Any, sampling: Sampling, watch: Any, edits: Sequence[Edit] = (), reads: Sequence[Read] = ()
    ) -> Generation:
        inner: Any = self.inner
        found: Generation = inner.generate_watched(
            prompts, sampling, watch, self.edited(edits, "watched", prompts), reads
        )
        return found

    def forward(
        self, tokens: TokenBatch, edits: Sequence[Edit] = (), reads: Sequence[Read] = (), *, logprobs: bool = False
    ) -> ForwardResult:
        return self.inner.forward(tokens, self.edited(edits, "forward", tokens.prompts), reads, logprobs=logprobs)


class Dropping(Faulty):
    """Takes edits and does nothing."""

    def edited(self, edits: Sequence[Edit], call: str, prompts: Any) -> Sequence[Edit]:
        return ()


class GenerationForgets(Faulty):
    def edited(self, edits: Sequence[Edit], call: str, prompts: Any) -> Sequence[Edit]:
        return edits if call == "forward" else ()


class WatchForgets(Faulty):
    """The path of a chat."""

    def edited(self, edits: Sequence[Edit], call: str, prompts: Any) -> Sequence[Edit]:
        return () if call == "watched" else edits


class ForwardForgets(Faulty):
    def edited(self, edits: Sequence[Edit], call: str, prompts: Any) -> Sequence[Edit]:
        return () if call == "forward" else edits


class Scaled(Faulty):
    """Every edit some times."""

    factor = 2.0

    def edited(self, edits: Sequence[Edit], call: str, prompts: Any) -> Sequence[Edit]:
        return [replace(edit, coefficient=edit.coefficient * self.factor) for edit in edits]


class Flipped(Scaled):
    factor = -1.0


class TwiceInGeneration(Scaled):
    def edited(self, edits: Sequence[Edit], call: str, prompts: Any) -> Sequence[Edit]:
        return edits if call == "forward" else super().edited(edits, call, prompts)


class Late(Faulty):
    """Every edit a layer too late, as far as there is one."""

    by = 1

    def edited(self, edits: Sequence[Edit], call: str, prompts: Any) -> Sequence[Edit]:
        last = self.info.n_layers - 1
        return [replace(edit, layer=min(max(edit.layer + self.by, 0), last)) for edit in edits if edit.layer <= last]


class Early(Late):
    by = -1


Found = TypeVar("Found", Generation, ForwardResult)


class Shifted(Late):
    """Edits and reads count blocks from another one alike: what is called a layer is the one before."""

    by = -1

    def shifted(self, reads: Sequence[Read], found: Found) -> Found:
        at = {
            read.kind.value: [max(each - 1, 0) for each in read.resolved_layers(self.info.n_layers)] for read in reads
        }
        return replace(found, reads={name: value[:, at[name]] for name, value in found.reads.items()})

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        edits: Sequence[Edit] = (),
        reads: Sequence[Read] = (),
    ) -> Generation:
        return self.shifted(reads, super().generate(prompts, sampling, edits, [replace(r, layers=None) for r in reads]))

    def forward(
        self, tokens: TokenBatch, edits: Sequence[Edit] = (), reads: Sequence[Read] = (), *, logprobs: bool = False
    ) -> ForwardResult:
        everywhere = [replace(read, layers=None) for read in reads]
        return self.shifted(reads, super().forward(tokens, edits, everywhere, logprobs=logprobs))


class SomeRows(Faulty):
    """Only some rows of a batch are steered."""

    def __init__(self, inner: Backend, chosen: Callable[[Tensor, int], Tensor], calls: Sequence[str]) -> None:
        super().__init__(inner)
        self.chosen, self.calls = chosen, calls

    def edited(self, edits: Sequence[Edit], call: str, prompts: Sequence[Sequence[int]]) -> Sequence[Edit]:
        if call not in self.calls:
            return edits
        rows, count = torch.arange(len(prompts)), len(prompts)
        kept = self.chosen(rows, count).float()
        return [replace(edit, coefficient=edit.coefficient * kept) for edit in edits]


class OneForAll(Faulty):
    """All rows of a batch are given the strongest coefficient."""

    def edited(self, edits: Sequence[Edit], call: str, prompts: Any) -> Sequence[Edit]:
        return [replace(edit, coefficient=float(torch.as_tensor(edit.coefficient).max())) for edit in edits]


class OnlyAt(Faulty):
    """Generations are edited while the prompt runs, or at the tokens that are generated, and not at both."""

    def __init__(self, inner: Backend, kind: Positions) -> None:
        super().__init__(inner)
        self.kind = kind

    def edited(self, edits: Sequence[Edit], call: str, prompts: Any) -> Sequence[Edit]:
        return edits if call == "forward" else [kept for edit in edits if (kept := self.part(edit)) is not None]

    def part(self, edit: Edit) -> Edit | None:
        if isinstance(edit.positions, Span):
            return edit if self.kind is Positions.PROMPT else None
        if edit.positions is Positions.GENERATING and self.kind is Positions.PROMPT:
            return replace(edit, positions=Span(Positions.PROMPT, -1))
        return replace(edit, positions=self.kind)


class Cached(Faulty):
    """A cache by tokens alone: of a beginning that was seen before, the edits of today are not made.

    Args:
        inner: The model.
        calls: In which calls.
    """

    def __init__(self, inner: Backend, calls: Sequence[str]) -> None:
        super().__init__(inner)
        self.calls, self.seen = calls, set[tuple[int, ...]]()

    def generate(self, prompts: Sequence[Sequence[int]], *given: Any, **more: Any) -> Generation:
        found = super().generate(prompts, *given, **more)
        self.note([(*prompt, *response) for prompt, response in zip(prompts, found.responses, strict=True)])
        return found

    def note(self, texts: Sequence[Sequence[int]]) -> None:
        self.seen |= {tuple(text[: n + 1]) for text in texts for n in range(len(text))}

    def edited(self, edits: Sequence[Edit], call: str, prompts: Sequence[Sequence[int]]) -> Sequence[Edit]:
        known = [max((n for n in range(len(p)) if tuple(p[:n]) in self.seen), default=0) for p in prompts]
        if call not in self.calls or not any(known):
            return edits
        return [kept for edit in edits for kept in self.behind(edit, known)]

    @staticmethod
    def behind(edit: Edit, known: Sequence[int]) -> Iterator[Edit]:
        """An edit of each row's tokens behind what is in the cache."""
        at_the_end = isinstance(edit.positions, Span) and edit.positions.start < 0
        if at_the_end or edit.positions is Positions.GENERATING:
            yield edit
            return
        for row, start in enumerate(known):
            alone = torch.as_tensor(edit.coefficient) * (torch.arange(len(known)) == row)
            stop = edit.positions.stop if isinstance(edit.positions, Span) else None
            if stop is None or start < stop:
                yield replace(edit, coefficient=alone, positions=Span(Positions.ALL, start, stop))


class LeftBehind(Faulty):
    """What a failed call had begun stays for the next one."""

    left: Sequence[Edit] = ()

    def edited(self, edits: Sequence[Edit], call: str, prompts: Any) -> Sequence[Edit]:
        if any(type(edit) is not Edit for edit in edits):
            self.left = [edit for edit in edits if type(edit) is Edit]
            return edits
        left, self.left = self.left, ()
        return [*left, *edits]


class Deaf(Faulty):
    """Once a call has failed, no later one is edited."""

    failed = False

    def edited(self, edits: Sequence[Edit], call: str, prompts: Any) -> Sequence[Edit]:
        self.failed |= any(type(edit) is not Edit for edit in edits)
        return [edit for edit in edits if type(edit) is not Edit] if self.failed else edits


class Silent(Faulty):
    """An edit that cannot be made is left out."""

    def edited(self, edits: Sequence[Edit], call: str, prompts: Any) -> Sequence[Edit]:
        return [edit for edit in edits if type(edit) is Edit]


GENERATIONS, CALLS = ("generate", "watched"), ("generate", "watched", "forward")
FAULTS: dict[str, Callable[[Backend], Backend]] = {
    "nothing is edited": Dropping,
    "generations forget": GenerationForgets,
    "forward passes forget": ForwardForgets,
    "twice": Scaled,
    "twice while generating": TwiceInGeneration,
    "the sign": Flipped,
    "a layer late": Late,
    "a layer early": Early,
    "layers counted from another one": Shifted,
    "the first half": lambda inner: SomeRows(inner, lambda rows, n: rows < n // 2, CALLS),
    "the second half": lambda inner: SomeRows(inner, lambda rows, n: rows >= n // 2, CALLS),
    "the first half, generating": lambda inner: SomeRows(inner, lambda rows, n: rows < n // 2, GENERATIONS),
    "the second half, generating": lambda inner: SomeRows(inner, lambda rows, n: rows >= n // 2, GENERATIONS),
    "every other row": lambda inner: SomeRows(inner, lambda rows, n: rows % 2 == 0, CALLS),
    "all rows alike": OneForAll,
    "the prompt alone": lambda inner: OnlyAt(inner, Positions.PROMPT),
    "generated tokens alone": lambda inner: OnlyAt(inner, Positions.RESPONSE),
    "a cache by tokens": lambda inner: Cached(inner, CALLS),
    "a cache by tokens, generating": lambda inner: Cached(inner, GENERATIONS),
    "left behind": LeftBehind,
    "deaf after a failure": Deaf,
    "errors are swallowed": Silent,
}


SOME = [*((ADAPTERS[0], name) for name in FEW_ARCHITECTURES), *((adapter, "llama") for adapter in ADAPTERS[1:])]


@pytest.mark.parametrize(("adapter", "architecture"), SOME)
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_seeded_fault_is_found(adapter: str, architecture: str, fault: Callable[[Backend], Backend]) -> None:
    assert failed(fault(tiny_backend(adapter, architecture)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_seeded_fault_is_found_in_16_bits(fault: Callable[[Backend], Backend], dtype: torch.dtype) -> None:
    module: Any = tiny_model()
    assert failed(fault(backend_of(ADAPTERS[0], module.to(dtype))))


def test_a_chat_that_forgets_is_found(backend: Backend) -> None:
    found = failed(WatchForgets(backend))
    assert found
    assert all(each.startswith(WATCHED) for each in found)


# In the module itself


@contextmanager
def losing(backend: Any, layer: int) -> Iterator[None]:
    """What a hook puts out at one block is read, and not what the next block goes on from: a fused residual."""
    attach = type(backend).attach

    def lost(self: Any, layers: Sequence[int], hook: Any) -> AbstractContextManager[None]:
        def at_block(number: int, h: Tensor, inputs: Any) -> Tensor:
            changed: Tensor = hook(number, h, inputs)
            return h if number == layer else changed

        return attach(self, layers, at_block)  # type: ignore[no-any-return]

    with patch.object(type(backend), "attach", lost):
        yield


@pytest.mark.module
@pytest.mark.parametrize("layer", range(3))
def test_a_residual_that_is_put_back_after_the_hook_is_found_at_every_layer(layer: int) -> None:
    backend = backend_of("transformers", tiny_model())
    with losing(backend, layer):
        assert any("reach the next token" in each for each in failed(backend))
    assert failed(backend) == []


@pytest.mark.module
def test_hooks_on_a_copy_of_a_block_are_found() -> None:
    from copy import deepcopy

    module: Any = tiny_model()
    backend: Any = backend_of("transformers", module)
    module.model.layers[1] = deepcopy(module.model.layers[1])  # as after a wrapping that the backend does not know of
    assert backend.blocks[1] is module.model.layers[1] or failed(backend)
    backend.blocks = [*module.model.layers[:2], deepcopy(module.model.layers[2])]
    assert failed(backend)


# What it says, and what is remembered


def test_a_failure_is_an_error_that_says_what_did_not_act(unchecked: None) -> None:
    backend = tiny_backend(ADAPTERS[0])
    with pytest.raises(VerificationError, match=r"edits at every layer are read there.*expected .* measured "):
        verify(Scaled(backend))
    given = replace(backend.info, model="LlamaForCausalLM", revision=None)
    with pytest.raises(VerificationError, match=r"on the model that was given, a LlamaForCausalLM .*try_edits` shows"):
        verify(GenerationForgets(Known(backend, given)))


def test_the_check_that_is_advised_has_the_precision_in_which_it_failed() -> None:
    module: Any = tiny_model("llama")
    backend = backend_of(ADAPTERS[0], module.to(torch.bfloat16))
    opened = replace(backend.info, model="owner/name", revision="f" * 40)
    with pytest.raises(VerificationError, match=r"backends check owner/name --steering --dtype bfloat16`"):
        verify(GenerationForgets(Known(backend, opened)))


class Known(Delegating):
    """A backend that is said to run another model."""

    def __init__(self, inner: Backend, info: ModelInfo) -> None:
        super().__init__(inner)
        self.info = info


def test_what_was_verified_is_remembered_for_this_very_model() -> None:
    from dataclasses import asdict

    backend = backend_of(ADAPTERS[0], tiny_model(seed=5))
    assert not was_verified(asdict(backend.info))
    verify(backend)
    assert was_verified(asdict(backend.info))
    assert not was_verified({**asdict(backend.info), "dtype": "bfloat16"})
    assert not was_verified(None)


def test_an_engine_is_what_has_no_module_here() -> None:
    backend = tiny_backend(ADAPTERS[0])
    assert is_engine(backend) == (ADAPTERS[0] == "vllm")
    assert is_engine(Delegating(backend))


def test_points_as_json() -> None:
    import json

    for point in (*try_edits(tiny_backend(ADAPTERS[0])), *try_edits(Silent(tiny_backend(ADAPTERS[0])))):
        assert json.loads(json.dumps(point.to_json(), allow_nan=False))["passed"] is point.passed
