"""`KeptResponses`: what an extraction under way kept, one layer at a time, and what that says of its vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import float64, tensor

from persona_lens.judging import Judgement
from persona_lens.runs.rollouts import Rollout, RolloutBatches
from persona_lens.traits import Arm
from persona_lens.vectors import DEFAULT_REDUCTION, PersonaVectors
from persona_lens.vectors.diagnosis import Unembedding, diagnostics_of
from persona_lens.vectors.samples import Responses, Samples


@dataclass(frozen=True, eq=False)
class KeptResponses:
    """The same as `persona_lens.vectors.samples.RunSamples`, before there are vectors.

    Attributes:
        collected: All responses, with what was read.
        responses: What is known of each that was kept.
        rows: Where it is among all.
    """

    collected: RolloutBatches
    responses: Responses
    rows: Sequence[int]

    @staticmethod
    def of(
        collected: RolloutBatches, rollouts: Sequence[Rollout], judged: Sequence[Judgement], kept: Sequence[bool]
    ) -> KeptResponses:
        """Those that a filter left of an extraction's responses."""
        rows = [row for row, each in enumerate(kept) if each]
        labels = [rollouts[row].request.labels for row in rows]
        question, pair, sample = (
            np.array([each[name] for each in labels], dtype=np.int64) for name in ("question_number", "pair", "sample")
        )
        responses = Responses(
            np.array([each["arm"] == Arm.POSITIVE for each in labels], dtype=np.bool_),
            question,
            pair,
            sample,
            np.array([len(rollouts[row].response_ids) for row in rows], dtype=np.int64),
            np.array([judged[row].trait.value for row in rows], dtype=np.float64),
        )
        return KeptResponses(collected, responses, rows)

    def layer(self, layer: int, reduction: str = DEFAULT_REDUCTION) -> Samples:
        """The kept responses at a layer."""
        found = self.collected.at_layer(reduction, layer)[tensor(self.rows)]
        return self.responses.at(found.to(float64).numpy())

    def diagnostics(self, vectors: PersonaVectors, residual_norms: Sequence[float] | None) -> Mapping[str, Any]:
        """What they say of their vectors, as JSON values; of the unembedding only where it is within reach.

        Args:
            vectors: Made of them.
            residual_norms: Mean length of the residual at each layer; None where it was not read.
        """
        unembedding = Unembedding.within_reach(self.collected.backend)
        found = diagnostics_of(vectors, self, residual_norms=residual_norms, unembedding=unembedding)
        return found.to_json()
