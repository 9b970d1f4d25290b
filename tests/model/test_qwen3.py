"""Qwen3, Llama and StarCoder2 against transformers, and from training to text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_lightning.inference.loading import load
from gpt_lightning.interop.folder import read_folder
from gpt_lightning.model.qwen3 import EPS, NormalizeRMS, Qwen3, Qwen3Config, StarCoder2, StarCoder2Config
from gpt_lightning.model.weights import apply_overrides

transformers = pytest.importorskip("transformers")
IDX = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(3))


def test_normalization_and_its_gradient_are_those_of_torch() -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, 8, generator=draw, dtype=torch.float64).requires_grad_()
    gain = torch.randn(8, generator=draw, dtype=torch.float64).requires_grad_()
    expected = torch.nn.functional.rms_norm(x, (8,), gain, EPS)
    torch.testing.assert_close(NormalizeRMS.apply(x, gain), expected)
    assert torch.autograd.gradcheck(NormalizeRMS.apply, (x, gain))  # against differences


def theirs(kind: str, **options: Any) -> Any:
    shape = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 24,
        "initializer_range": 0.2,
    }
    if kind != "Starcoder2":
        shape |= {"rms_norm_eps": 1e-6, "head_dim": 16 if kind == "Qwen3" else 8}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**shape | options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zeros would not show whether they are read
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize(
    ("kind", "options"),
    [("Qwen3", {}), ("Llama", {}), ("Starcoder2", {}), ("Starcoder2", {"hidden_act": "gelu"})],
    ids=["Qwen3", "Llama", "Starcoder2", "Starcoder2 with exact GELU"],
)
@pytest.mark.parametrize("tied", [True, False])
def test_folder_of_transformers_gives_the_same_logits(
    kind: str, options: dict[str, str], tied: bool, tmp_path: Path
) -> None:
    rope = {"rope_type": "default", "rope_theta": 500.0}
    model = theirs(kind, tie_word_embeddings=tied, rope_parameters=rope, **options)
    model.save_pretrained(tmp_path)
    net, tokenizer, _ = read_folder(tmp_path)
    assert tokenizer is None
    assert isinstance(net, StarCoder2 if kind == "Starcoder2" else Qwen3)
    assert (net.config.qk_norm, net.config.rope_theta) == (kind == "Qwen3", 500.0)
    with torch.no_grad():
        logits = net.eval()(IDX)
        torch.testing.assert_close(logits[..., :61], model(IDX).logits, atol=1e-4, rtol=1e-4)
        assert bool((logits[..., 61:] == -torch.inf).all())
        loss = model(IDX, labels=IDX).loss
        torch.testing.assert_close(net(IDX[:, :-1], IDX[:, 1:]), loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("Llama", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("Llama", "rope_parameters", {"rope_type": "llama3", "rope_theta": 5e5}),
        ("Llama", "attention_bias", True),
        ("Llama", "hidden_act", "gelu"),
        ("Llama", "rms_norm_eps", 1e-5),
        ("Llama", "num_key_value_heads", 3),
        ("Llama", "num_hidden_layers", 10**9),
        ("Llama", "hidden_size", None),
        ("Starcoder2", "sliding_window", 8),
        ("Starcoder2", "use_bias", False),
        ("Starcoder2", "num_attention_heads", 5),
    ],
)
def test_folder_that_is_not_supported_is_refused(kind: str, key: str, value: object, tmp_path: Path) -> None:
    theirs(kind).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=str(tmp_path)):
        read_folder(tmp_path)


def test_parameters_and_operations_are_those_counted_by_hand() -> None:
    shape = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 30, "head_dim": 6, "block_size": 8}
    net = Qwen3(Qwen3Config(vocab_size=100, **shape))
    assert net.config.inner_width == 80  # 8/3 of 30
    layer = 30 * 24 + 2 * 30 * 12 + 24 * 30 + 3 * 30 * 80 + 2 * 30 + 2 * 6
    assert net.num_parameters() == 128 * 30 + 2 * layer + 30
    assert net.flops_per_token() == 6 * net.num_parameters() + 12 * 2 * 24 * 8
    untied = Qwen3(Qwen3Config(vocab_size=128, n_layer=1, n_embd=24, n_head=2, tie_weights=False))
    assert untied.num_parameters() - untied.num_parameters(embeddings=False) == 128 * 24
    coder = StarCoder2(StarCoder2Config(vocab_size=100, n_layer=2, n_head=4, n_kv_head=2, n_embd=24))
    layer = 24 * 24 + 2 * 24 * 12 + 24 * 24 + 2 * 24 * 96 + (24 + 2 * 12 + 24 + 96 + 24) + 4 * 24
    assert coder.num_parameters() == 128 * 24 + 2 * layer + 2 * 24


def test_roles_tell_matrices_of_blocks_from_the_rest() -> None:
    net = Qwen3(Qwen3Config(vocab_size=64, n_layer=1, n_embd=24, n_head=2, tie_weights=False))
    roles = net.parameter_roles()
    hidden = {name.rsplit(".", 2)[1] for name, role in roles.items() if role == "hidden"}
    assert hidden == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    coder = StarCoder2(StarCoder2Config(vocab_size=64, n_layer=1, n_embd=24, n_head=2)).parameter_roles()
    assert {name.rsplit(".", 2)[1] for name, role in coder.items() if role == "hidden"} == {
        *(f"{name}_proj" for name in "qkvoc"),
        "c_fc",
    }
    assert {role for name, role in coder.items() if name.endswith("bias")} == {"vector"}
    assert roles["model.embed_tokens.weight"] == "embedding"
    assert roles["lm_head.weight"] == "head"
    assert {role for name, role in roles.items() if "norm" in name} == {"vector"}


def test_dropout_acts_in_training_alone() -> None:
    net = Qwen3(Qwen3Config(vocab_size=61, n_layer=1, n_embd=24, n_head=2, dropout=0.5, block_size=24))
    torch.manual_seed(0)
    assert not torch.equal(net(IDX), net(IDX))
    net.eval()
    assert torch.equal(net(IDX), net(IDX))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_head": 5}, "model.n_head=5 does not divide model.n_embd=32; give model.head_dim"),
        ({"n_kv_head": 3}, "model.n_kv_head=3 must divide model.n_head=4"),
        ({"head_dim": 5}, "a head of 5 dimensions has no pairs"),
        ({"rope_theta": 0.5}, "model.rope_theta=0.5 must be a finite number above 1"),
        ({"qk_norm": 1}, "model.qk_norm=1 must be true or false"),
        ({"head_dim": 0}, "model.head_dim=0 must be a whole number of at least 1"),
        ({"dropout": 1}, r"model.dropout=1 must lie in \[0, 1\)"),
    ],
)
def test_bad_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Qwen3Config(**{"vocab_size": 61, "n_head": 4, "n_embd": 32, **options})


def test_option_that_a_starcoder2_lacks_is_refused() -> None:
    config = StarCoder2Config(vocab_size=61, n_layer=1, n_embd=24, n_head=2)
    with pytest.raises(ValueError, match=r"model.head_dim is no option of the weights in RUN"):
        apply_overrides(config, {"head_dim": 12}, "RUN")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "inner", "theirs"),
    [("modern_tiny", "down_proj", "Qwen3ForCausalLM"), ("rotary_tiny", "c_fc", "Starcoder2ForCausalLM")],
)
def test_run_is_trained_evaluated_fine_tuned_and_exported(
    call: Callable[..., Any], tiny: list[str], tmp_path: Path, preset: str, inner: str, theirs: str
) -> None:
    options = [text for text in tiny if not text.startswith(("model", "hydra.run.dir"))]
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_kv_head": 2, "block_size": 32}
    model = [f"model={preset}", *(f"model.{key}={value}" for key, value in shape.items())]
    run = tmp_path / "first"
    call("train", *options, *model, "optimizer=muon", f"hydra.run.dir={run}")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["parameters"] == load(run).info["parameters"]
    call("evaluate", f"checkpoint={run}", f"output={tmp_path / 'found.json'}")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["loss"] == pytest.approx(summary["val_loss"], rel=0.05)
    assert len(load(run, dtype="int8").generate("The", max_new_tokens=8, temperature=0.0)) > 0
    layers = f"lora.target_modules=[q_proj,v_proj,{inner}]"
    tuned = tmp_path / "tuned"
    call("train", *options, f"init_from={run}", "lora.r=2", layers, f"hydra.run.dir={tuned}")
    call("export", f"checkpoint={tuned}", f"output={tmp_path / 'out'}")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(exported).__name__ == theirs
    ids = torch.tensor([load(tuned).encode("The cat")])
    with torch.no_grad():
        expected = load(tuned).net(ids)[..., : exported.config.vocab_size]
        torch.testing.assert_close(exported(ids).logits, expected, atol=1e-4, rtol=1e-4)
