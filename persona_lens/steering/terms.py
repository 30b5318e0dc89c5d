"""`Term`: one trait's part in a steering, as it is written: what is done, at which layers, to which tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import Decimal

from persona_lens.backend import Operation, Positions, Schedule, Span
from persona_lens.vectors import DEFAULT_REDUCTION


@dataclass(frozen=True)
class Layers:
    """Which layers a term edits.

    Attributes:
        ranges: Pairs of a first and a last layer, both included; empty for every layer.
    """

    ranges: tuple[tuple[int, int], ...] = ()

    def of(self, n_layers: int) -> tuple[int, ...]:
        """The layers, ascending, in a model that has so many; of a range that goes beyond it, one layer beyond."""
        if not self.ranges:
            return tuple(range(n_layers))
        inside = (range(first, min(last, max(first, n_layers)) + 1) for first, last in self.ranges)
        return tuple(sorted({layer for layers in inside for layer in layers}))

    def __str__(self) -> str:
        return "+".join(f"{a}" if a == b else f"{a}-{b}" for a, b in self.ranges) or "all"


@dataclass(frozen=True)
class When:
    """A condition as it is written: a trait's projection above or below a threshold.

    Attributes:
        trait: Name of the vectors.
        layer: Where the projection is taken; None for the layer of the edit.
        threshold: In residual-stream units.
        above: Above or below.
    """

    trait: str
    layer: int | None
    threshold: float
    above: bool = True

    def __str__(self) -> str:
        at = "" if self.layer is None else f"@{self.layer}"
        return f"{self.trait}{at}{'>' if self.above else '<'}{_plain(self.threshold)}"


@dataclass(frozen=True)
class Term:
    """One part of a steering.

    Attributes:
        trait: Name of the vectors.
        layers: Where; None for the layer that was tuned.
        operation: What is done; None, with `amount` None, for the coefficient that was tuned.
        amount: The coefficient of an addition, the fraction of an ablation, the threshold of a cap or floor, the
            target of an affine edit.
        relative: Whether the coefficient counts norms of the residual.
        increments: Whether each layer adds only what its vector has beyond that of the layer before.
        reduction: Which of the trait's vectors.
        positions: Which tokens.
        sinks: Whether attention sinks are edited too, see `persona_lens.backend.Edit`.
        schedule: How strength goes on from token to token.
        when: Condition.
    """

    trait: str
    layers: Layers | None = None
    operation: Operation | None = None
    amount: float | None = None
    relative: bool = False
    increments: bool = False
    reduction: str = DEFAULT_REDUCTION
    positions: Positions | Span = Positions.ALL
    sinks: bool = False
    schedule: Schedule | None = None
    when: When | None = None

    def scaled(self, factor: float) -> Term:
        """The term with its coefficient times a factor; other operations than addition stay as they are."""
        if self.operation is not Operation.ADD or self.amount is None:
            return self
        return replace(self, amount=self.amount * factor)

    def __str__(self) -> str:
        reduction = "" if self.reduction == DEFAULT_REDUCTION else f".{self.reduction}"
        layers = "" if self.layers is None else f"@{self.layers}"
        action = "" if self.operation is None else f":{self._action()}"
        on = "" if self.positions is Positions.ALL else f" on {self.positions}"
        sinks = " with sinks" if self.sinks else ""
        schedule = "" if self.schedule is None else f" schedule({self.schedule})"
        when = "" if self.when is None else f" if {self.when}"
        return f"{self.trait}{reduction}{layers}{action}{on}{sinks}{schedule}{when}"

    def _action(self) -> str:
        amount = self.amount
        if self.operation is Operation.ADD and amount is not None:
            number = f"{_plain(float(Decimal(repr(float(amount))).scaleb(2)))}%" if self.relative else _plain(amount)
            signed = number if number.startswith("-") else f"+{number}"
            return f"increments({signed})" if self.increments else signed
        return str(self.operation) if amount is None else f"{self.operation}({_plain(amount)})"


def _plain(number: float) -> str:
    """The shortest way to write a number, without an exponent's plus or a needless point."""
    return repr(round(number, 12)).removesuffix(".0").replace("e+", "e")
