"""Losses of a network as functions of its weights, and the norms and spectra of their Hessians.

coordinates      which parameters move; flat vectors
differentiation  derivatives of any module by automatic differentiation
losses           class Losses: values, gradients, products of a batch; SampleHessians
derivatives      the same by one call each
verification     whether the derivatives are those of the loss
lanczos          extreme eigenvalues of symmetric operators, with a certificate
norms            norms of examples and means
differences      norms of H_k, H_{k+1} - H_k, H_k - H_n
blocks           norms between groups of parameters
spectrum         trace and spectral density
pyhessian        PyHessian without its errors
estimators       tables of estimators beside each other
operations       floating-point operations of a call
"""

from utils.hessian.blocks import hessian_block_norms
from utils.hessian.derivatives import (
    hessian_vector_product,
    per_sample_gradients,
    per_sample_losses,
)
from utils.hessian.differences import hessian_difference_norms
from utils.hessian.losses import Losses
from utils.hessian.norms import hessian_norm, per_sample_hessian_norms
from utils.hessian.spectrum import hessian_trace, spectral_density

__all__ = [
    "Losses",
    "hessian_block_norms",
    "hessian_difference_norms",
    "hessian_norm",
    "hessian_trace",
    "hessian_vector_product",
    "per_sample_gradients",
    "per_sample_hessian_norms",
    "per_sample_losses",
    "spectral_density",
]
