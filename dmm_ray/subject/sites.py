"""Locates the sites of a language model: the module whose input or output holds each of them."""

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
"""Receives the activations at a site (b, t, w); returns their replacement, or None to leave them unchanged."""
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
"""Modules of a block whose output may be what the MLP adds to the residual stream: a norm after the MLP if there is one
(Gemma 2 and 3, OLMo 2), the MLP itself under its usual names, or its last layer if the MLP's own output is something
else (BLOOM's and MPT's MLPs add the stream themselves). A trial decides which."""
PROJECTION_PATHS = tuple(
    f"{attention}.{projection}"
    for attention in ("self_attn", "attn", "attention", "self_attention", "attn.attention")
    for projection in ("o_proj", "out_proj", "c_proj", "dense", "wo", "Wo", "proj")
)
"""Paths where a block may have its attention's output projection."""
SITE_TOLERANCE = 1e-2
"""Tolerance, relative to the norm, between a block's output and the sum expected in a trial: bfloat16 rounding."""


class Place(NamedTuple):
    """A module's output or input, or some columns of it."""

    module: nn.Module
    of_input: bool = False
    columns: slice = slice(None)


class Sites:
    """The sites of a model's blocks.

    Args:
        name: name of the model in error messages.
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
        """The place of ``site``. Call it outside of hooks: it may run the model.

        Raises:
            UserError: the layer is not loaded, the head does not exist, or the architecture's MLP or attention is not
                recognised.
        """
        layer = site.layer
        check_layers([layer], len(self._blocks), f"{self._name} as loaded")
        if (site.head is not None) != (site.part == "head"):
            raise UserError(
                f"head: required for part 'head' and allowed for no other (got head {site.head}, part {site.part!r})"
            )
        if site.part == "residual":
            return Place(self._blocks[layer])
        if site.part == "mlp":
            if layer not in self._mlps:
                self._mlps[layer] = self._find_mlp(layer)
            return Place(self._mlps[layer])
        if site.part == "head" and site.head is not None:
            return self._head(layer, site.head)
        raise UserError(f"part: expected residual, mlp or head (got {site.part!r})")

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
            f"mlp: no module of {type(block).__name__} has an output that is added to the residual stream like an "
            "MLP's; this site cannot be read or edited in such models"
        )

    def _is_added(self, layer: int, module: nn.Module) -> bool:
        """Whether the block's output is the rest of the block plus ``module``'s output, up to a constant factor.

        Tried by replacing it with zeros and then with random rows of several sizes: a norm after it would make them all
        the same size, and if it contained the residual stream itself, the zeros would leave nothing.
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
        """The attention's output projection, and the width of one head in its input."""
        block, heads = self._blocks[layer], self._config.num_attention_heads
        for path in PROJECTION_PATHS:
            projection = descend(block, path)
            width = None if projection is None else self._input_width(layer, projection)
            if projection is not None and width and isinstance(heads, int) and width % heads == 0:
                return projection, width // heads
        raise UserError(
            f"head: no output projection of an attention with {heads} heads found in {type(block).__name__}; "
            "this site cannot be read or edited in such models"
        )

    def _input_width(self, layer: int, module: nn.Module) -> int | None:
        """Width of the input of ``module``; None if it does not affect the block's output."""
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
    """Context in which each hook is called with the activations at its place; those at the same place run in order."""
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
    """A forward hook for a module that returns a tensor, or a tuple that starts with one."""

    def forward_hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        is_tuple = isinstance(output, tuple)
        new = hook(output[0] if is_tuple else output)
        if new is None:
            return None
        return (new, *output[1:]) if is_tuple else new

    return forward_hook


def _on_input(place: Place, hook: Hook) -> Callable[[nn.Module, Any], Any]:
    """A forward pre-hook for some columns of a module's first argument."""

    def forward_pre_hook(_module: nn.Module, inputs: Any) -> Any:
        whole = inputs[0]
        new = hook(whole[..., place.columns])
        if new is None:
            return None
        whole = whole.clone()
        whole[..., place.columns] = new
        return (whole, *inputs[1:])

    return forward_pre_hook
