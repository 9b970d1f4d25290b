"""The model compared with transformers' GPT-2 and with a slow reference."""

import math

import pytest
import torch
from support.models import random_net
from torch.nn import functional as F

from gpt_lightning.model.gpt import GPT, IGNORE, GPTConfig, KVCache, attention, build_gpt
from gpt_lightning.model.qwen3 import Qwen3Config, StarCoder2Config

SMALL = {"vocab_size": 61, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}


def build(seed=0, std=0.2, **values):
    """A small model whose weights are large enough that every part of it shows in the logits."""
    torch.manual_seed(seed)
    net = GPT(GPTConfig(**{**SMALL, **values}))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return net.eval()


def reference_logits(net, idx):
    """The same function in float64, one sequence, one head and one position at a time."""
    w = {name: p.double() for name, p in net.state_dict().items()}
    config = net.config
    n, d = config.n_head, config.n_embd // config.n_head

    def norm(x, name):
        x = (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + 1e-5)
        return x * w[name + ".weight"] + w.get(name + ".bias", 0.0)

    def linear(x, name):
        return w[name + ".weight"] @ x + w.get(name + ".bias", 0.0)

    def gelu(x):
        if config.exact_gelu:
            return x * torch.special.ndtr(x)
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    rows = []
    for sequence in idx.tolist():
        x = [w["transformer.wte.weight"][t] + w["transformer.wpe.weight"][i] for i, t in enumerate(sequence)]
        for layer in range(config.n_layer):
            at = f"transformer.h.{layer}."
            q, k, v = zip(
                *[linear(norm(a, at + "ln_1"), at + "attn.c_attn").chunk(3) for a in x], strict=True
            )
            for t in range(len(x) - 1, -1, -1):
                heads = []
                for h in range(n):
                    part = slice(h * d, (h + 1) * d)
                    scores = torch.stack([q[t][part] @ k[s][part] / math.sqrt(d) for s in range(t + 1)])
                    heads.append(sum(p * v[s][part] for s, p in enumerate(scores.softmax(0))))
                x[t] = x[t] + linear(torch.cat(heads), at + "attn.c_proj")
            x = [
                a + linear(gelu(linear(norm(a, at + "ln_2"), at + "mlp.c_fc")), at + "mlp.c_proj") for a in x
            ]
        rows.append(torch.stack([w["lm_head.weight"] @ norm(a, "transformer.ln_f") for a in x]))
    return torch.stack(rows)[..., : config.vocab_size]


def test_parameter_count_of_the_device_tuned_trainer():
    with torch.device("meta"):
        net = GPT(GPTConfig(vocab_size=50257, block_size=512, n_layer=8, n_head=8, n_embd=512))
    assert net.num_parameters() == 51_237_888


def test_parameter_count_of_gpt2_small():
    with torch.device("meta"):
        net = GPT(GPTConfig(vocab_size=50257))
    assert net.num_parameters() == 124_475_904
    assert sum(p.numel() for p in net.transformer.h[0].parameters()) == 7_087_872


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"vocab_multiple": 1},
        {"tie_weights": False},
        {"bias": False},
        {"qkv_bias": False},
        {"bias": False, "qkv_bias": True},
        {"n_inner": 40},
        {"n_head": 1},
        {"exact_gelu": True},
    ],
    ids=str,
)
def test_logits_equal_a_slow_reference(values):
    net = build(**values).double()
    idx = torch.randint(0, 61, (2, 7))
    torch.testing.assert_close(net(idx)[..., :61], reference_logits(net, idx), atol=1e-9, rtol=1e-9)


def test_attention_to_short_sequences_in_bfloat16_has_a_backward_pass_in_32_bits():
    torch.manual_seed(0)
    q, k, v, above = (torch.randn(2, 3, 24, 16).bfloat16().requires_grad_() for _ in range(4))
    y = attention(q, k, v, None, dropout_p=0.0, is_causal=True)
    exact = F.scaled_dot_product_attention(*(t.double() for t in (q, k, v)), is_causal=True)
    torch.testing.assert_close(y.double(), exact, atol=1e-2, rtol=1e-2)
    expected = torch.autograd.grad(exact, (q, k, v), above.double())
    for name, mine, right in zip("qkv", torch.autograd.grad(y, (q, k, v), above), expected, strict=True):
        error = (mine.float() - right.float()).norm() / right.float().norm()
        assert error < (0.001 if name == "v" else 0.003)  # of the pass in 16 bits: 0.003 for v


@pytest.mark.parametrize(
    ("values", "with_bias"),
    [
        ({}, {"c_attn", "c_proj", "c_fc", "ln_1", "ln_2", "ln_f"}),
        ({"bias": False}, set()),
        ({"bias": False, "qkv_bias": True}, {"c_attn"}),
        ({"qkv_bias": False}, {"c_proj", "c_fc", "ln_1", "ln_2", "ln_f"}),
    ],
    ids=["default", "no bias", "qkv_bias alone", "no qkv_bias"],
)
def test_biases_are_where_the_configuration_has_them(values, with_bias):
    names = build(**values).state_dict()
    assert {name.split(".")[-2] for name in names if name.endswith(".bias")} == with_bias


def test_gradients_equal_a_slow_reference():
    net = build(std=0.1)
    idx, targets = torch.randint(0, 61, (2, 2, 6))
    net(idx, targets).backward()
    fast = {name: p.grad.double() for name, p in net.named_parameters()}
    net.zero_grad()
    copy = {name: p.detach().double().requires_grad_() for name, p in net.named_parameters()}
    copy["lm_head.weight"] = copy["transformer.wte.weight"]
    stand_in = type("Net", (), {"config": net.config, "state_dict": lambda self: copy})()
    F.cross_entropy(reference_logits(stand_in, idx).flatten(0, 1), targets.flatten()).backward()
    for name, grad in fast.items():
        torch.testing.assert_close(grad, copy[name].grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("length", "first"), [(16, 9), (2, 1)])
def test_logits_ignore_future_tokens(length, first):
    net = build()
    idx = torch.randint(0, 61, (1, length))
    changed = idx.clone()
    changed[0, first:] = (changed[0, first:] + 1) % 61
    a, b = net(idx), net(changed)
    torch.testing.assert_close(a[:, :first], b[:, :first])
    assert (a[:, first] - b[:, first]).nan_to_num().abs().max() > 0.1


def test_padded_ids_have_probability_zero():
    net = build()
    logits = net(torch.randint(0, 61, (2, 5)))
    assert logits.shape == (2, 5, 64)
    probability = logits.softmax(-1)
    assert torch.all(probability[..., 61:] == 0)
    assert torch.all(probability[..., :61] > 0)


def test_padding_changes_no_loss_and_no_gradient():
    padded, plain = build(), build(vocab_multiple=1)
    table = ("wte.weight", "lm_head.weight")
    weights = padded.state_dict()
    plain.load_state_dict({name: w[:61] if name.endswith(table) else w for name, w in weights.items()})
    idx, targets = torch.randint(0, 61, (2, 2, 6))
    losses = [net(idx, targets) for net in (padded, plain)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    gradient = padded.transformer.wte.weight.grad
    torch.testing.assert_close(gradient[:61], plain.transformer.wte.weight.grad)
    assert torch.all(gradient[61:] == 0)


def test_loss_leaves_out_ignored_targets():
    net = build()
    idx, targets = torch.randint(0, 61, (2, 2, 6))
    each = -net(idx).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    targets[0, 2] = targets[1, 0] = IGNORE
    kept = targets != IGNORE
    assert kept.sum() == 10
    torch.testing.assert_close(net(idx, targets), each[kept].mean())
    torch.testing.assert_close(net(idx, targets, reduction="sum"), each[kept].sum())
    torch.testing.assert_close(net(idx, targets, reduction="none"), each * kept)


def test_initial_weights_have_the_scale_of_gpt2():
    torch.manual_seed(0)
    net = GPT(GPTConfig(vocab_size=1000, block_size=64, n_layer=8, n_head=4, n_embd=128))
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            assert torch.all(parameter == 0), name
        elif ".ln_" in name:
            assert torch.all(parameter == 1), name
        else:
            std = 0.02 / 4 if "c_proj" in name else 0.02  # sqrt(2 * 8 layers) = 4
            assert abs(parameter.std() / std - 1) < 0.03, name
            assert abs(parameter.mean()) < 0.1 * std, name


def test_initial_loss_equals_that_of_a_uniform_guess():
    torch.manual_seed(0)
    net = GPT(GPTConfig(vocab_size=1000, block_size=64, n_layer=2, n_head=4, n_embd=128))
    loss = net(*torch.randint(0, 1000, (2, 8, 64)))
    assert abs(loss - math.log(1000)) < 0.05


def test_dropout_is_active_only_in_training():
    net = build(dropout=0.5)
    idx = torch.randint(0, 61, (2, 9))
    assert torch.equal(net(idx), net(idx))
    torch.testing.assert_close(net(idx), build()(idx))
    net.train()
    assert not torch.equal(net(idx), net(idx))


def test_attention_weights_are_dropped_as_well_as_activations():
    attention, x = build(dropout=0.5).transformer.h[0].attn, torch.randn(2, 9, 32)
    expected = 2 * attention(x)  # of what is not dropped after the projection
    found = attention.train()(x)
    kept = found != 0
    assert not torch.allclose(found[kept], expected[kept])


def test_cache_reads_no_more_than_is_there_unless_shapes_have_to_stay():
    cache = KVCache(GPTConfig(**SMALL), 2, size=8, device=torch.device("cpu"), dtype=torch.float32)
    rows, positions = torch.arange(2), torch.tensor([[2], [2]])
    cache.seek(rows, positions)
    assert (cache.length, cache.mask) == (3, None)
    cache.seek(rows, positions, whole=True)
    assert cache.length == 8
    assert cache.mask.flatten(1).tolist() == [[True] * 3 + [False] * 5] * 2


def test_model_is_built_from_keywords():
    assert build_gpt(**SMALL).config == GPTConfig(**SMALL)


def test_values_say_what_none_stands_for():
    values = GPTConfig(**SMALL, bias=False).values()
    assert (values["n_inner"], values["qkv_bias"], values["n_embd"]) == (128, False, 32)
    values = GPTConfig(**SMALL, n_inner=7, bias=False, qkv_bias=True).values()
    assert (values["n_inner"], values["qkv_bias"], values["bias"]) == (7, True, False)


def test_roles_tell_matrices_of_blocks_from_the_rest():
    roles = build(n_layer=1, tie_weights=False).parameter_roles()
    block = "transformer.h.0"
    matrices = {
        "transformer.wte.weight": "embedding",
        "transformer.wpe.weight": "embedding",
        f"{block}.attn.c_attn.weight": "qkv",
        f"{block}.attn.c_proj.weight": "hidden",
        f"{block}.mlp.c_fc.weight": "hidden",
        f"{block}.mlp.c_proj.weight": "hidden",
        "lm_head.weight": "head",
    }
    assert {name: role for name, role in roles.items() if role != "vector"} == matrices
    vectors = [f"{block}.attn.c_attn.bias", f"{block}.ln_1.weight", "transformer.ln_f.bias"]
    assert set(vectors) <= roles.keys()
    assert len(roles) == 7 + 4 + 6  # matrices, biases of layers, two vectors of each LayerNorm


def test_flops_per_token_counted_by_hand():
    net = build(tie_weights=False)
    matrices = 2 * (32 * 96 + 32 * 32 + 2 * 32 * 128) + 64 * 32  # two blocks and the head
    biases = 2 * (96 + 32 + 128 + 32 + 4 * 32) + 2 * 32
    assert net.num_parameters(embeddings=False) == matrices + biases
    assert net.flops_per_token() == 6 * (matrices + biases) + 12 * 2 * 32 * 16
    assert build().flops_per_token() == net.flops_per_token()  # a tied head multiplies as well


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 0}, "model.vocab_size=0 must be a whole number of at least 1"),
        ({"n_layer": -2}, "model.n_layer=-2 must be a whole number of at least 1"),
        ({"block_size": 2.5}, "model.block_size=2.5 must be a whole number of at least 1"),
        ({"n_embd": "32"}, "model.n_embd='32' must be a whole number of at least 1"),
        ({"n_head": True}, "model.n_head=True must be a whole number of at least 1"),
        ({"n_inner": 0}, "model.n_inner=0 must be a whole number of at least 1"),
        ({"vocab_multiple": 0}, "model.vocab_multiple=0 must be a whole number of at least 1"),
        ({"bias": None}, "model.bias=None must be true or false"),
        ({"qkv_bias": 1}, "model.qkv_bias=1 must be true or false"),
        ({"tie_weights": "yes"}, "model.tie_weights='yes' must be true or false"),
        ({"dropout": 1.0}, "model.dropout=1.0 must lie in [0, 1)"),
        ({"dropout": -0.1}, "model.dropout=-0.1 must lie in [0, 1)"),
        ({"dropout": "0"}, "model.dropout='0' must be a number in [0, 1)"),
        ({"n_embd": 1}, "model.n_embd=1 is not divisible by model.n_head=4; choose model.n_embd=4"),
        ({"n_embd": 34}, "model.n_embd=34 is not divisible by model.n_head=4; choose model.n_embd=32"),
    ],
    ids=str,
)
def test_config_errors_name_key_value_and_remedy(values, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared below)
        GPTConfig(**{**SMALL, **values})
    assert str(error.value) == message


def test_input_longer_than_the_block_is_refused():
    with pytest.raises(ValueError, match=r"has 17 tokens but block_size=16; crop it"):
        build()(torch.zeros(1, 17, dtype=torch.long))


def test_tied_weights_are_one_matrix_and_untied_ones_two():
    tied, untied = build(), build(tie_weights=False)
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert untied.lm_head.weight is not untied.transformer.wte.weight
    assert untied.num_parameters() - tied.num_parameters() == 64 * 32


@pytest.mark.slow
def test_compile_in_place_keeps_the_state_dicts_keys():
    net = build()
    keys = list(net.state_dict())
    idx = torch.randint(0, 61, (1, 4))
    logits = net(idx)
    net.compile(backend="aot_eager")
    torch.testing.assert_close(net(idx), logits)
    assert list(net.state_dict()) == keys


@pytest.mark.slow
@pytest.mark.parametrize("kind", [GPTConfig, Qwen3Config, StarCoder2Config])
def test_compiled_network_is_one_graph_for_batches_of_any_shape(kind: type) -> None:
    torch.compiler.reset()
    net = random_net(kind=kind)
    compiled = torch.compile(net, backend="eager", dynamic=True, fullgraph=True)  # an error if it is not
    for B, T in ((3, 8), (2, 5)):
        idx = torch.randint(0, 250, (B, T))
        torch.testing.assert_close(compiled(idx, idx), net(idx, idx))


def test_state_dict_holds_no_padding_mask():
    net = build()
    assert "padding" not in net.state_dict()
    build(seed=1).load_state_dict(net.state_dict(), strict=True)
