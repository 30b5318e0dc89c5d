"""Commands as somebody types them, carried out in this process."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from persona_lens.cli import app
from persona_lens.core.errors import PersonaLensError


class Shell:
    """Carries out commands that begin with the same words.

    Args:
        first: These words; none for whole commands.
        columns: Of the terminal, so that words of a table are on one line.
    """

    def __init__(self, *first: str, columns: int = 200) -> None:
        self._first, self._columns = first, columns

    def run(self, *words: object) -> Result:
        """What comes of it, whatever that is."""
        typed = [*self._first, *map(str, words)]
        return CliRunner(env={"COLUMNS": str(self._columns)}).invoke(app, typed, prog_name="persona-lens")

    def done(self, *words: object) -> Result:
        """What comes of it; it succeeds."""
        result = self.run(*words)
        assert result.exit_code == 0, (result.output, result.exception)
        return result

    def ok(self, *words: object) -> str:
        """Its standard output; it succeeds."""
        return self.done(*words).stdout

    def parsed(self, *words: object) -> Any:
        """Standard output as JSON: all of it, so nothing else may be written there."""
        return json.loads(self.ok(*words))

    def refused(self, *words: object) -> str:
        """The sentence of an error that the user can mend."""
        result = self.run(*words)
        assert isinstance(result.exception, PersonaLensError), (result.output, result.exception)
        return str(result.exception)
