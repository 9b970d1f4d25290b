"""Generation compared with slow references and with transformers."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_lightning.inference import decoding
from gpt_lightning.inference.decoding import stream, window_length
from gpt_lightning.inference.sampling import SamplingSettings
from gpt_lightning.model.gpt import GPTConfig
from gpt_lightning.model.weights import NETWORKS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=NETWORKS, ids=lambda kind: kind.__name__)
def net(request):
    return build(kind=request.param)


def build(block_size=16, kind=GPTConfig, **values):
    """A random model in float64, where rounding does not decide between two tokens."""
    torch.manual_seed(0)
    values |= {} if kind is GPTConfig else {"n_kv_head": 1}
    shape = {"vocab_size": 61, "n_layer": 2, "n_head": 2, "n_embd": 16}
    net = NETWORKS[kind](kind(block_size=block_size, **shape, **values))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return net.double()


def generate(net, prompts, settings, *, seed=0, **options):
    return decoding.generate(net, prompts, replace(settings, seed=seed), **options)


RANDOM = SamplingSettings(max_new_tokens=40, temperature=1.0, top_k=None)
PROMPTS = [[3], list(range(9)), [5, 4, 3, 2], list(range(30))]


def test_window_grows_to_the_block_then_advances_in_half_blocks():
    assert [window_length(n, 4) for n in range(1, 12)] == [1, 2, 3, 4, 3, 4, 3, 4, 3, 4, 3]
    assert [window_length(n, 6) for n in range(5, 14)] == [5, 6, 4, 5, 6, 4, 5, 6, 4]
    assert [window_length(n, 1) for n in range(1, 5)] == [1, 1, 1, 1]
    assert [window_length(n, 2) for n in range(1, 6)] == [1, 2, 2, 2, 2]


def test_greedy_tokens_equal_repeated_forwards(net):
    text = [7, 1, 4]
    for _ in range(30):  # beyond the block of 16
        window = text[-window_length(len(text), 16) :]
        text.append(net.eval()(torch.tensor([window]))[0, -1].argmax().item())
    greedy = SamplingSettings(max_new_tokens=30, temperature=0.0)
    assert generate(net, [[7, 1, 4]], greedy) == [text[3:]]


def test_very_long_request_needs_little_memory_and_begins_like_a_short_one(net):
    endless = stream(net, PROMPTS, SamplingSettings(max_new_tokens=10**15, temperature=1.0, top_k=None))
    begun = [next(endless) for _ in range(300)]
    endless.close()
    short = SamplingSettings(max_new_tokens=300, temperature=1.0, top_k=None)
    assert begun == list(stream(net, PROMPTS, short))


@pytest.mark.parametrize(
    "chosen",
    [
        RANDOM,
        SamplingSettings(max_new_tokens=40, temperature=0.0),
        SamplingSettings(max_new_tokens=40, top_k=10, top_p=0.9, min_p=0.01, repetition_penalty=1.3),
    ],
    ids=["random", "greedy", "filters"],
)
def test_cache_changes_no_token_within_and_beyond_the_block(net, chosen):
    assert generate(net, PROMPTS, chosen, seed=5) == generate(net, PROMPTS, chosen, seed=5, use_cache=False)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9),
    st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=24), min_size=1, max_size=4),
    st.integers(0, 2**40),
)
def test_cache_changes_no_token_for_any_prompts_and_block(block_size, prompts, seed):
    net = build(block_size)
    chosen = SamplingSettings(max_new_tokens=20, temperature=1.0, top_k=None)
    assert generate(net, prompts, chosen, seed=seed) == generate(
        net, prompts, chosen, seed=seed, use_cache=False
    )


def test_static_shapes_change_no_token(net):
    plain = generate(net, PROMPTS, RANDOM, seed=5)
    assert generate(net, PROMPTS, RANDOM, seed=5, static_shapes=True) == plain


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recordable", [True, False])
def test_cuda_graph_gives_the_tokens_of_eager_steps(recordable, caplog):
    net = build().to("cuda")
    plain = generate(net, PROMPTS, RANDOM, seed=5)
    if not recordable:
        net.lm_head.register_forward_hook(lambda *_: torch.cuda.synchronize())  # a recording must not wait
    assert generate(net, PROMPTS, RANDOM, seed=5, static_shapes=True) == plain
    assert ("continues without a CUDA graph" in caplog.text) != recordable


def test_batched_sequences_equal_single_ones(net):
    together = generate(net, PROMPTS, RANDOM, seed=10)
    assert together == [generate(net, [prompt], RANDOM, seed=10 + i)[0] for i, prompt in enumerate(PROMPTS)]
    assert len({tuple(t) for t in generate(net, [[3]] * 4, RANDOM)}) == 4  # each has its own numbers


def test_seed_determines_the_text_whatever_its_length(net):
    first = generate(net, [[3]], RANDOM, seed=1)
    assert first == generate(net, [[3]], RANDOM, seed=1)
    assert first != generate(net, [[3]], RANDOM, seed=2)
    for n in (1, 5, 17):
        short = SamplingSettings(max_new_tokens=n, temperature=1.0, top_k=None)
        assert generate(net, [[3]], short, seed=1)[0] == first[0][:n]


def test_stop_ids_end_a_sequence_and_do_not_appear(net):
    free = generate(net, PROMPTS, RANDOM, seed=3)
    stop = free[0][4]
    ended = generate(net, PROMPTS, RANDOM, seed=3, stop_ids=[stop])
    for text, full in zip(ended, free, strict=True):
        assert text == (full[: full.index(stop)] if stop in full else full)
    steps = list(stream(net, PROMPTS[:2], replace(RANDOM, seed=3), stop_ids=[stop]))
    assert all(ids[0] is None for ids in steps[4:])
    assert steps[3][0] == free[0][3]


def test_stream_yields_nothing_once_every_sequence_has_stopped(net):
    assert list(stream(net, [[3], [4]], RANDOM, stop_ids=range(61))) == []


def test_padded_ids_are_never_produced(net):
    hot = SamplingSettings(max_new_tokens=400, temperature=1000.0, top_k=None)
    new = generate(net, [[1]] * 8, hot)
    assert net.config.padded_vocab_size == 64
    assert max(map(max, new)) == 60  # every real id comes up, the three padded ones do not


def test_repetition_penalty_counts_the_prompt_and_the_new_tokens(net):
    text = list(range(9))
    for _ in range(30):
        logits = net.eval()(torch.tensor([text[-window_length(len(text), 16) :]]))[0, -1].tolist()
        for token in set(text):
            logits[token] *= 1 / 1.7 if logits[token] > 0 else 1.7
        text.append(logits.index(max(logits)))
    chosen = SamplingSettings(max_new_tokens=30, temperature=0.0, repetition_penalty=1.7)
    assert generate(net, [list(range(9))], chosen)[0] == text[9:]


def test_global_random_state_and_mode_are_unchanged():
    net = build(dropout=0.5).train()
    torch.manual_seed(4)
    state = torch.get_rng_state()
    text = generate(net, [[3]], RANDOM)
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    assert text == generate(net.eval(), [[3]], RANDOM)  # dropout was off
    assert not net.training


def test_mode_is_restored_when_the_iterator_is_closed(net):
    net.train()
    tokens = stream(net, [[3]], RANDOM)
    next(tokens)
    tokens.close()
    assert net.training


def test_generation_works_under_autocast():
    net = build().float()
    greedy = SamplingSettings(max_new_tokens=20, temperature=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(generate(net, PROMPTS, greedy)[0]) == 20


@pytest.mark.parametrize("prompt", [[], [61], [-1], [3, 100]], ids=str)
def test_prompt_outside_the_vocabulary_is_refused(net, prompt):
    with pytest.raises(ValueError, match=r"must have at least one id, all below vocab_size=61; encode it"):
        generate(net, [[1], prompt], RANDOM)


@pytest.mark.slow
def test_greedy_tokens_equal_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    from gpt_lightning.interop.gpt2 import save_gpt2

    net = build(block_size=64)
    save_gpt2(net.float(), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, pad_token_id=0
    )
    greedy = SamplingSettings(max_new_tokens=40, temperature=0.0)
    assert generate(net, ids.tolist(), greedy)[0] == expected[0, 5:].tolist()
