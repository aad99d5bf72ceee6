"""Operations by name: arguments from the table of operations become a method call, its results named columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dmm_ray.operations import OPERATIONS, OperationName
from dmm_ray.prior.model import ActivationPrior
from dmm_ray.prior.solver import Solver
from dmm_ray.prior.top import TopUnits

Columns = dict[str, Tensor | None]


def ask(
    prior: ActivationPrior, name: OperationName, subject: Tensor | int, ids: Tensor, told: Mapping[str, Any]
) -> Columns:
    """Run an operation on n rows.

    Args:
        prior: a prior.
        name: the operation's name.
        subject: raw rows (n, d); for ``sample``, the number of rows n.
        ids: row ids (n, 2).
        told: arguments named as in :mod:`dmm_ray.operations`, plus ``layer``, ``seed`` and ``precision``.

    Returns:
        The operation's results by name, (n, ...) each; None for a missing one.

    Raises:
        UserError: as for the prior's method of that name.

    Example:
        >>> ask(prior, "denoise", x, ids, {"u": 0.5, "method": "rk4"})["activations"].shape == x.shape
        True
    """
    keywords = {key: value for key, value in told.items() if key not in ("method", "grid")}
    if "method" in told or "grid" in told:
        keywords["solver"] = Solver(**{key: told[key] for key in ("method", "grid") if key in told})
    found = getattr(prior, name)(subject, ids=ids, **keywords)
    if name == "log_prob":
        return {column: getattr(found, column) for column in OPERATIONS[name].RESULTS}
    if name == "velocity_error":
        layer = prior.layers[prior.layer_index(told.get("layer"))]
        share = None
        if prior.calibration is not None and layer in prior.calibration.layers:
            share = prior.calibration.proxy_percentile(layer, found.cpu(), ids[:, 1])
        return {"velocity_error": found, "proxy_percentile": share}
    if name == "encode":
        top = found if isinstance(found, TopUnits) else None
        return {
            "features": None if top else found,
            "indices": top.indices if top else None,
            "values": top.values if top else None,
        }
    return {"activations": found}
