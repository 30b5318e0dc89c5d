"""The demonstration: one trait, one small model, from nothing to a report that shows the vector at work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from persona_lens.backend import Backend, backend_statuses, open_backend
from persona_lens.backend.parity import check_parity
from persona_lens.backend.registry import DEFAULT, installed_version
from persona_lens.core.files import REPORT
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.extraction import ExtractionSettings, extract
from persona_lens.extraction.experiment import by_question
from persona_lens.reports.kinds import page_of
from persona_lens.reports.result import Result, StoredResult
from persona_lens.runs import RunFolder
from persona_lens.runs.settings import RolloutSettings, settings_json
from persona_lens.steering import SweepRow, SweepSettings, choose_layer, curve, effect, sweep
from persona_lens.steering.arms import COHERENCE_MARGIN
from persona_lens.traits import Trait, load_trait

LIBRARIES = ("persona-lens", "torch", "transformers", "transformer-lens", "nnsight")
SHOWN_SAMPLES = 6
# Where in the depth of a model its layers are tried: persona vectors steer best around the middle and a little after.
DEPTHS = (0.4, 0.5, 0.6, 0.7)
# A model this small rambles at the paper's temperature of 1.
EXTRACTION = ExtractionSettings(questions=12, rollouts=RolloutSettings(max_new_tokens=40, temperature=0.6))


@dataclass(frozen=True)
class DemoSettings:
    """How large the demonstration is.

    Attributes:
        model: Model to run on.
        backend: What runs it.
        trait: Trait to extract.
        seed: Base of all seeds.
        extraction: Settings of the extraction.
        choice_questions: Extraction questions that the choice of the layer rests on.
        questions: Evaluation questions that the steering curve rests on.
        coefficients: Steering coefficients, besides 0.
        random_directions: Directions that the null is averaged over.
        quick: Whether it is the smaller one, which says so; the backends are not compared then.
    """

    model: str = "smollm2-135m"
    backend: str = DEFAULT
    trait: str = "optimistic"
    seed: int = 0
    extraction: ExtractionSettings = field(default_factory=lambda: EXTRACTION)
    choice_questions: int = 4
    questions: int = 16
    coefficients: tuple[float, ...] = (-2.0, -1.0, 1.0, 2.0)
    random_directions: int = 5
    quick: bool = False

    @property
    def rollouts(self) -> RolloutSettings:
        """How steered responses are made: as those of the extraction."""
        return self.extraction.rollouts


QUICK = DemoSettings(
    extraction=replace(
        EXTRACTION, questions=4, judge_pairs=1, rollouts=replace(EXTRACTION.rollouts, max_new_tokens=32)
    ),
    choice_questions=2,
    questions=8,
    coefficients=(-2.0, 2.0),
    random_directions=2,
    quick=True,
)


def run_demo(
    folder: Path | str, settings: DemoSettings | None = None, progress: Progress = shown_progress
) -> StoredResult:
    """Extract, choose a layer, steer beside the null, compare the backends, and write ``report.html``.

    Args:
        folder: Where all results go; stopped and started again, it goes on where it was.
        settings: See `DemoSettings`.
        progress: Told how far the work is.
    """
    settings = settings or DemoSettings()
    root = Path(folder)
    trait = load_trait(settings.trait)
    backend = _opened(settings.backend, settings.model, progress)
    layers = tuple(sorted({int(depth * backend.info.n_layers) for depth in DEPTHS}))
    ends = (min(settings.coefficients), max(settings.coefficients))

    def steered(name: str, layers: Sequence[int], coefficients: Sequence[float], **which: Any) -> tuple[SweepRow, ...]:
        asked = SweepSettings(
            tuple(layers), tuple(coefficients), seed=settings.seed, rollouts=settings.rollouts, **which
        )
        return sweep(backend, extraction.vectors, asked, folder=root / name, name=name, progress=progress).answers

    with RunFolder(root, {"kind": "demo", "settings": settings_json(settings), "model": asdict(backend.info)}) as run:
        extraction_settings = replace(settings.extraction, seed=settings.seed)
        extraction = extract(backend, trait, root / "extraction", settings=extraction_settings, progress=progress)
        on = {"questions": settings.choice_questions, "question_set": "extraction", "random_directions": 0}
        choice = steered("layer-choice", layers, ends, **on)
        layer = choose_layer(choice)
        on = {"questions": settings.questions, "random_directions": settings.random_directions}
        rows = steered("steering", [layer], settings.coefficients, **on)
        summary = {
            "trait": {"name": trait.name, "description": trait.description, "content_hash": trait.content_hash()},
            "model": asdict(backend.info),
            "command": f"persona-lens demo{' --quick' * settings.quick} --out DIR --seed {settings.seed}",
            "quick": _quick(settings),
            "settings": settings_json(settings),
            "seed": settings.seed,
            "versions": {name: found for name in LIBRARIES if (found := installed_version(name))},
            "extraction": extraction.summary,
            "layer_choice": _choice_summary(choice, layer, settings),
            "steering": _steering_summary(rows, layer, settings),
            "samples": _samples(rows, trait, settings),
            "agreement": [] if settings.quick else _agreement(backend, settings, progress),
        }
        run.write_json("summary.json", summary)
        progress(0, 1, "report")
        run.write_bytes(REPORT, page_of("demo", summary, folder=str(root)).encode())
        progress(1, 1, "report")
    return Result.load(root)


def _choice_summary(rows: Sequence[SweepRow], chosen: int, settings: DemoSettings) -> dict[str, Any]:
    unsteered = by_question([row for row in rows if row.layer is None], "nll").values()
    layers = []
    for layer in sorted({row.layer for row in rows if row.layer is not None}):
        points = curve(rows, layer)
        nll = max(point.nll.mean for point in (points[0], points[-1]) if point.nll)
        layers.append({"layer": layer, "effect": effect(rows, layer).to_json(), "nll": nll})
    return {
        "question_set": "extraction",
        "questions": settings.choice_questions,
        "layers": layers,
        "unsteered_nll": sum(unsteered) / len(unsteered),
        "margin": COHERENCE_MARGIN,
        "chosen": chosen,
    }


def _steering_summary(rows: Sequence[SweepRow], layer: int, settings: DemoSettings) -> dict[str, Any]:
    kinds = ("vector", "random") if settings.random_directions else ("vector",)
    return {
        "layer": layer,
        "questions": settings.questions,
        "samples": 1,
        "curves": {kind: [point.to_json() for point in curve(rows, layer, kind)] for kind in kinds},
        "effect": effect(rows, layer).to_json(),
    }


def _samples(rows: Sequence[SweepRow], trait: Trait, settings: DemoSettings) -> list[dict[str, Any]]:
    """The first questions' responses, not the best ones."""
    shown = (min(settings.coefficients), 0.0, max(settings.coefficients))
    own = {(row.question, row.coefficient): row for row in rows if row.direction != "random"}
    return [
        {
            "question": trait.evaluation_questions[question],
            "responses": [
                {"coefficient": c, "score": own[question, c].score, "text": own[question, c].text} for c in shown
            ],
        }
        for question in range(min(SHOWN_SAMPLES, settings.questions))
    ]


def _agreement(backend: Backend, settings: DemoSettings, progress: Progress) -> list[dict[str, Any]]:
    """Every backend's numbers beside those of plain PyTorch hooks, in float32, where they must be the same."""
    statuses = [status for status in backend_statuses() if status.broken is None and status.name != DEFAULT]
    progress(0, len(statuses), "comparing backends")

    def opened(name: str) -> Backend:
        is_open = name == settings.backend and backend.info.dtype == "float32"
        return backend if is_open else _opened(name, settings.model, progress, dtype="float32")

    reference = opened(DEFAULT)
    found: list[dict[str, Any]] = []
    for done, status in enumerate(statuses, 1):
        if status.available:
            other = opened(status.name)
            checks = check_parity(other, reference, self_checks=False, progress=progress)
            found.append(
                {"backend": status.name, "version": other.info.backend, "checks": [each.to_json() for each in checks]}
            )
        else:
            found.append({"backend": status.name, "version": "", "missing": status.install})
        progress(done, len(statuses), "comparing backends")
    return found


def _opened(backend: str, model: str, progress: Progress, **options: Any) -> Backend:
    """A model opened through a backend, whose library may take its time to load."""
    label = " ".join((f"opening {model} through {backend}", *(f"in {value}" for value in options.values())))
    progress(0, 1, label)
    opened = open_backend(backend, model, **options)
    progress(1, 1, label)
    return opened


def _quick(settings: DemoSettings) -> str | None:
    """In what a quick demonstration is smaller, in words; None for the whole one."""
    if not settings.quick:
        return None
    whole = DemoSettings()
    return (
        f"{settings.extraction.questions} questions for the vector in place of {whole.extraction.questions}, "
        f"{settings.questions} for the curve in place of {whole.questions}, {settings.random_directions} random "
        f"directions in place of {whole.random_directions}, answers of at most {settings.rollouts.max_new_tokens} "
        f"tokens in place of {whole.rollouts.max_new_tokens}, judged by {settings.extraction.judge_pairs} of the "
        f"instruction pairs in place of {whole.extraction.judge_pairs}, and no comparison of backends"
    )
