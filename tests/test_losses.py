import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from crdnd.losses import cross_entropy, dlr, dlr_targeted, kl, margin
from support import BATCH, CLASSES, generator

LABELS, TARGETS = torch.tensor([0, 1, 4, 2, 3, 0]), torch.tensor([3, 0, 2, 4, 1, 1])
SOFT = 0.7 * F.one_hot(LABELS, CLASSES).double() + 0.3 * F.one_hot(TARGETS, CLASSES).double()


def logits(seed, scale=3.0, batch=BATCH, classes=CLASSES):
    return scale * torch.randn(batch, classes, generator=generator(seed), dtype=torch.float64)


def test_kl_of_two_known_coins():
    # KL((1/2, 1/2) || (3/4, 1/4)) = 1/2 log(2/3) + 1/2 log 2 = 1/2 log(4/3), and the other way round
    # KL((3/4, 1/4) || (1/2, 1/2)) = 3/4 log(3/2) + 1/4 log(1/2) = 3/4 log 3 - log 2.
    fair, biased = torch.tensor([0.0, 0.0]), torch.tensor([math.log(3.0), 0.0])
    target, student = torch.stack([fair, biased, fair]), torch.stack([biased, fair, fair])
    expected = torch.tensor([0.5 * math.log(4 / 3), 0.75 * math.log(3) - math.log(2), 0.0])
    torch.testing.assert_close(kl(target, student), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("classes", [2, 10, 100])  # a mean over the classes passes for none of them
def test_kl_from_a_certain_teacher_to_a_uniform_student_is_log_k(classes):
    certain = torch.zeros(3, classes, dtype=torch.float64)
    certain[:, 1] = 1000.0
    uniform = torch.full((3, classes), 7.0, dtype=torch.float64)
    torch.testing.assert_close(kl(certain, uniform), torch.full((3,), math.log(classes), dtype=torch.float64))


def test_the_temperature_of_kl_divides_both_logits():
    # Logits (2 log 3, 0) at temperature 2 are the coin (3/4, 1/4).
    fair, biased = torch.zeros(3, 2), torch.tensor([[2 * math.log(3.0), 0.0]]).expand(3, 2)
    torch.testing.assert_close(kl(fair, biased, 2.0), torch.full((3,), 0.5 * math.log(4 / 3)))
    torch.testing.assert_close(kl(biased, fair, 2.0), torch.full((3,), 0.75 * math.log(3) - math.log(2)))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 30), tau=st.floats(0.3, 30))
def test_kl_is_the_sum_over_classes_of_p_log_p_over_q(seed, scale, tau):
    target, student = logits(seed, scale), logits(seed + 1, scale)
    values = kl(target, student, tau)
    assert values.shape == (BATCH,)
    for i in range(BATCH):
        p = [math.exp(z / tau) for z in target[i].tolist()]
        q = [math.exp(z / tau) for z in student[i].tolist()]
        p, q = [a / math.fsum(p) for a in p], [b / math.fsum(q) for b in q]
        expected = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
        assert values[i].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(kl(target, target, tau), torch.zeros(BATCH, dtype=torch.float64))
    torch.testing.assert_close(kl(target + 5, student - 3, tau), values, rtol=1e-9, atol=1e-12)


def test_cross_entropy_of_known_logits():
    # softmax(log 1, log 2, log 5) = (1/8, 2/8, 5/8)
    z = torch.tensor([1.0, 2.0, 5.0]).log().expand(4, 3)
    expected = torch.tensor([math.log(8), math.log(4), math.log(8 / 5), math.log(4)])
    torch.testing.assert_close(cross_entropy(z, torch.tensor([0, 1, 2, 1])), expected)


def test_cross_entropy_with_soft_labels_of_known_logits():
    # softmax(log 1, log 2, log 5) = (1/8, 2/8, 5/8)
    z = torch.tensor([1.0, 2.0, 5.0]).log().expand(4, 3)
    soft = torch.tensor([[0.5, 0.0, 0.5], [0.75, 0.25, 0.0], [0.0, 0.0, 1.0], [0.2, 0.3, 0.5]])
    one, two, five = math.log(8), math.log(4), math.log(8 / 5)
    expected = [(one + five) / 2, 0.75 * one + 0.25 * two, five, 0.2 * one + 0.3 * two + 0.5 * five]
    torch.testing.assert_close(cross_entropy(z, soft), torch.tensor(expected))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.5, 1))
def test_cross_entropy_with_a_mixed_label_is_the_mixture_of_both(seed, share):
    z = logits(seed)
    own, other = (F.one_hot(y, CLASSES).double() for y in (LABELS, TARGETS))
    expected = share * cross_entropy(z, LABELS) + (1 - share) * cross_entropy(z, TARGETS)
    torch.testing.assert_close(cross_entropy(z, share * own + (1 - share) * other), expected)
    torch.testing.assert_close(cross_entropy(z, own), cross_entropy(z, LABELS))


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_cross_entropy_of_equal_logits_is_log_k(classes):
    value = cross_entropy(torch.full((3, classes), -4.0), torch.tensor([0, 1, classes - 1]))
    torch.testing.assert_close(value, torch.full((3,), math.log(classes)))


def test_margin_is_the_best_rival_minus_the_true_class():
    z = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [-1.0, -1.0, -5.0]])
    y = torch.tensor([0, 1, 2, 0])
    #         2 - 3, 3 - 1, 3 - 2, -1 - -1
    assert margin(z, y).tolist() == [-1.0, 2.0, 1.0, 0.0]


def test_margin_of_two_classes_is_a_difference_whatever_its_sign():
    z = torch.tensor([[-7.0, -9.0], [-7.0, -9.0], [100.0, 0.0]])
    assert margin(z, torch.tensor([0, 1, 1])).tolist() == [-2.0, 2.0, 100.0], "not capped, not clipped at 0"


def test_the_gradient_of_the_margin_is_one_for_the_rival_and_minus_one_for_the_true_class():
    z = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(margin(z, torch.tensor([0, 1])).sum(), z)
    assert gradient.tolist() == [[-1.0, 0.0, 1.0], [1.0, -1.0, 0.0]]


def test_dlr_of_known_logits():
    #                  z_(1) - z_(3) = 5 - 1 = 4, whatever the label
    z = torch.tensor([[5.0, 3.0, 1.0, 0.0]]).expand(4, 4)
    expected = torch.tensor([(3 - 5) / 4, (5 - 3) / 4, (5 - 1) / 4, (5 - 0) / 4])
    torch.testing.assert_close(dlr(z, torch.tensor([0, 1, 2, 3])), expected)
    unsorted = torch.tensor([[-9.0, 1.0, 5.0, 0.0, 3.0], [3.0, -9.0, 0.0, 5.0, 1.0]])
    torch.testing.assert_close(dlr(unsorted, torch.tensor([2, 0])), torch.tensor([-0.5, 0.5]))


def test_dlr_of_three_classes_is_its_formula_and_of_two_the_margin():
    z = torch.tensor([[2.0, 1.0, -2.0], [2.0, 1.0, -2.0]])
    torch.testing.assert_close(dlr(z, torch.tensor([0, 2])), torch.tensor([-1 / 4, 1.0]))
    two = torch.tensor([[2.0, 7.0], [2.0, 7.0], [0.5, 0.5]])
    assert dlr(two, torch.tensor([0, 1, 1])).tolist() == [5.0, -5.0, 0.0]


def test_targeted_dlr_of_known_logits():
    #            z_(1) - (z_(3) + z_(4)) / 2 = 5 - (1 + 0) / 2 = 4.5, and the fifth logit counts for nothing
    z = torch.tensor([[5.0, 3.0, 1.0, 0.0, -9.0]]).expand(5, 5)
    y, target = torch.tensor([0, 0, 1, 3, 0]), torch.tensor([1, 3, 0, 2, 4])
    expected = torch.tensor([-2.0, -5.0, 2.0, 1.0, -14.0]) / 4.5
    torch.testing.assert_close(dlr_targeted(z, y, target), expected)
    order = [3, 0, 4, 2, 1]
    place = torch.tensor(order).argsort()
    torch.testing.assert_close(dlr_targeted(z[:, order], place[y], place[target]), expected)


def test_targeted_dlr_of_three_and_of_two_classes():
    z = torch.tensor([[2.0, 1.0, -2.0], [2.0, 1.0, -2.0]])  # z_(1) - z_(3) = 4
    found = dlr_targeted(z, torch.tensor([0, 1]), torch.tensor([1, 2]))
    torch.testing.assert_close(found, torch.tensor([-1 / 4, -3 / 4]))
    two = torch.tensor([[2.0, 7.0], [2.0, 7.0], [0.5, 0.5]])
    assert dlr_targeted(two, torch.tensor([0, 1, 1]), torch.tensor([1, 0, 0])).tolist() == [5.0, -5.0, 0.0]


@given(
    seed=st.integers(0, 10**6),
    classes=st.sampled_from([3, 4, 5, 10, 100]),
    shift=st.floats(-100, 100),
    scale=st.floats(1e-3, 1e3),
)
def test_the_difference_of_logits_ratio_is_blind_to_shift_and_scale(seed, classes, shift, scale):
    z = logits(seed, classes=classes)
    y = torch.randint(0, classes, (BATCH,), generator=generator(seed + 1))
    target = (y + 1 + torch.randint(0, classes - 1, (BATCH,), generator=generator(seed + 2))) % classes
    torch.testing.assert_close(dlr(scale * z + shift, y), dlr(z, y), rtol=1e-6, atol=1e-9)
    changed = dlr_targeted(scale * z + shift, y, target)
    torch.testing.assert_close(changed, dlr_targeted(z, y, target), rtol=1e-6, atol=1e-9)


@given(seed=st.integers(0, 10**6), classes=st.sampled_from([2, 3, 4, 10]), scale=st.floats(1e-3, 1e3))
def test_the_difference_of_logits_ratio_is_positive_where_the_margin_is(seed, classes, scale):
    z = logits(seed, scale, classes=classes)
    y = torch.randint(0, classes, (BATCH,), generator=generator(seed + 1))
    value = dlr(z, y)
    assert torch.equal(value.sign(), margin(z, y).sign())
    if classes > 2:
        assert (value[value < 0] >= -1 - 1e-9).all(), "z_(2) - z_(1) is no larger than z_(3) - z_(1)"
    second = z.scatter(1, y[:, None], -torch.inf).argmax(1)
    assert torch.equal(dlr_targeted(z, y, second).sign(), value.sign())


def test_gradients_agree_with_finite_differences():
    target, student = logits(1).requires_grad_(True), logits(2).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, LABELS), student)
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, SOFT), student)
    assert torch.autograd.gradcheck(lambda z: margin(z, LABELS), student)
    assert torch.autograd.gradcheck(lambda z: dlr(z, LABELS), student)
    assert torch.autograd.gradcheck(lambda z: dlr_targeted(z, LABELS, TARGETS), student)
    assert torch.autograd.gradcheck(kl, (target, student))
    assert torch.autograd.gradcheck(lambda a, b: kl(a, b, 4.0), (target, student))


LOSSES = {
    "cross_entropy": lambda z: cross_entropy(z, LABELS),
    "cross_entropy with soft labels": lambda z: cross_entropy(z, SOFT.to(z.dtype)),
    "margin": lambda z: margin(z, LABELS),
    "dlr": lambda z: dlr(z, LABELS),
    "dlr_targeted": lambda z: dlr_targeted(z, LABELS, TARGETS),
    "kl to a target": lambda z: kl(logits(0).to(z), z),
    "kl from a target": lambda z: kl(z, logits(0).to(z)),
    "kl at tau 30": lambda z: kl(z.flip(1), z, 30.0),
    "kl between extremes": lambda z: kl(z.flip(1), z),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_finite_at_extreme_and_at_equal_logits(name, dtype):
    extreme = 1e4 * torch.sign(logits(5)).to(dtype)
    equal = torch.full((BATCH, CLASSES), 1e4, dtype=dtype)
    for z in (extreme, -extreme, equal, torch.zeros_like(equal)):
        z = z.clone().requires_grad_(True)
        values = LOSSES[name](z)
        assert values.shape == (BATCH,)
        (gradient,) = torch.autograd.grad(values.sum(), z)
        assert torch.isfinite(values).all()
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["cross_entropy", "cross_entropy with soft labels", "margin", "dlr", "dlr_targeted"])
def test_a_loss_is_one_value_for_each_sample_alone(name):
    z = logits(7)
    whole = LOSSES[name](z)
    changed = z.clone()
    changed[3] += torch.arange(CLASSES)
    others = [0, 1, 2, 4, 5]
    assert torch.equal(LOSSES[name](changed)[others], whole[others])
    assert LOSSES[name](changed)[3] != whole[3]
