"""``persona-lens monitor study``, ``baseline`` and ``prompt``: what is known of replies before there are any."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from persona_lens.cli import options
from persona_lens.cli.display import Column, interval_text, print_table, say, show_rows
from persona_lens.cli.runner import Job, Run, Session, deliver, say_traffic
from persona_lens.cli.settings import Fields, Given, Option, argument, whole_numbers
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import counted, in_short

if TYPE_CHECKING:
    from persona_lens.models import ChatFormat
    from persona_lens.monitoring import Baseline, Gauge, MonitorCalibration, Study, Threshold
    from persona_lens.vectors import PersonaVectors


def study_command(
    run: Annotated[Run, Fields(out=Option(shown="runs/study-TRAIT-MODEL"))],
    vectors: options.Vectors,
    given: Annotated[Given, Fields("persona_lens.monitoring:StudySettings", without=("shots", "rollouts"))],
    shots: Annotated[str | None, Option(shown="0,5,10,15,20")] = None,
    examples: Annotated[Path | None, Option(metavar="FOLDER")] = None,
    trait: str | None = None,
    traits_dir: options.TraitsDirs = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    thinking_budget: int | None = None,
    batch_size: options.BatchSize = 64,
) -> None:
    """Compare where prompts end on the vector with how strongly the replies to them show the trait.

    Held-out questions are answered under system prompts from holding the trait back to calling it forth. Correlations
    stand beside those of random directions. The folder gets the report, and `vectors.safetensors` with a calibration
    stored in it, for `monitor prompt` to use.

    Example: `persona-lens monitor study smollm2-135m runs/optimistic-smollm2-135m`

    Args:
        shots: The numbers of examples.
        examples: Extraction run whose best positive responses are the examples; by default where VECTORS is.
        trait: The trait's name or file, if not what is stored.
        max_new_tokens: Length limit of a response; None is as extracted.
        temperature: 0 is greedy; None is as extracted.
        thinking_budget: How many tokens the model may think before it has to answer; None is as extracted.
    """
    from persona_lens.extraction.experiment import Subject
    from persona_lens.monitoring import Conditions, StudySettings, plan_conditions, study, study_experiment

    loaded = options.open_vectors(vectors)
    asked = options.open_trait(trait, traits_dir) if trait else loaded.trait_definition
    settings = given.make(
        loaded.model.n_layers,
        shots=whole_numbers(shots, "--shots") if shots is not None else StudySettings.shots,
        rollouts=_rollouts(loaded, batch_size, max_new_tokens, temperature, thinking_budget),
    )
    prompts = settings.conditions is Conditions.PROMPTS
    if prompts and (shots is not None or examples is not None):
        raise PersonaLensError("--shots and --examples are for --conditions shots or both; this is 'prompts'")
    source = None if prompts else examples or (vectors if vectors.is_dir() else vectors.parent)
    job = Job(
        lambda at: study(at.backend, loaded, settings, trait=asked, examples=source, **at.given),
        _show_study,
        lambda at: study_experiment(
            Subject.of(at.backend, loaded, asked, planned=True, **at.asked),
            settings,
            plan_conditions(loaded, asked, settings, source),
        ).work(),
        traits=asked,
        name=f"study-{loaded.trait}",
        model=loaded.model.model,
    )
    run.carry_out(job)


CORRELATIONS = {
    "Pearson": "pearson",
    "Spearman": "spearman",
    "within conditions": "within_pearson",
    "random directions": "null",
}


def _show_study(found: Study, _: Session) -> None:
    from persona_lens.reports.study import told

    summary = found.summary
    show_rows(
        "Conditions: mean trait score of the replies, and mean projection of the prompts' last tokens",
        summary["conditions"],
        {
            "condition": "name",
            "responses": "responses",
            "score": ("mean_score", ".1f"),
            "show the trait": lambda each: None if each["shown"] is None else f"{100 * each['shown']:.0f}%",
            f"projection, layer {summary['layer']}": ("mean_projection", ".2f"),
        },
    )
    for kind, group in summary["groups"].items():
        best = sorted(group["layers"], key=lambda row: -(row["pearson"]["value"] or -2))[:5]
        named = (summary["layer"], summary["tuned_layer"])
        rows = [
            (str(row["layer"]), *(interval_text(row[name], ".2f", noun=None) for name in CORRELATIONS.values()))
            for row in group["layers"]
            if row in best or row["layer"] in named
        ]
        heading = f"Correlation of projection and score [95% interval], {kind}: {counted(group['prompts'], 'prompt')}"
        print_table(heading, ("layer", *CORRELATIONS), rows)
    for line in told(summary):
        say(line)


def baseline_command(
    run: Annotated[Run, Fields(without=("judge", "judging"), out=Option(shown="runs/baseline-TRAIT-MODEL"))],
    vectors: options.Vectors,
    given: Annotated[Given, Fields("persona_lens.monitoring:BaselineSettings", without=("rollouts",))],
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    thinking_budget: int | None = None,
    batch_size: options.BatchSize = 64,
) -> None:
    """Measure where the model's own neutral replies stand on a trait, for alarms such as `evil>2sd` to count from.

    The unsteered model answers everyday questions and some of the trait's held-out ones. The folder gets
    `vectors.safetensors` with the baseline stored in it, for `monitor chat` to use.

    Example: `persona-lens monitor baseline smollm2-135m runs/optimistic-smollm2-135m`

    Args:
        max_new_tokens: Length limit of a reply; None is as extracted.
        temperature: 0 is greedy; None is as extracted.
        thinking_budget: How many tokens the model may think before it has to answer; None is as extracted.
    """
    from persona_lens.monitoring import measure_baseline
    from persona_lens.monitoring.baseline import baseline_experiment

    loaded = options.open_vectors(vectors)
    rollouts = _rollouts(loaded, batch_size, max_new_tokens, temperature, thinking_budget)
    settings = given.make(loaded.model.n_layers, rollouts=rollouts)
    job = Job(
        lambda at: measure_baseline(at.backend, loaded, settings, **at.given),
        _show_baseline,
        lambda at: baseline_experiment(at.backend, loaded, settings, at.chat).work(),
        name=f"baseline-{loaded.trait}",
        model=loaded.model.model,
    )
    run.carry_out(job)


def _rollouts(
    vectors: PersonaVectors,
    batch_size: int,
    max_new_tokens: int | None,
    temperature: float | None,
    thinking_budget: int | None,
) -> Any:
    """How replies are made: as those that the vectors were extracted from, unless said otherwise."""
    said: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "thinking_budget": thinking_budget,
    }
    given = {name: each for name, each in said.items() if each is not None}
    return replace(vectors.rollouts, batch_size=batch_size, **given)


def _show_baseline(found: Baseline, at: Session) -> None:
    from statistics import fmean, stdev

    from persona_lens.core.statistics import few
    from persona_lens.reports.page import of_part

    stored = found.vectors.baseline
    assert stored is not None
    said, answers = few(stored.replies, "answer"), counted(stored.replies, "neutral answer")
    show_rows(
        f"{found.vectors.trait}: projections in {answers} of {stored.tokens:,} tokens",
        stored.layers.items(),
        {
            "layer": lambda row: row[0],
            "mean": (lambda row: row[1].mean, "+.2f"),
            "SD of tokens": (lambda row: row[1].sd, ".2f"),
            "SD of answers' means": (lambda row: stdev(row[1].means), ".2f"),
            "prompts' last tokens": (lambda row: fmean(row[1].prompts), "+.2f"),
            "their SD": (lambda row: stdev(row[1].prompts), ".2f"),
        },
    )
    for line in of_part(found.summary):
        say(line)
    options.say_notes([f"the baseline rests on {said}"] if said else [], "warning")
    say(f"vectors with the baseline stored: {at.kept / 'vectors.safetensors'}")


VECTORS = argument(
    'VECTORS... "TEXT"',
    "Vectors of one trait or more (files, or run folders), and then the user's message, unless --file.",
)


def prompt_command(
    subject: options.Subject,
    vectors: Annotated[list[str], VECTORS],
    system: Annotated[str | None, Option("System prompt before the message.")] = None,
    file: Annotated[Path | None, Option(metavar="FILE")] = None,
    layer: Annotated[int | None, Option("Block index, 0-based.", shown="as calibrated, or as tuned")] = None,
    false_alarm_rate: float | None = None,
    reduction: Annotated[
        str | None, Option("Which of the vectors.", shown="as calibrated, or the vectors' own")
    ] = None,
    allow_other_model: options.AllowOtherModel = False,
) -> None:
    """Project the last token of prompts on traits; nothing is generated.

    Where a study has calibrated the vectors (`monitor study`), the projection comes with the probability that a reply
    shows the trait, and `--false-alarm-rate` with a threshold.

    Example: `persona-lens monitor prompt smollm2-135m runs/study-optimistic-smollm2-135m "How will my exam go?"`

    Args:
        file: Conversations (OpenAI messages or ShareGPT as JSONL, or plain text) that end with the user.
        false_alarm_rate: Say which prompts raise an alarm at this rate.
    """
    from persona_lens.monitoring.scoring import gauge_projections

    if file is not None and system is not None:
        raise PersonaLensError("--system goes with a message; conversations in --file bring their own")
    if file is None and len(vectors) < 2:
        raise PersonaLensError(
            "give vectors and then the user's message in quotes, or prompts with --file; for example "
            '`persona-lens monitor prompt MODEL VECTORS "How will my exam go?"`'
        )
    paths = vectors if file is not None else vectors[:-1]
    places = [_place(options.open_vectors(Path(path)), layer, reduction, false_alarm_rate) for path in paths]
    opened, chat = subject.open()
    prompts = [(vectors[-1], chat.encode(system, vectors[-1]))] if file is None else list(_prompts(chat, file))
    asked, gauges = [ids for _, ids in prompts], [place.gauge for place in places]
    read = gauge_projections(opened, asked, gauges, allow_other_model=allow_other_model)
    say_traffic(opened)
    found = [[place.row(value) for place, value in zip(places, values, strict=True)] for values in read.tolist()]
    rows = [{"prompt": name, "traits": traits} for (name, _), traits in zip(prompts, found, strict=True)]
    deliver({"prompts": rows}, lambda: _show_prompt(rows, false_alarm_rate), subject.as_json)


@dataclass(frozen=True)
class _Place:
    """Where a trait is read, and what is known of values there."""

    gauge: Gauge
    calibration: MonitorCalibration | None
    threshold: Threshold | None

    def row(self, value: float) -> dict[str, Any]:
        """What is said of a value."""
        known = self.calibration
        row: dict[str, Any] = {"trait": self.gauge.trait, "layer": self.gauge.layer, "projection": value}
        row |= {"probability": known.probability(value) if known else None, "caveat": known.caveat if known else None}
        if self.threshold is not None:
            row |= {"threshold": self.threshold.to_json(), "alarm": value >= self.threshold.value}
        return row


def _place(vectors: PersonaVectors, layer: int | None, reduction: str | None, rate: float | None) -> _Place:
    """Where to read, which of the vectors, and what a study has found there, if one has."""
    from persona_lens.monitoring import Gauge, monitor_calibration, threshold_for

    if (stored := vectors.monitor) is not None:
        gauge = Gauge.of(vectors, stored.layer if layer is None else layer, reduction or stored.reduction)
    elif layer is None and vectors.tuned is None:
        raise PersonaLensError(
            f"the vectors of {vectors.trait!r} are neither calibrated (`persona-lens monitor study`) nor tuned; name a "
            "layer with --layer"
        )
    else:
        gauge = Gauge.of(vectors, layer, reduction)
    known = stored is not None and stored.reduction == gauge.reduction and gauge.layer in stored.layers
    calibration = monitor_calibration(vectors, gauge.layer) if known else None
    if rate is not None and calibration is None:
        raise PersonaLensError(
            f"--false-alarm-rate needs a calibration, and the vectors of {vectors.trait!r} have none for this layer; "
            "make one with `persona-lens monitor study`, and use the vectors in its folder"
        )
    threshold = threshold_for(calibration, rate) if rate is not None and calibration is not None else None
    return _Place(gauge, calibration, threshold)


def _prompts(chat: ChatFormat, file: Path) -> Iterator[tuple[str, list[int]]]:
    """The last message of each conversation of a file, and the conversation's token ids."""
    from persona_lens.data.transcripts import BadTranscript, open_transcripts
    from persona_lens.models import ModelError

    for transcript in open_transcripts(file):
        if isinstance(transcript, BadTranscript):
            raise transcript.error
        last = transcript.messages[-1]
        if last["role"] != "user":
            raise PersonaLensError(f"{transcript.place}: the conversation must end with the user, not {last['role']!r}")
        try:
            yield last["content"], chat.encode_messages(transcript.messages)
        except ModelError as error:
            raise PersonaLensError(f"{transcript.place}: {error}") from error


def _show_prompt(prompts: list[dict[str, Any]], rate: float | None) -> None:
    title = "Where the last token of the prompt stands, and how likely a reply shows the trait"
    columns: dict[str, Column[Any]] = {"prompt": lambda row: in_short(row["prompt"])} if len(prompts) > 1 else {}
    columns |= {
        "trait": lambda row: f"{row['trait']}@{row['layer']}",
        "projection": ("projection", ".3f"),
        "probability": ("probability", ".2f"),
    }
    if rate is not None:
        title += f"; alarms at a false-alarm rate of {100 * rate:g}%"
        columns |= {"alarm from": ("threshold.value", ".3f"), "alarm": lambda row: "ALARM" if row["alarm"] else ""}
    rows = [{"prompt": each["prompt"], **trait} for each in prompts for trait in each["traits"]]
    show_rows(title, rows, columns)
    options.say_notes(list(dict.fromkeys(row["caveat"] for row in rows if row["caveat"])))
