"""Two models on the same samples: the paired interval covers what it should, and only like is compared with like."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from crdnd import ImageData, InputError, Results, ThreatModel, evaluate
from crdnd.cli import main
from crdnd.evaluation import compare, paired_difference
from support import CLASSES, TinyNet, images

torch.set_num_threads(1)  # networks this small wait for their threads more than they compute


def text(right) -> str:
    return "".join("1" if value else "0" for value in right)


# Probabilities that both are right, only the first, only the second; and how many samples.
@pytest.mark.parametrize("n", [20, 97, 400])
@pytest.mark.parametrize(
    "cells", [(0.5, 0.1, 0.1), (0.5, 0.2, 0.05), (0.05, 0.02, 0.01), (0.9, 0.03, 0.03), (0.0, 0.6, 0.3)]
)
def test_the_interval_covers_the_truth_in_95_of_100_samples(cells, n):
    rng = np.random.default_rng(1)
    truth, covered, draws = 100 * (cells[1] - cells[2]), 0, 1500
    for counts in rng.multinomial(n, [*cells, 1 - sum(cells)], size=draws):
        both, one, other, neither = counts.tolist()
        found = paired_difference(
            "1" * (both + one) + "0" * (other + neither), "1" * both + "0" * one + "1" * other + "0" * neither
        )
        covered += found.low <= truth <= found.high
    assert covered / draws >= 0.93


def test_the_interval_is_that_of_its_formula():
    # 100 samples, 12 right in the first alone, 5 in the second alone: d = 7 / 102, s^2 = (18 / 102 - d^2) / 102.
    found = paired_difference("1" * 12 + "0" * 5 + "1" * 83, "0" * 12 + "1" * 5 + "1" * 83)
    centre = 7 / 102
    half = 1.959963984540054 * math.sqrt((18 / 102 - centre**2) / 102)
    assert (found.low, found.high) == pytest.approx((100 * (centre - half), 100 * (centre + half)), rel=1e-12)
    assert found.points == pytest.approx(7.0)
    assert (found.only_first, found.only_second) == (12, 5)
    assert found.differing == tuple(range(17))


def test_it_is_narrower_than_two_separate_intervals_where_models_agree():
    found = paired_difference("1" * 55 + "0" * 45, "1" * 50 + "0" * 50)
    assert found.low > 0
    separate = 100 * 1.96 * math.sqrt(2 * 0.25 / 100)
    assert found.high - found.low < separate


@pytest.mark.parametrize("seed", range(5))
def test_exchanging_the_two_changes_the_sign(seed):
    first, second = (text(row) for row in np.random.default_rng(seed).random((2, 37)) < [[0.7], [0.4]])
    one, other = paired_difference(first, second), paired_difference(second, first)
    assert (one.points, one.low, one.high) == pytest.approx((-other.points, -other.high, -other.low), rel=1e-12)
    assert (one.only_first, one.only_second, one.differing) == (other.only_second, other.only_first, other.differing)
    assert one.points == pytest.approx(100 * (first.count("1") - second.count("1")) / 37)


def test_equal_rows_differ_by_nothing_within_an_interval_around_it():
    found = paired_difference("1101.0", "1101.0")
    assert (found.points, found.only_first, found.only_second, found.differing) == (0.0, 0, 0, ())
    assert found.low == pytest.approx(-found.high)
    assert 0 < found.high < 100


def test_what_was_not_attacked_was_not_right():
    found = paired_difference("1.0.1", "110.0")
    assert (found.only_first, found.only_second, found.differing) == (1, 1, (1, 4))


@pytest.mark.parametrize(("first", "second"), [("", ""), ("11", "1"), ("", "1")])
def test_what_cannot_be_paired_is_refused(first, second):
    with pytest.raises(InputError, match=rf"verdicts of {len(first)} and {len(second)} samples cannot be paired"):
        paired_difference(first, second)


def measured(seed: int = 2, **changes) -> Results:
    x = images(29)
    with torch.no_grad():
        y = TinyNet(seed=2)(x).argmax(1)
    values = {"threat": ThreatModel(eps=0.02), "attacks": {"fgsm": {}, "square": {"queries": 5}}}
    return evaluate(TinyNet(seed=seed), ImageData(x, y, CLASSES, name="dots"), **values | changes)


def pair(one: Results, other: Results):
    return compare((one.protocol, one.rows[0]), (other.protocol, other.rows[0]))


def test_differences_are_those_of_the_counts():
    one, other = measured(), measured(seed=4)
    found = pair(one, other)
    assert list(found) == ["clean", "fgsm", "square", "worst_case"]
    counts = [{"clean": row.clean, **row.attacks, "worst_case": row.worst_case} for row in (one.rows[0], other.rows[0])]
    for name, difference in found.items():
        assert difference.points == pytest.approx(counts[0][name].percent - counts[1][name].percent)
    assert found["clean"].points > 0
    assert all(difference.points == 0 for difference in pair(one, measured()).values())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1, "threat": ThreatModel(eps=0.02)}, "seed"),
        ({"threat": ThreatModel(eps=0.03)}, "eps"),
        ({"threat": ThreatModel(norm="l2", eps=0.02)}, "norm"),
        ({"attacks": ["fgsm"]}, "attacks"),
        ({"eps_sweep": (0.1,)}, "eps_sweep"),
        ({"split": "validation"}, "split"),
    ],
    ids=["seed", "eps", "norm", "attacks", "sweep", "split"],
)
def test_results_of_other_protocols_are_refused_by_what_differs(changes, named):
    one = measured()
    changes = dict(changes)
    other = evaluate_again(changes) if "seed" in changes else measured(**changes)
    with pytest.raises(InputError) as caught:
        pair(one, other)
    assert str(caught.value) == f"results of different protocols cannot be compared; they differ in {named}."


def evaluate_again(changes) -> Results:
    x = images(29)
    with torch.no_grad():
        y = TinyNet(seed=2)(x).argmax(1)
    data = ImageData(x, y, CLASSES, name="dots")
    return evaluate(TinyNet(seed=2), data, attacks={"fgsm": {}, "square": {"queries": 5}}, **changes)


def test_results_without_verdicts_are_refused():
    one = measured()
    old = one.model_copy(update={"rows": [one.rows[0].model_copy(update={"verdicts": {}})]})
    for first, second in ((one, old), (old, one)):
        with pytest.raises(InputError, match="have no verdicts for each sample; run `crdnd evaluate` again"):
            pair(first, second)


def diff(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["diff", *(str(argument) for argument in arguments)])
    return ended.value.code, *capsys.readouterr()


def test_a_folder_stands_for_the_evaluation_in_it(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("mine", 2), ("student", 4)):
        Path(name).mkdir()
        Path(name, "evaluation.json").write_text(measured(seed).to_json())
    status, out, err = diff(capsys, "mine", "student/evaluation.json", "--json")
    assert status == 0, err
    assert json.loads(out)["clean"]["points"] == pytest.approx(pair(measured(2), measured(4))["clean"].points)
    Path("student", "evaluation.json").unlink()
    status, out, err = diff(capsys, "mine", "student")
    assert (status, out) == (2, "")
    command = "crdnd evaluate student --out student/evaluation.json"
    assert err == f"error: student: has no evaluation.json; write it with `{command}`.\n"
