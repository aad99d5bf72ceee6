import numpy as np
import pytest
import torch
from gaussians import gaussian_prior, random_covariance

from dmm_ray.errors import UserError
from dmm_ray.evaluation import ood, shifts
from dmm_ray.gaussians import mean_and_covariance
from dmm_ray.prior.calibrate import calibrate

D, WIDTH = 12, 8


def test_auc_of_known_shifts():
    rng = np.random.default_rng(0)
    docs = np.repeat(np.arange(50), 20)
    natural, lower = rng.normal(size=1000), rng.normal(size=1000) - 1
    found = ood.auc(natural, docs, lower, docs)
    assert found.auc == pytest.approx(0.760, abs=0.03)  # the normal distribution function at 1 / sqrt 2
    assert ood.auc(natural, docs, natural, docs).auc == pytest.approx(0.5)
    assert ood.auc(natural, docs, lower - 99, docs).auc == 1.0
    assert 0.005 < found.stderr < 0.02


def test_rows_of_a_document_do_not_count_as_independent():
    rng = np.random.default_rng(1)
    docs = np.repeat(np.arange(40), 25)
    together = np.repeat(rng.normal(size=40), 25)
    alone = rng.normal(size=1000)
    clustered, independent = (ood.auc(v, docs, rng.normal(size=1000), docs) for v in (together, alone))
    assert clustered.stderr > 2 * independent.stderr


def test_uniformity_takes_documents_as_units():
    rng = np.random.default_rng(2)
    docs = np.repeat(np.arange(50), 40)
    by_document = np.repeat(rng.random(50), 40)
    assert ood.uniformity(by_document, docs).p_value > 0.05
    assert ood.uniformity(by_document, np.arange(2000)).p_value < 0.02
    assert ood.uniformity(rng.random(2000) ** 1.5, docs).p_value < 0.02


def test_scores_find_what_they_should():
    covariance = random_covariance(D)
    torch.manual_seed(0)
    root = torch.linalg.cholesky(covariance).float()
    x, other = (torch.randn(512, D) @ root.T for _ in range(2))
    ids = torch.stack([torch.arange(512) // 32, 1 + torch.arange(512) % 32], dim=1)
    prior = gaussian_prior(covariance)
    with pytest.raises(UserError, match="prior: not calibrated"):
        ood.row_scores(prior, x, ids)
    prior.calibration = calibrate(prior, x, ids, steps=4)
    natural = ood.row_scores(prior, other, ids, steps=4)
    assert set(natural) == set(ood.SCORES)
    docs = ids[:, 0].numpy()

    def aucs(rows: torch.Tensor) -> dict[str, float]:
        found = ood.row_scores(prior, rows, ids, steps=4)
        return {s: ood.auc(natural[s], docs, found[s], docs).auc for s in ood.SCORES}

    shrunken, grown = aucs(0.4 * other), aucs(1.6 * other)
    assert shrunken["log_p"] < 0.2
    assert shrunken["proxy"] < 0.5
    assert shrunken["latent"] > 0.9
    assert shrunken["combined"] > 0.9
    assert min(grown[s] for s in ("log_p", "latent", "proxy", "combined")) > 0.8


def test_edits_are_what_they_say():
    torch.manual_seed(1)
    x = torch.randn(4000, D) * torch.linspace(0.5, 3, D) + 2
    mean, covariance = mean_and_covariance(x)
    found = shifts.edited(x, mean, covariance, seed=0)
    assert torch.equal(found["rows x 0.8"], 0.8 * x)
    assert torch.allclose(found["the mean row"].double(), mean.expand(4000, D), atol=1e-5)
    noise_mean, noise_covariance = mean_and_covariance(found["noise of the same covariance"])
    assert (noise_mean - mean).abs().max() < 0.2
    assert (noise_covariance - covariance).abs().max() < 0.7
    permuted = found["dimensions permuted"]
    assert torch.equal(permuted.sort(1).values, x.sort(1).values)
    assert not torch.equal(permuted, x)


def test_runs_stay_in_their_documents_and_others_are_at_the_same_positions():
    tokens = {doc: [0, *range(100 * doc, 100 * doc + 5 * doc)] for doc in range(1, 12)}
    runs = shifts.draw_runs(tokens, WIDTH, 6, seed=0)
    assert len({run.doc for run in runs}) == 6
    for run in runs:
        assert 1 <= run.start <= len(run.tokens) - WIDTH
    others = [list(range(n)) for n in (3, 70, 10, 80, 90, 70, 80)]
    found = shifts.matched(runs, iter(others), WIDTH)
    assert [run.start for run in found] == [run.start for run in runs[: len(found)]]
    assert 4 <= len(found) <= 6
    assert all(len(run.tokens) >= run.start + WIDTH for run in found)
    shuffled = shifts.shuffled_tokens(runs, seed=0)
    for run, other in zip(runs, shuffled, strict=True):
        assert other.tokens[0] == run.tokens[0]
        assert sorted(other.tokens) == sorted(run.tokens)
    assert [r.tokens for r in shuffled] != [r.tokens for r in runs]
    assert sorted(shifts.shuffled_words("a b c d e", 1).split()) == ["a", "b", "c", "d", "e"]


def test_activations_of_runs_are_those_of_the_whole_document(tiny_subject):
    from dmm_ray.subject import SubjectModel

    subject = SubjectModel.from_pretrained(str(tiny_subject), layers=[1])
    tokens = dict(enumerate(subject.tokenize(["the cat sat on a red mat and saw one big dog run"] * 3, 64)))
    runs = shifts.draw_runs(tokens, WIDTH, 3, seed=1)
    found = shifts.activations(subject, runs, 1, WIDTH)
    ids = shifts.row_ids(runs, WIDTH)
    assert found.shape == (3 * WIDTH, 32)
    whole = subject.capture(*subject.pad([runs[1].tokens]), [1])[1][0]
    assert torch.allclose(found[WIDTH : 2 * WIDTH], whole[ids[WIDTH : 2 * WIDTH, 1]], atol=1e-5)
    assert ids[WIDTH].tolist() == [runs[1].doc, runs[1].start]
