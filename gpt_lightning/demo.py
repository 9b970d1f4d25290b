"""Web page and completion server for a trained model: `python -m gpt_lightning.demo checkpoint=…`."""

from __future__ import annotations

import contextlib
import socket

from omegaconf import DictConfig

import gpt_lightning
from gpt_lightning.config.command import command
from gpt_lightning.config.command_line import verbatim
from gpt_lightning.config.errors import ConfigError
from gpt_lightning.config.source import checkpoint_source


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: If the address is not this machine's, or is in use.
    """
    if not isinstance(port, int) or not 0 <= port < 2**16:
        raise ConfigError(f"port={port!r} must be a whole number from 0 to 65535, where 0 is any free one")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror).split(" (")[0]  # Python adds the address in brackets
        raise ConfigError(f"host={host} port={port}: {reason}; choose another port or host") from error


@command("demo", arguments=verbatim("checkpoint"))
def main(cfg: DictConfig) -> None:
    source = checkpoint_source(cfg)
    with contextlib.suppress(KeyboardInterrupt), listen(str(cfg.host), cfg.port) as listener:
        from gpt_lightning.rundir.checkpoint import find_curves
        from gpt_lightning.serving.server import Site, run

        model = gpt_lightning.load(source, cfg.device.accelerator, cfg.dtype)
        limits = {key: cfg[key] for key in ("max_prompt_chars", "max_new_tokens", "queue")}
        site = Site(model, curves=find_curves(source), **limits)
        host = f"[{cfg.host}]" if ":" in str(cfg.host) else cfg.host
        address = f"http://{host}:{listener.getsockname()[1]}"
        print(f"page: {address}\ncompletions: {address}/v1\nCtrl-C stops the server", flush=True)
        run(site, listener)
    print("stopped")


if __name__ == "__main__":
    main()
