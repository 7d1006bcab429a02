"""Moved to `utils.hessian`; these names stay until nobody asks for them here."""

from utils.hessian.blocks import BlockNorms, hessian_block_norms, parameter_groups  # noqa: F401
from utils.hessian.derivatives import (  # noqa: F401
    dense_hessian,
    hessian_vector_product,
    per_sample_gradients,
    per_sample_hessian_vector_product,
    per_sample_losses,
)
from utils.hessian.differences import DifferenceNorms, hessian_difference_norms  # noqa: F401
from utils.hessian.differentiation import PARTS, Logits  # noqa: F401
from utils.hessian.lanczos import (  # noqa: F401
    Ritz,
    lanczos,
    lanczos_epsilon,
    uniform_start,
)
from utils.hessian.lanczos import certified_upper as _certified  # noqa: F401
from utils.hessian.lanczos import orthogonalise as _orthogonalise  # noqa: F401
from utils.hessian.losses import MEMORY, Losses, SampleHessians  # noqa: F401
from utils.hessian.norms import (  # noqa: F401
    NormEstimate,
    hessian_norm,
    operator_norm,
    per_sample_hessian_norms,
)
from utils.hessian.operations import operations  # noqa: F401
from utils.hessian.spectrum import SpectralDensity, hessian_trace, spectral_density  # noqa: F401
