"""Where in a corpus features are active: their examples, and how often each is."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from persona_lens.backend import Backend, Read, ReadKind, TokenBatch
from persona_lens.backend.memory import forward_batches
from persona_lens.backend.tokens import TokenIds
from persona_lens.features.dictionary import Features, FeaturesError
from persona_lens.progress import Progress, shown_progress

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
class FeatureExamples:
    """What a feature is active on.

    Attributes:
        feature: Its number.
        share: Of the tokens looked at: on how many it is active.
        examples: The strongest place of each text, strongest first.
    """

    feature: int
    share: float
    examples: tuple[Example, ...]

    def to_json(self) -> dict[str, Any]:
        """The values by name."""
        return asdict(self)


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
        FeaturesError: If the dictionary has no encoder, or no text has two tokens.
    """
    if features.encode is None:
        raise FeaturesError(
            f"{features.name} came without an encoder, so it is not known where its features are active"
        )
    tokenizer = backend.tokenizer
    rows = [tuple(tokenizer(text)["input_ids"])[:MAX_TOKENS] for text in texts]
    numbered = [(number, row) for number, row in enumerate(rows) if len(row) > 1]
    if not numbered:
        raise FeaturesError("no text of the corpus has two tokens or more")
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
