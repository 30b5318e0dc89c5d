"""Whether a baked model does what the steering does: their logits and greedy tokens beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from persona_lens.backend import Backend, Edit, Sampling, wrap_model
from persona_lens.backend.batches import context_length
from persona_lens.backend.blocks import find_blocks
from persona_lens.backend.tokens import TokenIds
from persona_lens.models import ModelError
from persona_lens.models.chat import chat_format
from persona_lens.steering.baking.architectures import Architecture, block_writers
from persona_lens.steering.baking.plan import BakingError, Plan
from persona_lens.traits import Trait, load_trait
from persona_lens.vectors import PersonaVectors, VectorsError

PROMPTS, NEW_TOKENS = 8, 32
LIMIT = 1e-4
"""Largest difference of logits where weights are in float32, as a share of the largest logit."""
SHARES: Mapping[str, float] = {"bfloat16": 0.02, "float16": 0.0025}
"""In 16 bits what was added is rounded: the largest difference there, as a share of what the steering itself does."""


@dataclass(frozen=True)
class Check:
    """How far a baked model and the steered one are apart, both computed in float32.

    A difference of logits is the largest over the vocabulary, as a share of the largest logit at that token; what
    stands here is the largest over all tokens of all prompts.

    Attributes:
        difference: Of the baked model, loaded from its folder, and the steered one.
        limit: The most that it may be, see `LIMIT` and `SHARES`.
        rounded: Whether the weights are in 16 bits, so that greedy tokens may come apart where two are nearly tied.
        shift: Of the steered model and the unsteered one.
        edits: Of the baked model and one whose directions are ablated at block outputs instead, as edits do; None
            where none are taken out everywhere.
        edits_with_sinks: As ``edits``, ablated at attention sinks too.
        cast: Of the unsteered model in the precision that was asked for and in that in which it is stored, which the
            others leave out; None where these are one.
        prompts: How many.
        same: Prompts after which the greedy tokens are the same.
    """

    difference: float
    limit: float
    rounded: bool
    shift: float
    edits: float | None
    edits_with_sinks: float | None
    cast: float | None
    prompts: int
    same: int

    @property
    def passed(self) -> bool:
        """Whether the difference is within its limit, and greedy tokens are the same where no weight was rounded."""
        return self.difference <= self.limit and (self.rounded or self.same == self.prompts)

    @property
    def tells(self) -> bool:
        """Whether the steering itself changes more than is allowed, so that a model without it would not pass."""
        return self.shift > self.limit

    @property
    def failure(self) -> str:
        """What is wrong where it has not passed, and what to do."""
        found = f"logits differ by {self.difference:.1e}, where {self.limit:.0e} is allowed"
        if self.difference <= self.limit:
            found = f"greedy tokens differ after {self.prompts - self.same} of {self.prompts} questions"
        return f"{found}; {'bake with --dtype float32' if self.rounded else 'keep the steering as an edit'}"

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "passed": self.passed, "tells": self.tells}


@dataclass(frozen=True)
class Observed:
    """What a model says.

    Attributes:
        logits: Of each prompt, float32 [tokens, vocabulary].
        tokens: Greedy continuation of each prompt.
    """

    logits: list[Tensor]
    tokens: tuple[TokenIds, ...]

    def require_numbers(self, otherwise: str) -> None:
        """Raise `BakingError`, with what that means and what to do, where logits are NaN, infinite or all zero."""
        largest = torch.cat([each.abs().amax(-1) for each in self.logits])
        if not bool((largest.isfinite() & (largest > 0)).all()):
            raise BakingError(otherwise)

    def apart(self, other: Observed) -> float:
        """The largest difference of logits, see `Check`."""
        return max(
            float(((mine - theirs).abs().amax(-1) / theirs.abs().amax(-1)).max())
            for mine, theirs in zip(self.logits, other.logits, strict=True)
        )


@dataclass(frozen=True)
class Steered:
    """What a model says that has nothing in its weights.

    Attributes:
        plain: Unsteered.
        hooked: Steered by hooks that do what was baked.
        edited: Steered by edits, which ablate at block outputs what is taken out everywhere; None where nothing is.
        edited_with_sinks: The same at attention sinks too.
    """

    plain: Observed
    hooked: Observed
    edited: Observed | None = None
    edited_with_sinks: Observed | None = None


def observe(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    edits: Sequence[Edit] = (),
    inside: AbstractContextManager[None] | None = None,
) -> Observed:
    """Run a model over prompts.

    Args:
        model: The model, in float32.
        tokenizer: Its tokenizer.
        prompts: Token ids of each.
        edits: At all tokens.
        inside: What is open meanwhile.
    """
    backend = wrap_model(model, tokenizer)
    with inside or nullcontext():
        with torch.no_grad(), backend.editing(edits):
            ids = (torch.tensor([list(prompt)], device=model.device) for prompt in prompts)
            logits = [model(each, use_cache=False).logits[0].float().cpu() for each in ids]
        return Observed(logits, backend.generate(prompts, Sampling(NEW_TOKENS), edits).responses)


@contextmanager
def taking_out(model: Any, architecture: Architecture, plan: Plan) -> Iterator[None]:
    """While open, hooks take the plan's directions out of all that is written to the residual stream."""
    modules = [model.get_submodule(path) for path in architecture.embeddings]
    modules += [module for _, module in block_writers(model, architecture)]

    def take_out(_: Any, __: Any, output: Tensor) -> Tensor:
        return plan.without(output)

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_hook(take_out).remove)
        yield


def prompts_of(vectors: Sequence[PersonaVectors], backend: Backend) -> list[TokenIds]:
    """Held-out questions of the vectors' traits in turn, in the model's chat format if it has one, as token ids.

    Raises:
        BakingError: If the model has no room for them.
    """
    traits: list[Trait] = []
    for each in vectors:
        try:
            traits.append(each.trait_definition)
        except VectorsError:  # imported ones carry none
            continue
    questions = [each.evaluation_questions for each in traits or [load_trait("optimistic")]]
    asked = dict.fromkeys(question for row in zip(*questions, strict=False) for question in row)
    try:
        chat = chat_format(backend)
        prompts = [tuple(chat.encode(None, question)) for question in asked]
    except ModelError:  # base models have none
        prompts = [tuple(backend.tokenizer.encode(question)) for question in asked]
    limit = context_length(backend)
    short = [prompt for prompt in prompts if limit is None or len(prompt) + NEW_TOKENS <= limit]
    if not short:
        raise BakingError(
            f"the model takes {limit} tokens, too few for the check's questions and {NEW_TOKENS} tokens after each; "
            "bake without --check"
        )
    return short[:PROMPTS]


def steered(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    architecture: Architecture,
    plan: Plan,
    added: Sequence[Edit],
) -> Steered:
    """The plain model as it is, steered by hooks as the plan says, and by edits alone.

    Args:
        model: The model, in float32.
        tokenizer: Its tokenizer.
        prompts: Token ids of each.
        architecture: Where it writes to the residual stream.
        plan: What was baked.
        added: The additions before anything is taken out of them.
    """
    plain = observe(model, tokenizer, prompts)
    inside = taking_out(model, architecture, plan) if plan.basis is not None else None
    hooked = observe(model, tokenizer, prompts, plan.edits(), inside)
    hooked.require_numbers("steered so, the model computes no numbers any more; steer with smaller coefficients")
    edited = []
    if plan.basis is not None:
        places = [(layer, each) for layer in range(len(find_blocks(model)[1])) for each in plan.basis.T.float()]
        for sinks in (False, True):
            ablated = [replace(Edit.ablate(layer, each), sinks=sinks) for layer, each in places]
            edited.append(observe(model, tokenizer, prompts, [*added, *ablated]))
    return Steered(plain, hooked, *edited)


def compared(baked: Observed, found: Steered, dtype: str, stored: Observed | None = None) -> Check:
    """The baked model beside what `steered` found.

    Args:
        baked: What it says.
        found: What the other says.
        dtype: Precision of its weights.
        stored: What the unsteered model says before its weights were rounded to that; None where they were not.

    Raises:
        BakingError: If the baked model computes no numbers.
    """
    baked.require_numbers(
        "what was written computes no numbers, as the steered model does; keep the steering as an edit"
    )
    shift = found.hooked.apart(found.plain)
    share = SHARES.get(dtype)
    return Check(
        difference=baked.apart(found.hooked),
        limit=LIMIT if share is None else max(LIMIT, share * shift),
        rounded=share is not None,
        shift=shift,
        edits=None if found.edited is None else baked.apart(found.edited),
        edits_with_sinks=None if found.edited_with_sinks is None else baked.apart(found.edited_with_sinks),
        cast=None if stored is None else found.plain.apart(stored),
        prompts=len(baked.logits),
        same=sum(mine == theirs for mine, theirs in zip(baked.tokens, found.hooked.tokens, strict=True)),
    )
