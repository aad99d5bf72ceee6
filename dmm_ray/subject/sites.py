"""Where the sites of a language model are: which module's input or output holds each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dmm_ray.errors import UserError
from dmm_ray.subject.intervention import Site
from dmm_ray.subject.source import check_layers

Hook = Callable[[Tensor], Tensor | None]
"""Sees the activations at a site (b, t, w); returns their replacement, or None to leave them."""
MLP_NAMES = (
    "post_feedforward_layernorm",
    "post_mlp_layernorm",
    "mlp",
    "feed_forward",
    "ffn",
    "block_sparse_moe",
    "moe",
    "fc2",
)
"""What may add the MLP's output to the residual stream, in a block: a norm after the MLP where there is one (Gemma 2
and 3, OLMo 2), then the MLP under its usual names. Which of them does is found by trial."""
ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
PROJECTION_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "wo", "proj")
"""The attention's output projection, inside the attention."""
ADDED, TOLERANCE = 0.1, 1e-3
"""What is added to a candidate in a trial, relative to the residual stream's norm, and how far the block's output may
be from moving along it (1 - cosine)."""


class Place(NamedTuple):
    """A tensor of a module: its output, or its input; all of it, or some columns."""

    module: nn.Module
    of_input: bool = False
    columns: slice = slice(None)


class Sites:
    """The sites of a model's blocks.

    Args:
        name: of the model, for errors.
        blocks: its decoder blocks.
        config: its text configuration.
        run: runs the model once on a few tokens.
    """

    def __init__(self, name: str, blocks: nn.ModuleList, config: Any, run: Callable[[], object]) -> None:
        self._name = name
        self._blocks = blocks
        self._config = config
        self._run = run
        self._mlps: dict[int, nn.Module] = {}

    def place(self, site: Site) -> Place:
        """Where ``site`` is. Call it outside of hooks: it may try the model out.

        Raises:
            UserError: a layer that is not loaded, a head that is not there, or an MLP or a projection that this
                architecture keeps elsewhere.
        """
        check_layers([site.layer], len(self._blocks), f"{self._name} as loaded")
        if site.part == "residual":
            return Place(self._blocks[site.layer])
        return self._mlp(site.layer) if site.part == "mlp" else self._head(site)

    def _head(self, site: Site) -> Place:
        block, heads = self._blocks[site.layer], self._config.num_attention_heads
        if site.head is None or not 0 <= site.head < heads:
            raise UserError(f"head: {self._name} has heads 0 to {heads - 1} (got {site.head})")
        for outer in ATTENTION_NAMES:
            for inner in PROJECTION_NAMES:
                projection = getattr(getattr(block, outer, None), inner, None)
                # Conv1D, GPT-2's linear layer, keeps its weight the other way round.
                if not isinstance(projection, nn.Module):
                    continue
                width = getattr(projection, "in_features", None)
                if width is None and isinstance(projection.weight, Tensor):
                    width = projection.weight.shape[0]
                if width and width % heads == 0:
                    size = width // heads
                    return Place(projection, True, slice(site.head * size, (site.head + 1) * size))
        raise UserError(f"head: the attention's output projection of {type(block).__name__} is not known")

    def _mlp(self, layer: int) -> Place:
        if layer not in self._mlps:
            self._mlps[layer] = self._find_mlp(layer)
        return Place(self._mlps[layer])

    def _find_mlp(self, layer: int) -> nn.Module:
        """The candidate that what is added to its output moves the block's output along it."""
        block = self._blocks[layer]
        plain = self._output(layer)
        push = torch.randn(plain.shape[-1], generator=torch.Generator().manual_seed(0)).to(plain)
        push = ADDED * plain.norm(dim=-1).mean() * push / push.norm()
        for name in MLP_NAMES:
            if isinstance(candidate := getattr(block, name, None), nn.Module):
                moved = self._output(layer, (Place(candidate), lambda hidden: hidden + push)) - plain
                along = torch.cosine_similarity(moved.float(), push.float().expand_as(moved), dim=-1)
                if float(along.min()) > 1 - TOLERANCE:
                    return candidate
        raise UserError(f"mlp: what adds the MLP's output in {type(block).__name__} is not known")

    def _output(self, layer: int, *hooks: tuple[Place, Hook]) -> Tensor:
        found: list[Tensor] = []
        with hooked([*hooks, (Place(self._blocks[layer]), found.append)]):
            self._run()
        return found[0]


@contextmanager
def hooked(hooks: list[tuple[Place, Hook]]) -> Iterator[None]:
    """Inside, each hook is called with what is at its place, in their order where the place is one."""
    handles = []
    try:
        for place, hook in hooks:
            if place.of_input:
                handles.append(place.module.register_forward_pre_hook(_on_input(place, hook)))
            else:
                handles.append(place.module.register_forward_hook(_on_output(hook)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _on_output(hook: Hook) -> Callable[[nn.Module, Any, Any], Any]:
    """``hook`` for a module that returns a tensor or a tuple that starts with it."""

    def forward_hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        is_tuple = isinstance(output, tuple)
        new = hook(output[0] if is_tuple else output)
        if new is None:
            return None
        return (new, *output[1:]) if is_tuple else new

    return forward_hook


def _on_input(place: Place, hook: Hook) -> Callable[[nn.Module, Any], Any]:
    """``hook`` for some columns of a module's first argument."""

    def forward_pre_hook(_module: nn.Module, inputs: Any) -> Any:
        whole = inputs[0]
        new = hook(whole[..., place.columns])
        if new is None:
            return None
        whole = whole.clone()
        whole[..., place.columns] = new
        return (whole, *inputs[1:])

    return forward_pre_hook
