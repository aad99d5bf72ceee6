"""A prior's model card: the README.md uploaded with it to the Hugging Face Hub."""

from __future__ import annotations

from string import Template
from typing import Any

import httpx
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from dmm_ray.errors import UserError
from dmm_ray.prior.config import PriorConfig

TAGS = ("interpretability", "activations", "diffusion", "flow-matching", "generative-latent-prior")
LICENCE_FIELDS = ("license", "license_name", "license_link")
BODY = Template("""
# $title

A diffusion meta-model of the activations of $subject, trained by flow matching on the outputs of $layers, one
activation per token, without context. It estimates how likely an activation is (`log_prob`), moves an edited one back
towards natural ones (`denoise`), draws new ones (`sample`), and exposes its hidden units (`encode`).

## Use
```python
from dmm_ray import ActivationPrior
prior = ActivationPrior.from_pretrained("$repo")
score = prior.log_prob(x$argument)  # x: (n, $d) raw activations
```
It loads with the Python package dmm-ray. `config.json` records the model, documents and seed it was trained with.

## What it is
| | |
|---|---|
$facts

## Training
| | |
|---|---|
$training

## Limits
- It models activations of the language model, layer and kind of text it was trained on; it says little about others.
- Unless its training says otherwise, it has seen no document's first token.
- A high likelihood means a common activation, not a true or harmless one; rows scaled towards the mean look likely.

## Licence
Activations carry what the language model has learnt, so this prior comes under the licence of its subject, `$license`.
""")


def subject_licence(subject: str, token: str | None = None) -> dict[str, str]:
    """The licence fields of a model's card on the Hugging Face Hub; empty if unavailable."""
    try:
        card = HfApi(token=token).model_info(subject).card_data
    except (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError):
        return {}
    known = card.to_dict() if card is not None else {}
    return {name: str(known[name]) for name in LICENCE_FIELDS if known.get(name)}


def hub_subject(config: PriorConfig) -> str | None:
    """The Hub id of the language model; None if it was a local folder or is unknown."""
    name = str(config.subject.get("id") or "")
    return name if name and not name.startswith(("/", ".", "~")) and "://" not in name else None


def licence(config: PriorConfig, given: str | None, token: str | None = None) -> dict[str, str]:
    """The licence fields of a prior's card: ``given``, or those of its subject on the Hub.

    Raises:
        UserError: none given and none found.
    """
    if given:
        return {"license": given}
    subject = hub_subject(config)
    found = subject_licence(subject, token) if subject else {}
    if "license" not in found:
        raise UserError(
            f"license: the licence of {subject or 'the subject, a model not from the Hub,'} could not be looked up; "
            "give license=, for example license='apache-2.0'"
        )
    return found


def render(
    config: PriorConfig, repo: str, licence_fields: dict[str, str], figures: dict[str, Any], parameters: int
) -> str:
    """Render the card.

    Args:
        config: the prior's configuration.
        repo: its Hub id.
        licence_fields: as returned by :func:`licence`.
        figures: metrics from the end of training, by name; may be empty.
        parameters: the network's parameter count.
    """
    subject = hub_subject(config)
    front: dict[str, Any] = {**licence_fields, "library_name": "dmm-ray", "tags": list(TAGS)}
    if subject:
        front["base_model"] = subject
    body = BODY.substitute(
        title=repo.split("/")[-1],
        subject=f"`{subject}`" if subject else "a language model that is not on the Hub",
        layers=_layers(config),
        repo=repo,
        argument="" if len(config.layers) == 1 else f", layer={config.layers[0]}",
        d=config.d,
        facts=_rows(_facts(config, parameters)),
        training=_rows(_training(config) | figures or {"not recorded": ""}),
        license=licence_fields.get("license_name", licence_fields["license"]),
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n{body.lstrip()}"


def _layers(config: PriorConfig) -> str:
    numbers = ", ".join(map(str, config.layers))
    return f"{'block' if len(config.layers) == 1 else 'blocks'} {numbers} (counted from 0)"


def _facts(config: PriorConfig, parameters: int) -> dict[str, Any]:
    return {
        "subject": hub_subject(config) or "not on the Hub",
        "subject's revision": config.subject.get("revision") or "not recorded",
        "layers": _layers(config),
        "width of an activation": config.d,
        "network": f"{config.n_blocks} gated blocks, d_model {config.d_model}, d_mlp {config.d_mlp}",
        "base": config.base,
        "parameters": f"{parameters:,}",
        "variance floor": f"{config.variance_floor:.3g}",
    }


def _training(config: PriorConfig) -> dict[str, Any]:
    split = ", ".join(f"{name} {value}" for name, value in config.split.items())
    return config.training | ({"documents' split": split} if split else {})


def _rows(values: dict[str, Any]) -> str:
    """Lines of a two-column Markdown table."""
    return "\n".join(f"| {name} | {_cell(value)} |" for name, value in values.items())


def _cell(value: object) -> str:
    text = f"{value:,}" if type(value) is int else f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())
