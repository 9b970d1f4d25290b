"""Tokenize a corpus into the cache: `python -m gpt_lightning.prepare data=… tokenizer=…`."""

from __future__ import annotations

from omegaconf import DictConfig

from gpt_lightning.config.command import ConfigError, build, entry_point


@entry_point("prepare")
def main(cfg: DictConfig) -> None:
    from gpt_lightning.data.token_store import prepare, prepare_shard

    corpus, tokenizer, cache = build(cfg.data.corpus, "data.corpus"), build(cfg.tokenizer), cfg.paths.cache
    if (cfg.shard is None) != (cfg.shards is None):
        raise ConfigError(f"shard={cfg.shard} and shards={cfg.shards} go together; give both or neither")
    if cfg.shard is None:
        store = prepare(corpus, tokenizer, cache)
    else:
        part = prepare_shard(corpus, tokenizer, cache, shard=cfg.shard, shards=cfg.shards)
        if part is None:
            print(f"shard {cfg.shard} of {cfg.shards} is done; the store is made when all are")
            return
        store = part
    for name, split in store.meta.splits.items():
        floor = store.floor_bits_per_byte(name)
        print(
            f"{name:>5}: {split.tokens:,} tokens, {split.documents:,} documents, {split.bytes:,} bytes"
            f" ({split.bytes / split.tokens:.2f} bytes per token)"
            + (f", entropy {floor:.4f} bits per byte" if floor else "")
        )
    print(f"vocabulary: {store.n_vocab:,} ids\ncache: {store.folder}")


if __name__ == "__main__":
    main()
