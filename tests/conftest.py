"""Shared fixtures: one Ray cluster per session, a tiny random subject model, a small text."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import pytest
import torch
from s3_server import port_to_be, settings
from texts import make_texts

SMALL = {"layers": [1, 2], "dtype": "float32", "rows_per_shard": 700, "actors": 1, "cpus_per_actor": 1}


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Refuse parameters whose names may change from one run to the next: two test processes must collect the same.

    Bytes may hold a clock (gzip's header does); a set's order is that of its process; a path or an address is the
    machine's.
    """
    text = str(val) if isinstance(val, str | os.PathLike) else ""
    if isinstance(val, bytes | set | frozenset) or text.startswith(
        ("/tmp", str(Path.home()), str(Path.cwd()))
    ):
        raise pytest.UsageError(f"{argname}: name this parameter with ids= or a key: {val!r:.60}")
    return None


TOGETHER = ("tests/serving/text_endpoint/", "tests/serving/load_endpoint/")
"""Folders whose tests share an endpoint, and so a test process."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """As ``--dist loadfile``: a file at a time for each process, and the folders above as one."""
    from xdist.scheduler import LoadFileScheduling

    class Rooms(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((room for room in TOGETHER if nodeid.startswith(room)), super()._split_scope(nodeid))

    return Rooms(config, log)


if threading.current_thread() is threading.main_thread():
    # A background job of a script has SIGINT ignored, and would hand that on to the commands that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One local Ray cluster with 4 logical CPUs for the whole session, whose workers know the tests' S3 server."""
    import ray

    from dmm_ray.ray_session import ensure_ray

    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings(f"http://127.0.0.1:{port_to_be()}").items():
            patch.setenv(name, value)
        ensure_ray(num_cpus=4)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of 60 short documents of mixed lengths."""
    path = tmp_path_factory.mktemp("text") / "tiny.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in make_texts(60)))
    return path


@pytest.fixture(scope="session")
def tiny_subject(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 blocks, d = 32, context 64, with a byte-level BPE tokenizer that adds a BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("subject")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_texts(200, seed=1), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_options(tiny_subject: Path, tiny_text: Path) -> dict[str, Any]:
    """Options of an extraction of ``tiny_text`` in 6 units of at most 11 documents (all but ``out``)."""
    return {"model": str(tiny_subject), "text": str(tiny_text), **SMALL}


@pytest.fixture(scope="session")
def tiny_store(tiny_options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished float32 store of layers 1 and 2, extracted in this process. Do not change it."""
    from stores import extract_here

    return Path(extract_here(out=str(tmp_path_factory.mktemp("stores") / "tiny"), **tiny_options))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real small data kept beside the checkout; tests that need it skip where it is absent."""
    folder = Path(
        os.environ.get("DMM_TEST_DATA", Path(__file__).parents[1] / ".." / "shared" / "data")
    ).resolve()
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set DMM_TEST_DATA to a folder that holds it")
    return folder
