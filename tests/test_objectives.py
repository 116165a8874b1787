import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from crdnd.config import build
from crdnd.errors import InputError
from crdnd.objectives import (
    INNER_LOSSES,
    LossTerms,
    Objective,
    TrainingAttack,
    Views,
    attack_needs,
    load_objective,
    needs_teacher,
)
from crdnd.objectives.crdnd import compensate, contrast
from support import BATCH, CLASSES, generator, random_views

# Predictions worked out by hand. FAIR is the coin (1/2, 1/2), BIASED (3/4, 1/4), SURE (9/10, 1/10).
FAIR, BIASED, SURE = (0.0, 0.0), (math.log(3), 0.0), (math.log(9), 0.0)
KL_FAIR_BIASED = 0.5 * math.log(4 / 3)  # 1/2 log(2/3) + 1/2 log 2
KL_BIASED_FAIR = 0.75 * math.log(3) - math.log(2)  # 3/4 log(3/2) + 1/4 log(1/2)
KL_SURE_FAIR = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
KL_FAIR_SURE = 0.5 * math.log(5 / 9) + 0.5 * math.log(5)
KL_SURE_BIASED = 0.9 * math.log(0.9 / 0.75) + 0.1 * math.log(0.1 / 0.25)
KL_BIASED_SURE = 0.75 * math.log(0.75 / 0.9) + 0.25 * math.log(0.25 / 0.1)


def coins(**rows):
    """Views of three samples with two classes from pairs of logits; `y` are the labels."""
    y = torch.tensor(rows.pop("y"))
    progress = rows.pop("progress", 0.0)
    views = {
        name: torch.tensor(values, dtype=torch.float64).requires_grad_(name.startswith("s_"))
        for name, values in rows.items()
    }
    return Views(y, progress, views=views)


def values(terms, name):
    return terms.terms[name].tolist()


def close(expected):
    return pytest.approx(expected, rel=1e-12, abs=1e-15)


def make(name, classes=2, **settings):
    return load_objective(name)(classes, **settings)


# --- what all methods share -------------------------------------------------------------------------------------------


def test_the_total_is_the_mean_over_samples_of_the_sum_of_the_terms():
    terms = LossTerms(a=torch.tensor([1.0, 2.0, 3.0]), b=torch.tensor([10.0, 20.0, 60.0]))
    assert terms.per_sample.tolist() == [11.0, 22.0, 63.0]
    assert terms.total.item() == 32.0
    scaled = terms.scaled(0.5)
    assert values(scaled, "a") == [0.5, 1.0, 1.5]
    assert scaled.total.item() == 16.0


def test_a_view_that_was_not_asked_for_is_an_error_that_says_what_to_do():
    v = Views(torch.tensor([0, 1]), views={"s_nat": torch.zeros(2, 3)})
    assert v["s_nat"].shape == (2, 3)
    with pytest.raises(KeyError, match=r"view 't_adv' was not computed; list it in `needs`"):
        v["t_adv"]


def test_the_target_is_the_label_unless_the_images_are_mixed():
    y, soft = torch.tensor([0, 1]), torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.6, 0.4]])
    assert Views(y, views={}).target is y
    mixed = Views(y, views={}, target=soft)
    assert mixed.target is soft
    assert mixed.y is y


@pytest.mark.parametrize(
    ("name", "settings", "term", "weight"),
    [("natural", {}, "ce_nat", 1), ("pgd_at", {}, "ce_adv", 1), ("trades", {}, "ce_nat", 1),
     ("ard", {"alpha": 0.25}, "ce_nat", 0.75)],
)  # fmt: skip
def test_cross_entropy_is_taken_with_the_soft_labels_of_mixed_images(name, settings, term, weight):
    objective = make(name, CLASSES, **settings)
    v = random_views(objective.needs)
    soft = 0.6 * F.one_hot(v.y, CLASSES).double() + 0.4 * F.one_hot(v.y.roll(1), CLASSES).double()
    mixed = Views(v.y, views=v._views, target=soft)
    logits = v["s_adv" if term == "ce_adv" else "s_nat"]
    torch.testing.assert_close(objective(mixed).terms[term], -weight * (soft * logits.log_softmax(1)).sum(1))
    inner = INNER_LOSSES["ce"].loss(Views(v.y, views={"s_adv": logits}, target=soft))
    torch.testing.assert_close(weight * inner, objective(mixed).terms[term])


def test_the_plain_objective_leaves_the_terms_to_its_methods():
    with pytest.raises(NotImplementedError):
        Objective(3)(Views(torch.tensor([0, 1]), views={}))


# (loss, start, batch-norm mode) of the training attack: TRADES, RSLAD and CRDND attack a divergence from x + 0.001 N(0,
# 1) in eval mode, the others the labels from a uniform start in train mode. All take 10 steps of eps/4.
ATTACKS = {
    "pgd_at": ("ce", "uniform", "train"),
    "trades": ("trades", "gaussian", "eval"),
    "ard": ("ce", "uniform", "train"),
    "iad": ("ce", "uniform", "train"),
    "rslad": ("kl_teacher", "gaussian", "eval"),
    "crdnd": ("kl_teacher", "gaussian", "eval"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_method_trains_against_the_attack_of_its_paper(name):
    attack = load_objective(name).attack
    assert attack is not None
    assert (attack.loss, attack.start, attack.mode) == ATTACKS[name]
    assert (attack.steps, attack.step) == (10, 0.25)


def test_natural_training_has_no_attack():
    assert load_objective("natural").attack is None


def test_views_of_an_attack_and_of_a_method_decide_whether_a_teacher_is_needed():
    assert attack_needs(None) == frozenset()
    assert attack_needs(TrainingAttack(loss="ce")) == {"s_adv"}
    assert attack_needs(TrainingAttack(loss="margin")) == {"s_adv"}
    assert attack_needs(TrainingAttack(loss="kl_teacher")) == {"s_adv", "t_nat"}
    assert attack_needs(TrainingAttack(loss="trades")) == {"s_adv", "s_nat"}
    alone = {"natural": False, "pgd_at": False, "trades": False, "ard": True, "iad": True, "rslad": True, "crdnd": True}
    for name, expected in alone.items():
        method = load_objective(name)
        assert needs_teacher(method, method.attack) is expected
        assert needs_teacher(method(3), method.attack) is expected
    # A method without a teacher needs one when its attack looks at it.
    assert needs_teacher(load_objective("pgd_at"), TrainingAttack(loss="kl_teacher"))


def test_inner_losses_are_those_of_the_papers():
    same = [SURE, FAIR, SURE]
    v = coins(
        y=[0, 1, 1], s_nat=[FAIR, SURE, SURE], s_adv=[BIASED, BIASED, SURE], t_nat=same, t_adv=same, t_linear=same
    )
    found = {name: inner.loss(v).tolist() for name, inner in INNER_LOSSES.items()}
    # CE(S(x'), y): -log 3/4, -log 1/4, -log 1/10. Margin: the other logit minus the true one.
    assert found["ce"] == close([math.log(4 / 3), math.log(4), math.log(10)])
    assert found["margin"] == close([-math.log(3), math.log(3), math.log(9)])
    # KL(T(x) || S(x')) and KL(S(x) || S(x')): the prediction on x comes first.
    for name in ("kl_teacher", "adaad", "linear_teacher"):
        assert found[name] == close([KL_SURE_BIASED, KL_FAIR_BIASED, 0.0])
    assert found["trades"] == close([KL_FAIR_BIASED, KL_SURE_BIASED, 0.0])


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"steps": 0}, "steps: .*greater than or equal to 1, got 0"),
        ({"step": 0.0}, "step: .*greater than 0, got 0.0"),
        ({"loss": "kl"}, "loss: .*got 'kl'"),
        ({"start": "random"}, "start: .*got 'random'"),
        ({"mode": "evaluation"}, "mode: .*got 'evaluation'"),
        ({"loos": "ce"}, "loos: no such setting; did you mean 'loss'"),
    ],
)
def test_an_impossible_training_attack_is_refused(choices, message):
    with pytest.raises(InputError, match=message):
        build(TrainingAttack, choices)


# --- natural, PGD-AT --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "view", "term"), [("natural", "s_nat", "ce_nat"), ("pgd_at", "s_adv", "ce_adv")])
def test_plain_training_is_cross_entropy_on_its_own_view(name, view, term):
    terms = make(name)(coins(y=[0, 1, 1], **{view: [BIASED, BIASED, FAIR]}))
    assert list(terms.terms) == [term]
    assert values(terms, term) == close([math.log(4 / 3), math.log(4), math.log(2)])
    assert terms.total.item() == close(math.log(4 / 3 * 4 * 2) / 3)


# --- TRADES -----------------------------------------------------------------------------------------------------------


def test_trades_is_natural_cross_entropy_plus_six_times_the_divergence():
    v = coins(y=[0, 1, 0], s_nat=[FAIR, BIASED, SURE], s_adv=[BIASED, FAIR, SURE])
    terms = make("trades")(v)
    assert values(terms, "ce_nat") == close([math.log(2), math.log(4), math.log(10 / 9)])
    assert values(terms, "kl_adv") == close([6 * KL_FAIR_BIASED, 6 * KL_BIASED_FAIR, 0.0])
    assert values(make("trades", beta=1.5)(v), "kl_adv") == close([1.5 * KL_FAIR_BIASED, 1.5 * KL_BIASED_FAIR, 0.0])
    assert values(make("trades", beta=1.5)(v), "ce_nat") == values(terms, "ce_nat")


def test_trades_sends_gradients_through_both_arguments_of_its_divergence():
    v = random_views(("s_nat", "s_adv"))
    beta = 6.0
    make("trades", CLASSES)(v).total.backward()
    p, q = F.softmax(v["s_nat"].detach(), 1), F.softmax(v["s_adv"].detach(), 1)
    log_ratio = p.log() - q.log()
    divergence = (p * log_ratio).sum(1, keepdim=True)
    # d KL(p || q) / d s_nat = p (log p - log q - KL); it is 0 where s_nat is detached. d CE / d s_nat = p - onehot(y).
    natural = p - F.one_hot(v.y, CLASSES) + beta * p * (log_ratio - divergence)
    torch.testing.assert_close(v["s_nat"].grad, natural / BATCH, rtol=0, atol=1e-12)
    # d KL(p || q) / d s_adv = q - p.
    torch.testing.assert_close(v["s_adv"].grad, beta * (q - p) / BATCH, rtol=0, atol=1e-12)
    assert (beta * p * (log_ratio - divergence)).abs().max() > 0.1


# --- ARD --------------------------------------------------------------------------------------------------------------


def tempered(pair, tau):
    """Logits that are the given coin at temperature tau."""
    return tuple(tau * z for z in pair)


def test_ard_is_tau_squared_times_the_divergence_at_tau():
    tau = 30.0
    rows = {
        "y": [0, 1, 1],
        "s_nat": [FAIR, FAIR, FAIR],
        "t_nat": [tempered(FAIR, tau), tempered(BIASED, tau), tempered(SURE, tau)],
        "s_adv": [tempered(BIASED, tau), tempered(FAIR, tau), tempered(SURE, tau)],
    }
    terms = make("ard")(coins(**rows))  # the paper's alpha 1 and tau 30
    assert values(terms, "ce_nat") == [0.0, 0.0, 0.0]
    assert values(terms, "kl_adv") == pytest.approx([900 * KL_FAIR_BIASED, 900 * KL_BIASED_FAIR, 0], rel=1e-9, abs=1e-9)


def test_ard_mixes_labels_and_teacher_by_alpha():
    tau, alpha = 2.0, 0.25
    v = coins(
        y=[0, 1, 1],
        s_nat=[BIASED, BIASED, FAIR],
        t_nat=[tempered(FAIR, tau), tempered(SURE, tau), tempered(BIASED, tau)],
        s_adv=[tempered(BIASED, tau), tempered(FAIR, tau), tempered(SURE, tau)],
    )
    terms = make("ard", alpha=alpha, tau=tau)(v)
    # The labels see the natural prediction at temperature 1.
    assert values(terms, "ce_nat") == close([0.75 * math.log(4 / 3), 0.75 * math.log(4), 0.75 * math.log(2)])
    assert values(terms, "kl_adv") == close([KL_FAIR_BIASED, KL_SURE_FAIR, KL_BIASED_SURE])  # alpha tau^2 = 1
    labels_only = make("ard", alpha=0, tau=tau)(v)
    assert values(labels_only, "kl_adv") == [0.0, 0.0, 0.0]
    assert values(labels_only, "ce_nat") == close([math.log(4 / 3), math.log(4), math.log(2)])


# --- IAD --------------------------------------------------------------------------------------------------------------

IAD_ROWS = {
    "y": [0, 1, 1],
    "t_nat": [FAIR, SURE, SURE],
    "t_adv": [SURE, SURE, BIASED],  # true-class probabilities 9/10, 1/10, 1/4
    "s_nat": [SURE, FAIR, FAIR],
    "s_adv": [BIASED, BIASED, FAIR],
}
IAD_TEACHER = [KL_FAIR_BIASED, KL_SURE_BIASED, KL_SURE_FAIR]
IAD_SELF = [KL_SURE_BIASED, KL_FAIR_BIASED, 0.0]
IAD_TRUE_CLASS = [0.9, 0.1, 0.25]


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_iad_trusts_the_teacher_by_its_true_class_probability_under_attack(beta):
    v = coins(**IAD_ROWS, progress=0.5)
    trust = [p**beta for p in IAD_TRUE_CLASS]
    own = [(1 - w) * d for w, d in zip(trust, IAD_SELF, strict=True)]
    paper = make("iad", beta=beta)(v)
    assert values(paper, "kl_teacher") == close([w * d for w, d in zip(trust, IAD_TEACHER, strict=True)])
    assert values(paper, "kl_self") == close(own)
    code = make("iad", beta=beta, form="code")(v)
    assert values(code, "kl_teacher") == close(IAD_TEACHER)
    assert values(code, "kl_self") == close(own)


def test_iads_defaults_are_those_of_its_paper():
    settings = make("iad").settings
    assert (settings.beta, settings.warmup, settings.form) == (0.1, 60 / 200, "paper")


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize(("progress", "warm"), [(0.0, True), (59 / 200, True), (60 / 200, False), (0.99, False)])
def test_iad_trusts_the_teacher_alone_before_epoch_60_of_200(form, progress, warm):
    terms = make("iad", form=form)(coins(**IAD_ROWS, progress=progress))
    if warm:
        assert values(terms, "kl_teacher") == close(IAD_TEACHER)
        assert values(terms, "kl_self") == [0.0, 0.0, 0.0]
    else:
        assert values(terms, "kl_self") == close(
            [(1 - p**0.1) * d for p, d in zip(IAD_TRUE_CLASS, IAD_SELF, strict=True)]
        )


def test_iads_warm_up_can_be_switched_off():
    terms = make("iad", warmup=0)(coins(**IAD_ROWS, progress=0.0))
    assert values(terms, "kl_self")[0] == close((1 - 0.9**0.1) * KL_SURE_BIASED)


def test_iad_does_not_detach_the_natural_prediction():
    v = random_views(("s_nat", "s_adv", "t_nat", "t_adv"), progress=0.5)
    make("iad", CLASSES, beta=1.0)(v).total.backward()
    p, q = F.softmax(v["s_nat"].detach(), 1), F.softmax(v["s_adv"].detach(), 1)
    log_ratio = p.log() - q.log()
    distrust = 1 - F.softmax(v["t_adv"], 1)[torch.arange(BATCH), v.y][:, None]
    expected = distrust * p * (log_ratio - (p * log_ratio).sum(1, keepdim=True)) / BATCH
    torch.testing.assert_close(v["s_nat"].grad, expected, rtol=0, atol=1e-12)


# --- RSLAD ------------------------------------------------------------------------------------------------------------


def test_rslad_weighs_adversarial_and_natural_divergence_five_to_one():
    v = coins(y=[0, 0, 1], t_nat=[FAIR, BIASED, SURE], s_nat=[BIASED, FAIR, BIASED], s_adv=[SURE, SURE, FAIR])
    natural = [KL_FAIR_BIASED, KL_BIASED_FAIR, KL_SURE_BIASED]
    adversarial = [KL_FAIR_SURE, KL_BIASED_SURE, KL_SURE_FAIR]
    terms = make("rslad")(v)
    assert values(terms, "kl_nat") == close([d / 6 for d in natural])
    assert values(terms, "kl_adv") == close([5 * d / 6 for d in adversarial])
    terms = make("rslad", alpha=0.9)(v)
    assert values(terms, "kl_nat") == close([0.1 * d for d in natural])
    assert values(terms, "kl_adv") == close([0.9 * d for d in adversarial])


@pytest.mark.parametrize("name", ["rslad", "crdnd"])
def test_no_label_enters_the_loss(name):
    v = random_views(load_objective(name).needs)
    other = Views((v.y + 1) % CLASSES, views=v._views)
    assert torch.equal(make(name, CLASSES)(v).total, make(name, CLASSES)(other).total)


# --- CRDND: compensation ----------------------------------------------------------------------------------------------


def matrix(accuracies):
    """M of equation (2): a_i at (i, i), and (1 - a_i) / (k - 1) in the rest of COLUMN i."""
    k = len(accuracies)
    return torch.tensor(
        [[accuracies[c] if r == c else (1 - accuracies[c]) / (k - 1) for c in range(k)] for r in range(k)],
        dtype=torch.float64,
    )


def cosine(a, b):
    """By the definition, in plain numbers."""
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))


def test_compensation_is_the_matrix_of_the_paper_for_three_classes():
    # a = (0.9, 0.5, 0.7): column 1 is (0.9, 0.05, 0.05), column 2 (0.25, 0.5, 0.25), column 3 (0.15, 0.15, 0.7).
    m = torch.tensor([[0.9, 0.25, 0.15], [0.05, 0.5, 0.15], [0.05, 0.25, 0.7]], dtype=torch.float64)
    accuracies = torch.tensor([0.9, 0.5, 0.7], dtype=torch.float64)
    torch.testing.assert_close(matrix([0.9, 0.5, 0.7]), m)
    unit = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(compensate(unit, accuracies), m.T, rtol=0, atol=1e-15)  # row i holds M e_i
    torch.testing.assert_close(compensate(unit, accuracies).sum(1), torch.ones(3, dtype=torch.float64))
    v = torch.randn(4, 3, generator=generator(1), dtype=torch.float64)
    expected = torch.stack([m @ row for row in v])
    torch.testing.assert_close(compensate(v, accuracies), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_compensation_is_the_matrix_for_any_number_of_classes(classes):
    accuracies = torch.rand(classes, generator=generator(classes), dtype=torch.float64)
    v = torch.randn(4, classes, generator=generator(2), dtype=torch.float64)
    expected = v @ matrix(accuracies.tolist()).T
    torch.testing.assert_close(compensate(v, accuracies), expected, rtol=0, atol=1e-14)
    # Columns sum to 1, so the sum of a prediction is kept, and probabilities stay probabilities.
    torch.testing.assert_close(compensate(v, accuracies).sum(1), v.sum(1), rtol=0, atol=1e-13)


def test_a_perfect_teacher_compensates_nothing():
    v = torch.randn(4, 3, generator=generator(1), dtype=torch.float64)
    torch.testing.assert_close(compensate(v, torch.ones(3, dtype=torch.float64)), v, rtol=0, atol=0)


def test_one_accuracy_for_all_classes_leaves_the_cosines_of_centred_logits_alone():
    k, a = 5, 0.3  # a > 1/k
    v = torch.randn(4, k, generator=generator(3), dtype=torch.float64)
    t = torch.randn(4, k, generator=generator(4), dtype=torch.float64)
    accuracies = torch.full((k,), a, dtype=torch.float64)
    centred, centred_t = v - v.mean(1, keepdim=True), t - t.mean(1, keepdim=True)

    def cosines(rows, targets):
        return torch.tensor([cosine(r.tolist(), s.tolist()) for r in rows for s in targets], dtype=torch.float64)

    # M v = (k a - 1) / (k - 1) v + (1 - a) / (k - 1) (sum v) 1: a rescaling where the sum is 0.
    torch.testing.assert_close(
        cosines(compensate(centred, accuracies), centred_t), cosines(centred, centred_t), rtol=0, atol=1e-12
    )
    changed = cosines(compensate(v, accuracies), t) - cosines(v, t)
    assert changed.abs().max() > 0.01


# --- CRDND: the relation, against plain loops -------------------------------------------------------------------------

SPACES = ("logits", "probabilities")
CHOICES = list(
    itertools.product(
        SPACES,
        (False, True),
        ("with_positive", "without_positive", "other_classes"),
        ("student_teacher", "natural_adversarial"),
        ("symmetric", "one_sided"),
    )
)


def embedding(logits, space, centre, m):
    """A prediction as a list: softmax or not, minus its mean or not, times M."""
    values_ = logits.tolist()
    if space == "probabilities":
        total = math.fsum(math.exp(z) for z in values_)
        values_ = [math.exp(z) / total for z in values_]
    if centre:
        mean = math.fsum(values_) / len(values_)
        values_ = [z - mean for z in values_]
    if m is not None:
        values_ = [math.fsum(m[r][c].item() * values_[c] for c in range(len(values_))) for r in range(len(values_))]
    return values_


def naive_relation(v, kind, matrices, *, space, centre, denominator, views, sides, tau):
    """L_nat or L_adv for each sample, by equations (4) to (7): loops over anchors and over the pool."""
    n = len(v.y)
    points = {
        who + other: [
            embedding(v[f"{who}_{other}"][i].detach(), space, centre, matrices[other] if who == "s" else None)
            for i in range(n)
        ]
        for who in "st"
        for other in ("nat", "adv")
    }
    result = []
    for i in range(n):
        losses = []
        anchor_sides = ("t",) if sides == "one_sided" else ("t", "s")
        for side in anchor_sides:
            anchor = points[side + kind][i]
            partner = "s" if side == "t" else "t"
            positive = (partner, kind, i)
            if views == "student_teacher":
                pool = [(who, kind, j) for who in "st" for j in range(n)]
                pool.remove((side, kind, i))  # all 2N predictions but the anchor itself
            else:
                pool = [(partner, other, j) for other in ("nat", "adv") for j in range(n)]
            if denominator == "without_positive":
                pool.remove(positive)
            if denominator == "other_classes":
                pool = [member for member in pool if member == positive or v.y[member[2]] != v.y[i]]
            score = {member: cosine(anchor, points[member[0] + member[1]][member[2]]) / tau for member in pool}
            on_top = cosine(anchor, points[partner + kind][i]) / tau
            losses.append(-math.log(math.exp(on_top) / math.fsum(math.exp(s) for s in score.values())))
        result.append(math.fsum(losses) / len(losses))
    return result


def counted(v, kind, classes):
    """(seen, right) of the teacher for each class, by a loop."""
    seen, right = [0] * classes, [0] * classes
    for logits, label in zip(v[f"t_{kind}"].tolist(), v.y.tolist(), strict=True):
        seen[label] += 1
        right[label] += max(range(classes), key=lambda j: logits[j]) == label
    return seen, right


def naive_accuracies(seen, right, acm):
    k = len(seen)
    if acm == "global":
        seen, right = [sum(seen)] * k, [sum(right)] * k
    accuracies = [r / s if s else 1.0 for s, r in zip(seen, right, strict=True)]
    return [max(a, 1 / k + 1e-3) for a in accuracies]


def crdnd_views(batch, classes, seed):
    """Views in which the teacher is right on about half of the natural images and on fewer adversarial ones."""
    v = random_views(load_objective("crdnd").needs, batch=batch, classes=classes, seed=seed, scale=1.0)
    places = torch.arange(batch)
    v["t_nat"][places[::2], v.y[::2]] += 4
    v["t_adv"][places[::4], v.y[::4]] += 4
    return v


ALL_ACM = list(itertools.product(("on", "off", "global"), ("previous_epoch", "running", "one")))


@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize(("space", "centre", "denominator", "views", "sides"), CHOICES)
def test_the_relation_is_its_formula_in_every_form(space, centre, denominator, views, sides, batch):
    classes, weight, tau = 4, 0.3, 0.7
    first, second = crdnd_views(30, classes, seed=1), crdnd_views(20, classes, seed=2)
    v = random_views(load_objective("crdnd").needs, batch=batch, classes=classes, seed=batch)
    form = {"space": space, "centre": centre, "denominator": denominator, "views": views, "sides": sides, "tau": tau}
    totals = []
    for acm, accuracy in ALL_ACM:
        objective = make("crdnd", classes, acm=acm, accuracy=accuracy, weight_nat=weight, **form)
        objective.observe(first)
        objective.end_epoch()
        objective.observe(second)
        source = {"previous_epoch": first, "running": second, "one": None}[accuracy]
        matrices = {"nat": None, "adv": None}
        if acm != "off":
            for kind in matrices:
                counts = counted(source, kind, classes) if source else ([0] * classes, [0] * classes)
                matrices[kind] = matrix(naive_accuracies(*counts, acm))
        terms = objective(v)
        for kind, share in (("nat", weight), ("adv", 1 - weight)):
            expected = [share * value for value in naive_relation(v, kind, matrices, **form)]
            assert values(terms, f"contrast_{kind}") == pytest.approx(expected, rel=1e-11, abs=1e-12), (acm, accuracy)
        totals.append(terms.total.item())
    # Compensation matters: off, one (which is the same), and the other four differ, except that one accuracy for all
    # classes cancels in the cosine when predictions are centred.
    totals.sort()
    distinct = 1 + sum(b - a > 1e-9 for a, b in itertools.pairwise(totals))
    assert distinct == (3 if centre else 5)


def test_crdnds_defaults_are_the_published_form():
    s = make("crdnd").settings
    assert (s.weight_nat, s.tau, s.space, s.centre) == (0.2, 0.5, "logits", False)
    assert (s.denominator, s.views, s.sides) == ("with_positive", "student_teacher", "symmetric")
    assert (s.acm, s.accuracy) == ("on", "previous_epoch")


def test_crdnd_by_default_is_nt_xent_over_both_networks_predictions():
    # The published form from a library's parts: rows u_1 .. u_N, v_1 .. v_N, cosine / tau, the diagonal struck out, the
    # cross-entropy with the partner's place as the class, the mean over 2N anchors; 0.2 on x and 0.8 on x'.
    v = random_views(load_objective("crdnd").needs)
    expected = torch.zeros((), dtype=torch.float64)
    for weight, kind in ((0.2, "nat"), (0.8, "adv")):
        rows = F.normalize(torch.cat([v[f"s_{kind}"], v[f"t_{kind}"]]), dim=1)
        scores = (rows @ rows.T / 0.5).fill_diagonal_(-math.inf)
        partner = (torch.arange(2 * BATCH) + BATCH) % (2 * BATCH)
        expected = expected + weight * F.cross_entropy(scores, partner)
    total = make("crdnd", CLASSES)(v).total
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)
    names = ("s_nat", "s_adv")
    ours = torch.autograd.grad(total, [v[name] for name in names])
    theirs = torch.autograd.grad(expected, [v[name] for name in names])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_equal_predictions_leave_the_logarithm_of_the_pools_size():
    # All cosines are 1: every member of the pool has the same share, 2N - 1 with the positive, 2N - 2 without it.
    same = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64).expand(BATCH, 3)
    v = Views(torch.zeros(BATCH, dtype=torch.int64), views=dict.fromkeys(load_objective("crdnd").needs, same))
    assert make("crdnd", 3)(v).total.item() == close(math.log(2 * BATCH - 1))
    assert make("crdnd", 3, denominator="without_positive")(v).total.item() == close(math.log(2 * BATCH - 2))
    # Anchored across networks the anchor is not in its pool of 2N: nothing but the positive can be left out.
    across = {"views": "natural_adversarial"}
    assert make("crdnd", 3, **across)(v).total.item() == close(math.log(2 * BATCH))
    without = make("crdnd", 3, **across, denominator="without_positive")(v)
    assert without.total.item() == close(math.log(2 * BATCH - 1))


def test_the_contrast_does_not_see_the_scale_of_the_logits():
    v = random_views(load_objective("crdnd").needs)
    bigger = Views(v.y, views={name: 1000 * v[name].detach() for name in load_objective("crdnd").needs})
    torch.testing.assert_close(make("crdnd", CLASSES)(v).total, make("crdnd", CLASSES)(bigger).total)


def test_contrast_is_minus_the_log_of_the_positives_share():
    similarity = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    own, positive = torch.tensor([0, 3]), torch.tensor([2, 0])
    e = math.e
    found = contrast(similarity, positive, own, with_positive=True).tolist()
    assert found == close([math.log((e**2 + e**3 + e**4) / e**3), math.log(3)])
    found = contrast(similarity, positive, own, with_positive=False).tolist()
    assert found == close([math.log((e**2 + e**4) / e**3), math.log(2)])
    found = contrast(similarity, positive, None, with_positive=True).tolist()
    assert found == close([math.log((e + e**2 + e**3 + e**4) / e**3), math.log(4)])


# --- CRDND: where the accuracies come from ----------------------------------------------------------------------------


def teacher_views(y, natural, adversarial, classes):
    """Views in which the teacher predicts the given classes."""
    return Views(
        torch.tensor(y),
        views={
            "t_nat": F.one_hot(torch.tensor(natural), classes).double(),
            "t_adv": F.one_hot(torch.tensor(adversarial), classes).double(),
        },
    )


# Class 0: 4 seen, 3 right on x and 2 on x'; class 1: 2 seen, 2 and 0 right; class 2: 1 seen, 0 and 1 right. Class 2 is
# predicted more often than it occurs, so counting predictions in place of labels gives other numbers.
EPOCH = ([0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 2, 1, 1, 1], [0, 0, 2, 2, 2, 2, 2], 3)
FLOOR = 1 / 3 + 1e-3
NATURAL, ADVERSARIAL = [3 / 4, 1.0, FLOOR], [2 / 4, FLOOR, 1.0]


def test_accuracies_start_at_one_and_are_those_of_the_epoch_before():
    objective = make("crdnd", 3)
    for kind in ("nat", "adv"):
        assert objective.accuracies(kind).tolist() == [1.0, 1.0, 1.0]
    objective.observe(teacher_views(*EPOCH))
    for kind in ("nat", "adv"):
        assert objective.accuracies(kind).tolist() == [1.0, 1.0, 1.0], "not before the epoch has ended"
    objective.end_epoch()
    assert objective.accuracies("nat").tolist() == close(NATURAL)
    assert objective.accuracies("adv").tolist() == close(ADVERSARIAL)
    # A second epoch replaces the first; what it does not see counts as right again.
    objective.observe(teacher_views([0, 0], [0, 1], [0, 0], 3))
    assert objective.accuracies("nat").tolist() == close(NATURAL)
    objective.end_epoch()
    assert objective.accuracies("nat").tolist() == close([1 / 2, 1.0, 1.0])
    assert objective.accuracies("adv").tolist() == [1.0, 1.0, 1.0]


def test_counts_of_several_batches_add_up():
    y, natural, adversarial, classes = EPOCH
    whole, parts = make("crdnd", 3), make("crdnd", 3)
    whole.observe(teacher_views(*EPOCH))
    for part in (slice(0, 2), slice(2, 7)):
        parts.observe(teacher_views(y[part], natural[part], adversarial[part], classes))
    assert torch.equal(whole.counts, parts.counts)
    # [natural or adversarial, seen or right, class]
    assert whole.counts.tolist() == [[[4, 2, 1], [3, 2, 0]], [[4, 2, 1], [2, 0, 1]]]
    assert whole.counts.dtype == torch.float64, "float32 stops counting at 16,777,216"


def test_running_accuracies_are_those_of_this_epoch_so_far():
    objective = make("crdnd", 3, accuracy="running")
    assert objective.accuracies("nat").tolist() == [1.0, 1.0, 1.0]
    objective.observe(teacher_views(*EPOCH))
    assert objective.accuracies("nat").tolist() == close(NATURAL)
    assert objective.accuracies("adv").tolist() == close(ADVERSARIAL)
    objective.observe(teacher_views([0, 2], [1, 2], [0, 0], 3))
    assert objective.accuracies("nat").tolist() == close([3 / 5, 1.0, 1 / 2])
    assert objective.accuracies("adv").tolist() == close([3 / 5, FLOOR, 1 / 2])
    objective.end_epoch()
    assert objective.accuracies("nat").tolist() == [1.0, 1.0, 1.0]


def test_an_accuracy_of_one_never_changes():
    objective = make("crdnd", 3, accuracy="one")
    for _ in range(2):
        objective.observe(teacher_views(*EPOCH))
        for kind in ("nat", "adv"):
            assert objective.accuracies(kind).tolist() == [1.0, 1.0, 1.0]
        objective.end_epoch()


def test_the_global_accuracy_is_that_of_all_samples_and_not_the_mean_of_the_classes():
    objective = make("crdnd", 3, acm="global")
    assert objective.accuracies("nat").tolist() == [1.0, 1.0, 1.0]
    objective.observe(teacher_views(*EPOCH))
    objective.end_epoch()
    # 5 and 3 of 7 samples; the means over the classes would be 7/12 and 1/2.
    assert objective.accuracies("nat").tolist() == close([5 / 7] * 3)
    assert objective.accuracies("adv").tolist() == close([3 / 7] * 3)


def test_without_compensation_there_are_no_accuracies():
    objective = make("crdnd", 3, acm="off")
    objective.observe(teacher_views(*EPOCH))
    objective.end_epoch()
    assert objective.accuracies("nat") is None
    assert objective.accuracies("adv") is None


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_accuracies_are_kept_above_chance_so_that_mixing_never_turns_a_prediction_over(classes):
    objective = make("crdnd", classes)
    wrong = [(label + 1) % classes for label in range(classes)]
    objective.observe(teacher_views(list(range(classes)), wrong, wrong, classes))
    objective.end_epoch()
    accuracies = objective.accuracies("nat")
    assert accuracies.tolist() == close([1 / classes + 1e-3] * classes)
    prediction = torch.randn(4, classes, generator=generator(1), dtype=torch.float64)
    assert torch.equal(compensate(prediction, accuracies).argsort(1), prediction.argsort(1))


def test_the_accuracies_survive_a_checkpoint():
    objective, fresh = make("crdnd", 3, accuracy="running"), make("crdnd", 3, accuracy="running")
    objective.observe(teacher_views(*EPOCH))
    objective.end_epoch()
    objective.observe(teacher_views([0, 1, 2], [0, 0, 0], [0, 0, 0], 3))
    state = {key: value.clone() for key, value in objective.state_dict().items()}
    fresh.load_state_dict(state)
    for kind in ("nat", "adv"):
        assert torch.equal(fresh.accuracies(kind), objective.accuracies(kind))
        assert not torch.equal(fresh.accuracies(kind), torch.ones(3))
    fresh.end_epoch()
    objective.end_epoch()
    assert all(torch.equal(value, objective.state_dict()[key]) for key, value in fresh.state_dict().items())
    # What several processes add up before the epoch ends are the sums of the epoch, and they are part of the state.
    assert set(objective.summed) <= set(state)
    assert objective.summed == ("counts",)


def test_observing_takes_no_part_in_the_gradient():
    objective = make("crdnd", 3)
    v = random_views(objective.needs, classes=3)
    before = {name: v[name].detach().clone() for name in objective.needs}
    objective.observe(v)
    assert not objective.counts.requires_grad
    assert all(torch.equal(v[name], before[name]) for name in before)
    assert list(objective.parameters()) == [], "nothing to learn: the accuracies determine M"


def test_the_compensation_reaches_the_loss_through_per_class_accuracies_alone_when_centred():
    v = crdnd_views(30, 4, seed=5)

    def total(**settings):
        objective = make("crdnd", 4, **settings)
        objective.observe(v)
        objective.end_epoch()
        return objective(v).total.item()

    assert total(centre=True, acm="global") == pytest.approx(total(centre=True, acm="off"), rel=0, abs=1e-12)
    assert abs(total(centre=False, acm="global") - total(centre=False, acm="off")) > 1e-3
    assert abs(total(centre=True, acm="on") - total(centre=True, acm="off")) > 1e-3


def test_compensation_stands_on_the_student_alone():
    # With every accuracy below 1 on x only, the teacher's own points must stay: compare with loops in which M stands
    # on the teacher instead.
    v = crdnd_views(3, 4, seed=6)
    objective = make("crdnd", 4, accuracy="running")
    objective.counts[0] = torch.tensor([[10.0] * 4, [9.0, 5.0, 7.0, 4.0]])
    m = {"nat": matrix([0.9, 0.5, 0.7, 0.4]), "adv": None}
    form = {
        "space": "logits",
        "centre": False,
        "denominator": "with_positive",
        "views": "student_teacher",
        "sides": "symmetric",
        "tau": 0.5,
    }
    swapped = Views(v.y, views={f"{'ts'[w == 't']}_{k}": v[f"{w}_{k}"] for w in "st" for k in ("nat", "adv")})
    right = [0.2 * value for value in naive_relation(v, "nat", m, **form)]
    wrong = [0.2 * value for value in naive_relation(swapped, "nat", m, **form)]
    assert values(objective(v), "contrast_nat") == pytest.approx(right, rel=1e-11)
    assert values(objective(v), "contrast_nat") != pytest.approx(wrong, rel=1e-3)
