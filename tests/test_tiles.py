import pytest
import torch
import torch.nn.functional as F
from torch import nn

from crdnd.attacks import _tiles
from crdnd.attacks._frozen import Folding
from crdnd.attacks._tiles import tiled, tiles_pay, transformed
from crdnd.models import create_model
from support import generator, images

COUNT, CHANNELS, OUTPUTS = 6, 5, 7
SIZES = [(4, 4), (8, 12), (12, 4), (16, 8)]


def problem(size, dtype=torch.float64):
    draws = generator(1)
    x = torch.randn(COUNT, CHANNELS, *size, generator=draws, dtype=dtype).requires_grad_(True)
    weight = torch.randn(OUTPUTS, CHANNELS, 3, 3, generator=draws, dtype=dtype).requires_grad_(True)
    bias = torch.randn(OUTPUTS, generator=draws, dtype=dtype).requires_grad_(True)
    return x, weight, bias, torch.randn(COUNT, OUTPUTS, *size, generator=draws, dtype=dtype)


@pytest.mark.parametrize("form", [transformed, lambda weight: weight])
@pytest.mark.parametrize("chunk", [1, 2000, 1 << 21])
@pytest.mark.parametrize("size", SIZES)
def test_a_convolution_in_tiles_and_its_gradients_are_the_convolution(size, chunk, form, monkeypatch):
    monkeypatch.setattr(_tiles, "CHUNK", chunk)
    x, weight, bias, upstream = problem(size)
    found, expected = tiled(x, form(weight), bias), F.conv2d(x, weight, bias, padding=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    ours, theirs = (torch.autograd.grad(maps, (x, weight, bias), upstream) for maps in (found, expected))
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_any_layout_of_images_gradients_and_weights_will_do(layout):
    x, weight, _, upstream = (one.detach().contiguous(memory_format=layout) if one.ndim > 1 else one
                              for one in problem((8, 12)))  # fmt: skip
    x.requires_grad_(True)
    found, expected = tiled(x, transformed(weight), None), F.conv2d(x, weight, padding=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(maps, x, upstream)[0] for maps in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-11)


def test_what_comes_next_may_work_in_place():
    x, weight, bias, upstream = problem((8, 12))
    found, expected = (
        F.relu(tiled(x, transformed(weight), bias), inplace=True),
        F.conv2d(x, weight, bias, padding=1).relu(),
    )
    gradients = [torch.autograd.grad(maps, x, upstream)[0] for maps in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-11)


def test_fixed_weights_get_no_gradient_and_keep_no_images():
    x, weight, _, _ = problem((8, 12))
    found = tiled(x, transformed(weight.detach()), None)
    assert found.grad_fn is not None
    assert found.grad_fn.saved_tensors[0] is None
    found.sum().backward()
    assert weight.grad is None


def test_rounding_in_float32_is_a_few_times_that_of_a_convolution():
    draws = generator()
    x, weight = torch.randn(COUNT, 128, 8, 8, generator=draws), torch.randn(96, 128, 3, 3, generator=draws)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    error = (tiled(x, transformed(weight), None) - exact).norm() / exact.norm()
    assert error <= 3e-6


def wide(**changes):
    values = {"in_channels": 128, "out_channels": 128, "kernel_size": 3, "padding": 1} | changes
    return nn.Conv2d(**values)


PAYS = {
    "wide": (wide(), (128, 8, 8), True),
    "one side wider": (wide(in_channels=64, out_channels=256), (64, 8, 12), True),
    "too wide": (wide(in_channels=512, out_channels=640), (512, 8, 8), False),
    "float64": (wide(dtype=torch.float64), (128, 4, 4), True),
    "narrow": (wide(in_channels=64), (64, 8, 8), False),
    "no multiple of 4": (wide(), (128, 8, 6), False),
    "1x1": (wide(kernel_size=1, padding=0), (128, 8, 8), False),
    "stride": (wide(stride=2), (128, 8, 8), False),
    "no padding": (wide(padding=0), (128, 8, 8), False),
    "dilation": (wide(dilation=2), (128, 8, 8), False),
    "groups": (wide(groups=2), (128, 8, 8), False),
    "reflected": (wide(padding_mode="reflect"), (128, 8, 8), False),
    "half precision": (wide(dtype=torch.bfloat16), (128, 8, 8), False),
}


@pytest.mark.parametrize("name", PAYS)
def test_tiles_are_for_wide_plain_convolutions_of_whole_tiles(name):
    convolution, inputs, pays = PAYS[name]
    assert tiles_pay(convolution, inputs) is pays


def resnet(dtype=torch.float64):
    return create_model("resnet18", input_shape=(3, 32, 32), num_classes=5, width=16, seed=1).to(dtype)


def test_a_frozen_resnet_computes_its_widest_stage_in_tiles_and_says_so():
    model, x = resnet().eval(), images(COUNT, (3, 32, 32))
    expected, folding = model(x), Folding(model, x)
    assert str(folding) == ("20 batch norms folded, 3 convolutions in tiles, 20 convolutions with channels last")
    with folding.applied():
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)


def test_where_tiles_would_change_answers_they_are_given_up_and_the_rest_is_not(monkeypatch):
    model, x = resnet().eval(), images(COUNT, (3, 32, 32))
    monkeypatch.setattr("crdnd.attacks._tiles.transformed", lambda weight: 1.001 * transformed(weight))
    assert str(Folding(model, x)) == "20 batch norms folded, 20 convolutions with channels last"


def test_images_of_another_size_and_an_autocast_take_the_convolution_itself(monkeypatch):
    model, x = resnet(torch.float32).eval(), images(COUNT, (3, 32, 32), dtype=torch.float32)
    folding = Folding(model, x)

    def never(*_):
        raise AssertionError

    monkeypatch.setattr("crdnd.attacks._frozen.tiled", never)
    for context in (folding.applied(), folding.training()):
        with context:
            with torch.autocast("cpu", torch.bfloat16):
                model(x)
            model(images(COUNT, (3, 24, 40), dtype=torch.float32))
            with pytest.raises(AssertionError):
                model(x)


def test_the_widest_convolutions_learn_as_they_are(monkeypatch):
    monkeypatch.setattr("crdnd.attacks._frozen.FEW_WEIGHTS", 128 * 128 - 1)
    model, x = resnet().eval(), images(COUNT, (3, 32, 32))
    folding = Folding(model, x)

    def never(*_):
        raise AssertionError

    monkeypatch.setattr("crdnd.attacks._frozen.tiled", never)
    with folding.training():
        model(x)
    with folding.applied(), pytest.raises(AssertionError):
        model(x)


def test_training_in_tiles_gives_every_weight_its_gradient():
    model, x = resnet().train(), images(COUNT, (3, 32, 32))
    with torch.random.fork_rng():
        folding = Folding(model.eval(), x)
    model.train()

    def gradients():
        model.zero_grad()
        loss = model(x).square().sum() + model(x.flip(3)).square().sum()
        loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    with folding.training():
        ours = gradients()
    for own, other in zip(ours, plain, strict=True):
        assert (own - other).norm() <= 1e-10 * other.norm() + 1e-12
