"""What ``persona-lens screen`` says at its end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_lens.cli import options
from persona_lens.cli.display import say, say_json
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.screening import Screening


def finish(found: Screening, folder: Path, as_json: bool) -> None:
    """Write the report, and say what was found."""
    from persona_lens import __version__
    from persona_lens.reports.screening import render_screening

    options.write_report(folder / options.REPORT, render_screening(found.summary, __version__))
    if found.rows:
        say(
            f"{counted(found.rows, 'row')}, {counted(found.tokens, 'token')} in {found.seconds:,.1f} s: "
            f"{found.rows / found.seconds:,.1f} rows and {found.tokens / found.seconds:,.0f} tokens a second",
            err=True,
        )
    for dataset in found.summary["datasets"]:
        if dataset["rejected"]:
            say(
                f"{dataset['name']}: {dataset['rejected']:,} of {dataset['rows']:,} rows could not be read"
                f"{f' ({tools:,} call tools)' if (tools := dataset['call_tools']) else ''}; "
                f"{folder / 'rejects.jsonl'} says which",
                err=True,
            )
    if as_json:
        say_json({"folder": str(folder), **found.summary})
    else:
        _show(found.summary, folder)


def _show(summary: Any, folder: Path) -> None:
    from persona_lens.cli.display import print_table

    for gauge in summary["gauges"]:
        known = [each["means"][gauge] for each in summary["datasets"] if each["means"]]
        against = "difference" if any(means["difference"] for means in known) else "prompt_difference"
        print_table(
            f"{gauge}: means [95% interval], in residual-stream units",
            ("dataset", "rows", "raw", against.replace("_", " "), "flagged"),
            [
                (
                    name,
                    f"{each['rows'] - each['rejected']:,}",
                    *(_interval(each["means"][gauge][quantity]) for quantity in ("raw", against)),
                    f"{each['flagged'][gauge]:,}" if each.get("flagged") else "-",
                )
                for dataset in summary["datasets"]
                if dataset["means"]
                for name, each in _named(dataset)
            ],
        )
    for line in conclusions(summary):
        say(line)
    say(f"report: {folder / options.REPORT}")


def conclusions(summary: Any) -> list[str]:
    """What the screening comes to beside the table, in a few lines."""
    lines = [
        f"{each['gauge']}: flagged above {each['high']:.3f}, undecided above {each['low']:.3f} "
        f"({summary['score']}; {100 * each['false_positive_rate']:g}% of {each['rows']:,} reference rows above "
        f"{each['value']:.3f})"
        for each in summary["thresholds"]
    ]
    for label, quantities in (summary["labels"] or {"labels": {}})["labels"].items():
        for quantity, gauges in quantities.items():
            lines += [
                f"{label} against {summary['labels']['clean']}, {quantity}, {gauge}: AUC {found['auc']:.3f} "
                f"[{found['low']:.3f}, {found['high']:.3f}]{_beside(found['random'])}"
                for gauge, found in gauges.items()
            ]
    for dataset in summary["datasets"]:
        lines += [
            f"{dataset['name']}: finetuning on it is forecast to move the score of {gauge.rpartition('@')[0]} by "
            f"{found['shift']:+.1f} [{found['low']:+.1f}, {found['high']:+.1f}] points"
            + (", beyond the datasets that the forecast was fitted on" if found["outside"] else "")
            for gauge, found in dataset["forecasts"].items()
        ]
    for trait, found in summary["opinions"].items():
        lines.append(
            f"{trait}: of {found['judged']:,} flagged rows the judge scores {found['confirmed']:,} at 50 or more"
            + (f", {found['without_score']:,} without a score" if found["without_score"] else "")
        )
    return lines


def _beside(random: list[float]) -> str:
    if not random:
        return ""
    mean = sum(random) / len(random)
    return f"; {len(random)} random directions {mean:.2f} on average, {min(random):.2f} to {max(random):.2f}"


def _interval(found: Any) -> str:
    from persona_lens.cli.display import interval_text

    return interval_text(found, 2, noun="row")


def _named(dataset: Any) -> list[tuple[str, Any]]:
    """A dataset and its groups, as they are named in a table."""
    name = Path(dataset["name"]).name + (" (reference)" if dataset["reference"] else "")
    return [(name, dataset), *((f"- {group}", found) for group, found in dataset["groups"].items())]
