"""Models and weights from the web: verified, kept, and never run. The web is a server on this machine."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from crdnd import ImageData, InputError, RunError, Splits, ThreatModel, create_model, distill
from crdnd import download as download_module
from crdnd.cli import main
from crdnd.models import ModelCard, load_model, local_model, resolve_model, save_model, weights_sha256
from support import CLASSES, SHAPE, TinyNet, images
from web import Server

torch.set_num_threads(1)  # networks this small wait for their threads more than they compute

X = images(dtype=torch.float32)


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setattr(download_module, "WAITS", (0.0,))
    monkeypatch.setenv("CRDND_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    found = Server()
    yield found
    found.close()


def cnn(seed: int = 0):
    return create_model("cnn", input_shape=SHAPE, num_classes=CLASSES, width=2, seed=seed).eval()


@pytest.fixture
def published(server, tmp_path):
    """A model folder of ours on the web; its spec, and the model."""
    model = cnn(seed=3)
    card = save_model(tmp_path / "folder", model, ModelCard(schema="crdnd.model/1", data="dots", role="teacher"))
    for name in ("model.safetensors", "model.json"):
        server.files[f"/t/{name}"] = (tmp_path / "folder" / name).read_bytes()
    return f"{server.root}/t/model.safetensors#sha256={card.sha256}", model


def test_a_model_of_ours_comes_with_its_card_and_is_asked_for_once(server, published):
    spec, model = published
    for _ in range(2):
        assert torch.equal(resolve_model(spec)(X), model(X))
    assert server.paths == ["/t/model.safetensors", "/t/model.json"]
    assert Path(local_model(spec)).with_suffix(".json").exists()


def test_a_url_without_its_sha256_is_refused_before_the_network_is_touched(server, published):
    for bare in (published[0].partition("#")[0], f"{server.root}/t/x.pt2#sha256=12", f"{server.root}/t/x.onnx#md5=1"):
        with pytest.raises(InputError, match=r"#sha256=\.\.\. with its 64 digits.*sha256sum") as error:
            resolve_model(bare)
        assert "\n" not in str(error.value)
    assert server.paths == []


def test_another_file_at_the_place_is_refused(server, published):
    server.files["/t/model.safetensors"] += b"x"
    with pytest.raises(InputError, match=r"has another file .its sha256 is"):
        resolve_model(published[0])


def test_a_card_of_another_model_is_refused(server, published, tmp_path):
    save_model(tmp_path / "other", cnn(seed=4), ModelCard(schema="crdnd.model/1"))
    server.files["/t/model.json"] = (tmp_path / "other" / "model.json").read_bytes()
    with pytest.raises(InputError, match="is the card of another model"):
        resolve_model(published[0])
    server.files["/t/model.json"] = b"[1]"
    with pytest.raises(InputError, match=r"model\.json: is not one of this package's files"):
        resolve_model(published[0])


def test_weights_without_a_card_are_said_to_need_an_architecture(server, published):
    del server.files["/t/model.json"]
    with pytest.raises(InputError, match=r"without the card model\.json .* give the architecture") as error:
        resolve_model(published[0])
    assert "\n" not in str(error.value)


def test_a_web_page_in_place_of_a_file_is_said_in_one_line(server, published):
    server.kind = "text/html"
    with pytest.raises(InputError, match="sends a web page instead of the file") as error:
        resolve_model(published[0])
    assert "\n" not in str(error.value)


def test_a_server_that_cannot_be_reached_is_the_machines_failure(server, published):
    server.close()
    with pytest.raises(RunError, match="cannot be reached"):
        resolve_model(published[0])


FACTORY = """
import torch
from support import TinyNet

def make():
    return TinyNet(seed=5, dtype=torch.float32)
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "remote_nets.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield "remote_nets:make"
    sys.modules.pop("remote_nets", None)


@pytest.mark.parametrize("path", ["/w.pt", "/w.safetensors", "/w.pth?download=1", "/uc?export=download&id=1"])
def test_weights_for_an_architecture_come_from_the_web_too(path, server, factory, tmp_path):
    model = TinyNet(seed=1, dtype=torch.float32)
    file = tmp_path / "weights"
    if "safetensors" in path:
        safetensors.torch.save_file(model.state_dict(), file)
    else:
        torch.save({"state_dict": model.state_dict()}, file)
    server.files[path] = file.read_bytes()
    spec = f"{server.root}{path}#sha256={hashlib.sha256(file.read_bytes()).hexdigest()}"
    assert torch.equal(resolve_model(factory, spec)(X), model(X))
    if "safetensors" not in path:
        with pytest.raises(InputError, match="file of weights without an architecture"):
            resolve_model(spec)


def test_what_is_downloaded_is_not_run(server, factory, tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "run",)

    torch.save({"state_dict": Payload()}, tmp_path / "bad")
    content = (tmp_path / "bad").read_bytes()
    server.files["/bad.pt"] = content
    with pytest.raises(InputError, match="may contain code, never run"):
        resolve_model(factory, f"{server.root}/bad.pt#sha256={hashlib.sha256(content).hexdigest()}")
    assert not (tmp_path / "run").exists()


def test_a_student_is_distilled_from_teachers_of_the_web(server, published, factory, tmp_path):
    file = tmp_path / "w.pt"
    torch.save(TinyNet(seed=1, dtype=torch.float32).state_dict(), file)
    server.files["/w.pt"] = file.read_bytes()
    weights = f"{server.root}/w.pt#sha256={hashlib.sha256(file.read_bytes()).hexdigest()}"
    y = torch.arange(13) % CLASSES
    data = Splits(ImageData(images(13, dtype=torch.float32), y, CLASSES), ImageData(X, y[:6], CLASSES))
    run = distill(
        cnn(), data, teacher=published[0], second_teacher=factory, second_teacher_weights=weights, objective="mtard",
        threat=ThreatModel(norm="linf", eps=0.1), epochs=1, batch_size=4, attack={"steps": 1}, out=tmp_path / "run",
    )  # fmt: skip
    assert json.loads((run.folder / "model.json").read_text())["teacher_sha256"] == weights_sha256(published[1])
    for given in ({"teacher": cnn(), "teacher_weights": "w.pt"}, {"teacher": cnn(), "second_teacher_weights": "w.pt"}):
        with pytest.raises(InputError, match="teacher_weights: "):
            distill(cnn(), data, objective="rslad", threat=ThreatModel(norm="linf", eps=0.1), out="o", **given)


def test_evaluate_reads_the_card_of_a_model_of_the_web(server, published, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({}, tmp_path / "unused")
    import numpy as np

    y = (torch.arange(6) % CLASSES).numpy()
    np.savez(tmp_path / "data.npz", x=X.numpy(), y=y)
    with pytest.raises(SystemExit) as end:
        main(["evaluate", published[0], "--data", "data.npz", "--eps", "0.1", "--attacks", "fgsm", "--json"])
    assert not end.value.code
    row = json.loads(capsys.readouterr().out)["rows"][0]
    assert row["role"] == "teacher"
    assert row["model_sha256"] == weights_sha256(published[1])


# The hub


class Hub:
    """What is asked of the hub, and a folder or an error for an answer."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def __call__(self, repository, **options):
        self.asked.append((repository, options))
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    import huggingface_hub

    save_model(tmp_path / "snapshot", cnn(seed=6), ModelCard(schema="crdnd.model/1", data="dots"))
    found = Hub(tmp_path / "snapshot")
    monkeypatch.setenv("CRDND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
    return found


@pytest.mark.parametrize("revision", [None, "v1.0", "refs/pr/3"])
def test_a_model_folder_comes_from_the_hub_by_two_files_alone(hub, revision, tmp_path):
    spec = "hf:owner/some-model.v2" + (f"@{revision}" if revision else "")
    assert torch.equal(resolve_model(spec)(X), cnn(seed=6)(X))
    ((repository, options),) = hub.asked
    assert (repository, options["revision"]) == ("owner/some-model.v2", revision)
    assert sorted(options["allow_patterns"]) == ["model.json", "model.safetensors"]
    assert options["cache_dir"] == tmp_path / "cache" / "hub"


def test_what_the_hub_refuses_is_said_in_one_line(hub, tmp_path):
    from huggingface_hub import errors

    cases = [
        (errors.RepositoryNotFoundError, InputError, "no such model at the hub"),
        (errors.RevisionNotFoundError, InputError, "no such revision"),
        (errors.HFValidationError, InputError, "said by the hub"),
        (errors.LocalEntryNotFoundError, RunError, "cannot be reached, and the model is not in"),
        (errors.HfHubHTTPError, RunError, "the hub answers said by the hub"),
    ]
    for answer, kind, message in cases:
        hub.answer = answer.__new__(answer)  # what their constructors take depends on the hub's version
        hub.answer.args = ("said by the hub\nand more",)
        with pytest.raises(kind, match=message) as error:
            resolve_model("hf:owner/name")
        assert "\n" not in str(error.value)
    (tmp_path / "empty").mkdir()
    hub.answer = tmp_path / "empty"
    with pytest.raises(InputError, match=r"has no model\.json; only model folders of this package"):
        resolve_model("hf:owner/name")
    for spec in ("hf:name", "hf:a/b/c", "hf:a/b@", "hf:../x/y"):
        with pytest.raises(InputError, match="is written as hf:owner/name"):
            resolve_model(spec)


def test_a_model_that_is_here_needs_no_network(hub, tmp_path):
    assert local_model(str(tmp_path / "snapshot")) == str(tmp_path / "snapshot")
    assert load_model(tmp_path / "snapshot") is not None
    assert hub.asked == []
