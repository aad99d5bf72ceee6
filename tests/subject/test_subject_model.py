from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from dmm_ray.errors import UserError
from dmm_ray.subject import Intervention, Site, SubjectModel, SubjectSource

TEXTS = [
    "the cat",
    "one big dog run to town while rain fell",
    "a",
    "the cat sat on a red mat and saw the hills " * 3,
]


def test_truncation_drops_blocks_and_head(tiny_subject: Path) -> None:
    subject = SubjectModel.from_pretrained(str(tiny_subject), layers=[1])
    names = [name for name, _ in subject.runner.model.named_parameters()]
    assert subject.n_layers == 4
    assert subject.d == 32
    assert subject.context == 64
    assert not any("layers.2" in name or "lm_head" in name for name in names)
    assert subject.bidirectional is False
    assert any("layers.1." in name for name in names)
    with pytest.raises(UserError, match="no layer 2"):
        subject.capture(*subject.pad([[0, 1]]), [2])


def test_token_losses_are_the_models_own(tiny_subject: Path) -> None:
    subject = SubjectModel.from_pretrained(str(tiny_subject), head=True)
    ids = subject.tokenize(TEXTS, 40)
    losses = subject.token_losses(*subject.pad(ids))
    lm = transformers.AutoModelForCausalLM.from_pretrained(tiny_subject).eval()
    for row, tokens in enumerate(ids):
        own = losses[row, : len(tokens) - 1]
        assert torch.isnan(losses[row, len(tokens) - 1 :]).all()
        one = torch.tensor([tokens])
        assert math.isclose(own.mean().item(), lm(one, labels=one).loss.item(), rel_tol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_edit_changes_all_but_position_0(make_model: Callable[[str], Path], family: str) -> None:
    subject = SubjectModel.from_pretrained(str(make_model(family)), head=True)
    batch = subject.pad(subject.tokenize(TEXTS[1:2], 12))
    plain = subject.token_losses(*batch)
    seen = []

    def noisy(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        assert ids.tolist() == [[0, position] for position in range(1, 1 + len(x))]
        seen.append(x)
        return x + 1.0 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))

    edited = subject.token_losses(*batch, [Intervention(Site(2), noisy)])
    torch.testing.assert_close(seen[0], subject.capture(*batch, [2])[2][0, 1:])
    torch.testing.assert_close(edited[:, 0], plain[:, 0])  # token 1 is predicted from position 0
    assert (edited[:, 1:] - plain[:, 1:]).abs().min() > 1e-6
    same = Intervention(Site(2), lambda x, ids: x)
    torch.testing.assert_close(subject.token_losses(*batch, [same]), plain)
    torch.testing.assert_close(subject.token_losses(*batch), plain)


def test_token_losses_without_head_is_a_mistake(tiny_subject: Path) -> None:
    subject = SubjectModel.from_pretrained(str(tiny_subject), layers=[0])
    with pytest.raises(ValueError, match="head=True"):
        subject.token_losses(*subject.pad([[0, 1]]))


def test_tokenize_cuts_and_keeps_bos(tiny_subject: Path) -> None:
    subject = SubjectModel.from_pretrained(str(tiny_subject), layers=[0])
    short, long = subject.tokenize(["the cat", "the cat " * 50], 10)
    assert short[0] == subject.tokenizer.bos_token_id == long[0]
    assert len(long) == 10
    assert subject.tokenize([], 10) == []


def test_hashes_follow_content(make_model: Callable[[str], Path], tmp_path: Path) -> None:
    source = SubjectSource.resolve(str(make_model("llama")))
    copy = tmp_path / "copy"
    shutil.copytree(source.folder, copy)
    same = SubjectSource.resolve(str(copy))
    assert (same.weights_hash, same.tokenizer_hash) == (source.weights_hash, source.tokenizer_hash)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5, "rms_norm_eps": 1e-3}))
    assert SubjectSource.resolve(str(copy)).weights_hash != source.weights_hash


def test_not_a_causal_model(tmp_path: Path) -> None:
    transformers.T5Config(vocab_size=32, d_model=16, num_layers=2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"t5.*causal"):
        SubjectSource.resolve(str(tmp_path)).check([0])


@pytest.mark.parametrize("layer", [4, -1])
def test_layer_out_of_range(tiny_subject: Path, layer: int) -> None:
    with pytest.raises(UserError, match=rf"layers: .*no layer {layer}; choose from 0 to 3"):
        SubjectModel.from_pretrained(str(tiny_subject), layers=[layer])
    with pytest.raises(UserError, match=rf"no layer {layer}; choose from 0 to 3"):
        SubjectSource.resolve(str(tiny_subject)).check([layer])


def test_no_such_model(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("x")
    for model, message in {
        str(tmp_path / "missing"): "no folder at",
        str(tmp_path): "no config.json",
        str(tmp_path / "file.txt"): "no folder at",
        "nobody/nothing": "neither a local folder nor an accessible hub model",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            SubjectModel.from_pretrained(model)
        assert "\n" not in str(error.value)


def test_damaged_folder(tiny_subject: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"transformers cannot load its config.json"):
        SubjectModel.from_pretrained(str(tmp_path))
    config = json.loads((tiny_subject / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": "four"}))
    with pytest.raises(UserError, match=r"transformers cannot load its config.json"):
        SubjectModel.from_pretrained(str(tmp_path))
    shutil.copy(tiny_subject / "config.json", tmp_path)
    with pytest.raises(UserError, match="does not load"):
        SubjectModel.from_pretrained(str(tmp_path))
    with pytest.raises(UserError, match="contains no weights"):
        SubjectSource.resolve(str(tmp_path)).weights_hash  # noqa: B018
    weights = (tiny_subject / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(UserError, match="does not load") as error:
        SubjectModel.from_pretrained(str(tmp_path))
    assert "\n" not in str(error.value)
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="no tokenizer"):
        SubjectModel.from_pretrained(str(tmp_path))


def test_missing_weights_are_refused(tiny_subject: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_subject, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in weights if "layers.1.mlp" in name)
    del weights[gone]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 weights, e.g. .*layers.1.mlp"):
        SubjectModel.from_pretrained(str(tmp_path))


def test_loading_is_silent(tiny_subject: Path, capfd: pytest.CaptureFixture[str]) -> None:
    SubjectModel.from_pretrained(str(tiny_subject), layers=[1])
    out, err = capfd.readouterr()
    assert out == ""
    assert err == ""
