"""Sections of a configuration, and YAML in and out. An unknown key is an error that names the nearest known key."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from typing_extensions import Self

from synthseg.errors import ConfigError
from synthseg.paths import data_dir

Range = tuple[float, float]
Strength = Annotated[float, Field(ge=0)]
Length = Annotated[float, Field(gt=0)]
StrengthRange = tuple[Strength, Strength]
LengthRange = tuple[Length, Length]
Count = Annotated[int, Field(gt=0)]
Triple = tuple[Count, Count, Count]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _ranges_are_ordered(cls, value: Any, info: ValidationInfo) -> Any:
        is_list = info.field_name is not None and Ellipsis in get_args(cls.model_fields[info.field_name].annotation)
        if (
            isinstance(value, tuple)
            and len(value) == 2
            and not is_list
            and all(isinstance(v, float) for v in value)
            and value[0] > value[1]
        ):
            raise ValueError(f"a range is (low, high), got {value}")
        return value

    def at_severity(self, severity: float) -> Self:
        """These settings between mild (0) and as they are (1).

        A field that declares ``json_schema_extra={"mild": value}`` moves linearly from that value; sections inside
        follow; every other field stays.
        """
        if not 0 <= severity <= 1:
            raise ConfigError(f"severity must lie in [0, 1], got {severity}")
        changed: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            extra = field.json_schema_extra
            if isinstance(value, Section):
                changed[name] = value.at_severity(severity)
            elif isinstance(extra, dict) and "mild" in extra:
                changed[name] = _between(extra["mild"], value, severity)
        return self.model_copy(update=changed)


def _between(mild: Any, full: Any, severity: float) -> Any:
    if isinstance(full, tuple):
        return tuple(_between(m, f, severity) for m, f in zip(mild, full, strict=True))
    return (1 - severity) * mild + severity * full


S = TypeVar("S", bound=Section)


def _section(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The section that a key of another one holds, or a list of it; None if it holds a value."""
    field = model.model_fields.get(key)
    annotation = field.annotation if field else None
    annotation = next(iter(get_args(annotation)), annotation)  # that of each item of a list
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _paths_of(model: type[BaseModel], key: str) -> list[str]:
    """Where a section or those inside it have a key, with dots."""
    found = [key] if key in model.model_fields else []
    for name in model.model_fields:
        inside = _section(model, name)
        found += [f"{name}.{path}" for path in _paths_of(inside, key)] if inside is not None else []
    return found


def _hint(model: type[BaseModel], location: Sequence[Any]) -> str:
    """What may be meant by an unknown key: one of that name in another section, else the nearest in its own."""
    own, key = model, str(location[-1])
    for part in location[:-1]:
        own = _section(own, str(part)) or own  # a number is the place in a list of sections
    near = _paths_of(model, key) or difflib.get_close_matches(key, own.model_fields, n=1, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(f"'{path}'" for path in near) + "?"
    return f"known keys: {', '.join(own.model_fields)}"


def parse(model: type[S], record: Mapping[str, Any], where: str) -> S:
    """Validate a record. Raises ConfigError with every problem on one line, and the nearest key for an unknown one."""
    try:
        return model.model_validate(record)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            key = ".".join(map(str, item["loc"]))
            if item["type"] == "extra_forbidden":
                problems.append(f"unknown key '{key}', {_hint(model, item['loc'])}")
            else:
                problems.append(f"{key}: {item['msg']} (got {item['input']!r})")
        raise ConfigError(f"{where}: " + "; ".join(problems)) from None


def set_by_path(record: dict[str, Any], assignment: str) -> None:
    """Apply one ``key.sub=value`` of the command line to a record; the value is YAML, ``key.0`` an entry of a list."""
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {assignment}: expected key=value, for example --set generator.voxel_size_mm=2")
    node: Any = record
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(node, list):
            node = node[_place(node, part, assignment)]
        elif node.get(part) is None:  # not there, or a section whose keys are all left out
            node[part] = {}
            node = node[part]
        else:
            node = node[part]
        if not isinstance(node, (dict, list)):
            raise ConfigError(f"--set {assignment}: '{part}' is not a section")
    try:
        node[_place(node, last, assignment) if isinstance(node, list) else last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {assignment}: the value is not valid YAML ({' '.join(str(error).split())})") from None


def _place(entries: list[Any], part: str, assignment: str) -> int:
    """Which entry of a list a part of a key means, as the 0 of ``contrast.0.beta``."""
    if part.isdecimal() and int(part) < len(entries):
        return int(part)
    numbers = f"0 to {len(entries) - 1}" if entries else "none, it is empty"
    raise ConfigError(f"--set {assignment}: '{part}' is no entry of the list; its entries are {numbers}")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file, or of one that ships in ``pipelines/`` if only its name is given."""
    file = Path(path)
    if not file.is_file() and file.suffix == "":
        shipped = data_dir("pipelines") / f"{path}.yaml"
        file = shipped if shipped.is_file() else file
    try:
        record = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be read ({error.strerror}); give a YAML file or the name of a recipe that ships"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from None
    if record is not None and not isinstance(record, dict):
        raise ConfigError(f"{file}: expected keys and values, got {type(record).__name__}")
    return record or {}


def load_yaml(model: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """Read a YAML file (or the name of one that ships) and apply ``key=value`` overrides."""
    record = read_yaml(path)
    for assignment in overrides:
        set_by_path(record, assignment)
    return parse(model, record, str(path))


def to_yaml(config: Section) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
