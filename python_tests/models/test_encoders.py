"""The tiny encoders and the registry."""

import pytest
import torch

from lcr2s_ext.models import (
    DualEncoder,
    TinyImageEncoder,
    TinyTextEncoder,
    build_encoder,
    encoder_spec,
    register_encoder,
)


@pytest.mark.parametrize("size", [(64, 32), (128, 64), (40, 24), (9, 5)])
def test_image_encoder_takes_any_size(size: tuple[int, int]) -> None:
    encoder = TinyImageEncoder(40)
    features = encoder(torch.randn(3, 3, *size))
    assert features.shape == (3, 40)
    assert features.isfinite().all()


def test_image_encoder_refuses_options_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="strides"):
        TinyImageEncoder(widths=(8, 8), strides=(1, 2))
    with pytest.raises(ValueError, match="grid"):
        TinyImageEncoder(grid=(0, 4))


@pytest.mark.parametrize("options", [{}, {"heads": 0}, {"pool": "mean"}, {"window": 1, "layers": 2, "heads": 4}])
def test_a_caption_does_not_depend_on_its_neighbours(options: dict[str, object]) -> None:
    encoder = TinyTextEncoder(50, 40, max_length=20, **options).double().eval()  # type: ignore[arg-type]
    for block in encoder.blocks:
        if block.heads:
            torch.nn.init.normal_(block.attention_output.weight, std=0.2)
    tokens = torch.zeros(3, 20, dtype=torch.int64)
    tokens[0, :4] = torch.tensor([5, 9, 3, 7])
    tokens[1, :18] = torch.randint(1, 50, (18,))
    together = encoder(tokens)
    assert together.shape == (3, 40)
    assert together.isfinite().all()  # the last row is padding alone
    torch.testing.assert_close(encoder(tokens[:1, :4]), together[:1])
    torch.testing.assert_close(encoder(tokens[:1]), together[:1])
    swapped = tokens.clone()
    swapped[0, :2] = tokens[0, [1, 0]]
    assert (encoder(swapped)[0] - together[0]).abs().max() > 1e-4


def test_text_encoder_refuses_what_it_cannot_read() -> None:
    encoder = TinyTextEncoder(50, 40, max_length=6)
    with pytest.raises(ValueError, match="tokens"):
        encoder(torch.ones(2, 7, dtype=torch.int64))
    for arguments, name in (
        ({"vocab_size": 1}, "vocab_size"),
        ({"vocab_size": 9, "window": 2}, "window"),
        ({"vocab_size": 9, "heads": 3}, "heads"),
        ({"vocab_size": 9, "pool": "sum"}, "pool"),
    ):
        with pytest.raises(ValueError, match=name):
            TinyTextEncoder(**arguments)  # type: ignore[arg-type]


def test_registry_rebuilds_and_names_what_it_does_not_know() -> None:
    encoder = TinyImageEncoder(40, widths=(8, 16), strides=(2,))
    again = build_encoder(encoder_spec(encoder))
    assert [tuple(p.shape) for p in again.parameters()] == [tuple(p.shape) for p in encoder.parameters()]
    with pytest.raises(ValueError, match="no encoder is registered as 'no_such'"):
        build_encoder({"type": "no_such"})
    with pytest.raises(ValueError, match="Linear cannot be saved by name"):
        encoder_spec(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="already registered"):
        register_encoder("tiny_image")(torch.nn.Linear)


def test_any_module_with_a_stated_width_is_an_encoder() -> None:
    image = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 4, 10))
    with pytest.raises(TypeError, match="image_encoder: an encoder states its feature width"):
        DualEncoder(image, TinyTextEncoder(9, 12))
    image.output_width = 10  # type: ignore[assignment]
    model = DualEncoder(image, TinyTextEncoder(9, 12), width=16)
    v, t = model(torch.randn(2, 3, 8, 4), torch.tensor([[1, 2], [3, 0]]))
    assert v.shape == t.shape == (2, 16)
    assert isinstance(DualEncoder(image, TinyTextEncoder(9, 10)).text_projection, torch.nn.Identity)


@pytest.mark.parametrize("probability", [0.2, 0.5])
def test_dropout_drops_and_scales_as_many_as_it_says(probability: float) -> None:
    encoder = TinyImageEncoder(8, dropout=probability)
    ones = torch.ones(400, 501, requires_grad=True)
    out = encoder.dropout(ones)
    rate = float((out == 0).double().mean())
    # 200 400 decisions: five standard deviations of their mean, and the rounding of the probability to 1/256.
    assert abs(rate - probability) < 0.0056 + 1 / 512
    kept = out.detach()[out.detach() != 0]
    assert torch.allclose(kept, kept[:1])
    assert abs(float(kept[0]) * (1 - probability) - 1) < 0.004
    out.sum().backward()
    assert ones.grad is not None
    assert torch.equal(ones.grad, out.detach())
    columns = (out == 0).double().mean(0)
    assert float(columns.min()) > probability - 0.16
    assert float(columns.max()) < probability + 0.16
    encoder.eval()
    assert torch.equal(encoder.dropout(ones), ones)


def test_dropout_follows_the_generator_and_compiles() -> None:
    encoder = TinyImageEncoder(8, dropout=0.3)
    ones = torch.ones(7, 5)
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(encoder.dropout(ones))
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], encoder.dropout(ones))
    compiled = torch.compile(encoder.dropout, fullgraph=True, backend="aot_eager")
    assert compiled(torch.ones(50, 50)).unique().tolist() == pytest.approx([0.0, 1 / 0.7])
