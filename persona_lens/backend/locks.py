"""One run of a model at a time: hooks belong to the module, so that two runs at once would edit each other."""

from __future__ import annotations

import threading

from persona_lens.errors import PersonaLensError


class BusyError(PersonaLensError):
    """The model was asked for something from inside its own generation."""


class RunLock:
    """A lock around a run. Other threads wait; the thread that holds it is told, where a plain lock would hang."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    def __enter__(self) -> None:
        if self._owner == threading.get_ident():
            raise BusyError(
                "the model is generating, and this callback asked it for something else; note what there is to do and "
                "do it once the generation is over"
            )
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._owner = None
        self._lock.release()
