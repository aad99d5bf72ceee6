"""What every worker runs: batches in the run's order, the same for any number of workers and any restart."""

from __future__ import annotations

import logging
import math
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmm_ray.activations.split import VALIDATION
from dmm_ray.activations.store import ActivationStore
from dmm_ray.errors import CheckFailed
from dmm_ray.prior.config import PriorConfig
from dmm_ray.prior.model import ActivationPrior, new_denoiser
from dmm_ray.prior.network import Denoiser
from dmm_ray.prior.normalizer import Normalizer
from dmm_ray.training import checkpoint
from dmm_ray.training.config import TrainConfig
from dmm_ray.training.loader import Loader, check_finite
from dmm_ray.training.step import Ema, FlowBatch, Validation, learning_rate
from dmm_ray.training.tracking import Tracker

logger = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where a worker stands."""

    rank: int
    world: int
    device: torch.device

    def share(self, batch: int) -> slice:
        """This worker's contiguous part of a global batch."""
        return slice(batch * self.rank // self.world, batch * (self.rank + 1) // self.world)


class Run:
    """A training run inside one worker.

    Args:
        config: of the run.
        prior_config: shape and provenance of the prior to be.
        place: rank, world size, device.
        wrap: makes the module that is called in the forward pass, DDP where there are several workers.
    """

    def __init__(
        self, config: TrainConfig, prior_config: PriorConfig, place: Place, wrap: Any = None
    ) -> None:
        self.config, self.prior_config, self.place = config, prior_config, place
        (self.layer,) = prior_config.layers
        store = ActivationStore.open(config.activations)
        moments = store.statistics(self.layer)
        mean, var = torch.from_numpy(moments.mean)[None], torch.from_numpy(moments.var)[None]
        self.normalizer = Normalizer(mean, var, prior_config.variance_floor).to(place.device)
        self.loader = Loader(store, self.layer, config.split, config.shuffle_rows, config.seed)
        torch.manual_seed(config.seed)
        self.denoiser: Denoiser = new_denoiser(prior_config).to(place.device)
        self.ema = Ema(self.denoiser, config.ema)
        self.optimizer = torch.optim.AdamW(
            self.denoiser.parameters(),
            lr=1.0,
            betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.batch = self._resume()
        self.model: nn.Module = wrap(self.denoiser) if wrap else self.denoiser
        self.validation = self._validation(store)
        self.peak_lr = config.peak_lr(prior_config.d)

    def train(self) -> None:
        """Run to the end; the first worker logs, saves checkpoints and writes the prior's folder."""
        config, total = self.config, self.config.total_batches
        tracker = self._tracker()
        log_every, save_every = config.every(config.log_every, 100), config.every(config.checkpoint_every, 10)
        validate_every = config.every(config.validate_every, 10)
        share = self.place.share(config.batch)
        batches = self.loader.batches(self.batch, config.batch, share)
        sums, since, started = torch.zeros(2, device=self.place.device), self.batch, time.perf_counter()
        while self.batch < total:
            sums += self._step(next(batches), share)
            self.batch += 1
            if self.batch % log_every == 0 or self.batch == total:
                loss, grad = self._mean(sums, self.batch - since)
                record = self._record(loss, grad, (self.batch - since) / (time.perf_counter() - started))
                if tracker and (self.batch % validate_every < log_every or self.batch == total):
                    record["validation_loss"] = self._validation_loss()
                if tracker:
                    tracker.log(record)
                sums.zero_()
                since, started = self.batch, time.perf_counter()
            if tracker and self.batch % save_every == 0 and self.batch < total:
                tensors = checkpoint.state_tensors(self.denoiser, self.optimizer, self.ema)
                checkpoint.save(config.out, self.batch * config.batch, tensors, config.keep_checkpoints)
        if tracker:
            tracker.close()
            self._export()

    def _step(self, rows: Tensor, share: slice) -> Tensor:
        """One global batch; returns this worker's (loss / world, gradient norm) without waiting for the device."""
        config = self.config
        z_BD = self.normalizer.normalize(rows.to(self.place.device, non_blocking=True))
        data = FlowBatch(config, self.batch, share, z_BD)
        losses = data.loss(self.model, config.precision == "bfloat16")
        # DDP averages gradients over workers, whose shares may be uneven: scale to the mean over the global batch.
        loss = losses.sum() / config.batch
        (loss * self.place.world).backward()
        norm = nn.utils.clip_grad_norm_(self.denoiser.parameters(), config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.peak_lr, self.batch)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.batch + 1)
        return torch.stack([loss.detach(), norm.detach()])

    def _mean(self, sums: Tensor, batches: int) -> tuple[float, float]:
        """Loss over the global batches and gradient norm, averaged over an interval."""
        if self.place.world > 1:
            total = sums.clone()
            dist.all_reduce(total)
            sums = torch.stack([total[0], sums[1]])
        loss, norm = (sums / batches).tolist()
        if not math.isfinite(loss):
            last = self.batch * self.config.batch
            raise CheckFailed(
                f"the loss is {loss} between samples {last - batches * self.config.batch} and {last}; "
                f"lower --lr or train in float32; the last checkpoint in {self.config.out} is kept"
            )
        return loss, norm

    def _record(self, loss: float, grad: float, batches_per_s: float) -> dict[str, Any]:
        return {
            "samples": self.batch * self.config.batch,
            "loss": loss,
            "lr": learning_rate(self.config, self.peak_lr, self.batch - 1),
            "samples_per_s": batches_per_s * self.config.batch,
            "grad_norm": grad,
            "validation_loss": None,
        }

    def _validation(self, store: ActivationStore) -> Validation | None:
        if self.place.rank != 0:
            return None
        rows = store.select(
            self.layer, self.config.split, VALIDATION, self.config.validation_rows, self.config.seed
        )
        if len(rows.doc) == 0:
            logger.warning("no document falls into the validation part: no validation loss")
            return None
        check_finite(store, self.layer, rows)
        return Validation(self.config, self.normalizer.normalize(rows.activation.to(self.place.device)))

    def _validation_loss(self) -> float | None:
        """Loss of the averaged weights on the fixed validation pairs."""
        return self.validation.loss(self._averaged()) if self.validation else None

    def _averaged(self) -> Denoiser:
        denoiser = new_denoiser(self.prior_config).to(self.place.device)
        denoiser.load_state_dict(self.ema.state())
        return denoiser

    def _resume(self) -> int:
        found = checkpoint.load_newest(self.config.out)
        if found is None:
            return 0
        samples, tensors = found
        checkpoint.load_tensors(tensors, self.denoiser, self.optimizer, self.ema)
        return samples // self.config.batch

    def _tracker(self) -> Tracker | None:
        if self.place.rank != 0:
            return None
        parameters = sum(p.numel() for p in self.denoiser.parameters())
        return Tracker(self.config, self.batch * self.config.batch, {"parameters": parameters})

    def _export(self) -> None:
        ActivationPrior(self.prior_config, self._averaged(), self.normalizer).save_pretrained(self.config.out)
