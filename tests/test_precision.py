"""Which number format a machine computes in: asked of the machine, recorded, kept."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from dmm_ray import precision
from dmm_ray.errors import UserError
from dmm_ray.precision import affordable_precision, choose_precision, cpu_has_fast_bfloat16, precision_on
from dmm_ray.prior import ActivationPrior, PriorConfig

AVX2 = {"avx2": True, "avx512_f": False}
AVX512 = {"avx2": True, "avx512_f": True, "avx512_bf16": False}


@pytest.mark.parametrize(
    ("machine", "flags", "onednn", "fast"),
    [
        pytest.param("x86_64", AVX2, False, False, id="AVX2 alone"),
        pytest.param("x86_64", AVX512, True, False, id="AVX512 without BF16: emulated"),
        pytest.param("x86_64", AVX512 | {"avx512_bf16": True}, True, True, id="AVX512-BF16"),
        pytest.param("AMD64", AVX512 | {"amx_tile": True}, True, True, id="AMX by torch's older name"),
        pytest.param("x86_64", AVX512 | {"amx_bf16": True}, True, True, id="AMX"),
        pytest.param("x86_64", {"avx512_bf16": True}, False, False, id="AVX512-BF16 kept from oneDNN"),
        pytest.param("aarch64", {}, True, True, id="Arm BF16"),
        pytest.param("arm64", {}, False, False, id="Arm without BF16"),
    ],
)
def test_a_cpu_is_fast_in_what_it_has_instructions_for(
    machine: str, flags: dict[str, Any], onednn: bool, fast: bool
) -> None:
    assert cpu_has_fast_bfloat16(machine, flags, onednn) is fast


def test_auto_is_what_the_device_is_fast_in_and_words_are_kept() -> None:
    assert choose_precision("auto", fast_bfloat16=True) == "bfloat16"
    assert choose_precision("auto", fast_bfloat16=False) == "float32"
    assert choose_precision("bfloat16", fast_bfloat16=False) == "bfloat16"
    assert choose_precision("float32", fast_bfloat16=True) == "float32"
    with pytest.raises(UserError, match=r"^precision: expected auto, float32 or bfloat16 \(got 'float16'\)"):
        choose_precision("float16", fast_bfloat16=True)


@pytest.mark.parametrize("fast", [True, False])
def test_rows_computed_again_are_in_what_this_machine_can_afford(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda device: fast)
    assert affordable_precision("float32", "cpu") == "float32"
    assert affordable_precision("bfloat16", "cpu") == ("bfloat16" if fast else "float32")
    assert precision_on("auto", "cpu") == ("bfloat16" if fast else "float32")


def test_this_machine_answers_without_being_timed() -> None:
    for device in ("cpu", torch.device("cpu"), "cuda", "meta"):
        assert isinstance(precision.has_fast_bfloat16(device), bool)
    assert not precision.has_fast_bfloat16("meta")


def test_onednn_kept_to_avx2_makes_float32_the_choice() -> None:
    """What torch really does is asked, not what the processor could do."""
    code = "from dmm_ray.precision import has_fast_bfloat16; print(has_fast_bfloat16('cpu'))"
    env = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "PATH": "/usr/bin:/bin"}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize("fast", [True, False])
def test_a_prior_keeps_the_precision_it_was_loaded_with(
    fast: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda device: fast)
    config = PriorConfig(d=8, layers=(1,), d_model=16, d_mlp=32, n_blocks=1, variance_floor=1e-6)
    ActivationPrior.untrained(config, torch.zeros(8), torch.ones(8)).save_pretrained(str(tmp_path))
    prior = ActivationPrior.from_pretrained(str(tmp_path), precision="auto")
    assert prior.precision == ("bfloat16" if fast else "float32")
    assert ActivationPrior.from_pretrained(str(tmp_path)).precision == "float32"
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    chosen = prior.encode(x, precision=prior.precision)
    assert torch.equal(prior.encode(x), chosen)
    assert torch.equal(prior.encode(x, precision="auto"), chosen)
    assert torch.equal(chosen, prior.encode(x, precision="float32")) is not fast
