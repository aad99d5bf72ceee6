"""Options that select the language model."""

from __future__ import annotations

from dmm_ray.config import Group
from dmm_ray.errors import UserError
from dmm_ray.subject.source import SubjectSource


class ModelSource(Group):
    """The language model."""

    model: str | None = None
    """Language model: a folder, a .gguf file or a hub id; defaults to the one recorded in the store or the prior."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    block_path: str | None = None
    """Dotted path of the list of decoder blocks, for unknown architectures; defaults to the one recorded in the store
    or the prior."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    def recorded(self, model: str | None, revision: str | None, block_path: str | None) -> ModelSource:
        """A copy with unset fields filled from a record; the recorded revision applies only to the recorded model."""
        known = revision if self.model in (None, model) else None
        return self.model_copy(
            update={
                "model": self.model or model,
                "revision": self.revision or known,
                "block_path": self.block_path or block_path,
            }
        )

    def resolve(self) -> SubjectSource:
        """Find or download the model. Raises UserError if none is given, or as ``SubjectSource.resolve``."""
        if self.model is None:
            raise UserError("model: no model is named, and none is recorded; give --model")
        return SubjectSource.resolve(self.model, self.revision, self.trust_remote_code)
