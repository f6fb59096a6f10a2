"""``LCR2S``: the model users hold: a student, its preprocessing, its tokenizer, saved without pickle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcr2s_ext._files import replacing, write_text
from lcr2s_ext.models.dual_encoder import Student, Teacher
from lcr2s_ext.models.encoders import build_encoder, encoder_spec
from lcr2s_ext.models.preprocess import ImageInput, images_to_tensor, normalize_images
from lcr2s_ext.models.pretrained import load_weights, read_architecture

__all__ = ["LCR2S", "PRESETS", "Tokenizer", "preset_config"]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
FORMAT_VERSION = 1

# ImageNet statistics, the ones most pretrained backbones expect; for the tiny encoders any fixed pair would do.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "width": 128,
        "image_size": [64, 32],
        "image_encoder": {"type": "tiny_image", "dropout": 0.3},
        "text_encoder": {"type": "tiny_text", "dropout": 0.2},
    },
    "small": {
        "width": 256,
        "image_size": [128, 64],
        "image_encoder": {"type": "tiny_image", "widths": [32, 64, 96, 128], "strides": [1, 2, 2]},
        "text_encoder": {"type": "tiny_text", "width": 128, "layers": 2, "hidden": 256},
    },
    "rn50-bert": {
        "width": 2048,
        "image_size": [384, 128],
        "image_encoder": {"type": "resnet"},
        "text_encoder": {"type": "bert_textcnn"},
    },
    "clip-vit-b16": {
        "width": 512,
        "image_size": [384, 128],
        "mean": CLIP_MEAN,
        "std": CLIP_STD,
        "image_encoder": {"type": "clip_image", "architecture": {"patch_size": 16}},
        "text_encoder": {"type": "clip_text"},
    },
    "clip-vit-b32": {
        "width": 512,
        "image_size": [384, 128],
        "mean": CLIP_MEAN,
        "std": CLIP_STD,
        "image_encoder": {"type": "clip_image"},
        "text_encoder": {"type": "clip_text"},
    },
    "clip-vit-l14": {
        "width": 768,
        "image_size": [392, 126],
        "mean": CLIP_MEAN,
        "std": CLIP_STD,
        "image_encoder": {
            "type": "clip_image",
            "architecture": {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "patch_size": 14,
                "projection_dim": 768,
            },
        },
        "text_encoder": {
            "type": "clip_text",
            "architecture": {
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_attention_heads": 12,
                "projection_dim": 768,
            },
        },
    },
    "siglip-b16": {
        "width": 768,
        "image_size": [384, 128],
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "image_encoder": {"type": "siglip_image"},
        "text_encoder": {"type": "siglip_text"},
    },
}
"""Image size, feature width and encoders of each preset. CLIP's L/14 takes the multiples of 14 next to 384 x 128."""


class Tokenizer(Protocol):
    """What ``LCR2S`` asks of a tokenizer; :class:`lcr2s_ext.data.CaptionTokenizer` is one."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, captions: list[str]) -> Tensor: ...

    def save(self, path: Any) -> None: ...


def preset_config(
    name: str,
    *,
    vocab_size: int,
    max_length: int = 64,
    width: int | None = None,
    image_size: Sequence[int] | None = None,
    image_encoder: dict[str, Any] | None = None,
    text_encoder: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Model configuration of a preset; the two dictionaries override the encoders' keyword arguments.

    ``vocab_size`` and ``max_length`` size the encoders that are trained from scratch; a pretrained text encoder has
    its own.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    preset = PRESETS[name]
    d = int(width or preset["width"])
    size = [int(side) for side in (image_size or preset["image_size"])]
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"image_size: expected two positive ints (H, W), got {image_size!r}")
    return {
        "format": "lcr2s",
        "version": FORMAT_VERSION,
        "preset": name,
        "width": d,
        "image_size": size,
        "mean": list(preset.get("mean", IMAGE_MEAN)),
        "std": list(preset.get("std", IMAGE_STD)),
        "image_encoder": {**preset["image_encoder"], **_image_sizes(preset, d, size), **(image_encoder or {})},
        "text_encoder": {
            **preset["text_encoder"],
            **_text_sizes(preset, d, int(vocab_size), int(max_length)),
            **(text_encoder or {}),
        },
    }


def _image_sizes(preset: dict[str, Any], width: int, image_size: list[int]) -> dict[str, Any]:
    kind = preset["image_encoder"]["type"]
    if kind in ("clip_image", "siglip_image"):
        return {"image_size": image_size}
    return {"output_width": width} if kind == "tiny_image" else {}


def _text_sizes(preset: dict[str, Any], width: int, vocab_size: int, max_length: int) -> dict[str, Any]:
    kind = preset["text_encoder"]["type"]
    if kind == "tiny_text":
        return {"output_width": width, "vocab_size": vocab_size, "max_length": max_length}
    return {"max_length": max_length} if kind == "bert_textcnn" else {}


class LCR2S(nn.Module):
    """A trained (or fresh) student with its preprocessing: one image or one sentence in, one unit vector out.

    Args:
        student: the dual encoder.
        image_size: ``(H, W)`` the images are resized to.
        mean, std: per-channel statistics of the normalisation, on the 0..1 scale.
        tokenizer: needed to encode strings; tokens can be encoded without.
        preset: name kept in the saved configuration, for the reader.
    """

    def __init__(
        self,
        student: Student,
        *,
        image_size: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        tokenizer: Tokenizer | None = None,
        preset: str | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.mean = tuple(float(x) for x in mean)
        self.std = tuple(float(x) for x in std)
        self.tokenizer = tokenizer
        self.preset = preset

    @classmethod
    def from_preset(
        cls,
        name: str,
        *,
        vocab_size: int | None = None,
        tokenizer: Tokenizer | None = None,
        seed: int | None = None,
        image_weights: str | Path | None = None,
        text_weights: str | Path | None = None,
        **overrides: Any,
    ) -> LCR2S:
        """Fresh model of a preset.

        Args:
            name: ``"tiny"`` (64x32 images, a small CNN and a small text transformer) or ``"small"`` (128x64), trained
                from scratch; ``"rn50-bert"``, ``"clip-vit-b16"``, ``"clip-vit-b32"``, ``"clip-vit-l14"`` or
                ``"siglip-b16"``, built by transformers.
            vocab_size: size of the token vocabulary; taken from ``tokenizer`` when that is given.
            tokenizer: attached, so that ``encode_text`` accepts strings.
            seed: seed of the initial weights; ``None`` draws from torch's global generator.
            image_weights: local Hugging Face folder from which the image encoder takes architecture and weights.
            text_weights: the same for the text encoder; for CLIP and SigLIP it may be the same folder.
            **overrides: ``width``, ``image_size``, ``max_length`` and dictionaries ``image_encoder``, ``text_encoder``.
        """
        if vocab_size is None:
            if tokenizer is None:
                raise ValueError("vocab_size: expected an int when no tokenizer is given, got None")
            vocab_size = tokenizer.vocab_size
        if tokenizer is not None:
            overrides.setdefault("max_length", getattr(tokenizer, "max_length", 64))
        config = preset_config(name, vocab_size=vocab_size, **overrides)
        weights = {"image_encoder": image_weights, "text_encoder": text_weights}
        for key, folder in weights.items():
            if folder is not None:
                config[key] |= {"architecture": read_architecture(config[key]["type"], folder)}
        with torch.random.fork_rng(devices=[]) if seed is not None else nullcontext():
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            model = cls.from_config(config, tokenizer=tokenizer)
        for key, folder in weights.items():
            if folder is not None:
                load_weights(getattr(model.student, key), folder)
        return model

    @classmethod
    def from_config(cls, config: dict[str, Any], *, tokenizer: Tokenizer | None = None) -> LCR2S:
        """Fresh model of a configuration as made by :func:`preset_config` or :meth:`config`."""
        student = Student(
            build_encoder(config["image_encoder"]), build_encoder(config["text_encoder"]), int(config["width"])
        )
        return cls(
            student,
            image_size=config["image_size"],
            mean=config["mean"],
            std=config["std"],
            tokenizer=tokenizer,
            preset=config.get("preset"),
        )

    @property
    def output_width(self) -> int:
        """Feature width ``d``."""
        return self.student.output_width

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def config(self) -> dict[str, Any]:
        """JSON-able description from which :meth:`from_config` builds the same architecture."""
        return {
            "format": "lcr2s",
            "version": FORMAT_VERSION,
            "preset": self.preset,
            "width": self.output_width,
            "image_size": list(self.image_size),
            "mean": list(self.mean),
            "std": list(self.std),
            "image_encoder": encoder_spec(self.student.image_encoder),
            "text_encoder": encoder_spec(self.student.text_encoder),
        }

    def make_teacher(self, **options: Any) -> Teacher:
        """Fresh :class:`Teacher` whose encoders have this model's architecture; options go to ``Teacher``."""
        return Teacher(LCR2S.from_config(self.config()).student, **options)

    def encode_image(self, images: ImageInput) -> Tensor:
        """Unit feature vectors of images.

        Args:
            images: a PIL image, a path, or a list of them; uint8 ``(3, H, W)`` or ``(B, 3, H, W)`` tensors; floats
                in 0..1 of these shapes. Any size; resized to ``image_size``.

        Returns:
            ``(B, d)`` float32, L2-normalised; one image is a batch of one.
        """
        batch = images_to_tensor(images, self.image_size).to(self.device)
        return F.normalize(self.student.image_features(normalize_images(batch, self.mean, self.std)), dim=1)

    def encode_text(self, captions: str | Sequence[str] | Tensor) -> Tensor:
        """Unit feature vectors of sentences.

        Args:
            captions: a sentence, a sequence of sentences (a tokenizer is attached), or int64 tokens ``(L,)`` or
                ``(B, L)``.

        Returns:
            ``(B, d)`` float32, L2-normalised; one sentence is a batch of one.
        """
        if isinstance(captions, Tensor):
            tokens = captions[None] if captions.dim() == 1 else captions
        else:
            sentences = [captions] if isinstance(captions, str) else list(captions)
            if not sentences or not all(isinstance(sentence, str) for sentence in sentences):
                raise TypeError("captions: expected a string, a non-empty sequence of strings, or int64 tokens")
            if self.tokenizer is None:
                raise ValueError("captions: strings need a tokenizer, this model has none; pass tokens or attach one")
            tokens = self.tokenizer.encode(sentences)
        return F.normalize(self.student.text_features(tokens.to(self.device)), dim=1)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The student's features, not L2-normalised, of normalised images ``(B, 3, H, W)`` and tokens ``(N, L)``."""
        return self.student(images, tokens)

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write ``config.json``, ``model.safetensors`` and, with a tokenizer, ``tokenizer.json``; returns the
        directory.
        """
        from safetensors.torch import save_file

        directory = Path(directory)
        config = self.config()
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
        state = {name: value.detach().cpu().contiguous() for name, value in self.student.state_dict().items()}
        with replacing(directory / WEIGHTS_FILE) as temporary:
            save_file(state, str(temporary))
        if self.tokenizer is not None:
            self.tokenizer.save(directory / TOKENIZER_FILE)
        return directory

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, tokenizer: Tokenizer | None = None) -> LCR2S:
        """Model written by :meth:`save_pretrained`, in eval mode on the CPU.

        Raises:
            FileNotFoundError: where the directory, ``config.json`` or ``model.safetensors`` is missing.
            ValueError: where a file is damaged, or weights and configuration disagree (the first differences are
            named).
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        directory = Path(directory)
        if not directory.is_dir():
            raise FileNotFoundError(f"directory: no folder {directory}")
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (directory / name).is_file():
                raise FileNotFoundError(
                    f"directory: {directory} holds no {name}; it was not written by save_pretrained"
                )
        try:
            config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{directory / CONFIG_FILE}: not valid JSON ({error})") from error
        if not isinstance(config, dict) or config.get("format") != "lcr2s":
            raise ValueError(f"{directory / CONFIG_FILE}: expected a configuration of format 'lcr2s'")
        if config.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"{directory / CONFIG_FILE}: expected version {FORMAT_VERSION}, got {config.get('version')!r}"
            )
        try:
            state = load_file(str(directory / WEIGHTS_FILE))
        except SafetensorError as error:
            raise ValueError(f"{directory / WEIGHTS_FILE}: damaged or not a safetensors file ({error})") from error
        try:
            model = cls.from_config(config)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{directory / CONFIG_FILE}: incomplete or unknown entries ({error})") from error
        _check_state(state, model.student, directory / WEIGHTS_FILE)
        model.student.load_state_dict(state)
        if tokenizer is None and (directory / TOKENIZER_FILE).is_file():
            tokenizer = _load_tokenizer(directory / TOKENIZER_FILE)
        model.tokenizer = tokenizer
        return model.eval()


def _load_tokenizer(path: Path) -> Tokenizer:
    from lcr2s_ext.models.tokenizer import SavedTokenizer

    return SavedTokenizer(path)


def _check_state(state: dict[str, Tensor], module: nn.Module, path: Path) -> None:
    expected = module.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is not part of the configured model" for name in state if name not in expected]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, the configuration asks for {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{path}: weights do not fit config.json: {'; '.join(problems[:3])}{more}")
