"""Checks for false security: they name what is broken on purpose, leave the honest alone, and keep their thresholds."""

import dataclasses
import importlib.util
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crdnd import ImageData, InputError, ThreatModel, create_model, evaluate
from crdnd.attacks import Attack, load_attack
from crdnd.evaluation import Check, Row, choose_attacks
from crdnd.evaluation import _checks as checks
from crdnd.evaluation import run as evaluation
from crdnd.evaluation._checks import Evidence, run_checks, verdict
from support import CLASSES, TinyNet, generator, images

torch.set_num_threads(1)  # networks this small wait for their threads more than they compute

ROOT = Path(__file__).parents[1]
THREAT = ThreatModel(norm="linf", eps=0.05)
N = 400


def study() -> Any:
    spec = importlib.util.spec_from_file_location("checks_study", ROOT / "studies" / "checks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STUDY = study()


# Thresholds, by hand-made verdicts


def evidence(model: nn.Module | None = None, n: int = N, **fell: int | range) -> Evidence:
    """Everything is right naturally; each attack breaks the samples of its range, or so many of the first."""
    ranges = {name: range(value) if isinstance(value, int) else value for name, value in fell.items()}
    verdicts = {"clean": torch.ones(n, dtype=torch.int8)}
    for name, ids in ranges.items():
        column = torch.ones(n, dtype=torch.int8)
        column[torch.tensor(list(ids), dtype=torch.int64)] = 0
        verdicts[name.replace("check_", "check:")] = column
    model = TinyNet(seed=2) if model is None else model
    x = images(n)
    with torch.no_grad():
        y = model(x).argmax(1)
    return Evidence(model, ImageData(x, y, CLASSES), THREAT, 0, 64, verdicts, gradients=True)


def found(name: str, **arguments: Any) -> Check:
    (check,) = [check for check in run_checks(evidence(**arguments)) if check.name == name]
    return check


SCALED = {f"check_pgd_sat_x{scale}": 100 for scale in (3, 10, 30, 100)}

# Verdicts with the largest number that raises no alarm, and with the next larger one; both of 400 images.
BORDERS: dict[str, tuple[dict[str, Any], dict[str, Any], float, float]] = {
    "noise": ({"check_uniform_noise": 9, "pgd_sat": 10}, {"check_uniform_noise": 10, "pgd_sat": 10}, 2.25, 2.5),
    "one_step_beats_many": ({"fgsm": 14, "pgd_sat": 10}, {"fgsm": 15, "pgd_sat": 10}, 1.0, 1.25),
    "ce_against_margin": (
        {"pgd_sat": 100, "cw_inf": 138},
        {"pgd_sat": 100, "cw_inf": 139},
        100 * 38 / 138,
        100 * 39 / 139,
    ),
    "logit_scale": (
        {"pgd_sat": 100, **SCALED, "check_pgd_sat_x30": 138},
        {"pgd_sat": 100, **SCALED, "check_pgd_sat_x30": 139},
        100 * 38 / 138,
        100 * 39 / 139,
    ),
    "not_converged": ({"apgd_ce": 50, "check_apgd_ce_1000": 54}, {"apgd_ce": 50, "check_apgd_ce_1000": 55}, 1.0, 1.25),
    "unbounded": ({"check_unbounded": range(2, N)}, {"check_unbounded": range(3, N)}, 0.5, 0.75),
    "square_beats_gradients": ({"apgd_t": 50, "square": 54}, {"apgd_t": 50, "square": 55}, 1.0, 1.25),
    "transfer_beats_gradients": ({"apgd_t": 50, "check_transfer": 54}, {"apgd_t": 50, "check_transfer": 55}, 1.0, 1.25),
}


@pytest.mark.parametrize("name", BORDERS)
def test_a_check_is_suspicious_just_above_its_threshold(name):
    below, above, number, larger = BORDERS[name]
    first, second = found(name, **below), found(name, **above)
    assert (first.number, first.suspicious) == (pytest.approx(number), False)
    assert (second.number, second.suspicious) == (pytest.approx(larger), True)


def test_cross_entropy_must_miss_seven_points_too():
    assert not found("ce_against_margin", pgd_sat=10, cw_inf=38).suspicious  # 74% of what falls, 7 points of all
    assert found("ce_against_margin", pgd_sat=10, cw_inf=39).suspicious
    assert not found("logit_scale", pgd_sat=10, **SCALED_NONE | {"check_pgd_sat_x3": 38}).suspicious
    assert found("logit_scale", pgd_sat=10, **SCALED_NONE | {"check_pgd_sat_x3": 39}).suspicious


# Of 20 images, two are 10 points: far above every threshold, and still too few.
FEW: dict[str, Callable[[int], dict[str, Any]]] = {
    "noise": lambda k: {"check_uniform_noise": k, "pgd_sat": 0},
    "one_step_beats_many": lambda k: {"fgsm": k, "pgd_sat": 0},
    "ce_against_margin": lambda k: {"pgd_sat": 0, "cw_inf": k},
    "logit_scale": lambda k: {"pgd_sat": 0, **SCALED_NONE, "check_pgd_sat_x3": k},
    "not_converged": lambda k: {"apgd_ce": 0, "check_apgd_ce_1000": k},
    "unbounded": lambda k: {"check_unbounded": range(k, 20)},
    "square_beats_gradients": lambda k: {"apgd_t": 0, "square": k},
    "transfer_beats_gradients": lambda k: {"apgd_t": 0, "transfer": k},
}
SCALED_NONE = dict.fromkeys(SCALED, 0)


@pytest.mark.parametrize("name", FEW)
def test_fewer_than_three_images_raise_no_alarm(name):
    assert not found(name, n=20, **FEW[name](2)).suspicious
    assert found(name, n=20, **FEW[name](3)).suspicious


@pytest.mark.parametrize("name", BORDERS)
def test_a_check_without_what_it_needs_is_left_out(name):
    arguments = BORDERS[name][1]
    for left_out in arguments:
        rest = {key: value for key, value in arguments.items() if key != left_out}
        assert name not in {check.name for check in run_checks(evidence(**rest))}


def test_parts_of_autoattack_count_as_the_attacks():
    given = {"autoattack/apgd_ce": 50, "autoattack/square": range(50, 55)}
    assert found("square_beats_gradients", **given).suspicious
    # What one gradient attack of several breaks does not stand under every one.
    assert not found("square_beats_gradients", **given, pgd_sat=range(51, 53)).suspicious


def test_gains_and_losses_of_one_step_cancel():
    # fgsm breaks 0 .. 29 and pgd_sat 10 .. 35: 10 images against 6.
    assert found("one_step_beats_many", fgsm=30, pgd_sat=range(10, 36)).number == pytest.approx(1.0)
    assert found("one_step_beats_many", fgsm=5, pgd_sat=90).number < 0


def test_noise_that_breaks_nearly_nothing_raises_no_alarm():
    assert not found("noise", check_uniform_noise=3, pgd_sat=2).suspicious  # 0.75 points
    assert found("noise", check_uniform_noise=4, pgd_sat=2).suspicious


class Unscaled(nn.Module):
    """Made for pixels up to 255, and sure of class 0 on all others."""

    def __init__(self) -> None:
        super().__init__()
        self.network = TinyNet(seed=2)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.eye(1, CLASSES, dtype=x.dtype)
        small = (x.flatten(1).amax(1) <= 1)[:, None]
        return torch.where(small, x.mean((1, 2, 3))[:, None] + first, self.network(x / 255) - 999 * first)


def labels_of(x: Tensor) -> Tensor:
    """Those that an `Unscaled` gives to pixels up to 255; never 0."""
    with torch.no_grad():
        return Unscaled()(255 * x).argmax(1)


def test_where_nothing_is_right_only_the_normalisation_is_checked_and_the_verdict_says_so():
    x = images(23)
    y = labels_of(x)
    for model, alarm in ((Unscaled(), True), (STUDY.Broken(Unscaled(), lambda f, x: f(x.clamp(0, 1))), False)):
        (row,) = evaluate(model, ImageData(x, y, CLASSES), threat=THREAT, attacks=["fgsm"], batch_size=7).rows
        assert row.clean.correct == 0
        assert [(check.name, check.suspicious) for check in row.checks] == [("normalisation", alarm)]
        if alarm:
            assert row.verdict.startswith("suspicious because normalisation: natural accuracy changes by +100.0 points")
        else:
            assert row.verdict == "no image is right, so its robustness was not checked"


def test_the_thresholds_are_those_of_the_documentation():
    text = (ROOT / "docs" / "checks.md").read_text()
    names = re.findall(r"^\| `(\w+)` ", text, re.M)
    columns = {
        cells[1].strip().strip("`"): cells[3]
        for line in text.splitlines()
        if line.startswith("| `") and (cells := re.split(r"(?<!\\)\|", line))
    }
    everything = run_checks(
        evidence(
            fgsm=9, pgd_sat=9, cw_inf=9, apgd_ce=9, square=9, check_uniform_noise=0, check_unbounded=9,
            check_apgd_ce_1000=9, check_transfer=9, **SCALED,
        )
    )  # fmt: skip
    assert [check.name for check in everything] == names
    for check in everything:
        numbers = re.findall(r"\d+(?:\.\d+)?", columns[check.name])
        if check.name == "probabilities":
            assert (check.threshold, numbers) == (0.0, [])
        elif check.name == "noise":
            assert check.threshold == max(float(numbers[0]), 100 * 9 / N)
        elif check.name in ("ce_against_margin", "logit_scale"):
            assert (check.threshold, numbers) == (28.0, ["28", "7"])
        else:
            assert [float(number) for number in numbers] == [check.threshold], check.name
    assert checks.FEWEST == 3
    assert f"at least {checks.FEWEST} images" in text


def check(name: str, *, suspicious: bool) -> Check:
    return Check(name=name, number=1, threshold=0, suspicious=suspicious, says=f"{name} says so", advice="")


def test_a_verdict_in_words():
    quiet = [check("one", suspicious=False), check("two", suspicious=False)]
    assert verdict(quiet) == "consistent (2 checks)"
    loud = [*quiet, check("three", suspicious=True), check("four", suspicious=True)]
    assert verdict(loud) == "suspicious because three: three says so; four: four says so"


# Outputs and gradients


_kept: list[nn.Module] = []


def blobs(count: int = 120, seed: int = 0) -> ImageData:
    """Five classes, each a patch at another place, on a noisy ground."""
    x = 0.35 + 0.3 * torch.rand(count, 1, 6, 9, generator=generator(seed))
    y = torch.arange(count) % CLASSES
    for index in range(count):
        column = int(y[index]) * 2 - (int(y[index]) == 4)
        x[index, 0, 1:5, column : column + 2] += 0.25
    return ImageData(x.clamp(0, 1), y, CLASSES, name="blobs")


def trained() -> nn.Module:
    """A small network that a few seconds of adversarial training have taught the patches."""
    if not _kept:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4 * 7, CLASSES))
        optimizer, data = torch.optim.Adam(network.parameters(), 0.01), blobs(300, seed=1)
        for _ in range(80):
            x = data.x.clone().requires_grad_(True)
            loss = nn.functional.cross_entropy(network(x), data.y)
            (gradient,) = torch.autograd.grad(loss, x)
            x_adv = (data.x + 0.05 * gradient.sign()).clamp(0, 1)
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x_adv), data.y).backward()
            optimizer.step()
        _kept.append(network.eval())
    return _kept[0]


def autoattack() -> Attack:
    settings = {
        "apgd_ce": {"iterations": 20},
        "apgd_t": {"iterations": 10, "targets": 4},
        "fab_t": {"iterations": 5, "targets": 1},
        "square": {"queries": 60},
    }
    parts = tuple(choose_attacks({name: values})[name] for name, values in settings.items())
    return dataclasses.replace(load_attack("autoattack"), parts=parts)


_columns = evaluation.check_columns


def quicker(*arguments: Any) -> list[Any]:
    """The same columns with fewer iterations."""
    found = []
    for column in _columns(*arguments):
        attack = column.attack
        if column.name in ("check:apgd_ce_1000", "check:apgd_dlr"):
            attack = dataclasses.replace(attack, iterations=40)
        if column.name == "check:uniform_noise":
            attack = dataclasses.replace(attack, draws=20)
        if column.name == "check:unbounded":
            parts = tuple(dataclasses.replace(part, iterations=20) for part in attack.parts)
            attack = dataclasses.replace(attack, parts=parts)
        found.append(dataclasses.replace(column, attack=attack))
    return found


def examine(model: nn.Module, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Row:
    monkeypatch.setattr(evaluation, "check_columns", quicker)
    attacks = {"fgsm": {}, "pgd_sat": {}, "cw_inf": {}, "autoattack": autoattack()}
    torch.manual_seed(0)
    return evaluate(model, blobs(), threat=THREAT, attacks=attacks, checks=True, **changes).rows[0]


class Opposed(nn.Module):
    """One wrong class is near; three far ones slope the other way, and drown it where logits are small."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        s = x.flatten(1).mean(1) - 0.5
        far = -10 * s - 5
        return self.scale * torch.stack([0 * s, 10 * s - 0.2, far, far, far], 1)


@pytest.mark.parametrize("scale", [1.0, 1e-2])
def test_logits_that_are_too_small_are_named(scale, monkeypatch):
    monkeypatch.setattr(evaluation, "check_columns", quicker)
    x = torch.linspace(0.44, 0.51, 40)[:, None, None, None].expand(-1, 1, 6, 9).clone()
    data = ImageData(x, torch.zeros(40, dtype=torch.int64), CLASSES)
    attacks = {"fgsm": {}, "pgd_sat": {}, "cw_inf": {}, "autoattack": autoattack()}
    (row,) = evaluate(Opposed(scale), data, threat=THREAT, attacks=attacks, checks=True).rows
    named = {check.name for check in row.checks if check.suspicious}
    assert named >= {"logit_scale", "ce_against_margin"} if scale < 1 else not named


@pytest.mark.parametrize("name", sorted(STUDY.BROKEN.keys() - {"scaled down"}))
def test_a_model_broken_on_purpose_is_named(name, monkeypatch):
    change, expected = STUDY.BROKEN[name]
    row = examine(STUDY.Broken(trained(), change), monkeypatch)
    named = {check.name for check in row.checks if check.suspicious}
    assert named & set(expected), row.checks
    assert row.verdict.startswith("suspicious because ")
    assert all(f"{check}: " in row.verdict for check in named)


def test_an_honest_model_is_left_alone_and_every_check_looks_at_it(monkeypatch):
    surrogate = nn.Sequential(nn.Flatten(), nn.Linear(54, CLASSES))
    model = trained().train()
    before = [module.training for module in model.modules()]
    random = torch.random.get_rng_state()
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    row = examine(model, monkeypatch, surrogate=surrogate)
    assert [check.name for check in row.checks if check.suspicious] == []
    assert row.verdict == f"consistent ({len(row.checks)} checks)"
    assert len(row.checks) == 13
    assert 0 < row.worst_case.correct < row.clean.correct
    assert [module.training for module in model.modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), random)


def test_a_surrogate_is_left_in_its_mode():
    surrogate = nn.Sequential(nn.Flatten(), nn.Linear(54, CLASSES)).train()
    evaluate(trained(), blobs(), threat=THREAT, attacks=["transfer"], surrogate=surrogate)
    assert surrogate.training


@pytest.mark.parametrize("missing", ["fgsm", "pgd_sat", "cw_inf", "autoattack"])
def test_all_checks_need_their_attacks(missing):
    names = [name for name in ("fgsm", "pgd_sat", "cw_inf", "autoattack") if name != missing]
    with pytest.raises(InputError, match=f"^checks: need the attack {missing} too; name it, or take the preset full"):
        evaluate(trained(), blobs(), threat=THREAT, attacks=names, checks=True)


def test_a_linear_model_has_the_right_gradients():
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(84, CLASSES, dtype=torch.float64)
            with torch.no_grad():  # two classes lead by far, so that the margin has no kink
                self.linear.bias.copy_(torch.tensor([50.0, 50, -50, -50, -50]))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.flatten(1))

    torch.manual_seed(0)
    numbers = {check.name: check.number for check in run_checks(evidence(Linear()))}
    assert numbers["wrong_gradients"] < 1e-6
    assert numbers["random_outputs"] == numbers["missing_gradients"] == numbers["probabilities"] == 0


class Scaled(nn.Module):
    """Gradients that are too long by a factor; the outputs are right."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.network, self.factor = TinyNet(seed=2), factor

    def forward(self, x: Tensor) -> Tensor:
        longer = x + (self.factor - 1) * (x - x.detach())
        return self.network(longer)


@pytest.mark.parametrize(
    ("factor", "suspicious"), [(1.0, False), (1.45, False), (1.55, True), (0.55, False), (0.45, True)]
)
def test_how_wrong_gradients_are_is_measured(factor, suspicious):
    check = found("wrong_gradients", model=Scaled(factor), n=40)
    assert check.number == pytest.approx(abs(factor - 1), abs=0.02)
    assert check.suspicious == suspicious


@pytest.mark.parametrize(("noise", "suspicious"), [(3e-5, False), (3e-4, True)])
def test_how_random_outputs_are_is_measured(noise, suspicious):
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = network(x)
            return logits * (1 + noise * torch.randn_like(logits))

    network = TinyNet(seed=2)
    torch.manual_seed(0)
    check = found("random_outputs", model=Noisy(), n=40)
    assert check.number == pytest.approx(noise * 2**0.5, rel=0.5)
    assert check.suspicious == suspicious


class Watching(ImageData):
    """Counts how many of its batches are in memory when it makes another one."""

    def batch(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        made, alive = vars(self).setdefault("made", []), vars(self).setdefault("alive", [])
        alive.append(sum(reference() is not None for reference in made))
        x, y = super().batch(ids)
        made.append(weakref.ref(x))
        return x, y


@pytest.mark.parametrize("size", [7, 64])
def test_normalisation_is_looked_for_in_parts_with_the_result_of_the_whole(size):
    x, network = images(40) * torch.tensor([0.2, 0.5, 1.0])[:, None, None], TinyNet(seed=2)
    standard = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), correction=0, keepdim=True)
    with torch.no_grad():
        natural, best = network(x).argmax(1), network(standard).argmax(1)
    y = torch.where(torch.arange(40) % 4 == 0, natural, best)
    right, gained = natural == y, int((best == y).sum()) - int((natural == y).sum())
    data = Watching(x, y, CLASSES)
    look = Evidence(network, data, THREAT, 0, size, {"clean": right.to(torch.int8)}, gradients=True)
    (check,) = [check for check in run_checks(look) if check.name == "normalisation"]
    assert check.number == pytest.approx(100 * gained / 40)
    assert gained > 4
    assert max(vars(data)["alive"]) <= 1


@pytest.mark.parametrize(("gained", "inside", "suspicious"), [(4, False, False), (20, False, True), (20, True, False)])
def test_a_gain_within_noise_or_over_a_normalisation_inside_the_model_is_no_lack_of_one(gained, inside, suspicious):
    x, shape = images(40, dtype=torch.float32), images(1).shape[1:]
    numbers = {"mean": [0.5] * 3, "std": [0.25] * 3} if inside else {"mean": [0.0] * 3, "std": [1.0] * 3}
    model = create_model("cnn", input_shape=tuple(shape), num_classes=CLASSES, width=2, **numbers)
    model.network = TinyNet(seed=2, dtype=torch.float32)
    with torch.no_grad():
        natural, changed = model(x).argmax(1), model(255 * x).argmax(1)
    differ = (natural != changed).nonzero()[:, 0]
    assert len(differ) >= 20
    y = (changed + 1) % CLASSES  # wrong either way, but for those below
    y = torch.where(y == natural, (y + 1) % CLASSES, y)
    same = natural == changed
    y[same] = torch.where(torch.arange(int(same.sum())) % 2 == 0, natural[same], y[same])
    y[differ[:gained]] = changed[differ[:gained]]
    clean = (natural == y).to(torch.int8)
    look = Evidence(model, ImageData(x, y, CLASSES), THREAT, 0, 40, {"clean": clean}, gradients=True)
    (check,) = [check for check in run_checks(look) if check.name == "normalisation"]
    assert check.number >= 100 * gained / 40
    assert check.suspicious == suspicious


@pytest.mark.parametrize(("missing", "suspicious"), [(2, False), (3, True)])
def test_missing_gradients_are_counted(missing, suspicious):
    class Partly(nn.Module):
        """No gradient where the first pixel is exactly 1."""

        def forward(self, x: Tensor) -> Tensor:
            cut = (x.flatten(1)[:, 0] == 1)[:, None, None, None]
            return network(torch.where(cut, x.detach(), x))

    network = TinyNet(seed=2)
    whole = evidence(Partly(), n=200)  # 2 of 200 images are 1 point, which is not above 1 point
    whole.data.x[:missing, 0, 0, 0] = 1
    (check,) = [check for check in run_checks(whole) if check.name == "missing_gradients"]
    assert check.number == pytest.approx(100 * missing / 200)
    assert check.suspicious == suspicious
