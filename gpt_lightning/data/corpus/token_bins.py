"""Folders that are tokenized already, as nanoGPT prepares them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt_lightning.data.corpus.base import Split, digest_files


@dataclass(frozen=True)
class TokenBins:
    """A folder with train.bin and val.bin as nanoGPT writes them: raw uint16 token ids, used in place.

    meta.pkl is not opened, since a pickle can run code: the tokenizer is the one of the configuration.

    Raises:
        FileNotFoundError: When read, if one of the two files is missing.
        ValueError: When read, if one of them is empty or not a whole number of ids.
    """

    path: str

    separated = True

    def file(self, split: Split) -> Path:
        """The file of a split, which is there and has a plausible size."""
        file = Path(self.path).expanduser() / f"{split}.bin"
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist; data.path= must be a folder with both .bin files"
            )
        size = file.stat().st_size
        if size == 0 or size % 2:
            raise ValueError(f"{file} has {size} bytes, no whole number of uint16 token ids; write it again")
        return file

    def digest(self) -> str:
        return digest_files(["TokenBins", 1], [self.file("train")], [self.file("val")])

    def documents(self, split: Split) -> Iterator[str]:
        raise ValueError(
            f"data.path={self.path} holds token ids, not text to learn a tokenizer from; "
            "choose the tokenizer that made it, such as tokenizer=gpt2"
        )

    def floor_bits(self, document: str) -> float | None:
        return None
