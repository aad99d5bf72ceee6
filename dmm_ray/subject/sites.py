"""Where the sites of a language model are: which module's input or output holds each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dmm_ray.errors import UserError
from dmm_ray.subject.blocks import descend
from dmm_ray.subject.intervention import Site
from dmm_ray.subject.source import check_layers

Hook = Callable[[Tensor], Tensor | None]
"""Sees the activations at a site (b, t, w); returns their replacement, or None to leave them."""
MLP_PATHS = (
    "post_feedforward_layernorm",
    "post_mlp_layernorm",
    "mlp",
    "feed_forward",
    "ffn",
    "block_sparse_moe",
    "moe",
    "fc2",
    "mlp.dense_4h_to_h",
    "ffn.down_proj",
)
"""Modules of a block whose output may be what the MLP adds to the residual stream: a norm after the MLP where there is
one (Gemma 2 and 3, OLMo 2), the MLP itself under its usual names, its last layer where its own output is another thing
(BLOOM's and MPT's MLPs add the stream themselves). Which of them it is, is found by trial."""
PROJECTION_PATHS = tuple(
    f"{attention}.{projection}"
    for attention in ("self_attn", "attn", "attention", "self_attention", "attn.attention")
    for projection in ("o_proj", "out_proj", "c_proj", "dense", "wo", "Wo", "proj")
)
"""Where a block may have its attention's output projection."""
SITE_TOLERANCE = 1e-2
"""How far, relative to its norm, a block's output may be from the sum that a trial expects: rounding of bfloat16."""


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
        self._projections: dict[int, tuple[nn.Module, int]] = {}

    def place(self, site: Site) -> Place:
        """Where ``site`` is. Call it outside of hooks: it may run the model.

        Raises:
            UserError: a layer that is not loaded, a head that is not there, or an architecture whose MLP or attention
                is not recognised.
        """
        layer = site.layer
        check_layers([layer], len(self._blocks), f"{self._name} as loaded")
        if (site.head is not None) != (site.part == "head"):
            raise UserError(f"head: {site} needs a head's number for a head, and for nothing else")
        if site.part == "residual":
            return Place(self._blocks[layer])
        if site.part == "mlp":
            if layer not in self._mlps:
                self._mlps[layer] = self._find_mlp(layer)
            return Place(self._mlps[layer])
        if site.part == "head" and site.head is not None:
            return self._head(layer, site.head)
        raise UserError(f"part: residual, mlp or head is needed (got {site.part!r})")

    def _head(self, layer: int, head: int) -> Place:
        if layer not in self._projections:
            self._projections[layer] = self._find_projection(layer)
        projection, width = self._projections[layer]
        heads = self._config.num_attention_heads
        if not 0 <= head < heads:
            raise UserError(f"head: {self._name} has heads 0 to {heads - 1} (got {head})")
        return Place(projection, True, slice(head * width, (head + 1) * width))

    def _find_mlp(self, layer: int) -> nn.Module:
        block = self._blocks[layer]
        for path in MLP_PATHS:
            candidate = descend(block, path)
            if candidate is not None and self._is_added(layer, candidate):
                return candidate
        raise UserError(
            f"mlp: no module of {type(block).__name__} has an output that is added to the residual stream as an "
            "MLP's; this site cannot be read or edited in such models"
        )

    def _is_added(self, layer: int, module: nn.Module) -> bool:
        """Whether the block's output is something else plus ``module``'s output, times a constant at most.

        Tried by putting zeros, and then random rows of several sizes, in its place: a norm that follows would make
        them all one size, and an output that holds the residual stream itself would leave nothing with the zeros.
        """
        plain = self._block_output(layer)
        size = plain.float().norm(dim=-1).mean()
        rows = torch.randn(plain.shape, generator=torch.Generator().manual_seed(0))
        ramp = torch.linspace(1, 2, plain[..., 0].numel()).reshape(*plain.shape[:-1], 1)
        rows = (size.cpu() * ramp * rows / rows.norm(dim=-1, keepdim=True)).to(plain)

        def replaced(by: Tensor) -> Tensor:
            def hook(hidden: Tensor) -> Tensor | None:
                return by.reshape(hidden.shape).to(hidden) if hidden.numel() == by.numel() else None

            return self._block_output(layer, (Place(module), hook)).float()

        without = replaced(torch.zeros_like(rows))
        if float(without.norm()) <= SITE_TOLERANCE * float(plain.float().norm()):
            return False
        difference, expected = replaced(rows) - without, rows.float()
        constant = (difference * expected).sum() / expected.square().sum()
        error = (difference - constant * expected).norm()
        return (
            float(error) <= SITE_TOLERANCE * abs(float(constant)) * float(expected.norm()) and constant != 0
        )

    def _find_projection(self, layer: int) -> tuple[nn.Module, int]:
        """The attention's output projection, and the width of a head in its input."""
        block, heads = self._blocks[layer], self._config.num_attention_heads
        for path in PROJECTION_PATHS:
            projection = descend(block, path)
            width = None if projection is None else self._input_width(layer, projection)
            if projection is not None and width and isinstance(heads, int) and width % heads == 0:
                return projection, width // heads
        raise UserError(
            f"head: no output projection of an attention with {heads} heads was found in {type(block).__name__}; "
            "this site cannot be read or edited in such models"
        )

    def _input_width(self, layer: int, module: nn.Module) -> int | None:
        """Width of the input of ``module``; None where it has no part in the block's output."""
        plain, widths = self._block_output(layer), list[int]()

        def hook(hidden: Tensor) -> Tensor:
            widths.append(hidden.shape[-1])
            return torch.zeros_like(hidden)

        without = self._block_output(layer, (Place(module, of_input=True), hook))
        return None if not widths or torch.equal(without, plain) else widths[0]

    def _block_output(self, layer: int, *hooks: tuple[Place, Hook]) -> Tensor:
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
