"""Qwen3, Llama and StarCoder2 in one file, beside what they share with GPT-2: networks with rotary positions.

B batch, T time (positions in one forward), C n_embd, H heads, G heads of keys and values, D head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from gpt_lightning.model.gpt import MLP, CausalLM, Head, KVCache, ModelConfig, attention

EPS = 1e-6  # added to the mean square, as in Qwen3


@dataclass(frozen=True, kw_only=True)
class RotaryConfig(ModelConfig):
    """What the configurations of networks with rotary positions have.

    Args:
        n_kv_head: Heads of keys and values, each for a group of query heads; divides n_head; None is n_head.
        rope_theta: Base of the wavelengths of the rotary positions.
    """

    n_kv_head: int | None = None
    rope_theta: float = 10000.0
    head_dim: ClassVar[int | None] = None
    qk_norm: ClassVar[bool] = False
    gated: ClassVar[bool] = False  # SwiGLU and RMSNorm, else GELU, LayerNorm and biases

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.rope_theta) not in (int, float) or not 1 < self.rope_theta < math.inf:
            raise ValueError(f"model.rope_theta={self.rope_theta!r} must be a finite number above 1")
        if self.n_head % self.kv_heads:
            raise ValueError(f"model.n_kv_head={self.n_kv_head} must divide model.n_head={self.n_head}")
        if self.head_dim is None and self.n_embd % self.n_head:
            near = 2 * self.n_head * max(1, round(self.n_embd / self.n_head / 2))
            remedy = "give model.head_dim" if self.gated else f"choose model.n_embd={near}"
            raise ValueError(
                f"model.n_head={self.n_head} does not divide model.n_embd={self.n_embd}; {remedy}"
            )
        if self.head_width % 2:
            raise ValueError(f"a head of {self.head_width} dimensions has no pairs to rotate; make it even")

    def values(self) -> dict[str, Any]:
        return super().values() | {"n_kv_head": self.kv_heads}

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        """Dimensions of a head."""
        return self.head_dim or self.n_embd // self.n_head


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(RotaryConfig):
    """The configuration of a Qwen3, or of a Llama if `qk_norm` is off.

    Args:
        n_inner: None is 8/3 * n_embd, which gives as many parameters as GPT-2 has, in multiples of 8.
        head_dim: Dimensions of a head, even; None is n_embd / n_head.
        qk_norm: Whether queries and keys are normalized, as in Qwen3.
    """

    head_dim: int | None = None  # type: ignore[misc]
    qk_norm: bool = True  # type: ignore[misc]
    gated: ClassVar[bool] = True

    def values(self) -> dict[str, Any]:
        return super().values() | {"head_dim": self.head_width}

    @property
    def inner_width(self) -> int:
        """Width of the feed-forward layer."""
        return self.n_inner or 8 * math.ceil(self.n_embd / 3)


@dataclass(frozen=True, kw_only=True)
class StarCoder2Config(RotaryConfig):
    """The configuration of a StarCoder2; n_head divides n_embd, and n_inner is 4 * n_embd unless given.

    Args:
        exact_gelu: Whether GELU is exact, or approximated by tanh, which is slower on a CPU.
    """

    exact_gelu: bool = False  # type: ignore[misc]


class RMSNorm(nn.RMSNorm):
    """RMSNorm whose gain has the type of its input, without which torch has no fused kernel for bfloat16."""

    def __init__(self, width: int):
        super().__init__(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling():
            return NormalizeRMS.apply(x, self.weight)
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class NormalizeRMS(torch.autograd.Function):
    """RMSNorm in 32 bits on a CPU, where torch has no fused kernel, in half to two thirds of its time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        scale = torch.linalg.vecdot(x, x).div_(x.size(-1)).add_(EPS).rsqrt_().unsqueeze_(-1)
        normal = x * scale
        ctx.save_for_backward(normal, scale, gain)
        return normal * gain

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        normal, scale, gain = ctx.saved_tensors
        of_gain = torch.linalg.vecdot(grad.flatten(0, -2), normal.flatten(0, -2), dim=0)
        grad = grad * gain
        along = torch.linalg.vecdot(grad, normal).unsqueeze_(-1).div_(-normal.size(-1))
        return torch.addcmul(grad, normal, along).mul_(scale), of_gain


def new_norm(config: RotaryConfig) -> nn.Module:
    """A normalization of the residual stream."""
    return RMSNorm(config.n_embd) if config.gated else nn.LayerNorm(config.n_embd)


class Attention(nn.Module):
    """Attention of each position to itself and earlier ones, whose scores depend on distances alone."""

    def __init__(self, config: RotaryConfig, layer: int):
        super().__init__()
        C, D = config.n_embd, config.head_width
        self.layer, self.n_head, self.n_kv_head, self.head_dim = layer, config.n_head, config.kv_heads, D
        self.dropout = config.dropout
        self.q_proj = nn.Linear(C, config.n_head * D, bias=not config.gated)
        self.k_proj = nn.Linear(C, config.kv_heads * D, bias=not config.gated)
        self.v_proj = nn.Linear(C, config.kv_heads * D, bias=not config.gated)
        self.o_proj = nn.Linear(config.n_head * D, C, bias=not config.gated)
        self.q_norm = RMSNorm(D) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotation: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, _ = x.shape
        q = rotate(self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)), rotation)  # (B, T, H, D)
        k = rotate(self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)), rotation)  # (B, T, G, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)  # (B, T, G, D)
        mask = None
        keys, values = k.transpose(1, 2), v.transpose(1, 2)  # (B, G, T, D)
        if cache is not None:
            stored = cache.update(self.layer, torch.stack([k, v], dim=2))
            if T == 1:  # otherwise the row begins here, and has only the keys of this forward
                (keys, values), mask = stored, cache.mask
        if self.n_kv_head < self.n_head:  # each head of keys and values serves a group of queries
            keys, values = (t.repeat_interleave(self.n_head // self.n_kv_head, 1) for t in (keys, values))
        dropout, q = self.dropout if self.training else 0.0, q.transpose(1, 2)
        y = attention(q, keys, values, mask, dropout_p=dropout, is_causal=cache is None or T > 1)
        return F.dropout(self.o_proj(y.transpose(1, 2).reshape(B, T, -1)), self.dropout, self.training)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair of dimensions (i, i + D/2) of a head by the angle of its position.

    Args:
        x: (B, T, heads, D).
        rotation: Cosines and sines, (2, T, 1, D) or (2, B, T, 1, D).

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).
    """
    cos, sin = rotation.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class GatedMLP(nn.Module):
    """SwiGLU: Shazeer, "GLU Variants Improve Transformer" (2020)."""

    def __init__(self, config: RotaryConfig):
        super().__init__()
        self.dropout = config.dropout
        self.gate_proj = nn.Linear(config.n_embd, config.inner_width, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.inner_width, bias=False)
        self.down_proj = nn.Linear(config.inner_width, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """Attention, then feed-forward, each normalized before and added to the residual stream."""

    def __init__(self, config: RotaryConfig, layer: int):
        super().__init__()
        self.input_layernorm = new_norm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = new_norm(config)
        self.mlp = GatedMLP(config) if config.gated else MLP(config, bias=True)

    def forward(self, x: Tensor, rotation: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and the final norm: from token ids to the inputs of the head."""

    rotation: Tensor

    def __init__(self, config: RotaryConfig):
        super().__init__()
        self.dropout = config.dropout
        self.embed_tokens = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.layers = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.norm = new_norm(config)
        D = config.head_width
        with torch.device("cpu"):  # arithmetic on the meta device would import torch._dynamo, for a second
            speeds = config.rope_theta ** (
                -torch.arange(0, D, 2).float() / D
            )  # radians per position, (D / 2,)
            angles = torch.outer(torch.arange(config.block_size).float(), speeds).repeat(1, 2)
            rotation = torch.stack([angles.cos(), angles.sin()])  # (2, block_size, D)
        self.register_buffer("rotation", rotation.to(self.embed_tokens.weight.device), persistent=False)

    def forward(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) ids to (B, T, C), at positions 0 to T - 1 or those of the cache."""
        rotation = self.rotation[:, : idx.size(1)] if cache is None else self.rotation[:, cache.positions]
        x = F.dropout(self.embed_tokens(idx), self.dropout, self.training)
        for block in self.layers:
            x = block(x, rotation.unsqueeze(-2), cache)
        return self.norm(x)


class Rotary(CausalLM):
    """A decoder-only transformer with rotary positions, and the parameter names that `transformers` has."""

    config: RotaryConfig

    def __init__(self, config: RotaryConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Head(config)
        if config.tie_weights:
            self.lm_head.weight = self.model.embed_tokens.weight
        residual = 0.02 / math.sqrt(2 * config.n_layer)  # as in GPT-2
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight"))
                nn.init.normal_(parameter, std=residual if is_residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        return self.model(idx, cache)

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.embed_tokens

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers


class Qwen3(Rotary):
    """Normalized queries and keys, RMSNorm, SwiGLU, no biases; without QK-norm a Llama.

    Source: Qwen Team, "Qwen3 Technical Report" (2025), section 2.
    """


class StarCoder2(Rotary):
    """GPT-2's blocks with rotary positions in the place of learned ones.

    Source: Lozhkov et al., "StarCoder 2 and The Stack v2: The Next Generation" (2024), section 6.
    """


def build_qwen3(**options: Any) -> Qwen3:
    """A Qwen3 from the fields of `Qwen3Config` as keywords, for configuration files."""
    return Qwen3(Qwen3Config(**options))


def build_starcoder2(**options: Any) -> StarCoder2:
    """A StarCoder2 from the fields of `StarCoder2Config` as keywords, for configuration files."""
    return StarCoder2(StarCoder2Config(**options))
