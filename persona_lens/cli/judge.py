"""``persona-lens judge``: have responses rated by people, and see how far two judges agree."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import persona_lens
from persona_lens.cli import options
from persona_lens.cli.display import interval_text, number, print_table, say, showing_progress
from persona_lens.cli.options import judges
from persona_lens.cli.runner import deliver, show_work, write_report
from persona_lens.cli.settings import Option, argument
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.judging.agreement import Agreement, Measure

SOURCES = "A run folder, its scores, a table (JSONL, CSV, Parquet), or ratings by people."
SECOND = argument(
    "SECOND",
    "The same responses by another judge; or a judge that scores them now: `openai:MODEL`, `local:MODEL`, "
    "`likelihood:VECTORS`.",
)
Source = Annotated[Path, argument("SOURCE", SOURCES)]
JUDGES = ("openai:", "local:", "likelihood:")


def sample(
    source: Source,
    out: Annotated[Path, Option("The table; it must not be there yet.", metavar="FILE.csv")],
    n: Annotated[int, Option("How many responses.", names=("--number", "-n"))] = 60,
    seed: options.Seed = 0,
    trait: str | None = None,
    column: str | None = None,
    traits_dir: options.TraitsDirs = None,
) -> None:
    """Draw responses for people to rate, without what a judge said of them.

    Low and high scores are both drawn. The raters fill in the column `rating` of the table, in any spreadsheet; what to
    do is in FILE.csv.instructions.txt. `judge compare` reads it back.

    Example: `persona-lens judge sample runs/optimistic-smollm2-135m --out ratings.csv --trait optimistic`

    Args:
        trait: A trait whose rubric the raters get.
        column: Column of the scores to draw by.
    """
    from persona_lens.judging.agreement import read_scored, write_blinded

    loaded = options.open_trait(trait, traits_dir) if trait is not None else None
    responses = read_scored(source, column=column, scores_required=column is not None)
    if all(each.score is None for each in responses):
        options.say_notes([f"{source} has no scores to draw by, so all responses are equally likely"])
    written = write_blinded(responses, out, n, seed, trait=loaded)
    say(
        f"{written} of {counted(len(responses), 'response')}: {out}\n"
        f"instructions for the raters: {out}.instructions.txt"
    )


def score(
    source: Source,
    judge: Annotated[str, Option("`openai:MODEL`, `local:MODEL` or `likelihood:VECTORS`.")],
    trait: Annotated[str, Option("The trait that is scored.")],
    out: Annotated[Path, Option("The scores; it must not be there.", metavar="FILE.jsonl")],
    dry_run: options.DryRun = False,
    traits_dir: options.TraitsDirs = None,
    *,
    opening: options.Placement,
    judging: judges.JudgeOptions,
) -> None:
    """Have responses scored by a judge, whatever scores they have.

    Stopped at any moment and started again with the same command, it goes on where it was.

    Example:
    `persona-lens judge score runs/optimistic-smollm2-135m --judge openai:gpt-4.1-mini --trait optimistic
    --out scores.jsonl`
    """
    from persona_lens.judging.agreement import read_scored
    from persona_lens.judging.scored import judge_scored, scoring_work

    responses = read_scored(source, scores_required=False)
    opened = judging.open(judge, options.open_trait(trait, traits_dir), opening)
    if dry_run:
        show_work(scoring_work(opened, responses), as_json=False)
        return
    with judges.saying_spending(opened), showing_progress() as progress:
        scored = judge_scored(opened, responses, out, progress)
    found = [each.score for each in scored if each.score is not None]
    if scored and not found:
        raise PersonaLensError(f"none of {len(scored):,} responses has a score: {scored[0].reason} ({out})")
    say(f"{len(found)} of {len(scored)} responses have a score: {out}")


def compare(
    first: Annotated[str, argument("FIRST", SOURCES)],
    second: Annotated[str, SECOND],
    first_column: str | None = None,
    second_column: str | None = None,
    report: Annotated[Path | None, Option("Also write a report.", metavar="FILE.html")] = None,
    trait: str | None = None,
    traits_dir: options.TraitsDirs = None,
    seed: options.Seed = 0,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
    *,
    opening: options.Placement,
    judging: judges.JudgeOptions,
) -> None:
    """See how far two judges agree on the responses that both of them scored.

    Responses are matched by question and response, or by the id that `judge sample` gave them. Intervals are 95%
    intervals over questions.

    Examples:
    `persona-lens judge compare runs/optimistic-smollm2-135m ratings.csv --report agreement.html`

    `persona-lens judge compare runs/optimistic-smollm2-135m local:smollm2-135m --trait optimistic`

    Args:
        first_column: Column of FIRST's scores.
        second_column: Column of SECOND's scores.
        trait: The trait that a judge scores now.
    """
    from persona_lens.judging.agreement import compare as compare_scores
    from persona_lens.judging.agreement import read_scored
    from persona_lens.judging.scored import judge_scored, scoring_work
    from persona_lens.reports.agreement import render_agreement

    if report is not None and report.suffix.lower() not in (".html", ".htm"):
        raise PersonaLensError(f"--report writes a page, so its file must end in .html; got {report}")
    scores = read_scored(first, column=first_column)
    if second.startswith(JUDGES):
        if trait is None:
            raise PersonaLensError(f"{second} needs to know what to score: name the trait (--trait)")
        judge = judging.open(second, options.open_trait(trait, traits_dir), opening)
        if dry_run:
            show_work(scoring_work(judge, scores), as_json)
            return
        with judges.saying_spending(judge), showing_progress() as progress:
            others = judge_scored(judge, scores, progress=progress)
    else:
        judging.refuse_useless(second)
        if trait is not None:
            raise PersonaLensError(f"--trait: only where SECOND is a judge ({', '.join(JUDGES)}…), this is {second!r}")
        others = read_scored(second, column=second_column)
        if dry_run:
            show_work((), as_json)
            return
    columns = ((first, first_column), (second, second_column))
    one, other = (path if column is None else f"{path}, {column}" for path, column in columns)
    found = compare_scores(scores, others, names=(one, other), seed=seed)
    if report is not None:
        write_report(report, render_agreement(found, persona_lens.__version__))
    deliver(found.to_json(), lambda: _show(found), as_json)
    if report is not None:
        say(f"report: {report}", err=True)


def _show(agreement: Agreement) -> None:
    from persona_lens.core.statistics import few

    counts, cuts, sides = agreement.counts, agreement.cuts, agreement.sides
    first, second = agreement.names
    print_table(
        f"First: {first}\nSecond: {second}",
        ("responses", "both", "first only", "second only"),
        [
            ("in the source", str(counts.matched), str(counts.only_first), str(counts.only_second)),
            ("with a score", str(counts.scored), str(counts.missing_second), str(counts.missing_first)),
            ("taken for refusals", str(counts.refused_both), str(counts.refused_first), str(counts.refused_second)),
            (f"at least {cuts.threshold:g}", str(sides.both_above), str(sides.first_above), str(sides.second_above)),
        ],
    )
    pairs = f"{cuts.high:g} or more over {cuts.low:g} or less"
    rows: dict[str, tuple[Measure, str]] = {
        "Pearson correlation": (agreement.pearson, ".2f"),
        "Spearman correlation of ranks": (agreement.spearman, ".2f"),
        f"first says {pairs}: second agrees": (agreement.pairwise_first, ".3f"),
        f"second says {pairs}: first agrees": (agreement.pairwise_second, ".3f"),
        f"same side of {cuts.threshold:g}": (agreement.same_side, ".3f"),
        "mean difference, second - first": (agreement.mean_difference, ".1f"),
        "lower limit of agreement": (agreement.lower_limit, ".1f"),
        "upper limit of agreement": (agreement.upper_limit, ".1f"),
    }
    print_table(
        f"Agreement [95% interval over {few(agreement.questions) or counted(agreement.questions, 'question')}]",
        ("measure", "value", "of"),
        [(name, _measured(measure, form), f"{measure.n:,}") for name, (measure, form) in rows.items()],
    )


def _measured(measure: Measure, form: str) -> str:
    value = "" if measure.value is None else f"{number(measure.value, form)} "
    if measure.low is None or measure.high is None:
        return f"{value}({measure.reason or ''})"
    return interval_text(measure, form, noun=None)
