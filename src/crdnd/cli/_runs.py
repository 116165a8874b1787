"""What `crdnd demo` and `crdnd compare` share: runs from recipes, and the evaluations in their folders."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crdnd.errors import InputError, Interrupted

if TYPE_CHECKING:
    from crdnd.data import ImageData
    from crdnd.evaluation import Results
    from crdnd.recipe import Recipe


def uses_teacher(layers: Mapping[str, Any], where: str = "") -> bool:
    """Whether the method in these layers of a recipe looks at a teacher."""
    from crdnd.config import build
    from crdnd.engine import Named
    from crdnd.engine.settings import AttackOverrides
    from crdnd.objectives import load_objective, needs_teacher

    method = load_objective(build(Named, layers.get("objective"), f"{where}.objective" if where else "objective").name)
    changes = build(AttackOverrides, layers.get("attack", {}), f"{where}.attack" if where else "attack")
    return layers.get("igdm") is not None or needs_teacher(
        method, method.attack and method.attack.model_copy(update=changes.model_dump(exclude_none=True))
    )


def held_out_images(recipe: "Recipe", n: int | None = None) -> "ImageData":
    """The test images of a run's data set, or the first n of them."""
    test = recipe.load_data().test
    if test is None:
        raise InputError(f"data {recipe.data}: has no test split.")
    return first(test, n, recipe.data)


def first(data: "ImageData", n: int | None, name: str) -> "ImageData":
    """The first n samples; all of them where n is None."""
    import torch

    if n is None:
        return data
    if n > len(data):
        raise InputError(f"n: {n} samples were asked for, {name} has {len(data)}.")
    return data.subset(torch.arange(n))


def current_evaluation(folder: Path, fingerprint: str, sha256s: Sequence[str]) -> "Results | None":
    """The evaluation in a run's folder, if it is of this protocol and of these models."""
    from crdnd.evaluation import load_results
    from crdnd.models import EVALUATION

    try:
        results = load_results(folder / EVALUATION)
    except InputError:
        return None
    current = results.protocol.fingerprint == fingerprint and [row.model_sha256 for row in results.rows] == list(
        sha256s
    )
    return results if current else None


@contextmanager
def saved_in(out: Path) -> Generator[None]:
    """Say where everything is when a signal stops the jobs of the body."""
    try:
        yield
    except Interrupted as error:
        message = f"stopped; everything is saved in {out}. The same command goes on from there."
        raise Interrupted(message, error.exit_code) from None
