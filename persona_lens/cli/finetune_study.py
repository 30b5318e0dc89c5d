"""``persona-lens finetune-study``: ways to finetune, side by side over seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from persona_lens.cli import judges, options
from persona_lens.cli.display import quiet_libraries, say, show_rows, showing_progress
from persona_lens.cli.finetune import ConfigFile, Data, HeldOut, Side, open_config
from persona_lens.cli.runner import REPORT, deliver, write_report
from persona_lens.cli.settings import Fields, Given, Option
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.finetuning.outcomes import TreatmentSettings
    from persona_lens.finetuning.study import FinetuneStudySettings
    from persona_lens.vectors import PersonaVectors

LEFT_OUT = ("everywhere", "post-hoc", "caft", "regularised", "prompted", "random")
SETTINGS = Fields(
    "persona_lens.finetuning.study:FinetuneStudySettings",
    without=("treatments", "layer", "question_set"),
    questions=Option("How many of the 20 evaluation questions to ask."),
    samples=Option("Replies to each question."),
    seed=Option("Base of the replies' seeds."),
)


@dataclass(frozen=True)
class TreatmentOptions:
    """The ways to finetune.

    Attributes:
        layer: Layer of all treatments, from 0; None for the one tuned.
        coefficient: Multiple of the vector that preventative steering adds, and post-hoc steering takes away; None for
            the one tuned.
        increments: The same at all layers, by increments; None for the coefficient.
        penalty: Weight of the projection penalty.
        without: Leave out: everywhere, post-hoc, caft, regularised, prompted, random.
    """

    layer: int | None = None
    coefficient: float | None = None
    increments: float | None = None
    penalty: float = 1.0
    without: str | None = None

    def open(self, vectors: PersonaVectors) -> tuple[TreatmentSettings, int]:
        """The treatments, and their layer."""
        from dataclasses import replace

        from persona_lens.finetuning.outcomes import TreatmentSettings

        left = [each.strip() for each in self.without.split(",")] if self.without else []
        if unknown := [each for each in left if each not in LEFT_OUT]:
            raise PersonaLensError(f"--without takes {', '.join(LEFT_OUT)}; got {unknown[0]!r}")
        tuned, place, strength = vectors.tuned, self.layer, self.coefficient
        if tuned is None and (place is None or strength is None):
            raise PersonaLensError(
                f"no layer was tuned for the vectors of {vectors.trait!r}; give --layer and --coefficient"
            )
        if tuned is not None:
            place = tuned.layer if place is None else place
            strength = tuned.coefficient if strength is None else strength
        assert place is not None
        assert strength is not None
        made = TreatmentSettings.of(vectors, place, strength, strength if self.increments is None else self.increments)
        gone: dict[str, Any] = {
            name.replace("-", "_"): False if name in ("prompted", "random") else None for name in left
        }
        return replace(made, penalty=self.penalty, **gone), place


def finetune_study_command(
    model: options.Model,
    data: Data,
    vectors: options.Vectors,
    given: Annotated[Given, SETTINGS],
    treated: TreatmentOptions,
    config: ConfigFile = None,
    held_out: HeldOut = None,
    side: Side = None,
    out: Annotated[options.Out, Option(shown="runs/finetune-study-TRAIT-MODEL")] = None,
    device: options.Device = "auto",
    judge: judges.JudgeName = "likelihood",
    as_json: options.AsJson = False,
    *,
    judging: judges.JudgeOptions,
) -> None:
    """Finetune MODEL on DATA in several ways, each over several seeds, and compare what they leave.

    DATA should carry VECTORS' trait. Plain finetuning stands beside preventative steering (one layer, all layers, and
    random directions of equal norm), ablation in training (CAFT), a penalty on the projection, a system prompt in the
    training data, and post-hoc steering of the plainly finetuned model. The folder gets `report.html`.

    Example: `persona-lens finetune-study smollm2-135m impolite.jsonl runs/impolite-smollm2-135m --layer 9
    --coefficient 4`
    """
    from persona_lens import __version__
    from persona_lens.finetuning.study import finetune_study
    from persona_lens.reports.finetuning import render_finetuning
    from persona_lens.vectors import load_vectors

    loaded = load_vectors(vectors)
    treatments, place = treated.open(loaded)
    settings: FinetuneStudySettings = given.make(treatments=treatments, layer=place)
    chosen = open_config(config, {}, {})
    folder = out or options.run_folder(f"finetune-study-{loaded.trait}", model)
    quiet_libraries()
    judging.refuse_useless(judge)
    scoring = None
    if judge != judges.LIKELIHOOD:
        scoring = judging.open_alone(judge, loaded.trait_definition, settings.dtype, device)
    with judges.saying_spending(scoring), showing_progress() as progress:
        found = finetune_study(
            model,
            data,
            loaded,
            settings,
            chosen,
            folder=folder,
            held_out=held_out or (),
            side=side,
            judge=scoring,
            device=device,
            progress=progress,
        )
    write_report(folder / REPORT, render_finetuning(found.summary, __version__))
    deliver({"folder": str(folder), **found.summary}, lambda: _show(found.summary, folder), as_json)


def _show(summary: Any, folder: Path) -> None:
    from persona_lens.reports.finetuning import verdicts

    base = {"score": summary["base"]["score"], "change": "", "against_plain": "", "losses": {"last": ""}, "shift": ""}
    show_rows(
        f"{summary['trait']} after finetuning, {counted(len(summary['settings']['seeds']), 'seed')} [95% interval]",
        [("base", base), *summary["treatments"].items()],
        {
            "": lambda row: row[0],
            "score": (lambda row: _mean(row[1]["score"]), ".1f"),
            "change": lambda row: row[1]["change"],
            "beside plain": lambda row: row[1]["against_plain"],
            "loss": (lambda row: _mean(row[1]["losses"]["last"]), ".2f"),
            "shift": (lambda row: _mean(row[1]["shift"]), ".2f"),
        },
    )
    for sentence in verdicts(summary):
        say(sentence)
    say(f"report: {folder / REPORT}")


def _mean(found: Any) -> Any:
    return found["mean"] if isinstance(found, dict) else found
