"""Tokenize a corpus into the cache: `python -m gpt_lightning.prepare data=… tokenizer=…`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from gpt_lightning.config.command import command
from gpt_lightning.config.errors import ConfigError
from gpt_lightning.config.nodes import build

if TYPE_CHECKING:
    from gpt_lightning.data.token_store import TokenStore


def show(store: TokenStore | None) -> None:
    """The tokens of each split."""
    if store is None:
        print("this shard is done; the store is made when all shards are")
        return
    for name, split in store.meta.splits.items():
        floor = store.floor_bits_per_byte(name)
        print(
            f"{name:>5}: {split.tokens:,} tokens, {split.documents:,} documents, {split.bytes:,} bytes"
            f" ({split.bytes / split.tokens:.2f} bytes per token)"
            + (f", corpus entropy {floor:.4f} bits per byte" if floor else "")
        )
    print(f"vocabulary: {store.n_vocab:,} ids\ncache: {store.folder}")


@command("prepare", show=show)
def main(cfg: DictConfig) -> TokenStore | None:
    """The token store; None while other shards are missing."""
    from gpt_lightning.data.remembered import remember_in
    from gpt_lightning.data.shards import prepare_shard
    from gpt_lightning.data.token_store import prepare

    if not isinstance(cfg.verify, bool):
        raise ConfigError(f"verify={cfg.verify!r} must be true or false")
    corpus, tokenizer, cache = build(cfg, "data.corpus"), build(cfg, "tokenizer"), cfg.paths.cache
    if (cfg.shard is None) != (cfg.shards is None):
        raise ConfigError(f"shard={cfg.shard} and shards={cfg.shards} go together; give both or neither")
    if isinstance(cache, str):  # anything else is refused below
        remember_in(Path(cache) / "remembered", verify=cfg.verify)
    if cfg.shard is None:
        return prepare(corpus, tokenizer, cache)
    return prepare_shard(corpus, tokenizer, cache, shard=cfg.shard, shards=cfg.shards)


if __name__ == "__main__":
    main()
