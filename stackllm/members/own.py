"""A user's own member: a class in a Python file, named ``file.py:Class`` in the settings.

Two kinds of class are understood. A scikit-learn classifier (anything with ``fit(X, y)`` and
``predict_proba(X)``) is given rows and labels. Any other class speaks the protocol that our own
members speak: ``fit(inputs, targets, seed, folder)`` writes a model into ``folder``, and
``predict(inputs, rows, folder)`` gives ``(len(rows), n_classes)``.

A class that computes on a GPU says ``gpu = True``: its models get one each, and others see none.

A fitted classifier is stored by its own ``save(folder)`` and ``load(folder)`` where the class has them,
else by skops, which writes no pickle and loads types of well-known packages and of the user's file only.
"""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stackllm.crossfit.targets import Targets
from stackllm.engine.devices import Wanted
from stackllm.errors import DataError, MissingInputError, StorageError, UsageError, did_you_mean
from stackllm.members.inputs import Inputs, read_texts
from stackllm.members.protocol import Kind, Traits
from stackllm.parameters import check
from stackllm.recipes.files import calling, load_file
from stackllm.store.digest import file_digest
from stackllm.store.records import read_json, write_json

VERSION = 2

_FILE, _SETTINGS, _MODEL, _FILL = "member.py", "own.json", "model.skops", "fill.npy"
_HOW_TO_STORE = "Give your class save(folder) and a classmethod load(folder)."
_TRUSTED = (
    "sklearn",
    "numpy",
    "scipy",
    "lightgbm",
    "xgboost",
    "builtins",
    "collections",
    "functools",
)
"""Packages whose types a stored classifier may hold, beside those of the user's own file."""
_SUM_TOLERANCE = 1e-3
"""How far a row may be from a sum of 1; float32 and averages of folds stay well within."""


@dataclass(frozen=True)
class OwnParams:
    """Settings of a member of the user's own.

    Parameters
    ----------
    reads
        What a scikit-learn classifier gets as ``X``: ``"features"`` (recipe columns, float64),
        ``"embedding"`` (pooled layers, float32), ``"both"`` side by side, or ``"texts"`` (the
        responses, a list of str).
    params
        Passed to the class as keywords.
    """

    reads: Literal["features", "embedding", "both", "texts"] = "features"
    params: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self)


def is_own(kind: str) -> bool:
    """Does a ``kind`` name a class in a file, as ``file.py:Class``?"""
    return ".py:" in kind


def own_kind(kind: str) -> Kind:
    """The kind that ``file.py:Class`` names, its class loaded and checked.

    Raises
    ------
    MissingInputError
        If there is no such file.
    UsageError
        If the file fails to load, or has no such class, or the class is no member.
    """
    path, name = _split(kind)
    member = _load_class(path, name)
    source = path.read_bytes()

    def fit(inputs: Inputs, targets: Targets, params: OwnParams, seed: int, folder: Path) -> None:
        (folder / _FILE).write_bytes(source)
        content = {"class": name, "reads": params.reads, "params": params.params}
        write_json(folder / _SETTINGS, content, sort_keys=True)
        np.save(folder / "n_classes.npy", np.array(targets.n_classes))
        made = _make(member, params.params, seed, path)
        if _is_classifier(member):
            _fit_classifier(made, inputs, targets, params.reads, folder, path)
        else:
            with calling(f"{path}: {name}.fit", path):
                made.fit(inputs, targets, seed, folder)

    def traits(params: OwnParams) -> Traits:
        devices: Wanted | None = "one" if getattr(member, "gpu", False) else None
        return Traits((name, params), weights=file_digest(path), devices=devices)

    return Kind(OwnParams, VERSION, fit, predict, traits)


def predict(inputs: Inputs, rows: np.ndarray, folder: Path) -> np.ndarray:
    """Probabilities of ``rows``, float64 ``(len(rows), n_classes)``, by the file that is stored with the model.

    Raises
    ------
    DataError
        If they have another shape, or rows that are no probabilities.
    """
    content = read_json(folder / _SETTINGS)
    name, stored = content["class"], folder / _FILE
    member = _load_class(stored, name)
    path = Path(
        str(load_file(stored, "own").__file__)
    )  # the user's own, where that is loaded already
    n_classes = int(np.load(folder / "n_classes.npy", allow_pickle=False))
    if not _is_classifier(member):
        made = _make(member, content["params"], 0, path)
        with calling(f"{name}.predict", path):
            predicted = np.asarray(made.predict(inputs, rows, folder), float)
        return _checked(f"{name}.predict", predicted, len(rows), n_classes)
    classifier = _load_classifier(member, folder, path)
    fill = np.load(folder / _FILL, allow_pickle=False) if (folder / _FILL).is_file() else None
    X = _features(inputs, rows, content["reads"], fill)
    with calling(f"{name}.predict_proba", path):
        predicted = np.asarray(classifier.predict_proba(X), float)
    classes = np.load(folder / "classes.npy", allow_pickle=False)
    probabilities = np.zeros((len(rows), n_classes))
    probabilities[:, classes] = _checked(
        f"{name}.predict_proba", predicted, len(rows), len(classes)
    )
    return probabilities


def _checked(what: str, predicted: np.ndarray, n_rows: int, n_classes: int) -> np.ndarray:
    """Probabilities as they came, if they are any."""
    if predicted.shape != (n_rows, n_classes):
        raise DataError(
            f"{what} gave shape {predicted.shape} for {n_rows} rows and {n_classes} classes. Return one "
            "column per class that fit was given."
        )
    wrong = ~((predicted >= 0).all(axis=1) & (np.abs(predicted.sum(axis=1) - 1) <= _SUM_TOLERANCE))
    if wrong.any():
        first = int(wrong.argmax())
        raise DataError(
            f"{what} gave {wrong.sum()} of {n_rows} rows that are no probabilities (first: row {first}, counted "
            f"from 0: {predicted[first].tolist()}). Return rows that are not negative and sum to 1."
        )
    return predicted


def _split(kind: str) -> tuple[Path, str]:
    name, _, class_name = kind.rpartition(":")
    path = Path(name).expanduser()
    if not path.is_file():
        raise MissingInputError(
            f"{path}: there is no such file. A member of your own is file.py:Class."
        )
    return path, class_name


def _load_class(path: Path, name: str) -> Any:
    module = load_file(path, "own")
    member = getattr(module, name, None)
    if not isinstance(member, type):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise UsageError(f'{path}: there is no class "{name}". {did_you_mean(name, classes)}')
    if not callable(getattr(member, "fit", None)) or not (
        _is_classifier(member) or callable(getattr(member, "predict", None))
    ):
        raise UsageError(
            f"{path}: {name} is no member. Give it fit(X, y) and predict_proba(X) as scikit-learn's classifiers "
            "have, or fit(inputs, targets, seed, folder) and predict(inputs, rows, folder)."
        )
    return member


def _is_classifier(member: Any) -> bool:
    return callable(getattr(member, "predict_proba", None))


def _make(member: Any, params: dict[str, Any], seed: int, path: Path) -> Any:
    """An instance; where it takes a ``random_state`` that nobody set, the seed is given to it."""
    with calling(f"{member.__name__}: making one with params = {params}", path, UsageError):
        made = member(**params)
        known = made.get_params() if hasattr(made, "get_params") else {}
        unset = {
            key: seed
            for key, value in known.items()
            if key.endswith("random_state") and value is None
        }
        return made.set_params(**unset) if unset else made


def _features(inputs: Inputs, rows: np.ndarray, reads: str, fill: np.ndarray | None = None) -> Any:
    """What a classifier gets as ``X``, with ``fill`` of each column in place of NaN."""
    if reads == "texts":
        return read_texts(inputs)["response"].gather(rows).to_list()
    parts = {"features": [inputs.blocks], "embedding": [inputs.embedding]}
    chosen = parts.get(reads, [inputs.blocks, inputs.embedding])
    X = np.hstack([np.asarray(part[rows], np.result_type(part, np.float32)) for part in chosen])
    return X if fill is None else np.where(np.isnan(X), fill.astype(X.dtype), X)


def _fit_classifier(
    classifier: Any, inputs: Inputs, targets: Targets, reads: str, folder: Path, path: Path
) -> None:
    """Fit on weighted labels where the classifier takes weights, else on each row's likeliest label."""
    name = type(classifier).__name__
    weights = _weight_argument(classifier)
    if weights is None:
        targets = targets.likeliest()
    X, y = _features(inputs, targets.rows, reads), targets.labels
    if reads != "texts" and np.isnan(X).any() and not _allows_nan(classifier):
        fill = _medians(X)
        np.save(folder / _FILL, fill)
        X = _features(inputs, targets.rows, reads, fill)
    with calling(f"{path}: {name}.fit on {len(y)} rows of {reads!r}", path):
        classifier.fit(X, y, **({} if weights is None else {weights: targets.weights}))
    np.save(folder / "classes.npy", np.unique(y))
    if callable(getattr(classifier, "save", None)):
        with calling(f"{path}: {name}.save", path):
            classifier.save(folder)
        return
    from skops.io import dump

    try:
        dump(classifier, folder / _MODEL)
    except Exception as error:  # skops has an error of its own for every type that it does not know
        raise StorageError(f"{path}: {name} cannot be stored ({error}). {_HOW_TO_STORE}") from error
    _make_repeatable(folder / _MODEL)


def _make_repeatable(path: Path) -> None:
    """Take times and memory addresses out of what skops wrote: the same model is the same bytes."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    schema = files.pop("schema.json").decode()
    # scikit-learn's vectorisers remember at which address their stop words stood when they were checked
    schema = re.sub(r'("_stop_words_id": \{[^}]*"content": ")\d+', r"\g<1>0", schema)
    address = re.compile(r'(?<="__id__": )\d+|(?<=")\d+(?=\.np[yz]")')
    numbers: dict[str, str] = {}
    for number in address.findall(schema):
        numbers.setdefault(number, str(len(numbers)))
    renamed = {f"{numbers[name.split('.')[0]]}.{name.split('.')[1]}": files[name] for name in files}
    renamed["schema.json"] = address.sub(lambda match: numbers[match.group()], schema).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name in sorted(renamed):
            archive.writestr(zipfile.ZipInfo(name), renamed[name])


def _load_classifier(member: Any, folder: Path, path: Path) -> Any:
    if not (folder / _MODEL).is_file():
        with calling(f"{member.__name__}.load", path):
            return member.load(folder)
    from skops.io import load

    types = _check_types(folder / _MODEL, member.__name__)
    try:
        return load(folder / _MODEL, trusted=types)
    except Exception as error:  # what was written need not be what can be read, a lambda say
        raise StorageError(
            f"{member.__name__} as skops stored it cannot be read ({type(error).__name__}: {error}). "
            f"{_HOW_TO_STORE}"
        ) from error


def _check_types(path: Path, classifier: str) -> list[str]:
    """The types that a stored classifier holds beyond those that skops knows, once they are allowed.

    Raises
    ------
    StorageError
        With the type that is not.
    """
    from skops.io import get_untrusted_types

    types: list[str] = get_untrusted_types(file=path)
    for name in types:
        if not name.startswith("stackllm_own_") and name.split(".")[0] not in _TRUSTED:
            raise StorageError(
                f"{classifier} holds a {name}, which is not stored without a pickle. "
                f"{_HOW_TO_STORE}"
            )
    return types


def _allows_nan(classifier: Any) -> bool:
    """Does a classifier say that it takes NaN? Recipe columns may hold it; one that says nothing is not asked to."""
    from sklearn.utils import get_tags

    try:
        return bool(get_tags(classifier).input_tags.allow_nan)
    except (
        AttributeError
    ):  # no class of scikit-learn's, or params that make no sense, which fit says better
        return False


def _medians(X: np.ndarray) -> np.ndarray:
    """Median of each column without its NaN; 0 where there is nothing else."""
    void = np.isnan(X).all(axis=0)
    return np.nanmedian(np.where(void, 0, X), axis=0)


def _weight_argument(classifier: Any) -> str | None:
    """What ``fit`` calls the weights of rows: of the last step in a pipeline; None if it takes none."""
    from sklearn.pipeline import Pipeline
    from sklearn.utils.validation import has_fit_parameter

    if isinstance(classifier, Pipeline):
        name, last = classifier.steps[-1]
        inner = _weight_argument(last)
        return None if inner is None else f"{name}__{inner}"
    return "sample_weight" if has_fit_parameter(classifier, "sample_weight") else None
