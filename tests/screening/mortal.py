"""A worker that is killed once; a module by itself, since Ray's processes import it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from persona_lens.monitoring import Panel
from persona_lens.screening import OpenedBy, Scorer, ScreeningSettings
from persona_lens.screening.samples import Window
from persona_lens.screening.scoring import Unit

DIED = "DIED_ONCE"  # names the file that is there once it has died


class _MortalScorer(Scorer):
    def units(self, window: Window, skip: int = 0) -> Iterator[Unit]:
        died = Path(os.environ[DIED])
        if window.number == 1 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().units(window, skip)


@dataclass(frozen=True)
class MortalOpenedBy(OpenedBy):
    """Opens a model whose process is killed at the second window, once."""

    def scorer(self, panel: Panel, settings: ScreeningSettings) -> Scorer:
        """As any, but mortal."""
        whole = super().scorer(panel, settings)
        return _MortalScorer(whole.backend, whole.chat, panel, settings)
