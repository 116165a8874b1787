"""`crdnd evaluate`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import Field

from crdnd.cli._common import (
    DataOption,
    EpsOption,
    JsonOption,
    NormOption,
    RecipeOption,
    SeedOption,
    SetOption,
    given,
    print_json,
    settings_of,
)
from crdnd.errors import InputError


def evaluate_command(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A model folder, .safetensors or package.module:factory.")
    ] = None,
    recipe: RecipeOption = None,
    assignments: SetOption = None,
    data: DataOption = None,
    attacks: Annotated[
        str | None, typer.Option("--attacks", help="Names with commas between; see `crdnd list attacks`.")
    ] = None,
    eps: EpsOption = None,
    norm: NormOption = None,
    seed: SeedOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the JSON document to this file too.")] = None,
    json: JsonOption = False,
) -> None:
    """Measure natural and robust accuracy on test data, and the worst case of every sample.

    Data and threat model are those that the model was trained for, unless given.

    Examples:

        crdnd evaluate runs/student

        crdnd evaluate runs/student --eps 0.05 --attacks pgd_sat,cw_inf --json

        crdnd evaluate mypackage.nets:small --data digits --eps 0.1
    """
    from rich.console import Console

    from crdnd.config import Frozen, build
    from crdnd.data import load_data
    from crdnd.evaluation import TABLE_ATTACKS, Label, evaluate
    from crdnd.io import atomic_write_text, make_folder
    from crdnd.models import ModelCard, read_card, resolve_model
    from crdnd.recipe import check_format
    from crdnd.report.table import results_table
    from crdnd.threat import ThreatModel

    class Settings(Frozen):
        """What `crdnd evaluate` takes from a recipe."""

        schema_: str = Field(default="crdnd.recipe/1", alias="schema")
        model: str
        data: str
        split_seed: int = 0
        threat: ThreatModel
        attacks: tuple[str, ...] = TABLE_ATTACKS
        seed: int = 0

    chosen = given(
        model=model, data=data, threat__eps=eps, threat__norm=norm, seed=seed,
        attacks=attacks.split(",") if attacks else None,
    )  # fmt: skip
    values = settings_of(recipe, assignments, chosen)
    check_format(values)
    if "model" not in values:
        raise InputError("MODEL: name the model to evaluate: a model folder, .safetensors or package.module:factory.")
    spec = str(values["model"])
    network = resolve_model(spec)
    card = read_card(Path(spec)) if Path(spec).exists() else ModelCard(schema="crdnd.model/1")
    _fill_from_card(values, card)
    settings = build(Settings, values)
    test = load_data(settings.data, settings.split_seed).test
    if test is None:
        raise InputError(f"data {settings.data}: has no test split.")
    if out is not None:
        make_folder(out.parent)  # before the work, so that its result is not lost
    results = evaluate(
        network,
        test,
        threat=settings.threat,
        attacks=settings.attacks,
        seed=settings.seed,
        label=Label(card.method or spec, card.role, card.seed, card.checkpoint),
        listener=lambda name: print(f"attacking with {name} ...", file=sys.stderr, flush=True),
    )
    if out is not None:
        atomic_write_text(out, results.to_json())
    if json:
        print_json(results.to_json().rstrip())
    else:
        Console().print(results_table(results))


def _fill_from_card(values: dict[str, Any], card: Any) -> None:
    """Take data and threat model from the model's card where they were not given."""
    from crdnd.recipe import merge

    if "data" not in values:
        if not card.data:
            raise InputError("data: this model does not say what it was trained on; give --data.")
        values["data"] = card.data
    if values["data"] == card.data:
        values.setdefault("split_seed", card.split_seed)
    threat = values.get("threat", {})
    if not isinstance(threat, dict):
        return  # the settings say what is wrong with it
    if card.threat is not None:
        # A norm alone would silently keep an eps that means something else in it.
        if "norm" in threat and threat["norm"] != card.threat.norm and "eps" not in threat:
            raise InputError(f"threat: the model's eps is for {card.threat.norm}; give --eps for {threat['norm']} too.")
        values["threat"] = merge(card.threat.model_dump(), threat)
    elif "eps" not in threat:
        raise InputError("threat: this model does not say what it was trained to withstand; give --eps.")
