"""Generates text from a trained model: `python -m gpt_lightning.generate checkpoint=… prompt=…`."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from gpt_lightning.config.command import command, imports
from gpt_lightning.config.command_line import verbatim
from gpt_lightning.config.errors import ConfigError
from gpt_lightning.config.nodes import plain
from gpt_lightning.config.rules import check, one_of, readable_path, texts
from gpt_lightning.config.source import checkpoint_source, network_of

if TYPE_CHECKING:
    from gpt_lightning.inference.sampling import SamplingSettings
    from gpt_lightning.inference.text import TextGenerator

log = logging.getLogger(__name__)


def read_prompts(cfg: DictConfig) -> list[str]:
    """The prompts of prompt=, prompt_file= or default_prompts=."""
    if cfg.prompt is not None:
        return [str(cfg.prompt)]
    if cfg.prompt_file is None:
        return list(cfg.default_prompts)
    try:
        text = Path(cfg.prompt_file).expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompt_file={cfg.prompt_file} is not UTF-8 text ({error.reason})") from error
    if not text:
        raise ConfigError(f"prompt_file={cfg.prompt_file} is empty; write one prompt a line")
    return text.removesuffix("\n").split("\n")


def show(model: TextGenerator, prompts: list[str], settings: SamplingSettings) -> None:
    """Print every prompt with its continuations as they are generated."""
    shown, tokens, started = -1, 0, time.monotonic()
    total = len(prompts) * settings.num_samples
    for number, piece in model.in_order(prompts, settings):
        if number != shown:
            heading = f"--- {number + 1} of {total}\n" if total > 1 else ""
            print(heading + prompts[number // settings.num_samples], end="")
        shown = number
        print(piece.text, end="\n" if piece.finish else "", flush=True)
        tokens += piece.tokens if piece.finish else 0
    seconds = time.monotonic() - started
    log.info("%d tokens in %.1f s (%.0f tokens/s)", tokens, seconds, tokens / max(seconds, 1e-9))


def write(model: TextGenerator, prompts: list[str], settings: SamplingSettings) -> None:
    """Print a line of JSON for every continuation as soon as it is complete."""
    text = ""
    for number, piece in model.in_order(prompts, settings):
        text += piece.text
        if piece.finish:
            answer: dict[str, Any] = {"prompt": prompts[number // settings.num_samples], "text": text}
            answer |= {"tokens": piece.tokens, "finish": piece.finish}
            print(json.dumps(answer, ensure_ascii=False), flush=True)
            text = ""


def converse(model: TextGenerator, settings: SamplingSettings) -> None:
    """Continue prompts from the terminal until Ctrl-D; the seed grows, so that the next answer differs."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # adds line editing and history to input()
    print("A line is continued, an empty one begins a new text. Ctrl-C stops an answer, Ctrl-D quits.")
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt) as error:
            print()
            if isinstance(error, EOFError):
                return
            continue
        try:
            show(model, [line], settings)
        except ValueError as error:
            print(f"error: {error}")
        except KeyboardInterrupt:
            print()  # below what there is of the answer
        settings = replace(settings, seed=settings.seed + settings.num_samples)


@command("generate", arguments=verbatim("checkpoint", "prompt", "prompt_file", "stop"))
def main(cfg: DictConfig) -> list[str] | None:
    """Prints texts, or returns them to Python."""
    given = [key for key in ("prompt", "prompt_file") if cfg[key] is not None]
    if cfg.interactive and given:
        raise ConfigError(f"interactive=true asks for prompts; leave {given[0]}= out")
    if cfg.interactive and main.in_python:
        raise ConfigError("interactive=true asks for prompts in a terminal; from Python, give prompt=")
    if cfg.prompt is not None and cfg.prompt_file is not None:
        raise ConfigError("prompt= and prompt_file= exclude each other; give one of them")
    check(cfg, {"interactive": one_of(True, False), "prompt_file": readable_path, "default_prompts": texts})
    source = checkpoint_source(cfg)
    with imports():
        from gpt_lightning.inference.loading import load
        from gpt_lightning.inference.sampling import SamplingSettings

    values = plain(cfg)
    settings = SamplingSettings(**{field.name: values[field.name] for field in fields(SamplingSettings)})
    prompts = [] if cfg.interactive else read_prompts(cfg)
    model = load(source, cfg.device.accelerator, cfg.dtype, model=network_of(cfg))
    for prompt in list(prompts):
        try:
            model.encode(prompt)
        except ValueError:
            if given:
                raise
            prompts.remove(prompt)  # of default_prompts
    if main.in_python:
        return model.generate(prompts, **asdict(settings))
    try:
        if cfg.interactive:
            converse(model, settings)
        elif cfg.prompt_file is None:
            show(model, prompts, settings)
        else:
            write(model, prompts, settings)
    except KeyboardInterrupt:
        print()
        raise SystemExit(130) from None
    return None


if __name__ == "__main__":
    main()
