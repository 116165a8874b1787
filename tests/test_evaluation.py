import json
import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crdnd import ImageData, InputError, Results, ThreatModel, create_model, evaluate, predict
from crdnd.attacks import attack_names
from crdnd.config import build
from crdnd.counts import Count
from crdnd.evaluation import TABLE_ATTACKS, Label, combine, examples, make_protocol, worst_case
from crdnd.models import weights_sha256
from support import CLASSES, SHAPE, RankOneVictim, Recorder, TinyNet, images

torch.set_num_threads(1)  # networks this small wait for their threads more than they compute

THREAT = ThreatModel(norm="linf", eps=0.05)


def data(count: int = 13, dtype: torch.dtype = torch.float64) -> ImageData:
    return ImageData(images(count, dtype=dtype), torch.arange(count) % CLASSES, CLASSES, name="dots")


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


def test_verdicts_do_not_depend_on_the_neighbours():
    model, sample, seen = TinyNet(seed=2), data(40), {}
    for size in (64, 7):
        recorder = Recorder(model)
        evaluate(recorder, sample, threat=THREAT, attacks=["pgd_sat"], batch_size=size)
        # After the look at the model and the natural passes: 20 steps and the verdict, for each batch.
        passes = recorder.inputs[1 + math.ceil(40 / size) :]
        seen[size] = torch.cat(passes[20::21])
    assert torch.equal(seen[64], seen[7])


def test_the_seed_moves_the_starts():
    def first_points(seed: int) -> Tensor:
        recorder = Recorder(TinyNet(seed=2))
        evaluate(recorder, data(), threat=THREAT, attacks=["pgd_sat"], seed=seed)
        return recorder.inputs[2]

    assert torch.equal(first_points(0), first_points(0))
    assert not torch.equal(first_points(0), first_points(1))


def test_a_verdict_needs_the_same_class_and_every_attack_sees_every_image():
    recorder = Recorder(Threshold())
    sample = greys(0.3, 0.7, 0.49, 0.3, 0.7, labels=(1, 0, 0, 0, 1))
    (row,) = evaluate(recorder, sample, threat=THREAT, attacks=["fgsm", "cw_inf"]).rows
    # The look, the natural pass, then one step and 30 steps with a verdict each, always on all five images.
    assert [len(x) for x in recorder.inputs] == [3, 5] + [5] * 2 + [5] * 31
    assert row.clean.correct == 3
    assert row.worst_case.correct == 2


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
        "model_sha256",
    }  # fmt: skip
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
    assert protocol["attacks"]["cw_inf"] == {"steps": 30, "step": 0.25, "start": "uniform", "loss": "margin"}
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
    }
    assert len({protocol(), *others.values()}) == 1 + len(others), others
    assert protocol() == protocol()


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
    told: list[str] = []
    evaluate(TinyNet(), data(), threat=THREAT, attacks=["cw_inf", "fgsm"], listener=told.append)
    assert told == ["cw_inf", "fgsm"]


# Predictions and bad input


def test_a_prediction_is_classes_and_probabilities():
    model, x = TinyNet(seed=1), data().x
    found = predict(model, x)
    torch.testing.assert_close(found.probabilities, model(x).softmax(1))
    assert torch.equal(found.classes, model(x).argmax(1))
    assert not found.probabilities.requires_grad


def test_examples_are_what_the_evaluation_judges():
    model, sample = TinyNet(seed=2, dtype=torch.float32), data(dtype=torch.float32)
    recorder = Recorder(model)
    evaluate(recorder, sample, threat=THREAT, attacks=["cw_inf"])
    judged = recorder.inputs[-1]
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


def test_nothing_is_attacked_before_the_request_is_checked():
    told: list[str] = []
    with pytest.raises(InputError):
        evaluate(TinyNet(), data(), threat=THREAT, attacks=["fgsm", "nope"], listener=told.append)
    assert not told
