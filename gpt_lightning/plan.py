"""What a run would cost, without running it: `python -m gpt_lightning.plan`, with `train`'s overrides."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from gpt_lightning.config.build import (
    Prepared,
    accelerator_of,
    build_net,
    memory_needs,
    precision_of,
    prepare_data,
)
from gpt_lightning.config.command import command, imports
from gpt_lightning.config.errors import ConfigError
from gpt_lightning.config.parts import Parts, build_parts, device_count, starting_point, with_length
from gpt_lightning.config.resume import check_classes_again
from gpt_lightning.config.rules import check, one_of, validate
from gpt_lightning.config.setup import Finding, check_setup
from gpt_lightning.config.start import plan_arguments
from gpt_lightning.training.memory import DEFAULT_MICRO_BATCH_SIZE, GIB


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The numbers of a run."""

    parameters: int
    trained_parameters: int  # those that have gradients
    train_tokens: int
    val_tokens: int
    vocab_size: int  # ids of the tokenizer
    micro_batch_size: int  # sequences of a forward on one device
    accumulation: int  # forwards of an optimizer step on one device
    devices: int
    block_size: int  # tokens of a sequence
    windows_per_epoch: int
    steps_per_epoch: int  # optimizer steps
    max_steps: int  # optimizer steps of the run
    flops_per_token: float  # forward and backward
    memory: dict[str, float]  # bytes per device, by what needs them
    learning_rates: list[float]  # of 48 steps, evenly spread over the run
    peak_learning_rate: float  # the highest of all steps
    seconds: float | None  # of all steps and validations, if that can be measured here, or gpu= is given
    tflops: float | None  # of a GPU that the seconds are estimated for, in dense bfloat16
    notes: list[str]  # warnings about the numbers, in words

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step over all devices."""
        return self.micro_batch_size * self.accumulation * self.devices * self.block_size

    @property
    def tokens(self) -> int:
        """Tokens of the run, those of later epochs counted again."""
        return self.max_steps * self.tokens_per_step


def notes_on(cfg: DictConfig, *, tokens: int, parameters: int, epochs: float, max_steps: int) -> list[str]:
    """Warnings about settings that are allowed but seldom meant."""
    notes = []
    if epochs > 100:
        notes.append(f"the run reads the training data {epochs:,.0f} times; the model will learn it by heart")
    if tokens < parameters and epochs > 1:
        notes.append(
            "there are fewer training tokens than parameters; watch the validation loss, use dropout"
        )
    if (cfg.trainer.val_every_steps or 0) > max_steps:
        notes.append("trainer.val_every_steps exceeds trainer.max_steps; the only validation is the last")
    if (cfg.trainer.save_every_steps or 0) > max_steps:
        notes.append("trainer.save_every_steps exceeds trainer.max_steps; a crash would lose everything")
    return notes


def sampled(schedule: Callable[[int], float], max_steps: int) -> list[float]:
    """The schedule's factor at 48 steps evenly spread over the run."""
    return [schedule(round(i * (max_steps - 1) / 47)) for i in range(48)]


def preview(rates: list[float], peak: float) -> str:
    """Learning rates as one line of eight heights, with the first, the highest and the last."""
    bars = "▁▂▃▄▅▆▇█"
    line = "".join(bars[min(max(round(7 * rate / (peak or 1)), 0), 7)] for rate in rates)
    return f"{line}  {rates[0]:.1e} → {peak:.1e} → {rates[-1]:.1e}"


def tflops_of(cfg: DictConfig) -> float | None:
    """TFLOP/s of the GPU that gpu= names; None without it.

    Raises:
        ConfigError: If there is no such GPU, or the run does not use one.
    """
    from gpt_lightning.training.speed import PEAKS

    if cfg.gpu is None:
        return None
    rate = PEAKS.get(str(cfg.gpu).lower(), cfg.gpu)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rate > 0:
        raise ConfigError(f"gpu={cfg.gpu!r} must be {', '.join(PEAKS)}, or dense TFLOP/s in bfloat16")
    if accelerator_of(cfg) != "cuda":
        raise ConfigError(f"gpu={cfg.gpu} needs device=cuda")
    return float(rate)


def predicted_seconds(
    cfg: DictConfig, parts: Parts, prepared: Prepared, net: Any, micro: int, accumulation: int
) -> float | None:
    """Seconds of the steps and validations of a run whose devices take micro sequences at once."""
    from gpt_lightning.training.intervals import save_interval
    from gpt_lightning.training.precision import multiplies_bfloat16
    from gpt_lightning.training.speed import UTILIZATION, Speed, measure_speed

    block_size, steps, precision = prepared.windows["block_size"], prepared.max_steps, precision_of(cfg, net)
    is_slow = precision == "bf16-mixed" and not multiplies_bfloat16("cpu")  # and so would measuring be
    config, flops = getattr(net, "config", None), flops_per_token(net, block_size)
    if (tflops := tflops_of(cfg)) is not None:
        per_token = flops / (UTILIZATION * 1e12 * tflops)
        speed: Speed | None = Speed(per_token / 3, per_token, update=0.0)
    elif accelerator_of(cfg) != "cpu" or is_slow or cfg.lora.r or cfg.device.compile:
        return None
    else:
        speed = measure_speed(
            config, parts.optimizer, sequences=micro, block_size=block_size, precision=precision
        )
    if speed is None:
        return None
    tokens = micro * accumulation * block_size  # of a device in a step
    validations = math.ceil(steps / (cfg.trainer.val_every_steps or save_interval(steps)))
    val_tokens = prepared.store.meta.splits["val"].tokens
    if cfg.trainer.val_batches is not None:
        val_tokens = min(val_tokens, cfg.trainer.val_batches * tokens)
    step = speed.training * tokens + speed.update
    return steps * step + validations * val_tokens * speed.forward


def flops_per_token(net: Any, block_size: int) -> float:
    """Of the forward and backward pass, six for each parameter where the network does not say."""
    if hasattr(net, "flops_per_token"):
        return float(net.flops_per_token(block_size))
    return 6.0 * sum(p.numel() for p in net.parameters())


def show(plan: Plan | list[Finding]) -> None:
    """The plan, or what check=true found, as a table."""
    from gpt_lightning.training.callbacks.progress import format_duration
    from gpt_lightning.training.speed import UTILIZATION

    if isinstance(plan, list):
        for finding in plan:
            print(f"{finding.name:>21}  {finding.found}")
            if finding.remedy:
                print(f"{'→':>21}  {finding.remedy}")
        return
    total, epochs = plan.tokens, plan.max_steps / plan.steps_per_epoch
    trained = f", {plan.trained_parameters:,} of them trained"
    where = f"at {UTILIZATION:.0%} of {plan.tflops:g} TFLOP/s per device" if plan.tflops else "here"
    parts = ", ".join(f"{name} {value / GIB:.2f}" for name, value in plan.memory.items())
    lines = {
        "parameters": f"{plan.parameters:,}" + trained * (plan.trained_parameters < plan.parameters),
        "training tokens": f"{plan.train_tokens:,} ({plan.train_tokens / plan.parameters:.2f} per parameter)",
        "validation tokens": f"{plan.val_tokens:,}",
        "vocabulary": f"{plan.vocab_size:,} ids",
        "tokens per step": f"{plan.tokens_per_step:,} = {plan.micro_batch_size} sequences × "
        f"{plan.accumulation} accumulated × {plan.devices} device(s) × {plan.block_size} tokens",
        "steps per epoch": f"{plan.steps_per_epoch:,} ({plan.windows_per_epoch:,} windows)",
        "run": f"{plan.max_steps:,} steps, {total:,} tokens ({total / plan.parameters:.2f} per parameter), "
        f"{epochs:.2f} epochs",
        "compute": f"{plan.flops_per_token:.3g} FLOPs per token, {plan.flops_per_token * total:.3g} in all",
        "memory estimate": f"{sum(plan.memory.values()) / GIB:.2f} GiB per device ({parts})",
        "time": "not measured" if plan.seconds is None else f"about {format_duration(plan.seconds)} {where}",
        "learning rate": preview(plan.learning_rates, plan.peak_learning_rate),
    }
    for name, text in lines.items():
        print(f"{name:>17}  {text}")
    for note in plan.notes:
        print(f"{'note':>17}  {note}")


@command("plan", arguments=plan_arguments, show=show)
def main(cfg: DictConfig) -> Plan | list[Finding]:
    """Plans the run, or looks at the machine if check=true."""
    check_classes_again(cfg)
    validate(cfg)
    check(cfg, {"check": one_of(True, False)})
    return check_setup(cfg) if cfg.check else plan_run(cfg)


def plan_run(cfg: DictConfig) -> Plan:
    """What the run would cost; nothing is allocated but the tokens."""
    with imports():
        import torch

        from gpt_lightning.data.windows import split_batch
        from gpt_lightning.rundir.checkpoint import newest_valid_checkpoint

    parts = build_parts(cfg)
    devices = device_count(cfg)
    micro, accumulation = split_batch(
        cfg.data.batch_size, cfg.device.micro_batch_size or DEFAULT_MICRO_BATCH_SIZE, devices
    )
    begun = newest_valid_checkpoint(Path(cfg.resume) / "checkpoints") if cfg.resume else None
    net, encoding = starting_point(cfg, begun)
    prepared = prepare_data(cfg, parts, net, encoding)
    if net is None:
        with torch.device("meta"):  # shapes without memory
            net = build_net(cfg, prepared.vocab_size)
    else:
        net = build_net(cfg, prepared.vocab_size, net)
    schedule, lr = with_length(parts.schedule, prepared.max_steps), cfg.optimizer.get("lr", 1.0)
    splits, parameters = prepared.store.meta.splits, sum(p.numel() for p in net.parameters())
    block_size, steps = prepared.windows["block_size"], prepared.max_steps
    return Plan(
        parameters=parameters,
        trained_parameters=sum(p.numel() for p in net.parameters() if p.requires_grad),
        train_tokens=splits["train"].tokens,
        val_tokens=splits["val"].tokens,
        vocab_size=prepared.store.n_vocab,
        micro_batch_size=micro,
        accumulation=accumulation,
        devices=devices,
        block_size=block_size,
        windows_per_epoch=prepared.windows_per_epoch,
        steps_per_epoch=prepared.steps_per_epoch,
        max_steps=steps,
        flops_per_token=flops_per_token(net, block_size),
        memory=memory_needs(cfg, net, tokens=micro * block_size, vocab_size=prepared.vocab_size),
        learning_rates=[lr * factor for factor in sampled(schedule, steps)],
        # the peak may lie between the points
        peak_learning_rate=lr * max(map(schedule, range(0, steps, max(1, steps // 1000)))),
        seconds=predicted_seconds(cfg, parts, prepared, net, micro, accumulation),
        tflops=tflops_of(cfg),
        notes=notes_on(
            cfg,
            tokens=splits["train"].tokens,
            parameters=parameters,
            epochs=steps / prepared.steps_per_epoch,
            max_steps=steps,
        ),
    )


if __name__ == "__main__":
    main()
