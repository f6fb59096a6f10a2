"""Which of the two GPU backends `auto` takes, for each operator and size: the one table, and where it was measured."""

from typing import NamedTuple


class Choice(NamedTuple):
    """The preferred backend of calls with at most `up_to` rows in their first tensor (None: with any number)."""

    up_to: int | None
    backend: str
    measured: str | None
    """The results file that the choice was read from; None: not measured on a GPU yet."""


_UNMEASURED = (Choice(None, "cuda", None),)

CHOICES: dict[str, tuple[Choice, ...]] = {
    "support_attention": _UNMEASURED,
    "info_nce": _UNMEASURED,
    "sdm": _UNMEASURED,
    "cmpm": _UNMEASURED,
    "tal": _UNMEASURED,
    "relation_frobenius": _UNMEASURED,
    "relation_kl": _UNMEASURED,
    "topk_similarity": _UNMEASURED,
    "retrieval_metrics": _UNMEASURED,
}
"""Operator -> choices by rising size; `python benchmarks/choose.py RESULTS.csv` prints it from a results file."""


def choice(op: str, rows: int | None) -> Choice:
    """The entry for a call of `op` with `rows` rows in its first tensor; None stands for the largest size."""
    entries = CHOICES.get(op, _UNMEASURED)
    if rows is not None:
        for entry in entries:
            if entry.up_to is None or rows <= entry.up_to:
                return entry
    return entries[-1]


def describe(op: str, rows: int | None) -> str:
    """One line: what `auto` prefers on a GPU for this call, and on what grounds."""
    entry = choice(op, rows)
    size = "any size" if entry.up_to is None and len(CHOICES.get(op, _UNMEASURED)) == 1 else "this size"
    grounds = f"measured in {entry.measured}" if entry.measured else "not measured on a GPU yet"
    return f"on a GPU `auto` prefers {entry.backend} at {size} ({grounds})"
