"""`crdnd data list|get|verify|show`: named data sets and their files."""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crdnd.cli._common import JsonOption, print_json
from crdnd.errors import InputError

if TYPE_CHECKING:
    from crdnd.data import DataInfo, Splits
    from crdnd.data._download import Listener
    from crdnd.data._named import FileSet

data_app = typer.Typer(
    help="Named data sets: what there is, getting their files, checking them, looking at them.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

FolderOption = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Folder of the sets' files; else that of CRDND_DATA, else ./data."),
]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A data set; see `crdnd data list`.")]


@data_app.command("list")
def list_command(data_dir: FolderOption = None, json: JsonOption = False) -> None:
    """List the named data sets with their licences, and where their files are.

    Examples:

        crdnd data list

        crdnd data list --data-dir ~/data --json
    """
    from crdnd.data import data_names, load_info

    entries = [_entry(name, load_info(name), data_dir) for name in data_names()]
    if json:
        print_json({"datasets": entries})
        return
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("name", "what", "licence", "download", "found", box=box.SIMPLE_HEAD)
    for entry in entries:
        size = f"{entry['megabytes']} MB" if entry["megabytes"] else "none"
        table.add_row(entry["name"], escape(entry["what"]), escape(entry["licence"]), size, escape(entry["found"]))
    console = Console(highlight=False)
    console.print(table)
    for entry in entries:
        console.print(escape(f"{entry['name']}: {entry['citation']}"), soft_wrap=True)


@data_app.command("get")
def get_command(name: NameArgument, data_dir: FolderOption = None) -> None:
    """Get a set's files: unpack what is there, download what is missing, check it. A stopped download goes on.

    This is the only command that asks the network for a named set.

    Examples:

        crdnd data get cifar10

        crdnd data get mnist --data-dir ~/data
    """
    from crdnd.data import data_folder, load_info
    from crdnd.data._download import get

    info = load_info(name)
    if info.files is None:
        print(f"{name}: nothing to get, it comes with a package.")
        return
    with _showing() as listener:
        folder = get(info.files, data_folder(data_dir), listener)
    print(f"{name}: {folder}")
    print(f"licence: {info.licence}\nplease cite: {info.citation}")


@data_app.command("verify")
def verify_command(name: NameArgument, data_dir: FolderOption = None, json: JsonOption = False) -> None:
    """Check a set's files: published checksums, numbers of images and classes. Says what is wrong.

    Examples:

        crdnd data verify cifar10

        crdnd data verify svhn --json
    """
    from crdnd.data import load_data, load_info

    info = load_info(name)
    checked = _checksums(info.files, data_dir) if info.files else {}
    wrong = [file for file, right in checked.items() if not right]
    if wrong:
        raise InputError(
            f"data {name}: {', '.join(wrong)}: not the published file, its checksum is another one. Move it away; "
            f"to get it: crdnd data get {name}"
        )
    splits = load_data(name, data_dir=data_dir)
    report: dict[str, Any] = {"name": name, "checksums": sorted(checked), **_facts(splits), "licence": info.licence}
    if json:
        print_json(report)
        return
    print(
        f"{name}: {'checksums right: ' + ', '.join(checked) if checked else 'no file with a published checksum here'}"
    )
    for part, facts in report["parts"].items():
        print(f"{part}: {facts['images']} images, {facts['fewest']} to {facts['most']} of each class")
    print(
        f"shape {tuple(report['shape'])}, {report['classes']} classes: {', '.join(splits.train.class_names[:12])}",
        end="",
    )
    print(" ..." if report["classes"] > 12 else "")
    print(f"mean of each channel of train and validation: {', '.join(f'{value:.4f}' for value in report['mean'])}")
    print(f"fingerprint of train and validation: {report['sha256']}\nlicence: {info.licence}\ncite: {info.citation}")


@data_app.command("show")
def show_command(
    spec: Annotated[str, typer.Argument(metavar="NAME|PATH", help="A data set, or training data by their path.")],
    out: Annotated[Path, typer.Option("--out", help="The picture, a PNG.")] = Path("sheet.png"),
    per_class: Annotated[int, typer.Option("--per-class", min=1, max=100, help="Images of each class.")] = 8,
    data_dir: FolderOption = None,
) -> None:
    """Draw a contact sheet: a few training images of each class beside its name.

    Photographs of several sizes are scaled and cropped to small squares.

    Examples:

        crdnd data show digits --out digits.png

        crdnd data show photos/ --per-class 4
    """
    from crdnd.data import load_data
    from crdnd.io import make_folder
    from crdnd.report.sheet import THUMBNAIL, write_contact_sheet

    if out.suffix.lower() != ".png":
        raise InputError(f"out: the picture is a PNG, so its name ends in .png, got {out.name}.")
    thumbnail = (3, THUMBNAIL, THUMBNAIL) if _differ_in_size(spec) else None
    splits = load_data(spec, data_dir=data_dir, model_shape=thumbnail)
    make_folder(out.parent)
    write_contact_sheet(out, splits.train, per_class)
    print(f"{out}: {splits.train.num_classes} classes, {len(splits.train)} training images")


def _differ_in_size(spec: str) -> bool:
    """Whether the data are a folder of images of several sizes."""
    from crdnd.data import data_names, image_files, image_shape

    if spec in data_names() or not Path(spec).is_dir():
        return False
    sizes: set[tuple[int, int]] = set()
    for file in image_files(spec):
        try:
            height, width, _ = image_shape(file)
        except InputError:
            continue  # reading the data says so
        sizes.add((height, width))
        if len(sizes) > 1:
            return True
    return False


def _entry(name: str, info: "DataInfo", data_dir: Path | None) -> dict[str, Any]:
    from crdnd.data import data_folder
    from crdnd.data._sources import SOURCES

    found = "with scikit-learn" if info.files is None else ""
    if info.files is not None:
        try:
            found = str(info.files.locate(data_folder(data_dir))[1])
        except InputError:
            found = f"no; crdnd data get {name}"
    size = sum(source.size for source in SOURCES[name][0]) if name in SOURCES else 0
    return {
        "name": name,
        "what": info.summary,
        "licence": info.licence,
        "citation": info.citation,
        "megabytes": round(size / 1e6),
        "found": found,
    }


def _checksums(files: "FileSet", data_dir: Path | None) -> dict[str, bool]:
    """Whether each file whose checksum is published, and that is there, has it."""
    from crdnd.data import data_folder
    from crdnd.data._download import is_whole, md5_of
    from crdnd.data._sources import SOURCES, UNPACKED

    root = data_folder(data_dir)
    try:
        _, folder = files.locate(root)
    except InputError:
        folder = root  # loading says what is missing; archives that are there are still looked at
    checked: dict[str, bool] = {}
    for source in (source for way in SOURCES[files.name] for source in way):
        for place in dict.fromkeys((root, root / files.name, folder)):
            if (place / source.file).is_file():
                checked[str(place / source.file)] = is_whole(source, place)
    for name, md5 in UNPACKED.get(files.name, {}).items():
        if (folder / name).is_file():
            checked[str(folder / name)] = md5_of(folder / name) == md5
    return checked


def _facts(splits: "Splits") -> dict[str, Any]:
    import torch

    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    counts = {
        part: data.y.bincount(minlength=data.num_classes).tolist() for part, data in parts.items() if data is not None
    }
    sizes = len(splits.train), len(splits.validation)
    means = torch.tensor([data.mean_and_std()[0] for data in (splits.train, splits.validation)], dtype=torch.float64)
    mean = (torch.tensor(sizes, dtype=torch.float64) @ means / sum(sizes)).tolist()
    return {
        "parts": {
            part: {"images": sum(found), "fewest": min(found), "most": max(found)} for part, found in counts.items()
        },
        "shape": list(splits.train.shape),
        "classes": splits.train.num_classes,
        "mean": mean,
        "sha256": splits.sha256,
    }


@contextmanager
def _showing() -> Generator["Listener"]:
    """A bar for each file on standard error; elsewhere a line when a file begins."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(file=sys.stderr)
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def listen(file: str, done: int, size: int) -> None:
            if file not in tasks:
                tasks[file] = bar.add_task(file, total=size)
                if not console.is_terminal:
                    print(f"loading {file}, {size / 1e6:.0f} MB ...", file=sys.stderr, flush=True)
            bar.update(tasks[file], completed=done)

        yield listen
