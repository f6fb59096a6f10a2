"""Encoders of your own: any module with an `output_width`, registered by name so that it can be saved.

python examples/own_encoder.py
"""

import tempfile

import torch
from torch import Tensor, nn

from lcr2s_ext import LCR2S
from lcr2s_ext.models import IMAGE_MEAN, IMAGE_STD, Student, TinyTextEncoder, register_encoder


@register_encoder("mean_colour")
class MeanColour(nn.Module):
    """The mean colour of each of a few horizontal stripes, mapped to the feature."""

    def __init__(self, output_width: int = 64, *, stripes: int = 6) -> None:
        super().__init__()
        self.config = {"output_width": output_width, "stripes": stripes}
        self.output_width = output_width
        self.stripes = stripes
        self.projection = nn.Linear(3 * stripes, output_width)

    def forward(self, images: Tensor) -> Tensor:
        stripes = nn.functional.adaptive_avg_pool2d(images, (self.stripes, 1))
        return self.projection(stripes.flatten(1))


def main() -> None:
    student = Student(MeanColour(64), TinyTextEncoder(vocab_size=500, output_width=64))
    model = LCR2S(student, image_size=(128, 64), mean=IMAGE_MEAN, std=IMAGE_STD).eval()
    images = torch.randint(0, 256, (2, 3, 200, 90), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        again = LCR2S.from_pretrained(model.save_pretrained(folder))
    print(torch.equal(model.encode_image(images), again.encode_image(images)))


if __name__ == "__main__":
    main()
