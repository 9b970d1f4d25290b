"""Packed layers compared with the ones they replace, on a trained model."""

import copy
import functools
from pathlib import Path

import pytest
import torch

from gpt_lightning.inference import cpu_kernels
from gpt_lightning.inference.cpu_kernels import Int8Linear, PackedLinear, activation_levels, pack
from gpt_lightning.inference.decoding import generate
from gpt_lightning.inference.sampling import SamplingSettings
from gpt_lightning.model.gpt import GPT, GPTConfig, KVCache

CORPUS = Path(__file__).parents[2] / "input.txt"
GREEDY = SamplingSettings(max_new_tokens=60, temperature=0.0)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def text():
    return torch.frombuffer(bytearray(CORPUS.read_bytes()[:200_000]), dtype=torch.uint8).long()


@pytest.fixture(scope="module")
def net(text):
    """A byte model trained for some seconds, in float32; ids are bytes.

    How many steps it takes depends on the machine's rounding. 4.8 is the loss of a guess, 3.0 that of
    letter frequencies.
    """
    torch.manual_seed(0)
    net = GPT(GPTConfig(vocab_size=127, block_size=64, n_layer=2, n_head=4, n_embd=64))
    optimizer = torch.optim.AdamW(net.parameters(), lr=6e-3)
    for step in range(2000):
        at = torch.randint(len(text) - 65, (12, 1)) + torch.arange(65)
        optimizer.zero_grad()
        net(text[at[:, :-1]], text[at[:, 1:]]).backward()
        optimizer.step()
        if step % 50 == 49 and loss(net, text) < 2.65:
            return net.eval()
    raise AssertionError("it does not learn")


def packed(net, dtype):
    return pack(copy.deepcopy(net), dtype)


@torch.no_grad()
def loss(net, text):
    windows = text[: 65 * 200].view(200, 65)
    logits = net(windows[:, :-1]).float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()


def test_every_linear_layer_is_replaced(net):
    for dtype, kind in (("float32", PackedLinear), ("int8", Int8Linear)):
        kinds = [type(m) for m in packed(net, dtype).modules()]
        assert kinds.count(kind) == 2 * 4 + 1
        assert torch.nn.Linear not in kinds


def test_float32_changes_only_rounding(net, text):
    idx = text[:64].view(1, 64)
    with torch.no_grad():
        torch.testing.assert_close(packed(net, "float32")(idx), net(idx), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("amx", [True, False])
def test_single_positions_change_only_rounding_with_amx_and_without(net, text, amx, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "repeats_single_rows", lambda: not amx)
    small, idx = packed(net, "float32"), text[:1].view(1, 1)
    calls = []
    for layer in small.modules():
        if isinstance(layer, PackedLinear):
            product = layer.linear
            layer.linear = lambda x, *rest, of=product: (calls.append(len(x)), of(x, *rest))[1]
    with torch.no_grad():
        torch.testing.assert_close(small(idx), net(idx), atol=1e-4, rtol=1e-4)
    assert calls == [1 if amx else 4] * (2 * 4 + 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_bfloat16_and_int8_change_the_loss_by_less_than_half_a_percent(net, text, dtype):
    full = loss(net, text)
    small = loss(packed(net, dtype), text)
    assert small != full
    assert abs(small / full - 1) < 0.005


@torch.no_grad()
def step_by_step(net, windows):
    """Logits (B, T, V) with one position at a time, as generation has it."""
    cache = KVCache(net.config, len(windows), size=64, device=windows.device, dtype=torch.float32)
    logits = []
    for t in range(windows.size(1)):
        cache.seek(torch.arange(len(windows)), torch.full((len(windows), 1), t))
        logits.append(net.lm_head(net.transformer(windows[:, t : t + 1], cache)[:, -1]))
    return torch.stack(logits, 1)


@pytest.mark.parametrize("weight_only", [False, True])
def test_int8_keeps_the_loss_of_generation(net, text, weight_only, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "Int8Linear", functools.partial(Int8Linear, weight_only=weight_only))
    windows = text[: 65 * 60].view(60, 65)
    full, small = (
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
        for logits in (net(windows[:, :-1]), step_by_step(packed(net, "int8"), windows[:, :-1]))
    )
    assert small != full
    assert abs(small / full - 1) < 0.005


def test_weight_only_int8_products_are_accurate_to_bfloat16():
    torch.manual_seed(0)
    linear = torch.nn.Linear(48, 20)
    x = torch.randn(7, 1, 48) * torch.logspace(-3, 3, 7).view(7, 1, 1)
    step = linear.weight.abs().amax(1, keepdim=True) / 127
    exact = x.bfloat16().double() @ (linear.weight / step).round().double().T  # before the scale
    expected = exact * step.T.double()
    with torch.no_grad():
        actual = Int8Linear(linear, torch.zeros(20), weight_only=True)(x).double()
    assert ((actual - expected).abs() <= 2**-8 * expected.abs() + 1e-6 * x.abs().amax(-1, True)).all()


@pytest.mark.parametrize("positions", [1, 5])
def test_int8_products_equal_those_of_rounded_values(positions):
    torch.manual_seed(0)
    linear = torch.nn.Linear(48, 20)
    sizes = torch.logspace(-3, 3, 3 * positions).view(3, positions, 1)  # rows of very different sizes
    x = torch.randn(3, positions, 48) * sizes
    weight_step = linear.weight.abs().amax(1, keepdim=True) / 127
    row_step = x.abs().amax(-1, keepdim=True) / activation_levels()
    rounded = torch.floor(x / row_step + 0.5) * row_step
    expected = (
        rounded.double() @ ((linear.weight / weight_step).round() * weight_step).double().T + linear.bias
    )
    with torch.no_grad():
        actual = Int8Linear(linear, linear.bias, weight_only=False)(x).double()
    error = (actual - expected).abs() / x.abs().amax(-1, keepdim=True)
    assert error.max() < 1e-5


@pytest.mark.parametrize("weight_only", [False, True])
def test_int8_layer_takes_zeros_and_no_bias(weight_only):
    layer = Int8Linear(torch.nn.Linear(16, 4, bias=False), None, weight_only)
    with torch.no_grad():
        assert torch.equal(layer(torch.zeros(2, 1, 16)), torch.zeros(2, 1, 4))


@pytest.mark.parametrize("width", [8, 12, 24, 33])
def test_int8_handles_widths_that_the_weight_only_kernel_does_not(width):
    torch.manual_seed(0)
    linear = torch.nn.Linear(width, 5)
    x = torch.randn(3, 1, width)
    with torch.no_grad():
        torch.testing.assert_close(Int8Linear(linear, linear.bias, True)(x), linear(x), atol=0.05, rtol=0)


@pytest.mark.parametrize("weight_only", [False, True])
def test_int8_rows_do_not_depend_on_their_neighbours(net, weight_only):
    linear = net.transformer.h[0].mlp.c_fc
    layer = Int8Linear(linear, linear.bias, weight_only)
    for length in (1, 5):  # generation, and a prompt
        x = torch.randn(8, length, 64)
        x[3] *= 100
        with torch.no_grad():
            assert torch.equal(layer(x), torch.cat([layer(row) for row in x.split(1)]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_packed_model_generates_with_and_without_cache(net, text, dtype):
    small = packed(net, dtype)
    prompts = [text[:5].tolist(), text[100:140].tolist()]
    new = generate(small, prompts, GREEDY)
    assert [len(t) for t in new] == [60, 60]
    if dtype == "float32":
        assert new == generate(net, prompts, GREEDY)
        assert new == generate(small, prompts, GREEDY, use_cache=False)
    # of the smaller ones, rounding decides between near equals
    assert new == [generate(small, [prompt], GREEDY)[0] for prompt in prompts]


def test_padded_ids_have_logit_minus_infinity_in_packed_models(net, text):
    for dtype in ("float32", "bfloat16", "int8"):
        with torch.no_grad():
            logits = packed(net, dtype)(text[:9].view(1, 9))
        assert logits.shape[-1] == 128
        assert torch.all(logits[..., 127:] == -torch.inf), dtype


def test_packed_model_refuses_to_save(net):
    with pytest.raises(ValueError, match="use read_model"):
        packed(net, "float32").state_dict()


def test_layers_are_not_packed_if_the_kernel_gives_wrong_results(net, text, monkeypatch, caplog):
    caplog.set_level("INFO")
    operator = torch.ops.mkldnn._linear_pointwise
    kernel = operator.default
    monkeypatch.setattr(operator, "default", lambda *arguments: kernel(*arguments) * 1.1)
    small = packed(net, "float32")
    assert not any(isinstance(layer, PackedLinear) for layer in small.modules())
    assert "packed linear layers are not used: the packed layer gives other results" in caplog.text
    idx = text[:64].view(1, 64)
    with torch.no_grad():
        assert torch.equal(small(idx), net(idx))


def test_unknown_type_is_refused_in_one_line(net):
    with pytest.raises(ValueError, match=r"^dtype='int4' must be one of float32, bfloat16, int8$"):
        pack(net, "int4")


def test_model_on_another_device_is_unchanged():
    net = GPT(GPTConfig(vocab_size=127, block_size=8, n_layer=1, n_head=1, n_embd=8)).to("meta")
    assert pack(net) is net
    assert isinstance(net.transformer.h[0].mlp.c_fc, torch.nn.Linear)
    with pytest.raises(ValueError, match=r"dtype=int8 is not available here .*; use dtype=bfloat16"):
        pack(net, "int8")
