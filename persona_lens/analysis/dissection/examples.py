"""Single features: the texts that they are most active on, and each steered alone, beside random ones."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from persona_lens.analysis import AnalysisError
from persona_lens.analysis.dissection.features import Features
from persona_lens.backend import Backend, Read, ReadKind, TokenBatch
from persona_lens.backend.batches import forward_batches
from persona_lens.backend.tokens import TokenIds
from persona_lens.core.documents import Record
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.core.statistics import CHANGES
from persona_lens.data.tables import read_rows
from persona_lens.extraction.experiment import json_of, values_of
from persona_lens.steering import ArmRow, Change, Steering
from persona_lens.steering.arms import UNSTEERED, change_of
from persona_lens.vectors import DEFAULT_REDUCTION, OWN_REDUCTION, PersonaVectors

COLUMNS = ("text", "response", "answer", "content")


def read_corpus(path: Path | str, *, limit: int | None = None) -> list[str]:
    """The texts of a file, empty ones left out.

    Args:
        path: A ``.txt`` file, a text a line, or a table (``.jsonl``, ``.csv``, ``.tsv``, ``.parquet``) whose texts are
            in a column named ``text``, ``response``, ``answer`` or ``content``, the first of them that it has. Rollouts
            of a run are such a table.
        limit: How many to read at most.

    Raises:
        AnalysisError: If there is no such file, text or column; with the line where one row is to blame.
        DataError: If a table cannot be read.
    """
    path = Path(path)
    texts = list(islice(filter(None, map(str.strip, _lines(path) if path.suffix == ".txt" else _column(path))), limit))
    if not texts:
        raise AnalysisError(f"{path} holds no text")
    return texts


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AnalysisError(f"the corpus {path} cannot be read: {error}") from error


def _column(path: Path) -> list[str]:
    texts, column = [], None
    for line, row in read_rows(path):
        column = column or next((name for name in COLUMNS if name in row), None)
        if column is None:
            raise AnalysisError(
                f"{path}:{line}: none of the columns is named {', '.join(COLUMNS)}; it has {', '.join(row) or 'none'}"
            )
        text = row.get(column)
        if text is not None and not isinstance(text, str):
            raise AnalysisError(f"{path}:{line}: {column} must be a text, but is {text!r:.60}")
        texts.append(text or "")
    return texts


MAX_TOKENS = 256  # of a text
AROUND = 12  # tokens shown before and after the one where a feature is most active
ENCODED_VALUES = 2**25  # activations that are there at once: 128 MB

Peak = tuple[float, int, int]
"""An activation, minus the number of its text (of equal ones the first text comes first), and the token's place."""


@dataclass(frozen=True)
class Example:
    """A place in a text where a feature is active.

    Attributes:
        activation: How strongly, in the autoencoder's units.
        before: The text before the token.
        token: The token itself.
        after: The text after it.
        text: Number of the text.
    """

    activation: float
    before: str
    token: str
    after: str
    text: int


@dataclass(frozen=True)
class FeatureExamples(Record):
    """What a feature is active on.

    Attributes:
        feature: Its number.
        share: Of the tokens looked at: on how many it is active.
        examples: The strongest place of each text, strongest first.
    """

    feature: int
    share: float
    examples: tuple[Example, ...]


@dataclass(frozen=True, eq=False)
class Activity:
    """What was found in a corpus.

    Attributes:
        tokens: How many tokens were looked at.
        counts: int64 [features], on how many of them each feature is active.
        found: For each feature asked about its examples.
    """

    tokens: int
    counts: Int[Tensor, " features"]
    found: tuple[FeatureExamples, ...]

    @property
    def alive(self) -> Bool[Tensor, " features"]:
        """Which features are active on any token."""
        return self.counts > 0


def find_examples(
    backend: Backend,
    features: Features,
    wanted: Sequence[int],
    texts: Sequence[str],
    *,
    count: int = 5,
    progress: Progress = shown_progress,
) -> Activity:
    """Run a corpus through the model and the dictionary's encoder.

    A text's first token and special tokens are left out: the residual is unlike any other there, and most features
    mean nothing on it. Texts longer than `MAX_TOKENS` tokens are cut.

    Args:
        backend: The model.
        features: The dictionary, with its encoder.
        wanted: Which features to give examples of.
        texts: The corpus.
        count: Examples of each.
        progress: Told how far the work is.

    Raises:
        AnalysisError: If the dictionary has no encoder, or no text has two tokens.
    """
    if features.encode is None:
        raise AnalysisError(
            f"{features.name} came without an encoder, so it is not known where its features are active"
        )
    tokenizer = backend.tokenizer
    rows = [tuple(tokenizer(text)["input_ids"])[:MAX_TOKENS] for text in texts]
    numbered = [(number, row) for number, row in enumerate(rows) if len(row) > 1]
    if not numbered:
        raise AnalysisError("no text of the corpus has two tokens or more")
    special = set(tokenizer.all_special_ids)
    read = Read(ReadKind.ACTIVATIONS, (features.layer,))
    counts, tokens, done = torch.zeros(features.count, dtype=torch.long), 0, 0
    peaks: list[list[Peak]] = [[] for _ in wanted]
    for indices, result in forward_batches(backend, TokenBatch.of([row for _, row in numbered]), [read]):
        for index, h in zip(indices, result.reads[read.kind.value][:, 0], strict=True):
            number, row = numbered[index]
            places = [place for place in range(1, len(row)) if row[place] not in special]
            if places:
                tokens += len(places)
                strongest = _encoded(features, h[-len(row) :][places], wanted, counts)
                for found, (value, place) in zip(peaks, strongest, strict=True):
                    found.append((value, -number, places[place]))
        done += len(indices)
        progress(done, len(numbered), "corpus")

    def examples(found: list[Peak]) -> tuple[Example, ...]:
        best = heapq.nlargest(count, (peak for peak in found if peak[0] > 0))
        return tuple(_example(backend, rows[-number], value, place, -number) for value, number, place in best)

    shares = (int(counts[feature]) / max(1, tokens) for feature in wanted)
    each = zip(wanted, shares, map(examples, peaks), strict=True)
    return Activity(tokens, counts, tuple(FeatureExamples(*parts) for parts in each))


def _encoded(
    features: Features, h: Float[Tensor, "n d_model"], wanted: Sequence[int], counts: Int[Tensor, " features"]
) -> Iterator[tuple[float, int]]:
    """The largest activation of each wanted feature and its place; all features' counts are brought up to date."""
    assert features.encode is not None
    columns = []
    step = max(1, ENCODED_VALUES // features.count)
    for start in range(0, len(h), step):
        active = features.encode(h[start : start + step]).detach().to("cpu", torch.float32)
        counts += (active > 0).sum(dim=0)
        columns.append(active[:, list(wanted)])
    values, places = torch.cat(columns).max(dim=0)
    return zip(values.tolist(), places.tolist(), strict=True)


def _example(backend: Backend, row: TokenIds, value: float, place: int, number: int) -> Example:
    def text(ids: Sequence[int]) -> str:
        return str(backend.tokenizer.decode(list(ids)))

    start, stop = max(0, place - AROUND), place + 1 + AROUND
    return Example(value, text(row[start:place]), text(row[place : place + 1]), text(row[place + 1 : stop]), number)


WHOLE = "vector"


@dataclass(frozen=True)
class FeatureEffect:
    """What one feature does to the trait score.

    Attributes:
        feature: Its number; None for the whole vector.
        change: Steered minus unsteered, with that of the random features, taken together question by question, as its
            null.
        nll: Change of -log p under the unsteered model, nats a token, likewise; None where no judge says.
        beyond: How many of the random features change the score less, in the direction of the coefficient; None
            without random features.
        random_features: How many there are.
        towards: 1 where the coefficient is positive, else -1.
    """

    feature: int | None
    change: Change
    nll: Change | None
    beyond: int | None
    random_features: int
    towards: int

    @property
    def stands_out(self) -> bool:
        """Whether the change is clear, goes with the coefficient, and beats that of every single random feature."""
        return self.random_features > 0 and self.beyond == self.random_features and self.change.clear == self.towards

    def to_json(self) -> dict[str, Any]:
        """The values by name."""
        return {
            "feature": self.feature,
            "change": self.change.to_json(),
            "nll": json_of(self.nll),
            "beyond": self.beyond,
            "random_features": self.random_features,
            "stands_out": self.stands_out,
        }


def arm_name(feature: int) -> str:
    """What a feature's arm is called."""
    return f"feature_{feature}"


def feature_steering(
    vectors: PersonaVectors,
    features: Features,
    feature: int,
    coefficient: float,
    *,
    reduction: str = OWN_REDUCTION,
) -> Steering:
    """The steering that adds one feature in place of the vector: its unit direction, as long as the vector's step is.

    Args:
        vectors: Whose length at the dictionary's layer is taken.
        features: The dictionary.
        feature: Which feature.
        coefficient: Multiple of the raw vector that the step is as long as.
        reduction: Which of the vectors.

    Raises:
        AnalysisError: If there is no such feature, or its direction is zero.
        VectorsError: If the vector is zero.
    """
    layer = features.layer
    length = float(vectors.vector(layer, reduction).norm())
    rows = torch.zeros(vectors.model.n_layers, vectors.model.d_model)
    rows[layer] = features.unit(feature) * length
    origin = {"feature": feature, "dictionary": features.name, "length_of": vectors.content_hash}
    name = arm_name(feature)
    single = PersonaVectors(name, vectors.model, {DEFAULT_REDUCTION: rows}, origin)
    return Steering.parse(f"{name}@{layer}:{coefficient:+.6g}", single)


def feature_effects(
    rows: Sequence[ArmRow], top: Sequence[int], random: Sequence[int], coefficient: float
) -> Mapping[str, FeatureEffect | None]:
    """The effects of all arms by name, the random features among them; None for one without any score.

    Args:
        rows: Every response.
        top: The features that are claimed to carry the trait.
        random: Those that stand for all others.
        coefficient: With which all were steered.
    """
    towards = 1 if coefficient > 0 else -1
    by_arm: dict[str, list[ArmRow]] = {}
    for row in rows:
        by_arm.setdefault(row.arm, []).append(row)
    pooled = [row for feature in random for row in by_arm[arm_name(feature)]]
    names: dict[str, int | None] = {WHOLE: None, **{arm_name(feature): feature for feature in (*top, *random)}}

    def change(name: str, quantity: str) -> Change | None:
        own, null = by_arm[name], () if names[name] in random else pooled
        within = CHANGES if quantity == "score" else None
        return change_of(*(values_of(each, quantity) for each in (by_arm[UNSTEERED], own, null)), within=within)

    scores = {name: change(name, "score") for name in names}
    moved = {each: found.vector.mean * towards for each in random if (found := scores[arm_name(each)]) is not None}
    effects: dict[str, FeatureEffect | None] = {}
    for name, feature in names.items():
        if (score := scores[name]) is None:
            effects[name] = None
            continue
        beyond = sum(score.vector.mean * towards > other for of, other in moved.items() if of != feature)
        others = len(moved) - (feature in moved)
        nll = change(name, "nll")
        effects[name] = FeatureEffect(feature, score, nll, beyond if others else None, others, towards)
    return effects
