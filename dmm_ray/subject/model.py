"""A frozen language model whose activations can be read and edited, and which generates text.

Layer k is the output of block k, counted from 0, before any final norm. Shapes: b sequences, t tokens, d the width of
the residual stream, w the width of a site, v the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from dmm_ray.arguments import as_integer
from dmm_ray.errors import UserError
from dmm_ray.subject.batching import Batching, BatchingTrials, capture_packed
from dmm_ray.subject.blocks import find_blocks
from dmm_ray.subject.decoding import DecodingTrials
from dmm_ray.subject.encoding import Chat, encode
from dmm_ray.subject.generation import Continuation, Sampling, generate
from dmm_ray.subject.intervention import Intervention, Interventions, Site, Tokens
from dmm_ray.subject.lens import logit_lens
from dmm_ray.subject.loading import LoadedModel, Placement
from dmm_ray.subject.losses import batches, token_losses
from dmm_ray.subject.reading import Prompt, Reading, TokenPiece, pieces_of, prompt_ids, text_ids, token_text
from dmm_ray.subject.runner import ModelRunner, pad
from dmm_ray.subject.source import SubjectSource

Where = TypeVar("Where", int, Site)


class SubjectModel:
    """A language model in evaluation mode, without gradients: causal, or an encoder such as BERT. Not thread-safe.

    Without a head, only its text model up to the highest requested layer is read, kept and run.
    """

    def __init__(
        self,
        source: SubjectSource,
        loaded: LoadedModel,
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
        vocabulary = getattr(source.config.get_text_config(), "vocab_size", None) or len(source.tokenizer)
        self.runner = ModelRunner(loaded.model, path, source.model_id, source.context, vocabulary, device)
        self.decoding_trials = DecodingTrials(self.runner)
        self._batching_trials = BatchingTrials(self.runner)

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
        """Load a model from a folder, a GGUF file or the hub.

        Args:
            model: a folder that contains config.json, or a hub id.
            layers: the layers to be captured; without a head, blocks above the highest one are not read (None keeps
                all blocks).
            head: keep the whole language model, for ``token_losses``, ``generate`` and ``lens``. An encoder has no
                head that predicts next tokens and is always loaded without one.
            device: a torch device, for a model that fits on one.
            dtype: dtype of the weights and the computation.
            revision: hub branch, tag or commit.
            block_path: dotted path of the list of blocks in the whole model, for unknown architectures.
            trust_remote_code: run Python code that comes with the model.
            device_map: spread the weights over devices as transformers does, e.g. "auto"; requires accelerate.
            max_memory: with ``device_map``, maximum memory per device, e.g. {"0": "70GiB", "cpu": "200GiB"}.
            offload_folder: with ``device_map``, a folder for weights that fit on no device.

        Raises:
            UserError: there is no such model, its architecture is unknown, weights are missing, the model lacks a
                layer, or a required library is not installed.

        Example:
            >>> subject = SubjectModel.from_pretrained("runs/demo/model", head=True)
            >>> subject.d, subject.context
            (64, 256)
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
        """Context window of the model, in tokens."""
        return self.source.context

    @property
    def model_id(self) -> str:
        """The absolute path or hub id that the model was loaded from."""
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
        """Whether the model is an encoder, whose tokens attend to later ones."""
        return self.source.bidirectional

    def tokenize(self, texts: Sequence[str | Chat], window: int) -> list[list[int]]:
        """Token ids of each text or chat as ``encode`` returns them: with special tokens, truncated to ``window``.

        Example:
            >>> [len(ids) for ids in subject.tokenize(["Once upon a time", ""], window=3)]
            [3, 0]
        """
        return [encoded.ids for encoded in encode(self.tokenizer, texts, window)]

    def pad(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """``ids`` as ``(input_ids, attention_mask)``: int64 (b, t), padded on the right, on the model's device.

        Example:
            >>> input_ids, attention_mask = subject.pad([[0, 5, 6], [0, 5]])
            >>> input_ids.shape, attention_mask.sum().item()
            (torch.Size([2, 3]), 5)
        """
        return pad(ids, self.device)

    @torch.no_grad()
    def capture(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        sites: Sequence[Where],
        interventions: Sequence[Intervention] = (),
        *,
        require_effect: bool = False,
    ) -> dict[Where, Tensor]:
        """Activations at ``sites``: ``{site: (b, t, w)}`` in the compute dtype, on ``device``.

        Args:
            input_ids: int64 (b, t).
            attention_mask: int64 (b, t), 0 at padding, which may be on either side.
            sites: sites to read; an integer k stands for ``Site(k)``, the output of that block. Sites are read after
                the interventions.
            interventions: edits; those at the same site apply in this order. The ids of their rows are (index in the
                batch, position).
            require_effect: raise an error if an intervention changes no activation.

        Raises:
            UserError: a layer is not loaded, the model lacks a site or its activations are not (b, t, w), an edit
                fails, or an edit lacks a required effect.

        Example:
            >>> rows = subject.capture(*subject.pad([[0, 5, 6]]), [2])[2]
        """
        asked = {where: Site(where) if isinstance(where, int) else where for where in sites}
        active, tokens = Interventions(interventions, require_effect), Tokens.of(attention_mask)
        if self._alone(input_ids):
            found = self._capture_alone(input_ids, tokens, list(asked.values()), active)
        else:
            options = self.runner.padding_options(attention_mask)
            found = self.runner.forward(input_ids, tokens, list(asked.values()), active, **options).captured
        active.check_effect()
        return {where: found[site] for where, site in asked.items()}

    def _capture_alone(
        self, input_ids: Tensor, tokens: Tokens, sites: Sequence[Site], active: Interventions
    ) -> dict[Site, Tensor]:
        """See :meth:`capture`; each sequence gets its own pass."""
        captured: dict[Site, Tensor] = {}
        for row, real in enumerate(tokens.real):
            alone = tokens.alone(row)
            found = self.runner.forward(input_ids[row, real][None], alone, sites, active).captured
            for site, hidden in found.items():
                shape = (*input_ids.shape, hidden.shape[-1])
                captured.setdefault(site, hidden.new_zeros(shape))[row, real] = hidden[0]
        return captured

    def capture_packed(self, ids: Sequence[Sequence[int]], layers: Sequence[int]) -> dict[int, Tensor]:
        """Outputs of blocks ``layers`` for sequences packed end to end without padding, each isolated from the others.

        Args:
            ids: token ids of each sequence, the longest first; t tokens in all.
            layers: block numbers.

        Returns:
            ``{layer: (t, d)}`` in the compute dtype, on ``device``, the sequences end to end.

        Raises:
            CannotPackError: the model's kind of attention is unsupported; check with ``batching`` first.
            UserError: a layer is not loaded, or a block's output is not (1, t, d).

        Example:
            >>> subject.capture_packed([[0, 5, 6], [0, 5]], [2])[2].shape
            torch.Size([5, 64])
        """
        return capture_packed(self.runner, ids, layers)

    def batching(self, longest: int) -> Batching:
        """How sequences of at most ``longest`` tokens can share a pass so that each yields the same rows as alone;
        decided by a trial, once per set of lengths that matter.

        Example:
            >>> subject.batching(longest=100)
            'packed'
        """
        return self._batching_trials.batching(longest)

    def token_losses(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        interventions: Sequence[Intervention] = (),
        *,
        require_effect: bool = False,
    ) -> Tensor:
        """Cross-entropy of each next token in nats, (b, t - 1): column i is for token i + 1; NaN at padding.

        Args:
            input_ids: int64 (b, t).
            attention_mask: int64 (b, t), 0 at padding, which may be on either side.
            interventions: see :meth:`capture`.
            require_effect: see :meth:`capture`.

        Raises:
            UserError: the model is an encoder, which predicts no next tokens; or as :meth:`capture`.
            ValueError: loaded without ``head=True``.

        Example:
            >>> halve = Intervention(Site(2), lambda x, ids: x / 2)
            >>> subject.token_losses(*subject.pad([[0, 5, 6]]), [halve]).shape
            torch.Size([1, 2])
        """
        self._require_head("token_losses")
        active = Interventions(interventions, require_effect)
        losses = token_losses(self.runner, input_ids, attention_mask, active, self._alone(input_ids))
        active.check_effect()
        return losses

    def generate(
        self,
        prompts: Sequence[Prompt],
        interventions: Sequence[Intervention] = (),
        *,
        max_tokens: int = 64,
        temperature: float | Sequence[float] = 0.0,
        seed: int = 0,
        ids: Sequence[int] | None = None,
        batch_size: int = 64,
        require_effect: bool = False,
    ) -> list[Continuation]:
        """Continue each prompt until the model ends the text or the context or ``max_tokens`` is reached.

        A continuation depends on the prompt, its id, the arguments and the seed alone, not on the other prompts in its
        batch (up to rounding).

        Args:
            prompts: texts, chats or token ids, none of them empty.
            interventions: see :meth:`capture`; the ids of their rows are (id of the prompt, position).
            max_tokens: maximum number of new tokens per prompt.
            temperature: 0 takes the likeliest token, 1 samples from the model's own distribution; one value for all
                prompts or one per prompt.
            seed: seed of the sampling.
            ids: ids of the prompts, for sampling and edits; defaults to 0, 1, ...
            batch_size: maximum number of prompts that share a pass; a model whose sequences cannot share one uses 1.
            require_effect: see :meth:`capture`.

        Raises:
            UserError: a prompt is blank or fills the context, or the model cannot generate; or as :meth:`capture`.

        Example:
            >>> [one] = subject.generate(["Once upon a time"], max_tokens=8)
            >>> one.text
            ', two generous girls n'
        """
        self.require_generation()
        active = Interventions(interventions, require_effect)
        known = prompt_ids(self.tokenizer, prompts, self.context, self.runner.vocabulary)
        sampling = Sampling.of(len(known), max_tokens, temperature, seed, ids)
        found = generate(self, known, sampling, active, as_integer("batch_size", batch_size, least=1))
        active.check_effect()
        return found

    def require_generation(self) -> None:
        """Check that the model can generate.

        Raises:
            UserError: it does not predict next tokens, or cannot do so from a key-value cache.
            ValueError: loaded without ``head=True``.
        """
        self._require_head("generation")
        if not self.generates:
            raise UserError(
                f"model: {self.model_id} cannot predict from a key-value cache, which generation requires"
            )

    @property
    def generates(self) -> bool:
        """Whether it predicts the same next token from a cache as from the full text; tried with a few tokens."""
        return self.head and not self.bidirectional and self.decoding_trials.continues

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end a text."""
        stated = [self.runner.model.generation_config, self.source.config.get_text_config(), self.tokenizer]
        found = [getattr(where, "eos_token_id", None) for where in stated]
        return frozenset(
            i for ids in found for i in (ids if isinstance(ids, list) else [ids]) if i is not None
        )

    def continuation_nats(
        self, prompts: Sequence[Sequence[int]], new: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """``-log p`` of each token in ``new`` given its prompt, under the model without interventions.

        Example:
            >>> found = subject.generate(["Once", "The king"], max_tokens=8)
            >>> nats = subject.continuation_nats([c.prompt for c in found], [c.ids for c in found])
            >>> [len(of_tokens) for of_tokens in nats]
            [8, 8]
        """
        whole = [[*before, *ids] for before, ids in zip(prompts, new, strict=True)]
        found: list[list[float]] = [[] for _ in whole]
        some = [i for i in range(len(whole)) if new[i]]
        for batch in batches([len(whole[i]) for i in some], self.runner.vocabulary):
            chosen = [some[k] for k in batch]
            losses = self.token_losses(*self.pad([whole[i] for i in chosen]))
            for i, row in zip(chosen, losses.tolist(), strict=True):
                found[i] = row[len(prompts[i]) - 1 : len(whole[i]) - 1]
        return found

    def lens(self, rows: Tensor) -> Tensor:
        """The logit lens: logits (n, v), float32 on the CPU, of activations (n, d).

        The rows are substituted for the last block's output; final norm and unembedding are the model's own.

        Raises:
            UserError: the model is an encoder, or rows contain NaN or Inf or are so large that their logits do.
            ValueError: loaded without ``head=True``.

        Example:
            >>> rows = subject.read("Once upon a time", layer=2).rows
            >>> subject.lens(rows).shape
            torch.Size([6, 2048])
        """
        self._require_head("the logit lens")
        return logit_lens(self.runner, rows)

    def read(self, text: str, layer: int) -> Reading:
        """The tokens of ``text`` and the layer's output at each of them.

        Raises:
            TooLongError: the text is longer than the model's context.
            UserError: the text has no tokens, the model lacks the layer, or its tokenizer has no character offsets.

        Example:
            >>> reading = subject.read("Once upon a time", layer=2)
            >>> [piece.text for piece in reading.pieces], reading.rows.shape
            (['<s>', 'On', 'ce', ' upon', ' a', ' time'], torch.Size([6, 64]))
        """
        pieces = self.pieces(text)
        ids, site = torch.tensor([[piece.id for piece in pieces]], device=self.device), Site(layer)
        options = self.runner.last_logits(1) if self.head else {}
        captured = self.runner.forward(ids, Tokens.of(torch.ones_like(ids)), [site], **options).captured
        return Reading(pieces, captured[site][0].float().cpu())

    def pieces(self, text: str) -> list[TokenPiece]:
        """The tokens of ``text``, special ones included, exactly as in extraction. Raises as :meth:`read`.

        Example:
            >>> [piece.text for piece in subject.pieces("Once upon")]
            ['<s>', 'On', 'ce', ' upon']
        """
        return pieces_of(self.tokenizer, text, text_ids(self.tokenizer, text, self.context))

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; a chat ends where the model's answer begins.

        Raises:
            UserError: the prompt has no tokens or token ids outside the vocabulary, or the template rejects the chat.
            TooLongError: the prompt leaves no room for a new token.

        Example:
            >>> subject.prompt_ids("Once upon")
            [0, 765, 432, 1626]
        """
        return prompt_ids(self.tokenizer, [prompt], self.context, self.runner.vocabulary)[0]

    def token_text(self, token: int) -> str:
        """A token's characters, or its name in the vocabulary if it is part of a character, or special.

        Example:
            >>> [subject.token_text(token) for token in subject.prompt_ids("Once upon")]
            ['<s>', 'On', 'ce', ' upon']
        """
        return token_text(self.tokenizer, token)

    def _alone(self, input_ids: Tensor) -> bool:
        """Whether these sequences (b, t) need one pass each."""
        return len(input_ids) > 1 and self.batching(input_ids.shape[1]) == "alone"

    def _require_head(self, what: str) -> None:
        if self.bidirectional:
            raise UserError(
                f"model: {self.model_id} is an encoder, which predicts no next tokens; give a causal model"
            )
        if not self.head:
            raise ValueError(f"{what} requires SubjectModel.from_pretrained(..., head=True)")
