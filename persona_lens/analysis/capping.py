"""`cap_axis`: where and how far a model is kept on the Assistant's side: searched, and confirmed on other prompts.

A cap is a floor on the projection along the axis, at several adjacent layers at once, at a percentile of the model's
own responses (Lu et al., arXiv 2601.10387, on activation capping).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from persona_lens.analysis import AnalysisError
from persona_lens.analysis.bench import CONFIRM, SEARCH, UNCAPPED, Arm, Bench, CapSettings, Measured
from persona_lens.backend import Backend, Edit
from persona_lens.core.documents import Record, plain
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.core.statistics import CHANGES, SHARE_CHANGES, Ends, Estimate, bootstrap_mean
from persona_lens.extraction.experiment import json_of, run_folder
from persona_lens.extraction.run import VECTORS
from persona_lens.judging import Judge
from persona_lens.models import ChatFormat
from persona_lens.models.chat import chat_format
from persona_lens.reports.result import Result
from persona_lens.runs import RunFolder
from persona_lens.runs.settings import settings_json
from persona_lens.steering import Steering, parse_terms
from persona_lens.traits.role import DefaultAssistant, Role, find_roles, load_default
from persona_lens.vectors import PersonaVectors, load_vectors
from persona_lens.vectors.persona_space import ASSISTANT, PersonaSpace, load_space
from persona_lens.vectors.samples import saved_means

STEERING = "steering.safetensors"


@dataclass(frozen=True)
class Candidate(Record):
    """A cap that was tried.

    Attributes:
        text: The steering's notation.
        persona: Change of the score by which replies to persona prompts play their role, points of 100, over roles.
        surprise: Change of how much ordinary replies surprise the uncapped model, nats a token, over questions.
        accuracy: Change of the share of right answers, over samples.
        on_front: Whether no other has at least as much effect at no more cost, by either cost.
        acceptable: Whether its costs are within what is accepted.
    """

    text: str
    persona: Estimate
    surprise: Estimate
    accuracy: Estimate
    on_front: bool = False
    acceptable: bool = False


@dataclass(frozen=True, repr=False, eq=False)
class Capping(Result):
    """What was found.

    Attributes:
        steering: The cap that was chosen; None if none does anything at an acceptable cost.
        candidates: Every cap tried, in the search.
        summary: See `Result`.
        folder: See `Result`.
    """

    kind = "cap"
    steering: Steering | None
    candidates: tuple[Candidate, ...]
    summary: dict[str, Any]
    folder: Path | None = None


@dataclass(frozen=True)
class AxisRun:
    """A finished run of `persona_lens.extraction.axis.persona_axis`.

    Attributes:
        folder: Its folder.
        space: Its persona space.
        vectors: Its axis.
    """

    folder: Path
    space: PersonaSpace
    vectors: PersonaVectors

    @staticmethod
    def load(folder: Path | str) -> AxisRun:
        """Read it.

        Raises:
            VectorsError: If it is none, or not finished.
        """
        return AxisRun(Path(folder), load_space(folder), load_vectors(folder))

    @cached_property
    def responses(self) -> int:
        """How many responses it has."""
        levels = self.vectors.levels
        if levels is None:
            raise AnalysisError(f"{self.folder} holds no percentiles; make it again with `persona-lens axis`")
        return levels.responses

    def roles(self, roles_dirs: Sequence[Path | str] = ()) -> dict[str, Role]:
        """Its roles by name, as far as they are within reach; see `persona_lens.traits.find_roles`."""
        catalogue = find_roles(roles_dirs)
        return {name: catalogue.find(name).read() for name in self.space.roles if name in catalogue.names}

    def farthest(self, count: int) -> list[str]:
        """The roles that stand farthest from the default along the axis at the middle layer."""
        layer = self.space.model.n_layers // 2
        along = self.space.means[:, layer] @ self.vectors.vector(layer)
        order = along.argsort()[:count].tolist()
        return [self.space.roles[place] for place in order]

    def randoms(self, layers: Sequence[int], percentile: float, seeds: Sequence[int]) -> list[tuple[Edit, ...]]:
        """For each seed a floor along a random direction at each layer, at that percentile of its own projections."""
        shape = (self.space.model.n_layers, self.space.model.d_model)
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        units = noise / noise.norm(dim=-1, keepdim=True)
        means = saved_means(self.folder, self.space.reduction, self.responses, shape)  # large: one pass serves all
        along = np.stack([np.einsum("ld,sld->sl", mean, units.numpy()) for _, mean in means])
        levels = np.nanpercentile(along, percentile, axis=0)
        return [
            tuple(Edit.floor(layer, unit[layer], float(level[layer])) for layer in layers)
            for unit, level in zip(units, levels, strict=True)
        ]


def cap_axis(
    backend: Backend,
    axis: AxisRun | Path | str,
    folder: Path | str | None = None,
    *,
    roles: Mapping[str, Role] | None = None,
    default: DefaultAssistant | None = None,
    settings: CapSettings | None = None,
    judges: Mapping[str, Judge] | None = None,
    chat: ChatFormat | None = None,
    progress: Progress = shown_progress,
) -> Capping:
    """Find a cap that keeps a model on the Assistant's side at little cost, and confirm it on other prompts.

    Args:
        backend: The model.
        axis: The run that its axis comes from, or its folder.
        folder: Run folder, kept and resumed; None keeps everything in memory.
        roles: Those of that run, by name; those within reach by default.
        default: The default Assistant of that run; the built-in one by default.
        settings: See `CapSettings`.
        judges: By role, see `persona_axis`.
        chat: Chat format; the model's own by default.
        progress: Told how far the work is.

    Raises:
        AnalysisError: If there are too few questions or roles, or a range does not exist.
        VectorsError: If the axis belongs to another model.
    """
    settings, chat = settings or CapSettings(), chat or chat_format(backend)
    axis, default = axis if isinstance(axis, AxisRun) else AxisRun.load(axis), default or load_default()
    roles = axis.roles() if roles is None else roles
    axis.vectors.check_model(backend, allowable=False)
    chosen = _chosen_roles(axis, roles, settings)
    steerings = _candidates(axis, settings)
    bench = Bench(backend, chat, settings, {name: roles[name] for name in chosen}, default, judges)
    about = {"settings": settings_json(settings), "vectors": axis.vectors.content_hash}
    with run_folder(folder, {"kind": "cap", **about, **bench.describe()}) as run:
        bench.prepare(run)
        arms = [Arm(UNCAPPED, ()), *(Arm(str(each), each.edits()) for each in steerings)]
        found = bench.measure(arms, SEARCH, run, progress)
        candidates = _judged_costs([_candidate(arm, found[UNCAPPED], found[arm.name]) for arm in arms[1:]], settings)
        best = _best(candidates)
        steering = next((each for each in steerings if str(each) == best), None)
        summary = {
            **_told(backend, settings, chosen, found[UNCAPPED], candidates),
            "chosen": None if steering is None else str(steering),
            "confirmed": _confirm(bench, axis, steering, run, progress) if steering else None,
            "judge": bench.judge_used,
            "samples": bench.samples,
        }
        if run is not None:
            run.write_rows("cap-scores.jsonl", bench.rows)
            run.write_json("summary.json", summary)
            if steering is not None:
                steering.save(run.path / STEERING)
                run.write_bytes(VECTORS, axis.vectors.to_bytes())
    return Capping(steering, candidates, plain(summary), run.path if run else None)


def _told(
    backend: Backend,
    settings: CapSettings,
    roles: Sequence[str],
    uncapped: Measured,
    candidates: Sequence[Candidate],
) -> dict[str, Any]:
    """What is told of the search."""
    return {
        "model": asdict(backend.info),
        "settings": settings_json(settings),
        "roles": {"search": roles[::2], "confirmation": roles[1::2]},
        "uncapped": {name: json_of(_mean(getattr(uncapped, name))) for name in ("persona", "accuracy")},
        "candidates": [each.to_json() for each in candidates],
    }


def _confirm(
    bench: Bench, axis: AxisRun, steering: Steering, run: RunFolder | None, progress: Progress
) -> dict[str, Any]:
    """The cap on other roles and questions, beside random directions."""
    nulls = _nulls(axis, steering, bench.settings)
    arms = [Arm(UNCAPPED, ()), Arm(str(steering), steering.edits()), *nulls]
    return _confirmed(bench.measure(arms, CONFIRM, run, progress), str(steering))


def _nulls(axis: AxisRun, steering: Steering, settings: CapSettings) -> list[Arm]:
    """Random directions, floored as the cap is."""
    layers, percentile = _place(steering)
    seeds = range(settings.seed, settings.seed + settings.random_directions)
    floors = axis.randoms(layers, percentile, seeds) if seeds else []
    return [Arm(f"random {seed}", edits) for seed, edits in zip(seeds, floors, strict=True)]


def _chosen_roles(axis: AxisRun, roles: Mapping[str, Role], settings: CapSettings) -> list[str]:
    chosen = axis.farthest(settings.roles)
    if len(chosen) < 4:
        raise AnalysisError(f"the axis in {axis.folder} has {len(axis.space.roles)} roles, and at least 4 are needed")
    if missing := [name for name in chosen if name not in roles]:
        raise AnalysisError(f"the role {missing[0]} of {axis.folder} cannot be found; name its folder (--roles-dir)")
    return chosen


def _candidates(axis: AxisRun, settings: CapSettings) -> list[Steering]:
    """Every range at every percentile."""
    n_layers = axis.space.model.n_layers
    ranges = settings.ranges or tuple(_usual_ranges(n_layers))
    if beyond := [last for _, last in ranges if last >= n_layers]:
        raise AnalysisError(f"layer {beyond[0]} does not exist: the model has layers 0 to {n_layers - 1}")
    texts = [
        f"{ASSISTANT}@{first}-{last}:floor(p{percentile:g})"
        for first, last in ranges
        for percentile in settings.percentiles
    ]
    return [Steering(parse_terms(text), {ASSISTANT: axis.vectors}) for text in dict.fromkeys(texts)]


def _usual_ranges(n_layers: int) -> Iterator[tuple[int, int]]:
    """Ranges of an eighth and of a quarter of the layers, from half of the depth on, none with the last layer."""
    for width in dict.fromkeys((max(1, n_layers // 8), max(1, n_layers // 4))):
        starts = dict.fromkeys(round(n_layers * share) for share in (0.5, 0.625, 0.75))
        yield from ((start, start + width - 1) for start in starts if start + width < n_layers)


def _place(steering: Steering) -> tuple[tuple[int, ...], float]:
    """The layers and the percentile of a cap."""
    (term,) = steering.terms
    assert term.layers is not None  # settled when it was made
    percentile = getattr(term.amount, "value", None)
    assert percentile is not None  # every candidate has one
    return term.layers.of(steering.vectors[ASSISTANT].model.n_layers), float(percentile)


# What it comes to


def _mean(values: Mapping[int, float]) -> Estimate:
    return bootstrap_mean(list(values.values()))


def _change(base: Mapping[int, float], other: Mapping[int, float], within: Ends | None = None) -> Estimate:
    both = [other[unit] - base[unit] for unit in other if unit in base]
    if not both:
        raise AnalysisError("every reply of one kind is empty or has no score; allow for more tokens")
    return bootstrap_mean(both, within=within)


def _candidate(arm: Arm, base: Measured, found: Measured) -> Candidate:
    return Candidate(
        arm.name,
        _change(base.persona, found.persona, CHANGES),
        _change(base.surprise, found.surprise),
        _change(base.accuracy, found.accuracy, SHARE_CHANGES),
    )


def _judged_costs(candidates: Sequence[Candidate], settings: CapSettings) -> tuple[Candidate, ...]:
    """The candidates with what is said of their costs."""
    return tuple(
        replace(
            each,
            on_front=not any(_dominates(other, each) for other in candidates),
            acceptable=(each.accuracy.mean >= -settings.accept_loss and each.surprise.mean <= settings.accept_surprise),
        )
        for each in candidates
    )


def _dominates(one: Candidate, other: Candidate) -> bool:
    ours, theirs = ((each.persona.mean, each.surprise.mean, -each.accuracy.mean) for each in (one, other))
    return all(a <= b for a, b in zip(ours, theirs, strict=True)) and ours != theirs


def _best(candidates: Sequence[Candidate]) -> str | None:
    """The strongest of those on the front whose costs are accepted; None if none makes personas weaker."""
    possible = [each for each in candidates if each.on_front and each.acceptable and each.persona.mean < 0]
    return min(possible, key=lambda each: each.persona.mean).text if possible else None


def _confirmed(found: Mapping[str, Measured], name: str) -> dict[str, Any]:
    """The chosen cap on other roles and questions, beside random directions."""
    base, own = found[UNCAPPED], found[name]
    nulls = [each for arm, each in found.items() if arm not in (UNCAPPED, name)]
    told: dict[str, Any] = {}
    for quantity, within in (("persona", CHANGES), ("surprise", None), ("accuracy", SHARE_CHANGES)):
        before, after = getattr(base, quantity), getattr(own, quantity)
        random = _averaged([getattr(each, quantity) for each in nulls])
        told[quantity] = {
            "before": json_of(_mean(before)),
            "change": json_of(_change(before, after, within)),
            "random": json_of(_change(before, random, within)) if random else None,
            "difference": json_of(_change(random, after, within)) if random else None,
        }
    return told


def _averaged(values: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """The mean over random directions, unit by unit, of those that all have."""
    if not values:
        return {}
    units = set(values[0]).intersection(*values[1:])
    return {unit: sum(each[unit] for each in values) / len(values) for unit in sorted(units)}
