"""The long pieces of work that are killed and starved: each on tiny models, in a folder, in a second or less."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import torch

from persona_lens.analysis.bench import CapSettings
from persona_lens.analysis.capping import cap_axis
from persona_lens.analysis.dissection import DissectSettings, dissect
from persona_lens.analysis.method_effects import MethodSettings, compare_methods
from persona_lens.analysis.persistence import PersistSettings, persist
from persona_lens.backend import wrap_model
from persona_lens.data.datasets import open_dataset
from persona_lens.data.scripted import Scripted
from persona_lens.extraction import ExtractionSettings, extract, plan_requests
from persona_lens.extraction.axis import AxisSettings, persona_axis
from persona_lens.extraction.responses import generate_responses
from persona_lens.finetuning import finetune
from persona_lens.finetuning.outcomes import TreatmentSettings
from persona_lens.finetuning.shift import ShiftSettings, shift
from persona_lens.finetuning.study import FinetuneStudySettings, finetune_study
from persona_lens.judging.blind import AgreementError, Scored
from persona_lens.judging.scored import judge_scored
from persona_lens.models import Loaded
from persona_lens.models.server import CompletionCache, CompletionServer, ServerSettings
from persona_lens.monitoring import DriftSettings, StudySettings, drift, study
from persona_lens.reports.result import Result
from persona_lens.runs.settings import RolloutSettings
from persona_lens.screening import BaseResponses, Flagging, Quantity, ScreeningSettings, screen
from persona_lens.steering import ArmSettings, Steering, SweepSettings, TuneSettings, sweep, tune
from persona_lens.steering.baking import BakingError, bake
from persona_lens.steering.comparison import compare
from persona_lens.steering.crossing import CrossSettings, effects
from persona_lens.traits import load_role, load_trait
from persona_lens.vectors import PersonaVectors
from tests.analysis.dictionaries import dictionary
from tests.campaign.counts import Counts
from tests.finetuning.chats import conversations, loaded_model, small, vectors_of
from tests.models.server.loopback import listener, scores, serving
from tests.planted import PlantedBackend
from tests.reproduction.made import reproduced
from tests.screening import made
from tests.tiny import saved_model, tiny_model, tiny_tokenizer

Run = Callable[[Path], Any]
SMALL = RolloutSettings(12, batch_size=6)
TRAIT = load_trait("optimistic")


@cache
def planted() -> PlantedBackend:
    """A backend that takes no time."""
    return PlantedBackend(TRAIT)


@cache
def vectors() -> PersonaVectors:
    """The planted vector, with what the likelihood judge needs."""
    provenance = {
        "trait": TRAIT.model_dump(mode="json"),
        "judge": {"calibration": {"slope": 1.0, "intercept": 0.0}},
    }
    return PersonaVectors(TRAIT.name, planted().info, {"response_mean": planted().planted["response_mean"]}, provenance)


@cache
def inputs() -> Path:
    """A folder for what the runs read."""
    return Path(mkdtemp(prefix="campaign-"))


@cache
def loaded() -> Loaded:
    """A model that can be trained."""
    return loaded_model(inputs() / "base")


@cache
def listening() -> socket.socket:
    """Where the server of responses listens: of its address their cache is told."""
    return listener()


@cache
def tiny_vectors() -> PersonaVectors:
    """Random vectors of the tiny model."""
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    return PersonaVectors(TRAIT.name, made.backend().info, {"response_mean": rows}, dict(vectors().provenance))


def _extract(folder: Path) -> Result:
    return extract(planted(), TRAIT, folder, settings=ExtractionSettings(questions=2, paired=False, rollouts=SMALL))


def _sweep(folder: Path) -> Result:
    settings = SweepSettings((1,), (-1.0, 1.0), questions=3, random_directions=2, rollouts=SMALL)
    return sweep(planted(), vectors(), settings, folder=folder)


def _compare(folder: Path) -> Result:
    arms = {"up": Steering.parse(f"{TRAIT.name}@1:+1", vectors())}
    return compare(planted(), arms, vectors(), ArmSettings((0, 1, 2), random_directions=2, rollouts=SMALL),
                      folder=folder)  # fmt: skip


def _effects(folder: Path) -> Result:
    arms = {TRAIT.name: Steering.parse(f"{TRAIT.name}@1:+1", tiny_vectors())}
    settings = CrossSettings(questions=2, random_directions=1, rollouts=RolloutSettings(4, batch_size=4))
    return effects(made.backend(), arms, {TRAIT.name: tiny_vectors()}, settings, folder=folder)


def _persist(folder: Path) -> Result:
    users = [Scripted(name, "tea", ("Hi", "Tea?")) for name in ("ann", "bob")]
    settings = PersistSettings(2, 2, ("all", "clean", "floor"), 1, 2.0, known_questions=1, last=1,
                               rollouts=RolloutSettings(4, batch_size=4))  # fmt: skip
    return persist(made.backend(), {TRAIT.name: tiny_vectors()}, settings, users=users, folder=folder)


def _methods(folder: Path) -> Result:
    first = tiny_vectors()
    made_by = {"one": first, "two": replace(first, directions={"response_mean": first.rows().flip(1)})}
    asked = ArmSettings((0, 1), random_directions=1, rollouts=RolloutSettings(4, batch_size=4))
    settings = MethodSettings(1, (0.5,), known_questions=1, asked=asked)
    return compare_methods(made.backend(), made_by, settings, folder=folder)


def _bench(folder: Path) -> Result:
    """The same of two traits."""
    first = tiny_vectors()
    other = load_trait("impolite")
    second = replace(first, trait=other.name, directions={"response_mean": first.rows().roll(1, dims=1)})
    both = [first, second.with_provenance(trait=other.model_dump(mode="json"))]
    asked = ArmSettings((0, 1), random_directions=1, rollouts=RolloutSettings(4, batch_size=4))
    settings = MethodSettings(1, (0.5,), known_questions=1, asked=asked)
    return compare_methods(made.backend(), {"one": both}, settings, folder=folder)


def _tune(folder: Path) -> Result:
    settings = TuneSettings((1,), strengths=(0.1, 0.2), search_questions=3, random_directions=1, rollouts=SMALL)
    return tune(Normed(TRAIT), vectors(), settings, folder=folder)


def _study(folder: Path) -> Result:
    return study(planted(), vectors(), StudySettings(questions=3, rollouts=SMALL), trait="optimistic", folder=folder)


def _drift(folder: Path) -> Result:
    people = [Scripted(f"{topic} {number}", topic, ("Oh well.", "Rain?", "And?")) for number in range(3)
              for topic in ("tea", "rain")]  # fmt: skip
    steering = {"up": Steering.parse(f"{TRAIT.name}@1:+1", tiny_vectors())}
    settings = DriftSettings(3, random_directions=3, permutations=2, rollouts=RolloutSettings(4, batch_size=4))
    return drift(made.backend(), tiny_vectors(), settings, layers=(0, 1), users=people, steerings=steering,
                 folder=folder, chat=made.chat())  # fmt: skip


def _axis(folder: Path) -> Result:
    roles = [load_role(name) for name in ("pirate", "ghost", "doctor", "void")]
    settings = AxisSettings(2, least=1, rollouts=RolloutSettings(4, batch_size=8))
    return persona_axis(
        made.backend(), folder, roles=roles, settings=settings, chat=made.chat(), traits=[tiny_vectors()]
    )


def _cap(folder: Path) -> Result:
    axis = inputs() / "axis"
    _axis(axis)
    settings = CapSettings((50.0,), ((0, 1),), 4, 1, 1, 1, accept_loss=1.0, accept_surprise=100.0, limit=2,
                           rollouts=RolloutSettings(4, batch_size=8))  # fmt: skip
    return cap_axis(made.backend(), axis, folder, settings=settings, chat=made.chat())


def _screen(folder: Path) -> Result:
    data, clean = inputs() / "rows.jsonl", inputs() / "clean.jsonl"
    if not clean.exists():
        made.jsonl(data, [*made.pairs(30), {"oh": 1}])
        made.jsonl(clean, made.pairs(12, 4))
    settings = ScreeningSettings(
        base=BaseResponses.GENERATE, base_share=0.5, look_ahead=16, batch_tokens=400, max_new_tokens=4
    )
    flagging = Flagging(Quantity.RAW, 0.2)
    return screen(made.backend(), [open_dataset(data)], made.panel(), settings, folder=folder,
           reference=[open_dataset(clean)], flagging=flagging, chat=made.chat())  # fmt: skip


def _shift(folder: Path) -> Result:
    others = {
        name: partial(wrap_model, tiny_model(seed=seed), tiny_tokenizer()) for seed, name in ((1, "a/b"), (2, "a--b"))
    }
    asked = ArmSettings((0, 1), random_directions=0, rollouts=RolloutSettings(4))
    return shift(made.backend(), others, [tiny_vectors()], ShiftSettings(asked=asked), folder=folder)


def _finetune(folder: Path) -> Result:
    return finetune(loaded(), conversations(), folder, small(save_every=1, keep_checkpoints=2, max_steps=3))


def _dissect(folder: Path) -> Result:
    settings = DissectSettings(
        show=4, pursuit=4, steered=2, random_features=2, coefficient=2.0, questions=2, rollouts=SMALL
    )
    return dissect(planted(), vectors(), dictionary(model="planted"), settings, folder=folder)


def _judge(folder: Path) -> None:
    said = [Scored(f"id-{number}", "Why?", "w" * number, None, None, {}) for number in range(8)]
    try:
        judge_scored(made.LengthJudge(), said, folder / "judged.jsonl")
    except AgreementError as error:  # killed at the very end
        if "is there already" not in str(error):
            raise


def _responses(folder: Path) -> None:
    settings = RolloutSettings(12)
    requests = plan_requests(TRAIT, ExtractionSettings(questions=2, rollouts=settings))
    with serving(listening(), respond=scores) as loopback:
        server = CompletionServer(ServerSettings("tiny", loopback.url), CompletionCache(folder / "cache"))
        generate_responses(server, requests, settings, folder / "responses.jsonl")


def _bake(folder: Path) -> None:
    model = inputs() / "to-bake"
    if not model.exists():
        saved_model(model)
    try:
        bake(str(model), f"{TRAIT.name}@1:+1", folder / "baked", vectors=tiny_vectors(), device="cpu")
    except BakingError as error:  # killed at the very end
        if "exists already" not in str(error):
            raise


def _finetune_study(folder: Path) -> Result:
    own = vectors_of(loaded(), TRAIT.name)
    treatments = TreatmentSettings(f"{TRAIT.name}@1:+1", prompted=False, random=False)
    asked = ArmSettings((0,), random_directions=0, rollouts=RolloutSettings(4))
    settings = FinetuneStudySettings(treatments, 1, (1,), asked, dtype="float32")
    base = str(inputs() / "base")
    return finetune_study(base, conversations(2), own, settings, small(max_steps=1), folder=folder, device="cpu")


class Normed(PlantedBackend):
    """Also reads norms."""

    def _values(self, name: str, *more: Any) -> Any:
        if name == "response_norm":
            return torch.full((len(more[0]), 3), 10.0)
        return super()._values(name, *more)


TARGETS: dict[str, Run] = {
    "extract": _extract,
    "steer sweep": _sweep,
    "steer compare": _compare,
    "steer effects": _effects,
    "steer tune": _tune,
    "steer persist": _persist,
    "steer methods": _methods,
    "bench-steer": _bench,
    "monitor study": _study,
    "monitor drift": _drift,
    "axis": _axis,
    "axis cap": _cap,
    "screen": _screen,
    "shift": _shift,
    "finetune": _finetune,
    "finetune study": _finetune_study,
    "responses": _responses,
    "dissect": _dissect,
    "reproduce": reproduced,
    "judge score": _judge,
    "bake": _bake,
}


def contents(folder: Path) -> dict[str, bytes]:
    """What a run leaves: all files, but for the lock, the checkpoints, which hold clock times, and the cache.

    Several processes share a cache, so what one was writing when it was killed has a name of its own and stays there.
    """
    apart = {".lock", "checkpoints", "cache"}
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not set(path.parts) & apart)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def differing(found: dict[str, bytes], expected: dict[str, bytes]) -> Sequence[str]:
    """Names of the files that are not the same in both."""
    return [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]


def on_all(seed: int, total: int, attack: Callable[[str, Run, Path, int, random.Random, Counts], None]) -> Counts:
    """Make so many attacks on all targets in turn, or on some of them where there are fewer attacks than targets."""
    counts, chance = Counts(), random.Random(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork has none of its parent's others
    names = list(TARGETS) if total >= len(TARGETS) else chance.sample(list(TARGETS), total)
    try:
        with TemporaryDirectory() as scratch:
            for place, name in enumerate(names):
                share = total // len(names) + (place < total % len(names))
                attack(name, TARGETS[name], Path(scratch) / str(place), share, chance, counts)
    finally:
        torch.set_num_threads(threads)
    return counts
