"Wavelet transforms at their edges: odd and tiny images, too many levels, low precision, what is refused."

import pytest
import torch

from histonb.core.errors import BadInput
from histonb.models.wavelets import InverseWaveletTransform, WaveletTransform, dwt, idwt


@pytest.mark.parametrize("wavelet", ["haar", "db2", "db4"])
@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 1, 7), (2, 5, 8), (3, 33, 47)])
def test_odd_and_tiny_images_come_back(shape, wavelet):
    torch.manual_seed(0)
    x = torch.rand(shape)
    for mode in ("symmetric", "periodization", "zero"):
        assert torch.allclose(
            idwt(dwt(x, wavelet=wavelet, mode=mode), wavelet=wavelet, mode=mode, size=shape[-2:]), x, atol=1e-5
        )


def test_one_pixel():
    "Alone it is its own neighbour: twice its value in the coarse band, nothing in the details."
    bands = dwt(torch.full((1, 1), 3.0))
    assert {name: band.item() for name, band in bands.items()} == pytest.approx({"aa": 6, "ad": 0, "da": 0, "dd": 0})


def test_more_levels_than_pixels():
    "Past one pixel it goes on with one pixel, and still comes back."
    x = torch.rand(2, 5, 7)
    coefficients = WaveletTransform(levels=9)(x)
    assert len(coefficients) == 10 and coefficients[0].shape == (2, 1, 1)
    assert torch.allclose(InverseWaveletTransform(levels=9)(coefficients, (5, 7)), x, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_low_precision_stays_and_comes_back(dtype, tolerance):
    torch.manual_seed(0)
    for size in (9, 600):  # as a matrix product, and as a convolution
        x = torch.rand(3, size, size).to(dtype)
        for wavelet in ("haar", "db2"):
            bands = dwt(x, wavelet=wavelet)
            back = idwt(bands, wavelet=wavelet, size=(size, size))
            assert bands["dd"].dtype == back.dtype == dtype
            assert (back.float() - x.float()).abs().max() < tolerance
            coefficients = WaveletTransform(levels=2, wavelet=wavelet)(x)
            assert (
                InverseWaveletTransform(levels=2, wavelet=wavelet)(coefficients, (size, size)).float() - x.float()
            ).abs().max() < 2 * tolerance


def test_what_has_no_bands_is_refused():
    for dtype in (torch.uint8, torch.int64, torch.bool):
        with pytest.raises(BadInput, match="bytes would overflow"):
            dwt(torch.zeros(4, 4).to(dtype))
        with pytest.raises(BadInput, match="bytes would overflow"):
            idwt({name: torch.zeros(2, 2).to(dtype) for name in ("aa", "ad", "da", "dd")})
        with pytest.raises(BadInput, match="bytes would overflow"):
            WaveletTransform()(torch.zeros(4, 4).to(dtype))
    with pytest.raises(BadInput, match="no bands"):
        dwt(torch.zeros(0, 4))
    with pytest.raises(BadInput, match="Split at least once"):
        WaveletTransform(levels=0)


def test_a_size_that_the_bands_do_not_hold_is_refused():
    bands = dwt(torch.rand(5, 5))
    for size in ((9, 9), (5,), (5, 7)):
        with pytest.raises(BadInput, match="The bands hold up to 6x6"):
            idwt(bands, size=size)
