"""Public label maps: downloaded or taken from a folder, checked, and imported as templates.

A map whose checksum is known is imported only if it agrees. For the others nobody can say whether a file is the
published one: they are left out unless asked for, and then their checksum is recorded.
"""

from __future__ import annotations

import contextlib
import difflib
import gzip
import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from synthseg.errors import InputError, TemplateError
from synthseg.templates import import_template, read_record, removal_note
from synthseg.volume import Volume, canonical, check_writable, image_suffix, load_volume, save_label_map

DOWNLOADS = ".fetch"  # in the output folder, until the maps are imported
TIMEOUT_S = 30
ROUNDS = 2  # how often each mirror is asked for a file


@dataclass(frozen=True)
class Source:
    """One published map.

    Attributes
    ----------
    name : of the template.
    file : its name on a mirror and in a folder.
    subject : what stands for ``{subject}`` in the addresses.
    sha256 : see ``Collection.raw_shape``; empty if not known.
    """

    name: str
    file: str
    subject: str
    sha256: str = ""


@dataclass(frozen=True)
class Collection:
    """Label maps that were published together.

    Attributes
    ----------
    urls : addresses in the order in which they are tried, with ``{file}`` and ``{subject}``.
    pattern : what else a file of a folder may be called, with ``{subject}``.
    affine, raw_shape : of headerless volumes, gzipped or not: 16 bits a voxel, x fastest, 16 times the id.
        ``sha256`` is then that of the ids, one byte a voxel in the same order, because the server packs the file anew
        for every download. None: the files are NIfTI, and ``sha256`` is that of the file.
    """

    name: str
    scheme: str
    license: str
    citation: str
    homepage: str
    urls: tuple[str, ...]
    maps: tuple[Source, ...]
    pattern: str
    affine: tuple[tuple[float, ...], ...] = ()
    raw_shape: tuple[int, int, int] | None = None


# Computed from copies of the files that bear their authors' gzip time stamps (May and June 2021). Of the other eight
# maps no copy was at hand.
SYNTHSEG_SHA256 = {
    "02": "65e64c6b9415f389dfda5182ec3a269836925b04166ea82f47b230e54980d0a4",
    "03": "f746e2f90e4dccd7bbbdc18bdd6374e455ddb7fc044504a0a42edc8507cf1aa0",
    "05": "a53baa7b0faea832d45f8a5b9a234b2b6d4ca92bf5c98baeada4a935cc2f1183",
    "06": "57d8c612469359da78b7c16647cc6979be461eb03b59805e7ebded51554f9ead",
    "07": "feaa1e8f320e037709a51e30881fe8076a45fc06611a09bbd87e76f8f3f89826",
    "08": "f4a9d39c5c64bc5457de84b10a4c4b47f3bb6257e9f396ffa61d290015f178d2",
    "10": "4a0147bf1d52c6853176777554165d79a01656ddb8f8474da48b65d6218b664e",
    "11": "02e468bbb652ff0da18eeb73932f09813150ef95155ba7669831849da8517196",
    "13": "d11cf676fbd5b9316fe30acbca98c854cf88dbcee74a5fe22092ac91ccd8d3a1",
    "14": "7b8d1783c1b5b71b454644169d848b28fa57a33ca4a9b49ff88ad897b8aea570",
    "16": "f48c442569883055440a930ad098b4e747d72deb6369f529e4486c36b0cbfe81",
    "18": "dbf3b2297907c88481594a2441a47aa13c75452cd7323fec0313b785b04c9671",
}
# Of the ids, from copies that had been converted to NIfTI.
BRAINWEB_SHA256 = {
    "04": "15ed050087af721f369ec873aa89dfe2599aa833da63fab2401f99e58fe47ee7",
    "05": "5912bfa96f7565fce3632415693313975e4289689d4e65412ca38652dbd95468",
    "06": "b6b1ea6e4a368beca77ad5b9e9cca6b1e04db2a5700d60cce2ebf9ac3ae8e853",
    "18": "094e0192f998ab377ae8cbfc1e163df6fe1e21eab086113a8475b1dd8ee469fc",
    "20": "19beb127cd35114f9987c8e8d832ffa2597d27169b758e2609e633073dc7c414",
    "38": "283330abc8d6f48ea157d7cad6733d36d9c9a159dc38ceccd59ddbeae5967346",
}
BRAINWEB_SUBJECTS = ("04", "05", "06", "18", "20", "38", *(f"{n}" for n in range(41, 55)))
SYNTHSEG_COMMIT = "3168fdf38ad220bd1927be43b67c5e9409a78ee7"
BRAINWEB_FORM = (
    "://brainweb.bic.mni.mcgill.ca/cgi/brainweb1?do_download_alias=subject{subject}_crisp"
    "&format_value=raw_short&zip_value=gnuzip&download_for_real=%5BStart+download%21%5D"
)

COLLECTIONS = {
    collection.name: collection
    for collection in (
        Collection(
            name="synthseg20",
            scheme="head",
            license="Apache-2.0",
            citation="Billot B, Greve DN, Puonti O, Thielscher A, Van Leemput K, Fischl B, Dalca AV, Iglesias JE. "
            "SynthSeg: segmentation of brain MRI scans of any contrast and resolution without retraining. Medical "
            "Image Analysis 86:102789, 2023.",
            homepage="https://github.com/BBillot/SynthSeg",
            urls=(
                f"https://raw.githubusercontent.com/BBillot/SynthSeg/{SYNTHSEG_COMMIT}/data/training_label_maps/{{file}}",
                "https://github.com/BBillot/SynthSeg/raw/master/data/training_label_maps/{file}",
            ),
            maps=tuple(
                Source(f"training_seg_{n}", f"training_seg_{n}.nii.gz", n, SYNTHSEG_SHA256.get(n, ""))
                for n in (f"{i:02d}" for i in range(1, 21))
            ),
            pattern=r"training_seg_{subject}\.nii\.gz",
        ),
        Collection(
            name="brainweb20",
            scheme="brainweb",
            license="free to use with citation",
            citation="Aubert-Broche B, Griffin M, Pike GB, Evans AC, Collins DL. Twenty new digital brain phantoms for "
            "creation of validation image data bases. IEEE Transactions on Medical Imaging 25(11):1410-1416, 2006.",
            homepage="https://brainweb.bic.mni.mcgill.ca/brainweb/anatomic_normal_20.html",
            urls=("https" + BRAINWEB_FORM, "http" + BRAINWEB_FORM),
            maps=tuple(
                Source(f"subject{n}", f"subject_{n}.bin.gz", n, BRAINWEB_SHA256.get(n, "")) for n in BRAINWEB_SUBJECTS
            ),
            pattern=r"(subject_?|brainweb_s){subject}(_crisp)?(_v)?\.(bin|raws|nii)(\.gz)?",
            affine=((0.5, 0, 0, -90.25), (0, 0.5, 0, -126.25), (0, 0, 0.5, -72.25), (0, 0, 0, 1)),
            raw_shape=(362, 434, 362),
        ),
    )
}


@dataclass
class Fetched:
    """What became of the maps of a collection, by name."""

    imported: list[str] = field(default_factory=list)
    present: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def find_collection(name: str) -> Collection:
    """Raises InputError with the names that exist."""
    if name not in COLLECTIONS:
        near = difflib.get_close_matches(name, COLLECTIONS, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise InputError(f"{name}: no such collection of label maps; {hint}available: {', '.join(COLLECTIONS)}")
    return COLLECTIONS[name]


def fetch(
    collection: Collection,
    out: Path,
    *,
    folder: Path | None = None,
    mirrors: Sequence[str] = (),
    allow_unverified: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Fetched:
    """Download maps, or take them from ``folder``, check them, and import them into ``out``.

    Maps that ``out`` holds already are skipped, so that an interrupted run goes on where it stopped. Those with a
    known checksum come first: if they disagree, none of the others is trusted.

    Parameters
    ----------
    mirrors : addresses of folders that hold the files under ``Source.file``, tried before the published addresses.
    allow_unverified : import maps without a known checksum as well.
    """
    result = Fetched()
    wanted = []
    for source in sorted(collection.maps, key=lambda source: not source.sha256):
        if (out / source.name).exists():
            _check_present(out / source.name, collection)
            result.present.append(source.name)
        elif source.sha256 or allow_unverified:
            wanted.append(source)
        else:
            result.left_out.append(source.name)
    files: dict[str, Path] = {}
    digests: dict[str, str] = {}
    if folder is not None:
        files = _find_files(collection, folder)
        result.missing = [source.name for source in wanted if source.name not in files]
        wanted = [source for source in wanted if source.name in files]
        for source in wanted:  # all are checked before the first is written
            digests[source.name] = _verified_digest(collection, source, files[source.name])
    if not wanted:
        return result
    check_writable(out / "labels.nii.gz")
    out.mkdir(parents=True, exist_ok=True)
    downloads = out / DOWNLOADS
    urls = [f"{mirror.rstrip('/')}/{{file}}" for mirror in mirrors] + list(collection.urls)
    for source in wanted:
        origin = str(files.get(source.name, ""))
        if folder is None:
            try:
                files[source.name], origin, digests[source.name] = _download(collection, source, downloads, urls, tell)
            except InputError:
                with contextlib.suppress(OSError):  # leave no empty folders
                    downloads.rmdir()
                    out.rmdir()
                raise
        _import(collection, source, files[source.name], out, origin, digests[source.name])
        if folder is None:
            files[source.name].unlink(missing_ok=True)
        known = "as known" if source.sha256 else "not known before, now recorded in labels.json"
        tell(f"{out / source.name}: sha256 {digests[source.name]} ({known})")
        if note := removal_note(out / source.name):
            tell(f"note: {note}")
        result.imported.append(source.name)
    shutil.rmtree(downloads, ignore_errors=True)
    return result


# ------------------------------------------------------------------------------------------------ download


def _download(
    collection: Collection, source: Source, downloads: Path, urls: Sequence[str], tell: Callable[[str], None]
) -> tuple[Path, str, str]:
    """(file, address it came from, checksum). pooch renames what it wrote, so that a file is whole or absent."""
    import pooch

    pooch.get_logger().setLevel("ERROR")
    # identity: the gzip layer belongs to the file and must not be taken off on the way
    downloader = pooch.HTTPDownloader(timeout=TIMEOUT_S, headers={"Accept-Encoding": "identity"})
    known = f"sha256:{source.sha256}" if source.sha256 and collection.raw_shape is None else None
    failures: dict[str, str] = {}
    for url in [*urls] * ROUNDS:
        address = url.format(file=source.file, subject=source.subject)
        tell(f"{source.name}: from {address.split('?')[0]}")
        try:
            path = pooch.retrieve(address, known, fname=source.file, path=downloads, downloader=downloader)
            return Path(path), address, _verified_digest(collection, source, Path(path))
        except OSError as error:  # those of requests as well
            failures[address] = _reason(error)
        except (ValueError, TemplateError) as error:  # pooch: another checksum; or no volume, or another one
            failures[address] = "another file than the published one" if isinstance(error, ValueError) else str(error)
            (downloads / source.file).unlink(missing_ok=True)
    reasons = "; ".join(f"{address.split('?')[0]}: {reason}" for address, reason in failures.items())
    raise InputError(
        f"{source.file} of {collection.name} could not be fetched ({reasons}). Maps fetched so far stay; run the "
        f"command again to go on. Without a network: get the files from {collection.homepage} elsewhere and use "
        "--from DIR, or name a copy with --mirror URL"
    )


def _reason(error: Exception) -> str:
    from requests.exceptions import ConnectionError, HTTPError, Timeout

    if isinstance(error, HTTPError) and error.response is not None:
        return f"the server answers {error.response.status_code}"
    if isinstance(error, Timeout):
        return f"no answer within {TIMEOUT_S} s"
    if isinstance(error, ConnectionError):
        return "no connection"
    return str(error)


# -------------------------------------------------------------------------------------------------- folder


def _find_files(collection: Collection, folder: Path) -> dict[str, Path]:
    """Files of a folder by the name of their map; those of a clone of SynthSeg's repository are found as well."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; --from expects the folder of the downloaded files")
    inside = folder / "data" / "training_label_maps"
    names = sorted(p for d in (folder, inside) if d.is_dir() for p in d.iterdir() if p.is_file())
    found: dict[str, Path] = {}
    for source in collection.maps:
        pattern = re.compile(collection.pattern.replace("{subject}", source.subject))
        for path in names:
            if pattern.fullmatch(path.name):
                found.setdefault(source.name, path)
    if not found:
        expected = ", ".join(source.file for source in collection.maps[:3])
        raise InputError(f"{folder}: holds no file of {collection.name}; expected {expected}, ...")
    return found


def _check_present(template: Path, collection: Collection) -> None:
    if read_record(template).get("collection") != collection.name:
        raise TemplateError(f"{template}: exists already, and is not from {collection.name}; choose another folder")


# ------------------------------------------------------------------------------------------- check, import


def _verified_digest(collection: Collection, source: Source, path: Path) -> str:
    """The checksum of a file. Raises TemplateError if it is not the known one."""
    digest = _digest(collection, path)
    if source.sha256 and digest != source.sha256:
        what = "file" if collection.raw_shape is None else "map"
        raise TemplateError(
            f"{path}: not the published {what} (sha256 {digest}, expected {source.sha256}); get it again from "
            f"{collection.homepage}. A map of your own is brought in with 'synthseg templates import'"
        )
    return digest


def _digest(collection: Collection, path: Path) -> str:
    if collection.raw_shape is None:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return hashlib.sha256(_read_ids(collection, path).data.tobytes(order="F")).hexdigest()


def _read_ids(collection: Collection, path: Path) -> Volume:
    """Ids, uint8 (D, H, W) in RAS+ order, of a headerless volume or of a NIfTI file made from one."""
    assert collection.raw_shape is not None
    shape = collection.raw_shape
    if image_suffix(path):
        volume = canonical(load_volume(path))
        if volume.data.shape != shape or volume.data.min() < 0 or volume.data.max() > 255:
            raise TemplateError(f"{path}: not a map of {collection.name}; expected ids on {shape} voxels")
        return Volume(volume.data.astype(np.uint8), volume.affine)
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError) as error:
            raise TemplateError(f"{path}: damaged ({error}); get it again") from None
    if len(content) != 2 * int(np.prod(shape)):
        raise TemplateError(
            f"{path}: holds {len(content)} bytes, expected 16-bit voxels of {shape}; the server may have sent "
            f"a page of text instead. Get the discrete model as raw short from {collection.homepage}"
        )
    ids = np.frombuffer(content, "<u2").reshape(shape, order="F") >> 4  # the lowest four bits carry nothing
    return Volume(ids.astype(np.uint8), np.array(collection.affine, dtype=float))


def _import(collection: Collection, source: Source, file: Path, out: Path, origin: str, digest: str) -> None:
    record = {
        "collection": collection.name,
        "license": collection.license,
        "citation": collection.citation,
        "sha256": digest,
        "sha256_of": "file" if collection.raw_shape is None else "ids",
        "verified": "yes" if source.sha256 else "no: the checksum of the published map was not known",
    }
    if collection.raw_shape is None:
        import_template(file, collection.scheme, out, origin, source.name, record)
        return
    volume = _read_ids(collection, file)
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{source.name}-") as draft:
        converted = Path(draft) / f"{source.name}.nii.gz"
        save_label_map(converted, volume.data, volume, [255])
        import_template(converted, collection.scheme, out, origin, source.name, record)
