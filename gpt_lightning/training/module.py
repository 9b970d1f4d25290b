"""The LightningModule: a language model, its loss, its optimizer and its learning-rate schedule.

B sequences of a micro-batch, T block_size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
import tiktoken
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gpt_lightning.data import tokenizer as tokenizers
from gpt_lightning.model.gpt import IGNORE
from gpt_lightning.rundir.checkpoint import Position
from gpt_lightning.training.loggers import log_metrics
from gpt_lightning.training.optimizers import OptimizerFactory, by_role, parameter_groups
from gpt_lightning.training.strategies import shard, whole

log = logging.getLogger(__name__)
UNTRAINED = 1.05  # largest loss of an untrained model, in multiples of that of guessing every token
Schedule = Callable[[int], float]  # optimizer steps done -> factor of the peak learning rate


class LanguageModel(pl.LightningModule):
    """Trains a network to predict the next token.

    Args:
        net: Called as `net(idx, targets, reduction=...)`, returns a loss in nats.
        optimizer: Builds the optimizer from parameter groups.
        schedule: Factor of the learning rate for each optimizer step.
        tokenizer: Saved in every checkpoint, measures bits per byte.
        config: The run's resolved configuration in plain containers, saved in every checkpoint.
        corpus_digest: Of the text, saved in every checkpoint.
        clip_norm: Largest gradient norm of a step; None does not clip.

    Attributes:
        train_loss: Mean loss of the last optimizer step's micro-batches on this rank, () nats.
        mean_loss: Mean of it over all ranks, as it was last asked for, in nats.
        grad_norm: Gradient norm of the last optimizer step before clipping, ().
        lr: Learning rate of the last optimizer step.
        step_ended: Whether the last micro-batch ended an optimizer step.
        before_step: Called before each optimizer step, with the loss known and the gradient not yet clipped.
        metrics: What the last validation measured.
        best_val_loss: Lowest plausible validation loss so far, in nats per token.
        plausible: Whether the last validation loss is not worse than that of an untrained model.
        n_parameters: Parameters of the network, tied ones counted once, over all shards.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        optimizer: OptimizerFactory,
        schedule: Schedule,
        tokenizer: tiktoken.Encoding,
        config: Mapping[str, Any],
        corpus_digest: str | None = None,
        clip_norm: float | None = 1.0,
    ):
        super().__init__()
        self.net, self.optimizer, self.schedule, self.clip_norm = net, optimizer, schedule, clip_norm
        self.tokenizer, self.corpus_digest = tokenizer, corpus_digest
        self.save_hyperparameters(dict(config))
        self.register_buffer(
            "token_bytes", torch.from_numpy(np.asarray(tokenizers.token_bytes(tokenizer))), persistent=False
        )
        self.n_parameters = sum(p.numel() for p in net.parameters())
        self._loss_sum = torch.zeros(())  # not a buffer, so that it stays in 32 bits if the weights do not
        self.train_loss, self.grad_norm = torch.tensor(math.nan), torch.tensor(math.nan)
        self.lr, self.mean_loss = math.nan, math.nan
        self.step_ended = False
        self.before_step: Callable[[], None] = lambda: None
        self.metrics: dict[str, float] = {}
        self.best_val_loss, self.plausible = math.inf, True
        self._sums: Tensor | None = None

    token_bytes: Tensor

    def configure_model(self) -> None:
        if self.device_mesh is not None:  # which trainer=fsdp has
            shard(self.net, self.device_mesh["data_parallel"])

    def on_train_start(self) -> None:
        self._loss_sum = torch.zeros((), device=self.device)
        if self.global_rank > 0:  # the ranks share the seed of the weights, but their dropout must differ
            torch.manual_seed(torch.initial_seed() + self.global_rank)

    def on_train_batch_start(self, *_: Any) -> None:
        self.step_ended = False

    def training_step(self, batch: tuple[Tensor, ...]) -> Tensor:
        idx, targets, *count = batch
        # a mean over what counts in this micro-batch would weigh micro-batches, or divide by 0
        loss = self.net(idx, targets, reduction="sum") / count[0] if count else self.net(idx, targets)
        self._loss_sum += loss.detach()
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.train_loss = self._loss_sum / self.trainer.accumulate_grad_batches
        self._loss_sum = torch.zeros_like(self._loss_sum)
        self.lr, self.step_ended = optimizer.param_groups[0]["lr"], True

    def configure_gradient_clipping(self, optimizer: Optimizer, *_: Any, **__: Any) -> None:
        trained = [p for p in self.parameters() if p.grad is not None]
        self.grad_norm = whole(nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))
        self.before_step()
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(trained, self.clip_norm, self.grad_norm)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(parameter_groups(self.net, by_role=by_role(self.optimizer)))
        scheduler = LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_validation_epoch_start(self) -> None:
        place = "cpu" if self.device.type == "mps" else self.device  # MPS has no float64
        self._sums = torch.zeros(3, dtype=torch.float64, device=place)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        idx, targets = batch
        nats = self.net(idx, targets, reduction="none")  # (B, T)
        if nats.shape != targets.shape:
            raise ValueError(
                f"the loss of {type(self.net).__name__} has shape {tuple(nats.shape)} under "
                f'reduction="none"; return one loss per token, of shape {tuple(targets.shape)}'
            )
        counted = targets != IGNORE
        n_bytes = self.token_bytes[targets.clamp(min=0)] * counted  # (B, T)
        assert self._sums is not None
        kind = torch.float32 if self.device.type == "mps" else torch.float64
        sums = torch.stack([nats.to(kind).sum(), counted.sum().to(kind), n_bytes.sum().to(kind)])
        self._sums += sums.to(self._sums)

    def on_validation_epoch_end(self) -> None:
        assert self._sums is not None
        nats, tokens, n_bytes = self.trainer.strategy.reduce(self._sums, reduce_op="sum").tolist()
        loss = nats / tokens
        self.metrics = {
            "val/loss": loss,
            "val/perplexity": math.exp(min(loss, 700.0)),  # exp overflows above
            "val/bits_per_byte": nats / math.log(2) / n_bytes if n_bytes else math.nan,
        }
        guess = math.log(self.tokenizer.n_vocab)
        self.plausible = loss <= UNTRAINED * guess  # NaN is not
        if self.plausible:
            self.best_val_loss = min(self.best_val_loss, loss)
        elif self.trainer.is_global_zero:
            log.warning(
                "the validation loss of %.4f at step %d is worse than %.4f, that of guessing: it is not kept "
                "as the best; if it does not fall, lower optimizer.lr",
                *(loss, self.global_step, guess),
            )
        monitored = {**self.metrics, "train/loss": self.mean_train_loss()}
        self.log_dict(monitored, logger=False, sync_dist=False, rank_zero_only=False)
        if not self.trainer.sanity_checking:
            log_metrics(self.trainer, self.metrics, self.global_step)

    def mean_train_loss(self) -> float:
        """Mean of `train_loss` over all ranks, which `mean_loss` keeps; a collective operation."""
        loss = self.train_loss.clone().to(self.device)
        self.mean_loss = float(self.trainer.strategy.reduce(loss, reduce_op="mean"))
        return self.mean_loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokenizer"] = tokenizers.to_state(self.tokenizer)
        checkpoint["tokenizer_digest"] = tokenizers.digest(self.tokenizer)
        checkpoint["corpus_digest"] = self.corpus_digest
        checkpoint["progress"] = Position(
            step=self.global_step,
            train_loss=self.mean_train_loss(),
            best_val_loss=self.best_val_loss,
            lr=self.lr,
            metrics=dict(self.metrics),
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        progress: Position = checkpoint["progress"]
        self.train_loss, self.lr = torch.tensor(progress["train_loss"]), progress["lr"]
        self.best_val_loss, self.metrics = progress["best_val_loss"], dict(progress["metrics"])
