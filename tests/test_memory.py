"""Micro-batches: the same gradients as whole batches, and what a run does where memory or the disk is too small."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crdnd import InputError, RunError, Splits, distill, train
from crdnd.engine import Progress, loop, read_status
from crdnd.engine.checkpoint import read_checkpoint
from crdnd.engine.memory import out_of_memory
from crdnd.io import check_room
from crdnd.objectives import Views, load_objective, objective_names
from crdnd.random import Stream
from support import BATCH, CLASSES, TinyNet, images
from test_contracts import FORMS, IDS, LABELS, experienced, networks, random_views, step_of
from test_run import STEPS, cnn, content, equal, part, settings, splits

torch.set_num_threads(1)

OUT_OF_MEMORY = "[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"


class StopError(Exception):
    """What a listener may raise."""


# The gradients


class Dropping(nn.Module):
    """A network with dropout, which must drop the same units when a part is looked at again."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.dropout = network, nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.dropout(x) if self.training else x)


def gradients(name: str, parts: dict[str, Any], micro_batch: int | None, *, dropout: bool = False) -> dict[str, Any]:
    """What a step with that micro-batch leaves, of a method that has seen other batches before."""
    student, teacher, second = networks()
    if dropout:
        student = Dropping(student).train()
    step = step_of(name, student, teacher, second, parts)
    step.objective.load_state_dict(experienced(name, {}).state_dict())
    target = 0.6 * torch.eye(CLASSES, dtype=torch.float64)[LABELS] + 0.4 / CLASSES
    torch.manual_seed(5)
    batch = step.prepare(images(), LABELS, Stream.of("test", ids=IDS), 0.9, target, micro_batch=micro_batch)
    terms, views = step.backward(batch, micro_batch)
    with torch.no_grad():
        step.objective.observe(views)
    found = {f"student.{key}": value.grad for key, value in student.named_parameters()}
    found |= {f"method.{key}": value.grad for key, value in step.objective.named_parameters()}
    found |= {f"term.{key}": value.detach() for key, value in terms.terms.items()}
    found |= {f"state.{key}": value for key, value in step.objective.state_dict().items()}
    found["x_adv"] = batch.x_adv
    return found


@pytest.mark.parametrize("micro_batch", [2, 4, 5])
@pytest.mark.parametrize("name", objective_names())
def test_micro_batches_give_the_gradients_the_terms_and_the_memory_of_the_whole_batch(name, micro_batch):
    teachers = any(view.startswith("t_") for view in load_objective(name).needs)
    parts = {"igdm": 2.0, "repair": True} if teachers and load_objective(name).attack else {}
    whole, split = (gradients(name, parts, size) for size in (None, micro_batch))
    assert whole.keys() == split.keys()
    for key, value in whole.items():
        if value is None:
            assert split[key] is None, key
        elif value.is_floating_point():
            torch.testing.assert_close(split[key], value, rtol=1e-10, atol=1e-12, msg=key)
        else:
            assert torch.equal(split[key], value), key
    assert any(value is not None and value.abs().sum() > 0 for key, value in whole.items() if "student" in key)


@pytest.mark.parametrize("name", ["crdnd", "saad", "rslad"])
def test_a_part_that_is_looked_at_again_drops_the_same_units(name):
    step_by_part = gradients(name, {}, 4, dropout=True)
    student, teacher, second = networks()
    student = Dropping(student).train()
    step = step_of(name, student, teacher, second)
    step.objective.load_state_dict(experienced(name, {}).state_dict())
    target = 0.6 * torch.eye(CLASSES, dtype=torch.float64)[LABELS] + 0.4 / CLASSES
    torch.manual_seed(5)
    batch = step.prepare(images(), LABELS, Stream.of("test", ids=IDS), 0.9, target, micro_batch=4)
    # The same draws, one part after the other, with all graphs kept.
    seen = [step._student(part) for part in batch.parts(4)]
    after = torch.get_rng_state()
    views = batch.teachers | {key: torch.cat([part[key] for part in seen]) for key in seen[0]}
    step.objective(Views(LABELS, 0.9, views=views, target=target, draws=batch.draws)).total.backward()
    for key, value in student.named_parameters():
        torch.testing.assert_close(step_by_part[f"student.{key}"], value.grad, rtol=1e-10, atol=1e-12, msg=key)
    gradients(name, {}, 4, dropout=True)
    assert torch.equal(torch.get_rng_state(), after), "looking again takes no draws"


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_a_method_says_whether_it_relates_samples(name, form):
    objective, memories = load_objective(name), []
    for fresh in (True, False):
        made = experienced(name, form)
        if fresh and "started" in dict(made.named_buffers()):
            made.started.fill_(False)
        v = random_views(made.needs, progress=0.9)
        whole = made(v)
        for rows in torch.arange(BATCH).split(BATCH // 2):
            views = {key: v[key][rows] for key in made.needs}
            part = made(Views(v.y[rows], v.progress, views=views, draws=v.draws.take(rows)))
            memories += [torch.allclose(part.terms[key], whole.terms[key][rows], rtol=1e-9) for key in whole.terms]
    assert all(memories) != objective.relates_samples


def test_a_batch_is_split_evenly_and_never_into_parts_above_the_size():
    student, teacher, second = networks()
    step = step_of("rslad", student, teacher, second)
    batch = step.prepare(images(), LABELS, Stream.of("test", ids=IDS), 0.0)
    assert batch.parts(None) == batch.parts(BATCH) == [batch]
    assert [len(part.x) for part in batch.parts(5)] == [3, 3]
    assert [len(part.x) for part in batch.parts(4)] == [3, 3]
    assert [len(part.x) for part in batch.parts(2)] == [2, 2, 2]


def test_looking_again_leaves_the_statistics_as_one_look_does():
    def norms(name: str) -> list[int]:
        student = cnn().train()
        step = step_of(name, student, cnn(seed=4).eval(), cnn(seed=5).eval(), dtype=torch.float32)
        batch = step.prepare(images(dtype=torch.float32), LABELS, Stream.of("test", ids=IDS), 0.0, micro_batch=3)
        step.backward(batch, 3)
        return [module.num_batches_tracked.item() for module in student.modules() if hasattr(module, "running_mean")]

    # Two parts, each with x and x'; the attack is in eval mode and leaves no trace.
    assert set(norms("rslad")) == set(norms("crdnd")) == {4}


# A run without enough memory


class Narrow(nn.Module):
    """Has no memory for more than so many images at once while it learns, and moves a buffer before it says so."""

    def __init__(self, most: int, network: nn.Module | None = None, *, validating: bool = False) -> None:
        super().__init__()
        self.network = network or cnn()
        self.register_buffer("seen", torch.zeros(1))
        self.most, self.validating = most, validating

    def forward(self, x: Tensor) -> Tensor:
        if self.training != self.validating:
            self.seen += len(x) * self.training
            if len(x) > self.most:
                raise RuntimeError(OUT_OF_MEMORY)
        return self.network(x)


@pytest.mark.parametrize("method", ["pgd_at", "crdnd"])
def test_out_of_memory_a_run_goes_on_with_smaller_micro_batches(method, tmp_path):
    def go(name: str, most: int, **changes: Any) -> Any:
        common = settings(objective=method, attack={"steps": 1, "mode": "eval"}, batch_size=8, epochs=3) | changes
        if method == "pgd_at":
            return train(Narrow(most), splits(), out=tmp_path / name, **common)
        return distill(Narrow(most), splits(), teacher=cnn(seed=4), out=tmp_path / name, **common)

    found = go("narrow", 3)
    changes = read_checkpoint(tmp_path / "narrow").changes
    assert [(change.what, change.value, change.step) for change in changes] == [
        ("micro_batch", 4.0, 0),
        ("micro_batch", 2.0, 0),
    ]
    assert "can't allocate memory" in changes[0].why
    assert json.loads((tmp_path / "narrow" / "run.json").read_text())["changes"][1]["value"] == 2.0
    assert read_status(tmp_path / "narrow").changes == changes
    # What the failed attempts left behind changes nothing.
    given = go("given", 3, micro_batch=2)
    assert not read_checkpoint(tmp_path / "given").changes
    assert equal(found.model, given.model)
    assert equal(found.other, given.other)


def test_a_run_that_goes_on_keeps_its_micro_batch(tmp_path):
    def stop(progress: Progress) -> None:
        if progress.step == 2:
            raise StopError

    common = settings(objective="pgd_at", attack={"steps": 1})
    whole = train(Narrow(2), splits(), out=tmp_path / "whole", **common)
    out = tmp_path / "run"
    with pytest.raises(StopError):
        train(Narrow(2), splits(), out=out, listener=stop, **common)
    again = train(Narrow(99), splits(), out=out, **common)  # with more memory than before
    assert equal(again.model, whole.model)
    assert [change.value for change in read_checkpoint(out).changes] == [2.0]


def test_adversarial_weights_are_found_in_micro_batches_too(tmp_path):
    def go(name: str, size: int | None) -> Any:
        network = TinyNet(dtype=torch.float32)
        common = settings(objective="trades", attack={"steps": 1}, awp={"warmup": 0.0, "gamma": 0.05})
        return train(network, splits(), out=tmp_path / name, **common, micro_batch=size)

    whole, split = go("whole", None), go("split", 2)
    for key, value in whole.other.state_dict().items():
        torch.testing.assert_close(split.other.state_dict()[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("every", [None, 2])
def test_a_validation_without_enough_memory_is_made_in_smaller_parts(every, tmp_path):
    def go(name: str, most: int) -> Any:
        network = Narrow(most, TinyNet(dtype=torch.float32), validating=True)
        common = settings(batch_size=12, save_every_steps=every, epochs=3)
        return train(network, Splits(part(13), part(20, seed=2)), out=tmp_path / name, **common)

    run, other = go("run", 8), go("other", 99)
    assert [(change.value, change.step) for change in read_checkpoint(run.folder).changes] == [(6.0, 1)]
    # Without batch norm the steps that follow are the same up to rounding.
    assert [epoch.validation for epoch in run.history] == [epoch.validation for epoch in other.history]


def test_memory_that_is_never_enough_is_one_line(tmp_path):
    with pytest.raises(RunError, match=r"out of memory with 2 images at once \(.*can't allocate.*smaller") as caught:
        train(Narrow(1), splits(), out=tmp_path / "run", **settings())
    assert "\n" not in str(caught.value)


def test_memory_that_runs_out_elsewhere_is_one_line_too(tmp_path, monkeypatch):
    def step(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    with pytest.raises(RunError, match=r"^out of memory at step 1 of 6, .*\(CUDA out of memory") as caught:
        train(cnn(), splits(), out=tmp_path / "run", **settings())
    assert "\n" not in str(caught.value)


def test_other_errors_of_a_network_are_its_own(tmp_path):
    class Wrong(Narrow):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise RuntimeError("shapes cannot be multiplied")
            return super().forward(x)

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train(Wrong(99), splits(), out=tmp_path / "run", **settings())
    assert not out_of_memory(RunError(OUT_OF_MEMORY))
    assert out_of_memory(MemoryError())
    assert out_of_memory(RuntimeError(OUT_OF_MEMORY))


@pytest.mark.parametrize("size", [1, 0, -4])
def test_a_micro_batch_has_two_images_at_least(size, tmp_path):
    with pytest.raises(InputError, match=r"micro_batch: .*greater than or equal to 2"):
        train(cnn(), splits(), out=tmp_path / "run", **settings(micro_batch=size))


# A disk without enough room


@pytest.mark.parametrize("optimizer", [{"name": "adamw"}, {"momentum": 0.9}, {"momentum": 0.0, "nesterov": False}])
@pytest.mark.parametrize("parts", [{}, {"ema": 0.9}, {"on_nan": "retry", "save_every_steps": 4}])
def test_as_much_room_is_asked_for_as_the_checkpoints_take(parts, optimizer, tmp_path, monkeypatch):
    asked, sizes = [], []
    monkeypatch.setattr(loop, "check_room", lambda folder, size, what: asked.append(size))

    def weigh(_: Progress) -> None:
        sizes.extend(path.stat().st_size for path in (tmp_path / "run").glob("checkpoint-*"))

    common = settings(optimizer={"learning_rate": 0.01} | optimizer) | {"save_every_steps": 1} | parts
    train(cnn(width=60), splits(), out=tmp_path / "run", listener=weigh, **common)
    assert len(asked) == 1
    assert 0.8 * max(sizes) < asked[0] / 2 < 1.05 * max(sizes)


def test_a_disk_that_is_too_small_is_named_before_the_first_step(tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    steps: list[Progress] = []
    before = settings(save_every_steps=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(RunError, match=r"run's checkpoints need 0\.\d+ GiB, and [\d.]+ GiB are free; ") as caught:
            train(cnn(width=60), splits(), out=tmp_path / "run", listener=steps.append, **before)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "run") in str(caught.value)
    assert not steps
    assert set(content(tmp_path / "run")) == {"run.json"}
    assert len(train(cnn(width=60), splits(), out=tmp_path / "run", **before).history) == 2


def test_room_that_is_there_is_left_as_it_was(tmp_path):
    check_room(tmp_path, (1 << 20) + 7, "tests")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="cannot be written"):
        check_room(tmp_path / "nowhere", 7, "tests")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is read-only for this user")
def test_a_folder_that_cannot_be_written_is_named_before_the_first_step(tmp_path):
    steps: list[Progress] = []
    (tmp_path / "run").mkdir(mode=0o500)
    with pytest.raises(InputError, match="cannot be written"):
        train(cnn(), splits(), out=tmp_path / "run", listener=steps.append, **settings())
    assert not steps


def test_a_run_needs_all_its_steps_whatever_the_micro_batch(tmp_path):
    seen: list[int] = []
    out: Path = tmp_path / "run"
    train(cnn(), splits(), out=out, listener=lambda p: seen.append(p.step), **settings(micro_batch=2))
    assert seen == list(range(1, STEPS + 1))
