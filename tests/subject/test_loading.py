"""What is read from a model's files, and where it goes."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from subject.families import COMMON, GEMMA, GROUPED

from dmm_ray.errors import UserError
from dmm_ray.subject import Intervention, Site, SubjectModel, SubjectSource

IDS = [[0, 5, 6, 7, 8], [0, 9, 10]]
UPPER = re.compile(r"(layers?|h|blocks)\.[23]\.|head|cls\.|pooler")


def outputs(folder: Path, layer: int = 1, **options: object) -> torch.Tensor:
    subject = SubjectModel.from_pretrained(str(folder), layers=[layer], **options)  # type: ignore[arg-type]
    return subject.capture(*subject.pad(IDS), [layer])[layer]


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mpt", "qwen3", "bert", "llava"])
def test_upper_blocks_and_head_are_not_read(
    make_model: Callable[[str], Path], copy_of: Callable[[Path], Path], family: str
) -> None:
    """They are not in the files at all."""
    whole = make_model(family)
    copy = copy_of(whole)
    weights = load_file(copy / "model.safetensors")
    kept = {k: v for k, v in weights.items() if "vision" in k or not UPPER.search(k)}
    assert len(kept) < len(weights) - 8
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(outputs(copy), outputs(whole), rtol=0, atol=0)
    with pytest.raises(UserError, match=r"lack .* weights"):
        outputs(copy, 2)


def test_blocks_that_depend_on_their_number(
    tmp_path: Path, tiny_subject: Path, copy_of: Callable[[Path], Path]
) -> None:
    """Gemma 4's last blocks use an earlier one's keys: a model built shorter would be another one."""
    config = transformers.Gemma4TextConfig(
        **GEMMA, num_kv_shared_layers=2, hidden_size_per_layer_input=8, vocab_size_per_layer_input=320,
        global_head_dim=8,
    )  # fmt: skip
    folder = copy_of(tiny_subject)
    torch.manual_seed(2)
    lm = transformers.AutoModelForCausalLM.from_config(config).eval()
    lm.save_pretrained(folder)
    with torch.no_grad():
        expected = lm(torch.tensor(IDS[:1]), output_hidden_states=True).hidden_states
    subject = SubjectModel.from_pretrained(str(folder), layers=[2])
    assert len(subject.runner.blocks) == 3
    found = subject.capture(*subject.pad(IDS[:1]), [1, 2])
    for layer in (1, 2):
        torch.testing.assert_close(found[layer], expected[layer + 1], atol=1e-5, rtol=1e-5)


def test_tied_and_sharded_weights(tmp_path: Path, tiny_subject: Path) -> None:
    torch.manual_seed(3)
    lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True)).eval()
    ids = torch.tensor(IDS[:1])
    for name, size in {"one": "1GB", "many": "20KB"}.items():
        folder = Path(shutil.copytree(tiny_subject, tmp_path / name))
        (folder / "model.safetensors").unlink()
        lm.save_pretrained(folder, max_shard_size=size)
        assert (len(list(folder.glob("*.safetensors"))) > 2) == (name == "many")
        subject = SubjectModel.from_pretrained(str(folder), head=True)
        loss = subject.token_losses(*subject.pad(IDS[:1])).mean()
        torch.testing.assert_close(loss, lm(ids, labels=ids).loss)
        assert len(subject.source.file_hashes) == 1 + len(list(folder.glob("*.safetensors")))
    torch.testing.assert_close(outputs(tmp_path / "many"), outputs(tmp_path / "one"), rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("memory", [{"cpu": "1GB"}, {"cpu": "30KB"}])
def test_device_map_offloads(
    make_model: Callable[[str], Path], tmp_path: Path, family: str, memory: dict[str, str]
) -> None:
    folder = make_model(family)
    spread = {"device_map": "auto", "max_memory": memory, "offload_folder": str(tmp_path / "offload")}
    torch.testing.assert_close(outputs(folder, **spread), outputs(folder))
    subject = SubjectModel.from_pretrained(str(folder), head=True, **spread)  # type: ignore[arg-type]
    if memory["cpu"] == "30KB":
        assert any(parameter.device.type == "meta" for parameter in subject.runner.model.parameters())
    here = SubjectModel.from_pretrained(str(folder), head=True)
    batch = here.pad(IDS)
    edits = [Intervention(Site(1), lambda x, ids: torch.zeros_like(x))]
    found, expected = subject.token_losses(*batch, edits), here.token_losses(*batch, edits)
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("option", [{"max_memory": {"cpu": "1GB"}}, {"offload_folder": "/tmp"}])
def test_options_of_a_device_map_need_one(tiny_subject: Path, option: dict[str, object]) -> None:
    with pytest.raises(UserError, match=rf"^{next(iter(option))}: requires a device map"):
        outputs(tiny_subject, **option)


def test_device_map_without_accelerate(tiny_subject: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(UserError, match=r"device_map: requires accelerate; pip install 'dmm-ray\[large\]'"):
        SubjectModel.from_pretrained(str(tiny_subject), layers=[1], device_map="auto")


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "made_up"}, "made_up"),
    ],
)
def test_quantised_without_its_library(
    tiny_subject: Path, copy_of: Callable[[Path], Path], quantization: dict[str, object], named: str
) -> None:
    folder = copy_of(tiny_subject)
    change_config(folder, quantization_config=quantization)
    with pytest.raises(UserError, match=rf"model: .*(?i:{named})") as error:
        outputs(folder)
    assert "\n" not in str(error.value)


def test_quantised_weights(tiny_subject: Path, copy_of: Callable[[Path], Path]) -> None:
    """8-bit floats with one scale for each matrix; without a GPU they are widened as they are read."""
    folder = copy_of(tiny_subject)
    torch.manual_seed(5)
    config = transformers.LlamaConfig(**COMMON | {"hidden_size": 128, "intermediate_size": 128})
    lm = transformers.LlamaForCausalLM(config).eval()
    lm.save_pretrained(folder)
    stored, meant = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        stored[name] = meant[name] = weight
        if "_proj" in name:
            scale = weight.abs().max() / 448
            stored[name] = (weight / scale).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale.reshape(1, 1)
            meant[name] = stored[name].float() * scale
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    lm.load_state_dict(meant)
    with torch.no_grad():
        expected = lm(torch.tensor(IDS[:1]), output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(outputs(folder)[:1], expected, atol=1e-5, rtol=1e-5)


REMOTE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class OwnConfig(PretrainedConfig):
    model_type = "own_kind"

    def __init__(self, vocab_size=320, hidden_size=32, num_hidden_layers=4, **kwargs):
        super().__init__(**kwargs)
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers


class OwnModel(PreTrainedModel):
    config_class, base_model_prefix = OwnConfig, "trunk"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stages = nn.ModuleList(nn.Linear(config.hidden_size, config.hidden_size)
                                    for _ in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embed(input_ids).cumsum(1)
        for stage in self.stages:
            hidden = hidden + torch.tanh(stage(hidden))
        return hidden


class OwnForCausalLM(PreTrainedModel):
    config_class, base_model_prefix = OwnConfig, "trunk"

    def __init__(self, config):
        super().__init__(config)
        self.trunk = OwnModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        return CausalLMOutput(logits=self.lm_head(self.trunk(input_ids, attention_mask)))
"""


@pytest.fixture
def remote(tiny_subject: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder with Python code of its own, whose blocks lie at ``trunk.stages``."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = Path(shutil.copytree(tiny_subject, tmp_path / "own"))
    (folder / "modeling_own.py").write_text(REMOTE)
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = {"model_type": "own_kind", "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 4}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    torch.manual_seed(4)
    weights = {f"trunk.stages.{k}.weight": torch.randn(32, 32) / 6 for k in range(4)}
    weights |= {f"trunk.stages.{k}.bias": torch.zeros(32) for k in range(4)}
    weights |= {"trunk.embed.weight": torch.randn(320, 32), "lm_head.weight": torch.randn(320, 32)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_code_of_the_models_own_runs_only_when_asked(remote: Path) -> None:
    for call in (SubjectModel.from_pretrained, SubjectSource.resolve):
        with pytest.raises(UserError, match=r"its own Python code.*--trust-remote-code") as error:
            call(str(remote))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"OwnForCausalLM is an unknown arch.*--block-path trunk.stages"):
        SubjectModel.from_pretrained(str(remote), layers=[1], trust_remote_code=True)
    options = {"block_path": "trunk.stages", "trust_remote_code": True}
    subject = SubjectModel.from_pretrained(str(remote), head=True, **options)  # type: ignore[arg-type]
    assert (subject.n_layers, subject.bidirectional) == (4, False)
    whole = subject.capture(*subject.pad(IDS), [1])[1]
    torch.testing.assert_close(outputs(remote, **options), whole)
    assert subject.token_losses(*subject.pad(IDS)).shape == (2, 4)
