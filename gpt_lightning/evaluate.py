"""How well a model predicts text, or recites it: `python -m gpt_lightning.evaluate checkpoint=… data=…`."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from gpt_lightning.config.command import ConfigError, build, check_output, entry_point, verbatim

if TYPE_CHECKING:
    import numpy as np

    from gpt_lightning.data.corpus.base import Corpus
    from gpt_lightning.inference.text import TextGenerator

SETTINGS = ("max_new_tokens", "temperature", "top_k", "seed")  # of the texts to generate
TABLE = {  # what is printed, with its format
    "text": "{}",
    "tokens": "{:,}",
    "bytes": "{:,}",
    "loss": "{:.4f} nats per token",
    "standard_error": "{:.4f}",
    "perplexity": "{:.2f}",
    "word_perplexity": "{:.4f}",
    "bits_per_byte": "{:.4f}",
    "floor_bits_per_byte": "{:.4f}, the entropy of the corpus",
    "bleu": "{:.2f}",
}


def check(cfg: DictConfig) -> None:
    """What can be wrong before the model is there."""
    if cfg.checkpoint is None:
        raise ConfigError("checkpoint= is missing; give a checkpoint, a run directory or an exported folder")
    if cfg.get("data") is not None and cfg.text is not None:
        raise ConfigError(f"text={cfg.text} and data= exclude each other; give one of them")
    if cfg.get("data") is None and cfg.text is None and cfg.samples is None and not cfg.num_samples:
        raise ConfigError("nothing to evaluate; give data=, text=, num_samples= or samples=")
    if cfg.reference is not None and cfg.samples is None:
        raise ConfigError(f"reference={cfg.reference} is compared with texts; give them with samples=FILE")
    for key in ("text", "samples", "reference"):
        if cfg[key] is not None and not Path(cfg[key]).expanduser().exists():
            raise ConfigError(f"{key}={cfg[key]} does not exist")
    check_output(cfg.output)
    if cfg.split not in ("train", "val"):
        raise ConfigError(f"split={cfg.split!r} must be train or val")
    for key, least in (("num_samples", 0), ("batch_size", 1)):
        optional = key == "batch_size" and cfg[key] is None
        if not optional and (type(cfg[key]) is not int or cfg[key] < least):
            raise ConfigError(f"{key}={cfg[key]!r} must be a whole number of at least {least}")
    if type(cfg.per_document) is not bool:
        raise ConfigError(f"per_document={cfg.per_document!r} must be true or false")
    if cfg.reference is not None and importlib.util.find_spec("sacrebleu") is None:
        raise ModuleNotFoundError(name="sacrebleu")


def read_tokens(
    cfg: DictConfig, corpus: Corpus | None, model: TextGenerator
) -> tuple[np.ndarray, dict[str, Any]]:
    """The tokens to score, and what is known of their text."""
    from gpt_lightning.data.corpus.files import TextFiles
    from gpt_lightning.data.token_store import prepare
    from gpt_lightning.data.tokenizer import FixedTokenizer
    from gpt_lightning.evaluation.losses import count_words, lay_out

    if corpus is not None:
        store = prepare(corpus, FixedTokenizer(model.tokenizer), cfg.paths.cache)
        name = cfg.data.get("name") or cfg.data.get("path") or type(corpus).__name__
        floor = store.floor_bits_per_byte(cfg.split)
        return store.tokens(cfg.split), {"text": f"{name}, {cfg.split}", "floor_bits_per_byte": floor}
    file = TextFiles(cfg.text, val_fraction=sys.float_info.min)  # so small that all is training text
    documents = list(file.documents("train"))
    tokens = lay_out(documents, model.tokenizer, separated=file.separated or cfg.per_document)
    return tokens, {"text": cfg.text, "words": sum(map(count_words, documents))}


def read_lines(path: str) -> list[str]:
    """Texts of a file: the `text` of each line of a .jsonl, else the lines."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason}); convert it") from error
    try:
        return [json.loads(line)["text"] for line in lines] if path.endswith(".jsonl") else lines
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} has a line without a text ({error!r}); use what generate wrote") from error


def judge(cfg: DictConfig, corpus: Corpus | None, model: TextGenerator) -> dict[str, Any]:
    """Whether texts of the model are its own, beside text that it has not seen."""
    from gpt_lightning.evaluation.originality import alike, distinct, excerpt, originality

    settings = {key: cfg[key] for key in SETTINGS}
    if cfg.samples is not None:
        samples = read_lines(cfg.samples)
    else:
        samples = model.generate(num_samples=cfg.num_samples, **settings)
    found: dict[str, Any] = {"samples": {f"distinct_{n}": distinct(samples, n) for n in (1, 2, 3)}}
    if corpus is not None:
        training, unseen = excerpt(corpus, "train"), alike(excerpt(corpus, "val"), samples)
        found["samples"] = originality(samples, training)
        found["validation"] = originality(unseen, training)
    if cfg.reference is not None:
        import sacrebleu

        references = read_lines(cfg.reference)
        if len(references) != len(samples):
            raise ConfigError(
                f"reference={cfg.reference} has {len(references)} texts for the {len(samples)} of "
                f"samples={cfg.samples}; write one a line for each"
            )
        found["bleu"] = sacrebleu.corpus_bleu(samples, [references]).score
    return found


def show(result: dict[str, Any]) -> None:
    """The table; a column for each kind of text where several are compared."""
    for key, layout in TABLE.items():
        if result.get(key) is not None:
            print(f"{key:>20}  {layout.format(result[key])}")
    columns = [key for key in ("samples", "validation") if key in result]
    if columns:
        print(f"\n{'':>20}  " + "".join(f"{column:>12}" for column in columns))
    for key in result.get("samples", {}):
        values = [result[column][key] for column in columns]
        print(f"{key:>20}  " + "".join(f"{'-' if v is None else format(v, '.3f'):>12}" for v in values))


@entry_point("evaluate", arguments=verbatim("checkpoint", "text", "samples", "reference", "output"))
def main(cfg: DictConfig) -> None:
    check(cfg)
    from gpt_lightning.evaluation.losses import evaluate
    from gpt_lightning.inference.loading import load
    from gpt_lightning.inference.session import check as check_settings

    check_settings(num_samples=max(1, cfg.num_samples), stop=None, **{key: cfg[key] for key in SETTINGS})
    model = load(cfg.checkpoint, cfg.device.accelerator, cfg.dtype)
    corpus: Corpus | None = build(cfg.data.corpus, "data.corpus") if cfg.get("data") is not None else None
    result: dict[str, Any] = {"checkpoint": str(cfg.checkpoint)}
    if corpus is not None or cfg.text is not None:
        tokens, facts = read_tokens(cfg, corpus, model)
        options = {key: cfg[key] for key in ("stride", "batch_size", "per_document")}
        result |= facts | evaluate(model, tokens, **options, words=facts.get("words"))
    if cfg.num_samples or cfg.samples is not None:
        result |= judge(cfg, corpus, model)
    show(result)
    if cfg.output is not None:
        path = Path(cfg.output).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
