"""The sweep of every family in one command, into one results file.

    python benchmarks/run.py --quick
    python benchmarks/run.py --device cuda --full --family similarity relation --csv results.csv
    python benchmarks/run.py --full --report --minutes 20
    python benchmarks/run.py --quick --compare HEAD~10

Rows go to benchmarks/results/<machine>.csv unless --csv names another file. --report begins that file anew, measures
training and scaling as well, then draws the plots and writes the tables of docs/performance.md (for another --csv only
plots, beside it). A family whose results do not match float64 prints no times; the others still run, and the exit
status says it.
"""

import argparse
import importlib
import os
import resource
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from side_by_side import RESULTS, results_file

ALL = ["float32", "bfloat16", "float16"]
HALF = ["bfloat16"]
BOTH = ["--part", "forward + backward"]
# What a script would call, where there is a published form, and the plain PyTorch twin where there is none.
PUBLISHED = ["--provider", "eager", "cpu", "peers"]
TWIN = ["--provider", "reference", "cpu"]

# family -> arguments of its runs, for each device and depth
SWEEPS: dict[tuple[str, str], dict[str, list[list[str]]]] = {
    ("cpu", "quick"): {
        "support_attention": [["--batch", "128", "4096"]],
        "similarity": [["--batch", "1024", "4096"]],
        "relation": [["--batch", "1024", "4096"]],
        "retrieval": [[]],
    },
    ("cuda", "quick"): {
        "support_attention": [["--batch", "128", "4096", "65536", "--dtype", "float32", "bfloat16"]],
        "similarity": [
            ["--batch", "128", "1024", "4096", "16384", "--loss", "sdm", "info_nce", "--dtype", *HALF],
            ["--batch", "1024", "4096", "--loss", "cmpm", "tal", "--dtype", *HALF],
            ["--batch", "1024", "4096", "--loss", "sdm"],
        ],
        "relation": [["--batch", "1024", "4096", "16384", "--dtype", *HALF], ["--batch", "1024", "4096"]],
        "retrieval": [
            ["--dtype", "float32", "bfloat16"],
            ["--op", "topk", "--queries", "10000", "--gallery", "100000", "--dtype", *HALF],
        ],
    },
}
# Some minutes each on two cores: the largest shapes in few rounds, torch.compile where its compilation is worth them.
SWEEPS["cpu", "full"] = {
    "support_attention": [
        ["--batch", "128", "1024", "--rounds", "9"],
        ["--batch", "4096", *PUBLISHED, "--compile", "--rounds", "3"],
        ["--batch", "4096", "--dtype", "bfloat16", "--provider", "eager", "cpu", "--rounds", "3", *BOTH],
    ],
    "similarity": [
        ["--batch", "256", "--loss", "sdm", "info_nce", *PUBLISHED, *BOTH],
        ["--batch", "1024", "4096", "--loss", "sdm", "info_nce", *PUBLISHED, "--compile", "--rounds", "3", *BOTH],
        ["--batch", "8192", "--loss", "sdm", "info_nce", *PUBLISHED, "--compile", "--rounds", "2", *BOTH],
        ["--batch", "1024", "4096", "--loss", "cmpm", "tal", *TWIN, "--compile", "--rounds", "3", *BOTH],
    ],
    "relation": [
        ["--batch", "1024", "4096", *PUBLISHED, "--compile", "--rounds", "3", *BOTH],
        ["--batch", "8192", *PUBLISHED, "--rounds", "2", *BOTH],
    ],
    "retrieval": [["--rounds", "3"]],
}
SWEEPS["cuda", "full"] = {
    "support_attention": [["--batch", "128", "1024", "4096", "16384", "65536", "--compile", "--dtype", *ALL]],
    "similarity": [["--batch", "128", "512", "1024", "2048", "4096", "8192", "16384", "--compile", "--dtype", *ALL]],
    "relation": [["--batch", "128", "1024", "4096", "8192", "16384", "--compile", "--dtype", *ALL]],
    "retrieval": [
        ["--compile", "--dtype", *ALL],
        ["--op", "topk", "--queries", "10000", "--gallery", "1000000", "--dtype", *HALF],
    ],
}
# What --report measures besides.
BESIDES: dict[str, dict[str, list[list[str]]]] = {
    "quick": {
        "end_to_end": [["--people", "100", "--steps", "10", "--epochs", "1", "--rounds", "1"]],
        "scaling": [["--sweep", "support_attention/set size", "--rounds", "3"]],
    },
    "full": {
        "end_to_end": [["--rounds", "3"]],
        "scaling": [
            ["--rounds", "3", "--sweep", curve]
            for curve in (
                *("sdm/rows", "support_attention/set size", "support_attention/threads", "sdm/threads"),
                *("relation_frobenius/rows", "support_attention/rows", "sdm/width"),
            )
        ],
    },
}


def limit_memory() -> None:
    """An allocation beyond four fifths of the machine's memory fails, which is a row, instead of ending the run."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if soft == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_AS, (int(0.8 * whole), hard))


def measure(steps: Sequence[tuple[str, Sequence[str]]], minutes: float | None) -> list[str]:
    """Run the steps one after another; those that failed, or were not begun because the time was spent."""
    start = time.monotonic()
    failed = []
    for family, arguments in steps:
        spent = (time.monotonic() - start) / 60
        name = f"{family} {' '.join(arguments)}"
        if minutes is not None and spent > minutes:
            print(f"\n== {name}: not begun, {minutes:g} minutes are spent")
            failed.append(f"{family} (no time left)")
            continue
        print(f"\n== {name} (minute {spent:.1f})", flush=True)
        try:
            importlib.import_module(family).main(list(arguments))
        except SystemExit as stop:
            if stop.code not in (None, 0):
                print(stop)
                failed.append(family)
        except Exception:
            traceback.print_exc()
            failed.append(family)
    return failed


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    families = list(SWEEPS["cpu", "quick"])
    parser.add_argument("--family", nargs="+", choices=families, default=families)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--quick", dest="depth", action="store_const", const="quick", default="quick")
    depth.add_argument("--full", dest="depth", action="store_const", const="full")
    parser.add_argument("--rounds", type=int, help="of every run; default: 5, and in --full what a run's size allows")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--report", action="store_true", help="training and scaling as well, plots and tables")
    parser.add_argument("--minutes", type=float, help="begin nothing after so many minutes")
    parser.add_argument("--compare", metavar="REV", help="this tree against another revision (compare.py)")
    args = parser.parse_args(arguments)
    runs = [(family, run) for family in args.family for run in SWEEPS[args.device, args.depth][family]]
    if args.compare:
        from compare import compare_revisions

        compare_revisions(args.compare, runs, device=args.device, rounds=args.rounds or 11, csv=args.csv)
        return
    file = args.csv or results_file(torch.device(args.device))
    if args.report:
        file.unlink(missing_ok=True)
        runs += [(name, run) for name, found in BESIDES[args.depth].items() for run in found]
        # The largest shapes last: they are what is left out where the time does not suffice.
        runs.sort(key=lambda run: "8192" in run[1])
    if args.device == "cpu":
        limit_memory()
    shared = ["--device", args.device, "--csv", str(file)]
    asked = [] if args.rounds is None else ["--rounds", str(args.rounds)]
    failed = measure([(family, [*shared, *run, *asked]) for family, run in runs], args.minutes)
    if args.report:
        import plot

        plot.main(["--table"] if file.parent == RESULTS else [str(file), "--plots", str(file.parent / "plots")])
    if failed:
        sys.exit(f"failed: {', '.join(sorted(set(failed)))}")


if __name__ == "__main__":
    main()
