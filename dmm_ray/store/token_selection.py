"""Which tokens of a document are kept."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from dmm_ray.config import Group


class TokenSelection(Group):
    """Which tokens of a document are kept."""

    keep_first: bool = False
    """Also keep position 0 (BOS, [CLS] or attention sink)."""
    keep_special: bool = False
    """Also keep the special tokens that a tokenizer appends to a document ([SEP], end of text)."""
    long_documents: Literal["cut", "split"] = "cut"
    """Truncate documents longer than the window, or split them into windows that do not attend to each other."""
    tokens_per_doc: Literal["all", "last"] | int = "all"
    """Tokens to keep per document: all, the last, or this many, drawn by seed."""
    min_position: int = Field(default=0, ge=0)
    """Drop positions before this one."""
    max_position: int | None = Field(default=None, ge=0)
    """Drop positions after this one."""

    @field_validator("tokens_per_doc", mode="before")
    @classmethod
    def _all_last_or_number(cls, value: object) -> object:
        if value in ("all", "last") or (str(value).isdecimal() and int(str(value)) > 0):
            return value
        raise ValueError("expected all, last or a positive integer")

    @model_validator(mode="after")
    def _in_order(self) -> TokenSelection:
        if self.max_position is not None and self.max_position < self.min_position:
            raise ValueError(
                f"max_position {self.max_position} is less than min_position {self.min_position}: no positions are left"
            )
        return self

    def most_rows(self, window: int) -> int:
        """The maximum number of rows from a document truncated to ``window`` tokens."""
        low = max(self.min_position, 0 if self.keep_first else 1)
        high = window if self.max_position is None else min(window, self.max_position + 1)
        drawn = {"all": window, "last": 1}.get(str(self.tokens_per_doc), self.tokens_per_doc)
        return max(1, min(high - low, int(drawn)))
