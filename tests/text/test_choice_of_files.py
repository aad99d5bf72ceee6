"""Which files a name, a folder or a pattern gives, whatever characters it has."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
from stores import extract_here

from dmm_ray.errors import UserError
from dmm_ray.provenance import SUMMARY
from dmm_ray.text.corpus import Corpus
from dmm_ray.training.checkpoint import complete

ODD = [
    "a[1].jsonl",
    "a::b.jsonl",
    "a?b.jsonl",
    "a*b.jsonl",
    "data[v2]/x.jsonl",
    "run#1/x.jsonl",
    "e::f/x.jsonl",
]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"text": text}) + "\n")
    return path


def texts(*uris: object) -> list[str | None]:
    return [document.text for document in Corpus.scan([str(uri) for uri in uris]).read()]


@pytest.mark.parametrize("name", ODD)
def test_what_exists_is_that_path(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("a1.jsonl", "axb.jsonl", "datav/x.jsonl", "run/x.jsonl"):
        write(tmp_path / other, "another")
    file = write(tmp_path / name, "this")
    assert texts(file) == ["this"]
    if file.parent != tmp_path:
        assert texts(file.parent) == ["this"]
    monkeypatch.chdir(tmp_path)
    assert texts(name) == ["this"]


def test_what_does_not_exist_is_a_pattern(tmp_path: Path) -> None:
    for name in ("a1.jsonl", "a2.jsonl", "b1.jsonl", ".a3.jsonl"):
        write(tmp_path / name, name)
    assert texts(tmp_path / "a[12].jsonl") == ["a1.jsonl", "a2.jsonl"]
    assert texts(tmp_path / "?1.jsonl") == ["a1.jsonl", "b1.jsonl"]
    assert texts(tmp_path / "*.jsonl") == ["a1.jsonl", "a2.jsonl", "b1.jsonl"]
    assert texts(tmp_path / ".a*.jsonl") == [".a3.jsonl"]
    with pytest.raises(UserError, match="no such file"):
        texts(tmp_path / "c[1].jsonl")


def test_a_folder_s_files_and_what_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, elsewhere = tmp_path / "text", tmp_path / "elsewhere"
    for name in ("a.jsonl", "b.JSONL", "c.ndjson", "d.Txt"):
        write(folder / name, name)
    write(elsewhere / "linked.jsonl", "linked")
    (folder / "link").symlink_to(elsewhere)
    (folder / "link" / "round").symlink_to(elsewhere)
    hidden = ("._a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", "_delta_log/0.checkpoint.parquet")
    for name in (*hidden, "e.json", "g.tsv"):
        write(folder / name, "not data")
    (folder / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with caplog.at_level(logging.INFO):
        found = texts(folder)
    assert found == ["a.jsonl", "b.JSONL", "c.ndjson", '{"text": "d.Txt"}', "linked"]
    [line] = [record.message for record in caplog.records]
    assert "reading 5 files, skipping 6" in line
    for name in ("e.json, g.tsv, gone.jsonl, ._a.jsonl", "and 1 more"):
        assert name in line


def test_what_dmm_wrote_is_no_text(tmp_path: Path, tiny_subject: Path) -> None:
    """A store among its own text, extracted twice."""
    write(tmp_path / "a.jsonl", "the cat sat on a red mat")
    out = tmp_path / "store"
    for _ in range(2):
        extract_here(model=str(tiny_subject), text=str(tmp_path), layers=[1], out=str(out))
        (out / SUMMARY).unlink()
    assert len(texts(tmp_path)) == 1
    with pytest.raises(UserError, match="dmm-ray's own output is not read as text"):
        texts(out)
    (tmp_path / "manifest.json").write_text("[]")  # of somebody else
    assert len(texts(tmp_path)) == 1


def test_folders_of_our_own_are_no_patterns(tmp_path: Path) -> None:
    for name in ("run[1]", "run1"):
        os.makedirs(tmp_path / name / "checkpoints" / "100")
        (tmp_path / name / "checkpoints" / "100" / "complete.json").write_text("{}")
    (tmp_path / "run[2]").mkdir()
    assert complete(str(tmp_path / "run[1]")) == [100]
    assert complete(str(tmp_path / "run[2]")) == []
