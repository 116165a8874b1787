"""Methods with two teachers: values worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from crdnd.errors import InputError
from crdnd.objectives import Views, load_objective, needs_second_teacher, needs_teacher
from support import BATCH, CLASSES, random_views
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
    make,
    tempered,
    values,
)

# (loss, start, batch-norm mode): AKD2 and IAD-II train like PGD-AT, MTARD like TRADES and RSLAD but on the labels.
ATTACKS = {"akd": ("ce", "uniform", "train"), "iad2": ("ce", "uniform", "train"), "mtard": ("ce", "gaussian", "eval")}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_method_trains_against_the_attack_of_its_paper(name):
    attack = load_objective(name).attack
    assert (attack.loss, attack.start, attack.mode) == ATTACKS[name]
    assert (attack.steps, attack.step) == (10, 0.25)


@pytest.mark.parametrize("name", ATTACKS)
def test_both_teachers_are_needed(name):
    method = load_objective(name)
    assert needs_teacher(method, method.attack)
    assert needs_second_teacher(method)
    assert not needs_second_teacher(load_objective("iad"))


# --- AKD2 -------------------------------------------------------------------------------------------------------------


def test_akd_weighs_labels_and_teachers_three_to_six_to_one_at_temperature_two():
    v = coins(
        y=[0, 1, 1],
        s_adv=[tempered(pair, 2) for pair in (BIASED, BIASED, FAIR)],
        t_adv=[tempered(pair, 2) for pair in (FAIR, SURE, BIASED)],
        t2_adv=[tempered(pair, 2) for pair in (SURE, FAIR, SURE)],
    )
    terms = make("akd")(v)
    assert list(terms.terms) == ["ce_adv", "kl_robust", "kl_natural"]
    # The labels see the prediction at temperature 1: twice log 3 is the coin (9/10, 1/10).
    assert values(terms, "ce_adv") == close([0.3 * math.log(10 / 9), 0.3 * math.log(10), 0.3 * math.log(2)])
    assert values(terms, "kl_robust") == close([2.4 * KL_FAIR_BIASED, 2.4 * KL_SURE_BIASED, 2.4 * KL_BIASED_FAIR])
    assert values(terms, "kl_natural") == close([0.4 * KL_SURE_BIASED, 0.4 * KL_FAIR_BIASED, 0.4 * KL_SURE_FAIR])


def test_akd_has_the_form_of_the_iad_paper_too():
    v = coins(y=[0, 1, 1], s_adv=[BIASED, BIASED, FAIR], t_adv=[FAIR, SURE, BIASED], t2_adv=[SURE, FAIR, SURE])
    terms = make("akd", weight_robust=0.5, weight_natural=0.25, tau=1)(v)
    assert values(terms, "ce_adv") == close([math.log(4 / 3) / 4, math.log(4) / 4, math.log(2) / 4])
    assert values(terms, "kl_robust") == close([KL_FAIR_BIASED / 2, KL_SURE_BIASED / 2, KL_BIASED_FAIR / 2])
    assert values(terms, "kl_natural") == close([KL_SURE_BIASED / 4, KL_FAIR_BIASED / 4, KL_SURE_FAIR / 4])


@pytest.mark.parametrize("name", ["akd", "iad2"])
def test_the_labels_get_what_the_teachers_leave_and_no_less_than_nothing(name):
    v = random_views(load_objective(name).needs, progress=0.9)
    alone = make(name, CLASSES, weight_robust=0, weight_natural=0)(v)
    torch.testing.assert_close(alone.total, F.cross_entropy(v["s_adv"], v.y), rtol=1e-12, atol=0)
    without = make(name, CLASSES, weight_robust=0.7, weight_natural=0.3)(v)
    assert values(without, "ce_adv") == pytest.approx([0.0] * BATCH, abs=1e-15)
    with pytest.raises(
        InputError, match=r"objective: weight_robust 0\.8 and weight_natural 0\.3 add up to more than 1; "
    ):
        make(name, weight_robust=0.8, weight_natural=0.3)


@pytest.mark.parametrize("name", ["akd", "iad2"])
def test_mixed_labels_enter_the_cross_entropy_and_nothing_else(name):
    v = random_views(load_objective(name).needs, progress=0.9)
    mixed = 0.7 * F.one_hot(v.y, CLASSES).double() + 0.3 * F.one_hot((v.y + 1) % CLASSES, CLASSES)
    objective, blend = make(name, CLASSES), Views(v.y, 0.9, views=v._views, target=mixed)
    plain, found = objective(v).terms, objective(blend).terms
    logs = F.log_softmax(v["s_adv"], 1)
    weight = objective.settings.weight_labels
    torch.testing.assert_close(found["ce_adv"], -weight * (mixed * logs).sum(1), rtol=1e-12, atol=0)
    assert all(torch.equal(found[key], plain[key]) for key in plain if key != "ce_adv")


# --- IAD-II -----------------------------------------------------------------------------------------------------------

IAD2_ROWS = {
    "y": [0, 1, 1],
    "t_adv": [SURE, SURE, BIASED],  # true-class probabilities 9/10, 1/10, 1/4
    "t2_adv": [FAIR, BIASED, SURE],
    "s_nat": [SURE, FAIR, BIASED],
    "s_adv": [BIASED, BIASED, FAIR],
}
LABELS = [math.log(4 / 3), math.log(4), math.log(2)]
ROBUST = [KL_SURE_BIASED, KL_SURE_BIASED, KL_BIASED_FAIR]
OWN = [KL_SURE_BIASED, KL_FAIR_BIASED, KL_BIASED_FAIR]
NATURAL = [KL_FAIR_BIASED, 0.0, KL_SURE_FAIR]
TRUE_CLASS = [0.9, 0.1, 0.25]


@pytest.mark.parametrize(("progress", "warm"), [(0.0, True), (39 / 200, True), (40 / 200, False), (0.99, False)])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_iad2_shares_half_of_the_loss_between_the_robust_teacher_and_the_student_itself(beta, progress, warm):
    terms = make("iad2", beta=beta)(coins(**IAD2_ROWS, progress=progress))
    trust = [1.0] * 3 if warm else [p**beta for p in TRUE_CLASS]
    assert list(terms.terms) == ["ce_adv", "kl_robust", "kl_self", "kl_natural"]
    assert values(terms, "ce_adv") == close([d / 4 for d in LABELS])
    assert values(terms, "kl_robust") == close([w * d / 2 for w, d in zip(trust, ROBUST, strict=True)])
    assert values(terms, "kl_self") == close([(1 - w) * d / 2 for w, d in zip(trust, OWN, strict=True)])
    assert values(terms, "kl_natural") == close([d / 4 for d in NATURAL])


def test_iad2s_defaults_are_those_of_the_authors_code():
    settings = make("iad2").settings
    assert (settings.beta, settings.warmup, settings.weight_labels) == (0.1, 40 / 200, 0.25)
    assert (settings.weight_robust, settings.weight_natural) == (0.5, 0.25)


def test_iad2_is_akd_at_temperature_one_while_the_teacher_is_trusted_alone():
    v = random_views(load_objective("iad2").needs, progress=0.1)
    akd = make("akd", CLASSES, weight_robust=0.5, weight_natural=0.25, tau=1)
    torch.testing.assert_close(make("iad2", CLASSES)(v).per_sample, akd(v).per_sample, rtol=1e-12, atol=0)


def test_iad2_does_not_detach_the_natural_prediction():
    v = random_views(load_objective("iad2").needs, progress=0.5)
    make("iad2", CLASSES, beta=1.0)(v).total.backward()
    p, q = F.softmax(v["s_nat"].detach(), 1), F.softmax(v["s_adv"].detach(), 1)
    log_ratio = p.log() - q.log()
    distrust = 1 - F.softmax(v["t_adv"], 1)[torch.arange(BATCH), v.y][:, None]
    expected = 0.5 * distrust * p * (log_ratio - (p * log_ratio).sum(1, keepdim=True)) / BATCH
    torch.testing.assert_close(v["s_nat"].grad, expected, rtol=0, atol=1e-12)


# --- MTARD ------------------------------------------------------------------------------------------------------------

# Mean divergences (natural, adversarial): of the first batch, then of a batch where the natural one has fallen less.
FIRST = coins(
    y=[0, 1],
    t2_nat=[FAIR, SURE], s_nat=[BIASED, BIASED],
    t_adv=[BIASED, SURE], s_adv=[FAIR, FAIR],
)  # fmt: skip
FIRST_NAT, FIRST_ADV = (KL_FAIR_BIASED + KL_SURE_BIASED) / 2, (KL_BIASED_FAIR + KL_SURE_FAIR) / 2


def second(progress=0.0):
    rows = {"t2_nat": [FAIR, FAIR], "s_nat": [SURE, FAIR], "t_adv": [BIASED, FAIR], "s_adv": [SURE, FAIR]}
    return coins(y=[1, 1], **rows, progress=progress)


SHARE = (KL_FAIR_SURE / 2 / FIRST_NAT) / (KL_FAIR_SURE / 2 / FIRST_NAT + KL_BIASED_SURE / 2 / FIRST_ADV)


def test_mtard_begins_with_equal_weights_on_either_teachers_divergence():
    terms = make("mtard")(FIRST)
    assert list(terms.terms) == ["kl_nat", "kl_adv"]
    assert values(terms, "kl_nat") == close([KL_FAIR_BIASED / 2, KL_SURE_BIASED / 2])
    assert values(terms, "kl_adv") == close([KL_BIASED_FAIR / 2, KL_SURE_FAIR / 2])


def test_mtards_weight_moves_to_the_term_that_has_fallen_less_since_the_first_batch():
    objective = make("mtard")
    objective.observe(FIRST)
    assert objective.initial.tolist() == close([FIRST_NAT, FIRST_ADV])
    assert objective.weight_nat.item() == close(0.5), "both relative losses are 1 on the first batch"
    objective.observe(second())
    assert objective.initial.tolist() == close([FIRST_NAT, FIRST_ADV]), "the first batch stays the measure"
    weight = 0.5 - 0.025 * (0.5 - SHARE)
    assert objective.weight_nat.item() == pytest.approx(weight, rel=1e-10)
    assert weight > 0.5
    objective.observe(second())
    weight -= 0.025 * (weight - SHARE)
    assert objective.weight_nat.item() == pytest.approx(weight, rel=1e-10)
    terms = objective(second())
    assert values(terms, "kl_nat") == pytest.approx([weight * KL_FAIR_SURE, 0.0], rel=1e-10)
    assert values(terms, "kl_adv") == pytest.approx([(1 - weight) * KL_BIASED_SURE, 0.0], rel=1e-10)


@pytest.mark.parametrize(
    ("progress", "tenths"),
    [(0.0, 0), (214 / 300, 0), (215 / 300, 1), (259 / 300, 1), (260 / 300, 2), (285 / 300, 3), (299 / 300, 3)],
)
def test_mtards_rate_falls_to_a_tenth_at_epochs_215_260_and_285_of_300(progress, tenths):
    objective = make("mtard")
    objective.observe(FIRST)
    objective.observe(second(progress))
    moved = objective.weight_nat.item() - 0.5
    assert moved == pytest.approx(0.025 * 0.1**tenths * (SHARE - 0.5), rel=1e-8)


def test_mtards_settings_change_its_rate():
    still, eager = make("mtard", rate=0), make("mtard", rate=1, drops=[])
    for objective in (still, eager):
        objective.observe(FIRST)
        objective.observe(second(0.99))
    assert still.weight_nat.item() == 0.5
    assert eager.weight_nat.item() == pytest.approx(SHARE, rel=1e-10)


MTARD_VIEWS = ("t2_nat", "s_nat", "t_adv", "s_adv")


def test_mtards_weights_stay_finite_where_nothing_is_left_to_learn():
    same = coins(y=[0, 1], **{name: [SURE, FAIR] for name in MTARD_VIEWS})
    for batches in ((same, same), (same, FIRST), (FIRST, same)):
        objective = make("mtard", rate=1)
        for batch in batches:
            objective.observe(batch)
        assert 0 <= objective.weight_nat.item() <= 1
    assert objective.weight_nat.item() == close(0.5)


def test_mtards_state_takes_no_part_in_the_gradient_and_is_all_in_its_buffers():
    objective = make("mtard", CLASSES)
    v = random_views(objective.needs)
    objective.observe(v)
    assert not any(buffer.requires_grad for buffer in objective.buffers())
    assert set(objective.state_dict()) == {"weight_nat", "initial", "seen"}
    assert objective.summed == (), "a mean over the processes is the same everywhere"


def test_mtard_asks_the_device_for_no_number():
    # A tensor on the meta device has none to give: `.item()`, `float()` and `if tensor` all fail there.
    objective = make("mtard", CLASSES).to("meta")
    rows = {name: torch.zeros(BATCH, CLASSES, device="meta") for name in objective.needs}
    v = Views(torch.zeros(BATCH, dtype=torch.int64, device="meta"), 0.9, views=rows)
    objective.observe(v)
    assert objective(v).total.device.type == "meta"
