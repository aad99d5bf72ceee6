"""A frozen language model with its block outputs open to reading and editing.

Layer k is the output of block k counted from 0, before any final norm. Shapes: b sequences, t tokens, d the
residual width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmm_ray.errors import UserError
from dmm_ray.seeds import numpy_rng
from dmm_ray.subject.blocks import find_blocks, text_model
from dmm_ray.subject.encoding import Chat, encode
from dmm_ray.subject.intervention import Intervention, Interventions, Site, Tokens
from dmm_ray.subject.loading import Loaded, Placement, is_causal, position_offset
from dmm_ray.subject.packing import CannotPackError, changing_lengths, may_pack, packing
from dmm_ray.subject.reading import Piece, Reading, TooLongError, pieces_of, token_text
from dmm_ray.subject.sites import Hook, Place, Sites, hooked
from dmm_ray.subject.source import SubjectSource
from dmm_ray.subject.state import ModuleState

LOGITS_TO_KEEP = "logits_to_keep"
Where = TypeVar("Where", int, Site)
TRIAL_TOKENS, TRIAL_IDS, TRIAL_SHORT = 24, 200, 4
"""Length of the sequences that a model is tried out with, most token ids in them, and the length where any will do."""
TRIAL_TOLERANCE = {torch.float32: 1e-4}
"""Mean difference of a sequence's rows relative to their norms that is still rounding, by dtype (others: 0.05);
sequences that see each other differ by many times that."""
Batching = Literal["packed", "padded", "alone"]
"""How sequences share a forward pass: laid end to end, padded to alike lengths, or not at all."""


class Pass(NamedTuple):
    """A forward pass."""

    output: Any
    """The model's own output."""
    captured: dict[Site, Tensor]
    """What is at each site that was to be read (b, t, w), in the compute dtype."""


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
        self._sites = Sites(source.model_id, self._blocks, source.config.get_text_config(), self._try)
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
    def capture(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        sites: Sequence[Where],
        interventions: Sequence[Intervention] = (),
    ) -> dict[Where, Tensor]:
        """Activations at ``sites``: ``{site: (b, t, w)}`` in the compute dtype, on ``device``.

        Args:
            input_ids: int64 (b, t).
            attention_mask: int64 (b, t), 0 at padding, which may be on either side.
            sites: places to read; a number stands for the output of that block, ``Site(k)``. What is read at a site
                is what interventions have made of it.
            interventions: edits; ids of their rows are (index in the batch, position).

        Raises:
            UserError: a layer that is not loaded, a site that the model does not have or whose activations are not
                (b, t, w), or an intervention without the effect that it requires.

        Example:
            >>> rows = subject.capture(*subject.pad([[0, 5, 6]]), [2])[2]  # doctest: +SKIP
        """
        asked = {where: Site(where) if isinstance(where, int) else where for where in sites}
        active, tokens = Interventions(interventions), Tokens.of(attention_mask)
        if len(input_ids) == 1 or self.batching(input_ids.shape[1]) != "alone":
            options = self.padding_options(attention_mask)
            found = self.forward(input_ids, tokens, list(asked.values()), active, **options).captured
        else:
            found = self._capture_alone(input_ids, tokens, list(asked.values()), active)
        active.check_effect()
        return {where: found[site] for where, site in asked.items()}

    def _capture_alone(
        self, input_ids: Tensor, tokens: Tokens, sites: Sequence[Site], active: Interventions
    ) -> dict[Site, Tensor]:
        """As :meth:`capture`, a pass for each sequence."""
        captured: dict[Site, Tensor] = {}
        for row, real in enumerate(tokens.real):
            one = Tokens(tokens.ids[row, real][None], real[real][None])
            for site, hidden in self.forward(input_ids[row, real][None], one, sites, active).captured.items():
                shape = (*input_ids.shape, hidden.shape[-1])
                captured.setdefault(site, hidden.new_zeros(shape))[row, real] = hidden[0]
        return captured

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        tokens: Tokens,
        sites: Sequence[Site] = (),
        interventions: Interventions | None = None,
        *,
        later: bool = False,
        predicting: Tensor | None = None,
        **options: Any,
    ) -> Pass:
        """One forward pass that is read and edited at sites: what all other methods are made of.

        Args:
            input_ids: int64 (b, t).
            tokens: whose they are.
            sites: places to read.
            interventions: edits in force.
            later: go on from earlier passes of a generation; else the model is as it was loaded.
            predicting: (b, t), True where a token predicts a new one, while generating.
            options: for the model's own forward.

        Raises:
            UserError: as :meth:`capture`.
        """
        active = interventions or Interventions()
        captured: dict[Site, Tensor] = {}

        def by_token(site: Site, hidden: Tensor) -> Tensor:
            # OPT's MLP runs on all tokens in one dimension.
            if hidden.shape[:-1] not in (input_ids.shape, (input_ids.numel(),)):
                raise UserError(
                    f"model: {site} of {self.model_id} puts out {tuple(hidden.shape)} for "
                    f"{tuple(input_ids.shape)} tokens; such models cannot be read"
                )
            return hidden.reshape(*input_ids.shape, hidden.shape[-1])

        def editing(index: int) -> Hook:
            def hook(hidden: Tensor) -> Tensor:
                there = by_token(active.given[index].site, hidden)
                return active.apply(index, there, tokens, predicting).reshape(hidden.shape)

            return hook

        def reading(site: Site) -> Hook:
            def hook(hidden: Tensor) -> None:
                captured[site] = by_token(site, hidden).to(self.device)

            return hook

        hooks: list[tuple[Place, Hook]] = []
        for index, one in enumerate(active.given):
            hooks.append((self._sites.place(one.site), editing(index)))
        hooks += [(self._sites.place(site), reading(site)) for site in sites]  # after the edits
        run = self._model if later else self._run
        with hooked(hooks):
            output = run(input_ids=input_ids, **options)
        return Pass(output, captured)

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
        with packing(self._model, lengths, self.device) as pack:
            positions = pack.positions() + self._first_position
            nobody = Tokens.of(torch.ones_like(tokens))
            sites = [Site(layer) for layer in layers]
            captured = self.forward(tokens, nobody, sites, position_ids=positions).captured
        if pack.calls < max(layers) + 1:
            raise CannotPackError(f"{type(self._model).__name__} has attention of its own")
        return {site.layer: hidden[0] for site, hidden in captured.items()}

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
        alone = [self._block_output([ids], layer)[0] for ids in trial]
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
        padded = self._block_output(trial, layer)
        return "padded" if same([x[: len(ids)] for x, ids in zip(padded, trial, strict=True)]) else "alone"

    def _block_output(self, ids: Sequence[Sequence[int]], layer: int) -> Tensor:
        """A block's output (b, t, d) for sequences that share a pass."""
        input_ids, mask = self.pad(ids)
        options = self.padding_options(mask)
        return self.forward(input_ids, Tokens.of(mask), [Site(layer)], **options).captured[Site(layer)]

    @torch.no_grad()
    def token_losses(
        self, input_ids: Tensor, attention_mask: Tensor, interventions: Sequence[Intervention] = ()
    ) -> Tensor:
        """Cross-entropy of each next token in nats, (b, t - 1): column i is token i + 1; NaN at padding.

        Args:
            input_ids: int64 (b, t).
            attention_mask: int64 (b, t), 0 at padding, which may be on either side.
            interventions: edits; ids of their rows are (index in the batch, position).

        Raises:
            UserError: an encoder, which predicts no next token; as :meth:`capture`.
            ValueError: loaded without ``head=True``.
        """
        if self.bidirectional:
            raise UserError(
                f"model: {self.model_id} is an encoder, which predicts no next token; give a causal model"
            )
        if not self.head:
            raise ValueError("token_losses needs SubjectModel.from_pretrained(..., head=True)")
        active, tokens = Interventions(interventions), Tokens.of(attention_mask)
        if len(input_ids) > 1 and self.batching(input_ids.shape[1]) == "alone":
            losses = torch.full(input_ids[:, 1:].shape, float("nan"), device=self.device)
            for row, real in enumerate(tokens.real):
                one = Tokens(tokens.ids[row, real][None], real[real][None])
                found = self._losses(input_ids[row, real][None], one, active)
                losses[row, real[1:] & real[:-1]] = found[0]
        else:
            losses = self._losses(input_ids, tokens, active, **self.padding_options(attention_mask))
        active.check_effect()
        return losses.masked_fill(attention_mask[:, 1:] == 0, float("nan"))

    def _losses(self, input_ids: Tensor, tokens: Tokens, active: Interventions, **options: Any) -> Tensor:
        logits = self.forward(input_ids, tokens, (), active, **options).output.logits
        # Sequence by sequence: float32 logits of all of them would take b times the memory.
        pairs = zip(logits, input_ids, strict=True)
        return torch.stack(
            [F.cross_entropy(row[:-1].float(), ids[1:], reduction="none") for row, ids in pairs]
        )

    def padding_options(self, attention_mask: Tensor, seen: int = 0) -> dict[str, Any]:
        """What a forward pass over padded sequences is told beside the tokens.

        Call it outside of hooks: it may try the model out.

        Under causal attention nothing sees padding on the right: no mask is needed then, which leaves the attention
        kernels their fast path. Other padding moves the tokens' positions.

        Args:
            attention_mask: (b, seen + t), 0 at padding.
            seen: how many of the columns a cache holds already.
        """
        options: dict[str, Any] = {"attention_mask": attention_mask}
        if bool((attention_mask[:, :-1] >= attention_mask[:, 1:]).all()):
            if self._causal:
                options["attention_mask"] = None
        elif self._uses_positions:
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0) + self._first_position
            options["position_ids"] = positions[:, seen:]
        return options

    def last_logits(self, n: int) -> dict[str, Any]:
        """The argument that has logits computed for the last ``n`` tokens only, where the model has one. Call it
        outside of hooks: it may try the model out."""
        return {LOGITS_TO_KEEP: n} if self._keeps_logits else {}

    @cached_property
    @torch.no_grad()
    def _keeps_logits(self) -> bool:
        """Whether it can be told to give the last logits only: tried."""
        ids = torch.tensor([self.trial_ids(2)], device=self.device)
        try:
            logits = self._run(input_ids=ids, **{LOGITS_TO_KEEP: 1}).logits
        except (TypeError, AttributeError):  # no such argument; no logits
            return False
        return logits.shape[1] == 1

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        text = self.source.config.get_text_config()
        return getattr(text, "vocab_size", None) or len(self.tokenizer)

    @torch.no_grad()
    def read(self, text: str, layer: int) -> Reading:
        """The tokens of ``text`` and the layer's output at each.

        Raises:
            TooLongError: more tokens than the model's context.
            UserError: a text without tokens, a layer the model lacks, or a tokenizer without character offsets.

        Example:
            >>> reading = subject.read("Once upon a time", layer=2)  # doctest: +SKIP
            >>> [piece.text for piece in reading.pieces], reading.rows.shape  # doctest: +SKIP
        """
        pieces = self.pieces(text)
        ids, site = torch.tensor([[piece.id for piece in pieces]], device=self.device), Site(layer)
        options = self.last_logits(1) if self.head else {}
        captured = self.forward(ids, Tokens.of(torch.ones_like(ids)), [site], **options).captured
        return Reading(pieces, captured[site][0].float().cpu())

    def pieces(self, text: str) -> list[Piece]:
        """The tokens of ``text``, special ones included, as extraction makes them. Raises as :meth:`read`."""
        return pieces_of(self.tokenizer, text, self.prompt_ids(text))

    def prompt_ids(self, text: str, field: str = "text") -> list[int]:
        """Token ids of ``text``, special ones included, not cut.

        Args:
            text: not blank.
            field: what errors call it.

        Raises:
            UserError: a text without tokens.
            TooLongError: more tokens than the model's context.
        """
        [ids] = self.tokenize([text], self.context + 1)
        if not ids:
            raise UserError(f"{field}: it holds no tokens; send some words")
        if len(ids) > self.context:
            raise TooLongError(
                f"{field}: more tokens than the model's context of {self.context}; send it in parts"
            )
        return ids

    def token_text(self, token: int) -> str:
        """A token's characters; its name in the vocabulary where it is part of a character, or special."""
        return token_text(self.tokenizer, token)

    def trial_ids(self, n: int) -> list[int]:
        """``n`` token ids of its vocabulary, to try something out with."""
        return numpy_rng(n).integers(0, min(TRIAL_IDS, self.vocabulary), n).tolist()

    def _try(self) -> None:
        """Run the model on a few tokens."""
        self._run(
            input_ids=torch.tensor([self.trial_ids(min(TRIAL_SHORT, self.context))], device=self.device)
        )

    @cached_property
    def _uses_positions(self) -> bool:
        """Whether positions can be given, and matter: tried with others than the default."""
        ids = torch.tensor([self.trial_ids(3)], device=self.device)
        positions = self._first_position + torch.tensor([[0, 1, 3]], device=self.device)
        layer = len(self._blocks) - 1
        site, tokens = Site(layer), Tokens.of(torch.ones_like(ids))
        plain = self.forward(ids, tokens, [site]).captured[site]
        try:
            moved = self.forward(ids, tokens, [site], position_ids=positions).captured[site]
        except TypeError:
            return False
        return not torch.equal(plain, moved)
