"""Options that several commands share, and how they show what is going on."""

import json
import logging
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crdnd.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from crdnd.engine import Listener, Progress, TimeLeft
    from crdnd.evaluation import Listener as AttackListener
    from crdnd.evaluation import Step
    from crdnd.models import ModelCard

RecipeOption = Annotated[Path | None, typer.Option("--recipe", help="YAML file with settings; options win over it.")]
NamedRecipeOption = Annotated[
    Path | None,
    typer.Option("--recipe", help="YAML file, or a name of `crdnd recipes list`; options win over it."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any setting of a recipe, such as objective.tau=1; docs/settings.md has them all. Repeatable.",
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option("--data", help="Data set of `crdnd data list`, a folder of images, .npz, or hf:OWNER/NAME."),
]

ImagesOption = Annotated[
    str | None,
    typer.Option(
        "--images",
        metavar="DIR",
        help="A folder of your own images, train/CLASS/ and test/CLASS/; what is not given is chosen for them.",
    ),
]


def _use_data_folder(folder: Path | None) -> Path | None:
    """Let this process and those that it starts find named sets there; no recipe and no run keeps the place."""
    if folder is not None:
        if not folder.is_dir():
            raise InputError(f"data_dir: {folder} is no folder.")
        os.environ["CRDND_DATA"] = str(folder.resolve())
    return folder


DataDirOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        callback=_use_data_folder,
        help="Folder of the named sets' files; else that of CRDND_DATA, else ./data.",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Architecture of `crdnd list models`, with settings as cnn,width=8; timm:NAME, or package.module:factory.",
    ),
]
MODEL_FORMS = (
    "Run or model folder, .safetensors, .pt2, .onnx, URL#sha256=..., hf:OWNER/NAME, robustbench:NAME, an architecture "
    "with weights as wrn,depth=34,width=10,weights=FILE, or package.module:factory."
)
"""What `crdnd.models.resolve_model` takes, on one line."""
WEIGHTS = "For an architecture or a factory: its weights, a .safetensors, a weights-only .pt, or URL#sha256=..."
WeightsOption = Annotated[str | None, typer.Option("--weights", help=WEIGHTS)]
JobsOption = Annotated[
    int | None, typer.Option("--jobs", min=1, help="Runs side by side; by default one a core, with a GPU one alone.")
]
TeacherOption = Annotated[str | None, typer.Option("--teacher", help=MODEL_FORMS)]
TeacherWeightsOption = Annotated[str | None, typer.Option("--teacher-weights", help=WEIGHTS)]
SecondTeacherOption = Annotated[
    str | None,
    typer.Option("--second-teacher", help="As --teacher; a naturally trained one, for methods that look at two."),
]
SecondTeacherWeightsOption = Annotated[
    str | None, typer.Option("--second-teacher-weights", help="As --teacher-weights, for the second teacher.")
]
ObjectiveOption = Annotated[str | None, typer.Option("--objective", help="Method; see `crdnd list objectives`.")]
EpsOption = Annotated[str | None, typer.Option("--eps", help="Radius of the attack in units of [0, 1]: 0.1, or 8/255.")]
NormOption = Annotated[str | None, typer.Option("--norm", help="Norm of the attack: linf or l2.")]
EpochsOption = Annotated[int | None, typer.Option("--epochs", help="Passes over the training data.")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Seed of everything that is drawn.")]
OutOption = Annotated[str | None, typer.Option("--out", help="The run's folder.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Move what is in the folder aside and start over.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, nothing else.")]


def given(**options: Any) -> dict[str, Any]:
    """The options that were given, as nested settings: `threat__eps` stands for threat.eps."""
    from crdnd.recipe import merge

    layers: list[dict[str, Any]] = []
    for name, value in options.items():
        if value is not None:
            nested: Any = value
            for part in reversed(name.split("__")):
                nested = {part: nested}
            layers.append(nested)
    return merge(*layers)


def settings_of(recipe: Path | None, assignments: list[str] | None, options: dict[str, Any]) -> dict[str, Any]:
    """Recipe, then --set, then options: each wins over the one before."""
    from crdnd.recipe import merge, parse_assignment, read_recipe

    return merge(
        read_recipe(recipe) if recipe else {}, *(parse_assignment(text) for text in assignments or []), options
    )


def has_card(path: Path) -> bool:
    """Whether a model is one that this package wrote, which says what it was trained on."""
    return path.is_dir() or (path.suffix == ".safetensors" and path.exists())


def card_of(spec: str, weights: str | None = None) -> "ModelCard | None":
    """The card of a model that this package wrote, be it here or in the web; None for every other one.

    Args:
        spec: as for `resolve_model`.
        weights: likewise; a model that these belong to is an architecture or a factory, which has no card.
    """
    from crdnd.models import local_model, read_card

    place = Path(spec if weights else local_model(spec))
    return read_card(place) if has_card(place) else None


def described(network: "nn.Module", spec: str, weights: str | None = None) -> "ModelCard":
    """The card of a model; of an exported file what the file says of itself, and of any other model an empty card.

    Args:
        network: what `resolve_model` made of the spec.
        spec: as for `card_of`.
        weights: likewise.
    """
    from crdnd.models import About, ModelCard

    about = getattr(network, "about", None)
    told = about if isinstance(about, About) else About()
    return card_of(spec, weights) or ModelCard(schema="crdnd.model/1", class_names=told.class_names, threat=told.threat)


def fill_from_card(values: dict[str, Any], card: "ModelCard") -> None:
    """Take data and threat model from the model's card where they were not given."""
    from crdnd.recipe import merge

    if "data" not in values:
        if not card.data:
            raise InputError("data: this model does not say what it was trained on; give --data.")
        if not is_at_hand(card.data):
            raise InputError(f"data: the model was trained on data called {card.data!r}; say where with --data PATH.")
        values["data"] = card.data
    if was_trained_on(card, values["data"]):
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


def was_trained_on(card: "ModelCard", data: Any) -> bool:
    """Whether these are the data of a model's card, which has what they were called and not their path."""
    from crdnd.data import name_of

    path = Path(str(data))
    return bool(card.data) and card.data == (name_of(path) if path.exists() else data)


def is_at_hand(data: str) -> bool:
    """Whether data of this name can be asked for: a card has no path, only what the data were called."""
    from crdnd.data import PREFIX, data_names

    return bool(data) and (data in data_names() or data.startswith(PREFIX) or Path(data).exists())


def print_json(document: str | dict[str, Any]) -> None:
    """The one document on standard output."""
    print(document if isinstance(document, str) else json.dumps(document, indent=1), flush=True)


def duration(seconds: float) -> str:
    """Such as '8.1 s', '12.5 min' or '31.0 h'."""
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def time_left(left: "TimeLeft | None") -> str:
    """Such as '31.0 h', or 'over 31.0 h' where something is not measured yet; empty where nothing is."""
    if left is None:
        return ""
    return f"over {duration(left.seconds)}" if left.at_least else duration(left.seconds)


@contextmanager
def showing(name: str) -> Generator["Listener"]:
    """Progress and the run's own messages on standard error while the body runs.

    Yields:
        A listener for the run. In a terminal it moves a bar; elsewhere the messages alone are printed, a line each.
    """
    from rich.console import Console
    from rich.logging import RichHandler
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = Console(file=sys.stderr)
    handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    log = logging.getLogger("crdnd")
    log.addHandler(handler)
    level = log.level
    log.setLevel(logging.INFO)  # a run does so itself; a download before it is worth a line too
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    try:
        with Bar(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
            task = bar.add_task(name, total=None, left="")

            def listen(progress: "Progress") -> None:
                left = f"{time_left(progress.left)} left" if progress.left else ""
                bar.update(task, completed=progress.step, total=progress.steps, left=left)

            yield listen
    finally:
        log.setLevel(level)
        log.removeHandler(handler)


@contextmanager
def showing_attacks(*, quiet: bool = False) -> Generator["AttackListener | None"]:
    """A bar on standard error in a terminal; elsewhere a line for each attack, and each part of one, that begins."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if quiet:
        yield None
        return
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task, said = bar.add_task("natural images", total=None), [("clean", "clean")]

        def listen(step: "Step") -> None:
            name = step.column if step.attack == step.column else f"{step.column}: {step.attack}"
            bar.update(
                task, description=f"{name} ({step.number}/{step.rounds})", completed=step.done, total=step.samples
            )
            if not console.is_terminal and (step.column, step.attack) != said[-1]:
                said.append((step.column, step.attack))
                if step.column != "clean":
                    print(f"attacking with {name} ...", file=sys.stderr, flush=True)

        yield listen
