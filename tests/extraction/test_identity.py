"""What a store records of its model: all that decides a row; and stores that were begun before it did."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from stores import extract_here

from dmm_ray.errors import CheckFailed, UserError
from dmm_ray.extraction.identity import changed_part
from dmm_ray.extraction.verify import VerifyConfig, verify
from dmm_ray.files import sha256, write_json
from dmm_ray.prior import PriorConfig
from dmm_ray.store.manifest import Manifest, SubjectEntry, read_manifest
from dmm_ray.store.match import check_fits
from dmm_ray.store.reader import ActivationStore
from dmm_ray.subject import SubjectSource

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
from .scaling import SCALE

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def own(tiny_subject: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama of two files of Python code, with a chat template."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = Path(shutil.copytree(tiny_subject, tmp_path / "own"))
    (folder / "modeling_own.py").write_text(CODE)
    (folder / "scaling.py").write_text("SCALE = 1.0\n")
    (folder / "unused.py").write_text("")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "own_llama", "auto_map": auto_map})
    )
    return folder


@pytest.fixture
def options(own: Path, tiny_text: Path, tmp_path: Path) -> dict[str, Any]:
    """Of an extraction with that model."""
    given = {
        "model": str(own),
        "text": str(tiny_text),
        "layers": [0],
        "dtype": "float32",
        "rows_per_shard": 2000,
    }
    return {**given, "out": str(tmp_path / "store"), "trust_remote_code": True}


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file that the code imports": (
        lambda m: (m / "scaling.py").write_text("SCALE = 2.0\n"),
        "code, scaling.py",
    ),
    "the chat template": (lambda m: (m / "chat_template.jinja").write_text(TEMPLATE + "\n"), "chat template"),
    "the configuration": (lambda m: (m / "config.json").open("a").write("\n"), "config.json"),
}


@pytest.mark.parametrize(("change", "part"), CHANGES.values(), ids=CHANGES)
def test_a_part_of_the_model_that_differs_is_named(
    own: Path, options: dict[str, Any], change: Callable[[Path], object], part: str
) -> None:
    store = extract_here(**options)
    resolved = read_manifest(store).subject.resolved
    assert resolved is not None
    assert resolved.code == {name: sha256(str(own / name)) for name in ("modeling_own.py", "scaling.py")}
    assert resolved.rope == {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    assert resolved.versions["torch"] == torch.__version__
    (own / "unused.py").write_text("1\n")
    assert extract_here(**options) == store
    verify(VerifyConfig(store=store, trust_remote_code=True))
    change(own)
    with pytest.raises(UserError, match=rf"^model \({part}\): {store} was made with \w+, not \w+;.* choose"):
        extract_here(**options)
    with pytest.raises(CheckFailed, match=rf": {part} is no longer what the store was extracted with$"):
        verify(VerifyConfig(store=store, trust_remote_code=True))


def test_code_counts_only_where_it_runs(tiny_store: Path, own: Path) -> None:
    assert SubjectSource.resolve(str(own), trust_remote_code=True).code_hashes
    resolved = read_manifest(str(tiny_store)).subject.resolved
    assert resolved is not None
    assert resolved.code == resolved.tokenizer_files == {}


def test_a_prior_of_other_code_does_not_fit(tiny_store: Path) -> None:
    store = ActivationStore.open(str(tiny_store))
    subject = store.manifest.subject.model_dump(mode="json")
    prior = PriorConfig(
        d=32, layers=(1,), d_model=32, d_mlp=32, n_blocks=1, variance_floor=1e-6, subject=subject
    )
    check_fits(prior, store, same_model=True)
    subject["resolved"]["code"] = {"modeling_own.py": "0" * 64}
    with pytest.raises(
        UserError, match=r"^activations: .* was trained on .* \(different Python code\); give a store"
    ):
        check_fits(prior.model_copy(update={"subject": subject}), store, same_model=True)
    del subject["resolved"]  # a prior of before
    check_fits(prior.model_copy(update={"subject": subject}), store, same_model=True)


def test_settings_and_versions_of_another_library(
    tiny_store: Path, tiny_options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A default that has changed decides rows; a version alone is said."""
    store = Path(shutil.copytree(tiny_store, tmp_path / "store"))
    written = json.loads((store / "manifest.json").read_text())
    source = SubjectSource.resolve(written["subject"]["id"])
    written["subject"]["resolved"]["versions"]["transformers"] = "4.0.0"
    write_json(str(store / "manifest.json"), written)
    (store / "summary.json").unlink()
    with caplog.at_level(logging.WARNING):
        extract_here(**tiny_options, out=str(store))
    assert f"{store}: started with transformers 4.0.0 (here {transformers.__version__})" in caplog.text
    assert json.loads((store / "manifest.json").read_text()) == written
    assert changed_part(source, Manifest.model_validate(written)) is None
    written["subject"]["resolved"]["rope"]["rope_parameters"]["rope_theta"] = 500.0
    assert changed_part(source, Manifest.model_validate(written)) == "setting rope_parameters"


def test_a_store_that_was_begun_before_goes_on(
    tiny_store: Path, tiny_options: dict[str, Any], tmp_path: Path
) -> None:
    """It opens, verifies and resumes, and its manifest stays as it was; another tokenizer is refused as ever."""
    store = Path(shutil.copytree(tiny_store, tmp_path / "store"))
    written = json.loads((store / "manifest.json").read_text())
    del written["subject"]["resolved"]
    before = Manifest.model_validate(written).sealed()
    assert set(before.identity()) >= {"model", "text", "layers"}
    write_json(str(store / "manifest.json"), before.model_dump(mode="json"))
    for path in (store / "shards").glob("*.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"config_hash": before.config_hash}, indent=2) + "\n")
    verify(VerifyConfig(store=str(store)))
    assert "resolved" not in ActivationStore.open(str(store)).manifest.subject.model_dump()
    manifest, shard = (store / "manifest.json").read_bytes(), store / "layer_01" / "shard-000002.parquet"
    rows = shard.read_bytes()
    shard.unlink()
    (store / "summary.json").unlink()
    extract_here(**tiny_options, out=str(store))
    assert shard.read_bytes() == rows
    assert (store / "manifest.json").read_bytes() == manifest
    model = Path(shutil.copytree(tiny_options["model"], tmp_path / "model"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(model)
    with pytest.raises(UserError, match=r"^model: .* was made with \[\w+, \w+\], not \[\w+, \w+\]; choose"):
        extract_here(**{**tiny_options, "model": str(model)}, out=str(store))


def test_an_entry_of_before_is_written_as_it_was(tiny_store: Path) -> None:
    """A prior's configuration holds it too, which a training run that goes on compares."""
    entry = read_manifest(str(tiny_store)).subject
    old = entry.model_dump(mode="json", exclude={"resolved"})
    assert SubjectEntry.model_validate(old).model_dump(mode="json") == old
    assert SubjectEntry.model_validate(entry.model_dump(mode="json")) == entry


def test_a_tokenizer_s_hash_does_not_depend_on_its_use(tiny_subject: Path, tmp_path: Path) -> None:
    """Its file may have it truncate and pad, which ours never does: the first call turns that off."""
    folder = Path(shutil.copytree(tiny_subject, tmp_path / "model"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    cut = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None}
    pad |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"truncation": cut, "padding": pad}))
    fresh, used = SubjectSource.resolve(str(folder)), SubjectSource.resolve(str(folder))
    used.tokenizer(["the cat"], padding=False, truncation=False)
    assert (
        fresh.tokenizer_hash == used.tokenizer_hash == SubjectSource.resolve(str(tiny_subject)).tokenizer_hash
    )
