"""The training loop of every worker: batches in the run's order, the same for any number of workers and restarts."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext

import torch
from torch import Tensor, nn

from dmm_ray.errors import UserError
from dmm_ray.files import join
from dmm_ray.prior.config import PriorConfig
from dmm_ray.prior.model import ActivationPrior, new_denoiser
from dmm_ray.seeds import MASK64
from dmm_ray.store.reader import ActivationStore
from dmm_ray.training import checkpoint
from dmm_ray.training.base import load_base
from dmm_ray.training.config import TrainConfig
from dmm_ray.training.loader import Loader, store_normalizer
from dmm_ray.training.metrics_window import MetricsWindow, batch_metrics, means
from dmm_ray.training.parallel import CpuGroup, ParallelDenoiser, RankInfo, full_tensor
from dmm_ray.training.signals import RunSignal
from dmm_ray.training.state import check_architecture, restore, snapshot
from dmm_ray.training.step import Ema, FlowBatch, learning_rate
from dmm_ray.training.tracking import Tracker
from dmm_ray.training.validation import load_validation

logger = logging.getLogger(__name__)
INTERVAL = "interval"
"""Name of the checkpoint tensor with the metrics of the batches since the last record."""


class Trainer:
    """A training run inside one worker.

    Args:
        config: the run's configuration.
        prior_config: shape and provenance of the prior to train.
        rank_info: rank, world size, device. Several workers require torch.distributed, ``fsdp`` always does.

    Raises:
        ValueError: the precision is still ``auto``.
        UserError: fewer training rows than a batch, rows with NaN or Inf, or a checkpoint of another architecture.
        CheckFailed: workers found different checkpoints.
    """

    def __init__(self, config: TrainConfig, prior_config: PriorConfig, rank_info: RankInfo) -> None:
        if config.precision == "auto":
            raise ValueError("precision: must be chosen before the run; dmm_ray.training.settle does")
        self.config, self.prior_config, self.rank_info = config, prior_config, rank_info
        (self.layer,) = prior_config.layers
        store = ActivationStore.open(config.activations)
        self.normalizer = store_normalizer(store, prior_config).to(rank_info.device)
        base = load_base(config, prior_config)
        self.base = None if base is None else base.to(rank_info.device)
        self.loader = self._loader(store)
        torch.manual_seed(config.seed & MASK64)
        compiled = config.compile if config.compile is not None else rank_info.device.type == "cuda"
        self.model = ParallelDenoiser(
            new_denoiser(prior_config), rank_info, config.distribution.parallel == "fsdp", compiled
        )
        self.denoiser = self.model.denoiser
        self.ema = Ema(self.denoiser, config.optimizer.ema)
        self.optimizer = torch.optim.AdamW(
            self.denoiser.parameters(),
            lr=1.0,
            betas=(0.9, 0.99),
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        self.cpu_group = CpuGroup(rank_info.rank, rank_info.world_size)
        self.batch, past = self._resume()
        self.window = MetricsWindow(
            config, self.batch, past, rank_info.rank, rank_info.world_size, rank_info.device
        )
        self.validation = load_validation(config, store, self.layer, self.normalizer, rank_info, self.base)
        self.peak_lr = config.peak_lr(prior_config.d)

    def train(self, signal_after: Callable[[int], RunSignal]) -> bool:
        """Train on; the first worker logs, saves checkpoints and, at the end, writes the prior's folder.

        Args:
            signal_after: called after every batch with the number of batches done; returns the same on every worker.

        Returns:
            True at the end, False if ``signal_after`` stopped the run, after writing a checkpoint.

        Raises:
            UserError: rows with NaN or Inf, or a full disk.
            CheckFailed: a loss, gradient or weight is NaN or Inf.
        """
        config, schedule = self.config, self.config.schedule
        total, share = schedule.total_batches, self.rank_info.share(schedule.batch)
        log_every = schedule.every(config.logging.log_every, 100)
        save_every = schedule.every(config.checkpoints.checkpoint_every, 10)
        self.window.restart(self.loader.waited)
        tracker = self._tracker()
        with (
            closing(tracker) if tracker else nullcontext(),
            self._writer() or nullcontext() as writer,
            closing(self.loader.batches(self.batch, schedule.batch, share)) as batches,
        ):
            while self.batch < total:
                self.window.add(self._step(next(batches), share))
                self.batch += 1
                if self.batch % log_every == 0 or self.batch == total:
                    self._log(tracker, log_every)
                wanted = signal_after(self.batch)
                if self.batch < total and (wanted != RunSignal.CONTINUE or self.batch % save_every == 0):
                    self._save(writer)
                    if wanted == RunSignal.STOP:
                        return False
        self._export()
        return True

    def step_seconds(self) -> Generator[float]:
        """Train endlessly, yielding the seconds of every step; for a trial: nothing is logged or saved."""
        size = self.config.schedule.batch
        share = self.rank_info.share(size)
        with closing(self.loader.batches(self.batch, size, share)) as batches:
            started = time.perf_counter()
            for rows in batches:
                self._step(rows, share)
                self.batch += 1
                if self.rank_info.device.type == "cuda":
                    torch.cuda.synchronize(self.rank_info.device)
                now = time.perf_counter()
                yield now - started
                started = now

    def _step(self, rows: Tensor, share: slice) -> Tensor:
        """One global batch; returns this rank's metrics of it without waiting for the device."""
        config, rank_info, size = self.config, self.rank_info, self.config.schedule.batch
        losses, levels = [], []
        for piece in rank_info.pieces(size, config.distribution.micro_batch):
            mine = rows[piece.start - share.start : piece.stop - share.start]
            z_BD = self.normalizer.normalize(mine.to(rank_info.device, non_blocking=True))
            data = FlowBatch(config, self.batch, piece, z_BD, self.base)
            with self.model.accumulate(last=piece.stop == share.stop):
                found = data.loss(self.model.called, config.precision == "bfloat16")
                # DDP and FSDP average gradients over workers, whose shares may be uneven: this gives the mean over
                # the global batch.
                (found.sum() / size * rank_info.world_size).backward()
            losses.append(found.detach())
            levels.append(data.u_B)
        norm = nn.utils.clip_grad_norm_(self.denoiser.parameters(), config.optimizer.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.peak_lr, self.batch)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.batch + 1)
        return batch_metrics(torch.cat(losses), torch.cat(levels), full_tensor(norm), share.start, size)

    def _log(self, tracker: Tracker | None, log_every: int) -> None:
        """Record the interval and start the next one."""
        config, schedule, window = self.config, self.config.schedule, self.window
        sums = window.sums()
        validate_every = schedule.every(config.validation.validate_every, 10)
        validate = self.batch % validate_every < log_every or self.batch == schedule.total_batches
        validation_loss = self.validation_loss() if validate else None
        if tracker:
            levels = schedule.levels
            tracker.log(
                {
                    "samples": self.batch * schedule.batch,
                    "lr": learning_rate(config, self.peak_lr, self.batch - 1),
                    "validation_loss": validation_loss,
                    **means(sums),
                    **window.speed(flops(self.denoiser, schedule.batch, levels), self.loader.waited),
                    "memory_gb": memory_gb(self.rank_info.device),
                    "workers": self.rank_info.world_size,
                }
            )
        window.clear()
        window.restart(self.loader.waited)

    def _writer(self) -> checkpoint.CheckpointWriter | None:
        """The writer of this worker's part of the checkpoints; unless sharded, the first worker writes everything."""
        if not self.model.sharded and self.rank_info.rank > 0:
            return None
        cpu_group = self.cpu_group if self.model.sharded else None
        return checkpoint.CheckpointWriter(self.config.out, self.config.checkpoints.retention, cpu_group)

    def _save(self, writer: checkpoint.CheckpointWriter | None) -> None:
        """Have a checkpoint written, including the metrics since the last record."""
        # Both are collective, so every rank computes them, even one that writes nothing.
        sums = self.window.sums()
        loss = self.validation_loss() if self.config.checkpoints.keep_best else None
        if writer is not None:
            tensors = snapshot(self.denoiser, self.optimizer, self.ema)
            if self.rank_info.rank == 0:
                tensors[INTERVAL] = sums
            writer.save(self.batch * self.config.schedule.batch, tensors, loss)

    def _loader(self, store: ActivationStore) -> Loader:
        config = self.config
        pin = self.rank_info.device.type == "cuda"
        loader = Loader(store, self.layer, config.split, config.schedule.shuffle_rows, config.seed, pin)
        if loader.order.epoch_rows < config.schedule.batch:
            raise UserError(
                f"batch: {config.schedule.batch} samples, but layer {self.layer} of {store.uri} has "
                f"{loader.order.epoch_rows} training rows; lower --batch or extract more text"
            )
        return loader

    def validation_loss(self) -> float | None:
        """Loss of the averaged weights on the fixed validation pairs. Collective: every rank must call this."""
        if self.validation is None:
            return None
        with self.ema.in_place():
            loss = self.validation.loss(self.denoiser)
            self.model.reshard()
        return loss

    def _resume(self) -> tuple[int, Tensor | None]:
        """Batches done and the metrics since the last record, from the newest intact checkpoint."""
        out = self.config.out
        samples = checkpoint.newest(out, self.cpu_group)
        if samples is None:
            return 0, None
        logger.info("resuming after %d samples", samples)
        saved = checkpoint.load(out, samples)
        shapes = saved.shapes()
        past = shapes.pop(INTERVAL, None)
        check_architecture(join(out, checkpoint.FOLDER), shapes, self.denoiser)
        restore(saved, self.denoiser, self.optimizer, self.ema)
        return samples // self.config.schedule.batch, saved.rows(INTERVAL, 0, past[0]) if past else None

    def _tracker(self) -> Tracker | None:
        if self.rank_info.rank != 0:
            return None
        parameters = sum(p.numel() for p in self.denoiser.parameters())
        samples = self.batch * self.config.schedule.batch
        return Tracker(self.config, samples, {"parameters": parameters}, self.rank_info.on_ray)

    def _export(self) -> None:
        """The first worker writes the prior's folder; full tensors are gathered one at a time."""
        weights = {}
        for name, average in self.ema.state().items():
            tensor = full_tensor(average)
            if self.rank_info.rank == 0:
                weights[name] = tensor.cpu()
        if self.rank_info.rank == 0:
            denoiser = new_denoiser(self.prior_config)
            denoiser.load_state_dict(weights, assign=True)
            prior = ActivationPrior(self.prior_config, denoiser, self.normalizer, self.base)
            prior.save_pretrained(self.config.out)


def flops(denoiser: nn.Module, rows: int, levels: int) -> float:
    """Floating-point operations of a step's matrix products, forward and backward.

    Args:
        denoiser: the network.
        rows: rows in the batch.
        levels: distinct noise levels; the time path runs once for each.
    """
    weights = [(name, p.numel()) for name, p in denoiser.named_parameters() if p.ndim == 2]
    return 6.0 * sum(n * (levels if ("time_" in name) else rows) for name, n in weights)


def memory_gb(device: torch.device) -> float:
    """Peak memory allocated on the device so far, in GB; on CPU, the peak resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
