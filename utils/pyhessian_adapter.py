"""Moved to `utils.hessian.pyhessian`; these names stay until nobody asks for them here."""

from utils.hessian.pyhessian import (  # noqa: F401
    STREAM,
    Eigenvalue,
    density,
    eigenvalue,
    prepared,
    trace,
)
