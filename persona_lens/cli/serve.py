"""``persona-lens serve``: a server and a page, to talk with a model while its traits are read and moved."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from persona_lens.cli import options
from persona_lens.cli.display import say
from persona_lens.cli.settings import Option
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.plugins import install_command


def serve_command(
    subject: Annotated[options.Subject, options.Here],
    traits: options.TraitsRead,
    host: Annotated[str, Option(metavar="ADDRESS")] = "127.0.0.1",
    port: Annotated[int, Option(least=0)] = 8017,
    token: str | None = None,
    allow_host: Annotated[list[str] | None, Option(metavar="NAME")] = None,
    presets: Annotated[Path | None, Option(metavar="FILE")] = None,
    rows: Annotated[int, Option(least=1)] = 32,
    waiting: Annotated[int, Option(least=0)] = 128,
) -> None:
    """Talk with a model in the browser, or from any OpenAI client, while its traits are read and moved.

    Opens a server that speaks OpenAI's protocol. Requests may steer and watch by a field `persona_lens`, each in its
    own way; those that run at the same time share their steps. It makes sure that replies are steered (`--no-verify`
    does not), and prints a link with its token; Ctrl-C ends it.

    Example: `persona-lens serve smollm2-135m runs/tuned-optimistic --port 8017`

    Args:
        host: Address to listen on. Others than the loopback interface need a token of yours.
        port: Port; 0 takes a free one.
        token: What clients have to know; drawn anew each time, unless `PERSONA_LENS_TOKEN` says it.
        allow_host: A name that clients call the server by. Repeatable.
        presets: Steerings stored by name are kept in this file.
        rows: Replies that run together.
        waiting: Requests that may wait.
    """
    try:
        from persona_lens.serve.server import link_of, serve, token_for
        from persona_lens.serve.shelf import Shelf
        from persona_lens.serve.workbench import Workbench
    except ModuleNotFoundError as error:
        raise PersonaLensError(f"the server needs {error.name}; install it: {install_command('serve')}") from error

    # What is missing is to be known before a model is loaded.
    token_for(host, token)
    loaded, chosen = traits.open()
    if chosen is None:
        for each in loaded:
            each.tuned_choice()
    backend, chat = replace(subject, opening=subject.opening.unsteered).open()
    shelf = Shelf(backend, loaded, chosen, presets, allow_other_model=traits.allow_other_model)
    workbench = Workbench(backend, shelf, chat, rows)
    if subject.opening.verify is not False:
        workbench.verify()

    def ready(address: str, secret: str) -> None:
        say(f"listening on {address}; Ctrl-C ends it", err=True)
        say(link_of(address, secret))
        sys.stdout.flush()

    serve(workbench, host=host, port=port, token=token, hosts=allow_host or (), waiting=waiting, on_ready=ready)
