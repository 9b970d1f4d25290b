"""LanguageModel against plain PyTorch."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from gpt_lightning.data.corpus.files import TextFiles
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.token_store import TokenStore, prepare
from gpt_lightning.data.tokenizer import Byte
from gpt_lightning.data.windows import EvalBatches, TrainBatches
from gpt_lightning.model.gpt import GPT, GPTConfig
from gpt_lightning.training.fit import quiet_lightning
from gpt_lightning.training.module import LanguageModel
from gpt_lightning.training.optimizers import adamw, decay_groups
from gpt_lightning.training.schedules import linear


@pytest.fixture(scope="module")
def store(small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return prepare(TextFiles(str(small_text)), Byte(), tmp_path_factory.mktemp("store"), progress=False)


def build(store: TokenStore, **options: Any) -> LanguageModel:
    torch.manual_seed(0)
    net = GPT(GPTConfig(vocab_size=store.n_vocab, block_size=16, n_layer=2, n_head=2, n_embd=16))
    return LanguageModel(
        net,
        optimizer=partial(adamw, lr=1e-2),
        schedule=partial(linear, max_steps=20, warmup_steps=2),
        tokenizer=store.tokenizer,
        config={"model": {}},
        **options,
    )


def data_module(store: TokenStore, micro_batch_size: int) -> TextDataModule:
    return TextDataModule(
        store, block_size=16, batch_size=8, micro_batch_size=micro_batch_size, max_steps=5, seed=1
    )


class Record(pl.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:  # type: ignore[override]
        if pl_module.step_ended:
            self.losses.append(float(pl_module.train_loss))
            self.norms.append(float(pl_module.grad_norm))
            self.rates.append(pl_module.lr)


def fit(module: LanguageModel, data: TextDataModule, accumulate: int) -> Record:
    quiet_lightning()
    record = Record()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=5,
        max_epochs=-1,
        callbacks=[record],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=accumulate,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=5 * accumulate,
    )
    trainer.fit(module, datamodule=data)
    return record


def by_hand(store: TokenStore, clip: float) -> tuple[GPT, Record]:
    """Five steps of a training loop without Lightning, accumulation or schedules' classes."""
    net, record = build(store).net, Record()
    optimizer = adamw(decay_groups(net), lr=1e-2)
    batches = TrainBatches(store, block_size=16, batch_size=8, micro_batch_size=8, steps=5, seed=1)
    for step in range(5):
        rate = 1e-2 * (1 / 3 + (2 / 3) * step / 2 if step < 2 else 1 - (step - 2) / 18)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = net(*batches[step])
        optimizer.zero_grad()
        loss.backward()
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in net.parameters()]))
        for p in net.parameters():
            p.grad *= min(1.0, clip / float(norm))
        optimizer.step()
        record.losses.append(float(loss.detach()))
        record.norms.append(float(norm))
        record.rates.append(rate)
    return net, record


@pytest.mark.parametrize("micro_batch_size", [8, 4, 1])
def test_training_equals_a_plain_loop(store: TokenStore, micro_batch_size: int) -> None:
    module = build(store, clip_norm=0.5)
    record = fit(module, data_module(store, micro_batch_size), 8 // micro_batch_size)
    net, expected = by_hand(store, clip=0.5)
    assert record.losses == pytest.approx(expected.losses, rel=1e-5)
    assert record.norms == pytest.approx(expected.norms, rel=1e-4)
    assert record.rates == pytest.approx(expected.rates)
    assert max(expected.norms) > 0.5  # else nothing was clipped
    for (name, p), q in zip(module.net.named_parameters(), net.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5), name


def test_validation_measures_the_whole_split(store: TokenStore) -> None:
    module = build(store)
    fit(module, data_module(store, 8), 1)
    batches = EvalBatches(store, block_size=16, micro_batch_size=1)
    nats, tokens, n_bytes = 0.0, 0, 0
    with torch.no_grad():
        for x, y in (batches[b] for b in range(len(batches))):
            log_p = torch.log_softmax(module.net(x)[0].double(), dim=-1)
            for position, target in enumerate(y[0].tolist()):
                if target >= 0:
                    nats -= float(log_p[position, target])
                    tokens += 1
                    n_bytes += target < 256  # a byte tokenizer's ids are bytes, but for the separator
    assert tokens == len(store.tokens("val")) - 1
    assert module.metrics["val/loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert module.metrics["val/perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert module.metrics["val/bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)


def test_no_clipping_still_measures_the_norm(store: TokenStore) -> None:
    record = fit(build(store, clip_norm=None), data_module(store, 8), 1)
    _, expected = by_hand(store, clip=math.inf)
    assert record.norms == pytest.approx(expected.norms, rel=1e-4)


def test_bad_clip_norm_is_refused(store: TokenStore) -> None:
    with pytest.raises(ValueError, match=r"trainer.clip_norm=0"):
        build(store, clip_norm=0)
