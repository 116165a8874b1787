"""What every method and every attack must do; a new file is tested by being there."""

import copy
import dataclasses
import importlib
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier, BrokenBarrierError
from typing import ClassVar, get_args

import pytest
import torch
from torch import Tensor, nn

from crdnd.attacks import attack_names, load_attack
from crdnd.engine import TrainSettings, make_objective
from crdnd.engine.step import Step, logits_and_features
from crdnd.errors import InputError
from crdnd.models import create_model, evaluating
from crdnd.objectives import (
    INNER_LOSSES,
    VIEWS,
    LossTerms,
    Objective,
    ObjectiveSettings,
    Processes,
    Sizes,
    TrainingAttack,
    Views,
    attack_needs,
    load_objective,
    needs_second_teacher,
    needs_teacher,
    objective_names,
)
from crdnd.objectives._base import AttackLoss
from crdnd.random import Stream
from crdnd.threat import ThreatModel
from support import (
    BATCH,
    CLASSES,
    FEATURES,
    SHAPE,
    SIZES,
    TEACHER_FEATURES,
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


def make(name, classes=CLASSES, *, dtype=torch.float64, features=FEATURES, **settings):
    """The method as the engine makes it; what it learns or remembers is no coarser than the views."""
    objective = load_objective(name)(classes, sizes=dataclasses.replace(SIZES, student_features=features), **settings)
    return objective.double() if dtype == torch.float64 else objective


def width_of_features(network):
    return [module for module in network.modules() if isinstance(module, nn.Linear)][-1].in_features


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


def step_of(name, student, teacher=None, second=None, parts=None, *, dtype=torch.float64, features=FEATURES, **changes):
    """A step of the method; `parts` are arguments of `Step`, `changes` are those of its training attack."""
    objective = make(name, dtype=dtype, features=features)
    attack = objective.attack.model_copy(update=changes) if objective.attack else None
    return Step(student, teacher, objective, attack, THREAT, second_teacher=second, **(parts or {}))


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
    # "Zi et al. 2021, arXiv 2108.07969": who, when and where, and where the head says so too.
    cited = re.fullmatch(r".+ (?:19|20)\d\d, (arXiv \d{4}\.\d{4,5}|[A-Z][A-Za-z]+)", method.paper)
    assert cited or "the control" in method.paper
    assert (cited.group(1) if cited else "the control") in document
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


def experienced(name, form, classes=CLASSES, dtype=torch.float64):
    """The method after an epoch and a batch, so that whatever it remembers differs from what it began with."""
    objective = make(name, classes, dtype=dtype, **form)
    with torch.no_grad():
        objective.observe(random_views(objective.needs, classes=classes, seed=11, progress=0.4, dtype=dtype))
        objective.end_epoch()
        objective.observe(random_views(objective.needs, classes=classes, seed=12, progress=0.5, dtype=dtype))
    return objective


def state_of(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same_state(state, other):
    assert state.keys() == other.keys()
    for key, value in state.items():
        assert torch.equal(value, other[key]), key


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
    objective = experienced(name, form)
    v = random_views(objective.needs, progress=0.9)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    views = {view: v[view][order] for view in objective.needs}
    shuffled = Views(v.y[order], v.progress, views=views, draws=v.draws.take(order))
    whole, permuted = objective(v), objective(shuffled)
    assert whole.terms.keys() == permuted.terms.keys()
    for key, term in whole.terms.items():
        torch.testing.assert_close(permuted.terms[key], term[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_a_look_at_the_terms_changes_nothing_that_a_method_remembers(name, form):
    objective = experienced(name, form)
    v, before = random_views(objective.needs, progress=0.9), state_of(objective)
    first = objective(v).per_sample
    assert_same_state(before, state_of(objective))
    assert torch.equal(objective(v).per_sample, first)


@pytest.mark.parametrize("name", objective_names())
def test_loss_scale_multiplies_the_whole_loss(name):
    v = random_views(load_objective(name).needs, progress=0.9)
    plain, scaled = make(name), make(name, loss_scale=0.1)
    scaled.load_state_dict(plain.state_dict())
    plain, scaled = plain(v), scaled(v)
    assert plain.terms.keys() == scaled.terms.keys()
    for key, term in plain.terms.items():
        torch.testing.assert_close(scaled.terms[key], 0.1 * term, rtol=1e-12, atol=0)
    torch.testing.assert_close(scaled.total, 0.1 * plain.total, rtol=1e-12, atol=0)


def extremes(needs, classes=CLASSES, dtype=torch.float64):
    """Views as large as a diverging network's, for and against the teacher, and views without any preference."""
    ordinary = random_views(needs, classes=classes, dtype=dtype)
    signs = {view: 1e4 * torch.sign(z.detach()) for view, z in ordinary._views.items()}
    yield signs
    yield {view: -z if view.startswith("s_") else z for view, z in signs.items()}
    yield {view: torch.full_like(z, 3.0) for view, z in signs.items()}
    yield {view: torch.zeros_like(z) for view, z in signs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_terms_and_gradients_are_finite_at_extreme_and_at_equal_logits(name, form, dtype):
    needs = load_objective(name).needs
    ordinary = random_views(needs, dtype=dtype)
    for objective in (make(name, dtype=dtype, **form), experienced(name, form, dtype=dtype)):
        for views in extremes(needs, dtype=dtype):
            leaves = {view: z.clone().requires_grad_(view.startswith("s_")) for view, z in views.items()}
            v = Views(ordinary.y, 0.9, views=leaves)
            objective.zero_grad()
            terms = objective(v)
            assert all(torch.isfinite(term).all() for term in terms.terms.values())
            terms.total.backward()
            learned = [*leaves.values(), *objective.parameters()]
            assert all(torch.isfinite(z.grad).all() for z in learned if z.grad is not None)
            with torch.no_grad():
                objective.observe(v)
            assert all(torch.isfinite(value).all() for value in objective.state_dict().values())
            assert torch.isfinite(objective(ordinary).total)


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_two_classes_will_do(name, form):
    objective = experienced(name, form, classes=2)
    v = random_views(objective.needs, classes=2, progress=0.9)
    terms = objective(v)
    assert all(torch.isfinite(term).all() for term in terms.terms.values())
    terms.total.backward()
    assert all(torch.isfinite(v[view].grad).all() for view in objective.needs if v[view].grad is not None)


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_a_methods_state_is_in_its_checkpoint(name, form):
    objective, fresh = experienced(name, form), make(name, **form)
    state = state_of(objective)
    fresh.load_state_dict(state)
    assert_same_state(state, state_of(fresh))
    # And goes on alike, to the last bit.
    for seed in (0, 1, 2):
        v = random_views(objective.needs, seed=seed, progress=0.9)
        assert torch.equal(fresh(v).per_sample, objective(v).per_sample)
        for each in (objective, fresh):
            with torch.no_grad():
                each.observe(v)
            if seed == 1:
                each.end_epoch()
        assert_same_state(state_of(objective), state_of(fresh))


# --- every method: a batch shared by two processes --------------------------------------------------------------------


class Meeting:
    """Where two threads hand each other what they bring; an error of one ends the wait of the other."""

    def __init__(self):
        self.barrier = Barrier(2, timeout=20)
        self.places = [None, None]

    def exchange(self, index, z):
        self.places[index] = z
        self.barrier.wait()
        both = list(self.places)
        self.barrier.wait()
        return both

    def run(self, work):
        """What `work` returns for either index, the two at the same time."""

        def guarded(index):
            try:
                return work(index)
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(2) as pool:
            results = [pool.submit(guarded, index) for index in range(2)]
        errors = [result.exception() for result in results if result.exception()]
        for error in sorted(errors, key=lambda error: isinstance(error, BrokenBarrierError)):
            raise error
        return [result.result() for result in results]


class Half(Processes):
    """One of two processes, here threads: what they gather keeps its gradients, what they average has none."""

    def __init__(self, meeting, index):
        self.meeting, self.index = meeting, index

    def gather(self, z):
        return torch.cat(self.meeting.exchange(self.index, z))

    def mean(self, z):
        return torch.stack(self.meeting.exchange(self.index, z)).mean(0).detach()


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_a_batch_shared_by_two_processes_has_the_terms_and_the_gradients_of_the_joined_one(name, form):
    joined, meeting = experienced(name, form), Meeting()
    halves = [make(name, **form) for _ in range(2)]
    for index, half in enumerate(halves):
        half.load_state_dict(joined.state_dict())
        half.processes = Half(meeting, index)
        for key in joined.summed:  # the sums so far are the first process's
            half.get_buffer(key).mul_(1 - index)
    rows = [torch.arange(BATCH // 2), torch.arange(BATCH // 2, BATCH)]

    def compare(seed):
        whole, shared = (random_views(joined.needs, seed=seed, progress=0.9) for _ in range(2))
        views = [
            Views(
                shared.y[part],
                0.9,
                views={view: shared[view][part] for view in joined.needs},
                draws=shared.draws.take(part),
            )
            for part in rows
        ]
        terms, parts = joined(whole), meeting.run(lambda index: halves[index](views[index]))
        for key, term in terms.terms.items():
            found = torch.cat([part.terms[key] for part in parts])
            torch.testing.assert_close(found, term, rtol=0, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")
        # Each process goes back from the mean over its own rows, and the gradients are averaged.
        terms.total.backward()
        (sum(part.total for part in parts) / 2).backward()
        for view in joined.needs:
            if view.startswith("s_"):
                expected = torch.zeros_like(whole[view]) if whole[view].grad is None else whole[view].grad
                found = torch.zeros_like(expected) if shared[view].grad is None else shared[view].grad
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        for one, two, both in zip(*(each.parameters() for each in (*halves, joined)), strict=True):
            torch.testing.assert_close(one.grad + two.grad, both.grad, rtol=0, atol=1e-12)
            one.grad = two.grad = both.grad = None
        with torch.no_grad():
            joined.observe(whole)
            meeting.run(lambda index: observe(index, views[index]))

    def observe(index, v):
        with torch.no_grad():  # of this thread
            halves[index].observe(v)

    compare(1)
    compare(2)
    for key in joined.summed:
        total = sum(half.get_buffer(key) for half in halves)
        for half in halves:
            half.get_buffer(key).copy_(total)
    joined.end_epoch()
    meeting.run(lambda index: halves[index].end_epoch())
    for key, value in joined.state_dict().items():
        for half in halves:
            torch.testing.assert_close(half.state_dict()[key], value, rtol=1e-12, atol=1e-12)
    compare(3)


# --- every inner loss -------------------------------------------------------------------------------------------------

LOSSES = list(INNER_LOSSES)


def test_every_attack_loss_has_its_function():
    assert set(get_args(AttackLoss)) == set(INNER_LOSSES)
    for inner in INNER_LOSSES.values():
        assert inner.needs <= set(VIEWS)
        assert not any(view.startswith("t2_") for view in inner.needs), "an attack looks at the robust teacher alone"


@pytest.mark.parametrize("classes", [2, CLASSES])
@pytest.mark.parametrize("name", LOSSES)
def test_an_attack_loss_has_one_value_a_sample_that_does_not_depend_on_its_batch(name, classes):
    inner = INNER_LOSSES[name]
    v = random_views(inner.needs, classes=classes)
    loss = inner.loss(v)
    assert loss.shape == (BATCH,)
    assert loss.dtype == torch.float64
    some = torch.tensor([4, 0, 3])
    part = inner.loss(Views(v.y[some], views={view: v[view][some] for view in inner.needs}))
    torch.testing.assert_close(part, loss[some], rtol=0, atol=1e-12)
    assert len(loss.detach().unique()) == BATCH
    for missing in inner.needs:
        with pytest.raises(KeyError, match=f"view '{missing}' was not computed"):
            inner.loss(random_views(inner.needs - {missing}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, CLASSES])
@pytest.mark.parametrize("name", LOSSES)
def test_an_attack_loss_and_its_gradient_are_finite_at_extreme_and_at_equal_logits(name, classes, dtype):
    inner = INNER_LOSSES[name]
    y = random_views(inner.needs, classes=classes).y
    for views in extremes(inner.needs, classes, dtype):
        moving = [view for view in inner.needs if view.endswith(("_adv", "_linear"))]
        leaves = {view: z.clone().requires_grad_(view in moving) for view, z in views.items()}
        loss = inner.loss(Views(y, views=leaves))
        assert torch.isfinite(loss).all()
        loss.sum().backward()
        assert all(torch.isfinite(leaves[view].grad).all() for view in moving)


# --- every method in a step -------------------------------------------------------------------------------------------


def networks(seed=1):
    """A student, its teacher and a second one that listen; the teachers' features are wider than the student's."""
    wide = {"features": TEACHER_FEATURES}
    nets = TinyNet(seed=seed), TinyNet(seed=seed + 1, **wide), TinyNet(seed=seed + 2, **wide)
    return [Recorder(net) for net in nets]


def kinds(views, who):
    """The kinds of images on which a network is asked; the linearised teacher is asked at x."""
    asked = {view.split("_")[1].replace("linear", "nat") for view in views if view.split("_")[0] == who}
    return [kind for kind in ("nat", "adv", "mirror") if kind in asked]


def attacked_images(step, student):
    """x' of the step that `student` has just seen, or None."""
    after = kinds(step.needs, "s")
    return student.inputs[-len(after) :][after.index("adv")] if "adv" in after else None


def run_step(step, progress=0.9, rows=slice(None)):
    return step(images()[rows], LABELS[rows], Stream.of("test", ids=IDS[rows]), progress)


# Arguments of `Step`, and changes to the training attack.
PARTS = {
    "plain": ({}, {}),
    "igdm": ({"igdm": 1.0}, {}),
    "repair": ({"repair": True}, {}),
    "restarts": ({}, {"restarts": 2}),
    "eps_warmup": ({}, {"eps_warmup": 0.95}),
}


WITH_PARTS = [(name, part) for name in objective_names() for part in PARTS if name in ATTACKED or part == "plain"]
MATCHED = [(name, igdm) for name in objective_names() for igdm in (None, 1.0) if name in ATTACKED or igdm is None]


@pytest.mark.parametrize(("name", "part"), WITH_PARTS)
def test_a_step_trains_the_student_and_never_a_teacher(name, part):
    parts, changes = PARTS[part]
    student, teacher, second = networks()
    step = step_of(name, student, teacher, second, parts, **changes)
    global_state = torch.get_rng_state()
    terms, v = run_step(step)
    assert torch.equal(torch.get_rng_state(), global_state)
    for network in (student, teacher, second):
        assert all(parameter.grad is None for parameter in network.parameters()), "the attack leaves no gradients"
    for term in terms.terms.values():
        assert term.shape == (BATCH,)
        assert torch.isfinite(term).all()
    torch.testing.assert_close(terms.total, sum(term.mean() for term in terms.terms.values()), rtol=0, atol=1e-12)
    terms.total.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in student.parameters())
    assert all(parameter.grad is None for network in (teacher, second) for parameter in network.parameters())
    for view in step.needs:
        assert v[view].requires_grad == view.startswith("s_"), view
    assert v.progress == 0.9
    assert torch.equal(v.y, LABELS)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("threat", [THREAT, L2], ids=str)
@pytest.mark.parametrize("name", ATTACKED)
def test_a_steps_images_are_legal_and_worse_than_the_natural_ones(name, threat, part):
    parts, changes = PARTS[part]
    student, teacher, second = networks()
    step = dataclasses.replace(step_of(name, student, teacher, second, parts, **changes), threat=threat)
    run_step(step)
    x, x_adv = images(), attacked_images(step, student)
    delta = (x_adv - x).flatten(1)
    size = delta.abs().amax(1) if threat.norm == "linf" else (delta**2).sum(1).sqrt()
    assert (size <= threat.eps + 1e-12).all()
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    assert (size > threat.eps / 2).all(), "ten steps of eps/4 go somewhere"


@pytest.mark.parametrize("name", ATTACKED)
def test_matching_input_gradients_adds_one_term_that_grows_with_the_run(name):
    plain, _ = run_step(step_of(name, *networks()))
    for progress in (0.0, 0.9):
        without, _ = run_step(step_of(name, *networks()), progress)
        terms, v = run_step(step_of(name, *networks(), {"igdm": 2.0}), progress)
        assert terms.terms.keys() == plain.terms.keys() | {"igdm"}
        for key, term in without.terms.items():
            assert torch.equal(terms.terms[key], term), key
        ours, theirs = v["s_adv"] - v["s_mirror"], v["t_adv"] - v["t_mirror"]
        match = (theirs.softmax(1) * (theirs.log_softmax(1) - ours.log_softmax(1))).sum(1)
        torch.testing.assert_close(terms.terms["igdm"], 2 * progress * match, rtol=0, atol=1e-12)
    assert terms.terms["igdm"].mean() > 0


@pytest.mark.parametrize("name", objective_names())
def test_a_repaired_teacher_is_right_about_every_sample(name):
    def views(repair):
        _, v = run_step(step_of(name, *networks(), {"repair": repair}))
        return {view: v[view] for view in load_objective(name).needs if view in ("t_nat", "t2_nat")}

    before = views(repair=False)
    for view, z in views(repair=True).items():
        assert torch.equal(z.argmax(1), LABELS)
        assert not torch.equal(before[view].argmax(1), LABELS), "else there is nothing to repair"
        assert torch.equal(z.sort(1).values, before[view].sort(1).values)


@pytest.mark.parametrize("name", ATTACKED)
def test_restarts_keep_for_each_sample_what_one_of_them_found(name):
    stream = Stream.of("test", ids=IDS)

    def found(draws, **changes):
        return step_of(name, *networks(), **changes).prepare(images(), LABELS, draws, 0.9).x_adv

    each = torch.stack([found(stream.child("restart", index)) for index in range(3)])
    chosen = (found(stream, restarts=3) == each).flatten(2).all(2)
    assert chosen.any(0).all()
    assert chosen.sum() == BATCH, "starts of their own"


@pytest.mark.parametrize("name", ATTACKED)
def test_eps_rises_over_the_warm_up(name):
    for progress, share in ((0.0, 0.0), (0.1, 0.25), (0.3, 0.75), (0.4, 1.0), (0.9, 1.0)):
        student, teacher, second = networks()
        step = step_of(name, student, teacher, second, eps_warmup=0.4)
        run_step(step, progress)
        size = (attacked_images(step, student) - images()).flatten(1).abs().amax(1)
        assert (size <= share * THREAT.eps + 1e-12).all()
        assert (size >= share * THREAT.eps / 2).all()


# Forward passes of (student, teacher, second teacher) in a step. Student: 10 of the attack, one of it on x where its
# loss compares with S(x), and one on each of x and x' that the method asks for. Teachers: one on each of x and x'.
PASSES = {
    "natural": (1, 0, 0),
    "pgd_at": (10 + 1, 0, 0),
    "trades": (1 + 10 + 2, 0, 0),
    "ard": (10 + 2, 1, 0),
    "iad": (10 + 2, 2, 0),
    "rslad": (10 + 2, 1, 0),
    "crdnd": (10 + 2, 2, 0),
    "akd": (10 + 1, 1, 1),
    "iad2": (10 + 2, 1, 1),
    "mtard": (10 + 2, 1, 1),
}


def expected_passes(step):
    """The same for any method, from what it, its attack and its parts ask for."""
    inner, before = attack_needs(step.attack), step.needs
    once = before | {view for view in inner if view.endswith(("_nat", "_linear"))}
    steps = step.attack.steps if step.attack else 0
    student = steps + ("s_nat" in inner) + len(kinds(before, "s"))
    teacher = steps * ("t_adv" in inner) + len(kinds(once, "t"))
    return student, teacher, len(kinds(before, "t2"))


@pytest.mark.parametrize(("name", "igdm"), MATCHED)
def test_a_step_computes_what_was_asked_for_and_nothing_else(name, igdm):
    nets = networks()
    step = step_of(name, *nets, {"igdm": igdm})
    _, v = run_step(step)
    passes = tuple(len(net.inputs) for net in nets)
    assert passes == expected_passes(step)
    assert (step.passes.student, step.passes.teacher) == (BATCH * passes[0], BATCH * (passes[1] + passes[2]))
    if igdm is None:
        assert passes == PASSES.get(name, passes)
    asked = step.needs | attack_needs(step.attack)
    if "t_linear" in asked:
        asked |= {"t_nat", "t_slope"}
    # A pass for features gives the logits too.
    asked |= {view.removesuffix("_features") for view in asked}
    # The slope comes with the prediction it starts from.
    asked |= {"t_nat", "t_slope"} if "t_linear" in asked else set()
    assert set(v._views) <= asked


@pytest.mark.parametrize(("name", "igdm"), MATCHED)
def test_a_teacher_sees_the_images_that_the_student_sees(name, igdm):
    student, *teachers = networks()
    step = step_of(name, student, *teachers, {"igdm": igdm})
    run_step(step)
    x, x_adv = images(), attacked_images(step, student)
    for who, teacher in zip(("t", "t2"), teachers, strict=True):
        seen = kinds(step.needs, who)
        if "nat" in seen:
            assert torch.equal(teacher.inputs[0], x)
        after = [kind for kind in seen if kind != "nat"]
        for kind, found in zip(after, teacher.inputs[len(teacher.inputs) - len(after) :], strict=True):
            torch.testing.assert_close(found, x_adv if kind == "adv" else 2 * x - x_adv, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", objective_names())
def test_a_method_is_refused_without_the_teachers_it_needs_and_with_one_it_ignores(name):
    method, settings = load_objective(name), TrainSettings(objective=name, threat=THREAT)
    needed = needs_teacher(method, method.attack) + needs_second_teacher(method)
    objective, attack = make_objective(settings, CLASSES, teachers=needed, sizes=SIZES)
    assert isinstance(objective, method)
    assert attack == method.attack
    for teachers in {0, 1, 2} - {needed}:
        with pytest.raises(InputError, match=f"objective {name} (needs a|uses (no|one)) "):
            make_objective(settings, CLASSES, teachers=teachers, sizes=SIZES)
    if not needed:
        terms, _ = run_step(step_of(name, TinyNet()))
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
    student = Recorder(inner)
    teachers = [TinyNet(seed=seed, dtype=torch.float32, features=TEACHER_FEATURES) for seed in (2, 3)]
    modes = [module.training for module in inner.modules()]
    norms = batch_norms(inner)
    features = width_of_features(inner)
    step = step_of(name, student, *teachers, dtype=torch.float32, features=features, mode=mode)
    step(images(dtype=torch.float32), LABELS, Stream.of("test", ids=IDS), 0.9)
    assert [module.training for module in inner.modules()] == modes
    assert not norms[0].training
    after = len(kinds(step.needs, "s"))
    in_attack = len(student.modes) - after
    assert student.modes == [mode == "train"] * in_attack + [True] * after
    # A batch norm in train mode counts its batches; in eval mode it keeps its statistics.
    expected = after + (in_attack if mode == "train" else 0)
    assert [norm.num_batches_tracked.item() for norm in norms] == [0, expected, expected]


@pytest.mark.parametrize("name", ATTACKED)
def test_the_adversarial_image_of_a_training_sample_does_not_depend_on_its_batch(name):
    def found(part):
        student, teacher, second = networks()
        step = step_of(name, student, teacher, second)
        run_step(step, rows=part)
        return attacked_images(step, student)

    whole = found(slice(0, 6))
    torch.testing.assert_close(torch.cat([found(slice(0, 2)), found(slice(2, 6))]), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", objective_names())
def test_a_step_keeps_no_graph_of_what_is_only_compared_with(name):
    looks = {"s": [], "t": [], "t2": []}

    class Watched(TinyNet):
        def __init__(self, who):
            super().__init__(features=FEATURES if who == "s" else TEACHER_FEATURES)
            self.who = who

        def forward(self, x):
            looks[self.who].append(torch.is_grad_enabled())
            return super().forward(x)

    step = step_of(name, *(Watched(who) for who in looks))
    run_step(step)
    inner = attack_needs(step.attack)
    # A teacher has a graph where an attack goes through it, and where its slope at x is asked for.
    through = step.attack.steps * ("t_adv" in inner) if step.attack else 0
    assert sum(looks["t"]) == through + ("t_linear" in step.needs | inner)
    assert not any(looks["t2"])
    # TRADES' attack compares with S(x), which it looks at once and without a graph.
    before = "s_nat" in inner
    assert looks["s"] == [False] * before + [True] * (len(looks["s"]) - before)


# --- every method in a run --------------------------------------------------------------------------------------------


class TinyRun:
    """Four steps in two epochs with an optimiser, as the engine takes them."""

    def __init__(self, name):
        self.student, *self.teachers = (
            create_model("cnn", input_shape=SHAPE, num_classes=CLASSES, width=width, seed=width) for width in (2, 3, 4)
        )
        for teacher in self.teachers:
            teacher.eval()
            next(teacher.parameters()).requires_grad_(False)  # as a user may have it
        self.student.train()
        features, wide = (width_of_features(network) for network in (self.student, self.teachers[0]))
        objective = load_objective(name)(CLASSES, sizes=Sizes(features, wide, SIZES.samples))
        self.step = Step(
            self.student, self.teachers[0], objective, objective.attack, THREAT, second_teacher=self.teachers[1]
        )
        learned = [*self.student.parameters(), *objective.parameters()]
        self.optimizer = torch.optim.SGD(learned, lr=0.05, momentum=0.9)

    def go(self, steps):
        for index in steps:
            x, ids = images(seed=index, dtype=torch.float32), IDS + index % 2
            terms, v = self.step(x, LABELS, Stream.of("train", index // 2, ids=ids), index / 4)
            self.optimizer.zero_grad(set_to_none=True)
            terms.total.backward()
            self.optimizer.step()
            with torch.no_grad():
                self.step.objective.observe(v)
            if index % 2:
                self.step.objective.end_epoch()
        return self

    @property
    def learning(self):
        return (self.student, self.step.objective, self.optimizer)


def frozen_facts(teacher):
    """Everything about a network that a run must leave alone."""
    modes = [module.training for module in teacher.modules()]
    flags = [(parameter.requires_grad, parameter.grad is None) for parameter in teacher.parameters()]
    return modes, flags, state_of(teacher)


@pytest.mark.parametrize("name", objective_names())
def test_a_run_leaves_both_teachers_as_they_were(name):
    run = TinyRun(name)
    before, student = [frozen_facts(teacher) for teacher in run.teachers], state_of(run.student)
    run.go(range(4))
    for teacher, (modes, flags, state) in zip(run.teachers, before, strict=True):
        assert frozen_facts(teacher)[:2] == (modes, flags)
        assert_same_state(state, state_of(teacher))
    assert any(not torch.equal(value, student[key]) for key, value in run.student.named_parameters())


@pytest.mark.parametrize("name", objective_names())
def test_a_run_goes_on_bit_for_bit_from_its_state(name):
    whole = TinyRun(name).go(range(4))
    first, second = TinyRun(name).go(range(3)), TinyRun(name)
    for old, new in zip(first.learning, second.learning, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    second.go(range(3, 4))
    for old, new in zip(whole.learning[:2], second.learning[:2], strict=True):
        assert_same_state(state_of(old), state_of(new))


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
@pytest.mark.parametrize("loss", LOSSES)
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
        # T(x'), and T(x) whose label alone goes on to x': d KL(p || q) / dt = p (log p - log q - KL), into the teacher.
        linearised = torch.where(one_hot.bool(), teacher(start), teacher(x))
        p = torch.softmax(linearised if loss == "linear_teacher" else teacher(start), 1)
        log_ratio = p.log() - q.log()
        through = p * (log_ratio - (p * log_ratio).sum(1, keepdim=True))
        slope, through = {
            "ce": (q - (one_hot if target is None else target), None),
            "margin": (torch.eye(CLASSES, dtype=torch.float64)[rival] - one_hot, None),
            "kl_teacher": (q - torch.softmax(teacher(x), 1), None),
            "trades": (q - torch.softmax(student.model(x), 1), None),
            "adaad": (q - p, through),
            "linear_teacher": (q - p, through * one_hot),
        }[loss]
        uphill = slope @ weight
        if through is not None:
            assert ((through @ teacher.weight).abs() > 1e-4).any(), "the teacher has its share"
            uphill = uphill + through @ teacher.weight
        uphill = uphill.reshape(x.shape)
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


class Excited(TinyNet):
    """Weighs its features by themselves: a linear layer that is called before the last one and registered behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Linear(FEATURES, FEATURES, dtype=torch.float64)
        self.unused = nn.Linear(2, CLASSES, dtype=torch.float64)

    def features(self, x: Tensor) -> Tensor:
        found = super().features(x)
        return found * self.squeeze(found).sigmoid()


def test_features_are_what_goes_into_the_last_linear_layer_that_a_pass_calls():
    x, flat = images(), nn.Sequential(nn.Flatten(), nn.Linear(84, 9), nn.ReLU(), nn.Linear(9, CLASSES)).double()
    excited = Excited()
    for net, expected in ((flat, flat[:3](x)), (excited, excited.features(x))):
        logits, found = logits_and_features(net, x)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        torch.testing.assert_close(logits, net(x), rtol=0, atol=0)


class Tokens(nn.Module):
    """Its last linear layer is called on every place of the image, and the mean of that are the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SHAPE[0], CLASSES, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(2).transpose(1, 2)).mean(1)


@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Conv2d(3, 5, (4, 7)).double(), nn.Flatten()), Tokens])
def test_a_network_without_a_linear_layer_at_its_end_has_no_features(make):
    with pytest.raises(InputError, match="has no linear layer at its end to read features from"):
        logits_and_features(make(), images())


def test_the_hooks_for_features_go_even_when_the_pass_fails():
    net = TinyNet()
    with pytest.raises(RuntimeError):
        logits_and_features(net, torch.zeros(2, SHAPE[0] + 1, 4, 4, dtype=torch.float64))
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
