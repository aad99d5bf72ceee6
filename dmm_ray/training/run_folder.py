"""The output folder of a run: whether it is free, this run's, or another's."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import ValidationError

from dmm_ray.config import one_line, refuse_other
from dmm_ray.errors import UserError
from dmm_ray.files import exists, filesystem, join, read_json, write_json
from dmm_ray.prior.config import PriorConfig
from dmm_ray.provenance import SUMMARY
from dmm_ray.training.base import FILE
from dmm_ray.training.config import TrainConfig
from dmm_ray.units.lock import LOCK

RUN = "train.json"


class SavedRun(NamedTuple):
    """A run as recorded in its folder."""

    out: str
    config: TrainConfig
    """Includes the number of samples and the precision that were chosen for it."""
    prior: PriorConfig
    """The configuration of the prior to train."""

    @property
    def finished(self) -> bool:
        """Whether the run has finished."""
        return exists(join(self.out, SUMMARY))

    def check(self, asked: TrainConfig, prior_config: PriorConfig) -> None:
        """Raises UserError naming the fields in which a resumed run would differ from this one."""
        refuse_other(self.out, _identity(self.config, self.prior), _identity(asked, prior_config))
        refuse_other(self.out, self.prior.identity(), prior_config.identity())


def _identity(config: TrainConfig, prior_config: PriorConfig) -> dict[str, Any]:
    """What identifies a run: its configuration and its store's content, wherever the store lies."""
    return {"activations": prior_config.training.get("store"), **config.identity()}


def saved_run(out: str) -> SavedRun | None:
    """The run in a folder; None if the folder is free.

    Raises:
        UserError: the folder holds something else.
    """
    marker = join(out, RUN)
    if not exists(marker):
        _check_empty(out)
        return None
    saved = read_json(marker)
    try:
        train, prior = TrainConfig.model_validate(saved["train"]), PriorConfig.model_validate(saved["prior"])
    except (KeyError, ValidationError) as e:
        why = one_line(e) if isinstance(e, ValidationError) else f"no {e}"
        raise UserError(f"{marker}: not a run of this version ({why}); choose another --out") from e
    return SavedRun(out, train, prior)


def claim_folder(config: TrainConfig, prior_config: PriorConfig) -> None:
    """Claim a free folder, whose lock is held, for this run."""
    marker = {"train": config.model_dump(mode="json"), "prior": prior_config.model_dump(mode="json")}
    write_json(join(config.out, RUN), marker)


def _check_empty(out: str) -> None:
    fs, path = filesystem(out)
    found = {p.rstrip("/").split("/")[-1] for p in fs.ls(path, detail=False)} if fs.isdir(path) else set()
    if others := sorted(found - {LOCK, FILE}):
        raise UserError(f"{out}: holds {others[0]}, not a run of ours; choose another --out")
