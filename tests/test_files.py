import importlib.util
import os
from collections.abc import Iterator

import fsspec
import pytest
from s3_server import forbidding_s3, s3_server

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


def test_a_local_folder_named_like_a_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files.make_folder("s3")
    assert os.path.isdir("s3")


def test_hash_of_json_ignores_order():
    assert files.hash_json({"a": 1, "b": 2}) == files.hash_json({"b": 2, "a": 1})
    assert files.hash_json({"a": 1}) != files.hash_json({"a": 2})


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as uri:
        yield uri


def test_what_others_write_to_an_object_store_is_seen(bucket):
    folder, other = files.join(bucket, "fresh"), fsspec.filesystem("s3")
    assert files.list_files(folder) == []
    files.write_bytes(files.join(folder, "a", "x"), b"abc")
    other.pipe("bucket/fresh/a/y", b"1")
    assert files.list_files(folder) == [f"{folder}/a/x", f"{folder}/a/y"]
    other.pipe("bucket/fresh/a/y", b"22")
    other.pipe("bucket/fresh/b/z", b"3")
    assert files.list_files(folder) == [f"{folder}/a/x", f"{folder}/a/y", f"{folder}/b/z"]
    assert files.match_files(f"{folder}/*/y") == [f"{folder}/a/y"]
    for name in ("one[1]", "one1"):
        files.write_bytes(f"{bucket}/{name}/z", b"1")
    files.remove_folder(f"{bucket}/one[1]")  # a path, no pattern
    assert files.list_files(f"{bucket}/one[1]") == []
    assert files.exists(f"{bucket}/one1/z")
    assert files.read_bytes(f"{folder}/a/y") == b"".join(files.iter_chunks(f"{folder}/a/y")) == b"22"
    other.rm("bucket/fresh/a", recursive=True)
    assert not files.exists(f"{folder}/a")
    assert files.exists(f"{folder}/b")


def test_markers_of_folders_are_no_files(bucket):
    fsspec.filesystem("s3").pipe("bucket/marked/", b"")
    files.write_bytes(f"{bucket}/marked/x", b"x")
    assert files.list_files(f"{bucket}/marked") == [f"{bucket}/marked/x"]


def test_a_missing_bucket_is_named_and_not_created(bucket):
    files.make_folder("s3://nobucket/store")
    for call in (
        lambda uri: files.write_bytes(uri, b""),
        files.list_files,
        lambda uri: list(files.iter_chunks(uri)),
    ):
        with pytest.raises(
            UserError, match=r"^s3://nobucket/store: The specified bucket does not exist; check"
        ):
            call("s3://nobucket/store")
    with pytest.raises(UserError, match="s3://nobucket/x: no such file"):
        files.read_bytes("s3://nobucket/x")
    assert fsspec.filesystem("s3").ls("") == ["bucket"]


@pytest.fixture
def forbidding() -> Iterator[None]:
    with forbidding_s3():
        yield


CALLS = [
    files.read_bytes, files.exists, files.list_files, files.sha256, lambda uri: files.write_bytes(uri, b"")
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_no_permission_in_an_object_store(forbidding, call):
    with pytest.raises(UserError, match=r"^s3://b/x: (Access Denied|Forbidden); check the address, the cred"):
        call("s3://b/x")


@pytest.mark.parametrize("call", CALLS)
def test_no_credentials(bucket, call, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name, value in {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    s3 = fsspec.get_filesystem_class("s3")
    s3.clear_instance_cache()
    with pytest.raises(UserError, match=r"^s3://bucket/x: Unable to locate credentials; check.*AWS_PROFILE"):
        call("s3://bucket/x")
    s3.clear_instance_cache()


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_a_filesystem_that_is_not_installed():
    with pytest.raises(UserError, match=r"^gs://b/x: no filesystem .*; pip install 'dmm-ray\[gcs\]'$"):
        files.exists("gs://b/x")
