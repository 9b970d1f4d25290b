"""Adapters compared with those of peft."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import random_net

from gpt_lightning.interop.gpt2 import save_gpt2
from gpt_lightning.interop.qwen3 import save_rotary
from gpt_lightning.model.gpt import GPTConfig, build_gpt
from gpt_lightning.model.lora import LoRAConfig, LoRALinear, add_adapters, merge_adapters
from gpt_lightning.model.qwen3 import build_qwen3
from gpt_lightning.model.weights import NETWORKS

CONFIG = LoRAConfig(r=3, lora_alpha=6, target_modules=("c_attn", "c_proj"))
IDX = torch.randint(257, (2, 20), generator=torch.Generator().manual_seed(1))


def adapted(kind: type = GPTConfig) -> Any:
    config = CONFIG if kind is GPTConfig else replace(CONFIG, target_modules=("q_proj", "v_proj", "o_proj"))
    net = add_adapters(random_net(kind=kind), config)
    torch.manual_seed(5)
    for layer in net.modules():
        if isinstance(layer, LoRALinear):
            torch.nn.init.normal_(layer.lora_B.weight)
    return net.eval()


def test_new_adapters_do_not_change_the_output() -> None:
    assert torch.equal(add_adapters(random_net(), CONFIG)(IDX), random_net()(IDX))


def test_only_adapters_are_trained() -> None:
    net = adapted()
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    # r * (in + out) of c_attn (16, 48) and the c_proj of attention (16, 16) and MLP (64, 16), in two blocks
    assert sum(p.numel() for p in trained.values()) == 2 * 3 * (16 + 48 + 16 + 16 + 64 + 16)
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    net(IDX, IDX).backward()
    optimizer.step()
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == trained.keys()


@pytest.mark.parametrize("kind", NETWORKS)
def test_merged_model_is_a_plain_one_with_the_same_output(kind: type) -> None:
    net, plain = adapted(kind), random_net(kind=kind)
    expected = net(IDX)
    assert not torch.allclose(expected, plain(IDX), atol=0.1)
    merged = merge_adapters(net)
    torch.testing.assert_close(merged(IDX), expected, atol=1e-4, rtol=1e-4)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert all(p.requires_grad for p in merged.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft's own making
@pytest.mark.parametrize("kind", NETWORKS)
def test_logits_equal_peft_with_the_same_adapters(kind: type, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    net = adapted(kind)
    save = save_gpt2 if kind is GPTConfig else save_rotary
    save(random_net(kind=kind), tmp_path, end_of_text=256)
    layers = sorted({name.split(".")[-1] for name, m in net.named_modules() if isinstance(m, LoRALinear)})
    options = {"target_modules": layers, "fan_in_fan_out": kind is GPTConfig}  # GPT-2 has Conv1D
    theirs = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path),
        peft.LoraConfig(r=3, lora_alpha=6, **options),
    ).eval()
    weights = theirs.state_dict()
    with torch.no_grad():
        for name, layer in net.named_modules():
            if isinstance(layer, LoRALinear):
                for part in ("lora_A", "lora_B"):
                    key = f"base_model.model.{name}.{part}.default.weight"
                    weights[key].copy_(getattr(layer, part).weight)
        expected = theirs(IDX).logits
    torch.testing.assert_close(net(IDX)[..., :257], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("build", "layers"), [(build_gpt, {"c_attn"}), (build_qwen3, {"q_proj", "k_proj", "v_proj"})]
)
def test_queries_keys_and_values_have_adapters_by_default(build: Any, layers: set[str]) -> None:
    net = build(vocab_size=64, block_size=8, n_layer=1, n_head=2, n_embd=8)
    names = (name for name, module in net.named_modules() if isinstance(module, LoRALinear))
    assert {name.rpartition(".")[2] for name in names} == set()
    add_adapters(net, LoRAConfig(r=2))
    names = (name for name, module in net.named_modules() if isinstance(module, LoRALinear))
    assert {name.rpartition(".")[2] for name in names} == layers


def test_model_without_layers_of_these_names_is_refused() -> None:
    net = build_gpt(vocab_size=64, block_size=8, n_layer=1, n_head=2, n_embd=8)
    attention = net.blocks[0].attn
    attention.mine = attention.c_attn
    del attention.c_attn
    with pytest.raises(ValueError, match="the model has no c_attn, but c_fc, c_proj, mine"):
        add_adapters(net, LoRAConfig(r=2))
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "lora.r=0 must be a whole number of at least 1"),
        ({"r": 2.5}, "lora.r=2.5"),
        ({"r": 2, "lora_alpha": 0}, "lora.lora_alpha=0 must be a number above 0"),
        ({"r": 2, "lora_dropout": 1}, r"lora.lora_dropout=1 must be a number in \[0, 1\)"),
        ({"r": 2, "target_modules": "c_attn"}, "lora.target_modules='c_attn' must be a list of c_attn, c_fc"),
        ({"r": 2, "target_modules": ["query"]}, "lora.target_modules="),
    ],
)
def test_bad_values_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**options)
