"""What goes together: a prior, the store that it is used on, a language model; and which rows may be used at all.

Every verb asks here, so that all of them refuse and warn about the same:

==================================  ======================================================================
width d                             refused
layer                               refused where the prior does not model it, or store or model lack it
model (hash of config and weights)  refused where the result is a statement about the prior (`evaluate`,
                                    calibration); elsewhere a warning, as priors of a base model are used
                                    on models fine-tuned from it
model, where the prior has no hash  a warning where both names are hub ids and differ (published priors)
rows with NaN or Inf                refused, naming document and position
rows far from the normaliser        a warning, by ``dmm_ray.prior.rows``, wherever a prior is given rows
stored number format                anything goes: it is rounding, to which priors are indifferent
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
"""Rows looked at together: few enough for the cache."""
EXPONENTS = {torch.bfloat16: (torch.int16, 0x7F80), torch.float32: (torch.int32, 0x7F800000)}
"""By stored dtype: the integers its bits are read as, and the exponent's bits, all set in inf and NaN alone."""


class Modelled(Protocol):
    """What a prior says of the activations that it models; a ``PriorConfig`` is one."""

    @property
    def d(self) -> int:
        """Their width."""

    @property
    def layers(self) -> Sequence[int]:
        """Block numbers of their layers."""

    @property
    def subject(self) -> Mapping[str, Any]:
        """The language model: ``id``, ``revision``, ``weights_hash``, as far as they are known."""


class AnySubject(Protocol):
    """A language model; a ``SubjectModel`` is one."""

    @property
    def d(self) -> int:
        """Width of its activations."""

    @property
    def n_layers(self) -> int:
        """How many blocks it has."""

    @property
    def model_id(self) -> str:
        """Its absolute path or hub id."""

    @property
    def revision(self) -> str | None:
        """The hub commit; None for a folder."""

    @property
    def weights_hash(self) -> str:
        """Of its configuration and weights; reading it may take as long as reading the weights."""


def check_fits(
    prior: Modelled, store: ActivationStore, layer: int | None = None, *, same_model: bool = False
) -> list[int]:
    """Check that a prior goes with a store; the layers that both have. The module says what is refused.

    Args:
        prior: the configuration of the prior.
        store: the activations.
        layer: the only layer that is wanted; None for any that both have.
        same_model: refuse a store of another model than the prior was trained on, rather than warn.

    Raises:
        UserError: another width, no such layer, or (with ``same_model``) another model.

    Example:
        >>> check_fits(prior.config, ActivationStore.open("runs/demo/activations"))  # doctest: +SKIP
        [2]
    """
    if store.d != prior.d:
        raise UserError(
            f"activations: {store.uri} has d = {store.d}, the prior models d = {prior.d}; "
            "give a store of its model"
        )
    wanted = list(prior.layers) if layer is None else [layer]
    shared = [number for number in wanted if number in store.layers and number in prior.layers]
    if not shared:
        raise UserError(
            f"layer: {store.uri} has {_listed(store.layers)}, the prior models layer {_listed(prior.layers)}; "
            "extract that layer"
        )
    entry = store.manifest.subject
    other = _other_model(prior.subject, entry.id, entry.revision, lambda: entry.weights_hash)
    code = (prior.subject.get("resolved") or {}).get("code")
    if other is None and code is not None and entry.resolved and entry.resolved.code != code:
        other = (
            f"the model {entry.id}, the prior was trained on {prior.subject.get('id')} (other Python code)"
        )
    if other:
        message = f"activations: {store.uri} is of {other}"
        if same_model and prior.subject.get("weights_hash"):
            raise UserError(f"{message}; give a store of that model")
        logger.warning("%s", message)
    return shared


def check_subject(prior: Modelled, subject: AnySubject, source: str) -> None:
    """Check that a prior goes with a language model whose activations it is to be used on; warns of another model.

    Args:
        prior: the configuration of the prior.
        subject: the language model.
        source: where the prior is, for messages.

    Raises:
        UserError: another width, or a layer that the model lacks.
    """
    if prior.d != subject.d or max(prior.layers) >= subject.n_layers:
        raise UserError(
            f"model: {subject.model_id} (d = {subject.d}, {subject.n_layers} layers) is not the one that prior "
            f"{source} (d = {prior.d}, layers {_listed(prior.layers)}) is of; give that model"
        )
    known = prior.subject
    if other := _other_model(known, subject.model_id, subject.revision, lambda: subject.weights_hash):
        logger.warning("prior %s: the language model is %s", source, other)


def check_finite(store: ActivationStore, layer: int, rows: Rows) -> None:
    """Check that no row of a layer contains NaN or Inf.

    Raises:
        UserError: one does; the message names its document and position.
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
    """Where a model is not the one that a prior was trained on: both, for a message; else None."""
    name, ours = known.get("id"), known.get("weights_hash")
    if ours:
        # A hub commit decides the weights: nothing has to be read.
        if revision is not None and (name, known.get("revision")) == (model, revision):
            return None
        theirs = weights_hash()
        if theirs == ours:
            return None
        return f"the model {model}, the prior was trained on {name} ({theirs[:12]}, not {ours[:12]})"
    if name and name != model and not any(one.startswith("/") for one in (name, model)):
        return f"the model {model}, the prior was trained on {name}"
    return None


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
