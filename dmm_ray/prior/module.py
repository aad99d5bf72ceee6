"""What a prior is before it is asked anything: its parts, loading, saving, publishing."""

from __future__ import annotations

import tempfile
from typing import Any, Self

import torch
from torch import Tensor, nn

from dmm_ray.arguments import as_integer
from dmm_ray.errors import UserError
from dmm_ray.precision import Precision, PrecisionOption, precision_on
from dmm_ray.prior import folder, publish
from dmm_ray.prior.calibration import Calibration
from dmm_ray.prior.config import PriorConfig
from dmm_ray.prior.network import Denoiser
from dmm_ray.prior.normalizer import Normalizer
from dmm_ray.prior.velocities import Velocities
from dmm_ray.prior.weights import fingerprint
from dmm_ray.seeds import MASK64, as_seed


class PriorModule(nn.Module):
    """The parts of a prior.

    Attributes:
        config: shape and provenance.
        denoiser: the network.
        normalizer: statistics of each layer.
        calibration: tables behind the percentiles, or None.
        velocities: the network as a field, in several number formats.
        precision: the one that the operations take where they are told none.
    """

    def __init__(self, config: PriorConfig, denoiser: Denoiser, normalizer: Normalizer) -> None:
        super().__init__()
        self.config = config
        self.denoiser = denoiser
        self.normalizer = normalizer
        self.calibration: Calibration | None = None
        self.velocities = Velocities(config)
        self.precision: Precision = "float32"
        self.eval()
        self.requires_grad_(False)

    @property
    def d(self) -> int:
        """Width of an activation."""
        return self.config.d

    @property
    def layers(self) -> tuple[int, ...]:
        """Block numbers this prior models."""
        return self.config.layers

    @property
    def device(self) -> torch.device:
        """Where the weights are; inputs are moved there."""
        return self.denoiser.in_proj.weight.device

    @classmethod
    def untrained(cls, config: PriorConfig, mean: Tensor, var: Tensor, seed: int = 0) -> Self:
        """A prior with random weights, from per-layer statistics mean and var, (d,) or (L, d)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(as_seed(seed) & MASK64)
            denoiser = new_denoiser(config)
        shape = (len(config.layers), config.d)
        normalizer = Normalizer(mean.reshape(shape), var.reshape(shape), config.variance_floor)
        return cls(config, denoiser, normalizer)

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        device: str = "cpu",
        revision: str | None = None,
        precision: PrecisionOption = "float32",
    ) -> Self:
        """Load a prior, ours or a published one, from a folder, an fsspec URI or a Hugging Face Hub id.

        Args:
            source: where it is.
            device: a torch device.
            revision: branch, tag or commit of a hub id.
            precision: of the network's products where an operation is told none; ``auto`` is bfloat16 where the device
                is fast in it.

        Raises:
            UserError: not a prior, a damaged file, or weights that do not fit the configuration.
        """
        path = folder.resolve(str(source), revision)
        config, tensors = folder.load(path)
        statistics = Normalizer(
            tensors.pop("normalizer.mean"), tensors.pop("normalizer.var"), config.variance_floor
        )
        with torch.device("meta"):
            denoiser = new_denoiser(config)
        weights = {name.removeprefix("denoiser."): t for name, t in tensors.items()}
        try:
            denoiser.load_state_dict(weights, assign=True)
        except RuntimeError as e:
            raise UserError(
                f"{source}: weights do not fit config.json: {' '.join(str(e).split())[:300]}"
            ) from e
        prior = cls(config, denoiser, statistics).to(device)
        prior.precision = precision_on(precision, device)
        prior.calibration = Calibration.load(path)
        prior._check_calibration()
        return prior

    def save_pretrained(self, path: str) -> None:
        """Write ``config.json``, ``model.safetensors`` (weights and normaliser) and the calibration into a folder."""
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        self._check_calibration()
        folder.save(path, self.config, tensors)
        if self.calibration is not None:
            self.calibration.save(path)

    def fingerprint(self) -> str:
        """Of the weights and the normaliser: :func:`dmm_ray.prior.weights.fingerprint`."""
        return fingerprint(self.state_dict())

    def _check_calibration(self) -> None:
        """Raises UserError where the percentiles are of other weights."""
        if self.calibration is not None:
            self.calibration.check(self.d, self.fingerprint())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        license: str | None = None,
        commit_message: str = "Upload a prior",
        token: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Upload this prior with a model card to the Hugging Face Hub; the commit's URL.

        Args: see :func:`dmm_ray.prior.publish.push_to_hub`.
        """
        with tempfile.TemporaryDirectory() as path:
            self.save_pretrained(path)
            return publish.push_to_hub(
                path,
                repo_id,
                private=private,
                license=license,
                commit_message=commit_message,
                token=token,
                revision=revision,
            )

    def compile(self, **options: Any) -> None:
        """Compile the network from now on, with ``options`` of torch.compile, such as ``mode="reduce-overhead"``."""
        self.velocities.compile(options)

    def layer_index(self, layer: int | None) -> int:
        """The index of ``layer`` among the modelled ones. Raises UserError for another, or None with several."""
        if layer is None and len(self.layers) == 1:
            return 0
        if layer is None or as_integer("layer", layer) not in self.layers:
            raise UserError(f"layer: this prior models {', '.join(map(str, self.layers))} (got {layer})")
        return self.layers.index(layer)


def new_denoiser(config: PriorConfig) -> Denoiser:
    """An initialised denoiser of the shape that ``config`` says."""
    return Denoiser(config.d, config.d_model, config.d_mlp, config.n_blocks, config.multi_layer)
