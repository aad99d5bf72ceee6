"""``dmm VERB``: each verb is a pydantic model, filled from ``--config`` and flags, and a function that takes it."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import re
import signal
import sys
from typing import Any, NamedTuple, NoReturn

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from dmm_ray.config import Config, load_yaml, one_line
from dmm_ray.errors import CheckFailed, UserError
from dmm_ray.failures import Failure, keep_trace
from dmm_ray.ray_session import quiet

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


class Verb(NamedTuple):
    """Where a verb is defined; its module is imported only when the verb is called."""

    module: str
    config: str
    function: str
    about: str
    positional: tuple[str, ...] = ()
    """Fields that may be given positionally, in this order, before the flags."""
    memory_options: str = ""
    """Options that reduce memory use, suggested in the error line when memory runs out."""


VERBS = {
    "demo": Verb(
        "dmm_ray.demo.run", "DemoConfig", "demo", "text -> activations -> prior -> report -> endpoint"
    ),
    "extract": Verb(
        "dmm_ray.extraction.extract",
        "ExtractConfig",
        "extract",
        "write an activation store",
        memory_options="--batch-tokens or --rows-per-shard",
    ),
    "train": Verb(
        "dmm_ray.training.train",
        "TrainConfig",
        "train",
        "train a prior on a store",
        memory_options="--micro-batch",
    ),
    "evaluate": Verb(
        "dmm_ray.evaluation.evaluate",
        "EvaluateConfig",
        "evaluate",
        "compare a prior with baselines",
        memory_options="--max-rows or --train-rows",
    ),
    "scaling": Verb(
        "dmm_ray.scaling.run", "ScalingConfig", "scaling", "fit a scaling law to priors of several sizes"
    ),
    "score": Verb(
        "dmm_ray.batch.verbs", "ScoreConfig", "score", "log-likelihood of each row of a store or text"
    ),
    "denoise": Verb(
        "dmm_ray.batch.verbs", "DenoiseConfig", "denoise", "move a store's rows to nearby natural ones"
    ),
    "encode": Verb(
        "dmm_ray.batch.verbs", "EncodeConfig", "encode", "the prior's hidden units for a store's rows"
    ),
    "sample": Verb("dmm_ray.batch.verbs", "SampleConfig", "sample", "draw activations from a prior"),
    "import-glp": Verb(
        "dmm_ray.training.published",
        "ImportConfig",
        "import_and_calibrate",
        "convert a published prior to this package's format",
        ("source", "out"),
    ),
    "export-glp": Verb(
        "dmm_ray.prior.glp_verbs",
        "ExportGlpConfig",
        "export_glp",
        "convert a prior to the published format",
        ("prior", "out"),
    ),
    "serve": Verb(
        "dmm_ray.serving.serve",
        "ServeConfig",
        "serve",
        "serve a prior for activations and texts over HTTP",
    ),
    "verify": Verb(
        "dmm_ray.extraction.verify",
        "VerifyConfig",
        "verify",
        "check a store against its records",
        ("store",),
    ),
    "info": Verb("dmm_ray.store.info", "InfoConfig", "info", "describe a store", ("store",)),
}


def usage() -> str:
    """The text that ``dmm --help`` prints."""
    lines = [f"  {name:<11} {verb.about}" for name, verb in VERBS.items()]
    return (
        "usage: dmm VERB [--config file.yaml] [--field value ...]\n\n"
        + "\n".join(lines)
        + "\n\ndmm VERB --help lists the fields of a verb\n"
    )


def parse(name: str, args: list[str]) -> tuple[Verb, Config]:
    """The verb and its configuration, from a ``--config`` file and from flags, which take precedence.

    Raises:
        UserError: unknown verb or field, invalid value, missing or damaged file.
    """
    if name not in VERBS:
        raise UserError(f"{name}: no such verb; one of {', '.join(VERBS)}")
    verb = VERBS[name]
    model = getattr(importlib.import_module(verb.module), verb.config)
    rest, defaults = _config_file([_one_dash(arg) for arg in args])
    return verb, build(model, f"dmm {name}", _named(verb.positional, rest), defaults)


def _one_dash(arg: str) -> str:
    """``--u`` as ``-u``, the only spelling the parser accepts for a one-letter field."""
    return arg[1:] if re.fullmatch(r"--[a-z](=.*)?", arg, re.DOTALL) else arg


def _named(fields: tuple[str, ...], args: list[str]) -> list[str]:
    """``args`` with the leading positional values turned into flags for ``fields``."""
    named: list[str] = []
    for field, value in zip(fields, args, strict=False):
        if value.startswith("-"):
            break
        named += [f"--{field}", value]
    return named + args[len(named) // 2 :]


def build(
    model: type[Config], program: str, args: list[str], defaults: dict[str, Any] | None = None
) -> Config:
    """An instance of ``model`` from command-line flags over ``defaults``; ``--help`` prints its fields and exits.

    Raises:
        UserError: unknown flag, invalid value, or missing required field.
    """

    class Flags(model, BaseSettings):  # type: ignore[misc, valid-type]
        model_config = SettingsConfigDict(
            cli_prog_name=program,
            cli_kebab_case=True,
            cli_implicit_flags=True,
            cli_avoid_json=True,
            cli_enforce_required=False,
        )

        @classmethod
        def settings_customise_sources(  # type: ignore[override]
            cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **_: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (init_settings,)  # flags take precedence anyway; the environment is not read

    Flags.__doc__ = model.__doc__
    complaint, shown = io.StringIO(), io.StringIO()
    try:
        nested = [_nested(model, arg) for arg in args]
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(shown):
            found = CliApp.run(Flags, cli_args=nested, **model.nest(defaults or {}))
    except ValidationError as e:
        raise UserError(one_line(e, model)) from e
    except SettingsError as e:
        raise UserError(
            f"{' '.join(str(e).split())}; write a list or mapping as JSON: '[1, 2]', '{{\"key\": \"value\"}}'"
        ) from e
    except SystemExit as e:
        if e.code:
            raise UserError(
                _flat(model, complaint.getvalue().strip().rpartition("error: ")[2])
                + "; --help lists the fields"
            ) from e
        sys.stdout.write(_flat(model, shown.getvalue()))
        raise
    return model.model_validate(found.model_dump())  # as a plain `model`, not its subclass Flags


def _nested(model: type[Config], arg: str) -> str:
    """``--lr`` as ``--optimizer.lr``, ``--d_model`` as ``--network.d-model``: the spelling that the parser accepts."""
    match = re.fullmatch(r"--(no-)?([a-z][a-z0-9_-]*)(=.*)?", arg, re.DOTALL)
    if match is None:
        return arg
    negation, name, value = match[1] or "", match[2].replace("_", "-"), match[3] or ""
    group = model.owners().get(name.replace("-", "_"))
    return f"--{negation}{group}.{name}{value}" if group else f"--{negation}{name}{value}"


def _flat(model: type[Config], text: str) -> str:
    """The parser's output with ``--lr`` in place of ``--optimizer.lr``."""
    groups = "|".join(model.groups())
    return re.sub(rf"--(no-)?(?:{groups})\.", r"--\1", text) if groups else text


def main(argv: list[str] | None = None) -> NoReturn:
    """Entry point: run a verb, print its output folder as the last line on stdout, exit with a documented code."""
    args = sys.argv[1:] if argv is None else argv
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("dmm_ray").setLevel(os.environ.get("DMM_LOG_LEVEL", "INFO"))
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        sys.exit(DONE if args else BAD_INPUT)
    quiet()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a terminated command ends as after Ctrl-C
    try:
        verb, config = parse(args[0], args[1:])
        function = getattr(importlib.import_module(verb.module), verb.function)
        sys.stdout.write(f"{function(config)}\n")
    except UserError as e:
        _fail(BAD_INPUT, args[0], str(e))
    except CheckFailed as e:
        _fail(FAILED, args[0], str(e))
    except KeyboardInterrupt:
        _fail(INTERRUPTED, args[0], "interrupted; the same command resumes")
    except Exception as e:  # noqa: BLE001 - the full traceback is kept in a file
        failure = Failure.of(e, VERBS[args[0]].memory_options)
        _fail(FAILED, args[0], f"{failure.cause}; {keep_trace(args[0], failure.trace)}")
    sys.exit(DONE)


def _fail(code: int, name: str, message: str) -> NoReturn:
    sys.stderr.write(f"dmm {name}: {' '.join(message.split())}\n")
    sys.exit(code)


def _config_file(args: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Remove ``--config FILE`` from the flags and load the file."""
    for i, arg in enumerate(args):
        if arg == "--config":
            if i + 1 == len(args):
                raise UserError("--config: no value; give the path of a YAML file")
            return args[:i] + args[i + 2 :], load_yaml(args[i + 1])
        if arg.startswith("--config="):
            return args[:i] + args[i + 1 :], load_yaml(arg.removeprefix("--config="))
    return args, {}
