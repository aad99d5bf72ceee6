"""Forward passes of a language model that are read and edited at sites: what capture, losses and generation share.

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
"""Most token ids in the sequences that a model is tried out with, and their length where any will do."""
TRIAL_TOLERANCE = {torch.float32: 1e-4}
"""Mean difference of a sequence's rows relative to their norms that is still rounding, by dtype (others: 0.05);
sequences that see each other differ by many times that."""


class Pass(NamedTuple):
    """A forward pass."""

    output: Any
    """The model's own output."""
    captured: dict[Site, Tensor]
    """The activations at each site that was to be read (b, t, w), in the compute dtype."""


class ModelRunner:
    """A loaded model and what is known of how to run it.

    Args:
        model: of transformers, with its weights.
        block_path: of the list of blocks inside its text model.
        name: for errors.
        context: the most tokens it was made for.
        vocabulary: how many tokens there are.
        device: where token ids go.
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
            config.use_cache = False  # nothing reads a cache, unless it is asked for
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
        """One forward pass that is read and edited at sites.

        Args:
            input_ids: int64 (b, t).
            tokens: which they are.
            sites: places to read.
            interventions: edits in force.
            later: continue earlier passes of a generation; else the model is as it was loaded.
            predicting: (b, t), True where a token predicts a new one, while generating.
            options: for the model's own forward.

        Raises:
            UserError: a layer that is not loaded, a site that the model does not have or whose activations are not
                (b, t, w), or an edit that fails.
        """
        active = interventions or Interventions()
        captured: dict[Site, Tensor] = {}
        reached: set[Site] = set()

        def by_token(site: Site, hidden: Tensor) -> Tensor:
            reached.add(site)
            # OPT's MLP runs on all tokens in one dimension.
            if hidden.shape[:-1] not in (input_ids.shape, (input_ids.numel(),)):
                raise UserError(
                    f"model: {site} of {self.name} puts out {tuple(hidden.shape)} for "
                    f"{tuple(input_ids.shape)} tokens; such models cannot be read"
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
        hooks += [(self._sites.place(site), reading(site)) for site in sites]  # after the edits
        with hooked(hooks):
            output = (self.model if later else self._run)(input_ids=input_ids, **options)
        for site in (*(one.site for one in active.given), *sites):
            if site not in reached:
                raise UserError(f"model: {self.name} does not use the module that should hold {site}")
        return Pass(output, captured)

    def padding_options(self, attention_mask: Tensor, seen: int = 0) -> dict[str, Any]:
        """What a forward pass over padded sequences is told besides the tokens.

        Call it outside of hooks: it may run the model.

        Under causal attention nothing sees padding on the right: no mask is needed then, which leaves the attention
        kernels their fast path. Other padding moves the tokens' positions.

        Args:
            attention_mask: (b, seen + t), 0 at padding.
            seen: how many of the columns a cache holds already.
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
        """The argument that has logits computed for the last ``n`` tokens only, where the model has one.

        Call it outside of hooks: it may run the model.
        """
        return {LOGITS_TO_KEEP: n} if self._keeps_logits else {}

    def trial_ids(self, n: int) -> list[int]:
        """``n`` token ids of its vocabulary, to try something out with."""
        return numpy_rng(n).integers(0, min(TRIAL_IDS, self.vocabulary), n).tolist()

    def _run(self, **options: Any) -> Any:
        """A forward pass of the model as it was loaded, whatever it has seen since."""
        self._state.restore()
        return self.model(**options)

    @torch.no_grad()
    def _run_shortly(self) -> None:
        ids = self.trial_ids(min(TRIAL_SHORT, self.context))
        self._run(input_ids=torch.tensor([ids], device=self.device))

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

    @cached_property
    def _uses_positions(self) -> bool:
        """Whether positions can be given, and matter: tried with others than the default."""
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
