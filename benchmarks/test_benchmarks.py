"""The operators under pytest-benchmark, every candidate checked against float64 before it is timed.

    pytest benchmarks/ --benchmark-only --rows 1024 --provider eager cpu -k sdm

`make test` does not collect this file. Groups are operator and part, so that candidates stand under one another; rounds
are not interleaved and memory is not measured: that is what the other files here do.
"""

import functools
from collections.abc import Callable

import pytest
import relation
import retrieval
import similarity
import support_attention
import torch
from problem import OURS, Problem, judged
from side_by_side import verify

HEADS, LARGEST_SET, NEAREST = 8, 8, 10


def _retrieval(op: str, rows: int, width: int, dtype: str, device: torch.device, wanted: set[str]) -> Problem:
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(rows) // 4
    centres = torch.randn(int(ids.max()) + 1, width, generator=generator)
    query, gallery = (
        (centres[ids] + 4 * torch.randn(rows, width, generator=generator)).to(device, getattr(torch, dtype))
        for _ in range(2)
    )
    if op == "topk_similarity":
        return retrieval.setup_topk(query, gallery, NEAREST, dtype, wanted)
    return retrieval.setup_metrics(query, gallery, (ids.to(device), ids.to(device)), dtype, wanted)


Setup = Callable[[int, int, str, torch.device, set[str]], Problem]
SETUPS: dict[str, Setup] = {
    "support_attention": lambda rows, width, *x: support_attention.setup(rows, width, HEADS, LARGEST_SET, *x),
    **{loss: functools.partial(similarity.setup, loss) for loss in ("sdm", "info_nce", "cmpm", "tal")},
    "relation_frobenius": lambda rows, width, *x: relation.setup("frobenius", rows, width, width, *x),
    "relation_kl": lambda rows, width, *x: relation.setup("kl", rows, width, width, *x),
    "retrieval_metrics": functools.partial(_retrieval, "retrieval_metrics"),
    "topk_similarity": functools.partial(_retrieval, "topk_similarity"),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    cases = []
    for op, setup in SETUPS.items():
        device = torch.device(option("--device"))
        problem = setup(option("--rows"), option("--width"), option("--dtype"), device, set(option("--provider")))
        cases += [
            pytest.param(problem, part, name, id=f"{op}-{part}-{name}")
            for part in problem.parts
            for name in problem.forms
        ]
    metafunc.parametrize(("problem", "part", "name"), cases)


def test_operator(benchmark: Callable[..., object], problem: Problem, part: str, name: str) -> None:
    form, measured = problem.forms[name], problem.parts[part]
    if isinstance(form.call, str):
        pytest.skip(form.call)
    candidate = measured.candidate(form.call)
    if form.provider in OURS:
        verify(f"{problem.title}, {name}", candidate(), measured.exact, problem.tolerance)
    elif isinstance(reason := judged(candidate, measured.exact, problem.tolerance), str):
        pytest.skip(reason)
    benchmark.group = f"{problem.title}, {part}"
    device = measured.exact[0].device

    def timed() -> None:
        candidate()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark(timed)
