"""Random runs of a few seconds, drawn from the configuration groups."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

SGD = "_target_: torch.optim.SGD\n_partial_: true\nlr: 0.05\nmomentum: 0.9\n"  # as a user adds an optimizer
WORDS = ["the", "a", "cat", "sees", "hears", "likes", "old", "red", "tree", "and", "then", "it", "é", "猫"]


@dataclass(frozen=True)
class Material:
    """What the runs read: a text, a folder with a user's own choices, and weights to begin from."""

    text: Path
    choices: Path
    weights: Path

    @classmethod
    def make(cls, folder: Path) -> Material:
        """Write the text and the choices; a run of BASE has to write the weights."""
        draw = random.Random(1)
        sentences = (" ".join(draw.choices(WORDS, k=draw.randint(4, 9))) + ".\n" for _ in range(500))
        (folder / "choices" / "optimizer").mkdir(parents=True)
        (folder / "choices" / "optimizer" / "sgd.yaml").write_text(SGD)
        (folder / "text.txt").write_text("".join(sentences), encoding="utf-8")
        return cls(folder / "text.txt", folder / "choices", folder / "base" / "checkpoints" / "last.ckpt")

    @property
    def base(self) -> list[str]:
        """The command line of the run whose weights the fine-tuned runs begin with."""
        few = ["trainer.max_steps=20", "logger=none", "callbacks.samples=null", "tokenizer=byte"]
        sizes = ["model.n_layer=2", "model.n_head=2", "model.n_embd=16", "model.block_size=32"]
        return ["data=text", f"data.path={self.text}", "device=cpu", *few, *sizes]


@dataclass(frozen=True)
class Configuration:
    """A run: its command line, and what of it is counted and printed."""

    arguments: tuple[str, ...]
    features: tuple[str, ...]


def draw_configuration(draw: random.Random, material: Material) -> Configuration:
    """A random run that takes a few seconds on a CPU."""
    features: list[str] = []
    parts = [_data(draw, material), _model(draw, material, features), _training(draw, material, features)]
    processes = 2 if draw.random() < 0.15 else 1
    workers = draw.choice([0, 0, 0, 2]) if processes == 1 else draw.choice([0, 0, 1])
    micro = draw.choice([2, 4] if processes == 2 else [2, 4, 8])
    parts.append(["device=cpu", f"device.micro_batch_size={micro}", f"data.num_workers={workers}"])
    if processes == 2:
        parts.append(["device.devices=2", "trainer.strategy=ddp"])
        features.append("two processes")
    if workers:
        features.append("workers")
    if micro * processes < 8:
        features.append("accumulation")
    return Configuration(tuple(argument for part in parts for argument in part), tuple(features))


def _yes(draw: random.Random) -> str:
    return draw.choice(["true", "false"])


def _data(draw: random.Random, material: Material) -> list[str]:
    found = [f"data={draw.choice(['text', 'lines'])}", f"data.path={material.text}", "data.batch_size=8"]
    found += [f"data.val_fraction={draw.choice([0.05, 0.1, 0.3])}", f"data.shuffle={_yes(draw)}"]
    found += [f"data.drop_last={_yes(draw)}", f"data.random_offset={_yes(draw)}"]
    return [*found, f"seed={draw.randrange(1000)}"]


def _model(draw: random.Random, material: Material, features: list[str]) -> list[str]:
    dropout = f"model.dropout={draw.choice([0.0, 0.1])}"
    if draw.random() < 0.2:
        features.append("adapters")
        layers = draw.choice(["[q_proj]", "[q_proj,o_proj,c_fc]"])
        found = [f"init_from={material.weights}", f"lora.r={draw.choice([1, 4])}", dropout]
        return [*found, f"lora.target_modules={layers}", f"lora.lora_dropout={draw.choice([0.0, 0.1])}"]
    tokenizer = draw.choice(["byte", "char", "bpe"])
    features.append(tokenizer)
    found = [f"tokenizer={tokenizer}", *(["tokenizer.vocab_size=300"] if tokenizer == "bpe" else [])]
    found += [f"model.n_layer={draw.choice([1, 2])}", f"model.n_embd={draw.choice([16, 32])}", dropout]
    found += ["model.n_head=2", f"model.block_size={draw.choice([16, 32])}"]
    model = draw.choice(["gpt", "qwen3", "starcoder2"])
    features.append(model)
    found += [f"model={model}", f"model.tie_weights={_yes(draw)}"]
    return found + ([f"model.bias={_yes(draw)}"] if model == "gpt" else [])


def _training(draw: random.Random, material: Material, features: list[str]) -> list[str]:
    optimizer = draw.choice(["adamw", "adamw" if "adapters" in features else "muon", "sgd"])
    scheduler = draw.choice(["wsd", "cosine", "linear", "constant"])
    features += [optimizer, scheduler]
    steps, every = draw.randint(30, 100), draw.randint(3, 30)
    found = ["--config-dir", str(material.choices)] if optimizer == "sgd" else []
    found += [f"optimizer={optimizer}", f"scheduler={scheduler}"]
    found += [f"scheduler.warmup_steps={draw.randint(0, 9)}"]
    if draw.random() < 0.15:
        features.append("epochs")
        found += ["trainer.max_steps=null", f"trainer.max_epochs={draw.randint(1, 2)}"]
    else:
        found.append(f"trainer.max_steps={steps}")
    found += [f"trainer.val_every_steps={every}", f"trainer.save_every_steps={draw.randint(2, 25)}"]
    found += [f"trainer.log_every_steps={draw.randint(1, 5)}", f"trainer.keep_last={draw.randint(1, 3)}"]
    found += [f"trainer.val_batches={draw.choice(['null', '3'])}"]
    found += [f"trainer.clip_norm={draw.choice(['1.0', 'null'])}"]
    found += [f"trainer.snapshot_every_steps={draw.choice(['null', 'null', '20'])}"]
    if draw.random() < 0.25:
        features.append("early stopping")
        found += ["callbacks=early_stopping", f"callbacks.early_stopping.patience={draw.randint(1, 3)}"]
        found += [f"callbacks.early_stopping.min_delta={draw.choice([0.0, 0.05, 0.5])}"]
    if draw.random() < 0.25:
        features.append("target loss")
        found.append(f"target_loss={draw.choice([2.9, 3.3, 4.5])}")
    if draw.random() < 0.3:
        found.append("callbacks.samples=null")
    else:
        features.append("samples")
        found.append("callbacks.samples.max_new_tokens=16")
    if draw.random() < 0.15:
        found.append("logger=none")
    return found
