"""The runs below a folder: what each is, how far it is, what it came to; and the index page over their reports."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from persona_lens.core.documents import Record
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.files import CONFIG, REPORT, named
from persona_lens.core.text import in_short
from persona_lens.reports.kinds import KINDS, SUMMARY, as_written, read_object
from persona_lens.reports.page import render

FINISHED, UNFINISHED, DAMAGED = "finished", "unfinished", "damaged"


@dataclass(frozen=True)
class FoundRun(Record):
    """One run folder.

    Attributes:
        path: Where it is.
        kind: What was done, such as ``sweep``; None where that cannot be read, as with all that follow.
        model: The model's name.
        trait: The trait's name, or several with commas between them.
        state: ``finished``, ``unfinished`` or ``damaged``.
        rows: Responses that there are so far; None where a run has none.
        planned: Responses that there will be; None where only the run itself knows.
        when: When something was last written, in UTC.
        verdict: What it came to, in a sentence.
        problem: Why it is damaged, or has no verdict though it is finished.
        report: Its page, if it has one.
    """

    path: str
    kind: str | None
    model: str | None
    trait: str | None
    state: str
    rows: int | None
    planned: int | None
    when: str
    verdict: str | None
    problem: str | None
    report: str | None

    @property
    def progress(self) -> str:
        """The state, with how far an unfinished run is."""
        if self.state != UNFINISHED or self.rows is None:
            return self.state
        return f"{self.state}, {self.rows:,}{f' of {self.planned:,}' if self.planned else ''} rows"


def find_runs(folder: Path | str) -> Iterator[FoundRun]:
    """The run folders below a folder, itself included, by their paths; runs inside of a run are parts of it.

    Raises:
        PersonaLensError: If there is no such folder.
    """
    root = Path(folder)
    with named(root, doing="read"):
        if not root.is_dir():
            raise PersonaLensError(f"{root} is no folder; name one that holds runs, such as the one given with --out")
        os.scandir(root).close()  # below it, folders that cannot be read are passed over
    for where, inner, names in os.walk(root):
        inner.sort()
        with suppress(PermissionError):
            if CONFIG in names and (Path(where) / CONFIG).is_file():
                inner.clear()
                yield _looked_at(Path(where))


def _looked_at(path: Path) -> FoundRun:
    config: Mapping[str, Any] = {}
    summary: Mapping[str, Any] = {}
    verdict, problem, known, finished = None, None, True, False
    try:
        config = read_object(path / CONFIG)
        finished = (path / SUMMARY).is_file()
        summary = read_object(path / SUMMARY) if finished else {}
        known = config.get("kind") in KINDS if _text(config.get("kind")) else False
        if finished and known:
            with as_written(path / SUMMARY):  # as `Result.verdict`, which imports torch
                verdict = KINDS[config["kind"]].headline(summary).sentence
        elif not _text(config.get("kind")):
            problem = f"{path / CONFIG} does not say what kind of run it is"
    except PersonaLensError as error:
        problem = in_short(str(error), 200)
    state = DAMAGED if problem else FINISHED if finished else UNFINISHED
    if state == FINISHED and not known:
        problem = "nothing more is known of this kind of run"
    files = [each for each in path.iterdir() if each.is_file()]
    made = [each for each in files if each.name.endswith("rollouts.jsonl")]
    places = (summary, config, config.get("settings"))
    return FoundRun(
        path=str(path),
        kind=_text(config.get("kind")),
        model=_text(summary.get("model")) or _text(config.get("model")),
        trait=next((name for each in places if (name := _trait(each))), None),
        state=state,
        rows=sum(map(_lines, made)) if made else None,
        planned=_planned(config),
        when=_when(files),
        verdict=verdict,
        problem=problem,
        report=str(path / REPORT) if (path / REPORT).is_file() else None,
    )


def _when(files: Iterable[Path]) -> str:
    latest = 0.0
    for each in files:
        with suppress(OSError):  # gone since
            latest = max(latest, each.stat().st_mtime)
    # Any time can be given to a file.
    return datetime.fromtimestamp(min(latest, _LAST), UTC).isoformat(timespec="minutes")


_LAST = datetime(9999, 12, 31, tzinfo=UTC).timestamp()


def _text(value: Any) -> str | None:
    """What something is called: a text, or the name in a mapping."""
    if isinstance(value, Mapping):
        value = value.get("name", value.get("model"))
    return in_short(value, 80) if isinstance(value, str) and value else None


def _trait(values: Any) -> str | None:
    """The trait, or traits, that a summary, a configuration or its settings name."""
    if not isinstance(values, Mapping):
        return None
    several = values.get("traits", values.get("gauges", values.get("vectors")))
    names = [_text(each) for each in several] if isinstance(several, list | tuple | Mapping) else []
    joined = ", ".join(dict.fromkeys(name.rpartition("@")[0] or name for name in names if name))
    return _text(values.get("trait")) or (in_short(joined, 80) or None)


def _lines(file: Path) -> int:
    """Whole lines of a file."""
    try:
        with file.open("rb") as stream:
            return sum(part.count(b"\n") for part in iter(lambda: stream.read(1 << 20), b""))
    except OSError:
        return 0


def _planned(config: Mapping[str, Any]) -> int | None:
    """How many responses a run is to have, of the kinds whose configuration says so."""
    try:
        asked = config["settings"]

        def whole(name: str, of: Any = asked) -> int:
            if type(of[name]) is not int:
                raise TypeError(name)
            return int(of[name])

        ways = 2 if asked.get("random_directions") else 1  # along the vector and along random directions
        match config["kind"]:
            case "sweep":
                pushes = len(asked["layers"]) * len(set(asked["coefficients"]) - {0.0})
                return whole("questions") * whole("samples") * (1 + pushes * ways)
            case "comparison":
                arms = sum(1 if "system" in arm else ways for arm in config["arms"].values())
                return len(asked["questions"]) * whole("samples") * (1 + arms)
            case "tune":
                strengths, searched = len(asked["strengths"]), whole("search_questions") * whole("samples")
                places = 1 + len(asked["layers"]) * strengths * ways
                confirmed = whole("confirm_questions") * whole("confirm_samples") * (1 + strengths * ways)
                # The unsteered responses whose residuals are measured come first.
                return searched * (1 + places) + confirmed
            case "methods":
                own, traits = asked["asked"], config["traits"].values()
                methods = sum(len(each["methods"]) for each in traits)
                steps = len(asked["strengths"]) * (methods + (1 if own["random_directions"] else 0))
                # Beside them the unsteered responses, those whose residuals are measured, and each system prompt's.
                return whole("questions", config) * whole("samples", own) * (2 + len(traits) + steps)
            case "study":
                return whole("questions") * whole("samples") * len(config["conditions"])
            case "baseline":
                return (whole("questions") + whole("neutral")) * whole("samples")
    except (LookupError, TypeError, AttributeError, ValueError):
        pass
    return None


def render_index(runs: Iterable[FoundRun], page: Path, version: str = "") -> str:
    """An index page over runs, with links to their reports; see `persona_lens.reports.page.render`.

    Args:
        runs: What was found.
        page: Where the page will stand, which the links go from.
        version: Of persona-lens, to be named on the page.
    """
    found = [{**each.to_json(), "progress": each.progress, "link": _link(each, page)} for each in runs]
    return render("catalogue.html.j2", {"runs": found, "version": version})


def _link(run: FoundRun, page: Path) -> str | None:
    if run.report is None:
        return None
    return quote(os.fsencode(Path(os.path.relpath(run.report, page.parent)).as_posix()))
