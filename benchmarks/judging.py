"""Judging at the paper's scale, against a server that delays and fails; beside the time that is needed at least."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from benchmarks.ratios import Ratio
from persona_lens.judging import Exchange, LLMJudge
from persona_lens.models.server import CompletionCache, CompletionServer, ServerSettings
from persona_lens.traits import load_trait

RESPONSES, DELAY = 2000, 0.1
FAULTS = {"failing": 0.05, "malformed": 0.01}
LIMIT = 1.3


@contextmanager
def failing_server() -> Iterator[str]:
    """A server in a process of its own; yields its address."""
    options = json.dumps({"delay": DELAY, **FAULTS})
    command = [sys.executable, "-m", "tests.models.server.loopback", options]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.communicate()


def judging_ratio(pairs: int) -> Ratio:
    """Time for a trait and a coherence score of each response / judgements x delay / requests at once."""
    exchanges = [Exchange(f"Question {i % 20}?", f"Response {i}. " + "Some words. " * 100) for i in range(RESPONSES)]
    times, least = [], 0.0
    for _ in range(pairs):
        with failing_server() as url, tempfile.TemporaryDirectory() as folder:
            server = CompletionServer(ServerSettings("judge", url), CompletionCache(folder))
            judge = LLMJudge(server, load_trait("optimistic"))
            judge.judge(exchanges[:1])
            start = time.perf_counter()
            judged = judge.judge(exchanges)
            times.append(time.perf_counter() - start)
            assert all(j.trait.value is not None and j.coherence and j.coherence.value is not None for j in judged)
            least = 2 * (RESPONSES - 1) * DELAY / server.settings.concurrency
    ratios = [seconds / least for seconds in times]
    name = f"judging {RESPONSES} responses with coherence, 6% of attempts failing / delay x judgements / at once"
    return Ratio(name, median(ratios), min(ratios), max(ratios), median(times), least, LIMIT)
