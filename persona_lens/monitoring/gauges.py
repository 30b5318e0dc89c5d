"""`Gauge`: a trait read at a layer; a `Panel` of them, read together; and what they say of one turn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.backend import Backend, Part, Read
from persona_lens.core.documents import Record
from persona_lens.core.errors import PersonaLensError
from persona_lens.models.reasoning import ANSWER, THINKING
from persona_lens.vectors import OWN_REDUCTION, PersonaVectors
from persona_lens.vectors.provenance import ANSWER_MEAN, THINKING_MEAN

PART_OF = {ANSWER_MEAN: Part.ANSWER, THINKING_MEAN: Part.THINKING}
"""Which tokens of a reply a mean of a part of it is over; another mean is over all of them."""


class MonitoringError(PersonaLensError):
    """What cannot be monitored or shown; where one row of a file is at fault, the message begins with its place."""


@dataclass(frozen=True)
class Gauge:
    """A trait, read at one layer: the projection on its direction, in residual-stream units.

    Attributes:
        vectors: The trait's vectors.
        layer: Block index, 0-based.
        reduction: Which of the vectors.

    Raises:
        VectorsError: If there is no such layer or reduction, or the vector is zero there.
        MonitoringError: If the vector is too long to be projected on.
    """

    vectors: PersonaVectors
    layer: int
    reduction: str = OWN_REDUCTION

    def __post_init__(self) -> None:
        object.__setattr__(self, "reduction", self.reduction or self.vectors.default_reduction)
        if not isfinite(length := float(self.direction.norm())):
            raise MonitoringError(
                f"the {self.reduction} vector of {self.trait!r} at layer {self.layer} has length {length:g}: nothing "
                "can be projected on it"
            )

    @staticmethod
    def of(vectors: PersonaVectors, layer: int | None = None, reduction: str | None = None) -> Gauge:
        """A gauge at a layer; left out, at the layer, and of the reduction, that were tuned for the vectors.

        Raises:
            VectorsError: If there is no such layer or reduction, or nothing was tuned.
        """
        if layer is None:
            tuned = vectors.tuned_choice()
            return Gauge(vectors, tuned.layer, reduction or tuned.reduction)
        return Gauge(vectors, layer, reduction or OWN_REDUCTION)

    @property
    def trait(self) -> str:
        """The trait's name."""
        return self.vectors.trait

    @property
    def direction(self) -> Float[Tensor, " d_model"]:
        """What is projected on, float32, not normalised."""
        return self.vectors.vector(self.layer, self.reduction)

    def __str__(self) -> str:
        return f"{self.trait}@{self.layer}"


def projected(
    activations: Float[Tensor, "rows layers d_model"], layers: Sequence[int], gauges: Sequence[Gauge]
) -> Float[Tensor, "rows gauges"]:
    """Each row's projections on the gauges' unit vectors, in residual-stream units.

    Args:
        activations: Of each row, at each of the layers.
        layers: Block indices, those of all gauges among them.
        gauges: What is read.
    """
    found = torch.empty(len(activations), len(gauges))
    for place, layer in enumerate(layers):
        own = [number for number, gauge in enumerate(gauges) if gauge.layer == layer]
        if own:
            directions = torch.stack([gauges[number].direction for number in own])
            units = directions / directions.norm(dim=-1, keepdim=True)
            found[:, own] = activations[:, place].float() @ units.T
    return found


@dataclass(frozen=True)
class Panel:
    """Gauges that are read together, in one pass.

    Attributes:
        gauges: At least one; no trait twice at one layer.

    Raises:
        MonitoringError: If there is none, or one twice.
    """

    gauges: tuple[Gauge, ...]

    def __post_init__(self) -> None:
        if not self.gauges:
            raise MonitoringError("there is nothing to monitor; give at least one trait's vectors")
        names = [str(gauge) for gauge in self.gauges]
        if twice := [name for name in names if names.count(name) > 1]:
            raise MonitoringError(f"{twice[0]} is monitored twice; name each trait once a layer")

    @staticmethod
    def of(vectors: PersonaVectors | Iterable[PersonaVectors], layers: int | Sequence[int] | None = None) -> Panel:
        """Every trait at every one of the layers; without layers, each where it was tuned.

        Raises:
            VectorsError: If a layer does not exist, or nothing was tuned.
        """
        each = (vectors,) if isinstance(vectors, PersonaVectors) else tuple(vectors)
        chosen: Sequence[int | None] = (layers,) if layers is None or isinstance(layers, int) else layers
        return Panel(tuple(Gauge.of(one, layer) for one in each for layer in chosen))

    def with_random_directions(self, count: int, seed: int = 0) -> Panel:
        """The panel with so many random directions behind it at each of its layers, seed by seed."""
        first = {gauge.layer: gauge for gauge in reversed(self.gauges)}
        models = {id(gauge.vectors): gauge.vectors for gauge in first.values()}
        nulls: list[Gauge] = []
        for each in range(seed, seed + count):
            random = {key: vectors.random_like(each) for key, vectors in models.items()}
            nulls += [Gauge(random[id(first[n].vectors)], n, first[n].reduction) for n in self.layers]
        return Panel((*self.gauges, *nulls))

    def check_model(self, backend: Backend, *, allow_other_model: bool | None = None) -> None:
        """Raise unless all vectors belong to the backend's model.

        Args:
            backend: The model.
            allow_other_model: Take vectors of another model; None where that cannot be allowed.

        Raises:
            VectorsError: Naming what differs.
        """
        for gauge in self.gauges if not allow_other_model else ():
            gauge.vectors.check_model(backend, allowable=allow_other_model is not None)

    def find(self, trait: str, layer: int | None = None) -> int:
        """Number of a gauge; the layer may be left out where the trait is read at one only.

        Raises:
            MonitoringError: If there is none, or several.
        """
        found = [n for n, g in enumerate(self.gauges) if g.trait == trait and layer in (None, g.layer)]
        if len(found) != 1:
            asked = trait if layer is None else f"{trait}@{layer}"
            why = "is read at several layers; name one" if found else "is not monitored"
            raise MonitoringError(f"{asked} {why}: there are {', '.join(map(str, self.gauges))}")
        return found[0]

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers that are read, ascending."""
        return tuple(sorted({gauge.layer for gauge in self.gauges}))

    @cached_property
    def directions(self) -> Float[Tensor, "layers k d_model"]:
        """The directions at each of `layers`; where a layer has fewer than another, its last one stands again."""
        at = [[gauge.direction for gauge in self.gauges if gauge.layer == layer] for layer in self.layers]
        most = max(map(len, at))
        return torch.stack([torch.stack(rows + [rows[-1]] * (most - len(rows))) for rows in at])

    @property
    def read(self) -> Read:
        """What brings the values of a finished text."""
        return Read.projections(self.directions, self.layers)

    def values(self, projections: Float[Tensor, "layers tokens k"]) -> Float[Tensor, "tokens gauges"]:
        """One row's projections, gauge by gauge."""
        rows, slots = self._places
        return projections[rows, :, slots].T

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        rows = [self.layers.index(gauge.layer) for gauge in self.gauges]
        slots = [rows[:number].count(row) for number, row in enumerate(rows)]
        return torch.tensor(rows), torch.tensor(slots)

    def readings(
        self,
        turn: int,
        said: Float[Tensor, "tokens gauges"],
        before: Float[Tensor, " gauges"],
        parts: Sequence[str] = (),
    ) -> tuple[TraitReading, ...]:
        """What the gauges say of a turn, one reading for each.

        Args:
            turn: Number of the assistant's turn, from 0.
            said: The values of the reply's tokens.
            before: Those of the last prompt token; NaN where there is none.
            parts: For each token ``thinking`` or ``answer``; empty where the reply holds no thinking.
        """
        apart = [_mean_of(said, parts, part) for part in (THINKING, ANSWER)]
        return tuple(
            TraitReading(
                turn=turn,
                trait=gauge.trait,
                layer=gauge.layer,
                tokens=len(said),
                mean=float(said[:, number].mean()),
                highest=float(said[:, number].max()) if len(said) else torch.nan,
                prompt_last=float(before[number]),
                thinking_mean=apart[0][number] if parts else None,
                answer_mean=apart[1][number] if parts else None,
            )
            for number, gauge in enumerate(self.gauges)
        )


def _mean_of(said: Float[Tensor, "tokens gauges"], parts: Sequence[str], part: str) -> list[float]:
    """The mean of each gauge over the tokens of a part; NaN where there are none."""
    own: list[float] = said[[at for at, found in enumerate(parts) if found == part]].mean(dim=0).tolist()
    return own


@dataclass(frozen=True)
class TraitReading(Record):
    """One trait at one layer over one turn of the assistant, in residual-stream units.

    Attributes:
        turn: Number of the assistant's turn, from 0.
        trait: Name of the trait.
        layer: Block index, 0-based.
        tokens: Tokens of the reply.
        mean: Mean over them; NaN for an empty reply.
        highest: Largest of them; NaN for an empty reply.
        prompt_last: Value at the last prompt token, before anything was said; NaN where that is not known.
        thinking_mean: Mean over the tokens of the thinking before the answer, its marks included; None without any.
        answer_mean: Mean over those of the answer, where there is thinking; NaN if it never came to one.
    """

    unsaid = frozenset({"thinking_mean", "answer_mean"})

    turn: int
    trait: str
    layer: int
    tokens: int
    mean: float
    highest: float
    prompt_last: float
    thinking_mean: float | None = None
    answer_mean: float | None = None

    @property
    def answered(self) -> float:
        """Mean over the answer, which is the whole reply where there is no thinking; NaN without any."""
        return self.mean if self.answer_mean is None else self.answer_mean
