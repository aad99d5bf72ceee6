"""AUC of every score of a prior against unnatural rows, by token and over 32 tokens, and how uniform percentiles are.

Run with ``python jobs/bench.py ood``. Environment variables: ``DMM_BENCH_RUN``, a folder with ``prior`` and
``activations``, as written by `dmm demo` (default runs/demo); ``DMM_BENCH_TEXTS``, comma-separated files of other text
in addition to the docstrings of Python's standard library; ``DMM_BENCH_DOCUMENTS``, the number of test documents (64).
"""

from __future__ import annotations

import ast
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from dmm_ray.evaluation import ood, shifts
from dmm_ray.files import join
from dmm_ray.gaussians import mean_and_covariance
from dmm_ray.precision import affordable_precision
from dmm_ray.prior import ActivationPrior
from dmm_ray.store.manifest import DTYPES
from dmm_ray.store.reader import ActivationStore
from dmm_ray.store.split import TEST, TRAIN, Split
from dmm_ray.subject import SubjectModel
from dmm_ray.text.corpus import Corpus
from dmm_ray.training.calibrate import calibration_of

Say = Callable[[str], None]
WIDTH, SEED, MOMENT_ROWS = 32, 0, 40_000
DOCSTRING_LETTERS = 500
ROWS = (2048, 4096, 8192)
SETTINGS = ((8, 1), (16, 1), (32, 1), (32, 4), (64, 2))


@dataclass(frozen=True)
class Setup:
    """A prior, its store and model, and runs of test documents."""

    prior: ActivationPrior
    store: ActivationStore
    subject: SubjectModel
    layer: int
    split: Split
    texts: dict[int, str]
    """Texts of the test documents, by number."""
    runs: list[shifts.TokenRun]

    def activations(self, runs: list[shifts.TokenRun]) -> Tensor:
        """Rows of the runs in float32, rounded to the store's dtype."""
        found = shifts.activations(self.subject, runs, self.layer, WIDTH)
        return found.to(self.store.manifest.torch_dtype).float()

    def scores(self, x: Tensor, runs: list[shifts.TokenRun]) -> dict[str, np.ndarray]:
        """Every score of the runs' rows."""
        return ood.row_scores(self.prior, x, shifts.row_ids(runs, WIDTH), self.layer)


def set_up(folder: str, documents: int) -> Setup:
    """Load the prior, the store, the model and the test documents of a run."""
    prior = ActivationPrior.from_pretrained(join(folder, "prior"))
    store = ActivationStore.open(join(folder, "activations"))
    manifest, layer = store.manifest, prior.layers[0]
    split = Split.model_validate(prior.config.split)
    corpus = Corpus.scan(manifest.corpus.uris, manifest.corpus.text_field, manifest.corpus.separator)
    numbers = np.arange(corpus.n_documents)
    kept = set(numbers[split.of(numbers) == TEST].tolist())
    texts = {d.doc: d.text for d in corpus.read() if d.doc in kept and d.text}
    subject = SubjectModel.from_pretrained(
        manifest.subject.id,
        layers=[layer],
        dtype=DTYPES[affordable_precision(manifest.compute_dtype, "cpu")],
        revision=manifest.subject.revision,
    )
    tokens = dict(zip(texts, subject.tokenize(list(texts.values()), manifest.window), strict=True))
    return Setup(prior, store, subject, layer, split, texts, shifts.draw_runs(tokens, WIDTH, documents, SEED))


def docstrings() -> Iterator[str]:
    """The long docstrings of Python's standard library."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) >= DOCSTRING_LETTERS:
                    yield " ".join(text.split())


def other_texts() -> dict[str, list[str]]:
    """Texts from other domains, by name."""
    files = [path for path in os.environ.get("DMM_BENCH_TEXTS", "").split(",") if path]
    given = {Path(path).stem: [d.text for d in Corpus.scan([path]).read() if d.text] for path in files}
    return {"standard library docstrings": list(docstrings())} | given


def text_shifts(setup: Setup) -> dict[str, tuple[Tensor, list[shifts.TokenRun]]]:
    """Rows of shuffled text and of other domains, at the positions of the natural ones."""
    runs, window = setup.runs, setup.store.manifest.window
    mixed = [shifts.shuffled_words(setup.texts[run.doc], SEED + run.doc) for run in runs]
    found = {"tokens shuffled": shifts.shuffled_tokens(runs, SEED)}
    same = [
        run._replace(tokens=ids)
        for run, ids in zip(runs, setup.subject.tokenize(mixed, window), strict=True)
        if len(ids) >= run.start + WIDTH
    ]
    found["words shuffled"] = same
    for name, texts in other_texts().items():
        order = np.random.default_rng(SEED).permutation(len(texts))
        ids = (setup.subject.tokenize([texts[i]], window)[0] for i in order)
        found[name] = shifts.matched(runs, ids, WIDTH)
    return {name: (setup.activations(one), one) for name, one in found.items()}


def table(say: Say, setup: Setup, natural: dict[str, np.ndarray], x: Tensor) -> None:
    """AUC by shift and score, for single tokens and for means over 32."""
    sample = setup.store.select(setup.layer, setup.split, TRAIN, MOMENT_ROWS, SEED).activation.float()
    mean, covariance = mean_and_covariance(sample)
    edits = shifts.edited(x, mean, covariance, SEED)
    every = {name: (rows, setup.runs) for name, rows in edits.items()} | text_shifts(setup)
    found = {name: (setup.scores(rows, runs), runs) for name, (rows, runs) in every.items()}
    for width in (1, WIDTH):
        say(f"ood AUC (standard error), {'single tokens' if width == 1 else f'means over {width} tokens'}")
        say(f"{'':30}" + "".join(f"{name:>15}" for name in ood.SCORES))
        for name, (scores, runs) in found.items():
            columns = (one_auc(natural[s], setup.runs, scores[s], runs, width) for s in ood.SCORES)
            say(f"{name:30}" + "".join(f"{a.auc:9.3f} ({a.stderr:.3f})"[-15:].rjust(15) for a in columns))


def one_auc(
    a: np.ndarray, a_runs: list[shifts.TokenRun], b: np.ndarray, b_runs: list[shifts.TokenRun], width: int
) -> ood.Auc:
    """The AUC of one score, for single rows or means over a run."""
    sides = []
    for values, runs in ((a, a_runs), (b, b_runs)):
        docs = np.repeat([run.doc for run in runs], WIDTH // width)
        sides += [values.reshape(-1, width).mean(axis=1), docs]
    return ood.auc(*sides)


def percentiles(say: Say, setup: Setup, x: Tensor) -> None:
    """Uniformity of percentiles on test rows, by number of calibration rows."""
    own, docs = setup.prior.calibration, np.repeat([run.doc for run in setup.runs], WIDTH)
    for rows in ROWS:
        setup.prior.calibration = calibration_of(setup.prior, setup.store, rows, SEED)
        scores = setup.scores(x, setup.runs)
        for name in ("log_p", "latent", "norm", "proxy", "combined"):
            found = ood.uniformity(scores[name], docs)
            says = f"{name:9} distance {found.distance:.3f}, p {found.p_value:.2f}"
            say(f"ood calibrated on {rows:5} rows: {says}")
    setup.prior.calibration = own or setup.prior.calibration


def settings(say: Say, setup: Setup, x: Tensor, natural: dict[str, np.ndarray]) -> None:
    """How far percentiles move when log_prob runs with settings other than the calibration's."""
    ids = shifts.row_ids(setup.runs, WIDTH)
    for steps, probes in SETTINGS:
        found = ood.row_scores(setup.prior, x, ids, setup.layer, steps=steps, probes=probes)
        moved = {s: 100 * (found[s] - natural[s]) for s in ("log_p", "combined")}
        says = (f"{s} by {v.mean():+.2f} (median size {np.median(np.abs(v)):.2f})" for s, v in moved.items())
        say(f"ood percentiles with {steps} steps, {probes} probes move: {', '.join(says)} points")


def bench(say: Say) -> None:
    """Run all parts: percentiles, settings, and the table of AUCs."""
    setup = set_up(
        os.environ.get("DMM_BENCH_RUN", "runs/demo"), int(os.environ.get("DMM_BENCH_DOCUMENTS", "64"))
    )
    x = setup.activations(setup.runs)
    say(f"ood {len(x)} test rows of {len(setup.runs)} documents, layer {setup.layer}, d = {setup.prior.d}")
    percentiles(say, setup, x)
    natural = setup.scores(x, setup.runs)
    settings(say, setup, x, natural)
    table(say, setup, natural, x)
