import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from crdnd.config import build
from crdnd.errors import InputError
from crdnd.random import Stream
from crdnd.threat import ThreatModel
from support import generator

MANY = 20_000
KS_LIMIT = 1.95  # see test_random.py

BATCH = 5
SHAPES = [(1, 2, 3), (3, 2, 4), (7,)]
NORMS = ("linf", "l2")


def law(examples):
    # Drawing is slow on a busy machine, and that is no fault of the law.
    return settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def rounding(threat: ThreatModel) -> float:
    return 1e-12 * (1 + threat.eps)


def pixels(shape, seed):
    """Pixels in [0, 1], about a third of them on a face of the box."""
    return (1.5 * torch.rand(BATCH, *shape, generator=generator(seed), dtype=torch.float64) - 0.25).clamp(0, 1)


@st.composite
def cases(draw, norms=NORMS):
    """A threat model, images, and points anywhere, from the size of a rounding error to far outside."""
    norm = draw(st.sampled_from(norms))
    eps = draw(st.one_of(st.just(0.0), st.floats(1e-6, 0.99 if norm == "linf" else 8.0)))
    shape, seed = draw(st.sampled_from(SHAPES)), draw(st.integers(0, 10**6))
    x = pixels(shape, seed)
    scale = 10.0 ** draw(st.integers(-8, 8))
    far = x + scale * torch.randn(x.shape, generator=generator(seed + 1), dtype=torch.float64)
    return ThreatModel(norm=norm, eps=eps), x, far


def expand(per_sample, like):
    return per_sample.reshape(-1, *(1,) * (like.ndim - 1))


def assert_legal(threat, x_adv, x):
    """By the definition { x' : ||x' - x||_p <= eps, 0 <= x' <= 1 }, not by the threat model's own distance."""
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    delta = (x_adv - x).flatten(1)
    length = delta.abs().max(dim=1).values if threat.norm == "linf" else (delta**2).sum(dim=1).sqrt()
    assert (length <= threat.eps + rounding(threat)).all()
    assert ((x_adv >= 0) & (x_adv <= 1)).all()


def test_distance_is_the_norm_of_the_whole_perturbation_of_each_sample():
    a = torch.zeros(2, 1, 1, 2, dtype=torch.float64)
    b = torch.tensor([[[[3.0, -4.0]]], [[[0.0, 0.5]]]], dtype=torch.float64)
    assert ThreatModel(norm="l2", eps=1).distance(a, b).tolist() == [5.0, 0.5]
    assert ThreatModel(norm="linf", eps=0.1).distance(a, b).tolist() == [4.0, 0.5]


@law(100)
@given(cases())
def test_projection_is_legal_and_idempotent(case):
    threat, x, far = case
    projected = threat.project(far, x)
    assert_legal(threat, projected, x)
    torch.testing.assert_close(threat.project(projected, x), projected, rtol=0, atol=rounding(threat))


@law(100)
@given(cases(), st.floats(0, 0.999))
def test_projection_leaves_legal_points_alone(case, part):
    threat, x, far = case
    # A point of the ball, then towards x until it is in the box: legal by construction.
    delta = far - x
    longest = delta.abs().flatten(1).amax(1) if threat.norm == "linf" else (delta**2).flatten(1).sum(1).sqrt()
    inside = (x + delta * expand(part * threat.eps / longest, x)).clamp(0, 1)
    torch.testing.assert_close(threat.project(inside, x), inside, rtol=0, atol=rounding(threat))
    assert torch.equal(threat.project(x, x), x)


@law(100)
@given(cases(norms=("linf",)))
def test_linf_projection_is_the_nearest_legal_point(case):
    threat, x, far = case
    # Ball and box are both boxes, so the nearest point is found pixel by pixel.
    lower, upper = (x - threat.eps).clamp(min=0), (x + threat.eps).clamp(max=1)
    nearest = torch.minimum(torch.maximum(far, lower), upper)
    torch.testing.assert_close(threat.project(far, x), nearest, rtol=0, atol=rounding(threat))


@law(50)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3))
def test_l2_projection_scales_the_perturbation_where_the_box_does_not_bind(seed, scale):
    threat = ThreatModel(norm="l2", eps=0.5)
    x = torch.full((BATCH, 1, 2, 3), 0.5, dtype=torch.float64)
    delta = scale * torch.randn(x.shape, generator=generator(seed), dtype=torch.float64)
    delta[0] *= 0.01 / scale  # one sample inside the ball: it must not be pushed out to the sphere
    length = (delta**2).flatten(1).sum(1).sqrt()
    factor = torch.where(length > 0.5, 0.5 / length, torch.ones_like(length))
    torch.testing.assert_close(threat.project(x + delta, x), x + delta * expand(factor, x), rtol=0, atol=1e-12)


@law(100)
@given(cases(), st.floats(0, 2), st.integers(-9, 9))
def test_a_step_is_legal_and_no_longer_than_its_fraction_of_eps(case, step, magnitude):
    threat, x, far = case
    x_adv = threat.project(far, x)
    gradient = 10.0**magnitude * torch.randn(x.shape, generator=generator(3), dtype=torch.float64)
    after = threat.ascend(x_adv, gradient, x, step)
    assert_legal(threat, after, x)
    # Both projections are onto convex sets that hold x_adv, so they never lengthen the step.
    moved = (after - x_adv).flatten(1)
    length = moved.abs().max(dim=1).values if threat.norm == "linf" else (moved**2).sum(dim=1).sqrt()
    assert (length <= step * threat.eps + rounding(threat)).all()


@pytest.mark.parametrize("magnitude", [1e-8, 1.0, 1e8])
def test_a_step_goes_along_the_steepest_direction_whatever_the_gradients_size(magnitude):
    x = torch.full((2, 1, 1, 2), 0.5, dtype=torch.float64)
    gradient = magnitude * torch.tensor([[[[3.0, -4.0]]], [[[-1.0, 0.0]]]], dtype=torch.float64)
    linf = ThreatModel(norm="linf", eps=0.4).ascend(x, gradient, x, 0.25) - x
    torch.testing.assert_close(linf, torch.tensor([[[[0.1, -0.1]]], [[[-0.1, 0.0]]]], dtype=torch.float64))
    l2 = ThreatModel(norm="l2", eps=0.4).ascend(x, gradient, x, 0.25) - x
    torch.testing.assert_close(l2, torch.tensor([[[[0.06, -0.08]]], [[[-0.1, 0.0]]]], dtype=torch.float64))


@pytest.mark.parametrize("magnitude", [1e-40, 1e-26, 1e30])
def test_the_gradient_of_a_saturated_loss_still_gives_a_step_of_the_right_length(magnitude):
    # Cross-entropy with a margin of 60 has a gradient of about exp(-60) = 1e-26, whose square float32 cannot hold.
    threat, x = ThreatModel(norm="l2", eps=0.4), torch.full((2, 1, 1, 2), 0.5)
    gradient = magnitude * torch.tensor([[[[3.0, -4.0]]], [[[-1.0, 0.0]]]])
    moved = threat.ascend(x, gradient, x, 0.25) - x
    torch.testing.assert_close(moved, torch.tensor([[[[0.06, -0.08]]], [[[-0.1, 0.0]]]]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_every_sample_may_have_a_step_of_its_own(norm):
    threat, x = ThreatModel(norm=norm, eps=0.3), pixels((3, 2, 4), 1)
    gradient = torch.randn(x.shape, generator=generator(3), dtype=torch.float64)
    steps = torch.tensor([2.0, 0.0, 0.25, 1.0, 0.125], dtype=torch.float64)
    found = threat.ascend(x, gradient, x, expand(steps, x))
    for i, step in enumerate(steps.tolist()):
        assert torch.equal(found[i], threat.ascend(x, gradient, x, step)[i])
    assert torch.equal(found[1], x[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm", NORMS)
def test_a_pixel_whose_gradient_is_no_number_stays_and_all_others_move(norm, bad):
    threat, x = ThreatModel(norm=norm, eps=0.3), torch.full((2, 1, 2, 3), 0.5, dtype=torch.float64)
    gradient = torch.randn(x.shape, generator=generator(3), dtype=torch.float64)
    clean = gradient.clone()
    clean[1, 0, 1, 2] = 0.0
    gradient[1, 0, 1, 2] = bad
    after = threat.ascend(x, gradient, x, 0.5)
    assert torch.equal(after, threat.ascend(x, clean, x, 0.5))
    assert after[1, 0, 1, 2] == 0.5
    assert (after != x).sum() == x.numel() - 1
    gradient[1] = bad
    assert torch.equal(threat.ascend(x, gradient, x, 0.5)[1], x[1])


@law(100)
@given(cases(), st.sampled_from([torch.float32, torch.float64]))
def test_whatever_is_projected_is_allowed_in_the_precision_of_the_images(case, dtype):
    threat, x, far = case
    x = x.to(dtype)
    assert threat.allows(threat.project(far.to(dtype), x), x).all()
    assert threat.allows(threat.start(x, "surface", Stream.of("s", ids=torch.arange(BATCH))), x).all()
    assert threat.allows(x, x).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", NORMS)
def test_what_is_too_far_outside_the_box_or_no_number_is_not_allowed(norm, dtype):
    threat, x = ThreatModel(norm=norm, eps=0.25), torch.full((BATCH, 1, 2, 3), 0.5, dtype=dtype)
    x[1], x[2], x[3] = 0.0, 1.0, 0.1
    x_adv = x.clone()
    x_adv[0, 0, 1, 2] += 0.25 + 1e-4
    x_adv[1, 0, 0, 0] = -1e-7
    x_adv[2, 0, 0, 0] = 1.000001
    x_adv[3, 0, 0, 1] = math.nan
    x_adv[4, 0, 1, 2] += 0.25
    assert threat.allows(x_adv, x).tolist() == [False, False, False, False, True]
    x_adv[4, 0, 1, 2] = math.inf
    assert not threat.allows(x_adv, x)[4]


def test_the_pixels_together_are_too_far_under_l2_and_each_near_enough_under_linf():
    x = torch.full((2, 1, 2, 3), 0.5)
    x_adv = x + torch.tensor([0.1, 0.2]).reshape(2, 1, 1, 1)  # lengths sqrt(6) times as large: 0.24 and 0.49
    assert ThreatModel(norm="linf", eps=0.21).allows(x_adv, x).tolist() == [True, True]
    assert ThreatModel(norm="l2", eps=0.25).allows(x_adv, x).tolist() == [True, False]


@pytest.mark.parametrize("norm", NORMS)
def test_a_zero_gradient_moves_nothing_and_gives_no_nan(norm):
    threat = ThreatModel(norm=norm, eps=0.3)
    x = pixels((1, 2, 3), 0)
    x_adv = threat.project(x + 0.05, x)
    gradient = torch.zeros_like(x)
    gradient[0, 0, 0, 0] = 1.0  # one sample's gradient is not zero: the others must not depend on it
    after = threat.ascend(x_adv, gradient, x, 0.25)
    assert torch.isfinite(after).all()
    torch.testing.assert_close(after[1:], x_adv[1:], rtol=0, atol=1e-15)


@pytest.mark.parametrize("norm", NORMS)
def test_a_sample_is_treated_the_same_in_any_batch(norm):
    threat = ThreatModel(norm=norm, eps=0.3)
    x = pixels((3, 2, 4), 1)
    far = x + torch.randn(x.shape, generator=generator(2), dtype=torch.float64)
    gradient = torch.randn(x.shape, generator=generator(3), dtype=torch.float64)
    ids = torch.tensor([10, 4, 99, 0, 7])
    for part in (slice(0, 2), slice(2, 5)):
        assert torch.equal(threat.project(far, x)[part], threat.project(far[part], x[part]))
        stepped = threat.ascend(x, gradient, x, 0.5)[part]
        assert torch.equal(stepped, threat.ascend(x[part], gradient[part], x[part], 0.5))
        start = threat.start(x, "uniform", Stream.of("s", ids=ids))[part]
        assert torch.equal(start, threat.start(x[part], "uniform", Stream.of("s", ids=ids[part])))


@law(50)
@given(cases(), st.sampled_from(["none", "uniform", "gaussian", "surface"]), st.integers(0, 10**6))
def test_a_start_is_legal(case, kind, seed):
    threat, x, _ = case
    before = x.clone()
    start = threat.start(x, kind, Stream.of("start", seed, ids=torch.arange(BATCH)))
    assert_legal(threat, start, x)
    assert torch.equal(x, before)
    if kind == "none":
        assert torch.equal(start, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", NORMS)
def test_the_surface_start_lies_at_distance_eps_where_the_box_does_not_bind(norm, dtype):
    threat, x = ThreatModel(norm=norm, eps=0.4), torch.full((BATCH, 3, 2, 4), 0.5, dtype=dtype)
    start = threat.start(x, "surface", Stream.of("start", ids=torch.arange(BATCH)))
    assert start.dtype == dtype
    delta = (start - x).flatten(1).double()
    length = delta.abs().amax(1) if norm == "linf" else (delta**2).sum(1).sqrt()
    torch.testing.assert_close(length, torch.full_like(length, 0.4), rtol=1e-6, atol=0)
    assert len(delta.unique(dim=0)) == BATCH
    assert (delta.abs() < 0.39).sum() > BATCH, "a random direction, no corner of the ball"


def test_the_surface_start_has_no_favourite_direction():
    for norm in NORMS:
        x = grey((1, 2, 3))
        start = ThreatModel(norm=norm, eps=0.4).start(x, "surface", Stream.of("start", ids=torch.arange(MANY)))
        delta = (start - x).flatten(1) / 0.4
        assert delta.mean(0).abs().max() < 4.5 / math.sqrt(MANY)
        assert (torch.corrcoef(delta.T) - torch.eye(6)).abs().max() < 4.5 / math.sqrt(MANY)


def test_no_start_is_a_copy():
    x = pixels((1, 2, 3), 0)
    start = ThreatModel(eps=0.1).start(x, "none", Stream.of("start", ids=torch.arange(BATCH)))
    start += 1
    assert x.max() <= 1


def ks(sample):
    """sqrt(n) times the largest distance of the sample's distribution from the uniform one on [0, 1)."""
    ordered = sample.double().flatten().sort().values
    n = len(ordered)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * max((steps[1:] - ordered).max().item(), (ordered - steps[:-1]).max().item())


def grey(shape, dtype=torch.float64):
    """Many grey images: with eps below 1/2 no perturbation reaches a face of the box."""
    return torch.full((MANY, *shape), 0.5, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_linf_start_is_uniform_in_the_ball(dtype):
    x = grey((1, 1, 2), dtype)
    start = ThreatModel(norm="linf", eps=0.4).start(x, "uniform", Stream.of("start", ids=torch.arange(MANY)))
    assert start.dtype == dtype
    place = ((start - x) / 0.4 + 1) / 2
    for pixel in place.flatten(1).T:
        assert ks(pixel) < KS_LIMIT
    assert abs(torch.corrcoef(place.flatten(1).T)[0, 1].item()) < 4 / math.sqrt(MANY)


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 2, 3), (3, 4, 4)])
def test_the_l2_start_is_uniform_in_the_ball(shape):
    x, eps, d = grey(shape), 0.45, math.prod(shape)
    start = ThreatModel(norm="l2", eps=eps).start(x, "uniform", Stream.of("start", ids=torch.arange(MANY)))
    delta = (start - x).flatten(1)
    length = (delta**2).sum(1).sqrt()
    # The ball of radius t eps has t^d of the volume: P(r <= t) = t^d, that is, r^d is uniform on [0, 1].
    assert ks((length / eps) ** d) < KS_LIMIT
    direction = delta / length[:, None]
    # A uniform direction has mean 0, covariance I / d, and is independent of the radius.
    assert direction.mean(0).abs().max() < 4.5 / math.sqrt(d * MANY)
    assert (direction.T @ direction / MANY - torch.eye(d) / d).abs().max() < 5 / (d * math.sqrt(MANY)) * math.sqrt(2)
    volume = (length / eps) ** d
    for moment in (direction, direction.abs()):
        related = torch.corrcoef(torch.cat([volume[None], moment.T]))[0, 1:]
        assert related.abs().max() < 4.5 / math.sqrt(MANY)


@pytest.mark.parametrize("norm", NORMS)
def test_the_gaussian_start_has_a_standard_deviation_of_a_thousandth(norm):
    # Not of eps / 1000: TRADES and RSLAD add 0.001 N(0, 1) whatever eps is.
    for eps in (0.05, 0.4):
        x = grey((1, 1, 2))
        start = ThreatModel(norm=norm, eps=eps).start(x, "gaussian", Stream.of("start", ids=torch.arange(MANY)))
        z = (start - x) / 0.001
        # The mean of n standard normals has a standard error of 1 / sqrt(n), their variance of sqrt(2 / n).
        assert z.mean().abs() < 4 / math.sqrt(2 * MANY)
        assert abs(z.var() - 1) < 4 * math.sqrt(2 / (2 * MANY))
        assert ks(torch.special.ndtr(z)) < KS_LIMIT


@pytest.mark.parametrize("kind", ["uniform", "gaussian", "surface"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_start_depends_on_its_stream_and_on_nothing_global(norm, kind):
    threat, x = ThreatModel(norm=norm, eps=0.1), pixels((1, 2, 3), 0)
    ids = torch.arange(BATCH)
    before = torch.get_rng_state()
    first = threat.start(x, kind, Stream.of("start", 0, ids=ids))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(threat.start(x, kind, Stream.of("start", 0, ids=ids)), first)
    assert not torch.equal(threat.start(x, kind, Stream.of("start", 1, ids=ids)), first)


@pytest.mark.parametrize(
    ("written", "value"),
    [("8/255", 8 / 255), (" 8 / 255 ", 8 / 255), ("0.1", 0.1), (0.1, 0.1), (0, 0.0), ("1e-2", 0.01)],
)
def test_eps_is_read_as_people_write_it(written, value):
    assert ThreatModel(eps=written).eps == value
    assert build(ThreatModel, {"norm": "linf", "eps": written}).eps == value


def test_an_l2_radius_that_makes_every_image_grey_is_meant_in_levels():
    shape = (3, 4, 12)  # whose half diagonal is 6
    grey = torch.full((2, *shape), 0.5)
    furthest = (torch.rand(2, *shape, generator=generator()) > 0.5).float()
    assert (ThreatModel(norm="l2", eps=1).distance(grey, furthest) <= 6).all()
    ThreatModel(norm="l2", eps=5.9).check_for(shape)
    ThreatModel(norm="linf", eps=0.9).check_for(shape)
    for eps in (6, 128):
        with pytest.raises(InputError, match=rf"threat\.eps: l2 eps={eps} makes any .* grey .*write {eps}/255"):
            ThreatModel(norm="l2", eps=eps).check_for(shape)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"norm": "linf", "eps": 8}, r"eps=8 reaches over the whole pixel range.*write 8/255 and not 8"),
        ({"norm": "linf", "eps": 1}, r"eps=1 reaches over the whole pixel range"),
        ({"norm": "linf", "eps": -0.1}, r"eps=-0\.1 must be a number of at least 0"),
        ({"norm": "l2", "eps": -1}, r"eps=-1 must be a number of at least 0"),
        ({"norm": "linf", "eps": math.nan}, r"eps=nan must be a number of at least 0"),
        ({"norm": "l2", "eps": math.inf}, r"eps=inf must be a number of at least 0"),
        ({"norm": "linf", "eps": "eight"}, r"'eight' is not a number; write 0\.1 or 8/255"),
        ({"norm": "linf", "eps": "nan"}, r"'nan' is not a number; write 0\.1 or 8/255"),
        ({"norm": "linf", "eps": "8/0"}, r"'8/0' is not a number; write 0\.1 or 8/255"),
        ({"norm": "linf", "eps": ""}, r"'' is not a number"),
    ],
)
def test_an_impossible_eps_is_refused_in_one_line(values, message):
    with pytest.raises(InputError, match=message) as error:
        build(ThreatModel, values, where="threat")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("threat")
    with pytest.raises(ValidationError, match=message):
        ThreatModel(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"norm": "linf", "eps": None}, r"threat: eps: .*got None"),
        ({"norm": "linf", "eps": [0.1]}, r"threat: eps: .*got \[0\.1\]"),
        ({"norm": "l1", "eps": 0.1}, r"threat: norm: .*'linf' or 'l2'.*got 'l1'"),
        ({"norm": "linf"}, r"threat: eps: this setting is required"),
        ({"norm": "linf", "epsilon": 0.1, "eps": 0.1}, r"threat: epsilon: no such setting; did you mean 'eps'\?"),
    ],
)
def test_a_nonsensical_threat_model_is_refused_by_key(values, message):
    with pytest.raises(InputError, match=message):
        build(ThreatModel, values, where="threat")


def test_l2_allows_an_eps_of_more_than_one_and_settings_never_change():
    threat = ThreatModel(norm="l2", eps=2)
    assert threat.eps == 2
    assert str(threat) == "l2 eps=2"
    assert str(ThreatModel(eps="8/255")) == "linf eps=0.03137"
    with pytest.raises(ValidationError, match="frozen"):
        threat.eps = 1.0
