"""What vectors carry besides their directions, read and checked in one place.

The provenance is a mapping of JSON values, as the file holds it. Nothing but this module reads meaning out of it, so a
file that somebody else wrote, or that is damaged, is met with the same words everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from persona_lens.core.documents import Record
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import in_short
from persona_lens.judging.reading import Calibration
from persona_lens.runs.settings import RolloutSettings
from persona_lens.traits import Trait, load_trait
from persona_lens.vectors.diagnostics import Diagnostics

DEFAULT_REDUCTION = "response_mean"
ANSWER_MEAN, THINKING_MEAN, THINKING = "answer_mean", "thinking_mean", "thinking"  # of a model that thinks first
OWN_REDUCTION = ""  # asks for the vectors' own, see `PersonaVectors.default_reduction`
FORECASTS = "shift_forecasts"
FOUND_OF_IT = ("diagnostics", "tuned", "monitor", "baseline", "levels", FORECASTS)
"""What is found of vectors once they are made, and does not hold of others."""
Found = TypeVar("Found")


class VectorsError(PersonaLensError):
    """Vectors that cannot be read, or do not fit what they are used on."""


@dataclass(frozen=True)
class Tuned(Record):
    """Where and how strongly to steer, as `persona_lens.steering.tune` found it.

    Attributes:
        layer: Block index, 0-based.
        coefficient: Multiple of the raw vector.
        reduction: Which of the vectors.
    """

    layer: Annotated[int, Field(ge=0)]
    coefficient: float
    reduction: str = DEFAULT_REDUCTION


@dataclass(frozen=True)
class StoredMonitor(Record):
    """What a monitoring study left with the vectors; `persona_lens.monitoring.monitor_calibration` makes curves of it.

    Attributes:
        layer: The layer that is used where none is named.
        reduction: Which of the vectors.
        shown: By prompt: how many of its responses show the trait.
        responses: By prompt: how many have a score.
        questions: By prompt: the number of its question.
        layers: By layer: the curve and how well it does, as JSON values.
    """

    layer: int
    reduction: str
    shown: tuple[int, ...]
    responses: tuple[int, ...]
    questions: tuple[int, ...]
    layers: Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True)
class LayerBaseline(Record):
    """Where a model's own unsteered replies stand along a trait at one layer, in residual-stream units.

    Attributes:
        mean: Over all tokens of all replies.
        sd: Standard deviation of those tokens.
        means: Of each reply, at least two.
        highest: Of each reply's tokens.
        lowest: Of each reply's tokens.
        prompts: The last prompt token before each reply.
    """

    mean: float
    sd: Annotated[float, Field(ge=0)]
    means: Annotated[tuple[float, ...], Field(min_length=2)]
    highest: tuple[float, ...]
    lowest: tuple[float, ...]
    prompts: Annotated[tuple[float, ...], Field(min_length=2)]


@dataclass(frozen=True)
class StoredBaseline(Record):
    """What alarms may count from; `persona_lens.monitoring.measure_baseline` makes it.

    Attributes:
        reduction: Which of the vectors.
        system: System prompt that the replies were given under; None for none.
        replies: How many there are.
        tokens: How many they have together.
        layers: By layer.
        mean: What of a reply counts in all of this: the whole, or of a model that thinks its answer or its thinking.
    """

    unsaid = frozenset({"mean"})
    reduction: str
    system: str | None
    replies: int
    tokens: int
    layers: Mapping[int, LayerBaseline]
    mean: Annotated[str, Field(pattern="^(response|answer|thinking)_mean$")] = DEFAULT_REDUCTION


@dataclass(frozen=True)
class StoredLevels(Record):
    """Where a model's own responses stand along the vectors.

    Attributes:
        reduction: Which of the vectors.
        responses: How many there are.
        layers: By layer: percentiles 0, 1 … 100 of their means' projections, in residual-stream units.
    """

    reduction: str
    responses: int
    layers: Mapping[int, Annotated[tuple[float, ...], Field(min_length=101, max_length=101)]]


class Quantity(StrEnum):
    """What is said of a row of a dataset, in residual-stream units along a trait's unit vector (method, section 7)."""

    RAW = "raw"  # mean over the response's tokens
    DIFFERENCE = "difference"  # that, minus the same of the base model's own response
    PROMPT_DIFFERENCE = "prompt_difference"  # that, minus the projection of the last prompt token


@dataclass(frozen=True)
class Forecast(Record):
    """A shift of the mean trait score that is to be expected.

    Attributes:
        shift: In points of the score, 0 to 100.
        low: Lower end of the 95% prediction interval for another dataset.
        high: Upper end.
        outside: Whether the dataset's value lies outside those that the line was fitted on.
    """

    shift: float
    low: float
    high: float
    outside: bool


@dataclass(frozen=True)
class ShiftForecast(Record):
    """A line from a dataset's mean value to the shift of the trait score after finetuning on it.

    Attributes:
        trait: The trait.
        layer: Layer at which the values were taken.
        quantity: Which value.
        slope: Points of the score for one unit of the residual stream.
        intercept: Points at 0.
        residual: Standard deviation of the residuals, in points, with n - 2 in the denominator.
        n: Datasets that it was fitted on.
        mean: Their mean value.
        spread: Sum of squared deviations from it.
        lowest: Their smallest value.
        highest: Their largest one.
        source: What was finetuned, in words.
    """

    trait: str
    layer: int
    quantity: Quantity
    slope: float
    intercept: float
    residual: float
    n: int
    mean: float
    spread: float
    lowest: float
    highest: float
    source: str = ""

    def predict(self, value: float | int) -> Forecast:
        """The shift to expect of a dataset with this mean value."""
        from scipy import stats  # slow to import

        shift = self.intercept + self.slope * value
        error = self.residual * np.sqrt(1 + 1 / self.n + (value - self.mean) ** 2 / self.spread)
        reach = float(stats.t.ppf(0.975, self.n - 2) * error)
        return Forecast(shift, shift - reach, shift + reach, not self.lowest <= value <= self.highest)


class Provenanced:
    """A trait's vectors as far as they say where they come from and what was found with them.

    Every property raises `VectorsError` if what is stored is damaged.
    """

    trait: str
    provenance: Mapping[str, Any]

    @property
    def default_reduction(self) -> str:
        """Which of the vectors is meant where none is named."""
        return DEFAULT_REDUCTION

    def stored(self, name: str) -> Mapping[str, Any]:
        """What the provenance holds under a name, if that is a mapping; else nothing."""
        found = self.provenance.get(name)
        return found if isinstance(found, Mapping) else {}

    def _read(self, what: str, read: Callable[[Any], Found], stored: Any, instead: str = "make them again") -> Found:
        """Read something, or say that it is damaged and what to do instead."""
        try:
            return read(stored)
        except (TypeError, ValueError, RecursionError) as error:
            why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise VectorsError(
                f"{what} that the vectors of {self.trait!r} carry is damaged: {in_short(why, 200)}; {instead}"
            ) from None

    @property
    def trait_definition(self) -> Trait:
        """The trait that the vectors were extracted for.

        Raises:
            VectorsError: If none is stored, too.
        """
        stored = dict(self.stored("trait"))
        stored.pop("content_hash", None)
        if not stored:
            raise VectorsError("these vectors carry no trait; name it with trait=... (--trait)")
        return self._read("the trait", Trait.model_validate, stored, "name it with trait=... (--trait)")

    def trait_for(self, given: str | Trait | None) -> Trait:
        """The trait that somebody asks for by name or definition; the vectors' own if that is None.

        Raises:
            VectorsError: If it is to be their own and they carry none.
            TraitError: If there is none of that name.
        """
        if given is None:
            return self.trait_definition
        return load_trait(given) if isinstance(given, str) else given

    @property
    def judge(self) -> Mapping[str, Any]:
        """The judge that scored the responses, as it describes itself; empty if that is not known."""
        return self.stored("judge")

    @property
    def calibration(self) -> Calibration:
        """The calibration of the likelihood judge.

        Raises:
            VectorsError: If none is stored, too.
        """
        if not (stored := self.judge.get("calibration")):
            raise VectorsError(
                "these vectors carry no calibration of the likelihood judge, so responses cannot be scored by it; name "
                "another judge (--judge), or extract with the likelihood judge"
            )
        again = "extract them again, or name another judge (--judge)"
        return self._read("the calibration", Calibration.from_json, stored, again)

    @property
    def rollouts(self) -> RolloutSettings:
        """How responses were made when the vectors were extracted, as far as that is stored."""
        stored = self.stored("settings").get("rollouts")
        names = ("max_new_tokens", "temperature", "top_p", "thinking_budget")
        given = {name: stored[name] for name in names if name in stored} if isinstance(stored, Mapping) else {}
        return self._read("the settings", TypeAdapter(RolloutSettings).validate_python, given)

    @property
    def tuned(self) -> Tuned | None:
        """The layer and coefficient that were tuned for these vectors; None if that was not done."""
        found = self.provenance.get("tuned")
        return self._read("what was tuned", Tuned.from_json, found) if found else None

    def tuned_choice(self, otherwise: str = "name one (`--layers` on the command line)") -> Tuned:
        """`tuned`, for where it is needed; an error says what to do ``otherwise``.

        Raises:
            VectorsError: If nothing was tuned.
        """
        if (tuned := self.tuned) is None:
            or_else = f"{otherwise}, or take the vectors that `persona-lens steer tune` wrote"
            raise VectorsError(f"no layer was tuned for the vectors of {self.trait!r}; {or_else}")
        return tuned

    @property
    def monitor(self) -> StoredMonitor | None:
        """What a monitoring study found; None if there was none."""
        found, again = self.provenance.get("monitor"), "make it again with `persona-lens monitor study`"
        return self._read("the calibration of the monitor", StoredMonitor.from_json, found, again) if found else None

    @property
    def baseline(self) -> StoredBaseline | None:
        """Where the model's own neutral replies stand; None if that was not measured."""
        found = self.provenance.get("baseline")
        again = "measure it again with `persona-lens monitor baseline`"
        return self._read("the baseline", StoredBaseline.from_json, found, again) if found else None

    @property
    def diagnostics(self) -> Diagnostics | None:
        """What was found to say of these vectors before anything is steered; None if nothing was."""
        found = self.provenance.get("diagnostics")
        again = "measure them again with `persona-lens vectors forecast`"
        return self._read("the diagnostics", Diagnostics.from_json, found, again) if found else None

    @property
    def levels(self) -> StoredLevels | None:
        """Percentiles of the responses that an axis was made of; None for other vectors."""
        found = self.provenance.get("levels")
        return self._read("the percentiles", StoredLevels.from_json, found) if found else None

    def level(self, layer: int, percentile: float | int, reduction: str = OWN_REDUCTION) -> float:
        """What so many percent of the model's responses stay below along the vectors, in residual-stream units.

        Of the responses that an axis was made of; of other vectors the neutral replies of their baseline.

        Args:
            layer: Block index, 0-based.
            percentile: From 0 to 100.
            reduction: Which of the vectors.

        Raises:
            VectorsError: If they carry neither, or not at that layer.
        """
        reduction = reduction or self.default_reduction
        if (levels := self.levels) is not None and (levels.reduction, layer in levels.layers) == (reduction, True):
            return float(np.interp(percentile, range(101), levels.layers[layer]))
        baseline = self.baseline
        if baseline is not None and (baseline.reduction, layer in baseline.layers) == (reduction, True):
            return float(np.percentile(baseline.layers[layer].means, percentile))
        raise VectorsError(
            f"the vectors of {self.trait!r} carry no percentiles for {reduction} at layer {layer}; measure them with "
            "`persona-lens monitor baseline`, or give the level as a number"
        )

    @property
    def forecasts(self) -> tuple[ShiftForecast, ...]:
        """How far finetuning would move the trait, by lines that were fitted before; almost always none."""
        stored, line = self.provenance.get(FORECASTS, ()), ShiftForecast.from_json
        return self._read("the forecast", lambda found: tuple(map(line, found)), stored, "fit it again")

    @property
    def missing_layers(self) -> tuple[int, ...]:
        """Layers without a vector, whose rows are zero: what another program's file did not hold."""
        return self._read("missing_layers", _layers, self.provenance.get("missing_layers", ()))

    @property
    def prompt_mean_sinks(self) -> bool:
        """Whether the prompt mean takes in attention sinks, as those of other programs do."""
        return bool(self.provenance.get("prompt_mean_sinks", True))


def inherited(*parts: Provenanced) -> dict[str, Any]:
    """What has to be said of vectors made from these: a layer that one of them lacks, they lack."""
    missing = sorted({layer for part in parts for layer in part.missing_layers})
    found: dict[str, Any] = {"missing_layers": missing} if missing else {}
    return found if parts[0].prompt_mean_sinks else {**found, "prompt_mean_sinks": False}


def kept_of_each_arm(counts: Any) -> str:
    """What ``counts`` in a provenance says in words, such as ``negative 40 of 50; positive 45 of 50``."""
    said = []
    for arm, each in sorted(counts.items()) if isinstance(counts, Mapping) else ():
        if isinstance(each, Mapping):
            said.append(f"{arm} {each.get('kept')} of {sum(n for n in each.values() if isinstance(n, int))}")
    return "; ".join(said)


def check_provenance(provenance: Any) -> dict[str, Any]:
    """What a file has to hold so that its vectors can be used at all.

    Raises:
        TypeError, ValueError: If it is no mapping, ``missing_layers`` no list of layers, or what was tuned no choice.
    """
    if not isinstance(provenance, dict):
        raise TypeError("provenance is a mapping")
    _layers(provenance.get("missing_layers", ()))
    if provenance.get("tuned"):
        Tuned.from_json(provenance["tuned"])
    return provenance


def _layers(found: Any) -> tuple[int, ...]:
    if not isinstance(found, list | tuple) or not all(type(layer) is int for layer in found):
        raise TypeError("missing_layers is a list of layers")
    return tuple(found)
