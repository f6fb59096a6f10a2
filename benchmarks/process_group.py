"""What one rank of a process group holds and sends for a loss over the batch of all ranks.

    python benchmarks/process_group.py --ranks 4 --rows 2048 --width 1024

Each form runs once in fresh gloo processes on the CPU. Held is the growth of the peak resident memory during loss and
gradients, beyond the rank's own features; sent is the bytes that the rank hands to torch.distributed for other ranks.
"""

import argparse
import contextlib
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing

from lcr2s_ext import ops
from lcr2s_ext.ops import _distributed, relation, similarity

FORMS = ("one process's operator on all rows", "gathered texts", "ring")


def _status(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


def _loss(name: str, image: torch.Tensor, text: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    group = dist.group.WORLD
    if name == "sdm":
        return ops.sdm_loss(image, text, ids, group=group)
    return ops.relation_kl_loss(image, text, text, image, student_scale=20.0, teacher_scale=20.0, group=group)


def _rank(rank: int, arguments: argparse.Namespace, name: str, form: int, file: str, out: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=arguments.ranks)
    sent = 0
    gather, exchange, send = _distributed._gather_rows, dist.all_to_all_single, dist.P2POp

    def count_gather(result: Any, rows: Any, **options: Any) -> Any:
        nonlocal sent
        sent += (arguments.ranks - 1) * rows.nbytes
        return gather(result, rows, **options)

    def count_exchange(result: Any, rows: Any, **options: Any) -> Any:
        nonlocal sent
        sent += (arguments.ranks - 1) * rows.nbytes // arguments.ranks
        return exchange(result, rows, **options)

    def count_send(operation: Any, tensor: Any, **options: Any) -> Any:
        nonlocal sent
        sent += tensor.nbytes if operation is dist.isend else 0
        return send(operation, tensor, **options)

    def measure(rows: int) -> int:
        generator = torch.Generator().manual_seed(rank)
        image, text = (torch.randn(rows, arguments.width, generator=generator) for _ in range(2))
        ids = torch.arange(rows) // 4
        image.requires_grad_()
        text.requires_grad_()
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        torch.autograd.grad(_loss(name, image, text, ids), [image, text])
        return _status("VmHWM") - before

    # The smallest budget of a kernel's tiles; what would not fit it decides the form, which is set here.
    ops.set_workspace_limit(1)
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(_distributed, "_gather_rows", count_gather))
        patches.enter_context(mock.patch.object(dist, "all_to_all_single", count_exchange))
        patches.enter_context(mock.patch.object(dist, "P2POp", count_send))
        patches.enter_context(mock.patch.object(_distributed, "travels_in_ring", return_value=form == 2))
        if form == 0:
            patches.enter_context(mock.patch.object(similarity, "_passes", return_value=None))
            patches.enter_context(mock.patch.object(relation, "_kl_passes", return_value=None))
        measure(64)
        sent = 0
        held = measure(arguments.rows // arguments.ranks)
    if rank == 0:
        out.put((held, sent))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rows", type=int, default=2048, help="of the whole batch")
    parser.add_argument("--width", type=int, default=1024)
    arguments = parser.parse_args()
    context = torch.multiprocessing.get_context("spawn")
    print("| Loss | Form | Held, MiB | Sent, MiB |\n| --- | --- | --- | --- |")
    for name in ("sdm", "relation_kl"):
        for form, label in enumerate(FORMS):
            out = context.SimpleQueue()
            with tempfile.TemporaryDirectory() as folder:
                inputs = arguments, name, form, f"{folder}/meeting", out
                torch.multiprocessing.spawn(_rank, inputs, arguments.ranks)
            held, sent = out.get()
            print(f"| {name} | {label} | {held / 2**20:.0f} | {sent / 2**20:.1f} |", flush=True)


if __name__ == "__main__":
    main()
