import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from crdnd import ImageData, Splits, ThreatModel, create_model, distill, train
from crdnd.data import augment
from crdnd.engine import Progress, Run
from crdnd.engine import levers as engine_levers
from crdnd.engine.levers import BATCHES_COMPARED, Levers, Memory, checkpointed
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
    student, teacher = resnet(1, torch.float64), Apart(resnet(2, torch.float64))
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
        "keep_teacher": "off: no teacher is asked about natural images",
    }
    train(TinyNet(), splits(), out=tmp_path / "off", **settings(objective="trades", levers=PLAIN))
    report = found(tmp_path / "off")
    assert {report[name] for name in ("fused_optimizer", "fold", "keep_teacher")} == {"off: as set"}
    distill(TinyNet(), splits(), teacher=Apart(TinyNet(seed=2)), out=tmp_path / "taught", **settings())
    assert found(tmp_path / "taught")["keep_teacher"] == "on: at most 64 MiB"


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


class Apart(nn.Module):
    """A teacher that looks at every image by itself: on no processor do others of the batch change its rounding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.model(image[None].clone()) for image in x])


class Asked(Recorder):
    """A teacher that knows in which steps it was asked about a batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.steps: list[int] = []
        self.halves = 0

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        self.halves += len(x) == BATCH // 2
        self.inputs = [one for one in self.inputs if len(one) == BATCH]  # others are probes
        return z

    def after_step(self, _: Progress) -> None:
        self.steps.append(len(self.inputs) - sum(self.steps))


def asked(out, **changes: Any) -> tuple[list[int], Run]:
    """How often the teacher was asked in each step of a run, and the run."""
    teacher = Asked(Apart(TinyNet(seed=2)))
    common = settings(**changes)
    run = distill(TinyNet(seed=1), splits(), teacher=teacher, out=out, listener=teacher.after_step, **common)
    return teacher.steps, run


def test_a_teacher_is_asked_about_an_image_until_its_answer_is_sure_and_nothing_changes(tmp_path):
    always, plain = asked(tmp_path / "0", epochs=12, levers={"keep_teacher": 0})
    seldom, kept = asked(tmp_path / "1", epochs=12)
    assert always == [1] * 36
    # Four batches of images have to come out alike first; an image that an epoch left out is new with all its batch.
    assert seldom[:6] == [1] * 6
    assert sum(seldom[6:]) < 6
    assert seldom[18:] == [0] * 18
    assert all(torch.equal(plain.model.state_dict()[key], value) for key, value in kept.model.state_dict().items())
    # Passes are those that the method asks for.
    assert [epoch.teacher_passes for epoch in kept.history] == [epoch.teacher_passes for epoch in plain.history]


def test_in_a_phase_with_augmentation_nothing_is_recalled(tmp_path):
    phases = [{"name": "none", "until": 0.5}, {"name": "shift", "until": 0.75}, {"name": "none"}]
    always, plain = asked(tmp_path / "0", epochs=24, augmentation=phases, levers={"keep_teacher": 0})
    seldom, kept = asked(tmp_path / "1", epochs=24, augmentation=phases)
    assert always == [1] * 72
    assert seldom[18:] == [0] * 18 + [1] * 18 + [0] * 18
    assert all(torch.equal(plain.model.state_dict()[key], value) for key, value in kept.model.state_dict().items())


def test_a_run_that_goes_on_asks_again_and_ends_in_the_same_weights_and_passes(tmp_path):
    class StopError(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.step == 31:
            raise StopError

    common = settings(epochs=12, save_every_steps=1, objective="mtard", repair=True)
    teachers: dict[str, Any] = {"teacher": TinyNet(seed=2), "second_teacher": TinyNet(seed=3)}
    whole = distill(TinyNet(seed=1), splits(), out=tmp_path / "whole", **teachers, **common)
    with pytest.raises(StopError):
        distill(TinyNet(seed=1), splits(), out=tmp_path / "run", listener=stop, **teachers, **common)
    # An older version kept nothing; that is no other run.
    run = distill(
        TinyNet(seed=1), splits(), out=tmp_path / "run", **teachers, **common, levers={"keep_teacher": 0}
    )  # fmt: skip
    assert all(torch.equal(whole.model.state_dict()[key], value) for key, value in run.model.state_dict().items())
    assert [epoch.teacher_passes for epoch in run.history] == [epoch.teacher_passes for epoch in whole.history]


def test_what_was_kept_of_whole_batches_is_not_used_in_micro_batches(tmp_path):
    class Narrow(TinyNet):
        passes = 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += self.training
            if self.training and self.passes > 80 and len(x) > 2:
                raise torch.OutOfMemoryError("out of memory: Tried to allocate 2 GiB")
            return super().forward(x)

    teacher = Asked(Apart(TinyNet(seed=2)))
    distill(
        Narrow(seed=1), splits(), teacher=teacher, out=tmp_path / "run", listener=teacher.after_step,
        **settings(epochs=20),
    )  # fmt: skip
    document = json.loads((tmp_path / "run" / "run.json").read_text())
    (change,) = document["changes"]
    assert change["what"] == "micro_batch"
    assert teacher.steps[change["step"] - 5 : change["step"]] == [0] * 5
    assert teacher.halves == 2 * (60 - change["step"])
    assert document["levers"]["keep_teacher"] == "on: at most 64 MiB"


class Neighbourly(TinyNet):
    """What it says of an image depends on the batch's first one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x[:1])


UNFIT: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], str]] = {
    "neighbours": (Neighbourly, {}, "off: an image's answer depends on the others of its batch"),
    "augmentation": (TinyNet, {"augmentation": "shift"}, "off: augmentation changes the images"),
    "slope": (TinyNet, {"attack": {"loss": "linear_teacher"}}, "off: the attack asks for its slope"),
    "one epoch": (TinyNet, {"epochs": 1}, "off: there is one epoch"),
    "micro-batches": (TinyNet, {"micro_batch": 2}, "off: micro-batches differ in size"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_cannot_be_kept_is_asked_again_in_every_epoch(name, tmp_path):
    make, changes, says = UNFIT[name]
    runs = []
    for kept in (0, 1):
        common = settings(**{"epochs": 10} | changes, levers={"keep_teacher": kept})
        run = distill(TinyNet(seed=1), splits(), teacher=make(seed=2), out=tmp_path / str(kept), **common)
        runs.append(run.model.state_dict())
    assert found(tmp_path / "1")["keep_teacher"] == says
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


def memory_of(samples: int, bound: float = 1e6) -> tuple[Memory, Levers]:
    levers = Levers()
    return Memory(samples, bound, levers), levers


def test_an_answer_is_recalled_when_enough_of_them_came_out_alike_in_other_batches():
    (memory, levers), views = memory_of(6), images(6, (5,))
    together = torch.tensor([4, 0, 2])
    for count in range(2 + BATCHES_COMPARED):
        assert (memory.recall(together) is None) == (count < 1 + BATCHES_COMPARED)
        memory.keep(together, {"t_nat": views[together]})
    assert levers.found == {}
    changed = views[together] + torch.tensor([[0.0], [1e-12], [0.0]])
    memory.keep(together, {"t_nat": changed})
    assert memory.recall(together) is None
    assert levers.found == {"keep_teacher": "off: an image's answer depends on the others of its batch"}


def test_a_memory_keeps_views_of_natural_images_within_its_bound():
    ids = torch.tensor([4, 0, 2])
    views = {"t_nat": images(3, (5,)), "t_adv": images(3, (5,)), "t_nat_features": images(3, (2,))}
    size = 7 * (5 + 2) * 8
    (memory, levers), (full, said) = memory_of(7, size), memory_of(7, size - 1)
    for one in (memory, full):
        for _ in range(1 + BATCHES_COMPARED):
            assert one.recall(ids) is None
            one.keep(ids, views)
    assert full.recall(ids) is None
    assert (levers.found, said.found) == ({}, {"keep_teacher": "off: it would take 0.000374 MiB"})
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
