"""Edits and reads of packed tokens: what a left-padded batch gives, however an engine cuts its rows into passes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from persona_lens.backend import Condition, Edit, Operation, Positions, Read, ReadKind, Span
from persona_lens.backend.edits import OPERATIONS
from persona_lens.backend.packed.intervention import PackedIntervention, aligned
from persona_lens.backend.parts.machine import Part
from persona_lens.backend.tokens import pad_left
from persona_lens.backend.writing import TokenMasks, Writer
from tests.backends.packs import (
    ALL_READS,
    END,
    LAYERS,
    LIMITS,
    SINKS_TOO,
    Chunk,
    D,
    Rows,
    as_batch,
    beginnings,
    passes,
    random_edits,
    run_pass,
)

MEANS = ("response_mean", "prompt_mean", "prompt_last", "thinking_mean", "answer_mean", "response_norm")


def packed(
    rows: Rows, edits: Sequence[Edit], reads: Sequence[Read], cut: Sequence[Sequence[Chunk]], **more: Any
) -> tuple[list[tuple[int, int, int, Tensor]], dict[str, Tensor], PackedIntervention]:
    """Row, layer, first position and residuals after the edits of every chunk; and the reads."""
    intervention = PackedIntervention(rows.call(edits, reads, **more))
    out = []
    for chunks in cut:
        for layer, h in enumerate(run_pass(rows, intervention, chunks, range(LAYERS))):
            parts = torch.split(h, [stop - start for _, start, stop in chunks])
            out += [(row, layer, start, part) for (row, start, _), part in zip(chunks, parts, strict=True)]
    return out, brought(rows, reads, intervention), intervention


def brought(rows: Rows, reads: Sequence[Read], intervention: PackedIntervention) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    results = intervention.results()
    for read in reads:
        value = results[read.kind]["value"]
        if "counts" not in results[read.kind]:
            value = aligned(results[read.kind], rows.kept, value.shape[2], value.shape[1])
            value = value.squeeze(-1) if read.kind is ReadKind.NORMS else value
        found[read.kind.value] = value
    return found


def mean_by_hand(rows: Rows, residuals: Sequence[Tensor], read: Read, limits: Sequence[float] | None) -> Tensor:
    """A reduction, from all residuals, in float64."""
    values = []
    for row, h in enumerate(residuals):
        prompt, kept = rows.prompts[row], rows.kept[row]
        begin = {"prompt_mean": 0, "prompt_last": prompt - 1}.get(read.kind, prompt)
        stop = prompt if read.kind.startswith("prompt") else kept
        part = {"thinking_mean": Part.THINKING, "answer_mean": Part.ANSWER}.get(read.kind)
        for layer in read.resolved_layers(LAYERS):
            lengths = rows.residuals[row][layer].float().norm(dim=-1)
            sink = lengths > (float("inf") if limits is None else limits[layer])
            sink[0] = True
            among = ~sink[begin:stop] if read.leaves_out_sinks else torch.ones(stop - begin, dtype=torch.bool)
            if part is not None:
                among &= torch.tensor([each == part for each in rows.kinds[row][begin:stop]], dtype=torch.bool)
            some = h[layer, begin:stop][among].double()
            values.append((some.norm(dim=-1) if read.kind is ReadKind.RESPONSE_NORM else some).mean(dim=0))
    found = torch.stack(values)
    return found.reshape(len(residuals), -1, *found.shape[1:]).float()


@pytest.mark.parametrize("generated", [False, True], ids=["text", "generated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_packed_passes_bring_what_a_padded_batch_brings(seed: int, dtype: torch.dtype, generated: bool) -> None:
    rng = random.Random(f"{seed} {dtype} {generated}")
    torch.manual_seed(seed)
    rows = Rows.random(rng, generated=generated, dtype=dtype)
    edits, reads = random_edits(rng, rows), rng.choice([ALL_READS, SINKS_TOO])
    limits = rng.choice([LIMITS, None])
    wanted, read_wanted = as_batch(rows, edits, reads, limits)
    out, read, _ = packed(rows, edits, reads, list(passes(rng, rows, [0] * len(rows.ids))), sink_limits=limits)
    _same_residuals(rows, out, wanted)
    assert read.keys() == read_wanted.keys()
    off = any(edit.relative for edit in edits)  # such lengths are no round numbers
    for one in reads:
        got, want = read[one.kind], read_wanted[one.kind]
        assert got.shape == want.shape, one.kind
        exact = one.kind not in MEANS and not (off and one.kind is not ReadKind.ACTIVATIONS)
        scale = float(want.nan_to_num().abs().max())
        torch.testing.assert_close(got, want, rtol=0, atol=0 if exact else 1e-5 * scale, equal_nan=True)
        if one.kind in MEANS:
            by_hand = mean_by_hand(rows, wanted, one, limits)
            torch.testing.assert_close(got, by_hand, rtol=0, atol=1e-6 * scale + 1e-9, equal_nan=True)


def _same_residuals(rows: Rows, out: Sequence[tuple[int, int, int, Tensor]], wanted: Sequence[Tensor]) -> None:
    for row, layer, start, part in out:
        stop = min(start + len(part), rows.kept[row])
        assert torch.equal(part[: max(0, stop - start)], wanted[row][layer, start:stop]), (row, layer, start)


@pytest.mark.parametrize("seed", range(12))
def test_rows_that_go_on_from_a_cache(seed: int) -> None:
    """Edits are the same; a response is read whole if it was computed whole, and each token once."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rows = Rows.random(rng, generated=rng.random() < 0.5)
    edits = random_edits(rng, rows)
    wanted, read_wanted = as_batch(rows, edits, ALL_READS)
    begins = beginnings(rng, rows)
    out, read, intervention = packed(rows, edits, ALL_READS, list(passes(rng, rows, begins)))
    _same_residuals(rows, out, wanted)
    assert intervention.masks.tallies.began.tolist() == begins
    width = max(rows.kept)
    for row, (begin, prompt) in enumerate(zip(begins, rows.prompts, strict=True)):
        first = width - rows.kept[row] + begin
        assert bool(read["norms"][row, :, :first].isnan().all())
        assert torch.equal(read["activations"][row, :, first:], read_wanted["activations"][row, :, first:])
        if begin <= prompt:
            by_hand = mean_by_hand(rows, wanted, ALL_READS[0], LIMITS)[row]
            torch.testing.assert_close(read["response_mean"][row], by_hand, rtol=1e-6, atol=1e-3, equal_nan=True)
        assert bool(read["prompt_last"][row].isnan().all()) == (begin >= prompt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_no_order_of_passes_shows(seed: int, dtype: torch.dtype) -> None:
    """Bit for bit, with residuals of a model's size and sinks of 1e5."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rows = Rows.random(rng, generated=True, ordinary=True, dtype=dtype)
    given = [residual.clone() for residual in rows.residuals]
    edits = [Edit.add(1, torch.randn(D), 2.0, Positions.GENERATING), Edit.add(2, torch.randn(D))]
    reads = [read for read in (*ALL_READS, *SINKS_TOO) if read.kind is not ReadKind.PROJECTIONS]
    for some in (reads[:6], reads[6:]):
        begins = [0] * len(rows.ids)
        _, first, _ = packed(rows, edits, some, list(passes(rng, rows, begins)))
        for _ in range(4):
            _, again, _ = packed(rows, edits, some, list(passes(rng, rows, begins)))
            for name, value in first.items():
                assert torch.equal(value.nan_to_num(0.123), again[name].nan_to_num(0.123)), name
    assert all(torch.equal(before, after) for before, after in zip(given, rows.residuals, strict=True))


def whole_rows(rows: Rows) -> list[list[Chunk]]:
    return [[(row, 0, total)] for row, total in enumerate(rows.totals)]


@pytest.mark.parametrize("sinks", [False, True])
def test_where_there_is_nothing_to_average(sinks: bool) -> None:
    """Prompts of one token, nothing but sinks, and responses without a token: NaN, in the shape it always has."""
    rows = Rows([1, 3], [1, 3], [1, 3], 0, [torch.tensor([1]), torch.tensor([1, 2, 3])], [])
    rows.residuals = [torch.ones(LAYERS, 1, D), torch.full((LAYERS, 3, D), 1e5)]
    reads = SINKS_TOO if sinks else ALL_READS
    _, found, _ = packed(rows, (), reads, whole_rows(rows))
    _, wanted = as_batch(rows, (), reads)
    assert {name: value.shape for name, value in found.items()} == {n: value.shape for n, value in wanted.items()}
    assert bool(found["response_mean"].isnan().all())
    assert bool(found["response_norm"].isnan().all())
    assert bool(found["prompt_mean"].isnan().all()) != sinks
    assert not bool(found["prompt_last"].isnan().any())


def test_what_follows_the_end_of_a_turn_is_nobodys() -> None:
    """An engine that is a step or more ahead runs over tokens that no response has, in passes of their own too."""
    ids = torch.tensor([1, 2, 3, END, 4, 5])
    rows = Rows([2], [2], [3], 8, [ids], [torch.arange(LAYERS * 6 * D).reshape(LAYERS, 6, D).float()])
    for cut in ([(0, 0, 6)], [(0, 0, 2), (0, 2, 4), (0, 4, 6)], [(0, at, at + 1) for at in range(6)]):
        intervention = PackedIntervention(rows.call((), ALL_READS))
        for chunk in cut:
            run_pass(rows, intervention, [chunk], range(LAYERS))
        found = intervention.results()
        assert found["response_mean"]["counts"].tolist() == [[1] * LAYERS]
        assert torch.equal(found["response_mean"]["value"][0], rows.residuals[0][:, 2])
        assert found["norms"]["rows"].tolist() == [0, 0, 0, 1, 1, 1]


def test_blocks_that_nothing_is_written_at_return_what_they_are_given() -> None:
    """So that an engine need not copy a pass for an edit of prompts while it generates."""
    rows = Rows.random(random.Random(1), generated=True)
    where: tuple[Any, ...] = (Positions.PROMPT, Span(Positions.PROMPT, 1))
    edits = [Edit.add(layer, torch.ones(D), positions=positions) for layer, positions in enumerate(where)]
    intervention = PackedIntervention(rows.call(edits, ()))
    prompt = rows.prompts[0]
    run_pass(rows, intervention, [(0, 0, prompt)], range(LAYERS))
    at, h = torch.tensor([prompt]), torch.ones(1, D)
    intervention.begin_pass(torch.tensor([0]), at, rows.ids[0][at])
    assert all(intervention.block(layer, h) is h for layer in intervention.layers)


def test_a_block_that_was_skipped_brings_nothing() -> None:
    rows = Rows.random(random.Random(2), generated=False)
    intervention = PackedIntervention(rows.call((), [Read(ReadKind.NORMS)], watched=Read.projections(torch.ones(1, D))))
    run_pass(rows, intervention, [(0, 0, 1)], range(LAYERS - 1))
    assert intervention.results() == {"norms": {}}
    assert intervention.watched() == {}
    assert intervention.masks.tallies.blocks == {0: 1, 1: 1, 2: 0}


@pytest.mark.parametrize("seed", range(8))
def test_layers_spread_over_stages_bring_the_same(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rows = Rows.random(rng, generated=rng.random() < 0.5)
    edits = [edit for edit in random_edits(rng, rows) if edit.condition is None or edit.condition.layer == edit.layer]
    cut = list(passes(rng, rows, [0] * len(rows.ids)))
    watched = Read.projections(torch.ones(1, D), (LAYERS - 1,))
    whole, found, _ = packed(rows, edits, ALL_READS, cut)
    call = rows.call(edits, ALL_READS, watched=watched)
    stages = [call.within(0, 1), call.within(1, LAYERS)]
    runs = [PackedIntervention(stage) for stage in stages]
    outputs = []
    for chunks in cut:
        first = run_pass(rows, runs[0], chunks, range(1))
        outputs += [*first, *run_pass(rows, runs[1], chunks, range(1, LAYERS))]
    flat = [part for _, _, _, part in whole]
    assert torch.equal(torch.cat(outputs), torch.cat(flat))
    parts = [run.results() for run in runs]
    for name in MEANS:
        values = [part[name]["value"] for part in parts if name in part]
        assert torch.equal(torch.cat(values, dim=1).nan_to_num(7), found[name].nan_to_num(7))
    assert runs[0].watched() == {}
    told = runs[1].watched()
    assert told["value"].shape[1:] == (1, 1)
    assert runs[1].watched() == {}  # once


def test_a_condition_in_an_earlier_stage_is_refused() -> None:
    rows = Rows.random(random.Random(3), generated=False)
    edit = Edit.add(2, torch.ones(D))
    call = rows.call([replace(edit, condition=Condition(0, torch.ones(D), 0.0))], ())
    with pytest.raises(ValueError, match="use one stage"):
        call.within(1, 3)
    assert call.within(0, 1).edits == ()


@pytest.mark.parametrize("operation", OPERATIONS.built_in.values(), ids=str)
def test_the_writer_writes_the_same_by_both_kinds_of_masks(operation: Operation) -> None:
    rng = random.Random(str(operation))
    torch.manual_seed(0)
    rows = Rows.random(rng, generated=False)
    padded = pad_left(rows.batch, 0, parts=rows.parts)
    level = {"threshold": 0.5, "target": 0.5}
    more = {operation.argument: level[operation.argument]} if operation.argument else {}
    coefficient = torch.tensor([rng.choice([0.5, 1.0]) for _ in rows.prompts])
    for where in (*Positions, Span(Positions.PROMPT, -2), Span(Positions.PROMPT, 0, -1), padded.prompt):
        edit = Edit(1, torch.ones(D), operation, coefficient, positions=where, **more)  # type: ignore[arg-type]
        masks = TokenMasks(padded, (), 0)
        masks.begin_pass(padded.ids)
        h = torch.zeros(*padded.ids.shape, D)
        h[padded.attention] = torch.cat([residual[1] for residual in rows.residuals])
        sinks = torch.zeros_like(padded.attention)
        wanted = Writer([edit.plain()]).block(1, h, masks, sinks)[padded.attention]
        intervention = PackedIntervention(rows.call([edit], (), sink_limits=None))
        run_pass(rows, intervention, [(row, 0, total) for row, total in enumerate(rows.totals)], range(0))
        flat = torch.cat([residual[1] for residual in rows.residuals]).unsqueeze(1)
        unsunk = torch.zeros(len(flat), 1, dtype=torch.bool)
        assert torch.equal(Writer([edit.plain()]).block(1, flat, intervention.masks, unsunk).squeeze(1), wanted)


def test_values_of_tokens_are_put_where_they_belong() -> None:
    """Those beyond a row, and those of the row that is none, are left out; what never came is NaN."""
    found = {
        "value": torch.arange(5.0).reshape(5, 1, 1),
        "rows": torch.tensor([1, 0, 1, 2, 0]),
        "at": torch.tensor([1, 0, 0, 0, 4]),
    }
    out = aligned(found, [1, 3], 1, 1)[:, 0, :, 0]
    assert out.nan_to_num(-1).tolist() == [[-1, -1, 1], [2, 0, -1]]
    assert bool(aligned({}, [1, 3], 2, 1).isnan().all())
