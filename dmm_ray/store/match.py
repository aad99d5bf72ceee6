"""Compatibility of a prior with a store and a language model, and which rows are usable at all.

Every command checks compatibility here, so that they all refuse and warn in the same cases:

==================================  ======================================================================
width d                             refused
layer                               refused if the prior does not model it, or the store or model lacks it
model (hash of config and weights)  refused if the result is a statement about the prior (`evaluate`,
                                    calibration); otherwise a warning, because priors of a base model are
                                    also used on models fine-tuned from it
model, if the prior has no hash     a warning if both names are hub ids and differ (published priors)
rows with NaN or Inf                refused, naming document and position
rows far from the normaliser        a warning from ``dmm_ray.prior.rows``, wherever a prior is given rows
stored number format                always accepted: it only affects rounding, to which priors are insensitive
==================================  ======================================================================
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from dmm_ray.errors import UserError
from dmm_ray.store.reader import ActivationStore, Rows

logger = logging.getLogger(__name__)
CHECKED_BYTES = 1 << 20
"""Bytes of rows checked at a time: small enough for the cache."""
EXPONENTS = {torch.bfloat16: (torch.int16, 0x7F80), torch.float32: (torch.int32, 0x7F800000)}
"""Per stored dtype: the integer type to view it as, and the exponent mask; only inf and NaN have all these bits set."""


class Modelled(Protocol):
    """Describes the activations that a prior models; implemented by ``PriorConfig``."""

    @property
    def d(self) -> int:
        """Width of the activations."""

    @property
    def layers(self) -> Sequence[int]:
        """Block numbers of the modelled layers."""

    @property
    def subject(self) -> Mapping[str, Any]:
        """The language model: ``id``, ``revision``, ``weights_hash``, where known."""


class AnySubject(Protocol):
    """A language model; implemented by ``SubjectModel``."""

    @property
    def d(self) -> int:
        """Width of the model's activations."""

    @property
    def n_layers(self) -> int:
        """Number of blocks."""

    @property
    def model_id(self) -> str:
        """Absolute path of its folder, or its hub id."""

    @property
    def revision(self) -> str | None:
        """The hub commit; None for a folder."""

    @property
    def weights_hash(self) -> str:
        """Hash of the configuration and weights; computing it may require reading all the weights."""


def check_fits(
    prior: Modelled, store: ActivationStore, layer: int | None = None, *, same_model: bool = False
) -> list[int]:
    """Check that a prior is compatible with a store (see the module's table) and return the layers that both have.

    Args:
        prior: the configuration of the prior.
        store: the activations.
        layer: the only layer to use; None for all that both have.
        same_model: refuse a store of a different model than the prior was trained on, instead of warning.

    Raises:
        UserError: the width differs, the layer is missing, or (with ``same_model``) the model differs.

    Example:
        >>> check_fits(prior.config, ActivationStore.open("runs/demo/activations"))
        [2]
    """
    if store.d != prior.d:
        raise UserError(
            f"activations: {store.uri} has d = {store.d}, but the prior models d = {prior.d}; "
            "give a store extracted from its model"
        )
    wanted = list(prior.layers) if layer is None else [layer]
    shared = [number for number in wanted if number in store.layers and number in prior.layers]
    if not shared:
        raise UserError(
            f"layer: {store.uri} has layers {_listed(store.layers)}, but the prior models {_listed(prior.layers)}; "
            "extract that layer"
        )
    entry = store.manifest.subject
    other = _other_model(prior.subject, entry.id, entry.revision, lambda: entry.weights_hash)
    code = (prior.subject.get("resolved") or {}).get("code")
    if other is None and code is not None and entry.resolved and entry.resolved.code != code:
        other = f"{entry.id}, but the prior was trained on {prior.subject.get('id')} (different Python code)"
    if other:
        message = f"activations: {store.uri} was extracted from {other}"
        if same_model and prior.subject.get("weights_hash"):
            raise UserError(f"{message}; give a store of that model")
        logger.warning("%s", message)
    return shared


def check_subject(prior: Modelled, subject: AnySubject, source: str) -> None:
    """Check that a prior is compatible with a language model; warn if it was trained on a different one.

    Args:
        prior: the configuration of the prior.
        subject: the language model.
        source: location of the prior, for messages.

    Raises:
        UserError: the width differs, or the model lacks a layer of the prior.
    """
    if prior.d != subject.d or max(prior.layers) >= subject.n_layers:
        raise UserError(
            f"model: {subject.model_id} (d = {subject.d}, {subject.n_layers} layers) does not match prior "
            f"{source} (d = {prior.d}, layers {_listed(prior.layers)}); give the model it was trained on"
        )
    known = prior.subject
    if other := _other_model(known, subject.model_id, subject.revision, lambda: subject.weights_hash):
        logger.warning("prior %s: the language model is %s", source, other)


def check_finite(store: ActivationStore, layer: int, rows: Rows) -> None:
    """Check that no row of a layer contains NaN or Inf.

    Raises:
        UserError: a row does; the message names its document and position.
    """
    if not len(rows.doc):
        return
    integer, exponent = EXPONENTS[rows.activation.dtype]
    bits = rows.activation.view(integer).numpy()
    step = max(1, CHECKED_BYTES // store.manifest.bytes_per_row)
    for low in range(0, len(bits), step):
        found = bits[low : low + step] & exponent
        if found.max() == exponent:
            bad = low + int((found == exponent).any(1).argmax())
            raise UserError(
                f"{store.uri}: layer {layer} contains NaN or Inf at document {rows.doc[bad]}, position "
                f"{rows.position[bad]}; extract with --exclude '[\"nonfinite\"]', or drop that document"
            )


def _other_model(
    known: Mapping[str, Any], model: str, revision: str | None, weights_hash: Callable[[], str]
) -> str | None:
    """A phrase for messages that names both models if they differ; None if they are the same."""
    name, ours = known.get("id"), known.get("weights_hash")
    if ours:
        # A hub commit pins the weights, so there is no need to read and hash them.
        if revision is not None and (name, known.get("revision")) == (model, revision):
            return None
        theirs = weights_hash()
        if theirs == ours:
            return None
        return f"{model}, but the prior was trained on {name} (weights {theirs[:12]}, not {ours[:12]})"
    if name and name != model and not any(one.startswith("/") for one in (name, model)):
        return f"{model}, but the prior was trained on {name}"
    return None


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
