"""What commands that make runs share: recipes looked at before anything is trained, and the evaluations of runs."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crdnd.errors import InputError, Interrupted

if TYPE_CHECKING:
    from crdnd.data import ImageData, Splits
    from crdnd.evaluation import Results
    from crdnd.models import ModelCard
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


def check_run(recipe: "Recipe", splits: "Splits") -> None:
    """Refuse settings that only a run itself would refuse; for what is not to be found out after hours."""
    from crdnd.engine import check_model, make_objective
    from crdnd.objectives import Sizes

    check_model(recipe.build_model(splits), splits.train, "model")
    sizes = Sizes(student_features=1, teacher_features=1, samples=len(splits.train))
    teachers = sum(teacher is not None for teacher in (recipe.teacher, recipe.second_teacher))
    make_objective(recipe, splits.train.num_classes, teachers=teachers, sizes=sizes)


def split_seen(card: "ModelCard | None", data: Any, split_seed: Any) -> int | None:
    """The split that a teacher was trained on, if test images of its student are among that; else None.

    Args:
        card: of the teacher, if it has one.
        data: of the student; only sets that draw their test images have other ones in another split.
        split_seed: of the student.
    """
    from crdnd.data import data_names, load_info

    if card is None or card.data != data or card.split_seed == split_seed or card.data not in data_names():
        return None
    return card.split_seed if load_info(card.data).draws_test else None


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
        message = f"stopped; everything is saved in {out}. The same command, without --fresh, goes on from there."
        raise Interrupted(message, error.exit_code) from None
