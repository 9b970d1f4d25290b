"""Where a run begins: from weights that were trained before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiktoken

from gpt_lightning.inference.loading import load_net, load_tokenizer, read_folder
from gpt_lightning.interop.gpt2 import download
from gpt_lightning.model.gpt import GPT
from gpt_lightning.rundir.checkpoint import read_checkpoint


def start_from(source: str, **overrides: Any) -> tuple[GPT, tiktoken.Encoding | None]:
    """A network with weights to begin from, and the tokenizer that they were trained with.

    Args:
        source: A checkpoint or run directory of this package, a folder in Hugging Face's layout or one
            that `gpt_lightning.export` wrote, or `hf:` and a name on the hub.
        overrides: Fields of GPTConfig that the user asks for; those that change the shape of the
            weights must agree with the source.

    Returns:
        The network, and the tokenizer, None where the source has none.

    Raises:
        OSError: If the source does not exist or cannot be reached.
        ValueError: If it is damaged or contradicts an override.
    """
    folder = Path(source).expanduser()
    if source.startswith("hf:"):
        name = source.removeprefix("hf:")
        folder = Path(name) if Path(name).is_dir() else download(name)
    if source.startswith("hf:") or (folder / "config.json").is_file():
        net, tokenizer, _ = read_folder(folder, **overrides)
        return net.train(), tokenizer
    checkpoint = read_checkpoint(source)
    return load_net(checkpoint, **overrides).train(), load_tokenizer(checkpoint)
