"""What an activation is: one frozen record that kernels, layers, export, plots and tests all read.

A record joins a pointwise function (value and analytic slopes, plain torch) with its parameters and its
place in an MLP (gated or not). It is the reference, not the fast path. The one decision that surprises: a
parameter has two faces. Its *raw* number (`alpha_p`, any real) is what is stored and optimized; formulas
use the *effective* one (`a_p`), made by `effective`: the constraint holds by construction, and autograd
carries d effective / d raw.
"""

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

# by symbol: effective values (Python floats, or tensors with one element), and derivatives
Values = Mapping[str, Tensor | float]
Grads = dict[str, Tensor]


class Pointwise(Protocol):
    """A function of one variable with parameters, and its exact derivatives, in the dtype of x."""

    def value(self, x: Tensor, p: Values) -> Tensor: ...

    def slopes(self, x: Tensor, p: Values) -> tuple[Tensor, Grads]: ...


@dataclass(frozen=True)
class Parameter:
    """One scalar. effective = raw, or lower + softplus(raw) where `lower` is given; `init` is effective.

    `lower` may name another parameter, whose effective value is then the bound.
    """

    name: str
    symbol: str
    init: float
    lower: float | str | None = None
    trainable: bool = True


@dataclass(frozen=True)
class Activation:
    """See the module's docstring. Not to be built by users: `activations.get` checks what it is given.

    formula:   in effective symbols.
    gated:     the last dimension of the input holds [gate, up].
    hf:        transformers' ACT2FN name of the same function at init (of the gate's activation where gated).
    eps:       0, or the negative clamp of code that uses min(x, eps): it changes the value, not the slopes.
    clamped:   value with that clamp; None for records that have none.
    of_output: where y alone tells the slope, a record that is given y for x: it returns y, and that slope.
    """

    name: str
    formula: str
    source: str
    maths: Pointwise
    parameters: tuple[Parameter, ...] = ()
    aliases: tuple[str, ...] = ()
    gated: bool = False
    hf: str | None = None
    eps: float = 0.0
    clamped: Callable[[Tensor, Values, float], Tensor] | None = None
    of_output: "Activation | None" = None

    def __post_init__(self):
        """key: the record as a string, {"name": "xielu", "trainable": ["alpha_p", "alpha_n"], "eps": 0.0, "init":
        {"alpha_p": 0.8, ...}}. An attribute, since that is what torch.compile reads as a constant."""
        trainable, init = [q.name for q in self.trainable], {q.name: q.init for q in self.parameters}
        key = {"name": self.name, "trainable": trainable, "eps": self.eps, "init": init}
        object.__setattr__(self, "key", json.dumps(key))

    @property
    def trainable(self) -> tuple[Parameter, ...]:
        return tuple(q for q in self.parameters if q.trainable)

    def initial_raw(self) -> dict[str, float]:
        """Raw start value of every trainable parameter, by name: the exact inverse of `effective` in fp64."""
        raw = {}
        for q in self.trainable:
            lower = self._lower_init(q)
            v = q.init if lower is None else q.init - lower
            raw[q.name] = v if lower is None else v + math.log(-math.expm1(-v))
        return raw

    def effective(self, raw: Mapping[str, Tensor]) -> dict[str, Tensor | float]:
        """Raw tensors by name -> effective values by symbol, in fp32 or wider, differentiable.

        A parameter that is not trainable is its init, a Python float, and is not looked up in `raw`.
        A distance below half an ulp of the bound is lost: in fp32, a_n = b = 0.5 for alpha_n < -17 or so.
        """
        return {q.symbol: self._effective(q, raw) for q in self.parameters}

    def value(self, x: Tensor, p: Values) -> Tensor:
        """f(x), pointwise, computed in x's dtype. For gated records: the function of the gate alone."""
        if self.eps:
            assert self.clamped is not None
            return self.clamped(x, p, self.eps)
        return self.maths.value(x, _like(x, p))

    def slopes(self, x: Tensor, p: Values) -> tuple[Tensor, Grads]:
        """(df/dx, {symbol: df/dparameter} for every parameter, trainable or not), pointwise, in x's dtype."""
        return self.maths.slopes(x, _like(x, p))

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of y, for x of this shape."""
        if not self.gated:
            return tuple(shape)
        if not shape or shape[-1] % 2:
            raise ValueError(f"a gated activation splits the last dimension in two; got shape {tuple(shape)}")
        return *shape[:-1], shape[-1] // 2

    def forward(self, x: Tensor, p: Values) -> Tensor:
        """y in x's dtype. Ungated: value(x). Gated: [gate, up] = x [..., 2F] -> value(gate) * up [..., F].

        Computed in fp32 or wider and rounded once. With eps < 0 it is computed in x's own dtype, op by op:
        the only use of eps is bit parity with code that rounds after each op.
        """
        z = x if self.eps else _widen(x)
        gate, up = self._gate_up(z)
        y = self.value(gate, p)
        return (y if up is None else y * up).to(x.dtype)

    def backward(self, x: Tensor, p: Values, dy: Tensor) -> tuple[Tensor, Grads]:
        """(dx in x's dtype, {symbol: sum over elements, 0-dim, fp32 or wider} of *trainable* parameters).

        Analytic, and in fp32 or wider throughout. These are gradients of effective values; autograd through
        `effective` turns them into those of raw ones.
        """
        parts, sums = self.backward_in_parts(x, p, dy)
        return torch.cat(parts, dim=-1) if self.gated else parts[0], sums

    def backward_in_parts(self, x: Tensor, p: Values, dy: Tensor) -> tuple[tuple[Tensor, ...], Grads]:
        """As `backward`, with dx as what is joined along its last dimension: (dgate, dup), or (dx,) where not gated."""
        z = _widen(x)
        dy = dy.to(z.dtype)
        gate, up = self._gate_up(z)
        slope, partials = self.slopes(gate, p)
        dvalue = dy if up is None else dy * up
        parts = (dvalue * slope,) if up is None else (dvalue * slope, dy * self.value(gate, p))
        sums = {q.symbol: (dvalue * partials[q.symbol]).sum() for q in self.trainable}
        return tuple(part.to(x.dtype) for part in parts), sums

    def _gate_up(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the function is applied to, and what multiplies its value, if anything does."""
        if not self.gated:
            return x, None
        self.output_shape(x.shape)  # refuses an odd one
        return x.chunk(2, dim=-1)

    def configured(
        self, *, trainable: Iterable[str] | None = None, eps: float = 0.0, init: Mapping[str, float]
    ) -> "Activation":
        """A copy with these effective start values, this full set of trained parameters and this eps.

        Raises ValueError, one line, for a name or a value that this activation cannot have.
        """
        if isinstance(trainable, str):
            raise ValueError(f"{self.name}: trainable = {trainable!r} must be a list of parameter names")
        learned = tuple(trainable) if trainable is not None else tuple(q.name for q in self.trainable)
        for name in (*init, *learned):
            self._parameter(name)
        for name, value in init.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{self.name}: {name} = {value!r} must be a finite number")
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not -1.0 <= eps <= 0.0:
            raise ValueError(f"{self.name}: eps = {eps!r} must be 0 (off) or a small negative number like -1e-6")
        if eps and self.clamped is None:
            raise ValueError(f"{self.name}: eps = {eps} has no meaning here; leave it out (xielu has one)")
        record = replace(
            self,
            eps=float(eps),
            parameters=tuple(
                replace(q, init=float(init.get(q.name, q.init)), trainable=q.name in learned) for q in self.parameters
            ),
        )
        for q in record.parameters:
            lower = record._lower_init(q)
            if lower is not None and not q.init > lower:
                bound = f"{q.lower} = {lower}" if isinstance(q.lower, str) else f"{lower}"
                raise ValueError(f"{self.name}: {q.name} = {q.init} must be greater than {bound}")
        return record

    def _parameter(self, name: str) -> Parameter:
        for q in self.parameters:
            if q.name == name:
                return q
        known = [q.name for q in self.parameters]
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{self.name} has no parameter {name!r}, only: {', '.join(known) or 'none'}{hint}")

    def _lower_init(self, q: Parameter) -> float | None:
        return self._parameter(q.lower).init if isinstance(q.lower, str) else q.lower

    def _effective(self, q: Parameter, raw: Mapping[str, Tensor]) -> Tensor | float:
        if not q.trainable:
            return q.init
        value = _widen(raw[q.name])
        if q.lower is None:
            return value
        lower = self._effective(self._parameter(q.lower), raw) if isinstance(q.lower, str) else q.lower
        # torch's default threshold of 20 drops log1p(exp(-raw)) where fp64 still sees it
        return lower + torch.nn.functional.softplus(value, threshold=40.0)


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _like(x: Tensor, p: Values) -> Values:
    """Tensors as 0-dim ones of x's dtype: (1,) would reshape a 0-dim x, and fp32 would promote bf16."""
    return {s: v.to(x.dtype).reshape(()) if isinstance(v, Tensor) else v for s, v in p.items()}
