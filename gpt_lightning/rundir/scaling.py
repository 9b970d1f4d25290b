"""Scaling laws: the loss of finished runs as a function of parameters and tokens.

L(N, D) = E + A / N^alpha + B / D^beta is fitted as in Hoffmann et al. 2022, "Training Compute-Optimal Large
Language Models", section 3.3 and appendix D.3: a Huber loss on the errors of log L is minimized from many
starts. Intervals come from a bootstrap over the runs. N counts all parameters, tied ones once, as
summary.json does. The compute is C = 6 N D.

P problems (starts, or resamples), R runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from gpt_lightning.rundir.report import Result, Table

Array = NDArray[np.float64]
DELTA = 1e-3  # errors of log L above this count linearly
FEWEST = 6  # different pairs of N and D, for five unknowns
MOST_ERROR = 0.05  # of a loss, above which a note says so
RESAMPLES = 1000
LEVELS = (2.5, 97.5)  # percentiles of an interval of 95 %


@dataclass(frozen=True)
class ScalingLaw:
    """A fitted law.

    Attributes:
        points: Parameters, tokens and loss of each run, (R, 3).
        values: log A, log B, log E, alpha, beta, (5,).
        resampled: The same of each bootstrap resample, (RESAMPLES, 5).
        floor: Corpus entropy in nats per token, if it is known.
    """

    points: Array
    values: Array
    resampled: Array
    floor: float | None = None

    def loss(self, parameters: Array | float, tokens: Array | float) -> Array:
        """Loss in nats per token."""
        a, b, e, alpha, beta = self.values
        n, d = np.log(parameters), np.log(tokens)
        return np.asarray(np.exp(e) + np.exp(a - alpha * n) + np.exp(b - beta * d))

    def errors(self) -> Array:
        """How far the measured losses are above the law, as shares of it, (R,)."""
        parameters, tokens, measured = self.points.T
        return measured / self.loss(parameters, tokens) - 1

    def with_interval(self, function: Callable[[Array], Array]) -> tuple[float, float, float]:
        """A function of `values`, and the bounds of its interval of 95 %; values may be (5,) or (5, P)."""
        low, high = np.percentile(function(self.resampled.T), LEVELS)
        return float(function(self.values)), float(low), float(high)


def optimal_parameters(values: Array, flops: float) -> Array:
    """The parameters that reach the lowest loss with a compute of `flops`; the tokens follow from 6 N D."""
    a, b, _, alpha, beta = values
    with np.errstate(all="ignore"):  # resamples with an exponent of 0 have no optimum
        log_ratio = np.log(alpha) + a - np.log(beta) - b
        return np.asarray(np.exp((log_ratio + beta * math.log(flops / 6)) / (alpha + beta)))


def fit_runs(results: Sequence[Result]) -> ScalingLaw:
    """The law of the finished runs, with their last validation losses.

    Raises:
        ValueError: If they are not comparable, too few, or too alike.
    """
    runs = [result.summary for result in results if result.status == "finished"]
    runs = [run for run in runs if run.get("val_loss") and run.get("parameters") and run.get("tokens")]
    for key in ("corpus_digest", "tokenizer_digest"):
        if len({run.get(key) for run in runs}) > 1:
            raise ValueError(f"fit=scaling: the runs differ in {key}, so that their losses are no one law's")
    points = np.array([(run["parameters"], run["tokens"], run["val_loss"]) for run in runs], dtype=float)
    points = points.reshape(-1, 3)
    floors = [  # in nats per token: both measures of a run have the same ratio to their floors
        floor / bits * (run["val_loss"] or 0.0)
        for run in runs
        if (floor := run.get("floor_bits_per_byte")) and (bits := run.get("bits_per_byte"))
    ]
    return fit(points, floor=float(np.mean(floors)) if floors else None)


def fit(points: Array, *, floor: float | None = None) -> ScalingLaw:
    """Fit the law to parameters, tokens and losses, (R, 3).

    Raises:
        ValueError: If there are fewer than FEWEST different pairs of parameters and tokens, or if one of the
            two follows from the other, so that their exponents cannot be told apart.
    """
    pairs = np.unique(np.log(points[:, :2]), axis=0)
    if len(pairs) < FEWEST:
        raise ValueError(
            f"fit=scaling needs {FEWEST} finished runs that differ in parameters or tokens, and there are "
            f"{len(pairs)}; train more sizes and lengths, as experiment=scaling does"
        )
    spread = np.linalg.svd(pairs - pairs.mean(0), compute_uv=False) / math.sqrt(len(pairs))
    if spread[-1] < 0.05:
        raise ValueError(
            "fit=scaling: the tokens of the runs follow from their parameters; train each size with several "
            "trainer.tokens_per_parameter or trainer.max_flops"
        )
    centre = pairs.mean(0)
    inputs, target = np.log(points[:, :2]) - centre, np.log(points[:, 2])
    spread_of_loss = math.log(max(np.ptp(points[:, 2]), 1e-3))
    least = math.log(points[:, 2].min())
    starts = np.array(
        [
            (spread_of_loss + a, spread_of_loss + b, least + e, alpha, beta)
            for a, b in product((-2.0, -1.0, 0.0), repeat=2)
            for e in (-1.0, -0.5, -0.1)
            for alpha, beta in product((0.2, 0.5, 1.0, 1.5), repeat=2)
        ]
    )
    found, errors = _minimize(inputs, target, np.ones((len(starts), len(target))), starts, steps=300)
    best = found[np.argmin(errors)]
    draws = np.random.default_rng(0).multinomial(len(target), [1 / len(target)] * len(target), RESAMPLES)
    resampled, _ = _minimize(inputs, target, draws.astype(float), np.tile(best, (RESAMPLES, 1)), steps=100)
    for values in (best[None], resampled):  # the coefficients as if the inputs were not centred
        values[:, :2] += values[:, 3:] * centre
    return ScalingLaw(points, best, resampled, floor)


def _minimize(
    inputs: Array, target: Array, weights: Array, values: Array, *, steps: int
) -> tuple[Array, Array]:
    """Minimize the weighted Huber loss of many problems at once, with Levenberg's and Marquardt's method.

    Args:
        inputs, target: log N and log D, (R, 2); log L, (R,).
        weights: Of each run in each problem, (P, R).
        values: Where to start, (P, 5).

    Returns:
        The values, (P, 5), and their Huber losses, (P,).
    """

    def errors(values: Array) -> tuple[Array, Array, Array]:
        a, b, e, alpha, beta = values.T[:, :, None]  # (P, 1) each
        n, d = inputs.T
        terms = np.stack([a - alpha * n, b - beta * d, e + 0 * n])  # (3, P, R)
        total = np.logaddexp.reduce(terms)
        of_n, of_d, of_e = np.exp(terms - total)
        jacobian = np.stack([of_n, of_d, of_e, -n * of_n, -d * of_d], axis=2)  # (P, R, 5)
        error = total - target
        size = np.abs(error)
        huber = np.where(size < DELTA, error**2 / 2, DELTA * (size - DELTA / 2))
        return error, jacobian, (weights * huber).sum(1)

    damping = np.full(len(values), 1e-2)
    error, jacobian, loss = errors(values)
    for _ in range(steps):
        weighted = weights * np.minimum(1, DELTA / np.maximum(np.abs(error), 1e-300))  # (P, R)
        hessian = np.einsum("pri,pr,prj->pij", jacobian, weighted, jacobian)
        gradient = np.einsum("pri,pr->pi", jacobian, weighted * error)
        diagonal = np.einsum("pii->pi", hessian) + 1e-9
        system = hessian + (damping[:, None] * diagonal)[:, :, None] * np.eye(5)
        proposed = values - np.linalg.solve(system, gradient[:, :, None])[:, :, 0]
        proposed[:, 3:] = np.clip(proposed[:, 3:], 0, 5)
        proposed[:, :3] = np.clip(proposed[:, :3], -30, 30)
        new_error, new_jacobian, new_loss = errors(proposed)
        better = new_loss < loss
        values = np.where(better[:, None], proposed, values)
        error = np.where(better[:, None], new_error, error)
        jacobian = np.where(better[:, None, None], new_jacobian, jacobian)
        loss = np.where(better, new_loss, loss)
        damping = np.clip(np.where(better, damping / 3, damping * 3), 1e-9, 1e9)
    return values, loss


def law_table(law: ScalingLaw, budget: float | None = None) -> Table:
    """The law with its intervals; with a budget in FLOPs, the best size for it."""

    def row(name: str, form: str, function: Callable[[Array], Array]) -> list[str]:
        value, low, high = law.with_interval(function)
        return [name, format(value, form), f"{low:{form}} to {high:{form}}"]

    rows = [
        row("E, irreducible loss", ".4f", lambda v: np.exp(v[2])),
        row("A", ".4g", lambda v: np.exp(v[0])),
        row("alpha", ".3f", lambda v: v[3]),
        row("B", ".4g", lambda v: np.exp(v[1])),
        row("beta", ".3f", lambda v: v[4]),
        row("a of optimal N ~ C^a", ".3f", lambda v: v[4] / (v[3] + v[4])),
    ]
    errors = np.abs(law.errors())
    rows.append(["errors of the runs", f"median {np.median(errors):.1%}", f"largest {errors.max():.1%}"])
    if law.floor is not None:
        rows.append(["corpus entropy, for comparison with E", f"{law.floor:.4f}", "known"])
    if budget is not None:
        best = float(optimal_parameters(law.values, budget))
        tokens = budget / 6 / best
        rows += [
            row(f"optimal N for C = {budget:.3g}", ".4g", lambda v: optimal_parameters(v, budget)),
            row("optimal D", ".4g", lambda v: budget / 6 / optimal_parameters(v, budget)),
            ["loss there", f"{float(law.loss(best, tokens)):.4f}", ""],
        ]
    return ["L = E + A / N^alpha + B / D^beta", "value", "95 % interval"], rows


def law_notes(law: ScalingLaw) -> list[str]:
    """What must be known before the law is used."""
    notes, (value, low, high) = [], law.with_interval(lambda v: np.exp(v[2]))
    if (largest := np.abs(law.errors()).max()) > MOST_ERROR:
        notes.append(f"the law misses a loss by {largest:.1%}: these runs do not follow it closely")
    if value < 1e-6:
        notes.append(
            "the losses show no irreducible loss (E = 0), so that the law must not be extrapolated: "
            "train larger models, or longer"
        )
    elif law.floor is not None and not low <= law.floor <= high:
        notes.append(f"the interval of E does not contain the corpus entropy of {law.floor:.4f}")
    return notes
