"""`estimate`: the arithmetic under a clock that is made up, and that the steps are the run's own."""

import json
import math
import os
import signal

import numpy as np
import pytest
import torch

from crdnd import InputError, Interrupted, create_model
from crdnd.cli import main
from crdnd.data import ImageData, Splits, StreamedData
from crdnd.engine import Counts, cost, estimate
from crdnd.engine.loop import Trainer
from support import CLASSES, SHAPE, Recorder, TinyNet

torch.set_num_threads(1)  # networks this small wait for their threads more than they compute


class Clock:
    """Every look at it takes `tick` seconds."""

    def __init__(self, tick: float) -> None:
        self.tick, self.now = tick, 0.0

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


def splits(train: int = 200, validation: int = 30) -> Splits:
    draws = torch.Generator().manual_seed(0)

    def part(count: int) -> ImageData:
        x = torch.randint(0, 256, (count, *SHAPE), generator=draws).to(torch.uint8)
        return ImageData(x, torch.arange(count) % CLASSES, CLASSES)

    return Splits(part(train), part(validation))


def network(seed: int = 0) -> TinyNet:
    return TinyNet(dtype=torch.float32, seed=seed)


PLAIN = {"objective": "pgd_at", "threat": {"eps": 0.1}, "attack": {"steps": 1}, "batch_size": 48}


def test_a_run_is_its_epochs_and_validations(monkeypatch):
    found = estimate(network(), splits(), clock=Clock(0.25), epochs=7, validate_every=3, **PLAIN)
    assert (found.batch_size, found.measured_batch_size, found.extrapolated) == (48, 48, False)
    assert found.steps_timed == 30
    assert found.step_seconds == 0.25
    assert found.steps_per_epoch == 4  # an incomplete last batch is left out
    assert found.epoch_seconds == 1.0
    assert found.validation_seconds == 0.25  # 30 images fit one batch
    assert (found.epochs, found.validations) == (7, 3)  # after epochs 3, 6 and 7
    assert found.run_seconds == pytest.approx(7 * 1.0 + 3 * 0.25)
    assert found.peak_memory is None or found.peak_memory > 1e7


@pytest.mark.parametrize(("tick", "measured"), [(1.2, 48), (1.3, 24), (3.0, 24), (50.0, 24)])
def test_where_a_step_is_slow_a_smaller_batch_is_measured_and_scaled(tick, measured):
    # The probe of 4 images takes a tick, so 48 images would take 12; a batch is not halved below 16 images.
    found = estimate(network(), splits(), clock=Clock(tick), **PLAIN)
    assert found.measured_batch_size == measured
    assert found.extrapolated == (measured < 48)
    assert found.step_seconds == pytest.approx(tick * 48 / measured)
    assert found.steps_timed == max(3, math.floor(15 / tick) + 1)
    assert found.validation_seconds == pytest.approx(tick * 30 / min(30, measured))


def test_a_part_of_the_data_stands_for_all_of_it():
    some = estimate(network(), splits(48, 48), counts=Counts(4800, 960), clock=Clock(0.25), epochs=2, **PLAIN)
    assert some.steps_per_epoch == 100
    assert some.epoch_seconds == pytest.approx(100 * 0.25)
    assert some.validation_seconds == pytest.approx(20 * 0.25)


def test_the_steps_are_those_of_the_run_and_the_first_ones_do_not_count(monkeypatch):
    made = []
    step = Trainer._one_step

    def one_step(self: Trainer) -> None:
        made.append((self.batch_size, self.step_function.attack, self.settings.augmentation))
        step(self)

    monkeypatch.setattr(Trainer, "_one_step", one_step)
    monkeypatch.setattr(Trainer, "_validate", lambda *_: pytest.fail("a validation falls between the steps"))
    monkeypatch.setattr(Trainer, "_save", lambda *_: pytest.fail("a save falls between the steps"))
    found = estimate(network(), splits(), clock=Clock(0.25), augmentation="crop_flip", **PLAIN)
    sizes = [size for size, *_ in made]
    assert sizes == [4] * (cost.WARM_UP + 1) + [48] * (cost.WARM_UP + found.steps_timed)
    assert {augmentation for *_, augmentation in made} == {"crop_flip"}
    assert {attack.steps for _, attack, _ in made} == {1}


def test_the_median_counts_so_that_one_slow_step_does_not():
    watch = cost._Stopwatch(Clock(1.0), 30)
    watch.readings = [0.0, 5.0, 6.0, 7.0, 30.0]
    assert watch.seconds == [1.0, 1.0, 23.0]  # the step to 5.0 belongs to the warm-up


def test_a_validation_is_timed_with_both_attacks_on_every_image(monkeypatch):
    seen = []
    validate = cost.validate
    monkeypatch.setattr(cost, "validate", lambda *a: seen.append(validate(*a)))
    # An eps at which the network would fail, were the images really moved.
    estimate(network(), splits(), clock=Clock(0.25), **PLAIN | {"threat": {"eps": 0.9}})
    assert [(found.clean.correct, found.robust.correct, found.robust.n) for found in seen] == [(30, 30, 30)] * 2


@pytest.mark.parametrize(
    ("more", "what"),
    [({"awp": {"gamma": 0.01, "warmup": 0.5}}, "a step that also moves the weights"), ({"igdm": 1.0}, "a mirror")],
)
def test_what_begins_later_in_a_run_is_counted_from_the_start(more, what):
    def passes(**settings: object) -> int:
        student = Recorder(network())
        teachers = [network(1)] if "igdm" in more else []
        objective = {"objective": "rslad"} if teachers else {}
        estimate(student, splits(), teachers=teachers, clock=Clock(0.25), **PLAIN | objective | settings)
        return sum(len(x) for x, training in zip(student.inputs, student.modes, strict=True) if training)

    assert passes(**more) > passes(), what


def test_averaged_weights_cost_a_pass_over_the_training_images_at_every_validation():
    plain = estimate(network(), splits(), clock=Clock(0.25), **PLAIN)
    averaged = estimate(network(), splits(), clock=Clock(0.25), ema=0.9, **PLAIN)
    assert averaged.validation_seconds == pytest.approx(plain.validation_seconds + 0.25 * 200 / 48)


def test_a_teacher_with_random_weights_is_not_judged_and_streamed_data_are_decoded(tmp_path):
    (tmp_path / "image").write_bytes(b"any")
    pixels = np.random.default_rng(0).integers(0, 256, (*SHAPE[1:], SHAPE[0]), dtype=np.uint8)

    def part(count: int) -> StreamedData:
        x = torch.empty((count, *SHAPE), dtype=torch.uint8, device="meta")
        y = torch.arange(count) % CLASSES
        return StreamedData(x, y, CLASSES, root=tmp_path, files=["image"] * count, decode=lambda _: pixels)

    data = Splits(part(200), part(60))
    found = estimate(network(), data, teachers=[network(1)], clock=Clock(1.0), **PLAIN | {"objective": "rslad"})
    assert found.steps_per_epoch == 200 // 48


def test_nothing_is_left_behind_and_what_a_run_refuses_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    estimate(network(), splits(), teachers=[network(1)], clock=Clock(1.0), **PLAIN | {"objective": "rslad"})
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="objective rslad needs a teacher"):
        estimate(network(), splits(), **PLAIN | {"objective": "rslad"})
    with pytest.raises(InputError, match="uses no teacher"):
        estimate(network(), splits(), teachers=[network(1)], **PLAIN)


def test_a_stopped_estimate_does_not_speak_of_a_run():
    clock = Clock(0.25)

    def stopping() -> float:
        if clock.now > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return clock()

    with pytest.raises(Interrupted, match=r"^stopped; an estimate keeps nothing\.$") as stopped:
        estimate(network(), splits(), clock=stopping, **PLAIN)
    assert stopped.value.exit_code == 143


def test_memory_of_images_that_are_not_there_is_added(monkeypatch):
    monkeypatch.setattr(cost, "_peak_memory", lambda: 10**6)
    found = estimate(network(), splits(48, 16), counts=Counts(4000, 1000), clock=Clock(0.25), **PLAIN)
    assert found.peak_memory == 10**6 + (5000 - 64) * math.prod(SHAPE)


def test_memory_grows_with_the_batch_as_between_the_two_that_were_seen(monkeypatch):
    readings = iter([1000, 1600])  # 4 images, then 24: 30 an image
    monkeypatch.setattr(cost, "_peak_memory", lambda: next(readings))
    assert estimate(network(), splits(), clock=Clock(2.0), **PLAIN).peak_memory == 1600 + 30 * (48 - 24)


# The command


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["estimate", *arguments])
    return ended.value.code, *capsys.readouterr()


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "MOST", 3)


SMALL = ("--model", "cnn", "--set", "model.width=2", "--set", "attack.steps=1")


@pytest.mark.usefixtures("few")
def test_a_published_recipe_is_estimated_on_made_up_images_without_its_data_or_teacher(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CRDND_DATA", str(tmp_path / "nowhere"))
    small = (*SMALL, "--set", "batch_size=40", "--set", "validate_every=4")
    teacher = ("--teacher-model", "cnn,width=3")
    status, out, err = run(capsys, "rslad-cifar100-resnet18-short", *small, *teacher, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["made_up_images"] is True
    assert (found["epochs"], found["validations"], found["steps_per_epoch"]) == (30, 8, 45_000 // 40)
    assert found["epoch_seconds"] == pytest.approx(found["step_seconds"] * found["steps_per_epoch"])
    assert found["run_seconds"] > 30 * found["epoch_seconds"]
    status, out, _ = run(capsys, "mtard-cifar10-resnet18", *small, *teacher, *teacher)
    assert status == 0
    assert "steps of 40 images with made-up images" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("few")
def test_data_that_is_there_is_used_itself(capsys):
    status, out, _ = run(capsys, "--objective", "trades", "--eps", "0.1", *SMALL, "--json", "--epochs", "2")
    found = json.loads(out)
    assert status == 0
    assert (found["made_up_images"], found["extrapolated"], found["steps_per_epoch"]) == (False, False, 1147 // 128)


@pytest.mark.usefixtures("few")
def test_a_teacher_is_an_architecture_with_weights_too(capsys, tmp_path):
    teacher = create_model("cnn", input_shape=(1, 8, 8), num_classes=10, width=3)
    torch.save(teacher.state_dict(), tmp_path / "w.pt")
    given = ("--objective", "rslad", "--eps", "0.1", *SMALL, "--teacher", "cnn,width=3,size=8")
    status, out, err = run(capsys, *given, "--teacher-weights", str(tmp_path / "w.pt"))
    assert (status, err) == (0, "")
    assert "steps of 128 images, " in out
    status, _, err = run(capsys, *given)
    assert (status, "is an architecture without weights" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rslad-cifar10-resnet18", *SMALL), "teacher: rslad looks at 1, given are 0; name each by --teacher, or as"),
        (("mtard-cifar10-resnet18", *SMALL, "--teacher-model", "cnn"), "teacher: mtard looks at 2, given are 1"),
        (("rslad-cifar10-resnet18", *SMALL, "--teacher-model", "cnn,2"), "--teacher-model cnn,2: write it as cnn, or"),
        (("rslad-cifar10-resnet18", *SMALL, "--teacher-model", "cn"), "unknown model 'cn'; did you mean 'cnn'?"),
        (("rslad-cifar10-resnet18", *SMALL, "--data", "cifr10"), "data: 'cifr10' is neither a data set nor a path"),
        (("--model", "cnn", "--eps", "0.1"), "objective: this setting is required"),
        (("nowhere.yaml",), "nowhere.yaml: cannot be read"),
    ],
)
def test_what_is_missing_is_said_in_one_line(arguments, message, capsys):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
