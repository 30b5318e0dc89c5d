"""`ExternalRollouts`: files of responses, matched and checked; and forward passes over them, saved like others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from persona_lens.backend import Backend, Read
from persona_lens.backend.batches import MAX_TOKENS, forward_plan, forward_rows
from persona_lens.backend.tokens import TokenBatch, TokenIds
from persona_lens.extraction.external.matching import Matched, ResponseEncoder, match_responses
from persona_lens.extraction.external.rows import ExternalResponse, read_files
from persona_lens.judging import Judgement, Score
from persona_lens.judging.protocol import EMPTY
from persona_lens.runs import RunFolder
from persona_lens.runs.chunks import Row
from persona_lens.runs.rollouts import Request, Rollout, RolloutBatches, RolloutSettings
from persona_lens.traits import Trait

if TYPE_CHECKING:
    from persona_lens.models import ChatFormat

Paths = Path | str | Sequence[Path | str]


@dataclass(frozen=True)
class ExternalScores:
    """Scores that came with the responses, in place of a judge.

    Attributes:
        judgements: One for each response.
        digests: SHA-256 of each file.
    """

    judgements: tuple[Judgement, ...]
    digests: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """See `persona_lens.judging.Judge.describe`."""
        return {"judge": "given", "file_sha256": list(self.digests)}


@dataclass(frozen=True)
class ExternalRollouts:
    """An extraction's rollouts that another program generated.

    Attributes:
        rollouts: In the order of an extraction's plan.
        prompts: Token ids of each one's prompt.
        scores: The scores, if every row has one or says that there is none.
        digests: SHA-256 of each file.
        notes: What the user should be told, one sentence each.
    """

    rollouts: tuple[Rollout, ...]
    prompts: tuple[TokenIds, ...]
    scores: ExternalScores | None
    digests: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def requests(self) -> list[Request]:
        """What the responses answer."""
        return [rollout.request for rollout in self.rollouts]

    @property
    def tokens(self) -> TokenBatch:
        """Prompts and responses."""
        return TokenBatch(self.prompts, tuple(rollout.response_ids for rollout in self.rollouts))

    def to_json(self) -> dict[str, Any]:
        """What determines the rollouts besides model and trait: the files' content."""
        return {"file_sha256": list(self.digests)}


def external_rollouts(
    backend: Backend,
    chat: ChatFormat,
    trait: Trait,
    paths: Paths,
    *,
    questions: int,
    allow_missing: bool = False,
) -> ExternalRollouts:
    """Read files of responses for an extraction.

    Args:
        backend: The model that will read them; it does not run here.
        chat: Its chat format.
        trait: The trait that they were generated for.
        paths: One file or several, see `persona_lens.extraction.external.read_responses`.
        questions: How many of the trait's extraction questions are used.
        allow_missing: Go on without responses that an extraction asks for and the files do not hold.

    Raises:
        DataError: If a file cannot be read.
        ExtractionError: If a row does not fit the trait or the model, or responses are missing.
    """
    files = [Path(paths)] if isinstance(paths, Path | str) else [Path(path) for path in paths]
    responses, digests = read_files(files)
    matched = match_responses(responses, trait, questions, allow_missing=allow_missing)
    encoder = ResponseEncoder.of(backend, chat)
    rollouts, prompts, changed = [], [], 0
    for slot, response in matched.responses:
        request = slot.request(trait)
        prompts.append(encoder.prompt(request, response))
        rollouts.append(encoder.rollout(request, response, prompts[-1]))
        changed += not encoder.gives_back(rollouts[-1], response)
    scores = _scores([response for _, response in matched.responses], rollouts, digests)
    return ExternalRollouts(tuple(rollouts), tuple(prompts), scores, digests, _notes(matched, scores, changed))


def _scores(
    responses: Sequence[ExternalResponse], rollouts: Sequence[Rollout], digests: tuple[str, ...]
) -> ExternalScores | None:
    found = [response.judgement for response in responses if response.judgement is not None]
    if len(found) < len(responses) or all(judgement.trait.value is None for judgement in found):
        return None
    empty = Score(None, EMPTY)
    return ExternalScores(
        tuple(
            judgement if rollout.response else Judgement(empty, empty if judgement.coherence else None)
            for judgement, rollout in zip(found, rollouts, strict=True)
        ),
        digests,
    )


def _notes(matched: Matched, scores: ExternalScores | None, changed: int) -> tuple[str, ...]:
    total = len(matched.responses)
    scored = sum(response.judgement is not None for _, response in matched.responses)
    notes = [
        f"{matched.missing}; the extraction goes on without them" if matched.missing else None,
        f"{matched.left_out:,} responses belong to questions that are not used, and are left out"
        if matched.left_out
        else None,
        f"{changed:,} of {total:,} responses read otherwise once this model's tokenizer has encoded their text, which "
        "changes some texts; give response_ids to read exactly what was generated"
        if changed
        else None,
        f"{scored:,} of {total:,} responses come with a score column, so the scores in the file are not used"
        if scored and not scores
        else None,
    ]
    return tuple(note for note in notes if note)


class ReadRollouts(RolloutBatches):
    """Responses from elsewhere, read by the model in a run folder.

    Batches are planned once: rows of like length together, or, where the backend computes a prompt only once, those of
    the same prompts.

    Args:
        backend: The model.
        given: The responses.
        settings: Its sizes of a batch are used, and nothing else.
        folder: Where to save, under names that begin with ``prefix``; None keeps all in memory.
        reads: What to read.
        prefix: Distinguishes several sets of rollouts in a folder.
    """

    def __init__(
        self,
        backend: Backend,
        given: ExternalRollouts,
        settings: RolloutSettings,
        *,
        folder: RunFolder | None = None,
        reads: Sequence[Read] = (),
        prefix: str = "",
    ) -> None:
        self.given = given
        self.settings = settings
        self._tokens = given.tokens
        # Above the most that any device is fast at, the limit says nothing.
        limit = settings.batch_tokens if settings.batch_tokens < MAX_TOKENS else None
        batches = forward_plan(backend, self._tokens, (), reads, max_rows=settings.batch_size, max_tokens=limit)
        super().__init__(backend, given.requests, batches, reads=reads, folder=folder, prefix=prefix)

    def calls(self) -> Iterator[TokenBatch]:
        """What `run` would hand to `Backend.forward`, batch by batch."""
        return map(self._tokens.chosen, self.batches)

    def _purpose(self, index: int) -> str:
        given = self.given.rollouts[index]
        return json.dumps([super()._purpose(index), given.response_ids, given.response])

    def _make(self, batch: Sequence[int]) -> tuple[list[Row], dict[str, Tensor]]:
        found = forward_rows(self.backend, self._tokens.chosen(batch), (), self.reads)
        return [self._row(index) for index in batch], dict(found.reads)

    def _row(self, index: int) -> Row:
        row = self.given.rollouts[index].to_row()
        del row["seed"]  # nothing was sampled here
        return row
