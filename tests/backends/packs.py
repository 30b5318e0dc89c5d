"""Scripted rows, run as a left-padded batch and as an engine runs them: any tokens of any rows in a pass."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from persona_lens.backend import Condition, Edit, Operation, Positions, Read, ReadKind, Schedule, Span, TokenBatch
from persona_lens.backend.edits import OPERATIONS
from persona_lens.backend.intervention import Intervention
from persona_lens.backend.packed.call import PackedCall
from persona_lens.backend.packed.intervention import PackedIntervention
from persona_lens.backend.parts import Parts
from persona_lens.backend.parts.machine import Part
from persona_lens.backend.tokens import pad_left

LAYERS, D, END = 3, 16, 9
LIMITS = (60.0, 60.0, 60.0)
PROJECTED = torch.tensor([[1.0] * D, [-1.0, 1.0] * (D // 2)])
ALL_READS = (
    Read(ReadKind.RESPONSE_MEAN),
    Read(ReadKind.PROMPT_MEAN, (0, 2)),
    Read(ReadKind.PROMPT_LAST),
    Read(ReadKind.THINKING_MEAN, (0, 2)),
    Read(ReadKind.ANSWER_MEAN),
    Read(ReadKind.RESPONSE_NORM, (1, 2)),
    Read.projections(PROJECTED, (0, 1)),
    Read(ReadKind.NORMS),
    Read(ReadKind.ACTIVATIONS),
)
SINKS_TOO = tuple(replace(read, sinks=read.leaves_out_sinks) for read in ALL_READS)

Chunk = tuple[int, int, int]  # of a row, from a position to one


@dataclass
class Rows:
    """What a model would compute: for each row its ids and residuals, of tokens beyond its response too.

    Attributes:
        prompts: Tokens of each prompt.
        texts: Tokens that are handed over; more where the responses are there already.
        kept: Tokens of each row's prompt and response.
        room: Tokens that may be generated; 0 where the responses are there.
        ids: int64 [tokens] of each row.
        residuals: [layers, tokens, d_model] of each row.
        parts: What tells thinking from answer, by no rule that any model has.
    """

    prompts: list[int]
    texts: list[int]
    kept: list[int]
    room: int
    ids: list[Tensor]
    residuals: list[Tensor]
    parts: Parts = field(default_factory=lambda: random_parts(random.Random(0)))

    @staticmethod
    def random(rng: random.Random, *, generated: bool, ordinary: bool = False, dtype: Any = torch.float32) -> Rows:
        """Some rows, of which a few tokens have massive residuals.

        Their numbers are such that sums of their products are exact, and say the same in whatever order; of the size
        and kind of a model's residuals if ``ordinary``.
        """
        generator = torch.Generator().manual_seed(rng.randrange(2**31))
        number, room = rng.randint(1, 5), rng.randint(1, 8) if generated else 0
        prompts = [rng.choice([1, 1, 2, rng.randint(1, 9)]) for _ in range(number)]
        responses = [rng.choice([0, rng.randint(0, 8)]) for _ in range(number)]
        ids, residuals, kept = [], [], []
        for prompt, response in zip(prompts, responses, strict=True):
            total = prompt + (room + 2 if generated else response)
            row = torch.randint(0, END, (total,), generator=generator)
            ends = range(prompt, total) if generated else ()
            for place in ends:
                if rng.random() < 0.15:
                    row[place] = END
            row[rng.randrange(prompt)] = END  # which in a prompt ends nothing
            stop = next((at for at in ends if row[at] == END), total)
            kept.append(min(stop, prompt + room) if generated else total)
            h = torch.randint(-64, 65, (LAYERS, total, D), generator=generator) / 16
            if ordinary:
                h = torch.randn(LAYERS, total, D, generator=generator) * 3
            massive = torch.rand(LAYERS, total, 1, generator=generator) < rng.choice([0, 0.1, 1.0])
            ids.append(row)
            residuals.append(torch.where(massive, h * (1e5 if ordinary else 1024), h).to(dtype))
        texts = list(prompts) if generated else [len(row) for row in ids]
        return Rows(prompts, texts, kept, room, ids, residuals, random_parts(rng))

    @property
    def batch(self) -> TokenBatch:
        """The prompts, with the responses that are there already."""
        heads = [ids[:prompt].tolist() for ids, prompt in zip(self.ids, self.prompts, strict=True)]
        tails = [i[p:t].tolist() for i, p, t in zip(self.ids, self.prompts, self.texts, strict=True)]
        return TokenBatch.of(heads, tails)

    @property
    def kinds(self) -> tuple[bytes, ...]:
        """What each token of each row's prompt and response is."""
        heads = [ids[:prompt].tolist() for ids, prompt in zip(self.ids, self.prompts, strict=True)]
        tails = [ids[prompt:kept].tolist() for ids, prompt, kept in zip(self.ids, self.prompts, self.kept, strict=True)]
        return self.parts.given(heads, tails).kinds

    @property
    def totals(self) -> list[int]:
        """Tokens of each row that an engine may run over."""
        return [len(ids) for ids in self.ids]

    def call(self, edits: Sequence[Edit], reads: Sequence[Read], **more: Any) -> PackedCall:
        """The call that does this with these rows."""
        ends = (END, 77) if self.room else ()
        given: dict[str, Any] = {"room": self.room, "end_ids": ends, "sink_limits": LIMITS, **more}
        given["parts"] = self.parts.given(self.batch.prompts, self.batch.responses)
        return PackedCall.of(self.prompts, self.texts, edits, reads, n_layers=LAYERS, **given)


def as_batch(
    rows: Rows, edits: Sequence[Edit], reads: Sequence[Read], limits: Sequence[float] | None = LIMITS
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Residuals after the edits, [layers, tokens, d_model] of each row, and the reads, as other backends do it."""
    padded = pad_left(rows.batch, 0, parts=rows.parts)
    given: dict[str, Any] = {"n_layers": LAYERS, "sink_limits": limits}
    if rows.room:
        given |= {"end_ids": (END, 77), "max_new_tokens": rows.room}
    intervention = Intervention(padded, edits, reads, **given)
    out = [torch.full_like(residual, torch.nan) for residual in rows.residuals]
    width = padded.ids.shape[1]
    for step in range(1 + (rows.room + 1 if rows.room else 0)):
        at = [range(text) if step == 0 else range(text + step - 1, text + step) for text in rows.texts]
        ids = padded.ids if step == 0 else torch.stack([i[a.start : a.stop] for i, a in zip(rows.ids, at, strict=True)])
        intervention.begin_pass(ids)
        for layer in range(LAYERS):
            h = torch.full((len(at), width if step == 0 else 1, D), torch.nan, dtype=out[0].dtype)
            for row, places in enumerate(at):
                h[row, h.shape[1] - len(places) :] = rows.residuals[row][layer, places.start : places.stop]
            h = intervention.block(layer, h)
            for row, places in enumerate(at):
                out[row][layer, places.start : places.stop] = h[row, h.shape[1] - len(places) :]
    return out, intervention.results()


def passes(rng: random.Random, rows: Rows, begins: Sequence[int]) -> Iterator[list[Chunk]]:
    """What an engine may make of the rows: they wait, are run in parts, are thrown out and begin again."""
    at = list(begins)
    stops = [rng.randint(kept, total) for kept, total in zip(rows.kept, rows.totals, strict=True)]
    longest, patience = rng.choice([1, 3, 20]), rng.choice([0, 4])
    while left := [row for row, stop in enumerate(stops) if at[row] < stop]:
        chosen = rng.sample(left, rng.randint(1, len(left)))
        chunks = [(row, at[row], min(stops[row], at[row] + rng.randint(1, longest))) for row in chosen]
        yield chunks
        for row, _, stop in chunks:
            at[row] = stop
        for row in range(len(at)):
            if begins[row] < at[row] < stops[row] and patience and rng.random() < 0.3:
                at[row], patience = rng.choice([0, begins[row]]), patience - 1


def run_pass(rows: Rows, intervention: PackedIntervention, chunks: Sequence[Chunk], layers: range) -> list[Tensor]:
    """One pass: the output of each of these layers, [tokens, d_model], where the call has nothing to do too."""
    whose = torch.cat([torch.full((stop - start,), row) for row, start, stop in chunks])
    at = torch.cat([torch.arange(start, stop) for _, start, stop in chunks])
    intervention.begin_pass(whose, at, torch.cat([rows.ids[row][start:stop] for row, start, stop in chunks]))
    outputs = []
    for layer in layers:
        h = torch.cat([rows.residuals[row][layer, start:stop] for row, start, stop in chunks])
        outputs.append(intervention.block(layer, h) if layer in intervention.layers else h)
    return outputs


def beginnings(rng: random.Random, rows: Rows) -> list[int]:
    """From where on each row may be computed, where a cache holds what comes before; what is to come it cannot."""
    return [rng.randrange(min(kept, text)) for kept, text in zip(rows.kept, rows.texts, strict=True)]


def random_parts(rng: random.Random) -> Parts:
    """An automaton of four states over the ids of `Rows`, whose tokens are anything in each of them."""
    states, ids = range(4), rng.sample(range(END + 1), 5)
    following = tuple(tuple(rng.choice(states) for _ in states) for _ in range(len(ids) + 1))
    kinds = tuple(tuple(rng.choice(list(Part)) for _ in states) for _ in range(len(ids) + 1))
    classes = {token: number + 1 for number, token in enumerate(ids)}
    return Parts((("a", "b"),), classes, following, kinds, tuple(rng.choice(states) for _ in states))


def random_edits(rng: random.Random, rows: Rows) -> list[Edit]:
    """Up to four edits of any kind; the operations that leave numbers of unlike sizes come last at their layer."""
    edits = [_edit(rng, rows) for _ in range(rng.randint(0, 4))]
    relative = {edit.layer: edit for edit in edits if edit.relative}
    return [edit for edit in edits if not edit.relative] + list(relative.values())


def _signs(rng: random.Random) -> Tensor:
    return torch.tensor([rng.choice([-1.0, 1.0]) for _ in range(D)])


def _edit(rng: random.Random, rows: Rows) -> Edit:
    operation, layer = rng.choice(list(OPERATIONS.built_in.values())), rng.randrange(LAYERS)
    level: dict[str | None, dict[str, float]] = {
        None: {},
        "threshold": {"threshold": rng.choice([-0.5, 0.25])},
        "target": {"target": 1.5},
    }
    fractions = [0.0, 0.5, 1.0]
    coefficient: Any = rng.choice(fractions)
    if rng.random() < 0.5:
        coefficient = torch.tensor([rng.choice(fractions) for _ in rows.prompts])
    condition = None
    if rng.random() < 0.4:
        above = rng.random() < 0.5
        condition = Condition(rng.randint(0, layer), _signs(rng), rng.choice([-1.1, 0.1, 2.1]), above)
    places = rng.randint(0, 4)
    schedule = Schedule(((places, 1.0), (places + rng.choice([1, 2, 4]), rng.choice([0.0, 0.5]))))
    return Edit(
        layer,
        _signs(rng) * rng.choice([0.5, 1.0, 2.0]),
        operation,
        coefficient,
        relative=operation is Operation.ADD and rng.random() < 0.4,
        positions=random_positions(rng, rows),
        schedule=schedule if rng.random() < 0.4 else None,
        condition=condition,
        sinks=rng.random() < 0.3,
        **level[operation.argument],
    )


def random_positions(rng: random.Random, rows: Rows) -> Any:
    """A kind, a part of one, or a mask over what is handed over."""
    kind = rng.choice(list(Positions))
    how = rng.choice(["kind", "span", "span", "mask"])
    if how == "mask":
        return torch.rand(len(rows.texts), max(rows.texts)) < rng.random()
    if how == "kind":
        return kind
    if kind is Positions.PROMPT and rng.random() < 0.6:
        start = rng.randint(-6, -1)
        return Span(kind, start, rng.choice([None, *range(start + 1, 0), rng.randint(0, 5)]))
    start = rng.randint(0, 5)
    stop = rng.choice([None, start + rng.randint(1, 4), *([-1] if kind is Positions.PROMPT else [])])
    return Span(kind, start, stop)
