"""GPT-2 in one file, with torch as its only dependency.

B batch, T time (positions in one forward), C n_embd, H heads, D head size, V padded vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100  # a target with this id does not count in the loss (F.cross_entropy's default)
CHUNK = 1 << 24  # logits in memory at once while a loss is computed, 64 MiB in 32 bits; twice as many in 16
SHORT = 256  # tokens up to which attention in bfloat16 on a CPU has a backward pass in 32 bits


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the configurations of all networks have.

    Args:
        vocab_size: Ids that the tokenizer can produce.
        block_size: Longest sequence the model sees at once, in tokens.
        n_layer: Transformer blocks.
        n_head: Attention heads in each block.
        n_embd: Width of the residual stream.
        n_inner: Width of the feed-forward layer; None follows n_embd.
        dropout: Probability that an activation is dropped in training.
        tie_weights: Whether the output head shares the token embedding's matrix.
        vocab_multiple: The embedding is padded to a multiple of this many rows, for faster matrix
            products; padded ids have probability zero.

    Raises:
        ValueError: If a value is out of its range; names the key, the value and the remedy.
    """

    vocab_size: int
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_inner: int | None = None
    dropout: float = 0.0
    tie_weights: bool = True
    vocab_multiple: int = 64
    exact_gelu: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            if value is None and kind.endswith("| None"):
                continue
            if kind.startswith("int") and (type(value) is not int or value < 1):
                raise ValueError(f"model.{field.name}={value!r} must be a whole number of at least 1")
            if kind.startswith("bool") and not isinstance(value, bool):
                raise ValueError(f"model.{field.name}={value!r} must be true or false")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)):
            raise ValueError(f"model.dropout={self.dropout!r} must be a number in [0, 1)")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout} must lie in [0, 1)")

    def values(self) -> dict[str, Any]:
        """The fields, with what None stands for."""
        return asdict(self) | {"n_inner": self.inner_width}

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to a multiple of vocab_multiple."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_head

    @property
    def head_width(self) -> int:
        """Dimensions of a head."""
        return self.n_embd // self.n_head

    @property
    def inner_width(self) -> int:
        """Width of the feed-forward layer."""
        return self.n_inner or 4 * self.n_embd


@dataclass(frozen=True, kw_only=True)
class GPTConfig(ModelConfig):
    """The configuration of a GPT; n_head divides n_embd, and n_inner is 4 * n_embd unless given.

    Args:
        bias: Whether linear layers and LayerNorms have a bias, as in GPT-2.
        qkv_bias: The same for the query, key and value projection alone; None follows `bias`.
        exact_gelu: Whether GELU is exact, as nanoGPT's, or GPT-2's approximation by tanh, slower on a CPU.
    """

    bias: bool = True
    qkv_bias: bool | None = None
    exact_gelu: bool = False  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_embd % self.n_head:
            raise ValueError(
                f"model.n_embd={self.n_embd} is not divisible by model.n_head={self.n_head}; "
                f"choose model.n_embd={self.n_head * max(1, round(self.n_embd / self.n_head))}"
            )

    def values(self) -> dict[str, Any]:
        return super().values() | {"qkv_bias": self.bias if self.qkv_bias is None else self.qkv_bias}


class KVCache:
    """Keys and values of sequences of different lengths, in one buffer of fixed size.

    Row b of the buffer holds the positions of sequence b from 0 on. `seek` sets the positions of the next
    forward's tokens: several per row fill it from position 0, one per row continues it.
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, *, size: int, device: torch.device, dtype: torch.dtype
    ):
        size = min(size, config.block_size)
        shape = (config.n_layer, batch_size, 2, config.kv_heads, size, config.head_width)
        self.buffer = torch.zeros(shape, device=device, dtype=dtype)

    def seek(self, rows: Tensor, positions: Tensor, *, whole: bool = False) -> None:
        """Set `positions` (B, T) and `rows` (B,) of the next forward; all rows if T is 1.

        `whole` reads complete rows under a mask, so that shapes do not change from token to token.
        """
        heads, size = 2 * self.buffer.size(3), self.buffer.size(4)
        head = torch.arange(heads, device=rows.device)
        self.positions = positions
        self.index = ((rows.view(-1, 1, 1) * heads + head) * size + positions.unsqueeze(-1)).flatten()
        self.length = size if whole else int(positions.max()) + 1
        seen = torch.arange(self.length, device=rows.device) <= positions[:, -1:]  # (B, length)
        self.mask = seen[:, None, None] if whole or not seen.all() else None  # (B, 1, 1, length)

    def update(self, layer: int, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, T, 2, H, D) of one layer, return all of its rows' (B, H, length, D)."""
        buffer = self.buffer[layer]
        buffer.view(-1, buffer.size(-1)).index_copy_(0, self.index, kv.reshape(-1, buffer.size(-1)))
        return buffer[:, 0, :, : self.length], buffer[:, 1, :, : self.length]


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout_p: float, is_causal: bool
) -> Tensor:
    """F.scaled_dot_product_attention of (B, H, T, D), with a faster backward pass where there is one."""
    narrow = q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.size(-2) <= SHORT
    plain = is_causal and not dropout_p and not torch.compiler.is_compiling()
    if narrow and plain and q.requires_grad and hasattr(torch.ops.aten, ShortAttention.BACKWARD):
        return ShortAttention.apply(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout_p, is_causal=is_causal)


class ShortAttention(torch.autograd.Function):
    """Causal attention in bfloat16 on a CPU, with a backward pass in 32 bits.

    For short sequences, torch's own in 16 bits takes up to eight times as long.
    """

    BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # what F.scaled_dot_product_attention calls; it alone returns what the backward pass needs
        y, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        ctx.save_for_backward(q, k, v, y, logsumexp)
        return y

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, ...]:
        *tensors, logsumexp = ctx.saved_tensors
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            above[0].float(), *(tensor.float() for tensor in tensors), logsumexp, 0.0, True
        )
        return tuple(gradient.to(torch.bfloat16) for gradient in gradients)


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each position to itself and earlier ones."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=qkv_bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, -1)
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))  # (B, H, T, D); one copy in the backward pass
        mask = None
        if cache is not None:
            keys, values = cache.update(self.layer, qkv[:, :, 1:])
            if T == 1:  # otherwise the row begins here, and has only the keys of this forward
                k, v, mask = keys, values, cache.mask
        dropout = self.dropout if self.training else 0.0
        y = attention(q, k, v, mask, dropout_p=dropout, is_causal=cache is None or T > 1)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """Position-wise feed-forward layer with GELU."""

    def __init__(self, config: ModelConfig, bias: bool):
        super().__init__()
        self.dropout = config.dropout
        self.approximate = "none" if config.exact_gelu else "tanh"
        self.c_fc = nn.Linear(config.n_embd, config.inner_width, bias=bias)
        self.c_proj = nn.Linear(config.inner_width, config.n_embd, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config, config.bias)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Embeddings, blocks and the final LayerNorm: from token ids to the inputs of the head."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout = config.dropout
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)

    def forward(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) ids to (B, T, C), at positions 0 to T - 1 or those of the cache."""
        positions = torch.arange(idx.size(1), device=idx.device) if cache is None else cache.positions
        x = F.dropout(self.wte(idx) + self.wpe(positions), self.dropout, self.training)
        for block in self.h:
            x = block(x, cache)
        return self.ln_f(x)


class Head(nn.Linear):
    """From C to logits (..., V), which are -inf at padded ids."""

    padding: Tensor | None

    def __init__(self, config: ModelConfig):
        super().__init__(config.n_embd, config.padded_vocab_size, bias=False)
        padding = None
        if config.padded_vocab_size > config.vocab_size:
            padding = torch.zeros(config.padded_vocab_size)
            padding[config.vocab_size :] = -math.inf
        self.register_buffer("padding", padding, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.padding)


class ChunkedLoss(torch.autograd.Function):
    """Sum of the cross-entropies of a linear layer's outputs, without having all outputs in memory.

    The gradients are computed in the forward pass, chunk by chunk, up to the factor that comes from above.
    Under autocast the probabilities, which have 32 bits, are computed for an eighth of a chunk at a time.
    The same memory serves all chunks: a CPU takes longer to get as much of it anew than to fill it.
    N tokens, C inputs, V outputs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        """The sum () in nats of x (N, C), weight (V, C), bias (V,), which is constant, and targets (N,)."""
        device, dtype, V = x.device, x.dtype, len(weight)
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        wide = torch.promote_types(dtype, torch.float32)  # of probabilities and sums
        total = torch.zeros((), dtype=wide, device=device)
        dx = torch.empty_like(x)
        dw = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        narrow, ctx.dtype = dtype != wide, weight.dtype
        rows = min(len(x), max(1, CHUNK * (1 + narrow) // V))
        few = max(1, rows // 8) if narrow else rows
        with torch.autocast(device.type, enabled=False):
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
            logits, log_p = total.new_empty(few, V), total.new_empty(few, V)
            products = x.new_empty(few, V) if narrow else logits
            gradients = x.new_empty(rows, V) if narrow else log_p
            product = torch.empty_like(weight) if narrow else None
            ids, counts = targets[:, None].clamp(min=0), targets[:, None] != IGNORE  # (N, 1)
            chunks = (tensor.split(rows) for tensor in (x, ids, counts, dx))
            for inputs, targeted, counted, out in zip(*chunks, strict=True):
                gradient = gradients[: len(inputs)]
                parts = (tensor.split(few) for tensor in (inputs, targeted, counted, gradient))
                for some, tokens, count, part in zip(*parts, strict=True):
                    n = len(some)
                    torch.mm(some, weight.T, out=products[:n])
                    if bias is not None:
                        products[:n] += bias
                    if narrow:
                        logits[:n] = products[:n]
                    p = torch.log_softmax(logits[:n], 1, out=log_p[:n])
                    log_likelihood = p.gather(1, tokens)
                    total -= (log_likelihood * count).sum()
                    p.exp_().scatter_(1, tokens, log_likelihood.expm1())  # p, and p - 1 at the target
                    if narrow:
                        part.copy_(p)
                out.copy_((gradient @ weight) * counted)
                if dw is not None and narrow:
                    dw += torch.mm(gradient.T, inputs * counted, out=product)
                elif dw is not None:
                    dw.addmm_(gradient.T, inputs * counted)
        ctx.gradients = dx, dw
        return total

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.gradients
        del ctx.gradients  # they are changed in place, so once only
        return dx.mul_(above[0]), None if dw is None else dw.mul_(above[0]).to(ctx.dtype), None, None


class CausalLM(nn.Module):
    """What training, evaluation and generation use of a network; GPT and others derive from it.

    Attributes:
        config: Its configuration.
        lm_head: From the outputs of `hidden` to logits.
        has_cache: Whether `hidden` uses a cache.
    """

    config: Any
    lm_head: Head
    has_cache = True

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) ids to the inputs (B, T, C) of the head, at positions 0 to T - 1 or those of the cache."""
        raise NotImplementedError

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding."""
        raise NotImplementedError

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    def forward(self, idx: Tensor, targets: Tensor | None = None, *, reduction: str = "mean") -> Tensor:
        """Logits of the next token at every position, or the loss against `targets`.

        Args:
            idx: Token ids, (B, T) int64, T at most block_size.
            targets: The tokens that follow, (B, T); IGNORE where a position does not count.
            reduction: "mean", "sum" or "none", as in F.cross_entropy.

        Returns:
            (B, T, V) logits, -inf at padded ids, or the loss in nats: () or, for "none", (B, T).

        Raises:
            ValueError: If there are more positions than block_size.
        """
        if idx.size(1) > self.config.block_size:
            raise ValueError(
                f"the input has {idx.size(1)} tokens but block_size={self.config.block_size}; "
                "crop it or train with a larger model.block_size"
            )
        x = self.hidden(idx)  # (B, T, C)
        if targets is None:
            return self.lm_head(x)
        loss = self._loss(x.flatten(0, 1), targets.flatten(), reduction)
        return loss.view_as(targets) if reduction == "none" else loss

    def _loss(self, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """The loss of inputs (N, C) of the head, in chunks on a CPU where the logits are many.

        Compiled code computes all logits at once: chunks would not be fused.
        """
        rows = max(1, CHUNK // self.config.padded_vocab_size)
        if len(x) <= rows or x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.cross_entropy(self.lm_head(x), targets, ignore_index=IGNORE, reduction=reduction)
        if x.requires_grad and reduction != "none":
            total = ChunkedLoss.apply(x, self.lm_head.weight, self.lm_head.padding, targets)
        else:
            pairs = zip(x.split(rows), targets.split(rows), strict=True)
            total = torch.cat([F.cross_entropy(self.lm_head(a), b, reduction="none") for a, b in pairs])
            if reduction == "none":
                return total
            total = total.sum()
        return total if reduction == "sum" else total / (targets != IGNORE).sum()

    def parameter_roles(self) -> dict[str, str]:
        """What each parameter is: hidden matrix, qkv (three of them in one), embedding, head or vector."""
        kinds, roles = {nn.Embedding: "embedding", Head: "head", nn.Linear: "hidden"}, {}
        for name, module in self.named_modules():
            role = kinds.get(type(module), "vector")
            for key, _ in module.named_parameters(recurse=False):
                roles[f"{name}.{key}"] = role if key == "weight" else "vector"
        return roles

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Number of parameters, tied ones counted once, optionally without position and token embeddings."""
        total = sum(p.numel() for p in self.parameters())
        if not embeddings:
            tables = {id(m.weight): m.weight.numel() for m in self.modules() if isinstance(m, nn.Embedding)}
            total -= sum(size for key, size in tables.items() if key != id(self.lm_head.weight))
        return total

    def flops_per_token(self, length: int | None = None) -> int:
        """Floating-point operations per token of a training step, forward and backward.

        6 for each parameter in a matrix product (the head among them) and 12 * T per layer and dimension of
        the heads for attention's scores, counted without the causal half, as in the PaLM paper, appendix B.
        T is `length`, in tokens; None takes block_size.
        """
        config = self.config
        heads = config.n_head * config.head_width
        attention = 12 * config.n_layer * heads * (length or config.block_size)
        return 6 * self.num_parameters(embeddings=False) + attention


class GPT(CausalLM):
    """A decoder-only transformer with GPT-2's architecture and parameter names.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
    """

    config: GPTConfig

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = Head(config)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # residual init, GPT-2 paper section 2.3
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)  # GPT-2's initializer_range
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        return self.transformer(idx, cache)

    def parameter_roles(self) -> dict[str, str]:
        roles = super().parameter_roles()
        return roles | {name: "qkv" for name in roles if name.endswith("c_attn.weight")}

    @property
    def embedding(self) -> nn.Embedding:
        return self.transformer.wte

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.h


def build_gpt(**options: Any) -> GPT:
    """A GPT from the fields of `GPTConfig` as keywords, for configuration files."""
    return GPT(GPTConfig(**options))
