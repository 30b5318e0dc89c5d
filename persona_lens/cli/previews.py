"""``--preview`` of several commands: token by token, what would be edited and read; then nothing more happens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from persona_lens.errors import PersonaLensError

if TYPE_CHECKING:
    from persona_lens.preview import Preview

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
        typer.echo(json.dumps({"previews": listed}))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for title, preview in previews.items():
        console.print(Text(title, style="italic"))
        console.print(preview)
