"""`crdnd evaluate`."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crdnd.cli._common import (
    MODEL_FORMS,
    DataDirOption,
    DataOption,
    EpsOption,
    JsonOption,
    NormOption,
    RecipeOption,
    SeedOption,
    SetOption,
    WeightsOption,
    described,
    fill_from_card,
    given,
    print_json,
    settings_of,
    showing_attacks,
    was_trained_on,
)
from crdnd.cli._runs import first
from crdnd.errors import InputError

if TYPE_CHECKING:
    from crdnd.evaluation import Results

WORK = Path("runs/evaluations")


def evaluate_command(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_FORMS)] = None,
    recipe: RecipeOption = None,
    assignments: SetOption = None,
    weights: WeightsOption = None,
    data: DataOption = None,
    data_dir: DataDirOption = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="Only the first N samples.")] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="quick, apgd, rslad-table, standard, rand or full (with all checks).")
    ] = None,
    attacks: Annotated[
        str | None, typer.Option("--attacks", help="Names with commas between; see `crdnd list attacks`.")
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", help="own, or reference: AutoAttack by the package pyautoattack.")
    ] = "own",
    surrogate: Annotated[
        str | None, typer.Option("--surrogate", help="Another MODEL, whose adversarial images are tried too.")
    ] = None,
    eps: EpsOption = None,
    norm: NormOption = None,
    eps_sweep: Annotated[
        str | None, typer.Option("--eps-sweep", help="More eps for a curve, with commas between: 2/255,4/255.")
    ] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Count each class too.")] = False,
    batch_size: Annotated[
        str, typer.Option("--batch-size", help="Samples attacked at once; auto takes what fits into memory.")
    ] = "256",
    seed: SeedOption = None,
    save_adv: Annotated[
        Path | None, typer.Option("--save-adv", help="Write the images that fooled the model to this .safetensors.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the JSON document to this file too.")] = None,
    work: Annotated[
        Path,
        typer.Option("--work", help="Where verdicts are kept on the way; a stopped evaluation goes on from there."),
    ] = WORK,
    json: JsonOption = False,
) -> None:
    """Measure natural and robust accuracy on test data, and the worst case of every sample.

    Data and threat model are those that the model was trained for, unless given. A folder's images are brought to the
    size that the model takes, and its classes are told by the names of their folders. Without --preset and --attacks,
    the four attacks of the field's tables run; believe a model's robustness after the preset full.

    Examples:

        crdnd evaluate runs/student --preset full

        crdnd evaluate runs/student --eps 0.05 --attacks pgd_sat,apgd_t --set attacks.pgd_sat.restarts=5 --json

        crdnd evaluate mypackage.nets:small --weights small.safetensors --data images.npz --eps 8/255 --preset standard

        crdnd evaluate wrn,depth=34,width=10 --weights model_cifar_wrn.pt --data cifar10 --eps 8/255

        accelerate launch --num_processes 4 -m crdnd evaluate runs/student --preset standard
    """
    from pydantic import Field

    from crdnd.config import Frozen, build, parse_number
    from crdnd.data import has_test, load_test, with_classes
    from crdnd.evaluation import TABLE_ATTACKS, Label, choose_attacks, evaluate, processes, reference
    from crdnd.evaluation import preset as preset_of
    from crdnd.io import atomic_write_text, make_folder
    from crdnd.models import input_shape, resolve_model
    from crdnd.recipe import check_format
    from crdnd.threat import ThreatModel

    class Settings(Frozen):
        """What `crdnd evaluate` takes from a recipe."""

        schema_: str = Field(default="crdnd.recipe/1", alias="schema")
        model: str
        data: str
        split_seed: int = 0
        image_size: int | None = Field(default=None, ge=1)
        threat: ThreatModel
        preset: str | None = None
        attacks: dict[str, Any] = {}
        seed: int = 0

    if out is not None and out.is_dir():
        raise InputError(f"out: {out} is a folder; name a file in it.")
    named = {name.strip(): {} for name in attacks.split(",")} if attacks else None
    chosen = given(model=model, data=data, threat__eps=eps, threat__norm=norm, seed=seed, preset=preset)
    values = settings_of(recipe, assignments, chosen)
    check_format(values)
    values["attacks"] = _attack_settings(values.get("attacks"), named)
    if "model" not in values:
        raise InputError(f"MODEL: name the model to evaluate. {MODEL_FORMS}")
    spec = str(values["model"])
    network = resolve_model(spec, weights)
    card = described(network, spec, weights)
    fill_from_card(values, card)
    settings = build(Settings, values)
    checks = False
    plan: Mapping[str, Any] = settings.attacks
    if settings.preset is not None:
        if named:
            raise InputError("attacks: --preset and --attacks exclude each other; settings of a preset go by --set.")
        wanted = preset_of(settings.preset)
        checks = wanted.checks
        plan = {name: {**own, **settings.attacks.get(name, {})} for name, own in wanted.attacks.items()}
        if other := set(settings.attacks) - set(plan):
            raise InputError(f"attacks.{min(other)}: is no attack of the preset {settings.preset}.")
    attack_plan = choose_attacks(plan or list(TABLE_ATTACKS))
    if engine not in ("own", "reference"):
        raise InputError(f"engine: must be own or reference, got {engine!r}.")
    if engine == "reference":
        attack_plan = reference(attack_plan, settings.seed)
    shape = input_shape(network)
    test = load_test(settings.data, settings.split_seed, image_size=settings.image_size, model_shape=shape)
    if card.class_names:
        test = with_classes(test, card.class_names)
    test = first(test, n, settings.data)
    split = "test"
    if was_trained_on(card, settings.data) and Path(settings.data).exists() and not has_test(Path(settings.data)):
        split = "training"
        print(
            f"warning: {settings.data} holds no test images, and the model was trained on what it holds: this is no "
            "measure of the model",
            file=sys.stderr,
        )
    if batch_size != "auto" and not (batch_size.isdecimal() and int(batch_size)):
        raise InputError(f"batch_size: must be a whole number above 0, or auto, got {batch_size!r}.")
    try:
        sweep = [parse_number(part) for part in eps_sweep.split(",")] if eps_sweep else []
    except ValueError as error:
        raise InputError(f"eps_sweep: {error}") from None
    for value in sweep:
        build(ThreatModel, {"norm": settings.threat.norm, "eps": value}, where="eps_sweep")
    for file in (out, save_adv):
        if file is not None:
            make_folder(file.parent)  # before the work, so that its result is not lost
    state = processes()
    with showing_attacks(quiet=not state.is_main_process) as listener:
        results = evaluate(
            network.to(state.device),
            test,
            threat=settings.threat,
            attacks=attack_plan,
            checks=checks,
            eps_sweep=sweep,
            per_class=per_class,
            surrogate=resolve_model(surrogate).to(state.device) if surrogate else None,
            seed=settings.seed,
            split=split,
            batch_size="auto" if batch_size == "auto" else int(batch_size),
            label=Label(card.method or spec, card.role, card.seed, card.checkpoint),
            work=work,
            save_adversarial=save_adv,
            listener=listener,
        )
    if not state.is_main_process:
        return
    if out is not None:
        atomic_write_text(out, results.to_json())
    if json:
        print_json(results.to_json().rstrip())
    else:
        _print(results)


def _attack_settings(found: Any, named: dict[str, dict[str, Any]] | None) -> Any:
    """Attacks as a mapping to their settings; those named on the command line replace those of a recipe."""
    if isinstance(found, list | tuple):
        found = {str(name): {} for name in found}
    if not isinstance(found, dict | None):
        raise InputError(f"attacks: must be a list of names or a mapping of names to settings, got {found!r}.")
    own: dict[str, Any] = found or {}
    return {name: own.get(name) or {} for name in named} if named else {key: own[key] or {} for key in own}


def _print(results: "Results") -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from crdnd.report._lines import eps_in_words
    from crdnd.report.table import results_table

    console = Console(highlight=False)
    console.print(results_table(results))
    row = results.rows[0]
    if row.per_class:
        table = Table("class", "clean", "worst case", box=box.SIMPLE_HEAD)
        for name, counts in row.per_class.items():
            table.add_row(escape(name), str(counts.clean), str(counts.worst_case))
        console.print(table)
    for point in row.sweep:
        console.print(f"eps {eps_in_words(point.eps)}: {escape(str(point.worst_case))} stand")
    for note in row.notes:
        console.print(f"note: {escape(note)}", soft_wrap=True)
    for check in row.checks:
        if check.suspicious:
            console.print(f"{check.name}: {escape(check.says)}. What to do: {escape(check.advice)}.", soft_wrap=True)
    console.print(f"verdict: {escape(row.verdict)}", soft_wrap=True)
