"""``persona-lens remote``: the server on which models run that do not fit here."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from persona_lens.cli import options
from persona_lens.cli.display import say, show_rows
from persona_lens.cli.runner import deliver
from persona_lens.core.errors import PersonaLensError

if TYPE_CHECKING:
    from persona_lens.backend.protocol import ServerStatus


def status(backend: options.Backends = "nnsight", as_json: options.AsJson = False) -> None:
    """Say whether the configured server can be used, and which models it has.

    The exit code is 1 if it cannot be used.

    Example: `NDIF_HOST=https://api.ndif.us persona-lens remote status`
    """
    from persona_lens.backend import find_backend

    spec = find_backend(backend)
    if spec.server is None:
        raise PersonaLensError(f"backend {backend} runs models here only; it has no server")
    found = spec.server()
    deliver(asdict(found), lambda: _show(found), as_json)


def _show(found: ServerStatus) -> None:
    key = "accepted" if found.key else "none; the server wants none"
    say(f"{found.host} can be used (key: {key}{f', of {found.account}' if found.account else ''})")
    if not found.deployments:
        say("no model is loaded there at the moment")
        return
    show_rows(
        "Models",
        found.deployments,
        {
            "model": lambda each: each.model,
            "revision": lambda each: each.revision,
            "state": lambda each: each.state.lower(),
            "answers now": lambda each: each.usable,
        },
    )
