"""Benchmark of extraction: ours against the bare engine without Ray and a plain loop; and of the writer alone.

Run with ``python jobs/bench.py extract``. The model is a random Llama of 16 blocks, sized for a CPU, whose head has the
same share of the weights as in Llama-3.2-1B; documents have log-normal lengths from 16 to 2048 tokens.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import transformers
from timing import medians, precisions
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from dmm_ray.extraction.config import ExtractConfig
from dmm_ray.extraction.engine import Engine, ExtractionTask, Loading
from dmm_ray.extraction.extract import extract
from dmm_ray.extraction.job import BATCH_TOKENS
from dmm_ray.store.manifest import DTYPES, read_manifest, read_record
from dmm_ray.store.writer import write_shard
from dmm_ray.text.corpus import Corpus
from dmm_ray.units.unit import unit_at

LAYER, WINDOW, WORDS = 7, 2048, 4000
PLAIN_BATCH = 8
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
PLAIN = {name: DTYPES[name] for name in precisions(DEVICE)}
SHAPE = {
    "vocab_size": 26_000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": WINDOW,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
if CUDA:  # the blocks of Llama-3.2-1B
    SHAPE |= {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }


def make_model(folder: Path) -> str:
    """A random Llama in bfloat16 whose tokenizer maps each word to a token and prepends a BOS."""
    vocabulary = {"<s>": 0, "</s>": 1} | {f"w{i}": i + 2 for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).to(torch.bfloat16)
    model.cpu().save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return str(folder)


def make_text(path: Path, documents: int) -> str:
    """Documents of log-normal lengths, median 256, from 16 to 2048 tokens including BOS."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(256), 1.0, documents), 16, WINDOW).astype(int) - 1
    with open(path, "w") as f:
        for n in lengths:
            f.write(json.dumps({"text": " ".join(f"w{i}" for i in rng.integers(0, WORDS, n))}) + "\n")
    return str(path)


def plain_loop(model: str, text: str, documents: int, dtype: torch.dtype) -> float:
    """Useful tokens per second of the usual loop over the first documents: the full model, batches of 8 documents
    padded to the longest, ``output_hidden_states``; nothing is written."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, pad_token="</s>")
    lm = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval().to(DEVICE)
    with open(text) as f:
        texts = [json.loads(line)["text"] for line in f][:documents]
    kept, tokens, started = [], 0, time.perf_counter()
    with torch.no_grad():
        for low in range(0, len(texts), PLAIN_BATCH):
            batch = tokenizer(
                texts[low : low + PLAIN_BATCH],
                padding=True, truncation=True, max_length=WINDOW, return_tensors="pt",
            )  # fmt: skip
            inputs = {name: batch[name].to(DEVICE) for name in ("input_ids", "attention_mask")}
            hidden = lm(**inputs, output_hidden_states=True).hidden_states[LAYER + 1]
            mask = inputs["attention_mask"].bool()
            kept.append(hidden[mask].cpu())
            tokens += int(mask.sum())
    return tokens / (time.perf_counter() - started)


def store_rate(out: str) -> float:
    """Tokens per second of a store between the ends of its first and last units, which excludes startup."""
    manifest = read_manifest(out)
    ends = sorted(
        (os.stat(f"{out}/shards/{unit:06d}.json").st_mtime, read_record(out, unit).tokens)
        for unit in range(manifest.units)
    )
    return sum(tokens for _, tokens in ends[1:]) / (ends[-1][0] - ends[0][0])


def bare_engine(store: str, out: str, text: str, threads: int) -> float:
    """Tokens per second of the same extraction as ``store``, by one engine in this process without Ray."""
    manifest = read_manifest(store)
    corpus = Corpus.scan([text])
    task = ExtractionTask(
        out, manifest, 0, Loading(batch_tokens=BATCH_TOKENS[DEVICE], threads=threads, device=DEVICE)
    )
    engine = Engine(task, corpus)
    units = [unit_at(u, corpus.n_documents, manifest.documents_per_unit) for u in range(manifest.units)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(engine.extract, units))
    Path(out, "manifest.json").write_text(manifest.model_dump_json())
    return store_rate(out)


def compare(say: Callable[[str], None], documents: int = 6000 if CUDA else 1000, rounds: int = 3) -> None:
    """Tokens per second of each method, in turns; medians."""
    threads = 1 if CUDA else torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        model, text = make_model(Path(folder, "model")), make_text(Path(folder, "text.jsonl"), documents)
        rates: dict[str, list[float]] = {"ours": [], "bare engine": []} | {
            f"plain {name}": [] for name in PLAIN
        }
        for i in range(rounds):
            out = f"{folder}/ours{i}"
            extract(
                ExtractConfig(
                    model=model, text=text, layers=[LAYER], out=out, actors=1, cpus_per_actor=threads
                )
            )
            rates["ours"].append(store_rate(out))
            rates["bare engine"].append(bare_engine(out, f"{folder}/bare{i}", text, threads))
            for name, dtype in PLAIN.items():
                rates[f"plain {name}"].append(plain_loop(model, text, documents // 20, dtype))
        medians = {name: float(np.median(found)) for name, found in rates.items()}
        figures = json.loads(Path(folder, "ours0", "summary.json").read_text())["figures"]
    for name, rate in medians.items():
        say(f"extract {name:14} {rate:10,.0f} tokens/s   ours is {medians['ours'] / rate:.2f}x")
    say(
        f"extract padding {figures['padding_share']:.1%}, {figures['tokens']:,} tokens, {figures['units']} units"
    )


def writer(say: Callable[[str], None], rows: int = 65536, d: int = 2048) -> None:
    """Bytes per second of one process that writes, hashes and syncs shards, and of the disk, which only writes and
    syncs the same bytes."""
    x = torch.randn(rows, d).bfloat16()
    doc = np.repeat(np.arange(rows // 128), 128)
    position = np.tile(np.arange(128, dtype=np.int32), rows // 128)
    raw = x.view(torch.uint8).numpy().data
    with tempfile.TemporaryDirectory() as folder:

        def plain() -> None:
            with open(f"{folder}/plain", "wb") as f:
                f.write(raw)
                f.flush()
                os.fsync(f.fileno())

        calls: dict[str, Callable[[], object]] = {
            "shard, hashed and synced": lambda: write_shard(f"{folder}/shard", x, doc, position, position),
            "plain file, synced": plain,
        }
        for name, seconds in medians(calls, rounds=9).items():
            say(f"extract writing {x.nbytes / 1e6:.0f} MB as a {name}: {x.nbytes / 1e6 / seconds:,.0f} MB/s")


def bench(say: Callable[[str], None]) -> None:
    """Benchmark the writer, then extraction against a plain loop."""
    writer(say)
    compare(say)
