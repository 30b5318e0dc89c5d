"""The notation of a steering, ``optimistic@18:+1.5, evil@all:ablate``, read into `Term`s."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cache
from importlib.resources import files
from typing import Any

from lark import Lark, Token, Transformer, UnexpectedInput, UnexpectedToken, v_args
from lark.exceptions import UnexpectedCharacters, UnexpectedEOF, VisitError

from persona_lens.backend import Operation, Positions, Schedule, Span
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import listed, printable
from persona_lens.vectors import OWN_REDUCTION


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
class Percentile:
    """A level as a share of a model's own responses: what so many percent of them stay below, layer by layer.

    Attributes:
        value: From 0 to 100.

    Raises:
        NotationError: If it is not.
    """

    value: float

    def __post_init__(self) -> None:
        if not 0 <= self.value <= 100:
            raise NotationError(f"a percentile is from p0 to p100, got p{_plain(self.value)}")

    def __str__(self) -> str:
        return f"p{_plain(self.value)}"


@dataclass(frozen=True)
class Term:
    """One part of a steering.

    Attributes:
        trait: Name of the vectors.
        layers: Where; None for the layer that was tuned.
        operation: What is done; None, with `amount` None, for the coefficient that was tuned.
        amount: The coefficient of an addition, the fraction of an ablation, the threshold of a cap or floor, the
            target of an affine edit; these levels may be percentiles.
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
    amount: float | Percentile | None = None
    relative: bool = False
    increments: bool = False
    reduction: str = OWN_REDUCTION
    positions: Positions | Span = Positions.ALL
    sinks: bool = False
    schedule: Schedule | None = None
    when: When | None = None

    def scaled(self, factor: float) -> Term:
        """The term with its coefficient times a factor; other operations than addition stay as they are."""
        if self.operation is not Operation.ADD or self.amount is None or isinstance(self.amount, Percentile):
            return self
        return replace(self, amount=self.amount * factor)

    def __str__(self) -> str:
        reduction = "" if self.reduction == OWN_REDUCTION else f".{self.reduction}"
        layers = "" if self.layers is None else f"@{self.layers}"
        action = "" if self.operation is None else f":{self._action()}"
        on = "" if self.positions is Positions.ALL else f" on {self.positions}"
        sinks = " with sinks" if self.sinks else ""
        schedule = "" if self.schedule is None else f" schedule({self.schedule})"
        when = "" if self.when is None else f" if {self.when}"
        return f"{self.trait}{reduction}{layers}{action}{on}{sinks}{schedule}{when}"

    def _action(self) -> str:
        amount = self.amount
        if isinstance(amount, Percentile):
            return f"{self.operation}({amount})"
        if self.operation is Operation.ADD and amount is not None:
            number = f"{_plain(float(Decimal(repr(float(amount))).scaleb(2)))}%" if self.relative else _plain(amount)
            signed = number if number.startswith("-") else f"+{number}"
            return f"increments({signed})" if self.increments else signed
        return str(self.operation) if amount is None else f"{self.operation}({_plain(amount)})"


def _plain(number: float) -> str:
    """The shortest way to write a number, without an exponent's plus or a needless point."""
    return repr(round(number, 12)).removesuffix(".0").replace("e+", "e")


# What the grammar's terminals are called in an error.
WORDS = {
    "NAME": "a trait's name",
    "NUMBER": "a number such as +1.5",
    "INT": "a whole number",
    "BOUND": "a whole number",
    "PERCENTILE": "a percentile such as p25",
    "KIND": "all, prompt, response, generating, thinking or answer",
    "SIDE": "> or <",
    "$END": "the end",
}


OPERATIONS = ("PLAIN", "LEVELLED")  # terminals

MAX_CHARACTERS = 2**14
MAX_DIGITS = 9  # of a layer or a token's index
SHOWN = 100  # characters on both sides of a mistake


class NotationError(PersonaLensError):
    """A steering that is not written as steerings are; the message points at the character."""


def parse_terms(text: str) -> tuple[Term, ...]:
    """Read what is written.

    Args:
        text: Terms with commas between them, each
            ``TRAIT[.REDUCTION][@LAYERS][:ACTION] [on POSITIONS] [with sinks] [if CONDITION] [schedule(POINTS)]``:

            - LAYERS: ``18``, ``10-20``, ``12+15+18`` or ``all``; left out, the layer that was tuned.
            - ACTION: ``+1.5`` adds 1.5 times the vector, ``+30%`` a step of 0.3 times the residual's own norm;
              ``increments(+1.5)`` adds at each layer what its vector has beyond the layer before; ``ablate``,
              ``ablate(0.5)``, ``cap(3)``, ``floor(-1)``, ``affine(0)``, and the operations of other packages. A level
              may be a percentile of the model's own responses, ``floor(p25)``, where the vectors carry them. Left out,
              the coefficient that was tuned.
            - POSITIONS: ``all``, ``prompt``, ``response``, ``generating``, ``thinking`` or ``answer``, or a part of
              these such as ``response[5:]``.
            - ``with sinks`` edits attention sinks too, see `persona_lens.backend.sinks`.
            - CONDITION: ``evil@12>3``, a projection at a layer; without one, at the layer that is edited.
            - POINTS: ``0:1 20:0``, factors by token index, interpolated.

    Raises:
        NotationError: With the text, a mark under the character, and what was expected there.
    """
    if len(text) > MAX_CHARACTERS:
        raise NotationError(f"a steering has at most {MAX_CHARACTERS:,} characters, this has {len(text):,}")
    try:
        tree = _grammar().parse(text)
        terms: tuple[Term, ...] = _Reader().transform(tree)
    except UnexpectedInput as error:
        raise NotationError(_pointing(text, _place(error, text), f"expected {_expected(error)}")) from None
    except VisitError as error:
        if not isinstance(error.orig_exc, PersonaLensError):
            raise
        found = getattr(error.obj, "meta", error.obj)  # of a rule; a token has its place itself
        raise NotationError(_pointing(text, getattr(found, "start_pos", None) or 0, str(error.orig_exc))) from None
    return terms


def _operations() -> dict[str, list[str]]:
    """Names of operations by the terminal of the grammar: those that take a fraction, and those with a level."""
    levelled = {operation: operation.argument is not None for operation in Operation if operation is not Operation.ADD}
    return {name: [str(o) for o, is_it in levelled.items() if is_it == (name == "LEVELLED")] for name in OPERATIONS}


@cache
def _grammar() -> Lark:
    grammar = (files("persona_lens.steering") / "notation.lark").read_text(encoding="utf-8")
    for terminal, names in _operations().items():
        grammar += f"{terminal}: {' | '.join(map(json.dumps, names))}\n"
    return Lark(grammar, parser="lalr", propagate_positions=True, maybe_placeholders=False)


def _place(error: UnexpectedInput, text: str) -> int:
    at_end = isinstance(error, UnexpectedEOF) or (isinstance(error, UnexpectedToken) and error.token.type == "$END")
    return len(text) if at_end or error.pos_in_stream is None else error.pos_in_stream


def _expected(error: UnexpectedInput) -> str:
    wanted: set[str] = set()
    if isinstance(error, UnexpectedCharacters):
        wanted = set(error.allowed or ())
    elif isinstance(error, UnexpectedToken | UnexpectedEOF):
        wanted = set(error.expected)
    terminals = {terminal.name: terminal for terminal in _grammar().terminals}
    words = [f"'{each}'" for name in wanted.intersection(OPERATIONS) for each in _operations()[name]]
    others = sorted(wanted.difference(OPERATIONS))
    words += [WORDS.get(name) or f"'{terminals[name].pattern.value}'" for name in others]
    ordered = sorted(set(words), key=lambda word: (word.startswith("'"), word))
    return listed(ordered, "or") if ordered else ""


def _pointing(text: str, place: int, message: str) -> str:
    begin = max(0, place - SHOWN) if len(text) > 2 * SHOWN else 0
    before, behind = (
        printable(part.replace("\n", " ").replace("\t", " ")) for part in (text[begin:place], text[place:][: 2 * SHOWN])
    )
    return f"the steering cannot be read:\n  {before}{behind}\n  {' ' * len(before)}^ {message}"


@v_args(inline=True)
class _Reader(Transformer[Token, Any]):
    """Turns the tree into terms; the methods are named after the grammar's rules."""

    NAME = PLAIN = LEVELLED = str
    KIND = Positions
    SIDE = str

    def INT(self, token: Token) -> int:  # noqa: N802 - the grammar's name
        if len(token) > MAX_DIGITS:
            raise NotationError(f"a number of layers or tokens has at most {MAX_DIGITS} digits")
        return int(token)

    BOUND = INT

    def NUMBER(self, token: Token) -> float:  # noqa: N802 - the grammar's name
        return float(token)

    def PERCENTILE(self, token: Token) -> Percentile:  # noqa: N802 - the grammar's name
        return Percentile(float(token[1:]))

    def start(self, *terms: Term) -> tuple[Term, ...]:
        return terms

    def term(self, trait: str, *parts: dict[str, Any]) -> Term:
        found: dict[str, Any] = {}
        for part in parts:
            if again := [name for name in part if name in found]:
                raise NotationError(f"{trait}: {again[0]} is given twice")
            found.update(part)
        if "layers" in found and "operation" not in found:
            raise NotationError(f"{trait} has layers but nothing to do there, such as :+1.5 or :ablate")
        if found.get("increments") and "layers" not in found:
            raise NotationError(f"{trait}: increments go from layer to layer, so say which, such as @all")
        return Term(trait, **found)

    def reduction(self, name: str) -> dict[str, Any]:
        return {"reduction": name}

    def layers(self, *ranges: tuple[int, int]) -> dict[str, Any]:
        return {"layers": Layers(ranges)}

    def range(self, first: int, last: int | None = None) -> tuple[int, int]:
        if last is not None and last < first:
            raise NotationError(f"the layers {first}-{last} run backwards")
        return first, first if last is None else last

    def add(self, amount: float) -> dict[str, Any]:
        return {"operation": Operation.ADD, "amount": amount}

    def relative(self, amount: float) -> dict[str, Any]:
        return {"operation": Operation.ADD, "amount": float(Decimal(repr(amount)).scaleb(-2)), "relative": True}

    def increments(self, amount: float) -> dict[str, Any]:
        return {"operation": Operation.ADD, "amount": amount, "increments": True}

    def operation(self, name: str, amount: float | Percentile | None = None) -> dict[str, Any]:
        return {"operation": Operation(name), "amount": amount}

    def on(self, kind: Positions, span: tuple[int, int | None] | None = None) -> dict[str, Any]:
        return {"positions": kind if span is None else Span(kind, *span)}

    def sinks(self) -> dict[str, Any]:
        return {"sinks": True}

    def within(self, start: int, stop: int) -> tuple[int, int | None]:
        return start, stop

    def beginning(self, start: int) -> tuple[int, int | None]:
        return start, None

    def until(self, stop: int) -> tuple[int, int | None]:
        return 0, stop

    def point(self, place: int, factor: float) -> tuple[int, float]:
        return place, factor

    def schedule(self, *points: tuple[int, float]) -> dict[str, Any]:
        return {"schedule": Schedule(points)}

    def when(self, trait: str, *parts: Any) -> dict[str, Any]:
        *layer, side, threshold = parts
        return {"when": When(trait, layer[0] if layer else None, threshold, side == ">")}
