"Scattering: the coefficients of kymatio 0.3.0, which cannot be installed beside a current SciPy, as it printed them."

import numpy as np
import pytest
import torch

from histonb.core.errors import BadInput
from histonb.models.scattering import Scattering
from histonb.models.scattering3d import Scattering3d

# J, height, width: (map, row, column, value) of kymatio.torch.Scattering2D(J, (height, width), L=8) for `image` below
KYMATIO = {
    (2, 40, 50): [
        (0, 1, 2, 0.70016),
        (3, 0, 0, 0.019852),
        (12, 2, 1, 0.018384),
        (17, 1, 1, 0.001687),
        (40, 1, 1, 0.000785),
        (80, 2, 2, 0.002001),
        (60, 0, 2, 0.002055),
    ],
    (3, 64, 48): [
        (0, 1, 2, 0.458032),
        (3, 0, 0, 0.022233),
        (12, 2, 1, 0.017401),
        (17, 1, 1, 0.040141),
        (40, 1, 1, 0.002212),
        (216, 2, 2, 0.005943),
        (60, 0, 2, 0.002764),
    ],
    (4, 96, 70): [
        (0, 1, 2, 0.501197),
        (3, 0, 0, 0.023904),
        (12, 2, 1, 0.016932),
        (17, 1, 1, 0.048395),
        (40, 1, 1, 0.003102),
        (416, 2, 2, 0.000686),
        (60, 0, 2, 0.001194),
    ],
}
SHAPES = {(2, 40, 50): (81, 10, 12), (3, 64, 48): (217, 8, 6), (4, 96, 70): (417, 6, 4)}


def image(height, width):
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    return (
        0.5 + 0.2 * torch.sin(0.9 * x + 0.2 * y) + 0.2 * torch.cos(0.015 * y * x) + 0.1 * torch.sin(1.7 * y - 0.4 * x)
    ).float()


@pytest.mark.parametrize("case", KYMATIO, ids=str)
def test_coefficients_are_kymatios(case):
    J, height, width = case
    maps = Scattering(J)(image(height, width))
    assert maps.shape == SHAPES[case]
    for at, row, column, value in KYMATIO[case]:
        # kymatio divides by 3.1415, not by pi
        assert maps[at, row, column].item() == pytest.approx(value, rel=1.5e-4, abs=1e-6)


def test_first_order_is_the_beginning_of_both():
    x = image(64, 48)[None].repeat(2, 1, 1)
    both = Scattering(3)(x)
    assert torch.equal(Scattering(3, order=1)(x), both[:, :25])
    assert torch.allclose(Scattering(3, chunk_size=1)(x), both, atol=1e-6)
    assert len(Scattering(3).paths) == both.shape[1]


@pytest.mark.parametrize("height, width", [(33, 37), (5, 9), (4, 4), (1, 64), (1, 1), (3, 50), (37, 32)])
def test_any_size_or_a_clear_error(height, width):
    "Odd sizes lose the remainder; where J=2 pads by more than the image, it says so."
    x = torch.rand(2, height, width)
    if min(height, width) < 5:
        with pytest.raises(BadInput, match="use larger images, or a smaller J"):
            Scattering(2)(x)
    else:
        assert Scattering(2)(x).shape == (2, 81, height // 4, width // 4)


def test_what_is_no_image_is_refused():
    for x in (
        torch.zeros(64, 64, dtype=torch.uint8),
        torch.zeros(64, 64, dtype=torch.int64),
        torch.zeros(64, 64, dtype=torch.complex64),
        torch.zeros(64),
    ):
        with pytest.raises(BadInput, match="Give float images"):
            Scattering(2)(x)
    with pytest.raises(BadInput, match="J=6 pads by more than the image"):
        Scattering(6)(torch.rand(64, 32))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-3), (torch.bfloat16, 8e-3), (torch.float64, 1e-6)])
def test_other_precisions(dtype, tolerance):
    "Computed in float32 and rounded once: what was lost is what the input lost and one rounding."
    x = image(40, 50).to(dtype)
    maps = Scattering(2)(x)
    exact = Scattering(2)(x.float())
    assert maps.dtype == dtype
    assert torch.allclose(maps.float(), exact, rtol=tolerance, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Scattering(2)(x.float()), exact)


def test_it_can_be_trained_through_after_inference():
    x = torch.rand(1, 3, 20, 24)
    for module in (Scattering(2), Scattering3d(2), Scattering3d(2, maps=True)):
        with torch.inference_mode():
            module(x)
        inner = torch.nn.Parameter(x.clone())
        module(inner).sum().backward()
        assert torch.isfinite(inner.grad).all() and inner.grad.abs().max() > 0


def test_gradient_is_the_slope():
    torch.manual_seed(0)
    x = torch.rand(1, 3, 12, 16)
    way = torch.randn(1, 3, 12, 16)
    for module in (Scattering(1, L=4), Scattering(2, L=2), Scattering3d(2, L=2)):
        weights = torch.randn(module(x).shape)
        inner = x.clone().requires_grad_()
        (module(inner) * weights).sum().backward()
        ahead, behind = ((module(x + step * way) * weights).sum() for step in (1e-3, -1e-3))
        slope = (ahead - behind).item() / 2e-3
        assert (inner.grad * way).sum().item() == pytest.approx(slope, rel=1e-2, abs=1e-2)


def test_volume_is_the_mean_over_the_colours_for_grey():
    "A grey volume has brightness only: wavelets of a hue answer as one of brightness, times the leak between them."
    x = torch.rand(1, 1, 24, 24).expand(1, 3, 24, 24)
    module = Scattering3d(2, order=1)
    brightness, one, other = module(x)[0, 1:].view(-1, 3).T
    assert torch.allclose(one, 0.2830 * brightness, rtol=1e-3) and torch.allclose(one, other, rtol=1e-4)


@pytest.mark.parametrize("height, width", [(16, 16), (15, 22)])
def test_volume_moves_and_turns(height, width):
    "Invariant to shifts in the ring of each axis, and permuted by the symmetries of the square, whatever the shape."
    torch.manual_seed(0)
    x = torch.rand(2, 3, height, width)
    module = Scattering3d(2)
    numbers = module(x)
    for shift in ((1, 0, 0), (0, 1, 0), (2, 5, -3)):
        assert torch.allclose(module(x.roll(shift, (1, 2, 3))), numbers, atol=1e-5)
    for flip in (False, True):
        for turns in range(-1, 4):
            moved = torch.rot90(x.flip(3) if flip else x, turns, (2, 3))
            order = module.permutation(turns, flip)
            assert sorted(order) == list(range(len(module.paths)))
            assert np.abs(module(moved).numpy() - numbers[:, order].numpy()).max() < 1e-5


def test_volume_maps_move_with_the_tile():
    torch.manual_seed(0)
    x = torch.rand(1, 3, 24, 32)
    module = Scattering3d(2, maps=True)
    maps = module(x)
    assert maps.shape == (1, len(module.paths), 6, 8)
    assert torch.allclose(module(x.roll((8, 4), (2, 3))), maps.roll((2, 1), (2, 3)), atol=1e-5)


def test_volume_refuses_what_it_cannot_scatter():
    for x in (
        torch.rand(1, 1, 32, 32),
        torch.rand(1, 4, 32, 32),
        torch.rand(3, 32, 32),
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        torch.rand(0, 3, 32, 32),
    ):
        with pytest.raises(BadInput, match=r"Give float RGB tiles \(B, 3, H, W\)"):
            Scattering3d(2)(x)
    with pytest.raises(BadInput, match="J=4 needs 16 pixels along each side"):
        Scattering3d(4)(torch.rand(1, 3, 32, 15))
    with pytest.raises(BadInput, match="multiples of 4: crop or pad"):
        Scattering3d(2, maps=True)(torch.rand(1, 3, 32, 30))
    with pytest.raises(BadInput, match="J=2 needs 4 pixels"):
        Scattering3d(2)(torch.rand(1, 3, 1, 1))
    for dtype, tolerance in ((torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
        x = torch.rand(1, 3, 16, 16).to(dtype)
        numbers = Scattering3d(2)(x)
        assert numbers.dtype == dtype
        assert torch.allclose(numbers.float(), Scattering3d(2)(x.float()), rtol=tolerance, atol=1e-6)
