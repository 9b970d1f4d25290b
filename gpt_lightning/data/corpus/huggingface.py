"""Datasets of the Hugging Face hub, or local folders in its layout."""

import sys
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gpt_lightning.data.corpus.base import (
    DocumentParts,
    Split,
    check_fraction,
    digest_files,
    field_of,
    files_below,
    reason_of,
    valid_text,
)

ROWS = 1000  # that a part of a source has at most


@dataclass(frozen=True)
class HuggingFace:
    """Documents from a dataset of the Hugging Face hub, or from a local folder in the hub's layout.

    Args:
        name: Name on the hub, such as "roneneldan/TinyStories", or a folder.
        config: Configuration of the dataset, where it has several.
        revision: Branch, tag or commit on the hub.
        field: Name of the text column.
        split: The dataset's split to train on.
        val_split: The dataset's split to validate on; None takes `val_fraction` of the documents of `split`.
        val_fraction: Share of validation, spread as in TextFiles.
        streaming: Read over the network as needed and store nothing.

    Raises:
        ValueError: If an argument is out of range, and, when read, for an unknown field, split or config.
        OSError: When read, if the dataset can neither be reached nor is stored here.
        ImportError: When read, if `datasets` is not installed.
    """

    name: str
    _: KW_ONLY
    config: str | None = None
    revision: str | None = None
    field: str = "text"
    split: str = "train"
    val_split: str | None = None
    val_fraction: float = 0.1
    streaming: bool = False

    separated = True

    def __post_init__(self) -> None:
        check_fraction(self.val_fraction)

    @property
    def _folder(self) -> Path | None:
        folder = Path(self.name).expanduser()
        return folder if folder.is_dir() else None

    def digest(self) -> str:
        settings: list[object] = ["HuggingFace", 1, self.config, self.field, self.split, self.val_split]
        settings.append(None if self.val_split else self.val_fraction)
        if self._folder is not None:
            return digest_files(settings, files_below(self._folder))
        return digest_files([*settings, self.name, self._load("load_dataset_builder").hash])  # of the commit

    def documents(self, split: Split) -> DocumentParts:
        """In parts: the files of a dataset that streams, or ranges of rows of one that is stored here."""
        name = self.val_split if split == "val" and self.val_split else self.split
        dataset = self._load("load_dataset", split=name, streaming=self.streaming)
        if self.field in (dataset.column_names or ()):
            dataset = dataset.select_columns([self.field])  # does not read the others
        count = dataset.num_shards if self.streaming else -(-len(dataset) // ROWS)
        parts = [partial(self._texts, dataset, index, count) for index in range(count)]
        fraction = None if self.val_split else self.val_fraction
        return DocumentParts(parts, split, fraction, f"data.name={self.name}")

    def floor_bits(self, document: str) -> float | None:
        return None

    def _texts(self, dataset: Any, part: int, parts: int) -> Iterator[str]:
        where = f"data.name={self.name}"
        for batch in dataset.shard(num_shards=parts, index=part, contiguous=True).iter(batch_size=256):
            texts = field_of(batch, self.field, where)
            yield from filter(
                str.strip, (valid_text(text, f"{where}: data.field={self.field}") for text in texts)
            )

    def _load(self, function: str, **options: object) -> Any:
        import datasets

        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        place = str(self._folder or self.name)
        try:
            return getattr(datasets, function)(place, self.config, revision=self.revision, **options)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            kind = ValueError if isinstance(error, ValueError) else OSError
            raise kind(
                f"cannot read data.name={self.name}: {reason_of(error)}; give a name on the hub that can be "
                "reached, or a local folder in the hub's layout"
            ) from error
