"""Teachers: measured before a run, refused at chance with the cause, seen through another shape of images."""

import json
import re
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crdnd import ImageData, InputError, Splits, ThreatModel, create_model, distill, load_data
from crdnd.cli import main
from crdnd.engine import measure_teacher, train
from crdnd.models import Adapted, Normalized, adapted, fitted, input_shape
from support import TinyNet, generator, images

torch.set_num_threads(1)  # networks this small wait for their threads more than they compute

THREAT = ThreatModel(norm="linf", eps=0.1)
COLOURS, SIDE = 6, (5, 7)


def colour_data(count: int, seed: int) -> ImageData:
    """Pale images, each with one of six colours; the colours of no class stay the same in the reverse of channels."""
    y = torch.arange(count) % COLOURS
    tints = torch.tensor([[2, 0, 0], [0, 1, 2], [0, 0, 2], [2, 1, 0], [2, 0, 1], [1, 0, 2]]).float()
    noise = torch.rand(count, 3, *SIDE, generator=generator(seed))
    return ImageData(0.5 + 0.06 * tints[y][:, :, None, None] + 0.08 * noise, y, COLOURS, name="colours")


TRAIN, VALIDATION = colour_data(300, 1), colour_data(240, 2)
MEAN, STD = TRAIN.x.mean((0, 2, 3)), TRAIN.x.std((0, 2, 3))


class Seen(nn.Module):
    """A network behind a change of its images."""

    def __init__(self, network, change):
        super().__init__()
        self.network, self.change = network, change

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.change(x))


def normalised(x: Tensor, mean=MEAN, std=STD) -> Tensor:
    return (x - torch.as_tensor(mean)[:, None, None]) / torch.as_tensor(std)[:, None, None]


@pytest.fixture(scope="session")
def of_normalised() -> nn.Module:
    """Has learned the colours of normalised images in a few steps, and expects them normalised."""
    network = TinyNet(COLOURS, 3, dtype=torch.float32, features=24)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(network(normalised(TRAIN.x)), TRAIN.y).backward()
        optimizer.step()
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def plain(of_normalised) -> nn.Module:
    """The same, right for images in [0, 1]."""
    return Seen(of_normalised, normalised)


def refusal(teacher, data=VALIDATION) -> str:
    with pytest.raises(InputError, match="no better than chance") as error:
        measure_teacher(teacher, data)
    assert "\n" not in str(error.value)
    return str(error.value)


# What is measured


def test_a_good_teacher_passes_with_its_accuracy(plain):
    found = measure_teacher(plain, VALIDATION)
    right = int((plain(VALIDATION.x).argmax(1) == VALIDATION.y).sum())
    assert (found.natural.correct, found.natural.n) == (right, 240)
    assert found.chance == pytest.approx(1 / 6)
    assert (found.input, found.warning) == (None, "")


def test_at_most_a_thousand_images_are_looked_at_always_the_same_and_of_all_classes(plain):
    data = colour_data(2400, 3)
    seen: list[Tensor] = []
    teacher = Seen(plain, lambda x: seen.append(x.clone()) or x)
    first = measure_teacher(teacher, data)
    assert first.natural.n == 1000
    once = torch.cat(seen)
    assert len(once) == 1000
    seen.clear()
    assert measure_teacher(teacher, data) == first
    assert torch.equal(torch.cat(seen), once)
    assert first.chance == pytest.approx(1 / 6, abs=2e-3)


def test_modes_and_the_global_random_state_are_left_alone():
    teacher = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 35, COLOURS)).train()
    nn.init.zeros_(teacher[2].weight)  # one class for all, which is at chance whatever was drawn
    before = torch.get_rng_state()
    with pytest.raises(InputError):
        measure_teacher(teacher, VALIDATION)
    assert teacher.training
    assert teacher[1].training
    assert torch.equal(torch.get_rng_state(), before)


# Wrong teachers, each of one kind


def test_a_teacher_of_pixels_up_to_255_is_named(plain):
    said = refusal(Seen(plain, lambda x: x / 255))
    assert "expects pixels in [0, 255]" in said
    assert "255 * x" in said


def test_a_teacher_of_normalised_images_is_named_with_the_numbers_that_mend_it(of_normalised):
    said = refusal(of_normalised)
    assert "expects normalised inputs" in said
    mean, std = (json.loads(text) for text in re.search(r"mean=(\[.*?\]), std=(\[.*?\])", said).groups())
    mended = Seen(of_normalised, lambda x: normalised(x, mean, std))
    assert measure_teacher(mended, VALIDATION).natural.percent > 90


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "imagenet"])
def test_the_usual_normalisations_are_among_those_tried(name):
    from crdnd.engine.teacher import NORMALISATIONS

    mean, std = NORMALISATIONS[name]
    # Images of that very mean and std, whose class lies in what only the right normalisation brings to its place.
    said = refusal(Seen(Shifts(), lambda x: x), shifted(mean, std))
    assert f"mean and std of {name}" in said or "mean and std of this data" in said
    assert "wrap it with mean=" in said


class Shifts(nn.Module):
    """Tells five classes by the mean of normalised inputs, which is -1, -0.5, 0, 0.5 or 1."""

    def forward(self, x: Tensor) -> Tensor:
        return -10 * (x.mean((1, 2, 3))[:, None] - torch.linspace(-1, 1, 5)).abs()


def shifted(mean, std) -> ImageData:
    y = torch.arange(200) % 5
    x = (torch.linspace(-1, 1, 5)[y][:, None] * torch.tensor(std) + torch.tensor(mean))[:, :, None, None]
    noise = 0.02 * torch.randn(200, 3, 4, 6, generator=generator())
    return ImageData((x + noise).clamp(0, 1), y, 5)


def test_a_teacher_that_normalises_twice_is_named(of_normalised):
    twice = Seen(of_normalised, lambda x: normalised(normalised(x)))
    said = measure_teacher(twice, VALIDATION).warning  # this network keeps a part of what it knows
    assert "normalises once too often" in said
    assert "mean=" in said


def test_a_teacher_of_bgr_images_is_named(plain):
    said = refusal(Seen(plain, lambda x: x.flip(1)))
    assert "channel order BGR" in said
    assert "x.flip(1)" in said


def test_a_teacher_of_bgr_images_up_to_255_is_named(plain):
    said = refusal(Seen(plain, lambda x: x.flip(1) / 255))
    assert "channel order BGR" in said
    assert "[0, 255]" in said


def test_another_order_of_the_classes_is_named_and_the_order_that_is_said_mends_it(plain):
    order = torch.tensor([4, 2, 5, 1, 0, 3])
    wrong = Seen(nn.Identity(), lambda x: plain(x)[:, order])
    said = refusal(wrong)
    assert "class order" in said
    named = json.loads(re.search(r"z\[:, (\[.*?\])\]", said)[1])
    assert measure_teacher(Seen(nn.Identity(), lambda x: wrong(x)[:, named]), VALIDATION).natural.percent > 90


def test_another_number_of_classes_is_named(plain, tmp_path):
    class More(nn.Module):
        def forward(self, x):
            return F.pad(plain(x), (0, 4), value=-9.0)

    student = create_model("cnn", input_shape=(3, *SIDE), num_classes=COLOURS, width=2)
    with pytest.raises(InputError, match=r"teacher has 10 classes and the student 6.*The data has 6: take a teacher"):
        distill(student, Splits(TRAIN, VALIDATION), teacher=More(), out=tmp_path / "run", **settings())
    assert not (tmp_path / "run").exists()


def test_an_untrained_teacher_has_no_cause_that_explains_it():
    constant = Seen(nn.Identity(), lambda x: torch.eye(COLOURS)[torch.full((len(x),), 2)])
    assert "it answers class 2 for 100% of the images" in refusal(constant)


def test_noise_is_not_taken_for_a_cause():
    for seed in range(20):
        network = TinyNet(COLOURS, 3, seed=seed, dtype=torch.float32)
        noise = ImageData(images(200, (3, *SIDE), seed=seed, dtype=torch.float32), torch.arange(200) % COLOURS, COLOURS)
        assert "look whether its weights were loaded" in refusal(network, noise)


def test_a_teacher_that_refuses_other_inputs_is_not_asked_again():
    def picky(x):
        if x.min() < 0 or x.max() > 1:
            raise ValueError("pixels must lie in [0, 1]")
        return torch.zeros(len(x), COLOURS)

    assert "look whether" in refusal(Seen(nn.Identity(), picky))


# Where the line is drawn


class Answers(nn.Module):
    """Gives prepared answers: the first pixel says which."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.eye(10)[(x[:, 0, 0, 0] * 100).round().long() % 10]


def answers(labels: list[int], predicted: list[int]) -> ImageData:
    x = torch.rand(len(labels), 1, 3, 4, generator=generator())
    x[:, 0, 0, 0] = torch.tensor(predicted) / 100
    return ImageData(x, torch.tensor(labels), 10)


def test_the_largest_class_is_what_guessing_reaches():
    labels = [0] * 160 + [1, 2, 3, 4] * 10
    assert "(80.0%)" in refusal(Answers(), answers(labels, [0] * 200))
    mostly = [0] * 160 + [1, 2, 3, 4] * 8 + [0] * 8
    assert measure_teacher(Answers(), answers(labels, mostly)).natural.percent == 96


def test_with_classes_of_very_different_sizes_a_teacher_below_the_largest_share_may_be_a_good_one():
    labels = [0] * 160 + [1, 2, 3, 4] * 10
    predicted = [0] * 110 + [1] * 50 + [1, 2, 3, 4] * 10
    assert measure_teacher(Answers(), answers(labels, predicted)).natural.percent == 75


def test_few_images_tell_nothing():
    labels = list(range(10))
    assert measure_teacher(Answers(), answers(labels[:6], [0, 0, 0, 3, 0, 0])).natural.correct == 2
    assert "no better than chance" in refusal(Answers(), answers(labels * 5, [0] * 50))
    found = measure_teacher(Answers(), answers(labels * 4, [0] * 40))
    assert "no better than chance" in found.warning
    assert "40 images are too few to refuse it" in found.warning


def test_a_teacher_that_would_be_much_better_otherwise_is_warned_of(plain):
    def half_wrong(x):
        wrong = x[:, :, 0, 0].sum(1) > x[:, :, 1, 1].sum(1)
        return torch.where(wrong[:, None], plain(x).roll(1, 1), plain(x))

    swapped = Seen(nn.Identity(), lambda x: plain(x)[:, [1, 0, 2, 3, 4, 5]])
    found = measure_teacher(swapped, VALIDATION)
    assert 60 < found.natural.percent < 75
    assert "class order" in found.warning
    assert measure_teacher(Seen(nn.Identity(), half_wrong), VALIDATION).warning == ""


# In a run


def settings(**changes: Any) -> dict[str, Any]:
    common = {"objective": "rslad", "threat": THREAT, "epochs": 1, "batch_size": 100, "attack": {"steps": 1}}
    return common | changes


def student() -> nn.Module:
    return create_model("cnn", input_shape=(3, *SIDE), num_classes=COLOURS, width=2)


DATA = Splits(TRAIN, VALIDATION)


def test_a_run_writes_down_what_it_measured_and_says_it(plain, tmp_path):
    distill(student(), DATA, teacher=plain, out=tmp_path / "run", **settings())
    (entry,) = json.loads((tmp_path / "run" / "run.json").read_text())["teachers"]
    assert entry["role"] == "teacher"
    assert entry["natural"]["n"] == 240
    assert entry["natural"]["correct"] > 220
    assert "teacher: natural accuracy" in (tmp_path / "run" / "run.log").read_text()


def test_both_teachers_are_measured(plain, of_normalised, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(InputError, match=r"^second teacher: natural accuracy .* wrap it with mean="):
        distill(student(), DATA, teacher=plain, second_teacher=of_normalised, out=out, **settings(objective="mtard"))
    good = Seen(of_normalised, normalised)
    distill(student(), DATA, teacher=plain, second_teacher=good, out=out, **settings(objective="mtard"))
    entries = json.loads((out / "run.json").read_text())["teachers"]
    assert [entry["role"] for entry in entries] == ["teacher", "second teacher"]


def test_a_refused_teacher_leaves_nothing_and_moves_nothing(plain, of_normalised, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(InputError, match="no better than chance"):
        distill(student(), DATA, teacher=of_normalised, out=out, **settings())
    assert not out.exists()
    distill(student(), DATA, teacher=plain, out=out, **settings())
    with pytest.raises(InputError, match="no better than chance"):
        distill(student(), DATA, teacher=of_normalised, out=out, fresh=True, **settings())
    assert (out / "model.json").exists()


def test_a_spoiled_teacher_can_be_meant(of_normalised, tmp_path):
    distill(student(), DATA, teacher=of_normalised, out=tmp_path / "run", **settings(check_teacher=False))
    (entry,) = json.loads((tmp_path / "run" / "run.json").read_text())["teachers"]
    assert entry["natural"] is None


def test_a_run_that_goes_on_does_not_measure_again(plain, tmp_path):
    seen: list[int] = []
    teacher = Seen(plain, lambda x: seen.append(len(x)) or x)
    distill(student(), DATA, teacher=teacher, out=tmp_path / "run", **settings())
    assert 240 in {sum(seen[: index + 1]) - 3 for index in range(4)}
    seen.clear()
    run = distill(student(), DATA, teacher=teacher, out=tmp_path / "run", **settings())
    assert run.reused
    assert sum(seen) < 240


def test_measuring_changes_nothing_of_the_run(plain, tmp_path):
    runs = [
        distill(student(), DATA, teacher=plain, out=tmp_path / str(check), **settings(check_teacher=check))
        for check in (True, False)
    ]
    first, second = (run.model.state_dict() for run in runs)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


# Images of another shape


GIVEN = (1, 6, 9)


@pytest.mark.parametrize(
    ("wanted", "covering"),
    [
        ((3, 6, 9), (6, 9)),
        ((3, 12, 18), (12, 18)),
        ((1, 2, 3), (2, 3)),
        ((1, 6, 5), (6, 9)),
        ((3, 12, 10), (12, 18)),
        ((1, 4, 4), (4, 6)),
        ((3, 4, 9), (6, 9)),
    ],
)
def test_images_are_scaled_as_the_field_does_it_and_cropped_in_the_middle(wanted, covering):
    x = images(4, GIVEN, dtype=torch.float64)
    expected = F.interpolate(x, covering, mode="bilinear", align_corners=False, antialias=True)
    top, left = (covering[0] - wanted[1]) // 2, (covering[1] - wanted[2]) // 2
    expected = expected[:, :, top : top + wanted[1], left : left + wanted[2]]
    for seen in (Adapted(nn.Identity(), GIVEN, wanted).double()(x), fitted(x, wanted)):
        assert seen.shape == (4, *wanted)
        for channel in range(wanted[0]):
            torch.testing.assert_close(seen[:, channel], expected[:, 0], rtol=0, atol=1e-6)
        assert seen.min() >= 0
        assert seen.max() <= 1 + 1e-12


def test_images_of_other_channels_than_grey_are_not_guessed_at():
    with pytest.raises(InputError, match="images have 3 channels, the model takes 1"):
        fitted(torch.rand(2, 3, 6, 9), (1, 6, 9))


def test_resized_images_of_one_grey_stay_that_grey():
    seen = Adapted(nn.Identity(), (3, 9, 4), (3, 5, 11))(torch.full((2, 3, 9, 4), 0.3))
    torch.testing.assert_close(seen, torch.full((2, 3, 5, 11), 0.3))


def test_gradients_flow_through_to_the_pixels_that_come():
    network = Adapted(TinyNet(channels=3), GIVEN, (3, 4, 12)).double()
    x = images(3, GIVEN, dtype=torch.float64).requires_grad_(True)
    assert torch.autograd.gradcheck(network, (x,))


def test_only_a_model_that_says_so_is_adapted():
    free = TinyNet()
    assert input_shape(free) is None
    assert adapted(free, GIVEN) is free
    ours = create_model("cnn", input_shape=(3, 8, 8), num_classes=5, width=2)
    assert input_shape(ours) == (3, 8, 8)
    assert adapted(ours, (3, 8, 8)) is ours
    assert isinstance(adapted(ours, (1, 6, 9)), Adapted)
    assert isinstance(adapted(free, GIVEN, (3, 6, 9)), Adapted)
    with pytest.raises(InputError, match=r"teacher: cannot process images of shape \(2, 8, 8\): it was made for"):
        adapted(ours, (2, 8, 8), what="teacher")
    with pytest.raises(InputError, match=r"itself says that it takes \[3, 8, 8\], and not \[1, 8, 8\]"):
        adapted(ours, (3, 8, 8), (1, 8, 8))


class Strict(nn.Module):
    """A teacher of 8 x 8 images that takes no others, wrapped for colour."""

    def __init__(self, network: Normalized) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1:] != (3, 8, 8):
            raise ValueError("images must be (3, 8, 8)")
        return self.network(x.mean(1, keepdim=True))


@pytest.fixture(scope="module")
def digits_teacher(tmp_path_factory):
    model = create_model("cnn", input_shape=(1, 8, 8), num_classes=10, width=8, mean=[0.3], std=[0.38])
    out = tmp_path_factory.mktemp("teacher") / "run"
    return train(
        model, "digits", out=out, objective="natural", threat=THREAT, epochs=8, batch_size=50, augmentation="shift"
    )


def enlarged() -> Splits:
    """The digits at 16 x 16."""
    data = load_data("digits")
    parts = [
        ImageData(F.interpolate(part.x, scale_factor=2), part.y, 10, name="large digits")
        for part in (data.train.subset(torch.arange(300)), data.validation)
    ]
    return Splits(*parts)


@pytest.mark.parametrize("objective", ["rslad", "adaad", "saad"])
def test_a_student_of_larger_images_learns_from_a_teacher_that_sees_them_smaller(objective, digits_teacher, tmp_path):
    student = create_model("cnn", input_shape=(1, 16, 16), num_classes=10, width=2)
    common = settings(objective=objective, epochs=1)
    run = distill(student, enlarged(), teacher=digits_teacher.folder, out=tmp_path / "run", **common)
    (entry,) = json.loads((run.folder / "run.json").read_text())["teachers"]
    assert entry["input"] == [1, 8, 8]
    assert entry["natural"]["correct"] > 0.7 * entry["natural"]["n"]
    card = json.loads((run.folder / "model.json").read_text())
    assert card["teacher_sha256"] == json.loads((digits_teacher.folder / "model.json").read_text())["sha256"]


def test_a_factorys_teacher_of_another_shape_needs_to_be_told_which(digits_teacher, tmp_path):
    student = create_model("cnn", input_shape=(1, 16, 16), num_classes=10, width=2)
    teacher = Strict(digits_teacher.model)
    with pytest.raises(InputError, match=r"must be \(3, 8, 8\); .* needs teacher_input=\[C, H, W\]"):
        distill(student, enlarged(), teacher=teacher, out=tmp_path / "run", **settings())
    common = settings(teacher_input=[3, 8, 8])
    run = distill(student, enlarged(), teacher=teacher, out=tmp_path / "run", **common)
    (entry,) = json.loads((run.folder / "run.json").read_text())["teachers"]
    assert entry["input"] == [3, 8, 8]
    assert entry["natural"]["correct"] > 0.7 * entry["natural"]["n"]


def test_causes_are_tried_on_what_the_teacher_itself_sees(digits_teacher):
    bare = Seen(digits_teacher.model.network, lambda x: x[:, :1])
    seen = Adapted(bare, (1, 16, 16), (3, 8, 8))
    data = enlarged().validation
    found = measure_teacher(Adapted(digits_teacher.model, (1, 16, 16), (1, 8, 8)), data)
    assert found.natural.percent > 70
    spoiled = Adapted(Seen(digits_teacher.model, lambda x: x / 255), (1, 16, 16), (1, 8, 8))
    assert "expects pixels in [0, 255]" in refusal(spoiled, data)
    assert seen.wanted == (3, 8, 8)


# The command


@pytest.fixture
def crdnd(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(arguments)
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return run


def test_check_teacher_measures_both_accuracies_and_trains_nothing(crdnd, digits_teacher, tmp_path):
    status, out, _ = crdnd("check-teacher", str(digits_teacher.folder), "--eps", "0.1", "--n", "100", "--json")
    found = json.loads(out)
    assert status == 0
    assert (found["schema"], found["data"], found["natural"]["n"]) == ("crdnd.teacher/1", "digits", 200)
    row = found["results"]["rows"][0]
    assert row["n"] == 100
    assert found["results"]["protocol"]["split"] == "validation"
    assert set(row["attacks"]) == {"pgd_sat", "cw_inf", "apgd_t"}
    assert f"{row['worst_case']['correct']}.0% stand under pgd_sat, cw_inf, apgd_t at linf eps 0.1" in found["verdict"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("eps", "said"), [("0.1", False), ("0.2", True)])
def test_a_teacher_for_another_threat_model_is_mentioned(eps, said, crdnd, digits_teacher):
    student = ["--model", "cnn,width=2", "--epochs", "1", "--set", "attack.steps=1", "--eps", eps, "--out", "student"]
    status, _, err = crdnd("distill", "--objective", "ard", "--teacher", str(digits_teacher.folder), *student)
    assert status == 0
    warning = "warning: the teacher was trained for linf eps=0.1, the student is for linf eps=0.2"
    assert (warning in err) == said


def test_check_teacher_tells_people(crdnd, digits_teacher):
    status, out, _ = crdnd("check-teacher", str(digits_teacher.folder))
    assert status == 0
    assert re.search(r"teacher: natural accuracy 9\d\.\d% .* on validation images", out)
    assert "verdict: it knows the data" in out


def test_check_teacher_refuses_as_distill_does(crdnd, digits_teacher, tmp_path, monkeypatch):
    (tmp_path / "wrong_teachers.py").write_text(
        "import torch\n"
        "from crdnd import load_model\n"
        f"def scaled():\n    model = load_model({str(digits_teacher.folder)!r})\n"
        "    def halve(module, inputs):\n        return (inputs[0] / 255,)\n"
        "    model.register_forward_pre_hook(halve)\n"
        "    return model\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    status, out, err = crdnd("check-teacher", "wrong_teachers:scaled")
    sys.modules.pop("wrong_teachers", None)
    assert (status, out) == (2, "")
    assert "no better than chance" in err
    assert "expects pixels in [0, 255]" in err
    assert err.count("\n") == 1
    assert crdnd("check-teacher", str(digits_teacher.folder), "--input", "8,8")[0] == 2
