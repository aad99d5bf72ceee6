"""A frozen causal language model with its block outputs open to reading and editing.

Layer k is the output of decoder block k counted from 0, before any final norm. Shapes: b sequences, t tokens
(padded on the right), d the residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from dmm_ray.errors import UserError
from dmm_ray.subject.blocks import find_blocks
from dmm_ray.subject.source import SubjectSource, check_layers, quiet

Hook = Callable[[Tensor], Tensor | None]
"""Sees a block's output (b, t, d); returns its replacement, or None to leave it."""


class SubjectModel:
    """A causal language model on one device, in evaluation mode, without gradients.

    Loaded without a head, only the blocks up to the highest wanted layer are kept and run.
    """

    def __init__(
        self, source: SubjectSource, model: nn.Module, blocks: nn.ModuleList, n_layers: int, head: bool
    ) -> None:
        self.source = source
        self.tokenizer = source.tokenizer
        self.n_layers = n_layers
        self.head = head
        self._model = model
        self._blocks = blocks
        attention = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
        self._causal = bool(attention) and all(attention)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        layers: Sequence[int] | None = None,
        head: bool = False,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        block_path: str | None = None,
        trust_remote_code: bool = False,
    ) -> SubjectModel:
        """Load a model folder or hub id.

        Args:
            model: a folder that holds config.json, or a hub id.
            layers: the layers that will be captured; without a head, blocks above the highest are dropped
                (None keeps all).
            head: keep the whole language model, for ``token_losses``.
            device: a torch device.
            dtype: of the weights and the computation.
            revision: hub branch, tag or commit.
            block_path: dotted path of the list of decoder blocks, for architectures not known here.
            trust_remote_code: run Python code that comes with the model.

        Raises:
            UserError: no model there, an unknown architecture, missing weights, or a layer the model lacks.
        """
        source = SubjectSource.resolve(model, revision, trust_remote_code)
        lm = _load(source, dtype)
        blocks = find_blocks(lm, block_path)
        n_layers = len(blocks)
        check_layers(layers or (), n_layers, model)
        if head:
            return cls(source, lm.to(device), blocks, n_layers, head)
        if layers is not None:
            del blocks[max(layers) + 1 :]
        return cls(source, lm.base_model.to(device), blocks, n_layers, head)

    @property
    def d(self) -> int:
        """Width of the residual stream."""
        return self.source.d

    @property
    def context(self) -> int:
        """The most tokens the model was made for."""
        return self.source.context

    @property
    def model_id(self) -> str:
        """The absolute folder or hub id it came from."""
        return self.source.model_id

    @property
    def revision(self) -> str | None:
        """The hub commit; None for a local folder."""
        return self.source.revision

    @property
    def weights_hash(self) -> str:
        """SHA-256 over config.json and the weight files."""
        return self.source.weights_hash

    @property
    def tokenizer_hash(self) -> str:
        """SHA-256 of the tokenizer."""
        return self.source.tokenizer_hash

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self._model.parameters()).device

    def tokenize(self, texts: Sequence[str], window: int) -> list[list[int]]:
        """Token ids of each text, with the tokenizer's own special tokens, cut at ``window``, not padded."""
        return tokenize(self.tokenizer, texts, window)

    def pad(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """``ids`` as ``(input_ids, attention_mask)``: int64 (b, t), padded on the right, on its device."""
        width = max(map(len, ids))
        input_ids = torch.zeros(len(ids), width, dtype=torch.long)
        mask = torch.zeros(len(ids), width, dtype=torch.long)
        for row, tokens in enumerate(ids):
            input_ids[row, : len(tokens)] = torch.as_tensor(tokens)
            mask[row, : len(tokens)] = 1
        return input_ids.to(self.device), mask.to(self.device)

    @torch.no_grad()
    def capture(self, input_ids: Tensor, attention_mask: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """Outputs of blocks ``layers``: ``{layer: (b, t, d)}`` in the compute dtype."""
        check_layers(layers, len(self._blocks), f"{self.model_id} as loaded")
        captured: dict[int, Tensor] = {}

        def keep(layer: int) -> Hook:
            def hook(hidden: Tensor) -> None:
                captured[layer] = hidden

            return hook

        with self._hooks({layer: keep(layer) for layer in layers}):
            self._forward(input_ids, attention_mask)
        return captured

    @torch.no_grad()
    def token_losses(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        layer: int | None = None,
        edit: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Cross-entropy of each next token in nats, (b, t - 1): column i is token i + 1; NaN at padding.

        ``edit`` gets layer ``layer``'s output (b, t, d) in float32 and returns its replacement. Position 0 is
        never edited: what ``edit`` returns there is dropped.

        Raises:
            ValueError: loaded without ``head=True``, or one of ``layer`` and ``edit`` without the other.
        """
        if not self.head:
            raise ValueError("token_losses needs SubjectModel.from_pretrained(..., head=True)")
        if (layer is None) != (edit is None):
            raise ValueError("layer and edit go together")

        def replace(hidden: Tensor) -> Tensor:
            assert edit is not None
            return torch.cat([hidden[:, :1], edit(hidden.float())[:, 1:].to(hidden.dtype)], dim=1)

        with self._hooks({} if layer is None else {layer: replace}):
            logits = self._forward(input_ids, attention_mask).logits
        losses = torch.stack(
            [
                F.cross_entropy(row[:-1].float(), ids[1:], reduction="none")
                for row, ids in zip(logits, input_ids, strict=True)
            ]
        )
        return losses.masked_fill(attention_mask[:, 1:] == 0, float("nan"))

    def _forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Run the model. Under causal attention nothing sees padding on the right: no mask is needed then,
        which leaves the attention kernels their fast path."""
        right_padded = bool((attention_mask[:, :-1] >= attention_mask[:, 1:]).all())
        mask = None if right_padded and self._causal else attention_mask
        return self._model(input_ids=input_ids, attention_mask=mask, use_cache=False)

    @contextmanager
    def _hooks(self, hooks: dict[int, Hook]) -> Iterator[None]:
        handles = [self._blocks[layer].register_forward_hook(_adapt(hook)) for layer, hook in hooks.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def tokenize(tokenizer: Any, texts: Sequence[str], window: int) -> list[list[int]]:
    """Token ids of each text as ``tokenizer`` makes them by default, cut at ``window``."""
    if not texts:
        return []
    with quiet():
        ids = tokenizer(list(texts), padding=False, truncation=False, return_attention_mask=False)[
            "input_ids"
        ]
    return [tokens[:window] for tokens in ids]


def _load(source: SubjectSource, dtype: torch.dtype) -> Any:
    """The whole causal language model on the CPU; UserError where its files lack weights."""
    with quiet(), source.loading():
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            source.folder,
            config=source.config,
            dtype=dtype,
            trust_remote_code=source.trust_remote_code,
            output_loading_info=True,
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"model: the files of {source.model_id} lack {len(missing)} weights, e.g. {missing[0]}"
        )
    return model.eval().requires_grad_(False)


def _adapt(hook: Hook) -> Callable[[nn.Module, Any, Any], Any]:
    """``hook`` as a forward hook of a block that returns a tensor or a tuple that starts with it."""

    def forward_hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        is_tuple = isinstance(output, tuple)
        new = hook(output[0] if is_tuple else output)
        if new is None:
            return None
        return (new, *output[1:]) if is_tuple else new

    return forward_hook
