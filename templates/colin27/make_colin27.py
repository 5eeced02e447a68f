#!/usr/bin/env python3
"""Make the `colin27` template: a label map of a real whole head, drawn by the network that ships and mended by rules.

    python templates/colin27/make_colin27.py [--out DIR]

Input: synthseg/samples/colin27_t1.nii.gz (Colin27, 1 mm) and synthseg/weights/siam16.safetensors; nothing else. The
network runs in float32 with its mirrored copy averaged in, and everything after it is arithmetic without chance, so
that two runs on one machine write the same bytes (another processor may round a voxel in a million differently).

Each function below is one rule. They run in the order of `mend`; `problems` says which of their promises a finished
map breaks, and the script refuses to write one that breaks any. Arrays are (D, H, W) in RAS+ order, one voxel is 1 mm.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage as ndi

from synthseg.conforming import conform
from synthseg.inference import clean_up
from synthseg.labels import load_scheme
from synthseg.networks.checkpoint import load_model
from synthseg.paths import data_dir
from synthseg.prediction import Member, predict
from synthseg.volume import canonical, load_volume

AIR, GM, WM, CSF, VENTRICLE, CEREBELLAR_GM, THALAMUS = range(7)
DURA, VESSEL, SKULL, HEAD = 13, 14, 15, 16
NUCLEI = range(THALAMUS, DURA)
PARENCHYMA = (GM, WM, CEREBELLAR_GM, *NUCLEI)
BRAIN = (*PARENCHYMA, VENTRICLE)

MIDPLANE = 90  # voxel plane of x = 0 mm
BASE_Z = 56  # z = -15 mm: above it nothing may pass through the skull
CANAL_Z = 20  # z = -51 mm: the foramen magnum; below it lies the spinal canal
FLUID_IS_DARK = 88  # of the T1, whose fluid is about 45, grey matter 86 and white matter 109
THALAMUS_IS_BRIGHT = 62
ROUGHEST = 0.03  # share of a surface that smoothing moves: at most 0.015 after the rules, at least 0.041 before
SMALLEST = {AIR: 500, VENTRICLE: 100, CSF: 30, DURA: 30, VESSEL: 100}  # voxels of a piece; the others: the largest only
FACES = ndi.generate_binary_structure(3, 1)
CUBE = np.ones((3, 3, 3), dtype=bool)
CITATION = (
    "Holmes CJ, Hoge R, Collins L, Woods R, Toga AW, Evans AC. Enhancement of MR images using registration for signal "
    "averaging. Journal of Computer Assisted Tomography 22(2):324-333, 1998."
)


# ------------------------------------------------------------------------------------------------------ tools
def ball(radius: float) -> np.ndarray:
    n = int(radius)
    x, y, z = np.ogrid[-n : n + 1, -n : n + 1, -n : n + 1]
    return x * x + y * y + z * z <= radius * radius


def largest(mask: np.ndarray, structure: np.ndarray = CUBE) -> np.ndarray:
    pieces, count = ndi.label(mask, structure)
    return mask if count < 2 else pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:])


def smooth(mask: np.ndarray, sigma: float) -> np.ndarray:
    """A mask with a rounder border; faces of the field of view count as continuing beyond it."""
    return ndi.gaussian_filter(mask.astype(np.float32), sigma, mode="nearest") > 0.5


def roughness(mask: np.ndarray) -> float:
    """The share of the voxels at the border of a mask that smoothing moves."""
    border = mask & ~ndi.binary_erosion(mask, FACES, border_value=1)
    return float((smooth(mask, 1.0) != mask).sum() / border.sum())


def close(mask: np.ndarray, radius: float) -> np.ndarray:
    """Closing by a ball, by distances (quick for large balls); the field of view continues beyond its faces."""
    n = int(np.ceil(radius)) + 1
    wide = np.pad(mask, n, mode="edge")
    wide = ndi.distance_transform_edt(~wide) <= radius
    return (ndi.distance_transform_edt(wide) > radius)[n:-n, n:-n, n:-n] | mask


def opened(mask: np.ndarray, radius: float) -> np.ndarray:
    """The largest piece of a mask after thin bridges of up to twice the radius were cut."""
    n = int(np.ceil(radius)) + 1
    wide = np.pad(mask, n, mode="edge")
    core = largest(ndi.distance_transform_edt(wide) > radius)
    return (ndi.distance_transform_edt(~core) <= radius)[n:-n, n:-n, n:-n] & mask


def to_nearest(labels: np.ndarray, where: np.ndarray, forbidden: tuple[int, ...] = ()) -> None:
    """Give voxels the label of the nearest voxel that is not among them, in place."""
    if where.any():
        source = where | np.isin(labels, forbidden)
        nearest = ndi.distance_transform_edt(source, return_distances=False, return_indices=True)
        labels[where] = labels[tuple(nearest[:, where])]


def shells(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What touches a mask by a face, edge or corner; and what touches that by a face."""
    first = ndi.binary_dilation(mask, CUBE)
    return first & ~mask, ndi.binary_dilation(first, FACES) & ~first


# ------------------------------------------------------------------------------------------------------ rules
def drop_islands(labels: np.ndarray) -> None:
    """Every class but air, CSF, ventricles, dura and vessels is one piece; specks take the label around them.

    Twice, since two specks may lie side by side. For the nuclei see `mend_nuclei`.
    """
    for _ in range(2):
        specks = np.zeros(labels.shape, dtype=bool)
        for index in (*BRAIN, CSF, DURA, VESSEL, SKULL, HEAD, AIR):
            if index in NUCLEI:
                continue
            pieces, count = ndi.label(labels == index, FACES if index in (AIR, SKULL, HEAD) else CUBE)
            if count < 2:
                continue
            sizes = np.bincount(pieces.ravel())
            sizes[0] = 0
            small = sizes < SMALLEST.get(index, int(sizes.max()))
            small[0] = False
            specks |= small[pieces]
        to_nearest(labels, specks)


def mend_fluid(labels: np.ndarray, t1: np.ndarray, probability: np.ndarray) -> None:
    """Fluid is dark in a T1: bright voxels among it (the fornix, thin folds) are the likeliest tissue instead.

    Between the thalami lies the third ventricle, and no thalamus crosses the middle.
    """
    bright = np.isin(labels, (CSF, VENTRICLE)) & (t1 > FLUID_IS_DARK)
    labels[bright] = np.array(PARENCHYMA)[probability[list(PARENCHYMA)][:, bright].argmax(0)]
    middle = slice(MIDPLANE - 8, MIDPLANE + 9)
    part = labels[middle]
    part[(part == THALAMUS) & (t1[middle] < THALAMUS_IS_BRIGHT)] = VENTRICLE
    thalamus = labels == THALAMUS
    left = np.logical_or.accumulate(thalamus[MIDPLANE - 8 : MIDPLANE + 9], 0)
    right = np.logical_or.accumulate(thalamus[MIDPLANE - 8 : MIDPLANE + 9][::-1], 0)[::-1]
    part[(part == CSF) & left & right] = VENTRICLE
    plane = labels[MIDPLANE]
    plane[plane == THALAMUS] = VENTRICLE


def mend_nuclei(labels: np.ndarray) -> None:
    """Each nucleus is one smooth piece without holes on each side of the middle."""
    mended = np.zeros_like(labels)
    for index in NUCLEI:
        for side in (slice(0, MIDPLANE), slice(MIDPLANE + 1, None)):
            mask = largest(ndi.binary_fill_holes(largest(smooth(labels[side] == index, 0.8), FACES)), FACES)
            mask &= np.isin(labels[side], (*BRAIN, CSF)) & (mended[side] == 0)
            mended[side][largest(mask, FACES)] = index
    to_nearest(labels, np.isin(labels, NUCLEI) & (mended == 0), forbidden=tuple(NUCLEI))
    labels[mended > 0] = mended[mended > 0]


def intracranial(labels: np.ndarray) -> np.ndarray:
    """The inside of the skull: brain, CSF, dura and sinuses, smooth, with a voxel of room around the brain.

    What hangs on it by a bridge thinner than 5 mm is no part of it, 10 mm below the vault.
    """
    inside = np.isin(labels, (*BRAIN, CSF, DURA))
    inside[:, :, BASE_Z:] |= labels[:, :, BASE_Z:] == VESSEL
    wide = opened(inside, 5)
    inside = opened(inside, 2.5)
    inside[:, :, :BASE_Z] &= wide[:, :, :BASE_Z]
    room = ndi.binary_dilation(np.isin(labels, BRAIN), CUBE)
    return largest(ndi.binary_fill_holes(smooth(close(inside, 4) | room, 1.0) | room), FACES)


def mend_inside(labels: np.ndarray, inside: np.ndarray) -> None:
    """Inside the skull: brain, CSF around it, dura under the bone where there is room. None of them lies outside."""
    brain = np.isin(labels, BRAIN)
    labels[inside & np.isin(labels, (SKULL, HEAD, AIR))] = CSF
    to_nearest(labels, ~inside & np.isin(labels, (CSF, DURA)), forbidden=(*BRAIN, CSF, DURA))
    rim = inside & ndi.binary_dilation(~inside, FACES)
    free = np.isin(labels, (CSF, DURA))
    labels[free & rim] = DURA
    labels[(labels == DURA) & ndi.binary_dilation(brain, CUBE)] = CSF


def mend_skull(labels: np.ndarray, inside: np.ndarray) -> None:
    """Bone all around: two voxels and more above the skull base, one at the base, where vessels may pass.

    Its outside is smooth.
    """
    z = np.arange(labels.shape[2])
    first, second = shells(inside)
    vault = z > BASE_Z
    base = (z >= CANAL_Z) & ~vault
    must = ((first | second) & vault) | (first & base & (labels != VESSEL))
    labels[must & ~inside] = SKULL
    solid = smooth(inside | (labels == SKULL), 1.0) & vault
    outer = vault & ~inside
    labels[outer & solid & (labels == HEAD)] = SKULL
    labels[outer & ~solid & ~must & (labels == SKULL)] = HEAD


def mend_skin(labels: np.ndarray, inside: np.ndarray) -> None:
    """A smooth surface of the head, and at least two voxels of soft tissue over the vault of the skull.

    Outside is the air that a ball of 4 mm reaches from above; nose, sinuses and ear canals are air within the head.
    """
    n = 8
    air = np.pad(labels == AIR, n, mode="edge")
    reach = ndi.distance_transform_edt(air) > 4
    pieces, _ = ndi.label(reach)
    reach = pieces == pieces[0, 0, -1]
    outside = (ndi.distance_transform_edt(~reach) <= 4.5)[n:-n, n:-n, n:-n] & (labels == AIR)
    solid = largest(smooth(~outside, 1.5), FACES)
    labels[solid & outside] = HEAD
    labels[~solid] = AIR
    vault = np.arange(labels.shape[2]) > BASE_Z
    first, second = shells(np.pad(~solid, 2, mode="edge"))
    thin = (first | second)[2:-2, 2:-2, 2:-2] & vault
    labels[thin & ~inside & (labels == SKULL)] = HEAD


def join_air(labels: np.ndarray) -> None:
    """Sinuses drain: each sealed pocket of air is opened to the nearest other air by a passage one voxel wide."""
    while True:
        air = np.pad(labels == AIR, 1, constant_values=True)
        pieces, count = ndi.label(air, FACES)
        if count == 1:
            return
        pieces = pieces[1:-1, 1:-1, 1:-1]
        pocket = pieces == 2
        others = (pieces > 0) & ~pocket
        distance, nearest = ndi.distance_transform_edt(~others, return_indices=True)
        spots = np.argwhere(pocket)
        start = spots[np.argmin(distance[pocket])]
        stop = nearest[(slice(None), *start)]
        here = start.copy()
        while not np.array_equal(here, stop):  # one axis at a time, so that the passage is joined by faces
            axis = int(np.argmax(np.abs(stop - here)))
            here[axis] += np.sign(stop[axis] - here[axis])
            if labels[tuple(here)] not in (HEAD, SKULL, AIR):
                raise SystemExit(f"a passage between pockets of air would cross label {labels[tuple(here)]} at {here}")
            labels[tuple(here)] = AIR


def mend(labels: np.ndarray, t1: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """All rules, in order, on the network's map."""
    labels = labels.copy()
    drop_islands(labels)
    mend_fluid(labels, t1, probability)
    mend_nuclei(labels)
    drop_islands(labels)
    inside = intracranial(labels)
    mend_inside(labels, inside)
    mend_skull(labels, inside)
    mend_skin(labels, inside)
    drop_islands(labels)
    mend_inside(labels, inside)
    mend_skull(labels, inside)
    drop_islands(labels)
    join_air(labels)
    return labels


# ---------------------------------------------------------------------------------------------------- promises
def pieces(mask: np.ndarray) -> int:
    return int(ndi.label(mask, CUBE)[1])


def problems(labels: np.ndarray) -> list[str]:
    """What a finished map breaks of the promises; empty if nothing."""
    found = []
    for index in (GM, WM, CEREBELLAR_GM, SKULL, HEAD):
        if (n := pieces(labels == index)) != 1:
            found.append(f"label {index} is in {n} pieces")
    for index in NUCLEI:
        for side in (labels[:MIDPLANE], labels[MIDPLANE + 1 :]):
            nucleus = side == index
            if (n := pieces(nucleus)) != 1:
                found.append(f"nucleus {index} is in {n} pieces on one side")
            for box in ndi.find_objects(nucleus.astype(np.uint8)):
                if n := int((ndi.binary_fill_holes(nucleus[box]) & ~nucleus[box]).sum()):
                    found.append(f"nucleus {index} has holes of {n} voxels on one side")
        if (labels[MIDPLANE] == index).any():
            found.append(f"nucleus {index} crosses the middle")
    if (n := int(ndi.label(np.pad(labels == AIR, 1, constant_values=True), FACES)[1])) != 1:
        found.append(f"the air is in {n} pieces")
    if (n := int(ndi.label(labels > 0, FACES)[1])) != 1:
        found.append(f"the head is in {n} pieces")
    brain = np.isin(labels, BRAIN)
    near = ndi.binary_dilation(brain, CUBE)
    for index, name in ((SKULL, "skull"), (HEAD, "soft tissue"), (AIR, "air"), (DURA, "dura")):
        if n := int((near & (labels == index)).sum()):
            found.append(f"{n} voxels of {name} touch the brain")
    vault = labels[:, :, BASE_Z + 1 :]
    flood, _ = ndi.label(vault != SKULL, CUBE)
    inner = np.unique(flood[np.isin(vault, BRAIN)])
    outer = np.unique(flood[(vault == AIR) | (vault == HEAD)])
    if np.intersect1d(inner, outer).size:
        found.append("the vault of the skull has a gap")
    inside = np.isin(flood, inner)
    if n := int((np.logical_or(*shells(inside)) & (vault != SKULL)).sum()):
        found.append(f"{n} voxels of the vault are bone of less than two voxels")
    base = labels[:, :, CANAL_Z : BASE_Z + 1]
    within = ndi.binary_dilation(np.isin(base, (*BRAIN, CSF, DURA)), CUBE)
    if n := int((within & np.isin(base, (AIR, HEAD))).sum()):
        found.append(f"{n} voxels of soft tissue or air open the base of the skull")
    outside = np.pad(labels == AIR, ((1, 1), (1, 1), (0, 1)), constant_values=True)[:, :, BASE_Z + 1 :]
    outside = largest(outside, FACES)[1:-1, 1:-1, :-1]
    if n := int((np.logical_or(*shells(outside)) & (vault == SKULL)).sum()):
        found.append(f"{n} voxels of the vault lie under less than two voxels of soft tissue")
    bone = np.isin(flood, outer, invert=True)
    for mask, name in ((~outside, "head"), (bone, "skull"), (inside, "inside of the skull")):
        if (share := roughness(mask)) > ROUGHEST:
            found.append(f"the {name} is rough: smoothing moves {share:.1%} of its surface")
    return found


# ------------------------------------------------------------------------------------------------------ making
def draw() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The network's labels uint8 and probabilities float16 (17, D, H, W), the T1, and the affine of its grid."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # sums in the same order on every machine
    model = load_model("siam16")
    ras = canonical(load_volume(data_dir("samples") / "colin27_t1.nii.gz"))
    members = (Member(), Member(mirrored=True))
    with torch.inference_mode():
        image = conform(ras, model.voxel_size_mm)
        if image.shape != ras.data.shape:
            raise SystemExit("the network does not work at the voxel size of the scan (1 mm)")
        probability = predict(image, model, torch.device("cpu"), members=members, mixed_precision=False)
        clean_up(probability, model.labels)
    labels = probability.max(0).indices.numpy().astype(np.uint8)
    return labels, probability.numpy(), np.asarray(ras.data, dtype=np.float32), ras.affine


def save(labels: np.ndarray, affine: np.ndarray, out: Path) -> None:
    image = nib.Nifti1Image(labels.astype(np.uint8), affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, 4)  # MNI space
    image.set_qform(affine, 4)
    image.header["descrip"] = b"Colin27, siam16 labels"
    weights = data_dir("weights") / "siam16.safetensors"
    table = load_scheme("siam16")
    record = {
        "name": "colin27",
        "scheme": "siam16",
        "derived": {},
        "source": "Colin27 T1 segmented by siam16 and mended by templates/colin27/make_colin27.py",
        "license": "the notice of Colin27 (see SOURCE.md); the labels: Apache-2.0",
        "citation": CITATION,
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "labels": {str(i): table[int(i)].name for i in np.unique(labels) if i},
    }
    (out / "labels.nii.gz").write_bytes(gzip.compress(image.to_bytes(), 9, mtime=0))
    (out / "labels.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    out = parser.parse_args().out
    drawn, probability, t1, affine = draw()
    labels = mend(drawn, t1, probability)
    if broken := problems(labels):
        raise SystemExit("not written: " + "; ".join(broken))
    out.mkdir(parents=True, exist_ok=True)
    save(labels, affine, out)
    for label in load_scheme("siam16").labels:
        before, after = (drawn == label.id).sum() / 1000, (labels == label.id).sum() / 1000
        print(f"{label.id:4d}  {label.name:16s} {before:9.2f} -> {after:9.2f} ml")
    print(f"labels.nii.gz: {(out / 'labels.nii.gz').stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
