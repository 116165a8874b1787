import errno
import hashlib
import importlib
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

import crdnd.export.document as documents
import crdnd.export.run as running
from crdnd.attacks import adversarial, load_attack
from crdnd.cli import main
from crdnd.data import ImageData, read_image
from crdnd.errors import InputError
from crdnd.export import Export, dequantised, export_model, read_exports
from crdnd.export._int8 import quantised, twin_of
from crdnd.export._measured import Differentiable, Verdicts, largest_difference, probe
from crdnd.export._onnx import joined, onnx_graph
from crdnd.export._program import Fitting, Whole, folded, plain_module, traced
from crdnd.io import cannot_write
from crdnd.models import ModelCard, OnnxModel, create_model, fitted, model_names, resolve_model, save_model
from crdnd.threat import ThreatModel
from support import CLASSES, TinyNet, generator

torch.set_num_threads(1)  # networks this small wait for their threads more than they compute

SHAPE = (3, 8, 9)
THREAT = ThreatModel(norm="linf", eps=0.02)
ATTACKS = {"fgsm": {}, "apgd_t": {"iterations": 3}}
TINY = {
    "cifar_resnet": {"depth": 8, "width": 4}, "wrn": {"depth": 10, "width": 1}, "resnet18": {"width": 4},
    "resnet34": {"width": 4}, "resnet50": {"width": 4}, "preact_resnet18": {"width": 4}, "cnn": {"width": 4},
}  # fmt: skip


def awake(model, shape=SHAPE):
    """In eval mode, with batch norms that have seen images, so that folding them changes something."""
    model.train()
    with torch.no_grad():
        for number in range(3):
            model(torch.rand(16, *shape, generator=generator(number)))
    return model.eval()


def cnn(seed=0):
    """A network whose classes have the same mean logit on noise, and logits as large as a trained one's."""
    model = awake(
        create_model("cnn", input_shape=SHAPE, num_classes=CLASSES, width=4, seed=seed, mean=[0.4] * 3, std=[0.2] * 3)
    )
    last = model.network.classifier
    with torch.no_grad():
        last.weight *= 100
        last.bias -= model(torch.rand(200, *SHAPE, generator=generator(8))).mean(0)
    return model


def labelled(model, count=70, shape=SHAPE, seed=5):
    """Images with the classes that the model sees in them."""
    x = torch.rand(count, *shape, generator=generator(seed))
    with torch.no_grad():
        return ImageData(x, model(x).argmax(1), num_classes=CLASSES, name="made")


def opened(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    return resolve_model(str(path))


def as_onnx(path, model, shape=SHAPE):
    return opened(path, joined(onnx_graph(folded(traced(model, shape, any_size=False), shape)), shape, {}))


def as_program(path, model, shape=SHAPE):
    return opened(path, running._program(model, shape, {}))


def refusal(message, function, *arguments, **options):
    with pytest.raises(InputError, match=message) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)


# --- the graph --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", model_names())
def test_every_architecture_computes_the_same_as_a_file(name, tmp_path):
    shape = (3, 32, 32)
    model = awake(
        create_model(name, input_shape=shape, num_classes=CLASSES, mean=[0.4] * 3, std=[0.2] * 3, **TINY.get(name, {})),
        shape,
    )
    x = torch.rand(68, *shape, generator=generator(9))
    assert largest_difference(model, as_onnx(tmp_path / "m.onnx", model, shape), x) < 1e-4
    if name in ("cnn", "wrn"):
        assert largest_difference(model, as_program(tmp_path / "m.pt2", model, shape), x) < 1e-4


@pytest.mark.parametrize("write", [as_onnx, as_program])
def test_images_of_any_size_are_fitted_inside_the_file(write, tmp_path):
    model = cnn()
    file = write(tmp_path / ("m.onnx" if write is as_onnx else "m.pt2"), model)
    for size in [(8, 9), (5, 4), (16, 18), (40, 11), (9, 8), (1, 2), (301, 200)]:
        x = torch.rand(4, 3, *size, generator=generator(1))
        with torch.no_grad():
            torch.testing.assert_close(file(x), model(fitted(x, SHAPE)), rtol=0, atol=1e-5)


def test_a_file_says_what_it_takes_and_nothing_of_this_machine(tmp_path):
    model = cnn()
    path = tmp_path / "m.onnx"
    data = labelled(model)
    export_model(model, path, "onnx", data=data, threat=THREAT, attacks=["fgsm"], square_queries=3)
    proto = onnx.load(path)
    onnx.checker.check_model(proto)
    (taken,), (returned,) = proto.graph.input, proto.graph.output
    sizes = [entry.dim_param or entry.dim_value for entry in taken.type.tensor_type.shape.dim]
    assert (taken.name, sizes) == ("images", ["batch", 3, "height", "width"])
    assert (returned.name, returned.type.tensor_type.shape.dim[1].dim_value) == ("logits", CLASSES)
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": 18}
    about = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(about["class_names"]) == list(data.class_names)
    assert about.keys() == {"class_names", "threat", "input_shape", "source_sha256"}
    assert json.loads(about["threat"]) == {"norm": "linf", "eps": 0.02}
    for to in ("onnx", "program"):
        file = tmp_path / f"again.{'onnx' if to == 'onnx' else 'pt2'}"
        export_model(model, file, to, data=data, threat=THREAT, attacks=["fgsm"], square_queries=3)
        read = resolve_model(str(file))
        assert (read.input_shape, read.about.threat, read.about.class_names) == (SHAPE, THREAT, data.class_names)
    program = running._program(model, SHAPE, about)
    for content in (path.read_bytes(), program):
        assert str(Path(running.__file__).parent.parent).encode() not in content
        assert b"site-packages" not in content


class Shared(nn.Module):
    """A convolution that a batch norm and something else read, and one that only a batch norm reads."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.second, self.last = nn.Conv2d(6, CLASSES, 3), nn.BatchNorm2d(CLASSES, affine=False)

    def forward(self, x):
        z = self.first(x)
        return self.last(self.second(self.norm(z) + z)).mean((2, 3))


def test_only_what_a_batch_norm_alone_reads_takes_it_in():
    model = awake(Shared())
    program = folded(traced(model, SHAPE, any_size=False), SHAPE)
    norms = [node for node in program.graph.nodes if "batch_norm" in str(node.target)]
    assert len(norms) == 1
    x = torch.rand(7, *SHAPE, generator=generator(2))
    torch.testing.assert_close(plain_module(program)(x), model(x), rtol=0, atol=1e-5)


# --- refusals ---------------------------------------------------------------------------------------------------------


def exporting(model, out, to="onnx", **options):
    options = {"data": labelled(cnn()), "threat": THREAT, "attacks": ["fgsm"], "square_queries": 3} | options
    return export_model(model, out, to, **options)


def test_a_graph_that_computes_something_else_is_refused_and_not_written(tmp_path, monkeypatch):
    def wrong(program):
        proto = onnx_graph(program)
        entry = next(e for e in proto.graph.initializer if len(e.dims) == 1 and e.dims[0] == CLASSES)
        changed = onnx.numpy_helper.to_array(entry) + np.float32([0, 0, 2e-4, 0, 0])
        entry.CopyFrom(onnx.numpy_helper.from_array(changed, entry.name))
        return proto

    monkeypatch.setattr(running, "onnx_graph", wrong)
    refusal(
        r"differ from the model's by 0\.0002 on 1000 inputs, more than 0\.0001", exporting, cnn(), tmp_path / "m.onnx"
    )
    assert not list(tmp_path.iterdir())


def test_logits_that_are_no_numbers_are_not_equal(tmp_path):
    model = cnn()
    x = probe(labelled(model), SHAPE, 0)
    assert x.shape == (1000, *SHAPE)
    assert torch.equal(x[:70], labelled(model).x)
    same = Whole(model, SHAPE)
    assert largest_difference(model, same, x) == 0
    assert largest_difference(model, lambda z: same(z) + float("nan"), x) == float("inf")
    refusal("answers 1 images with shape", largest_difference, model, lambda z: same(z)[:, :2], x)


class FixesTheBatch(TinyNet):
    def forward(self, x):
        return super().forward(x) + torch.stack([torch.zeros(CLASSES) for _ in range(x.shape[0])])


def test_a_model_that_fixes_the_number_of_images_is_refused(tmp_path):
    model = FixesTheBatch(dtype=torch.float32)
    for name, to in (("m.onnx", "onnx"), ("m.pt2", "program")):
        refusal("cannot be exported for any number of images", exporting, model, tmp_path / name, to)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_said_in_a_line(tmp_path, monkeypatch):
    model, out = cnn(), tmp_path / "m.onnx"
    refusal("a file of the format program ends in .pt2, got m.onnx", exporting, model, out, "program")
    refusal("to: must be one of onnx, program, int8, got 'tflite'", exporting, model, out, "tflite")
    refusal("int8 needs training data", exporting, model, out, "int8")
    file = as_onnx(tmp_path / "there.onnx", model)
    refusal("ONNX file without gradients", exporting, file, out)
    refusal("there.onnx is there already; use --fresh", exporting, model, tmp_path / "there.onnx")
    find = importlib.import_module

    def without(name):
        if name == "onnxscript":
            raise ImportError
        return find(name)

    monkeypatch.setattr(importlib, "import_module", without)
    refusal(r"needs onnxscript: pip install 'crdnd\[export\]'", exporting, model, out)


def test_an_export_that_is_stopped_leaves_what_was_there(tmp_path, monkeypatch):
    out = tmp_path / "m.pt2"
    first = exporting(cnn(), out, "program")
    content = out.read_bytes()

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "latencies", stopped)
    with pytest.raises(KeyboardInterrupt):
        exporting(cnn(seed=2), out, "program", fresh=True)
    assert out.read_bytes() == content
    assert Export.model_validate_json((tmp_path / "m.pt2.json").read_text()) == first
    with pytest.raises(KeyboardInterrupt):
        exporting(cnn(), tmp_path / "n.pt2", "program")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pt2", "m.pt2.json"]


# --- int8 -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eight_bits(tmp_path_factory):
    """A model, its folded program, the quantised graph, its twin, and that graph as a file."""
    folder, model = tmp_path_factory.mktemp("int8"), cnn()
    program = folded(traced(model, SHAPE, any_size=False), SHAPE)
    graph, some = onnx_graph(program), torch.rand(40, *SHAPE, generator=generator(3))
    small = quantised(graph, some, folder)
    twin = twin_of(program, graph, small, some[:5])
    return model, program, small, twin, opened(folder / "m.onnx", joined(small, SHAPE, {}))


def test_the_twins_weights_are_those_of_the_file_and_near_the_models(eight_bits):
    _, program, small, twin, _ = eight_bits
    held = {entry.name: onnx.numpy_helper.to_array(entry) for entry in small.graph.initializer}
    weights, exact = dict(twin.named_parameters()), dict(plain_module(program).named_parameters())
    found = dequantised(small)
    matrices = [name for name in found if found[name].ndim > 1]
    assert len(matrices) >= 4
    assert set(found) <= set(weights)
    for name in matrices:
        levels, scale = held[f"{name}_quantized"], held[f"{name}_scale"]
        assert levels.dtype == np.int8
        assert np.abs(levels.astype(int)).max() <= 64, "7 bits, for CPUs without VNNI"
        assert len(scale) == len(levels), "one scale a channel"
        by_hand = torch.from_numpy(levels * scale.reshape(-1, *[1] * (levels.ndim - 1)))
        assert torch.equal(weights[name], by_hand)
        error = (weights[name] - exact[name]).abs().flatten(1).amax(1)
        assert (error <= 0.5001 * torch.from_numpy(scale)).all()


def test_the_twin_is_nearer_to_the_file_than_the_model_and_has_gradients(eight_bits):
    model, _, small, twin, file = eight_bits
    x = torch.rand(41, *SHAPE, generator=generator(4))
    with torch.no_grad():
        target = file(x)
        assert (model(x) - target).abs().mean() > 100 * (twin(x) - target).abs().mean()
    rounded = sum(node.target is torch.fake_quantize_per_tensor_affine for node in twin.graph.nodes)
    assert rounded == sum(node.op_type == "QuantizeLinear" for node in small.graph.node)
    both = Differentiable(file, twin)
    torch.testing.assert_close(both(x), target, rtol=0, atol=1e-6)
    gradients = []
    for module in (both, twin, model):
        z = x.clone().requires_grad_(True)
        gradients.append(torch.autograd.grad(module(z)[:, 1].sum(), z)[0].flatten(1))
    assert torch.equal(gradients[0], gradients[1])
    assert torch.cosine_similarity(gradients[1], gradients[2]).mean() > 0.9


def test_an_int8_export_says_what_quantisation_costs(tmp_path):
    model = cnn()
    data, train = labelled(model), labelled(model, 90, seed=6)
    export = exporting(model, tmp_path / "m.onnx", "int8", data=data, training_data=train, calibration_images=33)
    file = resolve_model(str(tmp_path / "m.onnx"))
    with torch.no_grad():
        seen, expected = file(data.x), model(data.x)
    quantisation = export.quantisation
    assert quantisation.calibration_images == 33
    assert quantisation.agreeing.correct == (seen.argmax(1) == expected.argmax(1)).sum()
    assert quantisation.largest_difference == pytest.approx(float((seen - expected).abs().max()), abs=1e-6)
    assert quantisation.largest_difference > 0
    assert export.accuracy.clean.correct == (seen.argmax(1) == data.y).sum()
    assert list(export.accuracy.attacks) == ["model:fgsm", "square", "twin:fgsm"]
    assert export.accuracy.worst_case.correct <= min(share.correct for share in export.accuracy.attacks.values())
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load(tmp_path / "m.onnx").graph.node)


# --- what is measured -------------------------------------------------------------------------------------------------


def test_what_is_found_on_the_model_is_judged_on_the_file():
    model, other = cnn(), cnn(seed=1)
    data = labelled(model)
    verdicts = Verdicts(other, data)
    plan = verdicts.shown({"fgsm": load_attack("fgsm")})
    ids = torch.arange(len(data))
    x_adv = adversarial(model, plan["fgsm"], data.x, data.y, ids, THREAT, 0)
    assert torch.equal(x_adv, adversarial(model, load_attack("fgsm"), data.x, data.y, ids, THREAT, 0))
    expected = other(x_adv).argmax(1) == data.y
    assert torch.equal(verdicts.columns["model:fgsm"], expected)
    assert 0 < expected.sum() < len(data)


def test_an_equal_file_stands_where_its_model_stands_and_that_is_on_record(tmp_path):
    model = cnn()
    data = labelled(model)
    out, folder = tmp_path / "files" / "m.pt2", tmp_path / "run"
    save_model(folder, model, ModelCard())
    options = {"data": data, "attacks": ATTACKS, "folder": folder, "source": "run"}
    export = exporting(model, out, "program", **options)
    assert export.accuracy.clean == export.model_accuracy.clean
    assert export.accuracy.clean.correct == export.n == len(data)
    assert export.accuracy.worst_case == export.model_accuracy.worst_case
    assert 0 < export.accuracy.worst_case.correct < len(data)
    assert list(export.accuracy.attacks) == ["model:fgsm", "model:apgd_t", "square"]
    for name in ("fgsm", "apgd_t"):
        assert export.accuracy.attacks[f"model:{name}"] == export.model_accuracy.attacks[name]
    assert (export.cost_worst_case.points, export.cost_clean.points) == (0, 0)
    content = out.read_bytes()
    assert (export.sha256, export.size_bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    assert [line.batch for line in export.latency] == [1, 64]
    assert Export.model_validate_json(out.with_name("m.pt2.json").read_bytes()) == export
    assert read_exports(folder) == [export]
    again = exporting(model, out.with_name("n.pt2"), "program", **options)
    assert read_exports(folder) == [export, again]
    once_more = exporting(model, out, "program", fresh=True, **options)
    assert read_exports(folder) in ([again, once_more], [export, again, once_more])  # archives may differ in a date


def test_data_of_another_size_are_measured_through_the_resize(tmp_path):
    model = cnn()
    x = torch.rand(70, 3, 13, 11, generator=generator(7))
    with torch.no_grad():
        y = model(fitted(x, SHAPE)).argmax(1)
    y[:21] = (y[:21] + 1) % CLASSES
    data = ImageData(x, y, num_classes=CLASSES)
    export = exporting(model, tmp_path / "m.onnx", data=data)
    assert export.accuracy.clean.correct == export.model_accuracy.clean.correct == 49
    grey = ImageData(x[:, :1], y, num_classes=CLASSES)
    refusal("images have 1 channels, the file would take 3", exporting, model, tmp_path / "n.onnx", data=grey)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def crdnd(tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def photographs(tmp_path):
    """A folder of photographs of several sizes, and the folder of a model that was trained on it."""
    draws = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(30):
            size = (9 + number % 5, 8 + number % 7, 3)
            pixels = draws.integers(0, 256, size, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    model = awake(create_model("cnn", input_shape=(3, 8, 8), num_classes=2, width=4), (3, 8, 8))
    save_model(tmp_path / "run", model, ModelCard(data="photos", threat=THREAT, class_names=("cat", "dog")))
    return tmp_path


def test_from_a_folder_of_photographs_to_a_file_that_predicts(crdnd, photographs, capsys):
    options = ("--out", "student.onnx", "--square-queries", "3", "--calibration", "20", "--json")
    status, out, err = crdnd("export", "run", "--to", "int8", *options)
    assert status == 0, err
    export = Export.model_validate_json(out)
    assert (export.split, export.n, export.source) == ("validation", 6, "run")
    assert export.quantisation.calibration_images == 20
    assert read_exports(photographs / "run") == [export]
    wrong = (("onnx", "student.onnx", "use --fresh"), ("onnx", "s.pt2", "in .onnx"), ("tflite", "s.tf", "to: must be"))
    for to, name, message in wrong:
        # What is wrong with them is said before anything is read: a large folder takes minutes.
        status, _, err = crdnd("export", "nowhere", "--to", to, "--out", name)
        assert (status, message in err, err.count("\n")) == (2, True, 1)
    evaluated = ("--data", "photos", "--set", "image_size=14", "--eps", "0.02", "--attacks", "square", "--n", "4")
    assert crdnd("evaluate", "student.onnx", *evaluated, "--set", "attacks.square.queries=2")[0] == 0

    page = (Path(__file__).parent.parent / "docs" / "export.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len([line for line in block.splitlines() if line]) <= 10
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open("photos/cat/3.png").save("photo.jpg", exif=turned, quality=95)
    Path("example.py").write_text(block)
    found = runpy.run_path("example.py")
    assert capsys.readouterr().out.strip() in ("cat", "dog")
    assert np.array_equal(found["images"][0].transpose(1, 2, 0), np.float32(read_image(Path("photo.jpg"))) / 255)


def test_the_table_says_what_a_file_costs(crdnd, photographs, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    options = ("--out", "s.pt2", "--data", "photos/cat", "--square-queries", "3")
    status, _, err = crdnd("export", "run", "--to", "program", *options)
    assert status == 2
    (photographs / "photos").rename(photographs / "moved")
    options = ("--out", "s.pt2", "--data", "moved", "--square-queries", "3", "--n", "9")
    status, out, err = crdnd("export", "run", "--to", "program", *options)
    assert status == 0, err
    for words in ("s.pt2 (program", "n = 9", "worst case", "pgd_sat (model)", "square", "batch of 64", "x as fast"):
        assert words in out
    assert isinstance(resolve_model("s.pt2"), nn.Module)


def test_a_place_that_cannot_be_written_is_said_before_anything_is_read(crdnd, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for folder in ("s.onnx", "t.onnx.json"):
        (tmp_path / folder).mkdir()
    places = [
        ("file/m.onnx", "error: file: cannot be written"),
        ("s.onnx", "error: out: s.onnx is a folder; name a file"),
        ("t.onnx", "error: out: t.onnx.json is a folder; choose another --out"),
        ("m.onnx", "error: m.onnx: cannot be written (Read-only file system); choose another place"),
    ]
    for name, message in places:
        if name == "m.onnx":

            def refused(*_, **__):
                raise OSError(errno.EROFS, "Read-only file system")

            monkeypatch.setattr(running.tempfile, "TemporaryFile", refused)
        status, _, err = crdnd("export", "nowhere", "--to", "onnx", "--out", name, "--fresh")
        assert (status, err.startswith(message), err.count("\n")) == (2, True, 1), err


def test_a_model_folder_that_cannot_be_written_loses_no_export(crdnd, photographs, monkeypatch, caplog):
    def refused(path, _):
        raise cannot_write(path, OSError(errno.EROFS, "Read-only file system"))

    monkeypatch.setattr(documents, "atomic_write_text", refused)
    status, out, err = crdnd("export", "run", "--to", "program", "--out", "s.pt2", "--square-queries", "3")
    assert status == 0, err
    assert "worst case" in out
    assert Export.model_validate_json(Path("s.pt2.json").read_text()).n == 6
    (said,) = [record.getMessage() for record in caplog.records if record.name == "crdnd"]
    assert "s.pt2 is complete, but" in said
    assert "exports.json: cannot be written (Read-only file system)" in said
    assert "\n" not in said
    assert read_exports(photographs / "run") == []


def test_the_files_parts_have_the_names_that_others_call_them_by():
    assert Fitting(SHAPE)(torch.rand(2, 3, 4, 5)).shape == (2, *SHAPE)
    model = cnn()
    x = torch.rand(2, *SHAPE, generator=generator(1))
    assert torch.equal(Whole(model, SHAPE)(x), model(x))
    assert OnnxModel.provides_gradients is False
