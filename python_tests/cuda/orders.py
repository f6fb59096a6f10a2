"""Every operator's CUDA kernels in the emulator, with threads and blocks in several orders: equal to the bit.

LCR2S_LIBRARY=<an emulated build> python python_tests/cuda/orders.py [OPERATOR...]     (`make emulate`)
"""

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "gpu"), str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402
from problems import Problem, problems  # noqa: E402
from tolerances import assert_matches_oracle  # noqa: E402

from lcr2s_ext.ops import _library  # noqa: E402

ORDERS = ["forward", "reverse", "random:1", "random:2"]
# (capability, multiprocessors): the paths of two generations, with few blocks at once and with many.
DEVICES = [("80", "4"), ("90", "4"), ("90", "132")]


def check(problem: Problem, dtype: torch.dtype) -> None:
    inputs, extra = problem.inputs("cpu", dtype), problem.extra("cpu")
    exact = problem.run([x.double() for x in inputs], extra, "reference")
    for capability, multiprocessors in DEVICES:
        os.environ["LCR2S_EMULATE_CAPABILITY"] = capability
        os.environ["LCR2S_EMULATE_MULTIPROCESSORS"] = multiprocessors
        first: list[torch.Tensor] = []
        for order in ORDERS:
            os.environ["LCR2S_EMULATE_ORDER"] = order
            found = problem.run(inputs, extra, "cpu")
            name = f"{problem.name} {dtype} capability {capability} {multiprocessors} multiprocessors {order}"
            first = first or found
            for part, (ours, same, oracle) in enumerate(zip(found, first, exact, strict=True)):
                assert_matches_oracle(ours, oracle, dtype, f"{name} result {part}")
                if not torch.equal(ours, same):
                    sys.exit(f"{name} result {part}: differs from {ORDERS[0]}")


def main() -> None:
    if not _library.compiled():
        sys.exit(_library.LOAD_ERROR)
    if not torch.ops.lcr2s.emulates_cuda():
        sys.exit("LCR2S_LIBRARY must name a library built with LCR2S_EMULATE_CUDA=1")
    # Memory that an operator takes and does not write is NaN.
    torch.use_deterministic_algorithms(True)
    wanted = sys.argv[1:]
    for problem in problems():
        if not wanted or problem.name in wanted:
            for dtype in (torch.float32, torch.bfloat16):
                check(problem, dtype)
            print(f"{problem.name}: equal to the bit in {len(ORDERS)} orders on {len(DEVICES)} devices", flush=True)


if __name__ == "__main__":
    main()
