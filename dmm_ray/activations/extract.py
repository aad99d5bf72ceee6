"""``dmm extract``: text to an activation store, with a Ray Data pool of truncated subject models."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from typing import Any

from pydantic import Field, field_validator

from dmm_ray.activations.actor import Extractor
from dmm_ray.activations.corpus import Corpus
from dmm_ray.activations.engine import Task, too_many_failed
from dmm_ray.activations.figures import Figures, Progress
from dmm_ray.activations.lock import LOCK, writer_lock
from dmm_ray.activations.manifest import (
    MANIFEST,
    STATISTICS,
    SUMMARY,
    CorpusEntry,
    DtypeName,
    Manifest,
    SubjectEntry,
    moments_name,
    read_manifest,
    read_moments,
    read_record,
    record_name,
    write_moments,
)
from dmm_ray.activations.moments import Moments
from dmm_ray.activations.resources import Resources, plan_resources
from dmm_ray.activations.store import file_sizes, length_problem
from dmm_ray.activations.units import count_units, documents_per_unit, unit_at
from dmm_ray.activations.writer import TEMPORARY
from dmm_ray.cluster import ensure_ray
from dmm_ray.config import Config, versions
from dmm_ray.errors import UserError
from dmm_ray.files import absolute, filesystem, join, make_folder, write_json
from dmm_ray.subject import SubjectSource

logger = logging.getLogger(__name__)
DEFAULT_WINDOW = 2048
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
MAX_BLOCKS = 4096
"""Most Ray Data blocks of a run; with more units, a block holds several."""


class ExtractConfig(Config):
    """Read text, run a language model up to the highest wanted layer, store what its blocks put out."""

    model: str
    """Folder of a Hugging Face model, or a hub id."""
    text: str | list[str]
    """Text to read: .jsonl or .txt files, globs or folders, local paths or fsspec URIs; one or a list."""
    layers: list[int] = Field(min_length=1)
    """Layers to keep: k is the output of decoder block k, counted from 0."""
    out: str
    """Folder of the store to write or to resume; a local path or fsspec URI."""
    dtype: DtypeName = "bfloat16"
    """Stored number format."""
    compute_dtype: DtypeName | None = None
    """Number format of the model's computation; by default the same as dtype."""
    window: int | None = Field(default=None, ge=2)
    """Tokens of a document that are kept, from its start; by default 2048 or the model's context if less."""
    keep_first: bool = False
    """Keep position 0 (BOS or attention sink) too."""
    text_field: str = "text"
    """Field of a jsonl record that holds its text."""
    text_separator: str | None = None
    """What parts the documents of a .txt file; by default <|endoftext|> if it occurs, else blank lines."""
    max_failed_documents: int = Field(default=0, ge=0)
    """Documents without text (bad JSON, no field, bad UTF-8) to skip and list before giving up."""
    rows_per_shard: int = Field(default=262144, ge=1)
    """Most rows of a unit of work, whose rows of one layer make one shard."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens per forward pass, padding included; by default 2048 on a CPU, 16384 on a GPU."""
    actors: int | None = Field(default=None, ge=1)
    """Processes that each hold a model; by default one per GPU, or one per 2 CPUs where there is none."""
    cpus_per_actor: float | None = Field(default=None, gt=0)
    """CPUs (and torch threads) of each; by default 2 at most without a GPU, 1 with one."""
    gpus_per_actor: float | None = Field(default=None, ge=0)
    """GPUs of each; by default 1 where the cluster has any, else 0 (runs on the CPU)."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    block_path: str | None = None
    """Dotted path of the list of decoder blocks, for an architecture that is not known."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    seed: int = 0
    """Recorded in the manifest; rows do not depend on it, since every position of every document is kept."""

    @field_validator("layers")
    @classmethod
    def _distinct_layers(cls, layers: list[int]) -> list[int]:
        if len(set(layers)) != len(layers) or min(layers) < 0:
            raise ValueError("give distinct block numbers from 0 up")
        return sorted(layers)

    @property
    def uris(self) -> list[str]:
        """``text`` as a list of absolute URIs."""
        return [absolute(uri) for uri in ([self.text] if isinstance(self.text, str) else self.text)]


def extract(config: ExtractConfig) -> str:
    """Write, or finish, the store at ``config.out``; the folder.

    Raises:
        UserError: bad input, or a folder that holds something else; nothing is written then.
    """
    started = time.monotonic()
    out = absolute(config.out)
    check_target(out)
    source = SubjectSource.resolve(config.model, config.revision, config.trust_remote_code)
    n_layers = source.check(config.layers, config.block_path)
    window = choose_window(config.window, source.context)
    corpus = Corpus.scan(config.uris, config.text_field, config.text_separator)
    if len(corpus.problems) > config.max_failed_documents:
        raise UserError(too_many_failed(corpus.problems, config.max_failed_documents))
    manifest = make_manifest(config, source, n_layers, corpus, window)
    make_folder(out)
    with writer_lock(out):
        done = prepare(out, manifest)
        if len(done) == manifest.units and SUMMARY in file_sizes(out):
            logger.info("%s is complete already: %d units", out, manifest.units)
            return out
        if done:
            logger.info("resuming %s: %d of %d units are done", out, len(done), manifest.units)
        rows_per_s = run_units(config, out, manifest, corpus, done)
        figures = finish(out, manifest)
        summary = {
            "figures": {**figures, "rows_per_s": rows_per_s and round(rows_per_s, 1)},
            "inputs": config.model_dump(mode="json"),
            "versions": versions(),
            "seconds": round(time.monotonic() - started, 3),
        }
        write_json(join(out, SUMMARY), summary)
    return out


def choose_window(window: int | None, context: int) -> int:
    """The window in tokens. Raises UserError for one that the model's context cannot hold."""
    if window is not None and window > context:
        raise UserError(f"window: {window} is more than the model's context of {context} tokens")
    return window or min(DEFAULT_WINDOW, context)


def make_manifest(
    config: ExtractConfig, source: SubjectSource, n_layers: int, corpus: Corpus, window: int
) -> Manifest:
    """The manifest of this extraction."""
    per_unit = documents_per_unit(config.rows_per_shard, window)
    return Manifest(
        subject=SubjectEntry(
            id=source.model_id,
            revision=source.revision,
            weights_hash=source.weights_hash,
            block_path=config.block_path,
            n_layers=n_layers,
            context=source.context,
        ),
        tokenizer_hash=source.tokenizer_hash,
        layers=tuple(config.layers),
        dtype=config.dtype,
        compute_dtype=config.compute_dtype or config.dtype,
        d=source.d,
        corpus=CorpusEntry(
            uris=tuple(config.uris),
            hash=corpus.hash,
            documents=corpus.n_documents,
            text_field=config.text_field,
            separator=config.text_separator,
        ),
        window=window,
        keep_first=config.keep_first,
        seed=config.seed,
        rows_per_shard=config.rows_per_shard,
        documents_per_unit=per_unit,
        units=count_units(corpus.n_documents, per_unit),
    ).sealed()


def check_target(out: str) -> None:
    """Raise UserError where ``out`` is a file, or a folder that holds other things than a store."""
    fs, path = filesystem(out)
    if fs.isfile(path):
        raise UserError(f"out: {out} is a file; choose another --out")
    if not fs.isdir(path):
        return
    names = {name.rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(path, detail=False)} - {LOCK}
    if names and MANIFEST not in names:
        raise UserError(
            f"out: {out} holds no store but other things ({sorted(names)[0]}); choose another --out"
        )


def prepare(out: str, manifest: Manifest) -> set[int]:
    """Write the manifest, or compare it with the one there; the finished units. Left-over files go.

    Raises:
        UserError: the folder holds finished units of another configuration; the message names the option.
    """
    sizes = file_sizes(out)
    there = read_manifest(out) if MANIFEST in sizes else None
    done = {unit for unit in range(there.units) if is_done(out, unit, sizes)} if there else set()
    same = there is not None and there.config_hash == manifest.config_hash
    if there and not same and (done or SUMMARY in sizes):
        raise UserError(refusal(out, there, manifest))
    fs, path = filesystem(out)
    for name in sizes:
        if TEMPORARY in name or (not same and "/" in name):
            fs.rm_file(join(path, name))
    if not same:
        write_json(join(out, MANIFEST), manifest.model_dump(mode="json"))
    return done


def is_done(out: str, unit: int, sizes: dict[str, int]) -> bool:
    """Whether a unit has a readable record and all the files it lists have their lengths."""
    if record_name(unit) not in sizes:
        return False
    try:
        return length_problem(read_record(out, unit), sizes) is None
    except UserError as e:
        logger.warning("%s; its unit is extracted again", e)
        return False


def refusal(out: str, there: Manifest, manifest: Manifest) -> str:
    """Which option differs from what the store at ``out`` was extracted with."""
    theirs, ours = there.identity(), manifest.identity()
    option = next((name for name in ours if theirs[name] != ours[name]), MANIFEST)
    return (
        f"{option}: {out} was extracted with {_short(theirs.get(option))}, not {_short(ours.get(option))}; "
        "choose another --out, or give the same configuration to resume"
    )


def run_units(
    config: ExtractConfig, out: str, manifest: Manifest, corpus: Corpus, done: set[int]
) -> float | None:
    """Extract the units not in ``done``, logging rate and time left; rows per second, or None."""
    todo = [unit for unit in range(manifest.units) if unit not in done]
    if not todo:
        return None
    ensure_ray()
    resources = plan_resources(config.actors, config.cpus_per_actor, config.gpus_per_actor, len(todo))
    logger.info(
        "extracting %d units of %d documents at most, layers %s, on %d actors (%s)",
        len(todo), manifest.documents_per_unit, list(manifest.layers), resources.actors, resources.device,
    )  # fmt: skip
    failed = [failure for unit in done for failure in read_record(out, unit).failed]
    progress = Progress(len(todo))
    for result in _results(config, out, manifest, corpus, todo, resources):
        if "error" in result:
            raise UserError(result["error"])
        failed += [tuple(failure) for failure in result["failed"]]
        if len(failed) > config.max_failed_documents:
            raise UserError(
                f"text: {len(failed)} documents without text, the last: {failed[-1][1]}; "
                f"skip more with --max-failed-documents (now {config.max_failed_documents})"
            )
        progress.add(result["rows"])
    return progress.rows_per_s


def _results(
    config: ExtractConfig, out: str, manifest: Manifest, corpus: Corpus, todo: list[int], resources: Resources
) -> Iterator[dict[str, Any]]:
    """The small result of each unit, in the order they finish."""
    import ray

    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # says that its bars are off
    task = Task(
        out=out,
        manifest=manifest,
        batch_tokens=config.batch_tokens or BATCH_TOKENS[resources.device],
        max_failed=config.max_failed_documents,
        threads=max(1, int(resources.cpus)),
        device=resources.device,
        trust_remote_code=config.trust_remote_code,
    )
    units = [unit_at(unit, corpus.n_documents, manifest.documents_per_unit)._asdict() for unit in todo]
    dataset = ray.data.from_items(units, override_num_blocks=min(len(units), MAX_BLOCKS)).map_batches(
        Extractor,
        fn_constructor_args=(task, corpus),
        compute=ray.data.ActorPoolStrategy(min_size=resources.fitting, max_size=resources.actors),
        batch_size=1,
        num_cpus=resources.cpus,
        num_gpus=resources.gpus or None,
    )
    for row in dataset.iter_rows():
        yield json.loads(row["result"])


def finish(out: str, manifest: Manifest) -> dict[str, Any]:
    """Merge the moments in shard order and write them; the figures of all records.

    Raises:
        UserError: the corpus gave not one row.
    """
    total = {layer: Moments.empty(manifest.d) for layer in manifest.layers}
    figures = Figures(manifest)
    for unit in range(manifest.units):
        figures.add(read_record(out, unit))
        part = read_moments(out, moments_name(unit), manifest.layers)
        total = {layer: total[layer].merge(part[layer]) for layer in manifest.layers}
    if figures.rows == 0:
        raise UserError(f"text: {', '.join(manifest.corpus.uris)}: no document is longer than one token")
    write_moments(out, STATISTICS, total)
    logger.info("%s", figures.line())
    return figures.summary()


def _short(value: object) -> str:
    """A value for an error line; hashes cut."""
    parts = value if isinstance(value, list) else [value]
    shown = [p[:12] if isinstance(p, str) and len(p) == 64 else str(p) for p in parts]
    return f"[{', '.join(shown)}]" if isinstance(value, list) else shown[0]
