"""Recipes: a run as a YAML file, `crdnd.recipe/1`. The commands turn their options into one before they do anything."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from pydantic import Field, field_validator, model_validator

from crdnd.config import build
from crdnd.data import Splits, load_data, with_wrong_labels
from crdnd.engine import Listener, Named, Run, TrainSettings, distill, train
from crdnd.errors import InputError
from crdnd.models import NORMALIZATION, TIMM, StatedNormalization, create_model, parse_spec, resolve_model, seeded
from crdnd.recipes import recipe_text

SCHEMA = "crdnd.recipe/1"
OF_THE_RUN = {
    "model": {
        "num_classes": "the data say it, so leave it away",
        "input_shape": "the data say it, so leave it away; a folder of images is brought to a size by image_size",
        "seed": "write seeds.init, which is that of the initial weights",
    },
    "objective": {
        "num_classes": "the data say it, so leave it away",
        "sizes": "the networks say them, so leave it away",
    },
}
"""What the run itself hands to a model and a method, and so nobody else can."""

NO_FOLDER = "is empty, as what an unset variable gives; name a folder, or write . for the current one."


class Recipe(TrainSettings):
    """A training run with everything it needs, by name."""

    schema_: Literal["crdnd.recipe/1"] = Field(default=SCHEMA, alias="schema", description="The format of the file.")
    data: str = Field(default="digits", description="A named data set, a path, or hf:OWNER/NAME.")
    split_seed: int = Field(default=0, description="Which split of the data.")
    image_size: int | None = Field(
        default=None, ge=1, description="Of a path to folders of images: they are resized and cropped to such squares."
    )
    label_noise: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the training labels that are replaced by another class, drawn by split_seed: to study "
        "teachers that err.",
    )
    model: Named = Field(
        description="An architecture with its settings, timm:NAME, or package.module:factory. Images are normalised by "
        "the mean and std of the training data, or by what timm has for the model, unless model.normalization "
        f"({', '.join(NORMALIZATION)}) or model.mean and model.std say otherwise."
    )
    teacher: str | None = Field(
        default=None,
        description="A run or model folder, .safetensors, .pt2, .onnx, URL#sha256=..., hf:OWNER/NAME, "
        "robustbench:NAME, an architecture such as wrn,depth=34,width=10, or package.module:factory.",
    )
    teacher_weights: str | None = Field(
        default=None, description="For a teacher that is an architecture or a factory: the file or URL of its weights."
    )
    second_teacher: str | None = Field(
        default=None, description="Likewise; the naturally trained one of the methods that look at two."
    )
    second_teacher_weights: str | None = Field(default=None, description="Likewise.")
    role: Literal["teacher", "student"] = Field(
        default="student", description="What the model's card and the result tables call it."
    )
    out: str = Field(description="The run's folder.")

    @field_validator("model", mode="before")
    @classmethod
    def _from_spec(cls, value: Any) -> Any:
        """`cnn,width=8`, as other options write it."""
        values = {"name": value} if isinstance(value, str) else value
        if not isinstance(values, Mapping) or "," not in str(values.get("name")):
            return values
        name, own = parse_spec(str(values["name"]), "model")
        return {**own, **values, "name": name}

    @field_validator("out")
    @classmethod
    def _names_a_folder(cls, value: str) -> str:
        if not value.strip():
            raise ValueError(NO_FOLDER)
        return value

    @model_validator(mode="after")
    def _leaves_the_run_its_own(self) -> "Recipe":
        _check_settable("objective", self.objective)
        return self

    def run(self, *, fresh: bool = False, listener: Listener | None = None) -> Run:
        """Do it, or go on with it, or return it if it is done."""
        splits = self.load_data()
        model = self.build_model(splits)
        own = self.of_training()
        if self.teacher is not None:
            return distill(
                model, splits, teacher=self.teacher, teacher_weights=self.teacher_weights,
                second_teacher=self.second_teacher, second_teacher_weights=self.second_teacher_weights, out=self.out,
                fresh=fresh, listener=listener, **own,
            )  # fmt: skip
        if self.second_teacher is not None:
            raise InputError("second_teacher: give the robust one as teacher too.")
        if self.teacher_weights is not None or self.second_teacher_weights is not None:
            raise InputError("teacher_weights: there is no teacher that they belong to.")
        return train(model, splits, out=self.out, fresh=fresh, role=self.role, listener=listener, **own)

    def of_training(self) -> dict[str, Any]:
        """What `train` and `distill` take as settings."""
        return {name: getattr(self, name) for name in TrainSettings.model_fields}

    def load_data(self) -> Splits:
        """Training, validation and test data; `label_noise` spoils the first alone."""
        splits = load_data(self.data, self.split_seed, image_size=self.image_size)
        if not self.label_noise:
            return splits
        return replace(splits, train=with_wrong_labels(splits.train, self.label_noise, self.split_seed))

    def build_model(self, splits: Splits) -> Any:
        """The untrained network, made for the images and classes of this data."""
        _check_settable("model", self.model)  # here, where architectures of other commands pass too
        name, own, seed = self.model.name, self.model.settings, self.seed_for("init")
        if ":" in name and not name.startswith(TIMM):
            lost = [key for key, value in own.items() if (key, value) != ("normalization", "none")]
            if lost:
                raise InputError(
                    f"model.{lost[0]}: {name} is called without settings, so it would be lost; write a factory with it."
                )
            with seeded(seed):
                return resolve_model(name)
        channels, height, width = splits.train.shape
        stated = {key: own.pop(key) for key in StatedNormalization.model_fields if key in own}
        mean, std = build(StatedNormalization, stated, f"model {name}").normalized(name, channels) or (None, None)
        if mean is None and not name.startswith(TIMM):  # whose models know the normalisation that their weights want
            mean, std = ([round(value, 4) for value in values] for values in splits.train.mean_and_std())
        return create_model(
            name,
            input_shape=(channels, height, width),
            num_classes=splits.train.num_classes,
            mean=mean,
            std=std,
            seed=seed,
            **own,
        )


def _check_settable(part: str, named: Named) -> None:
    """Refuse settings of a model or a method that the run hands to it."""
    for key, instead in OF_THE_RUN[part].items():
        if key in named.settings:
            raise InputError(f"{part}.{key}: cannot be set; {instead}.")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; whatever else is there is an InputError that names the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not valid YAML: {error}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """The mapping in a YAML text; `where` is what an InputError calls it."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{where}: is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{where}: must hold settings as `key: value`.")
    return cast("dict[str, Any]", values)


def read_recipe(source: Path) -> dict[str, Any]:
    """The values of a recipe: a YAML file, or the name of a shipped recipe where there is no such file."""
    if source.exists() or source.suffix in (".yaml", ".yml") or len(source.parts) > 1:
        return read_yaml(source)
    return parse_yaml(recipe_text(str(source)), str(source))


def make_recipe(values: Mapping[str, Any], where: str = "") -> Recipe:
    """A recipe from plain values; a format of another version is refused in one line."""
    check_format(values, where)
    return build(Recipe, values, where)


def check_format(values: Mapping[str, Any], where: str = "") -> None:
    """Refuse a recipe of another version."""
    found = values.get("schema", SCHEMA)
    if found != SCHEMA:
        raise InputError(f"{where or 'recipe'}: has the format {found!r}; this version reads {SCHEMA}.")


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings on top of each other, the last one wins.

    >>> merge({"threat": {"norm": "linf", "eps": 0.1}}, {"threat": {"eps": 0.2}})
    {'threat': {'norm': 'linf', 'eps': 0.2}}
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = merged.get(key)
            if isinstance(value, Mapping) and isinstance(below, str):
                below = {"name": below}  # `objective: ard` below `objective: {tau: 1}`
            if isinstance(value, Mapping) and isinstance(below, Mapping):
                merged[key] = merge(cast("Mapping[str, Any]", below), cast("Mapping[str, Any]", value))
            else:
                merged[key] = value
    return merged


def parse_assignment(text: str) -> dict[str, Any]:
    """A `--set` option as a nested mapping; the value is read as YAML.

    >>> parse_assignment("optimizer.learning_rate=0.05")
    {'optimizer': {'learning_rate': 0.05}}
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set {text}: write it as key=value, such as optimizer.learning_rate=0.05.")
    try:
        parsed: Any = yaml.safe_load(value)
    except yaml.YAMLError:
        raise InputError(f"--set {text}: the value cannot be read.") from None
    for part in reversed(key.strip().split(".")):
        parsed = {part: parsed}
    return parsed
