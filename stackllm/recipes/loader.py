"""Finding and running recipes: one small file a block of feature columns.

A recipe file defines ``build(frame)``. It gets ``row_id, group_id, question, response`` — never a
label or a fold — and returns a frame keyed by ``row_id`` with numeric columns, which are then named
``{block}_{column}`` after the file. ``NEEDS = ("block", ...)`` names blocks whose columns it wants
in its frame; ``encoder`` is the block that the frozen LLM measures, and ``asked`` has a column
``asked_<block>`` for each rating that an LLM gave, of a rubric ``asked_<block>_<question>``.

A file ``<block>.toml`` asks an LLM (see :mod:`stackllm.rating.question`). It counts only if it is
turned on by its block's name, or named as a further recipe file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import MappingProxyType, ModuleType

import polars as pl

import stackllm
from stackllm.errors import (
    DataError,
    MissingInputError,
    UsageError,
    did_you_mean,
)
from stackllm.rating.question import column_names, main_column, read_asked
from stackllm.recipes.files import calling, load_file
from stackllm.store.digest import file_digest

ENCODER_BLOCK = "encoder"
ASKED_BLOCK = "asked"


@dataclass(frozen=True)
class Recipe:
    """A recipe file.

    Parameters
    ----------
    block
        Name of the block: the file's name without its ending.
    path
        The file.
    needs
        Blocks whose columns it wants.
    """

    block: str
    path: Path
    needs: tuple[str, ...] = ()

    @property
    def is_asked(self) -> bool:
        """Does an LLM answer it?"""
        return self.path.suffix == ".toml"


def recipe_folder() -> Path:
    """The folder of recipes in force: ``./features``, else those that come with stackllm."""
    package = Path(stackllm.__file__).parent
    for folder in (Path("features"), package / "features", package.parent / "features"):
        if any(folder.glob("*.py")):
            return folder
    raise MissingInputError("no recipes found: there is no folder features/ with *.py files.")


def find_asked() -> list[str]:
    """Names of the asked recipes in the folder of recipes, turned on or not."""
    return sorted(path.stem for path in recipe_folder().glob("*.toml"))


def find_recipes(
    extra: tuple[str, ...] = (), without: tuple[str, ...] = (), ask: tuple[str, ...] = ()
) -> list[Recipe]:
    """All recipes in the order in which they can run.

    Parameters
    ----------
    extra
        Paths of further recipe files; one named like a found block takes its place.
    without
        Blocks that can't be had here. A recipe that needs nothing else falls away with them, one
        that needs others too goes on without.
    ask
        Asked recipes of the recipe folder that are turned on.

    Raises
    ------
    MissingInputError
        If a file is not there.
    DataError
        If an asked recipe makes no sense, or two would make the same column.
    UsageError
        If recipes need each other in a circle or need an unknown block.
    """
    paths = _find_paths(extra, ask)
    recipes = {
        block: Recipe(block, path, () if path.suffix == ".toml" else _needs(path))
        for block, path in paths.items()
    }
    _check_asked(recipes.values())  # what is wrong in them is said before any work
    known = [*recipes, ENCODER_BLOCK, ASKED_BLOCK]
    for recipe in recipes.values():
        for need in recipe.needs:
            if need not in known:
                raise UsageError(
                    f'{recipe.path}: needs an unknown block "{need}". {did_you_mean(need, known)}'
                )
    graph = {  # lists, not sets: the order must not depend on the process's hash seed
        block: [need for need in recipe.needs if need in recipes]
        for block, recipe in recipes.items()
    }
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise UsageError(
            f"recipes need each other in a circle: {' -> '.join(error.args[1])}."
        ) from error
    absent = {*without, *(() if any(r.is_asked for r in recipes.values()) else (ASKED_BLOCK,))}
    runnable = []
    for recipe in (recipes[block] for block in order):
        needs = tuple(need for need in recipe.needs if need not in absent)
        if recipe.needs and not needs:
            absent.add(recipe.block)
        else:
            runnable.append(replace(recipe, needs=needs))
    return runnable


def _check_asked(recipes: Iterable[Recipe]) -> None:
    """Read what is asked, and see that no two questions call their columns alike."""
    makers: dict[str, str] = {}
    for recipe in recipes:
        if not recipe.is_asked:
            continue
        for question in read_asked(recipe.path).questions:
            for column in column_names(question):
                if column in makers:
                    raise DataError(
                        f'{recipe.path}: "{question.block}" would make the column "{column}", and so would '
                        f"{makers[column]}. Rename a file or a question."
                    )
                makers[column] = f'"{question.block}" of {recipe.path}'


def _find_paths(extra: tuple[str, ...], ask: tuple[str, ...]) -> dict[str, Path]:
    """File of each block that counts, by name."""
    folder = recipe_folder()
    paths = {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem[0] != "_"}
    for block in dict.fromkeys(ask):
        if block not in find_asked() and block not in {Path(name).stem for name in extra}:
            raise UsageError(
                f'there is no asked recipe "{block}" in {folder}. {did_you_mean(block, find_asked())}'
            )
        if block in paths:
            raise UsageError(f'{folder}: "{block}" is both a .py and a .toml file. Rename one.')
        paths[block] = folder / f"{block}.toml"
    for name in extra:
        path = Path(name)
        if not path.is_file():
            raise MissingInputError(f"{path}: there is no such recipe file.")
        paths[path.stem] = path
    return paths


def recipes_digest(recipes: Sequence[Recipe]) -> list[tuple[str, str]]:
    """Block and content digest of each recipe: part of the key of what they made."""
    return [(recipe.block, file_digest(recipe.path)) for recipe in recipes]


def run_recipes(
    recipes: Sequence[Recipe],
    rows: pl.DataFrame,
    encoder: pl.DataFrame,
    asked: Mapping[str, pl.DataFrame] = MappingProxyType({}),
) -> pl.DataFrame:
    """Run recipes over label-free rows.

    Parameters
    ----------
    recipes
        From :func:`find_recipes`.
    rows
        ``row_id, group_id, question, response``; row ids need not be unique, order counts.
    encoder
        Numeric columns that the encoder measured, one row per row of ``rows``.
    asked
        For each question that was asked the columns made of the LLM's answers, by its block.

    Returns
    -------
    polars.DataFrame
        Float64 columns ``{block}_{column}``, one row per row of ``rows``, in the same order.

    Raises
    ------
    DataError
        If a recipe fails, returns other rows than it got, something that is no number, or a column
        that another makes too.
    """
    base = rows.select("group_id", "question", "response").with_row_index("row_id")
    blocks = {ENCODER_BLOCK: _named(ENCODER_BLOCK, encoder)}
    ratings = []
    for recipe in recipes:
        if recipe.is_asked:
            questions = read_asked(recipe.path).questions
            blocks[recipe.block] = pl.concat(
                [_named(question.block, asked[question.block]) for question in questions],
                how="horizontal",
            )
            for question in questions:
                rating = main_column(question)
                if rating:
                    # Not a number becomes missing, or it would spoil its whole group's aggregates.
                    values = asked[question.block][rating].fill_nan(None)
                    ratings.append(values.alias(f"{ASKED_BLOCK}_{question.block}"))
    blocks[ASKED_BLOCK] = pl.DataFrame(ratings)
    for recipe in recipes:
        if recipe.is_asked:
            continue
        frame = pl.concat([base, *(blocks[need] for need in recipe.needs)], how="horizontal")
        blocks[recipe.block] = _built(recipe, frame, base)
    makers: dict[str, Path] = {}
    for recipe in recipes:
        for column in blocks[recipe.block].columns:
            if column in makers:
                raise DataError(
                    f'{recipe.path}: the column "{column}" is one of {makers[column]}, too. Rename a file or a column.'
                )
            makers[column] = recipe.path
    return pl.concat([blocks[recipe.block] for recipe in recipes], how="horizontal")


def _named(block: str, columns: pl.DataFrame) -> pl.DataFrame:
    """Columns by their name among all features."""
    return columns.rename(lambda name: f"{block}_{name}")


def _built(recipe: Recipe, frame: pl.DataFrame, base: pl.DataFrame) -> pl.DataFrame:
    """What a recipe makes of a frame, once it is as it must be."""
    build = _load(recipe.path).build
    with calling(f"{recipe.path}: build()", recipe.path):
        built = build(frame)
        if not isinstance(built, pl.DataFrame) or "row_id" not in built.columns:
            raise DataError(
                f'{recipe.path}: build() must return a polars frame with a column "row_id".'
            )
        aligned = base.select("row_id").join(built, on="row_id", how="left", maintain_order="left")
        if built.height != base.height or built["row_id"].n_unique() != base.height:
            raise DataError(
                f"{recipe.path}: build() got {base.height} rows and returned {built.height}. Return each row once."
            )
        columns = aligned.drop("row_id")
        wrong = [
            name
            for name, dtype in columns.schema.items()
            if not (dtype.is_numeric() or dtype == pl.Boolean)
        ]
        if wrong:
            raise DataError(
                f'{recipe.path}: column "{wrong[0]}" is {columns.schema[wrong[0]]}, not a number.'
            )
        return _named(recipe.block, columns.cast(pl.Float64))


def _needs(path: Path) -> tuple[str, ...]:
    needs = getattr(_load(path), "NEEDS", ())
    if isinstance(needs, str) or not all(isinstance(need, str) for need in needs):
        raise UsageError(f'{path}: NEEDS lists names of blocks, such as ("text", "encoder").')
    return tuple(needs)


def _load(path: Path) -> ModuleType:
    module = load_file(path, "recipe")
    if not callable(getattr(module, "build", None)):
        raise UsageError(
            f"{path}: a recipe defines build(frame) -> frame. Name files that are none with a leading _."
        )
    return module
