"""The minimiser of the law's objective, for many problems at once, and where it starts.

Instead of L-BFGS on one problem, `minimise` runs Newton's method on many (a thousand bootstraps, 4500 starts): exact
Hessians of 5 x 5 are cheap in numpy. What would surprise: every iteration tries two steps and takes the better. E, A,
alpha trade off along a curved valley, in which a Newton step in phi crawls; in the coordinates (loss at the centre, ln
of its slope in ln N, ln of its slope in ln D, alpha, beta) the valley is nearly straight.

Shapes: B = problems, n = runs, p = parameters of the form (5 or 4).
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_xact.studies.bars import bar
from megatron_xact.studies.law import Array, Law, Problem, derivatives, objective

EXPONENTS = (1e-3, 10.0)  # bounds of the exponents
CHUNK = 125  # problems per thread at a time; fixed, so that results do not depend on the number of threads


@dataclass(frozen=True)
class Optima:
    """Of B problems. `decrement`: g' |H|^-1 g, about twice what a further step could still gain; no units matter."""

    phi: Array
    objective: Array
    gradient: Array  # largest component
    decrement: Array

    @property
    def best(self) -> int:
        return int(np.argmin(self.objective))


def minimise(
    start: Array, problem: Problem, y: Array | None = None, weights: Array | None = None, *, hold_E: bool = False,
    steps: int = 300, workers: int | None = None, shown: str = "",
) -> Optima:  # fmt: skip
    """From B starts [B, p]; y [B, n] replaces the problem's targets, weights [B, n] its runs; hold_E keeps e fixed.

    shown: what a progress bar says; empty: none.
    """
    if y is None:
        y = problem.y
    y = np.broadcast_to(y, (len(start), len(problem.y)))
    terms = problem.terms
    chunks = [slice(i, i + CHUNK) for i in range(0, len(start), CHUNK)]

    def solve(chunk: slice) -> Optima:
        w = None if weights is None else weights[chunk]
        return _minimise(start[chunk], terms, y[chunk], w, hold_E, steps)

    if len(chunks) == 1:
        return solve(chunks[0])
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:  # numpy lets go of the GIL
        parts = pool.map(solve, chunks)
        found = list(bar(parts, shown, len(chunks)) if shown else parts)
    fields = ("phi", "objective", "gradient", "decrement")
    return Optima(*(np.concatenate([getattr(f, name) for f in found]) for name in fields))


def _minimise(start: Array, terms: Array, y: Array, weights: Array | None, hold_E: bool, steps: int) -> Optima:
    phi = start.copy()
    phi[:, 3:] = np.clip(phi[:, 3:], *EXPONENTS)
    B = len(phi)
    damping = np.ones((2, B))  # of the step in phi, and of that in slopes
    value, gradient_max, decrement = np.empty(B), np.full(B, np.inf), np.full(B, np.inf)
    live = np.arange(B)
    for _ in range(steps):
        x, y_live, w = phi[live], y[live], None if weights is None else weights[live]
        f, g, H = derivatives(x, terms, y_live, w)
        if hold_E:
            g[:, 2] = 0.0
            H[:, 2, :] = H[:, :, 2] = 0.0
            H[:, 2, 2] = 1.0
        step, gain = _newton(g, H, damping[0, live])
        value[live], gradient_max[live], decrement[live] = f, np.abs(g).max(1), gain
        plain = x + step
        plain[:, 3:] = np.clip(plain[:, 3:], *EXPONENTS)
        sloped = plain if hold_E else _step_in_slopes(x, g, H, damping[1, live])
        values = [objective(candidate, terms, y_live, w) for candidate in (plain, sloped)]
        second = values[1] < values[0]
        lower = np.where(second, values[1], values[0])
        better = lower < f
        phi[live[better]] = np.where(second[:, None], sloped, plain)[better]
        for k in (0, 1):
            eased = np.where(values[k] < f, damping[k, live] / 10, np.maximum(damping[k, live] * 10, 1e-2))
            damping[k, live] = eased
        # Not a tolerance on the objective: on a kinked Huber sum it would stop early.
        done = (gain < 1e-10) | (damping[:, live].min(0) > 1e12)
        live = live[~done]
        if not len(live):
            break
    return Optima(phi, value, gradient_max, decrement)


def _newton(g: Array, H: Array, damping: Array) -> tuple[Array, Array]:
    """A damped step with |H| (so that it goes down where the curvature is negative), of at most 2 per component."""
    eigenvalues, vectors = np.linalg.eigh(H)
    eigenvalues = np.abs(eigenvalues)
    least = np.maximum(1e-13 * eigenvalues.max(1, keepdims=True), np.finfo(float).tiny)  # H = 0 where all underflows
    eigenvalues = np.maximum(eigenvalues, least)
    along = np.einsum("bpk,bp->bk", vectors, g)
    step = -np.einsum("bpk,bk->bp", vectors, along / (eigenvalues + damping[:, None]))
    step /= np.maximum(1.0, np.abs(step).max(1) / 2.0)[:, None]
    with np.errstate(over="ignore"):  # where a step was nonsense, which is not taken
        return step, (along**2 / eigenvalues).sum(1)


def _step_in_slopes(phi: Array, g: Array, H: Array, damping: Array) -> Array:
    """A Newton step in psi = (a + ln alpha, b + ln beta, A + B + E, alpha, beta), mapped back to phi.

    At the centre of the runs those are ln of the slopes in ln N and ln D, and the loss. g and H follow by the chain
    rule; in psi, e = ln(c - exp(psi_0)/alpha - exp(psi_1)/beta) is the only nonlinear part besides ln alpha.
    """
    A, B, E, alpha, beta = np.exp(phi[:, 0]), np.exp(phi[:, 1]), np.exp(phi[:, 2]), phi[:, 3], phi[:, -1]
    size, p = phi.shape
    last = p - 1  # where beta is; 3 in the tied form, so that what is added there adds up
    jacobian = np.zeros((size, p, p))
    jacobian[:, range(p), range(p)] = 1.0
    jacobian[:, 0, 3] -= 1 / alpha
    jacobian[:, 1, last] -= 1 / beta
    dE, d2E = np.zeros((size, p)), np.zeros((size, p, p))
    dE[:, 0], dE[:, 1], dE[:, 2] = -A, -B, 1.0
    d2E[:, 0, 0], d2E[:, 1, 1] = -A, -B
    for i, term, exponent, at in ((0, A, alpha, 3), (1, B, beta, last)):
        dE[:, at] += term / exponent
        d2E[:, i, at] += term / exponent
        d2E[:, at, i] += term / exponent
        d2E[:, at, at] -= 2 * term / exponent**2
    jacobian[:, 2] = dE / E[:, None]
    with np.errstate(over="ignore", invalid="ignore"):
        d2e = d2E / E[:, None, None] - jacobian[:, 2, :, None] * jacobian[:, 2, None, :]
        g_psi = np.einsum("bij,bi->bj", jacobian, g)
        H_psi = jacobian.transpose(0, 2, 1) @ H @ jacobian + g[:, 2, None, None] * d2e
    H_psi[:, 3, 3] += g[:, 0] / alpha**2
    H_psi[:, last, last] += g[:, 1] / beta**2
    usable = np.isfinite(H_psi).all((1, 2))  # E next to 0 has no slopes' coordinates
    step = np.zeros_like(phi)
    step[usable], _ = _newton(g_psi[usable], H_psi[usable], damping[usable])
    new_alpha = np.clip(alpha * np.exp(np.clip(step[:, 3] / alpha, -9, 9)), *EXPONENTS)
    new_beta = np.clip(beta * np.exp(np.clip(step[:, last] / beta, -9, 9)), *EXPONENTS)
    a = phi[:, 0] + step[:, 0] + np.log(alpha / new_alpha)
    b = phi[:, 1] + step[:, 1] + np.log(beta / new_beta)
    new_E = E + A + B + step[:, 2] - np.exp(a) - np.exp(b)
    usable &= new_E > 1e-12
    new = np.stack([a, b, np.log(np.where(usable, new_E, 1.0)), new_alpha, new_beta][:p], axis=1)
    return np.where(usable[:, None], new, phi)


# -- starts -----------------------------------------------------------------------------------------------------------


def projected_starts(problem: Problem, count: int = 8) -> Array:
    """Variable projection: on a grid of exponents, non-negative least squares in relative error for E, A and B.

    Returns the best `count` points [count, p], local minima of the grid first.
    """
    line = np.geomspace(0.03, 1.5, 30)
    grid = np.meshgrid(line, line, indexing="ij") if problem.form == "free" else (line, line)
    shape = grid[0].shape
    alpha, beta = (g.ravel() for g in grid)
    powers = [np.exp(-alpha[:, None] * problem.n), np.exp(-beta[:, None] * problem.d)]
    features = np.stack([*powers, np.ones_like(powers[0])], axis=1) * np.exp(-problem.y)  # [grid, 3, n]
    gram, moment = features @ features.transpose(0, 2, 1), features.sum(2)
    error, coefficients = np.full(len(alpha), np.inf), np.zeros((len(alpha), 3))
    for support in ([0, 1, 2], [0, 1], [0, 2], [1, 2], [0], [1], [2]):  # three unknowns: try every active set
        block = gram[:, support][:, :, support]
        ridge = 1e-13 * np.trace(block, axis1=1, axis2=2)[:, None, None] * np.eye(len(support))
        found = np.zeros_like(coefficients)
        found[:, support] = np.linalg.solve(block + ridge, moment[:, support, None])[..., 0]
        left = len(problem.y) - 2 * (found * moment).sum(1) + np.einsum("gi,gij,gj->g", found, gram, found)
        take = (found >= 0).all(1) & (left < error)
        error[take], coefficients[take] = left[take], found[take]
    order = np.argsort(error, kind="stable")
    lowest = _local_minima(error.reshape(shape)).ravel()[order]
    order = np.concatenate([order[lowest], order[~lowest]])[:count]
    logs = np.log(np.maximum(coefficients[order], 1e-6))
    return np.column_stack([logs, alpha[order], beta[order]][: 2 if problem.form == "tied" else 3])


def _local_minima(values: Array) -> NDArray[np.bool_]:
    padded = np.pad(values, 1, constant_values=np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3,) * values.ndim)
    return values <= windows.min(axis=tuple(range(values.ndim, 2 * values.ndim)))


def classical_starts(problem: Problem) -> Array:
    """The 4500 starts of Hoffmann et al. (their appendix D.2), in raw units of N and D; the tied form's 900."""
    a, b, e = np.arange(0, 26, 5.0), np.arange(0, 26, 5.0), np.arange(-1, 1.1, 0.5)
    exponent = np.arange(0, 2.1, 0.5)
    axes = [a, b, e, exponent] + ([exponent] if problem.form == "free" else [])
    raw = np.stack([g.ravel() for g in np.meshgrid(*axes, indexing="ij")], axis=1)
    return problem.phi(Law(np.exp(raw[:, 2]), raw[:, 0], raw[:, 1], raw[:, 3], raw[:, -1]))


def solve(problem: Problem, starts: int = 8) -> Optima:
    """The optima reached from the projected starts; `.best` is the answer."""
    return minimise(projected_starts(problem, starts), problem)
