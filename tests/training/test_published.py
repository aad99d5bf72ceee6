import torch

from dmm_ray import ActivationPrior
from dmm_ray.cli import parse
from dmm_ray.prior import PriorConfig
from dmm_ray.prior.glp_verbs import ExportGlpConfig, export_glp
from dmm_ray.training.published import import_and_calibrate


def test_a_published_prior_is_imported_with_percentiles(train_store, tmp_path):
    config = PriorConfig(d=32, layers=(2,), d_model=32, d_mlp=64, n_blocks=1, variance_floor=1e-6)
    prior = ActivationPrior.untrained(config, torch.zeros(32), torch.ones(32))
    prior.save_pretrained(str(tmp_path / "ours"))
    theirs = export_glp(ExportGlpConfig(prior=str(tmp_path / "ours"), out=str(tmp_path / "theirs")))
    words = [theirs, str(tmp_path / "back"), "--activations", train_store, "--calibration-rows", "64"]
    _, wanted = parse("import-glp", words)
    back = ActivationPrior.from_pretrained(import_and_calibrate(wanted))
    x = torch.randn(4, 32)
    ours, found = prior.log_prob(x, steps=2, probes=1), back.log_prob(x, steps=2, probes=1)
    torch.testing.assert_close(found.nats, ours.nats)
    assert ours.percentile is None
    assert found.percentile is not None
    assert ((found.percentile >= 0) & (found.percentile <= 100)).all()
