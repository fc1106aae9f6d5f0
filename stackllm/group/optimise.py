"""One door to every method of stage three."""

from __future__ import annotations

from dataclasses import dataclass, field

from numpy.typing import ArrayLike

from stackllm.errors import UsageError, did_you_mean
from stackllm.group.assignment import assign_of, one_hot
from stackllm.group.blend import BlendParams, blend_of
from stackllm.group.plan import Plan, Quota, checked
from stackllm.group.posterior import posterior_of
from stackllm.group.sinkhorn import sinkhorn_of
from stackllm.group.tempering import Calibration, tempered
from stackllm.probabilities import Floats

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
        float64 ``(n_rows, n_classes)``; every row sums to 1. Groups that do not fit their quotas keep
        their tempered row probabilities.

    Raises
    ------
    DataError
        If the probabilities or groups are not usable, or a mapping lacks the quota of a group.
    UsageError
        If method, quota, exactly or temperature make no sense.

    Examples
    --------
    >>> optimise([[0.9, 0.1], [0.5, 0.5]], ["q", "q"], method="assignment").tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    chosen = method if isinstance(method, Method) else Method(method)
    if temperature is not None:
        calibration = Calibration(temperature, chosen.calibration.bias)
        chosen = Method(chosen.name, calibration, chosen.blend)
    return optimise_of(*checked(probabilities, groups, quota, exactly=exactly), chosen)


def optimise_of(matrix: Floats, plan: Plan, method: Method) -> Floats:
    """:func:`optimise` for checked probabilities and their plan.

    Parameters
    ----------
    matrix, plan
        As :func:`~stackllm.group.plan.checked` gives them: float64 ``(n_rows, n_classes)``, and its groups.
    method
        What to do.

    Returns
    -------
    numpy.ndarray
        float64 ``(n_rows, n_classes)``; every row sums to 1.

    Raises
    ------
    UsageError
        If the method's bias does not fit the classes.
    """
    if method.name == "posterior":
        return posterior_of(matrix, plan, method.calibration)
    if method.name == "sinkhorn":
        return sinkhorn_of(matrix, plan, method.calibration)
    rows = tempered(matrix, method.calibration)
    if method.name == "none":
        return rows
    labels = assign_of(matrix, plan, method.calibration)
    if method.name == "blend":
        return blend_of(rows, plan, labels, method.blend)
    result = one_hot(labels, plan.n_classes)
    result[plan.alone] = rows[plan.alone]
    return result
