import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from crdnd.attacks import Sequence, frozen, load_attack
from crdnd.attacks._apgd import looks
from crdnd.data import load_data
from crdnd.errors import InputError
from crdnd.losses import cross_entropy, dlr
from crdnd.models import create_model
from crdnd.random import Stream
from crdnd.threat import ThreatModel
from support import BATCH, CLASSES, RankOneVictim, Recorder, TinyNet, generator, images, small_attack, wavering

IDS = torch.tensor([11, 5, 0, 77, 8, 300])
STREAM = Stream.of("t", ids=IDS)
PARTS = ("apgd_ce", "apgd_t", "fab_t", "square")
THREATS = [ThreatModel(eps=0.02), ThreatModel(norm="l2", eps=0.12)]


def official():
    """Another implementation, or the test is skipped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("pyautoattack")
        import pyautoattack
    return pyautoattack.AutoAttack


def test_the_standard_version_has_the_official_parts_and_settings():
    attack = load_attack("autoattack")
    assert tuple(part.name for part in attack.parts) == PARTS
    assert attack.settings() == {
        "apgd_ce.loss": "cross_entropy", "apgd_ce.iterations": 100, "apgd_ce.restarts": 1, "apgd_ce.eot": 1,
        "apgd_t.iterations": 100, "apgd_t.targets": 9, "apgd_t.eot": 1,
        "fab_t.iterations": 100, "fab_t.targets": 9, "fab_t.alpha_max": 0.1, "fab_t.eta": 1.05, "fab_t.beta": 0.9,
        "square.queries": 5000, "square.first_share": 0.8, "square.restarts": 1,
    }  # fmt: skip
    names = [(part.attack, part.index, part.block) for part in attack.rounds(10)]
    nine = [[(name, rank, 0) for rank in range(9)] for name in ("apgd_t", "fab_t")]
    blocks = [("square", 0, block) for block in range(10)]
    assert names == [("apgd_ce", 0, 0), *nine[0], *nine[1], *blocks]
    assert [part.attack for part in attack.rounds(2) if not part.block] == list(PARTS)


def test_the_rand_version_has_the_official_parts_and_settings():
    attack = load_attack("autoattack_rand")
    assert [(part.name, part.loss, part.eot, part.iterations, part.restarts) for part in attack.parts] == [
        ("apgd_ce", cross_entropy, 20, 100, 1),
        ("apgd_dlr", dlr, 20, 100, 1),
    ]
    assert load_attack("apgd_ce").eot == 1
    assert load_attack("apgd_dlr").eot == 1


@pytest.mark.parametrize("version", ["standard", "rand"])
def test_the_settings_are_those_of_pyautoattack(version):
    theirs = official()(TinyNet(), eps=0.1, norm="Linf", version=version, seed=0)
    ours = {part.name: part for part in load_attack("autoattack" if version == "standard" else "autoattack_rand").parts}
    assert [name.replace("_", "-") for name in ours] == theirs.attacks_to_run
    apgd = ours["apgd_ce"]
    assert (apgd.iterations, apgd.restarts, apgd.eot) == (100, theirs.apgd.n_restarts, theirs.apgd.eot_iter)
    assert theirs.apgd.n_iter == 100
    gaps = theirs.apgd.n_iter_2, theirs.apgd.size_decr, theirs.apgd.n_iter_min
    assert (looks(100)[0], 2 * looks(100)[0] - looks(100)[1], looks(100)[-1] - looks(100)[-2]) == gaps
    if version == "standard":
        targeted, fab, square = theirs.apgd_targeted, theirs.fab, theirs.square
        assert (targeted.n_iter, targeted.n_restarts) == (ours["apgd_t"].iterations, 1)
        assert (targeted.n_target_classes, targeted.eot_iter) == (ours["apgd_t"].targets, ours["apgd_t"].eot)
        constants = fab.n_iter, fab.n_target_classes, fab.alpha_max, fab.eta, fab.beta
        mine = ours["fab_t"]
        assert constants == (mine.iterations, mine.targets, mine.alpha_max, mine.eta, mine.beta)
        assert (square.n_queries, square.p_init) == (ours["square"].queries, ours["square"].first_share)
        assert not square.rescale_schedule


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_the_whole_is_its_parts_in_turn_on_what_still_stands(threat):
    model, x, ids = wavering(), images(43), torch.arange(43) * 3
    y = model(x).argmax(1)
    y[4] = (y[4] + 1) % CLASSES
    attack = small_attack("autoattack")
    weak = dataclasses.replace(attack.parts[0], iterations=1)  # so that it leaves something to the others
    attack = dataclasses.replace(attack, parts=(weak, *attack.parts[1:]))
    whole = attack(model, x, y, threat, Stream.of("t", ids=ids))
    expected, rows = x.clone(), (model(x).argmax(1) == y).nonzero()[:, 0]
    fallen = []
    for part in attack.parts:
        found = part(model, x[rows], y[rows], threat, Stream.of("t", ids=ids[rows]))
        fooled = model(found).argmax(1) != y[rows]
        expected[rows[fooled]] = found[fooled]
        fallen.append(int(fooled.sum()))
        rows = rows[~fooled]
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-10)
    assert sum(count > 0 for count in fallen) > 1
    assert len(rows)


def test_a_search_that_none_survives_is_the_last_one():
    model, x = Recorder(wavering()), images()
    y = model.model(x).argmax(1)
    found = load_attack("autoattack")(model, x, y, ThreatModel(eps=0.3), STREAM)
    assert (model.model(found).argmax(1) != y).all()
    assert len(model.inputs) < 1 + 101 + 1


class Counter(nn.Module):
    """Says 0 by a lead that nothing overcomes, and counts the images it sees that are not the natural ones."""

    def __init__(self, x, classes=10):
        super().__init__()
        self.x, self.net = x, TinyNet(classes, dtype=torch.float32)
        self.plain = self.slopes = 0

    def forward(self, z):
        if z.shape != self.x.shape or not torch.equal(z.detach(), self.x):
            self.slopes += z.requires_grad
            self.plain += not z.requires_grad
        logits = self.net(z)
        return logits + 1000 * F.one_hot(torch.zeros(len(z), dtype=torch.int64), logits.shape[1])


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("part", PARTS)
def test_a_sample_that_stands_is_searched_as_long_as_by_pyautoattack(part, norm):
    x, y = images(7, (3, 6, 5), dtype=torch.float32), torch.zeros(7, dtype=torch.int64)
    eps, queries = 0.03, 200
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = Counter(x)
        name = {"linf": "Linf", "l2": "L2"}[norm]
        aa = official()(theirs, eps=eps, norm=name, version="custom", attacks=[part.replace("_", "-")], seed=0)
        aa.apgd.n_restarts = aa.fab.n_restarts = 1
        aa.square.n_queries = queries
        run = {"apgd_ce": aa.apgd, "apgd_t": aa.apgd_targeted, "fab_t": aa.fab, "square": aa.square}[part]
        run.loss, run.targeted = ("ce" if part == "apgd_ce" else getattr(run, "loss", None)), part == "fab_t"
        with torch.random.fork_rng():
            run.perturb(x.clone(), y.clone())
    attack = load_attack(part)
    if part == "square":
        assert attack.queries == 5000
        attack = dataclasses.replace(attack, queries=queries)
    ours = Counter(x)
    threat = ThreatModel(norm=norm, eps=eps)
    found = attack(ours, x, y, threat, Stream.of("t", ids=torch.arange(7)))
    assert torch.equal(found, x)
    assert ours.slopes >= theirs.slopes
    assert ours.plain >= theirs.plain
    # A verdict a round is all that may be more.
    assert ours.slopes == theirs.slopes
    assert ours.plain <= theirs.plain + len(attack.rounds(10))
    assert ours.slopes + ours.plain > 100


def trained_cnn(data):
    torch.manual_seed(0)
    model = create_model("cnn", input_shape=tuple(data.x.shape[1:]), num_classes=10, width=4, seed=0)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for epoch in range(6):
        for rows in torch.randperm(len(data), generator=generator(epoch)).split(64):
            noisy = data.x[rows] + 0.1 * torch.randn(data.x[rows].shape, generator=generator(epoch))
            optimiser.zero_grad()
            F.cross_entropy(model(noisy.clamp(0, 1)), data.y[rows]).backward()
            optimiser.step()
    return model.eval()


@pytest.mark.slow
def test_as_many_images_stand_as_under_pyautoattack():
    digits = load_data("digits")
    with torch.random.fork_rng():
        model = trained_cnn(digits.train)
    x, y = digits.test.x[:60], digits.test.y[:60]
    queries = 300
    attack = load_attack("autoattack")
    parts = (*attack.parts[:3], dataclasses.replace(attack.parts[3], queries=queries))
    attack = dataclasses.replace(attack, parts=parts)
    clean = int((model(x).argmax(1) == y).sum())
    assert clean > 50
    for norm, name, eps in (("linf", "Linf", 0.06), ("l2", "L2", 0.3)):
        threat, theirs = ThreatModel(norm=norm, eps=eps), []
        with frozen(model, x) as plain:
            found = attack(model, x, y, threat, Stream.of("t", ids=torch.arange(60)))
            stand = int((plain(found).argmax(1) == y).sum())
        assert threat.allows(found, x).all()
        for seed in (0, 1):
            with warnings.catch_warnings(), torch.random.fork_rng():
                warnings.simplefilter("ignore")
                aa = official()(model, eps=eps, norm=name, version="standard", seed=seed)
                aa.square.n_queries = queries
                adversarial, _ = aa.run_standard_evaluation(x, y, batch_size=60)
                theirs.append(int((model(adversarial).argmax(1) == y).sum()))
        assert 5 < stand < clean - 5, "the radius must split the images"
        assert min(theirs) - 1 <= stand <= max(theirs) + 1


@pytest.mark.parametrize("classes", [2, 3, 100])
@pytest.mark.parametrize("name", ["autoattack", "autoattack_rand"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_any_number_of_classes_will_do(norm, name, classes):
    model, x = TinyNet(classes), images()
    model.classifier.bias.data -= model(x).mean(0)
    y, threat = model(x).argmax(1), ThreatModel(norm=norm, eps=0.02 if norm == "linf" else 0.12)
    attack = small_attack(name)
    for eps in (1e-6, threat.eps, 0.5):
        allowed = ThreatModel(norm=norm, eps=eps)
        x_adv = attack(model, x, y, allowed, STREAM)
        fooled = model(x_adv).argmax(1) != y
        assert allowed.allows(x_adv, x).all()
        assert torch.equal(x_adv[~fooled], x[~fooled])
    assert fooled.sum() > BATCH / 2


def test_the_notes_say_what_stood_in_for_the_ratio():
    attack = load_attack("autoattack")
    assert attack.notes(10) == attack.notes(4) == []
    three = "apgd_t: the targeted DLR loss needs 4 classes; with 3 z_(1) - z_(3) was its denominator."
    assert attack.notes(3) == [three]
    assert attack.notes(2) == ["apgd_t: the targeted DLR loss needs 4 classes; with 2 z_t - z_y was used."]
    rand = load_attack("autoattack_rand")
    assert rand.notes(3) == []
    assert rand.notes(2) == ["apgd_dlr: the DLR loss needs 3 classes; with 2 the margin was used."]


def test_a_sequence_of_anything_names_its_settings_by_its_parts():
    both = Sequence(name="two", summary="s", paper="p", parts=(load_attack("fgsm"), load_attack("uniform_noise")))
    assert [part.attack for part in both.rounds(5)] == ["fgsm", "uniform_noise"]
    assert both.settings()["fgsm.steps"] == 1
    assert both.settings()["uniform_noise.draws"] == 100
    assert not both.judged_on_all


def test_parts_of_one_name_are_refused_whose_verdicts_would_be_one():
    with pytest.raises(InputError, match=r"^two: two parts are called fgsm; give each a name of its own"):
        Sequence(name="two", summary="s", paper="p", parts=(load_attack("fgsm"), load_attack("fgsm")))


def test_where_the_official_implementation_fails_it_says_so_in_one_line():
    pytest.importorskip("pyautoattack")
    from crdnd.evaluation._reference import reference

    attack = reference({"autoattack": load_attack("autoattack")}, seed=0)["autoattack"]
    victim, x = RankOneVictim(2), images().float()
    victim.float()
    y = victim(x).argmax(1)
    with pytest.raises(
        InputError, match=r"^engine: pyautoattack \S+ fails on this model .*leave --engine away"
    ) as caught:
        attack(victim, x, y, ThreatModel(eps=0.001), Stream.of("t", ids=torch.arange(len(x))))
    assert "\n" not in str(caught.value)
