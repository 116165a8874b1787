import pytest
import torch
import torch.nn.functional as F

from crdnd.engine.step import logits_and_features
from crdnd.models import create_model, parameter_count
from support import BATCH, CLASSES, SHAPE, generator, images

WIDTH = 3


def resnet(shape=SHAPE, **settings):
    """Small, in float64, with batch norms as after training: statistics of images, weights that differ."""
    model = create_model("resnet18", input_shape=shape, num_classes=CLASSES, seed=1, **{"width": WIDTH} | settings)
    draws = generator(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=draws) + 0.5)
        model.double().train()
        for _ in range(20):  # the running statistics forget their start
            model(images(4 * BATCH, shape, seed=9))
    return model.eval()


def test_the_field_s_network_has_11173962_parameters():
    model = create_model("resnet18", input_shape=(3, 32, 32), num_classes=10)
    # Convolutions 3x3: 9 (3 64 + 4 64^2 + 64 128 + 3 128^2 + 128 256 + 3 256^2 + 256 512 + 3 512^2) = 10,987,200;
    # 1x1: 64 128 + 128 256 + 256 512 = 172,032; batch norms: 2 (5 64 + 5 (128 + 256 + 512)) = 9,600; linear: 5,130.
    assert parameter_count(model) == 10_987_200 + 172_032 + 9_600 + 5_130 == 11_173_962
    grey = create_model("resnet18", input_shape=(1, 28, 28), num_classes=7)
    assert parameter_count(grey) == 11_173_962 - 2 * 9 * 64 - 3 * 513


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 9, 14), (1, 1, 1)])
def test_images_of_any_shape_give_logits(shape):
    logits = resnet(shape)(images(BATCH, shape))
    assert logits.shape == (BATCH, CLASSES)
    assert torch.isfinite(logits).all()
    assert (logits.std(0) > 0).all(), "the logits depend on the image"


def test_the_images_sizes_through_the_stages():
    model, sizes = resnet((3, 32, 20)).network, []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        stage.register_forward_hook(lambda *call: sizes.append(tuple(call[2].shape[1:])))
    model(images(2, (3, 32, 20)))
    assert sizes == [(WIDTH, 32, 20), (2 * WIDTH, 16, 10), (4 * WIDTH, 8, 5), (8 * WIDTH, 4, 3)]


def by_hand(weights, x):
    """The network's logits from its tensors alone: (B, C, H, W) -> (B, K), and the features (B, 8w)."""

    def convolved(z, conv, bn, stride):
        """Zero padding keeps the image's size at stride 1; then z -> (z - mean) / sqrt(var + 1e-5) * weight + bias."""
        kernel = weights[f"{conv}.weight"]
        z = F.conv2d(z, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        mean, var, gain, bias = (
            weights[f"{bn}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (z - mean) / (var + 1e-5).sqrt() * gain + bias

    z = convolved(x, "conv1", "bn1", 1).clamp(min=0)
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            shortcut = z if stride == 1 else convolved(z, f"{at}.shortcut.0", f"{at}.shortcut.1", stride)
            z = convolved(z, f"{at}.conv1", f"{at}.bn1", stride).clamp(min=0)
            z = (convolved(z, f"{at}.conv2", f"{at}.bn2", 1) + shortcut).clamp(min=0)
    features = z.flatten(2).mean(2)
    return features @ weights["linear.weight"].T + weights["linear.bias"], features


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 9, 14)])
def test_logits_and_features_are_those_of_the_network_written_out(shape):
    model, x = resnet(shape), images(BATCH, shape)
    logits, captured = logits_and_features(model, x)
    expected, features = by_hand(model.network.state_dict(), x)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(captured, features)
    assert features.shape == (BATCH, 8 * WIDTH)
    assert logits.std(0).min() > 1e-3


def test_tensors_have_the_names_of_the_field_s_checkpoints():
    def norm(name):
        return {f"{name}.{key}" for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}

    names = {"conv1.weight", "linear.weight", "linear.bias"} | norm("bn1")
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            at = f"layer{stage}.{block}"
            names |= {f"{at}.conv1.weight", f"{at}.conv2.weight"} | norm(f"{at}.bn1") | norm(f"{at}.bn2")
        if stage > 1:
            names |= {f"layer{stage}.0.shortcut.0.weight"} | norm(f"layer{stage}.0.shortcut.1")
    assert set(resnet().network.state_dict()) == names
    assert len(names) == 122


def test_gradients_reach_every_parameter_and_the_image():
    model, x = resnet().train(), images().requires_grad_(True)
    F.cross_entropy(model(x), torch.arange(BATCH) % CLASSES).backward()
    assert x.grad is not None
    assert (x.grad.flatten(1).abs().amax(1) > 0).all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
