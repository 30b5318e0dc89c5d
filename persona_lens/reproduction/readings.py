"""What claims are read from: the figures of one or several steps become a number, its null, and their difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice, permutations
from typing import Any

import numpy as np

from persona_lens.core.statistics import CORRELATION, PLAIN, jackknifed, pearson
from persona_lens.finetuning.shift import LEAST, correlated
from persona_lens.reproduction.claims import Finding, Found, MissingError, Number
from persona_lens.steering.comparison import pair_name

Read = Callable[[Found, str], Finding]
Json = Mapping[str, Any]
PERMUTATIONS = 1000
LEVELS = ("normal", "mild", "strong")
ZERO = Number.exactly(0.0)
MARGIN = 1.0  # nats a token, as in `persona_lens.steering`
MIN_COHERENCE = 50.0


def _change(change: Json | None, vector: str = "change", note: str = "") -> Finding:
    """Of a change beside random directions, question by question."""
    if change is None:
        raise MissingError("no response has a score")
    if change["random"] is None:
        raise MissingError("no random directions were run beside it; give the command some")
    null, apart = Number.of(change["random"]), Number.of(change["difference"])
    return Finding(Number.of(change[vector]), null, apart, note)


# Extraction


def reliable(found: Found, trait: str) -> Finding:
    """How far the vector is the trait's, and not its questions'."""
    layer = found.layer(trait)
    row = next(each for each in found("halves", trait)["layers"] if each["layer"] == layer)
    swapped = 2 * row["null"] / (1 + row["null"])
    return Finding(Number.of(row["whole"]), Number(0.0, -swapped, swapped), note=f"layer {layer}")


def confirmed(found: Found, trait: str) -> Finding:
    """What the layer that was chosen does to questions that the choice has not seen."""
    tuned = found("tune", trait)
    steering, of = tuned["chosen"]["steering"], len(tuned["residual_norms"])
    return _change(tuned["confirmed"], note=f"chosen: {steering}, of {of} layers")


def unasked(found: Found, trait: str) -> Finding:
    """The score of the unsteered model beside that under a system prompt that asks for the trait."""
    compared = found("cliff", trait)
    asked = compared["arms"]["prompted"]["effect"]
    apart = Number.of(asked["change"]).mapped(-1)
    return Finding(Number.of(compared["unsteered"]["score"]), Number.of(asked["score"]), apart)


# Steering


def swept(side: str) -> Read:
    """``promotion`` or ``suppression`` of a sweep at the layer that was tuned."""

    def read(found: Found, trait: str) -> Finding:
        layer = found.layer(trait)
        row = next(each for each in found("sweep", trait)["layers"] if each["layer"] == layer)
        effect = row["effect"] or {}
        if effect.get(side) is None:
            raise MissingError(
                f"the sweep has no coefficient on that side, or no response with a score, at layer {layer}"
            )
        at = effect["high" if side == "promotion" else "low"]
        return _change(effect[side], "vector", f"layer {layer}, coefficient {at:+g}")

    return read


def strain(place: int) -> Read:
    """How surprising, or how incoherent, text is under the first (0) or the last (-1) step of the cliff."""

    def read(found: Found, trait: str) -> Finding:
        compared = found("cliff", trait)
        steered = [name for name, arm in compared["arms"].items() if "system" not in arm]
        effect, plain = compared["arms"][steered[place]]["effect"], compared["unsteered"]
        if effect is None:
            raise MissingError(f"no response under {steered[place]} has a score")
        if effect["nll"] is not None:
            limit = Number.of(plain["nll"]).mapped(1, MARGIN)
            return Finding(Number.of(effect["nll"]), limit, note=steered[place])
        value = Number.of(effect["coherence"]).mapped(-1, 100)
        return Finding(value, Number.exactly(100 - MIN_COHERENCE), note=f"{steered[place]}; 100 minus coherence")

    return read


def reduced(other: str) -> Read:
    """Response mean against another reduction."""

    def read(found: Found, trait: str) -> Finding:
        compared = found("reductions", trait)
        arms = {each: _arm(compared, f".{each}@") for each in ("response_mean", other)}
        one, two = (Number.of(compared["arms"][arm]["effect"]["change"]) for arm in arms.values())
        pair = compared["pairs"][pair_name(*arms.values())]
        return Finding(one, two, Number.of(pair["score"]), note=arms["response_mean"])

    return read


def _arm(compared: Json, part: str) -> str:
    name: str | None = next((name for name in compared["arms"] if part in name), None)
    if name is None or compared["arms"][name]["effect"] is None:
        raise MissingError(
            f"no arm with {part!r} in its name has a score; the step compares {', '.join(compared['arms'])}"
        )
    return name


def increments(found: Found, trait: str) -> Finding:
    """What increments at all layers do to the score."""
    compared = found("increments", trait)
    name = _arm(compared, "increments(")
    return _change(compared["arms"][name]["effect"], note=name)


def increments_cost(found: Found, trait: str) -> Finding:
    """Change of capability under increments at all layers, beside that under one layer."""
    everywhere, one = (_capability(found, trait, inside) for inside in (True, False))
    return Finding(Number.of(everywhere["change"]), Number.of(one["change"]), note=everywhere["task"])


def steering_cost(found: Found, trait: str) -> Finding:
    """Change of capability under one layer's steering, beside that in a random direction."""
    one = _capability(found, trait, False)
    return Finding(Number.of(one["change"]), Number.of(one["random"]), note=f"{one['arm']}, {one['task']}")


def _capability(found: Found, trait: str, everywhere: bool) -> Json:
    for each in found("capability", trait)["changes"]:
        if each["change"] is not None and ("increments(" in each["arm"]) == everywhere:
            return dict(each)
    raise MissingError("no task of the step is a mean over samples, or it lacks that steering")


# Judges and monitoring


def agreement(found: Found, trait: str) -> Finding:
    """In how many pairs two judges say the same of which response shows more."""
    both = found("judges", trait)
    value = Number.of(both["pairwise_first"], "the agreement")
    return Finding(value, Number.exactly(0.5), note=f"{both['counts']['scored']} responses")


def foretold(kind: str, within: bool) -> Read:
    """How where prompts end goes with the score of their replies, at the layer where it does most."""

    def read(found: Found, trait: str) -> Finding:
        study = found("study", trait)
        group = study["groups"].get(kind)
        if group is None:
            raise MissingError(f"the study has no conditions of the kind {kind!r} (--conditions both)")
        known = [each for each in group["layers"] if each["pearson"]["value"] is not None]
        if not known:
            raise MissingError("scores or projections do not vary")
        row = max(known, key=lambda each: each["pearson"]["value"])
        null = row["within_null"] if within else group.get("best_null") or row["null"]
        note = f"layer {row['layer']}, {group['prompts']} prompts"
        return Finding(Number.of(row["within_pearson" if within else "pearson"]), Number.of(null, "chance"), note=note)

    return read


# Finetuning


def levelled(found: Found, trait: str) -> Finding:
    """Change of the score after data that shows the trait strongly, beside data that does not."""
    models = found("shift", trait)["traits"][trait]["models"]
    strong, normal = (models[f"finetune-{level}-{trait}"]["change"] for level in ("strong", "normal"))
    return Finding(Number.of(strong, "the change"), Number.of(normal, "the change"))


def points(found: Found, trait: str) -> list[dict[str, Any]]:
    """Of every dataset that was finetuned on: its projections before, and the shift and the change of score after."""
    shift, layer = found("shift", trait), found.layer(trait)
    own, place = shift["traits"][trait]["models"], shift["layers"].index(layer)
    rows = []
    for name, after in own.items():
        _, level, source = name.split("-", 2)
        row = {"model": name, "shift": after["shift"][place]["mean"], "change": (after["change"] or {}).get("mean")}
        rows.append({**row, **_projected(found, source, level, trait, layer)})
    return rows


def _projected(found: Found, source: str, level: str, trait: str, layer: int) -> dict[str, float | None]:
    values: dict[str, float | None] = {}
    for step, names in (("screen", ("raw", "difference", "prompt_difference")), ("screen-share", ("difference",))):
        try:
            datasets = found(step, source)["datasets"]
        except MissingError:
            continue
        means = next(each["means"] for each in datasets if each["name"].endswith(f"/{level}"))[f"{trait}@{layer}"]
        prefix = "" if step == "screen" else "share_"
        values |= {prefix + name: means[name] and means[name]["mean"] for name in names}
    return values


def goes_with(before: str, after: str, steps: Sequence[str] = ()) -> Read:
    """How two figures of the datasets go together over all that was finetuned on, beside shuffled pairs."""

    def read(found: Found, trait: str) -> Finding:
        for step in steps:
            found(step, trait)  # which says why there is none
        x, y = _columns(points(found, trait), before, after)
        null = _shuffled(x, y)
        return Finding(Number.of(correlated(x, y), "the correlation"), null, note=f"{len(x)} finetuned models")

    return read


def _columns(rows: Sequence[Json], *names: str) -> list[list[float]]:
    known = [row for row in rows if all(row.get(name) is not None for name in names)]
    if len(known) < LEAST:
        raise MissingError(f"{len(known)} datasets have all figures; a correlation needs {LEAST} (name more traits)")
    return [[float(row[name]) for row in known] for name in names]


def _shuffled(x: Sequence[float], y: Sequence[float]) -> Number:
    """The middle 95% of r where it is chance which dataset goes with which."""
    a, b, rng = np.array(x), np.array(y), np.random.default_rng(0)
    orders: Iterator[Any] = (rng.permutation(len(b)) for _ in range(PERMUTATIONS))
    if len(b) <= 6:  # fewer than 1,000 orders
        orders = islice(permutations(range(len(b))), PERMUTATIONS)
    values = np.array([float(pearson(a, b[list(order)])) for order in orders])
    if not np.isfinite(values).all():
        raise MissingError("the figures of the datasets do not vary")
    low, high = np.percentile(values, [2.5, 97.5])
    return Number(float(values.mean()), float(low), float(high))


def beats(before: str, other: str, after: str) -> Read:
    """Whether one figure goes with the change more than another does, each dataset left out in turn."""

    def read(found: Found, trait: str) -> Finding:
        x, z, y = (np.array(each) for each in _columns(points(found, trait), before, other, after))

        def three(rows: Any) -> Any:
            one, two = float(pearson(x[rows], y[rows])), float(pearson(z[rows], y[rows]))
            return np.array([one, two, one - two])

        ends = jackknifed(three, range(len(y)), [CORRELATION, CORRELATION, PLAIN])
        one, two, apart = (
            Number(float(value), own and own[0], own and own[1], len(y))
            for value, own in zip(three(np.arange(len(y))), ends, strict=True)
        )
        return Finding(one, two, apart, note=f"{len(y)} finetuned models")

    return read


def treated(name: str, against: str = "plain") -> Read:
    """A way to finetune beside plain finetuning, or beside the same in random directions."""

    def read(found: Found, trait: str) -> Finding:
        treatments = found("protection", trait)["treatments"]
        if name not in treatments:
            raise MissingError(f"the study leaves out {name!r} (--without)")
        own = treatments[name]
        if against == "base":
            return Finding(Number.of(own["change"], "the change"), ZERO)
        value = Number.of(own["against_plain"], "the change")
        if against == "plain":
            return Finding(value, ZERO, value)
        if against not in treatments:
            raise MissingError(f"the study leaves out {against!r} (--without)")
        null = Number.of(treatments[against]["against_plain"], "the change")
        return Finding(value, null, Number.of(own["against_random"], "the change"))

    return read


def kept_ability(name: str, other: str) -> Read:
    """Change of capability of a way to finetune, beside that of another."""

    def read(found: Found, trait: str) -> Finding:
        study = found("protection", trait)
        task, own = study["settings"]["task"], study["treatments"]
        if task is None:
            raise MissingError("the study measures no capability; give it a task (--task)")
        if lacking := [each for each in (name, other) if each not in own]:
            raise MissingError(f"the study leaves out {lacking[0]!r} (--without)")
        one, two = (Number.of(own[each]["capability_change"], "capability") for each in (name, other))
        return Finding(one, two, note=task)

    return read


# Data


def separated(quantity: str) -> Read:
    """How often a strong reply projects higher than a normal one."""

    def read(found: Found, trait: str) -> Finding:
        screened, gauge = found("screen", trait), f"{trait}@{found.layer(trait)}"
        entry = screened["labels"]["labels"]["strong"][quantity][gauge]
        null = np.array(entry["random"])
        if not len(null):
            raise MissingError("no random directions were run beside it (--random-directions)")
        low, high = np.percentile(null, [2.5, 97.5])
        value = Number(entry["auc"], entry["low"], entry["high"], entry["labelled"] + entry["clean"])
        return Finding(value, Number(float(null.mean()), float(low), float(high)), note=gauge)

    return read


def subset(kind: str) -> Read:
    """Change of the score after finetuning on the rows with the largest or smallest dP, beside rows at random."""

    def read(found: Found, trait: str) -> Finding:
        models = found("subsets", trait)["traits"][trait]["models"]
        own, other = (models[f"finetune-{each}-{trait}"]["change"] for each in (kind, "random"))
        return Finding(Number.of(own, "the change"), Number.of(other, "the change"))

    return read


def alike(found: Found, _: str) -> Finding:
    """The cosine of the first two traits' vectors, whose sign is as it may be."""
    both = found("cosines")
    if len(found.traits) < 2:
        raise MissingError("a cosine is between two traits; name two or more (--traits)")
    pair, layer = list(found.traits[:2]), both["layers"][0]
    row = next(each for each in both["intervals"] if each["pair"] == pair and each["layer"] == layer)
    own = Number(row["cosine"], row["low"], row["high"])
    chance = 2 * both["null_std"]
    note = f"{' and '.join(pair)}, layer {layer}: cosine {row['cosine']:+.2f}"
    return Finding(own.mapped(-1 if own.mean < 0 else 1), Number(0.0, -chance, chance), note=note)


def feature(found: Found, trait: str) -> Finding:
    """What the feature that is most like the vector does when it is steered alone."""
    taken = found("features", trait)
    steering = taken["steering"]
    if not steering:
        raise MissingError("no feature was steered (--steered)")
    top = taken["ranking"]["top"][0]
    effect = next(each for each in steering["effects"].values() if each and each["feature"] == top["feature"])
    return _change(effect["change"], "vector", f"feature {top['feature']}, cosine {top['cosine']:+.2f}")
