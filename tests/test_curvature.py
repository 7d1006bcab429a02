"""Moved to `tests/hessian`; what other tests still import from here."""

from hessian.reference import randomised, reference, samples, vit  # noqa: F401
