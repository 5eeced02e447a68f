"""Write docs/reference_config.md: every key of a recipe, from the models in synthseg/config/.

    python docs/make_reference.py [--check]

``--check`` writes nothing and ends with code 1 if the file is not up to date.
"""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from synthseg.config import PretrainConfig, RunConfig, TrainConfig
from synthseg.config.finetuning import FinetuneConfig

FILE = Path(__file__).parent / "reference_config.md"
HEADER = """# Keys of a recipe

Made by `docs/make_reference.py` from `synthseg/config/`; do not edit by hand. A recipe is a YAML file with any of
these keys; what it leaves out has its default, and an unknown key is an error. `synthseg train` reads all of the first
part, `synthseg generate --config FILE` those of `generator`; `synthseg pretrain` and `synthseg finetune` have keys of
their own, [below](#keys-of-pretraining-and-fine-tuning). On the command line, `--set generator.voxel_size_mm=1` sets
one key. What the keys do together is told in [training](training.md), [generator](generator.md),
[pretraining](pretraining.md) and [downstream tasks](downstream.md).
"""
OTHERS = """
# Keys of pretraining and fine-tuning

Besides the keys that are listed here, their recipes take these of a training recipe, above, with the same meaning:
"""
SIGNS = {annotated_types.Ge: "≥", annotated_types.Gt: ">", annotated_types.Le: "≤", annotated_types.Lt: "<"}


def type_name(annotation: Any) -> str:
    """A type in words, as a YAML author sees it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if a is type(None) else type_name(a) for a in arguments)
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        return f"list of {type_name(arguments[0])}s" + bounds(arguments[0])
    if origin is tuple and len(arguments) == 2 and {type_name(a) for a in arguments} == {"number"}:
        return "range [low, high]" + bounds(arguments[0])
    if origin is tuple:
        return f"{len(arguments)} {type_name(arguments[0])}s" + bounds(arguments[0])
    if origin is dict:
        return f"{type_name(arguments[0])}: {type_name(arguments[1])}" + bounds(arguments[1])
    return {str: "text", float: "number", int: "integer", bool: "true or false"}[annotation]


def bounds(annotation: Any) -> str:
    """The bounds inside an ``Annotated`` type, such as those of each number of a list."""
    extras = typing.get_args(annotation)[1:] if typing.get_origin(annotation) is typing.Annotated else ()
    return "".join(limits(extra.metadata if isinstance(extra, FieldInfo) else [extra]) for extra in extras)


def limits(metadata: Iterable[Any]) -> str:
    """The bounds of a number, for example ``, ≥ 0, < 1``."""
    return "".join(
        f", {sign} {getattr(bound, kind.__name__.lower()):g}"
        for bound in metadata
        for kind, sign in SIGNS.items()
        if isinstance(bound, kind)
    )


def value_text(value: Any) -> str:
    """A default as YAML would have it on one line."""
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    if isinstance(value, dict):
        return f"`{{{', '.join(f'{key}: {item}' for key, item in value.items())}}}`"
    return f"`{value}`"


def section(model: type[BaseModel], path: str, title: str = "", leave_out: frozenset[str] = frozenset()) -> list[str]:
    """One table for the keys of a model, then one for each section inside it."""
    lines = ["", f"## {title or f'`{path}`'}", ""]
    if model.__doc__:
        lines += [" ".join(model.__doc__.split()), ""]
    lines += ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    inner: list[str] = []
    for name, field in model.model_fields.items():
        if name in leave_out:
            continue
        kind = field.annotation
        below = f"{path}.{name}".lstrip(".")
        item = next(iter(typing.get_args(kind)), None)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            lines.append(f"| `{name}` | section | | see `{below}` below |")
            inner += section(kind, below)
        elif isinstance(item, type) and issubclass(item, BaseModel):
            lines.append(f"| `{name}` | list of sections | none | {field.description}; see `{below}` below |")
            inner += section(item, below)
        else:
            default = "needed" if field.is_required() else value_text(field.get_default(call_default_factory=True))
            meaning = (field.description or "").replace("|", "\\|")
            lines.append(f"| `{name}` | {type_name(kind)}{limits(field.metadata)} | {default} | {meaning} |")
    return lines + inner


def unchanged(model: type[RunConfig]) -> frozenset[str]:
    """Keys that a kind of recipe shares with all others, with the same default and meaning."""
    return frozenset(
        name
        for name, field in RunConfig.model_fields.items()
        if model.model_fields[name].description == field.description
        and (model.model_fields[name].default == field.default or field.description is None)
    )


def reference() -> str:
    lines = section(TrainConfig, "", "The recipe itself")
    others: dict[str, type[RunConfig]] = {
        "A recipe for pretraining": PretrainConfig,
        "A recipe for fine-tuning": FinetuneConfig,
    }
    shared = frozenset.intersection(*(unchanged(model) for model in others.values()))
    lines += [OTHERS + ", ".join(f"`{name}`" for name in RunConfig.model_fields if name in shared) + "."]
    for title, model in others.items():
        lines += section(model, "", title, shared)
    return HEADER + "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    text = reference()
    if arguments == ["--check"]:
        current = FILE.is_file() and FILE.read_text(encoding="utf-8") == text
        print("up to date" if current else f"{FILE} is out of date; run python docs/make_reference.py")
        return 0 if current else 1
    FILE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
