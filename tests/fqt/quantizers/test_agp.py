"""Activation gradient pruning: which groups are kept is compared with exact fractions, draw by draw."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import fqt
from fqt import products, reference
from fqt.formats import Format
from fqt.quantizers import Quantizer, build, quantize
from tests.fqt import oracle

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ONE = 1 << 24


def keep(ranges: list[float], mode: str, b: int, key: int = 0, stream: int = 3) -> tuple[list[int], list[float]]:
    """The kept groups, and the factor of every group, of groups that reach from 0 to their range."""
    high = torch.tensor(ranges, dtype=torch.float32)
    kept, factor = reference.keep_groups(torch.zeros_like(high), high, mode, b, torch.tensor(key), stream)
    return kept.tolist(), factor.tolist()


def exact_threshold(p: Fraction) -> int:
    """The probability p > 0 as the nearest multiple of 2^-24, ties to even, at least one."""
    return max(1, round(p * ONE))


def integer_ranges(rng: np.random.Generator, groups: int) -> list[float]:
    """Of 30 bits, the widest 2^30, with full float32 mantissas: these are kept exactly by the algorithm."""
    ranges = np.exp2(rng.uniform(0, 30, groups)).astype(np.float32).astype(np.int64)
    ranges = np.where(ranges < 2**24, ranges, ranges // 128 * 128)
    ranges[rng.random(groups) < 0.2] = 0
    ranges[rng.integers(groups)] = 2**30
    return ranges.astype(float).tolist()


@pytest.mark.parametrize("b", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 7, 8, 16, 33, 600])
@pytest.mark.every(3)
def test_probabilities_are_the_exact_water_filling(groups, b, rng):
    """Kept are just the groups whose 24 random bits are below min(1, c R_i), and they are divided by it."""
    for case in range(2 if groups > 100 else 8):
        ranges = integer_ranges(rng, groups) if case % 4 else rng.integers(1, 4, groups).astype(float).tolist()
        if case % 4 == 0:
            ranges[0] = 4.0  # powers of two are exact fractions of the widest
        p = oracle.agp_probabilities([Fraction(r) for r in ranges], b)
        assert sum(p) == max(Fraction(1), min(Fraction(groups, b), sum(r > 0 for r in ranges)))
        for key in rng.integers(-(2**63), 2**63, 6).tolist():
            kept, factor = keep(ranges, "bernoulli", b, key)
            draws = [oracle.u24(i, 0, 3, key) for i in range(groups)]
            threshold = [exact_threshold(q) if q > 0 else 0 for q in p]
            assert kept == [i for i in range(groups) if draws[i] < threshold[i]]
            expected = np.zeros(groups, np.float32)
            expected[kept] = [ONE / threshold[i] for i in kept]
            np.testing.assert_array_equal(np.float32(factor), expected)


@pytest.mark.parametrize("groups", [5, 40, 512, 1000])
def test_probabilities_of_any_ranges_are_water_filling_to_within_their_30_bits(groups, rng):
    """Ranges are cut to 30 bits of the widest: |dp| <= p * dR/R with dR = 2^-30 widest, and as much for the sum of R."""
    ranges = np.exp(rng.normal(size=groups) * 2).astype(np.float32).astype(float).tolist()
    p = oracle.agp_probabilities([Fraction(r) for r in ranges], 4)
    below_one = [r for r, q in zip(ranges, p, strict=True) if q < 1]
    unit = max(ranges) * 2.0**-29  # one for the cut, one for float64's rounding
    of_sum = groups * unit / sum(below_one)
    seen = 0
    for key in range(20):
        kept, factor = keep(ranges, "bernoulli", 4, key)
        for i in kept:
            slack = float(p[i]) * (unit / ranges[i] + of_sum) + 2.0**-24
            assert abs(1 / factor[i] - float(p[i])) <= slack + float(p[i]) * 2.0**-23
            seen += p[i] < 1
    assert seen > 2


@pytest.mark.parametrize("groups", [511, 512, 513, 1024, 4096])
def test_many_groups_of_equal_range_are_not_all_kept(groups):
    """64-bit sums of 2^54 * groups wrap from 512 groups on: all were kept, at a factor of 1."""
    kept, factor = keep([1.0] * groups, "bernoulli", 4)
    expected, sigma = groups / 4, math.sqrt(groups * 0.25 * 0.75)
    assert abs(len(kept) - expected) < oracle.z_limit(1) * sigma
    assert {factor[i] for i in kept} == {4.0}


def test_the_kept_groups_number_g_over_b_in_the_mean(rng):
    """E[number kept] = sum of p = G/b; a sum of independent coins, z-test at a false alarm of 1e-6."""
    ranges = np.exp(rng.normal(size=40) * 2).tolist()
    p = np.array([float(q) for q in oracle.agp_probabilities([Fraction(np.float32(r).item()) for r in ranges], 4)])
    assert p.sum() == pytest.approx(10)
    keys = 1000
    counts = [len(keep(ranges, "bernoulli", 4, key)[0]) for key in range(keys)]
    oracle.assert_mean(np.array(sum(counts)), keys, np.array(10.0), np.array((p * (1 - p)).sum()))


def test_one_group_wider_than_all_others_is_always_kept_and_the_rest_shares_what_is_left():
    ranges = [1e6] + [1.0] * 15
    for key in range(30):
        kept, factor = keep(ranges, "bernoulli", 4, key)
        assert 0 in kept
        assert factor[0] == 1.0
        assert all(factor[i] == pytest.approx(5.0, rel=1e-5) for i in kept if i)  # 3 of 15


def test_at_least_one_group_is_kept_in_the_mean():
    """G/b below 1 counts as 1: two groups of equal range, one in eight, are kept with probability 1/2 each."""
    for key in range(50):
        kept, factor = keep([3.0, 3.0], "bernoulli", 8, key)
        assert {factor[i] for i in kept} <= {2.0}
    assert keep([3.0], "bernoulli", 8)[0] == [0]


def test_zero_groups_are_dropped_and_constant_ones_are_not():
    low, high = torch.tensor([0.0, 2.0, -3.0, 0.0]), torch.tensor([0.0, 2.0, -3.0, 0.0])
    kept, _ = reference.keep_groups(low, high, "bernoulli", 1, torch.tensor(0), 1)
    assert kept.tolist() == [1, 2]
    kept, _ = reference.keep_groups(torch.zeros(3), torch.zeros(3), "bernoulli", 1, torch.tensor(0), 1)
    assert kept.tolist() == []


@pytest.mark.parametrize("mode", ["bernoulli", "topk"])
@pytest.mark.parametrize("bad", [(math.nan, math.nan), (-1.0, math.inf), (-math.inf, 0.0), (-3e38, 3e38)])
def test_a_group_that_is_not_finite_is_kept_as_it_is(mode, bad):
    low = torch.tensor([-1.0, bad[0], -1.0, -1.0, -2.0, 0.0])
    high = torch.tensor([1.0, bad[1], 1.0, 1.0, 3.0, 0.0])
    for key in range(20):
        kept, factor = reference.keep_groups(low, high, mode, 6, torch.tensor(key), 1)
        assert 1 in kept.tolist()
        assert factor[1] == 1.0
        assert bool(factor.isfinite().all())


def test_topk_keeps_the_largest_and_of_equals_the_first():
    """max(1, G // b) groups by max |x|, whatever their sign, not rescaled."""
    low = torch.tensor([-1.0, -5.0, 0.0, -5.0, 2.0, 0.0, -0.5])
    high = torch.tensor([1.0, 1.0, 5.0, 0.0, 4.0, 3.0, 5.0])
    for b, expected in ((1, [0, 1, 2, 3, 4, 5, 6]), (2, [1, 2, 3]), (3, [1, 2]), (4, [1]), (8, [1]), (100, [1])):
        kept, factor = reference.keep_groups(low, high, "topk", b, None, 1)
        assert kept.tolist() == expected
        assert factor.tolist() == [float(i in expected) for i in range(7)]
    all_equal, _ = reference.keep_groups(torch.full((9,), -1.0), torch.ones(9), "topk", 3, None, 1)
    assert all_equal.tolist() == [0, 1, 2]


# --- through quantize ------------------------------------------------------------------------------------------------


def gradient(rng: np.random.Generator, shape=(8, 3, 12)) -> torch.Tensor:
    """Samples and channels of very different size, as gradients are."""
    size = np.exp(rng.normal(size=(shape[0], 1, 1)) * 1.5 + rng.normal(size=(1, 1, shape[2])))
    return torch.from_numpy((rng.normal(size=shape) * size).astype(np.float32))


@pytest.mark.parametrize("granularity", ["sample", "channel", "token", "sample_channel", "tensor"])
@pytest.mark.parametrize("mode", ["bernoulli", "topk"])
def test_kept_groups_have_the_codes_that_they_would_have_unpruned(mode, granularity, rng):
    g, key = gradient(rng), torch.tensor(1234567)
    q, _ = quantize(g, build("agp", "g", bits=4, granularity=granularity, mode=mode), "g", key=key, stream=8)
    whole, _ = quantize(g, build("psq", "g", bits=4, granularity=granularity), "g", key=key, stream=8)
    low, high = reference.group_range(reference.group_rows(g, q.format))
    expected_kept, factor = reference.keep_groups(low, high, mode, 4, key, 9)
    assert q.index is not None
    assert q.offset is not None
    assert whole.offset is not None
    kept = q.index[q.index >= 0].long()
    assert kept.tolist() == expected_kept.tolist()
    pruned = [i for i in range(q.scale.numel()) if i not in kept.tolist()]
    assert torch.equal(q.scale[kept], whole.scale[kept] * factor[kept])
    assert torch.equal(q.offset[kept], whole.offset[kept] * factor[kept])
    assert not q.scale[pruned].any()
    assert not q.offset[pruned].any()
    codes, whole_codes = (reference.group_rows(reference.unpack(t.codes, t.format, t.shape), t.format) for t in (q, whole))
    assert torch.equal(codes[kept], whole_codes[kept])
    assert not codes[pruned].any()
    assert not reference.group_rows(q.decode(), q.format)[pruned].any()


@pytest.mark.parametrize("granularity", ["sample", "channel", "sample_channel"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bernoulli_is_unbiased_with_the_predicted_variance(granularity, bits, rng):
    """E Q(g) = g, and Var Q(g) = v/p + g^2 (1 - p)/p with the rounding's own v = f (1 - f) step^2 <= step^2/4.

    z-tests at a false alarm of 1e-6. Copies of all groups leave every p as it is, so that a key gives many draws.
    """
    copies, keys, g = 100, 40, gradient(rng, (8, 2, 8))
    draws = copies * keys
    many = g.repeat(1, 1, copies) if granularity == "channel" else g.repeat(copies, 1, 1)
    plain, _ = quantize(g, build("affine", "g", bits=bits, granularity=granularity), "g")
    rows = reference.group_rows(g, plain.format)
    low, high = reference.group_range(rows)
    ranges = [Fraction(float(h)) - Fraction(float(m)) for m, h in zip(low.clamp(max=0), high.clamp(min=0), strict=True)]
    p = np.array([float(q) for q in oracle.agp_probabilities(ranges, bits)])[:, None]

    value = rows.double().numpy()
    step, offset = (t.double().numpy()[:, None] for t in (plain.scale, plain.offset))
    y = (value - offset) / step
    nearly = np.abs(y - y.round()) < (2**bits - 1) * 2.0**-21  # the extremes are codes, but for float32's roundings
    share = np.where(nearly, 0, y - np.floor(y))
    rounding = share * (1 - share) * step**2
    assert (rounding <= step**2 / 4).all()
    variance = rounding / p + value**2 * (1 - p) / p

    got = np.zeros((keys, copies, *value.shape))
    for i, key in enumerate(rng.integers(-(2**63), 2**63, keys)):
        q, _ = quantize(many, build("agp", "g", bits=bits, granularity=granularity), "g", key=torch.tensor(key), stream=4)
        values = q.decode()
        parts = values.chunk(copies, 2 if granularity == "channel" else 0)
        got[i] = np.stack([reference.group_rows(part, q.format).numpy() for part in parts])
    got = got.reshape(draws, *value.shape)

    often = (p * draws > 300)[:, 0]  # the normal approximation needs hits
    assert often.sum() >= 2
    got, value, variance, p = got[:, often], value[often], variance[often], p[often]
    slack = np.abs(value).max(1, keepdims=True) / p * 2**-19
    # a group is kept or pruned as a whole, so its elements are not independent
    oracle.assert_mean(got.sum(0), draws, value, variance, slack=slack, independent=False)
    squares = np.square(got - value).sum(2)
    error = variance.sum(1)
    spread = squares.var(0)
    close = np.abs(squares.mean(0) - error) - 4 * (slack[:, 0] ** 2 + slack[:, 0] * np.sqrt(error))
    assert (close <= oracle.z_limit(len(error)) * np.sqrt(spread / draws)).all(), (squares.mean(0), error)


def test_topk_is_biased_and_says_so():
    g = torch.tensor([[[1.0, -1.0]], [[0.5, -0.5]]])
    q, _ = quantize(g, build("agp", "g", bits=2, mode="topk"), "g", key=torch.tensor(0))
    assert torch.equal(q.decode(), torch.tensor([[[1.0, -1.0]], [[0.0, 0.0]]]))


def test_constant_groups_survive_unbiased():
    """A channel whose gradient is one constant has no range of its own; the range to zero keeps it."""
    g = torch.tensor([2.0, 1.0, 1.0, 0.0]).view(1, 1, 4).expand(3, 2, 4)
    agp, keys = build("agp", "g", bits=2, granularity="channel"), 500
    total = torch.zeros(4, dtype=torch.float64)
    for key in range(keys):
        values = quantize(g, agp, "g", key=torch.tensor(key))[0].decode()
        assert torch.equal(values, values[:1, :1].expand(3, 2, 4))
        total += values[0, 0]
    # p = 1, 1/2, 1/2, 0
    oracle.assert_mean(total.numpy(), keys, np.array([2.0, 1.0, 1.0, 0.0]), np.array([0.0, 1.0, 1.0, 0.0]))


def test_a_nan_group_is_kept_and_decodes_to_nan(rng):
    g = gradient(rng)
    g[3, 1, 2] = torch.nan
    for mode in ("bernoulli", "topk"):
        for key in range(10):
            values = quantize(g, build("agp", "g", bits=8, mode=mode), "g", key=torch.tensor(key))[0].decode()
            assert bool(values[3].isnan().all())
            assert bool(values[[0, 1, 2, 4, 5, 6, 7]].isfinite().all())


def test_one_bit_is_not_pruned():
    assert build("agp", "g", bits=1) == Quantizer("uint", 1, "sample", "minmax", offset=True, stochastic=True)


def test_what_agp_is():
    assert build("agp", "g") == Quantizer(
        "uint", 4, "sample", "minmax", offset=True, stochastic=True, prune="bernoulli", keep_one_in=4
    )
    with pytest.raises(ValueError, match="quantizer 'agp' .*mode 'random' is not 'bernoulli', 'systematic' or 'topk'"):
        build("agp", "g", mode="random")


def test_pruning_draws_from_the_stream_after_the_rounding(rng):
    """Neither the next operand's stream nor the rounding's own: stream and stream + 1 belong to one quantizer."""
    g = gradient(rng)
    format = Format("uint", 4, "N", True)
    key = 42
    q, _ = reference.quantize(
        g,
        format,
        calibrate="minmax",
        stochastic=True,
        prune="bernoulli",
        keep_one_in=4,
        key=torch.tensor(key),
        stream=10,
    )
    ranges = [Fraction(float(row.amax().clamp(min=0))) - Fraction(float(row.amin().clamp(max=0))) for row in g]
    p = oracle.agp_probabilities(ranges, 4)
    expected = [i for i in range(8) if oracle.u24(i, 0, 11, key) < float(p[i]) * ONE]
    assert q.index is not None
    assert q.index[q.index >= 0].tolist() == expected


# --- systematic sampling ---------------------------------------------------------------------------------------------


def test_systematic_keeps_the_share_of_groups_and_never_none(rng):
    """G/b groups rounded up or down; one where G is less than b."""
    for groups, b in ((1, 4), (2, 4), (3, 8), (4, 4), (8, 4), (10, 4), (64, 4), (1000, 8)):
        high = torch.from_numpy(np.exp(rng.normal(size=groups)).astype(np.float32))
        for key in range(40):
            kept, factor = reference.keep_groups(-high, high, "systematic", b, torch.tensor(key), 1)
            assert max(1, groups // b) <= len(kept) <= max(1, -(-groups // b))
            assert torch.equal((factor > 0).nonzero()[:, 0], kept)


def test_systematic_has_the_probabilities_and_factors_of_independent_draws():
    """Over an even grid of draws the share of each group is its probability; each count lies within 5.5 deviations."""
    high = torch.tensor([1.0, 0.2, 3.0, 0.7, 0.0, 0.1, 40.0, 1.5])
    draws, count, factors = 1500, torch.zeros(8), torch.zeros(8)
    for key in range(draws):
        kept, factor = reference.keep_groups(-high, high, "systematic", 2, torch.tensor(key), 1)
        count[kept] += 1
        factors = torch.maximum(factors, factor)
    p = torch.where(factors > 0, 1 / factors, 0.0)
    assert p.sum() == pytest.approx(4.0, abs=1e-5) and p[6] == 1.0 and p[4] == 0.0
    deviation = (draws * p * (1 - p)).sqrt().clamp(min=1e-9)
    assert ((count - draws * p).abs() <= 5.5 * deviation + 1e-3).all()
    once = torch.zeros(8)
    for key in range(200):
        once = torch.maximum(once, reference.keep_groups(-high, high, "bernoulli", 2, torch.tensor(key), 1)[1])
    seen = once > 0
    assert torch.equal(once[seen], factors[seen])


@pytest.mark.parametrize("backend", ["", "reference"])
def test_systematic_codes_are_those_of_any_kernel_that_encodes(backend, rng):
    g, key, quantizer = gradient(rng), torch.tensor(99), build("agp", "g", bits=4, mode="systematic")
    assert quantizer is not None and quantizer.random
    q, _ = quantize(g, quantizer, "g", key=key, stream=8, backend=backend)
    options = {"calibrate": "minmax", "prune": "systematic", "keep_one_in": 4, "stochastic": True}
    expected, _ = reference.quantize(g, q.format, key=key, stream=8, **options)
    for made, wanted in zip(q.parts(), expected.parts(), strict=True):
        assert torch.equal(made, wanted)


def test_a_kernel_that_calibrates_itself_refuses_systematic():
    from fqt.cpu import codes

    for function in (codes.quantize, codes.calibrate):
        with pytest.raises(ValueError, match="prune 'systematic' is drawn by the reference's calibrate alone"):
            function(torch.ones(2, 1, 4), fqt.Format("uint", 4, "N", True), calibrate="minmax", prune="systematic")


SYSTEMATIC = """
extends: fqt_1bit
grad_input: {g: {quantizer: agp, bits: 4, granularity: sample, mode: systematic}, w: saved}
grad_weight: {g: {quantizer: agp, bits: 4, granularity: channel, mode: systematic}, x: saved}
"""


def test_no_small_batch_loses_its_gradient_and_independent_draws_say_so(tmp_path, caplog):
    (tmp_path / "systematic.yaml").write_text(SYSTEMATIC)

    def lost(recipe, batch):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(8)))
        fqt.convert(model, recipe)
        zero = 0
        for _ in range(30):
            model.zero_grad()
            model(torch.randn(batch, 16)).square().sum().backward()
            zero += not model[1].weight.grad.any()
        return zero

    products._say_small.cache_clear()
    assert lost(tmp_path / "systematic.yaml", 3) == 0
    assert "pruning" not in caplog.text
    assert lost("fqt_1bit", 3) > 5
    said = [line for line in caplog.messages if "samples" in line]
    assert said == [
        "pruning (uint4/sample keep 1/4 bernoulli) draws among 3 samples: up to 30 % of such steps keep none, and the gradient "
        "behind is zero; give larger batches, or a recipe with mode: systematic or without pruning (fqt_w1a1g6)"
    ]
