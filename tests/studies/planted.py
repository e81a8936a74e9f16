"""Studies whose answer is known: tables drawn from a law, and the two public tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_xact.studies.reading import Mapping, read
from megatron_xact.studies.table import Run, Table

DATA = Path(__file__).parent / "data"
# E, A, alpha, B, beta: Hoffmann et al. (arXiv:2203.15556), and one like the free fit of the OLMo ladder.
CHINCHILLA = (1.69, 406.4, 0.34, 410.7, 0.28)
EQUAL = (1.7, 400.0, 0.3, 900.0, 0.3)
UNEQUAL = (1.857, 300.0, 0.267, 60.0, 0.157)


def loss(law: Sequence[float], N: np.ndarray, D: np.ndarray, log_m: np.ndarray | float = 0.0) -> np.ndarray:
    """L at m^(1 - a) times the tokens and m^a times the parameters, a = beta / (alpha + beta): m times the compute."""
    E, A, alpha, B, beta = law
    a = beta / (alpha + beta)
    return E + A * (N * np.exp(a * log_m)) ** -alpha + B * (D * np.exp((1 - a) * log_m)) ** -beta


def olmo() -> Table:
    return read(DATA / "olmo_ladder_final_losses.csv", Mapping.of(DATA / "olmo.toml"))


def gadre(corpus: str, least_ratio: float = 0) -> Table:
    table = read(DATA / "gadre_models_tidy.csv", Mapping.of(DATA / "gadre.toml", where=[f"train_set={corpus}"]))
    return table.where(lambda r: r.tokens / r.params >= 0.99 * least_ratio or r.params > 5e8)


@dataclass(frozen=True)
class Design:
    sizes: Sequence[float]
    ratios: Sequence[float]  # tokens per parameter
    seeds: int


SMALL = Design((3e7, 1e8, 3e8), (10, 20, 40), 2)
LARGE = Design(tuple(np.geomspace(3e7, 1e9, 5)), (5, 10, 20, 40), 3)


def ladder(law: Sequence[float], design: Design, noise: float, rng: np.random.Generator, trunk: float = 0.0) -> Table:
    """One activation. noise: sd per run; trunk: of what all budgets of a size and seed share, which the table tells."""
    cells = [(N, N * r, s) for N in design.sizes for r in design.ratios for s in range(design.seeds)]
    shared = {(N, s): rng.normal(0, trunk) for N in design.sizes for s in range(design.seeds)} if trunk else {}
    return Table([
        Run(params=N, tokens=D, seed=s, loss=float(loss(law, N, D) + shared.get((N, s), 0) + rng.normal(0, noise)),
            trunk=f"{N:.3g} {s}" if trunk else "") for N, D, s in cells
    ])  # fmt: skip


def study(
    law: Sequence[float], design: Design, m: float, noise: float, rng: np.random.Generator, *, common: float = 0.0,
    trunk: float = 0.0, told: bool = False, tilt: float = 0.0, tilt_tokens: float = 0.0,
    step_time: float | None = None, mismatch: float = 1.0, share: float = 0.0,
) -> Table:  # fmt: skip
    """Activations "a" and "b"; b is worth m times the compute, times (N / 1e8)^tilt (D / 20 N)^tilt_tokens.

    noise: sd per run. common: sd of what both activations of a size and seed share. trunk: sd of what all budgets of
    one activation, size and seed share; told: whether the table says so. mismatch: parameters of b over those of a.
    share: noise that is larger where L - E is, as a share of it.
    """
    runs = []
    for N in design.sizes:
        for seed in range(design.seeds):
            shared = rng.normal(0, common)
            for name in "ab":
                branch = rng.normal(0, trunk)
                for r in design.ratios:
                    params = N * (mismatch if name == "b" else 1.0)
                    tilted = tilt * np.log(N / 1e8) + tilt_tokens * np.log(r / 20)
                    log_m = np.log(m) + tilted if name == "b" else 0.0
                    expected = float(loss(law, params, N * r, log_m))
                    sd = noise + share * (expected - law[0])
                    runs.append(Run(
                        activation=name, size=f"{N:.3g}", params=params, tokens=N * r, seed=seed,
                        loss=expected + shared + branch + rng.normal(0, sd),
                        trunk=f"{name} {N:.3g} {seed}" if told else "",
                        step_time_s=None if step_time is None else (step_time if name == "b" else 1.0) * N / 1e8,
                    ))  # fmt: skip
    return Table(runs)
