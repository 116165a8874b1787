import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crdnd.random import Stream, permutation

MANY = 40_000
# Kolmogorov and Smirnov: sqrt(n) sup|F_n - F| exceeds 1.95 with probability 0.001 when the law is right. The draws are
# fixed, so a test that passes once passes always.
KS_LIMIT = 1.95


def ks(sample: torch.Tensor) -> float:
    """sqrt(n) times the largest distance of the sample's distribution from the uniform one on [0, 1)."""
    ordered = sample.double().sort().values
    n = len(ordered)
    above = torch.arange(1, n + 1, dtype=torch.float64) / n - ordered
    below = ordered - torch.arange(n, dtype=torch.float64) / n
    return math.sqrt(n) * max(above.max().item(), below.max().item())


def draw(kind: str, stream: Stream) -> torch.Tensor:
    return {
        "uniform": lambda: stream.uniform((2, 3)),
        "uniform64": lambda: stream.uniform((2, 3), torch.float64),
        "normal": lambda: stream.normal((2, 3)),
        "normal64": lambda: stream.normal((2, 3), torch.float64),
        "integers": lambda: stream.integers(-5, 1000, (2, 3)),
        "bits": lambda: stream.bits(6),
    }[kind]()


KINDS = ("uniform", "uniform64", "normal", "normal64", "integers", "bits")


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_draws_the_same_in_any_batch_and_any_order(kind):
    ids = torch.tensor([7, 0, 123_456_789_012, 41, 3])
    whole = draw(kind, Stream.of("purpose", 1, ids=ids))
    parts = [draw(kind, Stream.of("purpose", 1, ids=part)) for part in ids.split(2)]
    assert torch.equal(torch.cat(parts), whole)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.equal(draw(kind, Stream.of("purpose", 1, ids=ids[order])), whole[order])


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_repeats_and_shows_the_global_random_state_nothing(kind):
    before = torch.get_rng_state()
    first = draw(kind, Stream.of("purpose", 1, ids=torch.arange(4)))
    torch.rand(3)
    torch.set_rng_state(before)
    assert torch.equal(draw(kind, Stream.of("purpose", 1, ids=torch.arange(4))), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_element_does_not_depend_on_how_many_are_drawn():
    stream = Stream.of("purpose", ids=torch.arange(4))
    assert torch.equal(stream.uniform((3,)), stream.uniform((9,))[:, :3])
    assert torch.equal(stream.uniform((2, 3)), stream.uniform((6,)).reshape(4, 2, 3))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("attack", 0), ("attack", 1)),
        (("attack", 0), ("order", 0)),
        (("attack", 1, 2), ("attack", 12)),
        (("attack", 1, 2), ("attack", 2, 1)),
        (("attack", 1), ("attack", "1")),
        (("attack",), ("attack", 0)),
    ],
)
def test_streams_of_different_names_are_unrelated(one, other):
    ids = torch.arange(MANY)
    a, b = (Stream.of(*names, ids=ids).uniform((1,), torch.float64)[:, 0] for names in (one, other))
    # The correlation of n independent pairs has a standard deviation of 1 / sqrt(n).
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1].item()) < 4 / math.sqrt(MANY)
    # The difference of independent uniforms, modulo 1, is uniform as well.
    assert ks((a - b) % 1) < KS_LIMIT


def test_a_child_is_unrelated_to_its_parent_and_its_siblings():
    parent = Stream.of("attack", ids=torch.arange(MANY))
    draws = torch.stack([s.uniform((), torch.float64) for s in (parent, parent.child("a"), parent.child("b", 1))])
    correlations = torch.corrcoef(draws) - torch.eye(3, dtype=torch.float64)
    assert correlations.abs().max() < 4 / math.sqrt(MANY)
    streams = (Stream.of(name, ids=torch.arange(MANY)).child("a") for name in ("attack", "other"))
    same, other = (stream.uniform((), torch.float64) for stream in streams)
    assert torch.equal(same, draws[1])
    assert abs(torch.corrcoef(torch.stack([other, draws[1]]))[0, 1].item()) < 4 / math.sqrt(MANY)


def test_neighbouring_samples_and_elements_are_unrelated():
    u = Stream.of("grid", ids=torch.arange(MANY)).uniform((2,), torch.float64)
    samples = torch.stack([u[:-1, 0], u[1:, 0]])
    # Element 1 of a sample must not be element 0 of the next one either: a counter would be shared then.
    diagonal = torch.stack([u[:-1, 1], u[1:, 0]])
    for pair in (samples, u.T, diagonal):
        assert abs(torch.corrcoef(pair)[0, 1].item()) < 4 / math.sqrt(MANY)
    assert len(u.flatten().unique()) == 2 * MANY


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("across", ["samples", "elements"])
def test_uniform_draws_are_uniform_on_the_half_open_interval(dtype, across):
    if across == "samples":
        u = Stream.of("law", ids=torch.arange(MANY)).uniform((1,), dtype).flatten()
    else:
        u = Stream.of("law", ids=torch.arange(2, 4)).uniform((4, MANY // 8), dtype).flatten()
    assert u.dtype == dtype
    assert u.min() >= 0
    assert u.max() < 1
    # Mean 1/2 with standard error sqrt(1/12 / n); variance 1/12 with sqrt(1/180 / n).
    assert abs(u.double().mean() - 1 / 2) < 4 * math.sqrt(1 / 12 / MANY)
    assert abs(u.double().var() - 1 / 12) < 4 * math.sqrt(1 / 180 / MANY)
    assert ks(u) < KS_LIMIT


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 24), (torch.float64, 53)])
def test_uniform_draws_use_all_bits_of_their_format(dtype, bits):
    scaled = Stream.of("bits", ids=torch.arange(2000)).uniform((3,), dtype).double() * 2.0**bits
    assert torch.equal(scaled, scaled.floor()), "multiples of 2^-bits, so that 1 is never reached by rounding"
    odd = (scaled % 2).mean().item()
    assert abs(odd - 1 / 2) < 4 * math.sqrt(1 / 4 / 6000), "the last bit is a fair coin"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_draws_have_the_moments_and_the_law_of_a_standard_normal(dtype):
    z = Stream.of("law", ids=torch.arange(MANY // 4)).normal((2, 2), dtype)
    assert z.shape == (MANY // 4, 2, 2)
    assert z.dtype == dtype
    z = z.double().flatten()
    # E z^p = 0, 1, 0, 3 with variances 1, 2, 15, 96 (E z^2p minus the square).
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 4 * math.sqrt(variance / MANY), f"moment {power}"
    assert ks(torch.special.ndtr(z)) < KS_LIMIT


def test_the_elements_of_a_normal_draw_are_unrelated():
    z = Stream.of("law", ids=torch.arange(MANY)).normal((3,), torch.float64)
    assert (torch.corrcoef(z.T) - torch.eye(3, dtype=torch.float64)).abs().max() < 4 / math.sqrt(MANY)


@settings(max_examples=50, deadline=None)
@given(low=st.integers(-1000, 1000), span=st.integers(1, 1000), seed=st.integers(0, 10**9))
def test_integers_stay_in_their_half_open_range(low, span, seed):
    draws = Stream.of("integers", seed, ids=torch.arange(5)).integers(low, low + span, (2, 3))
    assert draws.shape == (5, 2, 3)
    assert draws.dtype == torch.int64
    assert draws.min() >= low
    assert draws.max() < low + span


@pytest.mark.parametrize(("low", "high"), [(0, 2), (-4, 5), (3, 13)])
def test_integers_are_uniform(low, high):
    draws = Stream.of("integers", ids=torch.arange(MANY)).integers(low, high, ())
    counts = torch.bincount(draws - low, minlength=high - low).double()
    cells, expected = high - low, MANY / (high - low)
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    # Mean cells - 1, variance 2 (cells - 1).
    assert len(counts) == cells
    assert chi_squared < cells - 1 + 4 * math.sqrt(2 * (cells - 1))


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 200), seed=st.integers(0, 10**9))
def test_a_permutation_holds_every_number_once(count, seed):
    order = permutation(count, "order", seed)
    assert torch.equal(order.sort().values, torch.arange(count))
    assert torch.equal(order, permutation(count, "order", seed))


def test_a_permutation_depends_on_all_of_its_names():
    names = [("order", 0, 0), ("order", 0, 1), ("order", 1, 0), ("split", 0, 0)]
    orders = {tuple(permutation(50, *each).tolist()) for each in names}
    assert len(orders) == len(names)


def test_every_order_of_three_is_equally_likely():
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(3000):
        order = tuple(permutation(3, "fair", seed).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    # Binomial with n = 3000, p = 1/6.
    assert all(abs(count - 500) < 4 * math.sqrt(3000 * 5 / 36) for count in counts.values())
