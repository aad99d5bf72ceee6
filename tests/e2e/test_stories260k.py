"""The flow on a real trained model and real text, where they lie beside the checkout."""

import json
from pathlib import Path

import pytest
from stores import extract_here

from dmm_ray import ActivationPrior
from dmm_ray.evaluation.evaluate import EvaluateConfig, evaluate
from dmm_ray.extraction.verify import VerifyConfig, verify
from dmm_ray.training.config import TrainConfig
from dmm_ray.training.train import train


@pytest.mark.slow
def test_extract_train_evaluate(shared_data, tmp_path):
    model = str(shared_data / "models" / "stories260K")
    stories = (shared_data / "text" / "tinystories_1000_clean.txt").read_text().split("<|endoftext|>")
    (tmp_path / "stories.txt").write_text("<|endoftext|>".join(stories[:250]))
    with open(shared_data / "text" / "stories260k_sampled.jsonl") as f:
        (tmp_path / "sampled.jsonl").write_text("".join(next(f) for _ in range(400)))
    text = [str(tmp_path / "stories.txt"), str(tmp_path / "sampled.jsonl")]
    out = str(tmp_path / "store")
    store = extract_here(model=model, text=text, layers=[2], rows_per_shard=1 << 15, out=out)
    assert verify(VerifyConfig(store=store)) == store
    prior = train(
        TrainConfig(
            activations=store,
            out=str(tmp_path / "prior"),
            samples=200_000,
            batch=256,
            n_blocks=3,
            workers=0,
            calibration_rows=512,
        )
    )
    assert ActivationPrior.from_pretrained(prior).d == 64
    report = evaluate(
        EvaluateConfig(
            prior=prior,
            activations=store,
            model=model,
            out=str(tmp_path / "report"),
            mixture_sizes=(128,),
            analyser_sizes=(32,),
            analyser_ranks=(8,),
            sae_k=16,
            sae_latents=1024,
            sae_lr=5e-3,
            sae_kinds="topk",
            sae_samples=60_000,
            lm_documents=12,
            lm_levels=(),
            nll_rows=64,
            samples=300,
            two_sample_rows=200,
        )
    )
    summary = json.loads((Path(report) / "summary.json").read_text())
    for key in ("fidelity", "fidelity_unseen_prefix"):
        loss, delta = summary[key]["flow_matching_loss"], summary[key]["delta_lm_loss"]
        assert loss["prior"] < 0.75 * loss["gaussian"]
        assert delta["prior"] < 0.53 * min(delta[name] for name in ("gaussian", "pca", "sae"))
        assert summary[key]["nll_nats_per_dim"]["prior"] < summary[key]["nll_nats_per_dim"]["gaussian"] - 0.5
    assert 1.2 < summary["delta_lm"]["lm_loss"] < 1.6
