"""What a plan would ask of the model and of judges, and how long that takes here, by a short measurement."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from persona_lens.backend import Backend, ModelInfo, Sampling, TokenBatch
from persona_lens.core.documents import Record, json_lines
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.files import write_bytes
from persona_lens.core.text import in_short
from persona_lens.models import ChatFormat
from persona_lens.reproduction.places import Places
from persona_lens.reproduction.plan import Plan, Task
from persona_lens.reproduction.run import NEEDS, lacking, wanted
from persona_lens.traits import Arm, load_trait
from persona_lens.vectors import PersonaVectors, Tuned

ROWS, NEW_TOKENS = 16, 24
READING = ("judging", "reading", "known")
"""What the labels of work hold where text is read; other work is generated, or trained on."""
TRAINING, PASSES = "training", 3  # a step forwards and back, in passes forwards
LONGEST = 60  # words of stand-ins for responses

Counted = Callable[[Sequence[str]], Sequence[Mapping[str, Any]] | None]
"""What a command would ask, as its ``--dry-run`` says it; None of one that asks a model for nothing beforehand."""


@dataclass(frozen=True)
class Speed(Record):
    """Tokens a second, measured.

    Attributes:
        generated: Prompts and responses together, while the model generates.
        read: While it reads.
        seconds: What the measurement took.
        rows: Rows it was taken on.
    """

    generated: float
    read: float
    seconds: float
    rows: int


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


def speed_of(backend: Backend, chat: ChatFormat) -> Speed:
    """Generate and read a few rows, once to warm up and once on the clock."""
    prompts = [chat.encode(None, f"Tell me something about the number {number}.") for number in range(ROWS)]
    sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=1.0, seeds=tuple(range(ROWS)))
    began = time.perf_counter()
    backend.generate(prompts[:2], Sampling(max_new_tokens=2, temperature=1.0, seeds=(0, 1)))
    at = time.perf_counter()
    found = backend.generate(prompts, sampling)
    made = time.perf_counter() - at
    texts = [[*prompt, *row] for prompt, row in zip(prompts, found.responses, strict=True)]
    at = time.perf_counter()
    backend.forward(TokenBatch.of(texts), logprobs=True)
    read = time.perf_counter() - at
    tokens = sum(map(len, texts))
    return Speed(tokens / made, tokens / read, time.perf_counter() - began, ROWS)


def estimates(
    plan: Plan, model: str, tables: Sequence[str], counted: Counted, info: ModelInfo, speed: Speed
) -> list[Estimate]:
    """What every task would ask, each beside stand-ins for what earlier ones would leave; nothing runs.

    Args:
        plan: The plan.
        model: The model's name.
        tables: Names of tables whose claims are wanted.
        counted: Says what a command would ask.
        info: The model.
        speed: Of it.
    """
    with TemporaryDirectory(prefix="persona-lens-") as folder:
        places = Places(plan, model, Path(folder))
        places.write_files()
        found: dict[Task, Estimate] = {}
        for task in wanted(plan, tables):
            reasons = [lacking(plan, task), *(found[need].reason for need in plan.needs(task))]
            reason = next((each for each in reasons if each and each.startswith(NEEDS)), None)
            own = Estimate(task.name, reason=reason)
            found[task] = own if reason else _estimate(places, task, counted, info, speed)
        return list(found.values())


def _estimate(places: Places, task: Task, counted: Counted, info: ModelInfo, speed: Speed) -> Estimate:
    try:
        words = places.words(task)
        work = counted(words)
    except PersonaLensError as error:
        return Estimate(task.name, reason=in_short(str(error), 200))
    _stand_in(words, task, places.of(task), info)
    if work is None:
        return Estimate(task.name, reason="not counted: its command cannot tell beforehand")
    prices = [each["cost"] for each in work if each["cost"] is not None]
    seconds = sum(_seconds(each, speed) for each in work)
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


def _seconds(work: Mapping[str, Any], speed: Speed) -> float:
    if work["cost"] is not None or work["traffic"]:
        return 0.0  # a server's time is not this device's
    if work["label"].startswith(TRAINING):
        return float(PASSES * work["tokens"] / speed.read)
    return float(
        work["tokens"] / (speed.read if any(each in str(work["label"]) for each in READING) else speed.generated)
    )


def _stand_in(words: Sequence[str], task: Task, folder: Path, info: ModelInfo) -> None:
    """What later steps need of a step that makes or tunes vectors: such as there are before anything is known."""
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
    made = list(_answered(trait.extraction_questions))
    (folder / "rollouts.jsonl").write_bytes(json_lines(made))
    (folder / "scores.jsonl").write_bytes(json_lines({"row": row["row"], "score": 90.0, "kept": True} for row in made))


def _answered(questions: Sequence[str]) -> Iterator[dict[str, Any]]:
    for number, question in enumerate(questions):
        labels = {"arm": Arm.POSITIVE.value, "question_number": number, "pair": 0, "sample": 0}
        yield {"row": number, **labels, "question": question, "response": "word " * LONGEST}
