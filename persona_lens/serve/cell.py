"""`workbench`: a model to talk with in a notebook's cell, and a server for any OpenAI client beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from persona_lens.backend import Backend
from persona_lens.backend.continuous import ROWS
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.plugins import install_command
from persona_lens.models import ChatFormat
from persona_lens.serve.shelf import Shelf
from persona_lens.serve.workbench import Workbench
from persona_lens.vectors import PersonaVectors

if TYPE_CHECKING:
    from persona_lens.serve.server import Running

HEIGHT = 720  # CSS pixels
_UNDER_ITS_NAME = (
    "if (location.hostname === '127.0.0.1' && this.src.includes('//localhost:')) "
    "this.src = this.src.replace('//localhost:', '//127.0.0.1:')"
)


def workbench(
    backend: Backend,
    vectors: PersonaVectors | Iterable[PersonaVectors],
    layers: int | Sequence[int] | None = None,
    *,
    chat: ChatFormat | None = None,
    presets: Path | str | None = None,
    rows: int = ROWS,
    allow_other_model: bool = False,
    verify: bool = True,
) -> LiveWorkbench:
    """Start a server on a free port of this machine: a cell that ends with it shows its page.

    Args:
        backend: The model.
        vectors: Traits to read and to steer with.
        layers: Where they are read; by default where each was tuned.
        chat: Chat format; the model's own by default.
        presets: A file that keeps steerings by name.
        rows: How many replies run together at most.
        allow_other_model: Use vectors that belong to another model.
        verify: Make sure first that replies are steered.

    Raises:
        VerificationError: If replies are not steered.
        PersonaLensError: If what the server needs is not installed, or it cannot be started.
        VectorsError: If vectors belong to another model, or nothing was tuned.
    """
    try:
        from persona_lens.serve.server import Running
    except ModuleNotFoundError as error:
        raise PersonaLensError(
            f"the workbench needs {error.name}, which is not installed; install it: {install_command('serve')}"
        ) from error
    each = [vectors] if isinstance(vectors, PersonaVectors) else list(vectors)
    chosen = [layers] if isinstance(layers, int) else layers
    kept = None if presets is None else Path(presets)
    shelf = Shelf(backend, each, chosen, kept, allow_other_model=allow_other_model)
    bench = Workbench(backend, shelf, chat, rows)
    if verify:
        bench.verify()
    return LiveWorkbench(Running(bench), backend.info.model)


class LiveWorkbench:
    """A server that runs until it is closed, or Python ends; made by `workbench`.

    Only this machine reaches it, and only who knows its token.

    Args:
        running: The server.
        model: Name of the model, as clients ask for it.
    """

    def __init__(self, running: Running, model: str) -> None:
        self._running = running
        self._open = True
        self.model = model

    @property
    def base_url(self) -> str:
        """What OpenAI clients call so; their ``api_key`` is `token`."""
        return f"{self._running.address}/v1"

    @property
    def token(self) -> str:
        """What clients have to know."""
        return self._running.token

    @property
    def link(self) -> str:
        """Opens the page in a browser on this machine."""
        return self._running.link

    def close(self) -> None:
        """Let replies under way come to an end, and stop; a second time does nothing."""
        if self._open:
            self._open = False
            self._running.close()

    def __enter__(self) -> LiveWorkbench:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<workbench of {self.model} {f'at {self._running.address}' if self._open else '(closed)'}>"

    def _repr_html_(self) -> str:
        if not self._open:
            return f"<p>{escape(repr(self))}</p>"
        # A page within another keeps its cookie only under the other's name, which is localhost for most notebooks.
        framed = escape(self.link.replace("//127.0.0.1:", "//localhost:"), quote=True)
        style = f"width:100%;height:{HEIGHT}px;border:1px solid #8888;border-radius:8px"
        return (
            f'<iframe src="{framed}" title="Workbench" style="{style}" loading="lazy" '
            f'onload="{escape(_UNDER_ITS_NAME, quote=True)}"></iframe>'
            f'<p><a href="{escape(self.link, quote=True)}" target="_blank" rel="noopener">Open it in a tab of its own'
            "</a> (on the machine that runs this notebook)</p>"
        )
