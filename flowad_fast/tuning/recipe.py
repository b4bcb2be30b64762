"""A recipe: what a bundle computes, with the evidence that it was chosen by; needs no torch."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from flowad_fast.config import Frozen, parse, read_mapping
from flowad_fast.errors import ConfigError
from flowad_fast.files import replacing, sha256
from flowad_fast.stages.aggregates import Aggregate
from flowad_fast.stages.scorers import SCORERS, Scorer, options


class Separation(Frozen):
    """Area under the ROC curve of one recipe: mean over classes, 95 % interval by bootstrap, and by class."""

    auroc: float
    low: float
    high: float
    classes: dict[str, float]


class Timing(Frozen):
    """Milliseconds per frame at batch 1, backbone included: median and quartiles of `runs` calls."""

    median: float = Field(gt=0)
    quarter: float
    three_quarters: float
    runs: int = Field(gt=0)


class Evidence(Frozen):
    """What a recipe was chosen by.

    Attributes:
        chosen_by: what was separated: good parts from synthetic defects, or from labelled defective parts.
        rule: how the choice follows from the measurement, in words.
        engine: what was timed, e.g. "eager on cpu"; the separations are computed in float32 by plain torch.
        time: of the recipe's scorer.
        synthetic: held-out good parts against the same parts with synthetic defects.
        labelled: good against defective parts of the labelled set; None where none was given.
        best: separation of the best recipe in the grid, in the terms of `chosen_by`.
        recipes: how many were compared.
        parts: numbers of good parts for statistics and held out, of synthetic defects, and of labelled parts.
        data: SHA-256 of all contents: good parts and labelled ones.
        machine: processor and cores.
        versions: of what computed this.
        created: UTC, ISO 8601.
    """

    chosen_by: Literal["synthetic", "labelled"]
    rule: str
    engine: str
    time: Timing
    synthetic: Separation
    labelled: Separation | None = None
    best: float
    recipes: int = Field(gt=0)
    parts: dict[str, int]
    data: str
    machine: str
    versions: dict[str, str]
    created: str


class Recipe(Frozen):
    """What `flowad-export make --recipe` takes.

    `checkpoint` is the SHA-256 of the weight file that the recipe was chosen for.
    """

    schema_version: Literal[1] = 1
    scorer: Scorer = Field(discriminator="kind")
    aggregate: Aggregate
    location: bool = False
    engine: Literal["eager", "onnxruntime"]
    checkpoint: str = Field(pattern="[0-9a-f]{64}")
    evidence: Evidence

    @property
    def text(self) -> str:
        """The recipe in a few words."""
        return describe(self.scorer, self.aggregate, self.location)


class FollowedRecipe(Frozen):
    """A recipe in a manifest, and the settings in which the command line overruled it; the evidence is without them."""

    recipe: Recipe
    overruled: tuple[str, ...] = ()


def describe(scorer: Scorer, aggregate: str, location: bool) -> str:
    """A recipe in a few words, without options that have their default value."""
    fields = options(scorer.kind)
    given = [f"{k} {v}" for k, f in fields.items() if (v := getattr(scorer, k)) != f.default or k == scorer.counted_by]
    return f"{scorer.kind} ({', '.join(given)}), {aggregate}{', location' if location else ''}"


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe; the file is whole or as it was."""
    with replacing(path) as file:
        file.write((recipe.model_dump_json(indent=2) + "\n").encode())


def read_recipe(path: Path) -> Recipe:
    """The recipe in a JSON file.

    Raises:
        ConfigError: no JSON, a recipe of another version, or an unknown, missing or impossible field.
    """
    data = read_mapping(path)
    if data.get("schema_version") != 1:
        raise ConfigError(
            f"{path}: recipe schema {data.get('schema_version')!r}, this version reads 1; make it with flowad-tune"
        )
    return parse(Recipe, data, str(path))


def check_recipe(recipe: Recipe, checkpoint: Path, source: Path) -> None:
    """Refuse a recipe that was chosen for another checkpoint.

    Raises:
        ConfigError: what it was chosen for, and what this is.
    """
    if not checkpoint.is_file():
        raise ConfigError(f"{checkpoint}: no such file, expected the checkpoint that {source} was chosen for")
    got = sha256(checkpoint)
    if got != recipe.checkpoint:
        raise ConfigError(
            f"{source}: chosen for a checkpoint with SHA-256 {recipe.checkpoint[:16]}…, {checkpoint} has {got[:16]}…; "
            "run flowad-tune on this checkpoint"
        )


def followed(recipe: Recipe, scorer: Scorer, aggregate: Aggregate) -> FollowedRecipe:
    """A recipe for the manifest of what is exported, with what was overruled."""
    names = ["scorer"] if scorer.kind != recipe.scorer.kind else [
        name for name in options(scorer.kind) if getattr(scorer, name) != getattr(recipe.scorer, name)
    ]  # fmt: skip
    return FollowedRecipe(recipe=recipe, overruled=(*names, *(["aggregate"] if aggregate != recipe.aggregate else [])))


class RecipeDefaults:
    """A recipe in the place of the defaults that an authors' configuration gives, see `cli.authors.choose`."""

    def __init__(self, recipe: Recipe, source: str) -> None:
        self.scorer: str | None = recipe.scorer.kind
        self.aggregate: Aggregate | None = recipe.aggregate
        self.source = source
        self._chosen = recipe.scorer

    def options(self, kind: str, counted: bool = False) -> dict[str, Any]:
        """The options of the recipe's scorer; none for another one, and without the count where it was given."""
        if kind != self._chosen.kind:
            return {}
        names = [name for name in options(kind) if not (counted and name == SCORERS[kind].counted_by)]
        return {name: getattr(self._chosen, name) for name in names}
