"""Which scans a user means by files, folders, patterns and lists."""

import io
from pathlib import Path

import pytest

from synthseg.errors import InputError
from synthseg.inputs import Scan, find_scans, is_own_output, read_list


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (
        *("b.nii.gz", "a.NII", "c.mgz", "c.mgh", "d.nii", "notes.txt", ".hidden.nii.gz", "._a.nii"),
        *("b_seg.nii.gz", "b_mask.nii.gz", "b_stripped.nii.gz", "b_posteriors.nii.gz", "b_resampled.nii.gz"),
        *("e_mask.nii.gz", "_mask.nii.gz", "sub/x.nii.gz", "sub/deep/y.nii.gz", "[1].nii.gz"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.nii").mkdir()
    return tmp_path


def names(scans: list[Scan]) -> list[str]:
    return [scan.path.name for scan in scans]


def test_a_folder_gives_its_scans_in_order_and_no_outputs(folder: Path) -> None:
    scans = find_scans([folder])
    assert names(scans) == [
        *("[1].nii.gz", "_mask.nii.gz", "a.NII", "b.nii.gz", "c.mgh", "c.mgz", "d.nii", "e_mask.nii.gz")
    ]
    assert not any(scan.named for scan in scans)


def test_a_pattern_gives_what_matches(folder: Path) -> None:
    assert names(find_scans([str(folder / "b*")])) == ["b.nii.gz"]
    assert names(find_scans([folder / "[ad].*"])) == ["a.NII", "d.nii"]
    assert names(find_scans([folder / "*" / "*.gz"])) == ["x.nii.gz"]
    deep = find_scans([folder / "sub" / "**" / "*.nii.gz"])
    assert sorted(names(deep)) == ["x.nii.gz", "y.nii.gz"]
    assert not any(scan.named for scan in deep)


def test_a_pattern_starts_at_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    assert names(find_scans(["~/d.*"])) == ["d.nii"]


def test_a_file_is_taken_as_it_is(folder: Path) -> None:
    given = [folder / "b_seg.nii.gz", folder / "missing.nii", folder / "[1].nii.gz", folder / "notes.txt"]
    assert find_scans(given) == [Scan(path, named=True) for path in given]


def test_a_scan_that_is_named_twice_is_taken_once(folder: Path) -> None:
    inside = folder / "sub"
    (inside / "z.nii.gz").symlink_to(inside / "x.nii.gz")  # segmented into a file of its own
    again = [inside / "x.nii.gz", str(inside / ".." / "sub" / "x.nii.gz"), inside]
    assert find_scans([inside, *again]) == [
        Scan(inside / "x.nii.gz", named=True),
        Scan(inside / "z.nii.gz", named=False),
    ]
    assert find_scans([folder / "missing.nii"] * 2) == [Scan(folder / "missing.nii")]


@pytest.mark.parametrize(("given", "word"), [("empty", "no scan in this folder"), ("no*.nii", "no scan matches")])
def test_nothing_found_is_an_error(folder: Path, given: str, word: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match=word):
        find_scans([folder / given])


def test_a_folder_that_cannot_be_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match=r"cannot be listed \(Permission denied\)"):
        find_scans([folder])


def test_own_outputs_are_known_by_the_scan_beside_them(folder: Path) -> None:
    assert is_own_output(folder / "anything_seg.nii.gz")
    assert is_own_output(folder / "c_mask.nii.gz")  # of c.mgz
    assert not is_own_output(folder / "e_mask.nii.gz")
    assert not is_own_output(folder / "b_maskless.nii.gz")


def test_a_list(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeff# all\r\n a b.nii \r\n\r\nüber/*.nii\r\n#x.nii\r\n".encode())
    assert read_list(path) == ["a b.nii", "über/*.nii"]


def test_a_list_on_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a.nii\nb.nii\n"))
    assert read_list(Path("-")) == ["a.nii", "b.nii"]


@pytest.mark.parametrize(("content", "word"), [(b"", "names no scan"), (b"# x\n", "names no scan"), (b"\0\1", "text")])
def test_a_list_that_says_nothing(tmp_path: Path, content: bytes, word: str) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(InputError, match=word):
        read_list(tmp_path / "list.txt")
    with pytest.raises(InputError, match="cannot be read"):
        read_list(tmp_path / "missing.txt")
