"""Exports a checkpoint for other programs: `python -m gpt_lightning.export checkpoint=… output=DIR`."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from gpt_lightning.config.command import command, imports
from gpt_lightning.config.command_line import verbatim
from gpt_lightning.config.errors import ConfigError
from gpt_lightning.config.source import checkpoint_source


@command("export", arguments=verbatim("checkpoint", "output"))
def main(cfg: DictConfig) -> None:
    source = checkpoint_source(cfg)
    if cfg.output is None:
        raise ConfigError("output= is missing; give the folder to write")
    if not isinstance(cfg.overwrite, bool):
        raise ConfigError(f"overwrite={cfg.overwrite!r} must be true or false")
    if source.is_dir() and Path(cfg.output).expanduser().resolve() == source.resolve():
        raise ConfigError(f"output={cfg.output} is the folder that is exported; give another one")
    with imports():
        from gpt_lightning.inference.loading import read_model
        from gpt_lightning.interop.export import export

    model = read_model(source, merge=cfg.format != "peft")
    folder = export(model, cfg.output, format=cfg.format, overwrite=cfg.overwrite)
    for path in sorted(filter(Path.is_file, folder.iterdir())):
        print(f"{path.stat().st_size:>12,} bytes  {path.name}")
    print(folder)


if __name__ == "__main__":
    main()
