"""What a kind of node has to know: everything that a product, a gradient or a bound asks of it.

A network is a list of steps z = phi(inputs). Along a tangent u of the weights the values move by z'
(one walk forward), the adjoints lam_z = dl/dz of the loss by mu_z (one walk back):

    z'     =  sum over inputs x   D_x phi [x']
    lam_x  =  sum over readers z  D_x phi^T lam_z
    mu_x   =  sum over readers z  D_x phi^T mu_z  +  < lam_z, D^2 phi [(inputs)', .] >_x

and mu at the weights is h u, the Hessian of the loss times u. Source: Theorem (thm:adjoint).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

Parts = tuple[
    Tensor | None, ...
]  # one tensor (n, *shape) for each input; None is zero, or was not asked for
Form = Callable[
    [Parts, Tensor | None], Parts
]  # (tangents of the inputs, tangent of the output) -> parts


class Unknown(ValueError):
    """A bound asked of a node that has none; the message says which operator of which module."""


class Node(ABC):
    """One kind of step z = phi(inputs). A kind that lacks one of these methods cannot be created.

    Every array has the examples in front (see `arrays`); phi acts on each example alone. `saved` is
    what `forward` hands to the other methods. `wanted` has a number for each input: 0, its part is
    not asked for; 1, it is, for each example; 2, its sum over the examples is enough (the caller
    sums whatever has more than one row).
    """

    couples = False  # whether all that D^2 phi does is to couple the first two inputs

    @abstractmethod
    def forward(self, *z: Tensor) -> tuple[Tensor, object]:
        """phi(z) (L, *shape), and what the other methods need."""

    @abstractmethod
    def tangent(self, saved: object, dz: Parts) -> Tensor | None:
        """D phi [dz]."""

    @abstractmethod
    def adjoint(self, saved: object, lam: Tensor, wanted: tuple[int, ...]) -> Parts:
        """D phi^T lam, a part for each input."""

    @abstractmethod
    def second_order(self, saved: object, lam: Tensor, wanted: tuple[int, ...]) -> Form | None:
        """The map (dz, dout) -> < lam, D^2 phi [dz, .] >, dout = D phi [dz]; None where phi is
        linear."""

    @abstractmethod
    def majorant(self, saved: object, lam: Tensor, wanted: tuple[int, ...]) -> Form | None:
        """The map dz -> |M| dz with -|M| <= M <= |M|, M the symmetric matrix of < lam, D^2 phi >;
        None where it is 0.

        Where phi couples x and y, 2 < x, C y > <= < x, |C^T| x > + < y, |C| y >, the two halves
        apart: the walk weighs them by sigma and 1/sigma. Raises `Unknown` where nothing is known.
        Source: Theorem (thm:majorant).
        """
