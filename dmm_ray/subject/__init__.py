"""Frozen language models whose block outputs are captured and edited with forward hooks."""

from dmm_ray.subject.model import SubjectModel
from dmm_ray.subject.source import SubjectSource

__all__ = ["SubjectModel", "SubjectSource"]
