"""Score the first rows of an activation store through a running endpoint: `python client.py STORE [URL]`.

If the endpoint requires a token: `TOKEN=... python client.py STORE URL`.
"""

from __future__ import annotations

import os
import sys

import numpy as np

from dmm_ray import ActivationStore
from dmm_ray.client import Client


def main(uri: str, url: str = "http://127.0.0.1:8000") -> None:
    """Print document, position and nats per dimension of 8 rows."""
    store = ActivationStore.open(uri)
    layer = store.layers[0]
    rows = store.read(layer, store.row_groups(layer)[0])
    ids = np.stack([rows.doc[:8], rows.position[:8]], axis=1)
    with Client(url, token=os.environ.get("TOKEN")) as client:
        found = client.log_prob(rows.activation[:8].float().numpy(), layer=layer, ids=ids)
    for (doc, position), nats in zip(ids, found.nats_per_dim, strict=True):
        sys.stdout.write(f"{doc} {position} {nats:.3f}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
