"""Public label maps from a server or a folder: what is trusted, what is refused, and that nothing is half-written."""

import dataclasses
import gzip
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from synthseg.cli import run
from synthseg.errors import InputError, TemplateError
from synthseg.importing import fetch as fetching
from synthseg.importing.fetch import COLLECTIONS, Collection, Source, fetch, find_collection
from synthseg.templates import load_template, read_record
from tests.conftest import tiny_ids

RAW_SHAPE = (20, 26, 23)


def head_file(path: Path, right: int = 42) -> bytes:
    """A small whole head as NIfTI; maps differ by ``right``, the label of the right cortex."""
    ids = tiny_ids()
    ids[ids == 42] = right
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(ids, np.eye(4)), path)
    return path.read_bytes()


def raw_volume() -> tuple[np.ndarray, bytes]:
    """Ids of BrainWeb (x, y, z), and the same as its server packs them: 16 bits, x fastest, 16 times the id."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in RAW_SHAPE], indexing="ij")
    r = np.sqrt(x**2 + y**2 + z**2) + 0.1 * x
    ids = np.select([r < 0.5, r < 0.65, r < 0.75, r < 0.85, r < 0.95], [3, 2, 1, 7, 6], 0).astype(np.uint8)
    stream = bytearray()
    for k in range(RAW_SHAPE[2]):  # by hand: z slowest, then y, then x; low byte first, junk in the lowest four bits
        for j in range(RAW_SHAPE[1]):
            for i in range(RAW_SHAPE[0]):
                stream += int(16 * int(ids[i, j, k]) + (i % 16)).to_bytes(2, "little")
    return ids, bytes(stream)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """(address, folder that it serves, paths that were asked for). ``cut_*`` breaks off half way."""
    root = tmp_path / "served"
    root.mkdir()
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, directory=str(root), **kwargs)

        def do_GET(self) -> None:
            asked.append(self.path)
            if not self.path.startswith("/cut/"):
                return super().do_GET()
            content = (root / self.path.removeprefix("/cut/")).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])

        def log_message(self, *args) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", root, asked
        httpd.shutdown()
        thread.join()


@pytest.fixture
def heads(server: tuple[str, Path, list[str]]) -> Collection:
    """Three maps on the server; the checksum of the first two is known."""
    address, root, _ = server
    sums = ["", *(hashlib.sha256(head_file(root / f"head_0{n}.nii.gz", 41 + n)).hexdigest() for n in (1, 2))]
    head_file(root / "head_03.nii.gz", 49)
    return Collection(
        name="heads",
        scheme="head",
        license="terms",
        citation="somebody",
        homepage="https://example.org",
        urls=(address + "/gone/{file}", address + "/{file}"),
        maps=tuple(
            Source(f"head_0{n}", f"head_0{n}.nii.gz", f"0{n}", known) for n, known in zip((3, 1, 2), sums, strict=True)
        ),
        pattern=r"head_{subject}\.nii\.gz",
    )


def names(out: Path) -> list[str]:
    return sorted(p.name for p in out.iterdir()) if out.exists() else []


def test_known_maps_come_from_the_first_mirror_that_has_them(heads: Collection, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = fetch(heads, out)
    assert done.imported == ["head_01", "head_02"]
    assert done.left_out == ["head_03"]
    assert names(out) == ["head_01", "head_02"]  # and no downloads
    record = read_record(out / "head_02")
    assert record["sha256"] == heads.maps[2].sha256
    assert record["verified"] == "yes"
    assert record["citation"] == "somebody"
    assert record["source"] == heads.urls[1].format(file="head_02.nii.gz")
    assert "somebody" in (out / "head_02" / "SOURCE.md").read_text()
    assert "540" in record["derived"]
    assert load_template(out / "head_01").table.name == "head"


def test_fetch_goes_on_where_it_stopped(heads: Collection, server: tuple[str, Path, list[str]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    moved = server[1] / "elsewhere.nii.gz"
    (server[1] / "head_02.nii.gz").rename(moved)
    with pytest.raises(InputError, match=r"head_02.*answers 404.*run the command again"):
        fetch(heads, out)
    assert load_template(out / "head_01")
    assert not (out / "head_02").exists()
    before = (out / "head_01" / "labels.json").stat().st_mtime_ns
    moved.rename(server[1] / "head_02.nii.gz")
    server[2].clear()
    done = fetch(heads, out)
    assert (done.imported, done.present) == (["head_02"], ["head_01"])
    assert not [path for path in server[2] if "head_01" in path]
    assert (out / "head_01" / "labels.json").stat().st_mtime_ns == before


def test_a_file_downloaded_before_the_stop_is_not_asked_for_again(
    heads: Collection, server: tuple[str, Path, list[str]], tmp_path: Path
) -> None:
    downloads = tmp_path / "out" / fetching.DOWNLOADS
    downloads.mkdir(parents=True)
    (downloads / "head_01.nii.gz").write_bytes((server[1] / "head_01.nii.gz").read_bytes())
    (downloads / "head_02.nii.gz").write_bytes(b"half")  # never left by pooch, but never trusted either
    assert fetch(heads, tmp_path / "out").imported == ["head_01", "head_02"]
    assert not [path for path in server[2] if "head_01" in path]
    assert [path for path in server[2] if "head_02" in path]


def test_a_changed_file_is_refused_before_unknown_ones_are_trusted(
    heads: Collection, server: tuple[str, Path, list[str]], tmp_path: Path
) -> None:
    head_file(server[1] / "head_01.nii.gz", 53)
    with pytest.raises(InputError, match=r"head_01.*another file than the published one"):
        fetch(heads, tmp_path / "out", allow_unverified=True)
    assert not [name for name in names(tmp_path / "out") if name.startswith("head")]
    assert not [path for path in server[2] if "head_03" in path]


def test_a_download_that_breaks_off_leaves_nothing(
    heads: Collection, server: tuple[str, Path, list[str]], tmp_path: Path
) -> None:
    cut = dataclasses.replace(heads, urls=(server[0] + "/cut/{file}",))
    with pytest.raises(InputError, match=r"head_01"):
        fetch(cut, tmp_path / "out")
    assert not list((tmp_path / "out").glob("**/head*"))
    assert fetch(heads, tmp_path / "out").imported == ["head_01", "head_02"]
    assert names(tmp_path / "out") == ["head_01", "head_02"]


def test_unverified_maps_are_named_and_recorded(heads: Collection, tmp_path: Path) -> None:
    lines: list[str] = []
    done = fetch(heads, tmp_path / "out", allow_unverified=True, tell=lines.append)
    assert done.imported == ["head_01", "head_02", "head_03"]
    digest = hashlib.sha256((tmp_path / "served" / "head_03.nii.gz").read_bytes()).hexdigest()
    assert any(digest in line and "not known before" in line for line in lines)
    record = read_record(tmp_path / "out" / "head_03")
    assert record["sha256"] == digest
    assert record["verified"].startswith("no")


def test_a_mirror_of_ones_own_comes_first(
    heads: Collection, server: tuple[str, Path, list[str]], tmp_path: Path
) -> None:
    (server[1] / "copies").mkdir()
    for n in (1, 2):
        (server[1] / f"head_0{n}.nii.gz").rename(server[1] / "copies" / f"head_0{n}.nii.gz")
    fetch(heads, tmp_path / "out", mirrors=[server[0] + "/copies/"])
    assert server[2] == ["/copies/head_01.nii.gz", "/copies/head_02.nii.gz"]


def test_without_a_network_the_message_says_what_to_do(heads: Collection, tmp_path: Path) -> None:
    dead = dataclasses.replace(heads, urls=("http://127.0.0.1:9/{file}",))
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9.*no connection.*--from DIR"):
        fetch(dead, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_from_a_folder_all_are_checked_before_the_first_is_written(
    heads: Collection, server: tuple[str, Path, list[str]], tmp_path: Path
) -> None:
    clone, out = tmp_path / "clone", tmp_path / "out"
    inside = clone / "data" / "training_label_maps"
    inside.mkdir(parents=True)
    (inside / "head_01.nii.gz").write_bytes((server[1] / "head_01.nii.gz").read_bytes())
    head_file(inside / "head_02.nii.gz", 53)
    with pytest.raises(TemplateError, match=r"head_02.*sha256.*expected.*templates import"):
        fetch(heads, out, folder=clone)
    assert not out.exists()
    (inside / "head_02.nii.gz").unlink()
    done = fetch(heads, out, folder=clone)
    assert (done.imported, done.missing, done.left_out) == (["head_01"], ["head_02"], ["head_03"])
    assert server[2] == []
    assert (inside / "head_01.nii.gz").exists()
    assert names(out) == ["head_01"]


def test_a_foreign_template_is_not_taken_for_one_of_the_collection(heads: Collection, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "head_01"
    folder.mkdir(parents=True)
    (folder / "labels.json").write_text(json.dumps({"scheme": "head"}))
    with pytest.raises(TemplateError, match=r"head_01.*not from heads"):
        fetch(heads, tmp_path / "out")


@pytest.fixture
def raw(server: tuple[str, Path, list[str]]) -> Collection:
    ids, stream = raw_volume()
    (server[1] / "subject_04.bin.gz").write_bytes(gzip.compress(stream))
    affine = ((0.5, 0, 0, -5.0), (0, 0.5, 0, -6.0), (0, 0, 0.5, -7.0), (0, 0, 0, 1))
    return dataclasses.replace(
        COLLECTIONS["brainweb20"],
        urls=(server[0] + "/{file}",),
        maps=(Source("subject04", "subject_04.bin.gz", "04", hashlib.sha256(ids.tobytes(order="F")).hexdigest()),),
        affine=affine,
        raw_shape=RAW_SHAPE,
    )


def test_raw_volumes_keep_axes_and_ids(raw: Collection, tmp_path: Path) -> None:
    assert fetch(raw, tmp_path / "out").imported == ["subject04"]
    image = nib.load(tmp_path / "out" / "subject04" / "labels.nii.gz")
    labels = np.asarray(image.dataobj)
    ids, _ = raw_volume()
    for label in (1, 6, 7):
        assert (labels == label).sum() == (ids == label).sum()
        world = image.affine[:3, :3] @ np.argwhere(labels == label).mean(0) + image.affine[:3, 3]
        np.testing.assert_allclose(world, np.argwhere(ids == label).mean(0) * 0.5 + (-5, -6, -7), atol=1e-4)
    assert {"12", "13"} == set(read_record(tmp_path / "out" / "subject04")["derived"])


@pytest.mark.parametrize("name", ["subject_04.bin", "subject04_crisp_v.raws.gz", "subject04.nii.gz"])
def test_raw_volumes_from_a_folder_are_known_by_their_ids(raw: Collection, tmp_path: Path, name: str) -> None:
    ids, stream = raw_volume()
    folder = tmp_path / "in"
    folder.mkdir()
    if name.endswith("nii.gz"):
        nib.save(nib.Nifti1Image(ids, np.array(raw.affine)), folder / name)
    else:
        (folder / name).write_bytes(gzip.compress(stream) if name.endswith("gz") else stream)
    assert fetch(raw, tmp_path / "out", folder=folder).imported == ["subject04"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>busy</html>", "page of text"),
        (gzip.compress(b"x" * 999)[:-9], "damaged"),
        (gzip.compress(bytes(2 * 20 * 26 * 23)), "not the published map"),
    ],
    ids=["page", "damaged", "other"],
)
def test_what_is_no_such_volume_is_refused(raw: Collection, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "subject_04.bin.gz").write_bytes(content)
    with pytest.raises(TemplateError, match=message):
        fetch(raw, tmp_path / "out", folder=tmp_path)
    (tmp_path / "served" / "subject_04.bin.gz").write_bytes(content)
    with pytest.raises(InputError, match=message):
        fetch(raw, tmp_path / "out")
    assert not list((tmp_path / "out").glob("**/subject*"))


def test_the_collections_are_complete() -> None:
    for collection in COLLECTIONS.values():
        assert len({source.name for source in collection.maps}) == 20
        assert all(len(source.sha256) in (0, 64) for source in collection.maps)
        assert len({source.sha256 for source in collection.maps if source.sha256}) == sum(
            bool(source.sha256) for source in collection.maps
        )
    assert sum(bool(source.sha256) for source in COLLECTIONS["synthseg20"].maps) == 12
    assert sum(bool(source.sha256) for source in COLLECTIONS["brainweb20"].maps) == 6


def test_the_command(
    heads: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(COLLECTIONS, "heads", heads)
    out = tmp_path / "out"
    assert run(["templates", "fetch", "heads", "-o", str(out)]) == 0
    text = capsys.readouterr()
    assert f"2 of 3 maps in {out}" in text.out
    assert "head_03 (--allow-unverified)" in text.err
    assert "cite: somebody" in text.err
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "head_02.nii.gz").write_bytes((tmp_path / "served" / "head_02.nii.gz").read_bytes())
    assert run(["templates", "fetch", "heads", "-o", str(tmp_path / "b"), "--from", str(tmp_path / "part")]) == 1
    assert f"not in {tmp_path / 'part'}: head_01" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["synthseg2"], "did you mean 'synthseg20'"),
        (["synthseg20", "--from", "nowhere"], "nowhere: no such folder"),
        (["synthseg20", "--from", "."], "holds no file of synthseg20; expected training_seg_01.nii.gz"),
        (["synthseg20", "--mirror", "ftp:/x"], "not a web address"),
        (["synthseg20", "--from", ".", "--mirror", "http://x"], "give one of them"),
    ],
)
def test_wrong_usage_writes_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["templates", "fetch", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert names(tmp_path) == []


def test_find_collection_names_what_exists() -> None:
    with pytest.raises(InputError, match="available: synthseg20, brainweb20"):
        find_collection("oasis")


@pytest.mark.shared
@pytest.mark.slow
def test_the_known_checksums_are_those_of_the_copies(shared_dir: Path) -> None:
    for name, folder in (("synthseg20", "synthseg"), ("brainweb20", "brainweb")):
        collection = COLLECTIONS[name]
        files = fetching._find_files(collection, shared_dir / "templates" / folder)
        assert set(files) == {source.name for source in collection.maps if source.sha256}
        source = next(source for source in collection.maps if source.sha256)
        assert fetching._verified_digest(collection, source, files[source.name]) == source.sha256
