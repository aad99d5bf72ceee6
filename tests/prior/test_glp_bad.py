"""Published folders that cannot be right: each gets one line that names the file and the remedy."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from glp_folders import D_MODEL, D, statistics, weights, write
from safetensors.torch import save_file

from dmm_ray.errors import UserError
from dmm_ray.prior import ActivationPrior, PriorConfig, folder, glp
from dmm_ray.prior.glp_verbs import ImportGlpConfig, import_glp

Spoil = Callable[[Path], None]


def remove(name: str) -> Spoil:
    return lambda path: (path / name).unlink()


def set_key(key: str, value: object) -> Spoil:
    """Set a dotted key of config.yaml; ``...`` removes it."""

    def spoil(path: Path) -> None:
        tree = yaml.safe_load((path / "config.yaml").read_text())
        node, (*parents, last) = tree, key.split(".")
        for parent in parents:
            node = node[parent]
        if value is ...:
            del node[last]
        else:
            node[last] = value
        (path / "config.yaml").write_text(yaml.safe_dump(tree))

    return spoil


def set_statistics(value: object) -> Spoil:
    return lambda path: torch.save(value, path / "rep_statistics.pt")


def set_weight(name: str, value: torch.Tensor | None) -> Spoil:
    def spoil(path: Path) -> None:
        tensors = {**weights(True), name: value}
        save_file({k: v for k, v in tensors.items() if v is not None}, path / "final.safetensors")

    return spoil


def write_text(name: str, text: str) -> Spoil:
    return lambda path: (path / name).write_text(text)


def cut(name: str, share: float) -> Spoil:
    def spoil(path: Path) -> None:
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[: int(len(data) * share)])

    return spoil


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path(__file__).with_name("ran"),))


def with_value(name: str, value: float) -> dict[str, torch.Tensor]:
    found = statistics(4, D)
    found[name][2, 5] = value
    return found


DENOISER, TRACED = "glp_kwargs.denoiser_config", "glp_kwargs.tracedict_config"
CASES: list[tuple[Spoil, str]] = [
    (remove("config.yaml"), r"no config.json here; expected a prior's folder, .* with config.yaml"),
    (remove("rep_statistics.pt"), "rep_statistics.pt: no such file"),
    (remove("final.safetensors"), "neither final.safetensors nor checkpoints/epoch_N.safetensors here; copy"),
    (set_key(f"{DENOISER}.d_input", ...), f"config.yaml: no {DENOISER}.d_input; add it"),
    (set_key(DENOISER, ...), f"config.yaml: no {DENOISER}.d_input; add it"),
    (set_key("glp_kwargs", ...), f"config.yaml: no {TRACED}.retain; add it"),
    (set_key(f"{TRACED}.layers", ...), f"config.yaml: no {TRACED}.layers; add it"),
    (set_key(f"{TRACED}.layers", []), f"{TRACED}.layers must be a list of block numbers .got .... correct"),
    (set_key(f"{TRACED}.layers", [1, 7.0]), f"{TRACED}.layers must be a list of block numbers"),
    (set_key(f"{TRACED}.layers", [1, 1]), f"{TRACED}.layers names a block twice"),
    (set_key(f"{TRACED}.layers", [1, 4]), f"has block 4, but {DENOISER}.multi_layer_n_layers is 4; correct"),
    (set_key(f"{TRACED}.retain", "both"), f"{TRACED}.retain must be 'input' or 'output' .got 'both'."),
    (set_key(f"{DENOISER}.d_mlp", "wide"), f"{DENOISER}.d_mlp must be a positive integer .got 'wide'."),
    (set_key(f"{DENOISER}.d_mlp", True), f"{DENOISER}.d_mlp must be a positive integer .got True."),
    (set_key(f"{DENOISER}.d_model", 25), "config.yaml: d_model: .*multiple of 2"),
    (set_key(f"{DENOISER}.dropout", 0.1), f"{DENOISER}.dropout is not in the published architecture; remove"),
    (
        set_key(f"{DENOISER}.multi_layer_n_layers", None),
        "has 2 blocks, but .*multi_layer_n_layers is not given",
    ),
    (set_key("width", "${width}"), "width -> width refer to each other in a circle; write one of them out"),
    (set_key("width", "${nowhere}"), r"width refers to \$\{nowhere\}, but there is no nowhere; add it"),
    (set_key("width", "${oc.env:WIDTH}"), r"refers to \$\{oc.env:WIDTH\}, a resolver, which is not run"),
    (set_key("dmm_ray", {"d": 3}), "config.yaml: dmm_ray may only contain subject_layers, .*; remove"),
    (set_key("dmm_ray", {"variance_floor": -1}), "config.yaml: variance_floor: .* greater than 0"),
    (write_text("config.yaml", "a: [1"), "config.yaml: not valid YAML"),
    (write_text("config.yaml", "- 1"), "config.yaml: not a mapping"),
    (write_text("config.yaml", "a: !!python/object/apply:os.system [ls]"), "config.yaml: not valid YAML"),
    (
        set_key("width", D + 1),
        rf"rep_statistics.pt: mean has shape \(4, {D}\), .* asks for \({D + 1},\), \(4, {D + 1}\)",
    ),
    (
        set_key(f"{DENOISER}.d_model", D_MODEL + 2),
        "final.safetensors: model.in_proj.weight has shape .* config.yaml asks",
    ),
    (set_key(f"{DENOISER}.n_layers", 3), "final.safetensors: has no tensor model.layers.2.down_proj.bias"),
    (
        set_key(f"{DENOISER}.n_layers", 1),
        "final.safetensors: has a tensor model.layers.1.down_proj.bias that config",
    ),
    (set_weight("model.extra", torch.zeros(1)), "has a tensor model.extra that config.yaml has no place for"),
    (set_weight("ln.weight", torch.zeros(1)), "has a tensor ln.weight that config.yaml has no place for"),
    (
        set_weight("model.ln.bias", None),
        "final.safetensors: has no tensor model.ln.bias, which config.yaml asks for",
    ),
    (
        set_weight("model.ln.bias", torch.zeros(3)),
        r"model.ln.bias has shape \(3,\), config.yaml asks for \(24,\)",
    ),
    (
        set_weight("model.ln.bias", torch.full((24,), float("nan"))),
        "final.safetensors: model.ln.bias contains NaN or Inf in float32; copy",
    ),
    (
        set_weight("model.ln.bias", torch.full((24,), 1e60, dtype=torch.float64)),
        "final.safetensors: model.ln.bias contains NaN or Inf in float32; copy",
    ),
    (
        set_weight("model.ln.bias", torch.zeros(24, dtype=torch.int64)),
        "final.safetensors: model.ln.bias has dtype int64, expected floating point",
    ),
    (
        write_text("final.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "final.safetensors: is a Git LFS pointer, not the weights; run `git lfs pull`",
    ),
    (
        set_statistics({"mean": torch.zeros(4, D), "var": torch.full((4, D), 1e60, dtype=torch.float64)}),
        "rep_statistics.pt: var contains NaN or Inf in float32; copy",
    ),
    (cut("final.safetensors", 0.5), "final.safetensors: damaged .*; copy"),
    (write_text("final.safetensors", ""), "final.safetensors: damaged .*; copy"),
    (cut("rep_statistics.pt", 0.5), "rep_statistics.pt: damaged .*; copy"),
    (write_text("rep_statistics.pt", "hello"), "rep_statistics.pt: .*damaged"),
    (set_statistics({"mean": torch.zeros(4, D)}), "rep_statistics.pt: has no tensor var; expected"),
    (set_statistics([1, 2]), "rep_statistics.pt: has no tensor mean; expected"),
    (set_statistics({"mean": 0.0, "var": 1.0}), "rep_statistics.pt: has no tensor mean; expected"),
    (
        set_statistics({"mean": torch.zeros(4, D), "var": Evil()}),
        "rep_statistics.pt: holds more than plain tensors",
    ),
    (set_statistics(with_value("var", -1.0)), "rep_statistics.pt: var holds a negative variance; copy"),
    (
        set_statistics(with_value("var", float("inf"))),
        "rep_statistics.pt: var contains NaN or Inf in float32; copy",
    ),
    (
        set_statistics(with_value("mean", float("nan"))),
        "rep_statistics.pt: mean contains NaN or Inf",
    ),
    (set_statistics({"mean": torch.zeros(4, D), "var": torch.zeros(4, D)}), "every variance is zero; copy"),
    (
        set_statistics(statistics(3, D)),
        rf"mean has shape \(3, {D}\), .* asks for \({D},\), \(4, {D}\); correct",
    ),
    (
        set_statistics(statistics(1, D)),
        rf"mean has shape \(1, {D}\), .* asks for \({D},\), \(4, {D}\); correct",
    ),
    (set_statistics(statistics(2, 2, D)), rf"mean has shape \(2, 2, {D}\)"),
    (set_statistics({"mean": torch.tensor(1.0), "var": torch.tensor(1.0)}), r"mean has shape \(\)"),
]


@pytest.mark.parametrize(("spoil", "says"), CASES)
def test_bad_folders_are_named(tmp_path, spoil, says):
    write(tmp_path, [1, 3], 4)
    folder.load(str(tmp_path))
    spoil(tmp_path)
    with pytest.raises(UserError, match=says) as caught:
        ActivationPrior.from_pretrained(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_nothing_in_a_file_of_statistics_is_run(tmp_path):
    write(tmp_path, [1, 3], 4)
    (tmp_path / "rep_statistics.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="nothing in it was run"):
        folder.load_config(str(tmp_path))
    assert not Path(__file__).with_name("ran").exists()


def test_one_layer_takes_no_table_of_several(tmp_path):
    write(tmp_path, [7], stats=statistics(3, D))
    with pytest.raises(UserError, match=rf"mean has shape \(3, {D}\), .* asks for \({D},\)"):
        folder.load(str(tmp_path))


def test_a_prior_of_ours_is_not_imported(tmp_path):
    config = PriorConfig(d=D, layers=(1,), d_model=8, d_mlp=8, n_blocks=1, variance_floor=1e-6)
    ActivationPrior.untrained(config, torch.zeros(D), torch.ones(D)).save_pretrained(str(tmp_path / "ours"))
    with pytest.raises(
        UserError, match=r"ours: no config.yaml here; `import-glp` reads published priors only"
    ):
        import_glp(ImportGlpConfig(source=str(tmp_path / "ours"), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_layers_beyond_the_subject_are_not_exported(tmp_path):
    config = PriorConfig(
        d=D, layers=(1, 9), subject_layers=8, d_model=8, d_mlp=8, n_blocks=1, variance_floor=1e-6
    )
    prior = ActivationPrior.untrained(config, torch.zeros(2, D), torch.ones(2, D))
    with pytest.raises(UserError, match="layers: blocks 1, 9 of 8 cannot be exported; correct layers"):
        glp.save(str(tmp_path / "out"), config, dict(prior.state_dict()))
    assert not (tmp_path / "out").exists()
