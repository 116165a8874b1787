import dataclasses
import json
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from crdnd import ImageData, InputError, Results, RunError, ThreatModel, create_model, evaluate, predict
from crdnd.attacks import Attack, Round, attack_names, attack_stream, load_attack
from crdnd.config import build
from crdnd.counts import Count
from crdnd.evaluation import (
    PRESETS,
    TABLE_ATTACKS,
    Label,
    Row,
    Step,
    choose_attacks,
    combine,
    examples,
    make_protocol,
    preset,
    worst_case,
)
from crdnd.evaluation import _batch_size as sizes
from crdnd.models import weights_sha256
from support import CLASSES, SHAPE, RankOneVictim, Recorder, TinyNet, images

torch.set_num_threads(1)  # networks this small wait for their threads more than they compute

THREAT = ThreatModel(norm="linf", eps=0.05)


def data(count: int = 13, dtype: torch.dtype = torch.float64) -> ImageData:
    return ImageData(images(count, dtype=dtype), torch.arange(count) % CLASSES, CLASSES, name="dots")


def labelled(model: nn.Module, count: int = 41, dtype: torch.dtype = torch.float64) -> ImageData:
    """Images that the model gets right, but for every sixth one."""
    x = images(count, dtype=dtype)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::6] = (y[::6] + 1) % CLASSES
    return ImageData(x, y, CLASSES, name="dots")


@dataclass(frozen=True, kw_only=True)
class Watched(Attack):
    """An attack of the registry that keeps what it made, and for which samples; judged as the tables' attacks are."""

    inner: Attack
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Ids and images of each call."""

    judged_on_all: ClassVar[bool] = True

    def rounds(self, num_classes: int) -> list[Round]:
        def watch(part: Round) -> Round:
            def search(model, x, y, threat, stream):
                found = part.search(model, x, y, threat, stream)
                self.seen.append((stream.ids, found))
                return found

            return Round(part.attack, part.index, search)

        return [watch(part) for part in self.inner.rounds(num_classes)]

    def settings(self) -> dict[str, Any]:
        return self.inner.settings()


def watched(name: str) -> Watched:
    return Watched(summary="", paper="", inner=load_attack(name))


class Threshold(nn.Module):
    """Two classes; class 1 where the mean of the pixels lies above 1/2. Its robustness is a matter of arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(40.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        s = self.slope * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([-s, s], 1)


def greys(*values: float, labels: tuple[int, ...]) -> ImageData:
    x = torch.tensor(values, dtype=torch.float64)[:, None, None, None].expand(-1, 1, 4, 7).clone()
    return ImageData(x, torch.tensor(labels), 2)


# Counts


@pytest.mark.parametrize("attack", TABLE_ATTACKS)
def test_counts_of_a_linear_model_are_those_of_arithmetic(attack):
    # Distances from the border at 1/2: two within eps 0.05 on each side, three beyond it, and one wrong from the start.
    values = (0.46, 0.49, 0.51, 0.54, 0.40, 0.44, 0.56, 0.30)
    sample = greys(*values, labels=(0, 0, 1, 1, 0, 0, 1, 1))
    results = evaluate(Threshold(), sample, threat=THREAT, attacks=[attack])
    (row,) = results.rows
    assert row.clean == Count(correct=7, n=8)
    assert row.attacks == {attack: Count(correct=3, n=8)}
    assert row.worst_case == Count(correct=3, n=8)


def test_the_worst_case_is_that_of_each_sample_and_not_of_each_attack():
    clean = torch.tensor([True, True, True, True, False])
    one, other = torch.tensor([True, True, False, False, True]), torch.tensor([False, False, True, True, True])
    assert worst_case(clean, [one, other]).tolist() == [False] * 5
    assert worst_case(clean, [one]).tolist() == [True, True, False, False, False]
    assert worst_case(clean, []).tolist() == clean.tolist()


class TwoSided(nn.Module):
    """Samples with pixel 0 below 1/2 fall to cross-entropy alone, the others to the margin alone.

    Attacks can move the mean of all pixels, which random starts hardly move.
    """

    def forward(self, x: Tensor) -> Tensor:
        s, zero = x.flatten(1).mean(1) - 0.5, torch.zeros(len(x))
        # The runner-up is flat, so the margin has no slope; cross-entropy sees the third class and climbs.
        hidden = torch.stack([zero, zero - 1, 60 * s - 2], 1)
        # So sure that the slope of cross-entropy is exactly 0 in float32; the margin still has one.
        saturated = torch.stack([zero + 150, 5000 * s, zero - 999], 1)
        return torch.where((x.flatten(1)[:, 0] < 0.5)[:, None], hidden, saturated)


def test_two_attacks_that_break_different_halves_leave_nothing():
    x = torch.full((10, 1, 20, 21), 0.5)
    x[:, 0, 0, 0] = torch.tensor([0.2, 0.8] * 5)
    sample = ImageData(x, torch.zeros(10, dtype=torch.int64), 3)
    (row,) = evaluate(TwoSided(), sample, threat=THREAT, attacks=["pgd_sat", "cw_inf"]).rows
    assert row.clean.correct == 10
    assert {name: count.correct for name, count in row.attacks.items()} == {"pgd_sat": 5, "cw_inf": 5}
    assert row.worst_case == Count(correct=0, n=10)


@pytest.mark.parametrize("model", [TinyNet(seed=2), RankOneVictim(CLASSES)], ids=["curved", "linear"])
def test_verdicts_do_not_depend_on_the_batch(model):
    sample = data(40)
    whole, parts = (evaluate(model, sample, threat=THREAT, batch_size=size) for size in (64, 7))
    assert whole == parts


def test_images_do_not_depend_on_the_neighbours():
    sample, seen = data(40), {}
    for size in (64, 7):
        attack = watched("pgd_sat")
        evaluate(TinyNet(seed=2), sample, threat=THREAT, attacks={"pgd_sat": attack}, batch_size=size)
        ids, found = (torch.cat(parts) for parts in zip(*attack.seen, strict=True))
        assert torch.equal(ids, torch.arange(40))
        seen[size] = found
        assert len(attack.seen) == math.ceil(40 / size)
    assert torch.equal(seen[64], seen[7])


def test_the_starts_are_drawn_for_the_seed_the_attack_the_restart_and_the_sample():
    def first_points(seed: int) -> list[Tensor]:
        recorder, firsts = Recorder(TinyNet(seed=2)), []

        def listen(step: Step) -> None:
            if step.column == "pgd_sat":
                firsts.append(recorder.inputs[-21])  # 20 steps, the first of which looks at the start, and the verdict

        attacks = {"pgd_sat": {"restarts": 2}}
        evaluate(recorder, sample, threat=THREAT, attacks=attacks, seed=seed, listener=listen)
        return firsts

    sample = labelled(TinyNet(seed=2), 13)
    for seed in (0, 1):
        found = first_points(seed)
        ids = torch.arange(13)
        expected = THREAT.start(sample.x, "uniform", attack_stream(seed, ids).child("pgd_sat", 0))
        assert torch.equal(found[0], expected)
        (row,) = evaluate(TinyNet(seed=2), sample, threat=THREAT, attacks=["pgd_sat"], seed=seed).rows
        standing = torch.tensor([character == "1" for character in row.verdicts["pgd_sat"]])
        again = THREAT.start(sample.x, "uniform", attack_stream(seed, ids).child("pgd_sat", 1))
        assert torch.equal(found[1], again[standing])
        assert 0 < standing.sum() < 13
    assert not torch.equal(first_points(0)[0], first_points(1)[0])


def test_a_verdict_needs_the_same_class_and_every_attack_sees_every_image():
    recorder, passes = Recorder(Threshold()), []
    sample = greys(0.3, 0.7, 0.49, 0.3, 0.7, labels=(1, 0, 0, 0, 1))

    def listen(step: Step) -> None:
        passes.append((step.column, [len(x) for x in recorder.inputs]))
        recorder.inputs.clear()

    (row,) = evaluate(recorder, sample, threat=THREAT, attacks=["fgsm", "cw_inf"], listener=listen).rows
    # The natural pass after the looks; then one step and 30 steps with a verdict each, always on all five images.
    assert passes[0][0] == "clean"
    assert passes[0][1][-1] == 5
    assert passes[1:] == [("fgsm", [5] * 2), ("cw_inf", [5] * 31)]
    assert row.clean.correct == 3
    assert row.worst_case.correct == 2


# Verdicts

SMALL = {"apgd_ce": {"iterations": 7}, "apgd_t": {"iterations": 5, "targets": 2}, "square": {"queries": 20}}


def small_autoattack() -> Attack:
    """Its four parts with few iterations."""
    settings = SMALL | {"fab_t": {"iterations": 4, "targets": 2}}
    parts = tuple(choose_attacks({name: settings[name]})[name] for name in ("apgd_ce", "apgd_t", "fab_t", "square"))
    return dataclasses.replace(load_attack("autoattack"), parts=parts)


WEAK = ThreatModel(norm="linf", eps=0.01)


@pytest.fixture(scope="module")
def judged() -> Row:
    model = TinyNet(seed=2)
    attacks = {"fgsm": {}, "square": {"queries": 20}, "autoattack": small_autoattack(), "cw_inf": {"steps": 3}}
    (row,) = evaluate(model, labelled(model), threat=WEAK, attacks=attacks, per_class=True, batch_size=9).rows
    return row


def test_there_is_a_verdict_for_every_sample_attack_and_part(judged):
    parts = [f"autoattack/{part}" for part in ("apgd_ce", "apgd_t", "fab_t", "square")]
    assert set(judged.verdicts) == {"clean", "fgsm", "square", "autoattack", "cw_inf", *parts}
    assert {len(text) for text in judged.verdicts.values()} == {41}
    assert judged.verdicts["clean"] == "".join("0" if index % 6 == 0 else "1" for index in range(41))


def test_counts_are_those_of_the_verdicts(judged):
    assert judged.clean == Count(correct=judged.verdicts["clean"].count("1"), n=41)
    assert list(judged.attacks) == ["fgsm", "square", "autoattack", "cw_inf"]
    for name, count in judged.attacks.items():
        assert count == Count(correct=judged.verdicts[name].count("1"), n=41)
        assert 0 < count.correct < judged.clean.correct, name  # else these tests would show little
    assert judged.worst_case == Count(correct=judged.stands().count("1"), n=41)


def test_table_attacks_judge_every_image_and_the_others_what_is_right(judged):
    clean = judged.verdicts["clean"]
    for name in ("fgsm", "cw_inf"):
        assert set(judged.verdicts[name]) == {"0", "1"}, name
    for name in ("square", "autoattack"):
        assert all((a == ".") == (b == "0") for a, b in zip(judged.verdicts[name], clean, strict=True)), name


def test_a_part_of_autoattack_judges_what_the_parts_before_left_standing(judged):
    before = judged.verdicts["clean"]
    for part in ("apgd_ce", "apgd_t", "fab_t", "square"):
        verdicts = judged.verdicts[f"autoattack/{part}"]
        assert all((a == ".") == (b != "1") for a, b in zip(verdicts, before, strict=True)), part
        before = verdicts
    assert [a == "1" for a in before] == [a == "1" for a in judged.verdicts["autoattack"]]


def test_a_sample_stands_if_it_is_right_naturally_and_under_every_attack(judged):
    columns = [judged.verdicts[name] for name in ("clean", "fgsm", "square", "autoattack", "cw_inf")]
    assert judged.stands() == "".join(
        "1" if all(character == "1" for character in sample) else "0" for sample in zip(*columns, strict=True)
    )
    fewest = min(count.correct for count in judged.attacks.values())
    assert judged.worst_case.correct <= fewest


def test_classes_add_up_to_the_whole(judged):
    model = TinyNet(seed=2)
    y, stands = labelled(model).y.tolist(), judged.stands()
    assert set(judged.per_class) == {str(label) for label in set(y)}
    for label, counts in judged.per_class.items():
        members = [index for index, value in enumerate(y) if str(value) == label]
        assert counts.clean == Count(correct=sum(judged.verdicts["clean"][i] == "1" for i in members), n=len(members))
        assert counts.worst_case == Count(correct=sum(stands[i] == "1" for i in members), n=len(members))
    assert sum(counts.clean.correct for counts in judged.per_class.values()) == judged.clean.correct
    assert sum(counts.worst_case.correct for counts in judged.per_class.values()) == judged.worst_case.correct
    assert sum(counts.clean.n for counts in judged.per_class.values()) == 41


def test_classes_are_counted_on_request_only():
    (row,) = evaluate(TinyNet(seed=2), data(), threat=THREAT, attacks=["fgsm"]).rows
    assert row.per_class == {}
    assert row.sweep == []


@pytest.mark.parametrize("seed", [0, 3])
def test_other_attacks_beside_it_change_no_verdict_of_an_attack(seed):
    model = TinyNet(seed=2)

    def verdicts(*names: str) -> dict[str, str]:
        attacks = {name: SMALL.get(name, {}) for name in names}
        (row,) = evaluate(model, labelled(model), threat=WEAK, attacks=attacks, seed=seed).rows
        return row.verdicts

    together = verdicts("apgd_t", "fgsm", "square", "pgd_sat")
    for name in ("apgd_t", "fgsm", "square", "pgd_sat"):
        assert verdicts(name)[name] == together[name]


def test_restarts_only_ever_break_more():
    model = TinyNet(seed=2)
    once, often = (
        evaluate(model, labelled(model), threat=WEAK, attacks={"square": {"queries": 3, "restarts": restarts}}).rows[0]
        for restarts in (1, 6)
    )
    pairs = list(zip(once.verdicts["square"], often.verdicts["square"], strict=True))
    assert set(pairs) == {("1", "1"), ("1", "0"), ("0", "0"), (".", ".")}


# More eps


def test_a_sweep_of_a_linear_model_is_arithmetic():
    # Distances from the border at 1/2: 0.02, 0.02, 0.04, 0.06, 0.06 and 0.09; the last sample is wrong from the start.
    sample = greys(0.48, 0.52, 0.54, 0.44, 0.56, 0.59, 0.3, labels=(0, 1, 1, 0, 1, 1, 1))
    (row,) = evaluate(
        Threshold(), sample, threat=THREAT, attacks=["fgsm", "cw_inf"], eps_sweep=(0.05, 0.01, 0.08, 0.03, 0.1)
    ).rows
    assert [(point.eps, point.worst_case.correct) for point in row.sweep] == [
        (0.01, 6), (0.03, 4), (0.05, 3), (0.08, 1), (0.1, 0),
    ]  # fmt: skip
    assert {point.worst_case.n for point in row.sweep} == {7}
    assert row.worst_case.correct == 3


def test_a_sweep_at_the_eps_itself_finds_what_the_attacks_found(judged):
    model = TinyNet(seed=2)
    attacks = {"fgsm": {}, "square": {"queries": 20}, "cw_inf": {"steps": 3}}
    (row,) = evaluate(model, labelled(model), threat=WEAK, attacks=attacks, eps_sweep=(0.01,)).rows
    assert row.sweep[0].worst_case == row.worst_case


def test_a_sweep_only_ever_falls_and_attacks_only_what_still_stands():
    model, steps = TinyNet(seed=2), list[Step]()
    (row,) = evaluate(
        model, labelled(model), threat=WEAK, attacks={"fgsm": {}, "square": {"queries": 4}},
        eps_sweep=(0.02, 0.003, 0.006, 0.012), listener=steps.append,
    ).rows  # fmt: skip
    counts = [point.worst_case.correct for point in row.sweep]
    assert counts == sorted(counts, reverse=True)
    assert row.clean.correct > counts[0] > counts[-1]
    attacked = [(step.column, step.samples) for step in steps if step.column.startswith("eps:")]
    assert [column for column, _ in attacked] == [
        f"eps:{eps}/{name}" for eps in (0.003, 0.006, 0.012, 0.02) for name in ("fgsm", "square")
    ]
    assert [samples for column, samples in attacked if column.endswith("fgsm")] == [row.clean.correct, *counts[:-1]]
    assert not any(name.startswith("eps:") for name in row.verdicts)


def test_an_eps_of_a_sweep_is_checked_as_any_other():
    with pytest.raises(InputError, match=r"eps=8 .*write 8/255"):
        evaluate(TinyNet(), data(), threat=THREAT, attacks=["fgsm"], eps_sweep=(0.1, 8))


# Batches


@dataclass(frozen=True, kw_only=True)
class TwoRounds(Attack):
    """Breaks every sample with an even number in the first round, by a jump that is legal for a constant model."""

    batches: list[tuple[int, int]] = field(default_factory=list)
    """Round and batch size."""

    def rounds(self, num_classes: int) -> list[Round]:
        def searching(number: int) -> Round:
            def search(model, x, y, threat, stream):
                self.batches.append((number, len(x)))
                even = (stream.ids % 2 == 0)[:, None, None, None]
                return torch.where(even, 1 - x, x) if number == 0 else x

            return Round(self.name, number, search)

        return [searching(0), searching(1), searching(2)]

    def settings(self) -> dict[str, Any]:
        return {}


def test_survivors_are_attacked_in_full_batches():
    sample = greys(*[0.4 if i % 3 else 0.6 for i in range(45)], labels=tuple(int(i % 3 == 0) for i in range(45)))
    attack = TwoRounds(summary="", paper="")
    (row,) = evaluate(Threshold(), sample, threat=ThreatModel(eps=0.3), attacks={"jump": attack}, batch_size=8).rows
    first, survivors = [8, 8, 8, 8, 8, 5], [8, 8, 6]
    assert attack.batches == [*((0, size) for size in first), *((i, size) for i in (1, 2) for size in survivors)]
    assert row.verdicts["jump"] == "".join("0" if index % 2 == 0 else "1" for index in range(45))


@dataclass(frozen=True, kw_only=True)
class Returning(Attack):
    """Hands in what it is told to."""

    change: Callable[[Tensor], Tensor]

    def rounds(self, num_classes: int) -> list[Round]:
        return [Round(self.name, 0, lambda model, x, y, threat, stream: self.change(x))]


ILLEGAL: dict[str, Callable[[Tensor], Tensor]] = {
    "too far": lambda x: (x + 0.06 * (1 - 2 * (x > 0.5))).clamp(0, 1),
    "one pixel of one sample too far": lambda x: x.index_put(
        (torch.tensor(3), *torch.zeros(3, 1).long()), 1 - x[3, 0, 0, 0]
    ),
    "outside the box": lambda x: x.clamp(max=0.5).sub(0.5).clamp(min=-0.04).where(x < 0.04, x),
    "NaN": lambda x: torch.full_like(x, torch.nan),
    "one NaN": lambda x: x.index_put((torch.tensor(3), *torch.zeros(3, 1).long()), torch.tensor(torch.nan).double()),
    "infinite": lambda x: torch.full_like(x, torch.inf),
}


@pytest.mark.parametrize("how", ILLEGAL)
def test_an_attack_that_makes_an_illegal_image_ends_the_evaluation(how):
    model = TinyNet(seed=2)
    with pytest.raises(RunError, match=r"^cheat: made an image outside linf eps=0\.05") as caught:
        evaluate(
            model,
            labelled(model),
            threat=THREAT,
            attacks={"cheat": Returning(change=ILLEGAL[how], summary="", paper="")},
        )
    assert "\n" not in str(caught.value)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_attack_that_does_nothing_breaks_nothing():
    model = TinyNet(seed=2)
    attack = Returning(change=lambda x: x, summary="", paper="")
    (row,) = evaluate(model, labelled(model), threat=THREAT, attacks={"idle": attack}).rows
    assert row.attacks["idle"] == row.clean == row.worst_case


def test_the_verdict_is_that_of_the_labels_and_not_of_the_attack():
    # Images of another class, a legal distance away: what counts is what the model says to them.
    sample = greys(0.48, 0.52, 0.4, 0.6, 0.3, labels=(0, 1, 0, 1, 1))
    attack = Returning(change=lambda x: torch.where(x < 0.5, x + 0.05, x - 0.05), summary="", paper="")
    (row,) = evaluate(Threshold(), sample, threat=THREAT, attacks={"over": attack}).rows
    assert row.verdicts == {"clean": "11110", "over": "0011."}


OUT_OF_MEMORY = "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"


class OwnConv(nn.Conv2d):
    """Any convolution but torch's own, so that no probe of 8 images is taken of it."""


class Cramped(nn.Module):
    """Has no memory for more than so many images at once."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.network, self.most = TinyNet(seed=2), most
        self.network.conv.__class__ = OwnConv
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        if len(x) > self.most:
            raise RuntimeError(OUT_OF_MEMORY)
        return self.network(x)


def test_without_enough_memory_batches_are_halved_and_verdicts_are_the_same(caplog, tmp_path):
    attacks = {"fgsm": {}, "autoattack": small_autoattack(), "cw_inf": {"steps": 3}}
    model, steps = Cramped(8), list[Step]()
    sample = labelled(model.network)
    common: dict[str, Any] = {"threat": WEAK, "attacks": attacks, "eps_sweep": (0.02,), "batch_size": 30}
    with caplog.at_level("WARNING", logger="crdnd"):
        (row,) = evaluate(model, sample, listener=steps.append, work=tmp_path, **common).rows
    assert [size for size in model.seen if size > 8][:2] == [30, 15]
    assert [record.getMessage() for record in caplog.records] == [
        f"out of memory: {OUT_OF_MEMORY}; going on with {size} images at once" for size in (15, 7)
    ]
    assert [step.done for step in steps if step.column == "fgsm"] == [7, 14, 21, 28, 35, 41]
    (plain,) = evaluate(Cramped(41), sample, **common).rows
    (again,) = evaluate(Cramped(8), sample, work=tmp_path, **common).rows  # nothing is left to do but the checks
    for found in (row, again):
        assert found.verdicts == plain.verdicts
        assert found.sweep == plain.sweep
        for check, other in zip(found.checks, plain.checks, strict=True):  # some look at more images at once
            assert check == other.model_copy(update={"number": pytest.approx(other.number)})


def test_memory_that_runs_out_in_the_middle_of_a_round_costs_one_batch_there():
    model, steps = Cramped(41), list[Step]()

    def listen(step: Step) -> None:
        steps.append(step)
        if step.column == "cw_inf" and step.done == 12:
            model.most = 5

    sample = labelled(model.network)
    (row,) = evaluate(model, sample, threat=WEAK, attacks=["cw_inf"], batch_size=12, listener=listen).rows
    assert [step.done for step in steps if step.column == "cw_inf"] == [12, 15, 18, 21, 24, 27, 30, 33, 36, 39, 41]
    (plain,) = evaluate(model.network, sample, threat=WEAK, attacks=["cw_inf"]).rows
    assert row.verdicts == plain.verdicts


@pytest.mark.parametrize("column", ["clean", "fgsm"])
def test_memory_that_is_never_enough_is_one_line(column):
    model = Cramped(41)
    sample = labelled(model.network, 12)

    def listen(step: Step) -> None:
        if step.column == column:  # then comes the attack, or after it the checks
            model.most = 0
            model.seen.clear()

    with pytest.raises(RunError, match=r"^out of memory \(.*can't allocate memory\); take a smaller model") as caught:
        evaluate(model, sample, threat=WEAK, attacks=["fgsm"], batch_size=30, listener=listen)
    assert "\n" not in str(caught.value)
    if column == "clean":
        assert model.seen == [12, 6, 3, 1]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_other_errors_of_a_model_are_its_own(caplog):
    class Wrong(Cramped):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > self.most:
                raise RuntimeError("shapes cannot be multiplied")
            return super().forward(x)

    model = Wrong(7)
    with pytest.raises(RuntimeError, match=r"^shapes cannot be multiplied"):
        evaluate(model, data(), threat=WEAK, attacks=["fgsm"])
    assert not caplog.records


class Hungry(nn.Module):
    """Keeps as many images' worth of activations as it is told to."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.layers):
            x = x.sin()
        return x.flatten(1)[:, :CLASSES]


@pytest.mark.parametrize("free", [0, 1, 10**4, 10**6, 3 * 10**6, 10**7, 10**12])
def test_an_automatic_batch_is_a_power_of_two_between_8_and_512(free, monkeypatch):
    monkeypatch.setattr(sizes, "_free", lambda device: free)
    found = [sizes.batch_size_that_fits(Hungry(layers), data()) for layers in (1, 10, 100)]
    assert set(found) <= {8, 16, 32, 64, 128, 256, 512}
    assert found == sorted(found, reverse=True)
    if free <= 10**4:
        assert found == [8, 8, 8]
    if free == 10**12:
        assert found == [512, 512, 512]


def test_an_automatic_batch_is_smaller_for_a_model_that_keeps_more(monkeypatch):
    monkeypatch.setattr(sizes, "_free", lambda device: 8 * 10**6)
    small, large = (sizes.batch_size_that_fits(Hungry(layers), data()) for layers in (1, 100))
    assert 8 < large < small < 512
    # 84 pixels of 8 bytes: twice the activations and a dozen states within two fifths of what is free.
    for layers, size in ((1, small), (100, large)):
        one = (2 * layers + 12) * 84 * 8
        assert size * one <= 0.4 * 8e6 < 2 * size * one


def test_an_automatic_batch_gives_the_verdicts_of_any_other():
    model = TinyNet(seed=2)
    found = [evaluate(model, labelled(model), threat=WEAK, attacks=["fgsm"], batch_size=size) for size in ("auto", 5)]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, table I, method 3: 81/263, 15/148, 0/20 and 1/29.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_intervals_are_wilsons(correct, n, low, high):
    found = Count(correct=correct, n=n).interval()
    assert found == pytest.approx((100 * low, 100 * high), abs=0.006)
    mirrored = Count(correct=n - correct, n=n).interval()
    assert mirrored == pytest.approx((100 - found[1], 100 - found[0]), abs=1e-9)


# The document


def test_results_have_the_fields_of_their_format():
    label = Label("rslad", "student", 3, "best")
    model = create_model("cnn", input_shape=SHAPE, num_classes=CLASSES, width=2)
    results = evaluate(model, data(dtype=torch.float32), threat=THREAT, attacks=["fgsm", "cw_inf"], label=label)
    document = json.loads(results.to_json())
    assert set(document) == {"schema", "protocol", "rows"}
    assert document["schema"] == "crdnd.results/1"
    (row,) = document["rows"]
    assert set(row) == {
        "method", "role", "model", "params", "seed", "checkpoint", "n", "clean", "attacks", "worst_case",
        "verdict", "checks", "notes", "sweep", "per_class", "verdicts", "model_sha256",
    }  # fmt: skip
    assert set(row["verdicts"]) == {"clean", "fgsm", "cw_inf"}
    assert row["notes"] == []
    assert row["verdict"].startswith(("consistent", "suspicious because "))
    assert {tuple(check) for check in row["checks"]} == {
        ("name", "number", "threshold", "suspicious", "says", "advice")
    }
    assert {key: row[key] for key in ("method", "role", "model", "params", "seed", "checkpoint", "n")} == {
        "method": "rslad",
        "role": "student",
        "model": "cnn(width=2)",
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "seed": 3,
        "checkpoint": "best",
        "n": 13,
    }
    assert set(row["attacks"]) == {"fgsm", "cw_inf"}
    for count in (row["clean"], row["worst_case"], *row["attacks"].values()):
        assert set(count) == {"correct", "n"}
        assert 0 <= count["correct"] <= count["n"] == 13
    assert row["model_sha256"] == weights_sha256(model)
    protocol = document["protocol"]
    assert {key: protocol[key] for key in ("data", "split", "n", "norm", "eps", "seed")} == {
        "data": "dots", "split": "test", "n": 13, "norm": "linf", "eps": 0.05, "seed": 0,
    }  # fmt: skip
    assert protocol["attacks"]["cw_inf"] == {
        "steps": 30, "step": 0.25, "start": "uniform", "loss": "margin", "restarts": 1,
    }  # fmt: skip
    assert isinstance(protocol["fingerprint"], str)
    assert build(Results, document) == results


def protocol(**changes: Any) -> str:
    values = {"data": data(), "threat": THREAT, "attacks": ("fgsm", "cw_inf"), "seed": 0, "split": "test"} | changes
    return make_protocol(**values).fingerprint


def test_the_fingerprint_is_that_of_everything_but_the_model():
    relabelled = ImageData(data().x, data().y.flip(0), CLASSES, name="dots")
    others = {
        "eps": protocol(threat=ThreatModel(norm="linf", eps=0.051)),
        "norm": protocol(threat=ThreatModel(norm="l2", eps=0.05)),
        "seed": protocol(seed=1),
        "split": protocol(split="validation"),
        "attacks": protocol(attacks=("fgsm", "pgd_sat")),
        "more attacks": protocol(attacks=("fgsm", "cw_inf", "pgd_sat")),
        "pixels": protocol(data=ImageData(images(13, seed=1), data().y, CLASSES, name="dots")),
        "labels": protocol(data=relabelled),
        "order": protocol(data=data().subset(torch.arange(13).flip(0))),
        "fewer samples": protocol(data=data(12)),
        "settings": protocol(attacks={"fgsm": {}, "cw_inf": {"steps": 31}}),
        "restarts": protocol(attacks={"fgsm": {}, "cw_inf": {"restarts": 2}}),
    }
    assert len({protocol(), *others.values()}) == 1 + len(others), others
    assert protocol() == protocol()


def test_the_fingerprint_is_that_of_the_sweep_and_the_checks_too():
    model = TinyNet(seed=2)

    def fingerprint(**changes: Any) -> str:
        return evaluate(model, data(), threat=WEAK, **{"attacks": ["fgsm"], **changes}).protocol.fingerprint

    found = {
        "plain": fingerprint(),
        "sweep": fingerprint(eps_sweep=(0.02,)),
        "other sweep": fingerprint(eps_sweep=(0.02, 0.03)),
        "settings": fingerprint(attacks={"square": {"queries": 2}}),
        "other settings": fingerprint(attacks={"square": {"queries": 3}}),
    }
    assert len(set(found.values())) == len(found), found
    assert fingerprint(eps_sweep=(0.02, 0.03)) == fingerprint(eps_sweep=(0.03, 0.02))
    assert fingerprint(per_class=True) == found["plain"]


def test_the_protocol_says_what_it_was_computed_in():
    one, other = (
        evaluate(TinyNet(dtype=dtype), data(dtype=dtype), threat=THREAT, attacks=["fgsm"]).protocol
        for dtype in (torch.float32, torch.float64)
    )
    assert one.precision == "float32, TF32 off"
    assert other.precision == "float64"
    assert one.fingerprint != other.fingerprint


def test_the_fingerprint_does_not_depend_on_the_model_or_the_batch():
    found = {
        evaluate(model, data(), threat=THREAT, attacks=["fgsm"], batch_size=size, label=label).protocol.fingerprint
        for model, size, label in ((TinyNet(seed=1), 7, None), (TinyNet(seed=2), 64, Label("ard", seed=4)))
    }
    assert found == {make_protocol(data(), THREAT, ["fgsm"]).fingerprint}


def test_only_rows_of_one_protocol_stand_in_one_table():
    one, same = (evaluate(TinyNet(seed=seed), data(), threat=THREAT, attacks=["fgsm"]) for seed in (1, 2))
    together = combine([one, same])
    assert together.rows == [*one.rows, *same.rows]
    assert together.protocol == one.protocol
    other = evaluate(TinyNet(seed=1), data(), threat=ThreatModel(eps=0.1), attacks=["fgsm"])
    with pytest.raises(InputError, match="results of 2 different protocols cannot stand in one table"):
        combine([one, other])


# What an evaluation must leave alone


def model_in_pieces() -> nn.Module:
    model = create_model("cnn", input_shape=SHAPE, num_classes=CLASSES, width=2).train()
    model.network.features[1].eval()
    model.network.classifier.weight.grad = torch.ones_like(model.network.classifier.weight)
    model.network.classifier.bias.requires_grad_(False)
    return model


USES: dict[str, Callable[[nn.Module], Any]] = {
    "evaluate": lambda model: evaluate(model, data(dtype=torch.float32), threat=THREAT, attacks=["fgsm", "cw_inf"]),
    "predict": lambda model: predict(model, data(dtype=torch.float32).x),
    "examples": lambda model: examples({"m": model}, data(dtype=torch.float32), THREAT, "cw_inf", count=3),
}


@pytest.mark.parametrize("use", USES)
def test_looking_at_a_model_leaves_it_and_the_process_alone(use):
    model = model_in_pieces()

    def everything() -> dict[str, Any]:
        return {
            "state": {key: value.tolist() for key, value in model.state_dict().items()},
            "modes": [module.training for module in model.modules()],
            "gradients": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
            "wanting": [parameter.requires_grad for parameter in model.parameters()],
            "random": torch.get_rng_state().tolist(),
            "recording": torch.is_grad_enabled(),
            "precision": torch.get_float32_matmul_precision(),
            "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        }

    before = deepcopy(everything())
    USES[use](model)
    assert everything() == before


class Precision(nn.Module):
    """Notes the flags under which it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.network = TinyNet(dtype=torch.float32)
        self.seen: set[tuple[bool, bool]] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return self.network(x)


def test_verdicts_are_in_true_float32_whatever_the_caller_allows():
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    sample, model = data(dtype=torch.float32), Precision()
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        predict(model, sample.x)
        assert model.seen == {(True, True)}
        model.seen.clear()
        evaluate(model, sample, threat=THREAT, attacks=["fgsm"])
        assert (False, False) in model.seen
        assert model.seen - {(False, False)} <= {(True, True)}  # the look at the model beforehand judges nothing
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (True, True)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags


def test_a_caller_who_sets_precision_in_the_newer_way_can_evaluate():
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has the older flags only")
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        evaluate(TinyNet(seed=1), data(), threat=THREAT, attacks=["fgsm"])
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_a_model_without_parameters_can_be_evaluated():
    (row,) = evaluate(TwoSided(), ImageData(torch.rand(5, 1, 20, 21), torch.arange(5) % 3, 3), threat=THREAT).rows
    assert row.params == 0


def test_an_evaluation_tells_which_attack_runs():
    told: list[Step] = []
    model = TinyNet(seed=2)
    attacks = {"cw_inf": {}, "autoattack": small_autoattack()}
    (row,) = evaluate(model, labelled(model), threat=WEAK, attacks=attacks, batch_size=16, listener=told.append).rows
    assert told[:6] == [Step(column, column, 1, 1, done, 41) for column in ("clean", "cw_inf") for done in (16, 32, 41)]
    parts = ["apgd_ce", "apgd_t", "apgd_t", "fab_t", "fab_t", "square"]
    for number, part in enumerate(parts, 1):
        steps = [step for step in told[6:] if step.number == number]
        assert {(step.column, step.attack, step.rounds) for step in steps} == {("autoattack", part, 6)}
        samples = steps[0].samples
        assert [step.done for step in steps] == [*range(16, samples, 16), samples]
    assert [step.number for step in told[6:]] == sorted(step.number for step in told[6:])
    assert next(step for step in told if step.attack == "apgd_ce").samples == row.clean.correct


# Predictions and bad input


def test_a_prediction_is_classes_and_probabilities():
    model, x = TinyNet(seed=1), data().x
    found = predict(model, x)
    torch.testing.assert_close(found.probabilities, model(x).softmax(1))
    assert torch.equal(found.classes, model(x).argmax(1))
    assert not found.probabilities.requires_grad


def test_bytes_and_half_precision_are_predicted_as_what_they_stand_for():
    model, x = TinyNet(seed=1, dtype=torch.float32), (255 * data().x).round().byte()
    expected = predict(model, x.float() / 255)
    assert torch.equal(predict(model, x).probabilities, expected.probabilities)
    half = (x.float() / 255).half()
    assert torch.equal(predict(model, half).probabilities, predict(model, half.float()).probabilities)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: 255 * x, r"images: pixels range from .* must lie in \[0, 1\]; divide by 255"),
        (lambda x: x * float("nan"), r"images: images contain NaN"),
        (lambda x: x.double(), r"model: cannot process .*; the images are torch\.float64, so make them torch\.float32"),
        (lambda x: x[:, :2], r"model: cannot process images of shape \(2,"),
        (lambda x: x[0], r"must have shape \(N, C, H, W\)"),
        (lambda x: ["a.png"], r"images: must be a tensor \(B, C, H, W\), got list; crdnd\.data\.read_image reads one"),
        (lambda x: x.numpy(), r"images: must be a tensor \(B, C, H, W\), got ndarray"),
    ],
)
def test_images_that_cannot_be_predicted_are_refused_in_one_line(change, message):
    with pytest.raises(InputError, match=message) as caught:
        predict(TinyNet(seed=1, dtype=torch.float32), change(data(dtype=torch.float32).x))
    assert "\n" not in str(caught.value)


class Held:
    """Like a run, which holds its model."""

    model = TinyNet()


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ("runs/student", "model: must be a torch.nn.Module, got str; make one with load_model"),
        (Held(), "give its .model"),
    ],
)
@pytest.mark.parametrize("call", [predict, lambda model, x: evaluate(model, (x, x[:, 0, 0, 0].long()), threat=THREAT)])
def test_what_only_names_or_holds_a_model_is_refused(call, given_, message):
    with pytest.raises(InputError, match=message):
        call(given_, data().x)


def test_a_threat_model_is_also_its_settings_and_attacks_one_name():
    one = evaluate(TinyNet(), data(), threat=THREAT, attacks="fgsm")
    other = evaluate(TinyNet(), data(), threat={"norm": THREAT.norm, "eps": str(THREAT.eps)}, attacks=["fgsm"])
    assert one == other
    with pytest.raises(InputError, match="threat: eps=8 reaches over the whole pixel range"):
        evaluate(TinyNet(), data(), threat={"eps": 8}, attacks="fgsm")


def test_examples_are_what_the_evaluation_judges():
    model, sample = TinyNet(seed=2, dtype=torch.float32), data(dtype=torch.float32)
    attack = watched("cw_inf")
    evaluate(model, sample, threat=THREAT, attacks={"cw_inf": attack})
    ((_, judged),) = attack.seen
    shown = examples({"ard": model}, sample, THREAT, "cw_inf", count=4)
    assert [(example.method, example.attack, example.sample) for example in shown] == [
        ("ard", "cw_inf", sample) for sample in (0, 1, 2, 3)
    ]
    for example in shown:
        torch.testing.assert_close(torch.from_numpy(example.adversarial), judged[example.sample])
        assert torch.equal(torch.from_numpy(example.natural), sample.x[example.sample])
        assert example.label == str(int(sample.y[example.sample]))
        assert 1 / CLASSES <= example.confidence_adversarial <= 1


def test_attacks_must_be_known_and_at_least_one():
    with pytest.raises(InputError, match="unknown attack 'pgdsat'; did you mean 'pgd_sat'"):
        evaluate(TinyNet(), data(), threat=THREAT, attacks=["pgdsat"])
    with pytest.raises(InputError, match="attacks: name at least one of " + ", ".join(attack_names())):
        evaluate(TinyNet(), data(), threat=THREAT, attacks=[])


SETTINGS: dict[str, tuple[Any, str]] = {
    "unknown attack": ({"pgdsat": {}}, "unknown attack 'pgdsat'; did you mean 'pgd_sat'"),
    "unknown setting": ({"square": {"querys": 5}}, "attacks.square.querys: no such setting; did you mean 'queries'"),
    "a setting that is no number": ({"pgd_sat": {"loss": "margin"}}, "attacks.pgd_sat.loss: no such setting"),
    "text": ({"square": {"queries": "5"}}, "attacks.square.queries: must be a whole number above 0, got '5'"),
    "half": ({"square": {"queries": 0.5}}, "attacks.square.queries: must be a whole number above 0, got 0.5"),
    "yes": ({"square": {"queries": True}}, "attacks.square.queries: must be a whole number above 0, got True"),
    "zero": ({"apgd_t": {"targets": 0}}, "attacks.apgd_t.targets: must be a whole number above 0, got 0"),
    "negative": ({"pgd_sat": {"step": -0.1}}, "attacks.pgd_sat.step: must be a number above 0, got -0.1"),
    "NaN": ({"pgd_sat": {"step": math.nan}}, "attacks.pgd_sat.step: must be a number above 0, got nan"),
    "infinite": ({"pgd_sat": {"step": math.inf}}, "attacks.pgd_sat.step: must be a number above 0, got inf"),
    "no settings": ({"square": 5}, "attacks.square: must be settings, such as {steps: 100}, got 5"),
    "of a sequence": ({"autoattack": {"queries": 5}}, "attacks.autoattack.queries: no such setting"),
    "another model": ({"transfer": {}}, "transfer: this attack needs another model; give one with --surrogate"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_request_that_cannot_be_met_is_named_in_one_line(name):
    attacks, message = SETTINGS[name]
    told: list[Step] = []
    with pytest.raises(InputError) as caught:
        evaluate(TinyNet(), data(), threat=THREAT, attacks=attacks, listener=told.append)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert not told


def test_settings_make_another_attack_and_leave_the_registry_alone():
    before = load_attack("pgd_sat").settings()
    chosen = choose_attacks({"pgd_sat": {"steps": 3, "step": 1, "restarts": 2}, "fgsm": None})
    assert chosen["pgd_sat"].settings() == before | {"steps": 3, "step": 1, "restarts": 2}
    assert chosen["fgsm"] == load_attack("fgsm")
    assert load_attack("pgd_sat").settings() == before
    assert list(choose_attacks({"mine": load_attack("fgsm")})) == ["mine"]
    assert choose_attacks({"mine": load_attack("fgsm")})["mine"].name == "mine"


def test_presets_can_be_chosen_and_an_unknown_one_is_refused_with_a_suggestion():
    for name in PRESETS:
        chosen = choose_attacks(preset(name).attacks)
        assert list(chosen) == list(preset(name).attacks)
    assert PRESETS["full"].checks
    assert not any(PRESETS[name].checks for name in PRESETS if name != "full")
    with pytest.raises(InputError, match="unknown preset 'ful'; did you mean 'full'"):
        preset("ful")


def grey_data(count: int = 13) -> ImageData:
    return ImageData(images(count, (1, 8, 9), dtype=torch.float32), torch.arange(count) % CLASSES, CLASSES)


def colour_model() -> nn.Module:
    return create_model("cnn", input_shape=(3, 8, 9), num_classes=CLASSES, width=2)


def colour_model_of_any_size() -> nn.Module:
    model = colour_model()
    model.takes_any_size = True
    return model


def detached(how: str) -> nn.Module:
    model = Detached(how)
    model.network = TinyNet(CLASSES, 1, dtype=torch.float32)
    return model


SURROGATES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "fewer classes": (
        lambda: TinyNet(CLASSES - 1, 1, dtype=torch.float32), "surrogate: has 4 classes, but the data has 5",
    ),
    "more classes": (
        lambda: TinyNet(CLASSES + 1, 1, dtype=torch.float32), "surrogate: has 6 classes, but the model has 5",
    ),
    "colour": (colour_model, "surrogate: takes images of 3 channels, these have 1"),
    "colour of any size": (colour_model_of_any_size, "surrogate: takes images of 3 channels, these have 1"),
    "other images": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(71, CLASSES)), r"surrogate: cannot process images of shape \(1,",
    ),
    "no logits": (nn.Identity, r"surrogate: must return logits \(B, K\)"),
    "no gradients": (lambda: detached("declared"), "surrogate: lets no gradient through to its images"),
    "no gradients by chance": (lambda: detached("no_grad"), "surrogate: lets no gradient through to its images"),
}  # fmt: skip


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("asked", ["attack", "checks"])
def test_a_surrogate_that_does_not_fit_is_refused_before_any_attack(name, asked):
    make, message = SURROGATES[name]
    told: list[Step] = []
    with pytest.raises(InputError, match=f"^{message}") as caught:
        evaluate(
            TinyNet(CLASSES, 1, dtype=torch.float32), grey_data(), threat=THREAT, surrogate=make(),
            attacks=["transfer"] if asked == "attack" else PRESETS["full"].attacks, checks=asked == "checks",
            listener=told.append,
        )  # fmt: skip
    assert "\n" not in str(caught.value)
    assert not told


def test_a_surrogate_may_know_more_classes_than_the_data_if_the_model_does_too():
    model, surrogate = (TinyNet(CLASSES + 1, 1, seed=seed, dtype=torch.float32) for seed in (1, 2))
    (row,) = evaluate(model, grey_data(), threat=THREAT, attacks=["transfer"], surrogate=surrogate).rows
    assert "transfer" in row.attacks


@pytest.mark.parametrize("size", [0, -3])
def test_a_batch_that_is_none_is_refused(size):
    with pytest.raises(InputError, match="batch_size"):
        evaluate(TinyNet(), data(), threat=THREAT, attacks=["fgsm"], batch_size=size)


# Models without gradients


class Detached(nn.Module):
    """Right answers, and no way back to the images."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.network, self.how = TinyNet(seed=2), how
        self.provides_gradients = how != "declared"

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                return self.network(x)
        if self.how == "inference_mode":
            with torch.inference_mode():
                return self.network(x)
        return self.network(x.detach()) if self.how == "detached images" else self.network(x).detach()


HOW = ["declared", "no_grad", "inference_mode", "detached images", "detached logits"]


@pytest.mark.parametrize("how", HOW)
def test_a_model_without_gradients_gets_attacks_that_need_none_and_a_note(how):
    model = Detached(how)
    sample = labelled(model.network)
    attacks = {"pgd_sat": {}, "autoattack": small_autoattack(), "uniform_noise": {"draws": 3}, "cw_l2": {}}
    results = evaluate(model, sample, threat=WEAK, attacks=attacks, batch_size=16)
    (row,) = results.rows
    assert list(row.attacks) == list(results.protocol.attacks) == ["square", "uniform_noise"]
    assert row.notes == [
        "No gradients were available: pgd_sat, apgd_ce, apgd_t, fab_t, cw_l2 could not run, square, uniform_noise did."
    ]
    assert results.protocol.attacks["square"]["queries"] == 20
    # The very verdicts of the model with gradients under the same attacks.
    own = {"square": {"queries": 20}, "uniform_noise": {"draws": 3}}
    (same,) = evaluate(model.network, sample, threat=WEAK, attacks=own, batch_size=16).rows
    assert row.verdicts == same.verdicts
    assert 0 < row.worst_case.correct < row.clean.correct
    assert same.notes == []
    assert not {"missing_gradients", "wrong_gradients"} & {check.name for check in row.checks}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("how", ["declared", "no_grad"])
def test_every_preset_can_be_run_on_a_model_without_gradients(how, name, monkeypatch):
    model, chosen = Detached(how), preset(name)
    small = dataclasses.replace(load_attack("square"), queries=5)
    monkeypatch.setattr(
        "crdnd.evaluation._plan.load_attack", lambda key: small if key == "square" else load_attack(key)
    )
    autoattack = dataclasses.replace(load_attack("autoattack"), parts=(*load_attack("autoattack").parts[:3], small))
    attacks = chosen.attacks | ({"autoattack": autoattack} if "autoattack" in chosen.attacks else {})
    results = evaluate(model, labelled(model.network), threat=WEAK, attacks=attacks, checks=chosen.checks)
    assert list(results.rows[0].attacks) == ["square"]
    assert not results.protocol.checks
    (note,) = results.rows[0].notes
    assert note.startswith("No gradients were available: ")
    assert note.endswith(" could not run, square did.")


def test_images_of_another_model_are_tried_on_a_model_without_gradients():
    model = Detached("no_grad")
    sample = labelled(model.network)
    (row,) = evaluate(model, sample, threat=WEAK, attacks=["transfer"], surrogate=model.network).rows
    assert list(row.attacks) == ["transfer"]
    assert row.attacks["transfer"].correct < row.clean.correct
    assert row.notes == []


def test_attacks_that_need_gradients_run_where_one_sample_in_many_has_some():
    class Quantised(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return network((x * 8).round() / 8)

    network = TinyNet(seed=2)
    (row,) = evaluate(Quantised(), labelled(network), threat=WEAK, attacks=["fgsm"]).rows
    assert list(row.attacks) == ["fgsm"]  # zero is a gradient too; a check names it
    assert any(check.name == "missing_gradients" and check.suspicious for check in row.checks)


def test_nothing_is_attacked_before_the_request_is_checked():
    told: list[Step] = []
    with pytest.raises(InputError):
        evaluate(TinyNet(), data(), threat=THREAT, attacks=["fgsm", "nope"], listener=told.append)
    assert not told
