"""Importing nnsight through the adapter leaves the rest of the process alone."""

from __future__ import annotations

import subprocess
import sys

HEAD = "import sys; sys.argv = ['persona-lens', '-v', 'extract']; "


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_no_save_method_is_left_on_every_object() -> None:
    code = "from persona_lens_nnsight.library import nnsight; print(hasattr(object, 'save'), nnsight.save is not None)"
    assert run(code) == "False True"


def test_minus_v_of_our_command_line_is_not_nnsights_debug_switch() -> None:
    """The plain import takes it as its own; that shows what is being prevented."""
    look = "from nnsight import CONFIG; print(CONFIG.APP.DEBUG, sys.argv)"
    assert run(HEAD + look).startswith("True")
    through_us = HEAD + "from persona_lens_nnsight.library import nnsight; " + look
    assert run(through_us) == "False ['persona-lens', '-v', 'extract']"


def test_traits_are_written_where_nnsight_was_imported_by_itself() -> None:
    """The plain import puts ``save`` on ``object``, which a dataclass takes for a default of such a field."""
    code = "import nnsight; import persona_lens.traits.generate; print(hasattr(object, 'save'))"
    assert run(code) == "True"


def test_beartype_and_httpx_still_work_after_it() -> None:
    """Both died on the ``save`` that nnsight puts on ``object``."""
    code = (
        "from persona_lens_nnsight.library import nnsight\n"
        "import asyncio, beartype, httpx\n"
        "@beartype.beartype\n"
        "def f(x: int) -> int: return x\n"
        "async def g():\n"
        "    async with httpx.AsyncClient() as client: return type(client).__name__\n"
        "print(f(1), asyncio.run(g()))"
    )
    assert run(code) == "1 AsyncClient"
