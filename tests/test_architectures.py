"""Parameter counts as published, worked out layer by layer; networks written out; what holds for every architecture."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from crdnd import registry
from crdnd.attacks import frozen
from crdnd.attacks._frozen import answers
from crdnd.errors import InputError
from crdnd.models import create_model, model_names, parameter_count
from support import BATCH, CLASSES, generator, images

# Every architecture in a size that takes no time.
SMALL = {
    "cifar_resnet": {"depth": 8, "width": 3},
    "cnn": {"width": 2},
    "mobilenet_v2": {"width": 0.125},
    "preact_resnet18": {"width": 3},
    "resnet18": {"width": 3},
    "resnet34": {"width": 2},
    "resnet50": {"width": 2},
    "small_cnn": {"width": 3},
    "wrn": {"depth": 10, "width": 2},
}
VARIANTS = {
    **{name: (name, settings) for name, settings in SMALL.items()},
    "cifar_resnet with projections": ("cifar_resnet", {"depth": 14, "width": 3, "shortcut": "projection"}),
    "preact_resnet18 with a last norm": ("preact_resnet18", {"width": 3, "final_norm": True}),
    "wrn with silu": ("wrn", {"depth": 10, "width": 2, "activation": "silu", "padding": "same"}),
    "wrn no wider than its stem": ("wrn", {"depth": 16, "width": 1}),
}
SMALLEST = {"small_cnn": 16}


def network(name, *, channels=3, classes=10, **settings):
    """A network without memory for its weights: their shapes alone."""
    kind = registry.load("models", name, "MODEL")
    with torch.device("meta"):
        return kind(channels, classes, kind.Settings(**settings))


def small(variant, shape=(3, 18, 21), **changes):
    """Small, in float64, with batch norms as after training: statistics of images, weights that differ."""
    name, settings = VARIANTS[variant]
    model = create_model(name, input_shape=shape, num_classes=CLASSES, seed=1, **settings | changes)
    draws = generator(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=draws) + 0.5)
        norms = [module for module in model.double().train().modules() if isinstance(module, nn.BatchNorm2d)]
        for module in norms:
            module.momentum = 1.0  # the running statistics become those of this batch
        model(images(3 * BATCH, shape, seed=9))
        for module in norms:
            module.momentum = 0.1
    return model.eval()


def test_every_architecture_is_looked_at():
    assert sorted(SMALL) == model_names()


# --- parameter counts -------------------------------------------------------------------------------------------------


def conv(inputs, outputs, size=3):
    return size * size * inputs * outputs


def norm(width):
    return 2 * width


def linear(inputs, outputs):
    return (inputs + 1) * outputs


def stages(block, inputs, widths, counts):
    """Blocks `block(inputs, outputs, stride)`; the first of each stage but the first one has stride 2."""
    total = 0
    for stage, (outputs, count) in enumerate(zip(widths, counts, strict=True)):
        total += block(inputs, outputs, 1 + (stage > 0)) + (count - 1) * block(outputs, outputs, 1)
        inputs = outputs
    return total


def basic(inputs, outputs, stride, *, projects=True):
    shortcut = conv(inputs, outputs, 1) + norm(outputs) if projects and (stride > 1 or inputs != outputs) else 0
    return conv(inputs, outputs) + conv(outputs, outputs) + 2 * norm(outputs) + shortcut


def bottleneck(inputs, outputs, stride):
    inner = outputs // 4
    shortcut = conv(inputs, outputs, 1) + norm(outputs) if stride > 1 or inputs != outputs else 0
    convolutions = conv(inputs, inner, 1) + conv(inner, inner) + conv(inner, outputs, 1)
    return convolutions + 2 * norm(inner) + norm(outputs) + shortcut


def preact(inputs, outputs, stride):
    shortcut = conv(inputs, outputs, 1) if stride > 1 or inputs != outputs else 0
    return conv(inputs, outputs) + conv(outputs, outputs) + norm(inputs) + norm(outputs) + shortcut


def resnet(block, counts, widths, classes=10, first=64):
    return conv(3, first) + norm(first) + stages(block, first, widths, counts) + linear(widths[-1], classes)


def wrn(depth, width, classes=10):
    widths = [16 * width, 32 * width, 64 * width]
    blocks = [(depth - 4) // 6] * 3
    return conv(3, 16) + stages(preact, 16, widths, blocks) + norm(widths[-1]) + linear(widths[-1], classes)


def mobilenet(classes=10, *, projects=True):
    """Sandler et al. 2018, table 2: expansion t, channels c, blocks n, stride s; the first strides are 1 for CIFAR."""
    table = [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    total, inputs = conv(3, 32) + norm(32), 32
    for t, c, n, s in table:
        for stride in [s] + [1] * (n - 1):
            wide = t * inputs
            total += conv(inputs, wide, 1) + norm(wide) + 9 * wide + norm(wide) + conv(wide, c, 1) + norm(c)
            if projects and stride == 1 and inputs != c:
                total += conv(inputs, c, 1) + norm(c)
            inputs = c
    return total + conv(320, 1280, 1) + norm(1280) + linear(1280, classes)


STANDARD, WIDE = (64, 128, 256, 512), (256, 512, 1024, 2048)
COUNTS = {
    "ResNet-18": ("resnet18", {}, resnet(basic, (2, 2, 2, 2), STANDARD), 11_173_962),
    "ResNet-34": ("resnet34", {}, resnet(basic, (3, 4, 6, 3), STANDARD), 21_282_122),
    "ResNet-50": ("resnet50", {}, resnet(bottleneck, (3, 4, 6, 3), WIDE), 23_520_842),
    # The stem has no norm, the last norm is an option.
    "PreActResNet-18": (
        "preact_resnet18", {}, resnet(preact, (2, 2, 2, 2), STANDARD) - norm(64), 11_171_146,
    ),
    "PreActResNet-18 of Rice et al.": (
        "preact_resnet18", {"final_norm": True},
        resnet(preact, (2, 2, 2, 2), STANDARD) - norm(64) + norm(512), 11_172_170,
    ),
    "MobileNetV2": ("mobilenet_v2", {}, mobilenet(), 2_296_922),
    "WRN-16-4": ("wrn", {"depth": 16, "width": 4}, wrn(16, 4), 2_748_890),
    "WRN-28-10": ("wrn", {"depth": 28, "width": 10}, wrn(28, 10), 36_479_194),
    "WRN-34-10": ("wrn", {"depth": 34, "width": 10}, wrn(34, 10), 46_160_474),
    "WRN-34-20": ("wrn", {"depth": 34, "width": 20}, wrn(34, 20), 184_531_674),
    "WRN-70-16": ("wrn", {"depth": 70, "width": 16}, wrn(70, 16), 266_796_506),
    "WRN-70-16 of Gowal et al.": (
        "wrn", {"depth": 70, "width": 16, "activation": "silu", "padding": "same"}, wrn(70, 16), 266_796_506,
    ),
    "ResNet-8": ("cifar_resnet", {"depth": 8}, None, 75_290),
    "ResNet-20": ("cifar_resnet", {}, None, 269_722),
    "ResNet-56": ("cifar_resnet", {"depth": 56}, None, 853_018),
    "ResNet-20 with projections": ("cifar_resnet", {"shortcut": "projection"}, None, 272_474),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_those_of_the_papers(name):
    key, settings, derived, published = COUNTS[name]
    if key == "cifar_resnet":
        n, projects = (settings.get("depth", 20) - 2) // 6, "shortcut" in settings

        def block(inputs, outputs, stride):
            return basic(inputs, outputs, stride, projects=projects)

        derived = resnet(block, (n, n, n), (16, 32, 64), first=16)
    assert parameter_count(network(key, **settings)) == derived == published


def test_more_classes_and_fewer_channels_change_the_last_layer_and_the_first():
    cifar100 = parameter_count(network("wrn", classes=100, depth=70, width=16, activation="silu"))
    assert cifar100 == wrn(70, 16, classes=100)
    assert parameter_count(network("mobilenet_v2", channels=1)) == 2_296_922 - 2 * 9 * 32
    assert mobilenet(projects=False) == 2_237_770, "the paper's network, which has no such shortcuts"


def test_trades_small_network_has_312202_parameters():
    convolutions = sum(9 * i * o + o for i, o in ((1, 32), (32, 32), (32, 64), (64, 64)))
    hidden = linear(64 * 4 * 4, 200) + linear(200, 200) + linear(200, 10)
    assert parameter_count(network("small_cnn", channels=1)) == convolutions + hidden == 312_202


@pytest.mark.parametrize(
    ("width", "channels"),
    [(0.5, [16, 8, 16, 16, 32, 48, 80, 160, 1280]), (1.4, [48, 24, 32, 48, 88, 136, 224, 448, 1792])],
)
def test_a_width_multiplier_keeps_channels_at_multiples_of_8(width, channels):
    model = network("mobilenet_v2", width=width)
    starts = (0, 1, 3, 6, 10, 13, 16)  # the first block of each stage
    found = [model.conv1.out_channels, *(model.layers[i].conv3.out_channels for i in starts), model.conv2.out_channels]
    assert found == channels


# --- every architecture -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_architecture_maps_images_of_any_shape_to_logits(variant):
    name, settings = VARIANTS[variant]
    least = SMALLEST.get(name, 1)
    for shape, classes in (((1, 8, 8), 10), ((3, 9, 14), 2), ((3, 17, 32), 4), ((2, 28, 28), 3)):
        if min(shape[1:]) < least:
            continue
        model = create_model(name, input_shape=shape, num_classes=classes, **settings).eval()
        logits = model(images(BATCH, shape, dtype=torch.float32))
        assert logits.shape == (BATCH, classes)
        assert torch.isfinite(logits).all()
        assert model.architecture.name == name
        assert parameter_count(model) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_every_parameter_and_the_image(variant):
    model, x = small(variant).train(), images(BATCH, (3, 18, 21)).requires_grad_(True)
    F.cross_entropy(model(x), torch.arange(BATCH) % CLASSES).backward()
    assert x.grad is not None
    assert (x.grad.flatten(1).abs().amax(1) > 0).all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_seed_alone_decides_the_weights(variant):
    name, settings = VARIANTS[variant]
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first, again, other = (
        create_model(name, input_shape=(3, 18, 21), num_classes=CLASSES, seed=seed, **settings) for seed in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    weights = [p for p in first.parameters() if p.ndim > 1]
    others = [p for p in other.parameters() if p.ndim > 1]
    assert not any(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_attacked_network_computes_the_same_the_fast_way(variant):
    model = small(variant).float()
    x, other = (images(2 * BATCH, (3, 18, 21), seed=seed, dtype=torch.float32) for seed in (0, 5))
    expected = answers(model, other)
    with frozen(model, x):
        for a, b in zip(answers(model, other), expected, strict=True):
            assert (a - b).norm() <= 1e-4 * b.norm()
    assert all(torch.equal(a, b) for a, b in zip(answers(model, other), expected, strict=True)), "as it was before"


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_sample_does_not_depend_on_its_batch(name):
    model, x = small(name), images(BATCH, (3, 18, 21))
    torch.testing.assert_close(model(x)[2:5], model(x[2:5]))


# --- networks written out ---------------------------------------------------------------------------------------------


class Written:
    """A network's parts computed from its tensors alone, without its modules."""

    def __init__(self, tensors):
        self.tensors = tensors

    def conv(self, z, name, stride=1, padding=None, groups=1):
        kernel = self.tensors[f"{name}.weight"]
        padding = kernel.shape[-1] // 2 if padding is None else padding
        return F.conv2d(z, kernel, self.tensors.get(f"{name}.bias"), stride=stride, padding=padding, groups=groups)

    def norm(self, z, name):
        mean, var, gain, bias = (
            self.tensors[f"{name}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (z - mean) / (var + 1e-5).sqrt() * gain + bias

    def linear(self, z, name):
        return z @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]


def relu(z):
    return z.clamp(min=0)


def silu(z):
    return z / (1 + (-z).exp())


def write_wrn(w, x, settings):
    act = silu if settings.get("activation") == "silu" else relu
    z = w.conv(x, "conv1")
    for stage in (1, 2, 3):
        for block in range((settings["depth"] - 4) // 6):
            at, stride = f"block{stage}.layer.{block}", 2 if stage > 1 and block == 0 else 1
            inner = act(w.norm(z, f"{at}.bn1"))
            shortcut = w.conv(inner, f"{at}.convShortcut", stride) if f"{at}.convShortcut.weight" in w.tensors else z
            if settings.get("padding") == "same" and stride == 2:
                # TensorFlow: the output has ceil(H / 2) rows, what is missing is added, the odd row below.
                missing = [max((-(-n // 2) - 1) * 2 + 3 - n, 0) for n in inner.shape[2:]]
                (top, bottom), (left, right) = ((m // 2, m - m // 2) for m in missing)
                inner = w.conv(F.pad(inner, (left, right, top, bottom)), f"{at}.conv1", 2, padding=0)
            else:
                inner = w.conv(inner, f"{at}.conv1", stride)
            z = shortcut + w.conv(act(w.norm(inner, f"{at}.bn2")), f"{at}.conv2")
    return w.linear(act(w.norm(z, "bn1")).mean((2, 3)), "fc")


def write_preact(w, x, settings):
    z = w.conv(x, "conv1")
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            inner = relu(w.norm(z, f"{at}.bn1"))
            shortcut = z if stride == 1 else w.conv(inner, f"{at}.shortcut.0", stride)
            z = w.conv(relu(w.norm(w.conv(inner, f"{at}.conv1", stride), f"{at}.bn2")), f"{at}.conv2") + shortcut
    if settings.get("final_norm"):
        z = relu(w.norm(z, "bn"))
    return w.linear(z.mean((2, 3)), "linear")


def write_resnet50(w, x, settings):
    z = relu(w.norm(w.conv(x, "conv1"), "bn1"))
    for stage, count in zip((1, 2, 3, 4), (3, 4, 6, 3), strict=True):
        for block in range(count):
            at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            shortcut = w.norm(w.conv(z, f"{at}.shortcut.0", stride), f"{at}.shortcut.1") if block == 0 else z
            inner = relu(w.norm(w.conv(z, f"{at}.conv1"), f"{at}.bn1"))
            inner = relu(w.norm(w.conv(inner, f"{at}.conv2", stride), f"{at}.bn2"))
            z = relu(w.norm(w.conv(inner, f"{at}.conv3"), f"{at}.bn3") + shortcut)
    return w.linear(z.mean((2, 3)), "linear")


def write_cifar_resnet(w, x, settings):
    z = relu(w.norm(w.conv(x, "conv1"), "bn1"))
    for stage in (1, 2, 3):
        for block in range((settings["depth"] - 2) // 6):
            at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            if stride == 1:
                shortcut = z
            elif settings.get("shortcut") == "projection":
                shortcut = w.norm(w.conv(z, f"{at}.shortcut.0", 2), f"{at}.shortcut.1")
            else:  # as many zeros on both sides, the odd one behind
                fewer = torch.zeros_like(z[:, : z.shape[1] // 2, ::2, ::2])
                more = torch.zeros_like(z[:, : z.shape[1] - z.shape[1] // 2, ::2, ::2])
                shortcut = torch.cat([fewer, z[:, :, ::2, ::2], more], 1)
            inner = relu(w.norm(w.conv(z, f"{at}.conv1", stride), f"{at}.bn1"))
            z = relu(w.norm(w.conv(inner, f"{at}.conv2"), f"{at}.bn2") + shortcut)
    return w.linear(z.mean((2, 3)), "linear")


def write_mobilenet(w, x, settings):
    z = relu(w.norm(w.conv(x, "conv1"), "bn1"))
    strides = [1, 1, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1]
    for index, stride in enumerate(strides):
        at = f"layers.{index}"
        inner = relu(w.norm(w.conv(z, f"{at}.conv1"), f"{at}.bn1"))
        inner = relu(w.norm(w.conv(inner, f"{at}.conv2", stride, groups=inner.shape[1]), f"{at}.bn2"))
        inner = w.norm(w.conv(inner, f"{at}.conv3"), f"{at}.bn3")
        if f"{at}.shortcut.0.weight" in w.tensors:
            inner = inner + w.norm(w.conv(z, f"{at}.shortcut.0"), f"{at}.shortcut.1")
        elif stride == 1:
            inner = inner + z
        z = inner
    return w.linear(relu(w.norm(w.conv(z, "conv2"), "bn2")).mean((2, 3)), "linear")


def write_small_cnn(w, x, settings):
    z = x
    for number in (1, 2, 3, 4):
        z = relu(w.conv(z, f"feature_extractor.conv{number}", padding=0))
        if number in (2, 4):
            z = z.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
    assert z.shape[2:] == (4, 4)
    z = relu(w.linear(z.flatten(1), "classifier.fc1"))
    return w.linear(relu(w.linear(z, "classifier.fc2")), "classifier.fc3")


WRITTEN = {
    "wrn": write_wrn,
    "wrn with silu": write_wrn,
    "wrn no wider than its stem": write_wrn,
    "preact_resnet18": write_preact,
    "preact_resnet18 with a last norm": write_preact,
    "resnet50": write_resnet50,
    "cifar_resnet": write_cifar_resnet,
    "cifar_resnet with projections": write_cifar_resnet,
    "mobilenet_v2": write_mobilenet,
    "small_cnn": write_small_cnn,
}


@pytest.mark.parametrize("variant", WRITTEN)
def test_logits_are_those_of_the_network_written_out(variant):
    for shape in ((3, 28, 28),) if variant == "small_cnn" else ((3, 18, 21), (1, 16, 16)):
        model, x = small(variant, shape), images(BATCH, shape)
        expected = WRITTEN[variant](Written(model.network.state_dict()), x, VARIANTS[variant][1])
        torch.testing.assert_close(model(x), expected)
        assert expected.std(0).min() > 1e-4, "the logits depend on the image"


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("wrn", {"depth": 30}, r"model wrn: depth: must be 6 n \+ 4 .* such as 16, 28, 34 or 70, got 30\."),
        ("wrn", {"activation": "gelu"}, r"model wrn: activation: .*'relu' or 'silu', got 'gelu'"),
        ("cifar_resnet", {"depth": 18}, r"model cifar_resnet: depth: must be 6 n \+ 2 .*, got 18\."),
        ("mobilenet_v2", {"width": 0}, r"model mobilenet_v2: width: .*greater than 0, got 0"),
        ("small_cnn", {}, r"model small_cnn: takes images of 16x16 or more, got 15x20\."),
    ],
)
def test_an_impossible_network_is_refused_in_one_line(name, settings, message):
    with pytest.raises(InputError, match=message) as error:
        create_model(name, input_shape=(3, 15, 20), num_classes=CLASSES, **settings)
    assert "\n" not in str(error.value)


def test_dropout_is_off_unless_it_is_asked_for():
    model, x = small("small_cnn").train(), images(BATCH, (3, 18, 21))
    assert torch.equal(model(x), model(x))
    assert [m.p for m in small("small_cnn", dropout=0.5).modules() if isinstance(m, nn.Dropout)] == [0.5]
