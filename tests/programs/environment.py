"""The environment of the other programs, and running a program in it.

The programs of this folder that end in ``_program.py`` run there: they use nothing of ours and nothing of the tests'.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

ENVIRONMENT = "PERSONA_LENS_PROGRAMS_ENV"
HERE = Path(__file__).parent


def environment() -> Path:
    """Where the programs are: what the variable says, or the place where `make test-programs` puts them."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "persona-lens" / "programs"
    return Path(os.environ.get(ENVIRONMENT, default)).expanduser()


def missing() -> str | None:
    """Why the programs cannot be run here, in words; None when they can."""
    if not (environment() / ".installed").is_file():
        return f"the other programs are not installed in {environment()}; `make test-programs` installs them"
    return None


def run_program(name: str, task: dict[str, Any]) -> dict[str, Any]:
    """Run a program there: it gets the task as JSON on standard input, and its last line of output is its answer."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(environment() / "bin" / "python"), str(HERE / f"{name}_program.py")],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        env=variables,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
