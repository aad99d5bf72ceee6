"""The output folder of a run: whether it is free, this run's, or another's."""

from __future__ import annotations

from pydantic import ValidationError

from dmm_ray.activations.lock import LOCK
from dmm_ray.config import one_line
from dmm_ray.errors import UserError
from dmm_ray.files import exists, filesystem, join, read_json, write_json
from dmm_ray.prior.config import PriorConfig
from dmm_ray.training.config import TrainConfig, check_same

RUN, SUMMARY = "train.json", "summary.json"


def is_finished(config: TrainConfig, prior_config: PriorConfig) -> bool:
    """Whether the run is finished in its folder already; writes nothing.

    Raises:
        UserError: the folder holds another run, or something else.
    """
    marker = join(config.out, RUN)
    if not exists(marker):
        _check_empty(config.out)
        return False
    saved = read_json(marker)
    try:
        check_same(TrainConfig.model_validate(saved["train"]), config)
    except (KeyError, ValidationError) as e:
        why = one_line(e) if isinstance(e, ValidationError) else f"no {e}"
        raise UserError(f"{marker}: not a run of this version ({why}); choose another --out") from e
    for field, new in prior_config.model_dump(mode="json").items():
        if (old := saved["prior"].get(field)) != new:
            raise UserError(
                f"{config.out}: holds a run on another store or model ({field} = {old!r}, not {new!r}); "
                "choose another --out"
            )
    return exists(join(config.out, SUMMARY))


def claim(config: TrainConfig, prior_config: PriorConfig) -> None:
    """Take a folder that is free for this run, whose lock is held."""
    marker = join(config.out, RUN)
    if not exists(marker):
        write_json(
            marker, {"train": config.model_dump(mode="json"), "prior": prior_config.model_dump(mode="json")}
        )


def _check_empty(out: str) -> None:
    fs, path = filesystem(out)
    found = {p.rstrip("/").split("/")[-1] for p in fs.ls(path, detail=False)} if fs.isdir(path) else set()
    if others := sorted(found - {LOCK}):
        raise UserError(f"{out}: holds {others[0]}, not a run of ours; choose another --out")
