"""Surfaces against volumes and positions known from geometry; the grid is anisotropic, rotated and far from 0."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from synthseg.errors import InputError, OutputError
from synthseg.labels import Label, LabelTable, load_scheme
from synthseg.posteriors import Posteriors
from synthseg.surfaces import Surface, check_structure, isosurface, surface, write_surface
from synthseg.volume import Volume

SHAPE = (30, 26, 34)
SPACING = np.array([1.1, 1.4, 0.9])
SIAM = load_scheme("siam16")


def affine(seed: int = 0, flip: bool = False) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.random(random_state=seed).as_matrix() * SPACING
    matrix[:3, 3] = (-40, 25, 310)
    if flip:
        matrix[:3, 0] *= -1
    return matrix


def ball(radius_mm: float, centre: tuple[float, float, float] = (14.2, 12.7, 16.1)) -> np.ndarray:
    """A probability that is 0.5 at a distance of ``radius_mm`` from a voxel coordinate, and falls linearly."""
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    distance = np.linalg.norm((grid - centre) * SPACING, axis=-1)
    return np.clip(0.5 + (radius_mm - distance) / 6, 0, 1).astype(np.float32)


def assert_closed(mesh: Surface) -> None:
    """Every edge belongs to two triangles, which run along it in opposite directions."""
    edges = np.concatenate([mesh.triangles[:, [i, j]] for i, j in ((0, 1), (1, 2), (2, 0))])
    once, counts = np.unique(edges, axis=0, return_counts=True)
    assert (counts == 1).all()
    np.testing.assert_array_equal(once, np.unique(edges[:, ::-1], axis=0))
    a, b, c = (mesh.vertices_mm[mesh.triangles[:, i]] for i in range(3))
    assert np.linalg.norm(np.cross(b - a, c - a), axis=1).min() > 0


@pytest.mark.parametrize("flip", [False, True])
def test_a_ball_has_its_place_size_and_outward_normals(flip: bool) -> None:
    matrix = affine(1, flip)
    mesh = isosurface(ball(9.0), matrix)
    centre = matrix[:3, :3] @ (14.2, 12.7, 16.1) + matrix[:3, 3]
    distance = np.linalg.norm(mesh.vertices_mm - centre, axis=1)
    np.testing.assert_allclose(distance, 9.0, atol=0.05)  # a twentieth of a voxel
    assert_closed(mesh)
    assert mesh.volume_ml == pytest.approx(4 / 3 * np.pi * 0.9**3, rel=0.02)
    a, b, c = (mesh.vertices_mm[mesh.triangles[:, i]] for i in range(3))
    outward = np.einsum("ij,ij->i", np.cross(b - a, c - a), (a + b + c) / 3 - centre)
    assert (outward > 0).all()


def test_what_leaves_the_field_of_view_is_closed_there() -> None:
    matrix = np.diag([*SPACING, 1.0])
    mesh = isosurface(np.ones((5, 6, 7), np.float32), matrix)
    assert_closed(mesh)
    np.testing.assert_allclose(mesh.vertices_mm.min(0), -SPACING / 2, atol=1e-5)
    np.testing.assert_allclose(mesh.vertices_mm.max(0), (np.array([5, 6, 7]) - 0.5) * SPACING, atol=1e-5)


def test_noise_with_many_values_on_the_level_stays_closed() -> None:
    """The hardest case for marching cubes: every ambiguity, and values that are exactly the level."""
    values = np.random.default_rng(3).choice([0.0, 0.25, 0.5, 0.75, 1.0], size=(14, 15, 16)).astype(np.float32)
    mesh = isosurface(values, affine(2))
    edges = np.concatenate([mesh.triangles[:, [i, j]] for i, j in ((0, 1), (1, 2), (2, 0))])
    forward, counts = np.unique(edges, axis=0, return_counts=True)
    backward, counts_back = np.unique(edges[:, ::-1], axis=0, return_counts=True)
    np.testing.assert_array_equal(forward, backward)
    np.testing.assert_array_equal(counts, counts_back)
    a, b, c = (mesh.vertices_mm[mesh.triangles[:, i]] for i in range(3))
    assert np.linalg.norm(np.cross(b - a, c - a), axis=1).min() > 0


def head(parts: dict[str, np.ndarray]) -> Posteriors:
    """Posteriors of siam16 in which each named label has a probability; the background has the rest."""
    values = torch.zeros((17, *SHAPE), dtype=torch.float16)
    for name, probability in parts.items():
        values[SIAM.names.index(name)] = torch.from_numpy(probability).half()
    values[0] = 1 - values[1:].sum(0)
    return Posteriors.covering(values, SIAM, Volume(np.zeros(SHAPE), np.diag([1.0, 1.0, 1.0, 1.0])), 1.0)


def boxes(*corners: tuple[int, int]) -> np.ndarray:
    """1 in cubes from a first to a last voxel of each axis, 0 elsewhere."""
    out = np.zeros(SHAPE, np.float32)
    for low, high in corners:
        out[low:high, low:high, low:high] = 1
    return out


def test_brain_and_head_are_solid_and_skull_keeps_its_cavity() -> None:
    """Nested cubes, in voxels: head 3 to 23 around skull 5 to 21 around CSF around a brain 8 to 18 with a ventricle;
    an air bubble in the head, a drop of CSF in the brain, and a speck of head outside."""
    ventricle, drop, bubble = boxes((11, 14)), boxes((15, 17)), np.zeros(SHAPE, np.float32)
    bubble[20:22, 4, 4:6] = 1
    speck = np.zeros(SHAPE, np.float32)
    speck[27:29, 2:4, 28:30] = 1
    parts = {
        "WM": boxes((8, 18)) - ventricle - drop,
        "Ventricular-CSF": ventricle,
        "CSF": boxes((7, 19)) - boxes((8, 18)) + drop,
        "Skull": boxes((5, 21)) - boxes((7, 19)),
        "Head": boxes((3, 23)) - boxes((5, 21)) + speck,
    }
    parts["Head"] = np.where(bubble * boxes((3, 23)) > 0, 0, parts["Head"])
    shown = head(parts)

    def volume(structure: str) -> float:
        mesh = surface(shown, structure)
        assert_closed(mesh)
        return 1000 * mesh.volume_ml

    # marching cubes cuts off the edges of a cube, so a little less than n³ voxels; cavities have the same cut
    assert 0.9 * 10**3 < volume("brain") < 10**3
    assert 0.97 * 20**3 < volume("head") < 20**3
    for structure, low, high in (("brain", 7.5, 17.5), ("head", 2.5, 22.5)):  # nothing but the outer faces
        outside = surface(shown, structure).vertices_mm
        assert np.minimum(np.abs(outside - low), np.abs(outside - high)).min(1).max() < 0.1
    assert 16**3 - 12**3 - 60 < volume("Skull") < 16**3 - 12**3 + 30
    assert surface(shown, "skull").vertices_mm.max() < 23  # no speck
    assert surface(shown, "head").vertices_mm.max() < 23
    assert 0.7 * 27 < volume("ventricular-csf") < 27
    assert volume("wm") == pytest.approx(volume("brain") - volume("ventricular-csf") - 2**3, abs=3)
    inside = surface(shown, "skull").vertices_mm
    assert ((inside > 6).all(1) & (inside < 20).all(1)).any()  # its inner side is there


def test_a_structure_that_is_not_there_or_unknown_is_an_error() -> None:
    empty = head({"WM": boxes((8, 18))})
    with pytest.raises(InputError, match="no voxel of Skull is likelier than not"):
        surface(empty, "Skull")
    with pytest.raises(OutputError, match=r"no structure 'skul'.*brain, skull, head, GM"):
        check_structure("skul", SIAM)
    with pytest.raises(OutputError, match="background"):
        check_structure("background", SIAM)
    check_structure("hippocampus", SIAM)
    check_structure("SKULL", load_scheme("head45"))
    brain = LabelTable("brain", (Label(0, "Background", tissue="air"), Label(2, "White", tissue="wm")))
    with pytest.raises(OutputError, match=r"no structure 'skull'.*choose from brain, head, White$"):
        check_structure("skull", brain)


def test_gifti_is_read_back_in_scanner_space(tmp_path: Path) -> None:
    mesh = isosurface(ball(7.0), affine(4))
    write_surface(tmp_path / "a.surf.gii", mesh, "ball")
    image = nib.load(tmp_path / "a.surf.gii")
    np.testing.assert_array_equal(image.agg_data("pointset"), mesh.vertices_mm)
    np.testing.assert_array_equal(image.agg_data("triangle"), mesh.triangles)
    points = image.get_arrays_from_intent("pointset")[0]
    assert (points.coordsys.dataspace, points.coordsys.xformspace) == (1, 1)
    np.testing.assert_array_equal(points.coordsys.xform, np.eye(4))
    assert points.meta["Name"] == "ball"


def test_stl_is_binary_with_the_normals_of_its_triangles(tmp_path: Path) -> None:
    mesh = isosurface(ball(7.0), affine(5))
    write_surface(tmp_path / "a.stl", mesh, "solid head")
    content = (tmp_path / "a.stl").read_bytes()
    assert not content.startswith(b"solid")  # readers would take it for text
    assert b"SPACE=RAS" in content[:80]  # 3D Slicer would take it for LPS
    assert int.from_bytes(content[80:84], "little") == len(mesh.triangles)
    assert len(content) == 84 + 50 * len(mesh.triangles)
    record = np.frombuffer(content[84:134], "<f4", 12)
    corners = mesh.vertices_mm[mesh.triangles[0]]
    np.testing.assert_array_equal(record[3:].reshape(3, 3), corners)
    normal = np.cross(corners[1] - corners[0], corners[2] - corners[0])
    np.testing.assert_allclose(record[:3], normal / np.linalg.norm(normal), atol=1e-5)


@pytest.mark.parametrize("name", ["a.ply", "a", "a.gii.gz", "a.nii.gz"])
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match="not the name of a surface"):
        write_surface(tmp_path / name, isosurface(ball(7.0), np.eye(4)))
    assert list(tmp_path.iterdir()) == []
