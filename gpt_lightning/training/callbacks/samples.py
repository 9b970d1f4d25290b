"""Generates text while a model trains."""

from __future__ import annotations

import codecs
import logging
import math
import re
from pathlib import Path

import lightning.pytorch as pl
import tiktoken
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from gpt_lightning.data import tokenizer as tokenizers
from gpt_lightning.data.files import atomic_write
from gpt_lightning.inference.decoding import generate
from gpt_lightning.inference.sampling import SamplingSettings
from gpt_lightning.model.gpt import CausalLM
from gpt_lightning.model.own import as_causal_lm
from gpt_lightning.model.weights import NETWORKS, EmptyInit
from gpt_lightning.training.callbacks.charts import show_sample
from gpt_lightning.training.module import LanguageModel
from gpt_lightning.training.strategies import Sharded, whole_state

log = logging.getLogger(__name__)
SECTION = re.compile(rb"(?m)^(?=## Step (\d+)$)")  # beginning of a sample in samples.md


class Samples(Callback):
    """Generates text after each validation, into samples.md and TensorBoard.

    Args:
        path: The file; sections are appended.
        prompt: Beginning of the text; an empty one starts a new document.
        max_new_tokens, temperature, top_k: As in `SamplingSettings`.
        seed: Of a private generator, so that sampling does not change the training.
        show: Whether to log each sample as well.

    Raises:
        ValueError: If a setting is out of its range.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        prompt: str = "",
        max_new_tokens: int = 150,
        temperature: float = 0.8,
        top_k: int | None = 50,
        seed: int = 1337,
        show: bool = False,
    ):
        self.path, self.prompt, self.show = Path(path), prompt, show
        try:
            self.settings = SamplingSettings(
                max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed
            )
        except ValueError as error:
            raise ValueError(f"callbacks.samples.{error}") from error
        self.latest = ""

    def check_tokenizer(self, encoding: tiktoken.Encoding) -> None:
        """Refuse a prompt with a character that the vocabulary lacks, before anything of a run is written.

        Raises:
            ValueError: If it has one.
        """
        try:
            tokenizers.encode_array(encoding, self.prompt)
        except ValueError as error:
            raise ValueError(f"callbacks.samples.prompt={self.prompt!r}: {error}") from error

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:  # type: ignore[override]
        """Remove the samples that a resumed run will write again."""
        if trainer.is_global_zero and self.path.exists():
            self._write(trainer.global_step + 1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:  # type: ignore[override]
        net = pl_module.net
        state = whole_state(net) if isinstance(trainer.strategy, Sharded) else None
        if not trainer.is_global_zero:
            return
        step, loss = trainer.global_step, pl_module.metrics["val/loss"]
        try:
            if not math.isfinite(loss):  # on CUDA, sampling from NaN would break the whole process
                raise ValueError(f"the validation loss is {loss}")
            if state is not None:
                if not isinstance(net, CausalLM) or type(net.config) not in NETWORKS:
                    raise ValueError("trainer.strategy=fsdp samples from this package's networks only")
                with EmptyInit():
                    net = NETWORKS[type(net.config)](net.config)
                net.load_state_dict(state)
                net.eval().to(pl_module.device)
            encoding = pl_module.tokenizer
            if not isinstance(net, CausalLM):
                longest = pl_module.hparams["model"]["block_size"]
                net = as_causal_lm(net, vocab_size=encoding.n_vocab, block_size=longest)
            self._sample(trainer, net, encoding)
        except Exception as error:  # nothing that only looks may end a run
            log.warning("step %d has no sample: %s", step, error)

    def _sample(self, trainer: pl.Trainer, net: CausalLM, encoding: tiktoken.Encoding) -> None:
        end = encoding.eot_token
        ids = tokenizers.encode_array(encoding, self.prompt).tolist() if self.prompt else []
        new = generate(net, [[end, *ids]], self.settings, stop_ids=(end,))[0]
        self.latest = encoding.decode([*ids, *(token for token in new if token != end)])
        if self.show:
            with tqdm.external_write_mode():
                log.info("%s\n", self.latest)
        step = trainer.global_step
        self._write(step, f"## Step {step}\n\n```text\n{self.latest}\n```\n\n".encode())
        show_sample(trainer, self.prompt, self.latest)

    def _write(self, step: int, section: bytes = b"") -> None:
        """Replace the sections of a step and of later ones, in bytes, so that a damaged file is no error."""
        text = self.path.read_bytes().removeprefix(codecs.BOM_UTF8) if self.path.exists() else b""
        parts = SECTION.split(text)  # what precedes the first section, then each step with its section
        kept = [part for number, part in zip(parts[1::2], parts[2::2], strict=True) if int(number) < step]
        with atomic_write(self.path) as file:
            file.write(b"".join([*kept, section]))
