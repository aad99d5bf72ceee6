import subprocess
import sys

import pytest

from dmm_ray.cli import VERBS, main, parse
from dmm_ray.errors import UserError


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
    fields = getattr(__import__(VERBS[name].module, fromlist=["x"]), VERBS[name].config).model_fields
    for field, about in fields.items():
        assert ("-" if len(field) == 1 else "--") + field.replace("_", "-") in shown
        assert about.description, field
    assert f"usage: dmm {name}" in shown


def test_flags_override_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "activations: a\nout: b\nsamples: 5\nsplit: {seed: 3, test: 0.1, train: 0.8, validation: 0.1}\n"
    )
    _, config = parse("train", ["--config", str(path), "--samples", "7", "--split.seed", "9"])
    assert (config.activations, config.samples, config.split.seed, config.split.test) == ("a", 7, 9, 0.1)
    _, config = parse("train", [f"--config={path}"])
    assert (config.samples, config.split.seed) == (5, 3)


def test_the_environment_is_not_read(monkeypatch):
    monkeypatch.setenv("SAMPLES", "3")
    _, config = parse("train", ["--activations", "a", "--out", "b"])
    assert config.samples != 3


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
        (["train", "--config"], "--config: a YAML file is needed"),
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
