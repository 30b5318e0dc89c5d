"""``persona-lens finetune``, ``finetune-study`` and ``shift``: training on conversations, and what that leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli import options
from persona_lens.cli.display import (
    interval_text,
    number,
    print_table,
    quiet_libraries,
    say,
    show_rows,
    showing_progress,
)
from persona_lens.cli.options import judges
from persona_lens.cli.runner import REPORT, Job, Run, deliver, show_work, write_report
from persona_lens.cli.settings import Fields, Given, Option, argument
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.finetuning import FinetuneConfig
    from persona_lens.finetuning.outcomes import TreatmentSettings
    from persona_lens.vectors import PersonaVectors


CONVERSATIONS = "Conversations in any form that `screen` reads, `demonstration:impolite` among them, or plain text."


@dataclass(frozen=True)
class Training:
    """What is trained on what, and where it is kept.

    Attributes:
        config: Settings as YAML; see `finetune --print-config`.
        held_out: Conversations whose loss is only measured.
        side: Of preference pairs: `chosen` or `rejected`.
    """

    model: options.Model
    data: Annotated[str, argument("DATA", CONVERSATIONS)]
    config: Annotated[Path | None, Option(metavar="FILE", shown="the paper's")] = None
    held_out: Annotated[str | None, Option(metavar="DATA")] = None
    side: str | None = None
    device: options.Device = "auto"
    out: options.Out = None
    dry_run: options.DryRun = False
    as_json: options.AsJson = False

    def folder(self, what: str) -> Path:
        """Where it is kept."""
        return self.out or options.run_folder(what, self.model)

    def taken(self) -> dict[str, Any]:
        """What verbs of the library that count work take by name."""
        return {"held_out": self.held_out or (), "side": self.side}

    def read(self) -> dict[str, Any]:
        """What those take that do it."""
        return {**self.taken(), "device": self.device}

    def settings(self, given: Mapping[str, Any], watched: Mapping[str, Any]) -> FinetuneConfig:
        """The configuration of the file with what was given on the command line in place of what it says."""
        from persona_lens.finetuning import make_config
        from persona_lens.finetuning.config import read_config

        fields = {**(read_config(self.config) if self.config else {}), **given}
        looks = {name: value for name, value in watched.items() if value is not None}
        if looks:
            own = fields.get("watch")
            fields["watch"] = {**(own if isinstance(own, dict) else {}), **looks}
        return make_config(fields, str(self.config) if self.config else "the settings")


CONFIG = Fields(
    "persona_lens.finetuning.config:FinetuneConfig",
    without=("lora", "watch"),
    optional=True,
    edits=Option(metavar="SPEC", shown=""),
    seed=Option(most=2**32 - 1),
    report_to=Option(values="`wandb` or `tensorboard`; repeatable"),
)


def _print_config(asked: bool) -> None:
    if asked:
        from persona_lens.finetuning import documented

        say(documented(), nl=False)
        raise typer.Exit


def finetune_command(
    training: Annotated[Training, Fields(out=Option(shown="runs/finetuned-METHOD-MODEL"))],
    given: Annotated[Given, CONFIG],
    vectors: Annotated[list[Path] | None, Option(metavar="PATH")] = None,
    watch_every: int | None = None,
    stop_above: float | None = None,
    print_config: Annotated[bool, Option(at_once=_print_config)] = False,
) -> None:
    """Finetune MODEL on DATA, with the loss on what the assistant says and the paper's settings as defaults.

    What is trained is a LoRA adapter in OUT/adapter, unless the configuration says `weights: full`. OUT can then stand
    for the model in every command. With `--method preventative` the edits act in training and are gone afterwards:
    pushed towards a trait while it learns, the model need not learn the trait.

    Example: `persona-lens finetune smollm2-135m data.jsonl --method preventative --edits impolite@9:+2
    --vectors runs/impolite-smollm2-135m`

    Example: `persona-lens finetune --print-config > finetune.yaml`

    Args:
        vectors: Run folder or file of vectors that --edits names, or that are watched. Repeatable.
        watch_every: Project held-out prompts every so many steps.
        stop_above: Stop when a watched projection has risen by this.
        print_config: Print all settings with their meaning.
    """
    from persona_lens.finetuning import finetune
    from persona_lens.finetuning.run import finetune_work

    chosen = training.settings(given.chosen(), {"every": watch_every, "stop_above": stop_above})
    loaded = [options.open_vectors(each) for each in vectors or ()]
    if loaded and chosen.method in ("plain",) and chosen.watch.every is None:
        raise PersonaLensError("--vectors are for --edits, --method prompted or --watch-every; none of them is given")
    folder = training.folder(f"finetuned-{chosen.method}")
    quiet_libraries()
    if training.dry_run:
        work = finetune_work(training.model, training.data, chosen, vectors=loaded, **training.taken())
        show_work(work, training.as_json, asked="steps and batches")
        return
    with showing_progress() as progress:
        found = finetune(
            training.model, training.data, folder, chosen, vectors=loaded, progress=progress, **training.read()
        )

    def show() -> None:
        summary, loss, counts = found.summary, found.summary["loss"], found.summary["data"]
        say(
            f"{summary['method']}: {counted(summary['steps'], 'step')} over {counted(counts['examples'], 'example')}, "
            f"{counted(counts['learned_tokens'], 'token')} to learn"
        )
        none = "no answer" if chosen.part == "answer" else "nothing to learn"
        lost = {"shortened": "cut at max_length", "dropped": f"left out: {none} in max_length"}
        options.say_notes([f"{counts[name]} {text}" for name, text in lost.items() if counts[name]])
        first, last, learned, unseen = (number(loss[name], ".3f") for name in ("first", "last", "learned", "unseen"))
        say(
            f"loss, nats a token: {first} at first, {last} in the last quarter; without edits {learned} on what was "
            f"learned, {unseen} on held-out data"
        )
        if summary["stopped"]:
            say(f"stopped: {summary['stopped']}")
        say(f"{summary['trained']}: {found.model}; take {folder} for the model")

    deliver({"folder": str(folder), **found.summary}, show, training.as_json)


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
        from persona_lens.finetuning.outcomes import TreatmentSettings

        left = [each.strip() for each in self.without.split(",")] if self.without else []
        if unknown := [each for each in left if each not in LEFT_OUT]:
            raise PersonaLensError(f"--without takes {', '.join(LEFT_OUT)}; got {unknown[0]!r}")
        tuned, layer, coefficient = vectors.tuned, self.layer, self.coefficient
        if tuned is not None:
            layer = tuned.layer if layer is None else layer
            coefficient = tuned.coefficient if coefficient is None else coefficient
        if layer is None or coefficient is None:
            raise PersonaLensError(
                f"no layer was tuned for the vectors of {vectors.trait!r}; give --layer and --coefficient"
            )
        made = TreatmentSettings.of(
            vectors, layer, coefficient, coefficient if self.increments is None else self.increments
        )
        gone: dict[str, Any] = {
            name.replace("-", "_"): False if name in ("prompted", "random") else None for name in left
        }
        return replace(made, penalty=self.penalty, **gone), layer


def finetune_study_command(
    training: Annotated[Training, Fields(out=Option(shown="runs/finetune-study-TRAIT-MODEL"))],
    vectors: options.Vectors,
    given: Annotated[Given, SETTINGS],
    treated: TreatmentOptions,
    judge: judges.JudgeName = judges.LIKELIHOOD,
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
    from persona_lens.finetuning.study import finetune_study, finetune_study_work
    from persona_lens.reports.finetuning import verdicts

    loaded = options.open_vectors(vectors)
    treatments, place = treated.open(loaded)
    settings = given.make(treatments=treatments, layer=place)
    chosen = training.settings({}, {})
    folder = training.folder(f"finetune-study-{loaded.trait}")
    quiet_libraries()
    if judge == judges.LIKELIHOOD:
        judging.refuse_useless(judge)
        scoring = None  # the study makes this one itself
    else:
        opening = options.ModelOptions(dtype=settings.dtype, device=training.device)
        scoring = judging.open(judge, loaded.trait_definition, opening)
    if training.dry_run:
        base, _ = options.Subject(training.model, opening=options.ModelOptions(device=training.device)).open()
        asked = (base, training.data, loaded, settings, chosen)
        work = finetune_study_work(training.model, *asked, judge=scoring, **training.taken())
        show_work(work, training.as_json, asked="steps and batches")
        return
    with judges.saying_spending(scoring), showing_progress() as progress:
        read = {**training.read(), "judge": scoring, "folder": folder, "progress": progress}
        found = finetune_study(training.model, training.data, loaded, settings, chosen, **read)
    write_report(folder / REPORT, found.report())
    summary = found.summary
    unknown = {"losses": {"last": None}, "change": "", "against_plain": "", "shift": None}
    arms = {"base": {**unknown, "score": {"mean": summary["base"]["score"]}}, **summary["treatments"]}

    def show() -> None:
        show_rows(
            f"{loaded.trait} after finetuning, {counted(len(settings.seeds), 'seed')} [95% interval]",
            [{"treatment": name, **arm} for name, arm in arms.items()],
            {
                "": "treatment",
                "score": ("score.mean", ".1f"),
                "change": "change",
                "beside plain": "against_plain",
                "loss": ("losses.last.mean", ".2f"),
                "shift": ("shift.mean", ".2f"),
            },
        )
        for sentence in verdicts(summary):
            say(sentence)
        say(f"report: {folder / REPORT}")

    deliver({"folder": str(folder), **summary}, show, training.as_json)


BASE = argument("BASE", "The model before finetuning; the vectors are its own.")
FINETUNED = argument("FINETUNED...", "Run folders of `finetune`, adapter folders (not merged), or whole models.")
QUESTIONS = Option("How many of each trait's 20 evaluation questions.")


def shift_command(
    run: Annotated[Run, Fields(model=BASE)],
    finetuned: Annotated[list[str], FINETUNED],
    vectors: options.Vectors,
    given: Annotated[
        Given, Fields("persona_lens.finetuning.shift:ShiftSettings", without=("question_set",), questions=QUESTIONS)
    ],
    more: Annotated[list[Path] | None, Option(names=("--with",), metavar="PATH")] = None,
) -> None:
    """Measure what finetuning has shifted: (mean h_fine - mean h_base) . v̂ at the last token of the evaluation prompts.

    Beside it stands how the trait score of the replies has changed, and over several finetuned models how the two go
    together.

    Example: `persona-lens shift smollm2-135m runs/finetuned-plain-smollm2-135m runs/impolite-smollm2-135m`

    Args:
        more: Vectors of further traits. Repeatable.
    """
    from persona_lens.finetuning.shift import shift, shift_work

    if run.opening.remote:
        raise PersonaLensError("shift runs on this machine: a server cannot be given finetuned models")
    loaded = list(options.open_by_trait([vectors, *(more or ())]).values())
    models = {name: partial(run.opening.open, model) for name, model in _names(finetuned).items()}
    settings = given.make(loaded[0].model.n_layers)
    job = Job(
        lambda at: shift(at.backend, models, loaded, settings, **at.given),
        lambda found, _: _show_shift(found.summary),
        lambda at: shift_work(at.backend, len(models), loaded, settings, **at.asked),
        traits={each.trait: each.trait_definition for each in loaded} if settings.scores else None,
    )
    run.carry_out(job)


def _names(finetuned: list[str]) -> dict[str, str]:
    """What each model is called: its folder's name where that is clear, else what was given."""
    short = [Path(model).resolve().name if Path(model).exists() else model for model in finetuned]
    names = short if len(set(short)) == len(short) and "base" not in short else finetuned
    if len(set(names)) < len(names) or "base" in names:
        raise PersonaLensError(f"give each finetuned model once, under another name than base: {', '.join(names)}")
    return dict(zip(names, finetuned, strict=True))


def _show_shift(summary: Mapping[str, Any]) -> None:
    from persona_lens.core.statistics import few

    layers = summary["layers"]
    for trait, found in summary["traits"].items():
        # The layer that was tuned, else the one where the first model has moved most.
        first = next(iter(found["models"].values()))["shift"]
        largest = max(range(len(first)), key=lambda at: abs(first[at]["mean"]))
        place = layers.index(found["layer"]) if found["layer"] is not None else largest
        rows = [("base", "", number(found["score"]["mean"], ".1f"), "")] if found["score"] else []
        for name, row in found["models"].items():
            score = number(row["score"] and row["score"]["mean"], ".1f")
            rows.append((name, interval_text(row["shift"][place], "+.2f"), score, interval_text(row["change"])))
        title = f"{trait}: shift at layer {layers[place]} in residual-stream units, trait score and its change"
        print_table(f"{title} [95% interval]", ("model", "shift", "score", "change"), rows)
        if found["correlations"] and (r := found["correlations"][place])["value"] is not None:
            over = few(r["n"], "model") or counted(r["n"], "model")
            say(f"{trait}: correlation of shift and change over {over}: {interval_text(r, '.2f', noun=None)}")
