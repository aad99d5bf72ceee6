import json

import numpy as np
import pytest
import safetensors.torch
import torch
from gaussians import gaussian_prior, random_covariance

from dmm_ray.errors import UserError
from dmm_ray.evaluation.ood import uniformity
from dmm_ray.prior import ActivationPrior, PriorConfig
from dmm_ray.prior.calibrate import calibrate
from dmm_ray.prior.calibration import CALIBRATION, Calibration
from dmm_ray.prior.quantiles import Table, bucket_edges, quantiles
from dmm_ray.prior.windows import window_means

D, LAYER, STEPS = 12, 3, 8
COVARIANCE = random_covariance(D)


def documents(first: int, n: int, length: int = 16, shared: float = 0.3) -> tuple[torch.Tensor, np.ndarray]:
    """Rows of N(0, COVARIANCE), alike within a document, and their (document, position)."""
    torch.manual_seed(first)
    root = torch.linalg.cholesky(COVARIANCE)
    own, common = torch.randn(n, length, D).double(), torch.randn(n, 1, D).double()
    z = (shared**0.5 * common + (1 - shared) ** 0.5 * own).reshape(-1, D) @ root.T
    doc, position = np.meshgrid(np.arange(first, first + n), np.arange(1, length + 1), indexing="ij")
    return z.float(), np.stack([doc.ravel(), position.ravel()], axis=1)


@pytest.fixture(scope="module")
def calibrated() -> ActivationPrior:
    prior = gaussian_prior(COVARIANCE)
    x, ids = documents(0, 200)
    prior.calibration = calibrate(prior, x, ids, steps=STEPS)
    return prior


def test_percentiles_of_other_documents_are_uniform_and_those_of_other_rows_are_not(calibrated):
    x, ids = documents(1000, 64)
    found = calibrated.log_prob(x, steps=STEPS, ids=ids)
    error = calibrated.velocity_error(x, ids=ids)
    proxy = calibrated.calibration.proxy_percentile(LAYER, error, torch.from_numpy(ids[:, 1]))
    for percentile in (found.percentile, found.latent_percentile, found.combined_percentile, proxy):
        result = uniformity(percentile.numpy() / 100, ids[:, 0])
        assert result.p_value > 0.02
        assert result.distance < 0.12
    larger = calibrated.log_prob(1.2 * x, steps=STEPS, ids=ids)
    assert uniformity(larger.percentile.numpy() / 100, ids[:, 0]).p_value < 0.02


def test_without_positions_rows_are_compared_with_all(calibrated):
    x, ids = documents(2000, 64)
    found = calibrated.log_prob(x, steps=STEPS)
    assert uniformity(found.percentile.numpy() / 100, ids[:, 0]).distance < 0.12
    assert not torch.equal(found.percentile, calibrated.log_prob(x, steps=STEPS, ids=ids).percentile)


def test_shrunken_rows_fool_log_p_but_not_the_combined_score(calibrated):
    x, ids = documents(3000, 16)
    found = calibrated.log_prob(0.3 * x, steps=STEPS, ids=ids)
    assert found.percentile.median() > 95
    assert found.latent_percentile.median() < 1
    assert found.combined_percentile.median() < 1
    larger = calibrated.log_prob(2 * x, steps=STEPS, ids=ids)
    assert larger.combined_percentile.median() < 1


def test_the_combined_score_sees_a_norm_that_the_others_do_not(calibrated):
    x, ids = documents(3000, 16)
    usual = calibrated.log_prob(x, steps=STEPS, ids=ids)
    middle = [usual.nats.median().expand(3), usual.base.median().expand(3)]
    norms = torch.tensor([0.01, 11.0, 99.0])
    found = calibrated.calibration.percentiles(LAYER, *middle, norms)
    assert (found.combined_percentile < torch.tensor([2.0, 100.0, 2.0])).all()
    assert found.combined_percentile[1] > 50


def test_percentiles_rise_with_the_score_and_never_touch_the_ends(calibrated):
    nats = torch.linspace(-60, 10, 500)
    base = torch.full((500,), -0.5 * D * 2.84)
    norm = torch.full((500,), float(D))
    found = calibrated.calibration.percentiles(LAYER, nats, base, norm)
    assert (found.percentile.diff() >= 0).all()
    assert found.percentile[0] > 0
    assert found.percentile[-1] > 99.9
    assert (found.percentile[:100].diff() > 0).all()
    unknown = calibrated.calibration.percentiles(
        LAYER, torch.tensor([float("nan"), -20.0]), base[:2], norm[:2]
    )
    assert unknown.percentile.isnan().tolist() == [True, False]
    assert unknown.combined_percentile.isnan().tolist() == [True, False]


def test_saved_with_the_prior_and_read_back(calibrated, tmp_path):
    config = PriorConfig(d=D, layers=(LAYER,), d_model=16, d_mlp=16, n_blocks=1, variance_floor=1e-6)
    prior = ActivationPrior.untrained(config, torch.zeros(D), torch.ones(D))
    prior.save_pretrained(str(tmp_path))
    assert Calibration.load(str(tmp_path)) is None
    assert ActivationPrior.from_pretrained(str(tmp_path)).log_prob(torch.ones(1, D)).percentile is None
    prior.calibration = Calibration(D, calibrated.calibration.by_layer, prior.fingerprint())
    prior.save_pretrained(str(tmp_path))
    again = ActivationPrior.from_pretrained(str(tmp_path)).calibration
    nats, base = torch.randn(50) * 20, -torch.rand(50) * 30
    norm, position = torch.rand(50) * 30, torch.arange(50)
    for one, other in zip(
        again.percentiles(LAYER, nats, base, norm, position),
        calibrated.calibration.percentiles(LAYER, nats, base, norm, position),
        strict=True,
    ):
        assert torch.equal(one, other)
    assert again.widths == (8,)
    assert again.by_layer[LAYER].about == {
        "steps": STEPS, "probes": 1, "seed": 0, "rows": 3200, "documents": 200,
    }  # fmt: skip
    header = (tmp_path / CALIBRATION).read_bytes()
    again.save(str(tmp_path))
    assert (tmp_path / CALIBRATION).read_bytes() == header


def test_of_another_prior_it_is_refused(calibrated, tmp_path):
    calibrated.save_pretrained(str(tmp_path))
    other = ActivationPrior.untrained(calibrated.config, torch.zeros(D), torch.ones(D), seed=1)
    other.calibration = calibrated.calibration
    with pytest.raises(UserError, match=r"calibration\.safetensors: made for a prior with other weights"):
        other.save_pretrained(str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()
    other.calibration = None
    other.save_pretrained(str(tmp_path))  # the file of the weights before is still there
    with pytest.raises(UserError, match="other weights: its percentiles would be wrong"):
        ActivationPrior.from_pretrained(str(tmp_path))
    Calibration(D + 1, calibrated.calibration.by_layer).save(str(tmp_path))
    with pytest.raises(UserError, match=f"d = {D + 1}, not {D}"):
        ActivationPrior.from_pretrained(str(tmp_path))
    Calibration(D, calibrated.calibration.by_layer).save(str(tmp_path))  # made before there were fingerprints
    assert ActivationPrior.from_pretrained(str(tmp_path)).calibration is not None


def test_rows_far_out_or_all_alike_are_never_at_0(calibrated):
    x, ids = documents(0, 20)
    far = calibrated.log_prob(10 * x, ids=ids, steps=STEPS)
    assert (far.percentile > 0).all()
    prior = gaussian_prior(COVARIANCE)
    same = x[:1].expand(200, -1)
    prior.calibration = calibrate(prior, same, np.array([[i, 1] for i in range(200)]), steps=STEPS)
    again = prior.log_prob(x[:1], steps=STEPS, ids=np.array([[7, 1]]), probes=1)
    assert 1 < float(again.percentile) < 99
    assert float(again.latent_percentile) > 1


def test_a_damaged_file_is_named(calibrated, tmp_path):
    calibrated.calibration.save(str(tmp_path))
    path = tmp_path / CALIBRATION
    whole = path.read_bytes()
    tensors = safetensors.torch.load(whole)
    falling = {name: t.flip(-1) if name.endswith("nats") else t for name, t in tensors.items()}
    size = int.from_bytes(whole[:8], "little")
    metadata = json.loads(whole[8 : 8 + size])["__metadata__"]
    other = {"calibration": metadata["calibration"].replace('"version": 1', '"version": 7')}
    for data, says in (
        (whole[:-9], "damaged"),
        (whole[:4], "damaged"),
        (safetensors.torch.save(tensors), "damaged"),
        (safetensors.torch.save(falling, metadata), "damaged .a table has the wrong shape or is not"),
        (safetensors.torch.save(tensors, other), "version 7, expected 1; calibrate"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=f"{CALIBRATION}: .*{says}"):
            Calibration.load(str(tmp_path))


def test_layers_join_and_others_are_refused(calibrated):
    one = calibrated.calibration
    both = one | Calibration(D, {5: one.by_layer[LAYER]})
    assert both.layers == (3, 5)
    with pytest.raises(UserError, match=r"layer: calibrated for 3, 5 \(got 4\)"):
        both.percentiles(4, *torch.zeros(3, 1))
    with pytest.raises(UserError, match="width: windows calibrated are 8, of nats_per_dim and combined"):
        both.window_percentile(5, "combined", np.zeros(1), 16)


def test_bad_rows_are_refused():
    prior, (x, ids) = gaussian_prior(COVARIANCE), documents(0, 2)
    with pytest.raises(UserError, match="ids: expected 32 pairs of document and position"):
        calibrate(prior, x, ids[:, 0])
    with pytest.raises(UserError, match="contains NaN or Inf"):
        calibrate(prior, x * float("inf"), ids)


def test_window_percentiles_are_uniform_over_other_documents(calibrated):
    x, ids = documents(4000, 100)
    found = calibrated.log_prob(x, steps=STEPS, ids=ids)
    for score, values in (("nats_per_dim", found.nats_per_dim), ("combined", found.combined_percentile)):
        means = window_means(values.numpy(), *ids.T, 8)
        percentile = calibrated.calibration.window_percentile(LAYER, score, means, 8)
        whole = np.isfinite(percentile)
        assert (whole == (ids[:, 1] >= 8)).all()
        assert uniformity(percentile[whole] / 100, ids[whole, 0]).distance < 0.12


@pytest.mark.parametrize("width", [1, 3, 8])
def test_window_means_against_a_loop(width):
    rng = np.random.default_rng(width)
    pairs = {(int(d), int(p)) for d, p in rng.integers(0, [4, 40], (120, 2))}
    ids = rng.permutation(np.array(sorted(pairs)))
    values = rng.normal(size=len(ids))
    values[5] = np.nan
    known = {(d, p): v for (d, p), v in zip(ids.tolist(), values, strict=True)}
    expected = [
        np.mean([known.get((d, q), np.nan) for q in range(p - width + 1, p + 1)]) for d, p in ids.tolist()
    ]
    found = window_means(values, ids[:, 0], ids[:, 1], width)
    assert np.allclose(found, expected, equal_nan=True)
    assert np.isfinite(found).any()
    assert np.isnan(window_means(values[:2], ids[:2, 0], ids[:2, 1], 3)).all()


def test_weights_count_as_repeated_rows():
    rng = np.random.default_rng(0)
    score, times = rng.normal(size=4000), rng.integers(1, 6, 4000)
    weighted, repeated = quantiles(score, times), quantiles(np.repeat(score, times), np.ones(times.sum()))
    assert np.abs(weighted - repeated)[5:-5].max() < 0.01
    assert np.abs(quantiles(score, np.ones(4000)) - weighted).max() > 0.01


def test_shares_of_the_calibration_rows_themselves_are_their_ranks():
    score = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    below, above = Table.of(score.numpy(), np.ones(1000)).shares(score)
    rank = (score.argsort().argsort() + 0.5) / 1000
    assert (below - rank).abs().max() < 0.004
    assert torch.allclose(below + above, torch.ones(1000, dtype=torch.float64))


def test_tied_scores_get_the_middle_of_their_ranks():
    table = Table.of(np.array([0.0] * 500 + [1.0] * 500), np.ones(1000))
    below, _ = table.shares(torch.tensor([0.0, 1.0, -1.0, 2.0]))
    assert below.tolist() == pytest.approx([0.25, 0.75, 0.0, 1.0], abs=0.003)


def test_tails_go_on_at_the_same_slope():
    exponential = -np.log(np.arange(1, 100_001) / 100_000)
    table = Table.of(exponential, np.ones(100_000))
    far = torch.tensor([8.0, 12.0, 20.0])
    _, above = table.shares(far)
    assert torch.allclose(above.log(), -far.double(), rtol=0.08)
    edge = table.values[0, -1]
    _, around = table.shares(torch.stack([edge - 1e-9, edge, edge + 1e-9]))
    assert around.diff().abs().max() < 1e-6


def test_buckets_pool_positions_until_they_have_rows():
    position = np.repeat(np.arange(1, 65), 10)
    assert bucket_edges(position, 100).tolist() == [0, 16, 32]
    assert bucket_edges(position, 10).tolist() == [0, 2, 4, 8, 16, 32, 64]
    assert bucket_edges(position, 11).tolist() == [0, 4, 8, 16, 32]
    assert bucket_edges(position, 10_000).tolist() == [0]
    table = Table.of(position.astype(float), np.ones(640), position, bucket_edges(position, 100))
    below, _ = table.shares(torch.tensor([4.0, 4.0, 4.0]), torch.tensor([3, 40, 0]))
    assert below.tolist() == pytest.approx([35 / 150, 0.0, 35 / 150], abs=0.01)
