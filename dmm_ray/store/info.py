"""``dmm info``: describes a store."""

from __future__ import annotations

import logging

from dmm_ray.config import Config
from dmm_ray.errors import UserError
from dmm_ray.files import absolute
from dmm_ray.parallel import in_order
from dmm_ray.store.figures import Figures
from dmm_ray.store.manifest import OUTLIER_NORM, Manifest, read_manifest, read_record, record_name
from dmm_ray.store.reader import ActivationStore, file_sizes
from dmm_ray.store.token_selection import TokenSelection

logger = logging.getLogger(__name__)
SHOWN_FAILURES = 5


class InfoConfig(Config):
    """Describe a store: model, text, layers, size and progress."""

    store: str
    """Folder or URI of the store."""


def info(config: InfoConfig) -> str:
    """Log a description of the store and return its folder. Raises UserError if there is none."""
    uri = absolute(config.store)
    for line in describe(uri):
        logger.info("%s", line)
    return uri


def describe(uri: str) -> list[str]:
    """The description, one line per fact."""
    m, sizes = read_manifest(uri), file_sizes(uri)
    done = [unit for unit in range(m.units) if record_name(unit) in sizes]
    figures = Figures(m)
    for record in in_order(lambda unit: read_record(uri, unit), iter(done)):
        figures.add(record)
    try:
        state = [] if m.is_table else moments_lines(ActivationStore.open(uri))
    except UserError as e:
        state = [f"state      {e}"]
    return [
        f"store      {uri} (format {m.version})",
        *(_derived_lines(m)),
        f"model      {m.subject.id}" + (f" at {m.subject.revision}" if m.subject.revision else ""),
        f"hashes     weights {m.subject.weights_hash[:16]}, tokenizer {m.tokenizer_hash[:16]}",
        *_resolved_lines(m),
        f"layers     {', '.join(map(str, m.layers))} of {m.subject.n_layers} ({m.hook}), d {m.d}",
        f"numbers    {m.dtype}, computed in {m.compute_dtype}",
        *_text_lines(m),
        f"rows       {figures.rows:,} per layer, {figures.bytes / 1e6:,.1f} MB",
        f"units      {len(done)} of {m.units} done, {m.documents_per_unit} documents each",
        f"documents  {figures.failed} failed, {figures.long} longer than the window",
        *(f"failed     {error}" for _, error in figures.failures[:SHOWN_FAILURES]),
        f"tokens     {figures.tokens:,} through the model, plus {figures.padding:,} of padding",
        *(_strange_line(figures, layer) for layer in m.layers),
        *state,
    ]


def _resolved_lines(m: Manifest) -> list[str]:
    """The code shipped with the model, and the library versions it ran with."""
    resolved = m.subject.resolved
    if resolved is None:
        return []
    return [
        *(f"code       {name} {digest[:16]}" for name, digest in resolved.code.items()),
        f"versions   {', '.join(f'{name} {version}' for name, version in resolved.versions.items())}",
    ]


def _text_lines(m: Manifest) -> list[str]:
    """The text that the rows were extracted from, if they were."""
    if m.corpus is None:
        return []
    return [
        f"text       {', '.join(m.corpus.uris)}: {m.corpus.documents:,} documents",
        f"window     {m.window} tokens; kept: {_kept_line(m)}",
    ]


def _derived_lines(m: Manifest) -> list[str]:
    """What produced the rows, if not a language model."""
    if m.derived is None:
        return []
    source = f" from {m.derived.activations}" if m.derived.activations else ""
    given = ", ".join(f"{name} {value}" for name, value in m.derived.arguments.items())
    return [
        f"made by    dmm {m.derived.verb} with {m.derived.prior} ({m.derived.prior_hash[:16]}){source}; {given}",
        *(f"column     {name}: {meaning}" for name, meaning in m.derived.columns.items()),
    ]


def _kept_line(m: Manifest) -> str:
    """The options that differ from the defaults."""
    kept = m.kept.model_dump()
    asked = [
        f"{name} {value}" for name, value in kept.items() if value != TokenSelection().model_dump()[name]
    ]
    asked += [f"exclude {name}" for name in m.exclude]
    return ", ".join(asked) or "every position but the first"


def _strange_line(figures: Figures, layer: int) -> str:
    counts = figures.nonfinite[str(layer)], figures.outliers[str(layer)]
    far = f"with a norm over {OUTLIER_NORM:g} times the median"
    return f"layer {layer:<4} {counts[0]} rows with NaN or Inf, {counts[1]} {far}"


def moments_lines(store: ActivationStore) -> list[str]:
    """Mean, spread and massive dimensions per layer."""
    lines = []
    for layer in store.layers:
        moments = store.statistics(layer)
        spread, mean = float(moments.var.mean() ** 0.5), float((moments.mean**2).mean() ** 0.5)
        massive = ", ".join(f"{i} ({ratio:g} x)" for i, ratio in moments.massive().items())
        lines.append(
            f"layer {layer:<4} {moments.count:,} rows; rms of the mean {mean:.4g}, of the spread {spread:.4g}; "
            f"massive dimensions (times the median rms): {massive or 'none'}"
        )
    return lines
