"""Evidence saved as it comes, so that an interrupted judging goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from persona_lens.judging.likelihood import Evidence, LikelihoodJudge
from persona_lens.judging.protocol import Exchange
from persona_lens.pieces import Pieces, Row
from persona_lens.progress import Progress, no_progress
from persona_lens.rollouts import Rollout
from persona_lens.runs import RunFolder

if TYPE_CHECKING:
    from persona_lens.models import ChatFormat

EVIDENCE = "evidence.jsonl"


def weigh_rollouts(
    judge: LikelihoodJudge,
    rollouts: Sequence[Rollout],
    folder: RunFolder | None,
    *,
    prefix: str = "",
    progress: Progress = no_progress,
) -> list[Evidence | None]:
    """The evidence of each rollout, question by question; what the folder already holds is not weighed again."""
    groups: dict[str, list[int]] = {}
    for index, rollout in enumerate(rollouts):
        groups.setdefault(rollout.request.question, []).append(index)
    questions = list(groups.values())

    def weigh(number: int) -> list[Row]:
        group = questions[number]
        evidence = judge.weigh([exchange_of(rollouts[i], judge.chat) for i in group])
        return [_row(i, e) for i, e in zip(group, evidence, strict=True)]

    label = f"{prefix.rstrip('-') or 'extraction'} judging"
    pieces = Pieces(folder, prefix + EVIDENCE, [len(group) for group in questions])
    rows = pieces.run(
        weigh,
        at_once=judge.backend.calls_at_once,
        report=lambda done: progress(done, len(rollouts), label),
    )
    found = {row["row"]: _evidence(row) for row in rows}
    return [found[i] for i in range(len(rollouts))]


def exchange_of(rollout: Rollout, chat: ChatFormat) -> Exchange:
    """What a judge is shown of a rollout: never its system prompt, and never its reasoning."""
    whole = chat.decode(rollout.response_ids) == rollout.response
    return Exchange(rollout.request.question, rollout.response, rollout.response_ids if whole else None)


def _row(index: int, evidence: Evidence | None) -> dict[str, object]:
    return {"row": index, **(evidence.to_json() if evidence else {"reason": "empty response"})}


def _evidence(row: Row) -> Evidence | None:
    return None if "reason" in row else Evidence(row["preference"], row["surprise"])
