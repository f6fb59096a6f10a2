"""What the demo's numbers say: tables, means over runs, paired differences, and conclusions drawn from them alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lcr2s_ext.training.arms import ARMS

__all__ = ["PAIRS", "conclusions", "format_table", "paired_difference", "summarize", "table_rows"]

METRICS = ("R@1", "R@5", "R@10", "mAP", "mINP")

PAIRS: tuple[tuple[str, str, str], ...] = (
    ("c", "c0", "what the teacher's support is worth at test"),
    ("d", "b", "the method against equal epochs without a teacher"),
    ("d", "b+", "the method against equal optimiser steps without a teacher"),
    ("d", "e", "a teacher with support against an equally trained one without"),
    ("d'", "e", "the same, the two teachers differing by the fusion alone"),
)
"""Differences that are reported: first arm, second arm, the question."""

# Two-sided 95 % quantiles of Student's t by degrees of freedom; from 30 on the normal's is near enough.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045,
)  # fmt: skip

Run = Mapping[str, Any]
"""One run: ``{"corpus", "seed", "arms": {arm: {"test": {direction: metrics}, "steps", ...}}}``."""


def _value(run: Run, arm: str, metric: str, direction: str = "text_to_image") -> float:
    return float(run["arms"][arm]["test"][direction][metric])


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; the latter is None for a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def paired_difference(runs: Sequence[Run], first: str, second: str, metric: str = "R@1") -> dict[str, Any]:
    """Difference of two arms within each run (same corpus, same seed), and what it resolves to.

    Args:
        runs: finished runs that hold both arms.
        first: arm.
        second: arm subtracted from it.
        metric: text-to-image metric.

    Returns:
        ``values`` per run, ``mean``, ``sd`` (None for one run), ``margin``: the half-width of the 95 % interval, from
        the spread between runs, or for one run from the number of queries alone (the randomness of training is not in
        it), and ``verdict``: ``"higher"``, ``"lower"`` or ``"unresolved"``.
    """
    values = [_value(run, first, metric) - _value(run, second, metric) for run in runs]
    mean, sd = mean_sd(values)
    if sd is None:
        rates = (_value(runs[0], first, metric), _value(runs[0], second, metric))
        queries = max(1.0, _value(runs[0], first, "queries") - _value(runs[0], first, "queries_without_positive"))
        margin = 1.96 * math.sqrt(sum(rate * (1 - rate) for rate in rates) / queries)
    else:
        quantile = _T95[len(values) - 2] if len(values) - 1 <= len(_T95) else 1.96
        margin = quantile * sd / math.sqrt(len(values))
    verdict = "unresolved" if abs(mean) <= margin else ("higher" if mean > 0 else "lower")
    return {"values": values, "mean": mean, "sd": sd, "margin": margin, "verdict": verdict}


def summarize(runs: Sequence[Run], arms: Sequence[str]) -> dict[str, Any]:
    """Means and standard deviations of every arm on test, and the paired differences between arms that were run."""
    summary: dict[str, Any] = {"runs": len(runs), "arms": {}, "differences": {}}
    for arm in arms:
        directions = runs[0]["arms"][arm]["test"]
        summary["arms"][arm] = {
            direction: {
                metric: dict(
                    zip(("mean", "sd"), mean_sd([_value(run, arm, metric, direction) for run in runs]), strict=True)
                )
                for metric in directions[direction]
            }
            for direction in directions
        }
    for first, second, question in PAIRS:
        if first in arms and second in arms:
            summary["differences"][f"{first} - {second}"] = {
                "question": question,
                **{metric: paired_difference(runs, first, second, metric) for metric in ("R@1", "mAP")},
            }
    return summary


def percent(mean: float, sd: float | None, sign: bool = False) -> str:
    """A fraction in percent, with its deviation where there is one."""
    text = f"{100 * mean:+.1f}" if sign else f"{100 * mean:.1f}"
    return text if sd is None else f"{text} ± {100 * sd:.1f}"


def table_rows(runs: Sequence[Run], summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows of the results table: test, text to image, in percent."""
    rows = []
    for arm, directions in summary["arms"].items():
        metrics = directions["text_to_image"]
        steps = {int(run["arms"][arm]["total_steps"]) for run in runs}
        name = f"({arm}) {ARMS[arm].title}"
        rows.append(
            {
                "arm": name,
                **{metric: percent(metrics[metric]["mean"], metrics[metric]["sd"]) for metric in METRICS},
                "mAP trap.": percent(metrics["mAP_trapezoid"]["mean"], metrics["mAP_trapezoid"]["sd"]),
                "steps": "/".join(str(count) for count in sorted(steps)),
            }
        )
    return rows


def difference_rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows of the table of paired differences, in points."""
    rows = []
    for name, difference in summary["differences"].items():
        row = {"paired difference": name}
        for metric in ("R@1", "mAP"):
            found = difference[metric]
            row[metric] = percent(found["mean"], found["sd"], sign=True)
            row[f"{metric} in each run"] = ", ".join(f"{100 * value:+.1f}" for value in found["values"])
        row["question"] = difference["question"]
        rows.append(row)
    return rows


def format_table(rows: Sequence[Mapping[str, str]], *, markdown: bool = False) -> str:
    """Rows as aligned text, or as a Markdown table."""
    keys = list(rows[0])
    lines = [keys, *([row[key] for key in keys] for row in rows)]
    if markdown:
        body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
        return "\n".join([body[0], "|" + "---|" * len(keys), *body[1:]])
    widths = [max(len(line[column]) for line in lines) for column in range(len(keys))]
    text = [
        "  ".join(
            cell.ljust(width) if column in (0, len(keys) - 1) and not _is_number(cell) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit()


def conclusions(runs: Sequence[Run], summary: Mapping[str, Any]) -> list[str]:
    """Sentences that follow from the paired differences in R@1, no more than they allow."""
    differences, lines = summary["differences"], []
    count = len(runs)

    def found(name: str) -> str | None:
        return differences[name]["R@1"]["verdict"] if name in differences else None

    def points(name: str) -> str:
        difference = differences[name]["R@1"]
        spread = f", 95 % interval ± {100 * difference['margin']:.1f}"
        return f"{name}: {100 * difference['mean']:+.1f} points of R@1{spread}"

    sentences = {
        "c - c0": {
            "higher": "the teacher retrieves better when it is handed support sets of the test identities (an oracle)",
            "lower": "the teacher retrieves worse with support sets than without: its fusion does not use them",
            "unresolved": "support sets at test make no difference that these runs resolve",
        },
        "d - b": {
            "higher": "the student is better than the same student trained alone for as many epochs",
            "lower": "the student is worse than the same student trained alone for as many epochs",
            "unresolved": "the student and the same student trained alone for as many epochs are not told apart",
        },
        "d - b+": {
            "higher": "it is also better than plain training for all the optimiser steps that teacher and student took",
            "lower": "plain training for all the optimiser steps that teacher and student took is better",
            "unresolved": "plain training for all the steps that teacher and student took is not told apart from it",
        },
    }
    for name, words in sentences.items():
        verdict = found(name)
        if verdict is not None:
            lines.append(f"{points(name)}; {words[verdict]}.")
    transfer = [name for name in ("d - e", "d' - e") if found(name) is not None]
    for name in transfer:
        lines.append(f"{points(name)}.")
    verdicts = [found(name) for name in transfer]
    if "higher" in verdicts and "lower" not in verdicts:
        lines.append(
            "Conclusion: distilling from a teacher with support sets beats the same distillation from an equally "
            "trained teacher without them: some of the richness transfers to the student here."
        )
    elif verdicts and all(verdict == "lower" for verdict in verdicts):
        lines.append(
            "Conclusion: distilling from an equally trained teacher without support sets does better: what the student "
            "gains is distillation and longer training, not the richness of support sets."
        )
    elif verdicts:
        lines.append(
            "Conclusion: these runs do not show that the richness of support sets transfers to the student: an equally "
            "trained teacher without them does as well within what is resolved."
        )
    else:
        lines.append(
            "Conclusion: arms (d) and (e) were not both run; nothing is said about what the student's gain is due to."
        )
    if count == 1:
        lines.append(
            "One run: the intervals hold the uncertainty of the test queries alone, not that of another seed. "
            "--full --seeds N --corpora M repeats everything."
        )
    return lines
