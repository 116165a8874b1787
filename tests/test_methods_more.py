"""MART, KD, AdaAD, AdaIAD, CRD, SAAD and CRDND+: values worked out by hand, and where their gradients go."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from crdnd.errors import InputError
from crdnd.losses import gradient_match, kl
from crdnd.objectives import Processes, Sizes, Views, load_objective
from crdnd.objectives.crd import other_samples
from crdnd.objectives.mart import against_rival
from crdnd.objectives.saad import entropy
from crdnd.random import Stream
from support import BATCH, CLASSES, FEATURES, SIZES, TEACHER_FEATURES, random_views
from test_objectives import (
    BIASED,
    FAIR,
    KL_BIASED_FAIR,
    KL_BIASED_SURE,
    KL_FAIR_BIASED,
    KL_FAIR_SURE,
    KL_SURE_BIASED,
    KL_SURE_FAIR,
    SURE,
    close,
    coins,
    tempered,
    values,
)


def make(name, classes=2, sizes=SIZES, **settings):
    return load_objective(name)(classes, sizes=sizes, **settings)


def mixed(v, share=0.25):
    """The same views with labels of which `share` lies on the next class."""
    k = v["s_nat"].shape[1]
    target = (1 - share) * F.one_hot(v.y, k).double() + share * F.one_hot((v.y + 1) % k, k).double()
    return Views(v.y, v.progress, views=v._views, target=target, draws=v.draws), target


class InHalves(Processes):
    """One of two processes that share a batch; what the other one gathers was recorded."""

    def __init__(self, index, recorded=None):
        self.index, self.recorded, self.own = index, recorded, []

    def gather(self, z):
        self.own.append(z.detach().clone())
        if self.recorded is None:
            return z
        other = self.recorded[len(self.own) - 1]
        return torch.cat([other, z] if self.index else [z, other])


def halves(v, cut=2):
    for part in (slice(0, cut), slice(cut, None)):
        views = {name: z.detach()[part].requires_grad_(name.startswith("s_")) for name, z in v._views.items()}
        rows = torch.arange(len(v.y))[part]
        yield Views(v.y[part], v.progress, views=views, draws=v.draws.take(rows))


def in_two_processes(objective, v, what):
    """`what(objective, half)` for both halves of a batch, in two processes; the objectives and the results."""
    parts = list(halves(v))
    recorders = []
    for index, part in enumerate(parts):
        alone = copy.deepcopy(objective)
        alone.processes = InHalves(index)
        what(alone, part)
        recorders.append(alone.processes.own)
    found = []
    for index, part in enumerate(parts):
        own = copy.deepcopy(objective)
        own.processes = InHalves(index, recorders[1 - index])
        found.append((own, what(own, part)))
    return found


@pytest.mark.parametrize(
    ("name", "attack"),
    [
        ("mart", ("ce", "gaussian", "eval")),
        ("adaad", ("adaad", "gaussian", "eval")),
        ("adaiad", ("adaad", "gaussian", "eval")),
        ("saad", ("linear_teacher", "gaussian", "eval")),
        ("crdnd_plus", ("ce", "uniform", "eval")),
    ],
)
def test_a_method_trains_against_the_attack_of_its_paper(name, attack):
    found = load_objective(name).attack
    assert (found.loss, found.start, found.mode) == attack
    assert (found.steps, found.step) == (10, 0.25)


@pytest.mark.parametrize("name", ["kd", "crd"])
def test_a_method_of_natural_images_has_no_attack(name):
    assert load_objective(name).attack is None


# --- MART -------------------------------------------------------------------------------------------------------------

# Probabilities (1/2, 1/4, 1/4) and (1/8, 6/8, 1/8).
HALF, PEAK = (math.log(2), 0.0, 0.0), (0.0, math.log(6), 0.0)


def test_mart_pushes_the_label_up_and_its_strongest_rival_down():
    v = coins(y=[1, 0, 0, 1], s_nat=[HALF, HALF, PEAK, PEAK], s_adv=[HALF, HALF, PEAK, PEAK])
    terms = make("mart", 3)(v)
    assert values(terms, "ce_adv") == close([math.log(4), math.log(2), math.log(8), math.log(8 / 6)])
    # 1 - the largest probability of another class: 1 - 1/2, 1 - 1/4, 1 - 6/8, 1 - 1/8.
    assert values(terms, "rival_adv") == close([math.log(2), math.log(4 / 3), math.log(4), math.log(8 / 7)])
    assert values(terms, "kl_adv") == close([0.0] * 4)


def test_mart_weighs_the_divergence_by_how_unsure_the_natural_prediction_is_of_the_label():
    v = coins(y=[0, 0, 1], s_nat=[FAIR, BIASED, SURE], s_adv=[BIASED, FAIR, BIASED])
    unsure = [1 / 2, 1 / 4, 9 / 10]
    divergence = [KL_FAIR_BIASED, KL_BIASED_FAIR, KL_SURE_BIASED]
    expected = [u * d for u, d in zip(unsure, divergence, strict=True)]
    assert values(make("mart")(v), "kl_adv") == close([5 * e for e in expected])
    assert values(make("mart", beta=1.5)(v), "kl_adv") == close([1.5 * e for e in expected])


def test_with_two_classes_marts_rival_is_the_rest_and_doubles_the_cross_entropy():
    v = coins(y=[0, 1, 1], s_nat=[FAIR, BIASED, SURE], s_adv=[BIASED, BIASED, SURE])
    terms = make("mart")(v)
    assert values(terms, "rival_adv") == close(values(terms, "ce_adv"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rivals_logarithm_is_exact_where_probabilities_round_to_one(dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0], [40.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    found = against_rival(logits, torch.tensor([1, 0, 1]))
    # 1 - p_0 = e^-1e4; nothing to push where the label has it all; 1 - p_0 = 2 e^-40 (1 + ...).
    assert found.tolist() == pytest.approx([1e4, 0.0, 40 - math.log(2)], rel=1e-6)
    found.sum().backward()
    # Down with the rival, and up with what is left of the others by their shares.
    expected = torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.0, 0.0], [1.0, -0.5, -0.5]], dtype=dtype)
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-6)


def test_mart_sends_gradients_through_both_places_of_the_natural_prediction():
    v = random_views(("s_nat", "s_adv"))
    make("mart", CLASSES)(v).total.backward()
    p, q = F.softmax(v["s_nat"].detach(), 1), F.softmax(v["s_adv"].detach(), 1)
    log_ratio = p.log() - q.log()
    divergence = (p * log_ratio).sum(1, keepdim=True)
    p_y, one_hot = p.gather(1, v.y[:, None]), F.one_hot(v.y, CLASSES)
    # d KL(p || q) / d s_nat = p (log p - log q - KL), d (1 - p_y) / d s_nat = p_y (p - onehot(y)).
    expected = 5 * ((1 - p_y) * p * (log_ratio - divergence) + divergence * p_y * (p - one_hot)) / BATCH
    torch.testing.assert_close(v["s_nat"].grad, expected, rtol=0, atol=1e-12)


def test_marts_cross_entropy_alone_compares_with_mixed_labels():
    v = random_views(("s_nat", "s_adv"))
    blended, target = mixed(v)
    plain, found = make("mart", CLASSES)(v), make("mart", CLASSES)(blended)
    torch.testing.assert_close(found.terms["ce_adv"], -(target * F.log_softmax(v["s_adv"], 1)).sum(1))
    for name in ("rival_adv", "kl_adv"):
        assert torch.equal(found.terms[name], plain.terms[name])


# --- KD ---------------------------------------------------------------------------------------------------------------


def test_kd_mixes_labels_and_the_tempered_teacher():
    tau, alpha = 2.0, 0.25
    v = coins(
        y=[0, 1, 1],
        t_nat=[tempered(FAIR, tau), tempered(SURE, tau), tempered(BIASED, tau)],
        s_nat=[tempered(BIASED, tau), tempered(FAIR, tau), tempered(SURE, tau)],
    )
    terms = make("kd", alpha=alpha, tau=tau)(v)
    assert values(terms, "kl_nat") == close([KL_FAIR_BIASED, KL_SURE_FAIR, KL_BIASED_SURE])  # alpha tau^2 = 1
    # At temperature 1 the student's odds are squared: 9 to 1, 1 to 1, 81 to 1.
    assert values(terms, "ce_nat") == close([0.75 * math.log(x) for x in (10 / 9, 2, 82)])


def test_kds_defaults_are_those_of_tian_et_al():
    settings = make("kd").settings
    assert (settings.alpha, settings.tau) == (0.9, 4.0)


def test_kd_compares_with_mixed_labels():
    v = random_views(("s_nat", "t_nat"))
    blended, target = mixed(v)
    found = make("kd", CLASSES)(blended).terms["ce_nat"]
    torch.testing.assert_close(found, -0.1 * (target * F.log_softmax(v["s_nat"], 1)).sum(1))


# --- AdaAD, AdaIAD ----------------------------------------------------------------------------------------------------


def test_adaad_compares_both_networks_at_the_same_image():
    v = coins(
        y=[0, 0, 1],
        t_nat=[FAIR, BIASED, SURE],
        s_nat=[BIASED, FAIR, BIASED],
        t_adv=[SURE, FAIR, BIASED],
        s_adv=[FAIR, SURE, SURE],
    )
    adversarial, natural = (
        [KL_SURE_FAIR, KL_FAIR_SURE, KL_BIASED_SURE],
        [KL_FAIR_BIASED, KL_BIASED_FAIR, KL_SURE_BIASED],
    )
    terms = make("adaad")(v)
    assert values(terms, "kl_adv") == close(adversarial)
    assert values(terms, "kl_nat") == [0.0, 0.0, 0.0]
    terms = make("adaad", alpha=0.75)(v)
    assert values(terms, "kl_adv") == close([0.75 * d for d in adversarial])
    assert values(terms, "kl_nat") == close([0.25 * d for d in natural])


ADAIAD_ROWS = {
    "y": [0, 1, 1],
    "t_adv": [SURE, SURE, BIASED],  # true-class probabilities 9/10, 1/10, 1/4
    "s_nat": [SURE, FAIR, FAIR],
    "s_adv": [BIASED, BIASED, FAIR],
}
ADAIAD_TEACHER = [KL_SURE_BIASED, KL_SURE_BIASED, KL_BIASED_FAIR]
ADAIAD_SELF = [KL_SURE_BIASED, KL_FAIR_BIASED, 0.0]
TRUE_CLASS = [0.9, 0.1, 0.25]


def test_adaiad_trusts_the_teacher_at_the_adversarial_image_by_its_true_class_probability():
    v = coins(**ADAIAD_ROWS, progress=60 / 200)
    trust = [p**0.1 for p in TRUE_CLASS]
    own = [(1 - w) * d for w, d in zip(trust, ADAIAD_SELF, strict=True)]
    paper, code = make("adaiad")(v), make("adaiad", form="code")(v)
    assert values(paper, "kl_teacher") == close([w * d for w, d in zip(trust, ADAIAD_TEACHER, strict=True)])
    assert values(code, "kl_teacher") == close(ADAIAD_TEACHER)
    for terms in (paper, code):
        assert values(terms, "kl_self") == close(own)


@pytest.mark.parametrize("form", ["paper", "code"])
def test_adaiad_trusts_the_teacher_alone_before_epoch_60_of_200(form):
    terms = make("adaiad", form=form)(coins(**ADAIAD_ROWS, progress=59 / 200))
    assert values(terms, "kl_teacher") == close(ADAIAD_TEACHER)
    assert values(terms, "kl_self") == [0.0, 0.0, 0.0]


def test_adaiads_temperature_is_on_the_teachers_term_alone():
    tau = 30.0
    rows = ADAIAD_ROWS | {
        name: [tempered(pair, tau) for pair in ADAIAD_ROWS[name]] for name in ("t_adv", "s_nat", "s_adv")
    }
    v = coins(**rows, progress=0.5)
    found = values(make("adaiad", form="code", tau=tau)(v), "kl_teacher")
    assert found == pytest.approx([900 * d for d in ADAIAD_TEACHER], rel=1e-9)
    own = values(make("adaiad", tau=tau)(v), "kl_self")
    assert own == values(make("adaiad")(v), "kl_self")


def test_adaiad_does_not_detach_the_natural_prediction():
    v = random_views(("s_nat", "s_adv", "t_adv"), progress=0.5)
    make("adaiad", CLASSES, beta=1.0)(v).total.backward()
    p, q = F.softmax(v["s_nat"].detach(), 1), F.softmax(v["s_adv"].detach(), 1)
    log_ratio = p.log() - q.log()
    distrust = 1 - F.softmax(v["t_adv"], 1).gather(1, v.y[:, None])
    expected = distrust * p * (log_ratio - (p * log_ratio).sum(1, keepdim=True)) / BATCH
    torch.testing.assert_close(v["s_nat"].grad, expected, rtol=0, atol=1e-12)


# --- SAAD -------------------------------------------------------------------------------------------------------------

H_FAIR, H_BIASED = math.log(2), math.log(4) - 0.75 * math.log(3)
H_SURE = math.log(10) - 0.9 * math.log(9)


def saad_rows(t_adv=(SURE, FAIR, BIASED, SURE), progress=0.5):
    return coins(
        y=[0, 1, 1, 0],
        progress=progress,
        t_adv=t_adv,
        s_adv=[FAIR, BIASED, FAIR, BIASED],
        t_mirror=[FAIR] * 4,
        s_mirror=[FAIR] * 4,
        t_nat=[FAIR, BIASED, SURE, FAIR],
        s_nat=[BIASED, FAIR, BIASED, BIASED],
    )


def test_entropy_is_that_of_coins():
    logits = torch.tensor([FAIR, BIASED, SURE, (1e4, -1e4)], dtype=torch.float64)
    assert entropy(logits).tolist() == close([H_FAIR, H_BIASED, H_SURE, 0.0])


def test_saad_weighs_a_sample_by_how_much_less_sure_the_teacher_is_than_of_its_surest():
    weight = [0.0, 5 * (H_FAIR - H_SURE), 5 * (H_BIASED - H_SURE), 0.0]
    terms = make("saad")(saad_rows())
    divergence = [KL_SURE_FAIR, KL_FAIR_BIASED, KL_BIASED_FAIR, KL_SURE_BIASED]
    assert values(terms, "kl_adv") == close([w * d for w, d in zip(weight, divergence, strict=True)])
    # The mirrors are flat, so that the differences of predictions are the predictions at x'.
    assert values(terms, "match") == close([0.5 * w * d for w, d in zip(weight, divergence, strict=True)])
    assert values(terms, "kl_nat") == [0.0] * 4
    tenfold = make("saad", alpha=10)(saad_rows(progress=0.25))
    assert values(tenfold, "match") == close([2.5 * w * d for w, d in zip(weight, divergence, strict=True)])
    assert values(make("saad")(saad_rows(progress=0.0)), "match") == [0.0] * 4
    half = make("saad", scale=2.5)(saad_rows())
    assert values(half, "kl_adv") == close([w / 2 * d for w, d in zip(weight, divergence, strict=True)])


def test_saads_natural_term_counts_where_the_others_do_not():
    share = (H_BIASED - H_SURE) / (H_FAIR - H_SURE)
    expected = [KL_FAIR_BIASED, 0.0, (1 - share) * KL_SURE_BIASED, KL_FAIR_BIASED]
    assert values(make("saad", beta=2)(saad_rows()), "kl_nat") == close([2 * d for d in expected])


def test_saad_keeps_the_natural_term_where_the_teacher_is_equally_sure_of_all():
    terms = make("saad", beta=2)(saad_rows(t_adv=[SURE] * 4))
    assert values(terms, "kl_adv") == values(terms, "match") == [0.0] * 4
    natural = [KL_FAIR_BIASED, KL_BIASED_FAIR, KL_SURE_BIASED, KL_FAIR_BIASED]
    assert values(terms, "kl_nat") == close([2 * d for d in natural])


def test_saads_weights_carry_no_gradient():
    needs = load_objective("saad").needs
    v, same = (random_views(needs, progress=0.5) for _ in range(2))
    for each in (v, same):
        each["t_adv"].requires_grad_(True)
    make("saad", CLASSES)(v).total.backward()
    h = entropy(same["t_adv"]).detach()
    match = gradient_match(same["t_adv"], same["t_mirror"], same["s_adv"], same["s_mirror"])
    (5 * (h - h.min()) * (kl(same["t_adv"], same["s_adv"]) + 0.5 * match)).mean().backward()
    for name in ("t_adv", "s_adv", "s_mirror"):
        torch.testing.assert_close(v[name].grad, same[name].grad, rtol=0, atol=1e-12)


def test_saad_in_two_processes_is_saad_in_one():
    objective = make("saad", CLASSES, beta=0.5)
    v = random_views(objective.needs, progress=0.5)
    whole = objective(v)
    (_, first), (_, second) = in_two_processes(objective, v, lambda o, part: o(part))
    for name, term in whole.terms.items():
        torch.testing.assert_close(torch.cat([first.terms[name], second.terms[name]]), term, rtol=0, atol=1e-12)


# --- CRDND+ -----------------------------------------------------------------------------------------------------------


def test_crdnd_plus_without_its_teacher_has_the_loss_of_trades():
    objective = make("crdnd_plus", CLASSES, alpha=0, relation=0, beta=4)
    v = random_views(objective.needs)
    torch.testing.assert_close(objective(v).total, make("trades", CLASSES, beta=4)(v).total)


def test_crdnd_plus_trusts_a_teacher_as_far_as_it_believes_the_label_and_repairs_a_wrong_one():
    # Of labels 0 and 1 the teacher believes 9/10 and 1/10; asked about the second, it is repaired to 9/10 for it.
    sure = [math.log(9), 0.0]
    views = {
        "s_nat": torch.zeros(2, 2, dtype=torch.float64),
        "s_adv": torch.tensor([[math.log(3), 0.0]] * 2, dtype=torch.float64),
        "s_adv_features": torch.ones(2, 3, dtype=torch.float64),
        "t_nat": torch.tensor([sure, sure], dtype=torch.float64),
        "t_nat_features": torch.ones(2, 4, dtype=torch.float64),
    }
    terms = make("crdnd_plus", alpha=0.5, beta=2)(Views(torch.tensor([0, 1]), views=views))
    own = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    teacher = [0.9 * math.log(0.9 / 0.75) + 0.1 * math.log(0.1 / 0.25)]
    teacher.append(0.1 * math.log(0.1 / 0.75) + 0.9 * math.log(0.9 / 0.25))
    assert values(terms, "ce_nat") == close([math.log(2)] * 2)
    assert values(terms, "kl_self") == close([2 * (1 - 0.45) * own, 2 * (1 - 0.05) * own])
    assert values(terms, "kl_teacher") == close([2 * 0.45 * teacher[0], 2 * 0.05 * teacher[1]])
    assert values(terms, "relation") == close([0.0, 0.0])  # with one other example there is nothing to tell apart
    plain = make("crdnd_plus", alpha=0.5, beta=2, trust="constant", repair=False)
    terms = plain(Views(torch.tensor([0, 1]), views=views))
    assert values(terms, "kl_self") == close([own, own])
    assert values(terms, "kl_teacher") == close([teacher[0]] * 2)


def test_crdnd_plus_relates_every_example_to_each_other_one_as_the_teacher_does():
    objective = make("crdnd_plus", CLASSES, tau=0.3, relation=2)
    v = random_views(objective.needs)
    rows = []
    for i in range(BATCH):
        others = [j for j in range(BATCH) if j != i]
        p, q = (
            F.softmax(torch.stack([F.cosine_similarity(f[i], f[j], dim=0) for j in others]) / 0.3, dim=0)
            for f in (v["t_nat_features"], v["s_adv_features"])
        )
        rows.append(2 * (p * (p / q).log()).sum())
    found = objective(v).terms["relation"]
    torch.testing.assert_close(found, torch.stack(rows))
    found.mean().backward()
    slope = v["s_adv_features"].grad
    assert bool(slope.isfinite().all())
    assert (
        float((slope * v["s_adv_features"].detach()).sum(1).abs().max()) < 1e-12
    )  # the length of features does not matter


# --- CRD --------------------------------------------------------------------------------------------------------------

PLANE = Sizes(student_features=2, teacher_features=2, samples=7)


def crd_views(student, teacher, ids, key="crd test"):
    """Views of two classes with features in the plane."""
    views = {
        "s_nat": torch.zeros(len(ids), 2, dtype=torch.float64, requires_grad=True),
        "s_nat_features": torch.tensor(student, dtype=torch.float64, requires_grad=True),
        "t_nat_features": torch.tensor(teacher, dtype=torch.float64),
    }
    draws = Stream.of(key, ids=torch.tensor(ids))
    return Views(torch.zeros(len(ids), dtype=torch.int64), views=views, draws=draws)


def plain_crd(**settings):
    """CRD in the plane, whose heads leave directions as they are."""
    objective = make("crd", sizes=PLANE, dimensions=2, **settings)
    with torch.no_grad():
        for side in (objective.student, objective.teacher):
            side.head.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    return objective


def test_crd_begins_elsewhere_with_another_seed_and_in_the_same_place_with_the_same():
    first, same, other = (make("crd", sizes=dataclasses.replace(PLANE, seed=seed)).state_dict() for seed in (0, 0, 1))
    assert first.keys() >= {"student.head", "student.bank", "teacher.head", "teacher.bank"}
    for key in ("student.head", "student.bank", "teacher.head", "teacher.bank"):
        assert torch.equal(first[key], same[key])
        assert not torch.equal(first[key], other[key])


def random_crd_views(batch=BATCH, seed=0, dtype=torch.float64):
    v = random_views(load_objective("crd").needs, batch=batch, seed=seed, dtype=dtype)
    ids = torch.tensor([11, 5, 0, 77, 8, 300])[:batch]
    return Views(v.y, views=v._views, draws=Stream.of("crd", ids=ids))


@pytest.mark.parametrize(("negatives", "m"), [(3, 3), (16384, 6)])
def test_crd_of_equal_points_costs_what_guessing_costs(negatives, m):
    objective = plain_crd(negatives=negatives, weight=0.5)
    for side in (objective.student, objective.teacher):
        side.bank.copy_(torch.tensor([1.0, 0.0]).expand(7, 2))
    terms = objective(crd_views([[3.0, 0.0], [0.5, 0.0], [9.0, 0.0]], [[2.0, 0.0]] * 3, [4, 0, 6]))
    # Every P is 1/n, and the noise m/n: the positive has 1/(1 + m), each of the m negatives m/(1 + m).
    expected = 0.5 * (math.log(1 + m) + m * math.log((1 + m) / m))
    for name in ("contrast_student", "contrast_teacher"):
        assert values(terms, name) == pytest.approx([expected] * 3, rel=1e-6)
    assert values(terms, "ce_nat") == close([math.log(2)] * 3)


def test_crd_is_the_sum_over_pairs_of_its_definition():
    objective = make("crd", CLASSES, negatives=20, tau=0.3, weight=0.8).double()
    objective.observe(random_crd_views(seed=3))  # Z is that of another batch from here on
    v = random_crd_views()
    terms = objective(v)
    negatives = other_samples(v.draws.child("crd"), SIZES.samples, 20).tolist()
    sides = {
        "contrast_student": (objective.student, objective.teacher, v["s_nat_features"]),
        "contrast_teacher": (objective.teacher, objective.student, v["t_nat_features"]),
    }
    noise = 20 / SIZES.samples
    for name, (side, other, features) in sides.items():
        z = side.log_z.exp().item()
        expected = []
        for row, own in enumerate(v.draws.ids.tolist()):
            point = side.head[:, :-1] @ features[row] + side.head[:, -1]
            point = point / point.norm()

            def share(j, point=point, bank=other.bank, z=z):
                p = math.exp((point @ bank[j]).item() / 0.3) / z
                return p / (p + noise)

            loss = -math.log(share(own)) - math.fsum(math.log(1 - share(j)) for j in negatives[row])
            expected.append(0.8 * loss)
        assert values(terms, name) == pytest.approx(expected, rel=1e-9)


def test_crds_z_is_the_first_batchs_mean_of_sums_over_the_bank_and_stays():
    objective = plain_crd(tau=0.5)
    across, along = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    objective.teacher.bank.copy_(torch.stack([along, along, across, across, across, -along, -along]))
    objective.student.bank.copy_(torch.stack([across] * 7))
    first = crd_views([[2.0, 0.0], [0.0, 3.0]], [[1.0, 0.0], [0.0, 1.0]], [1, 5])
    objective.observe(first)
    # The student's first point meets 2 entries at cosine 1, 3 at 0 and 2 at -1; its second 3 at 1 and 4 at 0.
    up, down = math.exp(2), math.exp(-2)
    z_student = ((2 * up + 3 + 2 * down) + (3 * up + 4)) / 2
    assert objective.student.log_z.item() == pytest.approx(math.log(z_student), rel=1e-6)
    assert objective.teacher.log_z.item() == pytest.approx(math.log((7 + 7 * up) / 2), rel=1e-6)
    objective.observe(crd_views([[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]], [0, 2]))
    assert objective.student.log_z.item() == pytest.approx(math.log(z_student), rel=1e-6)


def test_crds_banks_move_halfway_to_what_was_seen_and_keep_their_length():
    objective = plain_crd()
    for side in (objective.student, objective.teacher):
        side.bank.copy_(torch.tensor([1.0, 0.0]).expand(7, 2))
    objective.observe(crd_views([[0.0, 5.0], [3.0, 4.0]], [[0.0, -2.0], [1.0, 0.0]], [6, 2]))
    corner = math.sqrt(0.5)
    student, teacher = objective.student.bank.tolist(), objective.teacher.bank.tolist()
    assert student[6] == pytest.approx([corner, corner])
    assert student[2] == pytest.approx([0.8 / math.sqrt(0.8), 0.4 / math.sqrt(0.8)])  # (1 + 3/5, 4/5) / 2, length 1
    assert teacher[6] == pytest.approx([corner, -corner])
    for row in (0, 1, 3, 4, 5):
        assert student[row] == teacher[row] == [1.0, 0.0]
    slow = plain_crd(momentum=0.75)
    slow.student.bank.copy_(torch.tensor([1.0, 0.0]).expand(7, 2))
    slow.observe(crd_views([[0.0, 5.0], [3.0, 4.0]], [[0.0, -2.0], [1.0, 0.0]], [6, 2]))
    assert slow.student.bank[6].tolist() == pytest.approx([3 / math.sqrt(10), 1 / math.sqrt(10)])


def test_crds_z_is_a_constant_in_the_first_batch_too():
    objective, v = make("crd", CLASSES, negatives=20), random_crd_views()
    first = torch.autograd.grad(objective(v).total, v["s_nat_features"])[0]
    kept = copy.deepcopy(objective)
    kept.observe(v)
    for side in ("student", "teacher"):  # only Z moves
        getattr(kept, side).bank.copy_(getattr(objective, side).bank)
    again = torch.autograd.grad(kept(v).total, v["s_nat_features"])[0]
    torch.testing.assert_close(again, first, rtol=1e-5, atol=1e-7)


def test_crd_compares_with_mixed_labels():
    v = random_crd_views()
    blended, target = mixed(v)
    found = make("crd", CLASSES)(blended).terms["ce_nat"]
    torch.testing.assert_close(found, -(target * F.log_softmax(v["s_nat"], 1)).sum(1))


def test_crd_looks_and_does_not_touch_before_the_update():
    objective = make("crd", CLASSES)
    before = {key: value.clone() for key, value in objective.state_dict().items()}
    objective(random_crd_views()).total.backward()
    assert all(torch.equal(value, before[key]) for key, value in objective.state_dict().items())


def test_the_students_contrast_trains_student_and_head_and_the_teachers_its_head_alone():
    objective, v = make("crd", CLASSES), random_crd_views()
    terms = objective(v)
    terms.terms["contrast_student"].sum().backward(retain_graph=True)
    assert v["s_nat_features"].grad.abs().sum() > 0
    assert objective.student.head.grad.abs().sum() > 0
    assert objective.teacher.head.grad is None
    objective.student.head.grad = v["s_nat_features"].grad = None
    terms.terms["contrast_teacher"].sum().backward()
    assert objective.teacher.head.grad.abs().sum() > 0
    assert objective.student.head.grad is None
    assert v["s_nat_features"].grad is None
    assert {name for name, _ in objective.named_parameters()} == {"student.head", "teacher.head"}


def test_descending_crd_brings_a_samples_points_together():
    objective, v = make("crd", CLASSES), random_crd_views(dtype=torch.float32)

    def own_cosine():
        points = objective.student.embed(v["s_nat_features"])
        return (points * objective.teacher.bank[v.draws.ids]).sum(1)

    before = own_cosine()
    heads = list(objective.parameters())
    for _ in range(20):
        gradients = torch.autograd.grad(objective(v).total, heads)
        with torch.no_grad():
            for head, gradient in zip(heads, gradients, strict=True):
                head -= 0.05 * gradient
    assert (own_cosine() > before + 0.1).all()


def test_other_samples_are_never_the_own_one_and_reach_all_others_alike():
    ids = torch.tensor([0, 3, 6])
    drawn = other_samples(Stream.of("others", ids=ids), 7, 6000)
    for row, own in enumerate(ids.tolist()):
        counts = torch.bincount(drawn[row], minlength=7)
        assert counts[own] == 0
        rest = counts[torch.arange(7) != own]
        assert (rest - 1000).abs().max() < 150, "five standard deviations"
    with_others = other_samples(Stream.of("others", ids=torch.tensor([6, 1])), 7, 6000)
    assert torch.equal(with_others[0], drawn[2]), "a sample's negatives do not depend on its batch"


def test_crds_negatives_change_from_epoch_to_epoch():
    objective = make("crd", CLASSES, negatives=20)
    v = random_crd_views()
    later = Views(v.y, views=v._views, draws=Stream.of("crd", 1, ids=v.draws.ids))
    assert not torch.equal(objective(v).terms["contrast_student"], objective(later).terms["contrast_student"])


def test_crds_contrast_of_a_sample_does_not_depend_on_its_batch():
    objective = make("crd", CLASSES, negatives=50)
    objective.observe(random_crd_views(seed=3))
    v = random_crd_views()
    whole = objective(v)
    parts = [objective(part) for part in halves(v)]
    for name, term in whole.terms.items():
        torch.testing.assert_close(torch.cat([p.terms[name] for p in parts]), term, rtol=0, atol=1e-9)


def test_crd_in_two_processes_is_crd_in_one():
    objective = make("crd", CLASSES, negatives=50)
    v = random_crd_views()
    whole = objective(v)
    (_, first), (_, second) = in_two_processes(objective, v, lambda o, part: o(part))
    for name, term in whole.terms.items():
        torch.testing.assert_close(torch.cat([first.terms[name], second.terms[name]]), term, rtol=0, atol=1e-9)
    found = [own for own, _ in in_two_processes(objective, v, lambda o, part: o.observe(part))]
    objective.observe(v)
    for own in found:
        for key, value in objective.state_dict().items():
            torch.testing.assert_close(own.state_dict()[key], value, rtol=0, atol=1e-6)


def test_crd_begins_the_same_everywhere_and_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    one, other = make("crd", CLASSES), make("crd", CLASSES)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())
    for side, features in ((one.student, FEATURES), (one.teacher, TEACHER_FEATURES)):
        assert side.bank.shape == (SIZES.samples, 128)
        torch.testing.assert_close(side.bank.norm(dim=1), torch.ones(SIZES.samples))
        assert side.head.shape == (128, features + 1)
        assert 0.9 < side.head.abs().max() * math.sqrt(features) <= 1
    assert not torch.equal(one.student.head, one.teacher.head)
    assert (one.student.bank * one.teacher.bank).sum(1).abs().max() < 0.5


def test_crd_is_finite_at_a_temperature_that_exp_would_not_survive():
    objective = make("crd", CLASSES, tau=1e-3)
    v = random_crd_views(dtype=torch.float32)
    terms = objective(v)
    terms.total.backward()
    assert torch.isfinite(terms.per_sample).all()
    assert torch.isfinite(v["s_nat_features"].grad).all()
    objective.observe(v)
    assert torch.isfinite(objective(v).total)


@pytest.mark.parametrize("sizes", [None, Sizes(student_features=2, teacher_features=2, samples=1)])
def test_crd_without_samples_to_remember_is_refused(sizes):
    with pytest.raises(InputError, match="objective crd: needs `sizes`"):
        make("crd", sizes=sizes)
