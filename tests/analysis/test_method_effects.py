"""Methods compared on a model whose behaviour is planted: which direction does more is known beforehand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from persona_lens.analysis import AnalysisError
from persona_lens.analysis.known_questions import asked_of, known_questions, known_requests, right_answers
from persona_lens.analysis.method_effects import MethodEffects, MethodSettings, compare_methods, compare_methods_work
from persona_lens.backend import Backend, Edit, ForwardResult, Read, TokenBatch
from persona_lens.backend.tokens import TokenIds
from persona_lens.core.progress import no_progress
from persona_lens.extraction.experiment import Variant
from persona_lens.judging import Calibration
from persona_lens.models.chat import chat_format
from persona_lens.reports.catalogue import find_runs
from persona_lens.reports.methods import beside_prompting
from persona_lens.runs import RunError
from persona_lens.runs.settings import RolloutSettings
from persona_lens.steering import ArmSettings, Steering, SteeringError
from persona_lens.steering.tuning.settings import Towards
from persona_lens.traits import load_trait
from persona_lens.vectors import PersonaVectors, Tuned, VectorsError
from tests.backends.fixtures import backend_of
from tests.planted import LEANING, PlantedBackend
from tests.screening.made import LengthJudge
from tests.tiny import CHATML, D_MODEL, N_LAYERS, thinking_tokenizer, tiny_model, with_template

TRAIT = load_trait("optimistic")
LAYER, NORM = 1, 10.0
SETTINGS = MethodSettings(
    layer=LAYER,
    strengths=(0.2, 0.8),
    known_questions=6,
    asked=ArmSettings(tuple(range(8)), random_directions=3, rollouts=RolloutSettings(16, batch_size=50)),
)


class Knowing(PlantedBackend):
    """Residuals have a known length; a token of a right answer loses half a nat for each unit that a row is pushed by.

    Text surprises by a tenth of a nat a token more for each unit of its leaning. With ``spread`` each row leans
    otherwise by that standard deviation, by its seed and by what pushes it.
    """

    def __init__(self, spread: float = 0.0) -> None:
        super().__init__(TRAIT)
        self.spread = spread

    def leanings(self, prompts: Sequence[TokenIds], seeds: Sequence[int], edits: Sequence[Edit]) -> Tensor:
        total = super().leanings(prompts, seeds, edits)
        pushed = sum((torch.as_tensor(each.coefficient) * each.direction.sum() for each in edits), torch.zeros(1))
        keys = (pushed.expand(len(total)) * 1000).long().tolist()
        for row, (seed, key) in enumerate(zip(seeds, keys, strict=True)):
            generator = torch.Generator().manual_seed(seed + 7 * key)
            total[row] += self.spread * float(torch.randn(1, generator=generator))
        return total

    def forward(
        self, tokens: TokenBatch, edits: Sequence[Edit] = (), reads: Sequence[Read] = (), *, logprobs: bool = False
    ) -> ForwardResult:
        plain = super().forward(tokens, logprobs=logprobs).logprobs or ()
        pushed = super().leanings([()] * len(tokens), [0] * len(tokens), edits)
        return ForwardResult(
            logprobs=tuple(values - float(push.abs()) / 2 for values, push in zip(plain, pushed, strict=True))
        )

    def _logprobs(self, prompt: TokenIds, response: TokenIds) -> Tensor:
        said = LEANING.search(self.tokenizer.decode(list(response)))
        return super()._logprobs(prompt, response) - (0.1 * abs(float(said.group(1))) if said else 0.0)

    def _values(self, name: str, *more: Any) -> Tensor:
        return torch.full((len(more[0]), N_LAYERS), NORM) if name == "response_norm" else super()._values(name, *more)


def vectors(backend: Backend, rows: Tensor, trait: str = "optimistic") -> PersonaVectors:
    provenance = {
        "trait": load_trait(trait).model_dump(mode="json"),
        "judge": {"calibration": Calibration(1.0, 0.0).to_json()},
    }
    return PersonaVectors(trait, backend.info, {"response_mean": rows}, provenance)


def planted(backend: PlantedBackend) -> dict[str, PersonaVectors]:
    """The planted direction, the same three times as long, and one that only half of is planted."""
    along = backend.planted["response_mean"]
    across = torch.randn(along.shape, generator=torch.Generator().manual_seed(3))
    across = across - (across * along).sum(1, keepdim=True) / (along * along).sum(1, keepdim=True) * along
    across = across / across.norm(dim=1, keepdim=True) * along.norm(dim=1, keepdim=True) * math.sqrt(3)
    ways = {"along": along, "longer": 3 * along, "half": along + across}
    return {name: vectors(backend, rows) for name, rows in ways.items()}


def compared(
    backend: PlantedBackend, settings: MethodSettings = SETTINGS, folder: Path | None = None, **how: Any
) -> MethodEffects:
    return compare_methods(backend, planted(backend), settings, folder=folder, progress=no_progress, **how)


def leaning(backend: PlantedBackend, strength: float, share: float = 1.0) -> float:
    """Of a step of that strength, of which a share is along the planted direction."""
    return share * strength * NORM / float(backend.planted["response_mean"][LAYER].norm())


def score(leaning: float) -> float:
    return 100 / (1 + math.exp(-leaning))


def told(found: MethodEffects, trait: str = "optimistic") -> dict[str, Any]:
    own: dict[str, Any] = found.summary["traits"][trait]
    return own


def steering_of(found: MethodEffects, name: str, strength: float) -> Steering:
    return found.steerings["optimistic"][name][strength]


def step(found: MethodEffects, name: str, strength: float) -> dict[str, Any]:
    steps = told(found)["methods"][name]["steps"]
    return next(each for each in steps if each["strength"] == strength)


def pair(found: MethodEffects, one: str, other: str, strength: float) -> dict[str, Any]:
    return next(
        each
        for each in told(found)["pairs"]
        if (each["one"], each["other"], each["strength"]) == (one, other, strength)
    )


@pytest.fixture(scope="module")
def backend() -> Knowing:
    return Knowing()


@pytest.fixture(scope="module")
def found(backend: Knowing, tmp_path_factory: pytest.TempPathFactory) -> MethodEffects:
    return compared(backend, folder=tmp_path_factory.mktemp("methods") / "run")


@pytest.mark.parametrize("strength", [0.2, 0.8])
@pytest.mark.parametrize(("name", "share"), [("along", 1.0), ("longer", 1.0), ("half", 0.5)])
def test_steps_of_one_strength_are_equally_long(
    backend: Knowing, found: MethodEffects, name: str, share: float, strength: float
) -> None:
    measured, pushed = step(found, name, strength), leaning(backend, strength, share)
    (edit,) = steering_of(found, name, strength).edits()
    assert float(edit.direction.norm()) * float(edit.coefficient) == pytest.approx(strength * NORM, rel=1e-3)
    assert measured["coefficient"] == edit.coefficient
    assert measured["means"]["score"]["mean"] == pytest.approx(score(pushed), abs=0.05)
    assert measured["changes"]["score"]["vector"]["mean"] == pytest.approx(score(pushed) - 50, abs=0.05)
    assert measured["means"]["nll"]["mean"] == pytest.approx(2 + 0.1 * pushed, abs=0.01)
    assert measured["means"]["capability"]["mean"] == pytest.approx(math.exp(-2 - pushed / 2), abs=1e-4)
    assert measured["means"]["capability"]["n"] == 6
    assert measured["changes"]["capability"]["vector"]["mean"] < 0


def test_what_does_more_than_prompting_and_than_others_is_found(found: MethodEffects) -> None:
    assert beside_prompting(told(found)) == {
        0.2: {"more": [], "less": ["along", "longer", "half"], "untold": []},
        0.8: {"more": ["along", "longer"], "less": ["half"], "untold": []},
    }
    assert pair(found, "along", "half", 0.8)["better"] == {
        "score": "along", "nll": "half", "coherence": None, "capability": "half"}  # fmt: skip
    headline = found.headline
    assert headline.verdict == "clear"
    assert headline.title == "Along (at 0.8) and longer (at 0.8) do more than prompting"
    said = " ".join(headline.sentences)
    assert "At 0.8 along does more than half, by " in said
    assert "At 0.8 of the residual's length 3 of 3 methods clearly do something" in said
    assert "12 differences of scores were looked at: of those that are none, about one in twenty looks clear" in said
    assert "8 held-out questions" in found.verdict


def test_equal_ones_are_not_called_different(found: MethodEffects) -> None:
    same = pair(found, "along", "longer", 0.8)
    assert (same["score"]["mean"], same["nll"]["mean"]) == (0, 0)
    assert same["capability"]["mean"] == pytest.approx(0, abs=1e-7)
    assert (same["better"]["score"], same["better"]["nll"]) == (None, None)
    backend = Knowing(spread=0.7)
    ways = planted(backend)
    shaken = ways["along"].rows() + 1e-3 * torch.randn(N_LAYERS, D_MODEL, generator=torch.Generator().manual_seed(4))
    both = {"along": ways["along"], "shaken": vectors(backend, shaken), "half": ways["half"]}
    asked = replace(SETTINGS.asked, questions=tuple(range(20)))
    noisy = compare_methods(backend, both, replace(SETTINGS, asked=asked), progress=no_progress)
    same = pair(noisy, "along", "shaken", 0.8)
    assert same["score"]["low"] < 0 < same["score"]["high"]
    assert same["better"]["score"] is None
    assert pair(noisy, "along", "half", 0.8)["better"]["score"] == "along"


def test_better_needs_an_effect_clear_of_random_directions(backend: Knowing) -> None:
    """One that does nothing and one that does the opposite: they differ, and neither is better."""
    ways = planted(backend)
    across = ways["half"].rows() - ways["along"].rows()
    both = {"across": vectors(backend, across), "against": vectors(backend, -ways["along"].rows())}
    found = compare_methods(backend, both, SETTINGS, progress=no_progress)
    apart = pair(found, "across", "against", 0.8)
    assert apart["score"]["low"] > 0
    assert apart["better"]["score"] is None
    assert pair(found, "across", "prompted", 0.8)["better"]["score"] == "prompted"
    assert found.headline.title.startswith("No method clearly does more than prompting; across (at 0.2 and 0.8) and ")
    alone = compare_methods(backend, ways, _asked(random_directions=0), progress=no_progress)
    assert alone.headline.verdict == "no null"
    assert told(alone)["random"] == []
    assert pair(alone, "along", "half", 0.8)["better"]["score"] is None
    assert "any direction of that length might do the same" in " ".join(alone.headline.sentences)


def test_what_breaks_the_text_is_not_called_better(backend: Knowing) -> None:
    """A tenth of a nat for each unit of leaning comes to more than one nat at a strength of 8."""
    found = compared(backend, replace(SETTINGS, strengths=(0.8, 8.0)))
    held = {(name, s): step(found, name, s)["coherent"] for name in ("along", "half") for s in (0.8, 8.0)}
    assert held == {("along", 0.8): True, ("along", 8.0): False, ("half", 0.8): True, ("half", 8.0): True}
    assert pair(found, "along", "prompted", 8.0)["better"]["score"] == "along"
    assert found.headline.title == "Along (at 0.8), longer (at 0.8) and half (at 8) do more than prompting"
    assert "The text of along and longer falls apart there" in " ".join(found.headline.sentences)
    alone = compare_methods(
        backend, {"along": planted(backend)["along"]}, replace(SETTINGS, strengths=(8.0,)), progress=no_progress
    )
    assert (alone.headline.verdict, alone.headline.title) == (
        "unclear",
        "What does more than prompting breaks the text",
    )


def _asked(**changes: Any) -> MethodSettings:
    return replace(SETTINGS, asked=replace(SETTINGS.asked, **changes))


def test_prompting_and_random_directions_stand_beside(backend: Knowing, found: MethodEffects) -> None:
    prompted = told(found)["prompted"]
    assert prompted["system"] == TRAIT.system_prompt("positive", 2)  # type: ignore[arg-type]
    assert prompted["means"]["score"]["mean"] == pytest.approx(score(1), abs=0.05)
    assert prompted["means"]["capability"]["mean"] == pytest.approx(math.exp(-2), abs=1e-4)
    assert prompted["changes"]["score"]["random"] is None
    weak, strong = (each["means"] for each in told(found)["random"])
    nulls = [steering_of(found, "along", 0.8).null(seed)[0] for seed in range(3)]
    axis = backend.planted["response_mean"][LAYER]
    pushes = [float(torch.as_tensor(each.coefficient) * (each.direction @ axis) / (axis @ axis)) for each in nulls]
    expected = [score(pushes[number % 3]) for number in range(8)]
    assert strong["score"]["mean"] == pytest.approx(sum(expected) / 8, abs=0.05)
    known = [math.exp(-2 - abs(pushes[number % 3]) / 2) for number in range(6)]
    assert strong["capability"]["mean"] == pytest.approx(sum(known) / 6, abs=1e-4)
    for name in ("along", "longer", "half"):
        random = step(found, name, 0.8)["changes"]["score"]["random"]
        assert random["mean"] == pytest.approx(strong["score"]["mean"] - 50, abs=1e-6)
    assert weak != strong


def test_random_directions_are_made_once_for_all_methods(backend: Knowing, found: MethodEffects) -> None:
    assert found.folder is not None
    rows = (found.folder / "arms-rollouts.jsonl").read_text().splitlines()
    # Unsteered, prompted, three methods and random directions at two strengths.
    assert len(rows) == len(found.answers) == 8 * (2 + 2 * (3 + 1))
    assert len((found.folder / "capability.jsonl").read_text().splitlines()) == 6 * 10
    (run,) = find_runs(found.folder)
    assert (run.rows, run.planned, run.trait) == (88, 88, "optimistic")
    work = compare_methods_work(backend, planted(backend), SETTINGS)
    assert {each.label: each.rows for each in work} == {
        "unsteered rollouts": 8,
        "rollouts": 80,
        "judging optimistic": 80 * 11,
        "capability": 60,
    }
    assert len(compare_methods_work(backend, planted(backend), replace(SETTINGS, known_questions=0))) == 3


def test_less_of_a_trait_is_steered_to_and_asked_for(backend: Knowing) -> None:
    found = compared(backend, replace(SETTINGS, towards=Towards.LESS))
    assert told(found)["prompted"]["system"] == TRAIT.system_prompt("negative", 2)  # type: ignore[arg-type]
    assert step(found, "along", 0.8)["coefficient"] < 0
    assert pair(found, "along", "prompted", 0.8)["score"]["mean"] == pytest.approx(
        score(leaning(backend, 0.8)) - score(1), abs=0.1
    )
    assert beside_prompting(told(found))[0.8] == {"more": ["along", "longer"], "less": ["half"], "untold": []}
    assert found.headline.sentences[0].startswith("A system prompt that asks for less of optimistic changes the score")


def test_it_can_be_looked_at(found: MethodEffects) -> None:
    page = found.report()
    for text in ("along", "longer", "half", "prompted", "random directions", "Every two methods", found.headline.title):
        assert text in page
    assert found.figures == ("effects",)
    rows = page.split("What each does to optimistic")[2].split("</table>")[0].split("<tr>")
    clear = {
        row.split('<th scope="row">')[1].split("</th>")[0]: "<td>yes</td>\n" in row
        for row in rows
        if 'scope="row"' in row
    }
    assert (clear["unsteered"], clear["prompted"]) == (False, False)
    assert clear["along"]
    silent = compare_methods(
        Knowing(),
        planted(Knowing()),
        replace(SETTINGS, known_questions=0),
        judges={"optimistic": LengthJudge()},
        progress=no_progress,
    )
    assert silent.figures == ("changes",)
    assert "Right answers" not in silent.report()


@pytest.mark.parametrize("left", ["norms", "arms", "capability"])
def test_what_was_killed_goes_on_and_gives_the_same_bytes(
    backend: Knowing, found: MethodEffects, tmp_path: Path, left: str
) -> None:
    class Dying(Knowing):
        """Dies at its first piece of that kind of work."""

        def generate(self, prompts: Any, sampling: Any, edits: Any = (), reads: Any = ()) -> Any:
            if left == ("norms" if reads else "arms"):
                raise KeyboardInterrupt
            return super().generate(prompts, sampling, edits, reads)

        def forward(self, tokens: Any, edits: Any = (), reads: Any = (), *, logprobs: bool = False) -> Any:
            if left == "capability" and edits:
                raise KeyboardInterrupt
            return super().forward(tokens, edits, reads, logprobs=logprobs)

    with pytest.raises(KeyboardInterrupt):
        compared(Dying(), folder=tmp_path)
    again = compared(backend, folder=tmp_path)
    assert found.folder is not None
    assert files(tmp_path) == files(found.folder)
    assert again.summary == found.summary
    with pytest.raises(RunError, match=r"settings\.layer: 1 -> 2"):
        compared(backend, replace(SETTINGS, layer=2), tmp_path)


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != ".lock"}


def test_the_layer_is_the_one_that_was_tuned_or_else_in_the_middle(backend: Knowing) -> None:
    settings = replace(SETTINGS, layer=None, known_questions=0)
    ways = planted(backend)
    assert compared(backend, settings).summary["layer"] == 1
    tuned = {**ways, "half": ways["half"].with_tuned(Tuned(2, 1.5), {})}
    found = compare_methods(backend, tuned, settings, progress=no_progress)
    assert (found.summary["layer"], found.summary["tuned_for"]) == (2, ["half"])
    assert "was tuned for half, on some of these questions, which favours it" in found.report()
    other = {**tuned, "along": ways["along"].with_tuned(Tuned(0, 1.5), {})}
    with pytest.raises(AnalysisError, match="tuned to different layers, 0, 2; name one"):
        compare_methods(backend, other, settings, progress=no_progress)
    assert compare_methods(backend, other, SETTINGS, progress=no_progress).summary["layer"] == 1


def test_what_cannot_be_compared_is_refused_before_anything_runs(backend: Knowing, tmp_path: Path) -> None:
    ways = planted(backend)
    stranger = replace(ways["half"], model=replace(backend.info, weights="sha256:other"))
    gap = ways["half"].rows().clone()
    gap[LAYER] = 0

    def refused(methods: Any, settings: MethodSettings = SETTINGS) -> str:
        with pytest.raises((AnalysisError, VectorsError, SteeringError)) as failed:
            compare_methods(backend, methods, settings, folder=tmp_path / "run")
        assert not (tmp_path / "run").exists()
        return str(failed.value)

    assert "there are no methods to compare" in refused({})
    assert "'prompted'" in refused({"prompted": ways["half"]})
    assert "the method 'one' has two vectors of 'optimistic'" in refused({"one": list(ways.values())})
    assert "belong to another model" in refused({"one": ways["half"], "two": stranger})
    assert "layer 1 is zero" in refused({"one": ways["half"], "two": vectors(backend, gap)})
    assert "layer 3 does not exist" in refused(ways, replace(SETTINGS, layer=3))
    assert "no reduction 'prompt_mean'" in refused(ways, replace(SETTINGS, reduction="prompt_mean"))
    assert "has 20 for evaluation" in refused(ways, _asked(questions=(20,)))
    bare = {name: replace(each, provenance={"trait": each.provenance["trait"]}) for name, each in ways.items()}
    assert "calibration" in refused(bare)
    assert compare_methods(backend, {**bare, "half": ways["half"]}, SETTINGS, progress=no_progress).summary["pairs"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strengths": ()}, "strengths are step lengths in residual norms"),
        ({"strengths": (0.0, 0.4)}, "strengths are step lengths in residual norms"),
        ({"strengths": (10.0,)}, "strengths are step lengths in residual norms"),
        ({"strengths": (0.4, 0.40000001)}, "give each strength once"),
        ({"known_questions": -1}, "known_questions must be from 0 to 76"),
        ({"known_questions": 77}, "known_questions must be from 0 to 76"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        MethodSettings(**changes)


def tiny(adapter: str, room: int = 2048) -> Backend:
    model: Any = tiny_model()
    model.config.max_position_embeddings = room
    return backend_of(adapter, model)


def tiny_ways(backend: Backend) -> dict[str, PersonaVectors]:
    return {
        name: vectors(backend, torch.randn(N_LAYERS, D_MODEL, generator=torch.Generator().manual_seed(seed)))
        for seed, name in enumerate(("one", "two"))
    }


def test_known_questions_that_the_model_has_no_room_for_are_told() -> None:
    small = tiny("transformers", 300)
    settings = replace(SETTINGS, asked=replace(SETTINGS.asked, questions=(0,), rollouts=RolloutSettings(2)))
    with pytest.raises(AnalysisError, match="and the model takes 300; ask none"):
        compare_methods(small, tiny_ways(small), settings)


def test_right_answers_are_weighed_as_a_plain_pass_does() -> None:
    backend = tiny("transformers")
    ways, chat, asked = tiny_ways(backend), chat_format(backend), asked_of(0, 2, 0)
    settings = replace(SETTINGS, strengths=(0.5,), known_questions=2, asked=ArmSettings((0, 1), random_directions=2,
                       rollouts=RolloutSettings(4)))  # fmt: skip
    found = compare_methods(backend, ways, settings, progress=no_progress)
    assert set(asked) <= set(known_questions())
    shown = [(each.question, each.answer) for each in asked[:4]]
    steering = steering_of(found, "two", 0.5)
    nulls = [steering_of(found, "one", 0.5).null(seed) for seed in range(2)]
    ways_of: dict[str, tuple[str | None, Sequence[tuple[Edit, ...]]]] = {
        "unsteered": (None, [(), ()]),
        "prompted": (told(found)["prompted"]["system"], [(), ()]),
        "two": (None, [steering.edits()] * 2),
        "random": (None, nulls),
    }
    for name, (system, edits) in ways_of.items():
        values = []
        for number, each in enumerate(asked[4:]):
            prompt, answer = chat.encode(system, each.question, shown), chat.encode_answer(each.answer)
            logprobs = backend.forward(TokenBatch.of([prompt], [answer]), edits[number], logprobs=True).logprobs
            assert logprobs is not None
            values.append(math.exp(float(logprobs[0].mean())))
        means = {
            "unsteered": told(found)["unsteered"]["means"],
            "prompted": told(found)["prompted"]["means"],
            "two": step(found, "two", 0.5)["means"],
            "random": told(found)["random"][0]["means"],
        }[name]
        assert means["capability"]["mean"] == pytest.approx(sum(values) / 2, rel=1e-3), name


def test_right_answers_stand_behind_the_thinking_that_a_prompt_ends_in() -> None:
    tokenizer = with_template(thinking_tokenizer(), CHATML.removesuffix("{% endif %}") + "<think>\n{% endif %}")
    backend = backend_of("transformers", tiny_model(thinks=True), tokenizer)
    requests, answers = known_requests([Variant({})], 2, 0)
    weighing = right_answers(backend, chat_format(backend), requests, answers, lambda _: (), "known")
    for passage, answer in zip(weighing.passages, answers, strict=True):
        assert str(tokenizer.decode(list(passage.ids))).endswith(f"assistant\n<think>\n</think>{answer}")


@pytest.mark.parametrize("adapter", ["transformer_lens", "nnsight"])
def test_other_backends_find_the_same(adapter: str) -> None:
    settings = replace(SETTINGS, strengths=(0.5,), known_questions=2, asked=ArmSettings((0, 1), random_directions=1,
                       rollouts=RolloutSettings(4, temperature=0.0)))  # fmt: skip

    def measured(name: str) -> MethodEffects:
        backend = tiny(name)
        return compare_methods(backend, tiny_ways(backend), settings, progress=no_progress)

    first, other = measured("transformers"), measured(adapter)
    assert [(row.arm, row.direction, row.text) for row in other.answers] == [
        (row.arm, row.direction, row.text) for row in first.answers
    ]
    for name in ("one", "two"):
        for measure in ("score", "nll", "capability"):
            values = [step(found, name, 0.5)["means"][measure]["mean"] for found in (first, other)]
            assert values[1] == pytest.approx(values[0], rel=1e-3), (name, measure)
    assert json.loads(json.dumps(first.summary)) == first.summary
