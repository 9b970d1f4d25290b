"""Intervals in optimizer steps, also for runs whose user did not choose them."""


def log_interval(max_steps: int) -> int:
    """Steps between two log rows: about 60 rows in a short run, a row every 50 steps in a long one."""
    return min(50, max(1, max_steps // 60))


def is_due(step: int, interval: int) -> bool:
    """Whether something is done after this step: after every `interval`-th, and after the first."""
    return step == 1 or step % interval == 0


def save_interval(max_steps: int) -> int:
    """Steps between two validations and between two checkpoints: at least eight in a run."""
    return min(500, max(1, max_steps // 8))
