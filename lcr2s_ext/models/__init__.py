"""Encoders, the dual encoder, teacher and student, and the model users hold."""

from lcr2s_ext.models.dual_encoder import DualEncoder, Student, Teacher, TeacherFeatures
from lcr2s_ext.models.encoders import (
    TinyImageEncoder,
    TinyTextEncoder,
    TokenFeatures,
    build_encoder,
    encoder_spec,
    register_encoder,
)
from lcr2s_ext.models.lcr2s import IMAGE_MEAN, IMAGE_STD, LCR2S, PRESETS, preset_config
from lcr2s_ext.models.preprocess import images_to_tensor, normalize_images
from lcr2s_ext.models.pretrained import (
    BertTextCNN,
    ClipImageEncoder,
    ClipTextEncoder,
    ResNetImageEncoder,
    SiglipImageEncoder,
    SiglipTextEncoder,
    load_encoder,
)
from lcr2s_ext.models.tokenizer import SavedTokenizer

__all__ = [
    "IMAGE_MEAN",
    "IMAGE_STD",
    "LCR2S",
    "PRESETS",
    "BertTextCNN",
    "ClipImageEncoder",
    "ClipTextEncoder",
    "DualEncoder",
    "ResNetImageEncoder",
    "SavedTokenizer",
    "SiglipImageEncoder",
    "SiglipTextEncoder",
    "Student",
    "Teacher",
    "TeacherFeatures",
    "TinyImageEncoder",
    "TinyTextEncoder",
    "TokenFeatures",
    "build_encoder",
    "encoder_spec",
    "images_to_tensor",
    "load_encoder",
    "normalize_images",
    "preset_config",
    "register_encoder",
]
