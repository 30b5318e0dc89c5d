"""Where a model thinks before it answers, drift, baselines and the alarms that count from them are of its answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from persona_lens import open_backend
from persona_lens.backend import Backend, Part, Parts, Read, ReadError, ReadKind, TokenBatch
from persona_lens.cli import app
from persona_lens.cli.drift import UserOptions
from persona_lens.models import ChatFormat
from persona_lens.models.chat import chat_format
from persona_lens.models.server import CompletionCache, CompletionServer, ServerSettings
from persona_lens.monitoring import (
    Alarm,
    Alert,
    BaselineSettings,
    ConversationMonitor,
    DriftSettings,
    MonitoringError,
    Panel,
    drift,
    measure_baseline,
)
from persona_lens.monitoring.alarms import described
from persona_lens.monitoring.drift import DriftRow
from persona_lens.monitoring.drift.plan import plan_drift
from persona_lens.monitoring.drift.simulated_user import LocalUser, ServerUser
from persona_lens.monitoring.scoring import monitor
from persona_lens.reports.drift import told
from persona_lens.reports.kinds import page_of
from persona_lens.runs import RunError
from persona_lens.runs.settings import RolloutSettings
from persona_lens.serve.shelf import Shelf
from persona_lens.serve.workbench import Asked, Workbench
from persona_lens.traits import load_trait
from persona_lens.vectors import PersonaVectors, load_vectors
from persona_lens.vectors.provenance import StoredBaseline, Tuned
from tests.backends.fixtures import backend_of, thinking_backend, tiny_backend
from tests.families import FAMILIES
from tests.models.server.loopback import completion, serving
from tests.monitoring.test_drift import people
from tests.thinking import ASKED, NEW, thinking_model
from tests.tiny import D_MODEL, N_LAYERS

SAID = "the model thinks before it answers: read are its answers, without the thinking before them"
LAYER, SOME = 1, RolloutSettings(max_new_tokens=24, batch_size=16)
BASELINE = BaselineSettings(layers=(LAYER,), questions=2, neutral=12, rollouts=SOME)
DRIFT = DriftSettings(turns=2, conversations=6, random_directions=2, permutations=2, rollouts=SOME)


@pytest.fixture(scope="module")
def backend() -> Backend:
    """It thinks, now and then."""
    return thinking_backend("transformers")


@pytest.fixture(scope="module")
def closing() -> Backend:
    """Its prompts open the thinking, and its reply to `ASKED` closes it."""
    return backend_of("transformers", thinking_model(), FAMILIES["qwq"].tokenizer())


def vectors(backend: Backend, *also: str) -> PersonaVectors:
    rows = torch.randn(N_LAYERS, D_MODEL, generator=torch.Generator().manual_seed(3))
    trait = load_trait("optimistic")
    known = {"trait": {"content_hash": trait.content_hash(), **trait.model_dump(mode="json")}}
    found = {name: rows * (n + 1) for n, name in enumerate(("response_mean", *also))}
    return PersonaVectors("optimistic", backend.info, found, known)


def values(backend: Backend, own: PersonaVectors, prompt: Any, ids: Any) -> tuple[Tensor, list[Part]]:
    """The projection of each token of a response at the layer, of a plain pass, and what the token is."""
    parts = list(Parts.of(backend.tokenizer).of_response(prompt, ids))
    read = backend.forward(TokenBatch.of([prompt], [ids]), (), [Read(ReadKind.ACTIVATIONS)]).reads["activations"][0]
    unit = own.rows()[LAYER] / own.rows()[LAYER].norm()
    return read[LAYER, -len(ids) :].float() @ unit, parts


def of_part(found: tuple[Tensor, list[Part]], part: Part) -> list[float]:
    return [value for value, each in zip(found[0].tolist(), found[1], strict=True) if each is part]


@pytest.mark.parametrize("reduction", ["", "thinking_mean"])
def test_a_baseline_is_of_the_answers_or_of_the_thinking(closing: Backend, tmp_path: Path, reduction: str) -> None:
    own, part = vectors(closing, "thinking_mean"), Part.THINKING if reduction else Part.ANSWER
    settings, mean = replace(BASELINE, reduction=reduction), reduction or "answer_mean"
    found = measure_baseline(closing, own, settings, folder=tmp_path)
    stored = load_vectors(tmp_path).baseline
    assert stored is not None
    assert stored.mean == mean == json.loads((tmp_path / "run.json").read_text())["mean"] == found.summary["mean"]
    chat, tokens, means = chat_format(closing), [], []
    for reply in found.replies:
        prompt = chat.encode(reply.request.system, reply.request.question)
        counting = of_part(values(closing, own, prompt, reply.response_ids), part)
        tokens += counting
        means.append(fmean(counting))
    assert 2 <= len(means) <= len(found.replies)
    assert len(tokens) < sum(len(each.response_ids) for each in found.replies)
    at = stored.layers[LAYER]
    assert (stored.replies, stored.tokens) == (len(means), len(tokens))
    assert at.means == pytest.approx(means, abs=1e-3)
    assert (at.mean, at.sd) == pytest.approx((fmean(tokens), stdev(tokens)), abs=1e-3)
    assert "the model thinks before it answers: read " in page_of("baseline", found.summary).lower()


def test_a_baseline_of_a_model_that_does_not_think_says_nothing_of_it(tmp_path: Path) -> None:
    plain = tiny_backend("transformers")
    found = measure_baseline(plain, vectors(plain), BASELINE, folder=tmp_path)
    assert "mean" not in found.summary
    assert "mean" not in json.loads((tmp_path / "run.json").read_text())
    assert found.vectors.baseline is not None
    assert found.vectors.baseline.mean == "response_mean"
    with pytest.raises(ReadError, match="no thinking to read"):
        measure_baseline(plain, vectors(plain, "thinking_mean"), replace(BASELINE, reduction="thinking_mean"))


def test_replies_that_come_to_no_answer_are_no_baseline(closing: Backend) -> None:
    short = replace(BASELINE, rollouts=RolloutSettings(max_new_tokens=1))
    with pytest.raises(MonitoringError, match=r"0 answers with any text.*--max-new-tokens"):
        measure_baseline(closing, vectors(closing), short)


def before(folder: Path) -> dict[str, bytes]:
    """A run as it was when replies were read whole: nothing in its configuration says otherwise."""
    config = json.loads((folder / "run.json").read_text())
    assert config.pop("mean") == "answer_mean"
    (folder / "run.json").write_text(json.dumps(config))
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file() and file.name != ".lock"}


def test_a_run_that_read_replies_whole_is_not_gone_on_with(backend: Backend, tmp_path: Path) -> None:
    own = vectors(backend)
    measure_baseline(backend, own, BASELINE, folder=tmp_path / "baseline")
    held(backend, own, tmp_path / "drift")
    kept = {name: before(tmp_path / name) for name in ("baseline", "drift")}
    with pytest.raises(RunError, match="mean"):
        measure_baseline(backend, own, BASELINE, folder=tmp_path / "baseline")
    with pytest.raises(RunError, match="mean"):
        held(backend, own, tmp_path / "drift")
    for name, files in kept.items():
        assert all((tmp_path / name / file).read_bytes() == content for file, content in files.items())


def test_what_was_stored_of_whole_replies_is_read_as_that(backend: Backend) -> None:
    stored = measure_baseline(backend, vectors(backend), BASELINE).vectors.provenance["baseline"]
    old = {name: value for name, value in stored.items() if name != "mean"}
    assert StoredBaseline.from_json(old).mean == "response_mean"
    assert "mean" not in StoredBaseline.from_json(old).to_json()
    gauge = Panel.of(vectors(backend).with_provenance(baseline=old), LAYER).gauges[0]
    assert "(neutral answers: mean" in described(Alarm.parse("optimistic>2sd", print), gauge)


def held(backend: Backend, own: PersonaVectors, folder: Path | None = None, **more: Any) -> Any:
    return drift(backend, own, DRIFT, layers=LAYER, users=people()[:6], folder=folder, **more)


def test_drift_is_of_the_answers(backend: Backend, tmp_path: Path) -> None:
    own = vectors(backend)
    found = held(backend, own, tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["mean"] == found.summary["mean"] == "answer_mean"
    planned = plan_drift(backend, own, DRIFT, layers=LAYER, users=people()[:6])
    compared: list[bool] = []
    heard: dict[str, list[DriftRow]] = {}
    for turn in planned.plain().hold(None):
        rows = [row for row in found.answers if row.turn == turn.number]
        for row, rollout in zip(rows, turn.rollouts, strict=True):
            asked = rollout.request
            prompt = planned.chat.encode(asked.system, asked.question, asked.examples)
            wanted = of_part(values(backend, own, prompt, rollout.response_ids), Part.ANSWER)
            shown = row.means["optimistic@1"]
            assert (shown is None) == (not wanted)
            assert shown is None or shown == pytest.approx(fmean(wanted), abs=1e-3)
            compared.append(len(wanted) < len(rollout.response_ids))
            assert rollout.response == planned.chat.answer(rollout.response_ids)
            assert list(asked.examples) == [(each.message, each.text) for each in heard.get(row.user, [])]
        for row in rows:
            heard.setdefault(row.user, []).append(row)
    assert any(compared)
    assert told(found.summary)[0] == SAID
    page = " ".join(page_of("drift", found.summary).split())
    assert SAID in page
    assert "the tokens of the answer in a reply" in page


def test_vectors_of_thinking_and_of_answers_are_not_held_at_once(backend: Backend) -> None:
    own = vectors(backend, "thinking_mean")
    thinking = own.with_tuned(Tuned(LAYER, 1.0, "thinking_mean"), {})
    other = PersonaVectors("calm", own.model, own.directions, {}).with_tuned(Tuned(LAYER, 1.0), {})
    assert plan_drift(backend, thinking, DRIFT, users=people()).config()["mean"] == "thinking_mean"
    with pytest.raises(MonitoringError, match=r"answer_mean for calm@1 and thinking_mean for optimistic@1"):
        drift(backend, [thinking, other], DRIFT, users=people())


@pytest.mark.parametrize("kind", ["token", "running_mean", "turn_mean"])
@pytest.mark.parametrize("mean", ["answer_mean", "thinking_mean", "response_mean"])
def test_an_alarm_listens_to_what_its_baseline_is_of(closing: Backend, kind: str, mean: Any) -> None:
    own = vectors(closing)
    (stored,) = [measure_baseline(closing, own, replace(BASELINE, rollouts=SOME)).vectors.baseline]
    assert stored is not None
    known = own.with_provenance(baseline=replace(stored, mean=mean).to_json())
    alerts: list[Alert] = []
    alarms = [Alarm.parse("optimistic>-999sd", alerts.append, kind)]
    turn = ConversationMonitor(closing, Panel.of(known, LAYER), alarms=alarms).reply(ASKED, max_new_tokens=NEW)
    assert turn.token_values is not None
    marks, behind = 1, turn.parts.index("answer")
    places = {
        "answer_mean": range(behind, NEW),
        "thinking_mean": range(behind - marks),
        "response_mean": range(NEW),
    }[mean]
    (alert,) = alerts
    said = turn.token_values[:, 0]
    assert alert.token == (None if kind == "turn_mean" else places[0])
    wanted = said[list(places)].mean() if kind == "turn_mean" else said[places[0]]
    assert alert.value == pytest.approx(float(wanted), rel=1e-4)
    words = {
        "answer_mean": "(neutral answers, without the thinking before them: mean",
        "thinking_mean": "(the thinking before neutral answers: mean",
        "response_mean": "(neutral answers: mean",
    }
    assert words[mean] in described(alarms[0], Panel.of(known, LAYER).gauges[0])


def test_means_that_are_shown_beside_a_baseline_are_of_the_answer(closing: Backend) -> None:
    own = vectors(closing)
    turn = ConversationMonitor(closing, Panel.of(own, LAYER)).reply(ASKED, max_new_tokens=NEW)
    assert turn.token_values is not None
    bench = Workbench(closing, Shelf(closing, [own], (LAYER,)))
    messages = ({"role": "user", "content": ASKED},)
    answer = bench.answer(bench.plan(Asked(bench.encode(messages), NEW, messages=messages)))
    assert float(answer.means[0]) == pytest.approx(turn.readings[0].answered, rel=1e-4)
    assert turn.readings[0].answered == turn.readings[0].answer_mean != turn.readings[0].mean
    thinking = bench.answer(bench.plan(Asked(bench.encode(messages), 2, messages=messages)))
    assert torch.isnan(thinking.means).all()


def test_thinking_in_messages_that_are_observed_is_told_apart(closing: Backend) -> None:
    own = vectors(closing)
    messages = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": "Hm, why?\n</think>\n\nHi."}]
    (turn,) = ConversationMonitor(closing, Panel.of(own, LAYER)).observe(messages)
    assert turn.token_values is not None
    answer = [at for at, part in enumerate(turn.parts) if part == "answer"]
    assert turn.readings[0].answer_mean == pytest.approx(float(turn.token_values[answer, 0].mean()), rel=1e-5)
    found = monitor(closing, [messages], own, LAYER)
    assert found.summary["gauges"]["optimistic@1"]["mean"] == pytest.approx(turn.readings[0].answered, abs=1e-3)
    (plain,) = ConversationMonitor(closing, Panel.of(own, LAYER)).observe(
        [messages[0], {"role": "assistant", "content": "Hi."}]
    )
    assert plain.parts == ()
    assert plain.readings[0].answered == plain.readings[0].mean


def test_a_user_on_a_server_says_nothing_of_what_it_thinks(tmp_path: Path) -> None:
    with serving(respond=lambda body: completion("<think>They seem kind.</think>\n\nThank you.")) as loopback:
        server = CompletionServer(ServerSettings("big", loopback.url, attempts=1), CompletionCache(tmp_path))
        assert ServerUser(server).write([[{"role": "user", "content": "Hi"}]], [1]) == ["Thank you."]


def test_the_commands_say_it_once(tmp_path: Path) -> None:
    for each in (thinking_model(), FAMILIES["qwq"].tokenizer()):
        each.save_pretrained(tmp_path / "model")
    opened = open_backend("transformers", str(tmp_path / "model"), dtype="float32")
    file = vectors(opened).save(tmp_path / "vectors.safetensors")
    given = [str(tmp_path / "model"), str(file), "--layers", str(LAYER), "--dtype", "float32", "--max-new-tokens", "24"]
    people = Path(__file__).resolve().parents[2] / "persona_lens/data/users/coding.yaml"
    small = ["--users", str(people), "--conversations", "2", "--turns", "2", "--random-directions", "0"]
    for name, more in (("baseline", ["--questions", "0", "--neutral", "6"]), ("drift", small)):
        command = ["monitor", name, *given, *more, "--out", str(tmp_path / name)]
        done = CliRunner(env={"COLUMNS": "400"}).invoke(app, command)
        assert done.exit_code == 0, done.output
        assert done.stdout.count(SAID) == 1


def test_a_model_that_plays_the_users_of_itself_does_not_think_for_them(backend: Backend) -> None:
    at: Any = SimpleNamespace(backend=backend, chat=ChatFormat.from_tokenizer(backend.tokenizer, thinking=True))
    run: Any = SimpleNamespace(model="tiny", dry_run=False)
    user = UserOptions(user_model="tiny").open(at, run)
    assert isinstance(user, LocalUser)
    assert (at.chat.think, user.chat.think) == (True, False)
