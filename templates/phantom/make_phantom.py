#!/usr/bin/env python3
"""Make the `phantom` template: an analytic label map of a whole adult head.

    python templates/phantom/make_phantom.py [--out DIR]

Writes labels.nii.gz and labels.json. Everything comes from the formulas below (ellipsoids, tubes, sheets and sums of
cosines); no scan, atlas or segmentation was used. There is no random generator either: "random" fields are sums of
cosines whose directions and phases follow the golden ratio, so two runs write the same bytes.

How to read it. All coordinates are in mm, RAS+ (left is -x), with the origin at the anterior commissure (AC) and y
along the AC-PC line, as in a stereotaxic atlas. Only when the file is written is the origin moved to the brain centre.
Paired structures are written once, for x > 0, and painted for both sides. The brain is bent and twisted a little
(`Head.__init__`) and the folds differ between the sides, so a mirrored head is not the same head.

Order of painting (later wins): head and skin, bone, dura and CSF, orbits, airways, spine, folded brain, deep
structures, ventricles, falx and tentorium, vessels.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage as ndi

SHAPE = (192, 232, 216)
CORNER = np.array([-96, -124, -121])  # AC coordinates of voxel (0, 0, 0)
BRAIN_CENTRE = np.array([0, -18, 9])  # AC coordinates of what the file calls (0, 0, 0) mm
GOLDEN = (1 + 5**0.5) / 2

PAIRS = {  # name: (left, right)
    "Cerebral-White-Matter": (2, 41), "Cerebral-Cortex": (3, 42), "Lateral-Ventricle": (4, 43),
    "Inf-Lat-Vent": (5, 44), "Cerebellum-White-Matter": (7, 46), "Cerebellum-Cortex": (8, 47),
    "Thalamus": (10, 49), "Caudate": (11, 50), "Putamen": (12, 51), "Pallidum": (13, 52),
    "Hippocampus": (17, 53), "Amygdala": (18, 54), "Accumbens-area": (26, 58), "VentralDC": (28, 60),
}  # fmt: skip
SINGLE = {
    "3rd-Ventricle": 14, "4th-Ventricle": 15, "Brain-Stem": 16, "CSF": 24, "Artery": 502, "Eyeball": 506,
    "Other-Soft-Tissue": 507, "Rectus-Muscle": 508, "Mucosa": 509, "Skin": 511, "Spinal-Cord": 512, "Vein": 514,
    "Cortical-Bone": 515, "Cancellous-Bone": 516, "Optic-Nerve": 530, "Dura": 540,
}  # fmt: skip
NAMES = {ids[k]: f"{side}-{n}" for n, ids in PAIRS.items() for k, side in enumerate(("Left", "Right"))}
NAMES |= {v: k for k, v in SINGLE.items()}


# ---------------------------------------------------------------------------------------------------- formulas
def smooth_min(a, b, k):
    """Union of two signed distances, rounded over about k mm."""
    h = np.maximum(k - np.abs(a - b), 0) / k
    return np.minimum(a, b) - h * h * k / 4


def smooth_max(a, b, k):
    """Intersection of two signed distances, rounded over about k mm."""
    return -smooth_min(-a, -b, k)


def ellipsoid(p, centre, radii, tilt=0.0, yaw=0.0):
    """Approximate signed distance; tilt turns about x (front up), yaw about z (front towards +x), in degrees."""
    x, y, z = (p[i] - np.float32(centre[i]) for i in range(3))
    if yaw:
        c, s = np.cos(np.radians(yaw)), np.sin(np.radians(yaw))
        x, y = np.float32(c) * x - np.float32(s) * y, np.float32(s) * x + np.float32(c) * y
    if tilt:
        c, s = np.cos(np.radians(tilt)), np.sin(np.radians(tilt))
        y, z = np.float32(c) * y + np.float32(s) * z, np.float32(c) * z - np.float32(s) * y
    a, b, c = (np.float32(r) for r in radii)
    k0 = np.sqrt((x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2)
    k1 = np.sqrt((x / a**2) ** 2 + (y / b**2) ** 2 + (z / c**2) ** 2)
    return k0 * (k0 - 1) / np.maximum(k1, 1e-6)


def segment(p, a, b, ra, rb, squash=(1, 1, 1)):
    """Signed distance of a capsule from a to b whose radius goes from ra to rb; squash widens it along an axis."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    sq = np.asarray(squash, float)
    d = (b - a) / sq
    q = [(p[i] - np.float32(a[i])) / np.float32(sq[i]) for i in range(3)]
    t = np.clip(sum(q[i] * np.float32(d[i]) for i in range(3)) / np.float32(max(d @ d, 1e-9)), 0, 1)
    r2 = sum((q[i] - t * np.float32(d[i])) ** 2 for i in range(3))
    return np.sqrt(r2) - (np.float32(ra) + t * np.float32(rb - ra))


def waves(p, wavelength, n, seed, spread=0.25):
    """Smooth field of mean 0 and deviation 1: n cosines, directions on a Fibonacci sphere, golden-ratio phases."""
    out = 0
    for i in range(n):
        cz = 1 - (i + 0.5) / n  # half a sphere is enough: cos is even
        az = 2 * np.pi * (i / GOLDEN + seed * 0.377)
        sz = np.sqrt(1 - cz * cz)
        k = 2 * np.pi / wavelength * (1 + spread * (2 * ((i * 0.7548 + seed * 0.31) % 1) - 1))
        ph = 2 * np.pi * ((i * 0.5698 + seed * 0.618 + i * i * 0.0731) % 1)
        kx, ky, kz = (np.float32(k * v) for v in (sz * np.cos(az), sz * np.sin(az), cz))
        out = out + np.cos(kx * p[0] + ky * p[1] + kz * p[2] + np.float32(ph))
    return out * np.float32(np.sqrt(2 / n))


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def signed_distance(mask):
    """Distance to the mask in voxels (1 mm): positive outside, negative inside, zero on the surface."""
    out = ndi.distance_transform_edt(~mask) - ndi.distance_transform_edt(mask)
    return (out - 0.5 * np.sign(out)).astype(np.float32)


def largest(mask):
    lab, n = ndi.label(mask, np.ones((3, 3, 3)))
    return mask if n < 2 else lab == 1 + np.argmax(np.bincount(lab.ravel())[1:])


# ---------------------------------------------------------------------------------------------------- the grid
class Head:
    """The label array and its coordinates, with painting helpers that work inside small boxes."""

    def __init__(self):
        ax = [np.arange(n, dtype=np.float32) + c for n, c in zip(SHAPE, CORNER, strict=True)]
        x, y, z = np.meshgrid(*ax, indexing="ij")
        # bend of the midline, occipito-frontal torque (right frontal, left occipital further out)
        xw = x + 1.3 * np.sin((y + 10) / 38) * np.exp(-((x / 60) ** 2))
        yw = y - 0.02 * x
        self.p = (xw.astype(np.float32), yw.astype(np.float32), z)
        self.lab = np.zeros(SHAPE, np.uint16)

    def box(self, lo, hi):
        lo = np.clip(np.floor(np.asarray(lo) - CORNER).astype(int), 0, SHAPE)
        hi = np.clip(np.ceil(np.asarray(hi) - CORNER).astype(int) + 1, 0, SHAPE)
        return tuple(slice(a, b) for a, b in zip(lo, hi, strict=True))

    def at(self, sl, side=1):
        return self.p[0][sl] * side if side < 0 else self.p[0][sl], self.p[1][sl], self.p[2][sl]

    def around(self, pts, pad, side):
        pts = np.asarray(pts, float) * [side, 1, 1]
        return self.box(pts.min(0) - pad - 3, pts.max(0) + pad + 3)

    def sdf_tube(self, sdf, pts, radii, side=1, squash=(1, 1, 1), k=0.0):
        """Unite (smoothly for k > 0) the array `sdf` with a chain of capsules."""
        radii = np.broadcast_to(radii, len(pts)).astype(float)
        for a, b, ra, rb in zip(pts[:-1], pts[1:], radii[:-1], radii[1:], strict=True):
            sl = self.around([a, b], max(ra, rb) * max(squash) + k + 2, side)
            d = segment(self.at(sl, side), a, b, ra, rb, squash)
            sdf[sl] = smooth_min(sdf[sl], d, k) if k else np.minimum(sdf[sl], d)

    def sdf_ellipsoid(self, sdf, centre, radii, side=1, tilt=0.0, yaw=0.0, k=0.0):
        sl = self.around([centre], max(radii) + k + 2, side)
        d = ellipsoid(self.at(sl, side), centre, radii, tilt, yaw)
        sdf[sl] = smooth_min(sdf[sl], d, k) if k else np.minimum(sdf[sl], d)

    def empty(self):
        return np.full(SHAPE, 99, np.float32)

    def paint(self, mask, label, over=None, sl=...):
        view = self.lab[sl]
        if over is not None:
            mask = mask & np.isin(view, over)
        view[mask] = label

    def tube(self, pts, radii, label, side=1, over=None, squash=(1, 1, 1)):
        radii = np.broadcast_to(radii, len(pts)).astype(float)
        for a, b, ra, rb in zip(pts[:-1], pts[1:], radii[:-1], radii[1:], strict=True):
            sl = self.around([a, b], max(ra, rb) * max(squash) + 1, side)
            self.paint(segment(self.at(sl, side), a, b, ra, rb, squash) < 0, label, over, sl)

    def blob(self, centre, radii, label, side=1, over=None, tilt=0.0, yaw=0.0):
        sl = self.around([centre], max(radii) + 1, side)
        self.paint(ellipsoid(self.at(sl, side), centre, radii, tilt, yaw) < 0, label, over, sl)


# ---------------------------------------------------------------------------------------------------- the brain
def tentorium_height(x, y):
    """Height z of the tentorium: a tent, highest behind the midbrain, lowest along the transverse sinuses."""
    rise = np.maximum(29 - 0.5 * np.abs(y + 45), 2)
    return -27 + rise * np.exp(-((x / 30) ** 2))


def behind_petrous(x, y):
    """Positive (mm) behind the petrous ridge, where the tentorium is the floor of the cerebrum."""
    return -(y + 8 + 0.8 * (np.abs(x) - 12))


def callosum(y, z, grow=0.0):
    """Outer contour of the corpus callosum in the mid-sagittal plane, as a signed distance."""
    q = (y * 0, y, z)
    return ellipsoid(q, (0, -3, 2), (1, 38 + grow, 24 + grow), tilt=3)


def cerebrum_hull(p):
    """Signed distance of the smooth outer shape of both hemispheres (no sulci, no fissure between them)."""
    x, y, z = p
    ax = np.abs(x)
    d = ellipsoid(p, (0, -18, 13), (67, 86.5, 61))
    # the frontal lobe is narrower than the parietal: squeeze the front, square the back a little
    d = d + 5.5 * sigmoid((y - 18) / 9) * sigmoid((ax - 34) / 8)
    d = d + 4.0 * np.exp(-(((y + 95) / 22) ** 2)) * np.exp(-(((z - 40) / 22) ** 2))
    tent = tentorium_height(ax, y)
    floor = np.maximum(tent + 2.2, -15)
    floor = floor + (-22 + 7 * np.exp(-(((ax - 24) / 13) ** 2)) - floor) * sigmoid((y - 11) / 3)
    d = smooth_max(d, (floor - z) * 0.9, 7)
    t = ellipsoid((ax, y, z), (42.5, -19, -20), (23.5, 40, 23), tilt=-9, yaw=-4)
    t = smooth_min(t, ellipsoid((ax, y, z), (23, -17, -20), (10, 24, 10), tilt=-12, yaw=-6), 7)
    back = sigmoid(behind_petrous(ax, y) / 4)
    t = smooth_max(t, (back * (tent + 2.2) + (1 - back) * -44 - z) * 0.9, 5)
    # the temporal pole is free in front (sphenoid wing between it and the frontal lobe), joined behind
    return np.where(y > 6, np.minimum(d, t), smooth_min(d, t, 6))


def sylvian(p):
    """Distance from the Sylvian fissure: the cleft above the temporal lobe and the sheet over the insula."""
    x, y, z = p
    ax = np.abs(x)
    side = np.where(x < 0, 1.0, -1.0).astype(np.float32)  # left fissure longer and flatter
    zs = -4 - (0.40 - 0.04 * side) * y + 1.5 * np.sin(y / 9) + 1.8 * np.sin(ax / 6.5 + side)
    cleft = np.maximum(np.abs(z - zs) * 0.92, np.maximum(38 - ax, np.maximum(y - 20, -(48 + 3 * side) - y)))
    xi = 40.8 - 0.022 * (z - 5) ** 2 - 0.008 * (y - 2) ** 2 + 0.8 * np.sin(y / 4)
    sheet = np.maximum(np.abs(ax - xi), np.maximum(np.abs(y - 1) - 23, np.maximum(zs - 7 - z, z - 19 + 0.1 * y)))
    return np.minimum(cleft, sheet), zs


def named_sulci(p):
    """Distance from the central, cingulate, parieto-occipital and calcarine sulci (sheets), and their depth."""
    x, y, z = p
    ax = np.abs(x)
    wob = 2.0 * np.sin(z / 7 + np.sign(x)) + 1.5 * np.sin(ax / 6 + 2 * np.sign(x))
    central = np.where(z > 14, np.abs(y + 8 + (z - 14) * 0.42 + wob) * 0.9, 99)
    cing = np.abs(callosum(y, z, 12) + 1.2 * np.sin(y / 8 + np.sign(x)))
    cing = np.where((ax < 18) & (z > -8) & (y > -52), cing, 99)
    po = np.where((ax < 20) & (z > 6), np.abs(y + 66 + (z - 8) * 0.45 + 1.5 * np.sin(z / 6)), 99)
    calc = np.where((ax < 26) & (y < -50), np.abs(z - 5 - 0.06 * (y + 60) + 1.5 * np.sin(y / 7)), 99)
    d = np.minimum(np.minimum(central, cing), np.minimum(po, calc))
    return d.astype(np.float32)


def fold_cerebrum(head):
    """Paint folded cortex and white matter of both hemispheres; return the hull's signed distance (full grid)."""
    sl = head.box((-74, -110, -52), (74, 76, 82))
    p = head.at(sl)
    x, y, z = p
    ax = np.abs(x)
    hull = cerebrum_hull(p)
    syl, _ = sylvian(p)
    core = (ellipsoid(p, (0, -3, 2), (27, 38, 24), tilt=3) < 0) & (ax < 14)
    core &= ~((y > 8) & (z < -6 + 0.3 * (y - 8)))  # below the rostrum the hemispheres are apart
    inside = (hull < 0) & ((ax > 2.0) | core)
    # depth below the smooth surface, the Sylvian cleft and medial wall counted as surface; its gradient
    depth = -signed_distance(inside & (syl > 1.1))
    soft = ndi.gaussian_filter(depth, 2.5)
    g = np.gradient(soft)
    norm = np.sqrt(g[0] ** 2 + g[1] ** 2 + g[2] ** 2) + 0.15
    push = [-0.8 * np.clip(depth, 0, 18) * gi / norm for gi in g]
    q = [c + d for c, d in zip(p, push, strict=True)]
    # a sulcus is where a band-limited field, evaluated at the surface point above, changes sign
    field = waves(q, 28.0, 26, 1) + 0.2 * waves(q, 16.0, 12, 2)
    gf = np.gradient(field)
    slope = np.sqrt(gf[0] ** 2 + gf[1] ** 2 + gf[2] ** 2)
    sheet = np.abs(field) / np.maximum(slope, 0.11)
    reach = 13.5 + 3.5 * waves(q, 70.0, 9, 3) - 9 * (waves(q, 42.0, 9, 4) > 1.35)
    named = named_sulci(p)
    reach = np.where((named < 6.5) | (syl < 6.5), 3.0, np.clip(reach, 3, 20))
    flare = 0.9 * np.exp(-np.maximum(depth, 0) / 1.8)
    width = 0.55 + 0.25 * np.clip(1 - depth / 14, 0, 1) + flare
    csf = (sheet < width) & (depth < reach)
    csf |= (named < width + 0.15) & (depth < 16)
    csf |= syl < 1.1
    csf &= ~core
    pial = largest(inside & ~csf)
    thick = ndi.gaussian_filter(ndi.distance_transform_edt(pial).astype(np.float32), 0.6)
    white = thick > 2.75 + 0.3 * waves(p, 60.0, 7, 5)
    # no cortex on the callosum, around the ventricles and towards the brain stem
    bare = core
    bare |= (ax < 15 + 2 * np.sin(y / 9)) & (y > -38) & (y < 9) & (z < 4) & (callosum(y, z, 3) < 0) & (hull < 0)
    white |= bare & pial
    for side, (wm, gm) in ((-1, (2, 3)), (1, (41, 42))):
        half = x * side >= 0
        half &= (x != 0) | (side > 0)
        w = largest(white & half)
        head.paint(pial & half, gm, sl=sl)
        head.paint(w, wm, sl=sl)
    full = head.empty()
    full[sl] = hull
    return full


def cerebellum_shape(p):
    x, y, z = p
    ax = np.abs(x)
    d = ellipsoid((ax, y, z), (25, -63, -36), (29, 28, 21.5), tilt=-8)
    d = smooth_min(d, ellipsoid((ax, y, z), (0, -58, -26), (15, 23, 24)), 9)
    d = smooth_min(d, ellipsoid((ax, y, z), (17, -41, -21), (17, 13, 12)), 6)  # anterior lobe
    d = smooth_max(d, (z - tentorium_height(ax, y) + 1.8) * 0.85, 4)
    notch = ellipsoid((ax, y, z), (0, -93, -45), (7, 13, 18))  # posterior cerebellar notch
    front = (y + 31 - 0.05 * ax + 0.35 * np.maximum(z + 20, 0)) * 0.95  # the peduncles and the pons lie in front
    return smooth_max(smooth_max(d, -notch, 5), front, 6)


def fold_cerebellum(head):
    """Paint the cerebellum: folia fan out from the roof of the fourth ventricle; return its signed distance."""
    sl = head.box((-60, -102, -66), (60, -26, 6))
    p = head.at(sl)
    x, y, z = p
    ax = np.abs(x)
    hull = cerebellum_shape(p)
    inside = hull < 0
    depth = -signed_distance(inside)
    fy, fz = y + 47, z + 31 + 0.08 * ax
    ang = np.arctan2(fz, -fy) + 0.004 * ax + 0.06 * np.sin(ax / 11 + 0.4 * np.sign(x))
    radius = np.sqrt(fy**2 + fz**2) + 0.5 * ax
    fissures, folia = 9, 27

    def gap(n, phase):  # distance in mm from the nearest of n sheets per turn
        t = ang * n / (2 * np.pi) + phase
        return np.abs(t - np.round(t)) * 2 * np.pi / n * radius

    deep = (gap(fissures, 0.15) < 0.9) & (depth < 13)
    fine = (gap(folia, 0.45) < 0.55) & (depth < 6.0)
    ctx_src = inside & ~deep & ~fine
    thick = ndi.gaussian_filter(ndi.distance_transform_edt(ctx_src).astype(np.float32), 0.5)
    white = (thick > 2.75) & (ax > 2.0)
    core = ellipsoid((ax, y, z), (16, -56, -36), (16, 11, 7.5), tilt=-10)
    white |= (core < 0) & inside
    vermis_tree = (ax < 4) & inside & (depth > 7) & (gap(fissures, 0.65) < 1.6)
    white |= vermis_tree
    csf = deep & (depth < 5)
    for side, (wm, gm) in ((-1, (7, 8)), (1, (46, 47))):
        half = (x * side >= 0) & ((x != 0) | (side > 0))
        head.paint(inside & half & ~csf, gm, sl=sl)
        head.paint(largest(white & half & ~csf), wm, sl=sl)
    full = head.empty()
    full[sl] = hull
    return full


STEM = dict(
    pts=[(0, -21, -4), (0, -24, -14), (0, -27, -27), (0, -30, -37), (0, -38, -48), (0, -43, -58), (0, -45, -62)],
    radii=[7.5, 8, 9.5, 9, 6.6, 5.6, 5.2],
)
CORD = [(0, -45, -61), (0, -48, -75), (0, -50, -95), (0, -51, -130)]


def stem_sdf(head):
    d = head.empty()
    head.sdf_tube(d, STEM["pts"], STEM["radii"], squash=(1.3, 1, 1), k=3)
    head.sdf_ellipsoid(d, (0, -24, -31), (16, 9.8, 11.5), k=4)  # pons
    for side in (-1, 1):
        head.sdf_tube(d, [(8, -15, -6), (7, -18, -15), (7, -22, -24)], [5, 5, 5.2], side, k=3)  # cerebral peduncles
        head.sdf_tube(d, [(13, -29, -31), (16, -42, -33)], [6, 5], side, k=3)  # middle cerebellar peduncles
        head.sdf_ellipsoid(d, (5, -34.5, -6), (4, 3.5, 4), side, k=2)  # colliculi
    return d


def deep_structures(head):
    """Paint nuclei, hippocampus, amygdala, brain stem and ventricles. `g` makes left and right differ by a few %."""
    for k, side in enumerate((-1, 1)):
        ids = {n: v[k] for n, v in PAIRS.items()}
        g = 1.02 if side < 0 else 0.985
        wm = ids["Cerebral-White-Matter"]
        # white matter bed: internal capsule and surroundings, so that no sulcus reaches the nuclei
        head.blob((18.5, -4, 4), (15.8, 30, 18), wm, side, over=[24, ids["Cerebral-Cortex"]])
        head.blob((9, -12, -9), (10.5 * g, 13, 7), ids["VentralDC"], side, tilt=8)
        head.blob((11.2, -18, 7), (9.2 * g, 16.5, 10.8), ids["Thalamus"], side, yaw=-14, tilt=4)
        head.blob((15, -29, 7), (7, 6.5, 6.5), ids["Thalamus"], side)  # pulvinar
        head.blob((25.5, 1, 2.5), (6.2 * g, 18, 11.5), ids["Putamen"], side, yaw=-14, tilt=-6)
        head.blob((18.6, -3.5, 0.5), (5.2 * g, 10.5, 8.2), ids["Pallidum"], side, yaw=-24)
        caud = [(12.5, 20, 1), (14, 11, 7), (15, 0, 14), (17, -14, 18.5), (22, -28, 18), (27.5, -35, 11), (31, -34, 0),
                (33, -25, -8)]  # fmt: skip
        head.tube(
            caud, np.array([5.8, 5.7, 4.2, 3.0, 2.2, 1.5, 1.3, 1.2]) * g, ids["Caudate"], side, squash=(1, 1, 1.15)
        )
        head.blob((10, 11, -5.5), (5, 6.2, 4.2), ids["Accumbens-area"], side)
        # hippocampus in the floor of the inferior horn, amygdala in front of and above its head
        bed = [(24, 0, -19), (27, -18, -16), (29, -34, -6), (27, -42, 4)]
        head.tube(bed, [8.5, 8.5, 7.5, 6], wm, side, over=[24, ids["Cerebral-Cortex"]])
        hip = [(21.5, -11, -20.5), (27, -15, -18.5), (29, -25, -13), (28, -33, -6), (23, -38, 1), (17, -38, 6)]
        horn = [(28, -6, -17), (32.5, -12, -15), (34, -24, -9.5), (32.5, -33, -2), (29, -40, 5)]
        head.tube(horn, np.array([1.4, 1.9, 1.9, 2.3, 3.4]) * g, ids["Inf-Lat-Vent"], side)
        head.blob((22.5, -2.5, -19), (7.5 / g, 8, 7), ids["Amygdala"], side)
        head.tube(hip, np.array([5.6, 6.0, 5.2, 4.5, 3.3, 1.7]) / g, ids["Hippocampus"], side)
        # lateral ventricle: frontal horn, body, atrium, occipital horn
        vent = [(8.5, 31, 3), (7.5, 22, 7), (6.5, 10, 12.5), (7, -5, 17.5), (9.5, -20, 19.5), (17, -33, 17),
                (24, -41, 10), (27, -47, 6)]  # fmt: skip
        head.tube(vent, np.array([2.8, 4.6, 4.9, 4.6, 4.6, 5.2, 6.0, 5.0]) * g, ids["Lateral-Ventricle"], side,
                  over=[2, 41, 3, 42, 24, ids["Inf-Lat-Vent"]])  # fmt: skip
        head.tube([(27, -47, 6), (26, -58, 5), (23, -72, 4)], np.array([4.6, 3.3, 1.6]) * g, ids["Lateral-Ventricle"],
                  side, over=[2, 41])  # fmt: skip
    # septum pellucidum and fornix between the ventricles (white matter, by side)
    sl = head.box((-4, -36, -2), (4, 34, 24))
    x, y, z = head.at(sl)
    for side, wm in ((-1, 2), (1, 41)):
        on_side = (x * side >= 0) & ((x != 0) | (side > 0))
        head.paint((np.abs(x) < 1.2) & on_side & (callosum(y, z) < 0), wm, [4, 43, 24, 3, 42], sl)
        head.tube([(2, 6, 1), (2, 3, 8), (2, -8, 13), (3, -22, 13), (8, -33, 11)], 2.0, wm, side,
                  over=[4, 43, 24, 2, 41, 14])  # fmt: skip
    # brain stem, aqueduct, third and fourth ventricle
    stem = stem_sdf(head)
    z = head.p[2]
    head.paint((stem < 0) & (z > -63), 16, over=[24, 2, 41, 3, 42, 7, 8, 46, 47, 507, 515, 516, 540, 28, 60])
    for k, side in enumerate((-1, 1)):
        head.blob((9, -11, -8), (9.6, 10.5, 6), PAIRS["VentralDC"][k], side, over=[16, 24, 2, 41, 3, 42])
    sl = head.box((-4, -34, -16), (4, 8, 16))
    x, y, z = head.at(sl)
    slit = ellipsoid((x * 0, y, z), (0, -11, 0), (1, 15.5, 11.5), tilt=14)
    half_width = 2.0 + 0.5 * np.sin((y + 4) / 6)
    adhesion = ((y + 14) / 4) ** 2 + ((z - 4) / 3) ** 2 < 1
    head.paint((slit < 0) & (np.abs(x) < half_width) & ~adhesion, 14, sl=sl)
    head.tube(
        [(0, -25, -2), (0, -28.5, -9), (0, -33, -19), (0, -39, -29)], 1.2, 15, over=[16, 10, 49, 28, 60, 2, 41, 24]
    )
    sl = head.box((-14, -56, -50), (14, -34, -18))
    x, y, z = head.at(sl)
    dia = np.abs(x) / (8 - 0.12 * np.abs(z + 32)) + np.abs(z + 33) / 14
    roof = np.abs(y + 42.5 - 0.25 * (z + 33) * -1) / (5.2 * np.clip(1.15 - dia, 0.05, 1))
    head.paint((dia < 1) & (roof < 1), 15, sl=sl)


# ---------------------------------------------------------------------------------------------------- the head
def cranial_cavity(head, cerebrum, cerebellum):
    """Signed distance from the surface of the cavity that dura lines: the brain, closed and widened by CSF."""
    d = np.minimum(np.minimum(cerebrum, cerebellum), stem_sdf(head) - 0.5)
    head.sdf_ellipsoid(d, (0, 0, -16), (13, 9, 6))  # suprasellar cistern
    head.sdf_ellipsoid(d, (0, -68, -50), (15, 12, 8))  # cisterna magna
    for side in (-1, 1):
        head.sdf_ellipsoid(d, (10, -38, -9), (15, 13, 13), side)  # ambient and quadrigeminal cisterns
        head.sdf_ellipsoid(d, (22, -39, -20), (15, 10, 10), side)  # below the tentorial edge
        head.sdf_ellipsoid(d, (42, -50, -26), (14, 14, 6), side)
    sl = head.box((-80, -116, -70), (80, 82, 86))
    mask = (d[sl] < 0) & (head.p[2][sl] > -61)
    grown = ndi.distance_transform_edt(~mask) < 6.5
    dist = ndi.gaussian_filter(ndi.distance_transform_edt(grown).astype(np.float32), 1.2)
    closed = np.zeros(SHAPE, bool)
    closed[sl] = ndi.binary_fill_holes(largest(dist > 4.6))
    return ndi.gaussian_filter(signed_distance(closed), 1.3)


def head_solid(head, cavity, skull):
    """Signed distance of the outer head: scalp over the skull, face, nose, ears, neck."""
    x, y, z = head.p
    scalp = 6.2 + 1.0 * np.sin(y / 40 + 1) + 5.0 * sigmoid((-18 - z) / 8) * sigmoid((-y - 50) / 12)
    scalp = scalp + 4.5 * np.exp(-(((y - 14) / 26) ** 2)) * np.exp(-(((z + 6) / 22) ** 2)) * sigmoid(
        (np.abs(x) - 45) / 5
    )
    d = cavity - skull - scalp
    d = ndi.gaussian_filter(d, 1.5)
    k = 14
    head.sdf_ellipsoid(d, (0, 36, -62), (61, 52, 66), k=k)  # face
    head.sdf_ellipsoid(d, (0, -76, -50), (52, 38, 34), k=k)  # nape
    head.sdf_ellipsoid(d, (0, 70, -106), (26, 23, 14), k=10)  # chin
    head.sdf_tube(d, [(0, 60, -84), (0, 74, -82)], [22, 18], squash=(1.3, 1, 1), k=8)  # lips
    head.sdf_ellipsoid(d, (0, 70, -12), (38, 18, 18), k=10)  # forehead
    for side in (-1, 1):
        head.sdf_tube(d, [(34, 60, -50), (50, 36, -46)], [22, 17], side, k=10)  # cheek
        head.sdf_tube(d, [(10, 77, -20), (38, 66, -21), (50, 52, -26)], [7.5, 8, 7], side, k=8)  # brow
        head.sdf_ellipsoid(d, (32, 62, -33), (13, 12.5, 12), side, k=5)  # lid over the globe
    head.sdf_tube(d, [(0, 80, -24), (0, 88, -38), (0, 92.5, -51)], [5.5, 7.5, 9], k=6)  # nose
    for side in (-1, 1):
        head.sdf_ellipsoid(d, (11, 86, -54), (7, 9, 7), side, k=4)  # ala
    neck = np.sqrt(((x) / 57) ** 2 + ((y + 18) / (58 + 0.05 * (z + 121))) ** 2)
    neck = np.maximum((neck - 1) * 57, z + 55)
    d = smooth_min(d, neck.astype(np.float32), 16)
    hollow = head.empty()
    for side in (-1, 1):
        ear = head.empty()
        head.sdf_ellipsoid(ear, (79, -34, -24), (7, 15, 29), side, tilt=12, yaw=-22)
        head.sdf_ellipsoid(hollow, (84, -30, -23), (4.5, 9, 20), side, tilt=12, yaw=-22)
        d = smooth_min(d, ear, 3)
        head.sdf_tube(hollow, [(84, -29, -37), (68, -26, -37), (60, -24, -40)], [3.5, 3.0, 2.6], side)  # ear canal
        head.sdf_tube(hollow, [(6, 95, -60), (6, 87, -56), (5, 76, -53)], [3.5, 3.8, 3.8], side)  # nostril
    hollow[cavity < 4] = 99  # the ear canal ends before the cranial cavity
    return np.maximum(d, -hollow)


def skull_bones(head, cavity, skull):
    """Signed distance of all bone: vault, base, face, mandible, cervical spine (before cavities are carved)."""
    z = head.p[2]
    d = np.where(z > -66, cavity - skull, 99).astype(np.float32)
    head.sdf_ellipsoid(d, (0, -96, -40), (16, 9, 20), k=8)  # occipital crest
    head.sdf_ellipsoid(d, (0, 16, -29), (17, 19, 13), k=4)  # body of the sphenoid
    head.sdf_tube(d, [(0, 2, -27), (0, -12, -44), (0, -20, -60)], [9, 8, 5], squash=(1.5, 1, 1), k=4)  # clivus
    head.sdf_ellipsoid(d, (0, 72, -16), (34, 12, 14), k=8)  # glabella and brow
    head.sdf_tube(d, [(0, 78, -24), (0, 85, -37)], [4, 2.5], squash=(1.4, 1, 1), k=3)  # nasal bone
    head.sdf_tube(d, [(0, 20, -60), (0, 70, -62)], [3.0, 3.0], squash=(6.5, 1, 1), k=3)  # hard palate
    head.sdf_tube(d, [(0, 20, -40), (0, 74, -52)], [1.3, 1.3], squash=(1, 1, 9), k=0)  # nasal septum (upper part)
    arch = [(0, 76), (13, 74), (22, 66), (27, 52), (29, 36)]
    for side in (-1, 1):
        head.sdf_tube(d, [(54, -26, -38), (36, -18, -40), (18, -8, -38)], [11, 9, 6], side, k=4)  # petrous
        head.sdf_ellipsoid(d, (51, -33, -50), (9, 13, 18), side, k=4)  # mastoid
        head.sdf_tube(d, [(26, 20, -20), (50, 24, -18)], [4, 4], side, k=4)  # sphenoid wing
        head.sdf_tube(d, [(14, 18, -32), (16, 20, -60)], [4, 3], side, squash=(1, 1.8, 1), k=3)  # pterygoid
        head.sdf_ellipsoid(d, (29, 44, -31), (20.5, 31, 20), side, yaw=16)  # orbital walls (orbit carved later)
        head.sdf_ellipsoid(d, (28, 50, -55), (18.5, 21.5, 17), side)  # maxilla
        zyg = [(44, 58, -44), (56, 42, -46), (63, 22, -42), (65, 2, -37), (60, -14, -34)]
        head.sdf_tube(d, zyg, [6, 5.5, 3.2, 2.8, 4], side, squash=(1, 1, 1.3), k=2)
        teeth = [(a, b, -68) for a, b in arch]
        head.sdf_tube(d, teeth, 4.2, side, squash=(1, 1, 1.6), k=2)  # upper alveolus and teeth
        jaw = [(0, 74, -104), (15, 71, -104), (31, 52, -102), (42, 26, -99), (47, 6, -92)]
        head.sdf_tube(d, jaw, [6.2, 6, 5.2, 5, 5], side, squash=(1, 1, 1.9), k=2)
        head.sdf_tube(d, [(a * 0.98, b - 1, -84) for a, b in arch], 3.8, side, squash=(1, 1, 1.9), k=3)  # lower teeth
        head.sdf_tube(d, [(47, 8, -92), (50, 6, -66), (51, -4, -44)], [5.5, 5.0, 4.5], side, squash=(0.8, 1.8, 1), k=2)
        head.sdf_tube(d, [(48, 14, -72), (47, 20, -52)], [4.5, 2.5], side, k=2)  # coronoid process
    # atlas, axis and below: bodies in front of the canal, arches behind, discs between
    for i, zc in enumerate((-72, -88, -105, -122)):
        yc = -28 - 1.0 * i
        if i:
            head.sdf_ellipsoid(d, (0, yc, zc), (13, 10, 8.5))
        else:
            head.sdf_tube(d, [(0, -24, -70), (0, -26, -82)], [5, 6])  # dens
        for side in (-1, 1):
            ring = [(0, -16, zc), (17, -24, zc)] if i == 0 else [(11, -34 - i, zc), (17, -38 - i, zc)]
            ring += [(23 - 3 * (i > 0), -36 - i, zc), (15, -56 - i, zc - 1), (0, -66 - 2.5 * i, zc - 3)]
            head.sdf_tube(d, ring, 4.2, side, squash=(1, 1, 1.3), k=2)
    return d


def paint_bone(head, bone, inside):
    """Cortical bone as a 1.8 mm rind of every bone, cancellous bone within."""
    solid = (bone < 0) & inside
    depth = ndi.gaussian_filter(ndi.distance_transform_edt(solid).astype(np.float32), 0.8)
    head.paint(solid, 515)
    head.paint(solid & (depth > 2.4), 516)


def paint_face(head, skin_depth):
    """Orbits, eyes, airways and their mucosa, tongue."""
    soft = [507, 511, 515, 516]
    for side in (-1, 1):
        orbit = head.empty()
        head.sdf_tube(orbit, [(31.5, 64, -32), (29, 48, -31.5), (13, 17, -24)], [16.5, 16, 3.5], side)
        head.paint((orbit < 0) & (skin_depth > 2), 507, [515, 516])
        apex, globe = np.array([13.5, 18, -24.0]), np.array([32.0, 58, -32.5])
        for off in ((0, 0, 10.5), (0, 0, -10.5), (11, 0, 0), (-11, 0, 0)):
            mid = 0.45 * apex + 0.55 * globe + 0.95 * np.array(off) + [0, -3, 0]
            head.tube([tuple(apex), tuple(mid), tuple(globe + off)], [1.6, 2.4, 1.3], 508, side, over=[507])
        head.blob(tuple(globe), (11.7, 11.9, 11.7), 506, side, over=[507, 508])
        head.tube([(30.5, 46.5, -32), (22, 32, -28), (13, 18, -23.5)], 2.1, 530, side, over=[507, 508])
        head.tube(
            [(13, 18, -23.5), (8, 10, -18.5), (2, 3, -14.5)], [2.1, 2.0, 2.2], 530, side, over=[507, 515, 516, 540, 24]
        )
        head.tube([(2, 3, -14.5), (7, -4, -13), (12, -12, -10)], 1.8, 530, side, over=[24])  # tract
    head.tube([(-4, 3, -14.5), (4, 3, -14.5)], 2.2, 530, over=[24, 540])  # chiasm
    air = head.empty()
    x, y, z = head.p
    # nasal cavity with three turbinates a side, sinuses, pharynx, mouth
    for side in (-1, 1):
        g = 1.06 if side < 0 else 0.96
        head.sdf_tube(air, [(6.5, 74, -50), (7, 55, -46), (7, 24, -47)], [5, 6.5, 6.5], side, squash=(0.85, 1, 1.75))
        head.sdf_tube(air, [(6, 88, -57), (6, 74, -53)], [3.2, 3.5], side)
        head.sdf_ellipsoid(air, (28, 50, -57.5), (13.5 * g, 16 * g, 12), side)  # maxillary
        head.sdf_ellipsoid(air, (7, 18, -29), (6.2 * g, 10, 7.5), side)  # sphenoid
        for i in range(4):
            head.sdf_ellipsoid(air, (6.8, 36 + 9 * i, -31.5), (4.0, 3.9, 5.5), side)  # ethmoid cells
        head.sdf_ellipsoid(air, (9 * g, 75, -12), (9 * g, 3.8, 9 * g), side)  # frontal
        for k in range(5):  # mastoid cells
            head.sdf_ellipsoid(air, (50 + 2.5 * (k % 2), -27 - 4 * (k % 3), -40 - 4.5 * k), (2.2, 2.4, 2.0), side)
    turb = head.empty()
    for side in (-1, 1):
        for zt, w in ((-56, 3.2), (-47, 2.8), (-39.5, 2.0)):
            head.sdf_tube(turb, [(9.0, 66, zt), (9.0, 28, zt)], w, side, squash=(0.9, 1, 1))
    head.sdf_tube(air, [(0, 18, -48), (0, 8, -54), (0, 4, -75), (0, 6, -100), (0, 10, -130)], [9, 8.5, 7.5, 8, 9],
                  squash=(1.25, 0.8, 1))  # fmt: skip
    tongue = ellipsoid((x, y, z), (0, 38, -88), (23, 33, 18))
    mouth = np.minimum(ellipsoid((x, y, z), (0, 38, -84), (25, 34, 18)), 99)
    mouth = np.maximum(np.maximum(mouth, -tongue + 0.3), -(z + 79))
    air = np.minimum(air, mouth)
    hollow = (air < 0) & (skin_depth > 0)
    lining = (air < 1.9) & (skin_depth > 2)
    head.paint(lining, 509, soft)
    head.paint(hollow, 0, [*soft, 509])
    head.paint((turb < 0) & hollow & (np.abs(x) > 4), 509, [0])
    head.paint((tongue < 0) & (z < -70) & (bone_free(head)), 507, [0, 509])


def bone_free(head):
    return (head.lab != 515) & (head.lab != 516)


def paint_spine(head, inside):
    """Spinal canal: dura, CSF and cord, from the foramen magnum down."""
    canal = head.empty()
    head.sdf_tube(canal, [(0, -44, -56), *CORD], [12, 10.5, 9.5, 8.5, 8.5], squash=(1.15, 1, 1))
    z = head.p[2]
    low = inside & (z < -57)
    head.paint((canal < 1.2) & low, 540, [507, 515, 516])
    head.paint((canal < 0) & low, 24, [507, 515, 516, 540])
    cord = head.empty()
    head.sdf_tube(cord, CORD, [5.2, 4.6, 4.5, 4.5], squash=(1.3, 1, 1))
    head.paint((cord < 0) & inside & (z <= -62), 512, [24, 540, 507])


def paint_dura_folds(head, cavity):
    """Falx, tentorium and the venous sinuses in their edges."""
    x, y, z = head.p
    ax = np.abs(x)
    free = ellipsoid((x * 0, y, z), (0, 3, 2), (1, 46, 31), tilt=3)
    tent = tentorium_height(ax, y)
    falx = (ax < 0.75) & (cavity < 0.5) & (free > 0) & (z > tent - 1)
    falx &= ((z > -16) | (y < -40)) & ((y > 0) | (z > -12) | (y < -45))
    head.paint(falx, 540, [24, 3, 42, 2, 41])
    notch = ellipsoid((ax, y, z * 0), (0, -28, 0), (19, 23, 1))
    leaf = (np.abs(z - tent) < 0.85) & (cavity < 0.5) & (notch > 0) & (behind_petrous(ax, y) > 0) & (y < -14)
    head.paint(leaf, 540, [24, 3, 42, 8, 47])
    # sinuses
    sss = (ax < 1.2 + 0.75 * (cavity + 5)) & (cavity > -5) & (cavity < 0.9)
    sss &= (y < 58) & (z > tent - 2) & ((z > 0) | (y < -40))
    head.paint(sss, 514, [24, 540, 3, 42])
    trans = np.sqrt((cavity + 1.2) ** 2 + (z - tent + 0.5) ** 2) < np.where(x > 0, 3.3, 2.7)  # right one larger
    head.paint(trans & (y < -46), 514, [24, 540, 3, 42, 8, 47])
    straight = np.sqrt(x**2 + (z - tent - 0.8) ** 2) < 1.9
    head.paint(straight & (y < -47) & (cavity < 0), 514, [24, 540, 3, 42, 8, 47])
    any_head = [24, 540, 507, 515, 516]
    for side in (-1, 1):
        r = 3.4 if side > 0 else 2.8
        head.tube([(55, -46, -28), (50, -42, -40), (40, -36, -50), (30, -26, -58)], r, 514, side, over=any_head)
        head.tube([(30, -26, -58), (31, -12, -80), (34, -4, -130)], [r, r + 1, r + 2], 514, side, over=[507, 515, 516])
        head.tube([(1.5, 3, 11), (2, -12, 14.5), (1.5, -28, 11.5)], 1.0, 514, side, over=[24, 14])  # internal cerebral
        head.tube([(11, -2, -18), (17, -22, -10), (12, -36, 0), (1, -42, 6)], 1.2, 514, side, over=[24])  # basal v.
    head.tube([(0, -29, 11), (0, -42, 8), (0, -48, 2)], 1.9, 514, over=[24, 540])  # Galen


def surface_points(cavity, directions, level):
    """Where rays from (0, -18, 10) cross cavity == level (mm)."""
    r = np.arange(20, 110, 0.5)
    out = []
    for v in directions:
        v = np.asarray(v, float) / np.linalg.norm(v)
        pts = np.array([0, -18, 10]) + r[:, None] * v
        val = ndi.map_coordinates(cavity, (pts - CORNER).T, order=1, mode="nearest")
        out.append(tuple(pts[np.argmax(val > level)]))
    return out


def paint_vessels(head, cavity):
    """Arteries (carotid, vertebral, circle of Willis, cerebral branches) and bridging cortical veins."""
    space = [24, 3, 42, 540]
    bone = [24, 540, 507, 515, 516]
    for side in (-1, 1):
        j = 1.0 if side > 0 else -0.7  # small left/right differences
        ica = [(31, 2, -130), (28, -2, -90), (27, -4, -62), (25, -6, -46), (14, 0, -38), (11, -1, -29), (11, 8, -24)]
        head.tube(ica, [3.0, 2.7, 2.5, 2.4, 2.2, 2.2, 2.2], 502, side, over=bone)
        head.tube([(11, 8, -24), (11.5, 4, -18), (10, 3, -15)], 2.0, 502, side, over=bone)
        head.tube(
            [(10, 3, -15), (20, 4 + j, -14), (30, 4, -13), (37, 3, -8)],
            [1.9, 1.7, 1.6, 1.5],
            502,
            side,
            [*space, 2, 41],
        )
        for up, y1 in ((14, 12), (12, -2 + j), (8, -14)):  # branches over the insula, out through the fissure
            zs = -4 - 0.4 * y1
            head.tube(
                [(38, 3, -7), (40, y1, zs + up * 0.5), (40.5, y1 - 3, zs + up)], [1.4, 1.1, 0.9], 502, side, space
            )
            out = [(40, y1, zs), (50, y1 - 3, zs + 1), (61, y1 - 6, zs + 2)]
            head.tube(out, [1.2, 1.1, 1.0], 502, side, space)
        for el, back in ((0.35, 25), (0.5, -5), (0.1, -45), (-0.1, -25)):
            d = [(1, (back * 0.6 - 0.0) / 60, el * 0.4 - 0.1), (1, back / 60, el), (1, back / 45, el * 1.7)]
            head.tube(surface_points(cavity, [np.array(v) * [side, 1, 1] for v in d], -2.0), 0.95, 502, 1, [24, 3, 42])
        head.tube([(10, 3, -15), (5, 8, -14.5), (2.0, 12, -13)], [1.5, 1.4, 1.3], 502, side, [*space, 2, 41])
        aca = [
            (2, 12, -13),
            (2, 28, -10),
            (2, 37, 0),
            (2, 36, 12),
            (2, 26, 22),
            (2, 8, 27.5),
            (2, -15, 28),
            (2, -34, 23),
        ]
        head.tube(aca, [1.5, 1.4, 1.3, 1.3, 1.2, 1.1, 1.0, 0.9], 502, side, space)
        pca = [(0, -11.5, -19), (8, -13, -17), (17, -22, -12), (19, -34, -6), (14, -50, -1), (9, -68, 4), (7, -82, 5)]
        head.tube(pca, [1.5, 1.5, 1.3, 1.3, 1.2, 1.0, 0.9], 502, side, [24, 3, 42])
        head.tube([(10, 3, -15.5), (9, -6, -17), (8, -13, -17)], 1.0, 502, side, [24, 540])  # posterior communicating
        head.tube([(0, -13.5, -40), (5, -17, -50), (9, -28, -58), (15, -36, -65), (23, -30, -72), (19, -27, -90),
                   (19, -28, -130)], [1.7, 1.7, 1.8, 1.8, 1.8, 1.8, 1.8], 502, side, bone)  # fmt: skip
        head.tube([(1, -13, -22), (14, -22, -20), (24, -36, -19)], 1.0, 502, side, [24])  # superior cerebellar
        head.tube([(27, 3, -85), (48, -8, -60), (70, -12, -30)], 1.5, 502, side, [507])  # external carotid
        sup = surface_points(cavity, [(side, -0.05, -0.2), (side, 0.1, 0.15), (side, 0.25, 0.6)], 12.0)
        head.tube(sup, 1.0, 502, 1, [507])  # superficial temporal
        for f in (0.62, 0.25, -0.1, -0.45, -0.8):  # bridging veins down from the superior sagittal sinus
            f = f + 0.05 * j
            path = [(side * s, f + 0.12 * s, (1.0 - 0.25 * s)) for s in (0.03, 0.2, 0.45, 0.8, 1.1)]
            pts = surface_points(cavity, path, -1.6)
            head.tube(pts, [1.7, 1.5, 1.3, 1.1, 0.9], 514, 1, [24, 3, 42])
        lab = surface_points(
            cavity, [(side, 0.5, -0.22), (side, 0.1, -0.12), (side, -0.4, 0.0), (side, -0.75, -0.35)], -1.6
        )
        head.tube(lab, [1.3, 1.3, 1.2, 1.2], 514, 1, [24, 3, 42])  # superficial middle cerebral and Labbe
    head.tube([(-2, 12.5, -13), (2, 12.5, -13)], 1.1, 502, over=space)  # anterior communicating
    head.tube([(0, -13.5, -40), (0, -11, -30), (0, -11.5, -19)], 1.9, 502, over=[24, 540, 515, 16])  # basilar


def clean(lab):
    """Give every voxel without a face neighbour of its own label the label of its left, else upper neighbour."""
    same = np.zeros(lab.shape, np.uint8)
    for axis in range(3):
        a, b = [slice(None)] * 3, [slice(None)] * 3
        a[axis], b[axis] = slice(1, None), slice(None, -1)
        eq = lab[tuple(a)] == lab[tuple(b)]
        same[tuple(a)] += eq
        same[tuple(b)] += eq
    lone = same == 0
    lone &= ~np.isin(lab, (502, 514))
    lab[lone] = np.roll(lab, 1, 2)[lone]


def make():
    head = Head()
    y, z = head.p[1], head.p[2]
    ax = np.abs(head.p[0])
    cerebrum = fold_cerebrum(head)
    cerebellum = fold_cerebellum(head)
    brain = head.lab
    head.lab = np.zeros(SHAPE, np.uint16)
    cavity = cranial_cavity(head, cerebrum, cerebellum)
    skull = 1.2 + 5.6 + 1.3 * sigmoid((-y - 70) / 8) + 0.8 * waves(head.p, 90.0, 7, 6)
    skull = skull - 2.2 * np.exp(-(((z + 2) / 20) ** 2)) * np.exp(-(((y + 8) / 38) ** 2)) * sigmoid((ax - 50) / 4)
    outer = head_solid(head, cavity, skull)
    inside = outer < 0
    skin_depth = ndi.gaussian_filter(-signed_distance(inside), 0.8)
    head.paint(inside, 507)
    head.paint(inside & (skin_depth < 2.0 + 0.2 * np.sin(z / 30)), 511)
    bone = skull_bones(head, cavity, skull)
    paint_bone(head, bone, inside & (skin_depth > 3.0) & (cavity > 0.9))
    head.paint((cavity < 1.2) & inside, 540)
    head.paint(cavity < 0, 24)
    paint_face(head, skin_depth)
    paint_spine(head, inside)
    head.paint((brain > 0) & (head.lab == 24), 0)  # make room, then drop the folded brain in
    room = (brain > 0) & ((head.lab == 0) | (head.lab == 540)) & (cavity < -0.6)
    head.lab[room] = brain[room]
    head.lab[(head.lab == 0) & (cavity < 0)] = 24
    deep_structures(head)
    paint_dura_folds(head, cavity)
    paint_vessels(head, cavity)
    clean(head.lab)
    return head.lab


def pack(raw):
    """gzip without a time stamp; the optional package `deflate` (libdeflate) packs the same bytes 12 % smaller."""
    try:
        import deflate
    except ImportError:
        return gzip.compress(raw, 9, mtime=0)
    return bytes(deflate.gzip_compress(raw, 12))


def save(lab, out):
    affine = np.eye(4)
    affine[:3, 3] = CORNER - BRAIN_CENTRE
    img = nib.Nifti1Image(lab, affine)
    img.header.set_xyzt_units("mm")
    img.set_sform(affine, 2)
    img.set_qform(affine, 2)
    img.header["descrip"] = b"analytic whole-head phantom"
    (out / "labels.nii.gz").write_bytes(pack(img.to_bytes()))
    present = [int(v) for v in np.unique(lab) if v]
    info = {
        "name": "phantom",
        "scheme": "head",
        "derived": {},
        "source": "made by templates/phantom/make_phantom.py from formulas alone; no scan or atlas was used",
        "license": "Apache-2.0",
        "citation": "The analytic head phantom that ships with synthseg (templates/phantom).",
        "labels": {str(v): NAMES[v] for v in present},
    }
    (out / "labels.json").write_text(json.dumps(info, indent=2) + "\n")


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    out = ap.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    lab = make()
    save(lab, out)
    counts = np.bincount(lab.ravel(), minlength=541)
    for v, name in sorted(NAMES.items()):
        print(f"{v:4d}  {name:30s} {counts[v] / 1000:9.2f} ml")
    print(f"labels.nii.gz: {(out / 'labels.nii.gz').stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
