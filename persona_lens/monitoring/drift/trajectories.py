"""`Trajectories`: where the replies of conversations stand, turn by turn, in each way to hold them; and what of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from persona_lens.core.documents import plain
from persona_lens.monitoring.drift.messages import Messages, predict_from
from persona_lens.monitoring.drift.onset import changes_of, estimates, movement
from persona_lens.monitoring.gauges import MonitoringError, Panel
from persona_lens.steering.arms import RANDOM, VECTOR, beside_null

Values = NDArray[np.float64]
EVERY = "all"
POSITION, CHANGE = "position", "change"
SHOWN_MESSAGES = 5

Way = tuple[str, str]
"""Name of a steering, and ``vector`` or ``random``."""


@dataclass(frozen=True, eq=False)
class Trajectories:
    """Projections of replies, on every gauge and on random directions beside it.

    Attributes:
        panel: The gauges.
        domains: Of each conversation.
        plain: Of the unsteered model: first the gauges, then the random directions, seed by seed, layer by layer.
        steered: Under each way to steer, in the same conversations; of the gauges alone.
        seed: Of the resampling.
    """

    panel: Panel
    domains: Sequence[str]
    plain: Float[Values, "conversations turns directions"]
    steered: Mapping[Way, Float[Values, "conversations turns gauges"]]
    seed: int = 0

    def figures(self, messages: MessageTable, permutations: int) -> list[dict[str, Any]]:
        """What there is to say of each gauge, as JSON values."""
        layers = self.panel.layers
        return [
            {
                "name": str(gauge),
                "trait": gauge.trait,
                "layer": gauge.layer,
                "movement": self._movements(self.plain[:, :, number], self._randoms(layers.index(gauge.layer))),
                "messages": messages.figures(self.plain[:, :, number], gauge.layer, permutations, self.seed),
                "replays": {way: self._replay(way, number) for way, kind in self.steered if kind == VECTOR},
            }
            for number, gauge in enumerate(self.panel.gauges)
        ]

    def _randoms(self, layer: int) -> Float[Values, "random conversations turns"] | None:
        """The random directions at one layer, given its place."""
        beside = self.plain[:, :, len(self.panel.gauges) :]
        found = np.moveaxis(beside[:, :, layer :: len(self.panel.layers)], -1, 0)
        return found if len(found) else None

    def _parts(self) -> Iterator[tuple[str, NDArray[np.intp]]]:
        """All conversations, and those of each domain where there are several."""
        yield EVERY, np.arange(len(self.domains))
        names = dict.fromkeys(self.domains)
        for name in names if len(names) > 1 else ():
            yield name, np.flatnonzero([domain == name for domain in self.domains])

    def _movements(self, table: Values, randoms: Values | None) -> dict[str, Any]:
        return {
            name: movement(table[rows], None if randoms is None else randoms[:, rows], self.seed).to_json()
            for name, rows in self._parts()
        }

    def _replay(self, way: str, gauge: int) -> dict[str, Any]:
        """One gauge under a steering, beside the same conversations without it."""
        base, own = self.plain[:, :, gauge], self.steered[way, VECTOR][:, :, gauge]
        random = self.steered.get((way, RANDOM))
        null = None if random is None else random[:, :, gauge]
        return {
            name: {
                "movement": movement(own[rows], seed=self.seed).to_json(),
                "difference": plain(estimates((own - base)[rows], self.seed)),
                "level": _beside(_mean(own - base), None if null is None else _mean(null - base), rows),
                "drift": _beside(_last(own) - _last(base), None if null is None else _last(null) - _last(base), rows),
            }
            for name, rows in self._parts()
        }


def _mean(table: Values) -> Values:
    """Of each conversation the mean of its turns; NaN where a turn has no value."""
    found: Values = table.mean(axis=1)
    return found


def _last(table: Values) -> Values:
    """Of each conversation the last turn minus the first."""
    found: Values = changes_of(table)[:, -1]
    return found


def _beside(moved: Values, null: Values | None, rows: NDArray[np.intp]) -> dict[str, Any] | None:
    """A difference to the unsteered model, with that of random directions, conversation by conversation."""

    def known(values: Values | None) -> dict[int, float]:
        return {} if values is None else {int(row): float(values[row]) for row in rows if np.isfinite(values[row])}

    change = beside_null(known(moved), known(null))
    return None if change is None else change.to_json()


@dataclass(frozen=True, eq=False)
class MessageTable:
    """The user's messages in the plain conversations.

    Attributes:
        texts: By conversation, turn by turn.
        users: Who wrote them, by conversation.
        domains: Of each conversation.
        embeddings: By layer, one row a message: conversation by conversation, turn by turn.
    """

    texts: Sequence[Sequence[str]]
    users: Sequence[str]
    domains: Sequence[str]
    embeddings: Mapping[int, Float[Values, "messages d_model"]]

    def figures(self, table: Values, layer: int, permutations: int, seed: int) -> dict[str, Any]:
        """How well messages say where the next reply stands, and how far it moves, as JSON values.

        Args:
            table: [conversations, turns], projections of the replies.
            layer: Whose embeddings are taken.
            permutations: See `persona_lens.monitoring.drift.messages.predict_from`.
            seed: Of the shuffling and the resampling.

        Returns:
            By target a `Prediction`, or the ``reason`` why there is none; and the messages that are expected to be
            followed by the largest and by the smallest value, by predictions from other conversations.
        """
        turns = table.shape[1]
        moved = np.full_like(table, np.nan)
        moved[:, 1:] = np.diff(table, axis=1)
        found: dict[str, Any] = {}
        for name, target in ((POSITION, table), (CHANGE, moved)):
            values = target.ravel()
            rows = np.flatnonzero(np.isfinite(values))
            every = Messages(
                self.embeddings[layer],
                [number for number in range(len(table)) for _ in range(turns)],
                [(domain, turn) for domain in self.domains for turn in range(turns)],
            )
            try:
                (best,), predicted = predict_from(every.chosen(rows), values[rows, None], permutations, seed)
            except MonitoringError as error:
                found[name] = {"reason": str(error)}
                continue
            found[name] = best.to_json() | self._strongest(rows, predicted[:, 0], values, turns)
        return found

    def _strongest(self, rows: NDArray[np.intp], predicted: Values, values: Values, turns: int) -> dict[str, Any]:
        order = np.argsort(predicted, kind="stable")

        def shown(place: int) -> dict[str, Any]:
            conversation, turn = divmod(int(rows[place]), turns)
            return {
                "user": self.users[conversation],
                "domain": self.domains[conversation],
                "turn": turn + 1,
                "message": self.texts[conversation][turn],
                "predicted": round(float(predicted[place]), 4),
                "value": round(float(values[rows[place]]), 4),
            }

        most = min(SHOWN_MESSAGES, len(order) // 2)
        return {
            "highest": [shown(place) for place in order[::-1][:most]],
            "lowest": [shown(place) for place in order[:most]],
        }
