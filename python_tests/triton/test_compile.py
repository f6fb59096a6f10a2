"""Every kernel compiles for GPUs that are not here, and fits: registers, shared memory, no spills, tensor cores."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lcr2s_ext import triton

HERE = Path(__file__).parent
PACKAGE = Path(triton.__file__).parent
PROCESSES = 2
ARCHITECTURES = (80, 90, 100)
POINTERS, DESCRIPTORS, SPECIALIZED = range(3)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes that one block may take (CUDA C++ Programming Guide, table of technical specifications)."""

pytestmark = pytest.mark.skipif(triton.UNAVAILABLE is not None, reason=str(triton.UNAVAILABLE))


def run(script: str, *arguments: str, cache: Path) -> "subprocess.Popen[str]":
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    return subprocess.Popen(
        [sys.executable, str(HERE / script), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    processes = [
        run("compile_kernels.py", str(i), str(PROCESSES), cache=tmp_path_factory.mktemp(f"triton{i}"))
        for i in range(PROCESSES)
    ]
    results = []
    for process in processes:
        out, errors = process.communicate()
        assert process.returncode == 0, errors
        results += [json.loads(line) for line in out.splitlines()]
    return results


def launched_kernels() -> set[str]:
    """What the package's sources launch: X of every wrap_triton(X)."""
    return {
        node.args[0].id
        for path in PACKAGE.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "wrap_triton"
        if isinstance(node.args[0], ast.Name)
    }


def names(results: list[dict[str, Any]]) -> list[str]:
    return [f"{result['kernel']} of {result['op']} on sm_{result['architecture']}: {result}" for result in results]


def test_every_kernel_was_compiled_for_every_architecture(compiled: list[dict[str, Any]]) -> None:
    assert {(result["kernel"], result["architecture"]) for result in compiled} >= {
        (kernel, architecture) for kernel in launched_kernels() for architecture in ARCHITECTURES
    }
    assert {result["op"].removesuffix("_backward") for result in compiled} == set(triton.MODULES)


def test_nothing_spills(compiled: list[dict[str, Any]]) -> None:
    assert not names([result for result in compiled if result["stack"] or result["local"]])


def test_registers_and_shared_memory_fit(compiled: list[dict[str, Any]]) -> None:
    assert not names([result for result in compiled if result["reg"] * result["threads"] > 65536])
    assert not names([result for result in compiled if result["shared"] > SHARED_LIMIT[result["architecture"]]])


def test_tensor_cores_of_hopper_are_used(compiled: list[dict[str, Any]]) -> None:
    wanted = [result for result in compiled if result["wants_wgmma"] and result["architecture"] == 90]
    assert not names([result for result in wanted if not result["wgmma"]])


def test_descriptors_become_bulk_copies(compiled: list[dict[str, Any]]) -> None:
    assert not names([result for result in compiled if result["tma"] != (result["loads"] != POINTERS)])
    # Triton 3.6 can split a tile without its descriptor, and copies too much then.
    copying = [result for result in compiled if result["loads"] != POINTERS]
    assert not names([result for result in copying if len(result["copies"]) < 2])
    assert not names([result for result in copying if any(source != target for source, target in result["copies"])])
    assert {result["kernel"] for result in compiled if result["loads"] == DESCRIPTORS} == {
        "similarity_statistics_kernel",
        "similarity_gradient_kernel",
        "relation_kl_kernel",
        "topk_similarity_maxima_kernel",
        "topk_similarity_rescore_kernel",
        "retrieval_metrics_count_kernel",
    }


def test_the_first_pass_of_top_k_is_specialised(compiled: list[dict[str, Any]]) -> None:
    """On sm_90, two groups of four warps multiply and one loads."""
    assert not names([result for result in compiled if result["specialized"] != (result["loads"] == SPECIALIZED)])
    specialized = [result for result in compiled if result["specialized"]]
    assert {(result["kernel"], result["architecture"]) for result in specialized} == {
        ("topk_similarity_maxima_kernel", 90),
        ("topk_similarity_maxima_kernel", 100),
    }
    assert [result["threads"] for result in specialized if result["architecture"] == 90] == [384]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pair_of_rows_is_scored_by_the_same_instructions_everywhere(
    architecture: int, compiled: list[dict[str, Any]]
) -> None:
    # Ranks are counted against scores from another kernel: equal bits need equal arithmetic.
    scoring = [name for name in launched_kernels() if name.startswith(("topk_similarity", "retrieval_metrics"))]
    scoring.remove("retrieval_metrics_finish_kernel")
    used = {
        kernel: {
            tuple(result["products"]) or result["threads"]
            for result in compiled
            if (result["kernel"], result["architecture"]) == (kernel, architecture)
        }
        for kernel in scoring
    }
    assert len(used) == 4
    first = used["topk_similarity_maxima_kernel"]
    assert len(first) == 2  # float32 and bfloat16
    assert all(products == first for products in used.values()), used


def test_a_spill_would_be_seen(tmp_path: Path) -> None:
    process = run("spill.py", cache=tmp_path)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    roomy, cramped = (json.loads(line) for line in out.splitlines())
    assert roomy["stack"] == 0
    assert cramped["stack"] > 0
