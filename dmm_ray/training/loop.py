"""What every worker runs: batches in the run's order, the same for any number of workers and any restart."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import sys
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmm_ray.activations.split import VALIDATION
from dmm_ray.activations.store import ActivationStore
from dmm_ray.errors import CheckFailed, UserError
from dmm_ray.prior.config import PriorConfig
from dmm_ray.prior.model import ActivationPrior, new_denoiser
from dmm_ray.prior.network import Denoiser
from dmm_ray.prior.normalizer import Normalizer
from dmm_ray.training import checkpoint
from dmm_ray.training.checkpoint import Notice
from dmm_ray.training.config import TrainConfig
from dmm_ray.training.loader import Loader, check_finite
from dmm_ray.training.step import Ema, FlowBatch, Validation, learning_rate
from dmm_ray.training.tracking import Interval, Tracker, batch_figures, means

logger = logging.getLogger(__name__)
INTERVAL = "interval"
"""Of a checkpoint: the figures of the batches since the last record."""


class Place(NamedTuple):
    """Where a worker stands."""

    rank: int
    world: int
    device: torch.device
    on_ray: bool = False
    """In a worker of Ray Train."""

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

    Raises:
        UserError: fewer training rows than a batch, rows that are not finite, a checkpoint of another architecture.
        CheckFailed: workers found different checkpoints.
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
        self.loader = self._loader(store)
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
        self.batch, past = self._resume()
        self.interval = Interval(config, self.batch, past, place.rank, place.world, place.device)
        self.model: nn.Module = wrap(self.denoiser) if wrap else self.denoiser
        if config.compile if config.compile is not None else place.device.type == "cuda":
            self.model = compiled(self.model, place.device)
        self.validation = self._validation(store)
        self.peak_lr = config.peak_lr(prior_config.d)

    def train(self, notice: Callable[[int], Notice]) -> bool:
        """Run on; the first worker logs, saves checkpoints and, at the end, writes the prior's folder.

        Args:
            notice: asked after every batch with the number of batches done; says the same to every worker.

        Returns:
            True at the end, False when ``notice`` stopped the run, a checkpoint of which is written then.

        Raises:
            UserError: rows that are not finite, a full disk.
            CheckFailed: a loss, gradient or weight is not finite.
        """
        config, total, share = self.config, self.config.total_batches, self.place.share(self.config.batch)
        log_every, save_every = config.every(config.log_every, 100), config.every(config.checkpoint_every, 10)
        self.interval.restart(self.loader.waited)
        tracker = self._tracker()
        with (
            closing(tracker) if tracker else nullcontext(),
            checkpoint.Writer(config.out, config.kept_checkpoints) as writer,
            closing(self._batches(share)) as batches,
        ):
            while self.batch < total:
                self.interval.add(self._step(next(batches), share))
                self.batch += 1
                if self.batch % log_every == 0 or self.batch == total:
                    self._log(tracker, log_every)
                wanted = notice(self.batch)
                if self.batch < total and (wanted != Notice.GO_ON or self.batch % save_every == 0):
                    self._save(writer)
                    if wanted == Notice.STOP:
                        return False
        if self.place.rank == 0:
            self._export()
        return True

    def _batches(self, share: slice) -> Generator[Tensor]:
        yield from self.loader.batches(self.batch, self.config.batch, share)

    def _step(self, rows: Tensor, share: slice) -> Tensor:
        """One global batch; returns this worker's figures of it without waiting for the device."""
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
        u = (
            data.u_M.repeat_interleave(len(z_BD) // len(data.u_M))
            if data.index is None
            else data.u_M[data.index]
        )
        return batch_figures(losses.detach(), u, norm, share.start, config.batch)

    def _log(self, tracker: Tracker | None, log_every: int) -> None:
        """Record the interval and begin the next one."""
        config, interval = self.config, self.interval
        sums = interval.sums()
        if tracker:
            validate_every = config.every(config.validate_every, 10)
            validate = self.batch % validate_every < log_every or self.batch == config.total_batches
            levels = min(config.levels_per_batch, config.batch)
            tracker.log(
                {
                    "samples": self.batch * config.batch,
                    "lr": learning_rate(config, self.peak_lr, self.batch - 1),
                    "validation_loss": self._validation_loss() if validate else None,
                    **means(sums),
                    **interval.speed(flops(self.denoiser, config.batch, levels), self.loader.waited),
                    "memory_gb": memory_gb(self.place.device),
                }
            )
        interval.clear()
        interval.restart(self.loader.waited)

    def _save(self, writer: checkpoint.Writer) -> None:
        """Have a checkpoint written; the figures since the last record go into it."""
        sums = self.interval.sums()
        if self.place.rank != 0:
            return
        loss = self._validation_loss() if self.config.keep_best else None
        tensors = checkpoint.state_tensors(self.denoiser, self.optimizer, self.ema) | {INTERVAL: sums}
        writer.save(self.batch * self.config.batch, tensors, loss)

    def _loader(self, store: ActivationStore) -> Loader:
        config = self.config
        pin = self.place.device.type == "cuda"
        loader = Loader(store, self.layer, config.split, config.shuffle_rows, config.seed, pin)
        if loader.order.epoch_rows < config.batch:
            raise UserError(
                f"batch: {config.batch} samples, but layer {self.layer} of {store.uri} has {loader.order.epoch_rows} "
                "training rows; lower --batch or extract more text"
            )
        return loader

    def _validation(self, store: ActivationStore) -> Validation | None:
        if self.place.rank != 0:
            return None
        rows = store.select(
            self.layer, self.config.split, VALIDATION, self.config.validation_rows, self.config.seed
        )
        if len(rows.doc) == 0:
            if self.config.keep_best:
                raise UserError(
                    "keep_best: no document falls into the validation part; change --split or leave it out"
                )
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

    def _resume(self) -> tuple[int, Tensor | None]:
        """Batches done and the figures since the last record, from the newest whole checkpoint."""
        out, batch, past = self.config.out, 0, None
        samples = checkpoint.newest(out)
        if samples is not None:
            logger.info("resuming after %d samples", samples)
            tensors = checkpoint.load(out, samples)
            past = tensors.pop(INTERVAL, None)
            checkpoint.check_architecture(out, tensors, self.denoiser)
            checkpoint.load_tensors(tensors, self.denoiser, self.optimizer, self.ema)
            batch = samples // self.config.batch
        if self.place.world > 1:
            ends = torch.tensor([batch, -batch], device=self.place.device)
            dist.all_reduce(ends, op=dist.ReduceOp.MAX)
            if ends[0] != -ends[1]:
                raise CheckFailed(
                    f"{out}: workers found different checkpoints; --out must be one folder to all of them"
                )
        return batch, past

    def _tracker(self) -> Tracker | None:
        if self.place.rank != 0:
            return None
        parameters = sum(p.numel() for p in self.denoiser.parameters())
        samples = self.batch * self.config.batch
        return Tracker(self.config, samples, {"parameters": parameters}, self.place.on_ray)

    def _export(self) -> None:
        with checkpoint.room(self.config.out):
            ActivationPrior(self.prior_config, self._averaged(), self.normalizer).save_pretrained(
                self.config.out
            )


def compiled(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` through torch.compile. Raises UserError on a CPU without a C++ compiler."""
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError(
            "compile: torch.compile needs a C++ compiler (g++, or CXX); install one or leave it out"
        )
    return cast(nn.Module, torch.compile(model))


def flops(denoiser: nn.Module, rows: int, levels: int) -> float:
    """Floating-point operations of a step's matrix products, forward and backward.

    Args:
        denoiser: whose weights are multiplied.
        rows: of the batch.
        levels: distinct noise levels; the time path runs once for each.
    """
    weights = [(name, p.numel()) for name, p in denoiser.named_parameters() if p.ndim == 2]
    return 6.0 * sum(n * (levels if ("time_" in name) else rows) for name, n in weights)


def memory_gb(device: torch.device) -> float:
    """The most that was allocated on the device so far; on CPU this process's largest resident size, in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
