"""Runs: a folder, its settings, its checkpoint, and in the end its models. `train` and `distill` live here."""

import copy
import hashlib
import json
import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import nn

from crdnd import provenance
from crdnd.config import build
from crdnd.data import ImageData, MapDataset, Splits, as_data, hold_out, load_data
from crdnd.engine.checkpoint import POINTER, WAY_OUT, read_checkpoint
from crdnd.engine.checks import (
    check_is_module,
    check_networks,
    check_splits,
    check_teacher_gradients,
    feature_sizes,
    say_classes,
)
from crdnd.engine.history import Change, Epoch
from crdnd.engine.levers import Levers
from crdnd.engine.loop import Listener, Trainer
from crdnd.engine.processes import SharedRun, processes, sharded
from crdnd.engine.settings import Named, TrainSettings, differences
from crdnd.engine.teacher import Role, TeacherCheck, measure_teacher
from crdnd.errors import DivergenceError, InputError, Interrupted, RunError, first_line
from crdnd.io import atomic_write_text, cannot_write, exclusive, make_folder, move_aside, read_json
from crdnd.models import (
    CARD,
    Adapted,
    ModelCard,
    Normalized,
    adapted,
    is_model_folder,
    load_tensors,
    resolve_model,
    save_model,
    state,
    weights_sha256,
)
from crdnd.objectives import (
    Objective,
    Sizes,
    TrainingAttack,
    attack_needs,
    load_objective,
    needs_second_teacher,
    needs_teacher,
    needs_teacher_gradients,
)

log = logging.getLogger("crdnd")

RUN, LOG, SCHEMA = "run.json", "run.log", "crdnd.run/1"
DIVERGED = " ERROR diverged: "
"""In the last line of the log of a run whose loss or weights are not finite any more."""
VALIDATION_PART = 0.15

DataSource = str | Splits | ImageData | tuple[torch.Tensor, torch.Tensor] | MapDataset
"""A named data set, ready splits, or training data, of which a part is held out for validation."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: where it lives; a model folder of the selected weights.
        model: the selected weights, in eval mode.
        other: the weights that were not selected (`last`, or `best`), in eval mode.
        settings: what it was trained with.
        history: one entry per epoch.
        best_epoch: the epoch of `best`, 1 for the first.
        reused: True when the folder already held this run, finished.
    """

    folder: Path
    model: nn.Module
    other: nn.Module
    settings: TrainSettings
    history: tuple[Epoch, ...]
    best_epoch: int
    reused: bool


def train(
    model: nn.Module,
    data: DataSource,
    *,
    out: str | Path,
    fresh: bool = False,
    role: Literal["teacher", "student"] = "student",
    listener: Listener | None = None,
    **settings: Any,
) -> Run:
    """Train a model without a teacher, or go on with a run that was interrupted.

    Args:
        model: images (B, C, H, W) in [0, 1] -> logits (B, K); its weights are changed.
        data: the name of a data set, `Splits`, or training data alone, of which a part is held out for validation.
        out: the run's folder. If it holds this run already, training goes on where it was, bit for bit.
        fresh: move what is in the folder aside and start over.
        role: what the model's card and the result tables call it.
        listener: called with a `Progress` after every step.
        settings: see `TrainSettings`; `objective` and `threat` are required.

    Returns:
        The finished run.

    Raises:
        InputError: something given cannot be used, or the folder holds a run with other settings.
        RunError: the loss is not finite any more, the disk is full, or a file of streamed data cannot be read; the last
            good checkpoint is kept.
        Interrupted: Ctrl-C or SIGTERM; everything is saved.
    """
    return _run(model, (), data, settings, Path(out), fresh=fresh, role=role, listener=listener)


def distill(
    student: nn.Module,
    data: DataSource,
    *,
    teacher: nn.Module | str | Path,
    teacher_weights: str | Path | None = None,
    second_teacher: nn.Module | str | Path | None = None,
    second_teacher_weights: str | Path | None = None,
    out: str | Path,
    fresh: bool = False,
    listener: Listener | None = None,
    **settings: Any,
) -> Run:
    """Train a student from a frozen teacher, or go on with a run that was interrupted.

    Args:
        student: images (B, C, H, W) in [0, 1] -> logits (B, K); its weights are changed.
        data: as for `train`.
        teacher: a module, or what `crdnd.models.resolve_model` takes, such as a run's folder. It is neither changed nor
            trained. Its natural accuracy on validation images is measured first, and at chance level it is refused.
            Where it says that it was made for images of another shape, or `teacher_input` does, they are resized for
            it.
        teacher_weights: a file of weights for a teacher that is given as an architecture or a factory.
        second_teacher: likewise; the naturally trained one of the methods that look at two.
        second_teacher_weights: likewise.
        out: as for `train`.
        fresh: as for `train`.
        listener: as for `train`.
        settings: see `TrainSettings`; `objective` and `threat` are required.

    Returns:
        The finished run; raises as `train` does.
    """
    check_place(out, (teacher, teacher_weights, second_teacher, second_teacher_weights), fresh=fresh)
    teachers = [_teacher(teacher, teacher_weights, "teacher_weights")]
    if second_teacher is not None:
        teachers.append(_teacher(second_teacher, second_teacher_weights, "second_teacher_weights"))
    elif second_teacher_weights is not None:
        raise InputError("second_teacher_weights: there is no second_teacher that they belong to.")
    return _run(student, tuple(teachers), data, settings, Path(out), fresh=fresh, role="student", listener=listener)


def check_place(out: str | Path, sources: Sequence[object], *, fresh: bool) -> None:
    """Refuse a folder whose run would take the place of one of its teachers, or of the weights of one."""
    here = Path(out).resolve()
    for place in (Path(source).resolve() for source in sources if isinstance(source, str | Path)):
        if here == (place.parent if place.suffix == ".safetensors" else place):
            raise InputError("out: is the teacher's folder; choose another.")
        if fresh and here in place.parents:
            raise InputError("out: holds the teacher, which --fresh would move aside; choose another.")


def check_goes_on(out: Path, settings: TrainSettings, student: nn.Module, splits: Splits) -> None:
    """Refuse a folder that holds another run, or something else, as far as that is known without the run's teacher."""
    if not ((out / RUN).exists() or (out / POINTER).exists() or is_model_folder(out)):
        return
    known: dict[str, Any] = {}
    with suppress(InputError):  # what is wrong with the file is said below
        known = read_json(out / RUN).get("identity", {})
    _open_run(out, settings, {**known, **_identity(student, splits)}, (), Levers())


def _teacher(given: nn.Module | str | Path, weights: str | Path | None, setting: str) -> nn.Module:
    if isinstance(given, str | Path):
        return resolve_model(str(given), weights)
    check_is_module(given, setting.removesuffix("_weights"))
    if weights is not None:
        raise InputError(f"{setting}: the teacher is a module and has weights; load these into it with load_weights.")
    return given


def make_objective(
    settings: TrainSettings, num_classes: int, *, teachers: int, sizes: Sizes | None = None
) -> tuple[Objective, TrainingAttack | None]:
    """The method of these settings and the training attack it runs with, for so many teachers at hand."""
    name = settings.objective.name
    objective = load_objective(name)(num_classes, sizes=sizes, **settings.objective.settings)
    changes = settings.attack.model_dump(exclude_none=True)
    if changes and objective.attack is None:
        raise InputError(f"attack.{next(iter(changes))}: objective {name} trains without an attack.")
    attack = objective.attack.model_copy(update=changes) if objective.attack else None
    if settings.igdm is not None and attack is None:
        raise InputError(f"igdm: objective {name} trains without an attack, and there is nothing to match.")
    needed = needs_teacher(objective, attack) or settings.igdm is not None
    if needed and not teachers:
        what = f"objective {name}" if needs_teacher(objective, attack) else "igdm"
        raise InputError(f"{what} needs a teacher: use `crdnd distill --teacher` or `distill(..., teacher=...)`.")
    if teachers and not needed:
        raise InputError(f"objective {name} uses no teacher: use `crdnd train` or `train(...)`.")
    if settings.repair and not needed:
        raise InputError(f"repair: objective {name} has no teacher to repair.")
    seen = objective.needs | attack_needs(attack)
    if settings.repair and all(view.startswith("s_") or view.endswith("_features") for view in seen):
        raise InputError(
            f"repair: objective {name} looks at no prediction of the teacher, and there is none to repair."
        )
    if settings.repair and not objective.repairable:
        raise InputError(
            f"repair: objective {name} takes account of the teacher's errors itself, and a repaired teacher would hide "
            "them from it; leave repair away."
        )
    if settings.repair and settings.igdm is not None:
        raise InputError(
            "repair: igdm matches how the teacher's predictions change, which repair breaks; leave one away."
        )
    if needs_second_teacher(objective) != (teachers > 1):
        raise InputError(
            f"objective {name} uses one teacher; leave second_teacher away."
            if teachers > 1
            else f"objective {name} needs a second, naturally trained teacher: give second_teacher."
        )
    return objective, attack


def as_splits(data: Any, seed: int) -> Splits:
    """Data with a validation split: the named set's own, or a stratified 15% of training data given alone."""
    if isinstance(data, str):
        return load_data(data)
    if isinstance(data, Splits):
        check_splits(data)
        return data
    whole = as_data(data)
    held_out = max(1, round(VALIDATION_PART * len(whole)))
    if held_out >= len(whole):
        raise InputError(f"{whole.name}: {len(whole)} images are too few to hold some out for validation.")
    train_ids, validation_ids = hold_out(whole.y, held_out, "validation", seed)
    return Splits(whole.subset(train_ids), whole.subset(validation_ids))


def _run(
    student: nn.Module,
    teachers: tuple[nn.Module, ...],
    data: Any,
    values: Mapping[str, Any],
    out: Path,
    *,
    fresh: bool,
    role: Literal["teacher", "student"],
    listener: Listener | None,
) -> Run:
    settings = build(TrainSettings, values)
    splits = as_splits(data, settings.seed)
    sha256s = [weights_sha256(teacher) for teacher in teachers]
    teachers = _adapted(teachers, splits.train, settings)
    num_classes = check_networks(student, teachers, splits.train)
    settings.threat.check_for(splits.train.shape)
    features = feature_sizes(settings.objective.name, student, teachers, splits.train)
    sizes = Sizes(*features, samples=len(splits.train), seed=settings.seed_for("init"))
    objective, attack = make_objective(settings, num_classes, teachers=len(teachers), sizes=sizes)
    if needs_teacher_gradients(objective, attack):
        check_teacher_gradients(teachers[0], attack, splits.train)
    teacher_sha256 = sha256s[0] if sha256s else None
    identity = {
        **_identity(student, splits),
        "teacher": teacher_sha256 and teacher_sha256[:16],
        "second_teacher": sha256s[1][:16] if len(sha256s) > 1 else None,
    }
    shared = SharedRun(processes())
    accelerator = _accelerator(settings, out, shared.count)
    if settings.shard_teacher and shared.count > 1:
        teachers = tuple(sharded(teacher, accelerator.device) for teacher in teachers)
    if settings.sync_batch_norm:
        student = _synchronised(student, accelerator.device)
    # Before anything is written or moved; a run that goes on has it in its file.
    _, known = shared.agree(main=(out / RUN).exists() and not fresh)
    checks = [] if known else _check_teachers(teachers, splits.validation.to(accelerator.device), settings)
    make_folder(out)
    # Of several processes the main one holds the folder; the others wait until it is open.
    with exclusive(out) if shared.is_main else nullcontext():

        def changed(changes: Sequence[Change]) -> None:
            if shared.is_main:
                _record(out, changes=[change.model_dump(mode="json") for change in changes])

        trainer = Trainer(
            student, teachers, objective, attack, splits, settings, out, accelerator, shared, listener, changed
        )
        aside = None
        if shared.is_main:
            if fresh:
                aside = move_aside(out, (RUN, POINTER, CARD))
            _remove_torn_writes(out)
            _open_run(out, settings, identity, checks, trainer.levers)
            if splits.skipped:
                _record(out, skipped=list(splits.skipped))
        shared.agree()
        threads = _open_run(out, settings, identity, checks, trainer.levers)
        reused = is_finished(out)
        with _logged(out) if shared.is_main else nullcontext(), _threads(threads), torch.random.fork_rng():
            if aside:
                log.info("moved the old run to %s", aside)
            if shared.is_main:
                if splits.skipped:
                    log.info("%d files cannot be read and are skipped; %s lists them", len(splits.skipped), RUN)
                say_classes(splits)
            for check in checks if shared.is_main else ():
                log.info("%s", check)
                if check.warning:
                    log.warning("%s", check.warning)
            torch.manual_seed(settings.seed)  # for dropout and the like; everything of ours is keyed by sample
            with nullcontext() if reused else _tracked(accelerator, settings, out):
                trainer.fit()
            if shared.is_main and not reused:
                # Another device may have gone on with it, or a compiler failed on the way.
                _record(out, levers=trainer.levers.found)
        run = _finish(trainer, teacher_sha256, out, splits, role, reused=reused)
        shared.agree()  # the folders are whole
        if trainer.stop_asked is not None:
            raise Interrupted(f"stopped; the run in {out} is finished.", trainer.stop_asked)
        return run


def _adapted(teachers: tuple[nn.Module, ...], data: ImageData, settings: TrainSettings) -> tuple[nn.Module, ...]:
    """The teachers, behind a change of the images' shape where they were made for another one."""
    if settings.teacher_input is not None and not teachers:
        raise InputError("teacher_input: there is no teacher.")
    channels, height, width = data.shape
    # A second one says itself what it was made for, or takes what comes.
    wanted = {"teacher": settings.teacher_input, "second teacher": None}
    return tuple(
        adapted(one, (channels, height, width), wanted[what], what) for what, one in zip(wanted, teachers, strict=False)
    )


def _check_teachers(teachers: Sequence[nn.Module], data: ImageData, settings: TrainSettings) -> list[TeacherCheck]:
    """Measure the teachers, on the device of the data."""
    roles: tuple[Role, Role] = ("teacher", "second teacher")
    if settings.check_teacher:
        return [measure_teacher(one.to(data.y.device), data, role) for one, role in zip(teachers, roles, strict=False)]
    return [
        TeacherCheck(role=role, input=one.wanted if isinstance(one, Adapted) else None)
        for one, role in zip(teachers, roles, strict=False)
    ]


def _identity(student: nn.Module, splits: Splits) -> dict[str, Any]:
    """What a run is of, its teachers apart."""
    return {
        "data": f"{splits.train.name} {splits.sha256[:16]}",
        "model": _describe(student),
        "normalization": _normalization(student),
    }


def _describe(model: nn.Module) -> str:
    """What the model is, and a digest of names and shapes: what must agree for weights to fit."""
    lines = [f"{key} {tuple(value.shape)} {value.dtype}" for key, value in state(model).items()]
    name = str(model.architecture) if isinstance(model, Normalized) else type(model).__name__
    return f"{name} {hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:16]}"


def _normalization(model: nn.Module) -> str | None:
    """Mean and std of a model that is behind them: the weights fit behind any."""
    if not isinstance(model, Normalized):
        return None
    return f"mean {list(model.architecture.mean)}, std {list(model.architecture.std)}"


def _resolved(settings: TrainSettings) -> dict[str, Any]:
    """What really runs, the method's defaults filled in: another version may have others."""
    method = load_objective(settings.objective.name)
    own = build(method.settings_class, settings.objective.settings, where="objective")
    attack = method.attack and method.attack.model_copy(update=settings.attack.model_dump(exclude_none=True))
    return settings.model_dump(mode="json") | {
        "objective": {"name": settings.objective.name, **own.model_dump(mode="json")},
        "attack": attack.model_dump(mode="json") if attack else {},
    }


def _open_run(
    out: Path, settings: TrainSettings, identity: Mapping[str, Any], checks: Sequence[TeacherCheck], levers: Levers
) -> int:
    """Write the run's settings, or compare them with those of the run that lives here. Returns its thread count."""
    chosen = _resolved(settings)
    if not (out / RUN).exists():
        if (out / POINTER).exists():
            raise InputError(f"{out}: holds a checkpoint, but {RUN} with its settings is missing; {WAY_OUT}.")
        if is_model_folder(out):
            raise InputError(f"{out}: holds a model and not the run that made it; {WAY_OUT}, or choose another --out.")
        threads = torch.get_num_threads()
        document = {
            "schema": SCHEMA,
            "settings": chosen,
            "identity": identity,
            "teachers": [check.model_dump(mode="json") for check in checks],
            "levers": levers.found,
            "threads": threads,
            "versions": provenance.package_versions(),
            "commit": provenance.commit(),
            "command": provenance.command(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        atomic_write_text(out / RUN, json.dumps(document, indent=1) + "\n")
        return threads
    try:
        document = read_json(out / RUN)
    except InputError as error:
        raise InputError(f"{str(error).rstrip('.')}; {WAY_OUT}.") from None
    if document.get("schema") != SCHEMA or not isinstance(document.get("settings"), dict):
        raise InputError(
            f"{out / RUN}: has the format {document.get('schema')!r}, this version reads {SCHEMA}; {WAY_OUT}."
        )
    defaults = _resolved(TrainSettings(objective=Named(name=settings.objective.name), threat=settings.threat))
    changed = differences(document.get("settings", {}), chosen, defaults)
    # Runs of before do not say what their images are normalised by.
    changed += differences(document.get("identity", {}), identity, {"normalization": identity["normalization"]})
    if changed:
        raise InputError(
            f"{out}: holds a run with other settings ({'; '.join(changed)}). "
            "Use --fresh to move it aside and start over, or choose another --out."
        )
    # Sums are added up in another order by another number of threads, so the run keeps the one it began with.
    return int(document.get("threads", torch.get_num_threads()))


def _record(out: Path, **found: object) -> None:
    """Write into the run's own document what became of it: what it changed about itself, and its levers."""
    document = read_json(out / RUN)
    if any(document.get(key) != value for key, value in found.items()):
        atomic_write_text(out / RUN, json.dumps(document | found, indent=1) + "\n")


def _remove_torn_writes(out: Path) -> None:
    """Remove what a kill in the middle of a write left behind; nothing ever points to it."""
    for folder in (out, out / "best", out / "last"):  # no deeper: other runs may live in folders below
        for torn in folder.glob(".*.tmp"):
            torn.unlink(missing_ok=True)


def is_finished(folder: Path) -> bool:
    """Whether the folder holds a run that was trained to its end."""
    found = read_checkpoint(folder)
    return found is not None and found.finished


def load_history(folder: Path) -> tuple[Epoch, ...]:
    """The epochs of the run in a folder, as far as they are saved."""
    found = read_checkpoint(folder)
    return found.history if found else ()


def _finish(
    trainer: Trainer,
    teacher_sha256: str | None,
    out: Path,
    splits: Splits,
    role: Literal["teacher", "student"],
    *,
    reused: bool,
) -> Run:
    """Make the two models of a finished run and write their folders."""
    last = trainer.result
    best = copy.deepcopy(last)
    load_tensors(best, trainer.best, f"{out}: best", WAY_OUT)
    models = {"best": best.eval(), "last": last.eval()}
    select = trainer.settings.select
    other: Literal["best", "last"] = "last" if select == "best" else "best"
    if trainer.shared.is_main:
        folders: dict[Literal["best", "last"], Path] = {other: out / other, select: out}
        for label, folder in folders.items():
            if not (reused and is_model_folder(folder)):
                card = ModelCard(
                    schema="crdnd.model/1",
                    method=trainer.settings.objective.name,
                    role=role,
                    seed=trainer.settings.seed,
                    checkpoint=label,
                    data=splits.train.name,
                    split_seed=splits.split_seed,
                    class_names=splits.train.class_names,
                    threat=trainer.settings.threat,
                    teacher_sha256=teacher_sha256,
                    command=provenance.command(),
                    versions=provenance.package_versions(),
                    commit=provenance.commit(),
                )
                save_model(folder, models[label], card)
    assert trainer.best_epoch is not None, "the last epoch is always validated"  # noqa: S101
    return Run(out, models[select], models[other], trainer.settings, trainer.history, trainer.best_epoch, reused)


def _synchronised(student: nn.Module, device: torch.device) -> nn.Module:
    if device.type != "cuda":
        raise InputError(
            "sync_batch_norm: torch has it for GPUs only; leave it away, and every process normalises by its own share."
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(student)


def _accelerator(settings: TrainSettings, out: Path, count: int) -> Accelerator:
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in settings.trackers:
        if name not in available:  # Accelerate itself would leave it out without a word
            raise InputError(f"trackers: {name} is not installed or not known to Accelerate; pip install {name}")
    if settings.batch_size % count:
        raise InputError(f"batch_size: {settings.batch_size} cannot be shared equally by {count} processes.")
    accelerator = Accelerator(mixed_precision="no", log_with=list(settings.trackers) or None, project_dir=out)
    if settings.on_nan == "retry" and count > 1:  # each would have to learn of the others' losses in every step
        raise InputError("on_nan: several processes cannot go back together; use on_nan=stop, or one process.")
    return accelerator


@contextmanager
def _tracked(accelerator: Accelerator, settings: TrainSettings, out: Path) -> Generator[None]:
    """The run's trackers for the body's time; a run that goes on continues the series that it began.

    TensorBoard's lie in the run's folder; what was logged after the checkpoint is dropped, for it is logged again. W&B
    knows the run by the moment and place of its start. MLflow takes the run to go on with from MLFLOW_RUN_ID.
    """
    if not settings.trackers:
        yield
        return
    saved = read_checkpoint(out)
    began = f"{read_json(out / RUN).get('started')} {out.resolve()}"
    wandb = {
        "id": hashlib.sha256(began.encode()).hexdigest()[:16],
        "resume": "allow",
        "name": out.name,
        "dir": str(out),
    }
    try:
        accelerator.init_trackers(
            "crdnd",
            init_kwargs={
                "tensorboard": {"purge_step": saved.step + 1 if saved else 1},
                "wandb": wandb,
                "mlflow": {"run_name": out.name},
            },
        )
    except Exception as error:  # each tracker has errors of its own, and none of them is about the training
        raise RunError(
            f"trackers: {', '.join(settings.trackers)} could not be started ({first_line(error)}); mend that, or train "
            "with trackers=[] and go on with them later."
        ) from error
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


@contextmanager
def _threads(count: int) -> Generator[None]:
    before = torch.get_num_threads()
    if count != before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count != before:
            torch.set_num_threads(before)


@contextmanager
def _logged(out: Path) -> Generator[None]:
    """Write what happens to the run's own log."""
    try:
        handler = logging.FileHandler(out / LOG, encoding="utf-8")
    except OSError as error:
        raise cannot_write(out / LOG, error) from error
    handler.handleError = lambda record: None  # a full disk must not fill the terminal; saving will say so in one line
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)

    def end(how: str, why: BaseException) -> None:  # to the file alone: the caller says it to people
        handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, f"{how}: {why}", (), None))

    try:
        yield
    except DivergenceError as error:
        end("diverged", error)
        raise
    except (RunError, Interrupted) as error:
        end("ended", error)
        raise
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
        handler.close()
