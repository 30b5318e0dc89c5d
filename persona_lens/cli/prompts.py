"""``persona-lens monitor study`` and ``prompt``: what a prompt says of the replies to it, before there are any."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from persona_lens.cli import options
from persona_lens.cli.display import interval_text, say, show_rows
from persona_lens.cli.runner import Job, Run, Session, deliver, say_traffic
from persona_lens.cli.settings import Fields, Given, Option, argument, whole_numbers
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import counted, in_short

if TYPE_CHECKING:
    from persona_lens.backend import Backend
    from persona_lens.models import ChatFormat
    from persona_lens.monitoring import MonitorCalibration, Study, Threshold
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
    """
    from persona_lens.monitoring import Conditions, StudySettings, study, study_work
    from persona_lens.reports.study import render_study

    loaded = options.open_vectors(vectors)
    asked = options.open_trait(trait, traits_dir) if trait else loaded.trait_definition
    sampled: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "batch_size": batch_size}
    settings = given.make(
        loaded.model.n_layers,
        shots=whole_numbers(shots, "--shots") if shots is not None else StudySettings.shots,
        rollouts=replace(loaded.rollouts, **{name: each for name, each in sampled.items() if each is not None}),
    )
    prompts = settings.conditions is Conditions.PROMPTS
    if prompts and (shots is not None or examples is not None):
        raise PersonaLensError("--shots and --examples are for --conditions shots or both; this is 'prompts'")
    source = None if prompts else examples or (vectors if vectors.is_dir() else vectors.parent)
    job = Job(
        lambda at: study(at.backend, loaded, settings, trait=asked, examples=source, **at.given),
        _show_study,
        lambda at: study_work(at.backend, loaded, settings, trait=asked, examples=source, **at.asked),
        traits=asked,
        name=f"study-{loaded.trait}",
        model=loaded.model.model,
        page=render_study,
    )
    run.carry_out(job)


def _show_study(found: Study, _: Session) -> None:
    from persona_lens.reports.study import title, told

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
        show_rows(
            f"Correlation of projection and score [95% interval], {kind}: {counted(group['prompts'], 'prompt')}",
            _shown_layers(group["layers"], {summary["layer"], summary["tuned_layer"]}),
            {
                "layer": "layer",
                "Pearson": lambda row: _measured(row["pearson"]),
                "Spearman": lambda row: _measured(row["spearman"]),
                "within conditions": lambda row: _measured(row["within_pearson"]),
                "random directions": lambda row: _measured(row["null"]),
            },
        )
    for line in (title(summary), *told(summary)):
        say(line)


def _shown_layers(rows: list[dict[str, Any]], named: set[int | None]) -> list[dict[str, Any]]:
    """The five with the largest correlation, and those named, in their order."""
    best = sorted(rows, key=lambda row: -(row["pearson"]["value"] or -2))[:5]
    return [row for row in rows if row in best or row["layer"] in named]


def _measured(found: dict[str, Any] | None) -> str:
    return interval_text(found, ".2f", noun=None)


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
    reduction: Annotated[str | None, Option("Which of the vectors.", shown="as calibrated, or response_mean")] = None,
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
    paths, text = _split(vectors, file)
    if file is not None and system is not None:
        raise PersonaLensError("--system goes with a message; conversations in --file bring their own")
    loaded = [options.open_vectors(Path(path)) for path in paths]
    places = [_place(each, layer, reduction, false_alarm_rate) for each in loaded]
    opened, chat = subject.open()
    names, prompts = _prompts(chat, text, system, file)
    read = _read(opened, prompts, places, allow_other_model)
    found = [[place.row(value) for place, value in zip(places, values, strict=True)] for values in read]
    say_traffic(opened)
    rows = [{"prompt": name, "traits": traits} for name, traits in zip(names, found, strict=True)]
    deliver({"prompts": rows}, lambda: _show_prompt(rows, false_alarm_rate), subject.as_json)


@dataclass(frozen=True)
class _Place:
    """Where a trait is read, and what is known of values there."""

    vectors: PersonaVectors
    layer: int
    reduction: str
    calibration: MonitorCalibration | None
    threshold: Threshold | None

    def row(self, value: float) -> dict[str, Any]:
        """What is said of a value."""
        row: dict[str, Any] = {"trait": self.vectors.trait, "layer": self.layer, "projection": value}
        row["probability"] = self.calibration.probability(value) if self.calibration else None
        row["caveat"] = self.calibration.caveat if self.calibration else None
        if self.threshold is not None:
            row |= {"threshold": self.threshold.to_json(), "alarm": value >= self.threshold.value}
        return row


def _split(given: list[str], file: Path | None) -> tuple[list[str], str | None]:
    """Vectors, and the message behind them."""
    if file is not None:
        return given, None
    if len(given) < 2:
        raise PersonaLensError(
            "give vectors and then the user's message in quotes, or prompts with --file; for example "
            '`persona-lens monitor prompt MODEL VECTORS "How will my exam go?"`'
        )
    return given[:-1], given[-1]


def _place(vectors: PersonaVectors, layer: int | None, reduction: str | None, rate: float | None) -> _Place:
    """Where to read, which of the vectors, and what a study has found there, if one has."""
    from persona_lens.monitoring import monitor_calibration, threshold_for
    from persona_lens.vectors import DEFAULT_REDUCTION

    tuned = vectors.tuned
    if vectors.monitor is not None:
        stored = monitor_calibration(vectors)
        layer, reduction = stored.layer if layer is None else layer, reduction or stored.reduction
    elif layer is None and tuned is not None:
        layer, reduction = tuned.layer, reduction or tuned.reduction
    elif layer is None:
        raise PersonaLensError(
            f"the vectors of {vectors.trait!r} are neither calibrated (`persona-lens monitor study`) nor tuned; name a "
            "layer with --layer"
        )
    reduction = reduction or DEFAULT_REDUCTION
    vectors.vector(layer, reduction)
    known = (monitor := vectors.monitor) is not None and monitor.reduction == reduction and layer in monitor.layers
    calibration = monitor_calibration(vectors, layer) if known else None
    if rate is not None and calibration is None:
        raise PersonaLensError(
            f"--false-alarm-rate needs a calibration, and the vectors of {vectors.trait!r} have none for this layer; "
            "make one with `persona-lens monitor study`, and use the vectors in its folder"
        )
    threshold = threshold_for(calibration, rate) if rate is not None and calibration is not None else None
    return _Place(vectors, layer, reduction, calibration, threshold)


def _prompts(
    chat: ChatFormat, text: str | None, system: str | None, file: Path | None
) -> tuple[list[str], list[list[int]]]:
    """What the prompts are called, and their token ids."""
    from persona_lens.data.transcripts import BadTranscript, open_transcripts
    from persona_lens.models import ModelError

    if file is None:
        assert text is not None
        return [text], [chat.encode(system, text)]
    names, prompts = [], []
    for transcript in open_transcripts(file):
        if isinstance(transcript, BadTranscript):
            raise transcript.error
        last = transcript.messages[-1]
        if last["role"] != "user":
            raise PersonaLensError(f"{transcript.place}: the conversation must end with the user, not {last['role']!r}")
        try:
            prompts.append(chat.encode_messages(transcript.messages))
        except ModelError as error:
            raise PersonaLensError(f"{transcript.place}: {error}") from error
        names.append(last["content"])
    return names, prompts


def _read(
    backend: Backend, prompts: list[list[int]], places: list[_Place], allow_other_model: bool
) -> list[list[float]]:
    """Each prompt's projection on each trait; one pass for all traits that use the same of their vectors."""
    from persona_lens.monitoring import prompt_projections

    layers = sorted({place.layer for place in places})
    found = [[0.0] * len(places) for _ in prompts]
    for reduction in dict.fromkeys(place.reduction for place in places):
        members = [number for number, place in enumerate(places) if place.reduction == reduction]
        read = prompt_projections(
            backend,
            prompts,
            [places[number].vectors for number in members],
            layers,
            reduction=reduction,
            allow_other_model=allow_other_model,
        )
        for at, number in enumerate(members):
            for row, value in zip(found, read[:, at, layers.index(places[number].layer)].tolist(), strict=True):
                row[number] = value
    return found


def _show_prompt(prompts: list[dict[str, Any]], rate: float | None) -> None:
    title = "Where the last token of the prompt stands, and how likely a reply shows the trait"
    columns: dict[str, Any] = {"prompt": lambda row: in_short(row[0])} if len(prompts) > 1 else {}
    columns |= {
        "trait": lambda row: f"{row[1]['trait']}@{row[1]['layer']}",
        "projection": (lambda row: row[1]["projection"], ".3f"),
        "probability": (lambda row: row[1]["probability"], ".2f"),
    }
    if rate is not None:
        title += f"; alarms at a false-alarm rate of {100 * rate:g}%"
        columns["alarm from"] = (lambda row: row[1]["threshold"]["value"], ".3f")
        columns["alarm"] = lambda row: "ALARM" if row[1]["alarm"] else ""
    rows = [(each["prompt"], trait) for each in prompts for trait in each["traits"]]
    show_rows(title, rows, columns)
    options.say_notes(list(dict.fromkeys(trait["caveat"] for _, trait in rows if trait["caveat"])))
