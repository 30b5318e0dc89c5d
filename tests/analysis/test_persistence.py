"""Ways to steer a conversation: what each of them writes, what is measured of it, and what is made of that."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from persona_lens.analysis import AnalysisError
from persona_lens.analysis.known_questions import asked_of, known_questions
from persona_lens.analysis.persistence import Aim, Persistence, PersistSettings, TurnRow, Way, persist, persist_work
from persona_lens.analysis.persistence.outcomes import Outcome, pairs_of
from persona_lens.analysis.persistence.ways import edits_by_labels, edits_for
from persona_lens.backend import (
    Backend,
    Edit,
    Generation,
    Operation,
    Positions,
    Read,
    ReadKind,
    Sampling,
    TokenBatch,
    open_backend,
)
from persona_lens.backend.batches import ContextError
from persona_lens.cli import app
from persona_lens.core.progress import no_progress
from persona_lens.data.scripted import Scripted
from persona_lens.data.tables import DataError
from persona_lens.data.turns import turn_prompt
from persona_lens.models import ChatFormat
from persona_lens.models.chat import messages_of
from persona_lens.reports.persistence import headline, usual_way
from persona_lens.runs.rollouts import Request, row_seed
from persona_lens.runs.settings import RolloutSettings
from persona_lens.traits import load_trait
from persona_lens.vectors import PersonaVectors, Tuned, VectorsError
from tests.backends.fixtures import backend_of
from tests.screening.made import LengthJudge
from tests.tiny import D_MODEL, N_LAYERS, saved_model, tiny_model, tiny_tokenizer

TRAIT = load_trait("optimistic")
USERS = (
    Scripted("ann", "tea", ("Hello", "What is tea?", "Which cup?")),
    Scripted("bob", "rain", ("Hi", "Will it rain?", "And then?")),
    Scripted("cem", "tea", ("Good day", "How hot?", "And milk?")),
)
SETTINGS = PersistSettings(
    conversations=3,
    turns=3,
    layer=1,
    coefficient=2.0,
    known_questions=2,
    last=2,
    random_directions=2,
    rollouts=RolloutSettings(5, batch_size=8),
)


@pytest.fixture(scope="module")
def backend() -> Backend:
    model: Any = tiny_model()
    model.config.max_position_embeddings = 16_384
    return backend_of("transformers", model)


def chat() -> ChatFormat:
    return ChatFormat.from_tokenizer(tiny_tokenizer())


def vectors(backend: Backend, trait: str = "optimistic", seed: int = 0) -> PersonaVectors:
    rows = torch.randn(N_LAYERS, D_MODEL, generator=torch.Generator().manual_seed(seed))
    provenance = {
        "trait": load_trait(trait).model_dump(mode="json"),
        "judge": {"calibration": {"slope": 1.0, "intercept": 0.0}},
    }
    return PersonaVectors(trait, backend.info, {"response_mean": rows}, provenance)


def persisted(backend: Backend, folder: Path | None = None, settings: PersistSettings = SETTINGS) -> Persistence:
    found = {"optimistic": vectors(backend)}
    return persist(backend, found, settings, users=USERS, folder=folder, progress=no_progress)


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != ".lock"}


@pytest.fixture(scope="module")
def found(backend: Backend, tmp_path_factory: pytest.TempPathFactory) -> Persistence:
    return persisted(backend, tmp_path_factory.mktemp("persist") / "run")


def row_of(found: Persistence, way: str, number: int, turn: int) -> TurnRow:
    (row,) = (row for row in found.answers if (row.way, row.question, row.turn) == (way, number, turn))
    return row


def test_every_way_holds_every_conversation(found: Persistence) -> None:
    rows = {(row.way, row.user, row.turn) for row in found.answers}
    assert rows == {(way, user.name, turn) for way in Way for user in USERS for turn in (1, 2, 3)}
    assert found.folder is not None
    assert {file for file in files(found.folder) if "turn-03" in file} == {
        "turn-03-rollouts.jsonl",
        *(f"activations/turn-03-batch-{number:05d}.safetensors" for number in range(4)),
    }
    trait = found.summary["traits"]["optimistic"]
    assert list(trait["ways"]) == list(Way)
    assert [each["turn"] for each in trait["ways"]["clean"]["turns"]] == [1, 2, 3]
    assert len(found.summary["together"]) == 21
    assert trait["target"] is not None


def test_it_is_an_experiment_that_can_be_looked_at(found: Persistence) -> None:
    html = found.report()
    assert all(way in html for way in Way)
    assert "3 conversations of 3 turns" in found.verdict
    assert "difference_score" in found.figures


def masked(prompt: Sequence[int], ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
    mask = torch.zeros(1, len(prompt), dtype=torch.bool)
    for start, stop in ranges:
        mask[0, start:stop] = True
    return mask


@pytest.mark.parametrize("way", Way)
def test_a_reply_in_the_last_turn_is_what_its_way_says(backend: Backend, found: Persistence, way: Way) -> None:
    number, user = 1, USERS[1]
    said = [(user.turns[turn], row_of(found, way, number, turn + 1).text) for turn in range(2)]
    aim = found.outcomes["optimistic"].aim
    system = TRAIT.instructions[2].positive if way is Way.PROMPTED else None
    system = system and TRAIT.system_prompt("positive", 2)  # type: ignore[arg-type]
    messages = messages_of(system, user.turns[2], said)
    prompt = turn_prompt(chat(), messages)
    v, target = vectors(backend).vector(1), aim.target
    assert target is not None
    replies = [(start - 1, stop) for start, stop in prompt.said]
    conditional = aim.edits(Way.GATED, 0)[0]
    edits: Mapping[Way, Sequence[Edit]] = {
        Way.NONE: [],
        Way.ALL: [Edit.add(1, v, 2.0)],
        Way.GENERATED: [
            Edit.add(1, v, 2.0, masked(prompt.ids, replies)),
            Edit.add(1, v, 2.0, Positions.GENERATING),
        ],
        Way.CLEAN: [Edit.add(1, v, 2.0, Positions.GENERATING)],
        Way.CLEAN_ALL: [
            Edit.add(1, v, 2.0, masked(prompt.ids, [(prompt.past, len(prompt.ids))])),
            Edit.add(1, v, 2.0, Positions.RESPONSE),
        ],
        Way.FLOOR: [Edit.floor(1, v, target)],
        Way.GATED: [conditional],
        Way.RANDOM: list(aim.steering.null(1)),
        Way.PROMPTED: [],
    }
    seed = row_seed(0, "conversation", user.name, 3)
    alone = backend.generate([prompt.ids], Sampling(5, 1.0, 1.0, (seed,)), edits[way])
    assert chat().answer(alone.responses[0]) == row_of(found, way, number, 3).text
    assert conditional.condition is not None
    assert (conditional.condition.threshold, conditional.condition.above) == (aim.gate, False)


def test_what_is_held_is_what_the_first_turn_has(found: Persistence) -> None:
    for way, level in (("all", "target"), ("prompted", "gate")):
        means = [row_of(found, way, number, 1).projection for number in range(3)]
        assert found.summary["traits"]["optimistic"][level] == pytest.approx(
            sum(map(float, filter(None, means))) / 3, abs=1e-4
        )
    held = [row.projection for row in found.answers if row.way == "floor" and row.projection is not None]
    assert min(held) >= found.summary["traits"]["optimistic"]["target"] - 1e-3


@pytest.mark.parametrize("way", ["none", "generated", "prompted"])
def test_surprise_is_that_of_the_unsteered_model_given_the_conversation(
    backend: Backend, found: Persistence, way: str
) -> None:
    user = USERS[2]
    said = [(user.turns[turn], row_of(found, way, 2, turn + 1).text) for turn in range(3)]
    for turn in range(3):
        prompt = chat().encode_messages(messages_of(None, said[turn][0], said[:turn]))
        reply = chat().encode_messages([*messages_of(None, said[turn][0], said[:turn]), _assistant(said[turn][1])],
                                       add_generation_prompt=False)[len(prompt) :]  # fmt: skip
        reply = reply[: reply.index(2)] if 2 in reply else reply
        values = backend.forward(TokenBatch.of([prompt], [reply]), logprobs=True).logprobs
        assert values is not None
        assert row_of(found, way, 2, turn + 1).nll == pytest.approx(-float(values[0].mean()), rel=1e-4)


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("way", ["none", "all", "generated", "clean", "clean-all", "floor"])
def test_known_questions_are_asked_in_the_conversation_as_it_is_steered(
    backend: Backend, found: Persistence, way: str
) -> None:
    user, number = USERS[0], 0
    said = [(user.turns[turn], row_of(found, way, number, turn + 1).text) for turn in range(3)]
    talk = [*messages_of(None, said[2][0], said[:2]), _assistant(said[2][1])]
    asked = asked_of(number, 2, 0)
    assert len(asked) == 6
    assert set(asked) <= set(known_questions())
    spans: list[tuple[int, int]] = []
    past = turn_prompt(chat(), [*talk, {"role": "user", "content": asked[0].question}]).past
    for each in asked:
        talk.append({"role": "user", "content": each.question})
        begin = len(chat().encode_messages(talk))
        spans.append((begin, begin + len(chat().encode_answer(each.answer))))
        talk.append(_assistant(each.answer))
    ids = chat().encode_messages(talk, add_generation_prompt=False)[: spans[-1][1]]
    earlier = turn_prompt(chat(), [*messages_of(None, said[2][0], said[:2]), _assistant(said[2][1]),
                                   {"role": "user", "content": "x"}]).said  # fmt: skip
    v, aim = vectors(backend).vector(1), found.outcomes["optimistic"].aim
    assert aim.target is not None
    items = [(start - 1, stop) for start, stop in spans]
    edits = {
        "none": [],
        "all": [Edit.add(1, v, 2.0)],
        "generated": [Edit.add(1, v, 2.0, masked(ids, [*((a - 1, b) for a, b in earlier), *items]))],
        "clean": [Edit.add(1, v, 2.0, masked(ids, items))],
        "clean-all": [Edit.add(1, v, 2.0, masked(ids, [(past, len(ids))]))],
        "floor": [Edit.floor(1, v, aim.target)],
    }[way]
    values = backend.forward(TokenBatch.of([ids[:1]], [ids[1:]]), edits, logprobs=True).logprobs
    assert values is not None
    right = [float(values[0][start - 1 : stop - 1].mean()) for start, stop in spans[4:]]
    assert row_of(found, way, number, 3).capability == pytest.approx(math.exp(sum(right) / 2), rel=1e-3)
    assert row_of(found, way, number, 2).capability is None


def test_less_of_a_trait_is_held_from_above(backend: Backend) -> None:
    aim = Aim(vectors(backend), TRAIT, 1, -2.0, "response_mean", 3.0, 1.0)
    (cap,), (gated,) = aim.edits(Way.FLOOR, 0), aim.edits(Way.GATED, 0)
    assert (cap.operation, cap.threshold) == (Operation.CAP, 3.0)
    assert gated.condition is not None
    assert (gated.condition.threshold, gated.condition.above) == (1.0, True)
    assert gated.coefficient == -2.0
    assert aim.system(Way.PROMPTED) == TRAIT.system_prompt("negative", 2)  # type: ignore[arg-type]
    assert aim.towards == -1


def test_a_batch_of_all_ways_has_each_row_under_its_own(backend: Backend) -> None:
    """Every row of a mixed batch does as it does alone."""
    aims = {"optimistic": Aim(vectors(backend), TRAIT, 1, 2.0, "response_mean", 3.0, 1.0)}
    made = edits_for(edits_by_labels(aims, 2, 0), chat())
    requests = [
        Request(None, "And?", row_seed(3), {"way": str(way), "trait": "optimistic", "question_number": 1}, said)
        for way in Way
        for said in ((("Hello", "hi there"),), (("A longer question", "a"), ("B", "something longer than that")))
    ]
    prompts = [chat().encode(None, each.question, each.examples) for each in requests]

    reads = [Read(ReadKind.PROMPT_LAST, (2,)), Read(ReadKind.RESPONSE_MEAN, (2,))]

    def alone(prompt: Sequence[int], request: Request) -> Generation:
        return backend.generate([prompt], Sampling(6, 1.0, 1.0, (request.seed,)), made([request]), reads)

    sampling = Sampling(6, 1.0, 1.0, tuple(each.seed for each in requests))
    together = backend.generate(prompts, sampling, made(requests), reads)
    each = [alone(*pair) for pair in zip(prompts, requests, strict=True)]
    assert list(together.responses) == [one.responses[0] for one in each]
    for name, values in together.reads.items():
        torch.testing.assert_close(values, torch.cat([one.reads[name] for one in each]), rtol=1e-4, atol=1e-4)
    last = together.reads["prompt_last"][:, 0]
    for place in (0, 1):  # all ways but a system prompt, which nobody gave here, have the model elsewhere
        apart = torch.cdist(last[place::2], last[place::2])
        same = {(Way.NONE, Way.PROMPTED)}
        for one, first in enumerate(Way):
            for other, second in enumerate(Way):
                alike = one == other or {(first, second), (second, first)} & same
                assert bool(apart[one, other] < 1e-3) == bool(alike), (first, second)


class Dying:
    """Lengths as scores, by a judge that dies at a call."""

    concurrency = 1

    def __init__(self, calls: int) -> None:
        self.calls, self.inner = calls, LengthJudge()

    def describe(self) -> dict[str, Any]:
        return self.inner.describe()

    def pieces(self, exchanges: Any) -> list[list[int]]:
        return [[number] for number in range(len(exchanges))]

    def judge(self, exchanges: Any, progress: Any = no_progress) -> Any:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return self.inner.judge(exchanges)


@pytest.mark.parametrize("calls", [0, 3])
def test_what_was_killed_goes_on_and_gives_the_same_bytes(backend: Backend, tmp_path: Path, calls: int) -> None:
    """Killed while it judges; that conversations go on is tried where they are held."""
    settings = replace(SETTINGS, conversations=1, turns=2, last=1, ways=("floor",), known_turns=(2,))
    given: Any = ({"optimistic": vectors(backend)}, settings)
    how: Any = {"users": USERS, "progress": no_progress}
    persist(backend, *given, folder=tmp_path / "whole", judges={"optimistic": Dying(99)}, **how)
    with pytest.raises(KeyboardInterrupt):
        persist(backend, *given, folder=tmp_path / "killed", judges={"optimistic": Dying(calls)}, **how)
    for name in ("surprise.jsonl", "capability-02.jsonl"):
        (tmp_path / "killed" / name).unlink()
    persist(backend, *given, folder=tmp_path / "killed", judges={"optimistic": Dying(99)}, **how)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    again = persist(backend, *given, folder=tmp_path / "killed", judges={"optimistic": Dying(0)}, **how)
    assert [row.way for row in again.answers] == ["none", "floor", "none", "floor"]


def test_two_traits_share_what_is_not_steered(backend: Backend) -> None:
    settings = replace(SETTINGS, conversations=2, turns=2, last=1, ways=("all", "clean"), known_questions=0)
    both = {"optimistic": vectors(backend), "impolite": vectors(backend, "impolite", 1)}
    found = persist(backend, both, settings, users=USERS, progress=no_progress)
    plain = {
        name: [row.text for row in found.answers if (row.trait, row.way) == (name, "none")] for name in found.outcomes
    }
    assert plain["optimistic"] == plain["impolite"]
    assert [len(each.rows) for each in found.outcomes.values()] == [12, 12]
    (pair,) = found.summary["together"]
    values = [trait["pairs"][0]["end"]["nll"]["mean"] for trait in found.summary["traits"].values()]
    assert pair["end"]["nll"]["mean"] == pytest.approx(sum(values) / 2)
    assert pair["end"]["capability"] is None
    assert found.summary["traits"]["impolite"]["ways"]["all"]["change"]["random"] is None


def rows(way: str, scores: Mapping[int, Sequence[float]], nll: float = 2.0) -> list[TurnRow]:
    return [
        TurnRow(number, 0, score, nll, None, "x", "optimistic", way, turn, f"user {number}", "tea", 0.0, None)
        for number, values in scores.items()
        for turn, score in enumerate(values, start=1)
    ]


def outcome(backend: Backend, coefficient: float = 2.0) -> Outcome:
    """Clean keeps 20 points more than all at the end, give or take, and surprises as much."""
    several = range(6)
    told = [
        *rows("none", {n: (40.0, 40.0, 40.0 + n) for n in several}),
        *rows("all", {n: (80.0, 70.0, 60.0 + n) for n in several}),
        *rows("clean", {n: (80.0, 80.0, 80 + n / 2) for n in several}),
        *rows("random", {n: (42.0, 42.0, 42.0 - n) for n in several}),
    ]
    return Outcome(Aim(vectors(backend), TRAIT, 1, coefficient, "response_mean"), told, 3, 1)


def test_ways_are_held_against_one_another_by_conversation(backend: Backend) -> None:
    found = outcome(backend)
    (pair,) = pairs_of([found])
    assert (pair["one"], pair["other"]) == ("all", "clean")
    assert pair["end"]["score"]["mean"] == pytest.approx(-20 + 2.5 / 2)
    assert pair["end"]["score"]["n"] == 6
    assert pair["whole"]["score"]["mean"] == pytest.approx((0 - 10 - 18.75) / 3)
    assert pair["end"]["nll"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 6}
    (less,) = pairs_of([outcome(backend, -2.0)])
    assert less["end"]["score"]["mean"] == pytest.approx(20 - 2.5 / 2)
    way = found.to_json(Way.ALL)
    assert way["drift"]["score"]["mean"] == pytest.approx(-20 + 2.5)
    assert way["change"]["vector"]["mean"] == pytest.approx(20)
    assert way["change"]["random"]["mean"] == pytest.approx(2 - 2 * 2.5)
    assert way["change"]["clear"] == 1


def summary_of(found: Outcome) -> dict[str, Any]:
    trait = {"steering": "optimistic@1:+2", "ways": {str(way): found.to_json(way) for way in found.ways}}
    return {
        "settings": {"turns": 3, "last": 1},
        "conversations": 6,
        "traits": {"optimistic": trait},
        "together": pairs_of([found]),
        "judges": {"optimistic": {"judge": "likelihood"}},
    }


def test_better_is_said_only_where_the_interval_is_clear_of_zero(backend: Backend) -> None:
    told = headline(summary_of(outcome(backend)))
    assert told.verdict == "clear"
    assert told.title == "Clean (more of the trait) holds better than all in the last turn"
    assert "clean against all: more of the trait (trait score +18.8" in " ".join(told.sentences)
    less = headline(summary_of(outcome(backend, -2.0)))
    assert less.verdict == "unclear"
    assert less.title.startswith("No way clearly keeps more than all without losing something in the last turn")
    assert "clean against all: less of the trait" in " ".join(less.sentences)
    alone = outcome(backend)
    alone = replace(alone, rows=[row for row in alone.rows if row.way != "clean"])
    assert usual_way(summary_of(alone)) is None
    assert headline(summary_of(alone)).verdict == "unclear"


def test_what_it_would_ask_is_known_before(backend: Backend) -> None:
    found = {"optimistic": vectors(backend)}
    work = {each.label: each for each in persist_work(backend, found, SETTINGS, users=USERS)}
    assert {name: each.rows for name, each in work.items()} == {
        "rollouts": 81,
        "surprise": 27,
        "capability-01": 27,
        "capability-03": 27,
        "judging optimistic": 81 * 11,
    }


def test_what_cannot_be_done_is_refused_before_anything_runs(backend: Backend, tmp_path: Path) -> None:
    def refused(settings: PersistSettings, **how: Any) -> str:
        with pytest.raises((AnalysisError, VectorsError, DataError, ContextError)) as failed:
            persist(backend, {"optimistic": vectors(backend)}, settings, folder=tmp_path / "run",
                    **{"users": USERS, **how})  # fmt: skip
        assert not (tmp_path / "run").exists()
        return str(failed.value)

    said = refused(replace(SETTINGS, layer=None, coefficient=None))
    assert "no layer was tuned for the vectors of 'optimistic'; give a layer and a coefficient (--layer, " in said
    assert "layer 7 does not exist" in refused(replace(SETTINGS, layer=7))
    assert "there are 3 scripted users with so many messages" in refused(replace(SETTINGS, conversations=4))
    assert "ask for fewer new tokens" in refused(replace(SETTINGS, rollouts=RolloutSettings(6000)))
    for changed, said in (
        ({"ways": ("all", "sideways")}, "there is no way 'sideways' to steer; there are none, all, generated"),
        ({"last": 4}, "last at most turns"),
        ({"coefficient": 0.0}, "steers nothing"),
        ({"layer": None}, "a layer and a coefficient go together"),
        ({"known_turns": (4,)}, "known_turns must be from 1 to 3"),
        ({"known_questions": 200}, "known_questions must be from 0 to 76"),
        ({"known_questions": -1}, "known_questions must be from 0 to 76"),
    ):
        with pytest.raises(AnalysisError, match=said):
            replace(SETTINGS, **changed)
    with pytest.raises(AnalysisError, match="at least one trait"):
        persist(backend, {}, SETTINGS)


def test_the_tuned_choice_is_taken_where_none_is_named(backend: Backend) -> None:
    tuned = vectors(backend).with_tuned(Tuned(2, 1.5, "response_mean"), {})
    settings = replace(SETTINGS, conversations=1, turns=1, last=1, layer=None, coefficient=None, ways=("all",))
    found = persist(backend, {"optimistic": tuned}, settings, users=USERS, progress=no_progress)
    assert found.summary["traits"]["optimistic"]["steering"] == "optimistic@2:+1.5"
    assert json.loads(json.dumps(found.summary)) == found.summary


@pytest.mark.parametrize("adapter", ["transformer_lens", "nnsight"])
def test_other_backends_find_the_same(backend: Backend, adapter: str) -> None:
    model: Any = tiny_model()
    model.config.max_position_embeddings = 16_384
    other = backend_of(adapter, model)
    settings = replace(SETTINGS, conversations=1, turns=2, last=1, known_questions=1)
    settings = replace(settings, rollouts=RolloutSettings(4, temperature=0.0))

    def measured(on: Backend) -> list[TurnRow]:
        return list(persist(on, {"optimistic": vectors(on)}, settings, users=USERS, progress=no_progress).answers)

    for one, same in zip(measured(backend), measured(other), strict=True):
        assert (one.way, one.turn, one.text) == (same.way, same.turn, same.text)
        for name in ("score", "nll", "projection", "capability"):
            assert getattr(same, name) == pytest.approx(getattr(one, name), rel=1e-3, abs=1e-3)


def test_from_the_command_line_to_the_page(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    saved_model(folder, positions=16_384)
    own = open_backend("transformers", str(folder), dtype="float32", device="cpu")
    file = str(vectors(own).save(tmp_path / "optimistic.safetensors"))
    people = tmp_path / "people.yaml"
    talk = [{"name": "ann", "turns": ["Hi", "Tea?"]}, {"name": "bob", "turns": ["Oh", "So?"]}]
    people.write_text(json.dumps({"format_version": 1, "domain": "tea", "users": talk}))
    command = [
        *("steer", "persist", str(folder), file, "--dtype", "float32", "--device", "cpu", "--users", str(people)),
        *("--conversations", "2", "--turns", "2", "--last", "1", "--max-new-tokens", "4", "--known-questions", "1"),
        *("--known-turns", "2", "--way", "all,clean", "--way", "prompted"),
    ]
    placed = [*command, "--layer", "1", "--coefficient", "2"]
    out = tmp_path / "run"
    run = CliRunner(env={"COLUMNS": "200"}).invoke
    first = run(app, [*placed, "--out", str(out), "--json"])
    assert first.exit_code == 0, (first.output, first.exception)
    found = json.loads(first.stdout)
    assert list(found["traits"]["optimistic"]["ways"]) == ["none", "all", "clean", "prompted"]
    assert "prompted" in (out / "report.html").read_text(encoding="utf-8")
    shown = run(app, [*placed, "--out", str(out)])
    assert shown.exit_code == 0
    assert "score, last 1 turn" in shown.stdout
    work = json.loads(run(app, [*placed, "--dry-run", "--json"]).stdout)["work"]
    assert [each["label"] for each in work] == ["rollouts", "surprise", "capability-02", "judging optimistic"]
    assert "no layer was tuned" in str(run(app, command).exception)
    assert "2 scripted users" in str(run(app, [*placed, "--conversations", "3"]).exception)
    assert "there is no way 'up'" in str(run(app, [*placed, "--way", "up"]).exception)
