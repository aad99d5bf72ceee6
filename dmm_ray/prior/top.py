"""The units of a row with the largest values."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TopUnits(NamedTuple):
    """The k units with the largest values in each of n rows, largest first; ties are ordered by unit."""

    indices: Tensor
    """Indices of the units (n, k), int64."""
    values: Tensor
    """Their values (n, k), float32."""

    @classmethod
    def of(cls, values: Tensor, k: int) -> TopUnits:
        """The top k units of rows (n, units).

        Example:
            >>> TopUnits.of(torch.tensor([[1.0, 3.0, 3.0, 0.0]]), 2).indices.tolist()
            [[1, 2]]
        """
        found, indices = values.topk(k, dim=1)
        # topk breaks ties arbitrarily: rows where a value equal to the last one is left out are fully sorted instead.
        last = found[:, -1:]
        torn = (values == last).sum(1) > (found == last).sum(1)
        if torn.any():
            ordered = values[torn].sort(dim=1, descending=True, stable=True)
            found[torn], indices[torn] = ordered.values[:, :k], ordered.indices[:, :k]
        indices = indices.sort(dim=1).values
        ordered = values.gather(1, indices).sort(dim=1, descending=True, stable=True)
        return cls(indices.gather(1, ordered.indices), ordered.values)
