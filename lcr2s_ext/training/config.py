"""The configuration of a training run: dataclasses, YAML files and ``key=value`` overrides."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lcr2s_ext._files import write_text

__all__ = [
    "ConfigError",
    "DataConfig",
    "DistillConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "TeacherConfig",
    "TrainConfig",
    "dump_config",
    "load_config",
    "to_dict",
]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key."""


@dataclass
class DataConfig:
    """What is trained on and how batches are made."""

    dataset: str = "cuhk-pedes"
    root: str = ""
    """Folder that holds the dataset's own folder (such as ``CUHK-PEDES/``); of a ``custom`` dataset its folder."""
    sampler: str = "random"
    """``random`` over captions, or ``identity``: P identities x K instances."""
    batch_size: int | None = None
    """Captions in a random batch; unset takes 64, fewer on a corpus that had under 8 batches an epoch."""
    identities: int = 16
    """P of the identity sampler."""
    instances: int = 4
    """K of the identity sampler."""
    support: str = "drawn"
    """Where a teacher's support rows come from: ``drawn`` (encoded besides the batch), ``batch`` (other rows of
    the batch) or ``bank`` (features of past batches), both at no extra encoder cost, or ``none``."""
    max_support: int = 4
    """Largest support set, the row itself not counted."""
    bank_size: int = 8192
    """Rows of the bank; a row finds (captions of its identity) x bank_size / (all captions) others in it."""
    vocab_size: int = 4000
    max_length: int = 64
    pad: int = 3
    """Pixels of padding before the random crop; 0 for none."""
    flip: float = 0.5
    erasing: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    workers: int = 0
    """Processes that make batches; 0 makes them in the training process, best where images fit into memory."""
    cache: bool = True
    """Keep decoded images (uint8, at the model's size) in memory."""
    cache_dir: str = ""
    """Folder for files of decoded images, written once and mapped into memory by every later run; empty for none."""
    text_cache: str = ""
    """Where a frozen text backbone's outputs are kept: ``memory``, or a folder for a mapped file; empty for none."""
    text_cache_dtype: str = "float32"
    """``float32``, ``float16`` or ``bfloat16``: what they are kept in."""


@dataclass
class ModelConfig:
    """The encoders (teacher's and student's alike) and the teacher's fusion."""

    preset: str = "tiny"
    width: int | None = None
    image_size: list[int] | None = None
    image_encoder: dict[str, Any] = field(default_factory=dict)
    text_encoder: dict[str, Any] = field(default_factory=dict)
    image_weights: str = ""
    """Local Hugging Face folder that the image encoder takes architecture and weights from; empty: fresh weights."""
    text_weights: str = ""
    """The same for the text encoder; captions are then read by that folder's ``tokenizer.json``."""
    heads: int = 8
    feed_forward: int | None = None
    fusion_dropout: float = 0.0
    fusion_input_norm: bool = True


@dataclass
class LossConfig:
    """Alignment and identity losses, the same for teacher and student."""

    align: str | list[str] | dict[str, float] = "sdm"
    """``sdm``, ``info_nce``, ``cmpm`` or ``tal``; a list of them, or a mapping to weights, is their weighted sum."""
    logit_scale: float = 1.0 / 0.12
    """Of SDM and InfoNCE; TAL's temperature is its inverse, CMPM has none."""
    logit_scales: dict[str, float] = field(default_factory=dict)
    """Loss -> its own logit scale, where losses that are combined want different ones."""
    learn_logit_scale: bool = False
    """One learnt scale for each of SDM and InfoNCE."""
    many_to_many: bool = True
    """False takes each row's own caption as its only positive (in ``info_nce`` alone)."""
    align_weight: float = 1.0
    identity_weight: float = 1.0
    label_smoothing: float = 0.0
    mlm_weight: float = 0.0
    """Of masked language modelling with the image at hand (IRRA), on single features; 0 for none."""
    mlm_fraction: float = 0.15
    """Of a caption's words that are masked."""
    mlm_layers: int = 4
    mlm_heads: int = 8
    mlm_width: int | None = None
    """Of its head; unset takes the features' width."""

    @property
    def align_terms(self) -> dict[str, float]:
        """The alignment losses with a positive weight."""
        if isinstance(self.align, str):
            return {self.align: 1.0}
        if isinstance(self.align, list):
            return dict.fromkeys(self.align, 1.0)
        return {name: weight for name, weight in self.align.items() if weight}


@dataclass
class TeacherConfig:
    """How the teacher is trained."""

    start: str = "warm"
    """``scratch``; ``auxiliary`` (the same losses on the single features as well); ``warm`` (encoders start from a
    plain student trained for ``warm_epochs``); ``frozen`` (as ``warm``, and only the fusion is trained)."""
    epochs: int | None = None
    """Unset: as many as the student's."""
    warm_epochs: int | None = None
    """Unset: as many as the student's."""
    auxiliary_weight: float = 1.0


@dataclass
class DistillConfig:
    """The student's losses against the teacher."""

    feature_weight: float = 5.0
    feature_reduction: str = "row"
    feature_normalize: bool = True
    relation: str = "frobenius"
    """``frobenius``, ``kl`` or ``none``."""
    relation_weight: float = 100.0
    relation_reduction: str = "mean"
    student_scale: float = 1.0 / 0.12
    teacher_scale: float = 1.0 / 0.12
    intra_weight: float = 0.0
    """Weight of the same relation loss within each modality (image-image and text-text)."""
    ramp_epochs: int = 0
    """Epochs over which the distillation weights rise linearly from 0; one-stage training needs some."""


@dataclass
class OptimConfig:
    """AdamW with a linear warm-up and a cosine to zero."""

    optimizer: str = "adamw"
    """``adamw``, or ``adam``, whose weight decay is part of the gradient."""
    lr: float = 8e-3
    lr_multipliers: dict[str, float] = field(default_factory=dict)
    """Part of a parameter's name -> factor of its learning rate; the longest part that is found counts, 0 freezes.
    Names are those of the stage: ``model.image_encoder``, ``task.identity``, ``model.text_projection`` and so on."""
    weight_decay: float = 0.1
    warmup_epochs: float = 1.0
    warmup_factor: float = 0.0
    """Factor of the learning rate that the warm-up starts from."""
    schedule: str = "cosine"
    """``cosine`` to zero, ``step`` or ``constant``."""
    milestones: list[int] = field(default_factory=list)
    """Epochs after which ``step`` multiplies the learning rate by 0.1."""
    accumulate: int = 1
    """Batches whose gradients are averaged before the optimiser's step; a contrastive loss still sees one batch."""
    micro_batch: int = 0
    """Rows that the encoders take at a time (cached gradients): memory of so few, losses over the whole batch; 0
    encodes the batch at once."""
    grad_clip: float = 0.0
    """Largest gradient norm; 0 for none."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights, which is then what is evaluated and kept; 0 for none."""


@dataclass
class TrainConfig:
    """One training run. ``method``: ``lcr2s`` (teacher, then student), ``one_stage`` (both together) or ``plain``
    (no teacher).
    """

    method: str = "lcr2s"
    epochs: int = 30
    """Epochs of the student (of the one stage, of the plain dual encoder)."""
    seed: int = 0
    out: str = ""
    eval_every: int = 5
    """Epochs between evaluations on val; the last epoch is always evaluated."""
    eval_batch: int = 256
    log_every: int = 10
    loggers: list[str] = field(default_factory=lambda: ["csv", "tensorboard"])
    progress: str = "auto"
    """``rich``, ``tqdm``, ``none``, or ``auto``: rich on a terminal, none elsewhere."""
    device: str = "auto"
    devices: int | str = "auto"
    """Processes of a node, a GPU each; ``auto``: as many as torchrun or srun started, else one."""
    nodes: int | str = "auto"
    """``auto``: as many as torchrun or srun started, else one."""
    strategy: str = "auto"
    """``ddp``; ``fsdp`` shards parameters, gradients and optimiser; ``auto`` is ``ddp`` where there are several."""
    sync_batchnorm: bool = False
    """Batch normalisation over the rows of all GPUs."""
    precision: str = "32-true"
    channels_last: bool = False
    """Images and convolution weights in channels-last memory format."""
    compile: str = ""
    """Backend of ``torch.compile`` for the encoders, such as ``inductor``; empty for none."""
    compile_mode: str = ""
    """Its mode, such as ``max-autotune``; empty for the default."""
    checkpoint_every: int = 0
    """Optimiser steps between checkpoints inside an epoch; 0 writes one after each epoch only."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        self.validate()

    @property
    def teacher_epochs(self) -> int:
        """Epochs of the teacher stage."""
        return self.epochs if self.teacher.epochs is None else self.teacher.epochs

    @property
    def warm_epochs(self) -> int:
        """Epochs of the plain student that a teacher starts from."""
        return self.epochs if self.teacher.warm_epochs is None else self.teacher.warm_epochs

    def validate(self) -> None:
        """ConfigError naming the first key whose value is out of range."""
        choices = {
            "method": (self.method, ("lcr2s", "one_stage", "plain")),
            "progress": (self.progress, ("auto", "rich", "tqdm", "none")),
            "strategy": (self.strategy, ("auto", "ddp", "fsdp")),
            "data.sampler": (self.data.sampler, ("random", "identity")),
            "data.support": (self.data.support, ("drawn", "batch", "bank", "none")),
            "teacher.start": (self.teacher.start, ("scratch", "auxiliary", "warm", "frozen")),
            "distill.feature_reduction": (self.distill.feature_reduction, ("row", "sum", "mean")),
            "distill.relation": (self.distill.relation, ("frobenius", "kl", "none")),
            "distill.relation_reduction": (self.distill.relation_reduction, ("mean", "row", "sum")),
            "optim.schedule": (self.optim.schedule, ("cosine", "step", "constant")),
            "optim.optimizer": (self.optim.optimizer, ("adamw", "adam")),
            "data.text_cache_dtype": (self.data.text_cache_dtype, ("float32", "float16", "bfloat16")),
        }
        for key, (value, allowed) in choices.items():
            if value not in allowed:
                raise ConfigError(f"{key}: expected one of {', '.join(allowed)}, got {value!r}{_near(value, allowed)}")
        self._validate_align()
        for key, count in (("devices", self.devices), ("nodes", self.nodes)):
            if count != "auto" and (not isinstance(count, int) or count < 1):
                raise ConfigError(f"{key}: expected auto or a positive int, got {count!r}")
        for logger in self.loggers:
            if logger not in ("csv", "tensorboard"):
                raise ConfigError(f"loggers: expected csv or tensorboard, got {logger!r}")
        at_least_one = {
            "epochs": self.epochs,
            "eval_every": self.eval_every,
            "eval_batch": self.eval_batch,
            "log_every": self.log_every,
            "data.batch_size": 1 if self.data.batch_size is None else self.data.batch_size,
            "data.identities": self.data.identities,
            "data.instances": self.data.instances,
            "data.bank_size": self.data.bank_size,
            "loss.mlm_heads": self.loss.mlm_heads,
            "loss.mlm_width": 1 if self.loss.mlm_width is None else self.loss.mlm_width,
            "data.vocab_size": self.data.vocab_size,
            "data.max_length": self.data.max_length,
            "teacher.epochs": self.teacher_epochs,
            "teacher.warm_epochs": self.warm_epochs,
            "model.heads": self.model.heads,
            "optim.accumulate": self.optim.accumulate,
        }
        not_negative = {
            "seed": self.seed,
            "threads": self.threads,
            "data.max_support": self.data.max_support,
            "data.pad": self.data.pad,
            "data.workers": self.data.workers,
            "loss.align_weight": self.loss.align_weight,
            "loss.identity_weight": self.loss.identity_weight,
            "loss.label_smoothing": self.loss.label_smoothing,
            "loss.mlm_weight": self.loss.mlm_weight,
            "loss.mlm_layers": self.loss.mlm_layers,
            "teacher.auxiliary_weight": self.teacher.auxiliary_weight,
            "distill.feature_weight": self.distill.feature_weight,
            "distill.relation_weight": self.distill.relation_weight,
            "distill.intra_weight": self.distill.intra_weight,
            "distill.ramp_epochs": self.distill.ramp_epochs,
            "optim.weight_decay": self.optim.weight_decay,
            "optim.warmup_epochs": self.optim.warmup_epochs,
            "optim.grad_clip": self.optim.grad_clip,
            "optim.micro_batch": self.optim.micro_batch,
            "checkpoint_every": self.checkpoint_every,
            **{f"optim.lr_multipliers.{part}": factor for part, factor in self.optim.lr_multipliers.items()},
            "optim.milestones": min(self.optim.milestones, default=0),
        }
        positive = {
            "loss.logit_scale": self.loss.logit_scale,
            "distill.student_scale": self.distill.student_scale,
            "distill.teacher_scale": self.distill.teacher_scale,
            "optim.lr": self.optim.lr,
        }
        for limits, low, words in ((at_least_one, 1, "at least 1"), (not_negative, 0, "at least 0")):
            for key, number in limits.items():
                if number < low:
                    raise ConfigError(f"{key}: expected {words}, got {number}")
        for key, number in positive.items():
            if not number > 0:
                raise ConfigError(f"{key}: expected a positive number, got {number}")
        probabilities = {
            "data.flip": self.data.flip,
            "data.erasing": self.data.erasing,
            "loss.mlm_fraction": self.loss.mlm_fraction,
            "data.brightness": self.data.brightness,
            "data.contrast": self.data.contrast,
            "optim.warmup_factor": self.optim.warmup_factor,
        }
        for key, number in probabilities.items():
            if not 0 <= number <= 1:
                raise ConfigError(f"{key}: expected a number in [0, 1], got {number}")
        if not 0 <= self.optim.ema_decay < 1:
            raise ConfigError(f"optim.ema_decay: expected a number in [0, 1), got {self.optim.ema_decay}")
        if self.optim.ema_decay and self.strategy == "fsdp":
            raise ConfigError("optim.ema_decay: sharded weights are not averaged; expected 0 with strategy=fsdp")
        if self.compile_mode and not self.compile:
            raise ConfigError(f"compile_mode: needs a backend in compile, got {self.compile_mode!r} alone")
        if self.loss.mlm_weight and self.optim.micro_batch:
            raise ConfigError("loss.mlm_weight: tokens are not encoded in parts; expected 0 with optim.micro_batch")
        if self.loss.mlm_weight and self.strategy == "fsdp":
            raise ConfigError("loss.mlm_weight: tokens of sharded encoders are not read; expected 0 with strategy=fsdp")
        if self.optim.milestones and self.optim.schedule != "step":
            raise ConfigError(f"optim.milestones: need optim.schedule=step, got {self.optim.schedule}")

    def _validate_align(self) -> None:
        loss = self.loss
        named = [loss.align] if isinstance(loss.align, str) else list(loss.align)
        for key, names in (("loss.align", named), ("loss.logit_scales", list(loss.logit_scales))):
            for name in names:
                if name not in _ALIGN:
                    raise ConfigError(f"{key}: expected one of {', '.join(_ALIGN)}, got {name!r}{_near(name, _ALIGN)}")
        if isinstance(loss.align, dict) and not all(0 <= weight < math.inf for weight in loss.align.values()):
            raise ConfigError(f"loss.align: expected weights of at least 0, got {loss.align}")
        if len(set(named)) != len(named) or not loss.align_terms:
            raise ConfigError(f"loss.align: expected at least one loss, each once, got {loss.align}")
        for name, scale in loss.logit_scales.items():
            if name == "cmpm" or not 0 < scale < math.inf:
                raise ConfigError(
                    f"loss.logit_scales.{name}: expected a positive number for sdm, info_nce or tal, got {scale}"
                )
        terms = loss.align_terms
        if not loss.many_to_many and "info_nce" not in terms:
            raise ConfigError(f"loss.many_to_many: false needs info_nce in loss.align, got {loss.align}")
        if loss.learn_logit_scale and not {"sdm", "info_nce"} & set(terms):
            raise ConfigError(f"loss.learn_logit_scale: {', '.join(terms)} has no logit scale to learn")


_Dataclass = TypeVar("_Dataclass")

_ALIGN = ("sdm", "info_nce", "cmpm", "tal")

# Mappings that are one choice: a later one replaces an earlier one instead of adding to it.
_CHOICES = ("align",)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Nested plain dictionary of a configuration, with what was left to other keys filled in."""
    values = dataclasses.asdict(config)
    values["teacher"] |= {"epochs": config.teacher_epochs, "warm_epochs": config.warm_epochs}
    return values


def dump_config(config: TrainConfig, path: str | Path) -> None:
    """Write the whole configuration, defaults included, as YAML."""
    import yaml

    write_text(path, yaml.safe_dump(to_dict(config), sort_keys=False))


def load_config(
    path: str | Path | None = None, overrides: Iterable[str] = (), *, base: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Configuration from a YAML file and ``key=value`` strings, the later ones winning.

    Args:
        path: YAML file of nested keys; ``None`` starts from the defaults.
        overrides: ``section.key=value`` strings; the value is read as YAML.
        base: nested dictionary applied before the overrides and after the file.

    Raises:
        ConfigError: unknown key (near matches are named), wrong kind of value, or a value out of range.
        FileNotFoundError: where ``path`` does not exist.
    """
    import yaml

    values: dict[str, Any] = {}
    if path is not None:
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"config: no file {file}")
        try:
            loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from error
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"{file}: expected a mapping of keys, got {type(loaded).__name__}")
        values = loaded or {}
    if base is not None:
        values = _merge(values, base)
    for text in overrides:
        key, separator, raw = text.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {text!r}: expected key=value")
        try:
            value = yaml.safe_load(raw)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: {raw!r} is not a valid value") from error
        nested: Any = value
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        values = _merge(values, nested)
    return _build(TrainConfig, values, "")


def _merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and key not in _CHOICES:
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _all_keys(cls: type, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            keys += _all_keys(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _near(value: object, allowed: Iterable[str]) -> str:
    matches = difflib.get_close_matches(str(value), list(allowed), n=3)
    return f"; did you mean {', '.join(matches)}?" if matches else ""


def _build(cls: type[_Dataclass], values: Mapping[str, Any], prefix: str) -> _Dataclass:
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in hints:
            keys = _all_keys(TrainConfig)
            near = [k for k in keys if k.rpartition(".")[2] == str(name)]
            near += [k for k in difflib.get_close_matches(key, keys, n=3) if k not in near]
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ConfigError(f"unknown key {key!r}{hint}")
        hint_type = hints[name]
        if dataclasses.is_dataclass(hint_type):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{key}: expected a mapping of keys, got {value!r}")
            arguments[name] = _build(typing.cast(type, hint_type), value, f"{key}.")
        else:
            arguments[name] = _convert(value, hint_type, key)
    return cls(**arguments)


def _convert(value: Any, hint: Any, key: str) -> Any:
    if isinstance(hint, types.UnionType):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        if value is None and len(options) < len(typing.get_args(hint)):
            return None
        fitting = [option for option in options if isinstance(value, typing.get_origin(option) or option)]
        hint = (fitting or options)[0]
    origin = typing.get_origin(hint) or hint
    if origin is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        # YAML 1.1 reads 2e-3 (no dot) as a string.
        try:
            return float(value)
        except ValueError:
            pass
    if origin is list and isinstance(value, (list, tuple)):
        inner = typing.get_args(hint)[0]
        return [_convert(item, inner, key) for item in value]
    if origin is dict and isinstance(value, Mapping):
        inner = typing.get_args(hint)[1]
        return {name: item if inner is Any else _convert(item, inner, f"{key}.{name}") for name, item in value.items()}
    kind = bool if origin is bool else origin
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"{key}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
