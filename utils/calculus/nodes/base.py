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
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from utils.calculus.nodes.known import Known, Situation

Shape = Sequence[int]
Shapes = Sequence[Shape]
Maybe = Any  # a tensor (n, *shape), or None: zero, or not asked for
Forward = tuple[Tensor, Any]  # the value, and what the other methods of the same node need
Wanted = tuple[int, ...]  # a number for each input, see `Node`
Leaves = tuple[bool, ...]  # which inputs are parameters themselves
Parts = tuple[Maybe, ...]  # one for each input
Form = Callable[[Parts, Maybe], Parts]  # (tangents of the inputs, of the output) -> parts
Roots = tuple[Any, ...]  # parts, or a number in their place, see `Node.roots`


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
    mixes: int | None = None  # how many of the last axes it mixes, where it acts on each row alone

    @abstractmethod
    def forward(self, *z: Tensor) -> Forward:
        """phi(z) (L, *shape), and what the other methods need."""

    @abstractmethod
    def tangent(self, saved: Any, dz: Parts) -> Maybe:
        """D phi [dz]."""

    @abstractmethod
    def adjoint(self, saved: Any, lam: Tensor, wanted: Wanted) -> Parts:
        """D phi^T lam, a part for each input; values of one example serve all rows of lam."""

    @abstractmethod
    def second_order(self, saved: Any, lam: Tensor, wanted: Wanted) -> Form | None:
        """The map (dz, dout) -> < lam, D^2 phi [dz, .] >, dout = D phi [dz]; None where phi is
        linear."""

    @abstractmethod
    def majorant(self, saved: Any, lam: Tensor, wanted: Wanted) -> Form | None:
        """The map dz -> |M| dz with -|M| <= M <= |M|, M the symmetric matrix of < lam, D^2 phi >;
        None where it is 0.

        Where phi couples x and y, 2 < x, C y > <= < x, |C^T| x > + < y, |C| y >, the two halves
        apart: the walk weighs them by sigma and 1/sigma. Raises `Unknown` where nothing is known.
        Source: Theorem (thm:majorant).
        """

    @abstractmethod
    def norms(self, inputs: tuple[Known, ...], saved: Any, at: Situation) -> Known:
        """What is known of phi(z), for all weights of a ball, from what is known of the inputs:
        its jet, sizes and displacement, see `Known`.

        saved  of `forward` at the centre, None where some value is not used
        at     the radius, and `at.number(name, value)`, which notes a number and may know a smaller
               one

        Raises `Unknown` where nothing is known. Source: Theorem 1 (thm:jet), Corollary (cor:ball).
        """

    def roots(
        self,
        saved: Any,
        lam: Tensor,
        wanted: Wanted,
        shapes: Shapes,
        leaves: Leaves,
    ) -> Roots:
        """Forms that bound < lam, D^2 phi > of one example, k rows (k, *shape) for each input.

        One element R: |< lam, D^2 phi [x', x'] >| <= |R x'|^2. Two, R and S: 2 |R x'| |S y'|, and a
        number in place of S stands for the identity on that input.

        shapes  of the inputs
        leaves  which of them are parameters themselves

        Empty where the form is 0. The default takes the dense |M| of `majorant`. Source: Theorem
        (thm:forms).
        """
        form = self.majorant(saved, lam, wanted)
        if form is None:
            return ()
        if self.couples:
            return tuple(dense_root(form, [place], shapes, lam) for place in (0, 1))
        places = [i for i, want in enumerate(wanted) if want]
        return (dense_root(form, places, shapes, lam),)


def dense_root(form: Form, places: list[int], shapes: Shapes, like: Tensor) -> Parts:
    """R of a positive semidefinite form |M| = R^T R, by its eigenvectors.

    form    x' -> |M| x' on the inputs at `places`; shapes of all inputs
    like    a tensor of the dtype and device wanted
    """
    sizes = [torch.Size(shape).numel() for shape in shapes]
    columns = []
    for place in places:
        units = torch.eye(sizes[place], dtype=like.dtype, device=like.device)
        dz = [like.new_zeros(sizes[place], *shape) for shape in shapes]
        dz[place] = units.reshape(-1, *shapes[place])
        parts = form(tuple(dz), None)
        rows = [parts[other].reshape(sizes[place], -1) for other in places]
        columns.append(torch.cat(rows, 1))
    M = torch.cat(columns)
    values, vectors = torch.linalg.eigh((M + M.mT) / 2)
    rows = values.clamp_min(0).sqrt()[:, None] * vectors.mT
    root: list[Maybe] = [None] * len(shapes)
    for place, part in zip(places, rows.split([sizes[place] for place in places], 1)):
        root[place] = part.reshape(-1, *shapes[place])
    return tuple(root)
