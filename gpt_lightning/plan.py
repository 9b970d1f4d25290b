"""What a run would cost, without running it: `python -m gpt_lightning.plan`, with `train`'s overrides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig

from gpt_lightning.config.build import (
    build_net,
    build_schedule,
    prepare_data,
    rehearse,
    starting_point,
    windows,
)
from gpt_lightning.config.command import entry_point
from gpt_lightning.config.memory import ENOUGH, GIB, device_count, memory_estimate
from gpt_lightning.config.rules import check


def warnings_for(cfg: DictConfig, *, tokens: int, parameters: int, epochs: float) -> list[str]:
    """What a careful colleague would ask about before the run."""
    notes = []
    if epochs > 100:
        notes.append(f"the run reads the training data {epochs:,.0f} times; the model will learn it by heart")
    if tokens < parameters and epochs > 1:
        notes.append(
            "there are fewer training tokens than parameters; watch the validation loss, use dropout"
        )
    if cfg.device.micro_batch_size == "auto":
        notes.append(
            f"device.micro_batch_size=auto is found when the run begins; these figures are for {ENOUGH}"
        )
    if cfg.trainer.val_every_steps > cfg.trainer.max_steps:
        notes.append("trainer.val_every_steps exceeds trainer.max_steps; the only validation is the last")
    if cfg.trainer.save_every_steps > cfg.trainer.max_steps:
        notes.append("trainer.save_every_steps exceeds trainer.max_steps; a crash would lose everything")
    return notes


def preview(schedule: Callable[[int], float], lr: float, max_steps: int, *, width: int = 48) -> str:
    """The learning rate over the run as one line of eight heights."""
    bars = "▁▂▃▄▅▆▇█"
    steps = [round(i * (max_steps - 1) / (width - 1)) for i in range(width)]
    factors = [schedule(step) for step in steps]
    # a schedule of the user's own may leave 0 … 1
    line = "".join(bars[min(max(round(7 * factor), 0), 7)] for factor in factors)
    peak = max(map(schedule, range(0, max_steps, max(1, max_steps // 1000))))  # between the bars, it may be
    return f"{line}  {lr * factors[0]:.1e} → {lr * peak:.1e} → {lr * factors[-1]:.1e}"


@entry_point("plan")
def main(cfg: DictConfig) -> None:
    check(cfg)
    rehearse(cfg, trainer=False)
    import torch

    from gpt_lightning.data.windows import epoch_size, split_batch

    devices = device_count(cfg)
    limit = ENOUGH if cfg.device.micro_batch_size == "auto" else cfg.device.micro_batch_size
    micro, accumulation = split_batch(cfg.data.batch_size, limit, devices)
    net, encoding = starting_point(cfg)
    store = prepare_data(cfg, encoding)
    with torch.device("meta"):  # shapes without memory
        net = build_net(cfg)
    schedule, lr = build_schedule(cfg), cfg.optimizer.lr
    tokens, parameters = store.meta.splits["train"].tokens, sum(p.numel() for p in net.parameters())
    cut = windows(cfg)
    count, steps_per_epoch = epoch_size(store, **cut)
    tokens_per_step = cut["batch_size"] * cut["block_size"]
    total, epochs = cfg.trainer.max_steps * tokens_per_step, cfg.trainer.max_steps / steps_per_epoch
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    memory = memory_estimate(cfg, parameters, micro, trained=trained)
    flops = net.flops_per_token(cut["block_size"]) if hasattr(net, "flops_per_token") else 6 * parameters
    lines: dict[str, Any] = {
        "parameters": f"{parameters:,}" + f", {trained:,} of them trained" * (trained < parameters),
        "training tokens": f"{tokens:,} ({tokens / parameters:.2f} per parameter)",
        "validation tokens": f"{store.meta.splits['val'].tokens:,}",
        "vocabulary": f"{store.n_vocab:,} ids",
        "tokens per step": f"{tokens_per_step:,} = {micro} sequences × {accumulation} accumulated × "
        f"{devices} device(s) × {cut['block_size']} tokens",
        "steps per epoch": f"{steps_per_epoch:,} ({count:,} windows)",
        "run": f"{cfg.trainer.max_steps:,} steps, {total:,} tokens ({total / parameters:.2f} per parameter), "
        f"{epochs:.2f} epochs",
        "compute": f"{flops:.3g} FLOPs per token, {flops * total:.3g} in all",
        "memory estimate": f"{sum(memory.values()) / GIB:.2f} GiB per device ("
        + ", ".join(f"{name} {value / GIB:.2f}" for name, value in memory.items())
        + ")",
        "learning rate": preview(schedule, lr, cfg.trainer.max_steps),
    }
    for name, text in lines.items():
        print(f"{name:>17}  {text}")
    for note in warnings_for(cfg, tokens=tokens, parameters=parameters, epochs=epochs):
        print(f"{'note':>17}  {note}")


if __name__ == "__main__":
    main()
