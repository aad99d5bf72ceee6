"""Operations by name: what the table of operations says they are told becomes a call, and its results columns."""

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
    """The results of an operation on n rows.

    Args:
        prior: a prior.
        name: of the operation.
        subject: rows (n, d) raw; for samples their number n.
        ids: of the rows (n, 2).
        told: arguments, by the names of :mod:`dmm_ray.operations`, with ``layer``, ``seed`` and ``precision``.

    Returns:
        What the operation finds by the names of its results, (n, ...) each; None for what is missing.

    Raises:
        UserError: as the prior's method of that name.

    Example:
        >>> ask(prior, "denoise", x, ids, {"u": 0.5, "method": "rk4"})["activations"].shape  # doctest: +SKIP
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
