"""Generates text while a model trains."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tqdm import tqdm

from gpt_lightning.data import tokenizer as tokenizers
from gpt_lightning.inference.decoding import generate
from gpt_lightning.inference.sampling import SamplingSettings
from gpt_lightning.model.gpt import GPT
from gpt_lightning.training.module import LanguageModel

log = logging.getLogger(__name__)
SECTION = re.compile(r"## Step (\d+)\n")  # heading of a sample in samples.md


class Samples(Callback):
    """Generates text after each validation, into samples.md and TensorBoard.

    Args:
        path: The file; sections are appended.
        prompt: Beginning of the text; an empty one starts a new document.
        max_new_tokens, temperature, top_k: As in `SamplingSettings`.
        seed: Of a private generator, so that sampling does not change the training.
        show: Whether to log each sample as well.

    Raises:
        ValueError: If a setting is out of its range, and, before training, if the prompt has a character
            that the vocabulary lacks.
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

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:  # type: ignore[override]
        """Validate the prompt, and remove the samples that a resumed run will write again."""
        tokenizers.encode_array(pl_module.tokenizer, self.prompt)  # raises before training
        if trainer.is_global_zero and self.path.exists():
            sections = re.split(r"(?m)^(?=## Step \d+$)", self.path.read_text(encoding="utf-8"))
            kept = [
                part
                for part in sections
                if (found := SECTION.match(part)) and int(found[1]) <= trainer.global_step
            ]
            self.path.write_text("".join(kept), encoding="utf-8")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:  # type: ignore[override]
        if not trainer.is_global_zero or not isinstance(pl_module.net, GPT):  # other models may not generate
            return
        encoding = pl_module.tokenizer
        end = tokenizers.end_of_text(encoding)
        ids = tokenizers.encode_array(encoding, self.prompt).tolist() if self.prompt else []
        new = generate(pl_module.net, [[end, *ids]], self.settings, stop_ids=(end,))[0]
        self.latest = encoding.decode([*ids, *(token for token in new if token != end)])
        if self.show:
            with tqdm.external_write_mode():
                log.info("%s\n", self.latest)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"## Step {trainer.global_step}\n\n```text\n{self.latest}\n```\n\n")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("sample", self.latest, trainer.global_step)
