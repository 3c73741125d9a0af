"""Sub-quadratic token mixers: the Hyena operator and its long convolution. Imports torch and einops only."""

from safari.cluster_attention import ClusterAttention
from safari.fftconv import long_conv, long_conv2d
from safari.hyena import BidirectionalHyena, CausalHyena, HyenaMixer, HyenaOperator
from safari.hyena2d import Hyena2d
from safari.landmark_attention import LandmarkAttention
from safari.linear_attention import LinearAttention, LinFusion
from safari.pointwise import PointwiseMixer
from safari.window_attention import WindowAttention

__all__ = [
    "BidirectionalHyena",
    "CausalHyena",
    "ClusterAttention",
    "Hyena2d",
    "HyenaMixer",
    "HyenaOperator",
    "LandmarkAttention",
    "LinFusion",
    "LinearAttention",
    "PointwiseMixer",
    "WindowAttention",
    "long_conv",
    "long_conv2d",
]
