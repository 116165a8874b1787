"""Measure models under attack: one verdict per sample and attack, and the worst case of each sample."""

import dataclasses
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from torch import Tensor, nn

from crdnd.attacks import UNTOLD, Attack, Classifier, answers, true_float32
from crdnd.config import build
from crdnd.counts import Count
from crdnd.data import ImageData, as_data
from crdnd.engine import check_model, few_images
from crdnd.engine.memory import out_of_memory
from crdnd.engine.processes import processes
from crdnd.engine.signals import stop_requests
from crdnd.errors import InputError, Interrupted, RunError, first_line
from crdnd.evaluation._batch_size import batch_size_that_fits
from crdnd.evaluation._checks import Evidence, check_columns, run_checks, verdict
from crdnd.evaluation._plan import TABLE_ATTACKS, Column, choose_attacks, without_gradients
from crdnd.evaluation._progress import Progress, work_folder, work_number
from crdnd.evaluation._runner import FELL, STANDS, Listener, Runner
from crdnd.evaluation.found import save_found
from crdnd.evaluation.result import (
    NOT_RUN,
    RIGHT,
    WRONG,
    ClassCounts,
    Protocol,
    Results,
    Row,
    SweepPoint,
)
from crdnd.io import sha256
from crdnd.models import Normalized, device_of, evaluating, lets_gradients_through, parameter_count, weights_sha256
from crdnd.threat import ThreatModel


@dataclass(frozen=True)
class Label:
    """What a row of results says about a model besides its numbers."""

    method: str = "unknown"
    role: Literal["teacher", "student"] = "student"
    seed: int | None = None
    checkpoint: Literal["best", "last"] | None = None


@contextmanager
def _memory_in_one_line() -> Generator[None]:
    """Say in one line that memory ran out where no smaller batch helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise RunError(f"out of memory ({first_line(error)}); take a smaller model or smaller images.") from error


@_memory_in_one_line()
def evaluate(
    model: nn.Module,
    data: Any,
    *,
    threat: ThreatModel | Mapping[str, Any],
    attacks: Sequence[str] | Mapping[str, Any] = TABLE_ATTACKS,
    checks: bool = False,
    eps_sweep: Sequence[float] = (),
    per_class: bool = False,
    surrogate: nn.Module | None = None,
    seed: int = 0,
    split: str = "test",
    batch_size: int | Literal["auto"] = 256,
    label: Label | None = None,
    work: str | Path | None = None,
    save_adversarial: str | Path | None = None,
    listener: Listener | None = None,
) -> Results:
    """Natural and robust accuracy of a model; its modes, gradients and the global random state are left alone.

    Table attacks are judged at their last iterate on every image; all others attack what is naturally right, and each
    of their rounds what the ones before left standing, in full batches. Several processes (`accelerate launch`) share
    the samples.

    Args:
        model: images (B, C, H, W) in [0, 1] -> logits (B, K).
        data: `ImageData`, a pair of tensors (images, labels) or a map-style data set; all of it is evaluated.
        threat: the adversary, or its settings, such as {"norm": "linf", "eps": "8/255"}.
        attacks: names, or a mapping of names to settings that differ from the attack's own (`{"square": {"queries":
            1000}}`) or to `Attack` objects.
        checks: run every check for false security, and not only those that come for free (docs/checks.md). Needs the
            attacks `fgsm`, `pgd_sat`, `cw_inf` and `autoattack`.
        eps_sweep: more eps, at which the same attacks run on what still stands.
        per_class: count each class too.
        surrogate: the model whose images `transfer` tries, and the checks.
        seed: of the attacks' draws, which depend on (seed, attack, restart, sample) and not on the batch.
        split: what the protocol calls this part of the data.
        batch_size: changes speed and memory, no verdict; "auto" takes what fits into memory. Halved where memory runs
            out.
        label: what the row says about the model.
        work: a folder for what has been found; the same call goes on there after a kill.
        save_adversarial: a `.safetensors` file for the images that fooled the model.
        listener: told how far it is, after every batch.

    Returns:
        A document with one row. `worst_case` counts the samples that are right naturally and under every attack.

    Raises:
        InputError: something handed in cannot be used.
        RunError: one image at once needs more memory than there is, or an attack made an illegal image.
        Interrupted: a signal asked to stop; what was found is in `work`.
    """
    if save_adversarial is not None and Path(save_adversarial).is_dir():
        raise InputError(f"save_adversarial: {save_adversarial} is a folder; name a file in it.")
    images, threat = as_data(data), build(ThreatModel, threat, where="threat")
    num_classes = check_model(model, images, "model", probabilities=True)
    threat.check_for(images.shape)
    if surrogate is not None:
        _check_surrogate(surrogate, images, num_classes)
    images = images.to(device_of(model))
    chosen = choose_attacks(attacks)
    differentiable = lets_gradients_through(model, few_images(images, model))
    notes: list[str] = []
    if not differentiable:
        chosen, notes = without_gradients(chosen, with_surrogate=surrogate is not None)
    chosen = _with_surrogate(chosen, surrogate)
    everything = checks and differentiable
    if everything and (missing := {"fgsm", "pgd_sat", "cw_inf", "autoattack"} - chosen.keys()):
        raise InputError(f"checks: need the attack {min(missing)} too; name it, or take the preset full.")
    protocol = _protocol(
        images, threat, chosen, seed, split, eps_sweep, checks=everything, surrogate=surrogate if everything else None
    )
    if batch_size != "auto" and batch_size < 1:
        raise InputError(f"batch_size: must be above 0, or auto, got {batch_size}.")
    notes += [note for attack in chosen.values() for note in attack.notes(num_classes)]

    state = processes()
    if save_adversarial is not None and work is None and state.num_processes > 1:
        raise InputError("save_adversarial: several processes need a folder that they share; give work.")
    about = label or Label()
    identity = weights_sha256(model)
    folder = None
    if work is not None:
        _check_told_apart(protocol)
        key = sha256(f"{identity} {protocol.fingerprint} {save_adversarial is not None}".encode())[:16]
        folder = _work_folder(Path(work), f"{protocol.data}-{key}", model, images, state)
    progress = Progress(folder)
    ids = torch.arange(len(images), device=images.device)[state.process_index :: state.num_processes]
    size = batch_size_that_fits(model, images) if batch_size == "auto" else batch_size
    with stop_requests(at_once=True) if work is not None else nullcontext():
        runner = Runner(
            model, images, ids, num_classes=num_classes, seed=seed, batch_size=size, progress=progress,
            keep_adversarial=save_adversarial is not None, listener=listener,
        )  # fmt: skip
        try:
            _run(runner, chosen, threat, images, surrogate, everything, protocol.eps_sweep)
        except Interrupted as error:
            message = f"stopped; everything found is saved in {folder}. The same command goes on from there."
            raise Interrupted(message, error.exit_code) from None
    verdicts = _of_all_processes(runner.verdicts, state)
    if save_adversarial is not None:
        state.wait_for_everyone()
        progress.reload()
        if state.is_main_process:
            save_found(Path(save_adversarial), progress, chosen, protocol, identity)
    evidence = Evidence(model, images, threat, seed, runner.batch_size, verdicts, differentiable)
    found = run_checks(evidence)
    stands = worst_case(verdicts["clean"] == STANDS, (verdicts[name] == STANDS for name in chosen))
    row = Row(
        method=about.method,
        role=about.role,
        model=str(model.architecture) if isinstance(model, Normalized) else type(model).__name__,
        params=parameter_count(model),
        seed=about.seed,
        checkpoint=about.checkpoint,
        n=len(images),
        clean=_count(verdicts["clean"] == STANDS),
        attacks={name: _count(verdicts[name] == STANDS) for name in chosen},
        worst_case=_count(stands),
        verdict=verdict(found, gradients=differentiable, any_right=bool((verdicts["clean"] == STANDS).any())),
        checks=found,
        notes=notes,
        sweep=[
            SweepPoint(eps=eps, worst_case=_count(verdicts[_sweep_column(eps, list(chosen)[-1])] == STANDS))
            for eps in protocol.eps_sweep
        ],
        per_class=_per_class(images, verdicts["clean"] == STANDS, stands) if per_class else {},
        verdicts={name: _text(values) for name, values in verdicts.items() if not name.startswith(("check:", "eps:"))},
        model_sha256=identity,
    )
    return Results(schema="crdnd.results/1", protocol=protocol, rows=[row])


def _check_surrogate(surrogate: nn.Module, images: ImageData, num_classes: int) -> None:
    """It must take these images and know as many classes as the model."""
    found = check_model(surrogate, images, "surrogate", probabilities=True)
    if not lets_gradients_through(surrogate, few_images(images, surrogate)):
        raise InputError(
            "surrogate: lets no gradient through to its images, as an ONNX file, and transfer needs it; give the model "
            "that it is of."
        )
    if found != num_classes:
        raise InputError(f"surrogate: has {found} classes, but the model has {num_classes}; they must be the same.")
    # Its normalisation would make three channels of one.
    if isinstance(surrogate, Normalized) and surrogate.channels != images.shape[0]:
        raise InputError(f"surrogate: takes images of {surrogate.channels} channels, these have {images.shape[0]}.")


def _check_told_apart(protocol: Protocol) -> None:
    """What a work folder holds must never be taken for verdicts of another attack."""
    for name, settings in protocol.attacks.items():
        for key, value in settings.items():
            if UNTOLD in str(value):
                raise InputError(
                    f"work: attacks.{name}.{key}: {value}, so its verdicts cannot be kept; write it as a class or "
                    "function of a module, with plain values, or leave work away."
                )


def _work_folder(root: Path, name: str, model: nn.Module, images: ImageData, state: PartialState) -> Path:
    number = torch.zeros((), dtype=torch.int64, device=images.device)
    if state.is_main_process:
        x, _ = images.batch(torch.arange(min(8, len(images)), device=images.device))
        with true_float32(), evaluating(model):
            first, second = answers(model, x), answers(model, x)
        random = not torch.equal(first[0].nan_to_num(), second[0].nan_to_num())
        number += work_number(root, name, first, random=random)
    if state.num_processes > 1:
        torch.distributed.broadcast(number, src=0)
    return work_folder(root, name, int(number))


def _run(
    runner: Runner,
    chosen: Mapping[str, Attack],
    threat: ThreatModel,
    images: ImageData,
    surrogate: nn.Module | None,
    everything: bool,
    sweep: Sequence[float],
) -> None:
    """Every attack on the samples that it has to see, cheap ones first."""
    standing = runner.clean()
    for name, attack in chosen.items():
        runner.run(Column(name, attack, threat, () if attack.judged_on_all else ("clean",)))
    if everything:
        chosen_too = choose_attacks(["transfer"]) if surrogate is not None else {}
        transfer = _with_surrogate(chosen_too, surrogate).get("transfer")
        for column in check_columns(threat, images.shape, transfer):
            if all(name in runner.verdicts for name in column.after):  # an own `autoattack` may have other parts
                runner.run(column)
    for eps in sweep:  # upwards: what falls at one eps falls at every larger one
        for name, attack in chosen.items():
            standing = runner.run(Column(_sweep_column(eps, name), attack, _wider(threat, eps)), start=standing)


def _wider(threat: ThreatModel, eps: float) -> ThreatModel:
    return build(ThreatModel, {"norm": threat.norm, "eps": eps}, where="eps_sweep")


def _sweep_column(eps: float, attack: str) -> str:
    return f"eps:{eps:.10g}/{attack}"


def _with_surrogate(attacks: Mapping[str, Attack], surrogate: nn.Module | None) -> dict[str, Attack]:
    from crdnd.attacks.transfer import Transfer

    found = dict(attacks)
    for name, attack in attacks.items():
        if isinstance(attack, Transfer) and attack.surrogate is None:
            if surrogate is None:
                raise InputError(f"{name}: this attack needs another model; give one with --surrogate.")
            found[name] = dataclasses.replace(
                attack, surrogate=_in_eval_mode(surrogate), surrogate_sha256=weights_sha256(surrogate)
            )
    return found


def _in_eval_mode(model: nn.Module) -> Classifier:
    def logits(x: Tensor) -> Tensor:
        with evaluating(model):
            return model(x)

    return logits


def make_protocol(
    data: ImageData,
    threat: ThreatModel,
    attacks: Sequence[str] | Mapping[str, Any],
    seed: int = 0,
    split: str = "test",
    *,
    checks: bool = False,
) -> Protocol:
    """The protocol that `evaluate` follows with these arguments on a model that has gradients."""
    return _protocol(data, threat, choose_attacks(attacks), seed, split, (), checks=checks)


def _protocol(
    data: ImageData,
    threat: ThreatModel,
    attacks: Mapping[str, Attack],
    seed: int,
    split: str,
    eps_sweep: Sequence[float],
    *,
    checks: bool,
    surrogate: nn.Module | None = None,
) -> Protocol:
    return Protocol(
        data=data.name,
        data_sha256=data.sha256,
        split=split,
        n=len(data),
        norm=threat.norm,
        eps=threat.eps,
        attacks={name: attack.identity() for name, attack in attacks.items()},
        eps_sweep=tuple(sorted({_wider(threat, eps).eps for eps in eps_sweep})),  # each is run once
        checks=checks,
        surrogate_sha256=weights_sha256(surrogate) if surrogate is not None else "",
        seed=seed,
        precision="float64" if data.x.dtype == torch.float64 else "float32, TF32 off",
    ).with_fingerprint()


def worst_case(clean: Tensor, survived: Iterable[Tensor]) -> Tensor:
    """Samples that are right naturally and under every attack; bool (N,), iterable of (N,) -> (N,).

    The smallest of the attacks' accuracies would be too high: two attacks at 50% that break different halves leave
    nothing standing.
    """
    return torch.stack([clean, *survived]).all(dim=0)


def combine(results: Sequence[Results]) -> Results:
    """One document of all rows; results of different protocols are refused, they do not belong in one table."""
    fingerprints = {result.protocol.fingerprint for result in results}
    if len(fingerprints) != 1:
        raise InputError(f"results of {len(fingerprints)} different protocols cannot stand in one table.")
    rows = [row for result in results for row in result.rows]
    return Results(schema="crdnd.results/1", protocol=results[0].protocol, rows=rows)


def _of_all_processes(verdicts: Mapping[str, Tensor], state: PartialState) -> dict[str, Tensor]:
    """Every process's verdicts put together: each sample was attacked by one of them."""
    if state.num_processes == 1:
        return dict(verdicts)
    names = sorted(verdicts)
    together = torch.stack([verdicts[name] for name in names]).to(torch.int32) + 1  # not run counts 0 in a sum
    torch.distributed.all_reduce(together)
    return dict(zip(names, (together - 1).to(torch.int8), strict=True))


def _count(right: Tensor) -> Count:
    return Count(correct=int(right.sum()), n=len(right))


def _per_class(data: ImageData, clean: Tensor, stands: Tensor) -> dict[str, ClassCounts]:
    found: dict[str, ClassCounts] = {}
    for label, name in enumerate(data.class_names):
        members = data.y == label
        if bool(members.any()):
            found[name] = ClassCounts(clean=_count(clean[members]), worst_case=_count(stands[members]))
    return found


def _text(verdicts: Tensor) -> str:
    characters = {STANDS: RIGHT, FELL: WRONG}
    return "".join(characters.get(value, NOT_RUN) for value in verdicts.tolist())


@dataclass(frozen=True)
class Prediction:
    """Classes and probabilities of a batch of images."""

    classes: Tensor
    """int64 (B,)."""
    probabilities: Tensor
    """(B, K), each row adds up to 1."""


def predict(model: nn.Module, images: Tensor) -> Prediction:
    """What a model sees in images (B, C, H, W) in [0, 1], or uint8; checked as the images of an evaluation are.

    Raises:
        InputError: the model cannot take them.
    """
    if not isinstance(images, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        kind = type(images).__name__
        raise InputError(f"images: must be a tensor (B, C, H, W), got {kind}; crdnd.data.read_image reads one image.")
    data = ImageData(images, torch.zeros(len(images), dtype=torch.int64, device=images.device), name="images")
    check_model(model, data, "model", probabilities=True)
    with evaluating(model), torch.no_grad():
        probabilities = model(data.batch(torch.arange(len(data)))[0].to(device_of(model))).softmax(dim=1)
    return Prediction(probabilities.argmax(1), probabilities)
