"""Peers in the benchmarks: what each adapter computes is what float64 says, and one that cannot run is a row."""

import csv
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CPU = torch.device("cpu")
FAMILIES = ("support_attention", "similarity", "relation", "retrieval")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports of the benchmarks' modules, all of one set."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("side_by_side", "problem", "peers", *FAMILIES)
    for name in names:
        sys.modules.pop(name, None)
    # What the adapters hand to a package is the same compiled or not, and compiling takes a minute.
    monkeypatch.setattr(torch, "compile", lambda call=None, **_: call if call is not None else lambda f: f)
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


def problems(modules: Callable[[str], ModuleType]) -> dict[str, Any]:
    """A tiny problem of every operator that has peers, with nothing but the peers."""
    generator = torch.Generator().manual_seed(0)
    ids = (torch.arange(12) % 6, torch.arange(14) % 7)  # id 6 is in the gallery alone
    features = [torch.randn(len(own), 16, generator=generator) for own in ids]
    retrieval = modules("retrieval")
    shared = ("float32", CPU, {"peers"})
    return {
        "ATTENTION": modules("support_attention").setup(9, 32, 2, 4, *shared),
        "INFO_NCE": modules("similarity").setup("info_nce", 12, 16, *shared),
        "SDM": modules("similarity").setup("sdm", 12, 16, *shared),
        "RELATION_KL": modules("relation").setup("kl", 12, 16, 24, *shared),
        "METRICS": retrieval.setup_metrics(*features, ids, "float32", {"peers"}),
        "TOP_K": retrieval.setup_topk(*features, 3, "float32", {"peers"}),
    }


def outcomes(modules: Callable[[str], ModuleType], problem: Any, name: str) -> dict[str, str]:
    """part -> "" where the form called `name` agrees with float64 there, otherwise the words of its row."""
    form = problem.forms[name]
    found = {}
    for part, (candidate, exact, _) in problem.parts.items():
        judged = (
            form.call
            if isinstance(form.call, str)
            else modules("problem").judged(candidate(form.call), exact, problem.tolerance)
        )
        found[part] = judged if isinstance(judged, str) else ""
    return found


def test_every_peer_that_runs_here_computes_what_float64_says(modules: Callable[[str], ModuleType]) -> None:
    peers = modules("peers")
    always = {"nn.MultiheadAttention", "open_clip ClipLoss, re-expressed", "open_clip DistillClipLoss, re-expressed"}
    if hasattr(F, "linear_cross_entropy"):
        always |= {"F.linear_cross_entropy", "F.linear_cross_entropy, chunked"}
    ran = set()
    for table, problem in problems(modules).items():
        described = getattr(peers, table)
        assert {*problem.forms} == {*described}
        for name, peer in described.items():
            found = outcomes(modules, problem, name)
            installed = importlib.util.find_spec(peer.module.split(".")[0]) is not None
            if not installed:
                assert all("is not installed" in words for words in found.values()), name
            elif peer.cuda:
                assert set(found.values()) == {"needs CUDA"}, name
            elif name == "FlexAttention":
                assert found["forward"] == ""
                assert all("does not support backward on CPU" in found[part] for part in {*found} - {"forward"})
            elif table == "SDM":
                assert all("something else" in words or "does not load" in words for words in found.values())
            elif not all("does not load" in words for words in found.values()):
                assert not any(found.values()), (name, found)
                ran.add(name)
    assert always <= ran


def _linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor, **_: object) -> Tensor:
    return F.cross_entropy(x @ weight.T, target)


def _variable_length(
    q: Tensor, k: Tensor, v: Tensor, queries: Tensor, rows: Tensor, longest_query: int, longest: int
) -> Tensor:
    """Attention of packed sequences as FlashAttention documents it: 0 for a query whose sequence is empty."""
    assert queries.dtype == rows.dtype == torch.int32
    assert longest_query == 1
    assert longest == int(rows.diff().max())
    out = []
    for i in range(queries.numel() - 1):
        own = slice(int(rows[i]), int(rows[i + 1]))
        weights = torch.einsum("hd,shd->hs", q[i], k[own]) / q.shape[-1] ** 0.5
        out.append(torch.einsum("hs,shd->hd", weights.softmax(1), v[own]))
    return torch.stack(out)


def _rows_of_inf_cl(q: Tensor, k: Tensor, labels: Any = None, scale: float = 1.0, head_dim: int = 256) -> Tensor:
    assert q.shape[1] % head_dim == 0
    return F.cross_entropy(scale * q @ k.T, torch.arange(len(q)), reduction="none")


def _kl(x: Tensor, target: Tensor, *, reduction: str, log_target: bool) -> Tensor:
    return F.kl_div(x, target, reduction=reduction, log_target=log_target)


def _linear_kl(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.kl_div((x @ weight.T).log_softmax(1), target, reduction="batchmean")


def _distill(v: Tensor, t: Tensor, scale: float, e: Tensor, f: Tensor, soft_scale: float) -> tuple[Tensor, Tensor]:
    pairs = ((scale * v @ t.T, soft_scale * e @ f.T), (scale * t @ v.T, soft_scale * f @ e.T))
    return v.sum(), sum(F.cross_entropy(x, z.softmax(1)) for x, z in pairs) / 2


LIGER = SimpleNamespace(
    liger_fused_linear_cross_entropy=_linear_cross_entropy, liger_kl_div=_kl, liger_fused_linear_kl_div=_linear_kl
)
STAND_INS = {
    ("ATTENTION", "FlashAttention varlen"): SimpleNamespace(flash_attn_varlen_func=_variable_length),
    ("ATTENTION", "torch varlen_attn"): SimpleNamespace(varlen_attn=_variable_length),
    ("INFO_NCE", "Liger linear cross entropy"): LIGER,
    ("INFO_NCE", "Inf-CLIP"): SimpleNamespace(cal_flash_loss=_rows_of_inf_cl),
    ("INFO_NCE", "cut-cross-entropy"): SimpleNamespace(linear_cross_entropy=_linear_cross_entropy),
    ("INFO_NCE", "cut-cross-entropy, torch_compile"): SimpleNamespace(linear_cross_entropy=_linear_cross_entropy),
    ("INFO_NCE", "QuACK linear cross entropy"): SimpleNamespace(chunked_linear_cross_entropy=_linear_cross_entropy),
    ("INFO_NCE", "open_clip ClipLoss"): SimpleNamespace(
        ClipLoss=lambda: (
            lambda v, t, scale: sum(
                _linear_cross_entropy(scale * x, y, torch.arange(len(x))) / 2 for x, y in ((v, t), (t, v))
            )
        )
    ),
    ("RELATION_KL", "Liger KL"): LIGER,
    ("RELATION_KL", "Liger linear KL"): LIGER,
    ("RELATION_KL", "open_clip DistillClipLoss"): SimpleNamespace(DistillClipLoss=lambda: _distill),
}


def test_adapters_are_right_about_what_a_package_documents(
    modules: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packages that need CUDA, and those not installed, are stood in for by PyTorch code with their signatures."""
    peers = modules("peers")

    def stood_in(peer: Any, package: Any) -> Any:
        build = peer.build
        return peer._replace(
            module="torch", cuda=False, dtypes=["float32"], build=lambda _, *rest: build(package, *rest)
        )

    for (table, name), package in STAND_INS.items():
        monkeypatch.setitem(getattr(peers, table), name, stood_in(getattr(peers, table)[name], package))
    tables = [getattr(peers, table) for table in ("ATTENTION", "INFO_NCE", "RELATION_KL")]
    assert not [name for table in tables for name, peer in table.items() if peer.cuda], "a package without a stand-in"
    made = problems(modules)
    for table, name in STAND_INS:
        assert set(outcomes(modules, made[table], name).values()) == {""}, name


def test_a_peer_that_is_absent_or_wrong_is_a_row_and_ours_wrong_ends_the_run(
    modules: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    peers, problem, side_by_side = modules("peers"), modules("problem"), modules("side_by_side")

    def raises(*_: object) -> None:
        raise RuntimeError("no kernel\nfor this")

    table = {
        "absent": peers.Peer("no-such-package", "no_such_package", raises),
        "broken": peers.Peer("torch", "torch", raises),
        "wrong": peers.Peer("torch", "torch", lambda *_: lambda v, t: 1.01 * peers.clip_formula(50.0)(v, t)),
        "fails": peers.Peer("torch", "torch", lambda *_: raises),
        "right": peers.Peer("torch", "torch", lambda *_: peers.clip_formula(50.0), "its adaptation"),
    }
    monkeypatch.setattr(modules("similarity"), "INFO_NCE", table)
    made = modules("similarity").setup("info_nce", 12, 16, "float32", CPU, {"peers", "reference", "cpu"})
    file = tmp_path / "results.csv"
    settings = side_by_side.Settings(CPU, 1, False, file, None)
    problem.run(made, settings)
    with file.open(newline="") as text:
        rows = list(csv.DictReader(text))
    notes = {row["candidate"]: row["note"] for row in rows if row["part"] == "forward + backward"}
    assert notes["absent"] == "no-such-package is not installed"
    assert notes["broken"] == "torch does not load: RuntimeError: no kernel"
    assert notes["wrong"] == "result 0 is off by 1.0e-02 relative to float64, not timed"
    assert notes["fails"] == "RuntimeError: no kernel"
    assert notes["right"] == "its adaptation"
    timed = {row["candidate"] for row in rows if row["ms"]}
    assert timed == {"right", "reference", "lcr2s_ext cpu"}
    assert {row["part"] for row in rows} == {"forward", "forward + backward"}
    ours = made.forms["lcr2s_ext cpu"]
    made.forms["lcr2s_ext cpu"] = ours._replace(call=lambda v, t: 1.01 * ours.call(v, t))
    with pytest.raises(SystemExit, match=r"lcr2s_ext cpu: result 0 is off by 1\.0e-02"):
        problem.run(made, settings)
