"""What each kind of run tells of itself: its headline, what that rests on, its figures, its page and its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from persona_lens.core.documents import DocumentError, parse_json, read_json
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.files import read_bytes
from persona_lens.core.plugins import install_command
from persona_lens.core.text import in_short
from persona_lens.reports import (
    axis,
    capping,
    diagnostics,
    dissection,
    drift,
    effects,
    finetuning,
    methods,
    persistence,
    readings,
    reproduction,
    screening,
    steering,
    study,
    svg,
    tuning,
    vector,
)
from persona_lens.reports.page import Headline, Steps, Tables, render

Summary = Mapping[str, Any]
Row = dict[str, Any]
SUMMARY = "summary.json"
_AGAIN = "the command that began the run makes it again"


@dataclass(frozen=True)
class Kind:
    """How a kind of run is told, from its ``summary.json`` and its folder alone.

    Attributes:
        headline: What it comes to.
        figures: What can be drawn, the main one first.
        rows: The rows in its folder.
        page: The report, given the version of persona-lens and the folder too; by default the headline, the figures and
            every number.
        after: What one may want to do next with its folder, for a page by default.
        tables: What stands in tables there; under those names of the summary it is not among the other numbers.
    """

    headline: Callable[[Summary], Headline]
    figures: Callable[[Summary], svg.Wanted]
    rows: Callable[[Path, Summary], Iterator[Row]]
    page: Callable[[Summary, str, str], str] | None = None
    after: Callable[[Summary, str], Steps] = lambda summary, folder: []
    tables: Mapping[str, Callable[[Summary], Tables]] = field(default_factory=dict)

    def rendered(self, name: str, summary: Summary, version: str, folder: str) -> str:
        """The page; ``name`` is the kind's."""
        if self.page is not None:
            return self.page(summary, version, folder)
        result, figures = self.headline(summary), self.figures(summary)
        drawn = {"figures": svg.drawn(figures), "names": {name: name.replace("_", " ") for name in figures}}
        apart = ("judge", "judges", *self.tables)
        numbers = {name: value for name, value in summary.items() if name not in apart}
        tables = [each for made in self.tables.values() for each in made(summary)]
        about = " and ".join(filter(None, [summary.get("trait"), summary.get("method")]))
        title = ": ".join(filter(None, [name.capitalize(), about]))
        judge = summary.get("judge")
        own = {"result": result, "judge": judge, "title": title, "next": self.after(summary, folder)}
        shown = {"numbers_of": numbers, "tables": tables, "version": version}
        return render("result.html.j2", {**own, **drawn, **shown})


# Files


def read_object(file: Path) -> Mapping[str, Any]:
    """The object in a JSON file of a run.

    Raises:
        DocumentError: If it cannot be read, or holds anything else.
    """
    found = read_json(file)
    if not isinstance(found, Mapping):
        raise DocumentError(f"{file} is damaged: it holds no object")
    return found


@contextmanager
def as_written(file: Path) -> Iterator[None]:
    """Whatever a file that somebody changed makes of the code that reads it, as an error that names the file.

    Raises:
        DocumentError: Saying what to do.
    """
    try:
        yield
    except PersonaLensError:
        raise
    except Exception as error:
        raise DocumentError(
            f"{file} is not what such a run writes ({in_short(repr(error), 100)}); remove it, and {_AGAIN}"
        ) from error


# Rows


def _lines(*names: str, part: bool = False) -> Callable[[Path, Summary], Iterator[Row]]:
    """The rows of files of JSON lines; with ``part`` each says which file it is of, up to its first ``-``."""

    def rows(folder: Path, _: Summary) -> Iterator[Row]:
        for pattern in names:
            files = sorted(folder.glob(pattern))
            if not files:
                raise DocumentError(f"the rows are gone: there is no {pattern} in {folder}; {_AGAIN}")
            for file in files:
                own = {"part": file.name.partition("-")[0]} if part else {}
                yield from ({**own, **row} for row in _read_lines(file))

    return rows


def _read_lines(file: Path) -> Iterator[Row]:
    return map(without_ids, _whole_lines(file))


def _whole_lines(file: Path) -> Iterator[Row]:
    for line, text in enumerate(read_bytes(file, DocumentError).splitlines(), start=1):
        try:
            row = parse_json(text)
        except DocumentError as error:
            raise DocumentError(f"line {line} of {file} is {error}; remove the file, and {_AGAIN}") from error
        if not isinstance(row, dict):
            raise DocumentError(f"line {line} of {file} holds no object; remove the file, and {_AGAIN}")
        yield row


def without_ids(row: Mapping[str, Any]) -> Row:
    """A row as it is shown: without its place, its checksum and the token ids of its text."""
    return {name: value for name, value in row.items() if name not in ("row", "check", "response_ids")}


def _responses(folder: Path, _: Summary) -> Iterator[Row]:
    """Rollouts with their scores."""
    with as_written(folder / "scores.jsonl"):
        both = zip(_read_lines(folder / "rollouts.jsonl"), _read_lines(folder / "scores.jsonl"), strict=True)
        yield from ({**rollout, **score} for rollout, score in both)


def _replies(folder: Path, _: Summary) -> Iterator[Row]:
    """Rollouts that have any tokens."""
    file = folder / "baseline-rollouts.jsonl"
    with as_written(file):
        yield from (without_ids(row) for row in _whole_lines(file) if row["response_ids"])


def _nothing(_: Path, __: Summary) -> Iterator[Row]:
    """What is kept in memory only has no rows in a folder."""
    return iter(())


def _screened(folder: Path, summary: Summary) -> Iterator[Row]:
    file = folder / "results.parquet"
    if not file.exists():  # it was written without pyarrow
        yield from _lines("results.jsonl")(folder, summary)
        return
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DocumentError(f"{file} cannot be read without pyarrow: {install_command('parquet')}") from error
    with as_written(file):
        for batch in parquet.ParquetFile(file).iter_batches():
            yield from batch.to_pylist()


def shifts_of(_: Path | None, summary: Summary) -> Iterator[Row]:
    """One row a trait, model and layer."""
    for trait, found in summary["traits"].items():
        for model, each in found["models"].items():
            changed = {"score": each["score"], "change": each["change"]}
            for layer, shift in zip(summary["layers"], each["shift"], strict=True):
                yield {"trait": trait, "model": model, "layer": layer, "shift": shift, **changed}


def _effects_figures(summary: Summary) -> svg.Wanted:
    rows = [
        (f"{cell['steering']} → {cell['trait']}", cell["score"]["vector"], cell["score"]["random"])
        for cell in summary["cells"]
        if cell["score"]
    ]
    found: svg.Wanted = {"changes": (steering.changes_figure, rows)} if rows else {}
    return {**found, **effects.figures(summary)}


# The table


KINDS: Mapping[str, Kind] = {
    "extraction": Kind(
        readings.extraction_headline,
        readings.extraction_figures,
        _responses,
        after=readings.after_extraction,
        tables={"diagnostics": diagnostics.tables},
    ),
    "axis": Kind(axis.headline, axis.figures, _responses, axis.render_axis, axis.next_steps),
    "cap": Kind(capping.headline, capping.figures, _lines("cap-scores.jsonl"), capping.render_cap, capping.next_steps),
    "sweep": Kind(steering.sweep_headline, steering.sweep_figures, _lines("*-scores.jsonl")),
    "comparison": Kind(steering.comparison_headline, steering.comparison_figures, _lines("arms-scores.jsonl")),
    "tune": Kind(
        tuning.headline,
        tuning.figures,
        _lines("search-scores.jsonl", "confirm-scores.jsonl", part=True),
        tuning.render_tuning,
    ),
    "effects": Kind(effects.headline, _effects_figures, _lines("effects-scores.jsonl"), effects.render_effects),
    "persistence": Kind(
        persistence.headline, persistence.figures, _lines("turns-scores.jsonl"), persistence.render_persistence
    ),
    "methods": Kind(methods.headline, methods.figures, _lines("arms-scores.jsonl"), methods.render_methods),
    "study": Kind(study.headline, study.figures, _lines("study-scores.jsonl"), study.render_study),
    "drift": Kind(drift.headline, drift.figures, _lines("drift-turns.jsonl"), drift.render_drift),
    "screening": Kind(screening.headline, screening.figures, _screened, screening.render_screening),
    "finetune": Kind(finetuning.training_headline, finetuning.training_figures, _lines("metrics.jsonl")),
    "finetune study": Kind(
        finetuning.headline, finetuning.figures, _lines("outcomes.jsonl"), finetuning.render_finetuning
    ),
    "shift": Kind(finetuning.shift_headline, finetuning.shift_figures, shifts_of),
    "dissection": Kind(
        dissection.headline, dissection.figures, _lines("arms-scores.jsonl"), dissection.render_dissection
    ),
    "reproduction": Kind(
        reproduction.headline, reproduction.figures, reproduction.rows_of, reproduction.render_reproduction
    ),
    "baseline": Kind(readings.baseline_headline, readings.baseline_figures, _replies, after=readings.after_baseline),
    "monitor": Kind(readings.monitor_headline, readings.monitor_figures, _nothing),
    "lens": Kind(readings.lens_headline, readings.lens_figures, _nothing),
    "demo": Kind(
        vector.demo_headline,
        vector.figures,
        lambda folder, summary: _lines("steering-scores.jsonl")(folder / "steering", summary),
        vector.render_vector,
    ),
}
