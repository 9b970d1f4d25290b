"""Train a language model: `python -m gpt_lightning.train key=value …`."""

from __future__ import annotations

import logging
import math
import shlex
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from gpt_lightning.config.build import build_data, build_module, prepare_data
from gpt_lightning.config.command import command, imports
from gpt_lightning.config.command_line import OWN_KEYS, as_given, flags_of, key_of
from gpt_lightning.config.errors import lacks_memory
from gpt_lightning.config.parts import build_loggers, build_parts, build_trainer, starting_point
from gpt_lightning.config.ranks import is_first_rank, tell_other_ranks
from gpt_lightning.config.recorded import recorded_choices, without_fixed
from gpt_lightning.config.resume import (
    check_classes_again,
    check_corpus,
    check_extension,
    record_extension,
    warn_of_versions,
)
from gpt_lightning.config.rules import parse_duration, validate
from gpt_lightning.config.run_directory import refuse_to_overwrite
from gpt_lightning.config.start import start_arguments
from gpt_lightning.rundir.directory import locked
from gpt_lightning.rundir.provenance import git_revision, versions
from gpt_lightning.rundir.summary import pruned_by, read_summary

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from gpt_lightning.config.build import Prepared
    from gpt_lightning.config.parts import Parts
    from gpt_lightning.inference.run import Run
    from gpt_lightning.rundir.summary import RunSummary
    from gpt_lightning.training.module import LanguageModel

log = logging.getLogger(__name__)


def provenance(cfg: DictConfig, prepared: Prepared) -> RunSummary:
    """What identifies the run, for its summary."""
    from gpt_lightning.training.slurm import slurm_job

    source = cfg.resume or cfg.repeat
    left_out = recorded_choices(Path(source)) if source else []  # nobody gave them
    texts = [text for text in as_given(HydraConfig.get().overrides.task) if text not in left_out]
    hidden = {*OWN_KEYS, *(["paths.outputs"] if cfg.repeat else [])}  # which repeat= sets, not the user
    return {
        "name": cfg.name,
        "overrides": [text for text in texts if key_of(text) not in hidden],
        "seed": cfg.seed,
        "device": cfg.device.accelerator,
        "versions": versions(),
        "git_revision": git_revision(),
        "slurm_job": slurm_job(),
        "corpus_digest": prepared.store.meta.corpus_digest,
        "tokenizer_digest": prepared.store.meta.tokenizer_digest,
    }


def starting_state(cfg: DictConfig, parts: Parts, folder: Path) -> tuple[Path | None, int, Any, Prepared]:
    """The checkpoint that a resumed run continues from, its step, a network that is there, the tokens.

    The step is -1 without a checkpoint. A resumed run keeps its own tokenizer.
    """
    from gpt_lightning.data.tokenizer import from_state
    from gpt_lightning.rundir.checkpoint import newest_valid_checkpoint, read_checkpoint

    if cfg.resume is None:
        net, encoding = starting_point(cfg)
        return None, -1, net, prepare_data(cfg, parts, net, encoding)
    warn_of_versions(folder)
    path, step, recorded = newest_valid_checkpoint(folder / "checkpoints"), -1, read_summary(folder)
    net, encoding = starting_point(cfg, path)
    digest = recorded.get("corpus_digest")
    if path is None:
        log.info("the run has no checkpoint yet: it begins again")
    else:
        checkpoint = read_checkpoint(path, verify=False)  # it was just verified
        step, encoding = checkpoint["progress"]["step"], from_state(checkpoint["tokenizer"])
        digest = checkpoint.get("corpus_digest") or digest
        log.info("resuming from %s at step %d", path, step)
    extended = check_extension(cfg, max(step, 0))
    check_corpus(parts.corpus, folder, digest)
    prepared = prepare_data(cfg, parts, net, encoding)
    if extended:
        record_extension(cfg)
    return path, step, net, prepared


@command("train", arguments=start_arguments)
def main(cfg: DictConfig) -> Run:
    """Trains, or continues, the run that the configuration describes.

    Raises:
        SystemExit: After a signal or at the time limit. In Python, only Ctrl-C is an exception
            (KeyboardInterrupt); after the others, the run that is returned has the status interrupted.
    """
    started, folder = time.monotonic(), Path(cfg.paths.run).resolve()
    with locked(folder) if is_first_rank() else nullcontext():
        if HydraConfig.get().mode == RunMode.MULTIRUN:  # for single runs, before Hydra wrote anything
            refuse_to_overwrite(folder)
        check_classes_again(cfg)
        validate(cfg)
        limit = parse_duration(cfg.time_limit) if cfg.time_limit is not None else math.inf
        train(cfg, folder, started + limit)
    from gpt_lightning.inference.run import Run

    return Run(folder)


def train(cfg: DictConfig, folder: Path, deadline: float) -> None:
    """One run in its directory: everything that needs no data is built before the data is looked at."""
    with imports():
        import lightning.pytorch as pl
        import torch

        from gpt_lightning.training.callbacks.interruption import Interrupted
        from gpt_lightning.training.callbacks.ranks import end_with_parent
        from gpt_lightning.training.fit import closing_lines, fit, quiet_lightning

    quiet_lightning()
    end_with_parent(folder)
    parts, before = build_parts(cfg), read_summary(folder)
    if cfg.resume and before.get("status") == "finished" and not check_extension(cfg, before["steps"]):
        log.info("the run in %s is finished; there is nothing to resume", folder)
        tell_other_ranks(None, cfg.trainer.timeout_seconds)
        return
    trainer = build_trainer(cfg, parts.callbacks, loggers=[])
    log.info("run: %s\ncommand: %s", folder, command_line(cfg, folder))
    tell_other_ranks(folder, cfg.trainer.timeout_seconds)
    checkpoint, step, net, prepared = starting_state(cfg, parts, folder)
    pl.seed_everything(cfg.seed, verbose=False)
    torch.set_float32_matmul_precision(cfg.device.matmul_precision)
    data, module = build_data(cfg, prepared), build_module(cfg, parts, prepared, net, checkpoint)
    facts: RunSummary = {**provenance(cfg, prepared), "precision": set_precision(cfg, trainer, module)}
    trainer.fit_loop.epoch_loop.max_steps = prepared.max_steps
    trainer.loggers = build_loggers(cfg, step if cfg.resume else None)
    try:
        summary = fit(
            module,
            data,
            trainer,
            folder=folder,
            val_every_steps=cfg.trainer.val_every_steps,
            facts=facts,
            hyperparameters=without_fixed(facts["overrides"], folder),
            checkpoint=checkpoint,
            deadline=deadline,
        )
    except Interrupted as interrupted:
        log.info(pruned_by(folder) or f"{interrupted}; go on with resume={folder}")
        if main.in_python and interrupted.code != 128 + signal.SIGINT:
            return  # whoever called reads the status
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of somebody who presses Ctrl-C many times
        raise SystemExit(interrupted.code) from None
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        raise too_large(cfg, prepared, module.net, trainer.world_size) from error
    if trainer.is_global_zero:
        log.info(closing_lines(summary, trainer, folder))


def command_line(cfg: DictConfig, folder: Path) -> str:
    """The command that trains the same run again, or resumes it."""
    overrides = [f"resume={folder}"] if cfg.resume else as_given(HydraConfig.get().overrides.task)
    return shlex.join(
        ["python", "-m", "gpt_lightning.train", *flags_of(HydraConfig.get(), "train"), *overrides]
    )


def set_precision(cfg: DictConfig, trainer: Trainer, module: LanguageModel) -> str:
    """Give the trainer the precision that was chosen with the network, where device.precision=auto."""
    from gpt_lightning.training.precision import use_precision

    precision = str(module.hparams["device"]["precision"])
    if cfg.device.precision == "auto":
        use_precision(trainer, precision)
        log.info("precision: %s, chosen by device.precision=auto", precision)
    return precision


def too_large(cfg: DictConfig, prepared: Prepared, net: Any, world_size: int) -> ValueError:
    """The error of a run that found too little memory."""
    from gpt_lightning.config.build import memory_needs
    from gpt_lightning.data.windows import split_batch
    from gpt_lightning.training.memory import out_of_memory

    size, _ = split_batch(cfg.data.batch_size, cfg.device.micro_batch_size, world_size)
    tokens = size * prepared.windows["block_size"]
    return out_of_memory(
        memory_needs(cfg, net, tokens=tokens, vocab_size=prepared.vocab_size),
        parameters=sum(p.numel() for p in net.parameters()),
        micro_batch_size=size,
        block_size=prepared.windows["block_size"],
    )


if __name__ == "__main__":
    main()
