import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from dmm_ray.errors import UserError
from dmm_ray.prior import ActivationPrior, PriorConfig
from dmm_ray.prior.calibration import CALIBRATION, Calibration
from dmm_ray.store.reader import ActivationStore
from dmm_ray.store.split import VALIDATION, Split
from dmm_ray.training.calibrate import (
    BLOCK,
    Places,
    calibrate_prior_on_store,
    candidates,
    draw,
    read,
)

SPLIT = {"train": 0.6, "validation": 0.3, "test": 0.1}


def places(lengths: np.ndarray) -> Places:
    """Rows of documents of these lengths, as if of one row group."""
    doc = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([np.arange(1, n + 1) for n in lengths])
    return Places([], np.zeros(len(doc), dtype=np.int64), np.arange(len(doc)), doc, position)


def untrained(d: int, layers: tuple[int, ...], folder: Path, split: dict) -> str:
    config = PriorConfig(
        d=d,
        layers=layers,
        subject_layers=4,
        d_model=32,
        d_mlp=32,
        n_blocks=1,
        variance_floor=1e-6,
        split=split,
    )
    shape = (len(layers), d)
    ActivationPrior.untrained(config, torch.zeros(shape), torch.full(shape, 4e-4)).save_pretrained(
        str(folder)
    )
    return str(folder)


def test_blocks_are_consecutive_and_as_many_as_asked_for():
    every = places(np.full(200, 300))
    drawn, weights = draw(every, 4000, seed=1)
    assert abs(len(drawn.doc) - 4000) < 300
    assert len(weights) == len(drawn.doc)
    starts = np.flatnonzero(
        (np.diff(drawn.position, prepend=-9) != 1) | (np.diff(drawn.doc, prepend=-9) != 0)
    )
    lengths = np.diff(np.append(starts, len(drawn.doc)))
    assert (lengths % BLOCK == 0).mean() > 0.6
    assert drawn.doc.tolist() == draw(every, 4000, seed=1)[0].doc.tolist()
    assert drawn.doc.tolist() != draw(every, 4000, seed=2)[0].doc.tolist()


def test_early_positions_are_drawn_more_often_and_weigh_less():
    every = places(np.full(100, 1000))
    shares, early = [], []
    for seed in range(20):
        drawn, weights = draw(every, 4000, seed)
        early.append((drawn.position < 64).mean())
        shares.append(weights[drawn.position < 64].sum() / len(every.doc))
    assert np.mean(early) > 0.2  # 6.3 % of all rows
    assert np.mean(shares) == pytest.approx(0.063, abs=0.01)


def test_all_rows_are_taken_where_there_are_no_more():
    every = places(np.array([3, 50, 20]))
    drawn, weights = draw(every, 1000, seed=0)
    assert len(drawn.doc) == 73
    assert set(weights) == {1.0}


def test_every_shared_layer_is_calibrated_on_validation_documents(train_store, tmp_path):
    folder = untrained(32, (1, 2), tmp_path, SPLIT)
    calibrate_prior_on_store(folder, train_store, rows=400, device="cpu")
    found = Calibration.load(folder)
    assert found.layers == (1, 2)
    assert 8 in found.widths
    about = found.by_layer[2].about
    assert 350 < about["rows"] < 450
    first = (tmp_path / CALIBRATION).read_bytes()
    calibrate_prior_on_store(folder, train_store, rows=400, device="cpu")
    assert (tmp_path / CALIBRATION).read_bytes() == first
    x = ActivationStore.open(train_store).select(1, Split(**SPLIT), VALIDATION, 200).activation
    percentile = ActivationPrior.from_pretrained(folder).log_prob(x, layer=1).percentile
    assert 25 < percentile.mean() < 75


def test_rows_are_those_of_their_places(train_store):
    store, split = ActivationStore.open(train_store), Split(**SPLIT)
    every = candidates(store, 1, split, 1_000_000, seed=3)
    whole = store.select(1, split, VALIDATION)
    assert len(every.doc) == len(whole.doc)
    drawn, _ = draw(every, 300, seed=3)
    at = {pair: i for i, pair in enumerate(zip(whole.doc.tolist(), whole.position.tolist(), strict=True))}
    index = [at[pair] for pair in zip(drawn.doc.tolist(), drawn.position.tolist(), strict=True)]
    assert torch.equal(read(store, 1, drawn), whole.activation[torch.tensor(index)])
    assert len(candidates(store, 1, None, 1_000_000, seed=3).doc) == store.rows


def test_a_prior_without_a_split_is_calibrated_on_all_documents(train_store, tmp_path, caplog):
    folder = untrained(32, (1,), tmp_path, {})
    with caplog.at_level(logging.WARNING):
        calibrate_prior_on_store(folder, train_store, rows=150, device="cpu")
    assert "the percentiles are rough" in caplog.text
    assert Calibration.load(folder).layers == (1,)


@pytest.mark.parametrize(
    ("d", "layers", "split", "says"),
    [
        (16, (1,), {}, "the prior models d = 16; give a store extracted"),
        (32, (3,), {}, "has layers 1, 2, but the prior models 3; extract that layer"),
        (32, (1,), {"train": 1.0, "validation": 0.0, "test": 0.0}, "no validation documents to calibrate on"),
    ],
)
def test_a_store_that_does_not_fit_is_refused(train_store, tmp_path, d, layers, split, says):
    folder = untrained(d, layers, tmp_path, split)
    with pytest.raises(UserError, match=says):
        calibrate_prior_on_store(folder, train_store, device="cpu")
    assert not (tmp_path / CALIBRATION).exists()
