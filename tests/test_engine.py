import logging
import math
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crdnd import ImageData, Splits, ThreatModel, create_model, distill, train
from crdnd.attacks import pgd
from crdnd.counts import Count
from crdnd.engine import Validation
from crdnd.engine import loop as engine_loop
from crdnd.engine.schedule import learning_rate_factor
from crdnd.engine.settings import ScheduleSettings
from crdnd.engine.validate import validate
from crdnd.losses import cross_entropy, margin
from crdnd.random import Stream, permutation
from support import CLASSES, SHAPE, Recorder, TinyNet, images

torch.set_num_threads(1)  # networks this small wait for their threads more than they compute

THREAT = ThreatModel(norm="linf", eps=0.1)
# 13 images in batches of 4: three steps an epoch, one image left out of each.
COUNT, BATCH, STEPS_PER_EPOCH = 13, 4, 3


def splits(count: int = COUNT, dtype: torch.dtype = torch.float64) -> Splits:
    def part(size: int, seed: int) -> ImageData:
        return ImageData(images(size, seed=seed, dtype=dtype), torch.arange(size) % CLASSES, CLASSES)

    return Splits(part(count, 1), part(7, 2))


def cnn(seed: int = 0) -> nn.Module:
    return create_model("cnn", input_shape=SHAPE, num_classes=CLASSES, width=2, seed=seed)


def settings(**changes: Any) -> dict[str, Any]:
    return {"objective": "natural", "threat": THREAT, "epochs": 2, "batch_size": BATCH, "select": "last"} | changes


class Snapshots:
    """A listener that copies a module's state after every step."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.taken: list[dict[str, Tensor]] = []

    def __call__(self, progress: object) -> None:
        self.taken.append(deepcopy(self.module.state_dict()))


def scripted(monkeypatch: pytest.MonkeyPatch, *counts: tuple[int, int]) -> None:
    """Make the validations of a run give these (clean, robust) counts, one after the other."""
    answers = iter(counts)

    def answer(*_: object) -> Validation:
        clean, robust = next(answers)
        return Validation(clean=Count(correct=clean, n=99), robust=Count(correct=robust, n=99))

    monkeypatch.setattr(engine_loop, "validate", answer)


# The step


def softmax_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    p, q = p_logits.softmax(1), q_logits.softmax(1)
    return (p * (p / q).log()).sum(1)


def rslad_loss(student: nn.Module, teacher: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    target = teacher(x).detach()
    natural, attacked = softmax_divergence(target, student(x)), softmax_divergence(target, student(x_adv))
    return (natural / 6 + 5 * attacked / 6).mean()


def trades_loss(student: nn.Module, teacher: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    natural = student(x)
    return F.cross_entropy(natural, y) + 6 * softmax_divergence(natural, student(x_adv)).mean()


def plain_loop(
    student: nn.Module,
    teacher: nn.Module,
    data: ImageData,
    loss: Callable[..., Tensor],
    target: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    highest: float,
    seed: int,
) -> None:
    """What a run must amount to, in plain torch."""
    step, steps = 0, epochs * STEPS_PER_EPOCH
    for epoch in range(epochs):
        for ids in permutation(len(data), "order", seed, epoch).split(BATCH):
            if len(ids) < BATCH:
                continue
            x, y = data.x[ids], data.y[ids]
            fixed = target(x).detach()
            stream = Stream.of("train", seed, epoch, ids=ids)
            x_adv = pgd(
                lambda z, fixed=fixed: softmax_divergence(fixed, student(z)),
                x,
                THREAT,
                steps=3,
                step=0.25,
                start="gaussian",
                stream=stream,
            )
            for group in optimizer.param_groups:
                group["lr"] = highest * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.zero_grad()
            loss(student, teacher, x, x_adv, y).backward()
            optimizer.step()
            step += 1


OPTIMIZERS: dict[str, tuple[dict[str, Any], Callable[[nn.Module], torch.optim.Optimizer]]] = {
    "sgd": (
        {"learning_rate": 0.3, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01},
        lambda net: torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.8, nesterov=True, weight_decay=0.01),
    ),
    "adamw": (
        {"name": "adamw", "learning_rate": 0.01, "weight_decay": 0.1},
        lambda net: torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", ["rslad", "trades"])
def test_a_run_equals_a_plain_torch_loop(method, optimizer, tmp_path):
    values, make_optimizer = OPTIMIZERS[optimizer]
    student, plain, teacher, data = TinyNet(seed=1), TinyNet(seed=1), TinyNet(seed=2), splits()
    common = settings(objective=method, attack={"steps": 3}, optimizer=values, seed=5)
    if method == "rslad":
        run = distill(student, data, teacher=teacher, out=tmp_path / "run", **common)
    else:
        run = train(student, data, out=tmp_path / "run", **common)

    plain_loop(
        plain,
        teacher,
        data.train,
        {"rslad": rslad_loss, "trades": trades_loss}[method],
        teacher if method == "rslad" else plain,
        make_optimizer(plain),
        epochs=2,
        highest=values["learning_rate"],
        seed=5,
    )
    before, expected, found = TinyNet(seed=1).state_dict(), plain.state_dict(), run.model.state_dict()
    for key, value in expected.items():
        assert (found[key] - value).abs().max() <= 1e-12, key
        assert (value - before[key]).abs().max() > 1e-3, key


@pytest.mark.parametrize(
    ("method", "teacher_passes", "attack_mode"),
    [("ard", 1, "train"), ("rslad", 1, "eval"), ("iad", 2, "train"), ("crdnd", 2, "eval")],
)
def test_the_networks_run_as_often_as_the_method_looks_and_no_more(
    method, teacher_passes, attack_mode, tmp_path, monkeypatch
):
    scripted(monkeypatch, (1, 1))
    student, teacher = Recorder(TinyNet(seed=1)), Recorder(TinyNet(seed=2))
    common = settings(objective=method, attack={"steps": 3}, epochs=1, check_teacher=False)
    distill(student, splits(BATCH), teacher=teacher, out=tmp_path / "run", **common)
    look, freezing, outer = 1, 2, 2
    assert len(teacher.inputs) == look + freezing + teacher_passes
    assert len(student.inputs) == look + freezing + 3 + outer
    assert sum(student.modes) == outer + (3 if attack_mode == "train" else 0)


def test_the_attack_moves_batch_norm_statistics_only_in_train_mode(tmp_path):
    moves = {}
    for mode in ("train", "eval"):
        student = cnn()
        train(
            student,
            splits(BATCH, torch.float32),
            out=tmp_path / mode,
            **settings(objective="pgd_at", attack={"steps": 3, "mode": mode}, epochs=1),
        )
        moves[mode] = int(student.network.features[1].num_batches_tracked)
    assert moves == {"train": 3 + 1, "eval": 1}


@pytest.mark.parametrize("method", ["natural", "pgd_at", "trades"])
def test_a_layer_that_the_user_froze_stays_frozen(method, tmp_path):
    student = cnn().train()
    frozen, free = student.network.features[1], student.network.features[4]
    frozen.eval()
    statistics = frozen.running_mean.clone(), free.running_mean.clone()
    train(
        student,
        splits(dtype=torch.float32),
        out=tmp_path / "run",
        **settings(objective=method) | ({} if method == "natural" else {"attack": {"steps": 2}}),
    )
    assert torch.equal(frozen.running_mean, statistics[0])
    assert not torch.equal(free.running_mean, statistics[1])


def test_parameters_that_take_no_gradient_are_not_trained(tmp_path):
    student = TinyNet(seed=1)
    student.conv.weight.requires_grad_(False)
    train(student, splits(), out=tmp_path / "run", **settings())
    assert torch.equal(student.conv.weight, TinyNet(seed=1).conv.weight)
    assert not torch.equal(student.classifier.weight, TinyNet(seed=1).classifier.weight)


def test_an_incomplete_last_batch_is_left_out(tmp_path):
    student = Recorder(TinyNet(seed=1))
    train(student, splits(), out=tmp_path / "run", **settings())
    batches = [x for x, training in zip(student.inputs, student.modes, strict=True) if training]
    assert [len(x) for x in batches] == [BATCH] * STEPS_PER_EPOCH * 2
    seen = torch.cat(batches[:STEPS_PER_EPOCH]).flatten(1).unique(dim=0)
    assert len(seen) == BATCH * STEPS_PER_EPOCH


def test_the_gradient_is_clipped_to_a_norm(tmp_path):
    moves = {}
    for clip in (None, 0.01):
        student = TinyNet(seed=1)
        train(
            student,
            splits(BATCH),
            out=tmp_path / str(clip),
            **settings(
                epochs=1,
                clip_grad_norm=clip,
                optimizer={"learning_rate": 0.5, "momentum": 0.0, "weight_decay": 0.0},
                schedule={"name": "constant"},
            ),
        )
        old, new = TinyNet(seed=1).parameters(), student.parameters()
        moves[clip] = torch.cat([(b - a).detach().flatten() for a, b in zip(old, new, strict=True)])
    assert moves[None].norm() > 0.5 * 0.1
    assert moves[0.01].norm().item() == pytest.approx(0.5 * 0.01, rel=1e-3)
    assert F.cosine_similarity(moves[None], moves[0.01], dim=0).item() == pytest.approx(1, abs=1e-12)


class Tied(nn.Module):
    """Two layers that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(CLASSES, CLASSES), nn.Linear(CLASSES, CLASSES)
        self.second.weight = self.first.weight
        self.front = cnn()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(self.front(x))))


class Empty(nn.Sequential):
    """A module that counts as empty, and therefore as false."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.front = cnn(seed)

    def __len__(self) -> int:
        return 0

    def forward(self, x: Tensor) -> Tensor:
        return self.front(x)


@pytest.mark.parametrize("network", [cnn, Tied, Empty])
def test_averaged_weights_follow_their_formula(network, tmp_path):
    student, decay = network(), 0.3  # from the fourth step on
    start, steps = deepcopy(student.state_dict()), Snapshots(student)
    run = train(
        student,
        splits(dtype=torch.float32),
        out=tmp_path / "run",
        listener=steps,
        **settings(ema=decay, optimizer={"learning_rate": 0.3}),
    )
    found = run.model.state_dict()
    assert any("running_mean" in key for key in found)
    for key, value in start.items():
        if "running" in key or key.endswith("num_batches_tracked"):
            continue  # estimated anew for the averaged weights
        for step, state in enumerate(steps.taken):
            kept = min(decay, (1 + step) / (10 + step))
            value = kept * value + (1 - kept) * state[key] if value.is_floating_point() else state[key]
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=key)
    last = steps.taken[-1]
    assert all(not torch.equal(found[key], last[key]) for key in found if key.endswith(("weight", "running_mean")))


class Kinds(nn.Module):
    """Notes what its linear layer computes in, in train mode and in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.network = TinyNet(dtype=torch.float32)
        self.seen: set[tuple[bool, torch.dtype]] = set()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        self.seen.add((self.training, logits.dtype))
        return logits


def test_bf16_is_for_training_and_validation_stays_in_float32(tmp_path):
    student = Kinds()
    run = train(student, splits(dtype=torch.float32), out=tmp_path / "run", **settings(precision="bf16"))
    assert student.seen == {(True, torch.bfloat16), (False, torch.float32)}
    assert all(value.dtype == torch.float32 for value in run.model.state_dict().values())
    assert not torch.equal(student.network.conv.weight, TinyNet(dtype=torch.float32).conv.weight)


def test_the_attack_of_a_bf16_run_still_reaches_every_weight(tmp_path):
    # Casts made while no gradient is wanted must not be served to the pass that wants one.
    student, start = TinyNet(dtype=torch.float32), TinyNet(dtype=torch.float32)
    common = settings(objective="trades", attack={"steps": 2}, precision="bf16", epochs=1)
    train(student, splits(dtype=torch.float32), out=tmp_path / "run", **common)
    for new, old in zip(student.parameters(), start.parameters(), strict=True):
        assert not torch.equal(new, old)


# Schedules


def cosine(progress: float) -> float:
    return 0.5 + 0.5 * math.cos(math.pi * progress)


SCHEDULES: dict[str, tuple[dict[str, Any], Callable[[float], float]]] = {
    "cosine": ({"name": "cosine"}, cosine),
    "constant": ({"name": "constant"}, lambda p: 1.0),
    "step": (
        {"name": "step", "milestones": (0.25, 0.5), "factor": 0.2},
        lambda p: 1.0 if p < 0.25 else 0.2 if p < 0.5 else 0.04,
    ),
    "warmup": ({"name": "cosine", "warmup": 0.25}, lambda p: 4 * p if p < 0.25 else cosine((p - 0.25) / 0.75)),
    "warmup, then steps": (
        {"name": "step", "milestones": (0.5,), "factor": 0.1, "warmup": 0.25},
        lambda p: 4 * p if p < 0.25 else 1.0 if p < 0.5 else 0.1,
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_follows_its_formula(name):
    values, expected = SCHEDULES[name]
    for twelfth in range(12):
        factor = learning_rate_factor(ScheduleSettings(**values), twelfth / 12)
        assert factor == pytest.approx(expected(twelfth / 12), abs=1e-12), twelfth


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learning_rate_changes_with_every_step_and_is_recorded(name, tmp_path):
    values, expected = SCHEDULES[name]
    run = train(
        TinyNet(), splits(), out=tmp_path / "run", **settings(epochs=4, schedule=values, optimizer={"learning_rate": 2})
    )
    recorded = [epoch.learning_rate for epoch in run.history]
    assert recorded == pytest.approx([2 * expected((3 * epoch - 1) / 12) for epoch in (1, 2, 3, 4)], abs=1e-12)


# Seeds


def passes_of(tmp_path: Path, **changes: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The natural batches of a run, and the first points of its attacks."""
    values = torch.rand(12, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 2 + 0.25
    flat = ImageData(values[:, None, None, None].expand(-1, *SHAPE).clone(), torch.arange(12) % CLASSES, CLASSES)
    student = Recorder(TinyNet(seed=1))
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    common = settings(objective="trades", attack={"steps": 1, "mode": "train", "start": "uniform"}, epochs=1)
    train(student, Splits(flat, flat.subset(torch.arange(5))), out=folder, **common | changes)
    seen = [x for x, training in zip(student.inputs, student.modes, strict=True) if training]
    # A step passes: x for the attack, the attack's start, then x and x' for the loss.
    return seen[0::4], seen[1::4]


def which(batches: list[Tensor]) -> list[Tensor]:
    """Which images: they are flat, and moving one brings in zeros only."""
    return [x.flatten(1).amax(1) for x in batches]


def test_the_order_seed_changes_the_order_alone(tmp_path):
    (base, starts), (other, other_starts) = passes_of(tmp_path), passes_of(tmp_path, seeds={"order": 1})
    assert not torch.equal(torch.cat(which(base)), torch.cat(which(other)))
    assert torch.equal(torch.cat(which(base)).sort().values, torch.cat(which(other)).sort().values)

    def start_of_each_image(batches: list[Tensor], attacked: list[Tensor]) -> Tensor:
        return (torch.cat(attacked) - torch.cat(batches))[torch.cat(which(batches)).argsort()]

    # Draws belong to samples: whatever the order, an image is attacked from the same point.
    torch.testing.assert_close(start_of_each_image(base, starts), start_of_each_image(other, other_starts))


def test_the_attack_seed_changes_the_starts_alone(tmp_path):
    (base, starts), (other, other_starts) = passes_of(tmp_path), passes_of(tmp_path, seeds={"attack": 1})
    assert torch.equal(torch.stack(base), torch.stack(other))
    assert all(not torch.equal(a, b) for a, b in zip(starts, other_starts, strict=True))


def test_the_augmentation_seed_changes_the_augmentation_alone(tmp_path):
    base, _ = passes_of(tmp_path, augmentation="shift")
    other, _ = passes_of(tmp_path, augmentation="shift", seeds={"augment": 1})
    assert torch.equal(torch.cat(which(base)), torch.cat(which(other)))
    assert not torch.equal(torch.stack(base), torch.stack(other))


def test_the_seed_of_a_run_sets_all_that_are_not_given(tmp_path):
    every = {"order": 7, "augment": 7, "attack": 7}
    one = passes_of(tmp_path, augmentation="shift", seed=7)
    same = passes_of(tmp_path, augmentation="shift", seed=0, seeds=every)
    other = passes_of(tmp_path, augmentation="shift", seed=0)
    assert all(torch.equal(torch.stack(a), torch.stack(b)) for a, b in zip(one, same, strict=True))
    assert not torch.equal(torch.stack(one[0]), torch.stack(other[0]))


def test_every_epoch_has_its_own_order_and_its_own_draws(tmp_path):
    batches, starts = passes_of(tmp_path, epochs=2)
    first, second = torch.cat(which(batches[:3])), torch.cat(which(batches[3:]))
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, second.sort().values)
    moves = [(torch.cat(starts[i : i + 3]) - torch.cat(batches[i : i + 3])) for i in (0, 3)]
    assert not torch.equal(moves[0][first.argsort()], moves[1][second.argsort()])


# Validation and the choice of a checkpoint


class TwoWeaknesses(nn.Module):
    """Pixel 0 says what breaks a sample of label 0: below 1/4 cross-entropy alone, below 1/2 the margin alone.

    Up to 3/4 nothing does, and above that the prediction is wrong. Attacks can move the mean of all pixels, which
    random starts hardly move.
    """

    def forward(self, x: Tensor) -> Tensor:
        kind, s = x.flatten(1)[:, 0], x.flatten(1).mean(1) - 0.5
        zero = torch.zeros_like(s)
        # The runner-up is flat, so the margin has no slope; cross-entropy sees the third class and climbs.
        hidden = torch.stack([zero, zero - 1, 30 * s - 2], 1)
        # So sure that the slope of cross-entropy is exactly 0 in float32; the margin still has one.
        saturated = torch.stack([zero + 150, 2500 * s, zero - 999], 1)
        solid = torch.stack([zero + 1, s, zero], 1)
        wrong = torch.stack([zero, zero + 1, zero], 1)
        chosen = torch.where((kind < 0.25)[:, None], hidden, torch.where((kind < 0.5)[:, None], saturated, solid))
        return torch.where((kind > 0.75)[:, None], wrong, chosen)


# An attack of eps 0.09 cannot make one kind another.
KINDS = {"cross_entropy": 0.1, "margin": 0.4, "nothing": 0.6, "wrong": 0.9}


def weak_data(**counts: int) -> ImageData:
    kinds = torch.tensor([KINDS[kind] for kind, count in counts.items() for _ in range(count)])
    x = torch.full((len(kinds), 1, 20, 21), 0.5)
    x[:, 0, 0, 0] = kinds
    return ImageData(x, torch.zeros(len(x), dtype=torch.int64), 3)


SMALL = ThreatModel(norm="linf", eps=0.09)


def test_the_validation_metric_is_the_worst_case_of_each_sample():
    data = weak_data(cross_entropy=6, margin=5, nothing=3, wrong=2)
    model = TwoWeaknesses()

    def survivors(loss: Callable[[Tensor, Tensor], Tensor]) -> int:
        x_adv = pgd(lambda z: loss(model(z), data.y), data.x, SMALL, steps=10, step=0.25)
        return int((model(x_adv).argmax(1) == data.y).sum())

    assert (survivors(cross_entropy), survivors(margin)) == (5 + 3, 6 + 3)
    for batch_size in (4, 64):
        found = validate(model, data, SMALL, batch_size)
        assert found == Validation(clean=Count(correct=14, n=16), robust=Count(correct=3, n=16))


def test_validation_attacks_take_ten_quarter_steps_from_starts_that_are_always_the_same():
    model, data = Recorder(TinyNet(seed=4)), splits().train
    threat = ThreatModel(norm="linf", eps=0.001)
    first = validate(model, data, threat, 64), model.inputs
    model.inputs = []
    second = validate(model, data, threat, 64), model.inputs
    assert first[0] == second[0]
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))

    _, _, natural, *passes = first[1]  # two looks at what freezing changes
    assert len(natural) == len(data)
    assert len(passes) == 11 + 11
    for path in (passes[:11], passes[11:]):
        # Ten steps, the last of which is judged, from a start inside the ball that is not its middle.
        assert len(path[0]) > 0
        assert max((b - a).abs().amax().item() for a, b in pairwise(path)) == pytest.approx(0.001 / 4, abs=1e-9)
        nearest = (path[0][:, None] - natural).flatten(2).abs().amax(2).amin(1)
        assert 0.0005 < nearest.amin() <= nearest.amax() <= 0.001 + 1e-9


class Flattened(nn.Module):
    """Reshapes its batch as most networks do, which an empty batch does not survive."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(math.prod(SHAPE), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.view(x.size(0), -1))


def test_a_network_that_no_sample_withstands_is_validated_too(tmp_path):
    always_wrong = Flattened()
    nn.init.zeros_(always_wrong.linear.weight)
    always_wrong.linear.bias.data = -torch.arange(CLASSES).float()
    data = splits(dtype=torch.float32).train
    found = validate(always_wrong, ImageData(data.x, torch.ones_like(data.y), CLASSES), THREAT, BATCH)
    assert found == Validation(clean=Count(correct=0, n=COUNT), robust=Count(correct=0, n=COUNT))


@pytest.mark.parametrize(
    ("method", "counts", "best"),
    [
        ("pgd_at", [(9, 1), (5, 4), (8, 3), (7, 2)], 2),
        ("pgd_at", [(5, 1), (5, 4), (5, 4), (5, 2)], 2),
        ("pgd_at", [(5, 1), (5, 2), (5, 3), (5, 4)], 4),
        ("natural", [(1, 9), (5, 2), (8, 1), (7, 9)], 3),
        ("natural", [(8, 0), (8, 0), (7, 9), (6, 9)], 1),
    ],
)
@pytest.mark.parametrize("select", ["best", "last"])
def test_best_is_the_highest_and_the_earlier_of_equals(method, counts, best, select, tmp_path, monkeypatch):
    scripted(monkeypatch, *counts)
    student = TinyNet(seed=1)
    steps = Snapshots(student)
    attack = {"attack": {"steps": 1}} if method == "pgd_at" else {}
    common = settings(objective=method, epochs=4, select=select) | attack
    run = train(student, splits(), out=tmp_path / "run", listener=steps, **common)
    expected = {"best": steps.taken[3 * best - 1], "last": steps.taken[-1]}
    other = "last" if select == "best" else "best"
    assert run.best_epoch == best
    for model, label in ((run.model, select), (run.other, other)):
        assert not model.training
        for key, value in model.state_dict().items():
            assert torch.equal(value, expected[label][key]), (label, key)


def test_best_of_a_run_with_averaged_weights_is_averaged_too(tmp_path, monkeypatch):
    scripted(monkeypatch, (5, 5), (5, 1))
    student = TinyNet(seed=1)
    start, steps = deepcopy(student.state_dict()), Snapshots(student)
    run = train(student, splits(), out=tmp_path / "run", listener=steps, **settings(ema=0.5, select="best"))
    for key, value in start.items():
        for kept, state in zip((1 / 10, 2 / 11, 3 / 12), steps.taken[:3], strict=True):
            value = kept * value + (1 - kept) * state[key]
        torch.testing.assert_close(run.model.state_dict()[key], value, rtol=1e-12, atol=1e-12)


def test_validation_comes_every_so_many_epochs_and_at_the_end(tmp_path):
    run = train(TinyNet(), splits(), out=tmp_path / "run", **settings(epochs=5, validate_every=2))
    assert [epoch.validation is not None for epoch in run.history] == [False, True, False, True, True]


def test_the_history_holds_means_over_each_epoch(tmp_path):
    student, losses = TinyNet(seed=1), []
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    data = splits().train
    for epoch in range(2):
        for ids in permutation(COUNT, "order", 0, epoch).split(BATCH)[:STEPS_PER_EPOCH]:
            loss = F.cross_entropy(student(data.x[ids]), data.y[ids])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    plain = {"learning_rate": 0.1, "momentum": 0.0, "weight_decay": 0.0}
    common = settings(optimizer=plain, schedule={"name": "constant"})
    history = train(TinyNet(seed=1), splits(), out=tmp_path / "run", **common).history
    means = [sum(losses[:3]) / 3, sum(losses[3:]) / 3]
    assert [epoch.epoch for epoch in history] == [1, 2]
    assert [epoch.loss for epoch in history] == pytest.approx(means, rel=1e-12)
    assert [epoch.terms for epoch in history] == [pytest.approx({"ce_nat": mean}, rel=1e-12) for mean in means]


@pytest.mark.parametrize("ema", [None, 0.7])
def test_the_validation_in_the_history_is_that_of_the_weights_that_are_kept(ema, tmp_path):
    data = Splits(splits().train, ImageData(images(200, seed=2), torch.arange(200) % CLASSES, CLASSES))
    student = TinyNet(seed=1)
    common = settings(objective="trades", attack={"steps": 1}, epochs=4, ema=ema, optimizer={"learning_rate": 0.5})
    run = train(student, data, out=tmp_path / "run", **common)

    def judged(model: nn.Module) -> Validation:
        return validate(model, data.validation, THREAT, 64)

    assert judged(run.model) == run.history[-1].validation
    assert judged(run.other) == run.history[run.best_epoch - 1].validation
    if ema is not None:
        assert judged(student) != run.history[-1].validation


# What a run must leave alone


def test_the_teacher_is_neither_changed_nor_trained(tmp_path):
    teacher = cnn(seed=3).train()
    teacher.network.features[4].eval()
    teacher.network.classifier.bias.requires_grad_(False)
    state = deepcopy(teacher.state_dict())
    modes = [module.training for module in teacher.modules()]
    wanting = [parameter.requires_grad for parameter in teacher.parameters()]
    for method in ("ard", "crdnd"):
        distill(
            cnn(),
            splits(dtype=torch.float32),
            teacher=teacher,
            out=tmp_path / method,
            **settings(objective=method, attack={"steps": 2}),
        )
    assert all(torch.equal(value, state[key]) for key, value in teacher.state_dict().items())
    assert [module.training for module in teacher.modules()] == modes
    assert [parameter.requires_grad for parameter in teacher.parameters()] == wanting
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_teacher_that_counts_as_empty_teaches_too(tmp_path):
    common = {"data": splits(dtype=torch.float32), **settings(objective="rslad", attack={"steps": 2})}
    runs = [
        distill(cnn(), teacher=teacher, out=tmp_path / str(index), **common)
        for index, teacher in enumerate((Empty(seed=3), cnn(seed=3)))
    ]
    for key, value in runs[0].model.state_dict().items():  # up to rounding: wrapped, it is computed in another way
        torch.testing.assert_close(value, runs[1].model.state_dict()[key])


def test_the_teacher_predicts_in_eval_mode_whatever_mode_it_came_in(tmp_path):
    teacher = Recorder(cnn(seed=3)).train()
    common = settings(objective="crdnd", attack={"steps": 2})
    distill(cnn(), splits(dtype=torch.float32), teacher=teacher, out=tmp_path / "run", **common)
    assert not any(teacher.modes)


def global_state() -> dict[str, Any]:
    log = logging.getLogger("crdnd")
    return {
        "random": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "handlers": list(log.handlers),
        "level": log.level,
    }


def test_a_run_leaves_the_state_of_the_process_alone(tmp_path):
    torch.rand(3)
    before = global_state()
    train(cnn(), splits(dtype=torch.float32), out=tmp_path / "run", **settings())
    assert global_state() == before
    train(cnn(), splits(dtype=torch.float32), out=tmp_path / "run", **settings())
    assert global_state() == before


def test_the_state_of_the_process_does_not_reach_a_run(tmp_path):
    weights = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        student = nn.Sequential(TinyNet(seed=1), nn.Dropout(0.5))
        run = train(student, splits(), out=tmp_path / str(seed), **settings())
        weights.append(run.model.state_dict())
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
