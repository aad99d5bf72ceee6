"""The self-contained HTML report: a summary in plain words, then tables with every method, better or worse."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files as package_files
from string import Template
from typing import Any, NamedTuple

from dmm_ray.evaluation.plots import NAMES, PICTURES
from dmm_ray.evaluation.summary import MIXTURES
from dmm_ray.files import exists, join, read_bytes, write_bytes

REPORT = "report.html"
REPORT_COLUMNS = {
    "flow_matching_loss": "flow-matching loss",
    "delta_lm_loss": "delta LM loss",
    "nll_nats_per_dim": "NLL, nats/dim",
    "frechet_distance": "Frechet distance",
    "two_sample_auc": "two-sample AUC",
}


class ScoredToken(NamedTuple):
    """A token of a text and the log-probability of its activation."""

    text: str
    nats_per_dim: float | None
    """Log-probability in nats per dimension, higher is more natural; None if not scored (position 0)."""
    percentile: float | None = None
    """Percentage of natural activations that are less likely."""


class ScoredText(NamedTuple):
    """A text with its scored tokens."""

    title: str
    tokens: Sequence[ScoredToken]


def write_report(out: str, summary: Mapping[str, Any], scored: Sequence[ScoredText] = ()) -> str:
    """Write ``report.html`` into ``out`` with the plots found there, and return its path.

    The page is self-contained: it needs neither network nor other files. It may be rewritten, with ``scored`` texts.
    """
    template = Template(
        package_files("dmm_ray.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    )
    inputs = summary["inputs"]
    page = template.substitute(
        title=escape(
            f"A prior of layer {inputs['layer']} of {inputs['model'].rstrip('/').rsplit('/', 1)[-1]}"
        ),
        opening=_opening(summary),
        headline=_headline(summary),
        tables=_tables(summary),
        scored=_scored(scored) if scored else "",
        pictures="".join(_picture(out, name, caption) for name, caption in PICTURES.items()),
        inputs=_inputs(summary),
    )
    path = join(out, REPORT)
    write_bytes(path, page.encode())
    return path


def _opening(summary: Mapping[str, Any]) -> str:
    rows = summary["rows"]
    flow, delta = (_compared(summary, k) for k in _HEADLINES)
    return (
        f"<p>A diffusion prior of d = {summary['inputs']['d']} activations was compared with a Gaussian, PCA, "
        "mixtures of many Gaussians and of factor analysers, sparse autoencoders and an untrained network of the same "
        "shape, all fitted on "
        f"{rows['train']:,} rows of training documents. On {rows['test']:,} rows of {rows['test_documents']:,} test "
        f"documents its flow-matching loss is {flow} the full-covariance Gaussian's and "
        f"{_best_mixture(summary, 'flow_matching_loss')}; its delta LM loss, the language model's added loss when the "
        f"layer is noised to u = 0.5 and restored, is {delta} the best of Gaussian, PCA and SAE and "
        f"{_best_mixture(summary, 'delta_lm_loss')}.</p>{_training(summary)}"
    )


def _best_mixture(summary: Mapping[str, Any], figure: str) -> str:
    """``10 % above the better mixture (diagonal)``: the prior against the better of both."""
    known = {k: v for k in MIXTURES if (v := summary["fidelity"][figure].get(k)) is not None}
    best = min(known, key=known.__getitem__, default=MIXTURES[0])
    return f"{_compared(summary, f'{figure}_vs_{best}')} the better mixture's ({NAMES[best]})"


def _training(summary: Mapping[str, Any]) -> str:
    """How long the prior was trained and how much the second half of the training helped; empty if unknown."""
    trained = summary.get("training")
    if not trained:
        return ""
    samples, rows = trained["samples"], summary["rows"]["train"]
    why = (
        f", as many as fitted into {trained['minutes']:g} minutes on this machine"
        if trained["minutes"]
        else ""
    )
    line = f"The prior saw {samples:,} samples ({samples / rows:.1f} passes over these rows){why}."
    if trained["half"] and trained["end"]:
        line += (
            f" The second half of them lowered its validation loss from {trained['half']:.3f} to "
            f"{trained['end']:.3f}, partly through the decaying learning rate; train longer with "
            "<code>--samples</code> or <code>--minutes</code> of <code>dmm train</code> and <code>dmm demo</code>."
        )
    return f'<p class="soft">{line}</p>'


_HEADLINES = ("flow_matching_loss_vs_gaussian", "delta_lm_loss_vs_best_of_gaussian_pca_sae")


def _headline(summary: Mapping[str, Any]) -> str:
    labels = (
        "flow-matching loss against the Gaussian",
        "delta LM loss against the best of Gaussian, PCA and SAE",
    )
    cards = []
    for suffix, where in (("", "all test rows"), ("_unseen_prefix", "unseen prefixes only")):
        for key, label in zip(_HEADLINES, labels, strict=True):
            value = (summary[f"relative{suffix}"] or {}).get(key)
            if value is not None:
                kind = "good" if value < 0 else "bad"
                interval = summary[f"relative_interval{suffix}"][key]
                between = (
                    "" if interval is None else " ({:+.0f} to {:+.0f})".format(*(100 * x for x in interval))
                )
                cards.append(
                    f'<div><b class="{kind}">{100 * value:+.0f} %</b>{label}<br>'
                    f"<small>{where}{between}</small></div>"
                )
    return "".join(cards)


def _tables(summary: Mapping[str, Any]) -> str:
    parts = [
        "<h2>All test rows</h2>",
        _table(summary, summary["fidelity"], summary["stderr"], with_size=True),
    ]
    if summary["fidelity_unseen_prefix"]:
        share = summary["rows"]["unseen_prefix_share"]
        parts.append(f"<h2>Rows with unseen prefixes ({100 * share:.1f} % of the test rows)</h2>")
        parts.append(
            _table(
                summary, summary["fidelity_unseen_prefix"], summary["stderr_unseen_prefix"], with_size=False
            )
        )
    if summary["delta_lm"]:
        found = summary["delta_lm"]["published_protocol"]
        parts.append(
            '<p class="soft">Delta LM loss under the published protocol, in which only the prior has noise to remove '
            f"(u = 0.5) and the baselines reconstruct clean rows: prior {_number(found.get('prior'))}, PCA "
            f"{_number(found.get('pca'))}, SAE {_number(found.get('sae'))}.</p>"
        )
    return "".join(parts)


def _table(
    summary: Mapping[str, Any], figures: Mapping[str, Any], errors: Mapping[str, Any], with_size: bool
) -> str:
    columns = [k for k in REPORT_COLUMNS if any(v is not None for v in (figures.get(k) or {}).values())]
    heads = [REPORT_COLUMNS[k] for k in columns]
    if with_size:
        heads[1:1] = ["at u = 0.4 to 0.6"]
        heads += ["parameters", "FLOPs per row", "fit, s"]
    lines = ["<tr><th></th>" + "".join(f"<th>{h}</th>" for h in heads) + "</tr>"]
    middle = {k: _middle(levels) for k, levels in summary["by_level"].items() if k in NAMES}
    shown = {name: label for name, label in NAMES.items() if name in summary["by_level"]}
    for name, label in shown.items():
        cells = [_cell(figures[k], errors.get(k) or {}, name, k) for k in columns]
        if with_size:
            about = _about(summary["methods"], name)
            cells[1:1] = [_cell(middle, {}, name, "middle")]
            cells += [
                f"<td>{_count(about.get('parameters'))}</td>",
                f"<td>{_count(about.get('flops_per_row'))}</td>",
                f"<td>{_number(about.get('seconds'), 1)}</td>",
            ]
        lines.append(f'<tr class="{name}"><td>{_label(summary, name, label)}</td>{"".join(cells)}</tr>')
    if any((figures.get(k) or {}).get("floor") is not None for k in columns):
        cells = [f"<td>{_number(figures[k].get('floor'))}</td>" for k in columns]
        if with_size:
            cells[1:1] = ["<td>–</td>"]
            cells += ["<td>–</td>"] * 3
        lines.append(f"<tr><td>real rows (floor)</td>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _cell(row: Mapping[str, float | None], errors: Mapping[str, float | None], name: str, column: str) -> str:
    value = row.get(name)
    known = {k: v for k, v in row.items() if v is not None and k != "floor"}
    if value is None:
        return '<td class="rest">–</td>'
    score = (lambda v: abs(v - 0.5)) if column == "two_sample_auc" else (lambda v: v)
    best = score(value) <= min(map(score, known.values()))
    error = errors.get(name)
    small = f" <small>± {_number(error)}</small>" if error is not None else ""
    return f'<td class="{"best" if best else "rest"}">{_number(value)}{small}</td>'


def _middle(deciles: Sequence[float | None]) -> float | None:
    """The mean of the two deciles around u = 0.5."""
    low, high = deciles[4], deciles[5]
    return None if low is None or high is None else (low + high) / 2


def _about(methods: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A method's size and seconds; for the autoencoders, the size of one and the total seconds of both."""
    if name != "sae":
        return methods.get(name, {})
    plain, noised = methods["sae_plain"], methods["sae_noised"]
    return plain | {"seconds": plain["seconds"] + noised["seconds"]}


def _label(summary: Mapping[str, Any], name: str, label: str) -> str:
    methods = summary["methods"]
    if name == "mixture":
        return f"mixture of {methods['mixture']['components']:,}"
    if name == "factor_analysers":
        about = methods["factor_analysers"]
        return f"{about['components']:,} factor analysers of rank {about['rank']}"
    if name == "pca":
        return f"PCA, {methods['pca']['components']} components"
    if name == "sae":
        return f"SAE, {methods['sae_plain']['latents']:,} latents, k = {methods['sae_plain']['k']}"
    if name == "sae_pretrained":
        return f"pretrained SAE, {methods['sae_pretrained']['latents']:,} latents"
    return label


def _scored(texts: Sequence[ScoredText]) -> str:
    values = sorted(t.nats_per_dim for text in texts for t in text.tokens if t.nats_per_dim is not None)
    parts = ["<h2>Text scored through the endpoint</h2>"]
    for text in texts:
        found = [t.nats_per_dim for t in text.tokens if t.nats_per_dim is not None]
        mean = f", {sum(found) / len(found):.3f} nats/dim on average" if found else ""
        spans = "".join(_span(token, values) for token in text.tokens)
        parts.append(f'<h3>{escape(text.title)}{mean}</h3><p class="tokens">{spans}</p>')
    parts.append(
        '<p class="soft">The redder a token, the less natural its activation under the prior, ranked among all tokens '
        "shown; hover over a token for its log-probability.</p>"
    )
    return "".join(parts)


def _span(token: ScoredToken, values: Sequence[float]) -> str:
    if token.nats_per_dim is None:
        return f'<span class="none" title="position 0 is not scored">{escape(token.text)}</span>'
    share = sum(v < token.nats_per_dim for v in values) / max(len(values) - 1, 1)
    tip = f"{token.nats_per_dim:.3f} nats/dim"
    if token.percentile is not None:
        tip += f", percentile {token.percentile:.1f}"
    return f'<span style="background: hsl(8 85% {72 + 23 * share:.0f}%)" title="{tip}">{escape(token.text)}</span>'


def _picture(out: str, name: str, caption: str) -> str:
    path = join(out, f"{name}.png")
    if not exists(path):
        return ""
    data = base64.b64encode(read_bytes(path)).decode()
    image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _inputs(summary: Mapping[str, Any]) -> str:
    shown = {k: summary["inputs"][k] for k in ("prior", "activations", "model", "layer", "d")}
    shown |= {"seconds": f"{summary['seconds']:.0f}", **summary["versions"]}
    return "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in shown.items())


def _compared(summary: Mapping[str, Any], key: str) -> str:
    """``37 % (35 to 39) below``: how the prior compares, with the 95 % interval."""
    value, interval = summary["relative"][key], summary["relative_interval"][key]
    if value is None:
        return "not known relative to"
    side, sign = ("below", -1) if value < 0 else ("above", 1)
    between = ""
    if interval is not None:
        low, high = sorted(100 * sign * end for end in interval)
        between = f" ({low:.0f} to {high:.0f})"
    return f"{100 * abs(value):.0f} %{between} {side}"


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits if abs(value) < 100 else 1}f}"


def _count(value: int | None) -> str:
    if value is None:
        return "–"
    if value < 1000:
        return str(value)
    return f"{value / 1e6:,.2f} M" if value >= 1_000_000 else f"{value / 1e3:.1f} k"
