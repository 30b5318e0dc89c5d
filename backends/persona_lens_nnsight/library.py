"""The nnsight library, imported so that it leaves the rest of the process alone."""

from __future__ import annotations

import sys


def _import_quietly() -> None:
    """Import nnsight without its two side effects on the process.

    It reads ``sys.argv`` and takes a ``-v`` there, meant for us, as its own debug switch; and it adds a ``save``
    method to every object, on which other libraries' class machinery stumbles. A program that has imported nnsight
    before us, and so may rely on that method, keeps it.
    """
    if "nnsight" in sys.modules:
        return
    arguments, sys.argv = sys.argv, sys.argv[:1]
    try:
        import nnsight
        from nnsight._c import unmount
    finally:
        sys.argv = arguments
    if hasattr(object, "save"):
        unmount("save")
    assert nnsight


_import_quietly()

import nnsight  # noqa: E402

__all__ = ["nnsight"]
