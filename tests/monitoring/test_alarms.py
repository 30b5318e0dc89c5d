"""Alarms that count from a model's own neutral replies, on a model whose tokens stand where the test says."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch

from persona_lens.backend import Edit, ForwardResult, Read, TokenBatch
from persona_lens.monitoring import (
    Alarm,
    AlarmKind,
    Alert,
    BaselineSettings,
    ConversationMonitor,
    MonitoringError,
    Panel,
    measure_baseline,
)
from persona_lens.monitoring.alarms import Scale, described
from persona_lens.monitoring.baseline import NEUTRAL
from persona_lens.runs import RunError
from persona_lens.runs.settings import RolloutSettings
from persona_lens.traits import load_trait
from persona_lens.vectors import PersonaVectors, VectorsError, load_vectors
from tests.planted import PlantedBackend
from tests.tiny import N_LAYERS

TRAIT = load_trait("optimistic")
STANDS = {"a": 8.0, "b": 10.0, "c": 12.0, "x": 40.0}
"""Where the token of each letter stands; all others stand at 5."""
REPLIES = ("abab", "bbcc", "abcb", "cbcb")
SETTINGS = BaselineSettings(questions=2, neutral=6, rollouts=RolloutSettings(max_new_tokens=8, temperature=0.5))


class Standing(PlantedBackend):
    """Answers with `REPLIES` in turn; a token's projection follows its letter, and is a tenth more at each layer."""

    def __init__(self, replies: Sequence[str] = REPLIES) -> None:
        said = cycle(replies)
        super().__init__(TRAIT, respond=lambda leaning: next(said))

    def forward(
        self, tokens: TokenBatch, edits: Sequence[Edit] = (), reads: Sequence[Read] = (), *, logprobs: bool = False
    ) -> ForwardResult:
        (read,) = reads
        assert read.layers is not None
        width = max(tokens.lengths)
        found = torch.full((len(tokens), len(read.layers), width, 1), torch.nan)
        for row, (prompt, response) in enumerate(zip(tokens.prompts, tokens.responses, strict=True)):
            ids = [*prompt, *response]
            stands = torch.tensor([STANDS.get(self.tokenizer.decode([each]), 5.0) for each in ids])
            for place, layer in enumerate(read.layers):
                found[row, place, width - len(ids) :, 0] = stands * (1 + layer / 10)
        return ForwardResult(reads={"projections": found})


def vectors_of(backend: PlantedBackend) -> PersonaVectors:
    provenance = {"trait": {"content_hash": TRAIT.content_hash(), **TRAIT.model_dump(mode="json")}}
    return PersonaVectors("optimistic", backend.info, dict(backend.planted), provenance)


def measured(**changes: Any) -> tuple[Standing, PersonaVectors]:
    backend = Standing()
    return backend, measure_baseline(backend, vectors_of(backend), replace(SETTINGS, **changes)).vectors


def heard(alarm: str, *said: str, kind: str = "token") -> list[Alert]:
    """What an alarm tells of replies."""
    backend, vectors = measured()
    alerts: list[Alert] = []
    alarms = [Alarm.parse(alarm, alerts.append, kind)]
    monitor = ConversationMonitor(backend, Panel.of(vectors, 0), alarms=alarms)
    turns = [({"role": "user", "content": "?"}, {"role": "assistant", "content": each}) for each in said]
    monitor.observe([message for turn in turns for message in turn])
    return alerts


def test_a_baseline_says_where_tokens_and_replies_stand_at_every_layer(tmp_path: Path) -> None:
    backend = Standing()
    found = measure_baseline(backend, vectors_of(backend), SETTINGS, folder=tmp_path)
    stored = load_vectors(tmp_path).baseline
    assert stored is not None
    assert stored == found.vectors.baseline
    assert (stored.replies, stored.tokens, stored.system, sorted(stored.layers)) == (8, 32, None, [0, 1, 2])
    values = [[STANDS[letter] for letter in each.response] for each in found.replies]
    assert sorted(each.response for each in found.replies) == sorted(REPLIES * 2)
    tokens = [value for each in values for value in each]
    for layer in range(N_LAYERS):
        at, scale = stored.layers[layer], 1 + layer / 10
        assert at.mean == pytest.approx(scale * fmean(tokens), abs=1e-3)
        assert at.sd == pytest.approx(scale * stdev(tokens), abs=1e-3)
        assert at.means == pytest.approx([scale * fmean(each) for each in values], abs=1e-3)
        assert at.highest == pytest.approx([scale * max(each) for each in values], abs=1e-3)
        assert at.lowest == pytest.approx([scale * min(each) for each in values], abs=1e-3)
        assert at.prompts == pytest.approx([scale * 5.0] * 8)
    asked = [each.request.question for each in found.replies]
    assert asked == [*NEUTRAL[:6], *TRAIT.evaluation_questions[:2]]
    assert json.loads((tmp_path / "summary.json").read_text())["replies"] == 8
    # It goes on where it was, and is another run with other settings.
    before = (tmp_path / "vectors.safetensors").read_bytes()
    measure_baseline(backend, vectors_of(backend), SETTINGS, folder=tmp_path)
    assert (tmp_path / "vectors.safetensors").read_bytes() == before
    with pytest.raises(RunError, match=r"settings\.neutral: 6 -> 5"):
        measure_baseline(backend, vectors_of(backend), replace(SETTINGS, neutral=5), folder=tmp_path)


def test_what_is_usual_for_the_model_raises_no_alarm_and_what_is_not_does() -> None:
    assert heard("optimistic>2sd", *REPLIES) == []
    assert [alert.token for alert in heard("optimistic>9", *REPLIES)] != [], "a fixed threshold below the usual sounds"
    (alert,) = heard("optimistic>2sd", "abxb")
    assert (alert.token, alert.value) == (2, 40.0)
    tokens = [STANDS[letter] for each in REPLIES for letter in each] * 2
    assert alert.sds == pytest.approx((40 - fmean(tokens)) / stdev(tokens), abs=1e-3)
    assert [each.token for each in heard("optimistic<-1sd", "cbab")] == [2]
    (plain,) = heard("optimistic>30", "abxb")
    assert plain.sds is None


def test_means_stray_less_than_tokens_and_a_short_mean_nearly_as_far() -> None:
    _, vectors = measured()
    (gauge,) = Panel.of(vectors, 0).gauges
    tokens = [STANDS[letter] for each in REPLIES for letter in each] * 2
    means = [fmean(STANDS[letter] for letter in each) for each in REPLIES] * 2
    by_kind = {kind: Scale.of(Alarm("optimistic", 2.0, print, kind=kind, in_sd=True), gauge) for kind in AlarmKind
               if kind is not AlarmKind.PROMPT_LAST}  # fmt: skip
    assert by_kind[AlarmKind.TOKEN].unit(1) == by_kind[AlarmKind.TOKEN].unit(99)
    assert by_kind[AlarmKind.TOKEN].unit(1) == pytest.approx(stdev(tokens), abs=1e-3)
    for kind in (AlarmKind.RUNNING_MEAN, AlarmKind.TURN_MEAN):
        scale = by_kind[kind]
        assert scale.unit(1) == pytest.approx(stdev(tokens), abs=1e-3)
        assert scale.unit(10**9) == pytest.approx(stdev(means), abs=1e-3)
        between = math.sqrt(stdev(means) ** 2 + (stdev(tokens) ** 2 - stdev(means) ** 2) / 4)
        assert scale.unit(4) == pytest.approx(between, abs=1e-3)
    # A usual first token is no alarm of the running mean, though a reply's mean that stood there would be.
    assert (12 - fmean(tokens)) / stdev(means) > 1.6
    assert heard("optimistic>1.6sd", "cbab", kind="running_mean") == []
    assert [each.token for each in heard("optimistic>1.6sd", "cccc", kind="running_mean")] == [2]
    assert [each.token for each in heard("optimistic>1.6sd", "cccc", kind="turn_mean")] == [None]


def test_how_often_neutral_replies_raise_an_alarm_is_said() -> None:
    _, vectors = measured()
    (gauge,) = Panel.of(vectors, 0).gauges
    said = described(Alarm.parse("optimistic>1sd", print), gauge)
    assert said.startswith("optimistic>1sd: above +11.66")
    assert said.endswith("6 of 8 of them have such a token")
    assert described(Alarm.parse("optimistic<-9sd", print, "turn_mean"), gauge).endswith(
        "0 of 8 of them have such a mean"
    )
    few = measured(questions=0, neutral=3)[1]
    assert "it rests on only 3 neutral answers" in described(
        Alarm.parse("optimistic>1sd", print), Panel.of(few, 0).gauges[0]
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("evil>3", Alarm("evil", 3.0, print)),
        (" evil@20 < -2.5 ", Alarm("evil", -2.5, print, 20, above=False)),
        ("evil>2sd", Alarm("evil", 2.0, print, in_sd=True)),
        ("evil>\N{MINUS SIGN}2.5", Alarm("evil", -2.5, print)),
        ("evil-er_1@0<-1e1 SD", Alarm("evil-er_1", -10.0, print, 0, above=False, in_sd=True)),
    ],
)
def test_an_alarm_is_written_in_one_line(text: str, expected: Alarm) -> None:
    assert Alarm.parse(text, print) == expected
    assert Alarm.parse(str(expected), print) == expected


@pytest.mark.parametrize(
    "text",
    [
        "evil",
        "evil>",
        "evil>1.2.3",
        "evil>2sds",
        "evil=3",
        ">3",
        "evil@x>3",
        "evil>3%",
        "evil>nan",
        "evil>inf",
        "evil>sd",
        "evil>+-2sd",
    ],
)
def test_what_is_no_alarm_is_told_the_forms_that_there_are(text: str) -> None:
    with pytest.raises(
        MonitoringError, match=r"written evil>3 \(in .*evil@20>3 .*evil>2sd .*monitor baseline.*; got '"
    ):
        Alarm.parse(text, print)


def test_without_a_baseline_it_is_said_what_to_run() -> None:
    backend, vectors = measured(layers=(0, 2))
    alarm = Alarm.parse("optimistic>2sd", print)
    bare = vectors_of(backend)
    for lacking, where in ((bare, ""), (vectors, " for response_mean at layer 1")):
        with pytest.raises(
            MonitoringError, match=rf"no such baseline{where}; measure it once with `persona-lens monitor"
        ):
            ConversationMonitor(backend, Panel.of(lacking, 1), alarms=[alarm])
    flat = Alarm("optimistic", 2.0, print, kind="prompt_last", in_sd=True)
    with pytest.raises(MonitoringError, match="all values are the same"):
        ConversationMonitor(backend, Panel.of(vectors, 0), alarms=[flat])
    damaged = bare.with_provenance(baseline={"layers": {"0": {"mean": 1.0}}})
    with pytest.raises(VectorsError, match=r"the baseline that the vectors of 'optimistic' .* damaged: .*measure it"):
        ConversationMonitor(backend, Panel.of(damaged, 0), alarms=[alarm])


def test_another_models_replies_are_not_counted_from() -> None:
    backend, vectors = measured()
    other = replace(vectors, model=replace(vectors.model, model="another", weights="0" * 16))
    alarms = [Alarm.parse("optimistic>2sd", print)]
    with pytest.raises(MonitoringError, match=r"optimistic>2sd counts from replies of the model .* another one"):
        ConversationMonitor(backend, Panel.of(other, 0), alarms=alarms, allow_other_model=True)
    in_units = [Alarm.parse("optimistic>2", print)]
    assert not ConversationMonitor(backend, Panel.of(other, 0), alarms=in_units, allow_other_model=True).turns


def test_a_text_is_no_alarm() -> None:
    backend, vectors = measured()
    with pytest.raises(MonitoringError, match=r"Alarm\.parse"):
        ConversationMonitor(backend, Panel.of(vectors, 0), alarms=["optimistic>2"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions": 1, "neutral": 0}, "needs at least 2 questions"),
        ({"neutral": 21}, "neutral 0 to 20"),
        ({"questions": 99}, "99 questions asked for"),
        ({"layers": ()}, "layers must be given"),
    ],
)
def test_what_cannot_be_a_baseline(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MonitoringError, match=message):
        measured(**changes)


def test_empty_replies_are_no_baseline(tmp_path: Path) -> None:
    backend = Standing([""])
    with pytest.raises(MonitoringError, match="0 answers with any text"):
        measure_baseline(backend, vectors_of(backend), SETTINGS)
