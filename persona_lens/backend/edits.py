"""What to write into the residual stream: `Edit`.

An edit is data. It can be compared, hashed, sent to another machine and kept in a record, and it never remembers a
model. `persona_lens.backend.writing` does the writing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from persona_lens.backend import writing
from persona_lens.backend.tokens import Condition, EditError, Positions, Schedule, Span
from persona_lens.backend.writing import changed, prepared
from persona_lens.core.plugins import Registry


class _Named(type):
    def __iter__(cls) -> Iterator[Any]:
        return iter(OPERATIONS.usable().values())


class Operation(str, metaclass=_Named):
    """What an edit does to a residual; a name among others, and all that has to be said of it.

    ``Operation("cap")`` finds one by its name, and iterating over the class goes over all of them, those of other
    packages included: a package adds one by an entry point in the group ``persona_lens.operations``. Where a model runs
    on a server, the module of ``moves`` is sent there, so that it may use nothing but torch at run time.

    Attributes:
        argument: What an edit must give for it: its ``threshold``, its ``target``, or nothing.
        formula: What becomes of a residual, see `persona_lens.backend.writing.OPERATIONS`.
        moves: How far each token moves along the unit direction: a differentiable function of the residual [batch,
            tokens, d_model], the direction [d_model] and the argument, to [batch, tokens].

    Raises:
        ValueError: If there is none of that name, or what is said of a new one cannot be.
    """

    ADD: ClassVar[Operation]
    ABLATE: ClassVar[Operation]
    CAP: ClassVar[Operation]
    FLOOR: ClassVar[Operation]
    AFFINE: ClassVar[Operation]

    argument: str | None
    formula: str
    moves: Callable[..., Tensor]

    def __new__(  # noqa: D102 - the class says it
        cls, name: str, argument: str | None = None, formula: str = "", moves: Callable[..., Tensor] | None = None
    ) -> Operation:
        if moves is None:
            there = OPERATIONS.built_in if name in OPERATIONS.built_in else OPERATIONS.usable()
            if name not in there:
                raise ValueError(f"operation is one of {', '.join(there)}; got {name!r}")
            return there[name]
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or argument not in (None, "threshold", "target"):
            raise ValueError(f"operation {name!r}: a name is of lower-case letters, an argument threshold or target")
        made = super().__new__(cls, name)
        made.argument, made.formula, made.moves = argument, formula, moves
        return made

    def __reduce__(self) -> tuple[type[Operation], tuple[str]]:
        return Operation, (str(self),)


OPERATIONS: Registry[Operation] = Registry(
    "persona_lens.operations",
    Operation,
    "operation",
    EditError,
    {name: Operation(name, *entry) for name, entry in writing.OPERATIONS.items()},
)
for _name, _operation in OPERATIONS.built_in.items():
    setattr(Operation, _name.upper(), _operation)


Where: TypeAlias = Positions | Span | Bool[Tensor, "batch width"]


@dataclass(frozen=True, eq=False, repr=False)
class Edit:
    """A change to the residual stream after one block.

    Attributes:
        layer: Block index l, 0-based; the edit acts on the block's output.
        direction: Direction v, float [d_model]. Copied, as the other tensors are, so that a later change of the
            caller's tensor has no effect; gradients flow through the copy.
        operation: What to do, see `Operation`.
        coefficient: Factor on the change: multiples of the raw direction for `ADD`; for the others the fraction of the
            change that is made, 1 being all of it. One number, or float [batch] with one for each row, so that one
            batch can hold a whole sweep; a row whose coefficient is 0 stays as it is.
        threshold: Largest (`CAP`) or smallest (`FLOOR`) projection on the unit direction that is left, in
            residual-stream units.
        target: The projection that `AFFINE` leaves, in residual-stream units.
        relative: For `ADD`: the coefficient counts norms of the residual at that token instead of norms of v.
        positions: Which tokens, by kind; a part of a kind; or a mask, bool [batch, width], over a left-padded batch. In
            a generation the mask covers the prompt, and no generated token is edited.
        schedule: A further factor, by the index of the token; None for 1 everywhere.
        condition: Leaves out tokens where it is not met.
        sinks: Edit attention sinks too, see `persona_lens.backend.sinks`. They are left out otherwise wherever it
            depends on the residual what is done to a token: by all operations but an `ADD` that is neither relative nor
            conditional, which moves every token by the same step.

    Raises:
        EditError: If a part is missing, is not used by the operation, or has the wrong shape.
    """

    layer: int
    direction: Float[Tensor, " d_model"]
    operation: Operation = OPERATIONS.built_in["add"]
    coefficient: float | Float[Tensor, " batch"] = 1.0
    threshold: float | None = None
    target: float | None = None
    relative: bool = False
    positions: Where = Positions.ALL
    schedule: Schedule | None = None
    condition: Condition | None = None
    sinks: bool = False

    def __post_init__(self) -> None:
        _check_parts(self)
        for name in ("direction", "coefficient", "positions"):
            if isinstance(value := getattr(self, name), Tensor):
                object.__setattr__(self, name, value.clone())

    def __repr__(self) -> str:
        rows = self.coefficient
        strength = f"{len(rows)} coefficients" if isinstance(rows, Tensor) else f"coefficient {rows:g}"
        named = (("threshold", self.threshold), ("target", self.target))
        more = "".join(f", {name} {value:g}" for name, value in named if value is not None)
        where = "a mask" if isinstance(self.positions, Tensor) else self.positions
        along = f"a direction of length {float(self.direction.norm()):.3g}"
        return f"<Edit {self.operation} at layer {self.layer}, {strength}{more}, {along}, on {where}>"

    @staticmethod
    def add(
        layer: int,
        direction: Float[Tensor, " d_model"],
        coefficient: float | Float[Tensor, " batch"] = 1.0,
        positions: Where = Positions.ALL,
        *,
        relative: bool = False,
    ) -> Edit:
        """Add ``coefficient * direction`` (the paper's steering, section 4 of the method)."""
        return Edit(layer, direction, coefficient=coefficient, positions=positions, relative=relative)

    @staticmethod
    def ablate(layer: int, direction: Float[Tensor, " d_model"], positions: Where = Positions.ALL) -> Edit:
        """Remove the component along ``direction``, so that the projection is zero."""
        return Edit(layer, direction, Operation.ABLATE, positions=positions)

    @staticmethod
    def cap(
        layer: int, direction: Float[Tensor, " d_model"], threshold: float, positions: Where = Positions.ALL
    ) -> Edit:
        """Keep the projection on the unit direction at or below ``threshold``."""
        return Edit(layer, direction, Operation.CAP, threshold=threshold, positions=positions)

    @staticmethod
    def floor(
        layer: int, direction: Float[Tensor, " d_model"], threshold: float, positions: Where = Positions.ALL
    ) -> Edit:
        """Keep the projection on the unit direction at or above ``threshold``."""
        return Edit(layer, direction, Operation.FLOOR, threshold=threshold, positions=positions)

    @staticmethod
    def affine(
        layer: int, direction: Float[Tensor, " d_model"], target: float, positions: Where = Positions.ALL
    ) -> Edit:
        """Ablate, then set the projection on the unit direction to ``target``."""
        return Edit(layer, direction, Operation.AFFINE, target=target, positions=positions)

    @property
    def leaves_out_sinks(self) -> bool:
        """Whether it depends on which tokens are attention sinks."""
        depends = self.operation is not Operation.ADD or self.relative or self.condition is not None
        return depends and not self.sinks

    def rows(self, start: int, stop: int, width: int | None = None) -> Edit:
        """The same edit for rows ``start`` to ``stop`` of the batch it was made for.

        Args:
            start: First row.
            stop: One past the last row.
            width: Tokens of the longest of these rows: in a batch of their own they are padded to that, and a
                positions mask loses the columns before it. None keeps the mask's width.
        """
        changes: dict[str, Tensor] = {}
        if isinstance(self.coefficient, Tensor):
            changes["coefficient"] = self.coefficient[start:stop]
        if isinstance(self.positions, Tensor):
            mask = self.positions[start:stop]
            changes["positions"] = mask if width is None else mask[:, -width:]
        return replace(self, **changes) if changes else self  # type: ignore[arg-type]

    def plain(self) -> dict[str, Any]:
        """The edit as a dictionary of tensors, numbers and strings, which needs no class of this package."""
        span = self.positions if isinstance(self.positions, Span) else None
        kind = span.kind if span is not None else self.positions
        return {
            "layer": self.layer,
            "direction": self.direction,
            "operation": str(self.operation),
            "moves": None if self.operation in writing.OPERATIONS else self.operation.moves,
            "coefficient": self.coefficient if isinstance(self.coefficient, Tensor) else float(self.coefficient),
            "level": self.target if self.threshold is None else self.threshold,
            "relative": self.relative,
            "positions": kind if isinstance(kind, Tensor) else str(kind),
            "span": (span.start, span.stop) if span is not None else None,
            "schedule": self.schedule.points if self.schedule is not None else None,
            "condition": self.condition.plain() if self.condition is not None else None,
            "sinks": not self.leaves_out_sinks,
        }

    @property
    def content_hash(self) -> str:
        """SHA-256 over everything that determines what the edit does."""
        digest = hashlib.sha256()
        plain = self.plain()
        for name, value in [*plain.items(), *(plain["condition"] or {}).items()]:
            if name not in ("condition", "moves"):
                digest.update(name.encode() + _bytes_of(value))
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Edit) and self.content_hash == other.content_hash

    def __hash__(self) -> int:
        return hash(self.content_hash)


def _bytes_of(value: object) -> bytes:
    if isinstance(value, Tensor):
        array = value.detach().to("cpu", torch.float64).contiguous().numpy()
        return repr(array.shape).encode() + array.tobytes()
    if isinstance(value, int | float):  # 2 and 2.0 do the same
        return repr(float(value)).encode()
    if isinstance(value, tuple):
        return b"(" + b",".join(map(_bytes_of, value)) + b")"
    return repr(value).encode()


def _check_parts(edit: Edit) -> None:
    if isinstance(edit.layer, bool) or not isinstance(edit.layer, int) or edit.layer < 0:
        raise EditError(f"layer must be a whole number counted from 0, got {edit.layer!r}")
    direction = edit.direction
    if direction.ndim != 1 or not direction.is_floating_point():
        raise EditError(
            f"direction must be a float tensor of shape [d_model], got {direction.dtype} {list(direction.shape)}; "
            "pick one layer of the vectors, for example vectors[18]"
        )
    if not bool(torch.isfinite(direction).all()):
        raise EditError("direction holds NaN or infinity; it cannot steer anything")
    if (edit.operation is not Operation.ADD or edit.relative) and not bool(direction.detach().any()):
        what = "a relative coefficient" if edit.operation is Operation.ADD else edit.operation
        raise EditError(f"{what} needs a direction that is not zero everywhere")
    _check_strength(edit)
    if isinstance(edit.positions, Tensor) and (edit.positions.ndim != 2 or edit.positions.dtype != torch.bool):
        raise EditError(
            f"a positions mask must be bool [batch, width], got {edit.positions.dtype} {list(edit.positions.shape)}"
        )
    if edit.condition is not None and not 0 <= edit.condition.layer <= edit.layer:
        raise EditError(
            f"the condition is at layer {edit.condition.layer} and the edit at layer {edit.layer}; it has to be known "
            "before the edit, so put it at the same layer or an earlier one"
        )


def _check_strength(edit: Edit) -> None:
    for name, value in (("threshold", edit.threshold), ("target", edit.target)):
        wanted = name == edit.operation.argument
        if (value is not None) != wanted:
            raise EditError(f"{edit.operation} {'needs a' if wanted else 'takes no'} {name}")
        if value is not None and not isfinite(value):
            raise EditError(f"{name} must be finite, got {value}")
    if edit.relative and edit.operation is not Operation.ADD:
        raise EditError(f"only add takes a relative coefficient; {edit.operation} does not depend on the vector's norm")
    if isinstance(edit.coefficient, Tensor) and edit.coefficient.ndim != 1:
        raise EditError(f"coefficient must be one number or float [batch], got shape {list(edit.coefficient.shape)}")
    coefficient = torch.as_tensor(edit.coefficient)
    if not bool(torch.isfinite(coefficient).all()):
        raise EditError("coefficient holds NaN or infinity, or is beyond float32; give a smaller one")
    if edit.operation is not Operation.ADD and not bool(((coefficient >= 0) & (coefficient <= 1)).all()):
        raise EditError(f"the coefficient of {edit.operation} is the fraction of the change that is made, from 0 to 1")


@runtime_checkable
class HasEdits(Protocol):
    """What says which edits it consists of, as a steering does."""

    def edits(self) -> tuple[Edit, ...]:
        """The edits, in the order in which they act."""


Edits: TypeAlias = Edit | Sequence[Edit] | HasEdits


def as_edits(edits: Edits | str) -> tuple[Edit, ...]:
    """Edits in whatever form they are given: one, several, or something that consists of them.

    Raises:
        EditError: If that is none of them, a notation among them: a backend does not know its vectors.
    """
    if isinstance(edits, Edit):
        return (edits,)
    if isinstance(edits, HasEdits):
        return edits.edits()
    if isinstance(edits, str):
        raise EditError(
            f"the notation {edits!r} needs the vectors that it names: give Steering.parse({edits!r}, vectors)"
        )
    listed = tuple(edits) if isinstance(edits, Iterable) else (edits,)
    if all(isinstance(edit, Edit) for edit in listed):
        return listed
    raise EditError(f"edits are one Edit, several, or a Steering, got {type(edits).__name__}: {edits!r:.80}")


def edits_of_rows(edits: Sequence[Edit], start: int, stop: int, lengths: Sequence[int]) -> list[Edit]:
    """Edits of a batch for rows ``start`` to ``stop`` alone; ``lengths`` are the tokens of all rows."""
    return [edit.rows(start, stop, max(lengths[start:stop])) for edit in edits]


def check_edits(
    edits: Sequence[Edit], n_layers: int, d_model: int, batch: int | None = None, width: int | None = None
) -> None:
    """Raise `EditError` for the first edit that does not fit the model, or a batch of so many rows and tokens a row."""
    for edit in edits:
        if edit.layer >= n_layers:
            raise EditError(f"layer {edit.layer} does not exist: the model has layers 0 to {n_layers - 1}")
        directions = {"direction": edit.direction}
        if edit.condition is not None:
            directions["direction of the condition"] = edit.condition.direction
        for name, direction in directions.items():
            if direction.shape[0] != d_model:
                raise EditError(f"{name} has {direction.shape[0]} entries, the model's d_model is {d_model}")
        for name, value in (("coefficient", edit.coefficient), ("positions mask", edit.positions)):
            if isinstance(value, Tensor) and value.shape[0] != batch:
                raise EditError(f"{name} has {value.shape[0]} rows, the batch has {batch}")
        if isinstance(edit.positions, Tensor) and edit.positions.shape[1] != width:
            raise EditError(
                f"positions mask is {edit.positions.shape[1]} tokens wide, the left-padded batch is {width}; "
                "in a generation the mask covers the prompts only"
            )


def apply_edit(
    h: Float[Tensor, "batch tokens d_model"], edit: Edit, where: Bool[Tensor, "batch tokens"] | None
) -> Float[Tensor, "batch tokens d_model"]:
    """The residual after one edit, whose condition, schedule and sinks are the caller's business.

    Args:
        h: Residual of one layer.
        edit: What to do; a coefficient for each row must match the batch.
        where: Positions to change; None changes every position.

    Returns:
        A new tensor in h's dtype and on its device.
    """
    return changed(h, prepared(edit.plain(), h.device, h.dtype), where)
