"""Score the first rows of an activation store through a running endpoint: `python client.py STORE [URL]`."""

from __future__ import annotations

import sys

import httpx

from dmm_ray import ActivationStore


def main(uri: str, url: str = "http://127.0.0.1:8000") -> None:
    """Write document, position and nats per dimension of 8 rows to stdout."""
    store = ActivationStore.open(uri)
    layer = store.layers[0]
    rows = store.read(layer, store.row_groups(layer)[0])
    ids = [[int(doc), int(position)] for doc, position in zip(rows.doc[:8], rows.position[:8], strict=True)]
    body = {"activations": rows.activation[:8].float().tolist(), "ids": ids, "layer": layer}
    answer = httpx.post(f"{url}/v1/log_prob", json=body, timeout=60)
    answer.raise_for_status()
    for (doc, position), nats in zip(ids, answer.json()["nats_per_dim"], strict=True):
        sys.stdout.write(f"{doc} {position} {nats:.3f}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
