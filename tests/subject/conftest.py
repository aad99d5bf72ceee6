"""Tiny random models of each family, sharing one tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from shape_checks import check_shapes
from subject.families import new_model

from dmm_ray.subject import SubjectModel

Make = Callable[[str], Path]
PROMPT = "the cat sat on"
assert check_shapes("dmm_ray.subject", input_ids="B T", attention_mask="B T", rows="N D")


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory, tiny_subject: Path) -> Callable[[str], Path]:
    """``make_model(family)``: folder of a random model of 4 blocks, d = 32, with tiny_subject's tokenizer."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            torch.manual_seed(1)
            model = new_model(family)
            for parameter in model.parameters():  # as initialised, some blocks would all but copy their input
                torch.nn.init.normal_(parameter, std=0.1)
            model.save_pretrained(folder)
            for file in tiny_subject.glob("*token*"):
                shutil.copy(file, folder)
            made[family] = folder
        return made[family]

    return make


@pytest.fixture(scope="session")
def language(tiny_subject: Path) -> SubjectModel:
    """The tiny Llama with its head."""
    return SubjectModel.from_pretrained(str(tiny_subject), head=True)
