"""One door to every method of stage three."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from numpy.typing import ArrayLike

from stackllm.errors import UsageError, did_you_mean
from stackllm.group.assignment import assign_of, one_hot
from stackllm.group.blend import BlendParams, blend_of
from stackllm.group.calibration import Calibration
from stackllm.group.plan import Batch, Floats, Quota, check_probabilities, kept_rows, plan
from stackllm.group.posterior import posterior_of
from stackllm.group.sinkhorn import sinkhorn_of
from stackllm.group.tempering import tempered

METHODS = ("posterior", "assignment", "blend", "sinkhorn", "none")


@dataclass(frozen=True)
class Method:
    """A method with everything that it needs to know.

    Parameters
    ----------
    name
        ``posterior`` (exact marginals), ``assignment`` (the likeliest, 0/1), ``blend`` (assignment
        and raw mixed), ``sinkhorn`` (balanced rows and columns) or ``none``.
    calibration
        Temperature and bias: what is done to the rows before anything else.
    blend
        Coefficients, used by ``blend``. The default is what suits predictions that are right about
        two times in three; better is :func:`stackllm.group.fitting.fit_method`.
    """

    name: str = "posterior"
    calibration: Calibration = field(default_factory=Calibration)
    blend: BlendParams = field(default_factory=lambda: BlendParams(weight=0.5, up=0.5, down=0.2))

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise UsageError(
                f'there is no method "{self.name}". {did_you_mean(str(self.name), METHODS)}'
            )

    @property
    def bias(self) -> tuple[float, ...] | None:
        """The calibration's bias, None where there is none."""
        return self.calibration.bias or None


def optimise(
    probabilities: ArrayLike,
    groups: ArrayLike,
    quota: Quota = 1,
    *,
    method: str | Method = "posterior",
    temperature: float | None = None,
    exactly: bool | ArrayLike = False,
) -> Floats:
    """Better probabilities, by what the quotas of a group tell about its rows.

    Parameters
    ----------
    probabilities
        Shape ``(n_rows, n_classes)``, finite, not negative.
    groups
        Shape ``(n_rows,)``, the group of each row, in any order.
    quota, exactly
        As for :func:`stackllm.group.posterior.posterior`.
    method
        A name, or a fitted :class:`Method`.
    temperature
        Divides the log-probabilities before anything else. None: what ``method`` says, else 1.

    Returns
    -------
    numpy.ndarray
        Shape ``(n_rows, n_classes)``; every row sums to 1. Groups that do not fit their quotas keep
        their tempered row probabilities.

    Raises
    ------
    DataError
        If the probabilities or groups are not usable.
    UsageError
        If the method, quota or temperature have no sense.

    Examples
    --------
    >>> optimise([[0.9, 0.1], [0.5, 0.5]], ["q", "q"], method="assignment").tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    chosen = method if isinstance(method, Method) else Method(method)
    if temperature is not None:
        calibration = Calibration(temperature, chosen.calibration.bias)
        chosen = Method(chosen.name, calibration, chosen.blend)
    matrix = check_probabilities(probabilities, groups)
    batches = [] if chosen.name == "none" else plan(groups, matrix.shape[1], quota, exactly=exactly)
    return _APPLY[chosen.name](matrix, batches, chosen)


def _posterior(matrix: Floats, batches: list[Batch], method: Method) -> Floats:
    return posterior_of(matrix, batches, method.calibration.temperature, method.bias)


def _sinkhorn(matrix: Floats, batches: list[Batch], method: Method) -> Floats:
    return sinkhorn_of(matrix, batches, method.calibration.temperature, method.bias)


def _assignment(matrix: Floats, batches: list[Batch], method: Method) -> Floats:
    labels = assign_of(matrix, batches, method.calibration.temperature, method.bias)
    result = one_hot(labels, matrix.shape[1])
    rows = kept_rows(batches)
    result[rows] = tempered(matrix[rows], method.calibration.temperature, method.bias)
    return result


def _blend(matrix: Floats, batches: list[Batch], method: Method) -> Floats:
    labels = assign_of(matrix, batches, method.calibration.temperature, method.bias)
    alone = tempered(matrix, method.calibration.temperature, method.bias)
    return blend_of(alone, batches, labels, method.blend)


def _none(matrix: Floats, batches: list[Batch], method: Method) -> Floats:
    return tempered(matrix, method.calibration.temperature, method.bias)


_APPLY: dict[str, Callable[[Floats, list[Batch], Method], Floats]] = {
    "posterior": _posterior,
    "assignment": _assignment,
    "blend": _blend,
    "sinkhorn": _sinkhorn,
    "none": _none,
}
