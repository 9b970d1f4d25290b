"""A running server of a small model that generates random letters."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

LETTERS = b"abcdefgh"
KEY = "the key of this server"

# Runs in the server before anything else, and writes down what it asks of other machines.
WATCH = """
import os, sys
out = open(os.environ["WATCHED"], "a", buffering=1)
out.write("watching\\n")
HERE = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "", None)
def hook(event, arguments):
    if event == "socket.getaddrinfo" and arguments[0] not in HERE:
        out.write(f"name {arguments[0]}\\n")
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in HERE:
        out.write(f"address {arguments[1]}\\n")
sys.addaudithook(hook)
"""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that gives each of eight letters the same probability, and all else nearly none."""
    import torch

    from gpt_lightning.data import tokenizer as tokenizers
    from gpt_lightning.model.gpt import GPT, GPTConfig

    encoding = tokenizers.Byte().build(lambda split: iter(()))
    torch.manual_seed(0)
    shape = {"vocab_size": encoding.n_vocab, "block_size": 32, "n_layer": 1, "n_head": 2, "n_embd": 16}
    net = GPT(GPTConfig(**shape))
    with torch.no_grad():  # logits are then 4 times the first column of the token table
        net.transformer.ln_f.weight.zero_()
        net.transformer.ln_f.bias.zero_()[0] = 4
        net.transformer.wte.weight[:, 0] = -9
        net.transformer.wte.weight[list(LETTERS), 0] = 1
    run = tmp_path_factory.mktemp("run")
    (run / "checkpoints").mkdir()
    torch.save(
        {
            "state_dict": {f"net.{name}": value for name, value in net.state_dict().items()},
            "hyper_parameters": {"name": "letters", "model": shape, "data": {"name": "<b>corpus"}},
            "tokenizer": tokenizers.to_state(encoding),
            "progress": {"step": 1234},
        },
        run / "checkpoints" / "best.ckpt",
    )
    (run / "curves.png").write_bytes(PIXEL)
    return run


PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060"
    "0000000500017a5eab3f0000000049454e44ae426082"
)


class Server:
    """The demo in a process of its own, as a user starts it."""

    def __init__(self, arguments: list[str], folder: Path):
        (folder / "sitecustomize.py").write_text(WATCH)
        self.watched = folder / "watched.txt"
        paths = [str(folder), os.environ.get("PYTHONPATH", "")]
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "WATCHED": str(self.watched)}
        self.log = folder / "log.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=folder,
            )
        assert self.process.stdout is not None
        first = self.process.stdout.readline()
        assert first.startswith("page: http://"), first + self.log.read_text()
        self.url = first.removeprefix("page: ").strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Start a server: `serve(*arguments of Python)`."""
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    servers: list[Server] = []

    def start(*arguments: Any) -> Server:
        servers.append(Server([str(argument) for argument in arguments], tmp_path_factory.mktemp("server")))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture(scope="session")
def server(serve: Callable[..., Server], checkpoint: Path) -> Server:
    limits = ("max_new_tokens=100000", "max_prompt_chars=2000", "queue=2")
    key = f"api_key={KEY}"
    return serve("-m", "gpt_lightning.demo", f"checkpoint={checkpoint}", "port=0", "device=cpu", key, *limits)
