"""``persona-lens remote``: the server on which models run that do not fit here."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from persona_lens.cli import options
from persona_lens.cli.display import say, say_json
from persona_lens.core.errors import PersonaLensError

if TYPE_CHECKING:
    from persona_lens.backend.protocol import ServerStatus

app = typer.Typer(
    name="remote",
    help="See which models a server has.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@app.callback()
def _remote() -> None:
    """See which models a server has."""


@app.command("status")
def status(backend: options.BackendName = "nnsight", as_json: options.AsJson = False) -> None:
    """Say whether the configured server can be used, and which models it has.

    The exit code is 1 if it cannot be used.

    Example: `NDIF_HOST=https://api.ndif.us persona-lens remote status`
    """
    from persona_lens.backend import find_backend

    spec = find_backend(backend)
    if spec.server is None:
        raise PersonaLensError(f"backend {backend} runs models here only; it has no server")
    found = spec.server()
    if as_json:
        say_json(asdict(found))
    else:
        _show(found)


def _show(found: ServerStatus) -> None:
    from persona_lens.cli.display import print_table

    key = "accepted" if found.key else "none; the server wants none"
    say(f"{found.host} can be used (key: {key}{f', of {found.account}' if found.account else ''})")
    if not found.deployments:
        say("no model is loaded there at the moment")
        return
    rows = [(d.model, d.revision, d.state.lower(), "yes" if d.usable else "no") for d in found.deployments]
    print_table("Models", ("model", "revision", "state", "answers now"), rows)
