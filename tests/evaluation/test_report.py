"""The report's scored texts, marks of the best, and escaping."""

import json
from pathlib import Path

import pytest

from dmm_ray.evaluation.report import ScoredText, ScoredToken, write_report

KEYS = ("prior", "gaussian", "pca", "mixture", "factor_analysers", "sae", "untrained")


def read(path):
    return Path(path).read_text()


@pytest.fixture
def summary():
    row = {k: float(i + 1) for i, k in enumerate(KEYS)}
    fidelity = {
        "flow_matching_loss": row,
        "delta_lm_loss": row | {"mixture": 0.5},
        "nll_nats_per_dim": {"prior": -0.25, "gaussian": 1.0, "mixture": None, "factor_analysers": None},
        "frechet_distance": row | {"sae": None, "floor": 0.1},
        "two_sample_auc": row | {"prior": 0.3, "gaussian": 0.55, "floor": 0.5},
    }
    relative = {
        "flow_matching_loss_vs_gaussian": -0.4,
        "flow_matching_loss_vs_mixture": 0.1,
        "flow_matching_loss_vs_factor_analysers": -0.2,
        "delta_lm_loss_vs_best_of_gaussian_pca_sae": -0.6,
        "delta_lm_loss_vs_mixture": 1.0,
        "delta_lm_loss_vs_factor_analysers": 0.5,
    }
    size = {"parameters": 12345, "flops_per_row": 2e6, "seconds": 1.5}
    return {
        "fidelity": fidelity,
        "fidelity_unseen_prefix": None,
        "relative": relative,
        "relative_unseen_prefix": None,
        "relative_interval": {k: [v - 0.02, v + 0.03] for k, v in relative.items()},
        "relative_interval_unseen_prefix": None,
        "stderr": {"flow_matching_loss": {"prior": 0.01}},
        "stderr_unseen_prefix": None,
        "by_level": {k: [1.0] * 10 for k in KEYS},
        "methods": {
            k: size | {"components": 7, "rank": 3, "latents": 9, "k": 2}
            for k in (*KEYS, "sae_plain", "sae_noised")
        },
        "delta_lm": {"published_protocol": {"prior": 0.7, "pca": 0.04, "sae": 0.1}},
        "rows": {"train": 1000, "test": 100, "test_documents": 10, "unseen_prefix_share": None},
        "inputs": {"prior": "/p", "activations": "/a", "model": "/models/<llm>", "layer": 3, "d": 64},
        "versions": {"torch": "x"},
        "seconds": 12.0,
    }


def test_says_plainly_what_is_better_and_what_is_worse(tmp_path, summary):
    page = read(write_report(str(tmp_path), summary))
    assert "40 % (37 to 42) below the full-covariance Gaussian" in page
    assert "10 % (8 to 13) above the better mixture's (mixture)" in page
    assert "7 factor analysers of rank 3" in page
    assert "2.00 M" in page
    assert "-60 %" in page
    assert "all test rows (-62 to -57)" in page
    assert "prior 0.700, PCA 0.040, SAE 0.100" in page
    assert "Text scored" not in page
    assert "&lt;llm&gt;" in page


def test_marks_the_best_of_each_column_and_leaves_dashes(tmp_path, summary):
    page = read(write_report(str(tmp_path), summary))
    assert '<td class="best">1.000 <small>± 0.010</small></td>' in page
    assert '<td class="best">0.500</td>' in page
    assert '<td class="best">0.550</td>' in page, "an AUC near 0.5 is best, not a low one"
    assert '<td class="rest">–</td>' in page


def test_scored_texts_are_coloured_with_tooltips_and_escaped(tmp_path, summary):
    tokens = [ScoredToken("<b>", None), ScoredToken("cat", 1.25, 40.0), ScoredToken("dog", -2.0)]
    page = read(write_report(str(tmp_path), summary, scored=[ScoredText("A & B", tokens)]))
    assert "A &amp; B" in page
    assert "&lt;b&gt;" in page
    assert 'title="1.250 nats/dim, percentile 40.0"' in page
    assert 'title="-2.000 nats/dim"' in page


def test_can_be_written_again_from_the_saved_summary(tmp_path, summary):
    first = read(write_report(str(tmp_path), summary))
    assert read(write_report(str(tmp_path), json.loads(json.dumps(summary)))) == first


def test_says_how_long_the_prior_was_trained_and_what_more_would_bring(tmp_path, summary):
    assert "The prior saw" not in read(write_report(str(tmp_path), summary))
    summary["training"] = {"samples": 2500, "minutes": 3.3, "half": 1.05, "end": 0.95}
    page = read(write_report(str(tmp_path), summary))
    assert "2,500 samples (2.5 passes over these rows), as many as fitted into 3.3 minutes" in page
    assert "from 1.050 to 0.950" in page
    assert "<code>--minutes</code>" in page
    summary["training"] = {"samples": 2500, "minutes": None, "half": None, "end": None}
    page = read(write_report(str(tmp_path), summary))
    assert "2,500 samples (2.5 passes over these rows).</p>" in page
