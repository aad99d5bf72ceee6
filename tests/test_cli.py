import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from dmm_ray.cli import VERBS, main, parse
from dmm_ray.errors import UserError
from dmm_ray.training.config import OptimizerConfig, TrainConfig

FLAGS = Path(__file__).parent / "flags.txt"
"""A verb and a flag a line. Lines are added, never taken away."""


def run(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "dmm_ray", *args], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("name", VERBS)
def test_help_shows_every_field(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    model = getattr(__import__(VERBS[name].module, fromlist=["x"]), VERBS[name].config)
    fields = {name: field for name, field in model.model_fields.items() if name not in model.groups()}
    for group, kind in model.groups().items():
        assert f"\n{group} options:\n" in shown
        assert model.model_fields[group].description, group
        fields |= kind.model_fields
    for field, about in fields.items():
        assert ("-" if len(field) == 1 else "--") + field.replace("_", "-") in shown
        assert about.description, field
    assert f"usage: dmm {name}" in shown


@pytest.mark.parametrize(("name", "flag"), [line.split() for line in FLAGS.read_text().splitlines()])
def test_a_flag_stays(name, flag):
    """Scripts use them: every flag that there ever was is known, and takes a value."""
    said = ""
    try:
        parse(name, [f"{flag}=x"])
    except UserError as e:
        said = str(e)
    assert "unrecognized arguments" not in said, flag


@pytest.mark.parametrize("name", VERBS)
def test_no_field_is_in_two_groups_or_beside_its_group(name):
    model = getattr(__import__(VERBS[name].module, fromlist=["x"]), VERBS[name].config)
    inside = [field for kind in model.groups().values() for field in kind.model_fields]
    assert len(set(inside)) == len(inside)
    assert not set(inside) & set(model.model_fields)


TRAIN = ["--activations", "a", "--out", "b"]


@pytest.mark.parametrize(
    ("flags", "group", "field", "value"),
    [
        (["--lr", "0.5"], "optimizer", "lr", 0.5),
        (["--lr=0.5"], "optimizer", "lr", 0.5),
        (["--optimizer.lr", "0.5"], "optimizer", "lr", 0.5),
        (["--keep-best"], "checkpoints", "keep_best", True),
        (["--keep-best", "--no-keep-best"], "checkpoints", "keep_best", False),
        (["--checkpoints.keep-best"], "checkpoints", "keep_best", True),
        (["--no-checkpoints.keep-best"], "checkpoints", "keep_best", False),
        (["--levels_per_batch", "64"], "schedule", "levels_per_batch", 64),
    ],
)
def test_a_field_of_a_group_is_given_by_its_own_name_or_the_group_s(flags, group, field, value):
    _, config = parse("train", [*TRAIN, *flags])
    assert getattr(getattr(config, group), field) == value


def test_a_file_may_be_flat_or_nested_and_flags_override_both(tmp_path):
    flat, nested = tmp_path / "flat.yaml", tmp_path / "nested.yaml"
    flat.write_text("activations: a\nout: b\nlr: 0.5\nema: 0.1\nworkers: 2\n")
    nested.write_text("activations: a\nout: b\noptimizer: {lr: 0.5, ema: 0.1}\ndistribution: {workers: 2}\n")
    first, second = (parse("train", ["--config", str(path)])[1] for path in (flat, nested))
    assert first == second
    for path in (flat, nested):
        for flag in ("--lr", "--optimizer.lr"):
            _, config = parse("train", ["--config", str(path), flag, "0.25"])
            assert (config.optimizer.lr, config.optimizer.ema, config.distribution.workers) == (0.25, 0.1, 2)
    both = tmp_path / "both.yaml"
    both.write_text("lr: 0.5\noptimizer: {lr: 0.1}\n")
    with pytest.raises(UserError, match=r"lr: given twice, as lr and as optimizer\.lr; give one of them"):
        parse("train", ["--config", str(both), *TRAIN])


def test_flat_fields_in_python():
    config = TrainConfig(activations="a", out="b", lr=0.5, optimizer={"ema": 0.1}, batch=64)
    assert (config.optimizer.lr, config.optimizer.ema, config.schedule.batch) == (0.5, 0.1, 64)
    changed = config.model_copy(update={"lr": 0.25, "workers": 2, "seed": 3})
    assert (changed.optimizer.lr, changed.optimizer.ema, changed.distribution.workers) == (0.25, 0.1, 2)
    assert TrainConfig.model_validate(config.model_dump()) == config
    with pytest.raises(ValidationError, match="given twice"):
        TrainConfig(activations="a", out="b", lr=0.5, optimizer=OptimizerConfig(lr=0.5))
    with pytest.raises(ValidationError, match="valid dictionary or instance of OptimizerConfig"):
        TrainConfig(activations="a", out="b", lr=0.5, optimizer=3)


def test_flags_override_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "activations: a\nout: b\nsamples: 5\nsplit: {seed: 3, test: 0.1, train: 0.8, validation: 0.1}\n"
    )
    _, config = parse("train", ["--config", str(path), "--samples", "7", "--split.seed", "9"])
    assert (config.activations, config.split.seed, config.split.test) == ("a", 9, 0.1)
    assert config.schedule.samples == 7
    _, config = parse("train", [f"--config={path}"])
    assert (config.schedule.samples, config.split.seed) == (5, 3)


def test_the_environment_is_not_read(monkeypatch):
    monkeypatch.setenv("SAMPLES", "3")
    _, config = parse("train", ["--activations", "a", "--out", "b"])
    assert config.schedule.samples != 3


def test_a_folder_may_stand_first():
    assert parse("verify", ["store", "--seed", "3"])[1].store == "store"
    assert parse("info", ["store"])[1].store == "store"
    assert parse("export-glp", ["prior", "folder", "--revision", "r"])[1].out == "folder"


def test_a_field_of_one_letter_is_a_flag_like_others():
    assert parse("sample", ["--prior", "p", "--out", "o", "--n", "5"])[1].n == 5
    assert parse("denoise", ["--prior", "p", "--out", "o", "--activations", "a", "--u=0.25"])[1].u == 0.25


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["trian"], "trian: no such verb; one of demo, extract, train"),
        (["train", "--out", "x"], "activations: required; give --activations"),
        (
            ["train", "--activations", "a", "--out", "x", "--samples", "many"],
            "samples: .*integer.*got 'many'",
        ),
        (
            ["train", "--activations", "a", "--out", "x", "--sampels", "3"],
            "unrecognized arguments: --sampels 3",
        ),
        (
            ["train", "--activations", "a", "--out", "x", "--levels-per-batch", "7"],
            "levels_per_batch: must divide",
        ),
        (["train", *TRAIN, "--lr", "-1"], "^lr: .*greater than 0"),
        (
            ["train", *TRAIN, "--keep-best=x"],
            "argument --keep-best/--no-keep-best: ignored explicit argument",
        ),
        (["train", *TRAIN, "--min-workers", "3"], "^min_workers: must not be more than workers"),
        (["extract", "--text", "t", "--out", "o", "--layers", "[1]"], "^model: required; give --model"),
        (["train", "--config"], "--config: no value; give the path of a YAML file"),
        (["train", "--config", "/nothing.yaml"], "/nothing.yaml: no such file"),
        (["extract", "--model", "m", "--text", "t", "--out", "o", "--layers", "[1,1]"], "layers: .*distinct"),
    ],
)
def test_bad_arguments_are_named(args, says):
    with pytest.raises(UserError, match=says):
        parse(args[0], args[1:])


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "a: [1\n", "nonsense: 3\n"])
def test_bad_files_are_named(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"c\.yaml: |nonsense: no such field"):
        parse("train", ["--config", str(path), "--activations", "a", "--out", "b"])


def test_exit_codes_and_one_line(tmp_path):
    bad = run("info", str(tmp_path / "none"))
    assert (bad.returncode, bad.stdout) == (2, "")
    assert len(bad.stderr.strip().splitlines()) == 1
    assert bad.stderr.startswith("dmm info: ")
    assert run().returncode == 2
    assert "verify" in run("--help").stdout


def test_a_failure_nobody_expected_is_one_line_that_names_its_trace(tmp_path, monkeypatch, capsys):
    def broken(config):
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("dmm_ray.store.info.info", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        main(["info", "/there"])
    assert ended.value.code == 1
    [log] = tmp_path.iterdir()
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"dmm info: ZeroDivisionError: division by zero; full trace: {log}\n")
    assert "in broken\n" in log.read_text()
