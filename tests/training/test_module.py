"""LanguageModel against plain PyTorch."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from gpt_lightning.data import tokenizer as tokenizers
from gpt_lightning.data.corpus.files import TextFiles
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.token_store import TokenStore, prepare
from gpt_lightning.data.tokenizer import Byte
from gpt_lightning.data.windows import IGNORE, EvalBatches, TrainBatches
from gpt_lightning.model.gpt import GPT, GPTConfig
from gpt_lightning.rundir.checkpoint import read_checkpoint
from gpt_lightning.rundir.metrics import read_metrics
from gpt_lightning.training.fit import quiet_lightning
from gpt_lightning.training.loggers import MetricsCSV
from gpt_lightning.training.module import LanguageModel
from gpt_lightning.training.optimizers import adamw, parameter_groups
from gpt_lightning.training.schedules import linear


@pytest.fixture(scope="module")
def store(small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return prepare(TextFiles(str(small_text)), Byte(), tmp_path_factory.mktemp("store"))


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


def fit(module: LanguageModel, data: TextDataModule, accumulate: int, **options: Any) -> Record:
    quiet_lightning()
    record = Record()
    values: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": 5,
        "max_epochs": -1,
        "callbacks": [record],
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accumulate_grad_batches": accumulate,
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": None,
        "val_check_interval": 5 * accumulate,
    }
    trainer = pl.Trainer(**{**values, **options})
    trainer.fit(module, datamodule=data)
    return record


def by_hand(store: TokenStore, clip: float) -> tuple[GPT, Record]:
    """Five steps of a training loop without Lightning, accumulation or schedules' classes."""
    net, record = build(store).net, Record()
    optimizer = adamw(parameter_groups(net), lr=1e-2)
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


class IgnoresReduction(torch.nn.Linear):
    """A model of the user's own that always returns the mean loss."""

    def forward(self, idx: torch.Tensor, targets: torch.Tensor, *, reduction: str = "mean") -> torch.Tensor:
        return super().forward(targets[..., None].float()).square().mean()


def test_model_that_ignores_reduction_is_refused_at_the_first_validation(store: TokenStore) -> None:
    module = build(store)
    module.net = IgnoresReduction(1, 1)
    line = r'loss of IgnoresReduction has shape \(\) under reduction="none"; .*\(117, 16\)'
    with pytest.raises(ValueError, match=line):
        fit(module, data_module(store, 8), 1)


def test_no_clipping_still_measures_the_norm(store: TokenStore) -> None:
    record = fit(build(store, clip_norm=None), data_module(store, 8), 1)
    _, expected = by_hand(store, clip=math.inf)
    assert record.norms == pytest.approx(expected.norms, rel=1e-4)


def test_checkpoint_restores_what_the_module_knows(store: TokenStore, tmp_path: Path) -> None:
    module = build(store, corpus_digest="of the text")
    record = fit(module, data_module(store, 4), 2)
    module.trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = read_checkpoint(tmp_path / "last.ckpt")
    assert checkpoint["progress"] == {
        "step": 5,
        "train_loss": record.losses[-1],
        "best_val_loss": module.metrics["val/loss"],
        "lr": record.rates[-1],
        "metrics": module.metrics,
    }
    assert checkpoint["tokenizer"] == tokenizers.to_state(store.tokenizer)
    assert checkpoint["tokenizer_digest"] == store.meta.tokenizer_digest
    assert checkpoint["corpus_digest"] == "of the text"
    assert checkpoint["hyper_parameters"] == {"model": {}}
    assert all(name.startswith("net.") for name in checkpoint["state_dict"])
    again = build(store)
    again.on_load_checkpoint(checkpoint)  # type: ignore[arg-type]
    for name in ("train_loss", "lr", "best_val_loss", "metrics"):
        assert getattr(again, name) == getattr(module, name)


def test_new_module_has_measured_nothing(store: TokenStore) -> None:
    module = build(store)
    assert all(map(math.isnan, (module.train_loss, module.grad_norm, module.lr)))
    assert (module.best_val_loss, module.metrics, module.step_ended) == (math.inf, {}, False)
    assert (module.clip_norm, module.corpus_digest, module.plausible) == (1.0, None, True)
    assert module.n_parameters == module.net.num_parameters()


def test_validation_is_logged_once_for_each_step(store: TokenStore, tmp_path: Path) -> None:
    module = build(store)
    logger = MetricsCSV(tmp_path / "metrics.csv")
    record = fit(module, data_module(store, 8), 1, logger=logger, num_sanity_val_steps=1, log_every_n_steps=1)
    logger.save()
    assert read_metrics(tmp_path / "metrics.csv") == [{"step": 5.0, **module.metrics}]
    monitored = {key: float(value) for key, value in module.trainer.callback_metrics.items()}
    assert monitored == pytest.approx({**module.metrics, "train/loss": record.losses[-1]})


def test_best_validation_loss_is_the_lowest(store: TokenStore) -> None:
    module = build(store)
    found: list[tuple[float, float]] = []

    class Note(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:  # type: ignore[override]
            found.append((pl_module.metrics["val/loss"], pl_module.best_val_loss))
            if len(found) == 4:  # the last one will be worse
                with torch.no_grad():
                    pl_module.net.transformer.wte.weight.normal_(std=2)

    fit(module, data_module(store, 8), 1, callbacks=[Note()], val_check_interval=1)
    losses = [loss for loss, _ in found]
    assert min(losses) < losses[-1]
    assert [best for _, best in found] == [min(losses[: i + 1]) for i in range(5)]


def test_loss_and_norm_are_known_before_the_optimizer_step(store: TokenStore) -> None:
    module, seen = build(store, clip_norm=0.5), []

    def note() -> None:
        norms = [p.grad.norm() for p in module.net.parameters() if p.grad is not None]
        seen.append((float(module.train_loss), float(torch.linalg.vector_norm(torch.stack(norms)))))

    module.before_step = note
    record = fit(module, data_module(store, 8), 1)
    losses, norms = zip(*seen, strict=True)
    assert list(losses) == record.losses
    assert list(norms) == pytest.approx(record.norms, rel=1e-5)  # not yet clipped
    assert max(norms) > 0.5


def test_sums_of_a_validation_leave_out_ignored_targets(
    store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = build(store).eval()
    module.token_bytes = torch.arange(1, store.n_vocab + 1).to(module.token_bytes)
    idx = torch.randint(0, 256, (2, 16))
    targets = torch.randint(1, 256, (2, 16))
    targets[0, 3], targets[1, 2] = IGNORE, 0
    counted = targets[targets != IGNORE]
    for place, kind in (("cpu", torch.float64), ("mps", torch.float32)):  # MPS has no float64
        monkeypatch.setattr(LanguageModel, "device", torch.device(place))
        module.on_validation_epoch_start()
        with torch.no_grad():
            for _ in range(2):
                module.validation_step((idx, targets))
            nats = module.net(idx, targets, reduction="none")
        assert module._sums is not None
        assert module._sums.dtype == torch.float64
        assert module._sums.device.type == "cpu"
        expected = [2 * float(nats.to(kind).sum()), 2 * 31, 2 * int((counted + 1).sum())]
        assert module._sums.tolist() == expected


def test_perplexity_does_not_overflow_and_bits_need_bytes(
    store: TokenStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def reduce(_: Any, value: torch.Tensor, group: Any = None, reduce_op: str = "mean") -> torch.Tensor:
        return {"sum": 2 * value, "mean": value}[reduce_op]  # the other rank has the same

    monkeypatch.setattr(SingleDeviceStrategy, "reduce", reduce)
    module = build(store)
    with torch.no_grad():
        module.net.transformer.wte.weight.mul_(1e5)
    module.token_bytes.zero_()
    quiet_lightning()
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.validate(module, datamodule=data_module(store, 8), verbose=False)
    assert module.metrics["val/loss"] > 701
    assert module.metrics["val/perplexity"] == math.exp(700)
    assert math.isnan(module.metrics["val/bits_per_byte"])
    assert caplog.messages == [
        f"the validation loss of {module.metrics['val/loss']:.4f} at step 0 is worse than "
        f"{math.log(store.n_vocab):.4f}, that of guessing: it is not kept as the best; if it does not fall, "
        "lower optimizer.lr"
    ]


def test_training_loss_is_the_mean_of_all_ranks(store: TokenStore) -> None:
    module = build(store)
    module.train_loss = torch.tensor(2.0)

    def reduce(value: torch.Tensor, reduce_op: str) -> torch.Tensor:
        return {"sum": value + 4, "mean": (value + 4) / 2}[reduce_op]  # the other rank has 4

    module.trainer = SimpleNamespace(strategy=SimpleNamespace(reduce=reduce))  # type: ignore[assignment]
    assert module.mean_train_loss() == 3.0
    assert float(module.train_loss) == 2.0


def test_ranks_differ_in_their_dropout_only(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    module = build(store)
    torch.manual_seed(5)
    torch.rand(1)
    before = torch.get_rng_state()
    module.on_train_start()
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(LanguageModel, "global_rank", 1)
    module.on_train_start()
    assert torch.initial_seed() == 6


def test_matrices_decay_though_sharding_makes_them_flat(store: TokenStore) -> None:
    module = build(store)
    flat = module.net.transformer.wpe.weight = torch.nn.Parameter(
        module.net.transformer.wpe.weight.detach().flatten()
    )
    optimizer = module.configure_optimizers()["optimizer"]
    decay, rest = optimizer.param_groups
    assert decay["weight_decay"] > 0 == rest["weight_decay"]
    assert any(parameter is flat for parameter in decay["params"])
