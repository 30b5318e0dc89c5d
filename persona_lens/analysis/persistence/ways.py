"""`Way`: the ways to steer a conversation, and what each of them writes in a turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.backend import Condition, Edit, Operation, Positions
from persona_lens.data.turns import TurnPrompt, turn_prompt
from persona_lens.extraction.experiment import Variant
from persona_lens.models import ChatFormat
from persona_lens.models.chat import messages_of
from persona_lens.runs.rollouts import EditsFor, Request
from persona_lens.steering.history import History, turn_edits
from persona_lens.steering.notation import Layers, Term
from persona_lens.steering.steering import Steering, rowwise
from persona_lens.traits import Arm, Trait
from persona_lens.vectors import PersonaVectors


class Way(StrEnum):
    """How a conversation is steered, turn after turn."""

    NONE = "none"
    """Not at all."""
    ALL = "all"
    """The coefficient is added at every token, and stays in the history."""
    GENERATED = "generated"
    """It is added where replies are generated, and stays in the history there."""
    CLEAN = "clean"
    """It is added where a reply is generated; finished turns are read as if they had not been steered."""
    CLEAN_ALL = "clean-all"
    """It is added at every token of the turn; finished turns are read as if they had not been steered."""
    FLOOR = "floor"
    """No token's projection stays below the target; for less of a trait, none stays above it."""
    GATED = "gated"
    """The coefficient is added at every token whose projection is below the gate; for less of a trait, above it."""
    RANDOM = "random"
    """As ``all``, along a random direction of the same length."""
    PROMPTED = "prompted"
    """A system prompt asks for the trait, and nothing is steered."""

    @property
    def history(self) -> History:
        """What becomes of finished turns."""
        return History.CLEAN if self in (Way.CLEAN, Way.CLEAN_ALL) else History.STEERED


STEERING = (Way.ALL, Way.GENERATED, Way.CLEAN, Way.CLEAN_ALL, Way.FLOOR, Way.GATED)
COMPARED = (*STEERING, Way.PROMPTED)
"""Ways that are held against one another; the others are there to be compared with."""
FROM = {Way.FLOOR: ("target", Way.ALL), Way.GATED: ("gate", Way.PROMPTED)}
"""What of an `Aim` a way needs, and in which way the replies of the first turn have it."""


@dataclass(frozen=True, eq=False)
class Aim:
    """A trait that is steered towards.

    Attributes:
        vectors: Its vectors.
        trait: The trait.
        layer: Where it is steered.
        coefficient: Multiple of the raw vector; below 0 for less of the trait.
        reduction: Which of the vectors.
        target: Projection that ``floor`` holds, in residual-stream units; None where it is not known yet.
        gate: Projection short of which ``gated`` adds; likewise.
    """

    vectors: PersonaVectors
    trait: Trait
    layer: int
    coefficient: float
    reduction: str
    target: float | None = None
    gate: float | None = None

    @property
    def towards(self) -> int:
        """1 for more of the trait, -1 for less."""
        return 1 if self.coefficient > 0 else -1

    @property
    def vector(self) -> Float[Tensor, " d_model"]:
        """The raw vector."""
        return self.vectors.vector(self.layer, self.reduction)

    def projection(self, mean: Float[Tensor, " d_model"]) -> float | None:
        """A mean residual's projection on the unit vector; None where there is no such mean."""
        value = float(mean.float() @ torch.nn.functional.normalize(self.vector, dim=0))
        return None if value != value else value

    @property
    def steering(self) -> Steering:
        """``all``, in the notation."""
        name, layers = self.trait.name, Layers(((self.layer, self.layer),))
        term = Term(name, layers, Operation.ADD, self.coefficient, reduction=self.reduction)
        return Steering((term,), {name: self.vectors})

    def system(self, way: Way) -> str | None:
        """The system prompt of a way."""
        if way is not Way.PROMPTED:
            return None
        return self.trait.middle_prompt(Arm.POSITIVE if self.towards > 0 else Arm.NEGATIVE)

    def variant(self, way: Way) -> Variant:
        """How conversations are held in a way."""
        return Variant({"trait": self.trait.name, "way": str(way)}, self.system(way))

    def edits(self, way: Way, random: int) -> tuple[Edit, ...]:
        """What a way writes, wherever it writes it; ``random`` is the seed of the random direction."""
        if way in (Way.NONE, Way.PROMPTED):
            return ()
        if way is Way.RANDOM:
            return self.steering.null(random)
        if way in FROM:
            return (self._holding(way),)
        positions = Positions.GENERATING if way in (Way.GENERATED, Way.CLEAN) else Positions.ALL
        return (Edit.add(self.layer, self.vector, self.coefficient, positions),)

    def _holding(self, way: Way) -> Edit:
        less, level = self.towards < 0, getattr(self, FROM[way][0])
        if way is Way.GATED:
            condition = Condition(self.layer, self.vector, level, above=less)
            return Edit(self.layer, self.vector, coefficient=self.coefficient, condition=condition)
        return (Edit.cap if less else Edit.floor)(self.layer, self.vector, level)


UNSTEERED = Variant({"trait": "", "way": str(Way.NONE)})
"""How conversations are held that no trait has a part in."""
EditsOf = Callable[[Mapping[str, Any]], tuple[Edit, ...]]


def edits_by_labels(aims: Mapping[str, Aim], random_directions: int, seed: int) -> EditsOf:
    """What is written in a conversation, by the labels of its requests.

    Args:
        aims: By trait.
        random_directions: How many there are; conversation i takes number i modulo this.
        seed: Of the first.
    """

    @cache
    def edits(trait: str, way: Way, random: int) -> tuple[Edit, ...]:
        return aims[trait].edits(way, random)

    def of(labels: Mapping[str, Any]) -> tuple[Edit, ...]:
        way = Way(labels["way"])
        if way is Way.NONE:
            return ()
        number = labels["question_number"] % random_directions if way is Way.RANDOM else 0
        return edits(labels["trait"], way, seed + number)

    return of


def edits_for(edits: EditsOf, chat: ChatFormat) -> EditsFor:
    """The edits of a batch of requests, each row under those of its own way, and with that way's history."""

    def of(requests: Sequence[Request]) -> list[Edit]:
        ways = [Way(request.labels["way"]) for request in requests]
        rows = [edits(request.labels) for request in requests]
        prompts = [_prompt(way, request, chat) for way, request in zip(ways, requests, strict=True)]
        found: list[Edit] = []
        for history in History:
            own = rowwise(row if way.history is history else () for way, row in zip(ways, rows, strict=True))
            found += turn_edits(own, prompts, history)
        return found

    return of


def _prompt(way: Way, request: Request, chat: ChatFormat) -> TurnPrompt:
    """A request's prompt; finished turns are looked for only where the way depends on where they are."""
    messages = messages_of(request.system, request.question, request.examples)
    if way in (Way.GENERATED, Way.CLEAN_ALL):
        return turn_prompt(chat, messages)
    return TurnPrompt(tuple(chat.encode_messages(messages)))
