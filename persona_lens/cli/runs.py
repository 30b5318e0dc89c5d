"""``persona-lens runs``: the runs below a folder, with what each came to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from persona_lens.cli import options
from persona_lens.cli.display import say, say_json
from persona_lens.cli.settings import Option, argument

FOLDER = argument("FOLDER", "Where to look.")


def runs_command(
    folder: Annotated[Path, FOLDER] = Path("runs"),
    html: Annotated[Path | None, Option(metavar="FILE")] = None,
    as_json: options.AsJson = False,
) -> None:
    """List the runs below a folder: what each is, how far it is, and what it came to.

    Folders that hold no run are passed over; a run that is damaged is listed with the reason.

    Example: `persona-lens runs --html runs/index.html`

    Args:
        html: Also write a page over them, with links to their reports.
    """
    import persona_lens
    from persona_lens.core.files import write_text
    from persona_lens.core.text import counted
    from persona_lens.reports.catalogue import find_runs, render_index

    found = list(find_runs(folder))
    if html is not None:
        write_text(html, render_index(found, html, persona_lens.__version__))
    if as_json:
        say_json({"runs": [run.to_json() for run in found]})
        return
    for run in found:
        about = " of ".join(filter(None, [run.kind, run.trait])) + (f" on {run.model}" if run.model else "")
        when = run.when[:16].replace("T", " ")
        say(run.path, bold=True)
        say(f"  {', '.join(filter(None, [about, run.progress, when and f'{when} UTC']))}")
        if told := run.verdict or run.problem:
            say(f"  {told}")
    if not found:
        say(f"there are no runs in {folder}")
    if html is not None:
        say(f"{counted(len(found), 'run')}: {html}", err=True)
