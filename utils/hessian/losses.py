"""The losses of a batch as functions of the weights: values, gradients, Hessian products.

Every function works on a copy of the model (eval mode, float64 unless said otherwise, attention by
its mathematical kernel) and leaves the model handed in as it was. Flat vectors of length P follow
`named_parameters`, frozen ones included: the surface is a function of all weights, and
`parameters` restricts them. Products are walks over the network's chain of nodes
(`utils.calculus`) where it is known, else automatic differentiation: `Losses.engine` says which.

L_k is the mean loss of k examples, H_k its Hessian, h_i the Hessian of example i alone. A Hessian
splits into the Gauss-Newton part J^T S J, with J the Jacobian of the logits and S the loss's
Hessian in them, and the functional part, the rest: part "full", "gauss_newton" or "functional".
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from utils.calculus import Chain, Tape, read_chain
from utils.calculus.chain import forget
from utils.calculus.checks import check_chain
from utils.hessian.coordinates import Coordinates, Operator
from utils.hessian.differentiation import Differentiation, check_part
from utils.networks.contract import admit
from utils.networks.copies import second_order_mode
from utils.networks.memory import KEPT, MEMORY, WALK, activation_numbers


class Losses(Coordinates):
    """The losses of a batch as functions of a flat weight vector.

    model       the network; a copy is taken
    x, y        inputs (n, ...) and labels (n,), arrays of torch or numpy
    loss        "cross_entropy", "mse" or "bce" [nat, or squared difference]
    parameters  names or patterns of the coordinates that move (`select_parameters`)
    dtype       of the computation
    device      of the computation, the model's if None
    chunk_size  examples at once; by default as many as `memory` has room for
    memory      budget of the working arrays [bytes]

    Raises ValueError for patterns that match nothing, and what `admit` refuses.

    >>> model = torch.nn.Linear(2, 3)
    >>> losses = Losses(model, torch.ones(4, 2), [0, 1, 2, 0], parameters=["weight"])
    >>> losses.n, losses.P, losses.gradient().shape
    (4, 6, torch.Size([6]))
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        loss: str = "cross_entropy",
        *,
        parameters: list[str] | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
        chunk_size: int | None = None,
        memory: int = MEMORY,
    ):
        admitted = admit(model, x, y, loss, dtype=dtype, device=device, memory=memory)
        self.model, self.x, self.y = admitted
        self.loss = loss
        self.chunk_size = chunk_size
        self.memory = memory
        self.n = len(self.x)
        for p in self.model.parameters():
            p.requires_grad_(False)  # derivatives are of a point put in the parameters' place
        self._size: int | None = None
        self._automatic = Differentiation(self.model, loss)
        self.move(dict(self.model.named_parameters()), parameters)
        self.chain: Chain | None = None
        self.untraced = ""
        self._read_chain()

    def moving(self, parameters: list[str] | None) -> Losses:
        """The same losses as functions of other coordinates: those that `parameters` mean."""
        self._activations()  # counted once for all
        other = copy.copy(self)
        other.move(dict(self.model.named_parameters()), parameters)
        return other

    # --- the network's chain of nodes: all that is asked of utils.calculus ------------------------

    def _read_chain(self) -> None:
        """Set `chain`, or, where the network has none, `untraced`, the reason in one sentence."""
        try:
            self.chain = read_chain(self.model, self.x)
            few = self._rows(None)[:8]
            tape = self._tape(dict(self.model.named_parameters()), few)
            point = dict(self.model.named_parameters())
            ones = self.w.new_ones(len(few))
            gradient = self._automatic.gradient(point, self.x[few], self.y[few], ones)[1]
            check_chain(tape, self._automatic.logits({}, self.x[few]), gradient)
        except torch.OutOfMemoryError:
            raise
        except Exception as reason:  # of any kind, from an operator that cannot run like this
            if self.chain is not None:
                forget(self.chain)
            self.chain = None  # an operator that vmap has no rule for raises RuntimeError
            self.untraced = str(reason).splitlines()[0]

    def _tape(self, point: dict, rows: Tensor, weights: Tensor | None = None) -> Tape:
        """One pass over `rows`; with `weights`, all that is computed is a sum over them."""
        assert self.chain is not None  # who has none does not ask
        values = self.rest | point | dict(self.model.named_buffers())
        sums = weights is not None
        with torch.no_grad():
            x, y = self.x[rows], self.y[rows]
            return Tape(self.chain, values, x, y, self.loss, point, sums, weights)

    @property
    def engine(self) -> str:
        """What products come from: "chain", or the engine of `Differentiation` that works here."""
        if self.chain is not None:
            return "chain"
        automatic = self._automatic
        return automatic.engine or automatic.choose(self.point, self.x[:2], self.y[:2])

    def _rows(self, rows: Tensor | None) -> Tensor:
        if rows is None:
            return torch.arange(self.n, device=self.x.device)
        return torch.as_tensor(rows).to(self.x.device)

    def _at(self, w: Tensor | None) -> dict[str, Tensor]:
        return self.point if w is None else self.unflatten(torch.as_tensor(w))

    # --- memory -----------------------------------------------------------------------------------

    def chunk(self, vectors: int, most: int = 64) -> int:
        """Examples that fit the budget when each needs `vectors` arrays of length P.

        Its activations come on top. On a CPU not more than `most`, which stay near its caches; a
        GPU waits for kernels to start, however small.
        """
        if self.chunk_size is not None:
            return self.chunk_size
        each = self.w.element_size() * (vectors * self.P + WALK * self._activations())
        limit = most if self.w.device.type == "cpu" else self.n
        return max(1, min(limit, self.memory // each))

    def _activations(self) -> int:
        if self._size is None:
            self._size = activation_numbers(self.model, self.x[:1])
        return self._size

    # --- values, gradients, products --------------------------------------------------------------

    def values(self, w: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """Losses (m,) of the examples `rows` (all if None) at weights w (P,) (the model's own)."""
        point = self._at(w)
        chunks = self._rows(rows).split(self.chunk(0, 256))
        with torch.no_grad(), second_order_mode():
            parts = [self._automatic.losses(point, self.x[r], self.y[r]) for r in chunks]
        return torch.cat(parts)

    def value_and_gradient(
        self, w: Tensor | None = None, rows: Tensor | None = None, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean loss over `rows` at w, and its gradient (P,); with `weights` (m,) the sum."""
        rows = self._rows(rows)
        if weights is None:
            weights = self.w.new_full((len(rows),), 1 / len(rows))
        weights = torch.as_tensor(weights).to(self.w)
        point = {n: t.detach() for n, t in self._at(w).items()}
        size = self.chunk(0, 128)
        value, gradient = 0.0, torch.zeros_like(self.w)
        for r, c in zip(rows.split(size), weights.split(size), strict=True):
            if self.chain is not None:
                tape = self._tape(point, r, c)
                batch, found = tape.losses @ c, tape.gradient()
            else:
                batch, found = self._automatic.gradient(point, self.x[r], self.y[r], c)
            with torch.no_grad():
                value = value + batch.double()
                gradient += self.flatten(found)
        return value, gradient

    def gradient(self, w: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """Gradient (P,) at w of the mean loss over `rows`."""
        return self.value_and_gradient(w, rows)[1]

    def sample_gradients(self, w: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """Gradients (m, P) at w of the examples in `rows`."""
        point = self._at(w)
        parts = []
        for r in self._rows(rows).split(self.chunk(3)):
            if self.engine == "chain":
                found = self._tape(point, r).gradient()
            else:
                found = self._automatic.example_gradients(point, self.x[r], self.y[r])
            parts.append(self.flatten(found, (len(r),)))
        return torch.cat(parts)

    def hessian(
        self,
        w: Tensor | None = None,
        rows: Tensor | None = None,
        part: str = "full",
        weights: Tensor | None = None,
    ) -> Operator:
        """The map v (P,) -> H v (P,), H the Hessian at w of the mean loss over `rows`, or a `part`.

        With `weights` (m,), H is that of the weighted sum of their losses. A call costs about two
        gradients; what calls share is kept between them while it fits the memory budget.
        """
        check_part(part)
        rows = self._rows(rows)
        count = len(rows) if weights is None else 1
        if weights is None:
            weights = self.w.new_ones(len(rows))
        weights = torch.as_tensor(weights).to(self.w)
        size = self.chunk(0, 64 if self.engine == "chain" else 256)
        pairs = list(zip(rows.split(size), weights.split(size), strict=True))
        point = self._at(w)
        of_chunk = self._by_chain if self.engine == "chain" else self._by_differentiation
        product = of_chunk(point, pairs, part)
        return lambda v: product(torch.as_tensor(v)) / count

    def _by_chain(self, point: dict, pairs: list, part: str) -> Operator:
        kept = len(pairs[0][0]) * KEPT * self._activations() * self.w.element_size()
        room = max(1, self.memory // (kept + 1))
        tapes = [self._tape(point, r, c) for r, c in pairs[:room]]

        def product(v: Tensor) -> Tensor:
            total = torch.zeros_like(v)
            with torch.no_grad():
                direction = self.unflatten(v)
                for i, (r, c) in enumerate(pairs):
                    tape = tapes[i] if i < len(tapes) else self._tape(point, r, c)
                    total += self.flatten(tape.product(direction, part))
            return total

        return product

    def _by_differentiation(self, point: dict, pairs: list, part: str) -> Operator:
        def product(v: Tensor) -> Tensor:
            direction = self.unflatten(v)
            found = (
                self._automatic.product(point, direction, self.x[r], self.y[r], part, c)
                for r, c in pairs
            )
            return sum(map(self.flatten, found))

        return product

    def product(
        self,
        v: Tensor,
        w: Tensor | None = None,
        rows: Tensor | None = None,
        part: str = "full",
    ) -> Tensor:
        """H v (P,) at w of the mean loss over `rows`, or a `part` of it; for more than one v take
        `hessian`."""
        return self.hessian(w, rows, part)(v)

    def dense(self, part: str = "full") -> Tensor:
        """The Hessian (P, P), or a `part` of it, of the mean loss, by products with the unit
        vectors."""
        check_part(part)
        units = torch.eye(self.P, dtype=self.w.dtype, device=self.w.device)
        together = self.chunk(4) // self.n
        if together < 2 or self.engine == "loop over examples":
            H = self.hessian(part=part)
            return torch.stack([H(e) for e in units])
        everyone = self._rows(None)
        rows = []
        for some in units.split(together):
            directions = some.repeat_interleave(self.n, dim=0)
            found = self.sample_products(directions, everyone.repeat(len(some)), part)
            rows.append(found.view(len(some), self.n, self.P).mean(1))
        return torch.cat(rows)

    def sample_products(self, v: Tensor, rows: Tensor | None = None, part: str = "full") -> Tensor:
        """h_i v_i (m, P), or a `part` of it, for the examples in `rows`, each with its own vector
        v (m, P)."""
        size = self.chunk(4)
        pairs = zip(self._rows(rows).split(size), torch.as_tensor(v).split(size), strict=True)
        return torch.cat([SampleHessians(self, r, part)(u) for r, u in pairs])


class SampleHessians:
    """The Hessians h_i of some examples as one map, each on a vector of its own.

    losses  where they come from
    rows    their indices (m,)
    part    "full", "gauss_newton" or "functional"

    What products share is kept while the examples stay.

    >>> losses = Losses(torch.nn.Linear(2, 3), torch.ones(4, 2), [0, 1, 2, 0])
    >>> SampleHessians(losses, torch.tensor([0, 3]))(losses.w.new_ones(2, 9)).shape
    torch.Size([2, 9])
    """

    def __init__(self, losses: Losses, rows: Tensor, part: str = "full"):
        check_part(part)
        self.losses = losses
        self.rows = rows.to(losses.w.device)
        self.part = part
        self.here: Tensor | None = None
        self.tape: Tape | None = None

    def _everyone(self) -> Tensor:
        return torch.arange(len(self.rows), device=self.rows.device)

    def _tape_of(self, local: Tensor) -> Tape:
        if self.tape is None or not torch.equal(self.here, local):
            self.here = local
            self.tape = self.losses._tape(self.losses.point, self.rows[local])
        return self.tape

    def gradients(self) -> Tensor:
        """Gradients (m, P) of the examples."""
        if self.losses.chain is None:
            return self.losses.sample_gradients(rows=self.rows)
        with torch.no_grad():
            tape = self._tape_of(self._everyone())
            return self.losses.flatten(tape.gradient(), (len(self.rows),))

    def __call__(self, V: Tensor, local: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """h_i V_j (m, P), i = rows[local[j]] (all in order if None), into `out` if given."""
        losses = self.losses
        local = torch.arange(len(V), device=V.device) if local is None else local
        out = torch.empty_like(V) if out is None else out
        directions = losses.unflatten(V)
        if losses.engine != "chain":
            rows = self.rows[local]
            x, y = losses.x[rows], losses.y[rows]
            found = losses._automatic.example_products(losses.point, directions, x, y, self.part)
            return losses.flatten(found, (len(V),), out)
        with torch.no_grad():
            self._tape_of(local).product(directions, self.part, losses.unflatten(out))
        return out
