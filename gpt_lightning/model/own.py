"""A network of the user's own, as evaluation and generation use networks.

B batch, T time, V vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gpt_lightning.model.gpt import CausalLM


@dataclass(frozen=True, kw_only=True)
class OwnConfig:
    """What has to be known of a network that says nothing about itself."""

    vocab_size: int
    block_size: int

    @property
    def padded_vocab_size(self) -> int:
        """Logits of a position."""
        return self.vocab_size


class OwnNetwork(CausalLM):
    """A network that is called as `net(idx)` for logits (B, T, V or more), and that has no cache."""

    has_cache = False

    def __init__(self, net: nn.Module, *, vocab_size: int, block_size: int):
        super().__init__()
        self.net, self.config = net, OwnConfig(vocab_size=vocab_size, block_size=block_size)
        self.lm_head: Any = nn.Identity()
        self.train(net.training)

    def hidden(self, idx: Tensor, cache: None = None) -> Tensor:  # type: ignore[override]
        """The logits, which the head leaves as they are.

        Raises:
            ValueError: If the network returns something else.
        """
        logits, vocab_size = self.net(idx), self.config.vocab_size
        shape = tuple(getattr(logits, "shape", ()))
        if shape[:-1] != tuple(idx.shape) or shape[-1] < vocab_size:
            raise ValueError(
                f"{type(self.net).__name__} without targets returns a {type(logits).__name__} of shape "
                f"{shape}; return logits of shape {(*idx.shape, vocab_size)}"
            )
        return logits[..., :vocab_size]


def as_causal_lm(net: nn.Module, *, vocab_size: int, block_size: int) -> CausalLM:
    """The network itself if it derives from CausalLM, else an OwnNetwork; arguments as there."""
    if isinstance(net, CausalLM):
        return net
    return OwnNetwork(net, vocab_size=vocab_size, block_size=block_size)
