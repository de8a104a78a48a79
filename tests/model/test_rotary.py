"""Rotary positions and their long-context scalings against values worked out by hand."""

import math

import pytest
import torch

from pretrain.model.rotary import (
    RotaryScaling,
    attention_sharpness,
    rotary_frequencies,
    rotary_table,
    rotate,
    scaled_frequencies,
)

DIM, THETA = 8, 10_000.0
PLAIN = [1, 0.1, 0.01, 0.001]


def scaled(kind: str, factor: float, trained: int = 128, length: int = 512) -> list[float]:
    return scaled_frequencies(DIM, THETA, RotaryScaling(kind, factor, trained), length).tolist()


@pytest.mark.parametrize("kind", ["interpolation", "ntk", "yarn"])
def test_a_factor_of_one_changes_nothing(kind):
    assert scaled(kind, 1.0) == rotary_frequencies(DIM, THETA).tolist() == pytest.approx(PLAIN)
    assert attention_sharpness(RotaryScaling(kind, 1.0, 128)) == 1.0


def test_interpolation_divides_every_frequency():
    assert scaled("interpolation", 4.0) == pytest.approx([f / 4 for f in PLAIN])


def test_ntk_keeps_the_highest_frequency_and_divides_the_lowest_by_the_factor():
    # base x 4^(8/6): dimension i is divided by 4^(2i/6)
    assert scaled("ntk", 4.0) == pytest.approx([f / 4 ** (i / 3) for i, f in enumerate(PLAIN)])


def test_dynamic_ntk_is_plain_up_to_the_trained_length_and_ntk_by_the_length_beyond():
    for length in (1, 100, 128):
        assert scaled("dynamic_ntk", 2.0, length=length) == pytest.approx(PLAIN)
    assert scaled("dynamic_ntk", 1.0, length=512) == pytest.approx(scaled("ntk", 4.0))
    assert scaled("dynamic_ntk", 2.0, length=512) == pytest.approx(scaled("ntk", 2 * 4 - 1))


def test_yarn_keeps_fast_dimensions_interpolates_slow_ones_and_ramps_between():
    trained = 1024
    frequencies = scaled("yarn", 8.0, trained=trained)
    turns = [trained * f / (2 * math.pi) for f in PLAIN]  # 163, 16.3, 1.63, 0.163
    ramp = [1.0, (turns[1] - 1) / 31, (turns[2] - 1) / 31, 0.0]
    assert frequencies == pytest.approx([f * (r + (1 - r) / 8) for f, r in zip(PLAIN, ramp, strict=True)])
    assert frequencies[0] == pytest.approx(1.0)
    assert frequencies[3] == pytest.approx(0.001 / 8)
    assert attention_sharpness(RotaryScaling("yarn", 8.0, trained)) == pytest.approx(0.1 * math.log(8) + 1)
    assert attention_sharpness(RotaryScaling("ntk", 8.0, trained)) == attention_sharpness(None) == 1.0


def test_a_sub_head_of_one_frequency_keeps_it_under_ntk():
    assert scaled_frequencies(2, THETA, RotaryScaling("ntk", 4.0, 128), 512).tolist() == [1.0]


def test_impossible_scalings_are_refused():
    with pytest.raises(ValueError, match="no rotary scaling 'linear'; there are interpolation"):
        RotaryScaling("linear", 2.0, 128)
    for factor, trained in ((0.5, 128), (math.nan, 128), (2.0, 0)):
        with pytest.raises(ValueError, match="factor >= 1 and trained_length >= 1"):
            RotaryScaling("ntk", factor, trained)


def test_rotation_and_its_gradient_are_those_of_complex_numbers():
    x = torch.randn(2, 5, 3, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]])
    angles = (positions[..., None].float() * rotary_frequencies(DIM, THETA))[:, :, None]
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(angles.cos().double(), angles.sin().double()) * 1.5
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    ours = rotate(x, rotary_table(positions, rotary_frequencies(DIM, THETA), 1.5))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    gradient = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    one, other = (torch.autograd.grad(y, x, gradient)[0] for y in (ours, expected))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert torch.autograd.gradcheck(lambda t: rotate(t, rotary_table(positions, rotary_frequencies(DIM, THETA))), x)
