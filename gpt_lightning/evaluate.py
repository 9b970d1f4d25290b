"""Scores a checkpoint on a text: `python -m gpt_lightning.evaluate checkpoint=… data=…`."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from omegaconf import DictConfig

from gpt_lightning.config.command import command, imports
from gpt_lightning.config.command_line import verbatim
from gpt_lightning.config.errors import ConfigError, check_output
from gpt_lightning.config.nodes import build
from gpt_lightning.config.rules import Rule, check, number, one_of, readable_path
from gpt_lightning.config.source import checkpoint_source, corpus_of_run, network_of
from gpt_lightning.data.files import atomic_write, write_json

if TYPE_CHECKING:
    import numpy as np

    from gpt_lightning.data.corpus.base import Corpus
    from gpt_lightning.evaluation.losses import Result
    from gpt_lightning.inference.text import TextGenerator

log = logging.getLogger(__name__)

TABLE = {  # what is printed, with its format
    "text": "{}",
    "tokens": "{:,}",
    "bytes": "{:,}",
    "loss": "{:.4f} nats per token",
    "standard_error": "{:.4f}",
    "perplexity": "{:.2f}",
    "bits_per_byte": "{:.4f}",
    "floor_bits_per_byte": "{:.4f}, the corpus entropy",
    "bleu": "{:.2f}",
}
RESULT = b'{\n  "checkpoint": '  # how the file of output= begins
PIECE, PIECES, SEARCHED = 60, 16, 10**8  # of `shared_text`, the first and the last in characters
PAGE = b"<!doctype html><!-- gpt_lightning tokens"  # how the page of tokens=true begins
WINDOWS = (
    "each token is predicted from its document's beginning, or from at least {0} tokens;\n"
    "with data.align_documents=false, training's validation has less context, and its loss is higher"
)


RULES: dict[str, Rule] = {
    "text": readable_path,
    "samples": readable_path,
    "reference": readable_path,
    "split": one_of("train", "val"),
    "batch_size": number(int, least=1, optional=True),
    "stride": number(int, least=1, optional=True),
    "tokens": one_of(True, False),
    "layer": number(int, least=0),
    "head": number(int, least=0),
}


def check_keys(cfg: DictConfig) -> None:
    """Refuse wrong values before the model is loaded.

    Raises:
        ConfigError: Names the first key with a wrong value.
    """
    if cfg.get("data") is not None and cfg.text is not None:
        raise ConfigError(f"text={cfg.text} and data= exclude each other; give one of them")
    if (cfg.reference is None) != (cfg.samples is None):
        raise ConfigError("samples=FILE and reference=FILE, texts and what they should be, go together")
    check(cfg, RULES)
    inputs = (cfg.text, cfg.samples, cfg.reference)
    if cfg.tokens and not str(cfg.output).endswith(".html"):
        raise ConfigError(
            f"tokens=true writes a page, but output={cfg.output}; name a file that ends in .html"
        )
    if cfg.tokens and cfg.get("data") is None and cfg.text is None and cfg.samples:
        raise ConfigError("tokens=true shows a text; give text= or data= beside samples=")
    check_output(cfg.output, PAGE if cfg.tokens else RESULT, *inputs)
    if cfg.reference is not None:
        import sacrebleu  # noqa: F401 (it is missing before the model is loaded, not after)


def choose_corpus(cfg: DictConfig, source: Path) -> Corpus | None:
    """The corpus of data=, that of the run where nothing else is to be evaluated, else None."""
    if cfg.get("data") is not None:
        return build(cfg, "data.corpus")
    if cfg.text is not None or cfg.samples is not None:
        return None
    corpus = corpus_of_run(source)
    if corpus is None:
        raise ConfigError(
            f"nothing to evaluate: {source} does not tell which corpus of gpt_lightning it was trained on; "
            "give data=, text=, or samples= and reference="
        )
    return corpus


class Scored(NamedTuple):
    """What is evaluated."""

    tokens: np.ndarray  # (N,)
    about: Result  # of the text
    counted: np.ndarray | None = None  # tokens that count, (N,) bool; None: all


def corpus_tokens(cfg: DictConfig, corpus: Corpus, model: TextGenerator) -> Scored:
    """The tokens of a split of a corpus; of conversations the responses count, as in training."""
    from gpt_lightning.data.token_store import prepare
    from gpt_lightning.data.tokenizer import FixedTokenizer
    from gpt_lightning.data.windows import response_tokens

    store = prepare(corpus, FixedTokenizer(model.tokenizer), cfg.paths.cache)
    data = cfg.get("data") or {}
    name = data.get("name") or data.get("path") or model.info.get("data") or type(corpus).__name__
    counted = response_tokens(store, cfg.split)
    text = f"{name}, {cfg.split}" + ("" if counted is None else ", responses alone")
    floor = store.floor_bits_per_byte(cfg.split)
    return Scored(store.tokens(cfg.split), {"text": text, "floor_bits_per_byte": floor}, counted)


def file_tokens(cfg: DictConfig, model: TextGenerator, source: Path) -> Scored:
    """The tokens of text=."""
    from gpt_lightning.data.corpus.files import TextFiles
    from gpt_lightning.evaluation.losses import lay_out

    text = TextFiles(cfg.text, val_fraction=sys.float_info.min)  # so small that all is training text
    documents = list(text.documents("train"))
    if found := shared_text(documents, source):
        log.warning("text=%s has training text of the run (%r…): its loss is too low", cfg.text, found[:30])
    tokens = lay_out(documents, model.tokenizer, separated=text.separated)
    return Scored(tokens, {"text": cfg.text})


def shared_text(texts: list[str], source: Path) -> str | None:
    """A piece that texts have in common with the training text of a run, if that is still there.

    Compared are pieces of PIECE characters, evenly spread, with the first SEARCHED characters of the corpus.
    """
    middles = [(text, max(0, (len(text) - PIECE) // 2)) for text in texts[:: -(-len(texts) // PIECES)]]
    if len(texts) == 1:
        middles = [(texts[0], len(texts[0]) * part // PIECES) for part in range(PIECES)]
    pieces = {text[start : start + PIECE] for text, start in middles}
    seen = 0
    try:
        corpus = corpus_of_run(source)
        for document in corpus.documents("train") if corpus else ():
            for piece in pieces:
                if piece == document or (len(piece) == PIECE and piece in document):
                    return piece
            if (seen := seen + len(document)) > SEARCHED:
                break
    except (ImportError, OSError, ValueError):
        pass  # the text cannot be read here
    return None


def read_lines(path: str) -> list[str]:
    """The texts of a file: the `text` of each line of a .jsonl, else the lines."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason}); convert it") from error
    if not path.endswith(".jsonl"):
        return lines
    try:
        texts = [json.loads(line)["text"] for line in lines]
        "".join(texts)  # a TypeError if one of them is no text
        return texts
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} has a line without a text ({error!r}); use what generate wrote") from error


def bleu(cfg: DictConfig) -> float:
    """BLEU of the texts of samples= against those of reference=."""
    import sacrebleu

    samples, references = read_lines(cfg.samples), read_lines(cfg.reference)
    if len(references) != len(samples):
        raise ConfigError(
            f"reference={cfg.reference} has {len(references)} texts for the {len(samples)} of "
            f"samples={cfg.samples}; write one a line for each"
        )
    return float(sacrebleu.corpus_bleu(samples, [references]).score)


def show(result: Result) -> None:
    """Print the results."""
    for key, layout in TABLE.items():
        if (value := result.get(key)) is not None:
            print(f"{key:>24}  {layout.format(value)}")
    block_size, stride = result.get("block_size", 0), result.get("stride", 0)
    if stride < block_size:
        print(WINDOWS.format(block_size - stride))


@command("evaluate", arguments=verbatim("checkpoint", "text", "samples", "reference", "output"), show=show)
def main(cfg: DictConfig) -> Result:
    """Returns what the table shows, by name."""
    source = checkpoint_source(cfg)
    check_keys(cfg)
    with imports():
        from gpt_lightning.evaluation.losses import evaluate
        from gpt_lightning.inference.loading import load

    corpus = choose_corpus(cfg, source)
    model = load(source, cfg.device.accelerator, cfg.dtype, model=network_of(cfg))
    result: Result = {"checkpoint": str(source)}
    found = None
    if corpus is not None:
        found = corpus_tokens(cfg, corpus, model)
    elif cfg.text is not None:
        found = file_tokens(cfg, model, source)
    if found:
        windows = {"stride": cfg.stride, "batch_size": cfg.batch_size}
        scores = evaluate(model, found.tokens, counted=found.counted, **windows)
        result = {**result, **found.about, **scores}
    if cfg.samples is not None:
        result["bleu"] = bleu(cfg)
    if cfg.tokens and found:
        write_page(cfg, model, found.tokens, f"{result['text']}, read by {source}")
    elif cfg.output is not None:
        write_json(Path(cfg.output).expanduser(), result)
    if cfg.output is not None:
        log.info("written to %s", Path(cfg.output).expanduser().resolve())
    return result


def write_page(cfg: DictConfig, model: TextGenerator, tokens: np.ndarray, title: str) -> None:
    """The page of tokens=true."""
    from gpt_lightning.inference.inspection import LONGEST, attention, inspect
    from gpt_lightning.inference.token_page import token_page

    ids, place = tokens[:LONGEST].tolist(), {"layer": cfg.layer, "head": cfg.head}
    weights = attention(model, ids, **place)
    page = token_page(inspect(model, ids), title, total=len(tokens), weights=weights, **place)
    with atomic_write(Path(cfg.output).expanduser(), text=True) as file:
        file.write(page)


if __name__ == "__main__":
    main()
