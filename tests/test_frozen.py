import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from crdnd.attacks import Folding, answers, frozen
from crdnd.models import create_model
from support import generator, images

COUNT, SIZE = 6, (9, 7)


def settle(model, seed=0):
    """Batch norms with statistics and weights that are not those of a new one, as after a training."""
    draws = generator(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor, low in ((module.running_mean, -0.5), (module.running_var, 0.5), (module.weight, 0.5)):
                    if tensor is not None:
                        tensor.copy_(low + torch.rand(tensor.shape, generator=draws))
                if module.bias is not None:
                    module.bias.copy_(torch.rand(module.bias.shape, generator=draws) - 0.5)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draws))
    return model


class Net(nn.Module):
    """A convolution, what is given as `between`, batch norm, ReLU, mean, linear layer."""

    def __init__(self, channels=1, bias=False, between=None, **norm):
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3, bias=bias)
        self.norm = nn.BatchNorm2d(8, **norm)
        self.linear = nn.Linear(8, 5)
        self.between = between

    def forward(self, x):
        x = self.conv(x)
        x = self.between(x) if self.between else x
        return self.linear(F.relu(self.norm(x)).mean((2, 3)))


class SharedNorm(nn.Module):
    """One batch norm behind two convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)
        self.norm, self.linear = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        return self.linear(F.relu(self.norm(self.second(x))).mean((2, 3)))


class SharedConvolution(nn.Module):
    """One convolution before two batch norms."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.norms, self.linear = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)]), nn.Linear(8, 5)

    def forward(self, x):
        return self.linear((F.relu(self.norms[0](self.conv(x))) - self.norms[1](self.conv(x))).mean((2, 3)))


class UsedTwice(Net):
    """The convolution's output goes into the batch norm and around it."""

    def forward(self, x):
        x = self.conv(x)
        return self.linear((F.relu(self.norm(x)) - F.relu(-x)).mean((2, 3)))


class UsedDetached(Net):
    """The convolution's output decides, without a gradient, what passes behind the batch norm."""

    def forward(self, x):
        x = self.conv(x)
        return self.linear((F.relu(self.norm(x)) * (x > 0.1)).mean((2, 3)))


class PreActivation(nn.Module):
    """Blocks whose sums are what the next batch norm reads, and the shortcut too."""

    def __init__(self, in_place, zero=False):
        super().__init__()
        self.first, self.linear = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 5)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.in_place = in_place
        self.scale = nn.Parameter(torch.tensor(0.0)) if zero else 1

    def forward(self, x):
        x = self.first(x)
        for one, two in ((0, 1), (2, 3)):
            out = self.convs[one](F.relu(self.norms[one](x)))
            out = self.convs[two](F.relu(self.norms[two](out)))
            if self.in_place:
                out += x
                x = out
            else:
                x = x + self.scale * out
        return self.linear(x.mean((2, 3)))


class Unused(Net):
    """Has a convolution and a batch norm that no image passes."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))


class ByHand(Net):
    """Uses its convolution's weight, and never the module."""

    def forward(self, x):
        return self.linear(F.relu(self.norm(F.conv2d(x, self.conv.weight))).mean((2, 3)))


def normed():
    model = Net()
    model.conv = weight_norm(model.conv)
    return model


NETS = {
    "grey": (1, Net),
    "colour": (3, lambda: Net(channels=3)),
    "with bias": (1, lambda: Net(bias=True)),
    "colour with bias": (3, lambda: Net(channels=3, bias=True)),
    "without affine": (1, lambda: Net(affine=False)),
    "without statistics": (1, lambda: Net(track_running_stats=False)),
    "large eps": (1, lambda: Net(eps=0.5)),
    "shared norm": (1, SharedNorm),
    "shared convolution": (1, SharedConvolution),
    "output used twice": (1, UsedTwice),
    "output used without a gradient": (1, UsedDetached),
    "pre-activation": (1, lambda: PreActivation(in_place=False)),
    "pre-activation in place": (1, lambda: PreActivation(in_place=True)),
    "branches that begin at zero": (1, lambda: PreActivation(in_place=False, zero=True)),
    "unused layers": (1, Unused),
    "weight norm": (1, normed),
    "by hand": (1, ByHand),
    "a function between": (1, lambda: Net(between=torch.tanh)),
    "a function in place between": (1, lambda: Net(between=F.relu_)),
    "a layer in place between": (1, lambda: Net(between=nn.ReLU(inplace=True))),
    "a view between": (1, lambda: Net(between=lambda z: z.flip(2))),
    "cnn": (1, lambda: create_model("cnn", input_shape=(1, *SIZE), num_classes=5, width=4, seed=1)),
    "colour cnn": (3, lambda: create_model("cnn", input_shape=(3, *SIZE), num_classes=5, width=4, seed=1)),
}
# How many modules compute the fast way: convolutions, the batch norms that were folded into them, and the model itself
PATCHED = {
    "grey": 2, "colour": 2, "with bias": 2, "colour with bias": 2, "without affine": 2, "without statistics": 1,
    "large eps": 2, "shared norm": 2, "shared convolution": 1, "output used twice": 1,
    "output used without a gradient": 0, "pre-activation": 7, "pre-activation in place": 7,
    "branches that begin at zero": 7, "unused layers": 3,
    "weight norm": 0, "by hand": 1, "a function between": 1, "a function in place between": 1,
    "a layer in place between": 1, "a view between": 1, "cnn": 7, "colour cnn": 7,
}  # fmt: skip


def build(name):
    channels, make = NETS[name]
    torch.manual_seed(0)
    return settle(make()), images(COUNT, (channels, *SIZE), dtype=torch.float32)


def patched(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("name", NETS)
def test_logits_and_gradients_are_those_of_the_plain_model(name):
    model, x = build(name)
    other = images(COUNT, x.shape[1:], seed=5, dtype=torch.float32)
    expected = answers(model.eval(), other)
    model.train()
    with frozen(model, x):
        for a, b in zip(answers(model, other), expected, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_the_fast_way_is_on_where_it_should_be_and_nowhere_else(name):
    model, x = build(name)
    with frozen(model, x):
        assert len(patched(model)) == PATCHED[name]
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(module.training for module in model.modules())
    assert patched(model) == []


@pytest.mark.parametrize("name", [name for name in NETS if name != "weight norm"])
def test_what_was_found_on_a_new_network_still_holds_when_it_has_learned(name):
    channels, make = NETS[name]
    torch.manual_seed(0)
    model, x = make().eval(), images(COUNT, (channels, *SIZE), dtype=torch.float32)
    folding = Folding(model, x)
    settle(model)
    for parameter in model.parameters():
        if parameter.ndim == 0:
            nn.init.constant_(parameter, 0.5)
    expected = answers(model, x)
    with folding.applied():
        for a, b in zip(answers(model, x), expected, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()


def test_a_folded_batch_norm_does_nothing_and_its_convolution_everything():
    model, x = build("cnn")
    conv, norm = (next(m for m in model.modules() if type(m) is kind) for kind in (nn.Conv2d, nn.BatchNorm2d))
    plain = nn.Conv2d.forward(conv, x)
    with frozen(model, x):
        assert norm(plain) is plain
        torch.testing.assert_close(conv(x), nn.BatchNorm2d.forward(norm, plain), rtol=1e-4, atol=1e-5)
        assert not conv(x).requires_grad


@pytest.mark.parametrize("name", ["cnn", "colour cnn"])
def test_the_yielded_model_is_the_plain_one_bit_for_bit_and_leaves_the_fast_one_on(name):
    model, x = build(name)
    expected = model.eval()(x)
    with frozen(model, x) as plain:
        fast = model(x)
        judged = plain(x)
        assert torch.equal(judged, expected)
        assert not judged.requires_grad
        assert not torch.equal(fast, expected), "rounding differs, or else nothing was folded"
        assert torch.equal(model(x), fast)


def snapshot(model):
    return {
        "modes": [module.training for module in model.modules()],
        "required": [parameter.requires_grad for parameter in model.parameters()],
        "own": [sorted(vars(module)) for module in model.modules()],
        "types": [type(module) for module in model.modules()],
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "ids": [id(parameter) for parameter in model.parameters()],
        "grads": [parameter.grad for parameter in model.parameters()],
        "hooks": [list(module._forward_hooks.values()) for module in model.modules()],
    }


def same(a, b):
    states = a.pop("state"), b.pop("state")
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    return a == b


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_the_model_is_left_as_it_was(name, raises):
    model, x = build(name)
    model.train()
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d))
    first.eval()
    next(iter(first.parameters())).requires_grad_(False)
    handle = first.register_forward_hook(lambda *_: None)
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError) if raises else contextlib.nullcontext(), frozen(model, x) as plain:
        answers(model, x)
        plain(x)
        if raises:
            raise ZeroDivisionError
    assert same(before, snapshot(model))
    assert handle.id in first._forward_hooks
    model(x).sum().backward()
    assert model.linear.weight.grad is not None if hasattr(model, "linear") else True


@pytest.mark.parametrize("fails_at", [1, 2])
def test_the_model_is_left_as_it_was_when_the_probe_fails(fails_at):
    class Fails(Net):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls == fails_at:
                raise ZeroDivisionError
            return super().forward(x)

    model, x = settle(Fails()), images(COUNT, (1, *SIZE), dtype=torch.float32)
    model.calls = 0
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), frozen(model, x):
        raise AssertionError("not reached")
    assert same(before, snapshot(model))


def test_the_plain_model_is_back_after_a_pass_of_it_has_failed():
    model, x = build("cnn")
    with frozen(model, x) as plain:
        fast = model(x)
        with pytest.raises(RuntimeError):
            plain(x[:, :, :, :0].expand(-1, 2, -1, -1))
        assert torch.equal(model(x), fast)


def test_a_forward_of_the_users_own_is_used_and_kept():
    model, x = build("grey")
    conv = model.conv
    own = lambda z: 2 * nn.Conv2d.forward(conv, z)  # noqa: E731
    conv.forward = own
    expected = model.eval()(x)
    with frozen(model, x):
        assert conv.forward is own
        assert "forward" not in vars(model.norm)
        torch.testing.assert_close(model(x), expected)
    assert conv.forward is own


def test_a_subclass_of_a_convolution_computes_its_own_way():
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = Net()
    model.conv = Doubled(1, 8, 3)
    settle(model)
    x = images(COUNT, (1, *SIZE), dtype=torch.float32)
    expected = model.eval()(x)
    with frozen(model, x):
        assert patched(model) == []
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", ["dropout", "noise"])
def test_a_random_model_is_left_plain_in_eval_mode(kind):
    class Random(Net):
        def forward(self, x):
            noisy = F.dropout(x, 0.3, training=True) if kind == "dropout" else x + 0.05 * torch.randn_like(x)
            return super().forward(noisy)

    model, x = settle(Random()), images(COUNT, (1, *SIZE), dtype=torch.float32)
    with frozen(model, x) as plain:
        assert patched(model) == []
        assert not model.norm.training
        torch.manual_seed(3)
        fast = model(x)
        torch.manual_seed(3)
        assert torch.equal(plain(x), fast)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_hooks_of_the_users_see_every_pass():
    model, x = build("cnn")
    calls = {}

    def count(name):
        return lambda *_: calls.__setitem__(name, calls.get(name, 0) + 1)

    for name, module in model.named_modules():
        module.register_forward_hook(count(name))
    with frozen(model, x) as plain:
        started = dict(calls)
        for _ in range(3):
            model(x)
        plain(x)
        assert {name: calls[name] - started[name] for name in calls} == dict.fromkeys(calls, 4)
    assert len(calls) == len(list(model.modules()))


def test_a_hook_that_changes_an_output_is_heeded():
    model, x = build("grey")
    model.conv.register_forward_hook(lambda module, arguments, output: torch.tanh(output))
    expected = model.eval()(x)
    with frozen(model, x):
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


def test_the_fast_way_works_for_any_batch_and_any_layout():
    model, x = build("colour cnn")
    more = images(17, x.shape[1:], seed=4, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    expected = model.eval()(more)
    with frozen(model, x):
        torch.testing.assert_close(model(more), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(more[:2]), expected[:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", [2, 1])
def test_a_colour_model_that_flattens_by_view_is_no_reason_to_fail(pool):
    class Flattens(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.linear = nn.Linear(8 * (SIZE[0] // pool) * (SIZE[1] // pool), 5)

        def forward(self, x):
            x = F.max_pool2d(F.relu(self.norm(self.conv(x))), pool)
            return self.linear(x.view(len(x), -1))

    model, x = settle(Flattens()), images(COUNT, (3, *SIZE), dtype=torch.float32)
    expected = model.eval()(x)
    with frozen(model, x):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_model_without_convolutions_is_frozen_all_the_same():
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(63, 5)), images(COUNT, (1, *SIZE), dtype=torch.float32)
    with frozen(model, x) as plain:
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not model.training
        assert torch.equal(plain(x), model(x))
    assert model.training


def test_double_precision_stays_double_precision():
    model, x = build("cnn")
    model, x = model.double(), x.double()
    expected = model.eval()(x)
    with frozen(model, x):
        assert len(patched(model)) == 7
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)


def test_one_context_inside_another_is_undone_in_its_order():
    model, x = build("cnn")
    expected = model.eval()(x)
    with frozen(model, x), frozen(model, x) as plain:
        torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)
    assert patched(model) == []
    assert torch.equal(model(x), expected)
