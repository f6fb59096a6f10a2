"""Streams, graphs, synchronisation, large offsets and memory: the contracts that only a GPU can break."""

import sys
from pathlib import Path

import pytest
import torch
from tolerances import assert_matches_oracle
from torch import Tensor

from lcr2s_ext import ops

sys.path.insert(0, str(Path(__file__).resolve().parent))
from problems import Problem, problems

PROBLEMS = {problem.name: problem for problem in problems()}
LOSSES = [name for name in PROBLEMS if name not in ("support_attention", "topk_similarity")]
BACKENDS = ["cuda", "triton"]
# Ranking reads one status word: it refuses NaN.
WITHOUT_SYNC = [name for name in PROBLEMS if name != "topk_similarity"]


def ready(problem: Problem, backend: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[object]]:
    """The problem's inputs on the device, after a first run: compiled, autotuned and with its memory in the cache."""
    inputs, extra = problem.inputs("cuda", dtype), problem.extra("cuda")
    problem.run(inputs, extra, backend)
    torch.cuda.synchronize()
    return inputs, extra


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITHOUT_SYNC)
def test_the_host_never_waits(name: str, backend: str) -> None:
    inputs, extra = ready(PROBLEMS[name], backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = PROBLEMS[name].run(inputs, extra, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(bool(tensor.isfinite().all()) for tensor in found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITHOUT_SYNC)
def test_in_a_cuda_graph(name: str, backend: str) -> None:
    """A captured forward and backward, replayed on new inputs, gives what a plain call gives, to the bit."""
    problem = PROBLEMS[name]
    inputs, extra = ready(problem, backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        problem.run(inputs, extra, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.run(inputs, extra, backend)
    for tensor in inputs:
        if tensor.dim() > 0:
            tensor.copy_(tensor.flip(0) * 1.25)
    graph.replay()
    for replayed, called in zip(captured, problem.run(inputs, extra, backend), strict=True):
        assert torch.equal(replayed, called)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_on_the_current_stream(name: str, backend: str) -> None:
    """On a side stream behind a long wait, the kernels see the inputs that this stream writes."""
    problem = PROBLEMS[name]
    inputs, extra = ready(problem, backend)
    expected = problem.run(inputs, extra, backend)
    late = [torch.zeros_like(tensor) for tensor in inputs]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for target, source in zip(late, inputs, strict=True):
            target.copy_(source)
        found = problem.run(late, extra, backend)
    side.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cuda_and_triton_agree(name: str, dtype: torch.dtype) -> None:
    problem = PROBLEMS[name]
    inputs, extra = problem.inputs("cuda", dtype), problem.extra("cuda")
    exact = problem.run([tensor.double() for tensor in inputs], extra, "reference")
    for backend in BACKENDS:
        for part, (ours, oracle) in enumerate(zip(problem.run(inputs, extra, backend), exact, strict=True)):
            assert_matches_oracle(ours, oracle, dtype, f"{backend} result {part}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_same_bits_every_time(name: str, backend: str) -> None:
    problem = PROBLEMS[name]
    inputs, extra = ready(problem, backend, torch.bfloat16)
    first = problem.run(inputs, extra, backend)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(problem.run(inputs, extra, backend), first, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_without_a_graph_break(backend: str) -> None:
    problem = PROBLEMS["sdm"]
    image, text, scale = problem.inputs("cuda", torch.float32)
    ids = problem.extra("cuda")

    def loss(image: Tensor, text: Tensor) -> Tensor:
        return ops.sdm_loss(image * 2, text, *ids, logit_scale=scale, backend=backend) + 1

    leaves = [image.requires_grad_(), text.requires_grad_()]
    compiled = torch.compile(loss, fullgraph=True)
    actual = torch.autograd.grad(compiled(*leaves), leaves)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_two_to_the_31_pairs(backend: str) -> None:
    """50,000 x 50,000 pairs, their loss against float64 computed in slabs."""
    rows, width = 50_000, 8
    generator = torch.Generator(device="cuda").manual_seed(1)
    image = torch.randn(rows, width, device="cuda", generator=generator, dtype=torch.bfloat16)
    text = (image + torch.randn(rows, width, device="cuda", generator=generator)).to(torch.bfloat16)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    leaves = [image.requires_grad_(), text.requires_grad_()]
    loss = ops.info_nce_loss(*leaves, logit_scale=20.0, backend=backend)
    gradients = torch.autograd.grad(loss, leaves)
    assert torch.cuda.max_memory_allocated() - before < (512 << 20)
    # The same loss in float64, a slab of rows at a time.
    v, t = (torch.nn.functional.normalize(x.detach().double(), dim=1) for x in (image, text))
    diagonal = 20 * (v * t).sum(1)
    total = torch.zeros((), dtype=torch.float64, device="cuda")
    for a, b in ((v, t), (t, v)):
        for start in range(0, rows, 2000):
            logits = 20 * a[start : start + 2000] @ b.T
            total += (logits.logsumexp(1) - diagonal[start : start + 2000]).sum()
    torch.testing.assert_close(loss.double(), total / (2 * rows), rtol=1e-3, atol=0)
    assert all(bool(gradient.isfinite().all()) and bool(gradient[-100:].any()) for gradient in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
def test_memory_stays_within_the_budget(name: str, backend: str) -> None:
    """What eager PyTorch would hold (several B x N matrices) is never allocated."""
    rows, width = 12_000, 64
    problem = {p.name: p for p in problems(rows, rows, width)}[name]
    inputs, extra = problem.inputs("cuda", torch.bfloat16), problem.extra("cuda")
    problem.run(inputs, extra, backend)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    problem.run(inputs, extra, backend)
    # 256 MiB of workspace and what grows with the rows; one float32 B x N matrix alone is 550 MiB.
    assert torch.cuda.max_memory_allocated() - before < (400 << 20)
