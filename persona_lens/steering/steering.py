"""`Steering`: terms and the vectors they name, which together say what is written where."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.backend import (
    Backend,
    Condition,
    Edit,
    Edits,
    ForwardResult,
    Generation,
    ModelInfo,
    Operation,
    Positions,
    Read,
    Sampling,
    TokenBatch,
    Watch,
    as_edits,
    watched_generation,
)
from persona_lens.backend.single_rows import DelegatingBackend
from persona_lens.core.documents import header_text, save_tensors, write_once
from persona_lens.core.errors import PersonaLensError
from persona_lens.steering.notation import Layers, Percentile, Term, parse_terms
from persona_lens.vectors import OWN_REDUCTION, PersonaVectors

# What is left of a direction, as a share of its norm, when others that are ablated too have been taken out of it: less
# than this is rounding.
NEGLIGIBLE = 1e-4
FORMAT_VERSION = 1
METADATA = "persona_lens_steering"


class SteeringError(PersonaLensError):
    """A steering that cannot be carried out as asked."""


@dataclass(frozen=True, eq=False, repr=False)
class Steering:
    """What to do to the residual stream, in words, with the vectors that the words name.

    Terms act in the order in which they stand where several meet at a layer. Traits that are ablated at the same layer
    and tokens are ablated together: none of them is left, however alike they are.

    Attributes:
        terms: What is done.
        vectors: By the names that the terms use.

    Raises:
        SteeringError: If a trait has no vectors, a layer does not exist, or the vectors are of different models.
    """

    terms: tuple[Term, ...]
    vectors: Mapping[str, PersonaVectors]

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", tuple(_settled(term, self._vectors_of(term.trait)) for term in self.terms))
        if not self.terms:
            raise SteeringError("a steering needs at least one term, such as optimistic@18:+1.5")
        conditions = [term.when.trait for term in self.terms if term.when is not None]
        names = dict.fromkeys([term.trait for term in self.terms] + conditions)
        named = {name: self._vectors_of(name) for name in names}
        first = next(iter(named.values()))
        for other in named.values():
            if different := first.model.differences(other.model):
                raise SteeringError(f"the vectors belong to different models: {'; '.join(different)}")
        object.__setattr__(self, "vectors", named)
        self.edits()

    @staticmethod
    def parse(text: str, vectors: PersonaVectors | Iterable[PersonaVectors] | Mapping[str, PersonaVectors]) -> Steering:
        """Read a steering from its notation.

        Args:
            text: Such as ``optimistic@18:+1.5, evil@all:ablate``; see `parse_terms`.
            vectors: Those of the traits that are named: by name, or named after their traits.

        Raises:
            NotationError: If it is not written so.
            SteeringError: If it does not fit the vectors.
        """
        return Steering(parse_terms(text), by_name(vectors))

    @staticmethod
    def adding(
        vectors: PersonaVectors,
        layer: int,
        coefficient: float,
        *,
        reduction: str = OWN_REDUCTION,
        positions: Positions = Positions.ALL,
    ) -> Steering:
        """The vector of a layer, added there as often as the coefficient says."""
        layers = Layers(((layer, layer),))
        term = Term(vectors.trait, layers, Operation.ADD, coefficient, reduction=reduction, positions=positions)
        return Steering((term,), {vectors.trait: vectors})

    def __str__(self) -> str:
        return ", ".join(map(str, self.terms))

    def __repr__(self) -> str:
        model = next(iter(self.vectors.values())).model
        return f"<Steering {self} of {model.in_short}>"

    def edits(self) -> tuple[Edit, ...]:
        """The edits, term by term and layer by layer."""
        return tuple(edit for _, edits in self.by_term() for edit in edits)

    def by_term(self) -> tuple[tuple[Term, tuple[Edit, ...]], ...]:
        """The edits of each term; none at a layer where other ablations leave nothing of its direction."""
        found: list[list[Edit]] = [[] for _ in self.terms]
        written = ((number, edit) for number, term in enumerate(self.terms) for edit in self._edits_of(term))
        for number, edit in _ablated_together(written):
            found[number].append(edit)
        return tuple((term, tuple(edits)) for term, edits in zip(self.terms, found, strict=True))

    def null(self, seed: int) -> tuple[Edit, ...]:
        """The same edits in a random direction: what a claim about this steering has to be held against.

        All directions are turned together by one random rotation, so that each keeps its norm, and two keep the angle
        between them: what increments add up to is as long as it was. Conditions keep their own directions.
        """
        edits = self.edits()
        turned = _turned(torch.stack([edit.direction for edit in edits]), seed)
        return tuple(replace(edit, direction=direction) for edit, direction in zip(edits, turned, strict=True))

    def scaled(self, factor: float) -> Steering:
        """The steering with every coefficient of an addition times a factor."""
        return Steering(tuple(term.scaled(factor) for term in self.terms), self.vectors)

    @property
    def content_hash(self) -> str:
        """SHA-256 over everything that determines what the steering does."""
        return "sha256:" + hashlib.sha256("".join(edit.content_hash for edit in self.edits()).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Steering) and self.content_hash == other.content_hash

    def __hash__(self) -> int:
        return hash(self.content_hash)

    def save(self, path: Path | str) -> Path:
        """Write the steering with its vectors into one safetensors file, whose bytes depend on the content alone.

        Raises:
            SteeringError: If the file exists and holds something else.
        """
        tensors, headers = {}, {}
        for name, each in sorted(self.vectors.items()):
            tensors.update({f"{name}/{reduction}": rows for reduction, rows in each.directions.items()})
            headers[name] = {
                "trait": each.trait,
                "model": {field: getattr(each.model, field) for field in ModelInfo.__dataclass_fields__},
                "provenance": dict(each.provenance),
            }
        header = {"format_version": FORMAT_VERSION, "steering": str(self), "vectors": headers}
        return write_once(path, save_tensors(tensors, METADATA, header_text(header)), SteeringError)

    def check_model(self, backend: Backend, *, allowable: bool = True) -> None:
        """Raise `persona_lens.vectors.vectors.VectorsError` unless the vectors belong to the backend's model."""
        for each in self.vectors.values():
            each.check_model(backend, allowable=allowable)

    def on(self, backend: Backend, *, allow_other_model: bool = False) -> SteeredBackend:
        """The backend, steered: whatever runs on what is returned runs under these edits.

        Args:
            backend: The model.
            allow_other_model: Steer a model that the vectors do not belong to.
        """
        if not allow_other_model:
            self.check_model(backend)
        return SteeredBackend(backend, self)

    @contextmanager
    def applied(self, backend: Backend, *, allow_other_model: bool = False) -> Iterator[None]:
        """While open, your own calls of the model under the backend run steered; see `Backend.editing`.

        Args:
            backend: The model.
            allow_other_model: Steer a model that the vectors do not belong to.
        """
        if not allow_other_model:
            self.check_model(backend)
        with backend.editing(self.edits()):
            yield

    def describe(self) -> dict[str, Any]:
        """The steering as JSON values, for the record of a run."""
        return {
            "text": str(self),
            "content_hash": self.content_hash,
            "vectors": {name: each.content_hash for name, each in sorted(self.vectors.items())},
        }

    def _vectors_of(self, name: str) -> PersonaVectors:
        if name not in self.vectors:
            there = ", ".join(sorted(self.vectors)) or "none"
            raise SteeringError(f"there are no vectors for {name!r}; there are vectors for: {there}")
        return self.vectors[name]

    def _edits_of(self, term: Term) -> Iterator[Edit]:
        assert term.layers is not None  # settled when this was made
        source = self.vectors[term.trait]
        before: Tensor | float = 0.0
        for layer in term.layers.of(source.model.n_layers):
            v = source.vector(layer, term.reduction)
            yield self._edit(term, layer, v - before if term.increments else v)
            before = v

    def _edit(self, term: Term, layer: int, direction: Tensor) -> Edit:
        operation, amount = term.operation, term.amount
        assert operation is not None
        if isinstance(amount, Percentile):
            amount = self.vectors[term.trait].level(layer, amount.value, term.reduction)
        level = operation.argument
        parts: dict[str, Any] = {level: amount} if level else {"coefficient": 1.0 if amount is None else amount}
        condition = None
        if term.when is not None:
            at = layer if term.when.layer is None else term.when.layer
            towards = self.vectors[term.when.trait].vector(at)
            condition = Condition(at, towards, term.when.threshold, term.when.above)
        return Edit(
            layer,
            direction,
            operation,
            relative=term.relative,
            positions=term.positions,
            schedule=term.schedule,
            condition=condition,
            sinks=term.sinks,
            **parts,
        )


class SteeredBackend(DelegatingBackend):
    """A backend whose every call runs under a steering, before the edits of the call itself.

    It is a backend like any other: replies, extraction, judging and evaluation run on it as they are. Its `info` names
    the steering, so that a run on it is never taken for one on the plain model.

    Args:
        inner: The plain backend.
        steering: What is at work.
    """

    def __init__(self, inner: Backend, steering: Steering) -> None:
        super().__init__(inner)
        self.steering = steering
        self._edits = steering.edits()
        self._name = f"steered {steering.content_hash[:19]}"

    def __repr__(self) -> str:
        return f"<{self.inner!r} under {self.steering}>"

    @property
    def info(self) -> ModelInfo:
        """The model, with the steering in the name of the backend."""
        plain = self.inner.info
        return replace(plain, backend=f"{plain.backend}, {self._name}")

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        edits: Edits = (),
        reads: Sequence[Read] = (),
    ) -> Generation:
        """See `Backend.generate`."""
        return self.inner.generate(prompts, sampling, (*self._edits, *as_edits(edits)), reads)

    def generate_watched(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        watch: Watch,
        edits: Edits = (),
        reads: Sequence[Read] = (),
    ) -> Generation:
        """See `persona_lens.backend.streaming.WatchableBackend.generate_watched`."""
        return watched_generation(self.inner, prompts, sampling, watch, (*self._edits, *as_edits(edits)), reads)

    def forward(
        self, tokens: TokenBatch, edits: Edits = (), reads: Sequence[Read] = (), *, logprobs: bool = False
    ) -> ForwardResult:
        """See `Backend.forward`."""
        return self.inner.forward(tokens, (*self._edits, *as_edits(edits)), reads, logprobs=logprobs)

    def editing(self, edits: Edits) -> AbstractContextManager[None]:
        """See `Backend.editing`."""
        return self.inner.editing((*self._edits, *as_edits(edits)))


def _settled(term: Term, vectors: PersonaVectors) -> Term:
    """The term with the layer, and the coefficient, that were tuned where none was written.

    The vectors' own reduction is not written, so that a steering is written in one way.
    """
    found = _with_tuned(term, vectors)
    return replace(found, reduction=OWN_REDUCTION) if found.reduction == vectors.default_reduction else found


def _with_tuned(term: Term, vectors: PersonaVectors) -> Term:
    if term.layers is not None and term.operation is not None:
        return term
    example = f"{term.trait}@{vectors.model.n_layers // 2}{'' if term.operation else ':+1.5'}"
    tuned = vectors.tuned_choice(f"write one behind its name, such as {example}")
    settled = replace(term, layers=term.layers or Layers(((tuned.layer, tuned.layer),)))
    if term.operation is not None:
        return settled
    return replace(settled, operation=Operation.ADD, amount=tuned.coefficient, reduction=tuned.reduction)


def _turned(directions: Float[Tensor, "k d_model"], seed: int) -> Float[Tensor, "k d_model"]:
    """The directions after a random rotation; only what it does to their span is ever computed."""
    generator = torch.Generator().manual_seed(seed)
    basis, coordinates = torch.linalg.qr(directions.double().T)
    noise = torch.randn(basis.shape, generator=generator, dtype=torch.float64)
    frame, scale = torch.linalg.qr(noise)
    frame = frame * scale.diagonal().sign()  # else the first entry of a frame would always have the same sign
    turned: Tensor = (frame @ coordinates).T.float()
    return turned


def _ablated_together(numbered: Iterable[tuple[int, Edit]]) -> Iterator[tuple[int, Edit]]:
    """The edits, numbered by term, with each full ablation at right angles to those before it at the same place.

    One after the other, ablations along directions that are alike would each bring back some of the one before.
    """
    before: dict[str, list[Tensor]] = {}
    for number, edit in numbered:
        if edit.operation is not Operation.ABLATE or edit.coefficient != 1.0 or edit.condition or edit.schedule:
            yield number, edit
            continue
        others = before.setdefault(f"{edit.layer} {edit.positions} {edit.sinks}", [])
        rest = edit.direction
        for unit in others:
            rest = rest - (rest @ unit) * unit
        if float(rest.norm()) <= NEGLIGIBLE * float(edit.direction.norm()):
            continue
        others.append(rest / rest.norm())
        yield number, replace(edit, direction=rest) if len(others) > 1 else edit


def rowwise(rows: Iterable[tuple[Edit, ...]]) -> list[Edit]:
    """Edits for a batch in which every row has edits of its own.

    Edits that differ only in their coefficient become one, with a coefficient for each row. Each row's edits keep their
    order.

    Args:
        rows: For each row its edits, each with one coefficient for all.
    """
    listed = list(rows)
    different = {id(edit): edit for edits in listed for edit in edits}  # most rows share their edits with others
    kinds = {key: replace(edit, coefficient=1.0).content_hash for key, edit in different.items()}
    merged: dict[tuple[int, str], tuple[Edit, Tensor]] = {}
    for number, edits in enumerate(listed):
        for place, edit in enumerate(edits):
            _, coefficients = merged.setdefault((place, kinds[id(edit)]), (edit, torch.zeros(len(listed))))
            coefficients[number] = edit.coefficient
    return [replace(edit, coefficient=c) for _, (edit, c) in sorted(merged.items(), key=lambda item: item[0][0])]


def by_name(
    vectors: PersonaVectors | Iterable[PersonaVectors] | Mapping[str, PersonaVectors],
) -> Mapping[str, PersonaVectors]:
    """Vectors by the names that a notation has for them: those given, or of their traits."""
    if isinstance(vectors, Mapping):
        return vectors
    return {each.trait: each for each in ([vectors] if isinstance(vectors, PersonaVectors) else vectors)}
