"""Learning-rate schedules: pure functions from an optimizer step to a factor of the peak rate.

Each takes the number of steps already done and the length of the run, so that the first update uses
`factor(0)` and the last `factor(max_steps - 1)`.
"""

from __future__ import annotations

import math

DEFAULT_WARMUP = 100  # optimizer steps, at most, where none are asked for


def default_warmup(max_steps: int) -> int:
    """Optimizer steps of the warm-up of a run where none are asked for."""
    return min(DEFAULT_WARMUP, max_steps // 10)


def _steps(max_steps: int | None, warmup_steps: int | None, **ratios: float | None) -> tuple[int, int]:
    """The length of the run and of its warm-up, a tenth of the run but at most 100 steps where it is None."""
    if max_steps is None or max_steps < 1:
        raise ValueError(f"scheduler.max_steps={max_steps} must be at least 1 optimizer step")
    warmup = default_warmup(max_steps) if warmup_steps is None else warmup_steps
    if not 0 <= warmup < max_steps:
        raise ValueError(
            f"scheduler.warmup_steps={warmup} must be at least 0 and smaller than the run's "
            f"{max_steps} optimizer steps; lower it or raise trainer.max_steps"
        )
    for key, value in ratios.items():
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"scheduler.{key}={value} is a share, so it must lie in [0, 1]")
    return max_steps, warmup


def _warmup(step: int, warmup_steps: int, start_ratio: float | None) -> float:
    """Straight line from start_ratio (None: one step's worth above zero) to 1 at warmup_steps."""
    start = 1 / (warmup_steps + 1) if start_ratio is None else start_ratio
    return start + (1 - start) * step / warmup_steps


def constant(
    step: int,
    *,
    max_steps: int | None,
    warmup_steps: int | None = 0,
    warmup_start_ratio: float | None = None,
) -> float:
    """Warm-up, then the peak rate.

    Args:
        step: Optimizer steps done, at least 0.
        max_steps: Optimizer steps of the run; None is an error, and stands for a number that is given later.
        warmup_steps: Optimizer steps until the peak; None is a tenth of the run, at most 100.
        warmup_start_ratio: Factor at step 0; None is 1 / (warmup_steps + 1).

    Raises:
        ValueError: If the warm-up does not fit into the run or a ratio is outside [0, 1].
    """
    max_steps, warmup_steps = _steps(max_steps, warmup_steps, warmup_start_ratio=warmup_start_ratio)
    return _warmup(step, warmup_steps, warmup_start_ratio) if step < warmup_steps else 1.0


def linear(
    step: int,
    *,
    max_steps: int | None,
    warmup_steps: int | None = 0,
    min_lr_ratio: float = 0.0,
    warmup_start_ratio: float | None = None,
) -> float:
    """Warm-up, then a straight line to min_lr_ratio at max_steps. Arguments and errors as `cosine`."""
    max_steps, warmup_steps = _steps(
        max_steps, warmup_steps, min_lr_ratio=min_lr_ratio, warmup_start_ratio=warmup_start_ratio
    )
    if step < warmup_steps:
        return _warmup(step, warmup_steps, warmup_start_ratio)
    progress = min(1.0, (step - warmup_steps) / (max_steps - warmup_steps))
    return 1 - (1 - min_lr_ratio) * progress


def cosine(
    step: int,
    *,
    max_steps: int | None,
    warmup_steps: int | None = 0,
    min_lr_ratio: float = 0.1,
    warmup_start_ratio: float | None = None,
) -> float:
    """Warm-up, then half a cosine down to min_lr_ratio at max_steps.

    Args:
        step: Optimizer steps done, at least 0.
        max_steps: Optimizer steps of the run; later steps keep the minimum.
        warmup_steps: As in `constant`.
        min_lr_ratio: Factor at the end.
        warmup_start_ratio: Factor at step 0; None is 1 / (warmup_steps + 1).

    Raises:
        ValueError: If the warm-up does not fit into the run or a ratio is outside [0, 1].
    """
    max_steps, warmup_steps = _steps(
        max_steps, warmup_steps, min_lr_ratio=min_lr_ratio, warmup_start_ratio=warmup_start_ratio
    )
    if step < warmup_steps:
        return _warmup(step, warmup_steps, warmup_start_ratio)
    progress = min(1.0, (step - warmup_steps) / (max_steps - warmup_steps))
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def wsd(
    step: int,
    *,
    max_steps: int | None,
    warmup_steps: int | None = 0,
    decay_ratio: float = 0.2,
    min_lr_ratio: float = 0.0,
    warmup_start_ratio: float | None = None,
) -> float:
    """Warm-up, stable, decay: the peak rate until the last decay_ratio of the run, then a straight line.

    Arguments and errors as `cosine`. Source: Hu et al., "MiniCPM" (2024), section 4.
    """
    max_steps, warmup_steps = _steps(
        max_steps,
        warmup_steps,
        decay_ratio=decay_ratio,
        min_lr_ratio=min_lr_ratio,
        warmup_start_ratio=warmup_start_ratio,
    )
    if step < warmup_steps:
        return _warmup(step, warmup_steps, warmup_start_ratio)
    decay_steps = min(round(decay_ratio * max_steps), max_steps - warmup_steps)
    remaining = max(0, max_steps - step)
    if remaining >= decay_steps:
        return 1.0
    return min_lr_ratio + (1 - min_lr_ratio) * remaining / decay_steps
