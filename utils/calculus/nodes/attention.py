"""Attention as one map (Q, K, V) -> softmax(scale Q K^T) V, seen from the product of its rows and
values.

The chain has it as scores, mask, softmax and mixing; products of their norms are far above the norm
of the whole, because softmax ignores what moves all keys together and a row is a probability.
Source: Lemma 5 (lem:bilinear), Lemma (lem:covariance), Corollary (cor:ball).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.calculus.jets import Jet
from utils.calculus.lemmas import (
    SOFTMAX_FIRST,
    Number,
    centred,
    covariances,
    hypot,
    least,
    mixing,
    softmax_moved,
    softmax_second,
    spectral,
)
from utils.calculus.nodes.base import Maybe
from utils.calculus.nodes.bilinear import same_group
from utils.calculus.nodes.known import Known, Situation
from utils.calculus.nodes.linear import Linear
from utils.calculus.nodes.products import Matmul
from utils.calculus.nodes.rows import Softmax
from utils.calculus.nodes.shape import Combination, Expand, Mask, Permute, Reshape, Select

HIDDEN = -1e30  # of a masked key: its weight is 0 beside every score above a tenth of this


@dataclass(frozen=True)
class Heads:
    """What is known of queries, keys or values, matrices (rows, d_h) of every head, on the ball.

    jet, moved  of all heads together, as in `Known`; of keys with their mean over the rows taken
                off, which softmax ignores
    matrix      >= the norm of every head's matrix, `middle` with the mean of its rows taken off
    row         >= the longest row; `spread` as in `Known`
    choice      >= the length of one row of each head together, whichever rows they are
    value       (n, H, rows, d_h) at the centre, or None
    """

    jet: Jet
    moved: Number
    matrix: Number
    middle: Number
    row: Number
    spread: Number
    choice: Number
    value: Maybe


def attention(A: Known, V: Known, at: Situation) -> Known | None:
    """What is known of A V where A are the rows of attention; None where they are not.

    A, V  of the rows and the values
    at    the walk, as in `Node.norms`
    """
    scores = _scores(A)
    if scores is None or A.shape[:-2] != V.shape[:-2]:
        return None
    Q, K, scale = scores
    if Q.shape[:-2] != K.shape[:-2] or math.prod(Q.shape[:-2]) != math.prod(A.shape[:-2]):
        return None
    queries = _heads(Q, at)
    keys = _heads(K, at, turned=True)
    values = _heads(V, at)
    count = math.prod(A.shape[:-2]), A.shape[-2]
    if any(h.value is None for h in (queries, keys, values)) or A.value is None:
        norms = _from_sizes(queries, keys, values, count[1])
        norms = {name: at.number(name, value) for name, value in norms.items()}
        moved = math.inf
        by, pairs = mixing(norms, scale)
    else:
        norms, moved = _from_values(A, queries, keys, values, scale, at)
        by, pairs = mixing(norms, scale)
        of_keys = by[0] * queries.moved + by[1] * keys.moved
        moved = by[2] * values.moved + least(moved, of_keys)
    jet = Jet.of([queries.jet, keys.jet, values.jet], list(by), pairs)
    full = math.sqrt(count[1]) * values.choice
    return Known(jet, moved=moved, full=full, row=values.row)


def _scores(A: Known) -> tuple[Known, Known, float] | None:
    """(Q, K^T, scale) of rows softmax(scale Q K^T + what does not move), masked or not.

    A masked key must have no weight: with one it would not be a product of a query and a key.
    """
    if not isinstance(A.node, Softmax) or A.node.axis % (len(A.shape) + 1) != len(A.shape):
        return None
    scale = 1.0
    hidden = -math.inf
    T = A.inputs[0]
    while not isinstance(T.node, Matmul):
        moving = [i for i, x in enumerate(T.inputs) if x.jet.moves]
        if len(moving) != 1 or not isinstance(T.node, Combination | Mask | Reshape):
            return None
        if isinstance(T.node, Mask):
            hidden = max(hidden, T.node.value)
        if isinstance(T.node, Combination):
            scale = scale * T.node.factors[moving[0]]
        x = T.inputs[moving[0]]
        if x.shape[-2:] != T.shape[-2:] or math.prod(x.shape) != math.prod(T.shape):
            return None
        T = x
    Q, K = T.inputs
    if hidden > -math.inf:
        largest = float(torch.as_tensor(scale * Q.full * K.full).max())
        if not (hidden <= HIDDEN and largest <= -HIDDEN / 10):
            return None
    return (Q, K, scale) if scale > 0 else None


# --- queries, keys and values ---------------------------------------------------------------------


def _heads(z: Known, at: Situation, turned: bool = False) -> Heads:
    """`turned`: keys, (..., d_h, rows), whose mean over the rows does not matter."""
    value = z.value
    if value is not None:
        value = value.mT if turned else value
        value = value.reshape(len(value), -1, *value.shape[-2:])
    projected = _projected(z, turned)
    if projected is not None:
        return _of_projection(*projected, value, turned, at)
    heads = math.prod(z.shape[:-2])
    if turned:
        return Heads(z.jet, z.moved, z.full, z.full, z.full, z.full, z.full, value)
    choice = math.sqrt(heads) * z.row
    return Heads(z.jet, z.moved, z.full, z.full, z.row, z.spread, choice, value)


def _projected(z: Known, turned: bool) -> tuple[Known, Tensor, float] | None:
    """(the output of a linear map, the channels (H, d_h) of every head, a factor), if views,
    selections and a factor are all that lies between and every row of a head is one of its rows.

    The same views applied to the numbers of the entries tell which entry has come where.
    """
    views = []
    factor = 1.0
    while not isinstance(z.node, Linear):
        if isinstance(z.node, Reshape | Permute | Select | Expand):
            views.append(z.node)
        elif isinstance(z.node, Combination) and len(z.inputs) == 1:
            factor = factor * z.node.factors[0]
        else:
            return None
        z = z.inputs[0]
    entries = torch.arange(math.prod(z.shape)).reshape(1, *z.shape)
    for view in reversed(views):
        entries = view.apply(entries)
    entries = entries.mT if turned else entries
    entries = entries[0].reshape(-1, *entries.shape[-2:])
    rows = entries // z.shape[-1]
    channels = entries % z.shape[-1]
    each_row_once = torch.equal(rows[0, :, 0].sort().values, torch.arange(z.rows))
    same_rows = torch.equal(rows, rows[:1, :, :1].expand_as(rows))
    same_channels = torch.equal(channels, channels[:, :1].expand_as(channels))
    channels = channels[:, 0]
    once = len(channels.unique()) == channels.numel()
    weights_known = z.inputs[1].value is not None and not z.inputs[1].data
    if not (each_row_once and same_rows and same_channels and once and weights_known):
        return None
    return z, channels, factor


def _of_projection(
    z: Known, channels: Tensor, factor: float, value: Tensor | None, turned: bool, at: Situation
) -> Heads:
    """Heads of the channels of [X 1] [W b]^T, times a factor."""
    X, W, *bias = z.inputs
    factor = abs(factor)
    weights = z.node.matrix(W)[0][channels.to(W.value.device)]  # (H, d_h, in)
    whole = spectral(weights.flatten(0, 1)) + W.moved
    plain = spectral(weights).amax() + W.moved
    both = weights
    R = W.moved
    if bias:
        b = bias[0].value.reshape(-1)[channels.to(W.value.device)]
        both = torch.cat([weights, b[..., None]], 2)
        one_group = same_group(W, bias)
        R = W.moved if one_group else math.hypot(W.moved, bias[0].moved)
    each = spectral(both)
    ones = bool(bias)
    if turned:
        reads = at.number("X_centred", X.norm(centre=True))
        still = least(X.at_centre(centre=True), reads)
    else:
        reads = X.norm(ones=ones)
        still = least(X.at_centre(ones=ones), reads)
    jet = X.jet.times(W.jet, reads, whole)
    moved = still * R + whole * X.moved
    if bias and not turned and not same_group(W, bias):
        jet = jet + bias[0].jet.linear(math.sqrt(X.rows))
    row = hypot(X.row, 1.0) if bias else X.row
    sizes = {
        "matrix": (each.amax() + R) * X.norm(ones=ones),
        "middle": plain * X.norm(centre=True),
        "row": (each.amax() + R) * row,
        "spread": plain * X.spread,
        "choice": (each.norm() + R) * row,
    }
    sizes = {name: factor * size for name, size in sizes.items()}
    jet = jet.linear(factor)
    moved = least(factor * moved, at.radius * jet.a.norm(dim=-1))
    return Heads(jet, moved, value=value, **sizes)


# --- norms of the whole ---------------------------------------------------------------------------


def _from_sizes(Q: Heads, K: Heads, V: Heads, rows: int) -> dict[str, Number]:
    """The norms that `mixing` wants, from those of the weights and what is read."""
    return {
        "Q": Q.matrix,
        "K": K.middle,
        "V": V.middle,
        "A": math.sqrt(rows),
        "columns": rows,
        "q": Q.row,
        "sigma_K": K.spread,
        "sigma_V": V.spread,
        "covariance": K.spread * V.spread,
        "reach": 2 * V.spread,
        "softmax1": SOFTMAX_FIRST,
        "softmax2": softmax_second(torch.as_tensor(SOFTMAX_FIRST, dtype=torch.float64)),
    }


def _from_values(
    A: Known, Q: Heads, K: Heads, V: Heads, scale: float, at: Situation
) -> tuple[dict[str, Number], Tensor]:
    """The same at the example's own values, and how far the rows' change moves the output."""
    limits = _from_sizes(Q, K, V, A.shape[-2])
    rows = A.value.reshape(len(A.value), -1, *A.shape[-2:])

    def ball(name: str, value: Tensor) -> Tensor:
        return at.number(name, least(value, limits[name]))

    queries = spectral(Q.value).amax(1)
    keys = spectral(centred(K.value)).amax(1)
    values = spectral(centred(V.value)).amax(1)
    of_Q = ball("Q", queries + Q.moved)
    of_T = scale * (of_Q * K.moved + keys * Q.moved)
    first = ball("softmax1", softmax_moved(A.notes["first"], of_T))
    of_A = least(first * of_T, math.sqrt(2 * rows.shape[1] * rows.shape[2]))
    sigma_K, sigma_V, covariance = covariances(rows, K.value, V.value)
    mixed = rows @ V.value
    far = torch.cdist(mixed, V.value, compute_mode="donot_use_mm_for_euclid_dist").amax((1, 2, 3))
    reach = ball("reach", far + 2 * V.moved + values * of_A)
    stretch = (of_T / math.sqrt(2)).exp()  # of a standard deviation, by the rows' change alone
    spread_K = ball("sigma_K", (sigma_K * stretch).nan_to_num(nan=math.inf) + K.moved)
    spread_V = ball("sigma_V", (sigma_V * stretch).nan_to_num(nan=math.inf) + V.moved)
    drift = V.moved * spread_K + spread_V * K.moved + reach * spread_K * of_T / math.sqrt(2)
    columns = rows.sum(-2).amax((1, 2)) + math.sqrt(rows.shape[2]) * of_A
    norms = {
        "Q": of_Q,
        "K": ball("K", keys + K.moved),
        "V": ball("V", values + V.moved),
        "A": ball("A", spectral(rows).amax(1) + of_A),
        "columns": ball("columns", columns),
        "q": ball("q", Q.value.norm(dim=-1).amax((1, 2)) + Q.moved),
        "sigma_K": spread_K,
        "sigma_V": spread_V,
        "covariance": ball("covariance", least(covariance + drift, spread_K * spread_V)),
        "reach": reach,
        "softmax1": first,
        "softmax2": at.number("softmax2", softmax_second(first)),
    }
    return norms, values * of_A
