"""The preview says what happens: held against what changes, and what is read, when a model runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from persona_lens.backend import (
    Backend,
    Edit,
    EditError,
    Operation,
    Positions,
    Read,
    ReadError,
    ReadKind,
    Sampling,
    Schedule,
    Span,
    TokenBatch,
    TokenError,
)
from persona_lens.steering import Steering
from persona_lens.steering.history import History, TurnPrompt, turn_edits
from persona_lens.steering.preview import Preview, PreviewedToken, preview_tokens
from persona_lens.vectors import PersonaVectors
from tests.backends.fixtures import (
    ADAPTERS,
    ALL_ACTIVATIONS,
    PROMPTS,
    RESPONSES,
    TEXT,
    activations,
    assert_close,
    encode,
    thinking_backend,
    tiny_backend,
)
from tests.backends.test_sinks import MASSIVE, massive
from tests.tiny import D_MODEL, N_LAYERS, tiny_tokenizer

BACKEND = tiny_backend("transformers")
NEW = 7


def vectors(trait: str, seed: int) -> PersonaVectors:
    generator = torch.Generator().manual_seed(seed)
    # So short that no step makes a residual massive: the preview looks at the text as it is without edits.
    rows = 0.2 * torch.randn(N_LAYERS, D_MODEL, generator=generator)
    return PersonaVectors(trait, BACKEND.info, {"response_mean": rows})


KIND, EVIL = vectors("kind", 0), vectors("evil", 1)
STEERINGS = (
    "kind@1:+1.5, evil@2:ablate on response",
    "kind@0:-2 on prompt[-2:], evil@1-2:+30% on generating",
    "kind@0:+1 on prompt[1:3], evil@1:+1 on response[2:], kind@2:floor(5) on response[:2]",
    "kind@all:increments(+2) schedule(2:0 6:1)",
    "evil@0:ablate(0.5) on generating[1:4] schedule(0:1 3:0.25), kind@2:affine(-3) on prompt",
    "kind@1:+1 on all[3:8], evil@2:+1 on response schedule(1:-1 4:1)",
)


def parse(text: str) -> Steering:
    return Steering.parse(text, [KIND, EVIL])


def tokens_of(preview: Preview) -> list[PreviewedToken]:
    """All tokens, those included that are only counted."""
    return [*preview.tokens, *[preview.tokens[-1]] * preview.rest]


def agrees(before: Tensor, after: Tensor, edit: Edit, tokens: list[PreviewedToken], number: int) -> None:
    """Whether an edit changed each token, [tokens, d_model], as its column of the preview says, and no other."""
    unit = edit.direction / edit.direction.norm()
    for h, changed, token in zip(before, after, tokens, strict=True):
        projection = float(h @ unit)
        level = edit.target if edit.threshold is None else edit.threshold
        full = {
            Operation.ADD: float(h.norm() if edit.relative else edit.direction.norm()),
            Operation.ABLATE: -projection,
            Operation.AFFINE: (level or 0.0) - projection,
            Operation.CAP: min((level or 0.0) - projection, 0.0),
            Operation.FLOOR: max((level or 0.0) - projection, 0.0),
        }[edit.operation]
        assert_close(changed, h + token.factors[number] * full * unit, rtol=2e-4)
        if token.factors[number] == 0:  # a schedule that passes through 0 leaves its rounding
            assert torch.equal(changed, h) if edit.schedule is None else float((changed - h).norm()) < 1e-5, token


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("text", STEERINGS)
def test_each_edit_changes_the_tokens_of_a_text_as_the_preview_says(adapter: str, text: str) -> None:
    backend, steering = tiny_backend(adapter), parse(text)
    check_text(backend, steering)


def check_text(backend: Backend, steering: Steering) -> None:
    """Each term against the others alone, at the first layer that it edits: up to there all else is the same."""
    parts = steering.by_term()
    together = activations(backend, edits=steering.edits())
    previews = [preview_tokens(backend, p, r, edits=steering) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    for number, (_, own) in enumerate(parts):
        others = [edit for other, (_, edits) in enumerate(parts) if other != number for edit in edits]
        alone = activations(backend, edits=others)
        for row, preview in enumerate(previews):
            assert preview.rest == 0
            length, layer = len(preview.tokens), own[0].layer
            agrees(alone[row, layer, -length:], together[row, layer, -length:], own[0], tokens_of(preview), number)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("text", STEERINGS)
def test_each_edit_changes_what_is_generated_as_the_preview_says(adapter: str, text: str) -> None:
    check_generation(tiny_backend(adapter), parse(text))


def check_generation(backend: Backend, steering: Steering) -> None:
    made = backend.generate(PROMPTS, Sampling(NEW), steering.edits(), [ALL_ACTIVATIONS])
    text = TokenBatch.of(PROMPTS, made.responses)
    assert max(map(len, made.responses)) > 4
    together, parts = made.reads["activations"], steering.by_term()
    previews = [tokens_of(preview_tokens(backend, prompt, NEW, edits=steering)) for prompt in PROMPTS]
    for number, (_, own) in enumerate(parts):
        others = [edit for other, (_, edits) in enumerate(parts) if other != number for edit in edits]
        alone = activations(backend, text, others)
        for row, (tokens, length) in enumerate(zip(previews, text.lengths, strict=True)):
            layer = own[0].layer
            before, after = alone[row, layer, -length:], together[row, layer, -length:]
            unit = own[0].direction / own[0].direction.norm()
            # What differs beside the edit is rounding: one ran with a cache.
            for h, changed, token in zip(before, after, tokens[:length], strict=True):
                assert bool(token.factors[number]) == (float((changed - h).norm()) > 1e-3), (token, own[0])
                if own[0].operation is Operation.ADD:
                    size = h.norm() if own[0].relative else own[0].direction.norm()
                    assert_close(changed, h + token.factors[number] * size * unit, rtol=1e-3)


KINDS = st.sampled_from([kind for kind in Positions if kind is not Positions.THINKING])
SPANS = st.none() | st.tuples(st.integers(0, 8), st.integers(1, 9))
POINTS = st.dictionaries(st.integers(0, 12), st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=2, max_size=4)


@settings(max_examples=30, deadline=None)
@given(kind=KINDS, span=SPANS, points=st.none() | POINTS)
@example(kind=Positions.ALL, span=(6, 1), points={9: 0.5, 0: -1.0})  # at its only token the schedule passes through 0
def test_any_positions_and_any_schedule_are_as_the_preview_says(
    kind: Positions, span: tuple[int, int] | None, points: dict[int, float] | None
) -> None:
    positions = kind if span is None else Span(kind, span[0], sum(span))
    schedule = None if points is None else Schedule(tuple(sorted(points.items())))
    (term,) = parse("kind@1:+2").terms
    steering = Steering((replace(term, positions=positions, schedule=schedule),), {"kind": KIND})
    check_text(BACKEND, steering)
    check_generation(BACKEND, steering)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2)), min_size=1, max_size=3),
    kind=KINDS,
    span=SPANS | st.just((-3, None)),
    points=st.none() | POINTS,
)
def test_a_conversation_is_edited_as_its_turns_were_one_by_one(
    lengths: list[tuple[int, int, int]],
    kind: Positions,
    span: tuple[int, int | None] | None,
    points: dict[int, float] | None,
) -> None:
    """What a steered history is: each token as the preview of its own turn, in which it was new, has it."""
    if span is not None and span[1] is None and kind is not Positions.PROMPT:
        span = None  # only a prompt can be counted from its end
    positions = kind if span is None else Span(kind, span[0], None if span[1] is None else span[0] + span[1])
    (term,) = parse("kind@1:+2").terms
    schedule = None if points is None else Schedule(tuple(sorted(points.items())))
    steering = Steering((replace(term, positions=positions, schedule=schedule),), {"kind": KIND})
    wanted: list[tuple[float, ...]] = []
    said: list[tuple[int, int]] = []
    over = 0
    for asked, answered, closing in lengths:
        prompt, new = len(wanted), asked + (over if said else 0)
        stop = prompt + new + answered
        own = tokens_of(preview_tokens(BACKEND, (5,) * (prompt + new), (6,) * answered, edits=steering))
        wanted += [token.factors for token in own[prompt:stop]]
        said.append((prompt + new, stop))
        over = closing
    asked = 2
    now = tokens_of(preview_tokens(BACKEND, (5,) * (len(wanted) + over + asked), NEW, edits=steering))
    wanted += [token.factors for token in now[len(wanted) :]]
    turn = TurnPrompt((5,) * (said[-1][1] + over + asked), said[-1][1] + over, tuple(said))
    found = tokens_of(preview_tokens(BACKEND, turn, NEW, edits=steering, history="steered"))
    assert [token.factors for token in found] == [pytest.approx(each) for each in wanted]
    try:
        clean = tokens_of(preview_tokens(BACKEND, turn, NEW, edits=steering, history="clean"))
    except EditError:
        return
    assert [token.factors for token in clean] == [(0.0,)] * turn.past + [
        pytest.approx(token.factors) for token in now[turn.past :]
    ]


@pytest.mark.parametrize("history", History)
def test_edits_of_a_later_turn_are_as_the_preview_says(history: History) -> None:
    turn = TurnPrompt(PROMPTS[2], 9, ((2, 6),))
    steering = parse("kind@1:+1.5, evil@2:+1 on generating, kind@0:+2 on prompt[-3:], evil@1:-1 on response[1:3]")
    parts = steering.by_term()

    def written(edits: Sequence[Edit]) -> list[Edit]:
        return turn_edits(edits, [turn], history, [RESPONSES[2]])

    text = TEXT.rows(2, 3)
    preview = preview_tokens(BACKEND, turn, RESPONSES[2], edits=steering, history=history)
    together = activations(BACKEND, text, written(steering.edits()))
    for number, (_, own) in enumerate(parts):
        others = [edit for other, (_, edits) in enumerate(parts) if other != number for edit in edits]
        alone = activations(BACKEND, text, written(others))
        agrees(alone[0, own[0].layer], together[0, own[0].layer], own[0], tokens_of(preview), number)
    over = [token.factors for token in preview.tokens[:9]]
    assert any(map(any, over)) is (history is History.STEERED)
    to_come = preview_tokens(BACKEND, turn, NEW, edits=steering, history=history)
    assert [each.factors for each in to_come.tokens[:9]] == over
    with pytest.raises(EditError, match="from the beginning"):
        preview_tokens(BACKEND, turn, edits=parse("kind@1:+1 on all[2:]"), history="clean")


def test_a_schedule_that_passes_through_zero_does_nothing_there() -> None:
    preview = preview_tokens(BACKEND, PROMPTS[2], edits=parse("kind@1:+2 schedule(0:-1 1:-1 3:0.5 6:-1)"))
    assert [token.factors[0] for token in preview.tokens[:7]] == [-2, -2, -0.5, 1, 0, -1, -2]


def test_a_mask_covers_the_prompt_and_nothing_that_comes() -> None:
    mask = torch.tensor([[True, False, True, False, False]])
    prompt = PROMPTS[0][:5]
    edit = Edit(1, KIND[1], coefficient=torch.tensor([3.0]), positions=mask)
    preview = preview_tokens(BACKEND, prompt, NEW, edits=[edit])
    assert [token.factors for token in preview.tokens[:5]] == [(3.0,), (0.0,), (3.0,), (0.0,), (0.0,)]
    assert all(token.factors == (0.0,) for token in tokens_of(preview)[5:])
    made = BACKEND.generate([prompt], Sampling(NEW), [edit], [ALL_ACTIVATIONS])
    before = activations(BACKEND, TokenBatch.of([prompt], made.responses))[0, 1]
    changed = (made.reads["activations"][0, 1] - before).norm(dim=-1) > 1e-3
    assert changed.tolist() == [bool(token.factors[0]) for token in tokens_of(preview)][: len(changed)]
    assert preview.edits[0].text == "vector:+3, at masked tokens"


def test_a_condition_is_named_where_the_edit_may_act() -> None:
    steering = parse("kind@1:+2 on prompt if evil@0>0")
    preview = preview_tokens(BACKEND, PROMPTS[2], RESPONSES[2], edits=steering)
    assert preview.edits[0].condition == "evil@0>0"
    text = TEXT.rows(2, 3)
    before, after = activations(BACKEND, text)[0], activations(BACKEND, text, steering.edits())[0]
    met = before[0] @ (EVIL[0] / EVIL[0].norm()) > 0
    changed = (after[1] - before[1]).norm(dim=-1) > 1e-4
    assert met.any()
    assert not met.all()
    assert changed.tolist() == [bool(t.factors[0]) and bool(m) for t, m in zip(preview.tokens, met, strict=True)]
    assert "+2 if evil@0>0" in " ".join(str(preview).split())


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_reads_take_in_the_tokens_that_the_preview_says(adapter: str) -> None:
    backend = tiny_backend(adapter)
    reads = (
        *Read.means((0, 2)),
        Read(ReadKind.RESPONSE_NORM),
        ALL_ACTIVATIONS,
        Read.projections(KIND[1].unsqueeze(0), (1,)),
    )
    made = backend.generate(PROMPTS, Sampling(NEW), (), reads)
    for row, prompt in enumerate(PROMPTS):
        length = len(prompt) + len(made.responses[row])
        preview = preview_tokens(backend, prompt, len(made.responses[row]), reads=reads)
        h = made.reads["activations"][row, :, -length:]
        taken = dict(
            zip(
                (read.kind for read in preview.reads),
                zip(*(t.reads for t in tokens_of(preview)), strict=True),
                strict=True,
            )
        )
        for kind in ("response_mean", "prompt_mean", "prompt_last"):
            among = torch.tensor(taken[ReadKind(kind)])
            assert_close(made.reads[kind][row], h[[0, 2]][:, among].mean(dim=1))
        norms = h[:, torch.tensor(taken[ReadKind.RESPONSE_NORM])].norm(dim=-1).mean(dim=1)
        assert_close(made.reads["response_norm"][row], norms)
        for kind in ("activations", "projections"):
            assert sum(taken[ReadKind(kind)]) == length == int((~made.reads[kind][row, 0, :, 0].isnan()).sum())
        assert [read.layers for read in preview.reads][:4] == [(0, 2)] * 3 + [(0, 1, 2)]


def test_a_text_without_a_response_has_none_to_read() -> None:
    preview = preview_tokens(BACKEND, PROMPTS[0], reads=Read.means())
    assert [token.reads for token in preview.tokens][-2:] == [(False, True, False), (False, True, True)]


def test_tokens_are_shown_as_far_as_they_are_treated_in_different_ways() -> None:
    def to_come(text: str, tokens: int) -> tuple[int, int]:
        preview = preview_tokens(BACKEND, PROMPTS[0], tokens, edits=parse(text))
        assert len(preview.tokens) + preview.rest == len(PROMPTS[0]) + tokens
        return len(preview.tokens) - len(PROMPTS[0]), preview.rest

    assert to_come("kind@1:+1", 100) == (3, 97)
    assert to_come("kind@1:+1", 2) == (2, 0)
    assert to_come("kind@1:+1 on response[5:]", 100) == (6, 94)
    assert to_come("kind@1:+1 on response schedule(0:1 20:0)", 100) == (21, 79)
    assert to_come("kind@1:+1 on response schedule(0:1 200:0)", 100) == (100, 0)


def test_a_table_for_people_and_values_for_programs() -> None:
    prompt = (1, *encode("a\n")[0], 2)
    steering = parse("kind@0-1:+0.3 on response[1:], evil@all:ablate on prompt")
    preview = preview_tokens(BACKEND, prompt, 9, edits=steering, reads=Read.means())
    shown = str(preview)
    for part in (
        "<|im_start|>",
        '"a"',
        '"\\n"',
        "response token 2",
        "6 more",
        "layers 0-1",
        "all layers",
        "prompt_last",
    ):
        assert part in shown
    said = json.loads(json.dumps(preview.to_json()))
    assert [(t["id"], t["text"], t["special"], t["part"]) for t in said["tokens"]] == [
        (1, "<|im_start|>", True, "prompt"),
        (prompt[1], "a", False, "prompt"),
        (prompt[2], "\n", False, "prompt"),
        (2, "<|im_end|>", True, "prompt"),
        *((None, f"response token {number}", False, "response") for number in range(3)),
    ]
    assert [t["factors"] for t in said["tokens"]] == [[0, 0]] + [[0, 1]] * 3 + [[0, 0], [0.3, 0], [0.3, 0]]
    assert said["edits"][0] == {
        "text": "kind@0-1:+0.3 on response[1:]",
        "layers": [0, 1],
        "operation": "add",
        "relative": False,
        "condition": None,
    }
    assert (said["rest"], said["reads"][0]["kind"]) == (6, "response_mean")


def test_attention_sinks_are_shown_and_left_out() -> None:
    prompt = PROMPTS[2]
    edits = parse("kind@1:+2, evil@all:ablate, evil@1:cap(0) with sinks")
    found = preview_tokens(BACKEND, prompt, 5, edits=edits, reads=Read.means())
    assert found.tokens[0].sink_at == (0, 1, 2)
    assert found.tokens[0].factors == (2.0, 0.0, 1.0)
    assert found.tokens[0].reads == (False, False, False)
    assert found.tokens[1].factors == (2.0, 1.0, 1.0)
    assert found.tokens[1].reads == (False, True, False)
    assert "sink at" in str(found)
    plain = preview_tokens(BACKEND, prompt, 5, edits=parse("kind@1:+2"), reads=Read.means(sinks=True))
    assert all(token.sink_at == () for token in plain.tokens)
    assert plain.tokens[0].reads == (False, True, False)
    assert "sink at" not in str(plain)


def test_sinks_within_a_text_are_found_by_one_pass() -> None:
    backend = massive("transformers")
    found = preview_tokens(backend, PROMPTS[2], edits=[Edit.ablate(1, KIND[1])])
    assert [bool(token.sink_at) for token in found.tokens] == [
        place == 0 or token == MASSIVE for place, token in enumerate(PROMPTS[2])
    ]
    assert [token.factors[0] == 0 for token in found.tokens] == [bool(token.sink_at) for token in found.tokens]


def test_text_is_no_markup() -> None:
    prompt = encode("[/b]")[0]
    assert '"["' in str(preview_tokens(BACKEND, prompt))


def test_part_of_a_character_is_shown_by_its_token() -> None:
    ids = encode("é")[0]
    assert len(ids) == 2
    names = tiny_tokenizer().convert_ids_to_tokens(list(ids))
    assert [token.text for token in preview_tokens(BACKEND, ids).tokens] == names


def test_edits_that_are_not_a_steering_are_put_together_where_they_are_alike() -> None:
    edits = [
        KIND.edit(0, 2.0),
        KIND.edit(2, 2.0),
        EVIL.edit(1, operation="ablate"),
        EVIL.edit(1, operation="cap", threshold=3.0, positions="response"),
        Edit.add(1, KIND[1], 0.3, relative=True),
        KIND.edit(1, 2.0, positions="prompt"),
    ]
    found = preview_tokens(BACKEND, PROMPTS[0], 3, edits=edits)
    assert [(edit.text, edit.layers) for edit in found.edits] == [
        ("vector:+2", (0, 2)),
        ("vector:ablate", (1,)),
        ("vector:cap(3) on response", (1,)),
        ("vector:+30%", (1,)),
        ("vector:+2 on prompt", (1,)),
    ]
    assert found.tokens[0].factors == (2.0, 0.0, 0.0, 0.0, 2.0)  # an attention sink
    assert found.tokens[1].factors == (2.0, 1.0, 0.0, 0.3, 2.0)
    assert found.tokens[-1].factors == (2.0, 1.0, 1.0, 0.3, 0.0)


def test_an_ablation_of_which_nothing_is_left_acts_nowhere() -> None:
    twice = Steering.parse("a@1:ablate, b@1:ablate", {"a": KIND, "b": KIND})
    preview = preview_tokens(BACKEND, PROMPTS[0], edits=twice)
    assert [edit.layers for edit in preview.edits] == [(1,), ()]
    assert {token.factors for token in preview.tokens[1:]} == {(1.0, 0.0)}
    assert "nothing is left to ablate" in " ".join(str(preview).replace("┃", " ").split())


def test_what_does_not_fit_is_refused() -> None:
    prompt = PROMPTS[0]
    with pytest.raises(EditError, match="coefficient has 3 rows, the batch has 1"):
        preview_tokens(BACKEND, prompt, edits=[KIND.edit(1, torch.ones(3))])
    with pytest.raises(EditError, match="layer 7 does not exist"):
        preview_tokens(BACKEND, prompt, edits=[Edit.add(7, KIND[1])])
    with pytest.raises(EditError, match="positions mask is 3 tokens wide"):
        preview_tokens(BACKEND, prompt, edits=[Edit(1, KIND[1], positions=torch.ones(1, 3, dtype=torch.bool))])
    with pytest.raises(ReadError, match="layer 9 does not exist"):
        preview_tokens(BACKEND, prompt, reads=Read.means((9,)))
    with pytest.raises(TokenError, match="empty prompt"):
        preview_tokens(BACKEND, ())
    with pytest.raises(TokenError, match="0 tokens or more, got -1"):
        preview_tokens(BACKEND, prompt, -1)


def test_thinking_and_answer_are_shown_apart_and_what_is_to_come_goes_on_with_what_begins() -> None:
    backend = thinking_backend("transformers")
    opening, closing = (backend.tokenizer.get_vocab()[mark] for mark in ("<think>", "</think>"))
    edits = [Edit.add(1, torch.ones(D_MODEL), 2.0, Positions.ANSWER)]
    reads = [Read(ReadKind.THINKING_MEAN), Read(ReadKind.ANSWER_MEAN)]
    there = preview_tokens(backend, (5, 6), (opening, 7, 8, closing, 9), edits=edits, reads=reads).tokens
    assert [token.factors[0] for token in there] == [0, 0, 0, 0, 0, 0, 2]
    assert [token.reads for token in there[2:]] == [(False, False), *[(True, False)] * 2, (False, False), (False, True)]
    for prompt, factor in (((5, 6), 2), ((5, opening), 0)):
        tokens = tokens_of(preview_tokens(backend, prompt, 4, edits=edits, reads=reads))
        assert [token.factors[0] for token in tokens] == [0, 0, *[factor] * 4]
        assert [token.reads for token in tokens[2:]] == [(not factor, bool(factor))] * 4
    with pytest.raises(EditError, match="no thinking to edit"):
        preview_tokens(BACKEND, (5, 6), 4, edits=[replace(edits[0], positions=Positions.THINKING)])
