"""L(N, D) = E + A N^-alpha + B D^-beta, fitted to the logarithm of losses with a Huber loss: values and derivatives.

Parameters are phi = (a, b, e, alpha, beta) with a = ln A, b = ln B, e = ln E for N and D in units of their geometric
means, so that ln L = logsumexp(a - alpha n, b - beta d, e); the *tied* form has one exponent, phi = (a, b, e, alpha).
The objective is the **sum** of Huber(residual of ln L, 1e-3) / 1e-6: with a mean, or unscaled, the tolerances of common
optimisers stop at plausible nonsense.

Shapes: B = problems, n = runs, p = parameters of the form (5 or 4).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DELTA = 1e-3  # Hoffmann et al., arXiv:2203.15556: the Huber loss is quadratic below this residual of ln L
FORMS = ("free", "tied")
PARAMETERS = {"free": 5, "tied": 4}
MULTIPLIER = (
    "A compute multiplier m says L_other(N, D) = L_baseline(m^a N, m^(1-a) D), with a = beta / (alpha + beta) of the "
    "law fitted to the runs of both: the baseline reaches the other's loss with m times the compute 6 N D, spent on N "
    "and D in the proportion of the compute-optimal frontier"
)


@dataclass(frozen=True)
class Law:
    """Fitted laws in the units of N and D. Fields are scalars, or arrays [B] for many laws at once."""

    E: Array
    log_A: Array
    log_B: Array
    alpha: Array
    beta: Array

    def reducible(self, N: Array, D: Array) -> Array:
        """L - E at each (N, D): [n], or [B, n] for many laws."""
        column = [np.asarray(v)[..., None] for v in (self.log_A, self.alpha, self.log_B, self.beta)]
        return np.exp(column[0] - column[1] * np.log(N)) + np.exp(column[2] - column[3] * np.log(D))

    def loss(self, N: Array, D: Array) -> Array:
        return np.asarray(self.E)[..., None] + self.reducible(N, D)

    @property
    def a_opt(self) -> Array:
        """Exponent of compute in the compute-optimal N."""
        return self.beta / (self.alpha + self.beta)

    @property
    def gamma(self) -> Array:
        """Exponent of the frontier: L - E falls as compute^-gamma when N and D grow in optimal proportion."""
        return self.alpha * self.beta / (self.alpha + self.beta)

    def optimal(self, flops: float) -> tuple[Array, Array]:
        """Compute-optimal (N, D) for a budget of 6 N D FLOPs."""
        log_G = (np.log(self.alpha) + self.log_A - np.log(self.beta) - self.log_B) / (self.alpha + self.beta)
        log_ND = np.log(flops / 6)
        log_N = np.clip(log_G + self.a_opt * log_ND, -600, 600)  # exponents near 0 have it anywhere: no overflow
        return np.exp(log_N), np.exp(log_ND - log_N)

    def __getitem__(self, index) -> Law:
        return Law(*(np.asarray(v)[index] for v in (self.E, self.log_A, self.log_B, self.alpha, self.beta)))


@dataclass(frozen=True)
class Problem:
    """Runs to fit and the form of the law. `n`, `d`: ln N and ln D about their means; `y`: ln L."""

    form: str
    n: Array
    d: Array
    y: Array
    centre: tuple[float, float]

    @classmethod
    def of(cls, N: Array, D: Array, L: Array, form: str = "free") -> Problem:
        log_N, log_D = np.log(N), np.log(D)
        centre = float(log_N.mean()), float(log_D.mean())
        return cls(form, log_N - centre[0], log_D - centre[1], np.log(L), centre)

    def law(self, phi: Array) -> Law:
        """phi [..., p] in the units of N and D."""
        a, b, e, alpha, beta = (phi[..., i] for i in (0, 1, 2, 3, -1))
        return Law(np.exp(e), a + alpha * self.centre[0], b + beta * self.centre[1], alpha, beta)

    def phi(self, law: Law) -> Array:
        """The inverse of `law`; of the tied form, alpha counts."""
        a, b = law.log_A - law.alpha * self.centre[0], law.log_B - law.beta * self.centre[1]
        values = (a, b, np.log(law.E), law.alpha, law.beta)
        return np.stack(values[: PARAMETERS[self.form]], axis=-1)

    @property
    def terms(self) -> Array:
        """[n, 3, p]: the three logarithms in the log-sum-exp are linear, terms @ phi."""
        terms = np.zeros((len(self.y), 3, PARAMETERS[self.form]))
        terms[:, range(3), range(3)] = 1.0
        terms[:, 0, 3], terms[:, 1, -1] = -self.n, -self.d
        return terms


def information(n: Array, d: Array, form: str) -> Array:
    """Columns of norm 1 [n, p] that the runs must tell apart, or the law's terms cannot be. n, d: ln N and ln D about
    their means.

    To second order the law is a polynomial in ln N and ln D: with 1, n, d, n^2, d^2 in the free form, and with
    n^2 + d^2 in the tied one.
    """
    columns = np.stack([np.ones_like(n), n, d, *([n**2, d**2] if form == "free" else [n**2 + d**2])], axis=1)
    return columns / np.maximum(np.linalg.norm(columns, axis=0), 1e-12)


def identifiable(N: Array, D: Array, form: str) -> bool:
    """Can these (N, D) determine the law? A singular value below 1 % counts as none: budgets that repeat one ratio D/N
    up to rounding do not separate N from D.
    """
    columns = information(np.log(N) - np.log(N).mean(), np.log(D) - np.log(D).mean(), form)
    return len(N) > columns.shape[1] and bool(np.linalg.svd(columns, compute_uv=False)[-1] > 0.01)


# -- objective --------------------------------------------------------------------------------------------------------


def residuals(phi: Array, terms: Array, y: Array) -> tuple[Array, Array]:
    """Predicted minus measured ln L [B, n], and the share of each of the three terms in the loss [B, n, 3]."""
    logs = (phi @ terms.reshape(-1, phi.shape[1]).T).reshape(len(phi), -1, 3)
    top = logs.max(-1, keepdims=True)
    parts = np.exp(logs - top)
    total = parts.sum(-1, keepdims=True)
    return (top + np.log(total))[..., 0] - y, parts / total


def huber(r: Array, weights: Array | None = None) -> Array:
    """Sum over runs of Huber(r) / DELTA^2, [B]."""
    z = np.abs(r) / DELTA
    h = np.where(z <= 1, 0.5 * z * z, z - 0.5)
    return (h if weights is None else weights * h).sum(-1)


def objective(phi: Array, terms: Array, y: Array, weights: Array | None = None) -> Array:
    """[B] for phi [B, p], y [n] or [B, n], weights [B, n] (how often each run counts)."""
    return huber(residuals(phi, terms, y)[0], weights)


def derivatives(phi: Array, terms: Array, y: Array, weights: Array | None = None) -> tuple[Array, Array, Array]:
    """Objective [B], gradient [B, p] and Hessian [B, p, p], analytic."""
    r, shares = residuals(phi, terms, y)
    p = phi.shape[1]
    slope = np.clip(r / DELTA, -1, 1) / DELTA
    curvature = (np.abs(r) <= DELTA) / DELTA**2 - slope
    if weights is not None:
        slope, curvature = slope * weights, curvature * weights
    jacobian = np.einsum("bik,ikp->bip", shares, terms)
    gradient = (slope[:, None, :] @ jacobian)[:, 0]
    squares = np.einsum("ikp,ikq->ikpq", terms, terms).reshape(-1, p * p)
    hessian = ((shares * slope[..., None]).reshape(len(phi), -1) @ squares).reshape(-1, p, p)
    hessian += (jacobian * curvature[..., None]).transpose(0, 2, 1) @ jacobian
    return huber(r, weights), gradient, hessian
