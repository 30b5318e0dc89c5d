"""Running an experiment: the one way in which every command that has one previews, plans, runs, reports and prints."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from persona_lens.cli import judges, options
from persona_lens.cli.display import console, print_table, say, say_json, showing_progress
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.files import read_bytes, write_text
from persona_lens.core.text import counted, printable

if TYPE_CHECKING:
    from persona_lens.backend import Backend
    from persona_lens.core.progress import Progress
    from persona_lens.judging import Judge
    from persona_lens.models import ChatFormat
    from persona_lens.runs.cost import Work
    from persona_lens.steering.preview import Preview
    from persona_lens.traits import Trait
    from persona_lens.vectors import PersonaVectors

Found = TypeVar("Found")
REPORT = "report.html"  # in the folder of a run


@dataclass
class Session:
    """What an experiment has at hand.

    Attributes:
        backend: The model; only this holds it.
        chat: Its chat format.
        read: What the experiment read before anything ran.
        judge: The judge of one trait; None for the likelihood judge, which the engine makes itself.
        judges: Those of several traits, by name; None for likelihood judges.
        folder: Where the run is kept.
        progress: Shows how far it is.
    """

    backend: Backend
    chat: ChatFormat
    read: Any = None
    judge: Judge | None = None
    judges: dict[str, Judge] | None = None
    folder: Path | None = None
    progress: Progress | None = None

    @property
    def given(self) -> dict[str, Any]:
        """What verbs of the library that judge one trait take by name: the folder, the judge, the chat, progress."""
        return {"folder": self.folder, "judge": self.judge, "chat": self.chat, "progress": self.shown}

    @property
    def given_each(self) -> dict[str, Any]:
        """The same for those that judge several."""
        return {"folder": self.folder, "judges": self.judges, "chat": self.chat, "progress": self.shown}

    @property
    def shown(self) -> Progress:
        """What shows how far it is, while it runs."""
        assert self.progress is not None
        return self.progress

    @property
    def kept(self) -> Path:
        """The folder of a run that always has one."""
        assert self.folder is not None
        return self.folder


@dataclass(frozen=True)
class Job(Generic[Found]):
    """What is an experiment's own.

    Attributes:
        run: Runs it.
        show: Prints what was found.
        work: Counts what it asks for.
        summary: What was found, as JSON values.
        traits: What is judged: a trait, or several by name; None judges nothing.
        name: Of its folder, unless one was named; None keeps a run only in a folder that was named.
        vectors: Whose trait and model are the rest of that name.
        model: The model that is, where no vectors are; None is the one that was opened.
        page: Makes a page of the summary and the version.
        report: The page's file.
        previews: What ``--preview`` shows.
        read: Reads what it needs besides, once the model is open.
    """

    run: Callable[[Session], Found]
    show: Callable[[Found, Session], None]
    work: Callable[[Session], Sequence[Work]] | None = None
    summary: Callable[[Found], Mapping[str, Any]] = operator.attrgetter("summary")
    traits: Trait | Mapping[str, Trait] | None = None
    name: str | None = None
    vectors: PersonaVectors | None = None
    model: str | None = None
    page: Callable[[Any, str], str] | None = None
    report: str = REPORT
    previews: Callable[[Session], Mapping[str, Preview]] | None = None
    read: Callable[[Session], Any] | None = None

    def folder(self, at: Session) -> Path:
        """Where the run is kept unless a folder was named."""
        given = self.vectors
        if given is None:
            return options.run_folder(str(self.name), self.model or at.backend.info.model)
        return options.run_folder(f"{self.name}-{given.trait}", given.model.model)


@dataclass(frozen=True)
class Run(options.Subject):
    """How an experiment is run.

    Attributes:
        out: Where it is kept.
        dry_run: Whether to run nothing, and say what would be asked.
        judge: Who scores.
        judging: What else there is to say of the judge.
    """

    out: options.Out = None
    dry_run: options.DryRun = False
    judge: judges.JudgeName = "likelihood"
    judging: judges.JudgeOptions = field(default_factory=judges.JudgeOptions)

    def carry_out(self, job: Job[Found], *, preview: bool = False) -> None:
        """Open the model and the judge, preview or plan if that is all that is wanted, and run, report and print."""
        if preview and self.dry_run:
            raise PersonaLensError("--preview shows tokens and --dry-run counts requests; give one of them")
        session = Session(*self.open(offline=self.dry_run or preview))
        session.folder = self.out
        if self.out is None and job.name is not None:
            session.folder = job.folder(session)
        session.read = job.read(session) if job.read else None
        if preview and job.previews:
            show_previews(job.previews(session), self.as_json)
            return
        self._open_judges(session, job.traits)
        if self.dry_run and job.work:
            show_work(job.work(session), self.as_json)
            return
        if self.opening.remote and job.work:
            say_plan(job.work(session))
        scoring = session.judge or next(iter((session.judges or {}).values()), None)
        with judges.saying_spending(scoring), showing_progress() as progress:
            session.progress = progress
            found = job.run(session)
        say_traffic(session.backend)
        self._finish(job, found, session)

    def _open_judges(self, session: Session, traits: Trait | Mapping[str, Trait] | None) -> None:
        given = (session.backend, session.chat, self.opening.dtype, self.opening.device)
        if isinstance(traits, Mapping):
            session.judges = self.judging.open_each(self.judge, traits, *given)
        elif traits is not None:
            session.judge = self.judging.open(self.judge, traits, *given)

    def _finish(self, job: Job[Found], found: Found, session: Session) -> None:
        folder = session.folder
        from persona_lens import __version__

        summary = job.summary(found)
        page = folder / job.report if job.page and folder else None
        if job.page and page:
            write_report(page, job.page(summary, __version__))
        if self.as_json:
            say_json({"folder": str(folder), **summary} if job.name is not None else summary)
        else:
            job.show(found, session)
        if page and not (self.as_json and job.name is not None):
            say(f"report: {page}", err=job.name is None)


def deliver(found: Any, show: Callable[[], None], as_json: bool) -> None:
    """Print what was found, as JSON values or for people."""
    if as_json:
        say_json(found)
    else:
        show()


def write_report(file: Path, page: str) -> None:
    """Write a report: all of it, or nothing; one that is there as it would be written stays."""
    if not (file.is_file() and read_bytes(file) == page.encode()):
        write_text(file, page)


def show_previews(previews: Mapping[str, Preview], as_json: bool) -> None:
    """Previews under their titles, as tables or as JSON."""
    if as_json:
        say_json({"previews": [{"title": title, **preview.to_json()} for title, preview in previews.items()]})
        return
    from rich.text import Text

    screen = console()
    for title, preview in previews.items():
        screen.print(Text(printable(title), style="italic"))
        screen.print(preview)


def say_plan(work: Sequence[Work]) -> None:
    """Say on standard error what a run will send to a server; nothing for a model that is here."""
    planned = [each.traffic for each in work if each.traffic]
    if planned:
        total = sum(planned[1:], planned[0])
        up, down = total.bytes_up / 1e6, total.bytes_down / 1e6
        say(f"plan: {counted(total.requests, 'request')}, {up:,.2f} MB up, at most {down:,.2f} MB down", err=True)


def say_traffic(backend: Backend) -> None:
    """Say on standard error what a run sent to a server; nothing for a model that is here."""
    from persona_lens.backend.protocol import RemoteBackend

    if isinstance(backend, RemoteBackend):
        made = backend.traffic
        up, down = made.bytes_up / 1e6, made.bytes_down / 1e6
        say(f"server: {counted(made.requests, 'request')}, {up:,.2f} MB up, {down:,.2f} MB down", err=True)


def show_work(work: Sequence[Work], as_json: bool, *, asked: str = "batches") -> None:
    """What a run would ask, as a table or as JSON; ``asked`` is what it is asked in where the model is here."""
    if as_json:
        say_json({"work": [asdict(each) for each in work]})
        return
    remote, paid = any(each.traffic for each in work), any(each.cost is not None for each in work)
    columns: tuple[str, ...] = ("", "requests" if remote else asked, "texts", "tokens at most")
    print_table(
        "What the run asks for, if every response is as long as it may be",
        (*columns, *(("MB up", "MB down at most") if remote else ()), *(("dollars at most",) if paid else ())),
        [_work_row(each, remote, paid) for each in work],
    )


def _work_row(work: Work, remote: bool, paid: bool) -> tuple[str, ...]:
    amounts = [work.label, f"{work.requests:,}", f"{work.rows:,}", f"{work.tokens:,}"]
    if remote:
        sizes = (work.traffic.bytes_up, work.traffic.bytes_down) if work.traffic else ()
        amounts += [f"{size / 1e6:,.1f}" for size in sizes] or ["-", "-"]
    if paid:
        amounts.append("-" if work.cost is None else f"{work.cost:,.2f}")
    return tuple(amounts)
