"""Priors to and from a hub on this machine; processes of their own ask, since the address is read at import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from glp_folders import D, write
from hub_server import TOKEN, PriorHub, Repo

from dmm_ray.errors import UserError
from dmm_ray.files import write_json
from dmm_ray.prior import ActivationPrior, PriorConfig, card, folder
from dmm_ray.prior.publish import push_to_hub

SUBJECT = "some/subject"
PROGRAM = """
import json, sys, warnings
from dmm_ray.errors import UserError
from dmm_ray.prior import folder
from dmm_ray.prior.publish import push_to_hub

found = []
for verb, arguments in json.loads(sys.argv[1]):
    try:
        if verb == "push":
            found.append(push_to_hub(**arguments))
        else:
            config, tensors = folder.load(**arguments)
            found.append([config.model_dump(mode="json"), sorted(tensors)])
    except UserError as e:
        found.append(f"refused: {e}")
print(json.dumps(found))
"""


def prior_folder(path: Path, subject: str = SUBJECT) -> str:
    config = PriorConfig(
        d=D,
        layers=(3,),
        subject_layers=8,
        d_model=16,
        d_mlp=32,
        n_blocks=2,
        variance_floor=1e-3,
        subject={"id": subject, "revision": "abc"},
        split={"seed": 5},
        training={"samples": 1_000_000},
    )
    ActivationPrior.untrained(config, torch.zeros(D), torch.ones(D)).save_pretrained(str(path))
    return str(path)


@pytest.fixture
def hub() -> Iterator[PriorHub]:
    subject = Repo(card={"license": "other", "license_name": "llama3.2", "license_link": "LICENSE"})
    with PriorHub({SUBJECT: subject, "bare/subject": Repo()}).running() as hub:
        yield hub


def run(hub: PriorHub, home: Path, *calls: tuple[str, dict[str, Any]], **environment: str) -> list[Any]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(calls)],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def front(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---")[1])


def test_push_then_load(hub, tmp_path):
    path = prior_folder(tmp_path / "prior")
    write_json(f"{path}/summary.json", {"figures": {"validation_loss": 0.81234, "samples": 1_000_000}})
    (tmp_path / "prior" / "calibration.safetensors").write_bytes(b"tables")
    (tmp_path / "prior" / "checkpoints").mkdir()
    (tmp_path / "prior" / "checkpoints" / "big.bin").write_bytes(b"-" * 100)
    push = {"path": path, "repo_id": "me/prior", "token": TOKEN, "private": True, "commit_message": "First"}
    url, loaded, again = run(
        hub,
        tmp_path / "home",
        ("push", push),
        ("load", {"source": "me/prior"}),
        ("push", {**push, "private": None, "license": "mit", "revision": "next", "commit_message": "Second"}),
    )
    repo = hub.repos["me/prior"]
    assert url == f"{hub.url}/me/prior/commit/{2:040x}"
    assert again == f"{hub.url}/me/prior/commit/{3:040x}"
    assert (repo.private, repo.commits, repo.branches) == (True, ["First", "Second"], {"main", "next"})
    assert set(repo.files) == {"README.md", "config.json", "model.safetensors", "calibration.safetensors"}
    assert repo.files["model.safetensors"] == (tmp_path / "prior" / "model.safetensors").read_bytes()
    config, tensors = folder.load(path)
    assert loaded == [config.model_dump(mode="json"), sorted(tensors)]
    assert sorted(repo.gets) == ["calibration.safetensors", "config.json", "model.safetensors"]
    assert not (tmp_path / "prior" / "README.md").exists()
    text = repo.files["README.md"].decode()
    assert front(text)["license"] == "mit"
    assert "| validation_loss | 0.8123 |\n" in text
    assert "| samples | 1,000,000 |\n" in text


def test_the_licence_is_the_subjects(hub, tmp_path):
    push = {"path": prior_folder(tmp_path / "prior"), "repo_id": "me/prior", "token": TOKEN}
    other = {**push, "path": prior_folder(tmp_path / "bare", "bare/subject")}
    local = {**push, "path": prior_folder(tmp_path / "local", "/data/models/mine")}
    _, bare, nowhere = run(hub, tmp_path / "home", ("push", push), ("push", other), ("push", local))
    text = hub.repos["me/prior"].files["README.md"].decode()
    assert front(text) | {"tags": None} == {
        "license": "other",
        "license_name": "llama3.2",
        "license_link": "LICENSE",
        "base_model": SUBJECT,
        "library_name": "dmm-ray",
        "tags": None,
    }
    assert "comes under the licence of its subject, `llama3.2`" in text
    assert bare.startswith(
        "refused: license: the licence of bare/subject could not be looked up; give license="
    )
    assert nowhere.startswith(
        "refused: license: the licence of the subject, a model not from the Hub, could not"
    )
    assert hub.repos["me/prior"].commits == ["Upload a prior"]


def test_refusals_say_what_to_do(hub, tmp_path):
    push = {"path": prior_folder(tmp_path / "prior"), "repo_id": "me/prior", "token": TOKEN, "license": "mit"}
    found = run(
        hub,
        tmp_path / "home",
        ("push", {**push, "token": "hf_other"}),
        ("push", {**push, "license": "nonsense"}),
        ("push", {**push, "repo_id": "me//prior"}),
        ("load", {"source": "me/nothing"}),
    )
    assert found[0].startswith("refused: me/prior: the Hub refused (")
    assert found[0].endswith("log in with `hf auth login`, or give a token that may write there")
    assert found[1].startswith("refused: README.md: the Hub rejected it (")
    assert found[2].startswith("refused: repo_id: ")
    assert found[3].startswith(
        "refused: me/nothing: no such folder, and it could not be downloaded from the Hub ("
    )
    assert not any("\n" in message for message in found)
    assert hub.repos.get("me/prior", Repo()).files == {}


def test_offline_the_licence_must_be_given(hub, tmp_path):
    push = {"path": prior_folder(tmp_path / "prior"), "repo_id": "me/prior", "token": TOKEN}
    (refused,) = run(hub, tmp_path / "home", ("push", push), HF_HUB_OFFLINE="1")
    assert refused.startswith(
        f"refused: license: the licence of {SUBJECT} could not be looked up; give license="
    )


def test_a_card_in_the_folder_goes_along(hub, tmp_path):
    path = prior_folder(tmp_path / "prior", "/data/mine")
    (tmp_path / "prior" / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    run(hub, tmp_path / "home", ("push", {"path": path, "repo_id": "me/prior", "token": TOKEN}))
    assert hub.repos["me/prior"].files["README.md"] == b"---\nlicense: mit\n---\nMine.\n"


def test_a_published_prior_is_fetched_with_one_set_of_weights(hub, tmp_path):
    """The final weights where there are any; else the newest checkpoint, which a second call has at hand offline."""
    final = write(tmp_path / "final", [7])
    (final / "optimizer.bin").write_bytes(b"-")
    write(tmp_path / "running", [7], name="checkpoints/epoch_0010.safetensors")
    for name, path in (
        ("glp/final", final),
        ("glp/running", write(tmp_path / "running", [7], name="checkpoints/epoch_9.safetensors")),
    ):
        files = {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}
        hub.repos[name] = Repo(files)
    hub.repos["glp/final"].files["checkpoints/epoch_1.safetensors"] = b"-"
    calls = [("load", {"source": name}) for name in ("glp/final", "glp/running")]
    found = run(hub, tmp_path / "home", *calls)
    assert found[0][0] == found[1][0] == folder.load_config(str(final)).model_dump(mode="json")
    assert sorted(hub.repos["glp/final"].gets) == ["config.yaml", "final.safetensors", "rep_statistics.pt"]
    expected = ["checkpoints/epoch_0010.safetensors", "config.yaml", "rep_statistics.pt"]
    assert sorted(hub.repos["glp/running"].gets) == expected
    assert run(hub, tmp_path / "home", *calls, HF_HUB_OFFLINE="1") == found
    assert sorted(hub.repos["glp/running"].gets) == expected


def test_only_a_local_folder_of_ours_is_pushed(tmp_path):
    with pytest.raises(UserError, match="expected a local folder in this package's format; import or copy"):
        push_to_hub(str(write(tmp_path / "glp", [7])), "me/prior", license="mit")
    with pytest.raises(UserError, match=r"no config\.json here"):
        push_to_hub(str(tmp_path), "me/prior", license="mit")
    (tmp_path / "config.json").write_text(
        (Path(prior_folder(tmp_path / "prior")) / "config.json").read_text()
    )
    with pytest.raises(UserError, match=r"model.safetensors: no such file"):
        push_to_hub(str(tmp_path), "me/prior", license="mit")


def test_a_card_of_several_layers_of_a_local_subject():
    config = PriorConfig(
        d=D, layers=(1, 3), d_model=8, d_mlp=8, n_blocks=1, variance_floor=1, subject={"id": "/secret/model"}
    )
    text = card.render(config, "me/prior", {"license": "mit"}, {}, 1234)
    assert "base_model" not in front(text)
    assert "/secret" not in text
    assert 'ActivationPrior.from_pretrained("me/prior")\nscore = prior.log_prob(x, layer=1)' in text
    assert "| parameters | 1,234 |" in text
    assert "| layers | blocks 1, 3 (counted from 0) |" in text
