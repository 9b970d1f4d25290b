"""Each filter compared with values computed by hand; probabilities are powers of two, exact in binary."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_lightning.inference import sampling
from gpt_lightning.inference.sampling import RANGES, SamplingSettings, choose

KEEP_ALL = SamplingSettings(temperature=1.0, top_k=None)


def logits(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log().float()


def kept(filtered):
    return [row.isfinite().nonzero()[:, 0].tolist() for row in filtered]


TWO = logits([1 / 8, 1 / 2, 1 / 8, 1 / 4], [1 / 4, 1 / 4, 1 / 4, 1 / 4])


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.2, [[1], [0, 1, 2, 3]]),  # equally likely tokens stay together
        (0.5, [[1], [0, 1, 2, 3]]),
        (0.51, [[1, 3], [0, 1, 2, 3]]),
        (0.75, [[1, 3], [0, 1, 2, 3]]),
        (0.76, [[0, 1, 2, 3], [0, 1, 2, 3]]),
    ],
)
def test_top_p_keeps_the_fewest_that_reach_p(p, expected):
    filtered = sampling.top_p(TWO, p)
    assert kept(filtered) == expected
    finite = filtered.isfinite()
    assert torch.equal(filtered[finite], TWO[finite])


def test_top_p_equals_a_full_sort_for_any_size_of_the_nucleus(monkeypatch):
    torch.manual_seed(0)
    rows = torch.randn(4, 300)
    rows[:, 290:] = -math.inf
    for p in (0.1, 0.9, 0.999):
        expected = []
        for row in rows:
            order = row.softmax(0).argsort(descending=True)
            total, nucleus = 0.0, []
            for i in order.tolist():
                nucleus.append(i)
                total += row.double().softmax(0)[i].item()
                if total >= p:
                    break
            expected.append(sorted(nucleus))
        assert kept(sampling.top_p(rows, p)) == expected
        monkeypatch.setattr(sampling, "NUCLEUS_GUESS", 4)
        assert kept(sampling.top_p(rows, p)) == expected


@pytest.mark.parametrize(
    ("p", "expected"),
    [(1.0, [[1], [0, 1, 2, 3]]), (0.4, [[1, 3], [0, 1, 2, 3]]), (0.2, [[0, 1, 2, 3], [0, 1, 2, 3]])],
)
def test_min_p_is_relative_to_the_likeliest(p, expected):
    assert kept(sampling.min_p(TWO, p)) == expected


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    values = torch.tensor([[2.0, 0.5, -2.0, 4.0, -4.0, -math.inf]])
    seen = torch.tensor([[True, True, True, False, False, True]])
    expected = [[1.0, 0.25, -4.0, 4.0, -4.0, -math.inf]]
    assert sampling.penalize_repetition(values, seen, 2.0).tolist() == expected


def test_draw_inverts_the_cumulative_distribution():
    # cumulative: 1/8, 5/8, 6/8, 1
    uniform = torch.tensor([0.0, 0.124, 0.125, 0.624, 0.625, 0.75, 0.999999])
    drawn = sampling.draw(TWO[:1].expand(7, -1), uniform)
    assert drawn.tolist() == [0, 0, 1, 1, 2, 3, 3]


def test_draw_never_returns_an_id_with_probability_zero():
    row = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    uniform = torch.tensor([0.0, 0.25, 0.4999999, 0.5, 1 - 2**-24, 1.0])
    assert sampling.draw(row.expand(6, -1), uniform).tolist() == [1, 1, 1, 3, 3, 3]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 60))
def test_draw_returns_only_possible_ids_of_random_logits(seed, n):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(8, n, generator=generator) * 5
    rows[torch.rand(8, n, generator=generator) < 0.5] = -math.inf
    rows[:, seed % n] = 0.0
    drawn = sampling.draw(rows, torch.rand(8, generator=generator))
    assert rows.gather(1, drawn[:, None]).isfinite().all()


def test_zero_temperature_always_takes_the_most_likely_token():
    for uniform in (0.0, 0.999):
        chosen = choose(TWO[:1], torch.tensor([uniform]), SamplingSettings(temperature=0.0))
        assert chosen.tolist() == [1]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # TWO's first row is 1/8, 1/2, 1/8, 1/4
        ({}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        ({"temperature": 0.5}, [1 / 22, 16 / 22, 1 / 22, 4 / 22]),  # squares, normalised
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_k": 10}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        ({"top_p": 0.6}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0]),  # of the two left, one has 2/3
        ({"min_p": 0.4}, [0, 2 / 3, 0, 1 / 3]),
        ({"temperature": 0.5, "min_p": 0.2}, [0, 16 / 20, 0, 4 / 20]),  # after temperature
    ],
    ids=str,
)
def test_tokens_are_drawn_with_the_probabilities_of_the_filters(values, expected):
    n = 4096  # evenly spread random numbers give frequencies exact to 1 / n
    chosen = choose(
        TWO[:1].expand(n, -1),
        (torch.arange(n) + 0.5) / n,
        SamplingSettings(**{"temperature": 1.0, "top_k": None, **values}),
    )
    frequency = chosen.bincount(minlength=4) / n
    torch.testing.assert_close(frequency, torch.tensor(expected, dtype=torch.float32), atol=1 / n, rtol=0)


def test_filters_that_keep_everything_change_no_token():
    rows, uniform = TWO[:1].expand(64, -1), (torch.arange(64) + 0.5) / 64
    plain = choose(rows, uniform, KEEP_ALL)
    assert torch.equal(choose(rows, uniform, SamplingSettings(temperature=1.0, top_k=4)), plain)
    rare = torch.tensor([[-18.0, 0.0]])  # so rare that in float32 the other one has probability 1
    assert choose(rare, torch.zeros(1), KEEP_ALL).tolist() == [0]


def test_penalty_comes_before_temperature_and_needs_the_seen_ids():
    row = torch.tensor([[2.0, 1.5]])
    greedy = SamplingSettings(temperature=0.0, repetition_penalty=2.0)
    seen = torch.tensor([[True, False]])
    assert choose(row, torch.zeros(1), greedy, seen=seen).tolist() == [1]
    assert choose(row, torch.zeros(1), greedy).tolist() == [0]


def test_batched_rows_equal_single_rows():
    torch.manual_seed(0)
    rows, uniform = torch.randn(6, 50), torch.rand(6)
    chosen = SamplingSettings(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01)
    together = choose(rows, uniform, chosen)
    alone = [choose(rows[i : i + 1], uniform[i : i + 1], chosen) for i in range(6)]
    assert together.tolist() == torch.cat(alone).tolist()


TEMPERATURE = "from 1e-20 to 1e+20, or 0 to take the most likely token"


def test_every_setting_within_its_bounds_draws_an_id_that_is_possible():
    logits = torch.tensor([[5000.0, -5000.0, 1e-30, 0.0, -math.inf], [0.0, 0.0, -1e-30, 3.0, -math.inf]])
    seen = torch.tensor([[True, True, False, True, False]]).expand(2, 5)
    keys = ("temperature", "top_p", "min_p", "repetition_penalty")
    bounds = [[*RANGES[key][1:3], getattr(SamplingSettings(), key)] for key in keys]
    for values in itertools.product(*bounds, [1, 3, None]):
        settings = SamplingSettings(**dict(zip([*keys, "top_k"], values, strict=True)))
        for uniform in (0.0, 0.5, 1 - 2**-24):
            assert choose(logits, torch.full((2,), uniform), settings, seen=seen).max() < 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number of at least 1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5 must be a whole number of at least 1"),
        ({"top_k": 0}, "top_k=0 must be a whole number of at least 1, or null to keep all tokens"),
        ({"top_k": True}, "top_k=True must be a whole number of at least 1, or null to keep all tokens"),
        ({"temperature": -1}, f"temperature=-1 must be a number {TEMPERATURE}"),
        ({"temperature": math.nan}, f"temperature=nan must be a number {TEMPERATURE}"),
        ({"temperature": 1e-45}, f"temperature=1e-45 must be a number {TEMPERATURE}"),
        ({"temperature": False}, f"temperature=False must be a number {TEMPERATURE}"),
        ({"temperature": math.inf}, f"temperature=inf must be a number {TEMPERATURE}"),
        ({"num_samples": 0}, "num_samples=0 must be a whole number from 1 to 1048576"),
        ({"seed": 2**62}, f"seed={2**62} must be a whole number from 0 to {2**62 - 1}"),
        ({"top_p": 1.5}, "top_p=1.5 must be a number from 1e-20 to 1, where 1 keeps all tokens"),
        ({"stop": 3}, "stop=3 must be a text of at least one character, a list, or null"),
        ({"stop": {"a"}}, "stop={'a'} must be a text of at least one character, a list, or null"),
        ({"stop": ["a", ""]}, "stop=['a', ''] must be a text of at least one character, a list, or null"),
        ({"stop": ["a", 3]}, "stop=['a', 3] must be a text of at least one character, a list, or null"),
        ({"top_p": 0}, "top_p=0 must be a number from 1e-20 to 1, where 1 keeps all tokens"),
        ({"top_p": 1e-300}, "top_p=1e-300 must be a number from 1e-20 to 1, where 1 keeps all tokens"),
        ({"top_p": "0.9"}, "top_p='0.9' must be a number from 1e-20 to 1, where 1 keeps all tokens"),
        ({"min_p": 1.1}, "min_p=1.1 must be a number from 0 to 1, where 0 keeps all tokens"),
        (
            {"repetition_penalty": 1e-308},
            "repetition_penalty=1e-308 must be a number from 0.01 to 100, where 1 is no penalty",
        ),
    ],
    ids=str,
)
def test_settings_errors_name_key_value_and_remedy(values, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared below)
        SamplingSettings(**values)
    assert str(error.value) == message


def test_bounds_of_the_settings_are_allowed():
    for key, (kind, least, most, _) in RANGES.items():
        for value in (least, most if most < math.inf else 10**9):
            assert getattr(SamplingSettings(**{key: kind(value)}), key) == value
    assert SamplingSettings(stop=["a", "bc"]).stops == ("a", "bc")
    assert SamplingSettings(stop="bc").stops == ("bc",)
    assert SamplingSettings(top_k=None).stops == ()


def test_unknown_setting_is_refused_with_a_list_of_all():
    with pytest.raises(
        ValueError, match=r"^unknown setting 'stopp'; use max_new_tokens, temperature, .*, stop$"
    ):
        SamplingSettings.of({"top_k": 3, "stopp": "x", "zoom": 1})
    assert SamplingSettings.of({"top_k": 3}) == SamplingSettings(top_k=3)
