"""A weights file from anywhere runs no code, asks for no memory on its word, and ends in one CheckpointError."""

from __future__ import annotations

import ast
import copy
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from synthseg.config import TrainConfig, parse
from synthseg.errors import CheckpointError
from synthseg.labels import load_scheme
from synthseg.networks.backbone import SegmentationNetwork
from synthseg.networks.checkpoint import load_model, read_tensors, save_model

ROOT = Path(__file__).resolve().parents[1]
CONFIG = parse(
    TrainConfig,
    {
        "generator": {"shape": [16, 24, 32], "voxel_size_mm": 1.5},
        "network": {"channels": [4, 8, 12], "norm": "batch"},
    },
    "test",
)
LABELS = load_scheme("siam16")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "good.safetensors"
    save_model(file, SegmentationNetwork(CONFIG.network, len(LABELS)), CONFIG, LABELS, {"steps": 7})
    return file


@pytest.fixture
def record(good: Path) -> dict[str, Any]:
    return read_tensors(good)[1]


def refused(path: Path) -> str:
    """The message with which a file is refused: one line that names it and can be shown on any terminal."""
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < len(str(path)) + 600
    return message


def safetensors_bytes(header: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + body


def with_record(path: Path, good: Path, record: Any) -> Path:
    """The tensors of a good file under another record."""
    text = record if isinstance(record, str) else json.dumps(record)
    path.write_bytes(save(load_file(good), {"record": text}))
    return path


# ------------------------------------------------------------------------------------------- no code is run


class Touch:
    """Unpickled, makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def code_carriers() -> dict[str, Callable[[Path, Path], None]]:
    """Each entry writes a file that makes ``ran`` if whoever reads it unpickles it."""

    def torch_zip(path: Path, ran: Path) -> None:
        torch.save({"weights": Touch(ran)}, path)

    def torch_legacy(path: Path, ran: Path) -> None:
        torch.save({"weights": Touch(ran)}, path, _use_new_zipfile_serialization=False)

    def numpy_object(path: Path, ran: Path) -> None:
        buffer = io.BytesIO()
        np.save(buffer, np.array([Touch(ran)], dtype=object), allow_pickle=True)
        path.write_bytes(buffer.getvalue())

    def after_the_header(path: Path, ran: Path) -> None:
        content = pickle.dumps(Touch(ran))
        header = {"a": {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}}
        header["__metadata__"] = {"record": json.dumps({"format": "synthseg-model-1", "config": content.hex()})}
        path.write_bytes(safetensors_bytes(json.dumps(header).encode(), content))

    def in_the_record(path: Path, ran: Path) -> None:
        yaml = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{ran}']]"
        entry = {"format": "synthseg-model-1", "config": yaml, "labels": yaml}
        path.write_bytes(save({"a": torch.zeros(1)}, {"record": json.dumps(entry)}))

    return {
        "pickle": lambda path, ran: path.write_bytes(pickle.dumps(Touch(ran))) and None,
        "pickle, protocol 0": lambda path, ran: path.write_bytes(pickle.dumps(Touch(ran), protocol=0)) and None,
        "torch.save": torch_zip,
        "torch.save, old": torch_legacy,
        "numpy object array": numpy_object,
        "pickle as a tensor": after_the_header,
        "YAML in the record": in_the_record,
    }


CARRIERS = code_carriers()

WATCHED = """
import sys
from synthseg.networks.checkpoint import load_model
from synthseg.errors import CheckpointError
import torch, monai.networks.nets  # what loading imports, before anything is watched
FORBIDDEN = ("pickle.find_class", "marshal.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.",
             "socket.", "ctypes.dlopen", "os.remove", "os.rename", "os.mkdir", "shutil.")
def watch(event, arguments):
    if event == "compile" and arguments[1] not in (None, "<unknown>") or event.startswith(FORBIDDEN):
        raise SystemExit(f"FORBIDDEN {event} {arguments}")
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        raise SystemExit(f"FORBIDDEN {event} {arguments}")
try:
    load_model(sys.argv[1])
except CheckpointError:
    pass
sys.addaudithook(watch)
for name in sys.argv[1:]:
    try:
        load_model(name)
        print("loaded", flush=True)
    except CheckpointError as error:
        print("refused", flush=True)
"""


def test_no_file_makes_the_loader_unpickle_write_connect_or_start_anything(good: Path, tmp_path: Path) -> None:
    """Watched by the interpreter's own audit events, in a process of its own."""
    ran = tmp_path / "ran"
    files = []
    for index, write in enumerate(CARRIERS.values()):
        files.append(tmp_path / f"{index}.safetensors")
        write(files[-1], ran)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(good), *map(str, files)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["loaded", *["refused"] * len(files)]
    assert not ran.exists()


@pytest.mark.parametrize("kind", CARRIERS)
def test_files_that_carry_code_are_refused(kind: str, tmp_path: Path) -> None:
    ran, path = tmp_path / "ran", tmp_path / "model.safetensors"
    CARRIERS[kind](path, ran)
    refused(path)
    assert not ran.exists()


def test_nothing_in_the_package_can_unpickle() -> None:
    forbidden_calls = {("torch", "load"), ("yaml", "load"), ("yaml", "unsafe_load"), ("np", "load"), ("numpy", "load")}
    for path in sorted((ROOT / "synthseg").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.split(".")[0] for alias in node.names}
                names |= {(node.module or "").split(".")[0]} if isinstance(node, ast.ImportFrom) else set()
                assert not names & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec", "compile", "__import__"}, path
            attribute = node.func if isinstance(node, ast.Call) else None
            if isinstance(attribute, ast.Attribute) and isinstance(attribute.value, ast.Name):
                assert (attribute.value.id, attribute.attr) not in forbidden_calls, path


# ------------------------------------------------------------------------------------- size and structure


def structures() -> dict[str, bytes]:
    """Contents that are no weights, or promise what is not there."""
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    big = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
    deep = b'{"__metadata__":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}"
    return {
        "zip bomb": bomb.getvalue(),
        "header of 4 EB": safetensors_bytes(b"{}", length=2**62),
        "header of 100 MB that is not there": safetensors_bytes(b"{}", length=100_000_000),
        "negative length": b"\xff" * 8 + b"{}",
        "tensor of 4 TB": safetensors_bytes(json.dumps({"a": big, "__metadata__": {"record": "{}"}}).encode()),
        "deep header": safetensors_bytes(deep),
        "overlapping tensors": safetensors_bytes(
            json.dumps({n: {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]} for n in "ab"}).encode(), bytes(8)
        ),
        "offsets backwards": safetensors_bytes(b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[8,0]}}', bytes(8)),
        "shape that overflows": safetensors_bytes(
            json.dumps({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}).encode(), bytes(4)
        ),
        "not UTF-8": safetensors_bytes(b'{"\xff\xfe":{}}'),
        "NUL bytes": bytes(1000),
        "empty": b"",
    }


STRUCTURES = structures()


@pytest.mark.parametrize("kind", STRUCTURES)
def test_broken_structures_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(STRUCTURES[kind])
    refused(path)


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("pipe", "loop", "folder"):
        with pytest.raises(CheckpointError):
            load_model(tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError):
        load_model("x" * 5000)


# ----------------------------------------------------------------------------------------------- the record


def records() -> dict[str, Callable[[dict[str, Any]], Any]]:
    """Changes to a good record that must be refused."""

    def network(**changes: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda record: record["config"]["network"].update(changes)

    def generator(**changes: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda record: record["config"]["generator"].update(changes)

    def label(**changes: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda record: record["labels"]["labels"][3].update(changes)

    return {
        "network of petabytes": network(channels=[2**20, 2**21, 2**22]),
        "channels beyond 64 bits": network(channels=[2**70, 2**71, 2**72]),
        "a thousand levels": network(channels=[4] * 1000),
        "unet that does not fit": network(architecture="unet"),
        "segresnet that does not fit": network(architecture="segresnet", channels=[4, 8, 16]),
        "window of petabytes": generator(shape=[10**5, 10**5, 10**5]),
        "voxels of a nanometre": generator(voxel_size_mm=1e-6),
        "voxels of a metre": generator(voxel_size_mm=1000.0),
        "path as a label": label(name="../../../../tmp/x"),
        "backslashes in a label": label(name="..\\..\\x"),
        "hidden label": label(name=".bashrc"),
        "terminal codes in a label": label(name="\x1b]0;title\x07\x1b[2J"),
        "line break in a label": label(name="GM\n7 Skull"),
        "label of a megabyte": label(name="x" * 10**6),
        "no name": label(name=""),
        "number as a name": label(name=7),
        "same name twice": label(name="Background"),
        "same id twice": label(id=1),
        "negative id": label(id=-1),
        "id beyond 16 bits": label(id=40000),
        "id beyond 64 bits": label(id=2**80),
        "text as an id": label(id="3"),
        "fraction as an id": label(id=3.5),
        "truth as an id": label(id=True),
        "colour beyond 255": label(color=[300, 0, 0]),
        "colour of two": label(color=[3, 0]),
        "text as a colour": label(color="red"),
        "components of text": label(components="many"),
        "unknown key of a label": label(hook="os.system"),
        "partner that is not there": label(partner=999),
        "relation to text": label(to={"head": ["a"]}),
        "relation to a path": label(to={"../x": [1]}),
        "labels as text": lambda record: record.update(labels="labels"),
        "labels of labels": lambda record: record.update(labels={"name": "x", "labels": [[1, 2]]}),
        "scheme as a path": lambda record: record["labels"].update(name="../../etc"),
        "scheme as a list": lambda record: record["labels"].update(name=["siam16"]),
        "one label only": lambda record: record["labels"].update(labels=record["labels"]["labels"][:1]),
        "too few labels": lambda record: record["labels"].update(labels=record["labels"]["labels"][:5]),
        "terminal codes in an unknown key": lambda record: record["config"].update({"\x1b[2J\x07": 1}),
        "key of a megabyte": lambda record: record["config"].update({"k" * 10**6: 1}),
        "format of a megabyte": lambda record: record.update(format="f" * 10**6),
        "infinite voxel size": generator(voxel_size_mm=float("inf")),
        "voxel size that is no number": generator(voxel_size_mm=float("nan")),
    }


RECORDS = records()


@pytest.mark.parametrize("kind", RECORDS)
def test_records_that_ask_for_too_much_or_lie_are_refused(
    kind: str, good: Path, record: dict[str, Any], tmp_path: Path
) -> None:
    changed = copy.deepcopy(record)
    RECORDS[kind](changed)
    assert changed != record
    refused(with_record(tmp_path / "model.safetensors", good, changed))


def test_no_memory_is_asked_for_on_the_word_of_a_record(good: Path, record: dict[str, Any], tmp_path: Path) -> None:
    """A network of 9 GB, in a process that may have little more than it has already."""
    record["config"]["network"]["channels"] = [32, 512, 16384]
    path = with_record(tmp_path / "model.safetensors", good, record)
    code = (
        "import resource, sys\n"
        "from synthseg.networks.checkpoint import load_model\n"
        "from synthseg.errors import CheckpointError\n"
        "load_model(sys.argv[1])\n"  # imports everything
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))\n"
        "try:\n    load_model(sys.argv[2])\n"
        "except CheckpointError as error:\n    print(error)\n"
    )
    if not Path("/proc/self/statm").exists():
        pytest.skip("memory is limited by the size in /proc, which is not there")
    done = subprocess.run(
        [sys.executable, "-c", code, str(good), str(path)], capture_output=True, text=True, timeout=240
    )
    assert "has shape" in done.stdout, done.stderr[-2000:]
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 6e6  # kB


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000 + "]" * 100_000,
        '{"format":' + "9" * 50_000 + "}",
        '{"format": 1e999}',
        "null",
        "NaN",
        '"\\ud800"',
        "",
    ],
    ids=["deep", "long number", "infinite", "null", "NaN", "half a character", "empty"],
)
def test_records_that_are_odd_json_are_refused(text: str, good: Path, tmp_path: Path) -> None:
    refused(with_record(tmp_path / "model.safetensors", good, text))


def test_a_record_of_many_megabytes_is_refused(good: Path, tmp_path: Path) -> None:
    text = json.dumps({"format": "x" * (33 * 2**20)})
    assert "characters" in refused(with_record(tmp_path / "model.safetensors", good, text))


def _paths(node: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [prefix] * bool(prefix) + [path for key, value in items for path in _paths(value, (*prefix, key))]


ODD = [None, True, -1, 0, 3, 1e308, 2**70, "", "x", "\x1b[2J", [], {}, [[]], [1, 2, 3], {"a": 1}, "9" * 400]


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_value_anywhere_in_the_record_loads_or_is_refused(data: Any, good: Path, tmp_path: Path) -> None:
    record = read_tensors(good)[1]
    # Not each of the many numbers of the generator: only what a network is built from.
    parts = [
        path for path in _paths(record) if path[0] != "config" or len(path) == 1 or path[1] in ("network", "scheme")
    ]
    *parents, last = data.draw(
        st.sampled_from([*parts, ("config", "generator", "shape"), ("config", "generator", "shape", 1)])
    )
    node = record
    for key in parents:
        node = node[key]
    node[last] = data.draw(st.sampled_from(ODD))
    path = with_record(tmp_path / "model.safetensors", good, record)
    message = ""
    try:
        model = load_model(path)
    except CheckpointError as error:
        message = str(error)
    if message:
        assert message.startswith(f"{path}: ")
        assert message.isprintable()
    else:
        assert model.labels.colors.shape == (len(LABELS), 3)
        assert all(name.isprintable() for name in model.labels.names)


# ---------------------------------------------------------------------------------------------- the tensors


def tensors() -> dict[str, Callable[[dict[str, torch.Tensor]], Any]]:
    """Changes to good tensors that must be refused."""

    def set_to(value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
        return lambda weights: (
            next(w for k, w in sorted(weights.items()) if k.endswith("weight")).view(-1)[3:4].fill_(value)
        )

    def first(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], Any]:
        def apply(weights: dict[str, torch.Tensor]) -> None:
            name = next(k for k in sorted(weights) if k.endswith("weight") and weights[k].ndim == 5)
            weights[name] = change(weights[name]).contiguous()

        return apply

    def variance(weights: dict[str, torch.Tensor]) -> None:
        next(w for k, w in sorted(weights.items()) if k.endswith("running_var")).neg_()

    return {
        "NaN": set_to(float("nan")),
        "infinity": set_to(float("inf")),
        "beyond float32": first(lambda w: w.double() * 1e300),
        "negative variance": variance,
        "one too many": lambda weights: weights.update(extra=torch.zeros(3)),
        "one too few": lambda weights: weights.pop(sorted(weights)[0]),
        "name as a path": lambda weights: weights.update({"../../x": weights.pop(sorted(weights)[0])}),
        "terminal codes in a name": lambda weights: weights.update({"\x1b[2J\x07": torch.zeros(1)}),
        "name of a megabyte": lambda weights: weights.update({"x" * 10**6: torch.zeros(1)}),
        "turned": first(lambda w: w.transpose(0, 1)),
        "flat": first(lambda w: w.flatten()),
        "scalar": first(lambda w: w.flatten()[0]),
        "empty": first(lambda w: w[:0]),
        "whole numbers": first(lambda w: w.to(torch.int32)),
        "complex numbers": first(lambda w: w.to(torch.complex64)),
        "truth values": first(lambda w: w.to(torch.bool)),
        "8 bits": first(lambda w: w.float().to(torch.float8_e4m3fn)),
    }


TENSORS = tensors()


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_do_not_fit_or_compute_nothing_are_refused(kind: str, good: Path, tmp_path: Path) -> None:
    weights, record = read_tensors(good)
    TENSORS[kind](weights)
    path = tmp_path / "model.safetensors"
    save_file(weights, path, {"record": json.dumps(record)})
    refused(path)


def test_other_precisions_are_taken(good: Path, tmp_path: Path) -> None:
    weights, record = read_tensors(good)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        changed = {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}
        save_file(changed, tmp_path / "model.safetensors", {"record": json.dumps(record)})
        model = load_model(tmp_path / "model.safetensors")
        assert {p.dtype for p in model.network.parameters()} == {torch.float32}
        assert all(p.device.type == "cpu" for p in model.network.parameters())
