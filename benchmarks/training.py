"""What the framework costs: steps of `train` beside those of a bare PyTorch loop and of Lightning alone.

All train the same network on the same windows of input.txt with fused AdamW and clipping, in turn, in one
process; the loop does nothing else, and "Lightning alone" is a Trainer without callbacks and loggers. The
time is that from the end of the first step to the end of the last, with everything in between but
checkpoints, which have their own interval. Without overrides, the network is so small that the rest shows.
Prints milliseconds per step of each turn (the last ones are those of the loader alone), the medians, and
what a step takes longer than in the bare loop.

    python benchmarks/training.py [--rounds 7] [--steps 800] [--device cpu] [overrides of train …]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, open_dict

from gpt_lightning.config.build import (
    Prepared,
    build_data,
    build_module,
    build_net,
    precision_of,
    prepare_data,
)
from gpt_lightning.config.parts import Parts, build_loggers, build_parts, build_trainer
from gpt_lightning.config.resolvers import CONF
from gpt_lightning.training.fit import fit, quiet_lightning
from gpt_lightning.training.optimizers import parameter_groups
from gpt_lightning.training.precision import use_precision


class Clock(pl.Callback):
    """When micro-batches ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.times.append(time.perf_counter())


def per_step(times: list[float], accumulation: int) -> float:
    """Milliseconds per optimizer step, from the end of the first one on."""
    ends = times[accumulation - 1 :: accumulation]
    return 1000 * (ends[-1] - ends[0]) / (len(ends) - 1)


def framework(cfg: DictConfig, prepared: Prepared, folder: Path) -> float:
    """Milliseconds per step of `train`."""
    pl.seed_everything(cfg.seed, verbose=False)
    with open_dict(cfg):
        cfg.paths.run = str(folder)
    parts = build_parts(cfg)  # callbacks have a state, so each run has its own
    data, module = build_data(cfg, prepared), build_module(cfg, parts, prepared)
    clock = Clock()
    trainer = build_trainer(cfg, [*parts.callbacks, clock], build_loggers(cfg, None))
    if cfg.device.precision == "auto":
        use_precision(trainer, precision_of(cfg, module.net))
    fit(module, data, trainer, folder=folder, val_every_steps=10**9, facts={})
    return per_step(clock.times, trainer.accumulate_grad_batches)


def micro_batches(data: Any, loader: Any) -> int:
    """Of an optimizer step."""
    return data.tokens_per_step // loader.dataset[0][0].numel()


def loading(cfg: DictConfig, prepared: Prepared) -> float:
    """Milliseconds in which the loader gives the micro-batches of a step, when nobody uses them."""
    data = build_data(cfg, prepared)
    loader = data.train_dataloader()
    times = [time.perf_counter() for _ in loader]
    return per_step(times, micro_batches(data, loader))


def plain(cfg: DictConfig, parts: Parts, prepared: Prepared) -> float:
    """Milliseconds per step of the same steps without the framework."""
    torch.manual_seed(cfg.seed)
    data, device = build_data(cfg, prepared), torch.device(cfg.device.accelerator)
    net = build_net(cfg, prepared.vocab_size).to(device)
    optimizer = parts.optimizer(parameter_groups(net))
    loader = data.train_dataloader()
    accumulation = micro_batches(data, loader)
    bf16 = precision_of(cfg, net).startswith("bf16")
    times = []
    for number, (x, y) in enumerate(loader, start=1):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = net(x.to(device), y.to(device)) / accumulation
        loss.backward()
        if number % accumulation == 0:
            torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.trainer.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        times.append(time.perf_counter())
    if device.type == "cuda":
        torch.cuda.synchronize()
        times[-1] = time.perf_counter()
    return per_step(times, accumulation)


class Plain(pl.LightningModule):
    """The least that Lightning trains."""

    def __init__(self, net: torch.nn.Module, parts: Parts):
        super().__init__()
        self.net, self.parts = net, parts

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return self.net(*batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.parts.optimizer(parameter_groups(self.net))


def lightning_alone(cfg: DictConfig, parts: Parts, prepared: Prepared) -> float:
    """Milliseconds per step of a Trainer without what this package adds."""
    pl.seed_everything(cfg.seed, verbose=False)
    data, net, clock = build_data(cfg, prepared), build_net(cfg, prepared.vocab_size), Clock()
    loader = data.train_dataloader()
    accumulation = micro_batches(data, loader)
    nothing = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = pl.Trainer(
        max_steps=cfg.trainer.max_steps,
        accelerator=cfg.device.accelerator,
        precision=precision_of(cfg, net),
        gradient_clip_val=cfg.trainer.clip_norm,
        accumulate_grad_batches=accumulation,
        callbacks=[clock],
        use_distributed_sampler=False,
        **dict.fromkeys(nothing, False),
    )
    trainer.fit(Plain(net, parts), loader)
    return per_step(clock.times, accumulation)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--device", default="cpu")
    arguments, overrides = parser.parse_known_args()
    quiet_lightning()
    logging.getLogger("gpt_lightning").setLevel(logging.ERROR)
    fixed = [
        f"device={arguments.device}", f"trainer.max_steps={arguments.steps}", "trainer.val_batches=1",
        "scheduler=constant", "scheduler.warmup_steps=0", "callbacks.samples=null", "paths.run=.",
        "trainer.log_every_steps=10", "trainer.save_every_steps=1000000", "callbacks.layers=null",
        "logger=none", "tokenizer=byte", "model=gpt", "model.n_layer=1", "model.n_head=1", "model.n_embd=16",
        "model.block_size=8", "data.batch_size=2", "data.random_offset=true",
    ]  # fmt: skip
    if any(text.startswith("model=") for text in overrides):  # with sizes of its own
        fixed = [text for text in fixed if not text.startswith(("model", "data.", "tokenizer"))]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=[*fixed, *overrides])
    parts = build_parts(cfg)
    prepared = prepare_data(cfg, parts)
    turns: list[tuple[float, ...]] = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(-1, arguments.rounds):  # the first turn warms up
            found = (
                framework(cfg, prepared, Path(folder) / str(turn)),
                lightning_alone(cfg, parts, prepared),
                plain(cfg, parts, prepared),
                loading(cfg, prepared),
            )
            if turn >= 0:
                turns.append(found)
                print(f"round {turn + 1}: " + ", ".join(f"{ms:.2f} ms" for ms in found), flush=True)
    print("| | ms per step | longer than the bare loop | range |\n| --- | ---: | ---: | ---: |")
    for index, name in enumerate(("train", "Lightning alone", "bare loop")):
        more = [found[index] - found[2] for found in turns]
        print(
            f"| {name} | {statistics.median(found[index] for found in turns):.2f} "
            f"| {statistics.median(more):.2f} | {min(more):.2f} to {max(more):.2f} |"
        )
    alone, bare = (statistics.median(found[index] for found in turns) for index in (3, 2))
    print(f"the loader alone: {alone:.3f} ms per step, {alone / bare:.2%} of one of the bare loop")


if __name__ == "__main__":
    main()
