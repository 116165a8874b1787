import dataclasses
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crdnd.attacks import load_attack
from crdnd.attacks._boundary import to_hyperplane
from crdnd.random import Stream
from crdnd.threat import ThreatModel
from support import BATCH, CLASSES, RankOneVictim, Recorder, TinyNet, generator, images, wavering

NORMS = ("linf", "l2")
ROWS = 7
IDS = torch.tensor([11, 5, 0, 77, 8, 300])


def length(d, norm):
    return d.abs().amax(1) if norm == "linf" else (d**2).sum(1).sqrt()


def slow_projection(x, w, gap, norm):
    """By bisection on how far all pixels go, for one point; None where no point of the box is on the hyperplane."""
    towards = [-1.0 if a * gap > 0 else 1.0 for a in w]
    room = [(1 - p if t > 0 else p) if a else 0.0 for p, a, t in zip(x, w, towards, strict=True)]
    if sum(abs(a) * r for a, r in zip(w, room, strict=True)) < abs(gap):
        return None

    def moves(far):
        return [min(far * (1 if norm == "linf" else abs(a)), r) if a else 0.0 for a, r in zip(w, room, strict=True)]

    low, high = 0.0, 1.0
    while sum(abs(a) * m for a, m in zip(w, moves(high), strict=True)) < abs(gap) and high < 1e12:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        reached = sum(abs(a) * m for a, m in zip(w, moves(middle), strict=True)) >= abs(gap)
        low, high = (low, middle) if reached else (middle, high)
    return [t * m for t, m in zip(towards, moves(high), strict=True)]


@st.composite
def hyperplanes(draw):
    """Points, normals and gaps; some weights are 0, some pixels on a face of the box, some hyperplanes out of reach."""
    seed, pixels = draw(st.integers(0, 10**6)), draw(st.integers(1, 12))
    scale, zeros = 10.0 ** draw(st.integers(-4, 4)), draw(st.sampled_from([0.0, 0.3, 1.0]))
    g = generator(seed)
    x = (1.5 * torch.rand(ROWS, pixels, generator=g, dtype=torch.float64) - 0.25).clamp(0, 1)
    w = scale * torch.randn(ROWS, pixels, generator=g, dtype=torch.float64)
    w[torch.rand(w.shape, generator=g) < zeros] = 0.0
    gap = scale * pixels * 0.5 * torch.randn(ROWS, generator=g, dtype=torch.float64)
    gap[0] = 0.0
    return x, w, gap


@given(hyperplanes(), st.sampled_from(NORMS))
def test_the_way_to_a_hyperplane_is_the_shortest_one_inside_the_box(case, norm):
    x, w, gap = case
    d = to_hyperplane(x, w, gap, norm)
    assert d.shape == x.shape
    assert ((x + d >= -1e-12) & (x + d <= 1 + 1e-12)).all()
    assert (d[w == 0] == 0).all()
    reached = (w * d).sum(1)
    for i in range(ROWS):
        expected = slow_projection(x[i].tolist(), w[i].tolist(), gap[i].item(), norm)
        if expected is None:
            furthest = torch.where(w[i] * gap[i] > 0, -x[i], 1 - x[i])
            torch.testing.assert_close(d[i], torch.where(w[i] == 0, 0.0, furthest), rtol=0, atol=1e-9)
        else:
            assert abs(reached[i] + gap[i]) <= 2e-7 * gap[i].abs()
            shortest = torch.tensor([expected], dtype=torch.float64)
            assert length(d[i : i + 1], norm) <= length(shortest, norm) * (1 + 1e-9) + 1e-15


@pytest.mark.parametrize("norm", NORMS)
def test_where_the_box_does_not_bind_the_way_is_the_textbooks(norm):
    x = torch.full((2, 3), 0.5, dtype=torch.float64)
    w, gap = torch.tensor([[3.0, 0.0, -4.0], [1.0, 1.0, 2.0]], dtype=torch.float64), torch.tensor([0.7, -0.4]).double()
    d = to_hyperplane(x, w, gap, norm)
    if norm == "linf":  # gap / ||w||_1 against the sign of w
        expected = torch.tensor([[-0.1, 0.0, 0.1], [0.1, 0.1, 0.1]])
    else:  # gap w / ||w||_2^2
        expected = torch.stack([torch.tensor([-2.1, 0.0, 2.8]) / 25, torch.tensor([0.4, 0.4, 0.8]) / 6])
    torch.testing.assert_close(d, expected.double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_a_pixel_on_a_face_leaves_its_share_to_the_others(norm):
    # The first pixel must fall and is at 0 already: the second one does all the work, |d| w = gap.
    x = torch.tensor([[0.0, 0.9], [0.1, 0.9]], dtype=torch.float64)
    w, gap = torch.ones(2, 2, dtype=torch.float64), torch.tensor([0.5, 0.5]).double()
    expected = torch.tensor([[0.0, -0.5], [-0.1, -0.4]], dtype=torch.float64)
    torch.testing.assert_close(to_hyperplane(x, w, gap, norm), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("pixels", [2, 50, 784])
@pytest.mark.parametrize("norm", NORMS)
def test_the_way_to_a_hyperplane_agrees_with_pyautoattacks(norm, pixels):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("pyautoattack")
        from pyautoattack import fab_projections
    theirs = {"linf": fab_projections.projection_linf, "l2": fab_projections.projection_l2}[norm]
    g = generator(pixels)
    for scale in (0.1, 1.0):
        x = (1.2 * torch.rand(40, pixels, generator=g) - 0.1).clamp(0, 1)
        w = scale * torch.randn(40, pixels, generator=g)
        # From within reach to far out of it: all pixels together can do about a quarter of the sum of |w|.
        gap = torch.linspace(-0.4, 0.4, 40) * w.abs().sum(1)
        expected = theirs(x.clone(), w.clone(), (w * x).sum(1) - gap)
        torch.testing.assert_close(to_hyperplane(x, w, gap, norm), expected, rtol=0, atol=1e-5)


def closed_form_distance(victim, x, y, norm):
    """To the nearest boundary of a linear model, far from the faces of the box: lead / dual norm of its gradient."""
    logits = victim(x).detach()
    d = victim.d.detach().flatten()
    dual = d.abs().sum() if norm == "linf" else d.norm()
    lead = logits.gather(1, y[:, None]) - logits
    slope = (victim.t.detach()[y][:, None] - victim.t.detach()[None]).abs() * dual
    # Moving along d one way lifts the classes above y, the other way those below: each is a boundary of its own.
    return (lead / slope).scatter(1, y[:, None], torch.inf).amin(1)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("norm", NORMS)
def test_the_boundary_of_a_linear_model_is_found_exactly_where_it_is_near_enough(norm, classes):
    victim, x = RankOneVictim(classes), 0.4 + 0.2 * images(30)
    victim.b.data -= victim(x).mean(0)
    if classes == 3:
        victim.b.data[1] += 0.1
    y = victim(x).argmax(1)
    assert len(y.unique()) == classes
    distance = closed_form_distance(victim, x, y, norm)
    for eps in distance.sort().values[[3, 15, 26]].tolist():
        threat = ThreatModel(norm=norm, eps=eps * 1.01)
        x_adv = load_attack("fab_t")(victim, x, y, threat, Stream.of("t", ids=torch.arange(30)))
        fooled = victim(x_adv).argmax(1) != y
        decided = (distance < 0.995 * threat.eps) | (distance > threat.eps)
        assert torch.equal(fooled[decided], (distance < threat.eps)[decided])
        assert fooled[distance == eps].all()
        assert threat.allows(x_adv, x).all()
        assert torch.equal(x_adv[~fooled], x[~fooled])


def test_the_box_is_minded_on_the_way_to_the_boundary():
    victim, x = RankOneVictim(2), images(30)
    victim.b.data -= victim(x).mean(0)
    y = victim(x).argmax(1)
    uphill = victim.uphill(y).sign()
    for eps in (0.001, 0.003, 0.007):
        inner, outer = (victim((x + eps * part * uphill).clamp(0, 1)).argmax(1) != y for part in (0.98, 1.0))
        assert 0 < inner.sum() < 30
        x_adv = load_attack("fab_t")(victim, x, y, ThreatModel(eps=eps), Stream.of("t", ids=torch.arange(30)))
        fooled = victim(x_adv).argmax(1) != y
        assert fooled[inner].all()
        assert not fooled[~outer].any()


@pytest.mark.parametrize("norm", NORMS)
def test_a_sample_is_searched_the_same_in_any_batch(norm):
    model, x, threat = wavering(), images(13), ThreatModel(norm=norm, eps=0.02 if norm == "linf" else 0.12)
    y = model(x).argmax(1)
    attack = dataclasses.replace(load_attack("fab_t"), iterations=20)

    def found(rows):
        return attack(model, x[rows], y[rows], threat, Stream.of("t", ids=rows))

    whole = found(torch.arange(13))
    assert 0 < (model(whole).argmax(1) != y).sum() < 13
    for rows in (torch.tensor([3, 0]), torch.arange(5, 13), torch.randperm(13, generator=generator(1))):
        torch.testing.assert_close(found(rows), whole[rows], rtol=0, atol=1e-9)


def test_a_sample_that_stands_costs_two_passes_an_iteration_and_leaves_as_soon_as_it_falls():
    model, x = Recorder(wavering()), images()
    y = model.model(x).argmax(1)
    attack = dataclasses.replace(load_attack("fab_t"), iterations=6)
    attack(model, x, y, ThreatModel(eps=1e-9), Stream.of("t", ids=IDS))
    assert [len(z) for z in model.inputs] == [BATCH] * (1 + (CLASSES - 1) * (1 + 2 * 6 + 1))
    model.inputs.clear()
    attack(model, x, y, ThreatModel(eps=0.9), Stream.of("t", ids=IDS))
    assert len(model.inputs) < 1 + 1 + 2 * 6 + 1
    assert model.inputs[-1].shape == x.shape


def test_nan_gradients_give_legal_images_and_no_adversarial_ones():
    class Rooted(TinyNet):
        """Its slope is infinite times 0 wherever the pixels' mean is what it is."""

        def forward(self, z):
            return super().forward(z) + 0 * (z.detach() - z).abs().sqrt().flatten(1).sum(1, keepdim=True)

    model, x = Rooted(), images()
    y = model(x).argmax(1)
    for norm in NORMS:
        threat = ThreatModel(norm=norm, eps=0.1)
        x_adv = load_attack("fab_t")(model, x, y, threat, Stream.of("t", ids=IDS))
        assert torch.equal(x_adv, x)


def test_there_is_a_round_for_each_of_nine_targets_or_of_all_there_are():
    attack = load_attack("fab_t")
    for classes, rounds in ((2, 1), (3, 2), (10, 9), (100, 9)):
        assert [part.index for part in attack.rounds(classes)] == list(range(rounds))
