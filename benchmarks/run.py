"""The sweep of every family in one command, into one results file.

    python benchmarks/run.py --device cpu --quick --csv results.csv
    python benchmarks/run.py --device cuda --full --family similarity relation --csv results.csv

A family whose results do not match float64 prints no times; the others still run, and the exit status says it.
"""

import argparse
import importlib
import sys
import traceback
from pathlib import Path

ALL = ["float32", "bfloat16", "float16"]
HALF = ["bfloat16"]

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
SWEEPS["cpu", "full"] = {
    "support_attention": [["--batch", "128", "1024", "4096", "--compile", "--dtype", *ALL]],
    "similarity": [["--batch", "256", "1024", "4096", "8192", "--compile"]],
    "relation": [["--batch", "256", "1024", "4096", "8192", "--teacher-width", "1024", "--compile"], []],
    "retrieval": [["--compile"]],
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    families = list(SWEEPS["cpu", "quick"])
    parser.add_argument("--family", nargs="+", choices=families, default=families)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--quick", dest="depth", action="store_const", const="quick", default="quick")
    depth.add_argument("--full", dest="depth", action="store_const", const="full")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    shared = ["--device", args.device, "--rounds", str(args.rounds)]
    if args.csv:
        shared += ["--csv", str(args.csv)]
    failed = []
    for family in args.family:
        for arguments in SWEEPS[args.device, args.depth][family]:
            print(f"\n== {family} {' '.join(arguments)}", flush=True)
            try:
                importlib.import_module(family).main([*arguments, *shared])
            except SystemExit as stop:
                print(stop)
                failed.append(family)
            except Exception:
                traceback.print_exc()
                failed.append(family)
    if failed:
        sys.exit(f"failed: {', '.join(sorted(set(failed)))}")


if __name__ == "__main__":
    main()
