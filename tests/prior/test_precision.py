import subprocess
import sys
import threading

import pytest
import torch

from dmm_ray.prior.precision import exact_float32


@pytest.fixture(autouse=True)
def _default_precision():
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_short_products_are_off_inside_and_back_after(setting):
    torch.set_float32_matmul_precision(setting)
    with exact_float32():
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
        with exact_float32():
            pass
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == setting


def test_put_back_after_an_error():
    torch.set_float32_matmul_precision("medium")
    with pytest.raises(KeyError), exact_float32():
        raise KeyError
    assert torch.get_float32_matmul_precision() == "medium"


def test_overlapping_threads_put_back_once():
    torch.set_float32_matmul_precision("medium")
    entered, leave, seen = threading.Event(), threading.Event(), []

    def other():
        with exact_float32():
            entered.set()
            leave.wait(10)
            seen.append(torch.get_float32_matmul_precision())

    thread = threading.Thread(target=other)
    with exact_float32():
        thread.start()
        entered.wait(10)
    leave.set()
    thread.join()
    assert seen == ["highest"]
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
def test_settings_of_the_newer_interface():
    code = """
import torch
from dmm_ray.prior.precision import exact_float32
backend = torch.backends.cuda.matmul
backend.fp32_precision = "tf32"
with exact_float32():
    assert backend.fp32_precision == "ieee"
assert backend.fp32_precision == "tf32"
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
