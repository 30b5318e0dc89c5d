"""``persona-lens screen``: what a dataset would do to a model's character."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli import judges, options
from persona_lens.cli.display import say
from persona_lens.cli.effects import SeveralVectors
from persona_lens.cli.grouping import grouped
from persona_lens.cli.screened import finish
from persona_lens.core.errors import PersonaLensError

if TYPE_CHECKING:
    from persona_lens.data.datasets import Dataset
    from persona_lens.judging import Judge
    from persona_lens.monitoring import Panel
    from persona_lens.screening import Flagging


@dataclass(frozen=True)
class BaseOptions:
    """Where base responses come from."""

    base: Annotated[
        str,
        typer.Option(
            "--base",
            metavar="none|generate|FILE",
            help="The base model's own responses: `generate` has the model answer every prompt; a file has a "
            "column `response` (or lists, `responses`), rows in the order of DATA.",
        ),
    ] = "none"
    share: Annotated[
        float, typer.Option("--base-share", help="Share of the rows, drawn at random, that get a base response.")
    ] = 1.0
    samples: Annotated[
        int,
        typer.Option("--base-samples", help="Responses to a prompt; their mean holds less noise. Needs --temperature."),
    ] = 1
    temperature: Annotated[float, typer.Option("--temperature", help="Of generated base responses; 0 is greedy.")] = 0.0
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="Length limit of a generated base response.")
    ] = 128

    @property
    def supplied(self) -> str | None:
        """The file."""
        return None if self.base in ("none", "generate") else self.base

    def settings(self) -> dict[str, Any]:
        """The same, by the names that `ScreeningSettings` has for it."""
        from persona_lens.screening import BaseResponses

        return {
            "base": BaseResponses.SUPPLIED if self.supplied else BaseResponses(self.base),
            "base_share": self.share,
            "base_samples": self.samples,
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
        }


@dataclass(frozen=True)
class DataOptions:
    """What is read of the datasets."""

    also: Annotated[
        list[str] | None,
        typer.Option("--also", metavar="DATA", help="Another dataset, to compare. Repeatable.", show_default=False),
    ] = None
    reference: Annotated[
        list[str] | None,
        typer.Option(
            "--reference", metavar="DATA", help="Clean rows, from which thresholds are taken. Repeatable.",
            show_default=False,
        ),
    ] = None  # fmt: skip
    form: Annotated[
        str | None,
        typer.Option(
            "--form",
            help="`messages`, `sharegpt`, `prompt-response`, `alpaca` or `preference`.",
            show_default="what it looks like",
        ),
    ] = None
    split: Annotated[str, typer.Option("--split", help="Of a folder or a dataset of the hub.")] = "train"
    subset: Annotated[
        str | None, typer.Option("--subset", help="Configuration of such a dataset.", show_default=False)
    ] = None
    side: Annotated[
        str | None,
        typer.Option("--side", help="Of preference pairs: `chosen` or `rejected`.", show_default=False),
    ] = None
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Rows of each dataset at most.", show_default=False)
    ] = None
    label: Annotated[
        str | None, typer.Option("--label", metavar="COLUMN", help="Labels, for ROC and AUC.", show_default=False)
    ] = None
    by: Annotated[
        str | None, typer.Option("--by", metavar="COLUMN", help="Give means for each value.", show_default=False)
    ] = None

    def open(self, data: str, supplied: str | None) -> tuple[list[Dataset], list[Dataset]]:
        """The datasets, and the clean references; how each is read is said on standard error."""
        from persona_lens.data.datasets import open_dataset

        if supplied and (self.also or self.reference):
            raise PersonaLensError("--base FILE goes with one dataset; with --also or --reference take --base generate")
        found: list[list[Dataset]] = [[], []]
        for place, names in enumerate(([data, *(self.also or ())], self.reference or ())):
            for name in names:
                screened = place == 0
                dataset = open_dataset(
                    name,
                    form=self.form,
                    label=self.label if screened else None,
                    by=self.by if screened else None,
                    limit=self.limit,
                    base=supplied,
                    split=self.split,
                    subset=self.subset,
                    side=self.side,
                )
                say(f"{dataset.name}: rows in the form {dataset.form}", err=True)
                found[place].append(dataset)
        return found[0], found[1]


@dataclass(frozen=True)
class FlagOptions:
    """How rows are ranked and flagged."""

    score: Annotated[
        str | None,
        typer.Option(
            "--score",
            help="Rank and flag by `raw`, `difference` or `prompt_difference`.",
            show_default="difference if every row has a base response, else raw",
        ),
    ] = None
    false_positive_rate: Annotated[
        float, typer.Option("--false-positive-rate", help="Share of the reference rows that may be flagged.")
    ] = 0.05
    undecided: Annotated[
        str,
        typer.Option(
            "--undecided",
            metavar="interval|none|RATE",
            help="Rows within the threshold's 95% interval; none; or rows up to a larger false-positive rate.",
        ),
    ] = "interval"
    clean: Annotated[
        str | None,
        typer.Option(
            "--clean", metavar="VALUE", help="With --label: that of clean rows.", show_default="what is usual"
        ),
    ] = None
    random_directions: Annotated[
        int, typer.Option("--random-directions", help="With --label: directions that stand beside the traits.")
    ] = 20
    top_k: Annotated[int, typer.Option("--top-k", help="Rows shown at either end, for each trait.")] = 10

    def flagging(self, judged: int) -> Flagging:
        """The same as the library takes it."""
        from persona_lens.screening import Band, Flagging, Quantity

        if self.undecided in list(Band):
            band: Band | float = Band(self.undecided)
        else:
            try:
                band = float(self.undecided)
            except ValueError:
                raise PersonaLensError(
                    f"--undecided takes interval, none or a rate such as 0.1; got {self.undecided!r}"
                ) from None
        score = options.choice(Quantity, self.score, "--score") if self.score else None
        return Flagging(score, self.false_positive_rate, band, self.clean, self.random_directions, self.top_k, judged)


@grouped
def screen(
    model: options.Model,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A JSONL, CSV or Parquet file, a folder, OWNER/NAME on the Hugging Face hub, or "
            "`demonstration:impolite`.",
            show_default=False,
        ),
    ],
    vectors: SeveralVectors,
    layers: Annotated[
        str | None, typer.Option("--layers", help="`18`, `12,18` or `all`.", show_default="where each was tuned")
    ] = None,
    turns: Annotated[
        str, typer.Option("--turns", help="Answers of a conversation that count: `last` or `all`.")
    ] = "last",
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", help="Longer rows are rejected.", show_default="what the model takes"),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            "--judge",
            help="A second opinion on flagged rows: `openai:MODEL`, `local` or `local:MODEL`.",
            show_default=False,
        ),
    ] = None,
    judged: Annotated[
        int, typer.Option("--judged", help="With --judge: flagged rows of each trait at most, the largest first.")
    ] = 100,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray", metavar="ADDRESS", help="Spread over a Ray cluster; `local` starts one here.", show_default=False
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", help="With --ray.", show_default="one for each GPU or machine")
    ] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="Run folder; kept and resumed.", show_default="runs/screen-DATA-MODEL")
    ] = None,
    batch_size: options.BatchSize = 64,
    batch_tokens: Annotated[
        int | None,
        typer.Option("--batch-tokens", help="Tokens that run at once.", show_default="what the device is fast at"),
    ] = None,
    seed: options.Seed = 0,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
    *,
    reading: DataOptions,
    base: BaseOptions,
    flags: FlagOptions,
    opening: options.ModelOptions,
    judging: judges.JudgeOptions,
) -> None:
    """Say what a dataset would do to the model's character, and sort its rows.

    Each row is projected on the traits' vectors; with base responses, as the difference to what the model itself would
    have said. The run folder gets the results of every row, rows that could not be read, a report, and, with
    --reference, the dataset split into kept, flagged and undecided rows.

    Example: `persona-lens screen smollm2-135m chats.jsonl runs/tuned-impolite --reference clean.jsonl`
    """
    from persona_lens.cli.display import showing_progress
    from persona_lens.monitoring import Panel
    from persona_lens.screening import KnownModel, ScreeningSettings, Turns, screening_work
    from persona_lens.screening import screen as run_screening
    from persona_lens.vectors import load_vectors

    settings = ScreeningSettings(
        options.choice(Turns, turns, "--turns"),
        max_tokens=max_tokens,
        batch_tokens=batch_tokens,
        batch_size=batch_size,
        seed=seed,
        **base.settings(),
    )
    flagging = flags.flagging(judged)
    if workers and ray is None:
        raise PersonaLensError("--workers is for --ray; give an address, or `--ray local`")
    datasets, references = reading.open(data, base.supplied)
    loaded = [load_vectors(path) for path in vectors]
    panel = Panel.of(loaded, options.layer_numbers(layers, loaded[0].model.n_layers) if layers else None)
    opened = opening.open(model, offline=dry_run)
    chat = opening.chat(opened)
    work = partial(screening_work, opened, datasets, panel, settings, reference=references, chat=chat)
    if options.planned(work, opening, dry_run, as_json):
        return
    del work  # which holds the model
    asked = _judges(judge, panel, opened, chat, opening, judging)
    crew = _crew(ray, workers, model, opening)
    if ray is not None:
        opened = KnownModel.of(opened)
    folder = out or options.run_folder(f"screen-{datasets[0].source.stem}", loaded[0].model.model)
    first = next(iter((asked or {}).values()), None)
    with judges.saying_spending(first), showing_progress() as progress:
        found = run_screening(
            opened,
            datasets,
            panel,
            settings,
            folder=folder,
            reference=references,
            flagging=flagging,
            judges=asked,
            chat=chat,
            crew=crew,
            progress=progress,
        )
    options.say_traffic(opened)
    finish(found, folder, as_json)


def _judges(
    judge: str | None, panel: Panel, opened: Any, chat: Any, opening: options.ModelOptions, judging: judges.JudgeOptions
) -> dict[str, Judge] | None:

    if judge is None:
        judging.refuse_useless("none")
        return None
    traits = {gauge.trait: gauge.vectors.trait_definition for gauge in panel.gauges}
    found = judging.open_each(judge, traits, opened, chat, opening.dtype, opening.device)
    if found is None:
        raise PersonaLensError(
            "the likelihood judge is the model itself; a second opinion is openai:MODEL or local:MODEL"
        )
    return found


def _crew(ray: str | None, workers: int, model: str, opening: options.ModelOptions) -> Any:
    from persona_lens.screening import OneProcess, OpenedBy, RayCrew

    if ray is None:
        return OneProcess()
    if opening.remote:
        raise PersonaLensError("--ray spreads a model over processes; with --remote it runs on a server already")
    given = {
        "dtype": opening.dtype,
        "device": opening.device,
        "device_map": opening.device_map,
        "revision": opening.revision,
        "trust_remote_code": opening.trust_remote_code or None,
    }
    template = opening.chat_template.read_text(encoding="utf-8") if opening.chat_template else None
    kept = {name: value for name, value in given.items() if value is not None}
    return RayCrew(ray, OpenedBy(model, opening.backend, kept, template, opening.thinking), workers)
