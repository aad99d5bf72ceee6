from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from dmm_ray.errors import UserError
from dmm_ray.interventions import Direction, load_directions


def test_what_is_saved_is_loaded_at_length_one(tmp_path: Path) -> None:
    vector = torch.tensor([3.0, 0.0, -4.0])
    Direction("up", vector, layer=7).save(str(tmp_path))
    Direction("down", -vector).save(str(tmp_path))
    found = load_directions(str(tmp_path))
    assert {name: d.layer for name, d in found.items()} == {"down": None, "up": 7}
    torch.testing.assert_close(found["up"].vector, torch.tensor([0.6, 0.0, -0.8]))


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (torch.zeros(3), "not all zero"),
        (torch.tensor([1.0, float("nan")]), "finite"),
        (torch.ones(1, 3), r"shape \(d,\)"),
    ],
)
def test_what_is_no_direction_is_refused(vector: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=f"direction odd: .*{message}"):
        Direction("odd", vector)


def test_tiny_and_large_numbers_keep_their_direction() -> None:
    for scale in (1e-30, 1e30):
        torch.testing.assert_close(
            Direction("a", torch.tensor([3.0, 4.0]) * scale).vector, torch.tensor([0.6, 0.8])
        )


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.safetensors files"):
        load_directions(str(tmp_path))
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"not one")
    with pytest.raises(UserError, match=r"x\.safetensors: damaged"):
        load_directions(str(tmp_path))
    safetensors.torch.save_file({"vector": torch.ones(2)}, path)
    with pytest.raises(UserError, match="one tensor named direction"):
        load_directions(str(tmp_path))
    safetensors.torch.save_file({"direction": torch.ones(2)}, path, {"layer": "-1"})
    with pytest.raises(UserError, match="metadata layer"):
        load_directions(str(tmp_path))


def test_a_name_in_two_folders_is_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        Direction("same", torch.ones(2)).save(str(tmp_path / folder))
    with pytest.raises(UserError, match="rename"):
        load_directions(str(tmp_path))
