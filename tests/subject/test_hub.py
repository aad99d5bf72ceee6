"""Models by hub id, from a hub on this machine; a process of its own asks, since the address is read at import."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from subject.hub import COMMIT, Hub

PROGRAM = """
import json, sys
from dmm_ray.errors import UserError
from dmm_ray.subject import SubjectModel

for model, revision in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        subject = SubjectModel.from_pretrained(model, layers=[1], revision=revision or None)
        shape = subject.capture(*subject.pad([[0, 5, 6]]), [1])[1].shape
        found = {"id": subject.model_id, "revision": subject.revision, "hash": subject.weights_hash, "shape": shape}
    except UserError as e:
        found = {"error": str(e)}
    print(json.dumps(found))
"""


@pytest.fixture
def hub(tiny_subject: Path) -> Iterator[Hub]:
    hub = Hub({"some/model": tiny_subject, "some/gated": tiny_subject}, gated=frozenset({"some/gated"}))
    with hub.running():
        yield hub


def start(
    hub: Hub, home: Path, *models: str, program: str = PROGRAM, **environment: str
) -> subprocess.Popen[str]:
    """A process that wants each of ``models``: id, revision, id, revision ..."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", program, *models]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def results(process: subprocess.Popen[str]) -> list[dict[str, object]]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines()]


def result(process: subprocess.Popen[str]) -> dict[str, object]:
    [found] = results(process)
    return found


def test_a_branch_becomes_its_commit_and_is_fetched_once(hub: Hub, tmp_path: Path) -> None:
    """Two processes of one machine want it at once; the weights come only when both are under way."""
    hub.hold = frozenset({"model.safetensors"})
    both = [start(hub, tmp_path, "some/model", revision) for revision in ("v1", "main")]
    assert {hub.revisions.get(timeout=100) for _ in both} == {"v1", "main"}
    assert hub.asked.wait(100)
    hub.released.set()
    found = [result(process) for process in both]
    assert found[0] == found[1]
    assert (found[0]["id"], found[0]["revision"]) == ("some/model", COMMIT)
    assert found[0]["shape"] == [1, 3, 32]
    assert hub.gets["model.safetensors"] == 1
    assert set(hub.gets.values()) == {1}
    third = result(start(hub, tmp_path, "some/model", COMMIT, HF_HUB_OFFLINE="1"))
    assert third == found[0]
    assert set(hub.gets.values()) == {1}


REFUSALS = {
    ("some/gated", ""): "model: some/gated is gated; accept its terms on its hub page, then log in",
    ("some/missing", ""): "model: some/missing is neither a local folder nor an accessible hub model; check",
    ("some/model", "v9"): "revision: some/model has no branch, tag or commit 'v9'",
}


def test_refusals_say_what_to_do(hub: Hub, tmp_path: Path) -> None:
    found = results(start(hub, tmp_path, *(word for wanted in REFUSALS for word in wanted)))
    for (wanted, message), answer in zip(REFUSALS.items(), found, strict=True):
        error = str(answer["error"])
        assert error.startswith(message), wanted
        assert "\n" not in error, wanted


def test_no_hub_at_that_address(tmp_path: Path) -> None:
    with Hub({}).running() as gone:
        pass
    error = str(result(start(gone, tmp_path, "some/model", ""))["error"])
    assert error.startswith("model: some/model is neither a local folder nor an accessible hub model")
    assert "\n" not in error


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
HASHES = """
import json, sys
from dmm_ray.subject import SubjectSource
print(json.dumps(SubjectSource.resolve(sys.argv[1], trust_remote_code=True).code_hashes))
"""


def test_code_of_another_repository_is_hashed_as_it_was_fetched(
    hub: Hub, tiny_subject: Path, tmp_path: Path
) -> None:
    code, model = tmp_path / "code", Path(shutil.copytree(tiny_subject, tmp_path / "model"))
    code.mkdir()
    (code / "modeling_own.py").write_text(CODE)
    hub.models["some-one/its.code"] = code
    config = json.loads((model / "config.json").read_text()) | {"model_type": "own_llama"}
    names = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnForCausalLM"}
    config["auto_map"] = {auto: f"some-one/its.code--modeling_own.{name}" for auto, name in names.items()}
    (model / "config.json").write_text(json.dumps(config))
    found = result(start(hub, tmp_path / "home", str(model), program=HASHES))
    assert found == {"some-one/its.code/modeling_own.py": hashlib.sha256(CODE.encode()).hexdigest()}
