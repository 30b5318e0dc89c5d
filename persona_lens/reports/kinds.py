"""What each kind of run tells of itself: its headline, what that rests on, its figures, its page and its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_lens.core.documents import DocumentError, parse_json
from persona_lens.core.files import read_bytes
from persona_lens.core.text import counted
from persona_lens.reports import dissection, effects, finetuning, screening, study, svg, tuning, vector
from persona_lens.reports.page import (
    Headline,
    bounds,
    effect_headline,
    number,
    render,
    side,
    signed,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Summary = Mapping[str, Any]
Row = dict[str, Any]
SUMMARY = "summary.json"


@dataclass(frozen=True)
class Kind:
    """How a kind of run is told, from its ``summary.json`` and its folder alone.

    Attributes:
        headline: What it comes to.
        asked: What that was counted over, such as ``16 held-out questions``.
        figures: What can be drawn, the main one first.
        rows: The rows in its folder.
        page: The report, given the version of persona-lens too; by default the headline, the figures and every number.
    """

    headline: Callable[[Summary], Headline]
    asked: Callable[[Summary], str]
    figures: Callable[[Summary], svg.Wanted]
    rows: Callable[[Path, Summary], Iterator[Row]]
    page: Callable[[Summary, str], str] | None = None

    def basis(self, summary: Summary) -> str:
        """What the headline rests on, and who judged."""
        judges = summary.get("judges") or {}
        found = [summary["judge"]] if summary.get("judge") else list(judges.values())
        names = list(dict.fromkeys(map(judge_name, found)))
        judged = "judged by " + " and ".join(names) if names else ""
        return ", ".join(filter(None, [self.asked(summary), judged]))

    def rendered(self, summary: Summary, version: str) -> str:
        """The page."""
        if self.page is not None:
            return self.page(summary, version)
        result, figures = self.headline(summary), self.figures(summary)
        drawn = {"figures": svg.drawn(figures), "names": {name: name.replace("_", " ") for name in figures}}
        numbers = {name: value for name, value in summary.items() if name not in ("judge", "judges")}
        title = " and ".join(filter(None, [summary.get("trait"), summary.get("method")])) or "What was found"
        judge = summary.get("judge")
        own = {"result": result, "basis": self.basis(summary), "judge": judge, "title": title}
        return render("result.html.j2", {**own, **drawn, "numbers_of": numbers, "version": version})


def judge_name(described: Summary) -> str:
    """What a judge is called, given what it says of itself."""
    kind, model = described.get("judge"), described.get("model")
    if kind == "likelihood":
        return "the likelihood judge, a proxy"
    if kind == "given":
        return "the scores that came with the responses"
    named = model.get("model") if isinstance(model, Mapping) else model
    return f"{kind}:{named}" if named else str(kind)


# Rows


def _lines(*names: str, part: bool = False) -> Callable[[Path, Summary], Iterator[Row]]:
    """The rows of files of JSON lines; with ``part`` each says which file it is of, up to its first ``-``."""

    def rows(folder: Path, _: Summary) -> Iterator[Row]:
        for pattern in names:
            for file in sorted(folder.glob(pattern)):
                own = {"part": file.name.partition("-")[0]} if part else {}
                yield from ({**own, **row} for row in _read_lines(file))

    return rows


def _read_lines(file: Path) -> Iterator[Row]:
    for line, text in enumerate(read_bytes(file, DocumentError).splitlines(), start=1):
        try:
            row = parse_json(text)
        except DocumentError as error:
            raise DocumentError(f"line {line} of {file} is {error}") from error
        yield without_ids(row)


def without_ids(row: Mapping[str, Any]) -> Row:
    """A row as it is shown: without its place, its checksum and the token ids of its text."""
    return {name: value for name, value in row.items() if name not in ("row", "check", "response_ids")}


def _responses(folder: Path, _: Summary) -> Iterator[Row]:
    """Rollouts with their scores."""
    both = zip(_read_lines(folder / "rollouts.jsonl"), _read_lines(folder / "scores.jsonl"), strict=False)
    return ({**rollout, **score} for rollout, score in both)


def _nothing(_: Path, __: Summary) -> Iterator[Row]:
    """What is kept in memory only has no rows in a folder."""
    return iter(())


def _screened(folder: Path, _: Summary) -> Iterator[Row]:
    from pyarrow import parquet

    for batch in parquet.ParquetFile(folder / "results.parquet").iter_batches():
        yield from batch.to_pylist()


def shifts_of(_: Path | None, summary: Summary) -> Iterator[Row]:
    """One row a trait, model and layer."""
    for trait, found in summary["traits"].items():
        for model, each in found["models"].items():
            changed = {"score": each["score"], "change": each["change"]}
            for layer, shift in zip(summary["layers"], each["shift"], strict=True):
                yield {"trait": trait, "model": model, "layer": layer, "shift": shift, **changed}


# Extraction


def _extraction(summary: Summary) -> Headline:
    means, rows = summary["mean_score"], summary["separation"]
    scores = " and ".join(f"{number(means[arm])} on average under {arm} instructions" for arm in means)
    told = [f"Responses score {scores}."]
    if not rows:
        reason = "No layer can be tested: too few responses were kept to hold some back"
        return Headline("unclear", reason, tuple(told))
    best = max(rows, key=lambda row: float(row["d_prime"]))
    better = sum(row["better"] for row in rows)
    told.append(
        f"On questions held back the vector separates the two kinds best at layer {best['layer']}: d′ = "
        f"{number(best['d_prime'], 2)}, AUC {number(best['auc'], 2)}; 19 of 20 random directions stay below "
        f"{number(best['random_d_prime'], 2)} and {number(best['random_auc'], 2)}."
    )
    title = f"The vectors tell the two kinds of responses apart better than chance at {better} of {len(rows)} layers"
    return Headline("clear" if better else "unclear", title, tuple(told))


def _extraction_figures(summary: Summary) -> svg.Wanted:
    rows, unused = summary["separation"], -1
    found: svg.Wanted = {"separation": (vector.separation_figure, rows, unused)} if rows else {}
    return {**found, "norms": (vector.norm_figure, summary["norms"], unused)}


# Sweep


def _swept(summary: Summary) -> Summary | None:
    return next((each for each in summary["layers"] if each["layer"] == summary["chosen"]), None)


def _sweep(summary: Summary) -> Headline:
    found = _swept(summary)
    if found is None:
        return Headline("unclear", "No result: at no layer do responses at both ends have scores", ())
    told = vector.headline(found["effect"], summary["questions"])
    if len(summary["layers"]) == 1:
        return told
    chosen = f"Of {len(summary['layers'])} layers it is the one with the largest effect, which flatters it a little."
    return Headline(told.verdict, told.title, (*told.sentences, chosen))


def _sweep_figures(summary: Summary) -> svg.Wanted:
    found = _swept(summary)
    wanted: svg.Wanted = {}
    if found is not None:
        wanted["curve"] = (vector.curve_figure, found["curves"], None)
    layers = [each for each in summary["layers"] if each["effect"]]
    if len(layers) > 1:
        rows = [(f"layer {each['layer']}", each["effect"]["vector"], each["effect"]["random"]) for each in layers]
        wanted["layers"] = (changes_figure, rows)
    return wanted


# Comparison


def _comparison(summary: Summary) -> Headline:
    known = {name: each["effect"] for name, each in summary["arms"].items() if each["effect"]}
    if not known:
        return Headline("unclear", "No result: no steered response has a score", ())
    if len(known) == 1:
        ((name, effect),) = known.items()
        return effect_headline(effect, summary["questions"], name, "")
    told = tuple(
        f"{name}: {bounds(effect['change'], sign=True)}, random directions {bounds(effect['random'], sign=True)}."
        for name, effect in known.items()
    )
    clear = sum(bool(effect["clear"]) for effect in known.values())
    null = any(effect["random"] for effect in known.values())
    title = f"{clear} of {counted(len(known), 'steering')} clearly change{'s' if clear == 1 else ''} the trait score"
    return Headline("no null" if not null else "clear" if clear else "unclear", title, told)


def _comparison_figures(summary: Summary) -> svg.Wanted:
    known = {name: each["effect"] for name, each in summary["arms"].items() if each["effect"]}
    rows = [(name, effect["change"], effect["random"]) for name, effect in known.items()]
    return {"changes": (changes_figure, rows)} if rows else {}


def changes_figure(rows: Sequence[tuple[str, Summary, Summary | None]], width: int) -> Figure:
    """Changes of the trait score by name, each with its interval, beside those of random directions."""
    figure, axes = svg.panel(width, 110 + 34 * len(rows))
    svg.dots(axes, [(change, place - 0.12) for place, (_, change, _) in enumerate(rows)], svg.LINE, svg.VECTOR_LABEL)
    nulls = [(random, place + 0.12) for place, (*_, random) in enumerate(rows) if random]
    if nulls:
        svg.dots(axes, nulls, {**svg.NULL, "linestyle": ""}, svg.RANDOM_LABEL)
    axes.axvline(0, **svg.ZERO)
    axes.set(xlabel="change of the mean trait score, points", ylim=(-0.6, len(rows) - 0.4))
    svg.in_rows(axes, [name for name, *_ in rows])
    axes.xaxis.set_major_formatter(lambda value, _: signed(round(value, 6)))
    svg.legend(figure, axes)
    return figure


def _effects_figures(summary: Summary) -> svg.Wanted:
    rows = [
        (f"{cell['steering']} → {cell['trait']}", cell["score"]["vector"], cell["score"]["random"])
        for cell in summary["cells"]
        if cell["score"]
    ]
    found: svg.Wanted = {"changes": (changes_figure, rows)} if rows else {}
    return {**found, **effects.figures(summary)}


# Finetuning


def _shift(summary: Summary) -> Headline:
    told, moved = [], 0
    for trait, found in summary["traits"].items():
        at = summary["layers"].index(found["layer"]) if found["layer"] is not None else len(summary["layers"]) // 2
        for model, each in found["models"].items():
            shift, change = each["shift"][at], each["change"]
            moved += bool(side(shift))
            scored = f"; the trait score changes by {bounds(change, sign=True)}" if change else ""
            told.append(
                f"{model}: {bounds(shift, 2, sign=True)} along {trait} at layer {summary['layers'][at]}{scored}."
            )
    total = sum(len(found["models"]) for found in summary["traits"].values())
    title = f"{moved} of {counted(total, 'shift')} along a trait {'is' if moved == 1 else 'are'} clear of zero"
    return Headline("no null", title, tuple(told))


def _shift_figures(summary: Summary) -> svg.Wanted:
    return {f"{trait}": (shift_figure, trait, found, summary["layers"]) for trait, found in summary["traits"].items()}


def shift_figure(trait: str, found: Summary, layers: Sequence[int], width: int) -> Figure:
    """How far each model has moved along the trait, by layer, with intervals over questions."""
    figure, axes = svg.panel(width, 340)
    colours = (svg.VECTOR, svg.RANDOM, svg.THIRD, svg.MUTED)
    for place, (model, each) in enumerate(found["models"].items()):
        points = [{"coefficient": layer, "shift": shift} for layer, shift in zip(layers, each["shift"], strict=True)]
        svg.line_with_intervals(axes, points, "shift", {"color": colours[place % 4], "zorder": 4}, model)
    axes.axhline(0, **svg.ZERO)
    axes.set(title=f"Shift along {trait}, residual-stream units", xlabel="layer")
    svg.legend(figure, axes)
    return figure


def _finetune(summary: Summary) -> Headline:
    loss = summary["loss"]
    known = ", ".join(f"{number(loss[name], 3)} {said}" for name, said in _LOSSES.items() if loss[name] is not None)
    title = f"Trained {counted(summary['steps'], 'step')} ({summary['method']}): a loss of {known}, in nats a token"
    said = (f"Training was stopped: {summary['stopped']}.",) if summary["stopped"] else ()
    return Headline("no null", title, said)


_LOSSES = {"first": "at first", **finetuning.LOSSES}


def _finetune_figures(summary: Summary) -> svg.Wanted:
    return {"projections": (projections_figure, summary["projections"])} if summary["projections"] else {}


def projections_figure(rows: Sequence[Summary], width: int) -> Figure:
    """What was watched while the model trained."""
    figure, axes = svg.panel(width, 340)
    for name in (each for each in rows[0] if each != "step"):
        known = [row for row in rows if name in row]
        axes.plot([row["step"] for row in known], [row[name] for row in known], marker="o", label=name)
    axes.set(title="Mean projection of the last prompt token", xlabel="step")
    svg.legend(figure, axes)
    return figure


# Readings


def _monitor(summary: Summary) -> Headline:
    told = tuple(f"{gauge}: {bounds(mean, 2)} on average." for gauge, mean in summary["gauges"].items())
    lost = f", {counted(len(summary['not_read']), 'other')} not" if summary["not_read"] else ""
    return Headline("no null", f"{counted(summary['conversations'], 'conversation')} read{lost}", told)


def _monitor_figures(summary: Summary) -> svg.Wanted:
    known = {gauge: mean for gauge, mean in summary["gauges"].items() if mean}
    return {"means": (_means_figure, known)} if known else {}


def _means_figure(means: Summary, width: int) -> Figure:
    figure, axes = svg.panel(width, 90 + 34 * len(means))
    svg.dots(axes, [(mean, place) for place, mean in enumerate(means.values())], svg.LINE)
    axes.set(xlabel="mean projection of replies, residual-stream units", ylim=(-0.6, len(means) - 0.4))
    svg.in_rows(axes, list(means))
    return figure


def _lens(summary: Summary) -> Headline:
    layers = summary["layers"]
    beyond = [each for each in layers if each["promoted"][0]["shift"] > each["random_limit"]]
    told = tuple(
        f"Layer {each['layer']}: {', '.join(repr(token['text']) for token in each['promoted'][:5])}."
        for each in beyond[:3] + beyond[3:][-3:]
    )
    title = f"Vectors move some token further than random directions any at {len(beyond)} of {len(layers)} layers"
    return Headline("clear" if beyond else "unclear", title, told)


def _lens_figures(summary: Summary) -> svg.Wanted:
    return {"tokens": (lens_figure, summary["layers"][-1])}


def lens_figure(layer: Summary, width: int) -> Figure:
    """The tokens that the vector of one layer moves most, and how far random directions move any."""
    tokens = [*layer["promoted"], *reversed(layer["suppressed"])]
    figure, axes = svg.panel(width, 100 + 22 * len(tokens))
    shifts = [token["shift"] for token in tokens]
    axes.barh(range(len(tokens)), shifts, color=[svg.VECTOR if shift > 0 else svg.THIRD for shift in shifts])
    for side_of in (1, -1):
        axes.axvline(side_of * layer["random_most"], **svg.DOTTED)
    axes.axvline(0, **svg.ZERO)
    axes.set(title=f"Change of logits, layer {layer['layer']}; dotted: the most of a random direction")
    svg.in_rows(axes, [repr(token["text"]) for token in tokens])
    return figure


# The table


def _over(noun: str, *path: str, many: bool = False) -> Callable[[Summary], str]:
    """How many of what, found along a path; with ``many`` the length of what stands there."""

    def asked(summary: Summary) -> str:
        found: Any = summary
        for name in path:
            found = found[name]
        return counted(len(found) if many else found, noun)

    return asked


QUESTION = "held-out question"
KINDS: Mapping[str, Kind] = {
    "extraction": Kind(_extraction, _over("response", "responses"), _extraction_figures, _responses),
    "sweep": Kind(_sweep, _over(QUESTION, "questions"), _sweep_figures, _lines("*-scores.jsonl")),
    "comparison": Kind(_comparison, _over(QUESTION, "questions"), _comparison_figures, _lines("arms-scores.jsonl")),
    "tune": Kind(
        tuning.headline,
        _over(QUESTION, "confirm_questions"),
        tuning.figures,
        _lines("search-scores.jsonl", "confirm-scores.jsonl", part=True),
        lambda summary, _: tuning.render_tuning(summary),
    ),
    "effects": Kind(
        effects.headline,
        _over(QUESTION, "questions", many=True),
        _effects_figures,
        _lines("effects-scores.jsonl"),
        effects.render_effects,
    ),
    "study": Kind(
        study.headline,
        _over("prompt", "points", many=True),
        study.figures,
        _lines("study-scores.jsonl"),
        study.render_study,
    ),
    "screening": Kind(
        screening.headline, screening.rows_screened, screening.figures, _screened, screening.render_screening
    ),
    "finetune": Kind(
        _finetune, _over("conversation", "data", "conversations"), _finetune_figures, _lines("metrics.jsonl")
    ),
    "finetune study": Kind(
        finetuning.headline,
        _over(QUESTION, "settings", "asked", "questions", many=True),
        finetuning.figures,
        _lines("outcomes.jsonl"),
        finetuning.render_finetuning,
    ),
    "shift": Kind(_shift, lambda _: "", _shift_figures, shifts_of),
    "dissection": Kind(
        dissection.headline,
        _over(QUESTION, "settings", "questions"),
        dissection.figures,
        _lines("arms-scores.jsonl"),
        dissection.render_dissection,
    ),
    "monitor": Kind(_monitor, lambda _: "", _monitor_figures, _nothing),
    "lens": Kind(_lens, lambda _: "", _lens_figures, _nothing),
    "demo": Kind(
        lambda summary: vector.headline(summary["steering"]["effect"], summary["steering"]["questions"]),
        _over(QUESTION, "steering", "questions"),
        vector.figures,
        lambda folder, summary: _lines("steering-scores.jsonl")(folder / "steering", summary),
        lambda summary, _: vector.render_vector(summary),
    ),
}
