"""`Result`: what an experiment found, to be looked at in the same ways whatever the experiment was."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from markupsafe import Markup

from persona_lens.backend.registry import installed_version
from persona_lens.core.documents import json_lines, plain
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.files import CONFIG, named, write_bytes
from persona_lens.core.text import in_short, shown
from persona_lens.judging.blind import to_cell
from persona_lens.reports import svg
from persona_lens.reports.kinds import KINDS, SUMMARY, Kind, as_written, page_of, read_object, without_ids
from persona_lens.reports.page import FOLDER, Headline, environment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from persona_lens.vectors import PersonaVectors

TABLES, IMAGES = (".csv", ".jsonl"), (".png", ".svg", ".pdf")


class ResultError(PersonaLensError):
    """A result that cannot be read, shown or written."""


class Result:
    """What an experiment found. Each kind says the same of itself, as it comes or as it is read from its run folder.

    Attributes:
        kind: What was done, as in ``run.json``: ``sweep``, ``tune``, ….
        summary: Every figure that is shown, as JSON values: the run's ``summary.json``.
        folder: The run folder; None for what was kept in memory.
    """

    kind: str
    summary: Mapping[str, Any]
    folder: Path | None

    @staticmethod
    def load(folder: Path | str) -> StoredResult:
        """The result of a finished run.

        Raises:
            ResultError: If the folder holds no run, or one that is not finished.
            DocumentError: If one of its files is damaged; rows are read, and found to be, only when they are asked for.
        """
        path = Path(folder)
        with named(path, ResultError, "read"):
            begun, finished = (path / CONFIG).is_file(), (path / SUMMARY).is_file()
        if not begun:
            raise ResultError(
                f"{path} holds no run: there is no {CONFIG} in it; `persona-lens runs FOLDER` lists the runs below one"
            )
        kind = read_object(path / CONFIG).get("kind")
        if not isinstance(kind, str) or kind not in KINDS:
            raise ResultError(f"{path} holds a run of the kind {shown(kind)}, which has no result to be shown")
        if not finished:
            raise ResultError(f"the run in {path} ({kind}) is not finished; the command that began it goes on with it")
        return StoredResult(kind, read_object(path / SUMMARY), path)

    @property
    def _told(self) -> Kind:
        return KINDS[self.kind]

    def _reading(self) -> AbstractContextManager[None]:
        """Within it a summary is read, which nobody vouches for if it comes from a file."""
        return as_written(self.folder / SUMMARY) if self.folder and isinstance(self, StoredResult) else nullcontext()

    @property
    def has_page(self) -> bool:
        """Whether its kind has a page of its own, which the command line puts into the run folder."""
        return self._told.template is not None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What was counted, as plain records: one a response, unless the kind has others."""
        if self.folder is None:
            raise ResultError(f"the rows of this {self.kind} were not kept; give it a folder")
        with self._reading():
            return list(self._told.rows(self.folder, self.summary))

    @property
    def headline(self) -> Headline:
        """What it comes to, in words no stronger than the intervals allow."""
        with self._reading():
            return self._told.headline(self.summary)

    @property
    def verdict(self) -> str:
        """The headline in one sentence, with what it rests on and who judged."""
        return self.headline.sentence

    @property
    def figures(self) -> tuple[str, ...]:
        """What `plot` can draw; the first is what it draws unless it is told."""
        with self._reading():
            return tuple(self._told.figures(self.summary))

    def plot(self, axes: Axes | None = None, figure: str | None = None) -> Figure:
        """Draw one of the figures.

        Args:
            axes: Where; on a new figure by default. Of a figure of several panels only the first is drawn on them.
            figure: Which of `figures`.

        Raises:
            ResultError: If there is no such figure.

        Returns:
            The figure, to be shown, changed or saved (matplotlib's own way, or `save`).
        """
        if axes is not None and not hasattr(axes, "get_figure"):
            raise ResultError(f"axes are one panel of matplotlib's, got {shown(axes)}; figure= names what is drawn")
        with self._reading():
            wanted = self._told.figures(self.summary)
        name = figure or next(iter(wanted), None)
        if name not in wanted:
            there = f"it has {', '.join(wanted)}" if wanted else "it has nothing to draw"
            raise ResultError(f"this {self.kind} has no figure {name!r}: {there}" if name else f"{there}: {self!r}")
        draw, *data = wanted[name]
        # Axes that are given keep the style of the figure that they are in.
        style = svg.drawing_style() if axes is None else nullcontext()
        with self._reading(), style, svg.drawing_on(axes):
            drawn: Figure = draw(*data, svg.WIDE)
        return drawn

    def to_pandas(self) -> DataFrame:
        """The rows as a table; values in groups have columns such as ``scores.evil``.

        Raises:
            ResultError: If pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ResultError("a table needs pandas: pip install pandas") from error
        return pandas.json_normalize(self.rows)

    def report(self) -> str:
        """The page, as HTML that loads nothing."""
        folder = FOLDER if self.folder is None else str(self.folder)
        with self._reading():
            return page_of(self.kind, self.summary, installed_version("persona-lens") or "", folder)

    def save(self, path: Path | str) -> Path:
        """Write the page (``.html``), the figure (``.png``, ``.svg``, ``.pdf``) or the rows (``.csv``, ``.jsonl``).

        A file that is there is replaced, and folders that are not there are made. In a CSV, texts are as a spreadsheet
        shows them and does not run them, an apostrophe in front of what it could take for a formula, and cut where they
        are too long for a cell; JSONL has them as they are.

        Raises:
            ResultError: If the name ends otherwise, or the file cannot be written.
        """
        target = Path(path)
        suffix = target.suffix.lower()
        if suffix in IMAGES:
            content = svg.image_of(self.plot(), suffix[1:])
        elif suffix == ".csv":
            table = self.to_pandas()
            content = table.rename(columns=to_cell).map(_cell).to_csv(index=False).encode()
        elif suffix == ".jsonl":
            content = json_lines(self.rows)
        elif suffix == ".html":
            content = self.report().encode()
        else:
            known = ", ".join((".html", *IMAGES, *TABLES))
            raise ResultError(f"{target} can be written as {known}; take one of these endings")
        return write_bytes(target, content, failed=ResultError)

    def __repr__(self) -> str:
        where = f", {in_short(str(self.folder), 200)}" if self.folder else ""
        return f"<{self.kind}: {in_short(self.verdict, 200)}{where}>"

    def _repr_html_(self) -> str:
        image = None
        if self.figures:
            png = svg.image_of(self.plot(), "png", dpi=72)
            image = Markup(base64.b64encode(png).decode())  # whole: a text would be shortened
        told = {"result": self.headline, "verdict": self.verdict, "image": image, "folder": self.folder}
        return environment().get_template("result_view.html.j2").render(kind=self.kind, **told)


def _cell(value: Any) -> Any:
    return to_cell(str(value)) if isinstance(value, str | list | dict) else value


class Written(Protocol):
    """What can be written as one line of a file."""

    def to_row(self) -> dict[str, Any]:
        """The line, as JSON values."""


Answer = TypeVar("Answer", bound=Written, covariant=True)


class Answered(Result, Generic[Answer]):
    """A result whose rows are responses.

    Attributes:
        answers: Every response.
    """

    answers: Sequence[Answer]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """See `Result.rows`."""
        return [plain(answer.to_row()) for answer in self.answers]


class Scored(Result):
    """A result whose rows are responses with their scores.

    Attributes:
        rollouts: Every response.
        scores: What is said of each, as JSON values.
    """

    rollouts: Sequence[Written]
    scores: Sequence[dict[str, Any]]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """See `Result.rows`."""
        both = zip(self.rollouts, self.scores, strict=True)
        return [without_ids({**rollout.to_row(), **score}) for rollout, score in both]


@dataclass(frozen=True, repr=False, eq=False)
class StoredResult(Result):
    """A result that was read from its run folder."""

    kind: str
    summary: Mapping[str, Any]
    folder: Path

    @cached_property
    def vectors(self) -> PersonaVectors:
        """The vectors that the run left.

        Raises:
            VectorsError: If it left none.
        """
        from persona_lens.vectors import load_vectors

        return load_vectors(self.folder)
