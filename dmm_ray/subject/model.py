"""A frozen language model with its block outputs open to reading and editing.

Layer k is the output of block k counted from 0, before any final norm. Shapes: b sequences, t tokens, d the
residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmm_ray.errors import UserError
from dmm_ray.seeds import numpy_rng
from dmm_ray.subject.blocks import find_blocks, text_model
from dmm_ray.subject.encoding import Chat, encode
from dmm_ray.subject.loading import Loaded, Placement, is_causal, position_offset
from dmm_ray.subject.packing import CannotPackError, changing_lengths, may_pack, packing
from dmm_ray.subject.source import SubjectSource, check_layers
from dmm_ray.subject.state import ModuleState

Hook = Callable[[Tensor], Tensor | None]
"""Sees a block's output (b, t, d); returns its replacement, or None to leave it."""
TRIAL_TOKENS, TRIAL_IDS = 24, 200
"""Length of the sequences that a model is tried out with, and most token ids in them."""
TRIAL_TOLERANCE = {torch.float32: 1e-4}
"""Mean difference of a sequence's rows relative to their norms that is still rounding, by dtype (others: 0.05);
sequences that see each other differ by many times that."""
Batching = Literal["packed", "padded", "alone"]
"""How sequences share a forward pass: laid end to end, padded to alike lengths, or not at all."""


class SubjectModel:
    """A language model in evaluation mode, without gradients: causal, or an encoder such as BERT.

    Loaded without a head, only its text model up to the highest wanted layer is read, kept and run.
    """

    def __init__(
        self,
        source: SubjectSource,
        loaded: Loaded,
        path: str,
        n_layers: int,
        head: bool,
        device: torch.device,
    ) -> None:
        self.source = source
        self.tokenizer = source.tokenizer
        self.n_layers = n_layers
        self.head = head
        self.device = device
        self._model = loaded.model
        self._blocks: nn.ModuleList = text_model(loaded.model).get_submodule(path)
        self._causal = is_causal(loaded.model) is True
        for config in (loaded.model.config, loaded.model.config.get_text_config()):
            config.use_cache = False  # nothing reads a cache, unless it is asked for
        self._first_position = position_offset(loaded.model)
        self._state = ModuleState(loaded.model)
        self._changing = changing_lengths(loaded.model.config.get_text_config())
        self._batching: dict[tuple[int, ...], Batching] = {}

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
        device_map: str | None = None,
        max_memory: Mapping[str, str] | None = None,
        offload_folder: str | None = None,
    ) -> SubjectModel:
        """Load a model folder or hub id.

        Args:
            model: a folder that holds config.json, or a hub id.
            layers: the layers that will be captured; without a head, blocks above the highest are not read
                (None keeps all).
            head: keep the whole language model, for ``token_losses``. An encoder has no head that predicts
                tokens; it is loaded without.
            device: a torch device, for a model that fits on one.
            dtype: of the weights and the computation.
            revision: hub branch, tag or commit.
            block_path: dotted path of the list of blocks in the whole model, for architectures not known here.
            trust_remote_code: run Python code that comes with the model.
            device_map: spread the weights over devices as transformers does, e.g. "auto"; needs accelerate.
            max_memory: for ``device_map``, the most to use by device, e.g. {"0": "70GiB", "cpu": "200GiB"}.
            offload_folder: for ``device_map``, a folder for weights that fit nowhere else.

        Raises:
            UserError: no model there, an unknown architecture, missing weights, a layer the model lacks, or a
                library that it needs is not installed.
        """
        source = SubjectSource.resolve(model, revision, trust_remote_code)
        n_layers = source.check(layers or (), block_path)
        path = find_blocks(source.skeleton, block_path)
        placement = Placement(device, device_map, max_memory, offload_folder)
        loaded = source.load(
            path,
            max(layers) + 1 if layers else n_layers,
            head=head and not source.bidirectional,
            dtype=dtype,
            placement=placement,
        )
        return cls(source, loaded, path, n_layers, head, loaded.input_device(placement))

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
    def bidirectional(self) -> bool:
        """Whether it is an encoder, whose tokens see those after them."""
        return self.source.bidirectional

    def tokenize(self, texts: Sequence[str | Chat], window: int) -> list[list[int]]:
        """Token ids of each text or chat, as ``encode`` makes them: with special tokens, cut at ``window``."""
        return [encoded.ids for encoded in encode(self.tokenizer, texts, window)]

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
        """Outputs of blocks ``layers``: ``{layer: (b, t, d)}`` in the compute dtype, on ``device``.

        Args:
            input_ids: int64 (b, t).
            attention_mask: int64 (b, t), 0 at padding, which may be on either side.
            layers: block numbers.

        Raises:
            UserError: a layer that is not loaded, or a block whose output is not (b, t, d).
        """
        if len(input_ids) == 1 or self.batching(input_ids.shape[1]) != "alone":
            return self._capture(input_ids, attention_mask, layers)
        captured: dict[int, Tensor] = {}
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask.bool(), strict=True)):
            for layer, hidden in self._capture(ids[mask][None], mask[mask][None].long(), layers).items():
                shape = (*input_ids.shape, hidden.shape[-1])
                captured.setdefault(layer, hidden.new_zeros(shape))[row, mask] = hidden[0]
        return captured

    def _capture(self, input_ids: Tensor, attention_mask: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """As :meth:`capture`, all sequences in one pass."""
        options = self._options(attention_mask)
        with self._capturing(layers, input_ids.shape) as captured:
            self._run(input_ids=input_ids, **options)
        return captured

    def _run(self, **options: Any) -> Any:
        """A forward pass of the model as it was loaded, whatever it has seen since."""
        self._state.restore()
        return self._model(**options)

    @torch.no_grad()
    def capture_packed(self, ids: Sequence[Sequence[int]], layers: Sequence[int]) -> dict[int, Tensor]:
        """Outputs of blocks ``layers`` for sequences that do not see each other, without padding.

        Args:
            ids: token ids of each sequence, the longest first; t tokens in all.
            layers: block numbers.

        Returns:
            ``{layer: (t, d)}`` in the compute dtype, on ``device``, the sequences end to end.

        Raises:
            CannotPackError: the model's attention is of another kind; ``batching`` says so beforehand.
            UserError: a layer that is not loaded, or a block whose output is not (1, t, d).
        """
        tokens = torch.tensor([[token for sequence in ids for token in sequence]], device=self.device)
        lengths = [len(sequence) for sequence in ids]
        with (
            self._capturing(layers, tokens.shape) as captured,
            packing(self._model, lengths, self.device) as pack,
        ):
            positions = pack.positions() + self._first_position
            self._run(input_ids=tokens, position_ids=positions)
        if pack.calls < max(layers) + 1:
            raise CannotPackError(f"{type(self._model).__name__} has attention of its own")
        return {layer: hidden[0] for layer, hidden in captured.items()}

    @torch.no_grad()
    def batching(self, longest: int) -> Batching:
        """How sequences of at most ``longest`` tokens can share a pass so that each gives the rows it gives alone.

        Tried with a few sequences: short ones, and ones on either side of every length below ``longest`` at which the
        configuration says that the model changes (LongRoPE's other factors, attention to a choice of tokens).
        """
        lengths = tuple(n for n in self._changing if n < longest)
        if lengths not in self._batching:
            self._batching[lengths] = self._try_batching(lengths, longest)
        return self._batching[lengths]

    def _try_batching(self, changing: Sequence[int], longest: int) -> Batching:
        layer, short = len(self._blocks) - 1, min(TRIAL_TOKENS, self.context)
        around = [
            n for at in changing for n in (min(3 * at, longest), min(2 * at, longest), at + 1, max(at - 3, 2))
        ]
        trial = [self.trial_ids(n) for n in sorted([short, max(short - 3, 2), 2, *around], reverse=True)]
        alone = [self._capture(*self.pad([ids]), [layer])[layer][0] for ids in trial]
        limit = TRIAL_TOLERANCE.get(alone[0].dtype, 0.05)

        def same(found: Sequence[Tensor]) -> bool:
            """Whether no sequence has other rows than alone, but for rounding."""
            pairs = [(x.float(), y.float()) for x, y in zip(found, alone, strict=True)]
            return all(
                float(((x - y).norm(dim=1) / y.norm(dim=1).clamp_min(1e-12)).mean()) <= limit
                for x, y in pairs
            )

        if self._causal and may_pack(self.source.config.get_text_config()):
            try:
                packed = self.capture_packed(trial, [layer])[layer]
            # TypeError: its forward takes no positions; RuntimeError: masks of its own for so many tokens at most
            except (CannotPackError, TypeError, RuntimeError):
                packed = None
            if packed is not None and same(packed.split([len(ids) for ids in trial])):
                return "packed"
        padded = self._capture(*self.pad(trial), [layer])[layer]
        return "padded" if same([x[: len(ids)] for x, ids in zip(padded, trial, strict=True)]) else "alone"

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
            UserError: an encoder, which predicts no next token.
            ValueError: loaded without ``head=True``, or one of ``layer`` and ``edit`` without the other.
        """
        if self.bidirectional:
            raise UserError(
                f"model: {self.model_id} is an encoder, which predicts no next token; give a causal model"
            )
        if not self.head:
            raise ValueError("token_losses needs SubjectModel.from_pretrained(..., head=True)")
        if (layer is None) != (edit is None):
            raise ValueError("layer and edit go together")

        def replace(hidden: Tensor) -> Tensor:
            assert edit is not None
            edited = edit(hidden.to(self.device).float()).to(hidden)
            return torch.cat([hidden[:, :1], edited[:, 1:]], dim=1)

        if len(input_ids) > 1 and self.batching(input_ids.shape[1]) == "alone":
            return self._losses_alone(input_ids, attention_mask, layer, replace)
        options = self._options(attention_mask)
        with self._hooks({} if layer is None else {layer: replace}):
            logits = self._run(input_ids=input_ids, **options).logits
        losses = torch.stack(
            [
                F.cross_entropy(row[:-1].float(), ids[1:], reduction="none")
                for row, ids in zip(logits, input_ids, strict=True)
            ]
        )
        return losses.masked_fill(attention_mask[:, 1:] == 0, float("nan"))

    def _losses_alone(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        layer: int | None,
        replace: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """As :meth:`token_losses`, a pass for each sequence; the edit sees all of them at once all the same."""
        edited = None if layer is None else replace(self.capture(input_ids, attention_mask, [layer])[layer])
        losses = torch.full(input_ids[:, 1:].shape, float("nan"), device=self.device)
        for row, mask in enumerate(attention_mask.bool()):
            hooks: dict[int, Hook] = {}
            if layer is not None and edited is not None:
                hooks[layer] = lambda _hidden, one=edited[row, mask][None]: one  # type: ignore[misc]
            ids = input_ids[row, mask]
            with self._hooks(hooks):
                logits = self._run(input_ids=ids[None]).logits[0]
            found = F.cross_entropy(logits[:-1].float(), ids[1:], reduction="none")
            losses[row, mask[1:] & mask[:-1]] = found
        return losses

    def _options(self, attention_mask: Tensor) -> dict[str, Any]:
        """What a forward pass is told beside the tokens. Call it outside of hooks: it may try the model out.

        Under causal attention nothing sees padding on the right: no mask is needed then, which leaves the attention
        kernels their fast path. Other padding moves the tokens' positions.
        """
        options: dict[str, Any] = {"attention_mask": attention_mask}
        if bool((attention_mask[:, :-1] >= attention_mask[:, 1:]).all()):
            if self._causal:
                options["attention_mask"] = None
        elif self._uses_positions:
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0) + self._first_position
            options["position_ids"] = positions
        return options

    def trial_ids(self, n: int) -> list[int]:
        """``n`` token ids of its vocabulary, to try something out with."""
        text = self.source.config.get_text_config()
        vocabulary = getattr(text, "vocab_size", None) or len(self.tokenizer)
        return numpy_rng(n).integers(0, min(TRIAL_IDS, vocabulary), n).tolist()

    @cached_property
    def _uses_positions(self) -> bool:
        """Whether positions can be given, and matter: tried with others than the default."""
        ids = torch.tensor([self.trial_ids(3)], device=self.device)
        positions = self._first_position + torch.tensor([[0, 1, 3]], device=self.device)
        layer = len(self._blocks) - 1
        plain = self._capture(ids, torch.ones_like(ids), [layer])[layer]
        with self._capturing([layer], ids.shape) as captured:
            try:
                self._run(input_ids=ids, position_ids=positions)
            except TypeError:
                return False
        return not torch.equal(plain, captured[layer])

    @contextmanager
    def _capturing(self, layers: Sequence[int], shape: torch.Size) -> Iterator[dict[int, Tensor]]:
        """Inside the block the model's outputs of ``layers`` for input ids of ``shape`` are put into what it gives."""
        check_layers(layers, len(self._blocks), f"{self.model_id} as loaded")
        captured: dict[int, Tensor] = {}

        def keep(layer: int) -> Hook:
            def hook(hidden: Tensor) -> None:
                if hidden.shape[:-1] != shape:
                    raise UserError(
                        f"model: block {layer} of {self.model_id} puts out {tuple(hidden.shape)} for "
                        f"{tuple(shape)} tokens; such models cannot be read"
                    )
                captured[layer] = hidden.to(self.device)

            return hook

        with self._hooks({layer: keep(layer) for layer in layers}):
            yield captured

    @contextmanager
    def _hooks(self, hooks: dict[int, Hook]) -> Iterator[None]:
        handles = [self._blocks[layer].register_forward_hook(_adapt(hook)) for layer, hook in hooks.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _adapt(hook: Hook) -> Callable[[nn.Module, Any, Any], Any]:
    """``hook`` as a forward hook of a block that returns a tensor or a tuple that starts with it."""

    def forward_hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        is_tuple = isinstance(output, tuple)
        new = hook(output[0] if is_tuple else output)
        if new is None:
            return None
        return (new, *output[1:]) if is_tuple else new

    return forward_hook
