"""The processes of a run: how they start, what every one of them must agree on, and how Lightning is told of them.

A run of W processes has one process group, made once by :func:`start` and used by all its stages. Losses are those of
the whole batch on every rank (``group=`` of :mod:`lcr2s_ext.ops`), and both DistributedDataParallel and FSDP average
gradients over the ranks: :func:`whole` makes up for that where a loss is not a mean over a rank's own rows.
"""

from __future__ import annotations

import atexit
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lcr2s_ext.training.config import ConfigError, TrainConfig

__all__ = ["OtherRankError", "first", "group", "rank", "ranks", "speaks", "start", "together"]

_Error = TypeVar("_Error", bound=BaseException)


class OtherRankError(RuntimeError):
    """Another rank failed, and said why."""


def ranks() -> int:
    """Processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among them."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def first() -> bool:
    """Whether this process is the one that writes files, prints and shows progress."""
    return rank() == 0


def group() -> dist.ProcessGroup | None:
    """The group of all processes of the run; None where there is one."""
    return dist.group.WORLD if ranks() > 1 else None


def speaks(error: BaseException | None) -> bool:
    """Whether this process tells the user of an error, or (None) of what all find alike; else another one does."""
    if error is None or not dist.is_initialized():
        # Before the processes of a run know each other they all find the same.
        return _launched_rank() == 0
    return not (isinstance(error, OtherRankError) or getattr(error, "lcr2s_said_elsewhere", False))


def said_once(error: _Error) -> _Error:
    """An error that every rank raises at the same point: the first rank is the one to tell of it."""
    return error if first() else _silent(error)


def _silent(error: _Error) -> _Error:
    error.lcr2s_said_elsewhere = True  # type: ignore[attr-defined]
    return error


def _gather_objects(value: Any) -> list[Any]:
    values = [None] * ranks()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def together() -> Iterator[None]:
    """Every rank leaves the block with an error if any does, each with its own where it has one."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        if ranks() == 1:
            raise
        failure = error
    if ranks() == 1:
        return
    texts = _gather_objects(None if failure is None else f"{type(failure).__name__}: {failure}")
    failed = [number for number, text in enumerate(texts) if text is not None]
    if failure is not None:
        raise failure if texts.index(texts[rank()]) == rank() else _silent(failure)
    if failed:
        raise OtherRankError(f"rank {failed[0]} failed: {texts[failed[0]]}")


def wait() -> None:
    """Until every rank has come here."""
    if ranks() > 1:
        dist.barrier()


@contextmanager
def first_goes_first() -> Iterator[None]:
    """The first rank runs the block, then the others: they find the files that it has written."""
    if ranks() > 1 and not first():
        dist.barrier()
    try:
        yield
    finally:
        if ranks() > 1 and first():
            dist.barrier()


def check_same(what: str, value: Any) -> None:
    """ValueError on every rank where they do not all hold the same."""
    if ranks() > 1 and len(set(_gather_objects(value))) > 1:
        raise said_once(ValueError(f"{what}: the processes of this run do not find the same"))


def from_first(value: Any) -> Any:
    """What the first rank gives, on every rank."""
    if ranks() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def whole(loss: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """A loss over the batch of the whole group, its gradient times the number of ranks: they are averaged later.

    Losses that are means over a rank's own rows need nothing of the kind, for all ranks hold as many.
    """
    return loss if group is None else _Times.apply(loss, dist.get_world_size(group))


def mean(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Mean over the ranks, the same on each."""
    if group is None:
        return values
    total = values.detach().clone()
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)


def sync_buffers(module: nn.Module) -> None:
    """Give every rank the first one's buffers: statistics of a batch normalisation are each rank's own."""
    if ranks() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def full(value: Tensor) -> Tensor:
    """A tensor whole, whether it is sharded or not; every rank calls this."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """State dict with every tensor whole and on the CPU; every rank calls this."""
    return {key: full(value).detach().cpu().clone() for key, value in module.state_dict().items()}


def load_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what :func:`full_state` gave, whether the module is sharded or not."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.tensor import DTensor

    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        set_model_state_dict(module, dict(state), options=StateDictOptions(full_state_dict=True))
    else:
        module.load_state_dict(state)


def _launched_rank() -> int:
    """Rank that a launcher gave this process, before any process group exists."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ.get("RANK", 0))
    if "SLURM_STEP_ID" in os.environ:
        return int(os.environ.get("SLURM_PROCID", 0))
    return int(os.environ.get("LOCAL_RANK", 0)) if "WORLD_SIZE" in os.environ else 0


def _on_gpu(config: TrainConfig) -> bool:
    return config.device in ("gpu", "cuda") or (config.device == "auto" and torch.cuda.is_available())


def _environment() -> tuple[Any, tuple[int, int] | None, str]:
    """Lightning's view of the launcher, what it started (processes a node, nodes), and its name."""
    from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return TorchElasticEnvironment(), (local, int(os.environ["WORLD_SIZE"]) // local), "torchrun"
    # A step, which srun alone makes: in a batch script that calls python directly there is one process.
    if "SLURM_STEP_ID" in os.environ and "SLURM_NTASKS" in os.environ:
        nodes = int(os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES") or 1)
        return SLURMEnvironment(auto_requeue=False), (int(os.environ["SLURM_NTASKS"]) // nodes, nodes), "srun"
    return LightningEnvironment(), None, ""


def _size(config: TrainConfig, started: tuple[int, int] | None, launcher: str) -> tuple[int, int]:
    """Processes of a node, and nodes."""
    sizes = []
    for key, given, found in zip(("devices", "nodes"), (config.devices, config.nodes), started or (1, 1), strict=True):
        if started is not None and given not in ("auto", found):
            raise ConfigError(f"{key}: expected auto or {found}, what {launcher} started, got {given}")
        sizes.append(found if given == "auto" else int(given))
    if _on_gpu(config) and sizes[0] > torch.cuda.device_count():
        raise ConfigError(
            f"devices: expected at most the {torch.cuda.device_count()} GPUs of this node, got {sizes[0]}"
        )
    if started is None and sizes[1] > 1 and "MASTER_ADDR" not in os.environ:
        raise ConfigError("nodes: start several nodes with torchrun or srun, or set MASTER_ADDR and NODE_RANK")
    return sizes[0], sizes[1]


def start(config: TrainConfig) -> None:
    """Make the process group of a run, once; where no launcher did, the other processes are started here.

    Without torchrun or srun, processes beyond the first run the same command line again, as Lightning does it.

    Raises:
        ConfigError: ``devices`` or ``nodes`` other than what the launcher started, or a group of another size.
    """
    if config.strategy == "fsdp" and config.sync_batchnorm:
        raise ConfigError("sync_batchnorm: expected false with strategy=fsdp, got true")
    environment, started, launcher = _environment()
    devices, nodes = _size(config, started, launcher)
    if dist.is_initialized():
        if dist.get_world_size() != devices * nodes:
            raise ConfigError(
                f"devices: this process belongs to a group of {dist.get_world_size()} processes, "
                f"expected {devices * nodes}"
            )
        return
    if devices * nodes == 1 and config.strategy != "fsdp":
        return
    if config.sync_batchnorm and not _on_gpu(config):
        raise ConfigError("sync_batchnorm: torch has it for GPUs only, expected false on the CPU")
    import logging

    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    fabric = Fabric(
        accelerator=config.device,
        devices=devices,
        num_nodes=nodes,
        strategy=DDPStrategy(process_group_backend=_backend(config)),
        plugins=[environment],
    )
    fabric.launch()
    atexit.register(_leave, getattr(fabric.strategy.launcher, "procs", []))


def _backend(config: TrainConfig) -> str:
    # Objects and features on the host go by gloo, gradients on a GPU by NCCL.
    return "cpu:gloo,cuda:nccl" if _on_gpu(config) else "gloo"


def _leave(children: list[subprocess.Popen[bytes]]) -> None:
    for child in children:
        try:
            child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            # This process has ended and the child waits for it in a collective.
            child.terminate()
    if dist.is_initialized():
        dist.destroy_process_group()


def trainer_options(config: TrainConfig) -> dict[str, Any]:
    """Lightning's ``Trainer`` arguments that say where it runs."""
    options: dict[str, Any] = {"accelerator": config.device, "devices": 1}
    if not dist.is_initialized():
        return options
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    environment, started, launcher = _environment()
    devices, nodes = _size(config, started, launcher)
    strategy: Any
    if config.strategy == "fsdp":
        strategy = ModelParallelStrategy(
            data_parallel_size=ranks(),
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=_backend(config),
        )
    else:
        strategy = DDPStrategy(process_group_backend=_backend(config), gradient_as_bucket_view=True)
    return options | {
        "devices": devices,
        "num_nodes": nodes,
        "strategy": strategy,
        "plugins": [environment],
        "sync_batchnorm": config.sync_batchnorm,
    }


def shard(stage: nn.Module, mesh: Any, methods: tuple[str, ...]) -> None:
    """FSDP: each block of the encoders is gathered when it runs, the rest while one of ``methods`` does."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for parameter in stage.parameters():
        # FSDP takes no other layout, such as channels-last weights.
        parameter.data = parameter.data.contiguous()
    for module in list(stage.modules()):
        if isinstance(module, nn.ModuleList):
            for block in module:
                if any(parameter.numel() for parameter in block.parameters()):
                    fully_shard(block, mesh=mesh)
    fully_shard(stage, mesh=mesh, reshard_after_forward=True)
    for method in methods:
        register_fsdp_forward_method(stage, method)
