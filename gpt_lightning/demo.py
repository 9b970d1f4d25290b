"""Web page and completion server for a trained model: `python -m gpt_lightning.demo checkpoint=…`."""

from __future__ import annotations

import contextlib
import ipaddress
import socket

from omegaconf import DictConfig

import gpt_lightning
from gpt_lightning.config.command import command
from gpt_lightning.config.command_line import verbatim
from gpt_lightning.config.errors import ConfigError
from gpt_lightning.config.rules import Rule, check, number, optional_text, text, texts
from gpt_lightning.config.source import checkpoint_source, network_of

RULES: dict[str, Rule] = {
    "host": text,
    "port": number(int, least=0, most=65535),
    "allowed_hosts": texts,
    "api_key": optional_text,
    "max_prompt_chars": number(int, least=1),
    "max_new_tokens": number(int, least=1),
    "queue": number(int, least=0),
}


def listen(cfg: DictConfig) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: If the address is not this machine's or in use, or open to other machines without a key.
    """
    try:
        family = socket.getaddrinfo(cfg.host, cfg.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((cfg.host, cfg.port), family=family)
    except OSError as error:
        reason = str(error.strerror).split(" (")[0]  # Python adds the address in brackets
        where = f"host={cfg.host} port={cfg.port}"
        raise ConfigError(f"{where}: {reason}; choose another port or host") from error
    address = listener.getsockname()[0].partition("%")[0]  # of IPv6, without the interface
    if cfg.api_key is None and not ipaddress.ip_address(address).is_loopback:
        listener.close()
        raise ConfigError(
            f"host={cfg.host} lets other machines in; set a key that they must give: the environment "
            "variable GPT_LIGHTNING_API_KEY, or api_key="
        )
    return listener


@command("demo", arguments=verbatim("checkpoint", "api_key"))
def main(cfg: DictConfig) -> None:
    source = checkpoint_source(cfg)
    check(cfg, RULES)
    with contextlib.suppress(KeyboardInterrupt), listen(cfg) as listener:
        from gpt_lightning.rundir.checkpoint import find_curves
        from gpt_lightning.serving.server import Site, run

        model = gpt_lightning.load(source, cfg.device.accelerator, cfg.dtype, model=network_of(cfg))
        limits = {key: cfg[key] for key in ("max_prompt_chars", "max_new_tokens", "queue")}
        hosts = [cfg.host, *cfg.allowed_hosts]
        site = Site(model, curves=find_curves(source), hosts=hosts, api_key=cfg.api_key, **limits)
        host = f"[{cfg.host}]" if ":" in cfg.host else cfg.host
        address = f"http://{host}:{listener.getsockname()[1]}"
        print(f"page: {address}\ncompletions: {address}/v1\nCtrl-C stops the server", flush=True)
        run(site, listener)
    print("stopped")


if __name__ == "__main__":
    main()
