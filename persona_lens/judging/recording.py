"""Judgements saved as they come, so that an interrupted judging goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from persona_lens.core.progress import Progress, no_progress
from persona_lens.judging.protocol import EMPTY, Exchange, Judge, Judgement, JudgingError
from persona_lens.judging.reading import Evidence, LikelihoodJudge
from persona_lens.runs import RunFolder
from persona_lens.runs.chunks import Pieces, Row
from persona_lens.runs.cost import Work
from persona_lens.runs.rollouts import Rollout, RolloutBatches, Rollouts

if TYPE_CHECKING:
    from persona_lens.models import ChatFormat

Found = TypeVar("Found")
EVIDENCE = "evidence.jsonl"
JUDGEMENTS = "judgements.jsonl"


def prepare_judge(
    judge: Judge, folder: RunFolder | None, prefix: str = "", collected: RolloutBatches | None = None
) -> None:
    """Let a judge find out whether it can work, before anything is generated for it.

    Args:
        judge: Any judge; one without a method ``prepare`` is taken to be ready.
        folder: Where its judgements will be; if they are there already it is not needed.
        prefix: As for `judge_rollouts`.
        collected: What is going to be generated for it.

    Raises:
        PersonaLensError: If something keeps it from judging.
        ContextError: If the longest response would not fit behind what the likelihood judge puts before it.
    """
    if folder is not None and (folder.path / (prefix + JUDGEMENTS)).exists():
        return
    if prepare := getattr(judge, "prepare", None):
        prepare()
    if isinstance(judge, LikelihoodJudge) and isinstance(collected, Rollouts):
        questions = {request.question for request in collected.requests}
        judge.check_room(questions, collected.settings.max_new_tokens)


def judging_work(judge: Judge, exchanges: Sequence[Exchange]) -> tuple[Work, ...]:
    """What judging these exchanges asks; nothing for a judge that does not know."""
    work = getattr(judge, "work", None)
    return (work(exchanges),) if work else ()


def longest_exchanges(rollouts: Rollouts) -> list[Exchange]:
    """What there would be to judge, if every response were as long as it may be."""
    supposed = rollouts.longest().rollouts
    return [Exchange(each.request.question, each.response, each.response_ids) for each in supposed]


def check_scored(judged: Sequence[Judgement]) -> None:
    """Refuse judgements of which none is a score.

    Raises:
        JudgingError: If there is none, although there was text to judge.
    """
    reasons = [found.trait.reason for found in judged if found.trait.value is None]
    first = next((reason for reason in reasons if reason != EMPTY), None)
    if first is not None and len(reasons) == len(judged):
        raise JudgingError(f"none of {len(judged):,} responses got a score: {first}. Choose another judge (--judge)")


def rollout_evidence(
    judge: LikelihoodJudge,
    rollouts: Sequence[Rollout],
    folder: RunFolder | None,
    *,
    progress: Progress = no_progress,
) -> list[Evidence | None]:
    """The evidence of each rollout, for a judge that has yet to be calibrated."""

    def work(exchanges: Sequence[Exchange], progress: Progress) -> list[Row]:
        return [e.to_json() if e else {"reason": EMPTY} for e in judge.evidence(exchanges)]

    def evidence(row: Row) -> Evidence | None:
        return None if "reason" in row else Evidence.from_json(row)

    exchanges = [exchange_of(rollout, judge.chat) for rollout in rollouts]
    return _in_pieces(judge, work, exchanges, folder, EVIDENCE, evidence, "extraction judging", progress)


def judge_rollouts(
    judge: Judge,
    rollouts: Sequence[Rollout],
    chat: ChatFormat,
    folder: RunFolder | None,
    *,
    prefix: str = "",
    progress: Progress = no_progress,
) -> list[Judgement]:
    """The judgement of each rollout; what the folder already holds is not judged again.

    Args:
        judge: Any judge.
        rollouts: What to judge.
        chat: The subject model's chat format.
        folder: Where to save, under names that begin with ``prefix``; None keeps all in memory.
        prefix: Distinguishes several sets of rollouts in a folder.
        progress: Told how far the work is.

    Raises:
        JudgingError: If no response got a score, and not because all of them are empty.
    """
    label = f"{prefix.rstrip('-') or 'extraction'} judging"
    exchanges = [exchange_of(rollout, chat) for rollout in rollouts]
    judged = judge_exchanges(judge, exchanges, folder, prefix=prefix, label=label, progress=progress)
    check_scored(judged)
    return judged


def as_used(described: Mapping[str, Any], judged: Iterable[Judgement]) -> dict[str, Any]:
    """A judge's description, with the method that scores were found by where the choice of one was left to the judge.

    What binds a run folder is the description as it is, since the method is known only once the judge has been asked;
    what a run found is stored with this one.

    Args:
        described: See `Judge.describe`.
        judged: What it said.
    """
    scores = (score for each in judged for score in (each.trait, each.coherence) if score is not None)
    methods = {score.method.partition(":")[0] for score in scores if score.method}
    if "method" not in described or not methods:
        return dict(described)
    return {**described, "method": " and ".join(sorted(methods))}


def judge_exchanges(
    judge: Judge,
    exchanges: Sequence[Exchange],
    folder: RunFolder | None,
    *,
    prefix: str = "",
    label: str = "judging",
    progress: Progress = no_progress,
) -> list[Judgement]:
    """The judgement of each exchange, as `judge_rollouts` has it; ``label`` is what progress is told."""

    def work(exchanges: Sequence[Exchange], progress: Progress) -> list[Row]:
        return [judgement.to_json() for judgement in judge.judge(exchanges, progress)]

    return _in_pieces(judge, work, exchanges, folder, prefix + JUDGEMENTS, Judgement.from_json, label, progress)


def _in_pieces(
    judge: Judge,
    work: Callable[[Sequence[Exchange], Progress], list[Row]],
    exchanges: Sequence[Exchange],
    folder: RunFolder | None,
    name: str,
    form: Callable[[Row], Found],
    label: str,
    progress: Progress,
) -> list[Found]:
    """What the rows of ``work`` say of each exchange, in their order."""
    cut = judge.pieces(exchanges)

    def within(done: int, total: int | None, _: str) -> None:
        if len(cut) == 1:
            progress(done, total, label)

    def run(number: int) -> list[Row]:
        return work([exchanges[i] for i in cut[number]], within)

    purposes = [json.dumps([each.question, each.response, each.response_ids]) for each in exchanges]
    pieces = Pieces(folder, name, cut, purposes, form=form)
    rows = pieces.run(run, at_once=judge.concurrency, report=lambda done: progress(done, len(exchanges), label))
    return list(map(form, rows))


def exchange_of(rollout: Rollout, chat: ChatFormat) -> Exchange:
    """What a judge is shown of a rollout: never its system prompt, and never its reasoning."""
    whole = chat.decode(rollout.response_ids) == rollout.response
    return Exchange(rollout.request.question, rollout.response, rollout.response_ids if whole else None)
