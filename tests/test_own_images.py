"""A folder of one's own images: what is read of it, what is chosen for it, and what a model says of an image."""

import json
import logging
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn

from crdnd import load_data
from crdnd.cli import main
from crdnd.data import ImageData, load_test, read_image, read_images, read_splits, with_classes
from crdnd.engine.checkpoint import read_checkpoint
from crdnd.errors import InputError
from crdnd.evaluation import nearest_adversarial
from crdnd.models import fitted

torch.set_num_threads(1)

PAGE = (Path(__file__).parent.parent / "docs" / "your_own_images.md").read_text(encoding="utf-8")
H, W = 24, 36
COLOURS = {"blue": (30, 60, 200), "red": (200, 60, 30)}


def photograph(colour, seed=0, height=H, width=W):
    noise = np.random.default_rng(seed).integers(-25, 26, (height, width, 3))
    return Image.fromarray((np.array(colour) + noise).astype(np.uint8))


def make_photos(root, counts=(14, 11), test=4, size=(H, W)):
    for part, numbers in (("train", counts), ("test", (test, test))):
        for (name, colour), count in zip(COLOURS.items(), numbers, strict=True):
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                height, width = size[0] + index % 3, size[1] - index % 2
                photograph(colour, index, height, width).save(root / part / name / f"{index}.png")
    return root


@pytest.fixture
def crdnd(tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder: its status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["crdnd", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("own") / "my photos")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, photos):
    """The folder of a student that `--images` alone has made."""
    out = tmp_path_factory.mktemp("runs") / "student"
    with pytest.raises(SystemExit) as ended:
        main(["distill", "--images", str(photos), "--epochs", "2", "--set", "attack.steps=1", "--out", str(out)])
    assert ended.value.code == 0
    return out


# The walk-through


def test_the_commands_of_the_page_make_a_model_of_a_folder(crdnd, tmp_path):
    (script,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    (tmp_path / "make.py").write_text(script, encoding="utf-8")
    runpy.run_path(str(tmp_path / "make.py"))
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    commands = [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]
    assert [command[0] for command in commands] == ["distill", "evaluate", "predict", "predict"]
    said = [crdnd(*command) for command in commands]
    assert [status for status, _, _ in said] == [0, 0, 0, 0], said
    assert "validation clean" in said[0][1]
    assert "worst" in said[1][1]
    assert "3/10.png" in said[2][1].replace("\n", "")
    assert "nearest adversarial" in said[3][1]
    assert "2 million images" in PAGE
    assert read_splits("photos").test.sha256 == load_data("photos", image_size=8).test.sha256, "digits are 8x8"


# Reading


def test_every_orientation_of_a_photograph_is_turned_upright(tmp_path):
    image = photograph((90, 90, 90), 3)
    for orientation in range(1, 9):
        data = Image.Exif()
        data[0x0112] = orientation
        file = tmp_path / str(orientation) / "1.png"
        file.parent.mkdir()
        image.save(file, exif=data)
        with Image.open(file) as stored:
            upright = np.array(ImageOps.exif_transpose(stored).convert("RGB"))
        assert np.array_equal(read_image(file), upright), orientation
    for orientation in (2, 4, 5, 7, 8):
        (tmp_path / str(orientation) / "1.png").unlink()
    with pytest.raises(InputError, match=r"6.1\.png: is 24x36, but .*1\.png is 36x24"):
        read_images(tmp_path)  # their heads are looked at in the same way


def test_what_a_phone_or_a_scanner_makes_is_an_image(tmp_path):
    photo = photograph((200, 60, 30), 1)
    photo.convert("CMYK").save(tmp_path / "cmyk.jpg")
    photo.save(tmp_path / "frames.gif", save_all=True, append_images=[photograph((0, 0, 99))])
    photo.save(tmp_path / "pages.tiff", save_all=True, append_images=[photograph((0, 0, 99))])
    photo.save(tmp_path / "png under another name.JPG", format="PNG")
    for file in sorted(tmp_path.iterdir()):
        pixels = read_image(file, (16, 16), 3)
        assert pixels.shape == (16, 16, 3)
        assert np.abs(pixels.mean((0, 1)) - (200, 60, 30)).max() < 25, file.name


@pytest.mark.parametrize("size", [(427, 569), (97, 211), (150, 150), (33, 12), (7, 90), (64, 64), (64, 63)])
def test_a_photograph_is_scaled_by_the_rule_that_is_inside_exported_files(size, tmp_path):
    # Smooth, so that a shift by a part of a pixel would be seen, and nothing else.
    rows, columns = (np.linspace(0, 1, count)[:, None] for count in size)
    waves = np.stack([np.sin(20 * rows + shift) * np.cos(25 * columns.T + shift) for shift in (0, 1, 2)], axis=2)
    Image.fromarray((127.5 + 100 * waves).round().astype(np.uint8)).save(tmp_path / "photo.png")
    whole = torch.from_numpy(read_image(tmp_path / "photo.png").copy()).permute(2, 0, 1)[None].double()
    expected = 255 * fitted(whole / 255, (3, 64, 64))[0].permute(1, 2, 0)
    seen = torch.from_numpy(read_image(tmp_path / "photo.png", (64, 64), 3).copy()).double()
    assert (seen - expected).abs().max() <= 1.5, "two roundings to whole levels"


def test_grey_and_colour_become_what_a_model_takes(tmp_path):
    photograph((200, 60, 30)).save(tmp_path / "colour.png")
    photograph((200, 60, 30)).convert("L").save(tmp_path / "grey.png")
    grey = read_image(tmp_path / "grey.png")
    assert np.array_equal(read_image(tmp_path / "colour.png", None, 1), grey)
    assert np.array_equal(read_image(tmp_path / "grey.png", None, 3), np.repeat(grey, 3, axis=2))


def damage(folder):
    """Files that cannot be read, each for a reason of its own."""
    whole = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    (folder / "flipped.png").write_bytes(flipped)
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    (folder / "renamed.jpg").write_bytes(b"\0\0\0\x18ftypmif1" + bytes(50))
    (folder / "link.jpg").symlink_to(folder / "nowhere.jpg")
    Image.new("1", (13000, 7000)).save(folder / "huge.png")
    return ["cut.png", "empty.jpg", "flipped.png", "huge.png", "link.jpg", "phone.HEIC", "renamed.jpg"]


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_files_that_cannot_be_read_are_listed_and_skipped(tmp_path, caplog):
    whole = make_photos(tmp_path / "a" / "photos")
    expected = read_splits(whole, image_size=16)
    names = damage(whole / "train" / "red")
    with caplog.at_level(logging.WARNING, "crdnd"):
        found = read_splits(whole, image_size=16)
    assert found.sha256 == expected.sha256, "the fingerprint is of what was used"
    assert sorted(Path(line.split(": ")[0]).name for line in found.skipped) == names
    assert "skips 7 of 32 images, which cannot be read" in caplog.text
    assert all(caplog.text.count(f"{name}: ") == 1 for name in names), "each one once"
    assert "huge.png: has more than 89 million pixels" in caplog.text
    for name in ("phone.HEIC", "renamed.jpg"):
        assert f"{name}: is a HEIC image, which is not read; save it as JPEG" in caplog.text


def test_a_class_of_which_most_cannot_be_read_is_refused(tmp_path):
    make_photos(tmp_path, counts=(5, 4))
    for index in range(3):
        (tmp_path / "train" / "red" / f"{index}.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"red: 3 of its 4 images cannot be read; .*0\.png: is not a readable image"):
        read_splits(tmp_path, image_size=16)


def test_streamed_images_that_are_cut_off_are_skipped_before_the_run(tmp_path, monkeypatch):
    make_photos(tmp_path)
    file = tmp_path / "train" / "blue" / "1.png"
    file.write_bytes(file.read_bytes()[:-30])
    monkeypatch.setattr("crdnd.data._files.IN_MEMORY", 0)
    (line,) = read_splits(tmp_path, image_size=16).skipped
    assert line.startswith(f"{file}: is not a readable image")


def test_parts_of_the_data_are_not_taken_for_classes(tmp_path):
    make_photos(tmp_path)
    (tmp_path / "train").rename(tmp_path / "Training")
    (tmp_path / "test").rename(tmp_path / "Testing")
    splits = read_splits(tmp_path, image_size=16)
    assert (splits.train.class_names, len(splits.test)) == (("blue", "red"), 8)
    (tmp_path / "unsorted").mkdir()
    with pytest.raises(InputError, match=r"has unsorted beside Test?[a-z]*; leave only train, val and test in it"):
        read_splits(tmp_path, image_size=16)


def test_two_folders_of_one_split_are_refused(tmp_path):
    make_photos(tmp_path)
    for name in ("val", "valid"):
        shutil.copytree(tmp_path / "test", tmp_path / name)
    with pytest.raises(InputError, match="has val and valid; move the images of one into the other"):
        read_splits(tmp_path, image_size=16)


def test_a_class_may_be_called_train(tmp_path):
    for name in ("bus", "train"):
        (tmp_path / name).mkdir()
        for index in range(3):
            photograph((9, 9, 9), index).save(tmp_path / name / f"{index}.png")
    assert read_images(tmp_path, image_size=16).class_names == ("bus", "train")


def test_a_class_without_training_images_is_refused_and_one_without_test_images_is_named(tmp_path, caplog):
    make_photos(tmp_path)
    for file in (tmp_path / "test" / "blue").iterdir():
        file.unlink()
    with caplog.at_level(logging.WARNING, "crdnd"):
        test = read_splits(tmp_path, image_size=16).test
    assert "test: has no images of the class blue" in caplog.text
    assert test.y.tolist() == [1] * 4
    (tmp_path / "test" / "blue").rmdir()
    assert read_splits(tmp_path, image_size=16).test.y.tolist() == [1] * 4, "labels are told by names"
    (tmp_path / "train" / "new folder").mkdir()
    with pytest.raises(InputError, match=r"new folder: has no images; add some, or remove the folder"):
        read_splits(tmp_path, image_size=16)


@pytest.mark.parametrize(
    ("names", "model", "labels"),
    [
        (("a", "c"), ("a", "b", "c"), [2, 0]),
        (("c", "a", "b"), ("a", "b", "c"), [0, 2]),
        (("0", "1", "3"), ("0", "1", "2", "3"), [1, 0]),
        (("0", "1", "2"), ("0", "1", "10", "2"), [1, 0]),
        (("a",), ("a", "b", "c"), [0, 0]),
        (("a", "b"), ("0", "1"), [1, 0]),
        (("0", "1"), ("a", "b"), [1, 0]),
    ],
)
def test_labels_follow_the_names_of_the_models_classes(names, model, labels):
    y = torch.tensor([1, 0]) % len(names)
    data = ImageData(torch.zeros(2, 1, 3, 4), y, len(names), names)
    assert with_classes(data, model).y.tolist() == labels


def test_classes_without_names_are_taken_in_order_with_a_warning_and_only_if_they_are_as_many(caplog):
    data = ImageData(torch.zeros(2, 1, 3, 4), torch.tensor([1, 0]), 2, ("cat", "dog"))
    with_classes(data, ("0", "1"))
    assert "the model's classes have no names and are taken in the order of these: 0 is cat, 1 is dog" in caplog.text
    with pytest.raises(InputError, match=r"has 2 classes, cat and others; the model has 3, unnamed"):
        with_classes(data, ("0", "1", "2"))


def test_a_class_that_the_model_does_not_know_is_refused():
    data = ImageData(torch.zeros(2, 1, 3, 4), torch.tensor([1, 0]), 2, ("a", "x"))
    with pytest.raises(InputError, match=r"has images of the class 'x', which is none of a, b, c"):
        with_classes(data, ("a", "b", "c"))


def test_1000_classes_are_a_data_set(tmp_path):
    for label in range(1000):
        folder = tmp_path / "train" / f"{label:03}"
        folder.mkdir(parents=True)
        for index in range(2):
            Image.new("L", (3, 2), label % 256).save(folder / f"{index}.png")
    splits = read_splits(tmp_path, image_size=2)
    assert (splits.train.num_classes, len(splits.train), len(splits.validation)) == (1000, 1800, 200)


# Training


def test_images_alone_make_a_teacher_and_a_student(trained, photos, crdnd):
    card = json.loads((trained / "model.json").read_text())
    teacher = json.loads((trained.with_name("student-teacher") / "model.json").read_text())
    assert (card["method"], teacher["method"], teacher["role"]) == ("rslad", "trades", "teacher")
    assert card["teacher_sha256"] == teacher["sha256"]
    assert card["class_names"] == ["blue", "red"]
    assert card["architecture"]["input_shape"] == [3, 25, 25], "the typical shorter side"
    assert card["threat"] == {"norm": "linf", "eps": 8 / 255}
    command = ("--images", str(photos), "--epochs", "2", "--set", "attack.steps=1", "--out", str(trained))
    status, out, err = crdnd("distill", *command)
    assert status == 0
    assert "already finished, reused" in out
    assert f"crdnd evaluate {trained} --data '{photos}'" in out
    assert "no --teacher was given, so one is trained first" in err
    assert "the teacher was trained before" in err
    assert "image_size=25" in err
    assert "2 classes, with 10 (red) to 13 (blue) training images" in " ".join(err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "resnet-18"), "unknown model 'resnet-18'; did you mean 'resnet18'"),
        (("--model", "no:such"), "no:such: cannot be imported"),
        (("--set", "ema=2"), "ema: input should be less than 1"),
        (("--objective", "trades"), "objective trades uses no teacher"),
        (("--objective", "mtard"), "objective mtard needs a second, naturally trained teacher"),
        (("--objective", "mtard", "--second-teacher", "nowhere"), "nowhere: there is no such model"),
        (("--set", "objective.tau=3"), "objective: tau: no such setting"),
        (("--set", "model.widht=3"), "model cnn: widht: no such setting; did you mean 'width'"),
        (("--set", "teacher_input=[3, 9, 9]"), "teacher_input: is for a teacher that is given; give --teacher too"),
        (("--teacher-weights", "w.pt"), "teacher_weights: is for a teacher that is given; give --teacher too"),
        (("--set", "image_size=64px"), "image_size: must be a whole number of pixels, such as 64, got '64px'"),
        (("--set", "image_size=0"), "image_size: input should be greater than or equal to 1, got 0"),
    ],
)
def test_what_a_student_cannot_be_is_said_before_its_teacher_is_trained(arguments, message, photos, crdnd, tmp_path):
    status, out, err = crdnd("distill", "--images", str(photos), *arguments, "--out", "run")
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert "one is trained first" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "ema=0.5"), r"r: holds a run with other settings \(ema: None -> 0\.5\)\. Use --fresh"),
        (("--set", "model.width=3"), r"r: holds a run with other settings \(model: cnn\S* \w+ -> cnn\S* \w+\)\. Use"),
        (("--set", "split_seed=1"), r"r: holds a run with other settings \(data: my photos \w+ -> my photos \w+;"),
    ],
)
def test_another_run_in_the_students_folder_is_refused_before_its_teacher_is_trained(
    arguments, message, trained, photos, crdnd, tmp_path
):
    shutil.copytree(trained, tmp_path / "r")
    options = ("--images", str(photos), "--epochs", "2", "--set", "attack.steps=1", "--out", "r")
    status, out, err = crdnd("distill", *options, *arguments)
    assert (status, out) == (2, "")
    assert re.match(f"error: {message}", err.splitlines()[-1])
    assert "one is trained first" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_what_is_no_run_in_the_students_folder_is_refused_before_its_teacher_is_trained(trained, photos, crdnd):
    shutil.copytree(trained, "r")
    options = ("--images", str(photos), "--epochs", "2", "--set", "attack.steps=1", "--out", "r")
    for damage, message in (
        (lambda: Path("r/run.json").write_text("{"), "r/run.json: cannot be read as JSON .*--fresh"),
        (lambda: Path("r/run.json").unlink(), r"r: holds a checkpoint, but run\.json with its settings is missing"),
        (lambda: Path("r/checkpoint.json").unlink(), "r: holds a model and not the run that made it"),
    ):
        damage()
        status, _, err = crdnd("distill", *options)
        assert status == 2
        assert re.match(f"error: {message}", err.splitlines()[-1])
        assert not Path("r-teacher").exists()


def test_a_second_teacher_in_the_students_folder_is_refused_before_the_first_is_trained(trained, photos, crdnd):
    shutil.copytree(trained, "r")
    second = ("--objective", "mtard", "--second-teacher", "r/", "--out", "./r", "--fresh")
    status, _, err = crdnd("distill", "--images", str(photos), *second)
    assert (status, err.splitlines()[-1]) == (2, "error: out: is the teacher's folder; choose another.")
    assert [path.name for path in Path().iterdir()] == ["r"]


def test_a_teacher_shares_all_settings_but_those_that_the_page_says_it_does_not(photos, capsys):
    from crdnd.cli._images import teacher_of
    from crdnd.recipe import Recipe

    (sentence,) = re.findall(r"but for the student's own: (.*?)\.", PAGE, re.DOTALL)
    settings = {field.alias or name for name, field in Recipe.model_fields.items()}
    own = set(re.findall(r"`(\w+)`", sentence)) - {"teacher"}
    assert own < settings
    own |= {"out", *(name for name in settings if "teacher" in name)}
    given = dict.fromkeys(settings, "given") | {"data": str(photos), "image_size": 16, "out": "runs/mine"}
    found = teacher_of(given, given)
    assert {name for name in settings if found.get(name) == given[name]} == settings - own
    assert (found["out"], found["role"], found["objective"]) == ("runs/mine-teacher", "teacher", "trades")


def test_what_the_user_gives_wins_and_the_rest_is_chosen(photos):
    from crdnd.cli._images import with_defaults

    given = {"data": str(photos), "image_size": 48, "threat": {"norm": "l2"}, "model": "wrn", "epochs": 7}
    settings = with_defaults(given, "student")
    assert {key: settings[key] for key in ("image_size", "model", "epochs")} == {
        "image_size": 48, "model": "wrn", "epochs": 7,
    }  # fmt: skip
    assert settings["threat"] == {"norm": "l2", "eps": 0.5}, "an eps for the norm"
    assert settings["augmentation"] == "crop_flip"
    own = with_defaults({"data": str(photos), "model": {"width": 3}}, "teacher")
    assert own["model"] == {"name": "cnn", "width": 3}


def test_grey_images_are_not_mirrored_and_photographs_become_64_pixels(tmp_path, capsys):
    from crdnd.cli._images import with_defaults

    for label in "ab":
        (tmp_path / label).mkdir()
        Image.new("L", (90, 80), 7).save(tmp_path / label / "1.png")
    settings = with_defaults({"data": str(tmp_path)}, "student")
    assert (settings["augmentation"], settings["image_size"]) == ("shift", 64)
    said = capsys.readouterr().err
    assert all(f"  {key}=" in said for key in ("image_size", "model", "objective", "threat", "epochs", "batch_size"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--images", "nowhere"), "images: nowhere is no folder"),
        (("--images", ".", "--data", "digits"), "images: is a folder of your own, and --data"),
        (("--images", "empty"), "images: empty holds no images"),
        (("--images", "."), "run lies in the folder of the images; choose one elsewhere"),
    ],
)
def test_folders_that_will_not_do_are_refused_in_one_line(arguments, message, crdnd, tmp_path):
    (tmp_path / "empty" / "test").mkdir(parents=True)
    status, out, err = crdnd("distill", *arguments, "--out", "run")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_folder_without_test_images_is_not_said_to_measure_the_model(tmp_path, crdnd):
    make_photos(tmp_path / "photos", counts=(12, 12), size=(8, 8))
    options = ("--objective", "natural", "--epochs", "1", "--set", "model.width=2")
    status, out, err = crdnd("train", "--images", "photos/train", *options, "--out", "r")
    assert status == 0, err
    assert "photos/train has no test/, so nothing in it can measure the model" in err
    assert "images that it was not trained on: crdnd evaluate r --data PATH" in out
    status, out, err = crdnd("train", "--images", "photos", *options, "--out", "s")
    assert "has no test/" not in err
    assert "on test data: crdnd evaluate s --data photos" in out
    for run, data, said in (("r", "photos/train", True), ("s", "photos", False)):
        status, out, err = crdnd("evaluate", run, "--data", data, "--attacks", "fgsm", "--json")
        assert (status, "holds no test images, and the model was trained on what it holds" in err) == (0, said)
        assert json.loads(out)["protocol"]["split"] == ("training" if said else "test")


def test_the_next_command_of_a_run_of_ones_own_code_sees_the_images_as_the_run_did(tmp_path, crdnd):
    make_photos(tmp_path / "my photos", counts=(12, 12))
    Path("photonets.py").write_text(
        "from torch import nn\ndef flat():\n    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))\n"
    )
    options = ("--model", "photonets:flat", "--objective", "natural", "--epochs", "1", "--set", "image_size=8")
    status, out, err = crdnd("train", "--images", "my photos", *options, "--out", "r")
    assert status == 0, err
    status, out, err = crdnd(*shlex.split(out.partition("crdnd ")[2]), "--attacks", "fgsm", "--json")
    assert status == 0, err
    assert json.loads(out)["protocol"]["eps"] == 8 / 255


def test_imbalanced_classes_are_reported(tmp_path, crdnd):
    make_photos(tmp_path / "photos", counts=(45, 3), size=(8, 8))
    status, _, err = crdnd(
        "train", "--images", "photos", "--objective", "natural", "--epochs", "1", "--set", "model.width=2", "--out", "r"
    )
    assert status == 0, err
    log = (tmp_path / "r" / "run.log").read_text()
    assert re.search(r"2 classes, with \d \(red\) to 4\d \(blue\) training images", log)
    assert re.search(r"WARNING the classes are imbalanced: blue has \d\d times as many training images as red", log)


# Evaluation


def test_a_test_folder_is_brought_to_the_model_and_its_classes_go_by_name(trained, photos, tmp_path, crdnd):
    command = ("evaluate", str(trained), "--attacks", "fgsm", "--json")
    status, out, _ = crdnd(*command, "--data", str(photos))
    whole = json.loads(out)["rows"][0]
    (tmp_path / "half" / "without images").mkdir(parents=True)
    (tmp_path / "half" / "red").symlink_to(photos / "test" / "red")
    status, out, err = crdnd(*command, "--data", "half")
    assert status == 0, err
    assert json.loads(out)["rows"][0]["verdicts"]["clean"] == whole["verdicts"]["clean"][1::2]
    status, _, err = crdnd(*command)
    assert status == 2
    assert "was trained on data called 'my photos'; say where with --data" in err


def test_a_teacher_of_photographs_is_measured_on_them(trained, photos, crdnd):
    teacher = Path(f"{trained}-teacher")
    status, out, err = crdnd("check-teacher", str(teacher), "--data", str(photos), "--json")
    assert (status, err) == (0, "")
    saved = read_checkpoint(teacher)
    found = saved.history[saved.best_epoch - 1].validation.clean
    assert json.loads(out)["natural"] == found.model_dump(), "the same images, at the size that it was trained at"


# Prediction


def test_a_prediction_sees_what_the_evaluation_saw(trained, photos, crdnd):
    from crdnd import load_model, predict

    status, out, err = crdnd("predict", str(trained), str(photos / "test"), "--top", "5", "--json")
    document = json.loads(out)
    assert (status, err, document["schema"], document["unreadable"]) == (0, "", "crdnd.predictions/1", [])
    test = load_test(str(photos), model_shape=(3, 25, 25))
    expected = predict(load_model(trained), test.batch(torch.arange(len(test)))[0]).probabilities
    by_file = {Path(entry["file"]).relative_to(photos / "test"): entry["classes"] for entry in document["images"]}
    assert len(by_file) == len(test) == 8
    for number, (label, row) in enumerate(zip(test.y.tolist(), expected, strict=True)):
        classes = by_file[Path(test.class_names[label]) / f"{number // 2}.png"]
        found = [entry["probability"] for entry in sorted(classes, key=lambda entry: entry["class"])]
        torch.testing.assert_close(torch.tensor(found), row, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_unreadable_images_are_listed_and_the_others_predicted(trained, photos, tmp_path, crdnd):
    photograph(COLOURS["red"]).save(tmp_path / "0.png")
    names = damage(tmp_path)
    status, out, err = crdnd("predict", str(trained), str(tmp_path), "nowhere.jpg", "--json")
    document = json.loads(out)
    assert status == 2
    assert [Path(entry["file"]).name for entry in document["images"]] == ["0.png"]
    assert len(document["unreadable"]) == len(names) + 1
    assert all(f"{name}: " in err for name in [*names, "nowhere.jpg"])


def test_a_distance_is_shown_with_its_bound(trained, photos, crdnd):
    image = str(photos / "test" / "red" / "0.png")
    status, out, _ = crdnd("predict", str(trained), image, "--distance", "--up-to", "1e-6", "--json")
    assert status == 0
    assert json.loads(out)["images"][0]["distance"] == {"norm": "linf", "eps": None, "up_to": 1e-6}
    assert "none found" in crdnd("predict", str(trained), image, "--distance", "--up-to", "1e-6")[1]
    status, _, err = crdnd("predict", str(trained), image, "--up-to", "0.1")
    assert status == 2
    assert "up_to: belongs to --distance" in err


class Threshold(nn.Module):
    """Class 1 where the mean pixel is above 0.5; so the nearest adversarial image is at |mean - 0.5| under linf."""

    def forward(self, x):
        z = 20 * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([-z, z, torch.full_like(z, -9)], dim=1)


@pytest.mark.parametrize(("norm", "scale"), [("linf", 1.0), ("l2", 35**0.5)])
def test_the_nearest_adversarial_image_is_found_where_it_is_known(norm, scale):
    means = torch.tensor([0.45, 0.52, 0.6, 0.2, 0.58, 0.41])
    x = means[:, None, None, None].expand(6, 1, 5, 7).clone()
    bound = 0.1 * scale
    found = nearest_adversarial(Threshold(), x, norm=norm, bound=bound)
    exact = (means - 0.5).abs() * scale
    assert found[3].isinf(), "0.3 away, beyond the bound"
    near = torch.tensor([True, True, False, False, True, True])
    assert (found[near] >= exact[near] - 1e-6).all()
    assert (found[near] - exact[near]).max() <= bound / 128 + 1e-5
    alone = nearest_adversarial(Threshold(), x[4:], norm=norm, bound=bound)
    assert torch.equal(alone, found[4:]), "it depends on no other image"


class WithoutGradients(Threshold):
    provides_gradients = False

    def forward(self, x):
        return super().forward(x).detach()


def test_a_model_without_gradients_is_searched_by_its_answers():
    x = torch.full((2, 1, 5, 7), 0.52)
    found = nearest_adversarial(WithoutGradients(), x, norm="linf", bound=0.1)
    assert ((found >= 0.02 - 1e-6) & (found < 0.03)).all()


def onnx_file(path, **metadata):
    """Logits (mean of red, mean of blue) of images of any size."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper = onnx.helper
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["means"]),
        helper.make_node("Gather", ["means", "which"], ["logits"], axis=1),
    ]
    graph = helper.make_graph(
        nodes, "mean",
        [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["batch", 3, "height", "width"])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor("which", onnx.TensorProto.INT64, [2], [2, 0])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, metadata)
    onnx.save(model, str(path))
    return str(path)


def test_an_onnx_file_predicts_images_of_any_size(photos, tmp_path, crdnd):
    threat = json.dumps({"norm": "linf", "eps": 0.05})
    file = onnx_file(tmp_path / "m.onnx", class_names=json.dumps(["blue", "red"]), threat=threat)
    status, out, err = crdnd("predict", file, str(photos / "test"), "--json")
    assert status == 0, err
    for entry in json.loads(out)["images"]:
        assert entry["classes"][0]["class"] == Path(entry["file"]).parent.name
    status, out, err = crdnd(
        "predict", onnx_file(tmp_path / "n.onnx", class_names="not json"), str(photos / "test" / "red"), "--json"
    )
    assert [entry["classes"][0]["class"] for entry in json.loads(out)["images"]] == ["1"] * 4, err


def test_an_exported_file_is_evaluated_by_what_it_says_of_itself(photos, tmp_path, crdnd):
    about = {"threat": json.dumps({"norm": "linf", "eps": 0.01}), "input_shape": json.dumps([3, 24, 36])}
    file = onnx_file(tmp_path / "m.onnx", class_names=json.dumps(["blue", "red"]), **about)
    (tmp_path / "part" / "without images").mkdir(parents=True)
    (tmp_path / "part" / "red").symlink_to(photos / "test" / "red")
    status, out, err = crdnd("evaluate", file, "--data", "part", "--attacks", "square", "--json")
    assert status == 0, err
    document = json.loads(out)
    assert document["protocol"]["eps"] == 0.01
    assert document["rows"][0]["clean"]["correct"] == 4, "red is the second class of the file and the first one here"


def test_what_is_no_model_is_told_what_one_is(photos, crdnd):
    image = str(photos / "test" / "red" / "0.png")
    status, _, err = crdnd("predict", image, image)
    assert (status, err.count("\n")) == (2, 1)
    assert "0.png: is no model; give a model folder, or a .safetensors, .pt2 or .onnx file" in err
