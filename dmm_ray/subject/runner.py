"""Forward passes of a language model with reads and edits at sites, shared by capture, losses and generation.

Shapes: b sequences, t tokens, w the width of a site.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dmm_ray.errors import UserError
from dmm_ray.seeds import numpy_rng
from dmm_ray.subject.blocks import text_model
from dmm_ray.subject.intervention import Interventions, Site, Tokens
from dmm_ray.subject.loading import is_causal, position_offset
from dmm_ray.subject.sites import Hook, Place, Sites, hooked
from dmm_ray.subject.state import ModuleState

LOGITS_TO_KEEP = "logits_to_keep"
TRIAL_IDS, TRIAL_SHORT = 200, 4
"""Number of distinct token ids used in trial sequences, and their length where any will do."""
TRIAL_TOLERANCE = {torch.float32: 1e-4}
"""Mean difference of a sequence's rows, relative to their norms, that still counts as rounding, by dtype (others:
0.05). Sequences that attend to each other differ by many times that."""


class Pass(NamedTuple):
    """A forward pass."""

    output: Any
    """The model's own output."""
    captured: dict[Site, Tensor]
    """The activations (b, t, w) at each site read, in the compute dtype."""


class ModelRunner:
    """A loaded model and how to run it.

    Args:
        model: a transformers model with its weights.
        block_path: path of the list of blocks inside its text model.
        name: name of the model in error messages.
        context: maximum number of tokens.
        vocabulary: size of the vocabulary.
        device: device of the token ids.
    """

    def __init__(
        self, model: Any, block_path: str, name: str, context: int, vocabulary: int, device: torch.device
    ) -> None:
        self.model = model
        self.blocks: nn.ModuleList = text_model(model).get_submodule(block_path)
        self.name = name
        self.context = context
        self.vocabulary = vocabulary
        self.device = device
        self.config = model.config.get_text_config()
        for config in (model.config, self.config):
            config.use_cache = False  # only generation reads a cache, and it requests one explicitly
        self.causal = is_causal(model) is True
        self.first_position = position_offset(model)
        self._state = ModuleState(model)
        self._sites = Sites(name, self.blocks, self.config, self._run_shortly)

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
        """One forward pass with reads and edits at sites.

        Args:
            input_ids: int64 (b, t).
            tokens: ids and padding of these tokens.
            sites: sites to read.
            interventions: edits to apply.
            later: continue earlier passes of a generation; otherwise, the model's state is first reset.
            predicting: (b, t), True where a token predicts a new one; during generation only.
            options: passed to the model's forward.

        Raises:
            UserError: a layer is not loaded, the model lacks a site or its activations are not (b, t, w), or an edit
                fails.
        """
        active = interventions or Interventions()
        captured: dict[Site, Tensor] = {}
        reached: set[Site] = set()

        def by_token(site: Site, hidden: Tensor) -> Tensor:
            reached.add(site)
            # OPT's MLP runs on all tokens in one dimension.
            if hidden.shape[:-1] not in (input_ids.shape, (input_ids.numel(),)):
                raise UserError(
                    f"model: {site} of {self.name} outputs {tuple(hidden.shape)} for "
                    f"{tuple(input_ids.shape)} tokens; such models are unsupported"
                )
            return hidden.reshape(*input_ids.shape, hidden.shape[-1])

        def editing(index: int) -> Hook:
            def hook(hidden: Tensor) -> Tensor:
                rows = by_token(active.given[index].site, hidden)
                return active.apply(index, rows, tokens, predicting).reshape(hidden.shape)

            return hook

        def reading(site: Site) -> Hook:
            def hook(hidden: Tensor) -> None:
                captured[site] = by_token(site, hidden).to(self.device)

            return hook

        hooks: list[tuple[Place, Hook]] = []
        for index, one in enumerate(active.given):
            hooks.append((self._sites.place(one.site), editing(index)))
        hooks += [
            (self._sites.place(site), reading(site)) for site in sites
        ]  # last, to see the edited activations
        with hooked(hooks):
            output = (self.model if later else self._run)(input_ids=input_ids, **options)
        for site in (*(one.site for one in active.given), *sites):
            if site not in reached:
                raise UserError(f"model: {self.name} does not use the module that should hold {site}")
        return Pass(output, captured)

    def padding_options(self, attention_mask: Tensor, seen: int = 0) -> dict[str, Any]:
        """Arguments for a forward pass over padded sequences, besides the tokens.

        Call it outside of hooks: it may run the model.

        Under causal attention, nothing attends to padding on the right, so no mask is needed and attention kernels can
        take their fast path. Any other padding shifts the tokens' positions.

        Args:
            attention_mask: (b, seen + t), 0 at padding.
            seen: number of columns already in the cache.
        """
        options: dict[str, Any] = {"attention_mask": attention_mask}
        if bool((attention_mask[:, :-1] >= attention_mask[:, 1:]).all()):
            if self.causal:
                options["attention_mask"] = None
        elif self._uses_positions:
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0) + self.first_position
            options["position_ids"] = positions[:, seen:]
        return options

    def last_logits(self, n: int) -> dict[str, Any]:
        """The argument that limits logits to the last ``n`` tokens; empty if the model has none.

        Call it outside of hooks: it may run the model.
        """
        return {LOGITS_TO_KEEP: n} if self._keeps_logits else {}

    def trial_ids(self, n: int) -> list[int]:
        """``n`` token ids of the vocabulary for a trial run."""
        return numpy_rng(n).integers(0, min(TRIAL_IDS, self.vocabulary), n).tolist()

    def _run(self, **options: Any) -> Any:
        """A forward pass of the model in its state as loaded, regardless of earlier passes."""
        self._state.restore()
        return self.model(**options)

    @torch.no_grad()
    def _run_shortly(self) -> None:
        ids = self.trial_ids(min(TRIAL_SHORT, self.context))
        self._run(input_ids=torch.tensor([ids], device=self.device))

    @cached_property
    @torch.no_grad()
    def _keeps_logits(self) -> bool:
        """Whether the model can return the last logits only, as a trial shows."""
        ids = torch.tensor([self.trial_ids(2)], device=self.device)
        try:
            logits = self._run(input_ids=ids, **{LOGITS_TO_KEEP: 1}).logits
        except (TypeError, AttributeError):  # no such argument, or no logits
            return False
        return logits.shape[1] == 1

    @cached_property
    def _uses_positions(self) -> bool:
        """Whether position ids are accepted and matter, as a trial with non-default ones shows."""
        ids = torch.tensor([self.trial_ids(3)], device=self.device)
        positions = self.first_position + torch.tensor([[0, 1, 3]], device=self.device)
        site, tokens = Site(len(self.blocks) - 1), Tokens.of(torch.ones_like(ids))
        plain = self.forward(ids, tokens, [site]).captured[site]
        try:
            moved = self.forward(ids, tokens, [site], position_ids=positions).captured[site]
        except TypeError:
            return False
        return not torch.equal(plain, moved)


def pad(ids: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """``ids`` as ``(input_ids, attention_mask)``: int64 (b, t), padded on the right."""
    width = max(map(len, ids))
    input_ids = torch.zeros(len(ids), width, dtype=torch.long)
    mask = torch.zeros(len(ids), width, dtype=torch.long)
    for row, tokens in enumerate(ids):
        input_ids[row, : len(tokens)] = torch.as_tensor(tokens)
        mask[row, : len(tokens)] = 1
    return input_ids.to(device), mask.to(device)
