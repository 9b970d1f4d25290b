"""Weights in the Hugging Face layout, compared with transformers."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from gpt_lightning.interop.gpt2 import load_gpt2, save_gpt2
from gpt_lightning.model.gpt import GPT, GPTConfig

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 61, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}


def theirs(seed=0, **values):
    """A random GPT-2 of transformers', with weights that show in the logits."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        **{"vocab_size": 61, "n_positions": 16, "n_layer": 2, "n_head": 4, "n_embd": 32, **values}
    )
    net = transformers.GPT2LMHeadModel(config)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net.eval()


def ours(seed=0, **values):
    torch.manual_seed(seed)
    net = GPT(GPTConfig(**{**SMALL, **values}))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net.eval()


@pytest.mark.parametrize("vocab_multiple", [1, 64])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [{}, {"n_inner": 40}, {"activation_function": "gelu"}], ids=str)
def test_loaded_logits_and_loss_equal_transformers(tmp_path, tied, options, vocab_multiple):
    reference = theirs(tie_word_embeddings=tied, **options)
    reference.save_pretrained(tmp_path)
    net = load_gpt2(tmp_path, vocab_multiple=vocab_multiple).eval()
    idx = torch.randint(0, 61, (3, 16))
    expected = reference(idx, labels=idx)
    logits = net(idx)
    torch.testing.assert_close(logits[..., :61], expected.logits, atol=1e-4, rtol=1e-4)
    assert logits.shape[-1] == (64 if vocab_multiple == 64 else 61)
    torch.testing.assert_close(net(idx[:, :-1], idx[:, 1:]), expected.loss, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"vocab_multiple": 1},
        {"tie_weights": False},
        {"tie_weights": False, "vocab_multiple": 1},
        {"bias": False},
        {"qkv_bias": False},
        {"bias": False, "qkv_bias": True},
        {"n_inner": 40, "dropout": 0.3},
    ],
    ids=str,
)
def test_saved_model_gives_equal_logits_in_transformers(tmp_path, values):
    net = ours(**values)
    save_gpt2(net, tmp_path / "new", end_of_text=60)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "new", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.vocab_size == 61
    assert loaded.config.eos_token_id == 60
    assert loaded.config.resid_pdrop == values.get("dropout", 0.0)
    idx = torch.randint(0, 61, (3, 16))
    torch.testing.assert_close(loaded.eval()(idx).logits, net(idx)[..., :61], atol=1e-4, rtol=1e-4)


def test_round_trip_keeps_every_weight(tmp_path):
    net = ours(tie_weights=False, dropout=0.25, exact_gelu=True)
    save_gpt2(net, tmp_path)
    back = load_gpt2(tmp_path)
    assert (back.config.dropout, back.config.exact_gelu) == (0.25, True)
    for name, weight in net.state_dict().items():
        rows = 61 if name.endswith(("wte.weight", "lm_head.weight")) else None  # the rest is padding
        assert torch.equal(back.state_dict()[name][:rows], weight[:rows]), name


def test_smaller_block_keeps_the_first_positions(tmp_path):
    reference = theirs()
    reference.save_pretrained(tmp_path)
    net = load_gpt2(tmp_path, block_size=5, dropout=0.2)
    assert (net.config.block_size, net.config.dropout) == (5, 0.2)
    idx = torch.randint(0, 61, (2, 5))
    torch.testing.assert_close(net.eval()(idx)[..., :61], reference(idx).logits, atol=1e-4, rtol=1e-4)


def test_sharded_and_half_precision_weights_load(tmp_path):
    reference = theirs(n_layer=4).to(torch.bfloat16)
    reference.save_pretrained(tmp_path, max_shard_size="60KB")
    assert not (tmp_path / "model.safetensors").exists()
    net = load_gpt2(tmp_path).eval()
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    idx = torch.randint(0, 61, (2, 5))
    torch.testing.assert_close(net(idx)[..., :61], reference.float()(idx).logits, atol=1e-4, rtol=1e-4)


def test_files_without_the_transformer_prefix_load(tmp_path):
    reference = theirs()  # OpenAI's own upload names weights h.0.… and stores the causal masks
    reference.save_pretrained(tmp_path)
    weights = {k.removeprefix("transformer."): w for k, w in reference.transformer.state_dict().items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    weights = {name: w.contiguous() for name, w in weights.items()}
    save_file(weights, tmp_path / "model.safetensors")
    idx = torch.randint(0, 61, (2, 5))
    torch.testing.assert_close(
        load_gpt2(tmp_path).eval()(idx)[..., :61], reference(idx).logits, atol=1e-4, rtol=1e-4
    )


def test_export_casts_to_float32(tmp_path):
    save_gpt2(ours().bfloat16(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] is None
    weights = load_file(tmp_path / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert weights["transformer.wte.weight"].shape == (61, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama' is not 'gpt2'"),
        ({"activation_function": "relu"}, "activation_function='relu' is not supported, only 'gelu_new' or"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06 is not supported"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not"),
        ({"n_layer": 3}, "has no weight 'transformer.h.2.ln_1.weight'"),
        ({"n_layer": 1}, "has weights that the model does not, such as 'transformer.h.1.attn.c_attn.bias'"),
        ({"n_embd": 64}, "has shape (61, 32) where its configuration asks for (61, 64)"),
        ({"vocab_size": 62}, "has shape (61, 32) where its configuration asks for (62, 32)"),
    ],
    ids=str,
)
def test_folder_with_another_model_is_refused(tmp_path, change, message):
    theirs().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared below)
        load_gpt2(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"n_layer": 3}, "model.n_layer=3 but the weights in .* have 2; leave the key out"),
        ({"block_size": 32}, "model.block_size=32 but the weights in .* have 16"),
        ({"vocab_size": 64}, "model.vocab_size=64 but the weights in .* have 61"),
        ({"bias": False}, "model.bias=False but the weights in .* have True"),
        ({"tie_weights": False}, "model.tie_weights=False but the weights in .* have True"),
        ({"dropout": 2.0}, "model.dropout=2.0 must lie in"),
    ],
    ids=str,
)
def test_override_that_contradicts_the_weights_is_refused(tmp_path, overrides, message):
    theirs().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_gpt2(tmp_path, **overrides)


def test_override_that_agrees_is_accepted(tmp_path):
    theirs().save_pretrained(tmp_path)
    net = load_gpt2(tmp_path, **{**SMALL, "n_inner": None, "qkv_bias": None, "bias": True})
    assert net.config.n_inner == 128


def test_missing_damaged_and_pickled_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist"):
        load_gpt2(tmp_path)
    theirs().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        load_gpt2(tmp_path)
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pickled weights \(.bin\) are not read"):
        load_gpt2(tmp_path)
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(ValueError, match=r"is not the configuration of a GPT-2"):
        load_gpt2(tmp_path)


def test_shard_outside_the_folder_is_not_opened(tmp_path):
    theirs().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"transformer.wte.weight": "../outside.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"model/outside.safetensors does not exist"):
        load_gpt2(tmp_path / "model")


def test_unreachable_hub_is_reported_in_one_line():
    code = """
from gpt_lightning.interop.gpt2 import load_gpt2
try:
    load_gpt2("no-one-here/no-such-model")
except OSError as error:
    print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.startswith(
        "init_from=hf:no-one-here/no-such-model: it is no folder, and the Hugging Face hub did not"
    )
    assert "give a local folder" in done.stdout
    assert done.stdout.count("\n") == 1


def test_hub_name_loads_from_the_hubs_cache(tmp_path):
    reference = theirs()
    snapshot = tmp_path / "hub" / "models--someone--small" / "snapshots" / ("0" * 40)
    reference.save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    code = "from gpt_lightning.interop.gpt2 import load_gpt2; print(load_gpt2('someone/small').config)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "vocab_size=61" in done.stdout, done.stderr


def test_loading_draws_no_random_numbers_and_no_weight_is_left_out(tmp_path, monkeypatch):
    reference = theirs()
    reference.save_pretrained(tmp_path)
    empty = torch.empty  # memory that was used before holds anything
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))
    before = torch.get_rng_state()
    net = load_gpt2(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.isfinite().all() for parameter in net.parameters())


def test_loaded_model_trains(tmp_path):
    theirs().save_pretrained(tmp_path)
    net = load_gpt2(tmp_path)
    idx = torch.randint(0, 61, (4, 16))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    before = net(idx, idx).item()
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(net(idx).flatten(0, 1), idx.flatten()).backward()
        optimizer.step()
    assert net(idx, idx).item() < before
    assert torch.all(net.transformer.wte.weight[61:] == 0)  # padding stays untouched
