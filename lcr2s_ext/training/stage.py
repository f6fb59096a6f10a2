"""What all stages of training share, as a Lightning module."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lcr2s_ext.data import PersonBatch
from lcr2s_ext.models import DualEncoder, Teacher, TeacherFeatures, TokenFeatures
from lcr2s_ext.retrieval import Retrieval
from lcr2s_ext.training import distributed
from lcr2s_ext.training.cached_gradients import encode_in_parts
from lcr2s_ext.training.config import OptimConfig, TrainConfig
from lcr2s_ext.training.ema import WeightAverage
from lcr2s_ext.training.failures import FAILED_BATCH_FILE, BadStep, FailedBatch, FiniteWatch, save_failed_batch
from lcr2s_ext.training.feature_bank import FeatureBank
from lcr2s_ext.training.mlm import MaskedLanguageModel
from lcr2s_ext.training.text_cache import TextCache, check_frozen, make_text_cache

__all__ = ["Stage", "TrainingError", "freeze", "parameter_groups", "step_seed"]

_MASK = (1 << 64) - 1

# Words in the names of parameters that not every stage has.
_SOME_STAGES = ("fusion", "distillation", "identity", "align", "auxiliary", "mlm")


class TrainingError(RuntimeError):
    """Training that cannot go on; the message says where and why."""


def step_seed(seed: int, epoch: int, step: int, purpose: int = 0) -> int:
    """63-bit seed of one step (splitmix64 over the four numbers), so that a resumed run draws what it would have
    drawn.
    """
    state = 0
    for number in (seed, epoch, step, purpose):
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def _generator(device: torch.device) -> torch.Generator:
    """The generator that dropout on this device draws from."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def freeze(module: nn.Module) -> nn.Module:
    """Eval mode and no gradients, in place."""
    return module.eval().requires_grad_(False)


def parameter_groups(stage: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """The trained parameters by weight decay and learning rate.

    Raises:
        TrainingError: a multiplier whose name part is in no parameter's name.
    """
    for part in optim.lr_multipliers:
        elsewhere = any(word in part for word in _SOME_STAGES)
        if not elsewhere and not any(part in name for name, _ in stage.named_parameters()):
            raise TrainingError(f"optim.lr_multipliers: no parameter's name has {part!r} in it")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in stage.named_parameters():
        found = max((part for part in optim.lr_multipliers if part in name), key=len, default=None)
        multiplier = 1.0 if found is None else optim.lr_multipliers[found]
        if not parameter.requires_grad or not multiplier:
            continue
        # Biases, norms and scales: decay would pull them towards a value that means nothing.
        decay = optim.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((multiplier, decay), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr": multiplier * optim.lr}
        for (multiplier, decay), parameters in groups.items()
    ]


class Stage(pl.LightningModule):
    """What all stages share: optimiser, per-step seeds, the check for NaN, evaluation and the best weights.

    Args:
        config: of the run.
        name: of the stage, for messages and logs.
        model: what is trained and what is kept.
        augment: a :class:`~lcr2s_ext.data.BatchAugment`: ``(uint8 pool, seed, rows=, total=)`` to normalised floats.
        epochs: of this stage.
        steps_per_epoch: batches of an epoch, for the schedule.
        evaluate: makes val metrics of the stage's model; ``None`` where there is no val split.
    """

    def __init__(
        self,
        config: TrainConfig,
        name: str,
        model: nn.Module,
        augment: Callable[[Tensor, int], Tensor],
        *,
        epochs: int,
        steps_per_epoch: int,
        evaluate: Callable[[], Retrieval] | None,
    ) -> None:
        super().__init__()
        self.config = config
        self.stage_name = name
        self.model = model
        self.epochs = epochs
        self.steps_per_epoch = steps_per_epoch
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.best_state: dict[str, Tensor] | None = None
        self.latest: dict[str, Tensor] = {}
        self.folder: Path | None = None
        self.bank: FeatureBank | None = None
        self.mlm: MaskedLanguageModel | None = None
        self._watch = FiniteWatch()
        self._averages: list[WeightAverage] = []
        self._saved_averages: list[dict[str, Any]] = []
        self._clock, self._rows, self._rate = time.perf_counter(), 0, 0.0
        self._text_caches: dict[int, TextCache] = {}
        self.captions = torch.empty(0, 0, dtype=torch.int64)
        self.kept_text_caches: dict[str, TextCache] = {}
        # Kept out of the module tree: nothing of these belongs to the parameters, the optimiser or the checkpoint.
        self.__dict__["_augment"] = augment
        self.__dict__["_evaluate"] = evaluate
        self.__dict__["_teacher"] = None

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher, if any: not a submodule, so neither trained nor saved."""
        return self.__dict__["_teacher"]

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks whose rows make the batch; ``None`` where one process holds it."""
        return distributed.group()

    def losses(self, images: Tensor, batch: PersonBatch) -> dict[str, Tensor]:
        """Weighted loss terms of a batch whose pool was augmented to ``images``; their mean over the ranks is that of
        the whole batch, and so are their gradients.
        """
        raise NotImplementedError

    def encode(
        self, encoders: DualEncoder, images: Tensor, batch: PersonBatch, rows: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features of the first ``rows`` rows of the batch's pools, ``None`` for all, ``images`` being augmented.

        With ``optim.micro_batch`` that many rows are encoded at a time, with a text cache the tokens' backbone is not
        run.
        """
        return self._encode_images(encoders, images[:rows]), self._encode_texts(encoders, batch, rows, images.device)

    def encode_trained(
        self, encoders: DualEncoder, images: Tensor, batch: PersonBatch, rows: int | None = None
    ) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
        """As :meth:`encode`, and the masked language term of the anchors where these encoders have one."""
        if self.mlm is None:
            return self.encode(encoders, images, batch, rows), {}
        image = encoders.image_token_features(self._in_format(images[:rows]))
        text = self._encode_texts(encoders, batch, rows, images.device)
        count = len(batch.labels)
        anchors = TokenFeatures(*(part[:count] for part in image))
        term = self.mlm(encoders, anchors, batch.tokens[:count], batch.samples, batch.epoch, self.group)
        return (image.pooled, text), {"mlm": term}

    def keep_mlm(self, encoders: DualEncoder, tokenizer: Any) -> None:
        """These encoders get the masked language term, where it has a weight."""
        if self.config.loss.mlm_weight:
            self.mlm = MaskedLanguageModel(self.config.loss, encoders, tokenizer, step_seed(self.config.seed, 0, 0, 20))

    def _in_format(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last) if self.config.channels_last else images

    def _encode_images(self, encoders: DualEncoder, images: Tensor) -> Tensor:
        inputs = (self._in_format(images),)
        return encode_in_parts(encoders.image_features, inputs, self.config.optim.micro_batch, encoders)

    def _encode_texts(
        self, encoders: DualEncoder, batch: PersonBatch, rows: int | None, device: torch.device
    ) -> Tensor:
        texts: tuple[Tensor, ...] = (batch.tokens[:rows],)
        cache = self._text_caches.get(id(encoders.text_encoder))
        if cache is not None and batch.captions is not None:
            texts += (cache.take(batch.captions[:rows], device),)
        return encode_in_parts(encoders.text_features, texts, self.config.optim.micro_batch, encoders)

    def keep_bank(self, teacher: nn.Module | None) -> None:
        """Support rows of this teacher come from past batches, where the configuration says so."""
        if isinstance(teacher, Teacher) and self.config.data.support == "bank":
            self.bank = FeatureBank(self.config.data.bank_size, teacher.output_width, self.config.seed)
            # Every rank puts the same rows in: DDP need not send them at every step.
            self._ddp_params_and_buffers_to_ignore = [f"bank.{name}" for name, _ in self.bank.named_buffers()]

    def fuse(self, teacher: Teacher, encoded: tuple[Tensor, Tensor], batch: PersonBatch) -> TeacherFeatures:
        """A teacher's features of the anchors, from what its encoders made of the pools."""
        if self.bank is None:
            return teacher.fuse(*encoded, batch.image_support, batch.text_support)
        ids = (batch.labels, batch.item_ids, batch.samples)
        (image_rows, image_support), (text_rows, text_support) = self.bank.draw(
            *ids, max_support=self.config.data.max_support, epoch=batch.epoch
        )
        image, text = encoded
        made = teacher.fuse(
            torch.cat([image, self.bank.image[image_rows].to(image.dtype)]),
            torch.cat([text, self.bank.text[text_rows].to(text.dtype)]),
            image_support,
            text_support,
        )
        self.bank.push(image, text, *ids, self.group)
        return made

    def step_seeds(self, epoch: int, step: int) -> dict[str, int]:
        """Seeds of a step. Dropout is each rank's own; augmentation is that of the row's place in the whole batch."""
        purposes = {"dropout": 100 + distributed.rank() if distributed.rank() else 1, "augment": 2}
        return {name: step_seed(self.config.seed, epoch, step, purpose) for name, purpose in purposes.items()}

    def compute(self, batch: PersonBatch, seeds: Mapping[str, int]) -> dict[str, Tensor]:
        """``loss``, and the weighted terms that it is the sum of, with gradient."""
        # Not torch.manual_seed: for every absent accelerator it formats a stack trace.
        _generator(self.device).manual_seed(seeds["dropout"])
        images = self.__dict__["_augment"](
            batch.images, seeds["augment"], rows=batch.image_rows, total=batch.whole_images
        )
        terms = self.losses(images, batch)
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}

    def training_step(self, batch: PersonBatch, batch_idx: int) -> Tensor:
        terms = self.compute(batch, self.step_seeds(batch.epoch, batch.step))
        self.latest = {name: value.detach() for name, value in terms.items()}
        self._watch.saw(batch.epoch, batch.step, self.latest)
        return terms["loss"]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # A loss scaler's gradients may overflow, and it looks after that itself.
        self._watch.before_update(optimizer, None if self._loss_scaled() else _parameters(optimizer))
        if self.global_step % self.reads_every == 0:
            self.check_finite()

    @property
    def reads_every(self) -> int:
        """Steps between looks at the loss: reading it costs a GPU a synchronisation, a CPU nothing."""
        return 1 if self.device.type == "cpu" else self.config.log_every

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if self._loss_scaled():
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            # Lightning refuses a fused optimiser under any autocast, though only a loss scaler would be in its way.
            torch.nn.utils.clip_grad_norm_(_parameters(optimizer), gradient_clip_val)

    def _loss_scaled(self) -> bool:
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def check_finite(self) -> None:
        """TrainingError on every rank where a loss or gradient since the last look was not finite on any; the batch is
        saved first.
        """
        found, bad = self._watch.first_bad()
        if not found:
            return
        state = distributed.full_state(self)
        where = f"in stage {self.stage_name}"
        if bad is None:
            raise distributed.said_once(TrainingError(f"the loss is not finite {where} on another process"))
        values = ", ".join(f"{key} {value:.4g}" for key, value in bad.terms.items())
        what = "gradient" if all(map(math.isfinite, bad.terms.values())) else "loss"
        saved = self._save_failed(bad, state)
        raise distributed.said_once(
            TrainingError(
                f"the {what} is not finite {where}, epoch {bad.epoch}, step {bad.step} ({values}); "
                f"lower optim.lr, set optim.grad_clip, or look at the batch's images; {saved}"
            )
        )

    def _save_failed(self, bad: BadStep, state: dict[str, Tensor]) -> str:
        if self.folder is None:
            return "the batch was not saved, for the run has no folder (out)"
        # Made again from its numbers, so that no batch has to be kept back for this.
        loader: Any = self.trainer.train_dataloader
        batch = loader.batch(bad.epoch, bad.step)
        seeds = self.step_seeds(bad.epoch, bad.step)
        failed = FailedBatch(self.stage_name, bad, self.config.seed, seeds, batch, state)
        name = FAILED_BATCH_FILE if self.group is None else f"rank{distributed.rank()}_{FAILED_BATCH_FILE}"
        try:
            return f"the batch is in {save_failed_batch(self.folder / name, failed)}"
        except OSError as error:
            return f"the batch could not be saved ({error})"

    def replay(self, failed: FailedBatch) -> dict[str, Tensor]:
        """Loss and terms, with gradient, of a saved batch, with the weights and random numbers it had."""
        self.load_state_dict(failed.state)
        self.train()
        return self.compute(failed.batch.to(self.device), failed.step_seeds)

    def encoders(self) -> dict[str, DualEncoder]:
        """Every dual encoder of the stage by its name; the frozen teacher's, which is no submodule, is ``teacher``."""
        found: dict[str, DualEncoder] = {
            name: module for name, module in self.named_modules() if isinstance(module, DualEncoder)
        }
        if isinstance(self.teacher, Teacher):
            found["teacher"] = self.teacher.encoders
        elif isinstance(self.teacher, DualEncoder):
            found["teacher"] = self.teacher
        return found

    def averaged_modules(self) -> list[nn.Module]:
        """What ``optim.ema_decay`` keeps an average of."""
        return [self.model]

    def keep_averages(self) -> None:
        """Put the averages in the place of the weights, for good."""
        for average in self._averages:
            average.module.load_state_dict(average.state)

    def on_train_start(self) -> None:
        self._clock = time.perf_counter()
        decay = self.config.optim.ema_decay
        self._averages = [WeightAverage(module, decay) for module in self.averaged_modules()] if decay else []
        for average, saved in zip(self._averages, self._saved_averages, strict=bool(self._saved_averages)):
            average.load_state_dict(saved)

    def on_train_epoch_start(self) -> None:
        self._clock, self._rows = time.perf_counter(), 0

    def optimizer_step(self, *arguments: Any, **named: Any) -> None:
        super().optimizer_step(*arguments, **named)
        for average in self._averages:
            average.update()

    def usage(self) -> dict[str, float]:
        """Samples a second of all processes since the last log (or the epoch's start), and peak memory of this one in
        GiB: what was allocated on its GPU, else its resident set.
        """
        if self._rows:
            self._rate = self._rows * distributed.ranks() / (time.perf_counter() - self._clock)
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"samples_per_second": self._rate, "memory_gib": peak / 2**30}

    def freeze_text_backbones(self) -> None:
        """With a text cache: ConfigError where a backbone is trained; otherwise it gets no gradient from here on."""
        if not self.config.data.text_cache:
            return
        for name, dual in self.encoders().items():
            check_frozen(dual.text_encoder, [f"{name}.text_encoder"], self.config.optim.lr_multipliers)
            dual.text_encoder.model.requires_grad_(False)

    def on_fit_start(self) -> None:
        if self.teacher is not None:
            self.teacher.to(self.device)
        data = self.config.data
        if not data.text_cache:
            return
        for dual in self.encoders().values():
            with distributed.first_goes_first(), self.trainer.precision_plugin.forward_context():
                self._text_caches[id(dual.text_encoder)] = make_text_cache(
                    dual.text_encoder,
                    self.captions,
                    where=data.text_cache,
                    dtype=getattr(torch, data.text_cache_dtype),
                    device=self.device,
                    batch_size=self.config.eval_batch,
                    kept=self.kept_text_caches,
                )

    def configure_model(self) -> None:
        mesh = getattr(self, "device_mesh", None)
        if mesh is not None and self.config.strategy == "fsdp":
            distributed.shard(self, mesh["data_parallel"], ("training_step", "evaluate"))

    def evaluate(self) -> Retrieval:
        """Val metrics, the same on every rank."""
        distributed.sync_buffers(self)
        with self.averaged():
            metrics: Retrieval = self.__dict__["_evaluate"]()
        return metrics

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The weights that are evaluated and kept, the same on every rank: the averages where there are any."""
        with ExitStack() as applied:
            for average in self._averages:
                applied.enter_context(average.applied())
            distributed.sync_buffers(self)
            yield

    def on_train_epoch_end(self) -> None:
        self.check_finite()
        epoch = self.current_epoch + 1
        if self.__dict__["_evaluate"] is None or (epoch % self.config.eval_every and epoch != self.epochs):
            return
        metrics = self.evaluate()
        self.history.append({"epoch": epoch, "step": self.global_step, "val": metrics})
        score = metrics["text_to_image"]["R@1"]
        if self.best is None or score > self.best["R@1"]:
            self.best = {"R@1": score, "epoch": epoch, "val": metrics}
            with self.averaged():
                self.best_state = distributed.full_state(self.model)
        for logger in self.loggers:
            logger.log_metrics(
                {
                    f"val/{direction}/{key}": value
                    for direction, values in metrics.items()
                    for key, value in values.items()
                },
                step=self.global_step,
            )

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._rows += len(batch)
        if self.global_step % self.config.log_every:
            return
        means = distributed.mean(torch.stack([value.float() for value in self.latest.values()]), self.group)
        self.latest = dict(zip(self.latest, means, strict=True))
        if self.loggers:
            metrics = {f"train/{key}": float(value) for key, value in self.latest.items()}
            metrics["train/lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]
            metrics |= self.usage()
            for logger in self.loggers:
                logger.log_metrics(metrics, step=self.global_step)
        self._clock, self._rows = time.perf_counter(), 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_finite()
        checkpoint["lcr2s"] = {
            "stage": self.stage_name,
            "history": self.history,
            "best": self.best,
            "best_state": self.best_state,
            "averages": [average.state_dict() for average in self._averages],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("lcr2s")
        if saved is None or saved["stage"] != self.stage_name:
            found = None if saved is None else saved["stage"]
            raise TrainingError(f"checkpoint: expected one of stage {self.stage_name!r}, got {found!r}")
        self.history, self.best, self.best_state = saved["history"], saved["best"], saved["best_state"]
        self._saved_averages = saved.get("averages", [])

    def configure_optimizers(self) -> Any:
        optim = self.config.optim
        cls = torch.optim.AdamW if optim.optimizer == "adamw" else torch.optim.Adam
        # A fused optimiser unscales gradients itself, too late for them to be clipped.
        fused = not (self.config.precision == "16-mixed" and optim.grad_clip)
        optimizer = cls(parameter_groups(self, optim), lr=optim.lr, fused=fused)
        # In optimiser steps; what is left of an epoch after the last whole accumulation is a step of its own.
        steps_per_epoch = math.ceil(self.steps_per_epoch / optim.accumulate)
        total = max(1, self.epochs * steps_per_epoch)
        warm = min(round(optim.warmup_epochs * steps_per_epoch), max(0, total - 1))

        def factor(step: int) -> float:
            if step < warm:
                return optim.warmup_factor + (1.0 - optim.warmup_factor) * (step + 1) / (warm + 1)
            if optim.schedule == "constant":
                return 1.0
            if optim.schedule == "step":
                return 0.1 ** sum(step >= epoch * steps_per_epoch for epoch in optim.milestones)
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - warm) / (total - warm))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
