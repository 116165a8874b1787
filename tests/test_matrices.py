"""Small networks as products with matrices: equal to the network for whatever layers, and off where somebody looks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from crdnd.attacks import Folding, answers, frozen
from crdnd.attacks._matrices import LARGEST_MATRIX, PixelMatrix
from crdnd.models import create_model, evaluating
from support import images
from test_frozen import settle

COUNT = 5


@st.composite
def layers(draw):
    """Channels, images' height and width, and convolutions (outputs, kernel, stride, padding, dilation, bias, norm)."""
    convolution = st.tuples(
        st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.integers(1, 2), st.booleans(),
        st.booleans(),
    )  # fmt: skip
    return (
        draw(st.integers(1, 3)),
        draw(st.integers(6, 9)),
        draw(st.integers(6, 9)),
        draw(st.lists(convolution, min_size=1, max_size=3)),
    )


def network(channels, size, convolutions, pooled):
    """Convolutions with ReLUs behind them and a linear layer, or None where the maps become too small or too large."""
    parts, x = [], torch.zeros(2, channels, *size)
    for outputs, kernel, stride, padding, dilation, bias, norm in convolutions:
        if min(x.shape[2:]) + 2 * padding < dilation * (kernel - 1) + 1:
            return None
        parts.append(nn.Conv2d(x.shape[1], outputs, kernel, stride, padding, dilation, bias=bias))
        if norm:
            parts.append(nn.BatchNorm2d(outputs))
        parts.append(nn.ReLU())
        before, x = x, parts[-3 if norm else -2](x)
        if before[0].numel() * x[0].numel() > LARGEST_MATRIX:
            return None
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if pooled else [nn.Flatten()]
    features = x.shape[1] if pooled else x[0].numel()
    return nn.Sequential(*parts, *pool, nn.Linear(features, 7))


@settings(max_examples=60, deadline=None)
@given(layers(), st.booleans())
def test_any_chain_of_layers_is_computed_as_products_and_is_the_same(shape, pooled):
    channels, height, width, convolutions = shape
    torch.manual_seed(0)
    model = network(channels, (height, width), convolutions, pooled)
    if model is None:
        return
    settle(model).double().eval()
    x = images(COUNT, (channels, height, width))
    expected = answers(model, x)
    with frozen(model, images(3, (channels, height, width), seed=1)):
        assert "forward" in vars(model)
        for a, b in zip(answers(model, x), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def small(channels=3, size=(9, 7), width=4):
    torch.manual_seed(0)
    model = settle(create_model("cnn", input_shape=(channels, *size), num_classes=6, width=width, std=(0.3,) * channels,
                                mean=(0.4, 0.5, 0.6)[:channels]))  # fmt: skip
    return model.eval(), images(COUNT, (channels, *size), dtype=torch.float32)


def test_the_normalisation_and_the_padding_behind_it_are_part_of_the_product():
    model, x = small()
    expected = answers(model, x)
    with frozen(model, x):
        for a, b in zip(answers(model, x), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_layer_that_was_all_zero_when_the_model_was_looked_at_may_learn():
    model, x = small()
    weight = model.network.features[3].weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    folding = Folding(model, x)
    with torch.no_grad():
        weight.copy_(kept)
    expected = answers(model, x)
    with folding.applied():
        assert "forward" in vars(model)
        for a, b in zip(answers(model, x), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hook", ["forward", "forward_pre", "full_backward"])
def test_who_hooks_into_a_layer_later_sees_every_pass(hook):
    model, x = small()
    seen = []
    with frozen(model, x):
        answers(model, x)
        handle = getattr(model.network.classifier, f"register_{hook}_hook")(lambda *_: seen.append(1))
        answers(model, x)
        handle.remove()
        answers(model, x)
    assert seen == [1]


def test_other_shapes_types_and_precisions_take_the_model_as_it_is():
    model, x = small()
    with frozen(model, x) as plain:
        wide = images(COUNT, (3, 9, 11), dtype=torch.float32)
        torch.testing.assert_close(model(wide), plain(wide), rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16


class Unknown(nn.Module):
    """The user's own code, which may count, draw or look at its weights."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def convolution(inputs, outputs, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


NO_CHAINS = {
    "code of the user": lambda: Unknown(nn.Sequential(convolution(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(252, 6))),
    "no ReLU": lambda: nn.Sequential(convolution(3, 4), nn.Flatten(), nn.Linear(252, 6)),
    "two convolutions": lambda: nn.Sequential(
        convolution(3, 4), convolution(4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(252, 6)
    ),
    "two linear layers": lambda: nn.Sequential(
        convolution(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(252, 8), nn.Linear(8, 6)
    ),
    "a pool between": lambda: nn.Sequential(
        convolution(3, 4), nn.ReLU(), nn.AvgPool2d(2), convolution(4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(48, 6)
    ),
    "a norm before": lambda: nn.Sequential(
        nn.BatchNorm2d(3), convolution(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(252, 6)
    ),
    "groups": lambda: nn.Sequential(convolution(3, 6, groups=3), nn.ReLU(), nn.Flatten(), nn.Linear(378, 6)),
    "a residual": lambda: create_model("resnet18", input_shape=(3, 9, 7), num_classes=6, width=1),
}


@pytest.mark.parametrize("name", NO_CHAINS)
def test_what_is_no_chain_is_computed_layer_by_layer(name):
    torch.manual_seed(0)
    model, x = settle(NO_CHAINS[name]()).eval(), images(COUNT, (3, 9, 7), dtype=torch.float32)
    expected = answers(model, x)
    with frozen(model, x):
        assert "forward" not in vars(model)
        for a, b in zip(answers(model, x), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_and_its_matrix_have_the_same_gradients(groups):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups).double()
    x = images(COUNT, (4, 7, 5)).requires_grad_(True)
    y = layer(x)
    toward = torch.randn_like(y)
    pixels = PixelMatrix(layer, x.shape[1:], y.shape[1:])
    product = (x.flatten(1) @ pixels(layer.weight) + pixels.spread(layer.bias)).unflatten(1, y.shape[1:])
    torch.testing.assert_close(product, y)
    inputs = (x, layer.weight, layer.bias)
    for a, b in zip(torch.autograd.grad(product, inputs, toward), torch.autograd.grad(y, inputs, toward), strict=True):
        torch.testing.assert_close(a, b)


def test_a_training_pass_learns_the_same_and_leaves_the_model_as_it_was():
    model, x = small()
    model.double().train()
    x = x.double()
    with evaluating(model):
        folding = Folding(model, x)

    def learned():
        before = {key: value.clone() for key, value in model.state_dict().items()}
        logits = model(x)
        weights = torch.linspace(-1, 1, logits.numel(), dtype=x.dtype).reshape(logits.shape)
        found = torch.autograd.grad((logits * weights).sum(), list(model.parameters()))
        statistics = {key: value.clone() for key, value in model.state_dict().items()}
        model.load_state_dict(before)
        return [logits.detach(), *found, *statistics.values()]

    expected = learned()
    with folding.training():
        assert sum("forward" in vars(module) for module in model.modules()) == 3
        assert model.training
        got = learned()
    assert not any("forward" in vars(module) for module in model.modules())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
