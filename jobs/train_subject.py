"""Train the demo's embedded subject: a small Llama-architecture language model of the generated stories.

    python jobs/train_subject.py --out dmm_ray/demo/subject

Writes a Hugging Face model folder with a fast byte-level BPE tokenizer and a model card with measured metrics.
Every story is seen once; the stories for training, for the held-out loss and for the demo have different seeds.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic_settings import CliApp
from sklearn.mixture import GaussianMixture
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dmm_ray.config import Config
from dmm_ray.demo.stories import Story, generate
from dmm_ray.provenance import versions

log = logging.getLogger(__name__)

CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# The demo's subject

A Llama-architecture language model of the short English stories that `dmm_ray.demo.stories` generates:
{parameters:,} parameters, {blocks} blocks, d = {d}, {heads} heads, context {context}, byte-level BPE of
{vocabulary} tokens. BOS `<s>` precedes every text; EOS `</s>` ends a story. It exists so that the
demo and the tests have a real language model without a model hub; it knows nothing but its stories.

The stories carry labels (sentiment, the hero's gender and number, tense, place, weather, animal, harm),
character spans and facts, drawn independently of each other. The 64 residents of a fixed world have the same
home, possession and job in every story, for the model to memorise.

## Training
`{command}`: {minutes:.0f} minutes on {threads} CPU thread(s) of a busy machine, {when}, torch {torch},
transformers {transformers}. {stories:,} stories of seed {stories_seed}, each seen once
({training_tokens:,} tokens); AdamW, learning rate {learning_rate}, 2 % warm-up and cosine, {batch}
stories per step, float32, seed {seed}.

## Measured
| metric | value |
|---|---|
| loss on 1,000 new stories, nats/token | {held_out_loss:.3f} |
| the unigram's loss on them, nats/token | {unigram_loss:.3f} |
| tokens per story, BOS and EOS included | {tokens_per_story:.0f} |
| rows whose whole prefix is seen (see below) | {seen_prefix_share:.1%} |
| world facts ranked first where a story first tells them | {world_fact_recall:.1%} |
| a story's own facts (home, animal's name) ranked first where it repeats them | {story_fact_recall:.1%} |

Rows are the positions after BOS in the demo's 3,000 stories (seed {demo_seed}); seen are those of the last 5 %
of the stories whose whole prefix also begins one of the first 90 %.

Activations of those stories, the last 5 % held out: mean excess kurtosis along whitened principal axes (0
for a Gaussian), and negative log-likelihood in nats/dim of standardised rows under a full-covariance
Gaussian and under 256 diagonal components.

| block | excess kurtosis | Gaussian | mixture |
|---|---|---|---|
{rows}

## Limits
Trained on generated text only, and briefly: where the recall of a story's own facts is low, the model does not
keep track of names, and the characters of the stories it samples change midway. About 15 % of stories tell of a
theft, a poisoning, a fire or a threat, mildly worded, for experiments with safety interventions.
"""

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
IGNORED = -100


class SubjectConfig(Config):
    """The subject's size and its training."""

    out: str = "dmm_ray/demo/subject"
    """Folder to write."""
    seed: int = 0
    """Seed of the weights and of the order of stories."""
    stories_seed: int = 1000
    """Seed of the training stories; the held-out stories use the next one."""
    demo_seed: int = 1
    """Seed of the demo's stories, on which the metrics of activations are measured."""
    stories: int = 50_000
    """Training stories, each seen once."""
    vocabulary: int = 2048
    """Vocabulary size of the byte-level BPE."""
    d: int = 64
    """Hidden size."""
    mlp: int = 192
    """Hidden size of the MLPs."""
    layers: int = 6
    """Decoder blocks."""
    heads: int = 4
    """Attention heads."""
    context: int = 256
    """Context window in tokens; longer stories are truncated."""
    batch: int = 16
    """Stories per step."""
    initializer_range: float = 0.1
    """Standard deviation of the initial weights; at this size 0.02 delays attention."""
    learning_rate: float = 4e-3
    """Peak of AdamW's learning rate (2 % warm-up, cosine to 2 %)."""
    weight_decay: float = 0.05
    """Weight decay of matrices."""
    threads: int = 1
    """CPU threads."""


def build_tokenizer(texts: Sequence[str], config: SubjectConfig) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on ``texts`` that prepends BOS to every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=config.context,
        clean_up_tokenization_spaces=False,
    )


def build_model(config: SubjectConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained subject of the configured size."""
    torch.manual_seed(config.seed)
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.d,
        intermediate_size=config.mlp,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=config.context,
        tie_word_embeddings=True,
        initializer_range=config.initializer_range,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(llama)


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], context: int) -> list[list[int]]:
    """Token ids of each text with BOS and, if it fits into the context window, EOS."""
    eos = tokenizer.eos_token_id
    return [ids[:context] for ids in ([*ids, eos] for ids in tokenizer(list(texts))["input_ids"])]


def pad(documents: Sequence[Sequence[int]], fill: int) -> Tensor:
    """The documents as (b, t) int64, padded on the right with ``fill``."""
    width = max(map(len, documents))
    return torch.tensor([[*ids, *[fill] * (width - len(ids))] for ids in documents])


def batches(documents: Sequence[Sequence[int]], size: int, seed: int) -> Iterator[Tensor]:
    """Shuffled batches of documents of similar length, padded with IGNORED."""
    rng = np.random.default_rng(seed)
    lengths = np.array([len(ids) for ids in documents]) + rng.uniform(-4, 4, len(documents))
    order = np.argsort(lengths)
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    for group in rng.permutation(len(groups)):
        yield pad([documents[i] for i in groups[group]], IGNORED)


def token_losses(model: LlamaForCausalLM, ids_BT: Tensor) -> Tensor:
    """Loss in nats of every token after the first of each document, (m,)."""
    known = ids_BT != IGNORED
    logits = model(input_ids=ids_BT.where(known, torch.zeros_like(ids_BT))).logits[:, :-1]
    targets = ids_BT[:, 1:]
    return F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED
    )[known[:, 1:].flatten()]


def fit(model: LlamaForCausalLM, documents: Sequence[Sequence[int]], config: SubjectConfig) -> None:
    """Train on every document once with AdamW, warm-up and cosine decay, and gradient clipping.

    Training is in float32: at this size bf16 autocast is no faster on a CPU, and its attention is slower.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))
    steps = math.ceil(len(documents) / config.batch)
    warm = max(1, steps // 50)

    def scale(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    started, tokens = time.monotonic(), 0
    model.train()
    for step, ids_BT in enumerate(batches(documents, config.batch, config.seed)):
        losses = token_losses(model, ids_BT)
        loss = losses.mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        tokens += len(losses)
        if step % 100 == 99:
            rate = tokens / (time.monotonic() - started)
            log.info("step %d/%d loss %.3f %.0f tokens/s", step + 1, steps, loss.item(), rate)
    model.eval()


def held_out_loss(model: LlamaForCausalLM, documents: Sequence[Sequence[int]]) -> float:
    """Nats per token over all tokens after BOS, EOS included."""
    with torch.no_grad():
        return float(torch.cat([token_losses(model, ids_BT) for ids_BT in batches(documents, 32, 0)]).mean())


def unigram_loss(
    training: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]], vocabulary: int
) -> float:
    """Nats per token of the training frequencies (add-one smoothed) on the held-out documents."""
    counts = np.bincount(np.concatenate([ids[1:] for ids in training]), minlength=vocabulary) + 1
    nats = -np.log(counts / counts.sum())
    return float(nats[np.concatenate([ids[1:] for ids in held_out])].mean())


def seen_prefix_share(documents: Sequence[Sequence[int]]) -> float:
    """Share of rows (position >= 1) of the last 5 % whose prefix also begins one of the first 90 %."""
    rows = [ids[:-1] for ids in documents]
    first, last = int(0.9 * len(rows)), int(0.95 * len(rows))
    known = {tuple(ids[: i + 1]) for ids in rows[:first] for i in range(1, len(ids))}
    seen = [tuple(ids[: i + 1]) in known for ids in rows[last:] for i in range(1, len(ids))]
    return sum(seen) / len(seen)


def fact_recall(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, stories: Sequence[Story]
) -> dict[str, float]:
    """Share of facts all of whose tokens rank first: world facts when first told, a story's own facts when repeated."""
    right: dict[str, list[bool]] = {"world": [], "story": []}
    for story in stories:
        encoded = tokenizer(story.text, return_offsets_mapping=True)
        with torch.no_grad():
            best = model(torch.tensor([encoded["input_ids"]])).logits[0].argmax(-1).tolist()
        told = set()
        for fact in story.facts:
            repeated = fact[:3] in told
            told.add(fact[:3])
            if (fact.relation == "owns" and not fact.world) or repeated == fact.world:
                continue
            at = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < fact.end and b > fact.start]
            right["world" if fact.world else "story"].append(
                all(best[i - 1] == encoded["input_ids"][i] for i in at)
            )
    return {kind: sum(hits) / max(1, len(hits)) for kind, hits in right.items()}


def layer_rows(model: LlamaForCausalLM, documents: Sequence[Sequence[int]], layer: int) -> np.ndarray:
    """Outputs of block ``layer``, (rows, d), at every position but the first and the last (EOS is not an input)."""
    rows = []
    with torch.no_grad():
        for ids_BT in batches([ids[:-1] for ids in documents], 32, 0):
            known = ids_BT != IGNORED
            hidden = model(
                ids_BT.where(known, torch.zeros_like(ids_BT)), output_hidden_states=True
            ).hidden_states[layer + 1]
            rows.append(hidden[:, 1:][known[:, 1:]])
    return torch.cat(rows).double().numpy()


def shape_figures(train: np.ndarray, test: np.ndarray) -> dict[str, float]:
    """How non-Gaussian rows are: kurtosis along whitened axes, NLL in nats/dim of standardised rows."""
    mean, std = train.mean(0), train.std(0)
    train, test = (train - mean) / std, (test - mean) / std
    values, axes = np.linalg.eigh(np.cov(train.T))
    white = (test - train.mean(0)) @ axes / np.sqrt(values)
    white = (white - white.mean(0)) / white.std(0)
    gaussian = GaussianMixture(1, covariance_type="full").fit(train)
    mixture = GaussianMixture(256, covariance_type="diag", max_iter=20, reg_covar=1e-4, random_state=0).fit(
        train
    )
    d = train.shape[1]
    return {
        "excess_kurtosis": float((white**4).mean() - 3),
        "gaussian_nll": float(-gaussian.score(test) / d),
        "mixture_nll": float(-mixture.score(test) / d),
    }


def measure(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    training: list[list[int]],
    config: SubjectConfig,
) -> dict[str, Any]:
    """Every metric of the model card."""
    fresh = list(generate(1000, config.stories_seed + 1))
    held_out = encode(tokenizer, [story.text for story in fresh], config.context)
    demo = encode(tokenizer, [story.text for story in generate(3000, config.demo_seed)], config.context)
    recall = fact_recall(model, tokenizer, fresh[:500])
    shape = {}
    for layer in range(config.layers // 2 - 1, config.layers // 2 + 1):
        rng = np.random.default_rng(0)
        rows = layer_rows(model, demo[:1000], layer)
        shape[layer] = shape_figures(rng.permutation(rows)[:60_000], layer_rows(model, demo[-150:], layer))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": sum(len(ids) - 1 for ids in training),
        "tokens_per_story": float(np.mean([len(ids) for ids in held_out])),
        "held_out_loss": held_out_loss(model, held_out),
        "unigram_loss": unigram_loss(training, held_out, len(tokenizer)),
        "seen_prefix_share": seen_prefix_share(demo),
        "world_fact_recall": recall["world"],
        "story_fact_recall": recall["story"],
        "shape": shape,
    }


def card(figures: dict[str, Any], config: SubjectConfig, seconds: float) -> str:
    """The model card in Markdown."""
    rows = "\n".join(
        f"| {layer} | {f['excess_kurtosis']:.2f} | {f['gaussian_nll']:.3f} | {f['mixture_nll']:.3f} |"
        for layer, f in figures["shape"].items()
    )
    flags = [f"--{k} {v}" for k, v in config.model_dump(exclude_defaults=True, exclude={"out"}).items()]
    values = (
        config.model_dump(exclude={"layers"})
        | figures
        | {k: v for k, v in versions().items() if k.isidentifier()}
    )
    return CARD.format(
        rows=rows,
        command=" ".join(["python jobs/train_subject.py", *flags]),
        blocks=config.layers,
        when=time.strftime("%Y-%m-%d"),
        minutes=seconds / 60,
        **values,
    )


def train_subject(config: SubjectConfig) -> str:
    """Generate the stories, train, measure, and write the model folder; return its path."""
    torch.set_num_threads(config.threads)
    started = time.monotonic()
    texts = [story.text for story in generate(config.stories, config.stories_seed)]
    tokenizer = build_tokenizer(texts[:20_000], config)
    documents = encode(tokenizer, texts, config.context)
    model = build_model(config, tokenizer)
    fit(model, documents, config)
    seconds = time.monotonic() - started
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model.generation_config = GenerationConfig(**ids, do_sample=True, top_k=0, max_length=config.context)
    model.save_pretrained(config.out)
    tokenizer.save_pretrained(config.out)
    figures = measure(model, tokenizer, documents, config)
    log.info("figures %s", json.dumps(figures))
    Path(config.out, "README.md").write_text(card(figures, config, seconds))
    return config.out


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    sys.stdout.write(train_subject(CliApp.run(SubjectConfig)) + "\n")
