"""Train a language model: `python -m gpt_lightning.train key=value …`."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from gpt_lightning.config.build import (
    build_callbacks,
    build_data,
    build_loggers,
    build_module,
    build_trainer,
    prepare_data,
    rehearse,
    starting_point,
)
from gpt_lightning.config.command import entry_point, git_revision, lacks_memory, readable, versions
from gpt_lightning.config.memory import device_count, find_micro_batch, out_of_memory
from gpt_lightning.config.repeat import repeat_arguments
from gpt_lightning.config.resume import (
    check_unchanged,
    claimed,
    resume_arguments,
    status,
    warn_of_versions,
)
from gpt_lightning.config.rules import check, duration

if TYPE_CHECKING:
    from gpt_lightning.data.token_store import TokenStore
    from gpt_lightning.rundir.summary import RunSummary
from gpt_lightning.training.slurm import slurm_job

log = logging.getLogger(__name__)


def resume_from(folder: Path) -> tuple[Path | None, int]:
    """The checkpoint to go on from and its step; None and -1 where the run was killed before its first."""
    from gpt_lightning.rundir.checkpoint import newest_valid_checkpoint, read_checkpoint

    warn_of_versions(folder)
    path = newest_valid_checkpoint(folder / "checkpoints")
    if path is None:
        log.info("the run has no checkpoint yet: it begins again")
        return None, -1
    step = int(read_checkpoint(path, verify=False)["progress"]["step"])  # it was just verified
    log.info("resuming from %s at step %d", path, step)
    return path, step


def micro_batch_size(cfg: DictConfig, checkpoint: Path | None) -> int:
    """The number that device.micro_batch_size=auto stands for; a run goes on with the one it began with."""
    from gpt_lightning.rundir.checkpoint import read_checkpoint

    if checkpoint is not None:
        return int(
            read_checkpoint(checkpoint, verify=False)["hyper_parameters"]["device"]["micro_batch_size"]
        )
    return find_micro_batch(cfg, device_count(cfg))


def facts(cfg: DictConfig, store: TokenStore) -> RunSummary:
    """What identifies the run, for its summary."""
    return {
        "name": cfg.name,
        "seed": cfg.seed,
        "device": cfg.device.accelerator,
        "versions": versions(),
        "git_revision": git_revision(),
        "slurm_job": slurm_job(),
        "corpus_digest": store.corpus_digest,
        "tokenizer_digest": store.tokenizer_digest,
    }


@entry_point("train", arguments=lambda given: resume_arguments(repeat_arguments(readable(given))))
def main(cfg: DictConfig) -> float | None:
    started = time.monotonic()
    check(cfg)
    deadline = started + duration(cfg.time_limit) if cfg.time_limit is not None else None
    folder = Path(cfg.paths.run).resolve()
    if cfg.resume is not None:
        check_unchanged(cfg, folder)
        if status(folder).get("status") == "finished":
            log.info("the run in %s is finished; there is nothing to resume", folder)
            return status(folder).get("best_val_loss")
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    with claimed(folder) if getattr(rank_zero_only, "rank", 0) == 0 else nullcontext():
        return train(cfg, folder, deadline)


def train(cfg: DictConfig, folder: Path, deadline: float | None) -> float | None:
    """One run in its directory; returns its best validation loss."""
    import lightning.pytorch as pl
    import torch

    from gpt_lightning.data.windows import split_batch
    from gpt_lightning.training.callbacks.interruption import Interrupted
    from gpt_lightning.training.fit import describe, end_with_parent, fit, quiet_lightning

    quiet_lightning()
    end_with_parent()
    rehearse(cfg, trainer=True)
    log.info("run: %s", folder)
    checkpoint, resume_step = resume_from(folder) if cfg.resume is not None else (None, None)
    net, encoding = starting_point(cfg, checkpoint)
    store = prepare_data(cfg, encoding)
    if cfg.device.micro_batch_size == "auto":
        cfg.device.micro_batch_size = micro_batch_size(cfg, checkpoint)
    pl.seed_everything(cfg.seed, verbose=False)
    torch.set_float32_matmul_precision(cfg.device.matmul_precision)
    data, module = build_data(cfg, store), build_module(cfg, store, net)
    trainer = build_trainer(cfg, build_callbacks(cfg), build_loggers(cfg, resume_step))
    try:
        summary = fit(
            module,
            data,
            trainer,
            folder=folder,
            val_every_steps=cfg.trainer.val_every_steps,
            facts=facts(cfg, store),
            checkpoint=checkpoint,
            deadline=deadline,
        )
    except Interrupted as interrupted:
        log.info("%s; go on with resume=%s", interrupted, folder)
        raise SystemExit(interrupted.code) from None
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        size, _ = split_batch(cfg.data.batch_size, cfg.device.micro_batch_size, trainer.world_size)
        raise out_of_memory(cfg, sum(p.numel() for p in module.parameters()), size) from error
    if trainer.is_global_zero:
        log.info(describe(summary, trainer, folder))
    return summary["best_val_loss"]


if __name__ == "__main__":
    main()
