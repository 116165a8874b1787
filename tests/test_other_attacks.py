import dataclasses
import math

import pytest
import torch
from torch import nn

from crdnd.attacks import load_attack, pgd
from crdnd.errors import InputError
from crdnd.losses import margin
from crdnd.random import Stream
from crdnd.threat import ThreatModel
from support import BATCH, RankOneVictim, Recorder, TinyNet, images, wavering

IDS = torch.tensor([11, 5, 0, 77, 8, 300])
STREAM = Stream.of("t", ids=IDS)


def centred(x, classes=2):
    victim = RankOneVictim(classes)
    victim.b.data -= victim(x).mean(0)
    return victim


# --- cw_l2 ------------------------------------------------------------------------------------------------------------


def test_cw_finds_the_nearest_adversarial_image_of_a_linear_model_and_nothing_nearer():
    x = 0.4 + 0.2 * images()
    victim = centred(x)
    y = victim(x).argmax(1)
    logits = victim(x).detach()
    distance = (logits[:, 0] - logits[:, 1]).abs() / ((victim.t[1] - victim.t[0]) * victim.d.norm()).detach()
    for i in (0, 1):
        for factor, found in ((1.15, True), (0.98, False)):
            threat = ThreatModel(norm="l2", eps=factor * distance[i].item())
            x_adv = load_attack("cw_l2")(victim, x, y, threat, STREAM)
            fooled = victim(x_adv).argmax(1) != y
            assert fooled[i] == found
            assert not fooled[distance > threat.eps].any()
            assert fooled[distance < threat.eps / 1.15].all()
            assert threat.allows(x_adv, x).all()
            assert torch.equal(x_adv[~fooled], x[~fooled])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_what_cw_returns_is_legal_and_fools_even_from_the_faces_of_the_box(norm, dtype):
    model = wavering().to(dtype)
    x = (1.5 * images(dtype=dtype) - 0.25).clamp(0, 1)
    with torch.no_grad():
        model.classifier.bias -= model(x).mean(0)
    y, threat = model(x).argmax(1), ThreatModel(norm=norm, eps=0.05 if norm == "linf" else 0.5)
    attack = dataclasses.replace(load_attack("cw_l2"), search_steps=5, iterations=60)
    x_adv = attack(model, x, y, threat, STREAM)
    fooled = model(x_adv).argmax(1) != y
    assert fooled.sum() >= BATCH / 2
    assert x_adv.dtype == dtype
    assert threat.allows(x_adv, x).all()
    assert torch.equal(x_adv[~fooled], x[~fooled])


def test_under_linf_cw_falls_short_of_the_closed_form_optimum_only_where_that_is_close():
    x = images()
    victim = centred(x)
    y = victim(x).argmax(1)
    for eps in (0.002, 0.01):
        inner, outer = (
            victim((x + part * eps * victim.uphill(y).sign()).clamp(0, 1)).argmax(1) != y for part in (0.8, 1.0)
        )
        fooled = victim(load_attack("cw_l2")(victim, x, y, ThreatModel(eps=eps), STREAM)).argmax(1) != y
        assert fooled[inner].all()
        assert not fooled[~outer].any()


def test_every_sample_has_a_search_of_its_own():
    model, x, threat = wavering(), images(), ThreatModel(norm="l2", eps=0.25)
    y = model(x).argmax(1)
    attack = dataclasses.replace(load_attack("cw_l2"), search_steps=4, iterations=50)

    def found(rows):
        return attack(model, x[rows], y[rows], threat, STREAM.take(rows))

    whole = found(torch.arange(BATCH))
    assert 0 < (model(whole).argmax(1) != y).sum() < BATCH
    for rows in (torch.tensor([3, 0]), torch.tensor([1, 2, 4, 5]), torch.tensor([5, 2, 0, 1, 4, 3])):
        torch.testing.assert_close(found(rows), whole[rows], rtol=0, atol=1e-9)


def test_a_sample_that_stands_costs_cw_a_pass_an_iteration():
    model, x = Recorder(TinyNet()), images()
    attack = dataclasses.replace(load_attack("cw_l2"), search_steps=3, iterations=7)
    attack(model, x, model.model(x).argmax(1), ThreatModel(norm="l2", eps=1e-6), STREAM)
    assert [len(z) for z in model.inputs] == [BATCH] * (1 + 3 * 7 + 1)
    torch.testing.assert_close(model.inputs[1], x, rtol=0, atol=1e-5)


# --- transfer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threat", [ThreatModel(eps=0.1), ThreatModel(norm="l2", eps=0.5)], ids=str)
def test_transfer_is_pgd_on_the_surrogate_judged_by_the_model(threat):
    model, surrogate, x = Recorder(wavering(seed=0)), wavering(seed=1), images()
    y = model.model(x).argmax(1)
    y[1] = (y[1] + 1) % 5
    found = dataclasses.replace(load_attack("transfer"), surrogate=surrogate)(model, x, y, threat, STREAM)
    assert len(model.inputs) == 2, "once for what is right and once for the verdict, never for a gradient"
    right = torch.arange(BATCH) != 1
    expected = pgd(
        lambda z: margin(surrogate(z), y), x, threat,
        steps=20, step=0.25, start="uniform", stream=STREAM.child("transfer", 0),
    )  # fmt: skip
    torch.testing.assert_close(model.inputs[1], expected[right], rtol=0, atol=1e-12)
    fooled = (model.model(expected).argmax(1) != y) & right
    assert fooled.any()
    torch.testing.assert_close(found, torch.where(fooled[:, None, None, None], expected, x), rtol=0, atol=1e-12)


def test_transfer_from_a_model_to_itself_is_as_strong_as_its_own_gradients():
    model, x, threat = wavering(), images(), ThreatModel(eps=0.02)
    y = model(x).argmax(1)
    found = dataclasses.replace(load_attack("transfer"), surrogate=model)(model, x, y, threat, STREAM)
    own = pgd(lambda z: margin(model(z), y), x, threat, steps=20, step=0.25, stream=STREAM.child("transfer", 0))
    assert torch.equal(model(found).argmax(1) != y, model(own).argmax(1) != y)


def test_transfer_needs_a_surrogate():
    model, x = TinyNet(), images()
    with pytest.raises(InputError, match=r"transfer: this attack needs another model; give one with --surrogate"):
        load_attack("transfer")(model, x, model(x).argmax(1), ThreatModel(eps=0.1), STREAM)


def test_the_settings_of_transfer_name_the_surrogate_by_its_hash():
    attack = dataclasses.replace(load_attack("transfer"), surrogate=TinyNet(), surrogate_sha256="abc")
    assert attack.settings() == {"surrogate_sha256": "abc", "steps": 20, "step": 0.25, "restarts": 1}


# --- uniform_noise ----------------------------------------------------------------------------------------------------


class Threshold(nn.Module):
    """Says 1 where the first pixel exceeds 0.5 + a; on grey images a draw fools with a probability that is known."""

    def __init__(self, a):
        super().__init__()
        self.a = a

    def forward(self, x):
        over = x[:, 0, 0, 0] - 0.5 - self.a
        return torch.stack([-over, over], 1)


@pytest.mark.parametrize("draws", [1, 2, 7])
def test_noise_fools_as_many_samples_as_chance_says(draws):
    count, eps = 4000, 0.1
    x, y = torch.full((count, 1, 2, 3), 0.5), torch.zeros(count, dtype=torch.int64)
    attack = dataclasses.replace(load_attack("uniform_noise"), draws=draws)
    model = Threshold(0.05)
    x_adv = attack(model, x, y, ThreatModel(eps=eps), Stream.of("t", ids=torch.arange(count)))
    fooled = model(x_adv).argmax(1) != y
    expected = 1 - 0.75**draws  # the pixel is uniform in 0.5 +- 0.1 and must exceed 0.55
    assert abs(fooled.double().mean() - expected) < 4.5 * math.sqrt(expected * (1 - expected) / count)
    assert ThreatModel(eps=eps).allows(x_adv, x).all()
    assert torch.equal(x_adv[~fooled], x[~fooled])


def test_a_sample_that_stands_is_shown_every_draw_and_one_that_falls_none_after():
    model, x = Recorder(Threshold(0.05)), torch.full((40, 1, 2, 3), 0.5)
    y, threat = torch.zeros(40, dtype=torch.int64), ThreatModel(eps=0.1)
    attack, stream = dataclasses.replace(load_attack("uniform_noise"), draws=5), Stream.of("t", ids=torch.arange(40))
    x_adv = attack(model, x, y, threat, stream)
    draws = torch.stack([threat.start(x, "uniform", stream.child("uniform_noise", 0).child(i)) for i in range(5)])
    falls = draws[:, :, 0, 0, 0] > 0.55
    standing = [40, *(~falls.cummax(0).values).sum(1).tolist()]
    assert [len(z) for z in model.inputs] == [40, *standing[:5], 40]
    first = falls.int().argmax(0)
    expected = torch.where(falls.any(0)[:, None, None, None], draws[first, torch.arange(40)], x)
    assert torch.equal(x_adv, expected)
    model.inputs.clear()
    attack(model, x, y, ThreatModel(eps=0.01), stream)
    assert len(model.inputs) == 1 + 5 + 1
    assert load_attack("uniform_noise").draws == 100
