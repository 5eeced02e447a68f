"""One scan in all 48 orientations and three storage types: is the segmentation the same, up to the flip?

    python benchmarks/invariance.py [--scan synthseg/samples/colin27_t1.nii.gz] [--model siam16] [--out FILE.json]

Files are written and read back, as a user would. Prints the number of voxels that differ from the first result.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path

from synthseg.allocator import tune_allocator

tune_allocator()

import nibabel as nib  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from nibabel.orientations import apply_orientation, inv_ornt_aff  # noqa: E402

from synthseg.inference import segment  # noqa: E402
from synthseg.networks.checkpoint import load_model  # noqa: E402
from synthseg.paths import data_dir  # noqa: E402
from synthseg.volume import load_volume  # noqa: E402


def stored(data: np.ndarray, affine: np.ndarray, kind: str) -> nib.Nifti1Image:
    """The same intensities as int16, float32, or uint8 with a slope and an intercept."""
    if kind == "scaled uint8":
        image = nib.Nifti1Image(data.astype(np.uint8), affine)
        image.header.set_slope_inter(2.5, -7.0)
        return image
    return nib.Nifti1Image(data.astype({"int16": np.int16, "float32": np.float32}[kind]), affine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", type=Path, default=data_dir("samples") / "colin27_t1.nii.gz")
    parser.add_argument("--model", default="siam16")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model(options.model)
    source = nib.load(options.scan)
    data = np.rint(np.asarray(source.dataobj, dtype=np.float32))
    if data.min() < 0 or data.max() > 255:
        sys.exit(f"{options.scan}: needs values from 0 to 255 to be stored in all three types")
    reference: np.ndarray | None = None
    worst, rows = 0, {}
    kinds = itertools.cycle(("int16", "float32", "scaled uint8"))
    orientations = [
        np.column_stack([axes, signs])
        for axes in itertools.permutations(range(3))
        for signs in itertools.product((1, -1), repeat=3)
    ]
    runs = [(np.column_stack([range(3), (1, 1, 1)]), kind) for kind in ("int16", "float32", "scaled uint8")]
    runs += [(orientation, next(kinds)) for orientation in orientations]
    with tempfile.TemporaryDirectory() as folder:
        for orientation, kind in runs:
            moved = apply_orientation(data, orientation)
            affine = source.affine @ inv_ornt_aff(orientation, data.shape)
            file = Path(folder) / "scan.nii"
            nib.save(stored(moved, affine, kind), file)
            labels = segment(load_volume(file), model).labels
            back = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.io_orientation(source.affine))
            labels = apply_orientation(labels, back)
            reference = labels if reference is None else reference
            differ = int((labels != reference).sum())
            worst = max(worst, differ)
            codes = "".join(nib.aff2axcodes(affine))
            rows[f"{codes} {kind}"] = differ
            print(f"{codes} {kind:13s} {differ} voxels differ", flush=True)
    print(f"{len(runs)} runs, {len(orientations)} orientations: at most {worst} of {data.size} voxels differ")
    if options.out:
        record = {"model": model.name, "sha256": model.sha256, "runs": len(runs), "voxels": data.size, "worst": worst}
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
