"""``--preview`` of several commands: token by token, what would be edited and read; then nothing more happens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from persona_lens.cli.display import console, say_json
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import printable

if TYPE_CHECKING:
    from persona_lens.steering.preview import Preview

PreviewOption = Annotated[
    bool, typer.Option("--preview", help="Generate nothing: show token by token what would be read and edited.")
]


def check_one_look_ahead(preview: bool, dry_run: bool) -> None:
    """Refuse `--preview` and `--dry-run` together: each shows something else, and stops."""
    if preview and dry_run:
        raise PersonaLensError("--preview shows tokens and --dry-run counts requests; give one of them")


def show_previews(previews: Mapping[str, Preview], as_json: bool) -> None:
    """Previews under their titles, as tables or as JSON."""
    if as_json:
        listed = [{"title": title, **preview.to_json()} for title, preview in previews.items()]
        say_json({"previews": listed})
        return
    from rich.text import Text

    screen = console()
    for title, preview in previews.items():
        screen.print(Text(printable(title), style="italic"))
        screen.print(preview)
