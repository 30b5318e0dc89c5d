"""The one base class of every error this package raises on purpose."""

from __future__ import annotations


class PersonaLensError(Exception):
    """Something the caller can put right; the message says how.

    The command line prints the message without a traceback (``--debug`` adds it). Anything else that escapes is a
    bug of this package.
    """
