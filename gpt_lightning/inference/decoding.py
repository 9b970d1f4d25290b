"""Token by token generation for sequences of different lengths.

GPT-2's positions are learned, so a text longer than block_size cannot advance by one token without
recomputing every key. The window therefore advances in steps: when the text outgrows the block, the oldest
tokens are dropped until little more than half a block is left, that part is recomputed, and the window grows
again. A token thus sees between half a block and a block of context, for one forward of half a block per
half block of tokens; advancing by one token would cost a forward of a whole block per token. The window
depends only on the length of the text, with a cache or without.

Every sequence draws from its own generator, so it does not depend on its neighbours in the batch, and the
global random state is unchanged. B sequences, T positions, C n_embd, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpt_lightning.inference.sampling import SamplingSettings, choose
from gpt_lightning.model.gpt import CausalLM, KVCache

log = logging.getLogger(__name__)

DRAWS = 256  # random numbers drawn at once; constant, so that the text does not depend on max_new_tokens


def window_length(length: int, block_size: int) -> int:
    """Number of last tokens of a text that the model sees when it predicts the next one."""
    shortest = block_size // 2 + 1
    if length <= block_size:
        return length
    return shortest + (length - block_size - 1) % (block_size - shortest + 1)


@torch.inference_mode()
def stream(
    net: CausalLM,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    *,
    stop_ids: Collection[int] = (),
    use_cache: bool = True,
    static_shapes: bool = False,
) -> Iterator[list[int | None]]:
    """Yields the next token of every prompt until all have stopped.

    Args:
        net: The model; in evaluation mode until the iterator ends.
        prompts: Token ids, at least one each (<|endoftext|> begins a text from nothing).
        settings: How tokens are chosen; prompt i draws from a generator seeded with settings.seed + i.
        stop_ids: A sequence ends before one of these.
        use_cache: False recomputes every window, as a slow reference, and as a net without a cache needs.
        static_shapes: Whether every step reads the whole cache, so that a CUDA device can record the step
            as a CUDA graph and replay it; under autocast nothing is recorded.

    Yields:
        One id per prompt, None where the sequence has ended.

    Raises:
        ValueError: If a prompt is empty or has an id outside the vocabulary.
    """
    device, vocab_size = net.device, net.config.vocab_size
    for prompt in prompts:
        if not prompt or not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(
                f"prompt {list(prompt)[:8]} must have at least one id, all below vocab_size={vocab_size}; "
                "encode it with the model's tokenizer and begin an empty one with <|endoftext|>"
            )
    texts = [list(prompt) for prompt in prompts]
    generators = [torch.Generator().manual_seed(settings.seed + row) for row in range(len(texts))]
    seen = None
    if settings.repetition_penalty != 1:
        seen = torch.zeros(len(texts), net.config.padded_vocab_size, dtype=torch.bool, device=device)
        for row, text in enumerate(texts):
            seen[row, text] = True
    longest = max(map(len, texts)) + settings.max_new_tokens
    next_logits: Callable[[list[list[int]]], Tensor] = partial(_uncached, net)
    if use_cache and net.has_cache:
        next_logits = _Cached(net, len(texts), longest, static_shapes)
    running = [True] * len(texts)
    was_training = net.training
    net.eval()
    try:
        for step in range(settings.max_new_tokens):
            if step % DRAWS == 0:
                uniform = torch.stack([torch.rand(DRAWS, generator=g) for g in generators]).to(device)
            ids = choose(next_logits(texts), uniform[:, step % DRAWS], settings, seen=seen)
            if seen is not None:
                seen.scatter_(1, ids[:, None], True)
            new = ids.tolist()
            for row, token in enumerate(new):
                texts[row].append(token)
                running[row] = running[row] and token not in stop_ids
            if not any(running):
                return
            yield [token if alive else None for token, alive in zip(new, running, strict=True)]
    finally:
        net.train(was_training)


def generate(
    net: CausalLM, prompts: Sequence[Sequence[int]], settings: SamplingSettings, **options: Any
) -> list[list[int]]:
    """The new tokens of every prompt; options and errors as `stream`."""
    new: list[list[int]] = [[] for _ in prompts]
    for ids in stream(net, prompts, settings, **options):
        for row, token in enumerate(ids):
            if token is not None:
                new[row].append(token)
    return new


def _uncached(net: CausalLM, texts: list[list[int]]) -> Tensor:
    """Logits (B, V) after each text, from a forward of its whole window."""
    windows = [text[-window_length(len(text), net.config.block_size) :] for text in texts]
    last = [net.hidden(torch.tensor([window], device=net.device))[:, -1] for window in windows]
    return net.lm_head(torch.cat(last)).float()


class _Cached:
    """The same from one new position per text, while its window only grows."""

    def __init__(self, net: CausalLM, batch_size: int, longest: int, static_shapes: bool):
        weight = net.embedding.weight
        device, dtype = weight.device, weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        self.net, self.device = net, device
        self.cache = KVCache(net.config, batch_size, size=longest, device=device, dtype=dtype)
        self.lengths = [-1] * batch_size  # positions of each text in the cache
        self.rows = torch.arange(batch_size, device=device)
        self.static_shapes = static_shapes
        self.recorded: _Recorded | None = None

    def __call__(self, texts: list[list[int]]) -> Tensor:
        lengths = [window_length(len(text), self.net.config.block_size) for text in texts]
        moved = [row for row, length in enumerate(lengths) if length != self.lengths[row] + 1]
        self.lengths = lengths
        if moved:
            logits = self._fill(moved, [texts[row][-lengths[row] :] for row in moved])
        if len(moved) < len(texts):
            logits = self._extend([text[-1] for text in texts])
        return logits.float()

    def _fill(self, rows: list[int], windows: list[list[int]]) -> Tensor:
        """Logits after the windows, whose keys and values are written to `rows` of the cache."""
        T = max(map(len, windows))
        # Padding on the right is invisible to earlier positions and overwritten by later tokens.
        idx = torch.tensor([window + [0] * (T - len(window)) for window in windows], device=self.device)
        positions = torch.arange(T, device=self.device).expand(len(rows), T)
        self.cache.seek(self.rows[rows], positions)
        x = self.net.hidden(idx, self.cache)  # (B, T, C)
        last = torch.tensor([len(window) - 1 for window in windows], device=self.device)
        return self.net.lm_head(x[self.rows[: len(rows)], last])

    def _extend(self, ids: list[int]) -> Tensor:
        """Logits after one more token of every row."""
        idx = torch.tensor(ids, device=self.device)[:, None]
        positions = torch.tensor(self.lengths, device=self.device)[:, None] - 1
        self.cache.seek(self.rows, positions, whole=self.static_shapes)
        if self.static_shapes and self.device.type == "cuda" and not torch.is_autocast_enabled("cuda"):
            try:
                self.recorded = self.recorded or _Recorded(self.net, idx, self.cache)
                return self.recorded(idx, self.cache)
            except RuntimeError as error:  # too little memory, or a layer that cannot be recorded
                log.warning("generation continues without a CUDA graph: %s", error)
                self.static_shapes, self.recorded = False, None
                self.cache.seek(self.rows, positions)
        return self.net.lm_head(self.net.hidden(idx, self.cache)[:, -1])


class _Recorded:
    """The step of one token per row as a CUDA graph, which replays without launching kernels one by one.

    Raises:
        RuntimeError: If the step cannot be recorded, or its first replay gives other logits.
    """

    def __init__(self, net: CausalLM, idx: Tensor, cache: KVCache):
        self.inputs = self._inputs(idx, cache)
        with torch.cuda.device(idx.device):
            self._record(net, idx, cache)

    def _record(self, net: CausalLM, idx: Tensor, cache: KVCache) -> None:
        aside = torch.cuda.Stream()  # for the warm-up, in which kernels choose algorithms
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            expected = net.lm_head(net.hidden(idx, cache)[:, -1])
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.logits = net.lm_head(net.hidden(idx, cache)[:, -1])
        self.logits.zero_()  # detects an empty recording
        self.graph.replay()
        if not torch.allclose(self.logits, expected, rtol=0.05, atol=0.05):
            raise RuntimeError("its logits differ from those of the recorded step")

    def __call__(self, idx: Tensor, cache: KVCache) -> Tensor:
        for recorded, new in zip(self.inputs, self._inputs(idx, cache), strict=True):
            recorded.copy_(new)
        with torch.cuda.device(idx.device):
            self.graph.replay()
        return self.logits

    @staticmethod
    def _inputs(idx: Tensor, cache: KVCache) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert cache.mask is not None
        return idx, cache.positions, cache.index, cache.mask
