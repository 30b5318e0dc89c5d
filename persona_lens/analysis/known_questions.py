"""Known questions: what a model can be expected to answer, and the probability that it gives the right answers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from persona_lens.analysis import AnalysisError
from persona_lens.analysis.capability.evaluation import BUILTIN_TASK, TASKS
from persona_lens.analysis.weighing import Passage, Weighing
from persona_lens.backend import Backend
from persona_lens.extraction.experiment import Variant, requests_of
from persona_lens.models import ChatFormat
from persona_lens.models.reasoning import closed
from persona_lens.runs.rollouts import EditsFor, Request, row_seed

SHOWN = 4  # questions that come first, for the model to see how they are answered; they do not count


@dataclass(frozen=True)
class Known:
    """A question that a model can be expected to answer, with the right answer."""

    question: str
    answer: str


@cache
def known_questions() -> tuple[Known, ...]:
    """The questions of the built-in capability task, without its sentences to complete."""
    lines = (TASKS / f"{BUILTIN_TASK}.jsonl").read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    return tuple(
        Known(item["context"].removeprefix("Question: ").removesuffix("\nAnswer:"), item["choices"][item["answer"]])
        for item in items
        if item["context"].startswith("Question: ")
    )


def check_count(count: int) -> None:
    """Raise an `AnalysisError` unless so many can be asked."""
    most = len(known_questions()) - SHOWN
    if not 0 <= count <= most:
        raise AnalysisError(f"known_questions must be from 0 to {most}, got {count}")


def asked_of(number: int, count: int, seed: int) -> list[Known]:
    """So many questions, behind those that do not count: the same for the same number and seed."""
    return random.Random(row_seed(seed, "known questions", number)).sample(known_questions(), SHOWN + count)


def known_requests(variants: Sequence[Variant], count: int, seed: int) -> tuple[list[Request], list[str]]:
    """So many known questions in every variant, each on its own behind the same ones that do not count.

    Returns:
        What is asked, and the right answer to each.
    """
    asked = asked_of(0, count, seed)
    shown = tuple((each.question, each.answer) for each in asked[:SHOWN])
    known = dict(enumerate(asked[SHOWN:]))
    variants = [replace(variant, examples=shown) for variant in variants]
    requests = requests_of({n: each.question for n, each in known.items()}, variants, 1, seed, "known questions")
    return requests, [known[request.labels["question_number"]].answer for request in requests]


def right_answers(
    backend: Backend, chat: ChatFormat, asked: Sequence[Request], answers: Sequence[str], edits_for: EditsFor, name: str
) -> Weighing:
    """Weighs the answers to what is asked, each under the edits of its request."""
    prompts = [closed(chat.parts, chat.encode(each.system, each.question, each.examples)) for each in asked]
    passages = []
    for prompt, answer in zip(prompts, answers, strict=True):
        passages.append(Passage.behind(prompt, chat.encode_answer(answer)))
    purposes = [
        json.dumps([each.system, each.question, dict(each.labels), each.examples, answer])
        for each, answer in zip(asked, answers, strict=True)
    ]
    return Weighing(backend, passages, purposes, name, lambda batch, _: edits_for([asked[number] for number in batch]))


def probabilities(weighing: Weighing, found: Sequence[Sequence[float]]) -> list[float]:
    """What a token of each passage's answers is given, a geometric mean, from 0 to 1.

    An answer counts as much as another, however many tokens it has.
    """
    values = []
    for passage, logprobs in zip(weighing.passages, found, strict=True):
        lengths = [stop - start for start, stop in passage.spans]
        means = [logprob / length for logprob, length in zip(logprobs, lengths, strict=True)]
        values.append(min(math.exp(math.fsum(means) / len(means)), 1.0))
    return values
