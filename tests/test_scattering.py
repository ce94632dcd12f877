"Scattering: the coefficients of kymatio 0.3.0, which cannot be installed beside a current SciPy, as it printed them."
import pytest
import torch

from histonb.models.scattering import Scattering

# J, height, width: (map, row, column, value) of kymatio.torch.Scattering2D(J, (height, width), L=8) for `image` below
KYMATIO = {
    (2, 40, 50): [(0, 1, 2, .70016), (3, 0, 0, .019852), (12, 2, 1, .018384), (17, 1, 1, .001687), (40, 1, 1, .000785), (80, 2, 2, .002001), (60, 0, 2, .002055)],
    (3, 64, 48): [(0, 1, 2, .458032), (3, 0, 0, .022233), (12, 2, 1, .017401), (17, 1, 1, .040141), (40, 1, 1, .002212), (216, 2, 2, .005943), (60, 0, 2, .002764)],
    (4, 96, 70): [(0, 1, 2, .501197), (3, 0, 0, .023904), (12, 2, 1, .016932), (17, 1, 1, .048395), (40, 1, 1, .003102), (416, 2, 2, .000686), (60, 0, 2, .001194)],
}
SHAPES = {(2, 40, 50): (81, 10, 12), (3, 64, 48): (217, 8, 6), (4, 96, 70): (417, 6, 4)}


def image(height, width):
    y, x = torch.meshgrid(torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij")
    return (.5 + .2*torch.sin(.9*x + .2*y) + .2*torch.cos(.015*y*x) + .1*torch.sin(1.7*y - .4*x)).float()


@pytest.mark.parametrize("case", KYMATIO, ids=str)
def test_coefficients_are_kymatios(case):
    J, height, width = case
    found = Scattering(J)(image(height, width))
    assert found.shape == SHAPES[case]
    for at, row, column, value in KYMATIO[case]: assert found[at, row, column].item() == pytest.approx(value, rel=1.5e-4, abs=1e-6)  # it divides by 3.1415, not by pi


def test_first_order_is_the_beginning_of_both():
    x = image(64, 48)[None].repeat(2, 1, 1)
    both = Scattering(3)(x)
    assert torch.equal(Scattering(3, order=1)(x), both[:, :25])
    assert torch.allclose(Scattering(3, together=1)(x), both, atol=1e-6)
    assert len(Scattering(3).paths) == both.shape[1]
