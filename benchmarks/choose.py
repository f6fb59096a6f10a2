"""Which GPU backend should be the default, read from a results file: prints the table of lcr2s_ext/ops/_dispatch.py.

    python benchmarks/choose.py benchmarks/results/h100.csv

For each operator and number of rows the backend with the smaller product of times over dtypes and parts wins (the time
of a replayed CUDA graph where both have one, wall time otherwise); neighbouring sizes with one winner become one entry.
"""

import argparse
import csv
import math
from collections import defaultdict
from pathlib import Path

CUDA, TRITON = "lcr2s_ext cuda", "lcr2s_ext triton"


def winners(rows: list[dict[str, str]]) -> dict[str, list[tuple[int, str]]]:
    """operator -> [(rows, "cuda" or "triton")] by rising size, of the sizes where both were measured."""
    pairs: dict[tuple[str, ...], dict[str, dict[str, str]]] = defaultdict(dict)
    for row in rows:
        if row["candidate"] in (CUDA, TRITON) and row["ms"]:
            case = tuple(row[key] for key in ("op", "rows", "columns", "width", "part", "dtype", "detail"))
            pairs[case][row["candidate"]] = row
    log_ratio: dict[tuple[str, int], float] = defaultdict(float)
    for (op, size, *_), pair in pairs.items():
        if len(pair) == 2:
            field = "device_ms" if all(row["device_ms"] for row in pair.values()) else "ms"
            log_ratio[op, int(size)] += math.log(float(pair[CUDA][field]) / float(pair[TRITON][field]))
    result: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for (op, size), ratio in sorted(log_ratio.items()):
        result[op].append((size, "cuda" if ratio <= 0 else "triton"))
    return result


def entries(sizes: list[tuple[int, str]], source: str) -> str:
    """The choices of one operator as the table's source code."""
    merged: list[tuple[int | None, str]] = []
    for position, (size, backend) in enumerate(sizes):
        limit = None if position + 1 == len(sizes) else size
        if merged and merged[-1][1] == backend:
            merged[-1] = (limit, backend)
        else:
            merged.append((limit, backend))
    return ", ".join(f'Choice({limit}, "{backend}", "{source}")' for limit, backend in merged)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    path = parser.parse_args().results
    with path.open(newline="") as file:
        found = winners(list(csv.DictReader(file)))
    if not found:
        raise SystemExit(f"{path} holds no operator that was measured on both cuda and triton")
    for op, sizes in found.items():
        print(f'    "{op}": ({entries(sizes, path.name)},),')


if __name__ == "__main__":
    main()
