"""Evidence saved as it comes, so that an interrupted judging goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from persona_lens.judging.likelihood import Evidence, LikelihoodJudge
from persona_lens.judging.protocol import Exchange
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
    name = prefix + EVIDENCE
    sizes = [len(group) for group in groups.values()]
    rows = folder.rows(name, sizes) if folder else []
    found: dict[int, Evidence | None] = {row["row"]: _evidence(row) for row in rows}
    label = f"{prefix.rstrip('-') or 'extraction'} judging"
    progress(len(found), len(rollouts), label)
    for group in groups.values():
        if group[0] in found:
            continue
        evidence = judge.weigh([exchange_of(rollouts[i], judge.chat) for i in group])
        if folder:
            folder.append(name, [_row(i, e) for i, e in zip(group, evidence, strict=True)])
        found.update(zip(group, evidence, strict=True))
        progress(len(found), len(rollouts), label)
    return [found[i] for i in range(len(rollouts))]


def exchange_of(rollout: Rollout, chat: ChatFormat) -> Exchange:
    """What a judge is shown of a rollout: never its system prompt, and never its reasoning."""
    whole = chat.decode(rollout.response_ids) == rollout.response
    return Exchange(rollout.request.question, rollout.response, rollout.response_ids if whole else None)


def _row(index: int, evidence: Evidence | None) -> dict[str, object]:
    return {"row": index, **(evidence.to_json() if evidence else {"reason": "empty response"})}


def _evidence(row: dict[str, Any]) -> Evidence | None:
    return None if "reason" in row else Evidence(row["preference"], row["surprise"])
