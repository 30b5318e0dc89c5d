"""`Drifting`: conversations that are to be held without a steering and then, word for word, under some."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from persona_lens.backend import Backend, Read, ReadKind
from persona_lens.data.scripted import Scripted, scripted_users, spread_over_domains
from persona_lens.extraction.conversations import Conversations
from persona_lens.extraction.experiment import Variant, model_config
from persona_lens.extraction.means import described_mean, mean_read
from persona_lens.models import ChatFormat
from persona_lens.models.chat import chat_format
from persona_lens.monitoring.drift.messages import check_regression
from persona_lens.monitoring.drift.simulated_user import SimulatedUsers, UserModel, described
from persona_lens.monitoring.gauges import MonitoringError, Panel
from persona_lens.runs.cost import Work
from persona_lens.runs.settings import RolloutSettings, settings_json
from persona_lens.steering import Steering
from persona_lens.steering.arms import arm_edits, arm_variants
from persona_lens.steering.history import DEFAULT_HISTORY, History, check_history, edits_over_turns
from persona_lens.vectors import PersonaVectors

KIND = "drift"
PLAIN, REPLAYED = "plain-", "replayed-"  # begin the names of files
BEFORE = ReadKind.PROMPT_LAST


@dataclass(frozen=True)
class DriftSettings:
    """How conversations are held, and what stands beside their projections.

    Attributes:
        turns: Turns of each conversation.
        conversations: How many, from each domain in turn; None for all.
        random_directions: Random directions that replies are read on beside the vectors; 0 leaves them out.
        permutations: How often messages are shuffled, in each of two ways, beside the prediction from messages; 0
            leaves that out.
        random_replays: Random rotations of each steering under which the conversations are replayed too; conversation i
            gets rotation i modulo this number. 0 leaves them out.
        history: What steered conversations keep of the turns that are over: `steered` leaves them as they were made,
            `clean` takes the edits out of them.
        seed: Base of every row's seed, of the random directions and of all shuffling.
        rollouts: How replies are made.
    """

    turns: int = 15
    conversations: int | None = None
    random_directions: int = 20
    permutations: int = 20
    random_replays: int = 0
    history: History = DEFAULT_HISTORY
    seed: int = 0
    rollouts: RolloutSettings = field(default_factory=RolloutSettings)

    def __post_init__(self) -> None:
        if self.turns < 2:
            raise MonitoringError(f"drift needs at least 2 turns, got {self.turns}")
        if self.conversations is not None and self.conversations < 2:
            raise MonitoringError(f"intervals are over conversations, so take at least 2; got {self.conversations}")
        if min(self.random_directions, self.permutations, self.random_replays) < 0:
            raise MonitoringError("random_directions, permutations and random_replays are at least 0")


@dataclass(frozen=True)
class Drifting:
    """Conversations that are to be held, and what is read in them.

    Attributes:
        backend: The model.
        chat: Its chat format.
        panel: What is read.
        users: Who talks.
        played: Who plays them; None where they follow their scripts.
        steerings: By name, those that the conversations are replayed under.
        settings: See `DriftSettings`.
    """

    backend: Backend
    chat: ChatFormat
    panel: Panel
    users: tuple[Scripted, ...]
    played: SimulatedUsers | None
    steerings: Mapping[str, Steering]
    settings: DriftSettings

    @cached_property
    def mean(self) -> ReadKind:
        """Which mean of a reply is projected.

        Raises:
            MonitoringError: If some vectors are of the thinking, and others not.
        """
        found = {mean_read(self.chat, gauge.reduction): str(gauge) for gauge in reversed(self.panel.gauges)}
        if len(found) > 1:
            what = " and ".join(f"{kind.value} for {gauge}" for kind, gauge in sorted(found.items()))
            raise MonitoringError(f"replies are read in one way, and the vectors ask for {what}; take them one by one")
        (mean,) = found
        return mean

    @property
    def wide(self) -> Panel:
        """The panel with the random directions behind it."""
        return self.panel.with_random_directions(self.settings.random_directions, self.settings.seed)

    def plain(self) -> Conversations:
        """The conversations without a steering."""
        unsteered = arm_variants({}, 0)
        return self._held(self.users, unsteered, PLAIN, asks=self.played)

    def replayed(self, users: Sequence[Scripted]) -> Conversations | None:
        """What those people said, said again under each steering; None where there is none."""
        if not self.steerings:
            return None
        rotations, seed = self.settings.random_replays, self.settings.seed
        steered = arm_variants(self.steerings, rotations)[1:]
        edits_for = edits_over_turns(arm_edits(self.steerings, rotations, seed), self.chat, self.settings.history)
        return self._held(users, steered, REPLAYED, edits_for=edits_for)

    def _held(self, users: Sequence[Scripted], variants: Sequence[Variant], prefix: str, **how: Any) -> Conversations:
        asked = self.settings
        return Conversations(
            self.backend,
            self.chat,
            users,
            variants,
            asked.turns,
            asked.seed,
            asked.rollouts,
            reads=[Read(self.mean, self.panel.layers), Read(BEFORE, self.panel.layers)],
            prefix=prefix,
            **how,
        )

    def check(self) -> None:
        """Refuse what cannot be run, before it claims a folder.

        Raises:
            ContextError: If a conversation might become too long for the model, or for the one that plays the users.
        """
        self.plain().check()
        if self.played is not None:
            self.played.work(self.users, [self.settings.turns - 1], self._words)

    def work(self) -> tuple[Work, ...]:
        """What a run would ask, but for reading the messages, which are few; texts being as long as they may be."""
        found = [replace(each, label="unsteered replies") for each in self.plain().work()]
        scripts = self.users
        if self.played is not None:
            words, count = self._words, self.settings.turns - 1
            found.append(self.played.work(self.users, range(1, count + 1), words))
            scripts = tuple(replace(user, turns=(user.turns[0], *[words] * count)) for user in self.users)
        again = self.replayed(scripts)
        found += [replace(each, label="steered replies") for each in again.work()] if again else []
        return tuple(found)

    @property
    def _words(self) -> str:
        """As long a text as a reply may be."""
        return " ".join(["word"] * self.settings.rollouts.max_new_tokens)

    def config(self) -> dict[str, Any]:
        """Everything that determines the result, as JSON values."""
        return {
            "kind": KIND,
            "settings": settings_json(self.settings),
            "gauges": [
                {"vectors": gauge.vectors.content_hash, "layer": gauge.layer, "reduction": gauge.reduction}
                for gauge in self.panel.gauges
            ],
            "users": [user.describe() for user in self.users],
            "played_by": described(self.played),
            "steerings": {name: steering.describe() for name, steering in self.steerings.items()},
            **described_mean(self.mean),
            **model_config(self.backend, self.chat),
        }


def plan_drift(
    backend: Backend,
    vectors: PersonaVectors | Iterable[PersonaVectors],
    settings: DriftSettings | None = None,
    *,
    layers: int | Sequence[int] | None = None,
    users: Sequence[Scripted] | None = None,
    user_model: UserModel | None = None,
    steerings: Mapping[str, Steering] | None = None,
    chat: ChatFormat | None = None,
    allow_other_model: bool = False,
) -> Drifting:
    """What `drift` holds; arguments as there.

    Raises:
        MonitoringError: If scikit-learn is missing, a steering's name is taken, or some vectors are of the thinking and
            others not.
        DataError: If there are too few people with so many messages.
        VectorsError: If vectors belong to another model, or nothing was tuned.
    """
    settings = settings or DriftSettings()
    check_regression()
    panel = Panel.of(vectors, layers)
    panel.check_model(backend, allow_other_model=allow_other_model)
    for steering in (steerings or {}).values():
        check_history(steering.edits(), settings.history)
        if not allow_other_model:
            steering.check_model(backend)
    given = tuple(users) if users is not None else scripted_users()
    needed = settings.turns if user_model is None else 1
    able = sum(len(user.turns) >= needed for user in given)
    # Without anybody who has so many messages, what is said is that one was wanted.
    chosen = spread_over_domains(given, settings.conversations or max(able, 2), needed)
    played = None if user_model is None else SimulatedUsers(user_model, settings.seed)
    arm_variants(steerings or {}, 0)  # refuses the name that stands for none
    return Drifting(backend, chat or chat_format(backend), panel, chosen, played, dict(steerings or {}), settings)
