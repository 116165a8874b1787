import hashlib
import io
import json
import pickle
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from crdnd.engine import check_model
from crdnd.errors import InputError
from crdnd.models import (
    ExportedModel,
    ModelCard,
    OnnxModel,
    create_model,
    evaluating,
    has_gradients,
    load_model,
    load_weights,
    parameter_count,
    resolve_model,
    save_model,
    weights_sha256,
)
from support import BATCH, CLASSES, SHAPE, TinyNet, generator, images

X = images(dtype=torch.float32)


def refusal(message, spec, weights=None):
    with pytest.raises(InputError, match=message) as error:
        resolve_model(str(spec), weights)
    assert "\n" not in str(error.value)
    return str(error.value)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


# --- weights for a factory --------------------------------------------------------------------------------------------

FACTORY = """
import torch
from support import TinyNet

def make():
    return TinyNet(seed=5, dtype=torch.float32)
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A current folder with a factory of the user's own."""
    (tmp_path / "foreign_nets.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    sys.modules.pop("foreign_nets", None)


SPEC = "foreign_nets:make"


def net(seed=1):
    return TinyNet(seed=seed, dtype=torch.float32)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".PTH"])
@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict", "net"])
def test_weights_in_a_checkpoint_are_found(workplace, suffix, key):
    tensors = net().state_dict()
    content = tensors if key is None else {"epoch": 3, key: tensors, "optimizer": {"lr": 0.1}}
    torch.save(content, f"weights{suffix}")
    model = resolve_model(SPEC, f"weights{suffix}")
    assert torch.equal(model(X), net()(X))
    assert not torch.equal(resolve_model(SPEC)(X), net()(X)), "without them it has weights of its own"
    assert not model.training


def test_weights_in_safetensors_or_a_folder_are_read(workplace):
    safetensors.torch.save_file(net().state_dict(), "w.safetensors")
    save_model(workplace / "run", net(), ModelCard())
    for weights in ("w.safetensors", Path("w.safetensors"), "run", workplace / "run"):
        assert torch.equal(resolve_model(SPEC, weights)(X), net()(X))


def test_data_parallels_prefix_is_removed_only_where_all_have_it(workplace):
    prefixed = {f"module.{key}": value for key, value in net().state_dict().items()}
    torch.save({"state_dict": prefixed}, "w.pt")
    assert torch.equal(resolve_model(SPEC, "w.pt")(X), net()(X))
    torch.save({**prefixed, "conv.bias": torch.zeros(3)}, "w.pt")
    refusal(r"w\.pt: belongs to another architecture", SPEC, "w.pt")


def test_half_precision_is_widened(workplace):
    torch.save({key: value.half() for key, value in net().state_dict().items()}, "w.pt")
    model = resolve_model(SPEC, "w.pt")
    assert model.conv.weight.dtype == torch.float32
    torch.testing.assert_close(model(X), net()(X), atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("conv.bias"), r"w\.pt: belongs to another architecture \(1 missing, such as conv\.bias\)"),
        (lambda t: t.update(extra=torch.zeros(2)), r"another architecture \(unexpected extra\)"),
        (
            lambda t: t.update({"classifier.bias": torch.zeros(9)}),
            r"\(classifier\.bias has shape \(9,\), the model needs \(5,\)\); use the weights of this very architecture",
        ),
        (lambda t: t.clear(), r"4 missing"),
    ],
)
def test_weights_of_another_architecture_are_refused(workplace, edit, message):
    tensors = dict(net().state_dict())
    edit(tensors)
    torch.save(tensors, "w.pt")
    refusal(message, SPEC, "w.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"epoch": 3, "weights": {}},
            r"w\.pt: holds no state dict of tensors.*under state_dict, model, .*: the keys epoc",
        ),
        ({"state_dict": {"a": 1}}, r"holds no state dict of tensors"),
        ([torch.zeros(2)], r"holds no state dict of tensors.*: list"),
        (torch.zeros(2), r"holds no state dict of tensors.*: Tensor"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(workplace, content, message):
    torch.save(content, "w.pt")
    refusal(message, SPEC, "w.pt")


@pytest.mark.parametrize("form", ["torch.save", "whole model", "legacy", "pickle", "TorchScript"])
def test_pickled_code_is_refused_and_never_run(workplace, form):
    proof = workplace / "was-run"
    content = {"state_dict": net().state_dict(), "extra": Payload(proof)}
    if form == "torch.save":
        torch.save(content, "w.pt")
    elif form == "whole model":
        torch.save(net(), "w.pt")
    elif form == "legacy":
        torch.save(content, "w.pt", _use_new_zipfile_serialization=False)
    elif form == "pickle":
        Path("w.pt").write_bytes(pickle.dumps(Payload(proof)))
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.save(torch.jit.trace(nn.Conv2d(3, 2, 1), X), "w.pt")
    refusal(
        r"w\.pt: holds pickled content.* that may contain code, never run; where.*save_file\(model\.state_",
        SPEC,
        "w.pt",
    )
    assert not proof.exists()


@pytest.mark.parametrize("length", [0, 7, 300, -40])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_damaged_weights_are_refused(workplace, name, length):
    if name == "w.pt":
        torch.save(net().state_dict(), name)
    else:
        safetensors.torch.save_file(net().state_dict(), name)
    Path(name).write_bytes(Path(name).read_bytes()[:length])
    refusal(rf"{name}: is not a readable", SPEC, name)


def test_other_weights_are_refused(workplace):
    Path("w.h5").write_text("x")
    refusal(r"w\.h5: weights are read from \.safetensors, \.pt, \.pth", SPEC, "w.h5")
    refusal(r"nowhere\.pt: there is no such weights file", SPEC, "nowhere.pt")


def test_weights_belong_to_a_factory(workplace):
    save_model(workplace / "run", create_model("cnn", input_shape=SHAPE, num_classes=CLASSES), ModelCard())
    torch.save(net().state_dict(), "w.pt")
    for spec in ("run", "run/model.safetensors", "w.pt"):
        refusal(r"weights: belong to a model given as package\.module:factory or by its architecture", spec, "w.pt")
    refusal(r"nowhere: is no architecture\. Available: .*, wrn$", "nowhere", "w.pt")
    refusal(r"resnt18: is no architecture; did you mean 'resnet18'\?", "resnt18", "w.pt")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin"])
def test_a_weights_file_alone_is_no_model(workplace, suffix):
    Path(f"w{suffix}").write_bytes(b"")
    message = (
        rf"w\{suffix}: is a file of weights without an architecture; give .*:factory, and this file as its weights"
    )
    refusal(message, f"w{suffix}")


def test_load_weights_takes_a_module_of_any_making(workplace):
    torch.save(net().state_dict(), "w.pt")
    model = net(seed=2).train()
    assert load_weights(model, "w.pt") is model
    assert torch.equal(model(X), net()(X))
    assert not model.training


# --- exported programs ------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Everything a file may hold: batch norm, buffers, constants, tied weights, in-place calls, sizes, two results."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.last = nn.Linear(6 * 4 * 7, CLASSES)
        self.first, self.again = nn.Linear(CLASSES, CLASSES), nn.Linear(CLASSES, CLASSES)
        self.again.weight = self.first.weight
        self.register_buffer("shift", torch.tensor([0.1, 0.2, 0.3]).reshape(1, 3, 1, 1))
        self.register_buffer("unsaved", torch.ones(1), persistent=False)
        self.constant = torch.full((1,), 2.0)
        self.drop = nn.Dropout(0.5)
        draws = generator(3)
        with torch.no_grad():
            for value in self.state_dict().values():
                if value.is_floating_point():
                    value.copy_(torch.rand(value.shape, generator=draws) / 2 + 0.1)

    def forward(self, x):
        h = (x - self.shift) / torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
        h = self.drop(torch.relu_(self.norm(self.conv(h))))
        left, right = h.chunk(2, 1)
        h = nn.functional.gelu(torch.cat([right, left], 1), approximate="tanh")
        h = h.view(x.shape[0], -1)
        largest, _ = h.max(1, keepdim=True)
        return self.again(self.first(self.last(h) * self.constant * self.unsaved)) + largest.to(torch.float32)


def export(file, model, *, dynamic=False, size=4):
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    program = torch.export.export(model, (images(size, dtype=torch.float32),), dynamic_shapes=shapes)
    torch.export.save(program, file)
    return file


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """`Odd`, exported for any batch size, for 4 and for 1."""
    folder, model = tmp_path_factory.mktemp("exported"), Odd().eval()
    return {
        None: export(folder / "any.pt2", model, dynamic=True),
        4: export(folder / "four.pt2", model),
        1: export(folder / "one.pt2", model, size=1),
    }


@pytest.mark.parametrize("size", [None, 4, 1])
@pytest.mark.parametrize("count", [1, 3, 4, 6, 9])
def test_an_exported_program_gives_the_models_logits_and_gradients(archives, size, count):
    original, model = Odd().eval(), resolve_model(str(archives[size]))
    assert isinstance(model, ExportedModel)
    x = images(count, dtype=torch.float32)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    expected, logits = original(leaves[0]), model(leaves[1])
    torch.testing.assert_close(logits, expected)
    assert logits.shape == (count, CLASSES)
    weights = torch.rand(expected.shape, generator=generator(1))
    for output in (expected, logits):
        (output * weights).sum().backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
    assert leaves[0].grad.abs().max() > 0
    assert torch.equal(leaves[1].detach(), x), "the images are left as they were"


def test_a_fixed_size_serves_no_images_too(archives):
    assert resolve_model(str(archives[4]))(X[:0]).shape == (0, CLASSES)


def test_an_exported_program_is_a_module_like_any_other(archives):
    original, model = Odd().eval(), resolve_model(str(archives[None]))
    expected = model(X)
    assert parameter_count(model) == parameter_count(original), "tied weights count once"
    model.train()
    with evaluating(model):
        assert not model.training
    assert model.training
    assert torch.equal(model(X), expected), "its mode is the one it was exported in"
    assert model.eval() is model
    assert not model.training
    assert has_gradients(model)
    with torch.no_grad():
        assert torch.equal(model(X), expected)
    assert torch.equal(model(X.double()), expected)
    model(X).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_exported_program_is_known_by_its_file(archives):
    for file in archives.values():
        assert weights_sha256(resolve_model(str(file))) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert len({weights_sha256(resolve_model(str(file))) for file in archives.values()}) == 3


@pytest.mark.parametrize("size", [None, 4])
def test_images_of_another_shape_are_refused(archives, size):
    model = resolve_model(str(archives[size]))
    for shape in ((2, 3, 5, 7), (2, 1, 4, 7), (3, 4, 7)):
        with pytest.raises(InputError, match=r"the model takes images of shape \(3, 4, 7\), got \("):
            model(torch.zeros(shape))


def test_words_and_equations_are_arguments_of_operators(tmp_path):
    class Words(nn.Module):
        def forward(self, x):
            x = nn.functional.pad(x, (1, 1, 0, 0), mode="reflect")
            return torch.einsum("bchw,chk->bk", x, torch.ones(3, 4, 2)).div(3, rounding_mode="floor")

    model = resolve_model(str(export(tmp_path / "words.pt2", Words(), dynamic=True)))
    torch.testing.assert_close(model(X), Words()(X))


@pytest.mark.parametrize("dynamic", [False, True])
def test_our_own_architecture_survives_the_export(tmp_path, dynamic):
    model = create_model("cnn", input_shape=SHAPE, num_classes=CLASSES, width=2, mean=(0.4,) * 3, std=(0.2,) * 3).eval()
    loaded = resolve_model(str(export(tmp_path / "cnn.pt2", model, dynamic=dynamic)))
    torch.testing.assert_close(loaded(X), model(X))


def rewritten(archive, target, changes=(), program=None, config=None):
    """A copy of an archive with other entries; `program` and `config` edit its JSON."""
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(target, "w") as out:
        root = source.namelist()[0].partition("/")[0]
        entries = {name.partition("/")[2]: source.read(name) for name in source.namelist()}
        for name, edit in (("models/model.json", program), ("data/constants/model_constants_config.json", config)):
            if edit:
                content = json.loads(entries[name])
                edit(content)
                entries[name] = json.dumps(content).encode()
        for name, data in {**entries, **dict(changes)}.items():
            if data is not None:
                out.writestr(f"{root}/{name}", data)
    return target


def torch_bytes(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_a_rewritten_archive_is_read_like_the_first(archives, tmp_path):
    model = resolve_model(str(rewritten(archives[None], tmp_path / "same.pt2")))
    torch.testing.assert_close(model(X), Odd().eval()(X))


@pytest.mark.parametrize("place", ["weights", "constants", "tensor", "custom", "opaque"])
def test_pickles_in_an_archive_are_refused_and_never_run(archives, tmp_path, place):
    proof = tmp_path / "was-run"
    pickled = torch_bytes({"weight": Payload(proof)})

    def use(path, by_torch):
        def edit(config):
            config["config"]["constant"] |= {"path_name": path, "use_pickle": by_torch}

        return edit

    changes, config = {
        "weights": ({"data/weights/model.pt": pickled}, None),
        "constants": ({"data/constants/model.pt": pickled}, None),
        "tensor": ({"data/constants/tensor_1": pickled}, use("tensor_1", by_torch=True)),
        "custom": ({"data/constants/custom_obj_0": pickled}, use("custom_obj_0", by_torch=True)),
        "opaque": (
            {"data/constants/opaque_obj_0": pickle.dumps(Payload(proof))},
            use("opaque_obj_0", by_torch=False),
        ),
    }[place]
    file = rewritten(archives[None], tmp_path / "bad.pt2", changes, config=config)
    refusal(r"bad\.pt2: keeps .+ as a pickle, which may contain code and is never loaded", file)
    assert not proof.exists()


def test_the_example_inputs_which_are_a_pickle_are_not_looked_at(archives, tmp_path):
    proof = tmp_path / "was-run"
    pickled = torch_bytes(((Payload(proof),), {}))
    file = rewritten(archives[None], tmp_path / "bad.pt2", {"data/sample_inputs/model.pt": pickled})
    torch.testing.assert_close(resolve_model(str(file))(X), Odd().eval()(X))
    assert not proof.exists()
    # The payload is a real one: torch's own reader runs it.
    with zipfile.ZipFile(file) as archive:
        data = archive.read(next(name for name in archive.namelist() if "sample_inputs" in name))
    with pytest.raises(pickle.UnpicklingError, match="Weights only"):
        torch.load(io.BytesIO(data), weights_only=True)
    assert not proof.exists()


def node_of(program, target):
    nodes = program["graph_module"]["graph"]["nodes"]
    return next(node for node in nodes if node["target"] == f"torch.ops.aten.{target}")


@pytest.mark.parametrize(
    "target",
    [
        "torch.os.system", "torch.load", "torch.hub.load", "torch.serialization.os.system", "math.sqrt", "#aoti:x",
        "_operator.attrgetter", "_operator.methodcaller", "torch.ops.aten.__class__.mro",
        "torch.ops.aten.nothing.default", "torch.ops.aten.gelu.nothing", "torch.ops.aten.gelu",
        "torch.ops.aten.gelu.overloads",
        "torch.ops.aten.gelu.default.redispatch", "torch.ops.aten.gelu._op", "torch.ops.prim.device.default",
        "torch.ops.higher_order.cond", "os.system", "",
    ],
)  # fmt: skip
def test_a_call_of_anything_but_an_operator_is_refused(archives, tmp_path, target):
    proof = tmp_path / "was-run"

    def edit(program):
        node = node_of(program, "gelu.default")
        node["target"] = target
        node["inputs"] = [{"name": "command", "arg": {"as_string": f"touch {proof}"}, "kind": 1}]

    refusal(r"bad\.pt2: calls .*is not run", rewritten(archives[None], tmp_path / "bad.pt2", program=edit))

    def only_target(program):
        node = node_of(program, "gelu.default")
        node["target"], node["inputs"] = target, node["inputs"][:1]

    refusal(r"bad\.pt2: calls .*is not run", rewritten(archives[None], tmp_path / "bad.pt2", program=only_target))
    assert not proof.exists()


def test_an_operator_that_opens_files_is_refused(archives, tmp_path):
    secret = tmp_path / "secret"

    def edit(program):
        node = node_of(program, "lift_fresh_copy.default")
        node["target"] = "torch.ops.aten.from_file.default"
        node["inputs"] = [
            {"name": "filename", "arg": {"as_string": str(secret)}, "kind": 1},
            {"name": "shared", "arg": {"as_bool": True}, "kind": 1},
            {"name": "size", "arg": {"as_int": 3}, "kind": 1},
        ]

    refusal(
        r"calls 'torch\.ops\.aten\.from_file\.default with a string",
        rewritten(archives[4], tmp_path / "b.pt2", program=edit),
    )
    assert not secret.exists()


def test_expressions_and_guards_are_not_evaluated(archives, tmp_path):
    proof = tmp_path / "was-run"
    code = f"__import__('pathlib').Path({str(proof)!r}).touch()"

    def edit(program):
        program["guards_code"] = [code]
        graph = program["graph_module"]["graph"]
        for value in graph["sym_int_values"].values():
            value["as_expr"]["expr_str"] = code
        for meta in graph["tensor_values"].values():
            for size in meta["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = code
        for entry in program["graph_module"]["module_call_graph"]:
            entry["signature"] = None

    model = resolve_model(str(rewritten(archives[None], tmp_path / "bad.pt2", program=edit)))
    torch.testing.assert_close(model(X), Odd().eval()(X))
    assert not proof.exists()


def test_compiled_code_in_an_archive_is_refused(archives, tmp_path):
    changes = {"data/aotinductor/model/wrapper.so": b"\x7fELF"}
    refusal(r"holds compiled code, which is never run", rewritten(archives[4], tmp_path / "bad.pt2", changes))


def test_older_and_newer_formats_are_refused(archives, tmp_path):
    older = {"serialized_exported_program.json": b"{}"}
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as out:
        for name, data in older.items():
            out.writestr(name, data)
    message = r"has an unknown or older format; save it again with torch\.export\.save of torch 2\.9 or newer"
    refusal(r"old\.pt2: " + message, tmp_path / "old.pt2")

    def edit(program):
        program["schema_version"]["major"] = 9

    refusal(message, rewritten(archives[4], tmp_path / "new.pt2", program=edit))


@pytest.mark.parametrize("module", ["norm", "drop"])
def test_a_program_in_training_mode_is_refused(tmp_path, module):
    model = Odd().eval()
    getattr(model, module).train()
    message = r"was exported in training mode .*; call model\.eval\(\) before torch\.export\.export"
    refusal(message, export(tmp_path / "training.pt2", model))


class Two(nn.Module):
    def forward(self, x, y):
        return x.flatten(1) + y


class Pair(nn.Module):
    def forward(self, x):
        return x.flatten(1), x.sum((2, 3))


class Flat(nn.Module):
    def forward(self, x):
        return x * 2


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return (x * self.calls).flatten(1)


class InPlace(nn.Module):
    def forward(self, x):
        x.view(-1).mul_(2)
        return x.flatten(1)


class NoGrad(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            h = x * 2
        return (x + h).flatten(1)


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (Two(), (X, torch.zeros(84)), r"takes 2 inputs; export a module with forward\(images\)"),
        (Pair(), (X,), r"must return one tensor, the logits"),
        (Flat(), (X[:, 0],), r"takes an input of 3 dimensions and torch\.float32, no images"),
        (Flat(), ((X * 255).to(torch.uint8),), r"takes an input of 4 dimensions and torch\.uint8, no images"),
        (Counter(), (X,), r"was exported in training mode \(it changes its own state\)"),
        (NoGrad(), (X,), r"calls 'torch\.ops\.higher_order.*hand the model over as package\.module:factory"),
    ],
)
def test_programs_that_are_no_classifiers_are_refused(tmp_path, model, inputs, message):
    torch.export.save(torch.export.export(model, tuple(x.clone() for x in inputs)), tmp_path / "m.pt2")
    refusal(r"m\.pt2: (" + message + ")", tmp_path / "m.pt2")


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_program_that_writes_on_its_images_writes_on_a_copy(tmp_path, dynamic):
    model = resolve_model(str(export(tmp_path / "in_place.pt2", InPlace(), dynamic=dynamic)))
    x = X.clone().requires_grad_()
    logits = model(x)
    torch.testing.assert_close(logits, 2 * X.flatten(1))
    assert torch.equal(x.detach(), X)
    logits.sum().backward()
    assert (x.grad == 2).all()


@pytest.mark.parametrize("length", [0, 20, 5000, -300])
def test_a_truncated_archive_is_refused(archives, tmp_path, length):
    file = tmp_path / "cut.pt2"
    file.write_bytes(archives[4].read_bytes()[:length])
    refusal(r"cut\.pt2: is not a readable exported program", file)


@pytest.mark.parametrize(
    "changes",
    [
        {"models/model.json": None},
        {"models/model.json": b"{"},
        {"models/model.json": b"[]"},
        {"models/model.json": b"{}"},
        {"data/weights/model_weights_config.json": b'{"config": {}}'},
        {"data/weights/weight_0": None},
        {"data/weights/weight_0": b""},
        {"data/weights/weight_0": b"1234"},
        {"data/weights/weight_0": b"123"},
    ],
)
def test_a_damaged_archive_is_refused(archives, tmp_path, changes):
    refusal(r"bad\.pt2: is not a readable exported program", rewritten(archives[4], tmp_path / "bad.pt2", changes))


# --- ONNX -------------------------------------------------------------------------------------------------------------

WEIGHT = torch.randn(84, CLASSES, generator=generator(4))


def onnx_bytes(batch="batch", *, inputs=1, kind=None, shape=(3, 4, 7), outputs=("logits",)):
    """A linear classifier of 3x4x7 images; `batch` is a number for a fixed size."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    kind = kind or TensorProto.FLOAT
    names = ["pixels", "other"][:inputs]
    values = [helper.make_tensor_value_info(name, kind, [batch, *shape]) for name in names]
    nodes = [
        helper.make_node("Flatten", ["pixels"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
        helper.make_node("Relu", ["logits"], ["positive"]),
    ]
    if inputs == 2:
        nodes[0].input[0] = "sum"
        nodes.insert(0, helper.make_node("Add", names, ["sum"]))
    graph = helper.make_graph(
        nodes,
        "classifier",
        values,
        [helper.make_tensor_value_info(name, kind, [batch, CLASSES]) for name in outputs],
        [numpy_helper.from_array(WEIGHT.numpy(), "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


@pytest.fixture
def onnx_file(tmp_path):
    def write(*args, **options):
        (tmp_path / "net.onnx").write_bytes(onnx_bytes(*args, **options))
        return tmp_path / "net.onnx"

    return write


@pytest.mark.parametrize("batch", ["batch", 4, 1])
@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_an_onnx_model_gives_its_logits(onnx_file, batch, count):
    model = resolve_model(str(onnx_file(batch)))
    assert isinstance(model, OnnxModel)
    x = images(count, dtype=torch.float32)
    expected = x.flatten(1) @ WEIGHT
    for given in (x, x.double(), x.clone().requires_grad_(), x.to(memory_format=torch.channels_last)):
        logits = model(given)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)
        assert (logits.dtype, logits.requires_grad) == (torch.float32, False)


def test_an_onnx_model_has_no_parameters_and_says_that_it_has_no_gradients(onnx_file):
    model = resolve_model(str(onnx_file()))
    assert parameter_count(model) == 0
    assert not has_gradients(model)
    assert not has_gradients(nn.Sequential(nn.Identity(), model)), "nor has what contains it"
    assert has_gradients(nn.Linear(2, 2))
    with evaluating(model.train()):
        assert not model.training
    assert model(X[:0]).shape == (0, CLASSES)


def test_the_first_output_is_the_logits(onnx_file):
    model = resolve_model(str(onnx_file(outputs=("logits", "positive"))))
    torch.testing.assert_close(model(X), X.flatten(1) @ WEIGHT, atol=1e-4, rtol=1e-5)
    model = resolve_model(str(onnx_file(outputs=("positive", "logits"))))
    torch.testing.assert_close(model(X), (X.flatten(1) @ WEIGHT).relu(), atol=1e-4, rtol=1e-5)


def test_an_onnx_model_is_known_by_its_file_and_the_weights_beside_it(onnx_file, tmp_path):
    import onnx

    file = onnx_file()
    assert weights_sha256(resolve_model(str(file))) == hashlib.sha256(file.read_bytes()).hexdigest()
    outside, seen = tmp_path / "outside.onnx", set()
    for factor in (1, 2):
        model = onnx.load_from_string(onnx_bytes())
        model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(factor * WEIGHT.numpy(), "weight"))
        (tmp_path / "outside.data").unlink(missing_ok=True)
        onnx.save(model, outside, save_as_external_data=True, location="outside.data", size_threshold=0)
        loaded = resolve_model(str(outside))
        torch.testing.assert_close(loaded(X), factor * X.flatten(1) @ WEIGHT, atol=1e-4, rtol=1e-5)
        seen |= {weights_sha256(loaded), hashlib.sha256(outside.read_bytes()).hexdigest()}
    assert len(seen) == 3, "one file that names the weights, two models"


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname"])
def test_weights_outside_the_folder_are_not_read(onnx_file, tmp_path, location):
    import onnx

    model = onnx.load_from_string(onnx_bytes())
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    (tmp_path / "bad.onnx").write_bytes(model.SerializeToString())
    refusal(r"bad\.onnx: names weights outside its folder", tmp_path / "bad.onnx")


def test_onnx_models_of_something_else_are_refused(onnx_file):
    from onnx import TensorProto

    refusal(r"net\.onnx: needs 2 inputs \(pixels, other\); export a model of images alone", onnx_file(inputs=2))
    refusal(r"takes a tensor\(float\) of 3 dimensions", onnx_file(shape=(12, 7)))
    refusal(r"takes a tensor\(double\) of 4 dimensions; export .* in float32", _double(onnx_file, TensorProto.DOUBLE))


def _double(onnx_file, kind):
    import onnx

    file = onnx_file(kind=kind)
    model = onnx.load(file)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(WEIGHT.double().numpy(), "weight"))
    file.write_bytes(model.SerializeToString())
    return file


@pytest.mark.parametrize("content", [b"", b"text", onnx_bytes()[:200]])
def test_a_damaged_onnx_file_is_refused(tmp_path, content):
    (tmp_path / "bad.onnx").write_bytes(content)
    refusal(r"bad\.onnx: is not a readable ONNX model", tmp_path / "bad.onnx")


def test_images_of_another_shape_are_refused_by_onnx(onnx_file):
    model = resolve_model(str(onnx_file(4)))
    with pytest.raises(InputError, match=r"the model takes images of shape \(3, 4, 7\), got \(3, 5, 7\)"):
        model(torch.zeros(2, 3, 5, 7))
    open_sized = resolve_model(str(onnx_file("batch", shape=("c", "h", 7))))
    with pytest.raises(InputError, match=r"images of shape \(any, any, 7\), got \(3, 4, 8\)"):
        open_sized(torch.zeros(2, 3, 4, 8))
    with pytest.raises(RuntimeError, match=r"onnxruntime: "):
        open_sized(torch.zeros(2, 3, 5, 7))


def test_without_onnxruntime_the_way_out_is_named(onnx_file, monkeypatch):
    file = onnx_file()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refusal(r'needs onnxruntime: pip install "crdnd\[onnx\]"', file)


# --- all of them ------------------------------------------------------------------------------------------------------


def test_foreign_models_pass_the_look_before_an_evaluation(archives, onnx_file):
    from crdnd.data import ImageData

    data = ImageData(X, torch.arange(BATCH) % CLASSES)
    for file in (*archives.values(), onnx_file(), onnx_file(4)):
        assert check_model(resolve_model(str(file)), data, "model") == CLASSES


def test_paths_that_do_not_exist_are_refused(workplace):
    for spec in ("a.pt2", "a.onnx", "a.pt", "a"):
        refusal(rf"{spec}: there is no such model", spec)


def test_a_folder_named_like_a_file_is_a_folder(tmp_path):
    model = create_model("cnn", input_shape=SHAPE, num_classes=CLASSES).eval()
    for name in ("x.pt", "x.pt2", "x.onnx"):
        save_model(tmp_path / name, model, ModelCard())
        assert torch.equal(resolve_model(str(tmp_path / name))(X), load_model(tmp_path / name)(X))
