"""Weights under the names of their publishers, and models of other packages."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from crdnd.cli import main
from crdnd.errors import InputError
from crdnd.models import (
    ModelCard,
    adapted,
    create_model,
    fitted,
    input_shape,
    load_model,
    load_weights,
    parse_spec,
    resolve_model,
    save_model,
    weights_sha256,
)
from support import BATCH, generator, images

CLASSES = 7
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
ODD = ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
WRN = "wrn,depth=10,width=2"


def made(spec, stats=None, channels=3):
    """A model with weights, norms and counters of its own, behind mean and std."""
    name, settings = parse_spec(spec)
    size = 28 if channels == 1 else 32
    mean, std = stats or (None, None)
    model = create_model(
        name, input_shape=(channels, size, size), num_classes=CLASSES, mean=mean, std=std, seed=3, **settings
    )
    draws = generator(7)
    with torch.no_grad():
        for key, value in model.network.state_dict().items():
            if "num_batches" in key:
                value.fill_(12)
            elif value.ndim == 1:
                value.copy_(torch.rand(value.shape, generator=draws) + 0.5)
    return model.eval()


def tensors_of(model):
    return {key: value.clone() for key, value in model.network.state_dict().items()}


def images_for(model):
    return images(BATCH, model.architecture.input_shape, dtype=torch.float32)


def saved(content, file="w.pt"):
    torch.save(content, file)
    return file


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- the names that others have ---------------------------------------------------------------------------------------


def plain(tensors):
    return tensors


def prefixed(prefix):
    return lambda tensors: {f"{prefix}{key}": value for key, value in tensors.items()}


def trades(tensors):
    """With the stage that TRADES' code makes and never calls."""
    twin = {
        key.replace("block1", "sub_block1"): torch.rand(value.shape)
        for key, value in tensors.items()
        if "block1" in key
    }
    return tensors | twin


def gowal(tensors):
    """Tensor by tensor as in the code that Gowal et al. published with their networks."""
    inner = {
        "bn1": "batchnorm_0",
        "conv1": "conv_0",
        "bn2": "batchnorm_1",
        "conv2": "conv_1",
        "convShortcut": "shortcut",
    }
    outer = {"conv1": "init_conv", "bn1": "batchnorm", "fc": "logits"}
    found = {}
    for key, value in tensors.items():
        match key.split("."):
            case [stage, "layer", block, part, what]:
                found[f"layer.{int(stage[-1]) - 1}.block.{block}.{inner[part]}.{what}"] = value
            case [part, what]:
                found[f"{outer[part]}.{what}"] = value
    assert len(found) == len(tensors)
    return found


def torchvision(tensors):
    found = {}
    for key, value in tensors.items():
        key = f"fc.{key.split('.')[1]}" if key.startswith("linear.") else key
        found[".".join("downsample" if part == "shortcut" else part for part in key.split("."))] = value
    return found


def without_counters(tensors):
    return {key: value for key, value in tensors.items() if "num_batches" not in key}


def with_stats(names, shape):
    def add(tensors):
        mean, std = (torch.tensor(values).reshape(shape) for values in ODD)
        return {names[0]: mean, names[1]: std} | tensors

    return add


MU, BUFFERS = with_stats(("mu", "sigma"), (1, 3, 1, 1)), with_stats(("mean", "std"), (3, 1, 1))
NORMALIZE = with_stats(("normalize.mean", "normalize.std"), (1, 3, 1, 1))
SILU = f"{WRN},activation=silu,padding=same"
STATED = "mean=[0.1,0.2,0.3],std=[0.5,0.6,0.7]"
# What is built, the names that its publishers give the tensors one step after another, and what is said on the command
# line where it is not all that was built.
FILES = {
    "TRADES and RSLAD, WRN-34-10": (WRN, None, [trades], None),
    "RobustBench, Carmon et al.": (WRN, None, [trades, prefixed("module.")], None),
    "RobustBench, Rice et al.": (WRN, ODD, [prefixed("module."), MU], None),
    "with everything in DataParallel": (WRN, ODD, [MU, prefixed("module.")], None),
    "RobustBench, Chen et al.": (WRN, ODD, [trades, prefixed("model."), NORMALIZE, prefixed("module.")], None),
    "LTD, WRN-34-20": ("wrn,depth=10,width=3", None, [plain], None),
    "Gowal et al.": (SILU, ODD, [gowal, BUFFERS], WRN),
    "RSLAD's CIFAR-100 teacher": (SILU, CIFAR10, [gowal], f"{WRN},normalization=cifar10"),
    "Gowal et al. without counters": (SILU, ODD, [gowal, without_counters, BUFFERS], None),
    "a compiled network": ("wrn,depth=10,width=1", None, [prefixed("_orig_mod."), prefixed("module.")], None),
    "ResNet-18": ("resnet18,width=3", None, [plain], None),
    "ResNet-18 of torchvision's names": ("resnet18,width=3", None, [torchvision, prefixed("module.")], None),
    "ResNet-50 of torchvision's names": ("resnet50,width=2", ODD, [torchvision], f"resnet50,width=2,{STATED}"),
    "PreActResNet-18 of AWP": ("preact_resnet18,width=3,final_norm=true", None, [prefixed("module.")], None),
    "MobileNetV2": ("mobilenet_v2,width=0.125", None, [prefixed("module.")], None),
    "ResNet-20 of torchvision's names": ("cifar_resnet,shortcut=projection,width=3", None, [torchvision], None),
    "ours": ("cnn,width=3", ODD, [prefixed("network."), BUFFERS], None),
}


@pytest.mark.parametrize("name", FILES)
def test_published_weights_give_the_logits_of_the_network_they_are_of(name):
    built, stats, steps, said = FILES[name]
    original = made(built, stats)
    published = tensors_of(original)
    for step in steps:
        published = step(published)
    model, x = resolve_model(said or built, saved(published)), images_for(original)
    assert torch.equal(model(x), original(x))
    assert not model.training
    assert model.architecture == original.architecture.model_copy(
        update={"mean": model.architecture.mean, "std": model.architecture.std}
    )
    for found, expected in zip(
        (model.architecture.mean, model.architecture.std), stats or ((0,) * 3, (1,) * 3), strict=True
    ):
        assert found == pytest.approx(expected)
    save_model(Path("net"), model, ModelCard())
    assert torch.equal(load_model("net")(x), original(x)), "and it can be kept"


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "student", "last", "net", "model"])
def test_weights_are_found_in_the_checkpoints_of_others(key):
    original = made(WRN)
    content = {"epoch": 3, key: prefixed("module.")(tensors_of(original)), "optimizer": {"lr": 0.1}}
    model = resolve_model(WRN, saved(content))
    assert torch.equal(model(images_for(original)), original(images_for(original)))


def test_trades_small_network_has_the_names_of_its_code():
    original = made("small_cnn,width=4", channels=1)
    names = [f"feature_extractor.conv{n}" for n in (1, 2, 3, 4)] + [f"classifier.fc{n}" for n in (1, 2, 3)]
    assert set(tensors_of(original)) == {f"{name}.{what}" for name in names for what in ("weight", "bias")}
    model = resolve_model("small_cnn,width=4", saved(prefixed("module.")(tensors_of(original))))
    assert model.architecture.input_shape == (1, 28, 28), "one channel is read off the weights"
    assert torch.equal(model(images_for(original)), original(images_for(original)))


def test_a_line_can_name_the_weights_too():
    original = made(WRN)
    file = saved(tensors_of(original))
    assert torch.equal(resolve_model(f"{WRN},weights={file}")(images_for(original)), original(images_for(original)))


def test_a_model_given_by_name_sees_images_of_the_size_that_comes_unless_one_was_stated():
    file = saved(tensors_of(made(WRN)))
    free, bound = resolve_model(WRN, file), resolve_model(f"{WRN},size=32", file)
    assert (input_shape(free), input_shape(bound)) == (None, (3, 32, 32))
    x = images(BATCH, (3, 64, 48), dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(adapted(free, (3, 64, 48))(x), free(x))
        assert torch.equal(adapted(bound, (3, 64, 48))(x), bound(fitted(x, (3, 32, 32))))
        assert torch.equal(adapted(free, (3, 64, 48), (3, 20, 20))(x), free(fitted(x, (3, 20, 20))))
        grey = x[:, :1]
        assert torch.equal(adapted(free, (1, 64, 48))(grey), free(grey.expand(-1, 3, -1, -1)))


def test_load_weights_takes_published_names_and_their_normalisation():
    original, model = made(SILU, ODD), made(SILU)
    load_weights(model, saved(BUFFERS(gowal(tensors_of(original)))))
    assert torch.equal(model(images_for(original)), original(images_for(original)))
    assert model.architecture.mean == pytest.approx(ODD[0])


# --- what is refused --------------------------------------------------------------------------------------------------


def refusal(message, spec, content=None):
    if content is not None:
        saved(content)
    with pytest.raises(InputError, match=message) as error:
        resolve_model(spec, None if content is None else "w.pt")
    assert "\n" not in str(error.value)


def test_weights_of_another_architecture_are_refused_by_the_first_difference():
    tensors = tensors_of(made(WRN))
    refusal(
        r"w\.pt: belongs to another architecture \(30 missing, such as block1\.layer\.1\.bn1\.weight\)",
        "wrn,depth=16,width=2", tensors,
    )  # fmt: skip
    refusal(
        r"block1\.layer\.0\.conv1\.weight has shape \(32, 16, 3, 3\), the model needs \(48, 16, 3, 3\)\); say",
        "wrn,depth=10,width=3", tensors,
    )  # fmt: skip
    refusal(
        r"95 missing, such as layer1\.0\.conv1\.weight; unexpected block1\.layer\.0\.bn1\.weight and 38 more; conv1\.w",
        "resnet18", tensors,
    )  # fmt: skip
    refusal(r"fc\.weight has shape \(7, 128\), the model needs \(9, 128\)", f"{WRN},num_classes=9", tensors)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t | {"sub_block2.layer.0.bn1.weight": torch.zeros(16)},
        lambda t: t | {"sub_block1.layer.0.bn1.extra": torch.zeros(16)},
        lambda t: t | {"sub_block1.layer.0.bn1.weight": torch.zeros(17)},
        lambda t: {key: value for key, value in t.items() if key != "sub_block1.layer.0.bn1.bias"},
    ],
)
def test_nothing_is_dropped_but_the_unused_stage_as_a_whole(spoil):
    tensors = spoil(trades(tensors_of(made(WRN))))
    refusal(r"w\.pt: belongs to another architecture \(unexpected sub_block[12]\.layer\.0\.\w+\.\w+", WRN, tensors)


def test_only_the_wide_resnet_drops_that_stage():
    refusal(
        r"unexpected sub_block1\.x", "cnn,width=3", tensors_of(made("cnn,width=3")) | {"sub_block1.x": torch.zeros(2)}
    )


def test_names_of_code_that_normalises_inside_need_the_numbers():
    tensors = gowal(tensors_of(made(SILU)))
    refusal(r"w\.pt: comes from code that normalises inside .* say wrn,normalization=cifar10", WRN, tensors)
    none = resolve_model(f"{WRN},normalization=none", "w.pt")
    assert torch.equal(none(images_for(none)), made(SILU)(images_for(none)))


def test_the_variant_of_such_names_cannot_be_another():
    tensors = gowal(tensors_of(made(SILU)))
    refusal(
        r"w\.pt: belongs to the variant with activation=silu; build the model so", f"{WRN},activation=relu", tensors
    )
    with pytest.raises(InputError, match=r"the variant with activation=silu, padding=same"):
        load_weights(made(WRN), "w.pt")


def test_a_stated_normalisation_must_be_that_of_the_file():
    tensors = MU(tensors_of(made(WRN)))
    refusal(
        r"w\.pt: holds mean 0\.1/0\.2/0\.3 .* were stated; leave them away", f"{WRN},normalization=cifar10", tensors
    )
    resolve_model(f"{WRN},mean=[0.1,0.2,0.3],std=[0.5,0.6,0.7]", "w.pt")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("normalization=cifar", r"model wrn: normalization: no such one 'cifar'; did you mean 'cifar10'\?"),
        ("normalization=cifar10,mean=[0,0,0],std=[1,1,1]", r"give normalization, or mean and std"),
        ("mean=[0,0,0]", r"mean and std are given together"),
        ("mean=[0,0],std=[1,1]", r"model wrn: mean has 2 values for 3 channels"),
        ("mean=[0],std=[0]", r"std must be above 0"),
        ("wdith=3", r"model wrn: wdith: no such setting; did you mean 'width'\?"),
        ("num_classes=1", r"model wrn: num_classes: .* got 1"),
        ("weights=other.pt", r"weights: .* names them already; leave --weights away"),
        ("depth", r"write it as cnn, or with settings as cnn,width=8"),
        ("depth=[", r"write it as cnn, or with settings as cnn,width=8"),
    ],
)
def test_a_wrong_line_is_refused(spec, message):
    refusal(message, f"{WRN},{spec}", tensors_of(made(WRN)))


def test_an_architecture_alone_has_no_weights():
    refusal(r"wrn: is an architecture without weights; give the file as --weights, or wrn,weights=FILE", WRN)
    refusal(r"wnr: is no architecture; did you mean 'wrn'\?", "wnr,depth=10")
    refusal(r"nowhere\.pt: there is no such weights file", f"{WRN},weights=nowhere.pt")
    refusal(r"w\.json: weights are read from", f"{WRN},weights={saved({}, 'w.json')}")


def test_a_line_is_a_name_and_settings():
    assert parse_spec(" cnn , width = 8 ") == ("cnn", {"width": 8})
    assert parse_spec("m,a=[1, 2],b=x,c=true,d=0.5") == ("m", {"a": [1, 2], "b": "x", "c": True, "d": 0.5})
    for text in ("", ",width=8", "cnn,", "cnn,=8"):
        with pytest.raises(InputError, match="write it as cnn"):
            parse_spec(text)


def test_the_command_line_takes_an_architecture_with_weights(capsys):
    original = create_model("cnn", input_shape=(1, 8, 8), num_classes=10, width=3, mean=[0.3], std=[0.4], seed=4)
    saved(prefixed("module.")(tensors_of(original)))
    options = ["--data", "digits", "--eps", "0.1", "--attacks", "fgsm", "--n", "9", "--work", "work", "--json"]
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "cnn,width=3,mean=[0.3],std=[0.4]", "--weights", "w.pt", *options])
    shown = capsys.readouterr()
    assert ended.value.code == 0, shown.err
    (row,) = json.loads(shown.out)["rows"]
    assert row["model_sha256"] == weights_sha256(original)


# --- timm and RobustBench ---------------------------------------------------------------------------------------------


class Standin(nn.Module):
    """What `timm.create_model` would return."""

    def __init__(self, num_classes, in_chans, img_size=None, width=4):
        super().__init__()
        self.conv, self.head = nn.Conv2d(in_chans, width, 3), nn.Linear(width, num_classes)
        self.img_size = img_size
        self.pretrained_cfg = {"mean": ODD[0], "std": ODD[1]}

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))


@pytest.fixture
def timm(monkeypatch):
    """A module with the parts of timm that are used, and the calls that it got."""
    package, calls = types.ModuleType("timm"), []

    def create(name, pretrained=False, **options):
        calls.append((name, pretrained, options))
        if options.get("broken"):
            raise TypeError("unexpected keyword 'broken'\nmore")
        network = Standin(**options)
        if pretrained:
            nn.init.constant_(network.head.bias, 5.0)
        return network

    package.create_model = create
    package.is_model = lambda name: name in ("net", "fixed")
    package.get_pretrained_cfg = lambda name: types.SimpleNamespace(fixed_input_size=name == "fixed")
    monkeypatch.setitem(sys.modules, "timm", package)
    return calls


def test_a_student_of_timm_is_made_for_the_data(timm):
    x = images(BATCH, (3, 20, 24), dtype=torch.float32)
    model = create_model("timm:net", input_shape=(3, 20, 24), num_classes=CLASSES, seed=1)
    assert timm == [("net", False, {"num_classes": CLASSES, "in_chans": 3})]
    assert model(x).shape == (BATCH, CLASSES)
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in ODD)
    torch.testing.assert_close(model(x), model.network((x - mean) / std))
    again = create_model("timm:net", input_shape=(3, 20, 24), num_classes=CLASSES, seed=1)
    assert torch.equal(model(x), again(x))
    create_model("timm:fixed", input_shape=(3, 20, 24), num_classes=CLASSES)
    assert timm[-1][2]["img_size"] == (20, 24)


def test_grey_images_get_the_average_of_timms_normalisation(timm):
    model = create_model("timm:net", input_shape=(1, 8, 8), num_classes=CLASSES)
    assert model.architecture.mean == pytest.approx((0.2,))
    assert create_model("timm:net", input_shape=(1, 8, 8), num_classes=5, mean=[0.4], std=[0.3]).architecture.std == (
        0.3,
    )


def test_a_student_of_timm_is_loaded_again_without_a_download(timm):
    model = create_model("timm:fixed", input_shape=(3, 20, 24), num_classes=CLASSES, pretrained=True, width=5)
    assert (model.network.head.bias == 5).all()
    save_model(Path("net"), model, ModelCard())
    loaded, x = load_model("net"), images(BATCH, (3, 20, 24), dtype=torch.float32)
    assert torch.equal(loaded(x), model.eval()(x))
    assert timm[-1] == ("fixed", False, {"num_classes": CLASSES, "in_chans": 3, "img_size": (20, 24), "width": 5})
    assert loaded.architecture.settings == {"width": 5}


def test_a_recipe_names_a_student_of_timm(timm):
    from crdnd.data import load_data
    from crdnd.recipe import make_recipe

    recipe = make_recipe(
        {"model": {"name": "timm:net", "width": 3}, "objective": "natural", "threat": {"eps": 0.1}, "out": "run"}
    )
    model = recipe.build_model(load_data("digits"))
    assert model.architecture.input_shape == (1, 8, 8)
    assert timm[-1] == ("net", False, {"num_classes": 10, "in_chans": 1, "width": 3})
    assert model.architecture.mean == pytest.approx((0.2,)), "timm's own"
    stated = recipe.model_copy(update={"model": recipe.model.model_copy(update={"normalization": "none"})})
    model = stated.build_model(load_data("digits"))
    assert (model.architecture.mean, model.architecture.std) == ((0.0,), (1.0,))


def test_weights_go_into_a_model_of_timm_by_name(timm):
    original = create_model("timm:net", input_shape=(3, 32, 32), num_classes=CLASSES, seed=5).eval()
    saved(prefixed("module.")(tensors_of(original)))
    model = resolve_model(f"timm:net,num_classes={CLASSES},size=32", "w.pt")
    assert torch.equal(model(images_for(original)), original(images_for(original)))
    pretrained = resolve_model(f"timm:net,num_classes={CLASSES},pretrained=true")
    assert (pretrained.network.head.bias == 5).all()
    refusal(r"timm:net: is an architecture without weights", "timm:net")
    refusal(
        r"model timm:net: num_classes cannot be seen; give it as timm:net,num_classes=10", "timm:net,pretrained=true"
    )


def test_what_timm_does_not_have_is_refused_in_one_line(timm):
    for name, settings, message in (
        ("timm:nets", {}, r"model timm:nets: timm has no such model; timm\.list_models\(\) has all"),
        ("timm:net", {"broken": 1}, r"model timm:net: timm cannot build it so \(unexpected keyword 'broken'\)"),
    ):
        with pytest.raises(InputError, match=message) as error:
            create_model(name, input_shape=(3, 8, 8), num_classes=CLASSES, **settings)
        assert "\n" not in str(error.value)


@pytest.fixture
def robustbench(monkeypatch):
    package, utils, calls = types.ModuleType("robustbench"), types.ModuleType("robustbench.utils"), []

    def load(**options):
        calls.append(options)
        return {"Someone2024": Standin(CLASSES, 3)}[options["model_name"]]

    utils.load_model, package.utils = load, utils
    monkeypatch.setitem(sys.modules, "robustbench", package)
    monkeypatch.setitem(sys.modules, "robustbench.utils", utils)
    return calls


def test_a_teacher_of_robustbench_is_loaded_by_that_package(robustbench):
    model = resolve_model("robustbench:Someone2024,dataset=cifar100,model_dir=here")
    assert isinstance(model, Standin)
    assert not model.training
    assert robustbench == [
        {"model_name": "Someone2024", "dataset": "cifar100", "threat_model": "Linf", "model_dir": "here"}
    ]
    refusal(
        r"robustbench:Nobody: RobustBench has no such model for dataset=cifar10 and threat_model=Linf",
        "robustbench:Nobody",
    )
    refusal(r"robustbench:Someone2024: dataset: .*got 'cifar'", "robustbench:Someone2024,dataset=cifar")
    refusal(r"weights: robustbench:Someone2024 has weights of its own", "robustbench:Someone2024", {})


@pytest.mark.parametrize("package", ["timm", "robustbench"])
def test_a_missing_package_costs_one_line_that_installs_it(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed
    spec = f"{package}:net" + (",pretrained=true,num_classes=3" if package == "timm" else "")
    refusal(rf'{package}:net: {package} cannot be imported \(.*\): pip install "crdnd\[{package}\]"', spec)
