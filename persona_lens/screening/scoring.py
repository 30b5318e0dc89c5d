"""`Scorer`: what a model says of a window of rows: any number of traits in one pass, batch by batch.

A batch's results are one JSON object, a *unit*: what is saved of a run, and what travels between machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import starmap
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from persona_lens.backend import Backend, Read, ReadKind, Sampling, TokenBatch
from persona_lens.backend.batches import batches_by_length, context_length, forward_plan, forward_rows, generate_rows
from persona_lens.backend.parts import Part
from persona_lens.backend.spread import RayBackend
from persona_lens.core.threads import in_threads
from persona_lens.data.tables import DataError
from persona_lens.monitoring import Panel
from persona_lens.monitoring.gauges import projected
from persona_lens.runs.rollouts import row_seed
from persona_lens.screening.samples import (
    BaseResponses,
    Counted,
    ScreeningError,
    ScreeningSettings,
    Text,
    Window,
    counting,
    encode_sample,
    text_of,
)

if TYPE_CHECKING:
    from persona_lens.backend.tokens import TokenIds
    from persona_lens.models import ChatFormat

Unit = dict[str, Any]
Job = tuple[Window, int]
"""A window, and how many of its units are there already."""
MEANS = {
    Counted.ALL: ReadKind.RESPONSE_MEAN,
    Counted.ANSWER: ReadKind.ANSWER_MEAN,
    Counted.THINKING: ReadKind.THINKING_MEAN,
}
GENERATED_TOKENS = 32768  # tokens of a batch of base responses, prompts and padding included


@dataclass(frozen=True)
class Reading:
    """Texts that are read together, each with the number of its row.

    Attributes:
        kind: ``own`` answers, or base responses that were ``supplied``.
        texts: At least one.
    """

    kind: str
    texts: tuple[tuple[int, Text], ...]


@dataclass(frozen=True)
class Generating:
    """Prompts that base responses are generated to together, each with the rows that need the response."""

    prompts: tuple[tuple[tuple[int, ...], TokenIds], ...]


@dataclass(frozen=True)
class Plan:
    """What a window asks of the model; nothing runs.

    Attributes:
        problems: Of rows that cannot be scored, why not, by the row's number.
        batches: What runs, one after the other.
    """

    problems: dict[int, str]
    batches: tuple[Reading | Generating, ...]


@dataclass(frozen=True)
class Scorer:
    """Scores windows.

    Attributes:
        backend: The model.
        chat: Its chat format.
        panel: The traits, each at its layers.
        settings: How.
    """

    backend: Backend
    chat: ChatFormat
    panel: Panel
    settings: ScreeningSettings

    def each(self, jobs: Iterable[Job]) -> Iterator[Iterable[Unit]]:
        """The units of each window that are not there yet, in the order of the windows.

        As many windows run at once as the backend takes calls. Ray's workers are given them whole, to encode too.
        """
        if isinstance(self.backend, RayBackend):
            score = self.backend.over(partial(_scoring, self.chat, self.panel, self.settings))
        elif self.backend.calls_at_once > 1:
            score = _scoring(self.chat, self.panel, self.settings, self.backend)
        else:
            return starmap(self.units, jobs)
        together = in_threads(lambda job: score(*job), jobs, self.backend.calls_at_once, in_order=True)
        return (units for _, units in together)

    def units(self, window: Window, skip: int = 0) -> Iterator[Unit]:
        """Everything about a window, unit by unit, in an order that is always the same.

        Args:
            window: The rows.
            skip: Units that are there already.

        Yields:
            First the rows themselves with what is wrong with bad ones, then the values of each batch. A value is the
            projection on the trait's unit vector, in residual-stream units, one for each gauge of the panel.
        """
        plan = self.plan(window)
        of = 1 + len(plan.batches)
        for number, batch in enumerate((None, *plan.batches)):
            if number >= skip:
                made = _rows_unit(window, plan) if batch is None else self._run(batch)
                yield {"dataset": window.dataset, "window": window.number, "unit": number, "of": of, **made}

    def plan(self, window: Window) -> Plan:
        """Encode a window and cut it into batches."""
        problems: dict[int, str] = {}
        own: list[tuple[int, Text]] = []
        supplied: list[tuple[int, Text]] = []
        asked: dict[TokenIds, list[int]] = {}  # seeds are the prompt's: the same prompt has the same responses
        for row in window.rows:
            if row.messages is None:
                problems[row.number] = row.problem or "it cannot be read"
                continue
            try:
                texts = encode_sample(row, self.chat, self.settings.turns, self._longest, self.settings.part)
            except (DataError, ScreeningError) as error:
                problems[row.number] = f"{window.name}:{row.line}: {error}"
                continue
            own += ((row.number, text) for text in texts)
            if not self._has_base(window.dataset, row.number):
                continue
            if self.settings.base is BaseResponses.GENERATE:
                for prompt in (prompt for text in texts for prompt in text.prompts):
                    asked.setdefault(prompt, []).append(row.number)
            prompt = texts[-1].prompts[-1]
            plain = (text_of(prompt, self.chat.encode_answer(response)) for response in row.base)
            given = (counting(text, self.chat, self.settings.part) for text in plain)
            supplied += ((row.number, text) for text in given if self._fits(text))
        prompts = [(tuple(rows), prompt) for prompt, rows in asked.items()]
        generated = [Generating(tuple(prompts[index] for index in batch)) for batch in self._cut_prompts(list(asked))]
        return Plan(problems, (*self._cut("own", own), *generated, *self._cut("supplied", supplied)))

    @cached_property
    def _longest(self) -> int | None:
        limits = [limit for limit in (self.settings.max_tokens, context_length(self.backend)) if limit is not None]
        return min(limits, default=None)

    def _has_base(self, dataset: int, row: int) -> bool:
        return row_seed(self.settings.seed, "base", dataset, row) < self.settings.base_share * 2**63

    def _fits(self, text: Text) -> bool:
        longest = self._longest
        return bool(text.answers[0].tokens) and (longest is None or len(text.ids) <= longest)

    def _cut(self, kind: str, texts: Sequence[tuple[int, Text]]) -> list[Reading]:
        if not texts:
            return []
        tokens = TokenBatch.of([text.ids for _, text in texts])
        rows, most = self.settings.batch_size, self.settings.batch_tokens
        plan = forward_plan(self.backend, tokens, (), [self.panel.read], max_rows=rows, max_tokens=most)
        return [Reading(kind, tuple(texts[index] for index in batch)) for batch in plan]

    def _cut_prompts(self, prompts: Sequence[TokenIds]) -> list[list[int]]:
        lengths = [len(prompt) + self.settings.max_new_tokens for prompt in prompts]
        samples = self.settings.base_samples  # those of a prompt run together
        at_once = max(1, self.settings.batch_size // samples)
        return batches_by_length(lengths, at_once, GENERATED_TOKENS // samples)

    def _run(self, batch: Reading | Generating) -> Unit:
        return self._read(batch) if isinstance(batch, Reading) else self._generate(batch)

    def _read(self, batch: Reading) -> Unit:
        tokens = TokenBatch.of([text.ids for _, text in batch.texts])
        read = forward_rows(self.backend, tokens, (), [self.panel.read]).reads["projections"]
        rows = [
            {"row": row, **_averaged(text, self.panel.values(values[:, -len(text.ids) :]))}
            for (row, text), values in zip(batch.texts, read, strict=True)
        ]
        return {"kind": batch.kind, "rows": rows, "ran": sum(tokens.lengths)}

    def asked(self, batch: Generating) -> tuple[list[TokenIds], Sampling]:
        """What is generated for base responses: each prompt as often as there are samples, side by side."""
        samples, settings = range(self.settings.base_samples), self.settings
        prompts = [prompt for _, prompt in batch.prompts]
        seeds = None
        if settings.temperature:
            seeds = tuple(row_seed(settings.seed, "base response", n, *prompt) for prompt in prompts for n in samples)
        budget = settings.thinking_budget
        sampling = Sampling(settings.max_new_tokens, settings.temperature, seeds=seeds, thinking_budget=budget)
        return [prompt for prompt in prompts for _ in samples], sampling

    def _generate(self, batch: Generating) -> Unit:
        """Base responses, read while they are generated (method, section 7)."""
        layers, samples = self.panel.layers, self.settings.base_samples
        asked, sampling = self.asked(batch)
        kind = MEANS[self.settings.part]
        found = generate_rows(self.backend, asked, sampling, (), [Read(kind, layers)])
        responses, values = found.responses, list(projected(found.reads[kind.value], layers, self.panel.gauges))
        rows: list[dict[str, Any]] = []
        for number, (members, prompt) in enumerate(batch.prompts):
            own = slice(number * samples, (number + 1) * samples)
            entry = self._base_entry(prompt, responses[own], values[own])
            rows += [{"row": row, **entry} for row in members]
        return {"kind": "base", "rows": rows, "ran": sum(map(len, asked)) + sum(map(len, responses))}

    def _base_entry(self, prompt: TokenIds, responses: Sequence[TokenIds], values: Sequence[Tensor]) -> dict[str, Any]:
        """The responses to one prompt; the values are the mean over those of which any token counts."""
        said = [own for own in values if bool(own.isfinite().all())]  # NaN where nothing counts
        return {
            "texts": [self.chat.decode(ids) for ids in responses],
            "tokens": sum(self._counted(prompt, ids) for ids in responses) / max(1, len(said)),
            "values": _numbers(torch.stack(said).mean(dim=0)) if said else None,
        }

    def _counted(self, prompt: TokenIds, response: TokenIds) -> int:
        """How many tokens of a response that was generated count, as they were told apart while it was."""
        if self.settings.part is Counted.ALL:
            return len(response)
        wanted = Part.ANSWER if self.settings.part is Counted.ANSWER else Part.THINKING
        return self.chat.parts.of_response(prompt, response).count(wanted)


def _scoring(
    chat: ChatFormat, panel: Panel, settings: ScreeningSettings, backend: Backend
) -> Callable[[Window, int], list[Unit]]:
    """What a whole window is scored with."""
    scorer = Scorer(backend, chat, panel, settings)
    return lambda window, skip: list(scorer.units(window, skip))


def _rows_unit(window: Window, plan: Plan) -> Unit:
    rows = [
        {"number": row.number, "line": row.line, "id": row.id, "label": row.label, "group": row.group}
        | ({"problem": plan.problems[row.number]} if row.number in plan.problems else {})
        for row in window.rows
    ]
    return {"kind": "rows", "rows": rows, "ran": 0}


def _averaged(text: Text, values: Tensor) -> dict[str, Any]:
    """Mean over all tokens of all answers, and over the last tokens before them, of float32 [tokens, gauges]."""
    said = torch.cat([values[list(answer.tokens)] for answer in text.answers])
    before = values[[answer.prompt - 1 for answer in text.answers]]
    return {
        "tokens": len(said),
        "values": _numbers(said.mean(dim=0)),
        "answers": len(before),
        "prompt": _numbers(before.mean(dim=0)),
    }


def _numbers(values: Tensor) -> list[float]:
    """The shortest decimals that are the same float32 numbers."""
    return [float(str(value)) for value in values.numpy()]
