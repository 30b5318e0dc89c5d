"""`persona_axis`: roles that a model plays become its persona space, and the axis from them to the default Assistant.

After Lu et al., *The Assistant Axis* (arXiv 2601.10387).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from persona_lens.backend import Backend, ModelInfo, Read, ReadKind
from persona_lens.core.documents import plain
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.extraction.cells import Cells, Levels, levels_along
from persona_lens.extraction.experiment import Answers, Experiment, Variant, model_config, requests_of, run_folder
from persona_lens.extraction.means import ExtractionError, own_mean, part_means, thinking_told
from persona_lens.extraction.run import SCORES, SUMMARY, VECTORS
from persona_lens.judging import Calibration, Judge, Judgement, LikelihoodJudge
from persona_lens.judging.reading import PAIRS
from persona_lens.judging.recording import as_used, judge_rollouts, judging_work, longest_exchanges, prepare_judge
from persona_lens.models import ChatFormat
from persona_lens.models.chat import chat_format
from persona_lens.reports.result import Scored
from persona_lens.runs import RunFolder, file_prefix
from persona_lens.runs.cost import Work, together
from persona_lens.runs.rollouts import Request, Rollout, Rollouts
from persona_lens.runs.settings import RolloutSettings, settings_json
from persona_lens.traits.role import (
    GRADES,
    N_SYSTEM_PROMPTS,
    DefaultAssistant,
    PlayedRole,
    Role,
    find_roles,
    load_default,
)
from persona_lens.vectors import PersonaVectors
from persona_lens.vectors.geometry import Components, chance
from persona_lens.vectors.persona_space import ASSISTANT, PersonaSpace
from persona_lens.vectors.provenance import THINKING, THINKING_MEAN, StoredLevels

SPACE = "space.safetensors"
FULLY = len(GRADES) - 1
SHOWN_COMPONENTS = 10


@dataclass(frozen=True)
class AxisSettings:
    """Everything about an axis besides the model, the roles and the judge.

    Attributes:
        questions: How many of the shared questions are asked, of each role under each of its five prompts; the paper
            has 240, of which none are left out.
        samples: Responses for each question and prompt.
        least: Responses that must play a role so that it counts; the paper takes 10.
        layer: Layer of the map and of what is said first; None for the middle one.
        seed: Base of every row's seed.
        judge_pairs: Prompts of a role that the likelihood judge compares with neutral ones, 1 to 5.
        rollouts: How responses are made.
    """

    questions: int = 40
    samples: int = 1
    least: int = 10
    layer: int | None = None
    seed: int = 0
    judge_pairs: int = PAIRS
    rollouts: RolloutSettings = field(default_factory=RolloutSettings)

    def __post_init__(self) -> None:
        if self.questions < 2 or self.samples < 1 or self.least < 1:
            raise ExtractionError(
                "questions must be at least 2, since halves of them are compared, samples and least at least 1: got "
                f"{self.questions}, {self.samples} and {self.least}"
            )
        if self.samples > 1 and self.rollouts.temperature == 0:
            raise ExtractionError("at temperature 0 all samples are the same; set samples to 1, or a temperature")


@dataclass(frozen=True, repr=False, eq=False)
class Axis(Scored):
    """What roles come to in a model; a row for each response.

    Attributes:
        space: The roles' and the default's means.
        vectors: The axis, with the default's and the roles' percentiles along it in its provenance.
        rollouts: Every response.
        scores: Of each: its score and grade, and whether it counts as played; the default's are not judged.
        summary: See `Result`.
        folder: See `Result`.
    """

    kind = "axis"
    space: PersonaSpace
    vectors: PersonaVectors
    rollouts: list[Rollout]
    scores: list[dict[str, Any]]
    summary: dict[str, Any]
    folder: Path | None = None


def plan_roles(roles: Sequence[Role], default: DefaultAssistant, settings: AxisSettings) -> list[Request]:
    """What is asked: every question of the default and of each role, under each of its prompts.

    The default has its neutral prompts and none at all. Rows of one question and prompt number share their seed.

    Raises:
        ExtractionError: If there are fewer than three roles or a name twice, or too few questions.
    """
    names = [role.name for role in roles]
    if twice := sorted({name for name in names if names.count(name) > 1 or name == ASSISTANT}):
        raise ExtractionError(f"the role {twice[0]} is given twice, or has the default's name; give each once")
    if len(roles) < 3:
        raise ExtractionError(f"{len(roles)} roles span no persona space; give at least three (--roles)")
    if settings.questions > len(default.questions):
        raise ExtractionError(f"{settings.questions} questions asked for, there are {len(default.questions)}")
    prompts: dict[str, tuple[str | None, ...]] = {ASSISTANT: (*default.system_prompts, None)}
    prompts |= {role.name: role.system_prompts for role in roles}
    questions = dict(enumerate(default.questions[: settings.questions]))
    found = []
    for number in range(N_SYSTEM_PROMPTS):
        variants = [Variant({"role": name, "prompt": number}, each[number]) for name, each in prompts.items()]
        found += requests_of(questions, variants, settings.samples, settings.seed, "axis", number)
    return found


def persona_axis(
    backend: Backend,
    folder: Path | str | None = None,
    *,
    roles: Sequence[Role] | None = None,
    default: DefaultAssistant | None = None,
    settings: AxisSettings | None = None,
    judges: Mapping[str, Judge] | None = None,
    traits: Sequence[PersonaVectors] = (),
    chat: ChatFormat | None = None,
    progress: Progress = shown_progress,
) -> Axis:
    """Find a model's persona space and its assistant axis; of its answers, where it thinks before it answers.

    Args:
        backend: The model.
        folder: Run folder, kept and resumed; None keeps everything in memory.
        roles: At least three; all within reach by default, see `persona_lens.traits.find_roles`.
        default: The default Assistant, and what all are asked; the built-in one by default.
        settings: See `AxisSettings`.
        judges: By role: who grades its responses, 0 to 3; only those of grade 3 count. By default the model itself by
            likelihood: a response counts if it is likelier under the role's prompts than under neutral ones.
        traits: Vectors of traits, to be placed in the same space.
        chat: Chat format; the model's own by default.
        progress: Told how far the work is.

    Raises:
        ExtractionError: If fewer than three roles are played often enough.
        GeometryError: If a trait's vectors belong to another model.
        RunError: If the folder belongs to another run.
    """
    settings, chat = settings or AxisSettings(), chat or chat_format(backend)
    roles = [file.read() for file in find_roles().files] if roles is None else roles
    default = default or load_default()
    _layer(settings, backend.info)
    for each in traits:
        each.check_model(backend, allowable=False)
    experiment = axis_experiment(backend, roles, default, settings, chat)
    asked = axis_judges(backend, chat, roles, default, settings.judge_pairs, judges)
    config: dict[str, Any] = {
        "kind": "axis",
        "settings": settings_json(settings),
        "roles": {role.name: role.content_hash() for role in roles},
        "default": default.content_hash(),
        "judges": {name: judge.describe() for name, judge in asked.items()},
        "traits": {each.trait: each.content_hash for each in traits},
        **model_config(backend, chat),
    }
    with run_folder(folder, config) as run:
        for number, (name, judge) in enumerate(asked.items()):
            prepare_judge(judge, run, file_prefix(number, name))
        answers = experiment.run(run, progress)
        judged = _judged(asked, answers.rollouts, chat, run, progress)
        found = _made(answers, judged, asked, settings, traits, run.config if run else config)
        if run is not None:
            run.write_rows(SCORES, found.scores)
            run.write_bytes(SPACE, found.space.to_bytes())
            run.write_bytes(VECTORS, found.vectors.to_bytes())
            run.write_json(SUMMARY, found.summary)
    return replace(found, folder=run.path if run else None)


def _made(
    answers: Answers,
    judged: Sequence[Judgement | None],
    judges: Mapping[str, Judge],
    settings: AxisSettings,
    traits: Sequence[PersonaVectors],
    config: Mapping[str, Any],
) -> Axis:
    """What the responses come to; nothing of it is written."""
    requests = answers.collected.requests
    scores = [_score_row(request, found, judges) for request, found in zip(requests, judged, strict=True)]
    played = [row["played"] for row in scores]
    thought = _thought(played, answers)
    cells = Cells.of(requests, played, answers.collected, own_mean(thought > 0))
    counts = {name: int(count) for name, count in zip(cells.names[1:], cells.counts[1:].sum(dim=1), strict=True)}
    kept = [name for name, count in counts.items() if count >= settings.least]
    if len(kept) < 3:
        raise _too_few(counts, settings)
    cells = cells.of_roles(kept)
    judge = as_used(next(iter(judges.values())).describe(), (each for each in judged if each is not None))
    known = {**{name: each for name, each in config.items() if name != "judges"}, "judge": judge, "counts": counts}
    if thought:
        known[THINKING] = thinking_told(answers.rollouts, thought)
    space = PersonaSpace(ModelInfo(**known["model"]), tuple(kept), cells.means[1:], cells.means[0], known)
    levels = levels_along(requests, answers.collected, space)
    stored = StoredLevels(space.reduction, len(requests), dict(enumerate(map(tuple, levels["all"]))))
    summary = {
        **_summary(space, cells, levels, traits, settings),
        "responses": len(requests),
        "tokens": sum(len(rollout.response_ids) for rollout in answers.rollouts),
        "counts": counts,
        "judge": judge,
        **({THINKING: known[THINKING]} if thought else {}),
    }
    return Axis(space, space.vectors(levels=stored.to_json()), answers.rollouts, scores, plain(summary))


def axis_experiment(
    backend: Backend, roles: Sequence[Role], default: DefaultAssistant, settings: AxisSettings, chat: ChatFormat
) -> Experiment:
    """The responses that an axis is made of."""
    requests, reads = plan_roles(roles, default, settings), (Read(ReadKind.RESPONSE_MEAN), *part_means(chat))
    return Experiment(backend, chat, requests, settings.rollouts, {}, reads=reads)


def axis_work(
    backend: Backend,
    roles: Sequence[Role],
    default: DefaultAssistant,
    settings: AxisSettings,
    chat: ChatFormat,
    judges: Mapping[str, Judge] | None = None,
) -> tuple[Work, ...]:
    """What `persona_axis` with these arguments would ask of the model, and of the judges; nothing runs."""
    experiment = axis_experiment(backend, roles, default, settings, chat)
    collected = experiment.rollouts()
    assert isinstance(collected, Rollouts)  # nothing was given
    supposed = longest_exchanges(collected)
    asked = axis_judges(backend, chat, roles, default, settings.judge_pairs, judges)
    judging: list[Work] = []
    for name, judge in asked.items():
        own = [
            each for each, request in zip(supposed, experiment.requests, strict=True) if request.labels["role"] == name
        ]
        judging += judging_work(judge, own)
    return collected.work(), *together(judging)


def _layer(settings: AxisSettings, info: ModelInfo) -> int:
    layer = info.n_layers // 2 if settings.layer is None else settings.layer
    if not 0 <= layer < info.n_layers:
        raise ExtractionError(f"layer {layer} does not exist: the model has layers 0 to {info.n_layers - 1}")
    return layer


def _thought(played: Sequence[bool], answers: Answers) -> int:
    """How many of the responses that count hold any thinking."""
    found = 0
    for indices, tensors in answers.collected.reductions():
        if (means := tensors.get(THINKING_MEAN)) is not None:
            found += sum(played[i] and bool(mean.isfinite().all()) for i, mean in zip(indices, means, strict=True))
    return found


# Who played


def axis_judges(
    backend: Backend,
    chat: ChatFormat,
    roles: Sequence[Role],
    default: DefaultAssistant,
    pairs: int = PAIRS,
    given: Mapping[str, Judge] | None = None,
) -> dict[str, Judge]:
    """By role: who says how far a response plays it; the model itself by likelihood where nobody is given."""
    if given is not None:
        return {role.name: given[role.name] for role in roles}
    even = Calibration(1.0, 0.0, pairs)  # 50 where the role's prompts are as likely as neutral ones
    return {role.name: LikelihoodJudge(backend, chat, PlayedRole(role, default), even) for role in roles}


def gives_grades(judge: Judge) -> bool:
    """Whether a judge of roles gives grades, 0 to 3; the likelihood judge gives a score, 0 to 100."""
    return not isinstance(judge, LikelihoodJudge)


def _judged(
    judges: Mapping[str, Judge],
    rollouts: Sequence[Rollout],
    chat: ChatFormat,
    run: RunFolder | None,
    progress: Progress,
) -> list[Judgement | None]:
    """The judgement of each response by its role's judge; None for the default's."""
    found: list[Judgement | None] = [None] * len(rollouts)
    for number, (name, judge) in enumerate(judges.items()):
        own = [place for place, rollout in enumerate(rollouts) if rollout.request.labels["role"] == name]
        prefix = file_prefix(number, name)
        judged = judge_rollouts(judge, [rollouts[i] for i in own], chat, run, prefix=prefix, progress=progress)
        for place, judgement in zip(own, judged, strict=True):
            found[place] = judgement
    return found


def _score_row(request: Request, found: Judgement | None, judges: Mapping[str, Judge]) -> dict[str, Any]:
    """A response's line of ``scores.jsonl``."""
    if found is None:
        return {"score": None, "reason": None, "grade": None, "played": True}
    value = found.trait.value
    if not gives_grades(judges[request.labels["role"]]):
        return {"score": value, "reason": found.trait.reason, "grade": None, "played": value is not None and value > 50}
    beyond = value is not None and value > FULLY + 0.5
    reason = f"the judge gave {value:.0f}, and grades go up to {FULLY}" if beyond else found.trait.reason
    grade = None if value is None or beyond else round(value)
    return {"score": value, "reason": reason, "grade": grade, "played": grade == FULLY}


def _too_few(counts: Mapping[str, int], settings: AxisSettings) -> ExtractionError:
    best = ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda item: -item[1])[:5])
    return ExtractionError(
        f"fewer than three roles were played at least {settings.least} times (most often: {best}); ask more questions "
        "(--questions, --samples), or let roles count that were played less often (--least), with a new folder (--out)"
    )


# What is told


def _summary(
    space: PersonaSpace,
    cells: Cells,
    levels: Levels,
    traits: Sequence[PersonaVectors],
    settings: AxisSettings,
) -> dict[str, Any]:
    layer = _layer(settings, space.model)
    found = space.components(layer, settings.seed)
    shown = min(SHOWN_COMPONENTS, len(found.explained))
    coordinates = found.coordinates[:, :3]
    standings = space.standings(found)[:shown]
    return {
        "model": asdict(space.model),
        "layer": layer,
        "default_responses": int(cells.counts[0].sum()),
        "layers": [cells.evidence(each, settings.seed).to_json() for each in range(space.model.n_layers)],
        "explained": found.explained[:shown].tolist(),
        "random_explained": found.random_explained[:shown].tolist(),
        "components_for_70": int((found.explained.cumsum(0) < 0.7).sum()) + 1,
        "standings": [each.to_json() for each in standings],
        "map": [
            {"role": role, "coordinates": row} for role, row in zip(space.roles, coordinates.tolist(), strict=True)
        ],
        "default": [each.coordinate for each in standings[:3]],
        "traits": [_trait(space, found, each) for each in traits],
        "chance": chance(space.model.d_model),
        "levels": {name: rows[layer] for name, rows in levels.items()},
    }


def _trait(space: PersonaSpace, components: Components, vectors: PersonaVectors) -> dict[str, Any]:
    """How a trait's vector lies in the space."""
    rows = vectors.rows().double()
    cosines = torch.nn.functional.cosine_similarity(rows, space.axis.double(), dim=-1)
    v = vectors.vector(components.layer)
    return {
        "trait": vectors.trait,
        "axis": [float(value) if float(row.norm()) else None for value, row in zip(cosines, rows, strict=True)],
        "components": space.place(vectors, components)[:SHOWN_COMPONENTS].tolist(),
        "step": (components.directions[:3] @ v).tolist(),
    }
