"""Write a steering direction: `python direction.py MODEL LAYER WITH.txt WITHOUT.txt NAME FOLDER`.

It is the layer's mean activation over the lines of the first text minus that over the lines of the second.
Then run `dmm serve --prior PRIOR --model MODEL --directions FOLDER`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from dmm_ray.interventions import Direction
from dmm_ray.subject import SubjectModel


def mean_activation(model: SubjectModel, layer: int, path: str) -> torch.Tensor:
    """The layer's mean activation (d,) over all tokens of a file's lines except the first of each line."""
    lines = [line for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
    return torch.cat([model.read(line, layer).rows[1:] for line in lines]).mean(0)


def main(name_of_model: str, layer: str, with_it: str, without: str, name: str, folder: str) -> None:
    """Write FOLDER/NAME.safetensors and print its path."""
    model = SubjectModel.from_pretrained(name_of_model, head=True)
    difference = mean_activation(model, int(layer), with_it) - mean_activation(model, int(layer), without)
    sys.stdout.write(Direction(name, difference, int(layer)).save(folder) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
