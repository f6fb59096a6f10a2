"""The emulator that runs CUDA kernels on the host (csrc/emulation) is right, and finds what is wrong."""

import math
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or "g++"
ORDERS = ["forward", "reverse", "random:1", "random:2"]
THREADS = 96

Result = subprocess.CompletedProcess[str]
Run = Callable[..., Result]


def compile_programs(folder: Path, variants: dict[str, list[str]]) -> None:
    sources = {
        "kernels": Path(__file__).with_name("emulator_kernels.cu"),
        "emulator": CSRC / "emulation" / "emulator.cpp",
        "fiber": CSRC / "emulation" / "fiber.cpp",
    }
    common = ["-std=c++20", "-O0", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-DLCR2S_EMULATE_CUDA"]
    common += [f"-I{CSRC / 'emulation'}", f"-I{CSRC}", "-x", "c++"]
    # The fibers without assembly are another object beside the same two.
    jobs = [(variant, name) for variant in variants for name in sources if variant != "portable" or name == "fiber"]

    def build(job: tuple[str, str]) -> None:
        variant, name = job
        output = ["-o", str(folder / f"{variant}-{name}.o")]
        subprocess.run([COMPILER, *variants[variant], *common, "-c", str(sources[name]), *output], check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(build, jobs))
    for variant in variants:
        objects = []
        for name in sources:
            own = folder / f"{variant}-{name}.o"
            objects.append(str(own if own.exists() else folder / f"plain-{name}.o"))
        subprocess.run([COMPILER, *variants[variant], *objects, "-o", str(folder / variant)], check=True)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emulator")
    checked = ["-fsanitize=address", "-DLCR2S_DEBUG"]
    compile_programs(folder, {"plain": [], "portable": ["-DLCR2S_PORTABLE_FIBERS"], "sanitized": checked})
    return folder


@pytest.fixture
def run(programs: Path) -> Run:
    def run_case(case: str, order: str = "forward", program: str = "plain", **environment: str) -> Result:
        environment = {**os.environ, "LCR2S_EMULATE_ORDER": order, "ASAN_OPTIONS": "detect_leaks=0", **environment}
        return subprocess.run([programs / program, case], env=environment, capture_output=True, text=True)

    return run_case


def numbers(result: Result) -> list[float]:
    assert result.returncode == 0, result.stderr
    return [float(x) for x in result.stdout.split()]


def table(result: Result) -> list[list[float]]:
    values = numbers(result)
    return [values[i : i + THREADS] for i in range(0, len(values), THREADS)]


@pytest.mark.parametrize("program", ["plain", "portable", "sanitized"])
@pytest.mark.parametrize("order", ORDERS)
def test_barrier(run: Run, order: str, program: str) -> None:
    assert numbers(run("reverse", order, program)) == list(range(THREADS))[::-1]


def test_a_missing_barrier_shows_in_the_order_of_threads(run: Run) -> None:
    results = [numbers(run("race", order)) for order in ("forward", "reverse")]
    assert str(results[0]) != str(results[1])
    assert any(math.isnan(x) for x in results[0])


@pytest.mark.parametrize("program", ["plain", "portable", "sanitized"])
@pytest.mark.parametrize("order", ORDERS)
def test_shuffles_and_votes(run: Run, order: str, program: str) -> None:
    index, xor, narrow, ballot, half = table(run("shuffle", order, program))
    for thread in range(THREADS):
        lane, warp = thread % 32, 100 + thread // 32 * 32
        assert index[thread] == warp + 5
        assert xor[thread] == warp + (lane ^ 3)
        assert narrow[thread] == warp + lane // 8 * 8 + 1
        assert ballot[thread] == 11
        assert half[thread] == sum(x % 16 < x // 2 for x in range(32) if (x < 16) == (lane < 16))


@pytest.mark.parametrize("order", ORDERS)
def test_reductions(run: Run, order: str) -> None:
    warp_sum, warp_max, group_sum, group_max, block_sum, block_max = table(run("reduce", order))
    for thread in range(THREADS):
        warp, group = thread // 32 * 32, thread // 8 * 8
        assert warp_sum[thread] == sum(range(warp, warp + 32))
        assert math.isnan(warp_max[thread]) if warp == 32 else warp_max[thread] == warp + 31
        assert group_sum[thread] == sum(range(group, group + 8))
        assert group_max[thread] == (group + 7 if thread % 32 < 8 else -1)
        assert block_sum[thread] == sum(range(THREADS))
        assert block_max[thread] == 0


@pytest.mark.parametrize("order", ORDERS)
def test_shared_memory_starts_as_nan_in_every_block(run: Run, order: str) -> None:
    values = numbers(run("poison", order))
    assert len(values) == 96
    assert all(math.isnan(x) for x in values)


def test_order_of_blocks(run: Run) -> None:
    forward, reverse, random = (numbers(run("order", order)) for order in ("forward", "reverse", "random:3"))
    assert forward == list(range(6)) == reverse[::-1]
    assert sorted(random) == forward
    assert random not in (forward, reverse)
    assert numbers(run("order", "random:3")) == random
    refused = run("order", "backwards")
    assert refused.returncode != 0
    assert "must be forward, reverse or random:<seed>, got backwards" in refused.stderr


@pytest.mark.parametrize("program", ["plain", "portable", "sanitized"])
@pytest.mark.parametrize("order", ORDERS)
def test_blocks_of_a_cooperative_launch_meet(run: Run, order: str, program: str) -> None:
    result = run("cooperative", order, program)
    assert result.returncode == 0, result.stderr
    zeroed, *sums, most, refusal = result.stdout.splitlines()
    assert zeroed == "launched"
    for blocks, line in zip((3, 1, 8), sums, strict=True):
        # Three phases: 1, 1 + blocks, and so on; the last one written lies behind.
        then = 1 + blocks
        assert [float(x) for x in line.split()] == [then] * blocks + [1 + blocks * then] * blocks
    assert int(most) == 8
    assert refusal == "too many blocks in cooperative launch"


def test_limits_follow_the_capability(run: Run) -> None:
    for capability, shared in (("80", 163), ("90", 227), ("100", 227), ("120", 99)):
        lines = run(
            "limits", LCR2S_EMULATE_CAPABILITY=capability, LCR2S_EMULATE_MULTIPROCESSORS="7"
        ).stdout.splitlines()
        assert lines[0] == f"7 {capability} {shared * 1024}"
        fits = "launched" if shared >= 100 else "invalid argument"
        assert lines[1:4] == [fits, "launched", "invalid argument"]
        assert lines[4:] == ["invalid argument", "launched", "the grid must have at most 2^31 - 1 blocks", "0"]


@pytest.mark.parametrize("order", ORDERS)
def test_threads_that_have_ended_are_not_waited_for(run: Run, order: str) -> None:
    assert numbers(run("early_exit", order)) == [33.0] * 32 + [9.0] * 8


@pytest.mark.parametrize("order", ORDERS)
def test_warpgroups(run: Run, order: str) -> None:
    assert numbers(run("warpgroup", order)) == [sum(range(128))] * 128 + [sum(range(128, 256))] * 128


@pytest.mark.parametrize("order", ORDERS)
def test_waiting_for_a_condition(run: Run, order: str) -> None:
    assert run("spin", order).returncode == 0
    assert numbers(run("later", order)) == [5.0]


def test_work_that_nobody_waits_for(run: Run) -> None:
    result = run("never_waited")
    assert result.returncode != 0
    assert "ended before its asynchronous work was done" in result.stderr


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("divergent_barrier", "divergent __syncthreads"),
        ("divergent_warp", "divergent warp"),
        ("wrong_mask", "the mask leaves out the calling lane"),
    ],
)
def test_divergence_is_found(run: Run, case: str, message: str, order: str) -> None:
    result = run(case, order)
    assert result.returncode != 0
    assert message in result.stderr
    assert "emulator_kernels.cu:" in result.stderr


@pytest.mark.parametrize("order", ORDERS)
def test_deadlock_is_reported(run: Run, order: str) -> None:
    result = run("forgotten", order)
    assert result.returncode != 0
    assert "deadlock" in result.stderr
    assert "95 thread(s) wait for __syncthreads at" in result.stderr
    assert "1 thread(s) wait for spin_until at" in result.stderr
    assert "first: thread 3 of block 0" in result.stderr


def test_device_check(run: Run) -> None:
    assert run("device_check").returncode == 0
    result = run("device_check", program="sanitized")
    assert result.returncode != 0
    assert "device_check(threadIdx.x < 5) failed" in result.stderr
    assert "thread 5 of 96" in result.stderr


@pytest.mark.parametrize("case", ["shared_overrun", "global_overrun"])
def test_address_sanitizer_sees_overruns(run: Run, case: str) -> None:
    result = run(case, program="sanitized")
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
    assert f"{case}_kernel" in result.stderr
