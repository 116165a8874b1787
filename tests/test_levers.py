import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from crdnd import ImageData, Splits, ThreatModel, create_model, distill, train
from crdnd.data import augment
from crdnd.engine import levers as engine_levers
from crdnd.engine.levers import Levers, Memory, checkpointed
from crdnd.engine.step import Step
from crdnd.engine.weights import put_back, statistics
from crdnd.errors import InputError
from crdnd.objectives import INNER_LOSSES, Sizes, load_objective, objective_names
from crdnd.random import Stream
from support import CLASSES, FEATURES, SHAPE, TEACHER_FEATURES, Recorder, TinyNet, images

torch.set_num_threads(1)

THREAT = ThreatModel(norm="linf", eps=0.1)
COUNT, BATCH = 13, 4
PLAIN = {"fold": False, "channels_last": False, "fused_optimizer": False, "keep_teacher": 0}


def splits(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64) -> Splits:
    def part(size: int, seed: int) -> ImageData:
        return ImageData(images(size, shape, seed=seed, dtype=dtype), torch.arange(size) % CLASSES, CLASSES)

    return Splits(part(COUNT, 1), part(7, 2))


def settings(**changes: Any) -> dict[str, Any]:
    common = {"objective": "rslad", "threat": THREAT, "epochs": 2, "batch_size": BATCH, "select": "last"}
    return common | {"attack": {"steps": 2}, "check_teacher": False, "validate_every": 2} | changes


def found(folder) -> dict[str, str]:
    return json.loads((folder / "run.json").read_text())["levers"]


# Each lever changes nothing but rounding


def resnet(seed: int, dtype: torch.dtype) -> nn.Module:
    """Wide enough in its last stage for tiles."""
    return create_model("resnet18", input_shape=(3, 32, 32), num_classes=CLASSES, width=16, seed=seed).to(dtype)


LEVERS: dict[str, dict[str, Any]] = {
    "fold": {"fold": True},
    "channels_last": {"channels_last": True},
    "fused_optimizer": {"fused_optimizer": True},
    "keep_teacher": {"keep_teacher": 1},
    "all": {"fold": True, "channels_last": None, "fused_optimizer": True, "keep_teacher": 1},
}


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return trained(PLAIN, tmp_path_factory.mktemp("plain") / "run")


def trained(levers: dict[str, Any], out) -> dict[str, Tensor]:
    student, teacher = resnet(1, torch.float64), resnet(2, torch.float64)
    data = splits((3, 32, 32))
    return distill(student, data, teacher=teacher, out=out, **settings(levers=levers)).model.state_dict()


@pytest.mark.parametrize("name", LEVERS)
def test_a_lever_changes_a_run_by_rounding_alone(name, plain_run, tmp_path):
    state = trained(PLAIN | LEVERS[name], tmp_path / "run")
    report = found(tmp_path / "run")
    for lever in LEVERS[name]:
        assert report.get(lever, "on").startswith("on"), report
    for key, value in plain_run.items():
        assert (state[key] - value).abs().max() <= 1e-9 * (1 + value.abs().max()), key
    if name == "keep_teacher":
        assert all(torch.equal(state[key], value) for key, value in plain_run.items())


def test_a_run_says_what_became_of_its_levers(tmp_path):
    train(TinyNet(), splits(), out=tmp_path / "on", **settings(objective="trades"))
    assert found(tmp_path / "on") == {
        "precision": "fp32",
        "tf32": "off",
        "deterministic": "off",
        "checkpoint_teacher": "off",
        "fused_optimizer": "on",
        "fold": "on: 1 convolutions as products, 1 convolutions with channels last",
        "compile": "off",
        "keep_teacher": "off: as set",
    }
    train(TinyNet(), splits(), out=tmp_path / "off", **settings(objective="trades", levers=PLAIN))
    report = found(tmp_path / "off")
    assert {report[name] for name in ("fused_optimizer", "fold", "keep_teacher")} == {"off: as set"}


def test_an_optimiser_without_a_fused_kernel_is_the_plain_one_and_says_so(tmp_path, monkeypatch, caplog):
    kind = torch.optim.SGD

    def refuses(trained: Any, *, fused: bool = False, **values: Any) -> torch.optim.Optimizer:
        if fused:
            raise RuntimeError("no kernel for this\nand more")
        return kind(trained, **values)

    monkeypatch.setattr(torch.optim, "SGD", refuses)
    run = train(TinyNet(), splits(), out=tmp_path / "run", **settings(objective="natural", attack={}))
    assert found(tmp_path / "run")["fused_optimizer"] == "off: no kernel for this"
    assert "fused_optimizer is off: no kernel for this" in caplog.text
    assert len(run.history) == 2


# What teachers say of natural images


def test_a_teacher_is_asked_about_an_image_once_and_nothing_changes(tmp_path):
    runs, passes = [], []
    for kept in (0, 1):
        student, teacher = TinyNet(seed=1), TinyNet(seed=2)
        common = settings(epochs=4, levers={"keep_teacher": kept})
        run = distill(student, splits(), teacher=teacher, out=tmp_path / str(kept), **common)
        runs.append(run.model.state_dict())
        passes.append([epoch.teacher_passes for epoch in run.history])
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])
    # An image that the first epoch left out is new in the second, with all its batch; by the fourth none is.
    assert passes[0] == [1, 1, 1, 1]
    assert passes[1][0] == 1
    assert sum(passes[1]) < 2.5


def test_what_was_kept_of_whole_batches_is_not_used_in_micro_batches(tmp_path):
    class Narrow(TinyNet):
        passes = 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += self.training
            if self.training and self.passes > 30 and len(x) > 2:
                raise torch.OutOfMemoryError("out of memory: Tried to allocate 2 GiB")
            return super().forward(x)

    run = distill(
        Narrow(seed=1), splits(), teacher=TinyNet(seed=2), out=tmp_path / "run",
        **settings(epochs=20, levers={"keep_teacher": 1}),
    )  # fmt: skip
    passes = [epoch.teacher_passes for epoch in run.history]
    assert min(passes) == 0
    assert passes[-1] == 1
    document = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [change["what"] for change in document["changes"]] == ["micro_batch"]
    assert document["levers"]["keep_teacher"] == "on: at most 1 MiB"


class Neighbourly(TinyNet):
    """What it says of an image depends on the batch's first one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x[:1])


UNFIT: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], str]] = {
    "neighbours": (Neighbourly, {}, "off: an image's answer depends on its place in the batch"),
    "augmentation": (TinyNet, {"augmentation": "shift"}, "off: augmentation changes the images"),
    "slope": (TinyNet, {"attack": {"loss": "linear_teacher"}}, "off: the attack asks for its slope"),
    "one epoch": (TinyNet, {"epochs": 1}, "off: there is one epoch"),
    "micro-batches": (TinyNet, {"micro_batch": 2}, "off: micro-batches differ in size"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_cannot_be_kept_is_asked_again_in_every_epoch(name, tmp_path):
    make, changes, says = UNFIT[name]
    common = settings(levers={"keep_teacher": 1}, **changes)
    run = distill(TinyNet(seed=1), splits(), teacher=make(seed=2), out=tmp_path / "run", **common)
    assert found(tmp_path / "run")["keep_teacher"] == says
    assert len({epoch.teacher_passes for epoch in run.history}) == 1


def test_a_memory_keeps_views_of_natural_images_within_its_bound():
    ids = torch.tensor([4, 0, 2])
    views = {"t_nat": images(3, (5,)), "t_adv": images(3, (5,)), "t_nat_features": images(3, (2,))}
    size = 7 * (5 + 2) * 8
    memory, full = Memory(7, size), Memory(7, size - 1)
    for one in (memory, full):
        assert one.recall(ids) is None
        one.keep(ids, views)
    assert full.recall(ids) is None
    known = memory.recall(ids.flip(0))
    assert known is not None
    assert known.keys() == {"t_nat", "t_nat_features"}
    assert all(torch.equal(view, views[name].flip(0)) for name, view in known.items())
    assert memory.recall(torch.tensor([4, 1])) is None


# The compiler


class Crashes:
    def __init__(self, network: nn.Module, after: int) -> None:
        self.network, self.left = network, after

    def __call__(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("no compiler here\nand more")
        return self.network(x)


@pytest.mark.parametrize("after", [0, 3])
def test_without_a_compiler_a_run_goes_on_as_it_is_with_one_line(after, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", lambda network, mode: Crashes(network, after))
    runs = []
    for compiles in (True, False):
        levers = PLAIN | {"compile": compiles}
        out = tmp_path / str(compiles)
        common = settings(levers=levers)
        runs.append(distill(TinyNet(seed=1), splits(), teacher=TinyNet(seed=2), out=out, **common).model.state_dict())
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])
    assert found(tmp_path / "True")["compile"] == "off: RuntimeError: no compiler here"
    assert caplog.text.count("no compiler here") == 1


def test_a_compiler_whose_networks_need_too_much_memory_is_asked_again_with_fewer_images(tmp_path, monkeypatch):
    def narrow(network: nn.Module, mode: str | None) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            if len(x) > 2:
                raise torch.OutOfMemoryError("out of memory: Tried to allocate 2 GiB")
            return network(x)

        return call

    monkeypatch.setattr(torch, "compile", narrow)
    common = settings(levers=PLAIN | {"compile": True})
    distill(TinyNet(seed=1), splits(), teacher=TinyNet(seed=2), out=tmp_path / "run", **common)
    document = json.loads((tmp_path / "run" / "run.json").read_text())
    assert document["levers"]["compile"] == "on"
    assert [(change["what"], change["value"]) for change in document["changes"]] == [("micro_batch", 2)]


def test_a_compiler_compiles_each_network_once_and_its_result_counts(tmp_path, monkeypatch):
    compiled: list[nn.Module] = []

    def doubles(network: nn.Module, mode: str | None) -> Callable[[Tensor], Tensor]:
        compiled.append(network)
        assert mode is None
        return lambda x: 2 * network(x)

    monkeypatch.setattr(torch, "compile", doubles)
    student, teacher = TinyNet(seed=1), TinyNet(seed=2)
    step = Step(
        student, teacher, load_objective("rslad")(CLASSES), None, THREAT,
        call=engine_levers.Compiled(Levers(), graphs=False),
    )  # fmt: skip
    x = images(BATCH)
    for _ in range(2):
        assert torch.equal(step.call(student, x), 2 * student(x))
        assert torch.equal(step.call(teacher, x), 2 * teacher(x))
    assert compiled == [student, teacher]


# Teachers in the attack, with less memory


def test_a_checkpointed_teacher_is_computed_again_and_says_the_same(tmp_path):
    runs, looks = [], []
    for checkpoints in (False, True):
        levers = PLAIN | {"checkpoint_teacher": checkpoints}
        teacher = Recorder(TinyNet(seed=2))
        run = distill(
            TinyNet(seed=1), splits(), teacher=teacher, out=tmp_path / str(checkpoints),
            **settings(objective="adaad", levers=levers),
        )  # fmt: skip
        runs.append(run.model.state_dict())
        looks.append(len(teacher.inputs))
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])
    steps, attack_steps = 2 * (COUNT // BATCH), 2
    assert looks[1] - looks[0] >= steps * attack_steps


def test_a_network_of_blocks_keeps_what_goes_into_each_and_is_left_as_it_was():
    network = create_model("wrn", input_shape=(3, 8, 8), num_classes=CLASSES, depth=10, width=1, seed=1).double().eval()
    x, kept = images(BATCH, (3, 8, 8)), {}

    def gradient() -> Tensor:
        z, sizes = x.clone().requires_grad_(True), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            loss = network(z).square().sum()
        kept[len(kept)] = sum(sizes)
        return torch.autograd.grad(loss, z)[0]

    plain = gradient()
    with checkpointed(network):
        torch.testing.assert_close(gradient(), plain, rtol=0, atol=0)
        assert sum("forward" in vars(module) for module in network.modules()) == 3
    assert kept[1] < kept[0] / 2
    assert not any("forward" in vars(module) for module in network.modules())


# Precision


@pytest.mark.parametrize("name", objective_names())
def test_every_method_works_in_bf16_with_its_losses_in_float32(name):
    sizes = Sizes(FEATURES, TEACHER_FEATURES, 400)
    objective = load_objective(name)(CLASSES, sizes=sizes)
    networks = [
        TinyNet(seed=seed, dtype=torch.float32, features=width)
        for seed, width in enumerate((FEATURES, TEACHER_FEATURES, TEACHER_FEATURES))
    ]
    step = Step(
        networks[0], networks[1].eval(), objective, objective.attack, THREAT,
        lambda: torch.autocast("cpu", torch.bfloat16), networks[2].eval(),
    )  # fmt: skip
    x, y, ids = images(BATCH, dtype=torch.float32), torch.arange(BATCH), torch.arange(BATCH)
    terms, views = step(x, y, Stream.of("test", ids=ids), 0.5)
    assert {term.dtype for term in terms.terms.values()} == {torch.float32}
    terms.total.backward()
    assert all(parameter.grad.isfinite().all() for parameter in networks[0].parameters())
    with torch.no_grad():
        objective.observe(views)


def test_tf32_is_for_training_alone_and_the_process_keeps_its_own_flags(tmp_path):
    def flags() -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.are_deterministic_algorithms_enabled()

    before, seen = flags(), []

    class Looks(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.training, *flags()))
            return super().forward(x)

    common = settings(objective="natural", attack={}, tf32=True, deterministic=True)
    train(Looks(), splits(), out=tmp_path / "run", **common)
    assert set(seen) >= {(True, True, True), (False, False, True)}
    assert (True, False, True) not in seen
    assert flags() == before
    report = found(tmp_path / "run")
    assert report["tf32"] == "off: the device has none"
    assert report["deterministic"] == "on"


# No waiting


class NoQuestions(TorchDispatchMode):
    """Refuses whatever would stop a GPU's queue to look at a number."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        asks = name.startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.item", "aten.masked_select"))
        masks = name.startswith("aten.index") and any(
            isinstance(index, Tensor) and index.dtype is torch.bool
            for one in args
            if isinstance(one, list)
            for index in one
        )
        if asks or masks:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", objective_names())
def test_a_step_asks_the_device_for_no_number(name):
    objective = load_objective(name)(CLASSES, sizes=Sizes(FEATURES, TEACHER_FEATURES, 400))
    student, teacher, second = (TinyNet(seed=seed, features=width) for seed, width in
                                enumerate((FEATURES, TEACHER_FEATURES, TEACHER_FEATURES)))  # fmt: skip
    step = Step(student, teacher, objective, objective.attack, THREAT, second_teacher=second, igdm=None)
    x, y, ids = images(BATCH), torch.arange(BATCH), torch.arange(BATCH)
    with NoQuestions():
        terms, views = step(x, y, Stream.of("test", ids=ids), 0.5)
        terms.total.backward()
        with torch.no_grad():
            objective.observe(views)


@pytest.mark.parametrize("name", ["rslad", "crd"])  # the second relates samples
def test_a_step_in_micro_batches_asks_the_device_for_no_number(name):
    objective = load_objective(name)(CLASSES, sizes=Sizes(FEATURES, TEACHER_FEATURES, 400))
    student, teacher = TinyNet(seed=1, features=FEATURES), TinyNet(seed=2, features=TEACHER_FEATURES)
    step = Step(student, teacher, objective, objective.attack, THREAT)
    x, y, ids = images(BATCH), torch.arange(BATCH), torch.arange(BATCH)
    with NoQuestions():
        before = statistics(student)
        batch = step.prepare(x, y, Stream.of("test", ids=ids), 0.5, micro_batch=3)
        step.backward(batch, 3)
        put_back(student, before)


@pytest.mark.parametrize("loss", INNER_LOSSES)
def test_no_training_attack_asks_the_device_for_a_number(loss):
    objective = load_objective("rslad")(CLASSES)
    attack = objective.attack.model_copy(update={"loss": loss, "restarts": 2, "steps": 2, "start": "uniform"})
    step = Step(TinyNet(seed=1), TinyNet(seed=2), objective, attack, THREAT, repair=True, igdm=1.0)
    x, y, ids = images(BATCH), torch.arange(BATCH), torch.arange(BATCH)
    with NoQuestions():
        step(x, y, Stream.of("test", ids=ids), 0.5)[0].total.backward()


@pytest.mark.parametrize("kind", ["shift", "crop_flip", "cropshift", "random_erasing", "idbh_weak", "mixup", "cutmix"])
def test_no_augmentation_asks_the_device_for_a_number(kind):
    x, ids = images(BATCH, (3, 16, 16)), torch.arange(BATCH)
    with NoQuestions():
        augment(x, torch.arange(BATCH), CLASSES, kind, Stream.of("test", ids=ids))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("name", objective_names())
def test_a_step_on_a_gpu_never_waits(name, micro_batch):
    objective = load_objective(name)(CLASSES, sizes=Sizes(FEATURES, TEACHER_FEATURES, 400)).cuda()
    student, teacher, second = (TinyNet(seed=seed, features=width).cuda() for seed, width in
                                enumerate((FEATURES, TEACHER_FEATURES, TEACHER_FEATURES)))  # fmt: skip
    step = Step(student, teacher, objective, objective.attack, THREAT, second_teacher=second)
    x, y, ids = images(BATCH).cuda(), torch.arange(BATCH).cuda(), torch.arange(BATCH).cuda()
    for mode in ("default", "error"):  # the first step makes what libraries need
        torch.cuda.set_sync_debug_mode(mode)
        try:
            before = statistics(student)
            batch = step.prepare(x, y, Stream.of("test", ids=ids), 0.5, micro_batch=micro_batch)
            _, views = step.backward(batch, micro_batch)
            put_back(student, before)
            with torch.no_grad():
                objective.observe(views)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_lever_that_is_misspelt_is_named(tmp_path):
    with pytest.raises(InputError, match=r"levers\.folds: no such setting.*fold"):
        train(TinyNet(), splits(), out=tmp_path / "run", **settings(levers={"folds": True}))


def test_levers_are_part_of_what_a_run_is(tmp_path):
    train(TinyNet(), splits(), out=tmp_path / "run", **settings(objective="trades"))
    with pytest.raises(InputError, match=r"levers\.fold: True -> False"):
        train(TinyNet(), splits(), out=tmp_path / "run", **settings(objective="trades", levers={"fold": False}))
