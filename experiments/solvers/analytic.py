"""Error of every solver over its network calls, on Gaussian data with a known denoiser: exact, without sampling.

    .venv/bin/python -m experiments.solvers.analytic

Writes analytic.json and analytic.png to this folder; takes a few seconds.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from ldm_jax.diffusion.schedules import make_process
from ldm_jax.diffusion.solvers import SOLVERS, make_table
from ldm_jax.diffusion.tables import HISTORY, Table

HERE = Path(__file__).parent
MEAN, STDS = 0.5, (0.05, 0.3, 1.0)  # of three independent Gaussians, from nearly a point to nearly the noise
STEPS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
SPACINGS = ("trailing", "karras")
OPTIONS = {"edm": {"churn": 20.0}}


def end_distribution(table: Table, std: float) -> tuple[float, float]:
    """The exact mean and standard deviation of the samples that a solver table produces.

    The denoiser of N(m, s^2) is affine in z and a table is linear, so z is always an affine function of the noise: here
    a vector of coefficients of (1, z_T, the noise of row 0, of row 1, ...).
    """
    rows = int(table.rows)
    basis = np.eye(rows + 2)
    a, sigma = table.alpha[0], table.sigma[0]
    zs, z0_hats = [a * MEAN * basis[0] + np.hypot(a * std, sigma) * basis[1]], []  # the exact distribution of z_T
    for i in range(rows):
        a, sigma, weights = table.alpha[i], table.sigma[i], table.weights[i]
        gain = a * std**2 / (a**2 * std**2 + sigma**2)
        z0_hats.insert(0, MEAN * basis[0] + gain * (zs[0] - a * MEAN * basis[0]))
        terms = zip(weights, zs), zip(weights[HISTORY + 1 :], z0_hats)
        z = sum(w * value for pairs in terms for w, value in pairs) + weights[-1] * basis[i + 2]
        zs, z0_hats = [z, *zs[:HISTORY]], z0_hats[:HISTORY]
    return float(zs[0][0]), float(np.linalg.norm(zs[0][1:]))


def error(table: Table) -> float:
    """The 2-Wasserstein distance to the data, root mean square over the three Gaussians."""
    ends = [(end_distribution(table, std), std) for std in STDS]
    return float(np.sqrt(np.mean([(mean - MEAN) ** 2 + (end_std - std) ** 2 for (mean, end_std), std in ends])))


def measure() -> dict[str, dict[str, list]]:
    """{spacing: {solver: [[calls, error], ...]}}; without lcm and tcd, which need consistency models."""
    process = make_process("scaled_linear", 1000)
    return {
        spacing: {
            solver: [
                [int(table.rows), error(table)]
                for table in (make_table(solver, process, n, spacing=spacing, **OPTIONS.get(solver, {})) for n in STEPS)
            ]
            for solver in SOLVERS
            if solver not in ("lcm", "tcd")
        }
        for spacing in SPACINGS
    }


def plot(results: dict[str, dict[str, list]], path: Path) -> None:
    """Plots error over network calls, both logarithmic, a panel for each spacing."""
    figure, axes = plt.subplots(1, len(results), figsize=(11, 4.6), sharey=True)
    for axis, (spacing, solvers) in zip(axes, results.items()):
        for k, (solver, points) in enumerate(solvers.items()):
            axis.loglog(*zip(*points), label=solver, color=f"C{k % 10}", ls="-" if k < 10 else "--", marker=".", ms=4)
        axis.set(title=f"{spacing} spacing", xlabel="network calls")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("Wasserstein distance to the data")
    axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    results = measure()
    (HERE / "analytic.json").write_text(json.dumps(results) + "\n")
    plot(results, HERE / "analytic.png")
    for spacing, solvers in results.items():
        for solver, points in solvers.items():
            shown = "  ".join(
                f"{calls}: {value:.2e}" for calls, value in points if calls in (8, 15, 16, 17, 31, 32, 33, 64)
            )
            print(f"{spacing:>9} {solver:>13}  {shown}")


if __name__ == "__main__":
    main()
