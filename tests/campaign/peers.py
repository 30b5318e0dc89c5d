"""A judge's server that lies, in every way of `tests.models.server.liars`, from its first answer and from a later one.

Each command ends in time, with the right scores or with the project's own error that says what the server did; the
cache holds nothing but right answers, the key stands nowhere, and memory does not grow.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from typer.testing import CliRunner

from persona_lens import PersonaLensError
from persona_lens.cli import app
from tests.campaign.counts import Counts
from tests.models.server.liars import KEY, LIES, TRUTHS, Lie, lying

RESPONSES = 4
TIMEOUT = 0.5  # seconds for an answer, of which a request here may have eight
MOST_SECONDS, MOST_MEMORY = 30.0, 96 * 2**20
SECRETS = (KEY, "u:pass@", "key=abc")


def attack(seed: int, size: float) -> Counts:
    """Have responses scored through every lie."""
    counts, draw = Counts(), random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        score_with(Lie(lambda asked: asked.send(asked.truth())), 0, Path(scratch) / "warm")  # imports are no growth
        for number, (name, lie) in enumerate(LIES.items()):
            if number >= max(1, round(size * len(LIES))):
                break
            for honest in (0, draw.randint(1, 2 * RESPONSES))[: 1 + lie.late]:
                failure = score_with(lie, honest, Path(scratch) / f"{number}-{honest}")
                again = f" ({name!r} after {honest} honest answers, seed {seed})"
                counts.add("from the first answer on" if honest == 0 else "later", failure and failure + again)
    return counts


def score_with(lie: Lie, honest: int, folder: Path) -> str | None:
    """Run one command against a lie; what promise it broke, or None."""
    folder.mkdir()
    source, out, cache = folder / "responses.jsonl", folder / "scores.jsonl", folder / "cache"
    rows = [{"question": "What now?", "response": f"Answer {number}."} for number in range(RESPONSES)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    began, before = time.monotonic(), _memory()
    with lying(lie, honest) as url, _environment(cache):
        judge = ("--judge", "openai:judge", "--judge-url", url, "--judge-key", "A_KEY", "--trait", "optimistic")
        result = CliRunner().invoke(app, ["judge", "score", str(source), *judge, "--out", str(out)])
    said = result.output + str(result.exception or "")
    if result.exception is not None and not isinstance(result.exception, PersonaLensError):
        return f"it fell over: {result.exception!r}"
    if time.monotonic() - began > MOST_SECONDS:
        return f"it took {time.monotonic() - began:.0f} seconds"
    if _memory() - before > MOST_MEMORY:
        return f"it took {(_memory() - before) / 2**20:.0f} MB"
    return _wrong_outcome(lie, honest, said, out if result.exception is None else None) or _wrong_files(folder, said)


def _wrong_outcome(lie: Lie, honest: int, said: str, out: Path | None) -> str | None:
    if out is None:
        expected = lie.quoted or ("" if honest else "(no error)")
        return None if re.search(expected, said) else f"the error does not say {expected!r}: {said}"
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    wrong = [row for row in rows if row["score"] != 80 and not (honest and row["score"] is None and row["reason"])]
    if wrong:
        return f"a wrong score: {wrong[0]}"
    return f"scores in spite of {lie.quoted!r}" if lie.quoted and not honest else None


def _wrong_files(folder: Path, said: str) -> str | None:
    for file in folder.glob("cache/completions/*/*.json"):
        text = json.loads(file.read_text())["text"]
        if text.rpartition("</think>")[2] not in TRUTHS:
            return f"the cache holds {text!r}"
    written = "".join(file.read_text() for file in folder.rglob("*") if file.is_file()) + said
    found = [secret for secret in (*SECRETS, "\x1b") if secret in written]
    return f"it shows {found[0]!r}" if found else None


@contextmanager
def _environment(cache: Path) -> Iterator[None]:
    known = {"A_KEY": KEY, "PERSONA_LENS_CACHE": str(cache)}
    with (
        mock.patch.dict(os.environ, known),
        mock.patch("persona_lens.models.endpoint.TIMEOUT", TIMEOUT),
        mock.patch("persona_lens.models.sending.FIRST_WAIT", 0.005),
        mock.patch("persona_lens.models.sending.LONGEST_WAIT", 0.02),
    ):
        yield


def _memory() -> int:
    """The most bytes that this process ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
