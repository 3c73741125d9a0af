"""Sub-quadratic token mixers: the Hyena operator and its long convolution. Imports torch and einops only."""

from safari.fftconv import long_conv
from safari.hyena import HyenaMixer, HyenaOperator
from safari.pointwise import PointwiseMixer

__all__ = ["HyenaMixer", "HyenaOperator", "PointwiseMixer", "long_conv"]
