"""``python -m benchmarks.judging FOLDER [TRAIT...]``: the likelihood judge by one to five instruction pairs.

For each trait, on the embedded model: responses of both arms, and steered ones to the held-out questions; how far the
scores by fewer pairs agree with those by all five and with a sentiment lexicon, and what they cost. `judging_ratio`,
part of ``python -m benchmarks``, is judging at the paper's scale, against a server that delays and fails.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from benchmarks.ratios import Ratio
from persona_lens.backend import Backend, open_backend
from persona_lens.backend.blocks import ModuleBackend
from persona_lens.cli.display import cell, print_plain_table, quiet_libraries
from persona_lens.core.progress import Progress, no_progress
from persona_lens.core.statistics import auc
from persona_lens.extraction import ExtractionSettings, extract
from persona_lens.extraction.experiment import Experiment, run_folder
from persona_lens.judging import Exchange, Judgement, LikelihoodJudge, LLMJudge, Score, fit_calibration
from persona_lens.judging.agreement import Scored, compare, response_id
from persona_lens.models.chat import chat_format
from persona_lens.models.server import CompletionCache, CompletionServer, ServerSettings
from persona_lens.runs.settings import RolloutSettings
from persona_lens.steering import SweepSettings
from persona_lens.steering.sweep import edits_of, plan_sweep
from persona_lens.traits import Arm, Trait, load_trait

RESPONSES, DELAY = 2000, 0.1
FAULTS = {"failing": 0.05, "malformed": 0.01}
LIMIT = 1.3
LAYER, PAIRS = 21, 5
REPLIES = RolloutSettings(max_new_tokens=40, temperature=0.6)  # as those of the demonstration
LEXICON = {"optimistic": 1, "impolite": -1}  # traits that a lexicon of sentiments sees something of, and how


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


class EachPair(LikelihoodJudge):
    """The likelihood judge by all pairs, each by itself."""

    def differences(self, exchanges: Sequence[Exchange]) -> NDArray[np.float64]:
        """Log-odds by each pair: [responses, pairs]; NaN for empty responses."""
        found = np.full((len(exchanges), self.pairs), np.nan)
        for chosen, tokens in self._batches(exchanges):
            means = np.array([float(values.mean()) for values in self._logprobs(tokens)]).reshape(-1, len(chosen))
            found[chosen] = (means[: self.pairs] - means[self.pairs : -1]).T
        return found


class Arms:
    """A judge who knows which arm a response of an extraction is of, so that all of them make up the vectors."""

    concurrency = 1

    def describe(self) -> dict[str, Any]:
        """See `persona_lens.judging.Judge`."""
        return {"judge": "arms"}

    def pieces(self, exchanges: Sequence[Exchange]) -> list[list[int]]:
        """All at once."""
        return [list(range(len(exchanges)))]

    def judge(self, exchanges: Sequence[Exchange], progress: Progress = no_progress) -> list[Judgement]:
        """Twins stand side by side, the positive one first."""
        return [Judgement(Score(100.0 if number % 2 == 0 else 0.0)) for number in range(len(exchanges))]


def responses(backend: Backend, trait: Trait, folder: Path) -> tuple[list[Exchange], NDArray[np.bool_]]:
    """Responses of both arms, and which are of the positive one; behind them those steered, or not, without an arm."""
    chat = chat_format(backend)
    settings = ExtractionSettings(rollouts=REPLIES)
    extraction = extract(backend, trait, folder / f"{trait.name}-extraction", settings=settings, judge=Arms())
    asked = SweepSettings((LAYER,), rollouts=REPLIES)
    requests, edits = plan_sweep(trait, asked), edits_of(extraction.vectors, asked)
    with run_folder(folder / f"{trait.name}-steering", {"seed": asked.seed}) as run:
        steered = Experiment(backend, chat, requests, REPLIES, {}, edits).run(run).rollouts
    exchanges = [Exchange(each.request.question, each.response, each.response_ids) for each in extraction.rollouts]
    positive = [each.request.labels["arm"] == Arm.POSITIVE for each in extraction.rollouts]
    exchanges += [Exchange(each.request.question, each.response, each.response_ids) for each in steered]
    return exchanges, np.array(positive)


def cost(judge: LikelihoodJudge, exchanges: Sequence[Exchange]) -> tuple[float, float]:
    """Tokens that the model runs over, padding included, and CPU seconds; of one response on average."""
    tokens: list[int] = []
    assert isinstance(judge.backend, ModuleBackend)
    hook = judge.backend.module.register_forward_pre_hook(
        lambda _, __, given: tokens.append(given["input_ids"].numel()), with_kwargs=True
    )
    start = time.process_time()
    judge.evidence(exchanges)
    seconds = time.process_time() - start
    hook.remove()
    return sum(tokens) / len(exchanges), seconds / len(exchanges)


def fewer_pairs(backend: Backend, trait: Trait, folder: Path) -> None:
    """Print what fewer pairs bring and cost for a trait."""
    exchanges, positive = responses(backend, trait, folder)
    arms = len(positive)
    by_pair = EachPair(backend, chat_format(backend), trait, pairs=PAIRS).differences(exchanges)
    there = ~np.isnan(by_pair[:, 0])
    lexicon = SentimentIntensityAnalyzer()
    witness = [LEXICON[trait.name] * lexicon.polarity_scores(each.response)["compound"] for each in exchanges]

    def scored(values: Sequence[float]) -> list[Scored]:
        """Of the steered responses, which no instruction has a part in."""
        rows = zip(exchanges[arms:], values[arms:], there[arms:], strict=True)
        return [Scored(response_id(e.question, e.response), e.question, e.response, v) for e, v, ok in rows if ok]

    def scores(evidence: NDArray[np.float64]) -> list[float]:
        known = there[:arms].nonzero()[0]
        calibration = fit_calibration(evidence[known].tolist(), positive[known].tolist())
        return [calibration.score(value) for value in evidence]

    whole, rows = scored(scores(by_pair.mean(axis=1))), []
    for pairs in range(1, PAIRS + 1):
        judge = LikelihoodJudge(backend, chat_format(backend), trait, pairs=pairs)
        evidence = by_pair[:, judge.compared].mean(axis=1)
        own, of_arms = scored(scores(evidence)), evidence[:arms]
        apart = auc(of_arms[there[:arms] & positive], of_arms[there[:arms] & ~positive])
        tokens, seconds = cost(judge, exchanges[:20])
        row = [str(pairs), f"{tokens:.0f}", f"{seconds:.2f}", f"{apart:.3f}"]
        for other in (whole, scored([50 + 50 * value for value in witness])):
            found = compare(other, own)
            for measure in (found.pearson, found.spearman, found.pairwise_first):
                ends = {"low": measure.low, "high": measure.high, "n": found.questions}
                row.append(cell({"mean": measure.value, **ends}, ".2f"))
        rows.append(row)
    with_other = [f"{m} with {other}" for other in ("all", "VADER") for m in ("Pearson", "Spearman", "pairwise")]
    head = ["pairs", "tokens", "CPU s", "AUC of arms", *with_other]
    print(f"{trait.name}, {int(there[arms:].sum())} steered responses, {backend.info.dtype}")
    print_plain_table(head, rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.judging", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("traits", nargs="*", help=f"of {', '.join(LEXICON)}; all by default")
    arguments = parser.parse_args()
    quiet_libraries()
    backend = open_backend("transformers", "smollm2-135m")
    for name in arguments.traits or LEXICON:
        fewer_pairs(backend, load_trait(name), arguments.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
