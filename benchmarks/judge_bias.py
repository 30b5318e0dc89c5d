"""``python -m benchmarks.judge_bias READER RUN...``: does the likelihood judge favour vectors that share its prompts?

Vector and judge come from the same model and the same instructions. Here two vectors are made of one extraction (RUN, a
run folder of the embedded model): *shared* from the responses to the instruction pairs that the judge compares, and
*apart* from those to the others. Both steer replies to the held-out questions with steps of one length, beside random
directions and a system prompt that the judge does not compare. Replies are scored by the judge, and by two witnesses
that know nothing of it: the VADER lexicon, and a second model (READER, a folder with one of sentence embeddings), by
whose embeddings a logistic regression tells the arms of responses to the other pairs apart. What the judge gives beyond
what a witness's score foretells in replies without any vector is its excess; a judge that favours vectors of its own
prompts has a greater excess under *shared* than under *apart*.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from benchmarks.judging import LEXICON
from persona_lens.backend import Backend, open_backend
from persona_lens.cli.display import cell, print_plain_table, quiet_libraries
from persona_lens.core.statistics import Estimate, pearson
from persona_lens.data.tables import read_rows
from persona_lens.extraction.experiment import averaged, estimated
from persona_lens.judging import LikelihoodJudge
from persona_lens.models.chat import chat_format
from persona_lens.runs.rollouts import ROLLOUTS
from persona_lens.runs.settings import RolloutSettings
from persona_lens.steering import Steering
from persona_lens.steering.arms import RANDOM, UNSTEERED, VECTOR, ArmRow, ArmSettings, Prompted, minus
from persona_lens.steering.comparison import compare
from persona_lens.traits import Arm, Trait
from persona_lens.vectors import PersonaVectors
from persona_lens.vectors.samples import RunSamples, read_samples

LAYER, LENGTH = 18, 1.5  # of a step, in lengths of the run's own vector
SHARED, APART, PROMPT = "shared", "apart", "prompt"
REPLIES = RolloutSettings(max_new_tokens=40, temperature=0.7)
SAMPLES = 2
Array = NDArray[np.float64]
Witness = Callable[[Sequence[str]], Array]


def of_pairs(kept: RunSamples, pairs: Sequence[int]) -> PersonaVectors:
    """The vector at the layer, of the kept responses to some instruction pairs alone, as long as the run's own."""
    samples = kept.layer(LAYER)
    difference = torch.from_numpy(samples.chosen(np.isin(samples.pair, pairs)).difference).float()
    rows = kept.vectors.rows().clone()
    rows[LAYER] = difference / difference.norm() * rows[LAYER].norm()
    return replace(kept.vectors, directions={"response_mean": rows})


def lexicon(trait: Trait) -> Witness:
    """VADER's compound, turned towards the trait."""
    analyzer, sign = SentimentIntensityAnalyzer(), LEXICON[trait.name]
    return lambda texts: np.array([sign * analyzer.polarity_scores(text)["compound"] for text in texts])


def reader(folder: Path, run: Path, pairs: Sequence[int]) -> Witness:
    """The log-odds of the positive arm by a second model's embeddings, fitted on responses to some pairs."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    def embedded(texts: Sequence[str]) -> Array:
        found = []
        for start in range(0, len(texts), 64):
            tokens = tokenizer(list(texts[start : start + 64]), padding=True, truncation=True, return_tensors="pt")
            with torch.inference_mode():
                h, mask = model(**tokens).last_hidden_state, tokens["attention_mask"].unsqueeze(-1)
            found.append(torch.nn.functional.normalize((h * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(found).double().numpy()

    rows = [row for _, row in read_rows(run / ROLLOUTS) if row["pair"] in pairs]
    probe = LogisticRegression(max_iter=1000).fit(
        embedded([row["response"] for row in rows]), [row["arm"] == Arm.POSITIVE for row in rows]
    )
    return lambda texts: np.asarray(probe.decision_function(embedded(texts)), dtype=np.float64)


def replies(backend: Backend, kept: RunSamples, vectors: Mapping[str, PersonaVectors]) -> list[ArmRow]:
    """The judged replies of all arms."""
    arms: dict[str, Steering | Prompted] = {
        name: Steering.adding(each, LAYER, LENGTH) for name, each in vectors.items()
    }
    arms[PROMPT] = Prompted(kept.vectors.trait_definition.middle_prompt(Arm.POSITIVE))
    settings = ArmSettings(samples=SAMPLES, rollouts=REPLIES)
    folder = kept.folder.with_name(f"{kept.folder.name}-judge-bias")
    found = compare(backend, arms, kept.vectors, settings, folder=folder)
    return [row for row in found.answers if row.score is not None]


def excess(rows: Sequence[ArmRow], scores: Array, seen: Array) -> Array:
    """What the judge gives each reply beyond what a witness's score foretells in replies without any vector."""
    plain = np.array([row.arm in (UNSTEERED, PROMPT) for row in rows])
    slope, intercept = np.polyfit(seen[plain], scores[plain], 1)
    found: Array = scores - (slope * seen + intercept)
    return found


def told(backend: Backend, run: Path, folder: Path) -> None:
    """Print what the judge and the witnesses make of each arm."""
    kept = read_samples(run)
    trait = kept.vectors.trait_definition
    judge = LikelihoodJudge(backend, chat_format(backend), trait)
    others = [pair for pair in range(len(trait.instructions)) if pair not in judge.compared]
    vectors = {SHARED: of_pairs(kept, judge.compared), APART: of_pairs(kept, others)}
    one, other = (vectors[name].vector(LAYER) for name in (SHARED, APART))
    rows = replies(backend, kept, vectors)
    cosine = float(torch.nn.functional.cosine_similarity(one, other, dim=0))
    print(f"{trait.name}: {len(rows)} replies; the cosine of the two vectors at layer {LAYER} is {cosine:.2f}")
    arms = {
        UNSTEERED: [row.arm == UNSTEERED for row in rows],
        PROMPT: [row.arm == PROMPT for row in rows],
        SHARED: [(row.arm, row.direction) == (SHARED, VECTOR) for row in rows],
        APART: [(row.arm, row.direction) == (APART, VECTOR) for row in rows],
        RANDOM: [row.direction == RANDOM for row in rows],
    }
    scores = np.array([float(row.score or 0) for row in rows])
    witnesses = {"VADER": lexicon(trait), "second model": reader(folder, run, others)}
    lines = []
    for name, witness in witnesses.items():
        seen = witness([row.text for row in rows])
        over = excess(rows, scores, seen)
        by_arm = {arm: averaged(_of(rows, over, mask)) for arm, mask in arms.items()}
        for arm, mask in arms.items():
            r = float(pearson(seen[mask], scores[mask]))
            means = [_shown(estimated(averaged(_of(rows, values, mask)))) for values in (scores, seen)]
            lines.append([name, arm, *means, f"{r:.2f}", _shown(estimated(by_arm[arm]))])
        bias = estimated(minus(by_arm[SHARED], by_arm[APART]))
        lines.append([name, f"{SHARED} - {APART}", "", "", "", _shown(bias)])
    print_plain_table(["witness", "arm", "judge's score", "witness's score", "r", "judge's excess"], lines)


def _of(rows: Sequence[ArmRow], values: Array, mask: Sequence[bool]) -> list[tuple[int, float | None]]:
    return [(row.question, float(value)) for row, value, ok in zip(rows, values, mask, strict=True) if ok]


def _shown(estimate: Estimate | None) -> str:
    return "" if estimate is None else str(cell(estimate.to_json(), ".2f"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.judge_bias", description=__doc__)
    parser.add_argument("reader", type=Path)
    parser.add_argument("runs", nargs="+", type=Path, help=f"of {', '.join(LEXICON)}")
    arguments = parser.parse_args()
    quiet_libraries()
    backend = open_backend("transformers", "smollm2-135m")
    for run in arguments.runs:
        told(backend, run, arguments.reader)
    return 0


if __name__ == "__main__":
    sys.exit(main())
