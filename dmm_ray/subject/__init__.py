"""Frozen language models whose activations can be read and edited at named sites, and which generate text."""

from dmm_ray.subject.generation import Continuation, Generated, Generation
from dmm_ray.subject.intervention import Intervention, Site
from dmm_ray.subject.model import SubjectModel
from dmm_ray.subject.reading import TooLongError
from dmm_ray.subject.source import SubjectSource

__all__ = [
    "Continuation",
    "Generated",
    "Generation",
    "Intervention",
    "Site",
    "SubjectModel",
    "SubjectSource",
    "TooLongError",
]
