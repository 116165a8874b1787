import hashlib
import json
import pickle
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from crdnd.errors import InputError
from crdnd.models import (
    Architecture,
    ModelCard,
    Normalized,
    create_model,
    evaluating,
    is_model_folder,
    load_model,
    parameter_count,
    read_card,
    resolve_model,
    save_model,
    state,
    weights_sha256,
)
from crdnd.threat import ThreatModel
from support import BATCH, CLASSES, SHAPE, TinyNet, generator, images

X = images(dtype=torch.float32)


def cnn(**changes):
    chosen = {"input_shape": SHAPE, "num_classes": CLASSES, "width": 2}
    return create_model("cnn", **chosen | changes).eval()


def trained(**changes):
    """A network whose batch norms have statistics of their own, as after training."""
    model = cnn(**changes)
    draws = generator(7)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "running" in name:
                value.copy_(torch.rand(value.shape, generator=draws) + 0.5)
            elif "num_batches" in name:
                value.fill_(12)
    return model


# --- architectures ----------------------------------------------------------------------------------------------------


def test_a_cnn_of_width_8_for_grey_digits_has_6274_parameters():
    model = create_model("cnn", input_shape=(1, 8, 8), num_classes=10, width=8)
    # Convolutions 9 (1*8 + 8*16 + 16*32) = 5832, batch norms 2 (8 + 16 + 32) = 112, linear layer 32*10 + 10 = 330.
    assert parameter_count(model) == 5832 + 112 + 330 == 6274
    assert parameter_count(create_model("cnn", input_shape=(1, 8, 8), num_classes=10)) == 6274, "8 is the default"


def test_a_cnn_halves_the_image_twice_and_classifies_the_mean_over_its_places():
    model = create_model("cnn", input_shape=(1, 8, 8), num_classes=10, seed=2).eval()
    x = images(BATCH, (1, 8, 8), dtype=torch.float32)
    layers = [layer for layer in model.network.features if isinstance(layer, nn.Conv2d)]
    sizes = []
    handles = [layer.register_forward_hook(lambda *call: sizes.append(tuple(call[2].shape))) for layer in layers]
    logits = model(x)
    for handle in handles:
        handle.remove()
    assert sizes == [(BATCH, 8, 8, 8), (BATCH, 16, 4, 4), (BATCH, 32, 2, 2)]
    maps = model.network.features(x)
    assert (maps >= 0).all(), "the last of its layers is a ReLU"
    torch.testing.assert_close(logits, model.network.classifier(maps.flatten(2).mean(2)))


def test_the_same_seed_gives_the_same_weights_and_the_global_random_state_is_kept():
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first, again, other = cnn(seed=3), cnn(seed=3), cnn(seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.network.classifier.weight, other.network.classifier.weight)
    torch.manual_seed(456)
    assert weights_sha256(cnn(seed=3)) == weights_sha256(first), "whatever the global state is"


def test_normalisation_is_the_models_first_layer():
    mean, std = (0.1, 0.5, 0.9), (0.2, 1.0, 4.0)
    plain, normalised = cnn(seed=1), cnn(seed=1, mean=mean, std=std)
    by_hand = torch.stack([(X[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(normalised(X), plain(by_hand))
    torch.testing.assert_close(plain(X), plain.network(X))
    assert (normalised(X) - plain(X)).abs().max() > 1e-3
    assert {"mean", "std"} <= set(normalised.state_dict()), "part of the weights, so that a folder is complete"
    assert parameter_count(plain) == parameter_count(normalised), "but nothing to learn"


def test_an_architecture_describes_itself():
    assert str(cnn().architecture) == "cnn(width=2)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, r"model cnn: width: .*greater than or equal to 1, got 0"),
        ({"width": "wide"}, r"model cnn: width: .*got 'wide'"),
        ({"wdith": 8}, r"model cnn: wdith: no such setting; did you mean 'width'\?"),
    ],
)
def test_an_impossible_setting_is_refused_by_key(changes, message):
    with pytest.raises(InputError, match=message):
        cnn(**changes)


def test_an_unknown_architecture_is_refused_with_a_suggestion():
    with pytest.raises(InputError, match=r"unknown model 'cn'; did you mean 'cnn'\? Available: "):
        create_model("cn", input_shape=SHAPE, num_classes=CLASSES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 1}, r"model cnn: num_classes: .*greater than or equal to 2, got 1"),
        ({"mean": (0.1, 0.2)}, r"model cnn: mean has 2 values for 3 channels"),
        ({"std": (0.1, 0.2, 0.3, 0.4)}, r"model cnn: std has 4 values for 3 channels"),
        ({"std": (1.0, 0.0, 1.0)}, r"model cnn: std must be above 0 in every channel"),
    ],
)
def test_an_impossible_architecture_is_refused_in_one_line(changes, message):
    with pytest.raises(InputError, match=message) as error:
        cnn(**changes)
    assert "\n" not in str(error.value)


# --- modes ------------------------------------------------------------------------------------------------------------


def test_evaluating_restores_the_mode_of_each_submodule():
    model = cnn()
    model.train()
    frozen = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)][1]
    frozen.eval()
    modes = [module.training for module in model.modules()]
    assert modes.count(False) == 1
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        with evaluating(model):
            pass
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes


def test_evaluating_restores_the_modes_after_an_error():
    model = cnn()
    model.train()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        raise ZeroDivisionError
    assert all(module.training for module in model.modules())


def test_evaluating_leaves_a_model_in_eval_mode_alone():
    model = cnn()
    with evaluating(model):
        pass
    assert not any(module.training for module in model.modules())


# --- folders: what is written -----------------------------------------------------------------------------------------


def test_a_saved_model_gives_the_same_logits_bit_for_bit(tmp_path):
    model = trained(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), seed=5)
    save_model(tmp_path / "net", model, ModelCard())
    for path in (tmp_path / "net", str(tmp_path / "net"), tmp_path / "net" / "model.safetensors"):
        loaded = load_model(path)
        assert isinstance(loaded, Normalized)
        assert not loaded.training
        assert torch.equal(loaded(X), model(X))
        assert loaded.architecture == model.architecture
        assert state(loaded).keys() == state(model).keys()
        assert all(torch.equal(value, state(model)[key]) for key, value in state(loaded).items())


def test_saving_leaves_the_model_as_it_was(tmp_path):
    model = trained().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    save_model(tmp_path / "net", model, ModelCard())
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_loading_leaves_the_global_random_state_as_it_was(tmp_path):
    save_model(tmp_path / "net", trained(), ModelCard())
    before = torch.get_rng_state()
    load_model(tmp_path / "net")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_card_says_what_the_model_is_and_where_it_comes_from(tmp_path):
    model = trained(seed=5)
    card = ModelCard(
        method="rslad",
        role="student",
        seed=5,
        checkpoint="best",
        data="digits",
        class_names=tuple("abcde"),
        threat=ThreatModel(norm="linf", eps="8/255"),
        teacher_sha256="ab" * 32,
        command="crdnd distill",
        versions={"torch": "2.6.0"},
        commit="0123abc",
    )
    written = save_model(tmp_path / "net", model, card)
    content = json.loads((tmp_path / "net" / "model.json").read_text())
    weights = (tmp_path / "net" / "model.safetensors").read_bytes()
    assert content["schema"] == "crdnd.model/1"
    assert content["sha256"] == hashlib.sha256(weights).hexdigest()
    assert content["architecture"] == {
        "name": "cnn",
        "settings": {"width": 2},
        "num_classes": CLASSES,
        "input_shape": list(SHAPE),
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
    }
    assert content["params"] == parameter_count(model)
    assert content["threat"] == {"norm": "linf", "eps": 8 / 255}
    assert (content["method"], content["role"], content["seed"], content["checkpoint"]) == (
        "rslad",
        "student",
        5,
        "best",
    )
    assert (content["data"], content["class_names"], content["commit"]) == ("digits", list("abcde"), "0123abc")
    assert (content["teacher_sha256"], content["versions"]) == ("ab" * 32, {"torch": "2.6.0"})
    assert read_card(tmp_path / "net") == written
    assert read_card(tmp_path / "net" / "model.safetensors") == written
    assert written.model_copy(update={"sha256": "", "architecture": None, "class_name": "", "params": 0}) == card


def test_the_identity_of_weights_is_the_sha256_of_their_file(tmp_path):
    model = trained()
    card = save_model(tmp_path / "net", model, ModelCard())
    assert card.sha256 == weights_sha256(model) == weights_sha256(model)
    assert weights_sha256(load_model(tmp_path / "net")) == card.sha256
    again = save_model(tmp_path / "again", model, ModelCard(method="other"))
    assert again.sha256 == card.sha256, "the same weights are the same file, whatever the card says"
    with torch.no_grad():
        model.network.classifier.bias[3] += 1e-6
    assert weights_sha256(model) != card.sha256


def test_training_mode_does_not_change_the_identity_of_weights():
    model = trained()
    assert weights_sha256(model) == weights_sha256(model.train())


def test_saving_again_replaces_the_model(tmp_path):
    save_model(tmp_path / "net", trained(seed=1), ModelCard())
    second = trained(seed=2)
    save_model(tmp_path / "net", second, ModelCard())
    assert torch.equal(load_model(tmp_path / "net")(X), second(X))
    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == ["model.json", "model.safetensors"]


# --- folders: what is refused -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "net", trained(), ModelCard())
    return tmp_path / "net"


def rewrite(folder, **changes):
    """The card with other content, and with the sha256 of whatever the weights file is now."""
    content = json.loads((folder / "model.json").read_text())
    content["sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "model.json").write_text(json.dumps(content | changes))


def refusal(path, message, **options):
    with pytest.raises(InputError, match=message) as error:
        load_model(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("place", [0, 9, 1000, -1])
def test_one_changed_byte_is_noticed(folder, place):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    message = refusal(folder, r"model\.safetensors: is truncated or damaged.*sha256")
    assert str(file) in message


@pytest.mark.parametrize("length", [0, 5, 500])
def test_a_truncated_file_is_noticed(folder, length):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    refusal(folder, r"is truncated or damaged")
    rewrite(folder)  # even where the card was made for the truncated file
    refusal(folder, r"model\.safetensors: is not a readable safetensors file")


def test_a_card_of_another_model_is_noticed(folder, tmp_path):
    save_model(tmp_path / "other", trained(seed=9), ModelCard())
    (folder / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    refusal(folder, r"is truncated or damaged")


def test_a_missing_card_or_file_or_folder_is_named(folder, tmp_path):
    refusal(tmp_path / "nowhere", r"nowhere: there is no such model")
    (folder / "model.json").rename(tmp_path / "card.json")
    refusal(folder, r"net: is not a model folder, model\.json is missing")
    refusal(folder / "model.safetensors", r"model\.json is missing")
    (tmp_path / "card.json").rename(folder / "model.json")
    (folder / "model.safetensors").unlink()
    refusal(folder, r"model\.safetensors: cannot be read \(No such file or directory\)")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"model\.json: cannot be read as JSON"),
        ("", r"model\.json: cannot be read as JSON"),
        ("[1]", r"model\.json: is not one of this package's files"),
        ("{}", r"model\.json: has the format None; this version reads crdnd\.model/1"),
        ('{"schema": "crdnd.model/2"}', r"has the format 'crdnd\.model/2'; this version reads crdnd\.model/1"),
        ('{"schema": "crdnd.checkpoint/1"}', r"has the format 'crdnd\.checkpoint/1'"),
        ('{"schema": "crdnd.model/1", "parms": 3}', r"model\.json: parms: no such setting; did you mean 'params'\?"),
        ('{"schema": "crdnd.model/1", "seed": "x"}', r"model\.json: seed: .*got 'x'"),
    ],
)
def test_an_unreadable_or_unknown_card_is_refused(folder, content, message):
    (folder / "model.json").write_text(content)
    refusal(folder, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"width": 3}}, r"belongs to another architecture \(.* has shape .*, the model needs .*\)"),
        ({"num_classes": 6}, r"belongs to another architecture \(network\.classifier\.\w+ has shape \(5.*needs \(6"),
        ({"name": "resnet"}, r"unknown model 'resnet'"),
        ({"settings": {"depth": 3}}, r"model cnn: depth: no such setting"),
    ],
)
def test_weights_of_another_architecture_are_refused(folder, change, message):
    architecture = json.loads((folder / "model.json").read_text())["architecture"]
    rewrite(folder, architecture=architecture | change)
    refusal(folder, message)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("network.classifier.bias"), r"\(1 missing, such as network\.classifier\.bias\)"),
        (lambda t: t.update(extra=torch.zeros(2)), r"\(unexpected extra\)"),
        (lambda t: t.update({"mean": torch.zeros(3)}), r"\(mean has shape \(3,\), the model needs \(1, 3, 1, 1\)\)"),
    ],
)
def test_missing_unexpected_and_misshapen_tensors_are_refused_by_name(folder, edit, message):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    edit(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    rewrite(folder)
    refusal(folder, r"belongs to another architecture " + message)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("form", ["pickle", "torch.save"])
def test_a_pickle_that_calls_itself_safetensors_is_refused_and_never_run(folder, tmp_path, form):
    proof, file = tmp_path / "was-run", folder / "model.safetensors"
    if form == "pickle":
        file.write_bytes(pickle.dumps(Payload(proof)))
    else:
        torch.save({"weights": Payload(proof)}, file)
    refusal(folder, r"is truncated or damaged")
    rewrite(folder)  # the attacker writes the card as well
    for path in (folder, file):
        refusal(path, r"model\.safetensors: is not a readable safetensors file")
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(file.read_bytes())
    refusal(alone, r"is not a model folder, alone\.json is missing")
    assert not proof.exists()
    # The payload is a real one: unpickled, it runs.
    pickle.loads(pickle.dumps(Payload(proof)))  # noqa: S301
    assert proof.exists()


def test_a_folder_is_a_models_only_while_its_weights_are_whole(folder, tmp_path):
    assert is_model_folder(folder)
    assert not is_model_folder(tmp_path)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert not is_model_folder(folder)
    file.unlink()
    assert not is_model_folder(folder)
    file.write_bytes(whole)
    assert is_model_folder(folder)
    (folder / "model.json").unlink()
    assert not is_model_folder(folder)


# --- modules of the user's own ----------------------------------------------------------------------------------------


def test_a_module_of_the_users_own_is_saved_and_loaded_into_one_like_it(tmp_path):
    mine, same = TinyNet(seed=1, dtype=torch.float32), TinyNet(seed=2, dtype=torch.float32)
    card = save_model(tmp_path / "mine", mine, ModelCard())
    assert card.architecture is None
    assert card.class_name == "support.TinyNet"
    loaded = load_model(tmp_path / "mine", model=same)
    assert loaded is same
    assert not loaded.training
    assert torch.equal(loaded(X), mine(X))


def test_a_module_of_the_users_own_needs_its_code_to_load(tmp_path):
    save_model(tmp_path / "mine", TinyNet(), ModelCard())
    message = r"holds weights of support\.TinyNet, which only its own code can build; call load_model\(path, model="
    refusal(tmp_path / "mine", message)
    refusal(tmp_path / "mine", r"belongs to another architecture", model=TinyNet(classes=3))
    refusal(tmp_path / "mine", r"belongs to another architecture \(.*missing", model=cnn())


def test_tied_weights_can_be_saved(tmp_path):
    class Tied(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.nn.init.normal_((first := nn.Linear(4, 4, bias=False)).weight, generator=generator(seed))
            self.first, self.second = first, nn.Linear(4, 4, bias=False)
            self.second.weight = first.weight

    save_model(tmp_path / "tied", Tied(1), ModelCard())
    loaded = load_model(tmp_path / "tied", model=Tied(2))
    assert torch.equal(loaded.first.weight, Tied(1).first.weight)
    assert loaded.second.weight is loaded.first.weight


# --- MODEL on the command line ----------------------------------------------------------------------------------------

FACTORY = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(84, 5)
    def forward(self, x):
        return self.layer(x.flatten(1))

def make():
    return Net()

def words():
    return "no module"

ready = Net()
number = 3
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A current folder with modules of the user's own; `sys.path` and the imported modules are put back."""
    (tmp_path / "user_nets.py").write_text(FACTORY)
    (tmp_path / "user_package").mkdir()
    (tmp_path / "user_package" / "__init__.py").write_text("")
    (tmp_path / "user_package" / "nets.py").write_text(FACTORY)
    (tmp_path / "user_broken.py").write_text("import nothing_of_this_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("user_"):
            del sys.modules[name]


def test_a_factory_of_the_users_own_is_called(workplace):
    for spec in ("user_nets:make", "user_nets:Net", "user_package.nets:make"):
        model = resolve_model(spec)
        assert type(model).__name__ == "Net"
        assert model(X).shape == (BATCH, CLASSES)


def test_a_folder_or_a_file_is_loaded(workplace):
    model = trained()
    save_model(workplace / "net", model, ModelCard())
    for spec in ("net", "net/model.safetensors", str(workplace / "net")):
        assert torch.equal(resolve_model(spec)(X), model(X))


def test_an_existing_folder_with_a_colon_in_its_name_is_a_folder(workplace):
    model = trained()
    save_model(workplace / "user_nets:make", model, ModelCard())
    assert torch.equal(resolve_model("user_nets:make")(X), model(X)), "a path never runs code"
    assert "user_nets" not in sys.modules


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", r"nowhere: there is no such model"),
        ("user_nowhere:make", r"user_nowhere:make: cannot be imported \(No module named 'user_nowhere'\)"),
        ("user_package.nowhere:make", r"cannot be imported \(No module named 'user_package\.nowhere'\)"),
        ("user_nets:nothing", r"user_nets:nothing: cannot be imported \(module 'user_nets' has no attribute 'nothing'"),
        ("user_broken:make", r"user_broken:make: cannot be imported \(No module named 'nothing_of_this_name'\)"),
        ("user_nets:words", r"user_nets:words: must return a torch\.nn\.Module, got str"),
        ("user_nets:", r"user_nets:: cannot be imported"),
        (":make", r":make: cannot be imported"),
    ],
)
def test_what_names_no_model_is_refused(workplace, spec, message):
    with pytest.raises(InputError, match=message) as error:
        resolve_model(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("./user_nets.py:make", r"\./user_nets\.py:make: cannot be imported"),
        ("user_nets:number", r"user_nets:number: must be a function that returns the model, got int"),
        ("user_nets:ready", r"user_nets:ready: must be a function that returns the model, got Net"),
    ],
)
def test_a_path_a_value_or_a_module_in_place_of_a_factory_is_refused(workplace, spec, message):
    with pytest.raises(InputError, match=message):
        resolve_model(spec)


def test_an_error_inside_the_users_own_code_is_the_users_to_see(workplace):
    (workplace / "user_fails.py").write_text("def make():\n    raise ZeroDivisionError('mine')\n")
    said = r"^user_fails:make: called without arguments, it failed \(ZeroDivisionError: mine\); python -c 'import"
    with pytest.raises(InputError, match=said) as refused:
        resolve_model("user_fails:make")
    assert isinstance(refused.value.__cause__, ZeroDivisionError)


def test_settings_of_an_architecture_survive_json():
    architecture = Architecture(
        name="cnn", settings={"width": 2}, num_classes=5, input_shape=(3, 4, 7), mean=(0.1, 0.2, 0.3), std=(1, 2, 3)
    )
    assert Architecture.model_validate_json(architecture.model_dump_json()) == architecture
