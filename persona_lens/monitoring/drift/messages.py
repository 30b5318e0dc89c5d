"""Which user messages move a conversation: where replies stand, predicted from the messages that they answer.

Ridge regression on embeddings of the messages, tested on conversations that it has not seen. Beside it stand the same
regressions with the messages shuffled: among all turns, which chance alone explains, and among the conversations of one
domain at the same turn, which is what the domain and the number of the turn say without the words.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from persona_lens.core.documents import Record
from persona_lens.core.plugins import install_command
from persona_lens.core.statistics import PLAIN, Verdict, jackknifed
from persona_lens.monitoring.gauges import MonitoringError
from persona_lens.monitoring.prediction import Measured, Null

if TYPE_CHECKING:
    from sklearn.model_selection import GroupKFold

Values = NDArray[np.float64]
Rows = NDArray[np.intp]
ALPHAS = tuple(10.0**power for power in range(-1, 7))
FOLDS = 5
LEAST = 6  # conversations; with fewer, no fold has enough to choose the penalty by
DIGITS = 6  # the last bits of a solver must not decide whether two runs agree


@dataclass(frozen=True)
class Prediction(Record):
    """How well messages predict what follows them, in conversations that the regression has not seen.

    Attributes:
        r2: Share of the variance about the mean of the other conversations, with its interval over conversations;
            negative where the mean is the better guess.
        shuffled: The same with messages shuffled among all turns.
        shuffled_within: The same with messages shuffled among the conversations of a domain, turn by turn.
        rows: Messages.
    """

    r2: Measured
    shuffled: Null | None
    shuffled_within: Null | None
    rows: int

    @property
    def verdict(self) -> Verdict:
        """What may be said of the messages.

        ``clear`` if the interval lies above 0 and above the middle 95% of both ways to shuffle them; ``no null`` if it
        does and nothing was shuffled; ``unclear`` otherwise.
        """
        if self.r2.low is None or self.r2.low <= 0:
            return "unclear"
        if self.shuffled is None or self.shuffled_within is None:
            return "no null"
        highest = [null.high for null in (self.shuffled, self.shuffled_within)]
        return "clear" if all(high is not None and self.r2.low > high for high in highest) else "unclear"

    def to_json(self) -> dict[str, Any]:
        """The values by name."""
        return {**super().to_json(), "verdict": self.verdict}


@dataclass(frozen=True, eq=False)
class Messages:
    """Messages, and what they are part of.

    Attributes:
        embeddings: One row a message.
        conversations: What each belongs to.
        strata: Its domain and turn.
    """

    embeddings: Float[Values, "messages d_model"]
    conversations: Sequence[Hashable]
    strata: Sequence[Hashable]

    def chosen(self, rows: Rows) -> Messages:
        """Some of them."""
        picked = [[each[row] for row in rows.tolist()] for each in (self.conversations, self.strata)]
        return Messages(self.embeddings[rows], *picked)


def check_regression() -> None:
    """Raise unless there is what regressions need.

    Raises:
        MonitoringError: With the command that installs it.
    """
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise MonitoringError(f"predicting from messages needs scikit-learn: {install_command('drift')}") from None


def predict_from(
    messages: Messages, targets: Float[Values, "messages targets"], permutations: int = 20, seed: int = 0
) -> tuple[list[Prediction], Float[Values, "messages targets"]]:
    """Predict each target from the messages.

    Args:
        messages: At least those of `LEAST` conversations.
        targets: What follows each message; finite.
        permutations: How often messages are shuffled, in each of both ways; 0 leaves the nulls out.
        seed: Of the shuffling and the resampling.

    Returns:
        How well that works for each target; and the predictions, each by regressions on other conversations.

    Raises:
        MonitoringError: If there are too few conversations.
    """
    if (held := len(set(messages.conversations))) < LEAST:
        raise MonitoringError(f"{held} conversations are too few to predict from messages; take {LEAST} or more")
    count = targets.shape[1]
    rng = np.random.default_rng(seed)
    orders = [*_shuffles(None, len(targets), permutations, rng)]
    orders += _shuffles(messages.strata, len(targets), permutations, rng)
    # Messages that are shuffled beside fixed targets, or targets beside fixed messages: one fit serves all of them.
    everything = np.concatenate([targets, *(targets[order] for order in orders)], axis=1)
    predicted, baseline = _out_of_fold(messages, everything)
    shares = _explained(everything, predicted, baseline).reshape(-1, count).round(DIGITS)
    ends = jackknifed(
        lambda rows: _explained(*(each[rows, :count] for each in (everything, predicted, baseline))),
        messages.conversations,
        PLAIN,
        seed,
    )
    found = []
    for target, interval in enumerate(ends):
        ways = (shares[1 : 1 + permutations, target], shares[1 + permutations :, target])
        at_random, within = (Null.of(each) if permutations else None for each in ways)
        rounded = interval and (round(interval[0], DIGITS), round(interval[1], DIGITS))
        found.append(Prediction(Measured.of(shares[0, target], rounded), at_random, within, len(targets)))
    return found, predicted[:, :count]


def _shuffles(strata: Sequence[Hashable] | None, rows: int, count: int, rng: np.random.Generator) -> list[Rows]:
    """Orders of the rows, each shuffled within its stratum, or among all."""
    members: dict[Hashable, list[int]] = {}
    for row in range(rows):
        members.setdefault(strata[row] if strata is not None else None, []).append(row)
    found = []
    for _ in range(count):
        order = np.arange(rows)
        for own in members.values():
            order[own] = rng.permutation(own)
        found.append(order)
    return found


def _explained(targets: Values, predicted: Values, baseline: Values) -> Values:
    """Share of the variance about the baseline that the predictions explain, by target; NaN where there is none."""
    left, total = ((targets - guess) ** 2 for guess in (predicted, baseline))
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Values = np.where((total := total.sum(axis=0)) > 0, 1 - left.sum(axis=0) / total, np.nan)
    return found


def _out_of_fold(messages: Messages, targets: Values) -> tuple[Values, Values]:
    """Predictions of each row by regressions on other conversations, and the mean of those conversations."""
    predicted, baseline = np.empty_like(targets), np.empty_like(targets)
    groups = _numbered(messages.conversations)
    for train, test in _folds(FOLDS, groups).split(messages.embeddings, groups=groups):
        seen = partial(_by_penalty, messages.embeddings)
        inner = _folds(FOLDS - 1, groups[train])
        errors = np.zeros((len(ALPHAS), targets.shape[1]))
        for fit, check in inner.split(train, groups=groups[train]):
            guesses = seen(train[fit], targets[train[fit]], train[check])
            errors += ((guesses - targets[train[check]]) ** 2).sum(axis=1)
        best = errors.argmin(axis=0)
        predicted[test] = seen(train, targets[train], test)[best, :, np.arange(targets.shape[1])].T
        baseline[test] = targets[train].mean(axis=0)
    return predicted, baseline


def _by_penalty(embeddings: Values, train: Rows, targets: Values, test: Rows) -> Float[Values, "alphas rows targets"]:
    """Predictions for some rows under each penalty; features are brought to the scale that they have in training."""
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(embeddings[train])
    seen, unseen = scaler.transform(embeddings[train]), scaler.transform(embeddings[test])
    fits = (Ridge(alpha=alpha).fit(seen, targets) for alpha in ALPHAS)
    return np.stack([fit.predict(unseen).reshape(len(test), -1) for fit in fits])


def _folds(most: int, groups: NDArray[np.int64]) -> GroupKFold:
    from sklearn.model_selection import GroupKFold

    return GroupKFold(min(most, len(np.unique(groups))))


def _numbered(names: Sequence[Hashable]) -> NDArray[np.int64]:
    order = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([order[name] for name in names])
