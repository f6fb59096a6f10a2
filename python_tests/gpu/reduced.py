"""Every kernel once on small shapes, checked against float64; compute-sanitizer watches this run in `make gpu`.

python python_tests/gpu/reduced.py cuda
"""

import os
import sys
from pathlib import Path

DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cuda"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402
from problems import problems  # noqa: E402
from tolerances import assert_matches_oracle  # noqa: E402

from lcr2s_ext import ops  # noqa: E402
from lcr2s_ext.ops import _backend  # noqa: E402


def main() -> None:
    device = torch.device(DEVICE)
    ran = 0
    for problem in problems():
        for dtype in (torch.float32, torch.bfloat16):
            inputs = problem.inputs(DEVICE, dtype)
            exact = problem.run([x.double() for x in inputs], problem.extra(DEVICE), "reference")
            for backend in (DEVICE, "triton"):
                reason = _backend.unavailable_reason(problem.name, backend, device)
                if reason is not None:
                    sys.exit(f"{problem.name}: {backend} cannot run: {reason}")
                found = problem.run(inputs, problem.extra(DEVICE), backend)
                for part, (ours, oracle) in enumerate(zip(found, exact, strict=True)):
                    name = f"{problem.name} {dtype} {backend} result {part}"
                    assert_matches_oracle(ours, oracle, dtype, name)
                ran += 1
    generator = torch.Generator().manual_seed(3)
    query, gallery = (torch.randn(n, 72, generator=generator).to(device) for n in (90, 140))
    ids = [torch.randint(0, 20, (n,), generator=generator).to(device) for n in (90, 140)]
    expected = ops.retrieval_metrics(query.double(), gallery.double(), *ids, backend="reference")
    for backend in (DEVICE, "triton"):
        found = ops.retrieval_metrics(query, gallery, *ids, backend=backend)
        if any(abs(found[key] - expected[key]) > 1e-6 for key in expected):
            sys.exit(f"retrieval_metrics on {backend}: {found}, expected {expected}")
        ran += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{ran} runs match float64 on {DEVICE}")


if __name__ == "__main__":
    main()
