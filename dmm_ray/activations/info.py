"""``dmm info``: what a store is."""

from __future__ import annotations

import logging

import numpy as np

from dmm_ray.activations.figures import Figures
from dmm_ray.activations.manifest import read_manifest, read_record, record_name
from dmm_ray.activations.store import ActivationStore, file_sizes
from dmm_ray.config import Config
from dmm_ray.errors import UserError
from dmm_ray.files import absolute

logger = logging.getLogger(__name__)


class InfoConfig(Config):
    """Say what a store is: model, text, layers, size, how far it is."""

    store: str
    """Folder or URI of the store."""


def info(config: InfoConfig) -> str:
    """Log a description of the store; its folder. Raises UserError where there is none."""
    uri = absolute(config.store)
    for line in describe(uri):
        logger.info("%s", line)
    return uri


def describe(uri: str) -> list[str]:
    """The description, a line per fact."""
    m, sizes = read_manifest(uri), file_sizes(uri)
    records = [read_record(uri, unit) for unit in range(m.units) if record_name(unit) in sizes]
    figures = Figures(m)
    for record in records:
        figures.add(record)
    try:
        state = _moments(ActivationStore.open(uri))
    except UserError as e:
        state = [f"state      {e}"]
    return [
        f"store      {uri} (format {m.version})",
        f"model      {m.subject.id}" + (f" at {m.subject.revision}" if m.subject.revision else ""),
        f"hashes     weights {m.subject.weights_hash[:16]}, tokenizer {m.tokenizer_hash[:16]}",
        f"layers     {', '.join(map(str, m.layers))} of {m.subject.n_layers} ({m.hook}), d {m.d}",
        f"numbers    {m.dtype}, computed in {m.compute_dtype}",
        f"text       {', '.join(m.corpus.uris)}: {m.corpus.documents:,} documents",
        f"window     {m.window} tokens, position 0 {'kept' if m.keep_first else 'left out'}",
        f"rows       {figures.rows:,} per layer, {figures.bytes / 1e6:,.1f} MB",
        f"units      {len(records)} of {m.units} done",
        f"documents  {len(figures.failed)} failed, {figures.cut} cut at the window",
        f"not finite {sum(figures.nonfinite.values())} rows",
        *state,
    ]


def _moments(store: ActivationStore) -> list[str]:
    """Mean norm and spread of each layer."""
    lines = []
    for layer in store.layers:
        moments = store.statistics(layer)
        spread, mean = float(np.sqrt(moments.var.mean())), float(np.sqrt((moments.mean**2).mean()))
        largest = int(np.argmax(moments.var + moments.mean**2))
        figures = f"rms of the mean {mean:.4g}, of the spread {spread:.4g}; largest dimension {largest}"
        lines.append(f"layer {layer:<4} {figures}")
    return lines
