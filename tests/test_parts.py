"""What combines with any method: repair, IGDM, AWP, averaged weights, and the settings of the training attack."""

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from crdnd import ImageData, InputError, Splits, ThreatModel, create_model, distill, train
from crdnd.engine.run import make_objective
from crdnd.engine.settings import TrainSettings
from crdnd.engine.step import Step
from crdnd.engine.weights import average, keeping_statistics, perturbable, perturbed, reestimate_batch_norm
from crdnd.losses import gradient_match, kl, repaired
from crdnd.objectives import Sizes, TrainingAttack, load_objective
from crdnd.random import Stream
from support import BATCH, CLASSES, SHAPE, Recorder, TinyNet, generator, images

torch.set_num_threads(1)  # networks this small wait for their threads more than they compute

THREAT = ThreatModel(norm="linf", eps=0.1)
IDS = torch.tensor([11, 5, 0, 77, 8, 300])
LABELS = torch.arange(BATCH) % CLASSES


def stream() -> Stream:
    return Stream.of("t", ids=IDS)


def splits(count: int = 13, dtype: torch.dtype = torch.float32) -> Splits:
    def part(size: int, seed: int) -> ImageData:
        return ImageData(images(size, seed=seed, dtype=dtype), torch.arange(size) % CLASSES, CLASSES)

    return Splits(part(count, 1), part(7, 2))


def cnn(seed: int = 0, width: int = 2) -> nn.Module:
    return create_model("cnn", input_shape=SHAPE, num_classes=CLASSES, width=width, seed=seed)


def settings(**changes: Any) -> dict[str, Any]:
    common = {"objective": "rslad", "threat": THREAT, "epochs": 4, "batch_size": 4, "select": "last"}
    return common | {"attack": {"steps": 2}, "optimizer": {"learning_rate": 0.2}} | changes


# Repair of a wrong teacher


def test_a_wrong_prediction_is_swapped_and_a_right_one_kept():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, -1.0]])
    assert torch.equal(repaired(logits, torch.tensor([2, 1])), torch.tensor([[2.0, 1.0, 3.0], [0.0, 5.0, -1.0]]))


@given(st.integers(0, 10**6), st.integers(2, 9))
def test_a_repaired_teacher_is_right_and_believes_the_same_numbers(seed, classes):
    logits = torch.randn(7, classes, generator=generator(seed), dtype=torch.float64)
    y = torch.randint(0, classes, (7,), generator=generator(seed + 1))
    found = repaired(logits, y)
    assert torch.equal(found.argmax(1), y)
    assert torch.equal(found.sort(1).values, logits.sort(1).values)


def test_repair_reaches_every_view_of_the_teacher_and_the_attack():
    teacher, student, x = TinyNet(seed=2), Recorder(TinyNet(seed=1)), images(BATCH)
    objective, attack = load_objective("iad")(CLASSES), TrainingAttack(loss="kl_teacher", start="none", steps=1)
    _, v = Step(student, teacher, objective, attack, THREAT, repair=True)(x, LABELS, stream(), 0.5)
    assert (teacher(x).argmax(1) != LABELS).any()
    for view in (v["t_nat"], v["t_adv"]):
        assert torch.equal(view.argmax(1), LABELS)
    z = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(kl(repaired(teacher(x), LABELS), student.model(z)).sum(), z)
    torch.testing.assert_close(student.inputs[-1], THREAT.ascend(x, gradient, x, 0.25))


# IGDM


def test_gradient_match_is_the_divergence_of_the_differences():
    t_plus, t_minus, s_plus, s_minus = (torch.randn(BATCH, 3, generator=generator(i)) for i in range(4))
    p, q = (t_plus - t_minus).softmax(1), (s_plus - s_minus).softmax(1)
    torch.testing.assert_close(gradient_match(t_plus, t_minus, s_plus, s_minus), (p * (p / q).log()).sum(1))


def test_igdm_adds_its_term_at_the_mirrored_point_and_grows_with_the_run():
    student, teacher, x = Recorder(TinyNet(seed=1)), Recorder(TinyNet(seed=2)), images(BATCH)
    objective = load_objective("ard")(CLASSES, loss_scale=0.5)
    plain, _ = Step(student, teacher, objective, objective.attack, THREAT)(x, LABELS, stream(), 0.25)
    terms, _ = Step(student, teacher, objective, objective.attack, THREAT, igdm=8.0)(x, LABELS, stream(), 0.25)
    assert terms.terms.keys() - plain.terms.keys() == {"igdm"}
    x_adv, mirror = student.inputs[-2:]
    assert torch.equal(mirror, 2 * x - x_adv)
    s, t = student.model, teacher.model
    expected = 0.5 * 8.0 * 0.25 * gradient_match(t(x_adv), t(mirror), s(x_adv), s(mirror))
    torch.testing.assert_close(terms.terms["igdm"], expected, rtol=1e-12, atol=0)
    for name, term in plain.terms.items():
        torch.testing.assert_close(terms.terms[name], term, rtol=1e-12, atol=0)


def test_igdm_and_repair_without_a_teacher_are_refused(tmp_path):
    for changes, message in (
        ({"objective": "pgd_at", "igdm": 1.0}, "igdm needs a teacher"),
        ({"objective": "natural", "igdm": 1.0, "attack": {}}, "igdm: objective natural trains without an attack"),
        ({"objective": "pgd_at", "repair": True}, "repair: objective pgd_at has no teacher"),
    ):
        with pytest.raises(InputError, match=message):
            train(cnn(), splits(), out=tmp_path / "run", **settings(**changes))


def test_repair_is_refused_where_no_prediction_of_the_teacher_is_looked_at():
    sizes = Sizes(student_features=2, teacher_features=2, samples=7)
    with pytest.raises(InputError, match="repair: objective crd looks at no prediction"):
        make_objective(TrainSettings(objective="crd", threat=THREAT, repair=True), 3, teachers=1, sizes=sizes)


@pytest.mark.parametrize("name", ["crdnd", "crdnd_plus", "iad", "iad2", "adaiad", "saad"])
def test_repair_is_refused_where_the_method_looks_at_the_teachers_errors_itself(name):
    with pytest.raises(InputError, match=f"repair: objective {name} takes account"):
        make_objective(TrainSettings(objective=name, threat=THREAT, repair=True), 3, teachers=1 + (name == "iad2"))


def test_repair_is_refused_beside_igdm_whose_slopes_it_would_break():
    with pytest.raises(InputError, match="repair: igdm matches how"):
        make_objective(TrainSettings(objective="rslad", threat=THREAT, repair=True, igdm=1.0), 3, teachers=1)


def test_igdm_gives_a_method_without_a_teacher_one(tmp_path):
    run = distill(cnn(), splits(), teacher=cnn(1), out=tmp_path, **settings(objective="pgd_at", igdm=1.0))
    assert set(run.history[-1].terms) == {"ce_adv", "igdm"}
    assert run.history[-1].terms["igdm"] > 0


class Convolutional(nn.Module):
    """A mean of maps for logits: no linear layer, and no gradient to its images where it is told so."""

    def __init__(self, *, gradients: bool = True) -> None:
        super().__init__()
        self.convolution, self.gradients = nn.Conv2d(SHAPE[0], CLASSES, 3), gradients

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.gradients and torch.is_grad_enabled()):
            return self.convolution(x).mean((2, 3))


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("name", ["crd", "crdnd_plus"])
def test_a_network_without_features_is_refused_before_a_run_begins(name, who, tmp_path):
    student, teacher = (Convolutional() if what == who else cnn(1) for what in ("student", "teacher"))
    with pytest.raises(
        InputError, match=rf"^{who}: Convolutional has no linear layer .*, and objective {name} needs them"
    ):
        distill(student, splits(), teacher=teacher, out=tmp_path / "run", **settings(objective=name))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["adaad", "adaiad", "saad", "rslad"])
def test_a_teacher_without_gradients_is_refused_where_its_slope_is_looked_at(name, tmp_path):
    def run():
        teacher = Convolutional(gradients=False)
        return distill(cnn(), splits(), teacher=teacher, out=tmp_path / "run", **settings(objective=name))

    if name == "rslad":
        assert run().history
        return
    with pytest.raises(InputError, match=r"^teacher: lets no gradient through to its images"):
        run()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"teacher": type("Run", (), {"model": cnn()})()},
            r"^teacher: must be a torch\.nn\.Module, got Run; give its \.mod",
        ),
        ({"student": cnn().requires_grad_(False)}, r"^student: none of its weights is trained"),
        ({"student": "cnn,width=4"}, r"^student: must be a torch\.nn\.Module, got str; make one with load_model"),
        ({"seed": 10**20}, r"^seed: input should be less than"),
        ({"seeds": {"init": -(10**20)}}, r"^seeds\.init: input should be greater than or equal to"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(change, message, tmp_path):
    given_ = {"student": cnn(), "teacher": cnn(1), **settings(objective="rslad"), **change}
    with pytest.raises(InputError, match=message):
        distill(data=splits(), out=tmp_path / "run", **given_)


def test_a_student_that_is_its_own_teacher_is_refused(tmp_path):
    network = cnn()
    with pytest.raises(InputError, match=r"^teacher: has weights of the student"):
        distill(network, splits(), teacher=network, out=tmp_path / "run", **settings(objective="rslad"))


# The training attack


class Slopes(nn.Module):
    """Logits w_k . x: the teacher whose slope is known."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(CLASSES, math.prod(SHAPE), generator=generator(seed), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.w.T


def stepped(loss: str, teacher: nn.Module, progress: float = 0.5, **attack: Any) -> Tensor:
    """x' of one batch."""
    student = Recorder(TinyNet(seed=1))
    chosen = TrainingAttack(loss=loss, start="none", **{"steps": 3, **attack})
    objective = load_objective("rslad")(CLASSES)
    Step(student, teacher, objective, chosen, THREAT)(images(BATCH), LABELS, stream(), progress)
    return student.inputs[-1]


def test_adaad_goes_where_student_and_teacher_part_and_a_fixed_target_does_not():
    teacher, x = TinyNet(seed=2), images(BATCH)
    student = TinyNet(seed=1)
    z = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(kl(teacher(z), student(z)).sum(), z)
    expected = THREAT.ascend(x, gradient, x, 0.25)
    found = stepped("adaad", teacher, steps=1)
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, stepped("kl_teacher", teacher, steps=1))
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_linear_teacher_moves_the_logit_of_the_label_along_its_slope_alone():
    teacher, student, x = Slopes(2), TinyNet(seed=1), images(BATCH)
    at_x = teacher(x).detach()

    def target(z: Tensor) -> Tensor:
        change = ((z - x).flatten(1) * teacher.w.detach()[LABELS]).sum(1)
        return at_x + F.one_hot(LABELS, CLASSES) * change[:, None]

    x_adv = x
    for _ in range(3):
        z = x_adv.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(kl(target(z), student(z)).sum(), z)
        x_adv = THREAT.ascend(x_adv, gradient, x, 0.25)
    recorded = Recorder(teacher)
    torch.testing.assert_close(stepped("linear_teacher", recorded), x_adv)
    assert len(recorded.inputs) == 1, "one look for value and slope, however many steps"


def test_eps_grows_over_its_warm_up():
    teacher = TinyNet(seed=2)
    for progress, share in ((0.0, 0.0), (0.1, 0.25), (0.4, 1.0), (0.9, 1.0)):
        x_adv = stepped("ce", teacher, progress, eps_warmup=0.4, steps=4, step=1.0)
        assert (x_adv - images(BATCH)).abs().max().item() == pytest.approx(0.1 * share, abs=1e-12)


def test_restarts_keep_each_samples_highest_loss():
    student, x = TinyNet(seed=1), images(BATCH)
    one, five = (stepped_from_noise(restarts) for restarts in (1, 5))
    before, after = (F.cross_entropy(student(z), LABELS, reduction="none") for z in (one, five))
    assert (after >= before - 1e-12).all()
    assert (after > before + 1e-6).any()
    assert THREAT.allows(five, x).all()


def stepped_from_noise(restarts: int) -> Tensor:
    student = Recorder(TinyNet(seed=1))
    attack = TrainingAttack(loss="ce", start="uniform", steps=1, step=0.1, restarts=restarts)
    Step(student, None, load_objective("pgd_at")(CLASSES), attack, THREAT)(images(BATCH), LABELS, stream(), 0.5)
    return student.inputs[-1]


# Adversarial weight perturbation


def test_weights_move_uphill_by_their_own_length_times_gamma_and_come_back_bit_for_bit():
    network = cnn()
    weights, before = perturbable(network), deepcopy(network.state_dict())
    assert {parameter.ndim for parameter in weights} == {2, 4}
    gradients = [torch.randn(weight.shape, generator=generator(3)) for weight in weights]
    old = [weight.detach().clone() for weight in weights]
    with perturbed(weights, gradients, 0.02):
        for weight, start, gradient in zip(weights, old, gradients, strict=True):
            move = weight.detach() - start
            assert move.norm().item() == pytest.approx(0.02 * start.norm().item(), rel=1e-4)
            assert F.cosine_similarity(move.flatten(), gradient.flatten(), dim=0).item() == pytest.approx(1, abs=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_step_with_awp_descends_by_the_gradient_at_the_worst_weights(tmp_path):
    data, gamma, rate = splits(dtype=torch.float64), 0.05, 0.1
    network = TinyNet(seed=1)
    reference = deepcopy(network)
    train(
        network, data, out=tmp_path, objective="natural", threat=THREAT, epochs=1, batch_size=13, select="last",
        awp={"gamma": gamma, "warmup": 0}, schedule={"name": "constant"},
        optimizer={"learning_rate": rate, "momentum": 0.0, "weight_decay": 0.0},
    )  # fmt: skip
    x, y = data.train.batch(torch.arange(13))
    names = [name for name, value in reference.named_parameters() if value.ndim > 1]
    values = dict(reference.named_parameters())
    F.cross_entropy(reference(x), y).backward()
    worst = {name: value.detach().clone() for name, value in values.items()}
    for name in names:
        gradient = values[name].grad
        worst[name] = worst[name] + gamma * values[name].detach().norm() * gradient / gradient.norm()
    moved = deepcopy(reference)
    moved.load_state_dict(worst)
    moved.zero_grad()
    F.cross_entropy(moved(x), y).backward()
    for (name, found), at_worst in zip(network.named_parameters(), moved.parameters(), strict=True):
        torch.testing.assert_close(found, values[name] - rate * at_worst.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_awp_waits_for_its_warm_up_and_counts_its_passes(tmp_path):
    def history(**changes: Any) -> list[tuple[float, float]]:
        run = distill(cnn(), splits(), teacher=cnn(1, 3), out=tmp_path / str(changes), **settings(**changes))
        return [(epoch.student_passes, epoch.teacher_passes) for epoch in run.history]

    # Two attack steps, then a look at x and one at x'; the teacher looks at x.
    assert history() == [(4.0, 1.0)] * 4
    assert history(awp={"gamma": 0.01, "warmup": 0.5}) == [(4.0, 1.0)] * 2 + [(6.0, 1.0)] * 2
    assert history(igdm=1.0) == [(5.0, 3.0)] * 4
    assert history(attack={"steps": 2, "loss": "adaad"}) == [(4.0, 3.0)] * 4
    assert history(attack={"steps": 2, "restarts": 3}) == [(11.0, 1.0)] * 4  # and a look at each restart's end


def test_a_pass_for_awp_leaves_no_trace_in_batch_norms():
    network = cnn().train()
    before = deepcopy(network.state_dict())
    with keeping_statistics(network):
        network(images(BATCH, dtype=torch.float32))
        assert any(not torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


# Averaged weights


def test_batch_norms_get_the_statistics_of_the_natural_training_images():
    network, data = cnn().eval(), splits(12).train
    modes = [module.training for module in network.modules()]
    norm = next(module for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    inputs: list[Tensor] = []
    handle = norm.register_forward_hook(lambda _, arguments, __: inputs.append(arguments[0]))
    reestimate_batch_norm(network, data, 4)
    handle.remove()
    assert len(inputs) == 3
    means = torch.stack([z.mean((0, 2, 3)) for z in inputs]).mean(0)
    variances = torch.stack([z.transpose(0, 1).flatten(1).var(1) for z in inputs]).mean(0)
    torch.testing.assert_close(norm.running_mean, means)
    torch.testing.assert_close(norm.running_var, variances)
    assert norm.momentum == 0.1
    assert [module.training for module in network.modules()] == modes


def test_batch_norms_get_the_same_statistics_from_images_sorted_by_class_as_from_mixed_ones():
    y = torch.arange(64) // 16
    x = (0.2 * y[:, None, None, None] + 0.2 * images(64, dtype=torch.float32)).clamp(0, 1)
    variances = {}
    for order in ("sorted", "mixed"):
        rows = torch.arange(64) if order == "sorted" else torch.randperm(64, generator=generator(3))
        network = cnn().eval()
        reestimate_batch_norm(network, ImageData(x[rows], y[rows]), 16)
        variances[order] = next(m for m in network.modules() if isinstance(m, nn.BatchNorm2d)).running_var
    torch.testing.assert_close(variances["sorted"], variances["mixed"], rtol=0.1, atol=0)


def test_swa_is_the_mean_of_the_ends_of_the_epochs_from_its_start_on(tmp_path):
    network = cnn()
    ends: list[dict[str, Tensor]] = []

    def listen(progress: Any) -> None:
        if progress.step % 3 == 0:
            ends.append(deepcopy(network.state_dict()))

    run = distill(network, splits(), teacher=cnn(1, 3), out=tmp_path, listener=listen, **settings(swa=0.5))
    found = run.model.state_dict()
    expected = {key: (ends[2][key] + ends[3][key]) / 2 for key in found if key.endswith(("weight", "bias"))}
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=key)
    again = deepcopy(run.model)
    reestimate_batch_norm(again, splits().train, 4)
    for key, value in again.state_dict().items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_before_its_start_the_average_is_the_student(tmp_path):
    network = cnn()
    run = distill(network, splits(), teacher=cnn(1, 3), out=tmp_path, **settings(swa=0.75))
    for key, value in network.named_parameters():
        torch.testing.assert_close(run.model.state_dict()[key], value, rtol=0, atol=0, msg=key)


def test_an_average_moves_by_its_share():
    first, second = TinyNet(seed=1), TinyNet(seed=2)
    expected = [
        0.75 * a.detach() + 0.25 * b.detach() for a, b in zip(first.parameters(), second.parameters(), strict=True)
    ]
    average(first, second, 0.25)
    for value, right in zip(first.parameters(), expected, strict=True):
        torch.testing.assert_close(value.detach(), right)


def test_two_ways_to_average_are_refused(tmp_path):
    with pytest.raises(InputError, match="ema and swa are two ways to average"):
        train(cnn(), splits(), out=tmp_path, **settings(objective="pgd_at", ema=0.9, swa=0.5))


# Teachers


def test_a_teacher_computes_faster_and_is_given_back_as_it_was(tmp_path):
    teacher = cnn(1, 3).train()
    next(teacher.parameters()).requires_grad_(False)
    flags = [parameter.requires_grad for parameter in teacher.parameters()]
    modes = [module.training for module in teacher.modules()]
    state = deepcopy(teacher.state_dict())
    distill(cnn(), splits(), teacher=teacher, out=tmp_path, **settings(attack={"steps": 2, "loss": "adaad"}))
    assert [parameter.requires_grad for parameter in teacher.parameters()] == flags
    assert [module.training for module in teacher.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in teacher.state_dict().items())
    assert not any("forward" in vars(module) for module in teacher.modules())


def test_a_second_teacher_where_one_is_enough_is_refused(tmp_path):
    with pytest.raises(InputError, match="objective rslad uses one teacher"):
        distill(cnn(), splits(), teacher=cnn(1), second_teacher=cnn(2), out=tmp_path, **settings())
