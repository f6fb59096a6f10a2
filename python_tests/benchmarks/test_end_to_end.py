"""The training benchmark: the naive way computes what ours does, and every section of a step is measured."""

import argparse
import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lcr2s_ext.ops import SupportIndex

pytest.importorskip("lightning")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def end_to_end(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("end_to_end")


def test_naive_is_ours_and_a_step_has_sections(
    end_to_end: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = argparse.Namespace(max_support=2, identities=3, instances=2, preset="tiny", epochs=1, device="cpu", steps=1)
    end_to_end.generate_corpus(tmp_path, identities=(6, 0, 0), seed=0)
    config = end_to_end.configuration(str(tmp_path), args)
    data = end_to_end.train_split(config)
    found = end_to_end.variants(config, data, torch.device("cpu"))
    assert end_to_end.check_naive(found) < 1e-5
    for name, variant in found.items():
        assert torch.isfinite(variant.step()[0]), name

    rows = end_to_end.profile_rows("student", found["student, support from the batch"], args, 1.0)
    assert [row["part"] for row in rows] == [*end_to_end.SECTIONS, "Lightning", "lcr2s:: operators"]
    assert all(float(row["ms"]) > 0 for row in rows if row["part"] != "Lightning")
    (seconds,) = end_to_end.epoch_seconds(
        end_to_end.fit_student, 1, config=end_to_end.with_support(config, "none"), data=data
    )
    assert seconds > 0

    def without_copies(support: SupportIndex, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows, mask = padded_slots(support, slots)
        return rows, torch.zeros_like(mask)

    padded_slots = end_to_end._slots
    monkeypatch.setattr(end_to_end, "_slots", without_copies)
    with pytest.raises(SystemExit, match="the naive way differs"):
        end_to_end.check_naive(found)
