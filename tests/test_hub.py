"""Pushing and pulling models: the hub's real client, against a stand-in of the hub on this machine."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants

from crdnd import ThreatModel, create_model, load_model
from crdnd.cli import main
from crdnd.evaluation import evaluate
from crdnd.evaluation.run import Label
from crdnd.models import ModelCard, read_card, save_model
from crdnd.provenance import without_places
from crdnd.report import model_card
from hub import TOKEN, Hub
from support import CLASSES, SHAPE, images

torch.set_num_threads(1)
# Of the client's own upload with its own HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")
X, Y = images(dtype=torch.float32), torch.arange(6) % CLASSES
REPOSITORY = "ada/dots-rslad"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    found = Hub()
    monkeypatch.setenv("CRDND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    _use(monkeypatch, found.url)
    yield found
    found.close()


def _use(monkeypatch, url):
    """What HF_ENDPOINT does; the client reads it once, when it is imported."""
    from huggingface_hub import hf_api

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hf_api.api, "endpoint", url)


def exported(file: str, card: ModelCard, **others) -> dict:
    """The document of an export of a model, measured on six images."""
    right = {"correct": 3, "n": 6, "low": 18.8, "high": 81.2}
    fooled, cost = right | {"correct": 2}, {"points": -16.7, "low": -50.0, "high": 16.7}
    measured = {"clean": right, "attacks": {"model:fgsm": fooled, "square": right}, "worst_case": fooled}
    return {
        "schema": "crdnd.export/1", "file": file, "format": "onnx", "sha256": hashlib.sha256(b"onnx").hexdigest(),
        "size_bytes": 2**19, "source": "runs/x", "source_sha256": card.sha256, "input": "images", "output": "logits",
        "input_shape": SHAPE, "class_names": card.class_names,
        "equality": {"inputs": 1000, "tolerance": 1e-4, "largest_difference": 3.1e-6},
        "threat": {"norm": "linf", "eps": 8 / 255}, "data": "cifar10", "data_sha256": "a", "split": "test", "n": 6,
        "seed": 0, "preset": {"fgsm": {}}, "square_queries": 500, "accuracy": measured,
        "model_accuracy": measured | {"attacks": {"fgsm": right, "square": right}},
        "cost_clean": cost, "cost_worst_case": cost | {"points": -1.5},
        "latency": [{"batch": 1, "file": 1.25, "model": 2.5, "runs": 7, "threads": 2, "processor": "A chip"}],
        "versions": {}, **others,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A run's folder as it is after an evaluation and an export, with what is nobody else's business."""
    threat = ThreatModel(norm="linf", eps="8/255")
    model = create_model("cnn", input_shape=SHAPE, num_classes=CLASSES, width=2, seed=3).eval()
    place = tmp_path / "run"
    card = ModelCard(
        schema="crdnd.model/1", method="rslad", data="cifar10", seed=3, checkpoint="best", threat=threat,
        class_names=("a", "b", "c", "d", "e"), teacher_sha256="f" * 64, commit="0" * 40, versions={"torch": "2.9"},
        command="crdnd distill --teacher '/home/ada lovelace/teacher' --set model.weights=/srv/x/w.pt --out runs/x",
    )  # fmt: skip
    save_model(place, model, card)
    results = evaluate(model, (X, Y), threat=threat, attacks=["fgsm"], label=Label("rslad", "student", 3, "best"))
    (place / "evaluation.json").write_text(results.to_json())
    (place / "student.onnx").write_bytes(b"onnx")
    exports = [exported(name, read_card(place)) for name in ("student.onnx", "../secret.onnx", "program.pt2")]
    (place / "exports.json").write_text(json.dumps(exports))
    for name in ("run.log", "checkpoint.json", "checkpoint-00000001.safetensors", "program.pt2", "notes.txt"):
        (place / name).write_text("{}" if name == "checkpoint" else "host-of-ada")
    (place / "checkpoint.json").unlink()
    (tmp_path / "secret.onnx").write_bytes(b"secret")
    return place


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    found = capsys.readouterr()
    return end.value.code, found.out, found.err


def refused(capsys, code, pattern, *arguments):
    found, _, err = run(capsys, *arguments)
    assert found == code, err
    assert re.search(pattern, err), err
    assert len(err.splitlines()) == 1


def nothing_left(place: Path) -> bool:
    return not list(place.glob("*pulled*")) and not list(place.glob(".*pulled*"))


SHARED = {"README.md", "model.json", "model.safetensors", "evaluation.json", "exports.json", "student.onnx"}


def test_what_is_pushed_is_pulled_and_nothing_else_leaves_the_folder(hub, folder, tmp_path, capsys):
    code, out, err = run(capsys, "push", folder, REPOSITORY, "--license", "mit", "--private")
    assert code == 0, err
    there = hub.repositories[REPOSITORY]["main"]
    assert set(there) == SHARED | {".gitattributes"}
    assert len(hub.commits) == 1
    assert hub.private == {REPOSITORY}
    assert out.splitlines()[-1] == f"{hub.url}/{REPOSITORY}/commit/{hub.commit(REPOSITORY)}"
    assert not any(word in content for content in there.values() for word in (b"lovelace", b"/srv", b"host-of-ada"))

    pulled = tmp_path / "pulled"
    code, out, err = run(capsys, "pull", REPOSITORY, "--out", pulled, "--sha256", read_card(folder).sha256)
    assert code == 0, err
    assert {path.name for path in pulled.iterdir()} == SHARED
    for name in ("model.safetensors", "evaluation.json", "student.onnx"):
        assert (pulled / name).read_bytes() == (folder / name).read_bytes()
    assert torch.equal(load_model(pulled)(X), load_model(folder)(X))
    assert not list(tmp_path.glob(".pulled*"))


def test_a_dry_run_shows_the_files_and_the_page_and_asks_nothing_of_the_network(hub, folder, capsys):
    code, out, err = run(capsys, "push", folder, REPOSITORY, "--dry-run")
    assert code == 0, err
    assert {line.split()[-1] for line in out.splitlines() if " bytes  " in line} == SHARED
    assert "# rslad-cnn" in out
    assert hub.requests == []
    assert not (folder / "README.md").exists()


def test_a_later_push_removes_what_no_longer_holds_and_leaves_the_owners_files(hub, folder, capsys):
    run(capsys, "push", folder, REPOSITORY)
    hub.repositories[REPOSITORY]["main"]["picture.png"] = b"png"
    (folder / "evaluation.json").unlink()
    assert run(capsys, "push", folder, REPOSITORY)[0] == 0
    there = hub.repositories[REPOSITORY]["main"]
    assert "evaluation.json" not in there
    assert "picture.png" in there
    assert b"robustness: not measured" in there["README.md"]


def test_a_branch_is_made_and_pulled_from(hub, folder, tmp_path, capsys):
    assert run(capsys, "push", folder, REPOSITORY, "--revision", "v2")[0] == 0
    assert "model.json" in hub.repositories[REPOSITORY]["v2"]
    assert "model.json" not in hub.repositories[REPOSITORY]["main"]
    refused(capsys, 2, r"has no model\.json", "pull", REPOSITORY, "--out", tmp_path / "pulled")
    assert run(capsys, "pull", f"hf:{REPOSITORY}@v2", "--out", tmp_path / "pulled")[0] == 0
    refused(capsys, 2, "no such revision", "pull", f"{REPOSITORY}@v3", "--out", tmp_path / "other")


@pytest.fixture
def pushed(hub, folder, capsys):
    assert run(capsys, "push", folder, REPOSITORY)[0] == 0
    return hub.repositories[REPOSITORY]["main"]


def test_tampered_files_are_refused_and_nothing_is_left(pushed, folder, tmp_path, capsys):
    whole = dict(pushed)
    digest = read_card(folder).sha256
    cut = bytearray(whole["model.safetensors"])
    cut[-1] ^= 1
    exports = json.dumps([{"file": "student.onnx", "sha256": hashlib.sha256(b"onnx").hexdigest()}]).encode()
    cases = [
        ({"model.safetensors": bytes(cut)}, "is not the file that model.json names .*tampered"),
        ({"model.json": whole["model.json"].replace(digest.encode(), b"0" * 64)}, "not the file that model.json names"),
        ({"model.json": b"[]"}, r"model\.json: is not one of"),
        ({"model.json": whole["model.json"].replace(b"crdnd.model/1", b"crdnd.model/9")}, "has the format"),
        ({"exports.json": b"["}, r"exports\.json: cannot be read"),
        ({"exports.json": exports, "student.onnx": b"0NNX"}, r"student\.onnx is not the file"),
    ]
    for changes, pattern in cases:
        pushed.clear()
        pushed.update(whole | changes)
        refused(capsys, 2, pattern, "pull", REPOSITORY, "--out", tmp_path / "pulled")
        assert nothing_left(tmp_path)


def test_weights_and_card_changed_together_are_refused_by_the_pinned_sha256_alone(pushed, folder, tmp_path, capsys):
    digest = read_card(folder).sha256
    other = create_model("cnn", input_shape=SHAPE, num_classes=CLASSES, width=2, seed=4)
    save_model(tmp_path / "other", other, read_card(folder))
    for name in ("model.safetensors", "model.json"):
        pushed[name] = (tmp_path / "other" / name).read_bytes()
    refused(
        capsys, 2, "other weights than --sha256 names", "pull", REPOSITORY, "--out", tmp_path / "pulled",
        "--sha256", digest,
    )  # fmt: skip
    refused(
        capsys, 2, "sha256: must be the 64 digits", "pull", REPOSITORY, "--out", tmp_path / "pulled", "--sha256", "12"
    )
    assert nothing_left(tmp_path)
    assert run(capsys, "pull", REPOSITORY, "--out", tmp_path / "pulled")[0] == 0


def test_weights_that_are_no_safetensors_are_refused_though_their_sha256_agrees(pushed, folder, tmp_path, capsys):
    bad = b"\x80\x04cposix\nsystem\n"
    digest = read_card(folder).sha256.encode()
    pushed["model.safetensors"] = bad
    pushed["model.json"] = pushed["model.json"].replace(digest, hashlib.sha256(bad).hexdigest().encode())
    refused(capsys, 2, "not a readable safetensors file", "pull", REPOSITORY, "--out", tmp_path / "pulled")
    assert nothing_left(tmp_path)


def test_foreign_files_are_named_and_not_asked_for(hub, pushed, tmp_path, capsys):
    foreign = ["pytorch_model.bin", "model.pt", "code/run.pkl", "other.onnx"]
    pushed.update(dict.fromkeys(foreign, b"\x80"))
    hub.requests.clear()
    code, out, _ = run(capsys, "pull", REPOSITORY, "--out", tmp_path / "pulled")
    assert code == 0
    assert out.splitlines()[-1].endswith(": " + ", ".join(foreign))
    assert not [asked for asked in hub.requests if any(name in asked for name in foreign)]
    assert {path.name for path in (tmp_path / "pulled").iterdir()} == SHARED


@pytest.mark.parametrize("name", ["../evil.onnx", "a/../../b", "/etc/x", "C:/x", "a\\b"])
def test_a_listing_with_a_name_outside_its_folder_is_refused(hub, pushed, tmp_path, capsys, name):
    hub.listed = [name]
    refused(capsys, 2, "lie outside its folder", "pull", REPOSITORY, "--out", tmp_path / "pulled")
    assert nothing_left(tmp_path)


def test_a_folder_that_is_there_is_not_touched(hub, pushed, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    hub.requests.clear()
    refused(capsys, 2, "is there already", "pull", REPOSITORY, "--out", tmp_path / "mine")
    assert hub.requests == []


def test_what_the_hub_refuses_is_one_line(hub, folder, tmp_path, capsys, monkeypatch):
    pull = ("pull", REPOSITORY, "--out", tmp_path / "pulled")
    refused(capsys, 2, "no such model at the hub", *pull)
    refused(capsys, 2, "refuses .*rights to create", "push", folder, "foreign/model")
    for command in (("push", folder, "name", "--dry-run"), ("pull", "name", "--out", tmp_path / "pulled")):
        refused(capsys, 2, "is written as owner/name, or owner/name@revision", *command)
    refused(capsys, 2, "is written as hf:owner/name, or hf:owner/name@revision", "push", folder, "hf:name")
    refused(capsys, 2, "license: must be", "push", folder, REPOSITORY, "--license", "My License")
    refused(capsys, 2, "revision: is named twice", "push", folder, f"{REPOSITORY}@a", "--revision", "b")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(capsys, 2, "refuses .*HF_TOKEN", "push", folder, REPOSITORY)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.close()
    refused(capsys, 1, "cannot be reached", *pull)
    refused(capsys, 1, "cannot be reached", "push", folder, REPOSITORY)
    assert nothing_left(tmp_path)


def test_a_damaged_or_missing_model_is_not_pushed(hub, folder, tmp_path, capsys):
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    refused(capsys, 2, "truncated or damaged", "push", folder, REPOSITORY)
    refused(capsys, 2, "none: is no model", "push", tmp_path / "none", REPOSITORY)
    assert hub.requests == []


# The page


def front(page: str) -> dict:
    return yaml.safe_load(page.split("---\n")[1])


def test_the_page_has_its_numbers_from_the_files(folder):
    page = model_card(folder, licence="mit", repository=REPOSITORY)
    row = json.loads((folder / "evaluation.json").read_text())["rows"][0]
    correct = row["worst_case"]["correct"]
    assert f"({correct}/6)" in page.split("**worst case**")[1].splitlines()[0]
    assert f"**{row['verdict']}**" in page
    assert "up to 8/255" in page
    assert "A. Krizhevsky" in page
    assert read_card(folder).sha256 in page
    assert "--teacher teacher --set model.weights=w.pt --out runs/x" in page
    head = front(page)
    assert head["license"] == "mit"
    values = {one["name"]: one["value"] for one in head["model-index"][0]["results"][0]["metrics"]}
    assert values["Robust accuracy (worst case of all attacks), linf, eps 8/255"] == pytest.approx(
        100 * correct / 6, abs=0.01
    )


def test_the_page_tells_of_every_exported_file_of_these_weights(folder):
    card = read_card(folder)
    quantised = {
        "calibration_images": 512, "calibration_data": "cifar10", "largest_difference": 0.1,
        "agreeing": {"correct": 5, "n": 6, "low": 43.6, "high": 97.0},
    }  # fmt: skip
    exports = [
        exported("student.onnx", card),
        exported("small.onnx", card, format="int8", quantisation=quantised),
        exported("old.onnx", card, source_sha256="0" * 64),
    ]
    (folder / "exports.json").write_text(json.dumps(exports))
    page = model_card(folder).split("## Exported files")[1].split("## Cost")[0]
    assert [line for line in page.splitlines() if line.startswith("### ")] == ["### student.onnx", "### small.onnx"]
    first, second = page.split("### ")[1:]
    assert "onnx, 0.50 MiB, on 6 images of cifar10 (split: test), under linf with eps 8/255" in first
    assert "| natural | 50.0% (3/6) [18.8, 81.2] | 50.0% (3/6) [18.8, 81.2] |" in first
    assert "| model:fgsm | 50.0% (3/6) [18.8, 81.2] | 33.3% (2/6) [9.7, 70.0] |" in first
    assert "| worst case, file minus model | | -1.5 [-50.0, +16.7] |" in first
    assert "| milliseconds an image, batch 1 | 2.500 | 1.250 |" in first
    assert "2 threads of A chip" in first
    assert hashlib.sha256(b"onnx").hexdigest() in first
    assert "Calibrated with 512 training images; the same class as from the model: 83.3% (5/6)" in second
    assert "Calibrated" not in first


def test_the_hub_reads_the_head_of_the_page(folder):
    from huggingface_hub import ModelCard as HubCard

    found = HubCard(model_card(folder)).data
    assert [result.metric_value for result in found.eval_results]
    assert found.library_name == "crdnd"
    assert found.license is None


def test_results_of_other_weights_are_not_this_models(folder):
    other = json.loads((folder / "evaluation.json").read_text())
    other["rows"][0]["model_sha256"] = "0" * 64
    (folder / "evaluation.json").write_text(json.dumps(other))
    page = model_card(folder)
    assert "robustness: not measured" in page
    assert "model-index" not in front(page)


def test_what_a_folder_does_not_say_the_page_says_is_not_recorded(tmp_path):
    save_model(tmp_path / "bare", torch.nn.Linear(3, 2), ModelCard(schema="crdnd.model/1"))
    page = model_card(tmp_path / "bare")
    assert page.count("Not recorded") == 3
    assert "not measured" in page
    assert "model=your_module" in page
    assert "datasets" not in front(page)


def test_a_readme_of_the_users_own_stays(folder, capsys):
    for _ in range(2):
        assert run(capsys, "card", folder)[0] == 0
    (folder / "README.md").write_text("mine")
    refused(capsys, 2, "is not one that crdnd wrote", "card", folder)
    assert (folder / "README.md").read_text() == "mine"


def test_a_finished_run_has_its_page(tmp_path, capsys):
    fixture = Path(__file__).parent / "fixtures" / "run-1-finished"
    shutil.copytree(fixture, tmp_path / "run")
    assert run(capsys, "card", tmp_path / "run")[0] == 0
    page = (tmp_path / "run" / "README.md").read_text()
    assert "which chose the epoch" in page
    assert "| epochs | 2 |" in page
    assert "learning_rate: 0.05" in page


@pytest.mark.parametrize(
    ("told", "shared"),
    [
        ("/home/ada/x.pt", "x.pt"),
        ("--out=/home/ada/a b/c", "--out=c"),
        ("wrn,depth=34,weights=/srv/w.pt", "wrn,depth=34,weights=w.pt"),
        ("~/runs/x", "x"),
        ("~ada/runs/x", "x"),
        ("../../ada/x", "x"),
        ("C:\\Users\\ada\\x.npz", "x.npz"),
        ("https://ada:secret@host/w.pt#sha256=12", "https://host/w.pt#sha256=12"),
        ("runs/x", "runs/x"),
        ("8/255", "8/255"),
        ("clean / robust", "clean / robust"),
        ("package.module:factory", "package.module:factory"),
    ],
)
def test_places_of_this_machine_are_cut_to_their_last_names(told, shared):
    assert without_places(told) == shared
