"""Running an experiment: the one way in which every command that has one previews, plans, runs, reports and prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from persona_lens.cli import options
from persona_lens.cli.display import console, print_table, say, say_json, showing_progress
from persona_lens.cli.options import judges
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.files import REPORT as REPORT
from persona_lens.core.files import read_bytes, write_text
from persona_lens.core.text import counted, printable

if TYPE_CHECKING:
    from persona_lens.backend import Backend
    from persona_lens.core.progress import Progress
    from persona_lens.extraction.experiment import Subject
    from persona_lens.judging import Judged
    from persona_lens.models import ChatFormat
    from persona_lens.reports.result import Result
    from persona_lens.runs.cost import Work
    from persona_lens.steering.preview import Preview
    from persona_lens.vectors import PersonaVectors

Found = TypeVar("Found", bound="Result")


@dataclass
class Session:
    """What an experiment has at hand.

    Attributes:
        backend: The model; only this holds it.
        chat: Its chat format.
        read: What the experiment read before anything ran.
        judging: The ``judge`` of one trait, or the ``judges`` of several by name; None for likelihood judges, which the
            engine makes itself.
        folder: Where the run is kept.
        progress: Shows how far it is.
    """

    backend: Backend
    chat: ChatFormat
    read: Any = None
    judging: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    progress: Progress | None = None

    @property
    def asked(self) -> dict[str, Any]:
        """What verbs of the library that count work take by name: the judge or judges, and the chat."""
        return {**self.judging, "chat": self.chat}

    @property
    def given(self) -> dict[str, Any]:
        """What those take that do it: the folder and progress too."""
        return {**self.asked, "folder": self.folder, "progress": self.progress}

    def planned(self, vectors: PersonaVectors) -> Subject:
        """Who is asked about these vectors' trait, to count what would be asked."""
        from persona_lens.extraction.experiment import Subject

        return Subject.of(self.backend, vectors, planned=True, **self.asked)

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
        traits: What is judged: a trait, or several by name; None judges nothing.
        name: Of its folder, unless one was named; None keeps a run only in a folder that was named.
        model: The rest of that name; None is the model that was opened.
        previews: What ``--preview`` shows.
        read: Reads what it needs besides, once the model is open.
    """

    run: Callable[[Session], Found]
    show: Callable[[Found, Session], None]
    work: Callable[[Session], Sequence[Work]] | None = None
    traits: Judged | Mapping[str, Judged] | None = None
    name: str | None = None
    model: str | None = None
    previews: Callable[[Session], Mapping[str, Preview]] | None = None
    read: Callable[[Session], Any] | None = None


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
    judge: judges.JudgeName = judges.LIKELIHOOD
    judging: judges.JudgeOptions = field(default_factory=judges.JudgeOptions)

    def carry_out(self, job: Job[Found], *, preview: bool = False) -> None:
        """Open the model and the judge, preview or plan if that is all that is wanted, and run, report and print."""
        if preview and self.dry_run:
            raise PersonaLensError("--preview shows tokens and --dry-run counts requests; give one of them")
        session = Session(*self.open(offline=self.dry_run or preview))
        session.folder = self.out
        if self.out is None and job.name is not None:
            session.folder = options.run_folder(job.name, job.model or session.backend.info.model)
        session.read = job.read(session) if job.read else None
        if preview and job.previews:
            show_previews(job.previews(session), self.as_json)
            return
        if job.traits is not None:
            asked = self.judging.open(self.judge, job.traits, self.opening, (session.backend, session.chat))
            session.judging = {"judges" if isinstance(job.traits, Mapping) else "judge": asked}
        if self.dry_run and job.work:
            show_work(job.work(session), self.as_json)
            return
        if self.opening.remote and job.work:
            say_plan(job.work(session))
        with judges.saying_spending(next(iter(session.judging.values()), None)), showing_progress() as progress:
            session.progress = progress
            found = job.run(session)
        say_traffic(session.backend)
        self._finish(job, found, session)

    def _finish(self, job: Job[Found], found: Found, session: Session) -> None:
        page = session.folder / REPORT if found.has_page and session.folder else None
        if page:
            write_report(page, found.report())
        if self.as_json:
            say_json({"folder": str(session.folder), **found.summary} if job.name is not None else found.summary)
        else:
            job.show(found, session)
            say(found.verdict)
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

    from persona_lens.models.reasoning import ANSWER, THINKING

    screen = console()
    for title, preview in previews.items():
        screen.print(Text(printable(title), style="italic"))
        screen.print(preview)
        asked = [*(edit.text for edit in preview.edits), *(f" on {read.kind}" for read in preview.reads)]
        apart = any(f" on {part}" in text for text in asked for part in (THINKING, ANSWER))
        if apart and preview.tokens[-1].id is None:
            say("thinking and answer are known as they come: here what the response begins with goes on to its end")


def say_plan(work: Sequence[Work]) -> None:
    """Say on standard error what a run will send to a server; nothing for a model that is here."""
    planned = [each.traffic for each in work if each.traffic]
    if planned:
        label = "plan, at most" if any(each.at_most for each in work) else "plan"
        _say_moved(label, sum(planned[1:], planned[0]), "at most ")


def say_traffic(backend: Backend) -> None:
    """Say on standard error what a run sent to a server; nothing for a model that is here."""
    from persona_lens.backend.protocol import RemoteBackend

    if isinstance(backend, RemoteBackend):
        _say_moved("server", backend.traffic)


def _say_moved(label: str, moved: Any, bound: str = "") -> None:
    up, down = moved.bytes_up / 1e6, moved.bytes_down / 1e6
    say(f"{label}: {counted(moved.requests, 'request')}, {up:,.2f} MB up, {bound}{down:,.2f} MB down", err=True)


def show_work(work: Sequence[Work], as_json: bool, *, asked: str = "batches") -> None:
    """What a run would ask, as a table or as JSON; ``asked`` is what it is asked in where the model is here."""
    if as_json:
        say_json({"work": [asdict(each) for each in work]})
        return
    if not work:
        say("nothing is asked of a model or a judge")
        return
    remote, paid = any(each.traffic for each in work), any(each.cost is not None for each in work)
    columns: tuple[str, ...] = ("", "requests" if remote else asked, "texts", "tokens at most")
    print_table(
        "What the run asks for, if every response is as long as it may be",
        (*columns, *(("MB up", "MB down at most") if remote else ()), *(("dollars at most",) if paid else ())),
        [_work_row(each, remote, paid) for each in work],
    )


def _work_row(work: Work, remote: bool, paid: bool) -> tuple[str, ...]:
    bound = "at most " if work.at_most else ""
    amounts = [work.label, f"{bound}{work.requests:,}", f"{bound}{work.rows:,}", f"{work.tokens:,}"]
    if remote:
        sizes = (work.traffic.bytes_up, work.traffic.bytes_down) if work.traffic else ()
        amounts += [f"{size / 1e6:,.1f}" for size in sizes] or ["-", "-"]
    if paid:
        amounts.append("-" if work.cost is None else f"{work.cost:,.2f}")
    return tuple(amounts)
