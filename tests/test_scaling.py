"""The cost model of studies/scaling.py: its counts against known networks and laws, its page against its results."""

import dataclasses
import json
import runpy
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from crdnd.models import parameter_count

ROOT = Path(__file__).parent.parent
STUDY = runpy.run_path(str(ROOT / "studies" / "scaling.py"))
PAGE = runpy.run_path(str(ROOT / "docs" / "scaling.py"))
FOUND = json.loads(STUDY["RESULTS"].read_text(encoding="utf-8"))
LARGE = (3, 224, 224)
STUDENT, TEACHER, BATCH, STEPS = "cnn,width=16", "cifar_resnet,depth=8", 6, 2


def forward(spec: str, batch: int, shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10):
    """What a pass of a network does, and the network."""
    with torch.device("meta"):
        network, x = STUDY["network"](spec, shape, classes), torch.empty(batch, *shape)
    with STUDY["Counter"]() as counter, torch.no_grad():
        network.eval()(x)
    return counter.work, network


@pytest.mark.parametrize(
    ("spec", "shape", "classes", "products", "parameters"),
    [  # as published: 10^9 multiplications with an addition, 10^6 parameters
        ("resnet18", (3, 32, 32), 10, 0.56, 11.17),
        ("wrn,depth=28,width=10", (3, 32, 32), 10, 5.25, 36.48),
        ("wrn,depth=34,width=10", (3, 32, 32), 10, 6.66, 46.16),
        ("wrn,depth=70,width=16", (3, 32, 32), 10, 38.8, 266.8),
        ("imagenet_resnet50", LARGE, 1000, 4.1, 25.56),
        ("imagenet_wrn_50_2", LARGE, 1000, 11.4, 68.88),
    ],
)
def test_known_networks_have_their_published_size_and_cost(spec, shape, classes, products, parameters):
    work, network = forward(spec, 3, shape, classes)
    assert work.flops / 3 / 2e9 == pytest.approx(products, rel=0.01)
    assert parameter_count(network) / 1e6 == pytest.approx(parameters, rel=0.001)


def test_a_backward_pass_has_the_flops_that_torch_counts():
    with torch.device("meta"):
        network, x = STUDY["network"]("resnet18,width=8"), torch.empty(BATCH, 3, 32, 32)
    with STUDY["Counter"]() as counter:
        network(x).sum().backward()
    with FlopCounterMode(display=False) as theirs:
        network(x).sum().backward()
    assert counter.work.flops == theirs.get_total_flops()


def test_a_grouped_convolution_costs_backwards_what_it_costs_forwards():
    # torch's own counter takes the gradients of a depthwise convolution for those of a full one.
    with torch.device("meta"):
        layer, x = torch.nn.Conv2d(12, 24, 3, groups=4, bias=False), torch.empty(BATCH, 12, 9, 8, requires_grad=True)
    with STUDY["Counter"]() as counter:
        layer(x).sum().backward()
    assert counter.work.forward == 2 * (BATCH * 24 * 7 * 6) * (3 * 3 * 3)
    assert counter.work.input_gradient == counter.work.weight_gradient == counter.work.forward


@pytest.mark.parametrize("name", STUDY["COMPARED_METHODS"])
def test_a_steps_work_is_that_of_the_passes_that_the_step_counts(name):
    found = STUDY["counted"](STUDY["Run"](name, STUDENT, TEACHER, BATCH, STEPS))
    student, teacher = (forward(spec, BATCH)[0].forward for spec in (STUDENT, TEACHER))
    passes = found.student_passes * student + found.teacher_passes * teacher
    # Besides the passes there are products in the loss and behind the last linear layer alone.
    assert passes <= found.work.forward <= 1.01 * passes


def test_passes_are_those_of_the_methods():
    def passes(name: str) -> tuple[float, float]:
        found = STUDY["counted"](STUDY["Run"](name, STUDENT, TEACHER, BATCH, STEPS))
        return found.student_passes, found.teacher_passes

    assert passes("natural") == (1, 0)
    assert passes("pgd_at") == (STEPS + 1, 0)
    assert passes("trades") == (1 + STEPS + 2, 0)  # the attack looks at x first
    assert passes("rslad") == (STEPS + 2, 1)
    assert passes("crdnd") == (STEPS + 2, 2)
    assert passes("adaad") == (STEPS + 2, STEPS + 2)


def test_the_attack_has_gradients_of_inputs_alone():
    def work(steps: int):
        return STUDY["counted"](STUDY["Run"]("pgd_at", STUDENT, TEACHER, BATCH, steps)).work

    few, more = work(STEPS), work(STEPS + 3)
    assert more.weight_gradient == few.weight_gradient > 0
    assert more.input_gradient > few.input_gradient > 0
    assert more.update_bytes == few.update_bytes > 0


def test_what_a_method_keeps_grows_with_the_batch_and_with_gradients_through_the_teacher():
    def kept(name: str, batch: int) -> int:
        return STUDY["counted"](STUDY["Run"](name, STUDENT, TEACHER, batch, STEPS)).kept_bytes

    assert kept("rslad", 2 * BATCH) == pytest.approx(2 * kept("rslad", BATCH), rel=0.01)
    assert kept("rslad", BATCH) == pytest.approx(2 * kept("natural", BATCH), rel=0.01)  # two views
    assert kept("adaad", BATCH) > kept("rslad", BATCH)


def test_the_message_holds_gradients_and_statistics_and_one_gpu_sends_none():
    found = dataclasses.asdict(STUDY["counted"](STUDY["Run"]("crdnd", "resnet18", STUDENT, BATCH, 1)))
    channels = 64 * 5 + 128 * 5 + 256 * 5 + 512 * 5  # the stem's norm, four a stage, three shortcuts
    assert STUDY["message_bytes"](found) == 4 * (11_173_962 + 2 * channels)
    assert found["gathered_bytes"] > found["returned_bytes"] > 0  # the teacher's rows have no gradients
    assert STUDY["exchange"](found, 1, 0) == {"gradients": 0, "pools": 0}
    eight, many = (STUDY["exchange"](found, gpus, 1)["gradients"] for gpus in (8, 64))
    gpu = STUDY["GPU"]
    bytes_seconds = 2 * 7 / 8 * STUDY["message_bytes"](found) / (gpu["achieved_link"][1] * gpu["link"])
    assert eight == pytest.approx(bytes_seconds + 2 * 3 * gpu["message_seconds"][1])
    assert many > eight


def test_the_fit_finds_the_constants_of_made_up_times():
    true = dict(zip(STUDY["CONSTANTS"], (1e-11, 2e-11, 3e-11, 1e-10, 2e-10, 1e-5), strict=True))
    works = [one["work"] for one in FOUND["measured"]["entries"]]
    made_up = [{"work": work, "seconds": STUDY["seconds_of"](work, true)} for work in works]
    assert STUDY["fit"](made_up) == pytest.approx(true, rel=1e-6)


def test_constants_and_errors_follow_from_the_times():
    entries = [dict(one) for one in FOUND["measured"]["entries"]]
    again = STUDY["model"](entries)
    assert again["constants"] == pytest.approx(FOUND["model"]["constants"], rel=1e-6)
    for group, error in again["errors"].items():
        assert error == pytest.approx(FOUND["model"]["errors"][group], rel=1e-6)
    fitted = {(one["run"]["objective"], one["run"]["student"]) for one in entries if one["group"] == "fitted"}
    for one in entries:
        method, student = one["run"]["objective"], one["run"]["student"]
        if "networks" in one["group"]:
            assert student not in {network for _, network in fitted}
            assert one["run"]["teacher"] not in STUDY["FITTED_NETWORKS"].values()
        if "methods" in one["group"]:
            assert method not in {name for name, _ in fitted}


def test_predictions_follow_from_their_counts_and_the_assumed_constants():
    assert FOUND["gpu"] == STUDY["GPU"], "run `python studies/scaling.py --predict`"
    for one in FOUND["predictions"]:
        for precision, ends in one["seconds"].items():
            slow, fast = (STUDY["gpu_step"](one["counted"], one["gpus"], precision, end) for end in (0, 1))
            assert [slow, fast] == [pytest.approx(end) for end in ends]
            assert slow["step"] > fast["step"]
            memory = STUDY["memory"](one["counted"], one["gpus"], precision)
            assert memory == pytest.approx(one["memory"][precision])
    natural = next(one["counted"]["work"] for one in FOUND["methods"] if one["method"] == "natural")
    again = STUDY["counted"](dataclasses.replace(STUDY["WORKLOADS"]["cifar100"].run, objective="natural"))
    assert again.work.flops == sum(natural[name] for name in ("forward", "input_gradient", "weight_gradient"))


def test_the_page_is_that_of_the_results():
    assert PAGE["PAGE"].read_text(encoding="utf-8") == PAGE["page"](FOUND), "run `python docs/scaling.py`"
