"""Label tables: what the numbers in a label map mean, and how the tables relate.

A scheme is a JSON file in ``synthseg/schemes``. Its labels carry FreeSurfer or CHARM ids, names, colours, the tissue
(which decides contrast), the left/right partner, how many connected components the structure has, and the
classes of other schemes that they stand for. A label that stands for several classes of another scheme is one that
"cannot tell these apart": losses then sum the probabilities of those classes (marginal supervision).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from synthseg.errors import LabelError
from synthseg.paths import data_dir

PARENCHYMA_TISSUES = frozenset(
    {"gm", "wm", "cerebellar_gm", "brainstem", "lesion", "tumour", "oedema", "haemorrhage"}
    | {"thalamus", "pallidum", "putamen", "caudate", "accumbens", "amygdala", "hippocampus"}
)
BRAIN_TISSUES = PARENCHYMA_TISSUES | {"ventricle"}
INTRACRANIAL_TISSUES = BRAIN_TISSUES | {"csf"}
MAX_ID = 32767  # label maps are stored as int16 at most
MAX_LABELS = 256  # indices are uint8


@dataclass(frozen=True)
class Label:
    """One structure of a scheme.

    Attributes
    ----------
    id : the number in the label map (FreeSurfer, CHARM or the scheme's own).
    tissue : intensity class; labels of one tissue share their mean in realistic contrasts.
    partner : id of the same structure on the other side, or None.
    components : connected components that the structure has in a healthy head (0: any number).
    to : scheme name -> ids of that scheme that this label stands for (several: it cannot tell them apart).
    """

    id: int
    name: str
    color: tuple[int, int, int] = (128, 128, 128)
    tissue: str = "soft"
    partner: int | None = None
    components: int = 0
    to: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class LabelTable:
    """An ordered set of labels. The position of a label is its *index*, used inside networks and the generator."""

    name: str
    labels: tuple[Label, ...]
    description: str = ""

    def __post_init__(self) -> None:
        ids = [label.id for label in self.labels]
        if len(set(ids)) != len(ids):
            twice = sorted({i for i in ids if ids.count(i) > 1})
            raise LabelError(f"scheme '{self.name}' defines the ids {twice} more than once; give each label its own id")
        if not ids or ids[0] != 0:
            raise LabelError(f"scheme '{self.name}' must begin with label 0 (background)")
        names = [label.name for label in self.labels]
        if len(set(names)) != len(names):
            same = sorted({name for name in names if names.count(name) > 1})
            raise LabelError(f"scheme '{self.name}' has several labels named {same}; give each label its own name")
        for label in self.labels:
            if label.partner is not None and (label.partner not in ids or self[label.partner].partner != label.id):
                raise LabelError(
                    f"scheme '{self.name}': {label.name} ({label.id}) names {label.partner} as its left/right "
                    "partner, which does not name it in return"
                )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, label_id: int) -> Label:
        for label in self.labels:
            if label.id == label_id:
                return label
        raise LabelError(f"scheme '{self.name}' has no label {label_id}; it has {[x.id for x in self.labels]}")

    @cached_property
    def ids(self) -> np.ndarray:
        """Ids in table order, int32, shape (n_labels,)."""
        return np.array([label.id for label in self.labels], dtype=np.int32)

    @cached_property
    def index_of(self) -> dict[int, int]:
        return {int(label_id): index for index, label_id in enumerate(self.ids)}

    @cached_property
    def names(self) -> list[str]:
        return [label.name for label in self.labels]

    @cached_property
    def colors(self) -> np.ndarray:
        """RGB, uint8, shape (n_labels, 3)."""
        return np.array([label.color for label in self.labels], dtype=np.uint8)

    @cached_property
    def flip(self) -> np.ndarray:
        """Index of the left/right partner of each index (itself where there is none), int64, shape (n_labels,)."""
        return np.array([self.index_of[x.id if x.partner is None else x.partner] for x in self.labels], dtype=np.int64)

    def to_index(self, label_map: np.ndarray, where: str = "label map") -> np.ndarray:
        """Ids to indices, uint8, same shape. Raises LabelError on an id that the scheme does not have."""
        present = np.unique(label_map)
        unknown = sorted(set(present.tolist()) - set(self.index_of))
        if unknown:
            raise LabelError(
                f"{where}: ids {unknown[:10]} are not in scheme '{self.name}'; "
                "choose the scheme that the map was made with, or add them to the scheme"
            )
        lut = np.zeros(int(present.max()) + 1, dtype=np.uint8)
        for label_id in present.tolist():
            lut[label_id] = self.index_of[label_id]
        return lut[label_map]

    def groups(self, target: LabelTable) -> np.ndarray:
        """Which classes of ``target`` each label stands for, bool, shape (n_labels, n_target).

        A row with one True is an exact relation; several mean that this scheme cannot tell them apart.
        """
        out = np.zeros((len(self), len(target)), dtype=bool)
        if target.name == self.name:
            same = [(x.id, x.name) for x in self.labels] == [(x.id, x.name) for x in target.labels]
            if not same:
                raise LabelError(
                    f"two different label tables are called '{self.name}' ({len(self)} and {len(target)} labels); "
                    "give one of them another name in its scheme file"
                )
            np.fill_diagonal(out, True)
            return out
        for index, label in enumerate(self.labels):
            if target.name not in label.to:
                raise LabelError(
                    f"scheme '{self.name}' does not say what {label.name} ({label.id}) is in '{target.name}'; "
                    f"add it under 'to' in the scheme file, or train with target scheme '{self.name}'"
                )
            ids = label.to[target.name]
            unknown = [label_id for label_id in ids if label_id not in target.index_of]
            if unknown or not ids:
                raise LabelError(
                    f"scheme '{self.name}' says that {label.name} ({label.id}) is {list(ids)} of '{target.name}', "
                    f"{f'which has no {unknown}' if unknown else 'which is nothing'}; mend 'to' in the scheme file"
                )
            out[index, [target.index_of[label_id] for label_id in ids]] = True
        return out

    def mapping(self, target: LabelTable) -> np.ndarray:
        """Index of the one class of ``target`` for each label, int64, shape (n_labels,).

        Raises LabelError where a label stands for several classes.
        """
        groups = self.groups(target)
        vague = [self.labels[i].name for i in np.flatnonzero(groups.sum(1) != 1)]
        if vague:
            raise LabelError(
                f"scheme '{self.name}' cannot tell apart the classes of '{target.name}' inside {vague}; "
                "use marginal supervision (groups) instead of a one-to-one mapping"
            )
        return groups.argmax(1)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "description": self.description,
            "labels": [
                {
                    "id": x.id,
                    "name": x.name,
                    "color": list(x.color),
                    "tissue": x.tissue,
                    "partner": x.partner,
                    "components": x.components,
                    "to": {scheme: list(ids) for scheme, ids in x.to.items()},
                }
                for x in self.labels
            ],
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> LabelTable:
        labels = []
        for entry in record["labels"]:
            fields = dict(entry)
            fields["color"] = tuple(fields.get("color", (128, 128, 128)))
            fields["to"] = {scheme: tuple(ids) for scheme, ids in fields.get("to", {}).items()}
            labels.append(_checked(Label(**fields)))
        name, description = record["name"], record.get("description", "")
        if not (_is_name(name) and isinstance(description, str)):
            raise LabelError(f"a scheme has the name {name!r:.60}; expected plain text without '/' or '\\'")
        return cls(name, tuple(labels), description)


def _is_name(text: object) -> bool:
    """Whether this can stand in a table, on a terminal and in a file name as it is."""
    if not (isinstance(text, str) and 0 < len(text) <= 100):
        return False
    return text.isprintable() and not set(text) & set("/\\") and not text.startswith((".", " "))


def _is_id(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number <= MAX_ID


def _checked(label: Label) -> Label:
    """The label, if every field is what it should be: a scheme may come with a file of weights, from anywhere."""
    numbers = [*([] if label.partner is None else [label.partner]), *(i for ids in label.to.values() for i in ids)]
    problems = {
        f"id {label.id!r:.30} (expected 0 to {MAX_ID})": not _is_id(label.id),
        f"name {label.name!r:.60} (expected plain text without '/' or '\\')": not _is_name(label.name),
        f"colour {label.color!r:.60} (expected three numbers from 0 to 255)": not (
            len(label.color) == 3 and all(_is_id(c) and c <= 255 for c in label.color)
        ),
        f"tissue {label.tissue!r:.60} (expected its name)": not _is_name(label.tissue),
        f"components {label.components!r:.30} (expected a number)": not _is_id(label.components),
        "a partner or a relation to something that is no id": not all(_is_id(i) for i in numbers),
        "a relation to a scheme without a name": not all(_is_name(scheme) for scheme in label.to),
    }
    for problem, found in problems.items():
        if found:
            raise LabelError(f"a label of the scheme has {problem}; mend the scheme file")
    return label


def tissue_mask(table: LabelTable, tissues: Collection[str]) -> np.ndarray:
    """Which labels of the table are of these tissues, bool (n_labels,)."""
    return np.array([label.tissue in tissues for label in table.labels], dtype=bool)


def available_schemes() -> list[str]:
    """Names of the schemes that ship."""
    return sorted(path.stem for path in data_dir("schemes").glob("*.json"))


def load_scheme(name: str | Path) -> LabelTable:
    """A scheme by name (``siam16``, ``head``, ``brainweb``) or from a JSON file. Raises LabelError if there is none."""
    path = Path(name)
    if path.suffix != ".json":
        path = data_dir("schemes") / f"{name}.json"
        if not path.is_file():
            known = available_schemes()
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known schemes: {', '.join(known)}"
            raise LabelError(f"there is no label scheme '{name}'; {hint}")
    try:
        return LabelTable.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LabelError(f"{path}: not a label scheme ({error}); see schemes/siam16.json for the format") from error
