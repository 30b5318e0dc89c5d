"""`CrossEffects`: the matrix of a crossing, a row for each steering and a column for each trait measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from persona_lens.core.documents import Record, plain
from persona_lens.core.statistics import CHANGES, Ends
from persona_lens.extraction.experiment import Value, json_of
from persona_lens.reports.result import Result
from persona_lens.steering.arms import NONE, RANDOM, UNSTEERED, VECTOR, Change, change_of
from persona_lens.steering.steering import Steering
from persona_lens.vectors import PersonaVectors
from persona_lens.vectors.geometry import Cosines, cosines


@dataclass(frozen=True)
class CrossRow:
    """One response, with everything that was measured of it.

    Attributes:
        arm: Name of the steering; `persona_lens.steering.arms.UNSTEERED` for the responses without one.
        direction: ``vector``, ``random``, or ``none`` for the unsteered.
        question: Number of the question.
        sample: Number of the sample.
        scores: By trait, 0 to 100; None if the response is empty or has no score.
        steered_projections: By trait, of the mean response token, or of a model that thinks the mean token of its
            answer, in the model as it was steered while it wrote, on the trait's unit vector, in residual-stream units;
            None if there is no such token.
        text_projections: The same in the unsteered model that reads the text.
        nll: -log p under the unsteered model, nats a token; None where no judge computes it.
        coherence: 0 to 100; None where no judge asks.
        text: The response.
    """

    arm: str
    direction: str
    question: int
    sample: int
    scores: Mapping[str, float | None]
    steered_projections: Mapping[str, float | None]
    text_projections: Mapping[str, float | None]
    nll: float | None
    coherence: float | None
    text: str


@dataclass(frozen=True)
class CrossTrait:
    """A column: a trait that is measured.

    Attributes:
        name: Of the trait.
        description: Of the trait.
        layer: Where projections are read.
        length: Of its vector there, in residual-stream units: the distance between the means of the two kinds of
            response that it was extracted from. Changes of projections are given as multiples of it.
    """

    name: str
    description: str
    layer: int
    length: float


@dataclass(frozen=True)
class CrossCell(Record):
    """What one steering does to one trait.

    Attributes:
        steering: Name of the steering.
        trait: Name of the trait.
        own: Whether the steering edits along this trait.
        score: Change of the trait score, points of 100.
        text_projection: Change of the projection in the unsteered model that reads the text, in lengths of the vector.
        steered_projection: Change of the projection in the steered model, the edit included, in lengths of the vector.
        cosine: Between the direction that is edited and the trait's vector at the edited layer, whatever the sign of
            the coefficient; None for a steering of several edits.
    """

    steering: str
    trait: str
    own: bool
    score: Change | None
    text_projection: Change | None
    steered_projection: Change | None
    cosine: float | None


@dataclass(frozen=True, repr=False, eq=False)
class CrossEffects(Result):
    """What a crossing found.

    Attributes:
        steerings: By name.
        vectors: Of the traits measured, by name.
        traits: The traits measured.
        questions: What was asked, with the trait that each question comes from.
        answers: Every response.
        reduction: Which of the vectors projections were taken on.
        config: What determines all of it, as in ``run.json``.
        folder: See `Result`.
    """

    kind = "effects"
    steerings: Mapping[str, Steering]
    vectors: Mapping[str, PersonaVectors]
    traits: tuple[CrossTrait, ...]
    questions: Mapping[str, str]
    answers: tuple[CrossRow, ...]
    reduction: str
    config: Mapping[str, Any]
    folder: Path | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """See `Result.rows`."""
        return [plain(asdict(each)) for each in self.answers]

    @cached_property
    def summary(self) -> dict[str, Any]:  # type: ignore[override]  # made when it is asked for
        """See `Result`."""
        found: dict[str, Any] = plain(self.to_json())
        return found

    @cached_property
    def cells(self) -> tuple[CrossCell, ...]:
        """The matrix, steering by steering."""
        return tuple(self._cell(name, trait) for name in self.steerings for trait in self.traits)

    def cell(self, steering: str, trait: str) -> CrossCell:
        """What a steering does to a trait.

        Raises:
            KeyError: If there is no such cell.
        """
        found = {(cell.steering, cell.trait): cell for cell in self.cells}
        return found[steering, trait]

    @cached_property
    def cosines(self) -> Cosines:
        """How alike the vectors are, layer by layer."""
        return cosines(self.vectors, self.reduction)

    def nll(self, steering: str) -> Change | None:
        """How much more a steering's responses surprise the unsteered model, nats a token; None if no judge says."""
        return self._change(steering, lambda row: row.nll)

    def coherence(self, steering: str) -> Change | None:
        """How coherence changes under a steering, points of 100; None if no judge asks for it."""
        return self._change(steering, lambda row: row.coherence, CHANGES)

    def to_json(self) -> dict[str, Any]:
        """Every figure that is shown, as in ``summary.json``."""
        return {
            **self.config,
            "reduction": self.reduction,
            "questions": [{"text": text, "trait": trait} for text, trait in self.questions.items()],
            "traits": [asdict(trait) for trait in self.traits],
            "judges": {name: each["judge"] for name, each in self.config["traits"].items()},
            "steerings": [self._steering(name) for name in self.steerings],
            "cells": [cell.to_json() for cell in self.cells],
            "cosines": self.cosines.to_json(),
            "samples": list(self._samples()),
        }

    def _cell(self, name: str, trait: CrossTrait) -> CrossCell:
        of, length = trait.name, trait.length

        def lengths(value: float | None) -> float | None:
            return None if value is None or not length else value / length

        steering = self.steerings[name]
        along = {steering.vectors[term.trait].content_hash for term in steering.terms}
        return CrossCell(
            name,
            of,
            self.vectors[of].content_hash in along,
            self._change(name, lambda row: row.scores[of], CHANGES),
            self._change(name, lambda row: lengths(row.text_projections[of])),
            self._change(name, lambda row: lengths(row.steered_projections[of])),
            self._cosine(name, of),
        )

    def _cosine(self, steering: str, trait: str) -> float | None:
        edits = self.steerings[steering].edits()
        if len(edits) != 1:
            return None
        other = self.vectors[trait].vector(edits[0].layer, self.reduction)
        value = float(torch.nn.functional.cosine_similarity(edits[0].direction.double(), other.double(), dim=0))
        return value if float(other.norm()) else None

    def _change(
        self, steering: str, value: Callable[[CrossRow], float | None], within: Ends | None = None
    ) -> Change | None:
        def of(arm: str, direction: str) -> list[Value]:
            return [(r.question, value(r)) for r in self.answers if (r.arm, r.direction) == (arm, direction)]

        return change_of(of(UNSTEERED, NONE), of(steering, VECTOR), of(steering, RANDOM), within=within)

    def _steering(self, name: str) -> dict[str, Any]:
        return {
            "name": name,
            "text": str(self.steerings[name]),
            "layers": sorted({edit.layer for edit in self.steerings[name].edits()}),
            "nll": json_of(self.nll(name)),
            "coherence": json_of(self.coherence(name)),
        }

    def _samples(self) -> Iterator[dict[str, Any]]:
        """The first question of each trait with its first responses: not picked for what they say."""
        shown: set[str] = set()
        for number, (question, trait) in enumerate(self.questions.items()):
            if trait in shown:
                continue
            shown.add(trait)
            rows = [r for r in self.answers if r.question == number and r.sample == 0 and r.direction != RANDOM]
            responses = [
                {"steering": None if r.arm == UNSTEERED else r.arm, "text": r.text, "scores": dict(r.scores)}
                for r in rows
            ]
            yield {"question": question, "trait": trait, "responses": responses}
