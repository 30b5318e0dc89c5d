"""``persona-lens screen``: what a dataset would do to a model's character."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from persona_lens.cli import options
from persona_lens.cli.display import interval_text, print_table, say
from persona_lens.cli.options import judges
from persona_lens.cli.runner import Job, Run, Session
from persona_lens.cli.settings import Fields, Given, Option, argument
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.data.datasets import Dataset
    from persona_lens.screening import Screening


@dataclass(frozen=True)
class DataOptions:
    """What is read of the datasets.

    Attributes:
        also: Another dataset, to compare. Repeatable.
        reference: Clean rows, from which thresholds are taken. Repeatable.
        form: `messages`, `sharegpt`, `prompt-response`, `alpaca` or `preference`; None is what it looks like.
        split: Of a folder or a dataset of the hub.
        subset: Configuration of such a dataset.
        side: Of preference pairs: `chosen` or `rejected`.
        limit: Rows of each dataset at most.
        label: Labels, for ROC and AUC.
        by: Give means for each value.
    """

    also: Annotated[list[str] | None, Option(metavar="DATA")] = None
    reference: Annotated[list[str] | None, Option(metavar="DATA")] = None
    form: str | None = None
    split: str = "train"
    subset: str | None = None
    side: str | None = None
    limit: Annotated[int | None, Option(least=1)] = None
    label: Annotated[str | None, Option(metavar="COLUMN")] = None
    by: Annotated[str | None, Option(metavar="COLUMN")] = None

    def open(self, data: str, supplied: str | None) -> tuple[list[Dataset], list[Dataset]]:
        """The datasets, and the clean references; how each is read is said on standard error."""
        from persona_lens.data.datasets import open_dataset

        if supplied and (self.also or self.reference):
            raise PersonaLensError("--base FILE goes with one dataset; with --also or --reference take --base generate")
        read = partial(
            open_dataset,
            form=self.form,
            limit=self.limit,
            base=supplied,
            split=self.split,
            subset=self.subset,
            side=self.side,
        )
        screened = [read(name, label=self.label, by=self.by) for name in (data, *(self.also or ()))]
        references = [read(name) for name in self.reference or ()]
        for dataset in (*screened, *references):
            say(f"{dataset.name}: rows in the form {dataset.form}", err=True)
        return screened, references


DATA = "A JSONL, CSV or Parquet file, a folder, OWNER/NAME on the Hugging Face hub, or `demonstration:impolite`."
SETTINGS = Fields(
    "persona_lens.screening:ScreeningSettings",
    without=("base", "look_ahead"),
    base_share=Option(),
    temperature=Option("Of generated base responses; 0 is greedy."),
)
FLAGGING = Fields(
    "persona_lens.screening:Flagging",
    without=("undecided",),
    score=Option("Rank and flag by", shown="difference if every row has a base response, else raw"),
    random_directions=Option("With --label: directions that stand beside the traits."),
    judged=Option("With --judge: flagged rows of each trait at most, the largest first."),
    clean=Option("With --label: that of clean rows.", metavar="VALUE", shown="what is usual"),
)
UNDECIDED = Option(metavar="interval|none|RATE")


@dataclass(frozen=True)
class ScreenRun(Run):
    """How a screening is run.

    Attributes:
        judge: A second opinion on flagged rows: `openai:MODEL`, `local` or `local:MODEL`.
    """

    judge: str | None = None

    def check_judge(self) -> None:
        """Refuse a second opinion that is none."""
        if self.judge == judges.LIKELIHOOD:
            raise PersonaLensError(
                "the likelihood judge is the model itself; a second opinion is openai:MODEL or local:MODEL"
            )


def screen(
    run: Annotated[ScreenRun, Fields(out=Option(shown="runs/screen-DATA-MODEL"))],
    data: Annotated[str, argument("DATA", DATA)],
    traits: Annotated[options.TraitsRead, Fields(without=("allow_other_model",))],
    given: Annotated[Given, SETTINGS],
    flags: Annotated[Given, FLAGGING],
    reading: DataOptions,
    base: Annotated[str, Option(metavar="none|generate|FILE")] = "none",
    undecided: Annotated[str, UNDECIDED] = "interval",
) -> None:
    """Say what a dataset would do to the model's character, and sort its rows.

    Each row is projected on the traits' vectors; with base responses, as the difference to what the model itself would
    have said. The run folder gets the results of every row, rows that could not be read, a report, and, with
    --reference, the dataset split into kept, flagged and undecided rows.

    Example: `persona-lens screen smollm2-135m chats.jsonl runs/tuned-impolite --reference clean.jsonl`

    Args:
        base: The base model's own responses: `generate` has the model answer every prompt; a file has a column
            `response` (or lists, `responses`), rows in the order of DATA.
        undecided: Rows within the threshold's 95% interval; none; or rows up to a larger false-positive rate.
    """
    from persona_lens.monitoring import Panel
    from persona_lens.screening import BaseResponses, screening_work
    from persona_lens.screening import screen as run_screening

    supplied = None if base in ("none", "generate") else base
    settings = given.make(base=BaseResponses.SUPPLIED if supplied else BaseResponses(base))
    flagging = flags.make(undecided=_band(undecided))
    run.check_judge()
    datasets, references = reading.open(data, supplied)
    panel = Panel.of(*traits.open())

    def screened(at: Session) -> Screening:
        read = {"reference": references, "flagging": flagging}
        found = run_screening(at.backend, datasets, panel, settings, **read, **at.given)
        _say_course(found, at.kept)
        return found

    job = Job(
        screened,
        lambda found, _: _show(found.summary),
        lambda at: screening_work(at.backend, datasets, panel, settings, reference=references, chat=at.chat),
        traits={gauge.trait: gauge.vectors.trait_definition for gauge in panel.gauges},
        name=f"screen-{datasets[0].source.stem}",
        model=panel.gauges[0].vectors.model.model,
    )
    run.carry_out(job)


def _band(text: str) -> Any:
    from persona_lens.screening import Band

    if text in list(Band):
        return Band(text)
    try:
        return float(text)
    except ValueError:
        raise PersonaLensError(f"--undecided takes interval, none or a rate such as 0.1; got {text!r}") from None


def _say_course(found: Screening, folder: Path) -> None:
    """Say on standard error how fast it went, and what could not be read."""
    if found.scored:
        say(
            f"{counted(found.scored, 'row')}, {counted(found.tokens, 'token')} in {found.seconds:,.1f} s: "
            f"{found.scored / found.seconds:,.1f} rows and {found.tokens / found.seconds:,.0f} tokens a second",
            err=True,
        )
    for dataset in found.summary["datasets"]:
        if dataset["rejected"]:
            say(
                f"{dataset['name']}: {dataset['rejected']:,} of {dataset['rows']:,} rows could not be read"
                f"{f' ({tools:,} call tools)' if (tools := dataset['call_tools']) else ''}; "
                f"{folder / 'rejects.jsonl'} says which",
                err=True,
            )


def _show(summary: Any) -> None:
    from persona_lens.reports.screening import told

    for gauge in summary["gauges"]:
        known = [each["means"][gauge] for each in summary["datasets"] if each["means"]]
        against = "difference" if any(means["difference"] for means in known) else "prompt_difference"

        rows = [
            (
                name,
                f"{each['rows'] - each['rejected']:,}",
                *(interval_text(each["means"][gauge][quantity], "+.2f", "row") for quantity in ("raw", against)),
                f"{each['flagged'][gauge]:,}" if each.get("flagged") else "-",
            )
            for dataset in summary["datasets"]
            if dataset["means"]
            for name, each in _named(dataset)
        ]
        title = f"{gauge}: means [95% interval], in residual-stream units"
        print_table(title, ("dataset", "rows", "raw", against.replace("_", " "), "flagged"), rows)
    for line in told(summary):
        say(line)


def _named(dataset: Any) -> list[tuple[str, Any]]:
    """A dataset and its groups, as they are named in a table."""
    name = Path(dataset["name"]).name + (" (reference)" if dataset["reference"] else "")
    return [(name, dataset), *((f"- {group}", found) for group, found in dataset["groups"].items())]
