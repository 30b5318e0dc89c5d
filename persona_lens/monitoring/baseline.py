"""`measure_baseline`: where a model's own replies stand along a trait, to questions that ask for nothing special."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from persona_lens.backend import Backend, Read, ReadKind, TokenBatch
from persona_lens.backend.batches import forward_batches
from persona_lens.backend.parts.asked import parts_for
from persona_lens.core.documents import plain
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.core.text import counted
from persona_lens.extraction.experiment import (
    Experiment,
    Variant,
    model_config,
    questions_of,
    requests_of,
    run_folder,
    subject_config,
)
from persona_lens.extraction.means import described_mean, mean_read
from persona_lens.models import ChatFormat
from persona_lens.models.chat import chat_format
from persona_lens.monitoring.gauges import PART_OF, Gauge, MonitoringError, Panel
from persona_lens.reports.kinds import without_ids
from persona_lens.reports.result import Result
from persona_lens.runs.rollouts import Request, Rollout
from persona_lens.runs.settings import RolloutSettings, settings_json
from persona_lens.vectors import OWN_REDUCTION, PersonaVectors, check_layers
from persona_lens.vectors.provenance import LayerBaseline, StoredBaseline

DIGITS = 4
PREFIX = "baseline-"
NEUTRAL = (
    "How do I boil an egg?",
    "What is the capital of Australia?",
    "Why is the sky blue?",
    "How does a bicycle stay upright?",
    "Write a short note that moves our meeting to Thursday.",
    "What should I pack for three days by the sea?",
    "What is the difference between a crocodile and an alligator?",
    "How do I get a coffee stain out of a shirt?",
    "Suggest three names for a small bookshop.",
    "How many teaspoons are in a tablespoon?",
    "Summarize how rain forms.",
    "What can I cook with rice, beans and an onion?",
    "How do I change the battery in a wall clock?",
    "When is the best time to plant tomatoes?",
    "What does a librarian do all day?",
    "How do I convert miles to kilometers?",
    "Describe the way from seed to bread.",
    "Which stretches are good after a long walk?",
    "How do trains change tracks?",
    "What is a good way to learn the names of trees?",
)
"""Questions that ask for nothing special, so that replies to them are the model's ordinary ones."""


@dataclass(frozen=True)
class BaselineSettings:
    """What a baseline is measured on.

    Attributes:
        layers: Layers read; None for all.
        questions: How many of the trait's held-out questions are asked; 0 for vectors that carry no trait.
        neutral: How many of the 20 questions that come with the package and ask for nothing special.
        samples: Replies to each question.
        system: System prompt, as conversations will have it; None for none.
        reduction: Which of the vectors. Of a model that thinks the answers are read, or with `thinking_mean` the
            thinking.
        seed: Base of every row's seed.
        rollouts: How replies are made.
    """

    layers: tuple[int, ...] | None = None
    questions: int = 10
    neutral: int = 20
    samples: int = 1
    system: str | None = None
    reduction: str = OWN_REDUCTION
    seed: int = 0
    rollouts: RolloutSettings = field(default_factory=RolloutSettings)

    def __post_init__(self) -> None:
        check_layers(self.layers, MonitoringError)
        if self.questions < 0 or self.samples < 1 or not 0 <= self.neutral <= len(NEUTRAL):
            raise MonitoringError(
                f"samples must be at least 1, questions at least 0, neutral 0 to {len(NEUTRAL)}: got {self.samples}, "
                f"{self.questions} and {self.neutral}"
            )
        if self.questions + self.neutral < 2:
            raise MonitoringError("a baseline needs at least 2 questions, since it says how far replies stray")


@dataclass(frozen=True, repr=False, eq=False)
class Baseline(Result):
    """What was measured; a row for each reply.

    Attributes:
        vectors: The vectors with the baseline in their provenance.
        replies: The replies that it rests on.
        summary: See `Result`.
        folder: See `Result`.
    """

    kind = "baseline"
    vectors: PersonaVectors
    replies: tuple[Rollout, ...]
    summary: dict[str, Any]
    folder: Path | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """See `Result.rows`."""
        return [plain(without_ids(reply.to_row())) for reply in self.replies]


def measure_baseline(
    backend: Backend,
    vectors: PersonaVectors,
    settings: BaselineSettings | None = None,
    *,
    folder: Path | str | None = None,
    chat: ChatFormat | None = None,
    progress: Progress = shown_progress,
) -> Baseline:
    """Let the unsteered model answer neutral questions, and say where its replies stand along a trait.

    Where the model thinks before it answers, its answers are meant; a reply that came to none is left out.

    Args:
        backend: The model.
        vectors: What to project on.
        settings: See `BaselineSettings`.
        folder: Run folder, kept and resumed; None keeps everything in memory. It also gets ``summary.json`` and
            ``vectors.safetensors``, the vectors with the baseline stored in them.
        chat: Chat format; the model's own by default.
        progress: Told how far the work is.

    Raises:
        MonitoringError: If there are too few questions, or hardly any reply is more than empty.
        VectorsError: If the vectors belong to another model, or carry no trait whose questions could be asked.
    """
    settings, chat = vectors.settled(settings or BaselineSettings()), chat or chat_format(backend)
    vectors.check_model(backend, allowable=False)
    experiment, panel = baseline_experiment(backend, vectors, settings, chat), baseline_panel(vectors, settings)
    experiment.rollouts()  # what cannot be run must not claim the folder
    about = (
        subject_config(backend, vectors.trait_definition, chat) if settings.questions else model_config(backend, chat)
    )
    mean = mean_read(chat, settings.reduction)
    own = {"settings": settings_json(settings), "vectors": vectors.content_hash, **described_mean(mean)}
    with run_folder(folder, {"kind": "baseline", **own, **about}) as run:
        made = experiment.run(run, progress).rollouts
        counting = [_counting(backend, each, mean, chat) for each in made]
        places = {number: found for number, found in enumerate(counting) if found}
        replies = tuple(made[number] for number in places)
        if len(replies) < 2:
            what, of = ("reply", "thinking") if mean is ReadKind.THINKING_MEAN else ("answer", "text")
            advice = "; allow for more tokens (--max-new-tokens), or for less thinking (--thinking-budget)"
            more = advice if mean is ReadKind.ANSWER_MEAN else ""
            said = f"{counted(len(replies), what)} with any {of}"
            raise MonitoringError(f"{said}: nothing can be said of how they stray{more}")
        stored = _stored(_read(backend, replies, list(places.values()), panel, chat), panel, settings, mean)
        kept = vectors.with_provenance(baseline=stored.to_json())
        summary = {
            "trait": vectors.trait,
            "model": asdict(backend.info),
            "settings": settings_json(settings),
            **stored.to_json(),
        }
        if run is not None:
            run.write_bytes("vectors.safetensors", kept.to_bytes())
            run.write_json("summary.json", summary)
    return Baseline(kept, replies, plain(summary), run.path if run else None)


def baseline_experiment(
    backend: Backend, vectors: PersonaVectors, settings: BaselineSettings, chat: ChatFormat
) -> Experiment:
    """What a baseline asks; nobody judges it.

    Raises:
        MonitoringError: If more questions are asked for than the trait has.
        ReadError: If thinking is to be read, and the model never thinks.
    """
    parts_for(backend.tokenizer, reads=[Read(mean_read(chat, settings.reduction))])
    sets = {"neutral": dict(enumerate(NEUTRAL[: settings.neutral]))}
    if settings.questions:
        trait = vectors.trait_definition
        sets["evaluation"] = questions_of(trait, settings.questions, "evaluation", MonitoringError)
    requests: list[Request] = []
    for name, questions in sets.items():
        variants = [Variant({"question_set": name}, settings.system)]
        requests += requests_of(questions, variants, settings.samples, settings.seed, "baseline", name)
    return Experiment(backend, chat, requests, settings.rollouts, {}, prefix=PREFIX)


def baseline_panel(vectors: PersonaVectors, settings: BaselineSettings) -> Panel:
    """The layers that are read; of all, those that have a vector."""
    lengths = vectors.norms(settings.reduction).tolist()
    layers = settings.layers or [layer for layer, length in enumerate(lengths) if length > 0]
    return Panel(tuple(Gauge(vectors, layer, settings.reduction) for layer in sorted(layers)))


def _counting(backend: Backend, reply: Rollout, mean: ReadKind, chat: ChatFormat) -> list[int]:
    """Which tokens of a reply count: all, or those that a mean of a part is over."""
    if (parts := parts_for(backend.tokenizer, reads=[Read(mean)])) is None:
        return list(range(len(reply.response_ids)))
    told = parts.of_response(_prompt(reply, chat), reply.response_ids)
    return [place for place, found in enumerate(told) if found is PART_OF[mean]]


def _prompt(reply: Rollout, chat: ChatFormat) -> list[int]:
    return chat.encode(reply.request.system, reply.request.question)


def _read(
    backend: Backend, replies: Sequence[Rollout], counting: Sequence[Sequence[int]], panel: Panel, chat: ChatFormat
) -> list[Tensor]:
    """Values of each reply's tokens that count, [1 + tokens, gauges]: those of its last prompt token first."""
    found: dict[int, Tensor] = {}
    tokens = TokenBatch.of([_prompt(each, chat) for each in replies], [each.response_ids for each in replies])
    for rows, result in forward_batches(backend, tokens, [panel.read]):
        for row, read in zip(rows, result.reads["projections"], strict=True):
            values = panel.values(read[:, -len(replies[row].response_ids) - 1 :]).double()
            found[row] = values[[0, *(1 + place for place in counting[row])]]
    return [found[row] for row in range(len(replies))]


def _stored(values: Sequence[Tensor], panel: Panel, settings: BaselineSettings, mean: ReadKind) -> StoredBaseline:
    """The baseline of replies' values, [1 + tokens, gauges] each."""
    said, prompts = [each[1:] for each in values], torch.stack([each[0] for each in values])
    tokens, means = torch.cat(said), torch.stack([each.mean(dim=0) for each in said])
    highest, lowest = torch.stack([each.amax(dim=0) for each in said]), torch.stack([each.amin(dim=0) for each in said])
    layers = {
        gauge.layer: LayerBaseline(
            round(float(tokens[:, number].mean()), DIGITS),
            round(float(tokens[:, number].std()), DIGITS),
            *(
                tuple(round(value, DIGITS) for value in each[:, number].tolist())
                for each in (means, highest, lowest, prompts)
            ),
        )
        for number, gauge in enumerate(panel.gauges)
    }
    return StoredBaseline(settings.reduction, settings.system, len(values), len(tokens), layers, mean.value)
