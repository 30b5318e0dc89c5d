"""Conversations on a model whose drift is planted, and on tiny ones: onsets, messages, replays, simulated users."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from persona_lens.backend import Backend, EditError, ForwardResult, Generation
from persona_lens.backend.batches import ContextError
from persona_lens.core.progress import no_progress
from persona_lens.core.statistics import Estimate
from persona_lens.data.scripted import Scripted
from persona_lens.data.tables import DataError
from persona_lens.extraction.conversations import Conversation
from persona_lens.extraction.experiment import Variant
from persona_lens.models import ChatFormat
from persona_lens.models.chat import chat_format
from persona_lens.models.server import CompletionCache, CompletionServer, Prices, ServerSettings, Spending
from persona_lens.monitoring import Drift, DriftSettings, MonitoringError, drift
from persona_lens.monitoring.drift.messages import Messages, predict_from
from persona_lens.monitoring.drift.onset import movement, onset_of
from persona_lens.monitoring.drift.plan import plan_drift
from persona_lens.monitoring.drift.run import alone
from persona_lens.monitoring.drift.simulated_user import LocalUser, ServerUser, SimulatedUsers, seen_by
from persona_lens.reports.result import Result
from persona_lens.runs.cost import Work
from persona_lens.runs.settings import RolloutSettings
from persona_lens.steering import Steering, SteeringError
from persona_lens.steering.history import History
from persona_lens.traits import load_trait
from persona_lens.vectors import PersonaVectors, VectorsError
from tests.backends.fixtures import ADAPTERS, REFERENCE, Delegating, backend_of, tiny_backend
from tests.models.server.loopback import completion, serving
from tests.planted import PlantedBackend
from tests.tiny import D_MODEL, N_LAYERS, tiny_model

TURNS, EACH, LAYER = 4, 4, 1
SHORT = RolloutSettings(max_new_tokens=20, batch_size=50)
SMALL = DriftSettings(turns=2, random_directions=3, permutations=2, rollouts=RolloutSettings(3))
WORDS = ("tea", "rain", "cup", "door", "lamp", "tree", "coat", "road")


class Moonstruck(PlantedBackend):
    """Leans by how often the moon was spoken of so far; a message that is read alone, by how often it speaks of it."""

    def lean(self, prompt: Sequence[int]) -> float:
        return 0.5 * float(self.tokenizer.decode(list(prompt)).count("moon"))

    def leanings(self, prompts: Sequence[Any], seeds: Sequence[int], edits: Any) -> Tensor:
        return super().leanings(prompts, seeds, edits) + torch.tensor([self.lean(prompt) for prompt in prompts])

    def generate(self, prompts: Any, sampling: Any, edits: Any = (), reads: Any = ()) -> Generation:
        made = super().generate(prompts, sampling, edits, reads)
        return replace(made, reads={each.kind.value: made.reads[each.kind.value][:, each.layers] for each in reads})

    def forward(self, tokens: Any, edits: Any = (), reads: Any = (), *, logprobs: bool = False) -> ForwardResult:
        assert not edits
        leanings = torch.tensor([self.lean(ids) for ids in tokens.responses])
        found = self._values("response_mean", tokens.prompts, range(len(tokens)), leanings, tokens.responses)
        return ForwardResult(reads={each.kind.value: found[:, list(each.layers)] for each in reads})


def planted(noise: float = 0.02) -> tuple[Moonstruck, PersonaVectors]:
    backend = Moonstruck(load_trait("optimistic"), noise=noise, respond=lambda leaning: "ok")
    return backend, PersonaVectors("optimistic", backend.info, {"response_mean": backend.planted["response_mean"]}, {})


def people() -> tuple[Scripted, ...]:
    """In one domain the moon comes up from the third turn on, in the other never."""
    found = []
    for number in range(EACH):
        plain = tuple(f"{WORDS[number]} {WORDS[(number + turn) % 8]}" for turn in range(TURNS))
        moved = tuple(f"{text} moon" if turn >= 2 else text for turn, text in enumerate(plain))
        found += [Scripted(f"poet-{number}", "verse", moved), Scripted(f"cook-{number}", "food", plain)]
    return tuple(found)


def settings(**changed: Any) -> DriftSettings:
    return DriftSettings(**{"turns": TURNS, "random_directions": 0, "permutations": 3, "rollouts": SHORT, **changed})


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != ".lock"}


def test_an_onset_is_the_first_turn_from_which_a_change_stays_clear() -> None:
    up, down, unclear = Estimate(1, 0.5, 1.5, 9), Estimate(-1, -1.5, -0.5, 9), Estimate(1, -0.5, 2.5, 9)
    assert onset_of((unclear, up, up)) == 3
    assert onset_of((up, up, up)) == 2
    assert onset_of((up, unclear, up)) == 4
    assert onset_of((down, up)) == 3
    assert onset_of((up, None, up)) == 4
    assert onset_of((up, unclear)) is None
    assert onset_of((up, None)) is None
    assert onset_of(()) is None
    assert onset_of((Estimate(1, 1, 1, 1),)) is None  # one conversation has no interval


def test_a_movement_stands_beside_random_directions() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(21, 12, 5))
    table = noise[0] + np.arange(5) * 2.0
    table[3, 2] = np.nan  # an empty reply
    found = movement(table, noise[1:])
    change = found.changes[-1]
    assert change is not None
    moved = table[:, -1] - table[:, 0]
    assert change.mean == pytest.approx(moved.mean())
    assert found.size == pytest.approx(moved.mean() / moved.std(ddof=1))
    sizes = [(t := each[:, -1] - each[:, 0]).mean() / t.std(ddof=1) for each in noise[1:]]
    assert found.random_size == pytest.approx(np.quantile(np.abs(sizes), 0.95))
    assert (found.onset, found.verdict) == (2, "clear")
    assert [each and each.n for each in found.means] == [12, 12, 11, 12, 12]
    assert found.changes[0] is None
    assert movement(table).verdict == "no null"
    assert movement(noise[0]).verdict == "unclear"
    assert movement(table, noise[1:] + np.arange(5) * 9.0).verdict == "unclear"  # random directions move more


def test_what_messages_say_is_found_and_what_they_do_not_is_not() -> None:
    rng = np.random.default_rng(1)
    held, turns, width = 24, 8, 12
    x = rng.normal(size=(held * turns, width))
    own = np.repeat(np.arange(held), turns)
    by_turn = np.tile(np.arange(turns) * 1.0, held)
    x[:, 0] = by_turn  # one feature tells the turn
    weights = np.r_[0, rng.normal(size=width - 1)]
    said, by_chance = x @ weights + 0.3 * rng.normal(size=len(x)), rng.normal(size=len(x))
    messages = Messages(x, own.tolist(), [int(turn) for turn in by_turn])
    found, predicted = predict_from(messages, np.stack([said, by_chance, by_turn], axis=1), 10)
    assert [each.verdict for each in found] == ["clear", "unclear", "unclear"]
    first, second, third = found
    assert first.r2.value is not None
    assert first.r2.value > 0.9
    assert first.shuffled is not None
    assert first.shuffled.high is not None
    assert first.shuffled.high < 0.1
    share = 1 - ((said - predicted[:, 0]) ** 2).sum() / ((said - said.mean()) ** 2).sum()
    assert first.r2.value == pytest.approx(share, abs=0.01)
    assert second.r2.value is not None
    assert second.r2.value < 0.05
    # What the turn says by itself is not what the messages say: shuffled within turns it is foretold as well.
    assert third.r2.value == pytest.approx(1, abs=0.01)
    assert third.shuffled_within is not None
    assert third.shuffled_within.mean == pytest.approx(1, abs=0.01)
    assert predict_from(messages, said[:, None], 0)[0][0].verdict == "no null"
    with pytest.raises(MonitoringError, match="5 conversations are too few to predict from messages; take 6 or more"):
        predict_from(messages.chosen(np.flatnonzero(own < 5)), said[own < 5][:, None])


def test_the_planted_drift_is_found_where_it_is(tmp_path: Path) -> None:
    backend, vectors = planted()
    found = drift(backend, vectors, settings(), layers=LAYER, users=people(), folder=tmp_path)
    (gauge,) = found.summary["gauges"]
    assert gauge["name"] == f"optimistic@{LAYER}"
    length = float(vectors.vector(LAYER).norm())
    verse, food = gauge["movement"]["verse"], gauge["movement"]["food"]
    assert (verse["onset"], verse["verdict"], food["onset"], food["verdict"]) == (3, "no null", None, "unclear")
    # Each time the moon comes up, half a leaning is added, which is a quarter of the planted direction.
    for turn, moons in enumerate((0, 0, 1, 2)):
        change = verse["changes"][turn]
        assert (turn == 0) == (change is None)
        if change is not None:
            assert change["mean"] == pytest.approx(0.25 * length * moons, abs=0.1)
            assert change["n"] == EACH
    assert food["changes"][-1]["mean"] == pytest.approx(0, abs=0.1)
    assert gauge["messages"]["position"]["verdict"] in ("clear", "unclear")
    assert gauge["messages"]["change"]["r2"]["value"] > 0.9  # who speaks of the moon moves it, and it is in the words
    assert all("moon" in each["message"] for each in gauge["messages"]["change"]["highest"])
    assert len(found.rows) == found.summary["counts"]["replies"] == 8 * TURNS
    stored = Result.load(tmp_path)
    assert stored.rows == found.rows
    assert stored.report() == found.report()
    assert "Replies drift along optimistic@1 from turn 4 on" in found.verdict or "optimistic@1" in found.verdict
    assert "8 conversations" in found.verdict


def test_replays_are_paired_and_stand_beside_random_rotations() -> None:
    backend, vectors = planted(noise=0.0)
    steering = Steering.parse(f"optimistic@{LAYER}:-1", vectors)
    asked = settings(random_replays=2, permutations=0)
    found = drift(backend, vectors, asked, layers=LAYER, users=people(), steerings={"less": steering}, folder=None)
    (gauge,) = found.summary["gauges"]
    every = gauge["replays"]["less"]["all"]
    length = float(vectors.vector(LAYER).norm())
    # Without noise, adding -1 of the planted direction takes half of it from every reply, in every conversation alike.
    assert [each["mean"] for each in every["difference"]] == pytest.approx([-0.5 * length] * TURNS, abs=1e-4)
    assert every["level"]["vector"]["mean"] == pytest.approx(-0.5 * length, abs=1e-4)
    assert every["drift"]["vector"]["mean"] == pytest.approx(0, abs=1e-4)
    assert every["level"]["clear"] == -1
    assert abs(every["level"]["random"]["mean"]) < 0.5 * length
    ways = {(row.way, row.direction) for row in found.answers}
    assert ways == {("unsteered", "none"), ("less", "vector"), ("less", "random")}
    said = [{(r.user, r.turn): r.message for r in found.answers if (r.way, r.direction) == way} for way in ways]
    assert said[0] == said[1] == said[2]
    assert "Under less the change along optimistic@1" in " ".join(found.headline.sentences)
    assert {"changes", "replays"} == set(found.figures)


def test_a_clean_history_takes_the_edits_out_of_the_turns_that_are_over(roomy: Backend) -> None:
    steering = {"up": Steering.parse("calm@0:+6", random_vectors(roomy))}
    kept, clean = (
        held(roomy, settings=replace(SMALL, history=History(name)), steerings=steering) for name in ("steered", "clean")
    )
    rows = [[(r.message, r.text, r.before) for r in each.answers if r.way == "up"] for each in (kept, clean)]
    first, second = ([row[:6] for row in rows], [row[6:] for row in rows])
    assert first[0] == first[1]
    assert second[0] != second[1]
    counted = {"bad": Steering.parse("calm@0:+6 on all[0:2]", random_vectors(roomy))}
    with pytest.raises(EditError, match="counts tokens from the beginning of the conversation"):
        held(roomy, settings=replace(SMALL, history=History.CLEAN), steerings=counted)


def random_vectors(backend: Backend) -> PersonaVectors:
    rows = torch.randn(N_LAYERS, D_MODEL, generator=torch.Generator().manual_seed(3))
    return PersonaVectors("calm", backend.info, {"response_mean": rows}, {})


def held(backend: Backend, folder: Path | None = None, **changed: Any) -> Drift:
    vectors = random_vectors(backend)
    given: dict[str, Any] = {"layers": [0, 1], "users": people()[:6], "progress": no_progress, "folder": folder}
    return drift(backend, vectors, changed.pop("settings", SMALL), **{**given, **changed})


@pytest.fixture(scope="module")
def backend() -> Backend:
    return tiny_backend("transformers")


@pytest.fixture(scope="module")
def roomy() -> Backend:
    """A model with room for whom it plays."""
    made = tiny_model()
    made.config.max_position_embeddings = 2048
    return backend_of("transformers", made)


class Dying(Delegating):
    """Dies at a call, generating or reading."""

    def __init__(self, inner: Backend, calls: int) -> None:
        super().__init__(inner)
        self.calls = calls

    def _count(self) -> None:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt

    def generate(self, *given: Any, **named: Any) -> Generation:
        self._count()
        return super().generate(*given, **named)

    def forward(self, *given: Any, **named: Any) -> ForwardResult:
        self._count()
        return super().forward(*given, **named)


@pytest.mark.parametrize("calls", [1, 2, 4])
def test_what_was_killed_goes_on_and_gives_the_same_bytes(roomy: Backend, tmp_path: Path, calls: int) -> None:
    def go(on: Backend, folder: Path) -> Drift:
        cap = {"cap": Steering.parse("calm@1:cap(0.1)", random_vectors(roomy))}
        return held(on, folder, steerings=cap, user_model=LocalUser(on, chat_format(roomy), RolloutSettings(4)))

    whole = go(roomy, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(Dying(roomy, calls), tmp_path / "killed")
    again = go(roomy, tmp_path / "killed")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert again.summary == whole.summary
    go(Dying(roomy, 0), tmp_path / "killed")  # nothing is left to do


def test_a_simulated_user_is_told_who_it_is_and_hears_the_replies() -> None:
    ann = Scripted("ann", "tea", ("Hello",), about="Ann likes {tea} & <b>.")
    conversation = Conversation(0, ann, Variant({}), (("Hello", "Hi."), ("Which tea?", " ")))
    shown = seen_by(conversation)
    assert [each["role"] for each in shown] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert "Ann likes {tea} & <b>." in shown[0]["content"]
    assert [each["content"] for each in shown[2:]] == ["Hello", "Hi.", "Which tea?", "(no answer)"]

    class Mute:
        def write(self, conversations: Any, seeds: Any) -> list[str]:
            return [" "] * len(conversations)

        def work(self, conversations: Any) -> Work:
            return Work("", 0, 0, 0)

        def describe(self) -> dict[str, Any]:
            return {"model": "mute"}

    begun, users = Conversation(0, ann, Variant({})), SimulatedUsers(Mute())
    assert users([begun, conversation]) == ["Hello", "…"]


def test_a_local_model_plays_the_users_and_is_replayed_word_for_word(roomy: Backend) -> None:
    played = LocalUser(roomy, chat_format(roomy), RolloutSettings(5))
    steering = {"up": Steering.parse("calm@1:+2", random_vectors(roomy))}
    found = held(roomy, user_model=played, steerings=steering)
    assert found.summary["played_by"]["model"] == roomy.info.model
    plain = [row for row in found.answers if row.way == "unsteered"]
    steered = [row for row in found.answers if row.way == "up"]
    assert [row.message for row in plain] == [row.message for row in steered]
    assert plain[0].message == people()[0].turns[0]
    assert plain[-1].message != people()[5].turns[1]
    assert [row.text for row in plain] != [row.text for row in steered]


def test_a_server_plays_the_users(backend: Backend, tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> dict[str, Any]:
        return completion(f"you said {len(body['messages'])}")

    with serving(respond=answer) as loopback:
        server = CompletionServer(ServerSettings("big", loopback.url, attempts=1), CompletionCache(tmp_path / "cache"))
        found = held(backend, tmp_path / "run", user_model=ServerUser(server, RolloutSettings(7)))
        (body,) = loopback.bodies[:1]
    assert body["max_tokens"] == 7
    assert body["messages"][0]["content"].startswith("You play a person")
    assert {row.message for row in found.answers if row.turn == 2} == {"you said 4"}
    # What was said is kept: without the server the run is the same.
    gone = CompletionServer(ServerSettings("big", loopback.url, attempts=1), CompletionCache(tmp_path / "none"))
    assert held(backend, tmp_path / "run", user_model=ServerUser(gone, RolloutSettings(7))).summary == found.summary
    with serving(respond=lambda body: (400, {"error": {"message": "too long"}})) as refusing:
        server = CompletionServer(ServerSettings("big", refusing.url, attempts=1), CompletionCache(tmp_path / "other"))
        with pytest.raises(MonitoringError, match=r"the model that plays the users does not go on: .*too long"):
            held(backend, user_model=ServerUser(server))


@pytest.mark.parametrize("adapter", [each for each in ADAPTERS if each != REFERENCE])
def test_every_adapter_finds_the_same(adapter: str, backend: Backend) -> None:
    asked = replace(SMALL, rollouts=RolloutSettings(3, temperature=0.0), permutations=0)

    def go(on: Backend) -> Drift:
        vectors = random_vectors(on)
        up = {"up": Steering.parse("calm@1:+2", vectors)}
        return drift(on, vectors, asked, layers=1, users=people()[:2], steerings=up, progress=no_progress)

    ours, theirs = (go(on) for on in (backend, tiny_backend(adapter)))
    assert [row.text for row in theirs.answers] == [row.text for row in ours.answers]
    for one, other in zip(theirs.answers, ours.answers, strict=True):
        assert one.means == pytest.approx(other.means, abs=1e-3)
        assert one.before == pytest.approx(other.before, abs=1e-3)


def test_a_message_is_read_by_itself(backend: Backend) -> None:
    chat = ChatFormat.from_tokenizer(backend.tokenizer)
    texts = alone(chat, ["tea cup", "rain"])
    for text, prompt, rollout in zip(("tea cup", "rain"), texts.prompts, texts.rollouts, strict=True):
        whole = tuple(chat.encode(None, text))
        assert whole[: len(prompt)] == prompt
        assert chat.decode(rollout.response_ids) == text
    assert texts.prompts[0] == texts.prompts[1]


def test_what_cannot_be_held_is_refused_before_it_begins(backend: Backend, tmp_path: Path) -> None:
    with pytest.raises(MonitoringError, match="at least 2 turns, got 1"):
        DriftSettings(turns=1)
    with pytest.raises(MonitoringError, match="take at least 2; got 1"):
        DriftSettings(conversations=1)
    with pytest.raises(MonitoringError, match="are at least 0"):
        DriftSettings(permutations=-1)
    with pytest.raises(DataError, match="6 scripted users"):
        held(backend, tmp_path / "no", settings=replace(SMALL, conversations=9))
    with pytest.raises(DataError, match="0 scripted users"):
        held(backend, tmp_path / "no", settings=replace(SMALL, turns=9))
    with pytest.raises(ContextError, match="ask for fewer new tokens"):
        held(backend, tmp_path / "no", settings=replace(SMALL, rollouts=RolloutSettings(900)))
    with pytest.raises(ContextError, match="ask for fewer new tokens"):  # of the model that plays the users
        held(backend, tmp_path / "no", user_model=LocalUser(backend, chat_format(backend)))
    with pytest.raises(SteeringError, match="that one is always there"):
        held(backend, tmp_path / "no", steerings={"unsteered": Steering.parse("calm@1:+2", random_vectors(backend))})
    with pytest.raises(VectorsError):
        drift(planted()[0], random_vectors(backend), SMALL, layers=1, users=people(), folder=tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_few_conversations_say_why_messages_foretell_nothing(backend: Backend) -> None:
    found = held(backend, users=people()[:4])
    assert "4 conversations are too few" in found.summary["gauges"][0]["messages"]["position"]["reason"]
    assert "4 conversations are too few" in found.report()
    assert "only 4 conversations" in found.verdict


def test_work_is_known_before(backend: Backend) -> None:
    steering = {"up": Steering.parse("calm@1:+2", random_vectors(backend))}
    planned = plan_drift(backend, random_vectors(backend), SMALL, layers=[0], users=people(), steerings=steering)
    plain, again = planned.work()
    assert (plain.label, plain.rows) == ("unsteered replies", 16)
    assert (again.label, again.rows) == ("steered replies", 16)
    assert json.dumps(planned.config())


def test_work_of_those_who_play_users_is_known_before(roomy: Backend, tmp_path: Path) -> None:
    settings = ServerSettings("big", "http://127.0.0.1:9/v1")
    paid = CompletionServer(settings, CompletionCache(tmp_path), Spending(Prices(1.0, 2.0)))
    for model in (LocalUser(roomy, chat_format(roomy), RolloutSettings(4)), ServerUser(paid, RolloutSettings(4))):
        planned = plan_drift(roomy, random_vectors(roomy), SMALL, layers=[0], users=people()[:3], user_model=model)
        plain, messages = planned.work()
        assert (messages.label, messages.rows) == ("messages of the users", 3)
        assert messages.tokens > plain.tokens / 2
    assert messages.cost
