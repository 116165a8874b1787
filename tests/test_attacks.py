import dataclasses
import functools
import importlib
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from crdnd.attacks import UNTOLD, Attack, Sequence, TableAttack, adversarial, attack_names, load_attack, pgd, verdicts
from crdnd.data import ImageData
from crdnd.errors import InputError
from crdnd.evaluation import load_results
from crdnd.losses import cross_entropy, margin
from crdnd.random import Stream
from crdnd.threat import ThreatModel
from support import BATCH, SHAPE, RankOneVictim, Recorder, TinyNet, generator, images, small_attack, wavering

# The table of the conventions: steps, length of a step as a fraction of eps, start. pgd_trades moves 0.003 at eps
# 8/255, and 0.003 * 255 / 8 = 0.095625.
TABLE = {
    "fgsm": (1, 1.0, "none"),
    "pgd_sat": (20, 0.25, "uniform"),
    "pgd_trades": (20, 0.095625, "uniform"),
    "cw_inf": (30, 0.25, "uniform"),
}
LINF, L2 = ThreatModel(norm="linf", eps=0.1), ThreatModel(norm="l2", eps=0.3)
IDS = torch.tensor([11, 5, 0, 77, 8, 300])
# The smallest and the largest of these images keep far from the faces of the box, for l2.
GREY = 0.4 + 0.2 * images(seed=3)


def expand(per_sample):
    return per_sample.reshape(-1, 1, 1, 1)


def length(delta):
    return (delta**2).flatten(1).sum(1).sqrt()


def run(name, model, x, y, threat, ids=IDS, seed=0):
    return small_attack(name, surrogate=model)(model, x, y, threat, Stream.of("test", seed, ids=ids))


@pytest.mark.parametrize("name", TABLE)
def test_an_attack_has_the_steps_of_the_table(name):
    steps, step, start = TABLE[name]
    attack = load_attack(name)
    assert (attack.steps, attack.start) == (steps, start)
    assert attack.step == pytest.approx(step, rel=1e-12)
    assert attack.loss is (margin if name == "cw_inf" else cross_entropy)
    known = {"steps": steps, "step": attack.step, "start": start, "loss": attack.loss.__name__, "restarts": 1}
    assert attack.settings() == known
    assert "arXiv" in (importlib.import_module(f"crdnd.attacks.{name}").__doc__ or "")


def test_every_table_attack_is_in_the_registry():
    assert set(TABLE) <= set(attack_names())


def test_an_unknown_attack_is_refused_with_a_suggestion():
    with pytest.raises(InputError, match=r"unknown attack 'pgd_sta'; did you mean 'pgd_sat'\? Available: .*fgsm"):
        load_attack("pgd_sta")


# What tells an attack from others


@pytest.mark.parametrize("name", attack_names())
def test_an_attack_of_the_package_is_known_by_its_settings_alone(name):
    attack = load_attack(name)
    assert attack.identity() == attack.settings()
    assert not any(UNTOLD in str(value) for value in attack.settings().values())


def test_committed_results_have_the_fingerprints_that_their_attacks_have_today():
    protocol = load_results(Path(__file__).parents[1] / "results" / "demo.json").protocol
    again = protocol.model_copy(update={"attacks": {name: load_attack(name).identity() for name in protocol.attacks}})
    assert set(protocol.attacks) == set(TABLE)
    assert again.with_fingerprint() == protocol


def steep(k):
    def loss(logits, y):
        return k * cross_entropy(logits, y)

    return loss


def holding(k):
    class Holding(Attack):
        def rounds(self, num_classes):
            return [k]

    return Holding(summary="", paper="")


class Base(Attack):
    def rounds(self, num_classes):
        return []


class Left(Base):
    pass


class Right(Base):
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Far(Base):
    steps: int = 3

    def rounds(self, num_classes):
        return [self.steps]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Farther(Base):
    steps: int = 3

    def rounds(self, num_classes):
        return [2 * self.steps]


def table(loss):
    return TableAttack(summary="", paper="", loss=loss, steps=3, step=0.5, start="none")


def own_cross_entropy(logits, y):
    return 0 * cross_entropy(logits, y)


own_cross_entropy.__name__ = "cross_entropy"


PAIRS = {
    "a name of the package's": (table(cross_entropy), table(own_cross_entropy)),
    "classes without fields": (Left(summary="", paper=""), Right(summary="", paper="")),
    "classes with fields": (Far(summary="", paper=""), Farther(summary="", paper="")),
    "parts": tuple(Sequence(summary="", paper="", parts=(kind(summary="", paper=""),)) for kind in (Left, Right)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_attacks_of_other_code_have_other_identities(name):
    one, other = PAIRS[name]
    assert one.identity() != other.identity()
    for attack in (one, other):
        assert attack.identity() == dataclasses.replace(attack).identity()
        assert all(isinstance(value, str | int | float) for value in attack.identity().values())
        assert not any(UNTOLD in str(value) for value in attack.identity().values())


def test_the_base_of_a_class_is_a_part_of_what_it_is():
    code = Left(summary="", paper="").identity()["class"].split(", ")
    assert [text.split()[0] for text in code] == [f"{__name__}.Left", f"{__name__}.Base"]


def clipped(loss):
    @functools.wraps(loss)
    def clip(logits, y):
        return loss(logits, y).clamp(max=1)

    return clip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patch(Base):
    patch: torch.Tensor


UNTOLD_ATTACKS = {
    "a partial": table(functools.partial(cross_entropy)),
    "a module": table(nn.CrossEntropyLoss(reduction="none")),
    "a method": table(TinyNet().forward),
    "a function of C": table(torch.sum),
    "a lambda": table(lambda z, y: z[:, 0] + y),
    "a function that holds a value": table(steep(2)),
    "a decorated function": table(clipped(cross_entropy)),
    "a class that holds a value": holding(2),
    "a tensor": Patch(summary="", paper="", patch=torch.ones(2, 3)),
    "a class without a file": type("Nowhere", (Base,), {})(summary="", paper=""),
    "a function without a file": table(eval("lambda z, y: z[:, 0] + y", {"__name__": __name__})),  # noqa: S307
    "a surrogate without its hash": dataclasses.replace(load_attack("transfer"), surrogate=TinyNet()),
}


@pytest.mark.parametrize("name", UNTOLD_ATTACKS)
def test_an_attack_that_could_be_another_one_says_so(name):
    (key,) = [key for key, value in UNTOLD_ATTACKS[name].identity().items() if UNTOLD in str(value)]
    assert key in ("loss", "patch", "class", "surrogate_sha256")


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
@pytest.mark.parametrize("name", TABLE)
def test_an_attack_looks_once_a_step_and_never_moves_further_than_its_step(name, threat):
    steps, step, start = TABLE[name]
    x, y = images(), torch.tensor([0, 1, 2, 3, 4, 0])
    model = Recorder(TinyNet())
    x_adv = run(name, model, x, y, threat)
    iterates = [*model.inputs, x_adv]
    assert len(model.inputs) == steps
    if start == "none":
        assert torch.equal(iterates[0], x)
    else:
        # The published start: uniform in the ball. Its law is tested with the threat model.
        assert torch.equal(iterates[0], threat.start(x, "uniform", Stream.of("test", 0, ids=IDS).child(name, 0)))
        assert not torch.equal(iterates[0], x)
    moves = torch.stack([threat.distance(b, a) for a, b in itertools.pairwise(iterates)])
    assert (moves <= step * threat.eps + 1e-12).all()
    if threat.norm == "linf":  # some pixel has room for the full step in every step before the last ones
        assert moves[0].min().item() == pytest.approx(step * threat.eps, rel=1e-9)


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("name", TABLE)
def test_linf_attacks_reach_the_closed_form_optimum_of_a_linear_model(name, classes):
    victim = Recorder(RankOneVictim(classes))
    x, y = images(), victim.model.labels(BATCH)
    x_adv = run(name, victim, x, y, LINF)
    steps, step, _ = TABLE[name]
    sign = victim.model.uphill(y).sign()
    # Pixel by pixel the furthest legal value uphill, clip(x + eps sign(d), 0, 1), unless the start was further away
    # than all steps together, which needs steps * step < 2: 20 * 0.095625 = 1.9125 of pgd_trades.
    best = (x + LINF.eps * sign).clamp(0, 1)
    reach = victim.inputs[0] + steps * step * LINF.eps * sign
    expected = torch.where(sign > 0, torch.minimum(best, reach), torch.maximum(best, reach))
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-12)
    if name != "pgd_trades":
        torch.testing.assert_close(x_adv, best, rtol=0, atol=1e-12)


def test_fgsm_is_its_formula_on_a_curved_model():
    model, x, y = TinyNet(), images(), torch.tensor([0, 1, 2, 3, 4, 0])
    z = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(z), y, reduction="sum"), z)
    expected = (x + LINF.eps * gradient.sign()).clamp(0, 1)
    torch.testing.assert_close(run("fgsm", model, x, y, LINF), expected, rtol=0, atol=1e-15)


def test_fgsm_under_l2_goes_one_radius_along_the_gradient():
    victim = RankOneVictim(3)
    y = victim.labels(BATCH)
    uphill = victim.uphill(y)
    expected = GREY + L2.eps * uphill / expand(length(uphill))
    torch.testing.assert_close(run("fgsm", victim, GREY, y, L2), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("name", ["pgd_sat", "pgd_trades", "cw_inf"])
def test_l2_attacks_follow_the_path_known_for_a_linear_model(name, classes):
    victim = Recorder(RankOneVictim(classes))
    y = victim.model.labels(BATCH)
    x_adv = run(name, victim, GREY, y, L2)
    steps, step, _ = TABLE[name]
    uphill = victim.model.uphill(y).flatten(1).numpy()
    unit = uphill / np.linalg.norm(uphill, axis=1, keepdims=True)
    # The gradient has the same direction g everywhere: d <- d + step eps g, back to the sphere when outside.
    delta = (victim.inputs[0] - GREY).flatten(1).numpy()
    start = delta.copy()
    for _ in range(steps):
        delta = delta + step * L2.eps * unit
        norm = np.linalg.norm(delta, axis=1, keepdims=True)
        delta = np.where(norm > L2.eps, delta * L2.eps / norm, delta)
    torch.testing.assert_close((x_adv - GREY).flatten(1), torch.from_numpy(delta), rtol=0, atol=1e-12)
    along = (delta * unit).sum(1)
    assert (along > (start * unit).sum(1)).all()
    assert (along <= L2.eps + 1e-12).all()
    if step == 0.25:
        # On the sphere, at an angle a from g, a step of s gives tan a' = sin a / (cos a + s) <= tan a / (1 + s). From
        # a right angle that is 1 / s after one step and at most 4 * 1.25^-17 = 0.09 after 18; two steps are allowed
        # for a start that leans away from g. cos(arctan(0.09)) = 0.996 of the optimum <g, d> = eps.
        assert (along > 0.99 * L2.eps).all()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_the_margin_attack_is_blind_to_the_scale_of_the_logits(scale):
    # The same start and a gradient of the same sign: the same image, however flat or steep the logits are.
    plain, scaled = TinyNet(), TinyNet()
    with torch.no_grad():
        scaled.classifier.weight *= scale
        scaled.classifier.bias *= scale
    x, y = images(), torch.tensor([0, 1, 2, 3, 4, 0])
    torch.testing.assert_close(run("cw_inf", scaled, x, y, LINF), run("cw_inf", plain, x, y, LINF), rtol=0, atol=1e-12)


def independent_pgd(model, x, y, start, loss, threat, steps, step):
    """PGD as the papers write it, pixel by pixel in numpy; gradients by `backward` on a copy."""
    low, high = x.numpy() - threat.eps, x.numpy() + threat.eps
    point = start.numpy().copy()
    for _ in range(steps):
        z = torch.tensor(point, requires_grad=True)
        logits = model(z)
        total = torch.zeros((), dtype=torch.float64)
        for i, label in enumerate(y.tolist()):
            rivals = [logits[i, j] for j in range(logits.shape[1]) if j != label]
            if loss == "margin":
                total = total + max(rivals) - logits[i, label]
            else:
                total = total + torch.logsumexp(logits[i], 0) - logits[i, label]
        total.backward()
        gradient = z.grad.numpy()
        if threat.norm == "linf":
            point = np.minimum(np.maximum(point + step * threat.eps * np.sign(gradient), low), high)
        else:
            norms = np.sqrt((gradient**2).sum(axis=(1, 2, 3), keepdims=True))
            delta = point + step * threat.eps * gradient / norms - x.numpy()
            norms = np.sqrt((delta**2).sum(axis=(1, 2, 3), keepdims=True))
            point = x.numpy() + np.where(norms > threat.eps, delta * threat.eps / norms, delta)
        point = np.clip(point, 0, 1)
    return torch.from_numpy(point)


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
@pytest.mark.parametrize("name", TABLE)
def test_an_attack_agrees_with_an_independent_one_on_a_curved_model(name, threat):
    model, x, y = Recorder(TinyNet(seed=4)), images(seed=5), torch.tensor([4, 1, 2, 3, 0, 0])
    ours = run(name, model, x, y, threat)
    steps, step, _ = TABLE[name]
    loss = "margin" if name == "cw_inf" else "ce"
    theirs = independent_pgd(model.model, x, y, model.inputs[0], loss, threat, steps, step)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_pgd_agrees_with_torchattacks_where_it_is_installed():
    torchattacks = pytest.importorskip("torchattacks")
    model = TinyNet(dtype=torch.float32).eval()
    x, y = images(dtype=torch.float32), torch.tensor([0, 1, 2, 3, 4, 0])
    theirs = torchattacks.PGD(model, eps=0.1, alpha=0.025, steps=7, random_start=False)(x, y)
    ours = pgd(lambda z: cross_entropy(model(z), y), x, LINF, steps=7, step=0.25, start="none")
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
@pytest.mark.parametrize("start", ["none", "uniform", "gaussian"])
def test_more_steps_never_leave_the_ball_or_the_box(threat, start):
    model, x, y = TinyNet(), images(), torch.tensor([0, 1, 2, 3, 4, 0])
    reached = [
        pgd(lambda z: cross_entropy(model(z), y), x, threat, steps=steps, step=0.7, start=start)
        for steps in (0, 1, 2, 5, 50)
    ]
    for x_adv in reached:
        assert (threat.distance(x_adv, x) <= threat.eps + 1e-12).all()
        assert ((x_adv >= 0) & (x_adv <= 1)).all()
    assert (reached[-1] - x).abs().max() > threat.eps / 10


def test_no_steps_return_the_start():
    x = images()
    stream = Stream.of("s", ids=IDS)
    for start in ("none", "uniform", "gaussian"):
        x_adv = pgd(lambda z: z.flatten(1).sum(1), x, LINF, steps=0, step=0.25, start=start, stream=stream)
        assert torch.equal(x_adv, LINF.start(x, start, stream))
        assert not x_adv.requires_grad


def test_without_a_stream_samples_are_numbered_by_their_place():
    x = images()
    loss = TinyNet()
    y = torch.zeros(BATCH, dtype=torch.int64)
    first = pgd(lambda z: cross_entropy(loss(z), y), x, LINF, steps=2, step=0.25)
    second = pgd(lambda z: cross_entropy(loss(z), y), x, LINF, steps=2, step=0.25)
    assert torch.equal(first, second)
    assert not torch.equal((first - x)[0], (first - x)[1])


@pytest.mark.parametrize("name", attack_names())
def test_an_attack_leaves_the_world_as_it_was(name):
    class Mixed(nn.Module):
        """Batch norm in eval mode inside a network in train mode."""

        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(SHAPE[0], dtype=torch.float64).eval()
            self.net = TinyNet()

        def forward(self, z):
            return self.net(self.norm(z))

    model = Mixed()
    x, y = images(), torch.tensor([0, 1, 2, 3, 4, 0])
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    x_before, modes, state = x.clone(), [m.training for m in model.modules()], torch.get_rng_state()
    x_adv = run(name, model, x, y, LINF)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert torch.equal(x, x_before)
    assert x.grad is None
    assert not x.requires_grad
    assert not x_adv.requires_grad
    assert x_adv.grad_fn is None


@pytest.mark.parametrize("name", attack_names())
def test_an_attack_works_where_the_caller_has_switched_gradients_off(name):
    model, x = wavering(), images()
    y = model(x).argmax(1)
    with torch.no_grad():
        inside = run(name, model, x, y, LINF)
    assert torch.equal(inside, run(name, model, x, y, LINF))
    if name != "uniform_noise":
        assert not torch.equal(inside, x)


@pytest.mark.parametrize("name", attack_names())
def test_an_input_that_takes_a_gradient_is_attacked_all_the_same(name):
    model, x, y = TinyNet(), images().requires_grad_(True), torch.tensor([0, 1, 2, 3, 4, 0])
    x_adv = run(name, model, x, y, LINF)
    assert x.grad is None
    assert not x_adv.requires_grad
    assert torch.equal(x_adv, run(name, model, x.detach(), y, LINF))


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
@pytest.mark.parametrize("name", attack_names())
def test_the_adversarial_image_of_a_sample_does_not_depend_on_its_batch(name, threat):
    model, x = wavering(), images()
    y = model(x).argmax(1)
    y[4] = (y[4] + 1) % 5
    whole = run(name, model, x, y, threat)
    parts = [run(name, model, x[s], y[s], threat, IDS[s]) for s in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-12)
    order = torch.tensor([5, 2, 0, 1, 4, 3])
    shuffled = run(name, model, x[order], y[order], threat, IDS[order])
    torch.testing.assert_close(shuffled, whole[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, (_, _, start) in TABLE.items() if start == "uniform"])
def test_a_random_start_depends_on_the_stream_and_on_the_sample(name):
    model, y = Recorder(RankOneVictim(2)), torch.zeros(BATCH, dtype=torch.int64)
    for seed in (0, 0, 1):
        run(name, model, GREY, y, LINF, seed=seed)
    steps = TABLE[name][0]
    first, again, other = (model.inputs[i * steps] - GREY for i in range(3))
    assert torch.equal(first, again)
    assert (first != other).any(dim=(1, 2, 3)).all()
    assert len(first.flatten(1).unique(dim=0)) == BATCH


def test_the_gradient_of_a_sample_does_not_shrink_with_the_batch():
    # A slope of 1e-44 is among the smallest numbers that float32 can hold; a mean over 50 samples would make it 0.
    x = torch.full((50, 1, 2, 3), 0.5)
    x_adv = pgd(lambda z: 1e-44 * z.flatten(1).sum(1), x, LINF, steps=1, step=1.0, start="none")
    torch.testing.assert_close(x_adv, x + 0.1)


class Shifted(nn.Module):
    """Predicts class 1 where the mean pixel exceeds 1/2; notes the modes it is used in."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1, affine=False)
        self.modes = []

    def forward(self, x):
        self.modes.append((self.training, self.norm.training))
        bright = x.flatten(1).mean(1) - 0.5
        return torch.stack([-bright, bright], dim=1)


def brightness_data():
    x = torch.tensor([0.9, 0.55, 0.45, 0.1, 0.52, 0.7, 0.2]).reshape(-1, 1, 1, 1).expand(7, 1, 2, 3).contiguous()
    return ImageData(x, torch.tensor([1, 1, 0, 0, 0, 1, 1]))


def test_verdicts_are_right_or_wrong_for_each_sample_in_its_order():
    data = brightness_data()
    # Bright means 1: samples 4 (bright, labelled 0) and 6 (dark, labelled 1) are wrong.
    expected = [True, True, True, True, False, True, False]
    for batch_size in (2, 3, 7, 50):
        assert verdicts(Shifted(), data, batch_size=batch_size).tolist() == expected
    assert verdicts(Shifted(), data, ids=torch.tensor([6, 0, 4]), batch_size=2).tolist() == [False, True, False]
    assert verdicts(Shifted(), data, ids=torch.zeros(0, dtype=torch.int64), batch_size=2).tolist() == []


@pytest.mark.parametrize("name", attack_names())
def test_verdicts_under_attack_are_those_of_the_worst_case_of_a_linear_model(name):
    data, model = brightness_data(), Shifted()
    # The smallest perturbation is searched for slowly, but on this model few steps are time enough for all others.
    attack = load_attack(name) if name == "cw_l2" else small_attack(name, surrogate=model)
    threat = ThreatModel(norm="linf", eps=0.1)

    def attacked(x, y, ids):
        return adversarial(model, attack, x, y, ids, threat, seed=3)

    model.train()
    model.norm.eval()
    state = torch.get_rng_state()
    found = verdicts(model, data, attacked, batch_size=3)
    # Every pixel can move by 0.1 towards the wrong side: |mean - 1/2| must exceed 0.1 for a right one to survive.
    # Noise moves the mean of 6 pixels by 0.1 / sqrt(18) = 0.024 at most times, and so fools none of the right ones.
    worst, noise = [True, False, False, True, False, True, False], [True, True, True, True, False, True, False]
    assert found.tolist() == (noise if name == "uniform_noise" else worst)
    assert set(model.modes) == {(False, False)}, "attacked and judged in eval mode"
    assert model.training
    assert not model.norm.training
    assert torch.equal(torch.get_rng_state(), state)


def test_adversarial_images_are_keyed_by_seed_attack_and_sample():
    model, x, y = TinyNet(), images(), torch.tensor([0, 1, 2, 3, 4, 0])

    def found(name, seed, ids, part=slice(None)):
        stays_where_it_starts = dataclasses.replace(load_attack("pgd_sat"), steps=1, step=1e-9, name=name)
        return adversarial(model, stays_where_it_starts, x[part], y[part], ids[part], LINF, seed)

    whole = found("pgd_sat", 0, IDS)
    torch.testing.assert_close(
        torch.cat([found("pgd_sat", 0, IDS, slice(0, 2)), found("pgd_sat", 0, IDS, slice(2, 6))]), whole
    )
    for other in (found("pgd_sat", 1, IDS), found("cw_inf", 0, IDS), found("pgd_sat", 0, IDS + 1)):
        assert ((other - whole).abs().amax(dim=(1, 2, 3)) > 0.01).all()


def test_restarts_begin_elsewhere_and_only_where_the_model_still_stands():
    model, x = Recorder(wavering()), images()
    y = model.model(x).argmax(1)
    y[2] = (y[2] + 1) % 5
    threat = ThreatModel(eps=0.01)
    once = dataclasses.replace(load_attack("pgd_sat"), steps=2)
    stream = Stream.of("test", ids=IDS)
    first = once(model.model, x, y, threat, stream)
    stands = model.model(first).argmax(1) == y
    assert 0 < stands.sum() < BATCH, "some must fall and some must stand for this test to say anything"
    found = dataclasses.replace(once, restarts=3)(model, x, y, threat, stream)
    sizes = [len(z) for z in model.inputs]
    # The natural images; every image in the first restart, wrong or right, with a verdict; then those that stand.
    assert sizes[:4] == [BATCH] * 4
    assert sizes[4] == stands.sum()
    assert len(sizes) == 1 + 3 * (2 + 1)
    assert torch.equal(found[~stands], first[~stands])
    assert (found[stands] != first[stands]).flatten(1).any(1).all()
    assert torch.equal(model.inputs[4], threat.start(x, "uniform", stream.child("pgd_sat", 1))[stands])
    last = model.inputs[-1]
    kept = model.model(found).argmax(1) == y
    assert kept.any()
    assert all(any(torch.equal(row, z) for z in last) for row in found[kept]), "judged by the last iterate"


def test_pgd_with_restarts_keeps_the_last_iterate_with_the_largest_loss():
    model, x, y = TinyNet(), images(), torch.tensor([0, 1, 2, 3, 4, 0])
    stream = Stream.of("test", ids=IDS)

    def loss(z):
        return margin(model(z), y)

    found = pgd(loss, x, LINF, steps=2, step=0.25, restarts=4, stream=stream)
    each = [pgd(loss, x, LINF, steps=2, step=0.25, stream=stream.child("restart", i)) for i in range(4)]
    values = torch.stack([loss(z) for z in each])
    assert len(values.argmax(0).unique()) > 1
    assert torch.equal(loss(found), values.amax(0))


def test_verdicts_do_not_depend_on_the_batch_size():
    x = images(13, seed=8, dtype=torch.float32)
    data = ImageData(x, torch.randint(0, 5, (13,), generator=generator(9)), num_classes=5)
    model = TinyNet(seed=10, dtype=torch.float32)
    attack, threat = load_attack("pgd_sat"), ThreatModel(eps=0.02)

    def attacked(x, y, ids):
        return adversarial(model, attack, x, y, ids, threat, seed=0)

    assert len({tuple(verdicts(model, data, attacked, batch_size=size).tolist()) for size in (2, 5, 13)}) == 1


def test_verdicts_restore_the_tf32_setting_that_they_found():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    seen = []

    class Looks(Shifted):
        def forward(self, x):
            seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
            return super().forward(x)

    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        verdicts(Looks(), brightness_data(), batch_size=3)
        assert set(seen) == {(False, False)}
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_a_step_as_long_as_the_diameter_reaches_the_optimum_from_any_start():
    victim = RankOneVictim(2)
    y = victim.labels(BATCH)
    x = images()
    best = (x + LINF.eps * victim.uphill(y).sign()).clamp(0, 1)
    x_adv = pgd(lambda z: margin(victim(z), y), x, LINF, steps=1, step=2.0, start="uniform")
    torch.testing.assert_close(x_adv, best, rtol=0, atol=1e-12)
    assert math.isclose(LINF.distance(x_adv, x).max().item(), LINF.eps, rel_tol=1e-9)
