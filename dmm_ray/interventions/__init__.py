"""A subject and a prior together: generation steered along directions and projected back to natural activations."""

from dmm_ray.interventions.directions import Direction, load_directions
from dmm_ray.interventions.steering import Steering

__all__ = ["Direction", "Steering", "load_directions"]
