import dataclasses
import importlib
import itertools
import math
import warnings

import pytest
import torch
from torch import nn

from crdnd.attacks import load_attack
from crdnd.losses import margin
from crdnd.random import Stream
from crdnd.threat import ThreatModel
from support import BATCH, RankOneVictim, Recorder, generator, images, wavering

LINF, L2 = ThreatModel(norm="linf", eps=0.1), ThreatModel(norm="l2", eps=0.3)
IDS = torch.tensor([11, 5, 0, 77, 8, 300])
# The package's attribute of this name is the function that loads no module: the file is read by its path.
SQUARE = importlib.import_module("crdnd.attacks.square")


class Unmoved(nn.Module):
    """Says 0 by a lead of 1,000; behind it every image has a slope of its own, so that some queries pay."""

    def __init__(self, shape):
        super().__init__()
        self.d = torch.randn(*shape, generator=generator(2), dtype=torch.float64)

    def forward(self, x):
        s = (x * self.d.to(x.dtype)).flatten(1).sum(1)
        return torch.stack([1000 - s, s, torch.zeros_like(s)], dim=1)


def square(queries):
    return dataclasses.replace(load_attack("square"), queries=queries)


def queried(shape, threat, queries, dtype=torch.float64, ids=IDS):
    """The natural images, all that the model saw in the search, and the margin of each."""
    model, x = Recorder(Unmoved(shape)), images(len(ids), shape, dtype=dtype)
    y = torch.zeros(len(ids), dtype=torch.int64)
    found = square(queries).rounds(3)[-1].search(model, x, y, threat, Stream.of("t", ids=ids))
    seen = torch.stack(model.inputs)
    values = torch.stack([margin(model.model(z), y) for z in seen])
    return x, found, seen, values


def test_the_share_of_the_image_is_halved_on_schedule():
    attack = load_attack("square")
    assert attack.queries == 5000
    steps = {0: 1, 10: 1, 11: 2, 50: 2, 51: 4, 200: 4, 201: 8, 500: 8, 501: 16, 1000: 16, 1001: 32, 2000: 32, 2001: 64}
    steps |= {4000: 64, 4001: 128, 4999: 128, 6000: 128, 6001: 256, 8000: 256, 8001: 512}
    assert {query: 0.8 / attack.share(query) for query in steps} == steps


def test_the_schedule_is_pyautoattacks():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("pyautoattack")
        from pyautoattack.square import SquareAttack
    theirs = SquareAttack(None, eps=0.1, resc_schedule=False, n_queries=5000)
    attack = load_attack("square")
    assert all(attack.share(query) == theirs.p_selection(query) for query in range(9000))


def test_the_linf_start_is_stripes_at_the_faces_of_the_ball():
    x, _, seen, _ = queried((3, 4, 7), LINF, 1)
    high, low = (x + 0.1).clamp(max=1), (x - 0.1).clamp(min=0)
    up, down = (seen[0] == high).all(2), (seen[0] == low).all(2)
    assert (up ^ down).all()
    assert 0.3 < up.double().mean() < 0.7
    assert len(up.flatten(1).unique(dim=0)) == BATCH
    assert (up[:, 0] != up[:, 1]).any(), "each channel has stripes of its own"


@pytest.mark.parametrize("shape", [(3, 4, 7), (1, 9, 5), (3, 8, 8), (1, 2, 6)])
def test_a_linf_candidate_differs_from_the_best_inside_one_square_at_corners_of_the_ball(shape):
    channels, height, width = shape
    x, found, seen, values = queried(shape, LINF, 700)
    high, low = (x + 0.1).clamp(max=1), (x - 0.1).clamp(min=0)
    best, highest = seen[0].clone(), values[0].clone()
    attack, places = load_attack("square"), torch.zeros(height, width)
    for query, (z, value) in enumerate(zip(seen[1:], values[1:], strict=True)):
        size = min(max(round(math.sqrt(attack.share(query) * height * width)), 1), height, width)
        for i in range(BATCH):
            changed = (z[i] != best[i]).any(0)
            if not changed.any():
                continue
            rows, columns = changed.any(1).nonzero()[:, 0], changed.any(0).nonzero()[:, 0]
            assert rows.max() - rows.min() < size
            assert columns.max() - columns.min() < size
            places += changed
            for channel in range(channels):
                where = z[i, channel] != best[i, channel]
                up, down = z[i, channel] == high[i, channel], z[i, channel] == low[i, channel]
                assert up[where].all() or down[where].all(), "one sign for each channel"
        better = value > highest
        best[better], highest[better] = z[better], value[better]
    assert torch.equal(found, best)
    assert (highest > values[0]).all()
    assert (places > 0).all(), "squares reach every place, the last row and column too"


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
def test_the_margin_of_the_best_never_falls_and_a_sample_that_stands_costs_one_query_more_than_stated(threat):
    _, found, seen, values = queried((3, 4, 7), threat, 150)
    assert len(seen) == 151
    y = torch.zeros(BATCH, dtype=torch.int64)
    assert torch.equal(margin(Unmoved((3, 4, 7))(found), y), values.amax(0))
    model = Recorder(Unmoved((3, 4, 7)))
    square(150)(model, images(), y, threat, Stream.of("t", ids=IDS))
    assert len(model.inputs) == 1 + 151 + 1


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
def test_a_sample_leaves_when_it_falls_and_the_last_of_them_ends_the_search(threat):
    model, x = Recorder(wavering()), images()
    y = model.model(x).argmax(1)
    search = square(300).rounds(5)[-1].search
    found = search(model, x, y, ThreatModel(norm=threat.norm, eps=threat.eps / 3), Stream.of("t", ids=IDS))
    sizes = [len(z) for z in model.inputs]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == BATCH
    assert sizes[-1] == (model.model(found).argmax(1) == y).sum()
    assert len(set(sizes)) > 2
    model.inputs.clear()
    search(model, x, (y + 1) % 5, threat, Stream.of("t", ids=IDS))
    assert len(model.inputs) < 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threat", [LINF, L2, ThreatModel(norm="l2", eps=4.0)], ids=str)
@pytest.mark.parametrize("shape", [(1, 6, 9), (3, 11, 5), (3, 2, 7), (1, 5, 1), (1, 1, 1), (3, 1, 2), (1, 28, 28)])
def test_every_query_is_legal_on_images_of_any_size(shape, threat, dtype):
    x, found, seen, values = queried(shape, threat, 90, dtype)
    assert found.dtype == dtype
    for z in (*seen, found):
        assert torch.isfinite(z).all()
        assert threat.allows(z, x).all()
    assert (values.amax(0) >= values[0]).all()


@pytest.mark.parametrize("shape", [(1, 6, 9), (3, 11, 5), (3, 2, 7)])
def test_under_l2_the_whole_ball_is_used_and_its_mass_is_moved(shape):
    threat = ThreatModel(norm="l2", eps=0.2)
    model, x = Recorder(Unmoved(shape)), 0.4 + 0.2 * images(BATCH, shape)
    y = torch.zeros(BATCH, dtype=torch.int64)
    found = square(300).rounds(3)[-1].search(model, x, y, threat, Stream.of("t", ids=IDS))
    lengths = torch.stack([(z - x).flatten(1).norm(dim=1) for z in model.inputs])
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.2), rtol=0, atol=1e-9)
    # From window to window: the place of most of the energy differs between start and end, and between samples.
    energy = [(z - x).square().sum(1).flatten(1) for z in (model.inputs[0], found)]
    apart = (energy[0] - energy[1]).abs().sum(1) / 0.2**2
    assert (apart > 0.2).all()
    moves = [(b - a).flatten(1).norm(dim=1) for a, b in itertools.pairwise(model.inputs)]
    assert (torch.stack(moves) > 0).double().mean() > 0.9


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 12])
def test_a_bump_is_two_opposite_hills_of_length_one(size):
    bump = SQUARE._bump(size)
    assert bump.shape == (size, size)
    assert bump.norm().item() == pytest.approx(1, abs=1e-12)
    if size > 1:
        assert (bump[: size // 2] > 0).all()
        assert (bump[size // 2 :] < 0).all()
        upper, lower = bump[: size // 2].square().sum(), bump[size // 2 :].square().sum()
        torch.testing.assert_close(upper, lower, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13])
def test_a_bump_has_the_form_of_pyautoattacks(size):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("pyautoattack")
        from pyautoattack.square import SquareAttack
    attack = SquareAttack(None, eps=0.1, norm="L2", device="cpu")
    theirs = torch.zeros(size, size)
    if size > 1:
        theirs[: size // 2] = attack.eta_rectangles(size // 2, size)
    theirs[size // 2 :] = -attack.eta_rectangles(size - size // 2, size)
    torch.testing.assert_close(SQUARE._bump(size).float(), theirs / theirs.norm(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("threat", [ThreatModel(eps=0.02), ThreatModel(norm="l2", eps=0.12)], ids=str)
def test_a_sample_is_searched_the_same_in_any_batch(threat):
    model, x, ids = wavering(), images(13), torch.arange(13) * 7
    y = model(x).argmax(1)
    search = square(150).rounds(5)[-1].search  # more than two blocks of draws

    def found(rows):
        return search(model, x[rows], y[rows], threat, Stream.of("t", ids=ids[rows]))

    whole = found(torch.arange(13))
    assert 0 < (model(whole).argmax(1) != y).sum() < 13
    for rows in (torch.tensor([3, 0]), torch.arange(5, 13), torch.randperm(13, generator=generator(1))):
        torch.testing.assert_close(found(rows), whole[rows], rtol=0, atol=1e-12)


def test_samples_and_streams_have_squares_of_their_own():
    first, other = (queried((1, 5, 6), LINF, 70, ids=ids)[2] for ids in (IDS, IDS + 1))
    x = images(BATCH, (1, 5, 6))
    assert not torch.equal(first, other)
    signs = (first - x).sign().flatten(2)
    assert len(signs.transpose(0, 1).flatten(1).unique(dim=0)) == BATCH


class Rounded(nn.Module):
    """Logits of few values, as a quantised model's: before an image is fooled its label only draws level."""

    def forward(self, x):
        s = (8 * (x.flatten(1).mean(1) - 0.5)).round()
        return torch.stack([torch.zeros_like(s), s], dim=1)


def test_a_tie_that_leaves_the_prediction_right_does_not_end_the_search():
    x, y = 0.3 + 0.01 * images(BATCH, (1, 6, 6)), torch.zeros(BATCH, dtype=torch.int64)
    threat, model = ThreatModel(norm="linf", eps=0.29), Rounded()
    level, beyond = (model(x + change) for change in (0.2, 0.29))
    assert (level.argmax(1) == y).all()
    assert (level[:, 1] == 0).all()
    assert (beyond.argmax(1) != y).all()
    found = square(2000).rounds(2)[-1].search(model, x, y, threat, Stream.of("t", ids=IDS))
    assert (model(found).argmax(1) != y).sum() > BATCH / 2  # 0 where a tie ends it


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 3, 5)])
def test_linf_comes_close_to_the_closed_form_optimum_of_a_linear_model(shape):
    victim, x = RankOneVictim(2, shape), images(BATCH, shape)
    victim.b.data[0] += 1000
    y = torch.zeros(BATCH, dtype=torch.int64)
    best = (x + LINF.eps * victim.uphill(y).sign()).clamp(0, 1)
    found = square(1500).rounds(2)[-1].search(victim, x, y, LINF, Stream.of("t", ids=IDS))
    gained, possible = (margin(victim(z), y) - margin(victim(x), y) for z in (found, best))
    assert (possible > 0).all()
    assert (gained > 0.95 * possible).all()


def test_l2_goes_more_than_half_the_way_to_the_closed_form_optimum_of_a_linear_model():
    shape = (1, 4, 4)
    victim, x = RankOneVictim(2, shape), 0.4 + 0.2 * images(BATCH, shape)
    victim.b.data[0] += 1000
    y, threat = torch.zeros(BATCH, dtype=torch.int64), ThreatModel(norm="l2", eps=0.2)
    best = x + threat.eps * victim.uphill(y) / victim.d.norm()
    found = square(1500).rounds(2)[-1].search(victim, x, y, threat, Stream.of("t", ids=IDS))
    gained, possible = (margin(victim(z), y) - margin(victim(x), y) for z in (found, best))
    assert (gained > 0.5 * possible).all()


@pytest.mark.parametrize("threat", [ThreatModel(eps=0.02), ThreatModel(norm="l2", eps=0.2)], ids=str)
def test_the_search_raises_the_margin_at_least_as_far_as_pyautoattacks(threat):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("pyautoattack")
        from pyautoattack.square import SquareAttack
    shape = (3, 6, 6)
    model, x = Unmoved(shape), 0.4 + 0.2 * images(24, shape, dtype=torch.float32)
    y = torch.zeros(24, dtype=torch.int64)
    ours = square(400).rounds(3)[-1].search(model, x, y, threat, Stream.of("t", ids=torch.arange(24)))
    name = {"linf": "Linf", "l2": "L2"}[threat.norm]
    reference = SquareAttack(model, eps=threat.eps, norm=name, n_queries=400, resc_schedule=False, device="cpu")
    reference.init_hyperparam(x)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _, theirs = reference.attack_single_run(x, y)
    gained = [(margin(model(z), y) - margin(model(x), y)).mean() for z in (ours, theirs)]
    assert gained[0] >= gained[1] > 0


def test_restarts_are_rounds_with_draws_of_their_own():
    model, x = Recorder(Unmoved((3, 4, 7))), images()
    y, stream = torch.zeros(BATCH, dtype=torch.int64), Stream.of("t", ids=IDS)
    attack = dataclasses.replace(square(5), restarts=2)
    assert [part.index for part in attack.rounds(3)] == [0, 1]
    attack(model, x, y, LINF, stream)
    assert len(model.inputs) == 1 + 2 * (6 + 1)
    assert not torch.equal(model.inputs[1], model.inputs[8])


@pytest.mark.parametrize("threat", [ThreatModel(eps=0.02), ThreatModel(norm="l2", eps=0.12)], ids=str)
def test_its_blocks_one_after_the_other_are_one_search(threat, monkeypatch):
    monkeypatch.setattr(SQUARE, "BLOCK", 64)
    model, x = Recorder(wavering()), images(13)
    y, stream = model.model(x).argmax(1), Stream.of("t", ids=torch.arange(13) * 7)
    rounds = dataclasses.replace(load_attack("square"), queries=150, restarts=2).rounds(5)
    assert [(part.index, part.block, part.go_on is None) for part in rounds] == [
        (0, 0, True), (0, 1, False), (0, 2, False), (1, 0, True), (1, 1, False), (1, 2, False),
    ]  # fmt: skip
    whole = rounds[2].search(model, x, y, threat, stream)
    assert 0 < (model.model(whole).argmax(1) != y).sum() < 13
    one_go = len(model.inputs)
    model.inputs.clear()
    last = rounds[0].search(model, x, y, threat, stream)
    first = len(model.inputs)
    for part in rounds[1:3]:
        last = part.go_on(model, x, y, threat, stream, last)
    torch.testing.assert_close(last, whole, rtol=0, atol=1e-12)
    assert first == 65
    assert len(model.inputs) == one_go + 2  # a look at where each later block begins


def test_called_as_a_whole_it_goes_on_from_block_to_block(monkeypatch):
    model, x = Recorder(Unmoved((3, 4, 7))), images(BATCH, (3, 4, 7))
    y, stream = torch.zeros(BATCH, dtype=torch.int64), Stream.of("t", ids=IDS)
    square(150)(model, x, y, LINF, stream)
    best_of_one = margin(model.model(torch.cat(model.inputs)), y.repeat(len(model.inputs))).reshape(-1, BATCH).amax(0)
    monkeypatch.setattr(SQUARE, "BLOCK", 64)
    model.inputs.clear()
    square(150)(model, x, y, LINF, stream)
    seen = margin(model.model(torch.cat(model.inputs)), y.repeat(len(model.inputs))).reshape(-1, BATCH)
    torch.testing.assert_close(seen.amax(0), best_of_one, rtol=0, atol=1e-12)
    assert len(seen) == 1 + 65 + 1 + 65 + 1 + 23 + 1
