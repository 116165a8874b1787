"""What every method and every attack must do; a new file is tested by being there."""

import importlib
import sys
from contextlib import contextmanager
from typing import ClassVar, get_args

import pytest
import torch
from torch import nn

from crdnd.attacks import attack_names, load_attack
from crdnd.engine import TrainSettings, make_objective
from crdnd.engine.step import Step, last_linear_input
from crdnd.errors import InputError
from crdnd.models import create_model, evaluating
from crdnd.objectives import (
    VIEWS,
    LossTerms,
    Objective,
    ObjectiveSettings,
    TrainingAttack,
    Views,
    attack_needs,
    load_objective,
    needs_teacher,
    objective_names,
)
from crdnd.random import Stream
from crdnd.threat import ThreatModel
from support import (
    BATCH,
    CLASSES,
    FEATURES,
    SHAPE,
    SIZES,
    Recorder,
    TinyNet,
    generator,
    images,
    random_views,
    small_attack,
    wavering,
)

THREAT = ThreatModel(norm="linf", eps=0.1)
IDS = torch.tensor([11, 5, 0, 77, 8, 300])
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


def make(name, classes=CLASSES, **settings):
    return load_objective(name)(classes, sizes=SIZES, **settings)


def choices(name):
    """The default settings, and every other value of every setting that is a choice."""
    fields = load_objective(name).settings_class.model_fields
    options = {key: (True, False) if f.annotation is bool else get_args(f.annotation) for key, f in fields.items()}
    default = [{}]
    return default + [
        {key: value}
        for key, values in options.items()
        for value in values
        if isinstance(value, str | bool) and value != fields[key].default
    ]


FORMS = [
    pytest.param(name, form, id="-".join([name, *map(str, form.values())]))
    for name in objective_names()
    for form in choices(name)
]
ATTACKED = [name for name in objective_names() if load_objective(name).attack]


def step_of(name, student, teacher=None, **changes):
    objective = make(name)
    attack = objective.attack.model_copy(update=changes) if objective.attack else None
    return Step(student, teacher, objective, attack, THREAT)


def bn_student():
    """A small network with batch norm, in train mode but for its first batch norm, which was frozen on purpose."""
    student = create_model("cnn", input_shape=SHAPE, num_classes=CLASSES, width=2, seed=1)
    student.train()
    batch_norms(student)[0].eval()
    return student


def batch_norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def test_the_registry_lists_the_seven_methods_of_the_field():
    assert {"natural", "pgd_at", "trades", "ard", "iad", "rslad", "crdnd"} <= set(objective_names())


def test_an_unknown_method_is_refused_with_a_suggestion():
    with pytest.raises(InputError, match=r"unknown objective 'rslda'; did you mean 'rslad'\? Available: .*trades"):
        load_objective("rslda")


# --- every attack -----------------------------------------------------------------------------------------------------


L2 = ThreatModel(norm="l2", eps=0.5)
JUDGED_ON_ALL = [name for name in attack_names() if load_attack(name).judged_on_all]
BEST_EFFORT = [name for name in attack_names() if name not in JUDGED_ON_ALL]


def attacked(name, model, y, threat):
    attack, x = small_attack(name, surrogate=model), images()
    return x, attack(model, x, y, threat, Stream.of("test", ids=IDS))


@pytest.mark.parametrize("threat", [THREAT, L2], ids=str)
@pytest.mark.parametrize("name", attack_names())
def test_an_attack_returns_legal_images(name, threat):
    x, x_adv = attacked(name, TinyNet(), LABELS, threat)
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    assert not x_adv.requires_grad
    delta = (x_adv - x).flatten(1)
    size = delta.abs().amax(1) if threat.norm == "linf" else (delta**2).sum(1).sqrt()
    assert (size <= threat.eps + 1e-12).all()
    assert ((x_adv >= 0) & (x_adv <= 1)).all()


@pytest.mark.parametrize("threat", [THREAT, L2], ids=str)
@pytest.mark.parametrize("name", JUDGED_ON_ALL)
def test_an_attack_that_is_judged_on_all_images_raises_its_own_loss(name, threat):
    model, attack = TinyNet(), load_attack(name)
    x, x_adv = attacked(name, model, LABELS, threat)
    before, after = attack.loss(model(x), LABELS), attack.loss(model(x_adv), LABELS)
    assert before.shape == (BATCH,)
    assert (after > before).all()


@pytest.mark.parametrize("threat", [THREAT, L2], ids=str)
@pytest.mark.parametrize("name", BEST_EFFORT)
def test_every_other_attack_returns_what_fools_or_else_the_natural_image(name, threat):
    model = wavering()
    y = model(images()).argmax(1)
    y[1] = (y[1] + 1) % CLASSES
    x, x_adv = attacked(name, model, y, threat)
    changed = (x_adv != x).flatten(1).any(1)
    assert not changed[1], "what is wrong already is left alone"
    assert (model(x_adv).argmax(1)[changed] != y[changed]).all()
    if name != "uniform_noise":
        assert changed.any()


@pytest.mark.parametrize("name", BEST_EFFORT)
def test_what_is_wrong_already_is_not_even_looked_at_by_a_search(name):
    model = Recorder(TinyNet())
    right = model.model(images()).argmax(1)
    y = (right + 1) % CLASSES
    x, x_adv = attacked(name, model, y, THREAT)
    assert torch.equal(x_adv, x)
    assert len(model.inputs) == 1
    y[[0, 3]] = right[[0, 3]]
    model.inputs.clear()
    attacked(name, model, y, ThreatModel(eps=1e-9))
    own = [z for z in model.inputs[1:] if z.shape[0] != BATCH]
    assert {len(z) for z in own} == {2}
    # Only FAB looks further away than eps: it searches for the nearest one.
    near = 1e-6 if name not in ("autoattack", "fab_t", "cw_l2") else 1.0
    assert all(((z - x[[0, 3]]).abs() <= near).all() for z in own)


@pytest.mark.parametrize("name", attack_names())
def test_an_attack_has_rounds_for_any_number_of_classes(name):
    for classes in (2, 3, 10, 100):
        rounds = load_attack(name).rounds(classes)
        assert rounds
        assert all((part.go_on is not None) == (part.block > 0) for part in rounds)
        keys = [(part.attack, part.index) for part in rounds if part.go_on is None]
        assert len(set(keys)) == len(keys), "two rounds would share their draws"
        assert all(isinstance(note, str) for note in load_attack(name).notes(classes))


@pytest.mark.parametrize("name", attack_names())
def test_an_attack_says_what_it_is(name):
    attack, module = load_attack(name), importlib.import_module(f"crdnd.attacks.{name}")
    assert attack.name == name
    assert attack.summary
    assert "arXiv" in attack.paper
    document = module.__doc__ or ""
    assert attack.paper.split("arXiv ")[1] in document or "the control" in document
    assert attack.settings()
    assert all(isinstance(value, str | int | float | bool) for value in attack.settings().values())
    assert not {"name", "summary", "paper", "surrogate"} & set(attack.settings())


# --- every method: its file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", objective_names())
def test_a_method_names_its_views_its_paper_and_its_problem(name):
    method = load_objective(name)
    assert issubclass(method, Objective)
    assert method.needs
    assert method.needs <= set(VIEWS)
    assert any(view.startswith("s_") for view in method.needs), "something must depend on the student"
    document = sys.modules[method.__module__].__doc__ or ""
    # Some papers are in no archive but that of their conference.
    for text in (document, method.paper):
        assert any(place in text for place in ("arXiv", "ICLR", "CVPR", "the control"))
    assert "min_S" in document
    assert method.attack is None or "argmax" in document
    assert method.attack is not None or not any("adv" in view for view in method.needs), "x' without an attack"
    assert set(method.summed) <= set(dict(make(name).named_buffers()))


@pytest.mark.parametrize("name", objective_names())
def test_a_methods_settings_are_described_checked_and_typed(name):
    settings = load_objective(name).settings_class
    assert issubclass(settings, ObjectiveSettings)
    for key, field in settings.model_fields.items():
        assert field.description, f"{key} has no description"
    with pytest.raises(InputError, match=r"objective: loss_scael: no such setting; did you mean 'loss_scale'\?"):
        make(name, loss_scael=2.0)
    for wrong in (0, -1, "much"):
        with pytest.raises(InputError, match="objective: loss_scale: "):
            make(name, loss_scale=wrong)


# --- every method: its terms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "form"), FORMS)
@pytest.mark.parametrize("progress", [0.0, 0.9])
def test_a_method_is_content_with_the_views_it_names_and_sends_gradients_to_the_student(name, form, progress):
    objective = make(name, **form)
    v = random_views(objective.needs, progress=progress)
    terms = objective(v)
    assert isinstance(terms, LossTerms)
    assert terms.terms
    for term in terms.terms.values():
        assert term.shape == (BATCH,)
        assert term.dtype == torch.float64
        assert torch.isfinite(term).all()
    assert terms.total.shape == ()
    # The loss is the sum of the named terms, averaged over the batch.
    torch.testing.assert_close(terms.total, sum(term.mean() for term in terms.terms.values()), rtol=0, atol=1e-12)
    terms.total.backward()
    gradients = {view: v[view].grad for view in objective.needs if view.startswith("s_")}
    reached = [view for view, gradient in gradients.items() if gradient is not None and gradient.abs().sum() > 0]
    assert reached, "some view of the student must move the loss"
    if objective.attack is not None:
        assert any("adv" in view for view in reached), "training against an attack must look at its result"


@pytest.mark.parametrize("name", objective_names())
def test_a_view_that_a_method_names_is_one_that_it_uses(name):
    objective = make(name)
    for missing in objective.needs:
        v = random_views(objective.needs - {missing}, progress=0.9)
        with pytest.raises(KeyError, match=f"view '{missing}' was not computed"):
            objective(v)


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_permuting_the_batch_permutes_the_terms(name, form):
    objective = make(name, **form)
    v = random_views(objective.needs, progress=0.9)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    views = {view: v[view][order] for view in objective.needs}
    shuffled = Views(v.y[order], v.progress, views=views, draws=v.draws.take(order))
    whole, permuted = objective(v), objective(shuffled)
    assert whole.terms.keys() == permuted.terms.keys()
    for key, term in whole.terms.items():
        torch.testing.assert_close(permuted.terms[key], term[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", objective_names())
def test_loss_scale_multiplies_the_whole_loss(name):
    v = random_views(load_objective(name).needs, progress=0.9)
    plain, scaled = make(name)(v), make(name, loss_scale=0.1)(v)
    assert plain.terms.keys() == scaled.terms.keys()
    for key, term in plain.terms.items():
        torch.testing.assert_close(scaled.terms[key], 0.1 * term, rtol=1e-12, atol=0)
    torch.testing.assert_close(scaled.total, 0.1 * plain.total, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_terms_and_gradients_are_finite_at_extreme_and_at_equal_logits(name, form, dtype):
    objective = make(name, **form)
    extreme = random_views(objective.needs, dtype=dtype)
    signs = {view: 1e4 * torch.sign(extreme[view].detach()) for view in objective.needs}
    against = {view: -z if view.startswith("s_") else z for view, z in signs.items()}
    equal = {view: torch.full_like(z, 3.0) for view, z in signs.items()}
    zero = {view: torch.zeros_like(z) for view, z in signs.items()}
    for views in (signs, against, equal, zero):
        leaves = {view: z.clone().requires_grad_(view.startswith("s_")) for view, z in views.items()}
        terms = objective(Views(extreme.y, 0.9, views=leaves))
        assert all(torch.isfinite(term).all() for term in terms.terms.values())
        terms.total.backward()
        assert all(torch.isfinite(z.grad).all() for z in leaves.values() if z.grad is not None)


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_two_classes_will_do(name, form):
    objective = make(name, 2, **form)
    v = random_views(objective.needs, classes=2, progress=0.9)
    terms = objective(v)
    assert all(torch.isfinite(term).all() for term in terms.terms.values())
    objective.observe(v)
    objective.end_epoch()
    assert torch.isfinite(objective(v).total)


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_a_methods_state_is_in_its_checkpoint(name, form):
    objective, fresh = make(name, **form), make(name, **form)
    v, later = (random_views(objective.needs, seed=seed, progress=0.9) for seed in (0, 1))
    with torch.no_grad():
        objective.observe(v)
        objective.end_epoch()
        objective.observe(later)
    fresh.load_state_dict({key: value.clone() for key, value in objective.state_dict().items()})
    assert torch.equal(fresh(v).per_sample, objective(v).per_sample)
    for each in (objective, fresh):
        each.end_epoch()
    assert torch.equal(fresh(v).per_sample, objective(v).per_sample)


# --- every method in a step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", objective_names())
def test_a_step_trains_the_student_and_never_the_teacher(name):
    student, teacher = TinyNet(seed=1), TinyNet(seed=2)
    step = step_of(name, student, teacher)
    global_state = torch.get_rng_state()
    terms, v = step(images(), LABELS, Stream.of("test", ids=IDS), 0.9)
    assert torch.equal(torch.get_rng_state(), global_state)
    assert all(parameter.grad is None for parameter in student.parameters()), "the attack leaves no gradients"
    terms.total.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    for view in step.objective.needs:
        assert v[view].requires_grad == view.startswith("s_"), view
    assert v.progress == 0.9
    assert torch.equal(v.y, LABELS)


@pytest.mark.parametrize("threat", [THREAT, ThreatModel(norm="l2", eps=0.5)], ids=str)
@pytest.mark.parametrize("name", ATTACKED)
def test_a_steps_images_are_legal_and_worse_than_the_natural_ones(name, threat):
    student, teacher = Recorder(TinyNet(seed=1)), TinyNet(seed=2)
    objective, x = make(name), images()
    Step(student, teacher, objective, objective.attack, threat)(x, LABELS, Stream.of("test", ids=IDS), 0.9)
    # The student's pass on x' is the last, but for one on its mirror image.
    x_adv = student.inputs[-2 if "s_mirror" in objective.needs else -1]
    delta = (x_adv - x).flatten(1)
    size = delta.abs().amax(1) if threat.norm == "linf" else (delta**2).sum(1).sqrt()
    assert (size <= threat.eps + 1e-12).all()
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    assert (size > threat.eps / 2).all(), "ten steps of eps/4 go somewhere"


# Forward passes of (student, teacher) in a step. Student: 10 of the attack, one of it on x where its loss compares with
# S(x), and one on each of x, x' and the mirror image of x' that the method asks for. Teacher: one on each of them, and
# 10 more where the attack's gradient goes through it.
PASSES = {
    "natural": (1, 0),
    "pgd_at": (10 + 1, 0),
    "trades": (1 + 10 + 2, 0),
    "ard": (10 + 2, 1),
    "iad": (10 + 2, 2),
    "rslad": (10 + 2, 1),
    "crdnd": (10 + 2, 2),
    "mart": (10 + 2, 0),
    "kd": (1, 1),
    "adaad": (10 + 2, 10 + 2),
    "adaiad": (10 + 2, 10 + 1),
    "crd": (1, 1),
    "saad": (10 + 3, 3),
}


def inputs_seen(views, network):
    """The images on which a network is looked at for these views: nat, adv or mirror. A slope is taken at nat."""
    kinds = {view.split("_")[1] for view in views if view.split("_")[0] == network}
    return {"nat" if kind == "linear" else kind for kind in kinds}


def expected_passes(name):
    """The same for any method, from what it and its attack ask for."""
    method = load_objective(name)
    inner, needs = attack_needs(method.attack), method.needs
    steps = method.attack.steps if method.attack else 0
    student = steps + ("s_nat" in inner) + len(inputs_seen(needs, "s"))
    teacher = steps * ("t_adv" in inner) + len(inputs_seen(needs | (inner - {"t_adv"}), "t"))
    return student, teacher


@pytest.mark.parametrize("name", objective_names())
def test_a_step_computes_what_was_asked_for_and_nothing_else(name):
    student, teacher = Recorder(TinyNet(seed=1)), Recorder(TinyNet(seed=2))
    _, v = step_of(name, student, teacher)(images(), LABELS, Stream.of("test", ids=IDS), 0.9)
    assert (len(student.inputs), len(teacher.inputs)) == PASSES.get(name, expected_passes(name))
    assert expected_passes(name) == PASSES.get(name, expected_passes(name))
    method = load_objective(name)
    asked = method.needs | attack_needs(method.attack)
    # A pass for features gives the logits too.
    asked |= {view.removesuffix("_features") for view in asked}
    # The slope comes with the prediction it starts from.
    asked |= {"t_nat", "t_slope"} if "t_linear" in asked else set()
    assert set(v._views) <= asked


@pytest.mark.parametrize("name", objective_names())
def test_a_teacher_sees_the_images_that_the_student_sees(name):
    student, teacher = Recorder(TinyNet(seed=1)), Recorder(TinyNet(seed=2))
    x = images()
    step_of(name, student, teacher)(x, LABELS, Stream.of("test", ids=IDS), 0.9)
    needs = load_objective(name).needs
    if "t_nat" in needs:
        assert torch.equal(teacher.inputs[0], x)
    if "t_adv" in needs:
        assert torch.equal(teacher.inputs[-1], student.inputs[-1]), "x' through both networks"


@pytest.mark.parametrize("name", objective_names())
def test_a_method_is_refused_without_the_teacher_it_needs_and_with_one_it_ignores(name):
    method, settings = load_objective(name), TrainSettings(objective=name, threat=THREAT)
    needed = needs_teacher(method, method.attack)
    objective, attack = make_objective(settings, CLASSES, teachers=int(needed))
    assert isinstance(objective, method)
    assert attack == method.attack
    with pytest.raises(InputError, match=f"objective {name} " + ("needs a teacher" if needed else "uses no teacher")):
        make_objective(settings, CLASSES, teachers=int(not needed))
    if not needed:
        terms, _ = step_of(name, TinyNet())(images(), LABELS, Stream.of("test", ids=IDS), 0.9)
        assert torch.isfinite(terms.total)


def test_an_attack_on_the_teachers_divergence_needs_a_teacher_whatever_the_method():
    settings = TrainSettings(objective="pgd_at", threat=THREAT, attack={"loss": "kl_teacher"})
    with pytest.raises(InputError, match="objective pgd_at needs a teacher"):
        make_objective(settings, CLASSES, teachers=0)
    _, attack = make_objective(settings, CLASSES, teachers=1)
    # What was not changed stays the method's own.
    assert attack == TrainingAttack(loss="kl_teacher", start="uniform", mode="train")


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ATTACKED)
def test_a_step_attacks_in_the_given_mode_and_leaves_every_submodule_its_own(name, mode):
    inner = bn_student()
    student, teacher = Recorder(inner), TinyNet(seed=2, dtype=torch.float32)
    modes = [module.training for module in inner.modules()]
    norms = batch_norms(inner)
    step = step_of(name, student, teacher, mode=mode)
    step(images(dtype=torch.float32), LABELS, Stream.of("test", ids=IDS), 0.9)
    assert [module.training for module in inner.modules()] == modes
    assert not norms[0].training
    method = load_objective(name)
    seen = inputs_seen(method.needs, "s")
    in_attack, after = len(student.modes) - len(seen), len(seen)
    assert student.modes == [mode == "train"] * in_attack + [True] * after
    # A batch norm in train mode counts its batches; in eval mode it keeps its statistics.
    expected = after + (in_attack if mode == "train" else 0)
    assert [norm.num_batches_tracked.item() for norm in norms] == [0, expected, expected]


@pytest.mark.parametrize("name", ATTACKED)
def test_the_adversarial_image_of_a_training_sample_does_not_depend_on_its_batch(name):
    x = images()

    def found(part):
        student, teacher = Recorder(TinyNet(seed=1)), TinyNet(seed=2)
        step_of(name, student, teacher)(x[part], LABELS[part], Stream.of("test", ids=IDS[part]), 0.9)
        return student.inputs[-1]

    whole = found(slice(0, 6))
    torch.testing.assert_close(torch.cat([found(slice(0, 2)), found(slice(2, 6))]), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", objective_names())
def test_a_step_keeps_no_graph_of_what_is_only_compared_with(name):
    looks = {"s": [], "t": []}

    class Watched(TinyNet):
        def __init__(self, who):
            super().__init__()
            self.who = who

        def forward(self, x):
            looks[self.who].append(torch.is_grad_enabled())
            return super().forward(x)

    step_of(name, Watched("s"), Watched("t"))(images(), LABELS, Stream.of("test", ids=IDS), 0.9)
    inner = attack_needs(load_objective(name).attack)
    # Only an attack sends gradients through the teacher: in each of AdaAD's ten steps, or once for SAAD's slope at x.
    assert sum(looks["t"]) == 10 * ("t_adv" in inner) + ("t_linear" in inner)
    # TRADES' attack compares with S(x), which it looks at once and without a graph.
    before = "s_nat" in inner
    assert looks["s"] == [False] * before + [True] * (len(looks["s"]) - before)


# --- the step's attack, by hand ---------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Logits W x of flattened images."""

    def __init__(self, seed):
        super().__init__()
        size = SHAPE[0] * SHAPE[1] * SHAPE[2]
        self.weight = nn.Parameter(0.3 * torch.randn(CLASSES, size, generator=generator(seed), dtype=torch.float64))

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


@pytest.mark.parametrize("target", [None, 0.6 * torch.eye(CLASSES, dtype=torch.float64)[LABELS] + 0.4 / CLASSES])
@pytest.mark.parametrize("loss", ["ce", "margin", "kl_teacher", "trades"])
def test_one_step_of_the_training_attack_goes_up_the_gradient_of_its_loss(loss, target):
    student, teacher, x = Recorder(Linear(1)), Linear(2), images()
    attack = TrainingAttack(loss=loss, steps=1, step=0.5, start="gaussian")
    _, v = Step(student, teacher, make("pgd_at"), attack, THREAT)(x, LABELS, Stream.of("test", ids=IDS), 0.0, target)
    assert v.y is LABELS
    assert v.target is (LABELS if target is None else target)
    x_adv, start = student.inputs[-1], student.inputs[-2]
    assert 0 < (start - x).abs().max() < 0.006
    with torch.no_grad():
        weight = student.model.weight
        q = torch.softmax(start.flatten(1) @ weight.T, 1)
        one_hot = torch.eye(CLASSES, dtype=torch.float64)[LABELS]
        # d/dz: of CE q - onehot(y) or q - the soft label, of the margin onehot(rival) - onehot(y), of KL(p || q) q - p.
        rival = (start.flatten(1) @ weight.T).masked_fill(one_hot.bool(), -torch.inf).argmax(1)
        slope = {
            "ce": q - (one_hot if target is None else target),
            "margin": torch.eye(CLASSES, dtype=torch.float64)[rival] - one_hot,
            "kl_teacher": q - torch.softmax(teacher(x), 1),
            "trades": q - torch.softmax(student.model(x), 1),
        }[loss]
        uphill = (slope @ weight).reshape(x.shape)
    # start + eps / 2 sign(gradient), back into the ball around x and the box.
    expected = (x + (start + 0.05 * uphill.sign() - x).clamp(-0.1, 0.1)).clamp(0, 1)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_the_training_attack_reaches_the_closed_form_optimum_of_two_classes(loss):
    size = SHAPE[0] * SHAPE[1] * SHAPE[2]
    student = Recorder(nn.Linear(size, 2, dtype=torch.float64))
    flat = Recorder(nn.Sequential(nn.Flatten(), student))
    x, y = images(), LABELS % 2
    objective = load_objective("pgd_at")(2)
    Step(flat, None, objective, TrainingAttack(loss=loss), THREAT)(x, y, Stream.of("test", ids=IDS), 0.0)
    weight = student.model.weight.detach()
    uphill = (weight[1 - y] - weight[y]).reshape(x.shape)
    torch.testing.assert_close(flat.inputs[-1], (x + 0.1 * uphill.sign()).clamp(0, 1), rtol=0, atol=1e-12)


# --- views of features ------------------------------------------------------------------------------------------------


class NearFeatures(Objective):
    """For the test alone: the distance of the student's features on x' from the teacher's on x."""

    paper = "the control"
    needs: ClassVar = frozenset({"s_adv_features", "t_nat_features"})
    attack = TrainingAttack(loss="ce", steps=2, mode="train")

    def terms(self, v):
        return LossTerms(near=(v["s_adv_features"] - v["t_nat_features"]).square().sum(1))


def test_a_feature_view_is_the_input_of_the_last_linear_layer():
    student, teacher = Recorder(TinyNet(seed=1)), Recorder(TinyNet(seed=2))
    objective, x = NearFeatures(CLASSES), images()
    terms, v = Step(student, teacher, objective, objective.attack, THREAT)(x, LABELS, Stream.of("t", ids=IDS), 0.0)
    x_adv = student.inputs[-1]
    assert v["s_adv_features"].shape == (BATCH, FEATURES)
    torch.testing.assert_close(v["s_adv_features"], student.model.features(x_adv), rtol=0, atol=0)
    torch.testing.assert_close(v["t_nat_features"], teacher.model.features(x), rtol=0, atol=0)
    # The attack's 2 passes and one for the features; the attack itself collects none.
    assert (len(student.inputs), len(teacher.inputs)) == (3, 1)
    terms.total.backward()
    assert student.model.conv.weight.grad.abs().sum() > 0
    assert student.model.classifier.weight.grad is None, "features lie before the last layer"
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not student.model.classifier._forward_pre_hooks, "the hook is gone"
    # The distance by hand.
    expected = (student.model.features(x_adv) - teacher.model.features(x)).square().sum(1).mean()
    torch.testing.assert_close(terms.total, expected)


def test_features_and_logits_of_one_network_on_one_input_cost_one_pass():
    class Both(NearFeatures):
        needs: ClassVar = frozenset({"s_nat", "s_nat_features", "t_nat", "t_nat_features"})
        attack = None

        def terms(self, v):
            return LossTerms(near=(v["s_nat"] - v["t_nat"]).square().sum(1) + v["s_nat_features"].sum(1))

    student, teacher = Recorder(TinyNet(seed=1)), Recorder(TinyNet(seed=2))
    _, v = Step(student, teacher, Both(CLASSES), None, THREAT)(images(), LABELS, Stream.of("t", ids=IDS), 0.0)
    assert (len(student.inputs), len(teacher.inputs)) == (1, 1)
    torch.testing.assert_close(student.model.classifier(v["s_nat_features"]), v["s_nat"])


def test_features_are_those_of_the_last_of_several_linear_layers():
    net = nn.Sequential(nn.Flatten(), nn.Linear(84, 9), nn.ReLU(), nn.Linear(9, CLASSES)).double()
    x = images()
    with last_linear_input(net) as captured:
        net(x)
        net(x / 2)
    assert len(captured) == 2, "one for each pass"
    torch.testing.assert_close(captured[0], net[:3](x), rtol=0, atol=0)
    torch.testing.assert_close(captured[1], net[:3](x / 2), rtol=0, atol=0)


def test_a_network_without_a_linear_layer_has_no_features():
    with (
        pytest.raises(InputError, match="Sequential has no linear layer to read features from"),
        last_linear_input(nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten())),
    ):
        pass


def test_the_hook_for_features_goes_even_when_the_pass_fails():
    net = TinyNet()
    with pytest.raises(RuntimeError), last_linear_input(net):
        net(torch.zeros(2, SHAPE[0] + 1, 4, 4, dtype=torch.float64))
    assert not net.classifier._forward_pre_hooks


# --- modes ------------------------------------------------------------------------------------------------------------


def test_evaluating_gives_every_submodule_its_own_mode_back_even_after_an_error():
    student = bn_student()
    modes = [module.training for module in student.modules()]
    assert len(set(modes)) == 2
    with evaluating(student):
        assert not any(module.training for module in student.modules())
    assert [module.training for module in student.modules()] == modes
    with pytest.raises(ZeroDivisionError), evaluating(student):
        raise ZeroDivisionError
    assert [module.training for module in student.modules()] == modes


def test_half_precision_predictions_are_scored_in_float32():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = TinyNet(dtype=torch.float32)

        def forward(self, x):
            return self.net(x).to(torch.bfloat16)

    _, v = step_of("rslad", Half(), Half(), steps=1)(images(dtype=torch.float32), LABELS, Stream.of("t", ids=IDS), 0.0)
    assert {v[view].dtype for view in ("s_nat", "s_adv", "t_nat")} == {torch.float32}


def test_the_networks_run_inside_the_precision_context_and_the_loss_outside():
    inside, during_loss = [], []
    active = [0]

    @contextmanager
    def precision():
        active[0] += 1
        yield
        active[0] -= 1

    class Watched(TinyNet):
        def forward(self, x):
            inside.append(active[0])
            return super().forward(x)

    class Loss(load_objective("rslad")):
        def terms(self, v):
            during_loss.append(active[0])
            return super().terms(v)

    objective = Loss(CLASSES)
    step = Step(Watched(seed=1), Watched(seed=2), objective, objective.attack, THREAT, precision)
    step(images(), LABELS, Stream.of("t", ids=IDS), 0.0)
    assert inside == [1] * 13
    assert during_loss == [0]
