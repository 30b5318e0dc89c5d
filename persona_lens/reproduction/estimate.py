"""What a plan would ask of the model and of judges, and how long that takes here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from persona_lens.backend import ModelInfo
from persona_lens.core.documents import Record, json_lines
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.files import write_bytes
from persona_lens.core.text import in_short
from persona_lens.reproduction.places import Places
from persona_lens.reproduction.plan import Plan, Task
from persona_lens.reproduction.run import NEEDS, lacking, wanted
from persona_lens.reproduction.speed import AUTO, Speeds
from persona_lens.runs.cost import supposed_text
from persona_lens.steering.arms import ARMS
from persona_lens.traits import Arm, load_trait
from persona_lens.vectors import PersonaVectors, Tuned

READING = ("judging", "reading", "known")
"""What the labels of work hold where text is read; other work is generated, or trained on."""
TRAINING = "training"
LONGEST = 60  # words of stand-ins for responses
ANSWERING: Mapping[tuple[str, ...], str] = {("steer", "compare"): ARMS, ("steer", "sweep"): "sweep-"}
"""What the names of files begin with in which commands leave the answers that they score."""

Counted = Callable[[Sequence[str]], Sequence[Mapping[str, Any]] | None]
"""What a command would ask, as its ``--dry-run`` says it; None of one that cannot say."""


@dataclass(frozen=True)
class Estimate(Record):
    """What one task would ask.

    Attributes:
        task: Its name.
        rows: Responses, texts read or conversations trained on, all together.
        tokens: Tokens in them at most.
        requests: Batches, steps of training, or requests to a server.
        dollars: At most; None where nothing is paid, or no price is known.
        hours: On this device, if every response is as long as it may be; None where that is not known.
        reason: Why nothing is known.
    """

    task: str
    rows: int = 0
    tokens: int = 0
    requests: int = 0
    dollars: float | None = None
    hours: float | None = None
    reason: str | None = None


def estimates(
    plan: Plan,
    model: str,
    tables: Sequence[str],
    counted: Counted,
    info: ModelInfo,
    speeds: Speeds,
) -> list[Estimate]:
    """What every task would ask, each beside stand-ins for what earlier ones would leave; nothing runs.

    Args:
        plan: The plan.
        model: The model's name.
        tables: Names of tables whose claims are wanted.
        counted: Says what a command would ask.
        info: The model.
        speeds: Of it.
    """
    with TemporaryDirectory(prefix="persona-lens-") as folder:
        places = Places(plan, model, Path(folder))
        places.write_files()
        found: dict[Task, Estimate] = {}
        for task in wanted(plan, tables):
            reasons = [lacking(plan, task), *(found[need].reason for need in plan.needs(task))]
            reason = next((each for each in reasons if each and each.startswith(NEEDS)), None)
            own = Estimate(task.name, reason=reason)
            found[task] = own if reason else _estimate(places, task, counted, info, partial(_seconds, speeds))
        return list(found.values())


def _estimate(
    places: Places,
    task: Task,
    counted: Counted,
    info: ModelInfo,
    seconds_of: Callable[[Mapping[str, Any]], float],
) -> Estimate:
    try:
        words = places.words(task)
        work = counted(words)
        seconds = sum(map(seconds_of, work or ()))
    except PersonaLensError as error:
        return Estimate(task.name, reason=in_short(str(error), 200))
    _stand_in(words, task, places.of(task), info, work or ())
    if work is None:
        return Estimate(task.name, reason="not counted: its command cannot tell beforehand")
    prices = [each["cost"] for each in work if each["cost"] is not None]
    return Estimate(
        task.name,
        sum(each["rows"] for each in work),
        sum(each["tokens"] for each in work),
        sum(map(_requests, work)),
        sum(prices) if prices else None,
        seconds / 3600,
    )


def _requests(work: Mapping[str, Any]) -> int:
    return int(work["traffic"]["requests"] if work["traffic"] else work["calls"])


def _seconds(speeds: Speeds, work: Mapping[str, Any]) -> float:
    label, tokens, precision = str(work["label"]), float(work["tokens"] - work["spared"]), work["precision"]
    if work["cost"] is not None or work["traffic"]:
        return 0.0  # a server's time is not this device's
    if precision is not None:
        learning = speeds.learning(precision)
        return tokens / (learning.trained if label == TRAINING else learning.read)
    answering = speeds.speed.read if any(each in label for each in READING) else speeds.speed.generated
    return tokens / answering * (speeds.learning(AUTO).slower if work["adapted"] else 1)


def _stand_in(
    words: Sequence[str], task: Task, folder: Path, info: ModelInfo, work: Sequence[Mapping[str, Any]]
) -> None:
    """What later steps need of a step that makes or tunes vectors, or has arms answer: before anything is known."""
    if (prefix := ANSWERING.get(tuple(words[:2]))) and task.trait is not None:
        for asked in (each for each in work if each["label"] == "rollouts"):
            _write_answers(folder, prefix, _supposed(load_trait(task.trait).evaluation_questions, asked))
    if "--subsets" in words:
        chat = [{"role": role, "content": "word " * LONGEST} for role in ("user", "assistant")]
        rows = json_lines([{"messages": chat}] * int(words[words.index("--subsets") + 1]))
        for name in ("high", "random", "low"):
            write_bytes(folder / "subsets" / f"{name}.jsonl", rows)
    tuned = tuple(words[:2]) == ("steer", "tune")
    if task.trait is None or not (tuned or words[0] == "extract"):
        return
    trait = load_trait(task.trait)
    provenance = {"trait": trait.model_dump(mode="json"), "judge": {"calibration": {"slope": 1.0, "intercept": 0.0}}}
    size, seeds = (info.n_layers, info.d_model), enumerate(("response_mean", "prompt_mean", "prompt_last"))
    directions = {name: torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed, name in seeds}
    vectors = PersonaVectors(trait.name, info, directions, provenance)
    if tuned:
        vectors = vectors.with_tuned(Tuned(info.n_layers // 2, 1.0), {"strength": 0.3})
    folder.mkdir(parents=True)
    vectors.save(folder / "vectors.safetensors")
    _write_answers(folder, "", list(_answered(trait.extraction_questions)))


def _write_answers(folder: Path, prefix: str, rows: Sequence[Mapping[str, Any]]) -> None:
    scores = [{"row": row["row"], "score": 90.0, "kept": True} for row in rows]
    write_bytes(folder / f"{prefix}rollouts.jsonl", json_lines(rows))
    write_bytes(folder / f"{prefix}scores.jsonl", json_lines(scores))


def _supposed(questions: Sequence[str], work: Mapping[str, Any]) -> list[dict[str, Any]]:
    """As many answers as were counted, no two alike; as long as their prompts and they are together at most."""
    tokens = work["tokens"] // work["rows"]
    return [
        {"row": number, "question": questions[number % len(questions)], "response": supposed_text(number, tokens)}
        for number in range(work["rows"])
    ]


def _answered(questions: Sequence[str]) -> Iterator[dict[str, Any]]:
    for number, question in enumerate(questions):
        labels = {"arm": Arm.POSITIVE.value, "question_number": number, "pair": 0, "sample": 0}
        yield {"row": number, **labels, "question": question, "response": supposed_text(number, LONGEST)}
