"""Number formats of matrix products, and which of them a device computes fast.

On a CPU without bfloat16 instructions a bfloat16 product is more than a hundred times slower than a float32 one; on a
GPU, or a CPU with such instructions, it is several times faster. ``auto`` therefore queries the device, once, and the
choice is recorded with the results.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from dmm_ray.errors import UserError

if TYPE_CHECKING:
    import torch

Precision = Literal["float32", "bfloat16"]
"""``float32``: like the weights. ``bfloat16``: products in bfloat16; states, sums and sinusoids in float32."""
PrecisionOption = Literal["auto", "float32", "bfloat16"]
"""``auto``: bfloat16 on devices with fast bfloat16, float32 elsewhere."""


def choose_precision(option: str, fast_bfloat16: bool) -> Precision:
    """Resolve ``option`` to a number format.

    Args:
        option: one of :data:`PrecisionOption`.
        fast_bfloat16: the device's :func:`has_fast_bfloat16`.

    Raises:
        UserError: unknown option.

    Example:
        >>> choose_precision("auto", fast_bfloat16=False)
        'float32'
    """
    known: dict[str, Precision] = {
        "auto": "bfloat16" if fast_bfloat16 else "float32",
        "float32": "float32",
        "bfloat16": "bfloat16",
    }
    if option not in known:
        raise UserError(f"precision: expected auto, float32 or bfloat16 (got {option!r})")
    return known[option]


def precision_on(option: str, device: str | torch.device) -> Precision:
    """Resolve ``option`` to a number format on ``device``. Raises UserError like :func:`choose_precision`."""
    return choose_precision(option, option == "auto" and has_fast_bfloat16(device))


def affordable_precision(recorded: Precision, device: str | torch.device) -> Precision:
    """The number format in which results were computed, or float32 if it is slow on ``device``.

    For recomputing rows that are compared within a tolerance, as ``dmm verify`` and ``dmm evaluate`` do.
    """
    return recorded if recorded == "float32" or has_fast_bfloat16(device) else "float32"


def has_fast_bfloat16(device: str | torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices faster than float32 ones, by its reported capabilities.

    True for CUDA from compute capability 8.0 (Ampere), ROCm devices for which torch reports support, and CPUs with AMX,
    AVX512-BF16 or Arm's BF16 instructions, unless oneDNN is kept from using them (``ONEDNN_MAX_CPU_ISA``). Nothing is
    timed.
    """
    # Imported here because configurations use these types in processes that do not load torch.
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and cpu_has_fast_bfloat16(platform.machine(), _cpu_flags(), _onednn_takes_bfloat16())


def cpu_has_fast_bfloat16(machine: str, flags: Mapping[str, object], onednn: bool) -> bool:
    """:func:`has_fast_bfloat16` for a CPU.

    Args:
        machine: its architecture, as named by ``platform.machine()``.
        flags: its instruction sets, as named by ``torch.cpu.get_capabilities()``.
        onednn: whether oneDNN, torch's library for such products, supports bfloat16 products on it.
    """
    if not onednn:
        return False
    if machine.lower() in ("aarch64", "arm64"):
        return True  # on Arm, oneDNN supports them only if the CPU has the instructions
    # With AVX512 alone oneDNN also supports them, but widens them to float32, which is slower than float32.
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16") or flags.get("amx_tile"))


def _cpu_flags() -> Mapping[str, object]:
    import torch

    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    # torch before 2.10
    return {
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx_tile": torch.cpu._is_amx_tile_supported(),
    }


def _onednn_takes_bfloat16() -> bool:
    import torch

    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
