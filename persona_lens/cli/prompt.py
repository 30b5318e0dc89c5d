"""``persona-lens monitor prompt``: what replies to a prompt will be like, before there are any."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli import options
from persona_lens.cli.display import say, say_json
from persona_lens.cli.grouping import grouped
from persona_lens.cli.sweep import AllowOtherModel
from persona_lens.core.errors import PersonaLensError

if TYPE_CHECKING:
    from persona_lens.backend import Backend
    from persona_lens.models import ChatFormat
    from persona_lens.monitoring import MonitorCalibration, Threshold
    from persona_lens.vectors import PersonaVectors

SHOWN = 60


@grouped
def prompt_command(
    model: options.Model,
    vectors: Annotated[
        list[str],
        typer.Argument(
            metavar='VECTORS... "TEXT"',
            help="Vectors of one trait or more (files, or run folders), and then the user's message, unless --file.",
            show_default=False,
        ),
    ],
    system: Annotated[
        str | None, typer.Option("--system", help="System prompt before the message.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            metavar="FILE",
            help="Conversations (OpenAI messages or ShareGPT as JSONL, or plain text) that end with the user.",
            show_default=False,
        ),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option("--layer", help="Block index, 0-based.", show_default="as calibrated, or as tuned"),
    ] = None,
    false_alarm_rate: Annotated[
        float | None,
        typer.Option("--false-alarm-rate", help="Say which prompts raise an alarm at this rate.", show_default=False),
    ] = None,
    reduction: Annotated[
        str | None,
        typer.Option("--reduction", help="Which of the vectors.", show_default="as calibrated, or response_mean"),
    ] = None,
    allow_other_model: AllowOtherModel = False,
    as_json: options.AsJson = False,
    *,
    opening: options.ModelOptions,
) -> None:
    """Project the last token of prompts on traits; nothing is generated.

    Where a study has calibrated the vectors (`monitor study`), the projection comes with the probability that a reply
    shows the trait, and `--false-alarm-rate` with a threshold.

    Example: `persona-lens monitor prompt smollm2-135m runs/study-optimistic-smollm2-135m "How will my exam go?"`
    """
    from persona_lens.monitoring import threshold_for
    from persona_lens.vectors import load_vectors

    paths, text = _split(vectors, file)
    if file is not None and system is not None:
        raise PersonaLensError("--system goes with a message; conversations in --file bring their own")
    loaded = [load_vectors(path) for path in paths]
    places = [_place(each, layer, reduction) for each in loaded]
    calibrations = [_calibration(each, *place) for each, place in zip(loaded, places, strict=True)]
    thresholds: list[Threshold | None] = [None] * len(loaded)
    if false_alarm_rate is not None:
        thresholds = [threshold_for(_needed(c, v), false_alarm_rate) for c, v in zip(calibrations, loaded, strict=True)]
    opened = opening.open(model)
    names, prompts = _prompts(opening.chat(opened), text, system, file)
    read = _read(opened, prompts, loaded, places, allow_other_model)
    found = [
        [
            _row(each.trait, place[0], value, calibration, threshold)
            for each, place, value, calibration, threshold in zip(
                loaded, places, values, calibrations, thresholds, strict=True
            )
        ]
        for values in read
    ]
    options.say_traffic(opened)
    if as_json:
        rows = [{"prompt": name, "traits": traits} for name, traits in zip(names, found, strict=True)]
        say_json({"prompts": rows})
    else:
        _show(names, found, false_alarm_rate)


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


def _place(vectors: PersonaVectors, layer: int | None, reduction: str | None) -> tuple[int, str]:
    """Where to read, and which of the vectors."""
    from persona_lens.monitoring import is_calibrated, monitor_calibration
    from persona_lens.vectors import DEFAULT_REDUCTION

    if is_calibrated(vectors):
        stored = monitor_calibration(vectors)
        return stored.layer if layer is None else layer, reduction or stored.reduction
    if layer is None and vectors.tuned is None:
        raise PersonaLensError(
            f"the vectors of {vectors.trait!r} are neither calibrated (`persona-lens monitor study`) nor tuned; name a "
            "layer with --layer"
        )
    tuned = vectors.tuned
    if layer is None and tuned is not None:
        return tuned.layer, reduction or tuned.reduction
    return layer or 0, reduction or DEFAULT_REDUCTION


def _calibration(vectors: PersonaVectors, layer: int, reduction: str) -> MonitorCalibration | None:
    """The calibration of that very place, if there is one."""
    from persona_lens.monitoring import monitor_calibration

    vectors.vector(layer, reduction)
    if (stored := vectors.monitor) is None or stored.reduction != reduction or layer not in stored.layers:
        return None
    return monitor_calibration(vectors, layer)


def _needed(calibration: MonitorCalibration | None, vectors: PersonaVectors) -> MonitorCalibration:
    if calibration is None:
        raise PersonaLensError(
            f"--false-alarm-rate needs a calibration, and the vectors of {vectors.trait!r} have none for this layer; "
            "make one with `persona-lens monitor study`, and use the vectors in its folder"
        )
    return calibration


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
    backend: Backend,
    prompts: list[list[int]],
    loaded: list[PersonaVectors],
    places: list[tuple[int, str]],
    allow_other_model: bool,
) -> list[list[float]]:
    """Each prompt's projection on each trait; one pass for all traits that use the same of their vectors."""
    from persona_lens.monitoring import prompt_projections

    layers = sorted({layer for layer, _ in places})
    found = [[0.0] * len(loaded) for _ in prompts]
    for reduction in dict.fromkeys(reduction for _, reduction in places):
        members = [number for number, (_, which) in enumerate(places) if which == reduction]
        read = prompt_projections(
            backend,
            prompts,
            [loaded[number] for number in members],
            layers,
            reduction=reduction,
            allow_other_model=allow_other_model,
        )
        for at, number in enumerate(members):
            for row, value in zip(found, read[:, at, layers.index(places[number][0])].tolist(), strict=True):
                row[number] = value
    return found


def _row(
    trait: str, layer: int, value: float, calibration: MonitorCalibration | None, threshold: Threshold | None
) -> dict[str, Any]:
    row: dict[str, Any] = {"trait": trait, "layer": layer, "projection": value}
    row["probability"] = calibration.probability(value) if calibration else None
    row["caveat"] = calibration.caveat if calibration else None
    if threshold is not None:
        row |= {"threshold": threshold.to_json(), "alarm": value >= threshold.value}
    return row


def _show(names: list[str], found: list[list[dict[str, Any]]], rate: float | None) -> None:

    from persona_lens.cli.display import print_table
    from persona_lens.core.text import printable

    title = "Where the last token of the prompt stands, and how likely a reply shows the trait"
    several = len(names) > 1
    alarms = () if rate is None else ("alarm from", "alarm")
    print_table(
        title if rate is None else f"{title}; alarms at a false-alarm rate of {100 * rate:g}%",
        (*(("prompt",) if several else ()), "trait", "projection", "probability", *alarms),
        [
            (
                *((_in_short(printable(" ".join(name.split()))),) if several else ()),
                f"{row['trait']}@{row['layer']}",
                f"{row['projection']:.3f}",
                "-" if row["probability"] is None else f"{row['probability']:.2f}",
                *(() if rate is None else (f"{row['threshold']['value']:.3f}", "ALARM" if row["alarm"] else "")),
            )
            for name, rows in zip(names, found, strict=True)
            for row in rows
        ],
    )
    for caveat in dict.fromkeys(row["caveat"] for rows in found for row in rows if row["caveat"]):
        say(f"note: {printable(caveat)}", err=True)


def _in_short(text: str) -> str:
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
