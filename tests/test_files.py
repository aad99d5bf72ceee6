import os

import pytest

from dmm_ray import files
from dmm_ray.errors import UserError


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}"


def test_round_trip(folder):
    uri = files.join(folder, "a", "b.json")
    assert not files.exists(uri)
    files.write_json(uri, {"x": [1, 2]})
    assert files.read_json(uri) == {"x": [1, 2]}
    files.write_bytes(files.join(folder, "a", "c.bin"), b"abc" * 10)
    assert b"".join(files.iter_chunks(files.join(folder, "a", "c.bin"), 3, 9)) == b"abcabc"
    assert [os.path.basename(p) for p in files.list_files(folder)] == ["b.json", "c.bin"]
    assert [os.path.basename(p) for p in files.list_files(folder, (".bin",))] == ["c.bin"]
    assert files.sha256(uri) == files.sha256(files.list_files(folder)[0])


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        files.write_bytes(str(path), "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_nan_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(str(tmp_path / "x.json"), {"x": float("nan")})


def test_errors_name_the_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: no such file"):
        files.read_json(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad\.json: not valid JSON"):
        files.read_json(str(tmp_path / "bad.json"))
    with pytest.raises(UserError, match="is in the way"):
        files.make_folder(str(tmp_path / "bad.json"))
    with pytest.raises(UserError, match="no filesystem for this address"):
        files.exists("nosuch://bucket/x")


def test_hash_of_json_ignores_order():
    assert files.hash_json({"a": 1, "b": 2}) == files.hash_json({"b": 2, "a": 1})
    assert files.hash_json({"a": 1}) != files.hash_json({"a": 2})
