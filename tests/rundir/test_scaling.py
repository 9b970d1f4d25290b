"""Fits of losses that the formula itself made, against its constants, and refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt_lightning.data.files import write_json
from gpt_lightning.rundir.scaling import RESAMPLES, Array, fit, law_notes, optimal_parameters

# as Hoffmann et al. 2022 report them: log A, log B, log E, alpha, beta
TRUE = np.array([np.log(406.4), np.log(410.7), np.log(1.69), 0.34, 0.28])
N = np.repeat([5e4, 1e5, 2e5, 4e5, 8e5], 4)
D = N * np.tile([5.0, 10, 20, 40], 5)


def made(noise: float, seed: int = 0) -> Array:
    loss = 1.69 + 406.4 / N**0.34 + 410.7 / D**0.28
    loss *= np.exp(np.random.default_rng(seed).normal(0, noise, len(loss)))
    return np.stack([N, D, loss], axis=1)


def test_constants_of_exact_losses_are_found() -> None:
    law = fit(made(noise=0))
    assert law.values == pytest.approx(TRUE, rel=1e-4)
    assert law.loss(N, D) == pytest.approx(made(noise=0)[:, 2], rel=1e-7)


def test_one_wild_loss_hardly_moves_the_fit() -> None:
    points = made(noise=0)
    points[7, 2] *= 1.2
    assert fit(points).values == pytest.approx(TRUE, rel=0.02)


def test_intervals_contain_the_constants_of_noisy_losses() -> None:
    """Of 4 data sets; intervals of 95 % from a bootstrap of 20 runs are known to be somewhat narrow."""
    inside = np.zeros(5)
    for seed in range(4):
        law = fit(made(noise=2e-3, seed=seed))
        assert law.resampled.shape == (RESAMPLES, 5)
        low, high = np.percentile(law.resampled, (2.5, 97.5), axis=0)
        inside += (low <= TRUE) & (high >= TRUE)
        assert law.values[3:] == pytest.approx(TRUE[3:], abs=0.06)
    assert (inside >= 3).all(), inside


def test_law_without_an_irreducible_loss_or_with_another_one_says_so() -> None:
    points = made(noise=1e-3)
    assert law_notes(fit(points, floor=1.69)) == []
    assert law_notes(fit(points, floor=3.0)) == [
        "the interval of E does not contain the corpus entropy of 3.0000"
    ]
    points[:, 2] = 406.4 / N**0.34 + 410.7 / D**0.28
    (note,) = law_notes(fit(points, floor=3.0))
    points[3, 2] *= 1.2
    assert law_notes(fit(points))[0].startswith("the law misses a loss by 1")
    assert note.startswith("the losses show no irreducible loss (E = 0)")


@pytest.mark.parametrize("flops", [1e12, 1e18])
def test_optimal_size_has_the_lowest_loss_of_all_with_its_compute(flops: float) -> None:
    sizes = np.geomspace(1e3, 1e12, 200_000)
    losses = 1.69 + 406.4 / sizes**0.34 + 410.7 / (flops / 6 / sizes) ** 0.28
    assert float(optimal_parameters(TRUE, flops)) == pytest.approx(sizes[np.argmin(losses)], rel=1e-3)


@pytest.mark.parametrize(
    ("points", "line"),
    [
        (made(0)[:5], "needs 6 finished runs that differ in parameters or tokens, and there are 5"),
        (np.repeat(made(0)[:4], 3, axis=0), "and there are 4"),  # seeds are no further sizes
        (np.empty((0, 3)), "and there are 0"),
        (
            np.stack([10.0 ** np.arange(6), 20 * 10.0 ** np.arange(6), np.arange(9.0, 3, -1)], axis=1),
            "the tokens of the runs follow from their parameters",
        ),
        (
            np.stack([10.0 ** np.arange(6), 1e12 / 10.0 ** np.arange(6), np.arange(9.0, 3, -1)], axis=1),
            "the tokens of the runs follow from their parameters",
        ),
    ],
    ids=["few", "repeated", "none", "ladder", "isoflop"],
)
def test_runs_that_cannot_bear_the_fit_are_refused(points: Array, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        fit(points)


def test_report_has_the_law_and_the_floor(
    tmp_path: Path, call: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for number, (parameters, tokens, loss) in enumerate(made(noise=1e-3)):
        run = tmp_path / "runs" / f"run{number}"
        (run / ".hydra").mkdir(parents=True)
        (run / ".hydra" / "overrides.yaml").write_text("[]")
        summary = {"status": "finished", "parameters": parameters, "tokens": tokens, "val_loss": loss}
        # 3 bytes per token
        bits = loss / np.log(2) / 3
        summary |= {"best_val_loss": loss, "bits_per_byte": bits, "floor_bits_per_byte": 0.4}
        write_json(run / "summary.json", summary)
    pages = [tmp_path / f"page.{kind}" for kind in ("md", "html")]
    for page in pages:
        call("report", f"runs={tmp_path / 'runs'}", "fit=scaling", "budget=1e13", f"output={page}")
    out = capsys.readouterr().out
    assert re.search(r"^E, irreducible loss +1\.\d{4}  +\d\.\d{4} to \d\.\d{4}$", out, re.M)
    floor = 0.4 * np.log(2) * 3  # nats per token
    assert re.search(rf"^corpus entropy, for comparison with E +{floor:.4f} +known$", out, re.M)
    best = re.search(r"^optimal N for C = 1e\+13 +(\S+)", out, re.M)
    assert best
    assert float(best[1]) == pytest.approx(float(optimal_parameters(TRUE, 1e13)), rel=0.1)
    assert "| alpha | 0.3" in pages[0].read_text()
    assert "<h2>Scaling law</h2>" in pages[1].read_text()
    write_json(run / "summary.json", summary | {"tokenizer_digest": "other"})
    with pytest.raises(SystemExit):
        call("report", f"runs={tmp_path / 'runs'}", "fit=scaling")
    assert "fit=scaling: the runs differ in tokenizer_digest" in capsys.readouterr().err
