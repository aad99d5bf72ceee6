"""The whole verb on a tiny store and prior, and every bad input it names."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaForCausalLM

from dmm_ray.cli import parse
from dmm_ray.errors import UserError
from dmm_ray.evaluation.config import EvaluateConfig
from dmm_ray.evaluation.data import load
from dmm_ray.evaluation.evaluate import evaluate
from dmm_ray.evaluation.statistics import clustered
from dmm_ray.evaluation.summary import compare, finite
from dmm_ray.files import sha256
from dmm_ray.prior import ActivationPrior
from dmm_ray.store.manifest import read_record, record_name
from dmm_ray.store.reader import ActivationStore

KEYS = {"prior", "gaussian", "pca", "mixture", "factor_analysers", "sae", "untrained"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, request):
    """The folder and summary of one whole evaluation."""
    out = tmp_path_factory.mktemp("evaluated") / "report"
    prior, store = request.getfixturevalue("eval_prior"), request.getfixturevalue("eval_store")
    config = EvaluateConfig(
        prior=prior,
        activations=store,
        out=str(out),
        mixture_sizes=(4, 32),
        analyser_sizes=(4,),
        analyser_ranks=(2, 4),
        sae_latents=64,
        sae_k=(8, 16),
        sae_lr=5e-3,
        sae_kinds="topk",
        sae_samples=30_000,
        lm_documents=8,
        nll_rows=32,
        nll_steps=8,
        samples=200,
        sample_steps=8,
        two_sample_rows=150,
        device="cpu",
    )
    assert evaluate(config) == str(out)
    return out, json.loads((out / "summary.json").read_text())


def test_summary_has_the_fixed_keys_and_finite_figures(finished):
    _, summary = finished
    assert {"fidelity", "inputs", "versions", "seconds"} <= set(summary)
    fidelity = summary["fidelity"]
    assert set(fidelity["flow_matching_loss"]) == set(fidelity["delta_lm_loss"]) == KEYS
    assert set(fidelity["nll_nats_per_dim"]) == {"prior", "gaussian", "mixture", "factor_analysers"}
    assert set(fidelity["frechet_distance"]) == set(fidelity["two_sample_auc"]) == KEYS | {"floor"}
    for name, row in fidelity.items():
        missing = {k for k, v in row.items() if v is None}
        assert missing == ({"sae"} if name in ("frechet_distance", "two_sample_auc") else set()), name
    assert summary["seconds"] > 0
    assert summary["versions"]["torch"]
    assert summary["inputs"]["layer"] == 1


def test_figures_are_in_order(finished):
    _, summary = finished
    flow = summary["fidelity"]["flow_matching_loss"]
    assert flow["prior"] < flow["untrained"]
    assert flow["gaussian"] < flow["pca"]
    assert summary["relative"]["flow_matching_loss_vs_gaussian"] == pytest.approx(
        flow["prior"] / flow["gaussian"] - 1
    )
    for suffix in ("", "_unseen_prefix"):
        intervals = summary[f"relative_interval{suffix}"]
        for name, value in summary[f"relative{suffix}"].items():
            low, high = intervals[name]
            assert low < value < high, name
    distance = summary["fidelity"]["frechet_distance"]
    assert distance["floor"] < distance["prior"] < distance["untrained"]
    nll, normalised = summary["fidelity"]["nll_nats_per_dim"], summary["nll_normalised_nats_per_dim"]
    assert nll["gaussian"] - nll["prior"] == pytest.approx(
        normalised["gaussian"] - normalised["prior"], abs=1e-6
    )
    assert set(summary["delta_lm"]["by_level"]) == {"0.3", "0.5", "0.7"}
    assert set(summary["delta_lm"]["published_protocol"]) == {"pca", "sae", "prior"}
    assert summary["delta_lm"]["by_level"]["0.5"]["prior"] == summary["fidelity"]["delta_lm_loss"]["prior"]


def test_methods_tell_their_size_and_time(finished):
    methods = finished[1]["methods"]
    assert set(methods) == (KEYS - {"sae"}) | {"sae_plain", "sae_noised"}
    assert all(m["parameters"] > 0 for m in methods.values())
    assert methods["prior"]["seconds"] > 0
    assert all(m["flops_per_row"] > 0 for m in methods.values())
    assert {"4", "32"} < set(methods["mixture"]["validation_loss_by_size"])
    assert set(methods["factor_analysers"]["validation_loss_by_size"]) == {"4 x 2", "4 x 4"}
    assert methods["mixture"]["components_lowered_to"] is None
    assert len(methods["sae_plain"]["validation_by_options"]) == 2
    assert 0 <= methods["sae_noised"]["dead_latents"] < 64


def test_unseen_prefixes_leave_out_test_documents_that_training_repeats(finished, config):
    _, summary = finished
    share = summary["rows"]["unseen_prefix_share"]
    inputs = load(config)
    unseen = inputs.is_unseen(inputs.test.ids)
    assert share == pytest.approx(unseen.mean())
    assert 0.5 < share < 1
    split = inputs.prior.config.split
    assert split["test"] == 0.1
    train_docs = set(inputs.train.docs.tolist())
    copies = [doc for doc in range(180, 200) if doc in inputs.tokens and doc - 180 in train_docs]
    copies += [doc for doc in range(20) if doc in inputs.tokens and doc + 180 in train_docs]
    assert copies
    assert not any(inputs.unseen[doc].any() for doc in copies)
    assert set(summary["fidelity_unseen_prefix"]["flow_matching_loss"]) == KEYS


def test_report_is_self_contained_and_names_every_method(finished):
    out, _ = finished
    page = (out / "report.html").read_text()
    for word in ("http://", "https://", "<script", "<link", 'src="/', "$"):
        assert word not in page
    for word in (
        "mixture of",
        "factor analysers of rank",
        "SAE",
        "Gaussian",
        "untrained",
        "unseen",
        "prefers-color-scheme",
        "viewport",
    ):
        assert word in page
    assert page.count("data:image/png;base64,") == 4
    assert {p.name for p in out.glob("*.png")} == {
        "loss_by_level.png",
        "delta_lm.png",
        "samples.png",
        "training.png",
    }


def test_parts_that_were_not_asked_for_are_null(options):
    fields = options | {"lm_documents": 0, "nll_rows": 0, "samples": 0, "unseen_prefix": False}
    out = evaluate(EvaluateConfig(**fields))
    summary = json.loads(Path(out, "summary.json").read_text())
    assert set(summary["fidelity"]["delta_lm_loss"].values()) == {None}
    assert set(summary["fidelity"]["frechet_distance"].values()) == {None}
    assert summary["fidelity_unseen_prefix"] is None
    assert summary["fidelity"]["flow_matching_loss"]["prior"] > 0
    assert Path(out, "report.html").stat().st_size > 1000


def refused(options, pattern, **changes):
    """The evaluation is refused in one line that matches, before it makes its folder."""
    fields = options | changes
    with pytest.raises(UserError, match=pattern) as caught:
        evaluate(EvaluateConfig(**fields))
    assert "\n" not in str(caught.value)
    assert not Path(fields["out"], "summary.json").exists()


def test_store_of_another_width(options, eval_prior, tmp_path):
    source = ActivationPrior.from_pretrained(eval_prior)
    config = source.config.model_copy(update={"d": 16})
    ActivationPrior.untrained(config, torch.zeros(16), torch.ones(16)).save_pretrained(
        str(tmp_path / "narrow")
    )
    refused(
        options,
        r"activations: .* has d = 32, but the prior models d = 16; give a store",
        prior=str(tmp_path / "narrow"),
    )


def test_layer_that_the_prior_lacks(options):
    refused(options, "layer: this prior models 1", layer=2)


def test_layer_that_the_store_lacks(options, eval_prior, tmp_path):
    source = ActivationPrior.from_pretrained(eval_prior)
    config = source.config.model_copy(update={"layers": (3,)})
    ActivationPrior.untrained(config, torch.zeros(32), torch.ones(32)).save_pretrained(
        str(tmp_path / "third")
    )
    refused(options, r"layer: .* has layers 1, 2, but the prior models 3", prior=str(tmp_path / "third"))


def test_prior_of_another_model(options, eval_prior, tmp_path):
    source = ActivationPrior.from_pretrained(eval_prior)
    config = source.config.model_copy(update={"subject": {"id": "elsewhere", "weights_hash": "0" * 64}})
    ActivationPrior.untrained(config, torch.zeros(32), torch.ones(32)).save_pretrained(
        str(tmp_path / "other")
    )
    refused(options, "trained on elsewhere", prior=str(tmp_path / "other"))


def test_model_with_other_weights(options, tiny_subject, tmp_path):
    folder = tmp_path / "retrained"
    shutil.copytree(tiny_subject, folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data += 0.1
    model.save_pretrained(folder)
    refused(options, "model: .*: model.safetensors is not what .* was extracted with", model=str(folder))


def test_missing_and_other_text(options, tmp_path):
    refused(options, "text: .*no such file", text=str(tmp_path / "none.jsonl"))
    other = tmp_path / "text.jsonl"
    other.write_text('{"text": "something else"}\n')
    refused(options, "is not the text that", text=[str(other)])


def test_no_test_documents(options, eval_prior, tmp_path):
    folder = tmp_path / "no_test"
    shutil.copytree(eval_prior, folder)
    config = json.loads((folder / "config.json").read_text())
    config["split"] = {"seed": 0, "train": 0.9, "validation": 0.1, "test": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    refused(options, "no test documents", prior=str(folder))


def test_value_that_is_not_finite_is_named_by_document_and_position(options, eval_store, tmp_path):
    store = tmp_path / "damaged"
    shutil.copytree(eval_store, store)
    opened = ActivationStore.open(str(store))
    path = store / "layer_01" / "shard-000000.parquet"
    table = pq.read_table(path)
    width = opened.manifest.bytes_per_row
    values = [v.as_py() for v in table["activation"]]
    values[5] = np.full(width // 4, np.nan, dtype=np.float32).tobytes()
    column = table.schema.get_field_index("activation")
    field = table.schema.field("activation")
    table = table.set_column(column, field, [pa.array(values, type=field.type)])
    pq.write_table(table, path, row_group_size=opened.manifest.row_group_rows)
    record = json.loads(read_record(str(store), 0).model_dump_json())
    entry = record["files"]["layer_01/shard-000000.parquet"]
    entry |= {"bytes": path.stat().st_size, "sha256": sha256(str(path))}
    (store / record_name(0)).write_text(json.dumps(record))
    doc, position = (table[name][5].as_py() for name in ("doc", "position"))
    refused(options, f"document {doc}, position {position}", activations=str(store))


def test_output_folder_that_holds_something_else(options, eval_store, eval_prior):
    for out, what in ((eval_store, "an activation store"), (eval_prior, "a prior")):
        with pytest.raises(UserError, match=f"out: .* holds {what}; choose another"):
            evaluate(EvaluateConfig(**options | {"out": out}))


def test_not_finite_becomes_null_and_missing_rivals_give_no_ratio():
    assert finite({"a": [1.0, float("nan")], 2: (float("inf"), "x")}) == {"a": [1.0, None], "2": [None, "x"]}
    one, two = (clustered(np.full(4, mean), np.arange(4)) for mean in (1.0, 2.0))
    flow = dict.fromkeys(KEYS, two) | {"prior": one, "pca": None}
    found = compare({"flow_matching_loss": flow, "delta_lm_loss": dict.fromkeys(KEYS)})
    assert found["flow_matching_loss_vs_gaussian"] == (-0.5, (-0.5, -0.5))
    assert found["flow_matching_loss_vs_pca"] is None
    assert found["delta_lm_loss_vs_best_of_gaussian_pca_sae"] is None


def test_quick_changes_defaults_and_nothing_that_is_given() -> None:
    given = {"prior": "p", "activations": "a", "out": "o", "sae_k": (8, 64), "lm_documents": 5}
    quick, full = (EvaluateConfig(**given, quick=quick) for quick in (True, False))
    assert (quick.sae_k, quick.lm_documents) == ((8, 64), 5)
    assert (quick.mixture_sizes, quick.sae_minutes) == ((2048,), 0.75)
    assert (full.mixture_sizes[-1], full.sae_minutes) == (8192, 4.0)
    _, parsed = parse(
        "evaluate", ["--prior", "p", "--activations", "a", "--out", "o", "--quick", "--seed", "3"]
    )
    assert (parsed.mixture_sizes, parsed.seed) == ((2048,), 3)
