"""What each kind of run tells of itself: its headline, what that rests on, its figures, its page and its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

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
from persona_lens.reports.page import FOLDER, Headline, Steps, Tables, render

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
        template: Of its own report; by default that of the headline, the figures and every number.
        parts: What the template shows beside the summary, the headline, the figures and what to do next.
        filters: What only its template calls, by name.
        after: What one may want to do next with its folder.
        tables: What stands in tables where it has no template of its own; under those names of the summary it is not
            among the other numbers.
    """

    headline: Callable[[Summary], Headline]
    figures: Callable[[Summary], svg.Wanted]
    rows: Callable[[Path, Summary], Iterator[Row]]
    template: str | None = None
    parts: Callable[[Summary], Mapping[str, Any]] = lambda summary: {}
    filters: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    after: Callable[[Summary, str], Steps] = lambda summary, folder: []
    tables: Mapping[str, Callable[[Summary], Tables]] = field(default_factory=dict)

    def every_number(self, name: str, summary: Summary) -> Row:
        """The parts of a page without a template of its own; ``name`` is the kind's."""
        about = " and ".join(filter(None, [summary.get("trait"), summary.get("method")]))
        apart = ("judge", "judges", *self.tables)
        return {
            "title": ": ".join(filter(None, [name.capitalize(), about])),
            "judge": summary.get("judge"),
            "names": {figure: figure.replace("_", " ") for figure in self.figures(summary)},
            "numbers_of": {key: value for key, value in summary.items() if key not in apart},
            "tables": [each for made in self.tables.values() for each in made(summary)],
        }


def page_of(kind: str, summary: Summary, version: str = "", folder: str = FOLDER) -> str:
    """The report of a run; see `persona_lens.reports.page.render`.

    Args:
        kind: Of `KINDS`.
        summary: JSON values as in the run's ``summary.json``.
        version: Of persona-lens, to be named on the page where the summary does not say it.
        folder: Where the run is, for the commands that go on from it.
    """
    told = KINDS[kind]
    shared = {
        "result": told.headline(summary),
        "figures": svg.Drawn(told.figures(summary)),
        "next": told.after(summary, folder),
        "version": (summary.get("versions") or {}).get("persona-lens", version),
    }
    own = told.parts(summary) if told.template else told.every_number(kind, summary)
    return render(told.template or "result.html.j2", {**summary, **shared, **own}, told.filters)


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


# The table


class _Page(Protocol):
    """A module that tells of a kind with a template of its own, which has the module's name."""

    __name__: str

    def headline(self, summary: Summary, /) -> Headline: ...
    def figures(self, summary: Summary, /) -> svg.Wanted: ...
    def parts(self, summary: Summary, /) -> Mapping[str, Any]: ...


def _paged(page: _Page, rows: Callable[[Path, Summary], Iterator[Row]], **more: Any) -> Kind:
    template = f"{page.__name__.rpartition('.')[2]}.html.j2"
    return Kind(page.headline, page.figures, rows, template, page.parts, **more)


KINDS: Mapping[str, Kind] = {
    "extraction": Kind(
        readings.extraction_headline,
        readings.extraction_figures,
        _responses,
        after=readings.after_extraction,
        tables={"diagnostics": diagnostics.tables},
    ),
    "axis": _paged(axis, _responses, after=axis.next_steps),
    "cap": _paged(capping, _lines("cap-scores.jsonl"), after=capping.next_steps),
    "sweep": Kind(steering.sweep_headline, steering.sweep_figures, _lines("*-scores.jsonl")),
    "comparison": Kind(steering.comparison_headline, steering.comparison_figures, _lines("arms-scores.jsonl")),
    "tune": _paged(tuning, _lines("search-scores.jsonl", "confirm-scores.jsonl", part=True), after=tuning.next_steps),
    "effects": _paged(
        effects,
        _lines("effects-scores.jsonl"),
        filters={"beyond": effects.beyond, "tint": effects.tint},
        after=effects.next_steps,
    ),
    "persistence": _paged(persistence, _lines("turns-scores.jsonl"), filters={"verdict": persistence.verdict}),
    "methods": _paged(methods, _lines("arms-scores.jsonl"), after=methods.next_steps),
    "study": _paged(study, _lines("study-scores.jsonl"), filters={"share": study.share}, after=study.next_steps),
    "drift": _paged(drift, _lines("drift-turns.jsonl"), filters={"null": drift.null_range}, after=drift.next_steps),
    "screening": _paged(
        screening,
        _screened,
        filters={"share": screening.share, "random": screening.random},
        after=screening.next_steps,
    ),
    "finetune": Kind(finetuning.training_headline, finetuning.training_figures, _lines("metrics.jsonl")),
    "finetune study": _paged(finetuning, _lines("outcomes.jsonl"), after=finetuning.next_steps),
    "shift": Kind(finetuning.shift_headline, finetuning.shift_figures, shifts_of),
    "dissection": _paged(dissection, _lines("arms-scores.jsonl"), after=dissection.next_steps),
    "reproduction": _paged(
        reproduction,
        reproduction.rows_of,
        filters={"cell": reproduction.cell_of, "groups": reproduction.groups},
    ),
    "baseline": Kind(readings.baseline_headline, readings.baseline_figures, _replies, after=readings.after_baseline),
    "monitor": Kind(readings.monitor_headline, readings.monitor_figures, _nothing),
    "lens": Kind(readings.lens_headline, readings.lens_figures, _nothing),
    "demo": _paged(
        vector,
        lambda folder, summary: _lines("steering-scores.jsonl")(folder / "steering", summary),
        filters={"scientific": vector.scientific},
        after=vector.next_steps,
    ),
}
