"""A subject and a prior together: texts read, tokens generated under a steered layer, activations as tokens."""

from dmm_ray.interventions.directions import Direction, load_directions
from dmm_ray.interventions.generation import Generated, Generation
from dmm_ray.interventions.language import LanguageModel, TooLongError
from dmm_ray.interventions.steering import Steering

__all__ = [
    "Direction",
    "Generated",
    "Generation",
    "LanguageModel",
    "Steering",
    "TooLongError",
    "load_directions",
]
