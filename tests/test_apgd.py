import dataclasses
import importlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from crdnd.attacks import input_gradient, load_attack
from crdnd.attacks._apgd import auto_pgd, looks
from crdnd.attacks._targets import target_of_rank
from crdnd.losses import cross_entropy, dlr, margin
from crdnd.random import Stream
from crdnd.threat import ThreatModel
from support import BATCH, CLASSES, RankOneVictim, Recorder, TinyNet, generator, images, wavering

LINF, L2 = ThreatModel(norm="linf", eps=0.1), ThreatModel(norm="l2", eps=0.3)
IDS = torch.tensor([11, 5, 0, 77, 8, 300])
APGD = ["apgd_ce", "apgd_dlr", "apgd_t"]


class Unshakable(nn.Module):
    """A curved model that says 0 whatever it is shown, by a lead of 1,000 on the first logit."""

    def __init__(self, seed=0, dtype=torch.float64):
        super().__init__()
        self.net = TinyNet(seed=seed, dtype=dtype)
        self.lead = 1000 * nn.functional.one_hot(torch.tensor(0), CLASSES).to(dtype)

    def forward(self, x):
        return self.net(x) + self.lead

    def labels(self, count=BATCH):
        return torch.zeros(count, dtype=torch.int64)

    def hidden(self, loss):
        """The loss of the net behind the lead, towards the labels that are handed over as targets."""
        return lambda logits, y, target: loss(logits - self.lead, target)


def test_the_looks_of_the_paper():
    assert looks(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert looks(20) == [4, 7, *range(9, 21)], "a gap of 4, of 3, of 2, and then of 1"


@given(st.integers(1, 2000))
def test_gaps_between_looks_shrink_by_a_constant_down_to_a_floor(iterations):
    found = looks(iterations)
    gaps = np.diff([0, *found])
    first, floor, less = (max(int(share * iterations), 1) for share in (0.22, 0.06, 0.03))
    assert gaps.tolist() == [max(first - i * less, floor) for i in range(len(gaps))]
    assert found[-1] <= iterations < found[-1] + max(first - len(gaps) * less, floor)


@pytest.mark.parametrize("eot", [1, 3])
@pytest.mark.parametrize("iterations", [1, 7, 100])
def test_a_sample_that_never_falls_costs_one_pass_more_than_there_are_iterations(iterations, eot):
    model, x = Recorder(Unshakable()), images()
    y = model.model.labels()
    loss = model.model.hidden(cross_entropy)
    auto_pgd(model, loss, x, y, y, LINF, Stream.of("t", ids=IDS), iterations=iterations, eot=eot)
    assert [len(z) for z in model.inputs] == [BATCH] * (eot * (iterations + 1))


@pytest.mark.parametrize("name", APGD)
def test_an_attack_costs_what_its_rounds_cost(name):
    model = Recorder(Unshakable())
    attack = dataclasses.replace(load_attack(name), iterations=11)
    attack(model, images(), model.model.labels(), LINF, Stream.of("t", ids=IDS))
    # The natural images once; in each round the search, with a look for targets, and its verdict.
    each, rounds = (12 + 2, 4) if name == "apgd_t" else (12 + 1, 1)
    assert len(model.inputs) == 1 + rounds * each


def test_the_mean_of_several_gradients_is_followed():
    torch.manual_seed(0)
    noise = torch.randn(200, 3, 4, 7, dtype=torch.float64)
    direction = torch.linspace(-1, 1, 84, dtype=torch.float64).reshape(3, 4, 7)
    calls = []

    def model(z):
        calls.append(len(z))
        wobble = direction + 3 * noise[len(calls) % 200]
        s = (z * wobble).flatten(1).sum(1)
        return torch.stack([1000 - s, s], 1)

    x, y = images(), torch.zeros(BATCH, dtype=torch.int64)
    right = {}
    for eot in (1, 150):
        calls.clear()
        found = auto_pgd(
            model, lambda z, y, _: margin(z, y), x, y, y, L2, Stream.of("t", ids=IDS), iterations=1, eot=eot
        )
        moved = (found - x).flatten(1) @ direction.flatten()
        right[eot] = moved.mean()
    assert right[150] > right[1]
    assert right[150] > 0


@pytest.mark.parametrize("threat", [ThreatModel(eps=0.02), ThreatModel(norm="l2", eps=0.12)], ids=str)
def test_a_sample_leaves_with_the_first_image_that_fools(threat):
    model, x = Recorder(wavering()), images()
    y = model.model(x).argmax(1)
    found = auto_pgd(
        model, lambda z, y, _: cross_entropy(z, y), x, y, y, threat, Stream.of("t", ids=IDS), iterations=40
    )
    fooled = model.model(found).argmax(1) != y
    assert 0 < fooled.sum() < BATCH
    # The natural images lie further from each other than the ball is wide, so that each input tells whose it is.
    seen = [[] for _ in range(BATCH)]
    for z in model.inputs:
        owners = (z[:, None] - x[None]).flatten(2).norm(dim=2).argmin(1)
        assert len(owners.unique()) == len(owners)
        for owner, row in zip(owners.tolist(), z, strict=True):
            seen[owner].append(row)
    for i, rows in enumerate(seen):
        wrong = model.model(torch.stack(rows)).argmax(1) != y[i]
        if fooled[i]:
            assert wrong.tolist() == [False] * (len(rows) - 1) + [True]
            assert torch.equal(found[i], rows[-1])
        else:
            assert not wrong.any()
            assert len(rows) == 41


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threat", [LINF, L2, ThreatModel(eps=0.9), ThreatModel(norm="l2", eps=5.0)], ids=str)
def test_every_point_that_the_model_sees_is_legal(threat, dtype):
    model, x = Recorder(Unshakable(dtype=dtype)), images(dtype=dtype)
    y = torch.tensor([0, 1, 2, 3, 4, 1])
    loss, labels = model.model.hidden(margin), model.model.labels()
    found = auto_pgd(model, loss, x, labels, y, threat, Stream.of("t", ids=IDS), iterations=60)
    for z in (*model.inputs, found):
        assert z.dtype == dtype
        assert threat.allows(z, x).all()


@pytest.mark.parametrize("threat", [ThreatModel(eps=0.02), ThreatModel(norm="l2", eps=0.12)], ids=str)
@pytest.mark.parametrize("name", APGD)
def test_a_sample_is_searched_the_same_in_any_batch(name, threat):
    model, x, ids = wavering(), images(13), torch.arange(13) * 7
    y = model(x).argmax(1)
    search = load_attack(name).rounds(CLASSES)[0].search

    def found(rows):
        return search(model, x[rows], y[rows], threat, Stream.of("t", ids=ids[rows]))

    whole = found(torch.arange(13))
    fooled = model(whole).argmax(1) != y
    assert 0 < fooled.sum() < 13
    for rows in (torch.tensor([3, 0]), torch.arange(5, 13), torch.randperm(13, generator=generator(1))):
        torch.testing.assert_close(found(rows), whole[rows], rtol=0, atol=1e-9)


def slow_apgd(model, loss, x, start, threat, iterations):
    """Algorithm 1 of the paper for one sample, by lists over all iterations; also how often the step was halved."""
    eps, norm, x = threat.eps, threat.norm, x.numpy()

    def value_and_gradient(point):
        z = torch.tensor(point[None], requires_grad=True)
        value = loss(model(z))[0]
        value.backward()
        return value.item(), z.grad[0].numpy()

    def project(point):
        if norm == "linf":
            return np.clip(np.clip(point, x - eps, x + eps), 0, 1)
        delta = point - x
        size = np.sqrt((delta**2).sum())
        return np.clip(x + (delta * eps / size if size > eps else delta), 0, 1)

    def steepest(gradient):
        return np.sign(gradient) if norm == "linf" else gradient / np.sqrt((gradient**2).sum())

    points, values, gradients = [start.numpy()], [], []
    value, gradient = value_and_gradient(points[0])
    values.append(value)
    gradients.append(gradient)
    now, going, before = points[0], gradient, points[0]
    step, halvings, halved_at_last_look, best_at_last_look = 2 * eps, [], True, value
    times, last = looks(iterations), 0
    for k in range(1, iterations + 1):
        z = project(now + step * steepest(going))
        new = z if k == 1 else project(now + 0.75 * (z - now) + 0.25 * (now - before))
        value, gradient = value_and_gradient(new)
        points.append(new)
        values.append(value)
        gradients.append(gradient)
        before, now, going = now, new, gradient
        if k in times:
            rises = sum(values[i] > values[i - 1] for i in range(last + 1, k + 1))
            stuck = not halved_at_last_look and max(values) == best_at_last_look
            halved_at_last_look = rises <= 0.75 * (k - last) or stuck
            best_at_last_look, last = max(values), k
            if halved_at_last_look:
                best = int(np.argmax(values))
                step, now, going = step / 2, points[best], gradients[best]
                halvings.append(k)
    return points[int(np.argmax(values))], max(values), halvings


@pytest.mark.parametrize("iterations", [30, 100])
@pytest.mark.parametrize("loss", [cross_entropy, margin, dlr])
@pytest.mark.parametrize("threat", [ThreatModel(eps=0.3), ThreatModel(norm="l2", eps=1.5)], ids=str)
def test_auto_pgd_agrees_with_the_papers_algorithm_for_one_sample_at_a_time(threat, loss, iterations):
    model, x = Unshakable(seed=4), images(seed=5)
    y, stream = torch.tensor([4, 1, 2, 3, 0, 1]), Stream.of("t", ids=IDS)
    hidden = model.hidden(loss)
    ours = auto_pgd(model, hidden, x, model.labels(), y, threat, stream, iterations=iterations)
    start = threat.start(x, "surface", stream)
    histories = []
    for i in range(BATCH):
        row = slice(i, i + 1)
        one = lambda z, row=row: hidden(z, None, y[row])  # noqa: E731
        theirs, value, halvings = slow_apgd(model, one, x[i], start[i], threat, iterations)
        histories.append(tuple(halvings))
        assert one(model(ours[row])).item() == pytest.approx(value, rel=1e-6, abs=1e-9)
        torch.testing.assert_close(ours[i], torch.from_numpy(theirs), rtol=0, atol=1e-6)
    assert sum(map(bool, histories)) > BATCH / 2
    assert len(set(histories)) > 1, "each sample has a step of its own"


class Scripted:
    """A loss of 1,000 at the start, and then one that rises with every look and never so far again."""

    def __init__(self):
        self.inputs = []

    def __call__(self, z):
        self.inputs.append(z.detach().clone())
        slope = torch.sin(7 * z.flatten(1)).sum(1)
        return (1000 if len(self.inputs) == 1 else len(self.inputs)) + 1e-3 * slope


def test_a_step_is_not_halved_for_standing_still_before_the_second_look():
    x, threat, stream = images(2), ThreatModel(norm="l2", eps=0.5), Stream.of("t", ids=IDS[:2])
    y = torch.zeros(2, dtype=torch.int64)
    script = Scripted()

    def model(z):
        value = script(z)
        return torch.stack([5000 - value, value - 5000], 1)

    auto_pgd(model, lambda z, y, _: z[:, 1], x, y, y, threat, stream, iterations=60)
    start = threat.start(x, "surface", stream)
    for i in range(2):
        theirs = Scripted()
        _, _, halvings = slow_apgd(theirs, lambda z: z, x[i], start[i], threat, 60)
        assert looks(60)[0] not in halvings
        assert looks(60)[1] in halvings
        ours = torch.stack([z[i] for z in script.inputs])
        torch.testing.assert_close(ours, torch.cat(theirs.inputs), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["apgd_ce", "apgd_dlr"])
def test_linf_reaches_the_closed_form_optimum_of_a_linear_model_with_two_classes(name):
    victim, threat = RankOneVictim(2, scale=0.1), ThreatModel(eps=0.04)
    x = images(40)
    y = victim(x).argmax(1)
    best = (x + threat.eps * victim.uphill(y).sign()).clamp(0, 1)
    falls = victim(best).argmax(1) != y
    assert 0 < falls.sum() < 40
    found = load_attack(name).rounds(2)[0].search(victim, x, y, threat, Stream.of("t", ids=torch.arange(40)))
    assert torch.equal(victim(found).argmax(1) != y, falls)
    torch.testing.assert_close(found[~falls], best[~falls], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["apgd_ce", "apgd_dlr"])
def test_l2_reaches_the_closed_form_optimum_of_a_linear_model_with_two_classes(name):
    victim, threat = RankOneVictim(2), ThreatModel(norm="l2", eps=0.1)
    x = 0.4 + 0.2 * images(40)
    victim.b.data -= victim(x).mean(0)
    y = victim(x).argmax(1)
    uphill = victim.uphill(y)
    best = x + threat.eps * uphill / victim.d.norm()
    falls = victim(best).argmax(1) != y
    assert 0 < falls.sum() < 40
    found = load_attack(name).rounds(2)[0].search(victim, x, y, threat, Stream.of("t", ids=torch.arange(40)))
    assert torch.equal(victim(found).argmax(1) != y, falls)
    along = ((found - x) * uphill).flatten(1).sum(1) / victim.d.norm()
    assert (along[~falls] > 0.9999 * threat.eps).all()


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_targeted_attack_fools_a_linear_model_exactly_where_that_can_be_done(norm, classes):
    victim = RankOneVictim(classes, scale=0.1)
    x = 0.3 + 0.4 * images(90)
    y = victim(x).argmax(1)
    known = (y == 0) | (y == classes - 1)
    x, y = x[known], y[known]
    uphill = victim.uphill(y)
    # Where the most can be done along the one direction that counts; every class but the label wins by it.
    reach = uphill.sign() if norm == "linf" else uphill / victim.d.norm()
    need = torch.tensor(
        [
            next(eps for eps in np.geomspace(1e-4, 50, 400) if victim((x + eps * reach)[i : i + 1]).argmax(1) != y[i])
            for i in range(len(x))
        ]
    )
    need = need.sort().values
    middle = len(need) // 4
    threat = ThreatModel(norm=norm, eps=float((need[middle] * need[middle + 1]).sqrt()))
    assert threat.eps < 0.3 or norm == "l2"
    best = (x + threat.eps * reach).clamp(0, 1)
    falls = victim(best).argmax(1) != y
    assert 0 < falls.sum() < len(x)
    found = load_attack("apgd_t")(victim, x, y, threat, Stream.of("t", ids=torch.arange(len(x))))
    assert torch.equal(victim(found).argmax(1) != y, falls)
    assert torch.equal(found[~falls], x[~falls])


def test_targets_are_the_wrong_classes_by_their_natural_logits():
    logits = torch.tensor([[5.0, 1.0, 3.0, 4.0], [0.0, 9.0, 2.0, 1.0], [1.0, 7.0, 7.0, 0.0]])
    y = torch.tensor([0, 2, 1])
    ranks = [target_of_rank(lambda _: logits, torch.zeros(3, 1, 1, 2), y, rank).tolist() for rank in range(3)]
    assert ranks == [[3, 1, 2], [2, 3, 0], [1, 0, 3]]


def test_the_targeted_attack_has_a_round_for_each_of_nine_targets_or_of_all_there_are():
    attack = load_attack("apgd_t")
    for classes, rounds in ((2, 1), (3, 2), (10, 9), (100, 9)):
        assert [part.index for part in attack.rounds(classes)] == list(range(rounds))
    assert [part.index for part in dataclasses.replace(attack, targets=3).rounds(100)] == [0, 1, 2]


def test_each_round_of_the_targeted_attack_goes_to_a_target_of_its_own(monkeypatch):
    module = importlib.import_module("crdnd.attacks._apgd")
    aims, whole = [], module.dlr_targeted

    def watched(logits, y, target):
        aims.append(target.clone())
        return whole(logits, y, target)

    monkeypatch.setattr(module, "dlr_targeted", watched)
    model, x = Unshakable(), images()
    attack = dataclasses.replace(load_attack("apgd_t"), iterations=1)
    attack(model, x, model.labels(), LINF, Stream.of("t", ids=IDS))
    order = model.net(x)[:, 1:].argsort(1, descending=True) + 1
    assert [aim.tolist() for aim in aims] == [order[:, rank // 2].tolist() for rank in range(8)]


def test_restarts_begin_elsewhere_and_only_where_the_model_still_stands():
    model, x = Recorder(wavering()), images()
    y, threat = model.model(x).argmax(1), ThreatModel(eps=0.02)
    attack = dataclasses.replace(load_attack("apgd_ce"), iterations=4, restarts=2)
    stream = Stream.of("t", ids=IDS)
    found = attack(model, x, y, threat, stream)
    stands = model.model(found).argmax(1) == y
    assert 0 < stands.sum() < BATCH
    starts = [threat.start(x, "surface", stream.child("apgd_ce", restart)) for restart in (0, 1)]
    assert not torch.equal(*starts)
    assert torch.equal(model.inputs[1], starts[0])
    assert any(z.shape == x[stands].shape and torch.equal(z, starts[1][stands]) for z in model.inputs)


def test_a_model_without_gradients_is_no_reason_to_fail():
    def model(z):
        return TinyNet()(z.detach())

    x = images()
    y = model(x).argmax(1)
    leaf = x.clone().requires_grad_(True)
    assert torch.equal(input_gradient(model(leaf).sum(), leaf), torch.zeros_like(x))
    assert torch.equal(input_gradient(torch.zeros(2).sum(), leaf), torch.zeros_like(x))
    for threat in (LINF, L2):
        found = auto_pgd(model, lambda z, y, _: margin(z, y), x, y, y, threat, Stream.of("t", ids=IDS), iterations=5)
        assert threat.allows(found, x).all()


def test_a_notice_says_which_loss_stood_in_for_the_ratio():
    assert load_attack("apgd_ce").notes(2) == []
    assert "the margin was used" in load_attack("apgd_dlr").notes(2)[0]
    assert load_attack("apgd_dlr").notes(3) == []
    assert "z_t - z_y was used" in load_attack("apgd_t").notes(2)[0]
    assert "z_(1) - z_(3)" in load_attack("apgd_t").notes(3)[0]
    assert load_attack("apgd_t").notes(4) == []
