"""`Scorer`: what a model says of a window of rows: any number of traits in one pass, batch by batch.

A batch's results are one JSON object, a *unit*: what is saved of a run, and what travels between machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from persona_lens.backend import Backend, Read, ReadKind, Sampling, TokenBatch
from persona_lens.backend.batches import batches_by_length, context_length, forward_plan, forward_rows, generate_rows
from persona_lens.data.tables import DataError
from persona_lens.monitoring import Panel
from persona_lens.runs.rollouts import row_seed
from persona_lens.screening.samples import (
    BaseResponses,
    Sample,
    ScreeningError,
    ScreeningSettings,
    Text,
    Window,
    encode_sample,
    text_of,
)

if TYPE_CHECKING:
    from persona_lens.backend.tokens import TokenIds
    from persona_lens.models import ChatFormat

Unit = dict[str, Any]
GENERATED_TOKENS = 32768  # tokens of a batch of base responses, prompts and padding included


@dataclass(frozen=True)
class Plan:
    """What a window asks of the model; nothing runs.

    Attributes:
        samples: The rows that can be scored.
        problems: Of the others, why not, by the row's number.
        texts: What is read, with the row it belongs to.
        own: Indices of the texts that run together.
        prompts: What base responses are generated to, with the rows that need the response.
        generated: Indices of the prompts that run together.
        supplied: Base responses behind their prompts, with the row.
        base: Indices of those that run together.
    """

    samples: tuple[Sample, ...]
    problems: dict[int, str]
    texts: tuple[tuple[int, Text], ...]
    own: tuple[list[int], ...]
    prompts: tuple[tuple[tuple[int, ...], TokenIds], ...]
    generated: tuple[list[int], ...]
    supplied: tuple[tuple[int, Text], ...]
    base: tuple[list[int], ...]


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
        makers: list[Callable[[], Unit]] = [
            partial(_rows_unit, window, plan),
            *(partial(self._read, plan.texts, batch, "own") for batch in plan.own),
            *(partial(self._generate, plan.prompts, batch) for batch in plan.generated),
            *(partial(self._read, plan.supplied, batch, "supplied") for batch in plan.base),
        ]
        place = {"dataset": window.dataset, "window": window.number}
        for number, make in enumerate(makers[skip:], skip):
            yield {**place, "unit": number, "of": len(makers), **make()}

    def plan(self, window: Window) -> Plan:
        """Encode a window and cut it into batches."""
        samples, problems = [], {}
        for row in window.rows:
            if row.messages is None:
                problems[row.number] = row.problem or "it cannot be read"
                continue
            try:
                samples.append(encode_sample(row, self.chat, self.settings.turns, self._longest))
            except (DataError, ScreeningError) as error:
                problems[row.number] = f"{window.name}:{row.line}: {error}"
        texts = tuple((sample.row.number, text) for sample in samples for text in sample.texts)
        with_base = [sample for sample in samples if self._has_base(window.dataset, sample)]
        asked: dict[TokenIds, list[int]] = {}  # seeds are the prompt's: the same prompt has the same responses
        supplied: tuple[tuple[int, Text], ...] = ()
        if self.settings.base is BaseResponses.GENERATE:
            for sample in with_base:
                for prompt in (prompt for text in sample.texts for prompt in text.prompts):
                    asked.setdefault(prompt, []).append(sample.row.number)
        elif self.settings.base is BaseResponses.SUPPLIED:
            supplied = tuple((s.row.number, text) for s in with_base for text in self._base_texts(s))
        return Plan(
            tuple(samples),
            problems,
            texts,
            self._cut(texts),
            tuple((tuple(rows), prompt) for prompt, rows in asked.items()),
            self._cut_prompts(list(asked)),
            supplied,
            self._cut(supplied),
        )

    @cached_property
    def _longest(self) -> int | None:
        limits = [limit for limit in (self.settings.max_tokens, context_length(self.backend)) if limit is not None]
        return min(limits, default=None)

    @cached_property
    def _units_at(self) -> tuple[Tensor, Tensor]:
        """Of each gauge: its place among the layers read, int64 [gauges]; and its unit vector, [gauges, d_model]."""
        rows = torch.tensor([self.panel.layers.index(gauge.layer) for gauge in self.panel.gauges])
        directions = torch.stack([gauge.direction for gauge in self.panel.gauges])
        return rows, directions / directions.norm(dim=-1, keepdim=True)

    def _has_base(self, dataset: int, sample: Sample) -> bool:
        drawn = row_seed(self.settings.seed, "base", dataset, sample.row.number)
        return drawn < self.settings.base_share * 2**63

    def _base_texts(self, sample: Sample) -> list[Text]:
        prompt = sample.texts[-1].prompts[-1]
        texts = (text_of(prompt, self.chat.encode_answer(response)) for response in sample.row.base)
        return [text for text in texts if self._fits(text)]

    def _fits(self, text: Text) -> bool:
        longest = self._longest
        return text.answers[0].stop > text.answers[0].start and (longest is None or len(text.ids) <= longest)

    def _cut(self, texts: Sequence[tuple[int, Text]]) -> tuple[list[int], ...]:
        if not texts:
            return ()
        tokens = TokenBatch.of([text.ids for _, text in texts])
        rows, most = self.settings.batch_size, self.settings.batch_tokens
        return tuple(forward_plan(self.backend, tokens, (), [self.panel.read], max_rows=rows, max_tokens=most))

    def _cut_prompts(self, prompts: Sequence[TokenIds]) -> tuple[list[int], ...]:
        lengths = [len(prompt) + self.settings.max_new_tokens for prompt in prompts]
        samples = self.settings.base_samples  # those of a prompt run together
        at_once = max(1, self.settings.batch_size // samples)
        return tuple(batches_by_length(lengths, at_once, GENERATED_TOKENS // samples))

    def _read(self, texts: Sequence[tuple[int, Text]], batch: Sequence[int], kind: str) -> Unit:
        tokens = TokenBatch.of([texts[index][1].ids for index in batch])
        rows = []
        projections = forward_rows(self.backend, tokens, (), [self.panel.read]).reads["projections"]
        for index, projected in zip(batch, projections, strict=True):
            row, text = texts[index]
            rows.append({"row": row, **_averaged(text, self.panel.values(projected[:, -len(text.ids) :]))})
        return {"kind": kind, "rows": rows, "ran": sum(tokens.lengths)}

    def asked(self, prompts: Sequence[TokenIds]) -> tuple[list[TokenIds], Sampling]:
        """What is generated for base responses to prompts: each as often as there are samples, side by side."""
        samples, settings = range(self.settings.base_samples), self.settings
        seeds = None
        if settings.temperature:
            seeds = tuple(row_seed(settings.seed, "base response", n, *prompt) for prompt in prompts for n in samples)
        sampling = Sampling(settings.max_new_tokens, settings.temperature, seeds=seeds)
        return [prompt for prompt in prompts for _ in samples], sampling

    def _generate(self, prompts: Sequence[tuple[tuple[int, ...], TokenIds]], batch: Sequence[int]) -> Unit:
        """Base responses, read while they are generated (method, section 7)."""
        read = Read(ReadKind.RESPONSE_MEAN, self.panel.layers)
        places, units = self._units_at
        asked, sampling = self.asked([prompts[index][1] for index in batch])
        found = generate_rows(self.backend, asked, sampling, (), [read])
        responses = found.responses
        values = list(torch.einsum("bgd,gd->bg", found.reads["response_mean"][:, places], units))
        rows: list[dict[str, Any]] = []
        for number, index in enumerate(batch):
            own = slice(number * self.settings.base_samples, (number + 1) * self.settings.base_samples)
            entry = self._base_entry(responses[own], values[own])
            rows += [{"row": row, **entry} for row in prompts[index][0]]
        return {"kind": "base", "rows": rows, "ran": sum(map(len, asked)) + sum(map(len, responses))}

    def _base_entry(self, responses: Sequence[TokenIds], values: Sequence[Tensor]) -> dict[str, Any]:
        """The responses to one prompt; the values are the mean over those that are not empty."""
        said = [own for ids, own in zip(responses, values, strict=True) if ids]
        return {
            "texts": [self.chat.decode(ids) for ids in responses],
            "tokens": sum(map(len, responses)) / max(1, len(said)),
            "values": _numbers(torch.stack(said).mean(dim=0)) if said else None,
        }


def _rows_unit(window: Window, plan: Plan) -> Unit:
    rows = [
        {"number": row.number, "line": row.line, "id": row.id, "label": row.label, "group": row.group}
        | ({"problem": plan.problems[row.number]} if row.number in plan.problems else {})
        for row in window.rows
    ]
    return {"kind": "rows", "rows": rows, "ran": 0}


def _averaged(text: Text, values: Tensor) -> dict[str, Any]:
    """Mean over all tokens of all answers, and over the last tokens before them, of float32 [tokens, gauges]."""
    said = torch.cat([values[answer.start : answer.stop] for answer in text.answers])
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
