"""IMOD models (.mod): an object for each kind of particle, its points scattered in one contour.

IMOD puts the centre of the first voxel at (0.5, 0.5, 0) in x, y, z: voxel = (x - 0.5, y - 0.5, z), and back.
With half_voxel=False coordinates are voxels as they are, as the CZ CryoET Data Portal takes them in. The
score is IMOD's general value of each point, which goes with the point when 3dmod edits the model; a
point without one has score 1. Angles are slicer angles, whose centre is the point: the matrix
from particle to tomogram is the inverse of Rx·Ry·Rz. The header has the voxel size, and, in files of
ours, the name and the size of the tomogram; other files are named for theirs.

"imod" takes the points of contours, turned where each has a slicer angle within a voxel of it.
"imod_slicer" takes the slicer angles themselves, at their centres, as the portal does; read only.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial.transform import Rotation

from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats.folders import files_in, places
from tomocpt_stream.formats.imod_chunks import Contour, Model, Object, read_model, render_model
from tomocpt_stream.formats.side import same_places
from tomocpt_stream.picks import Picks

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tomocpt_stream.formats.asked import Asked
    from tomocpt_stream.formats.delimited import Floats

SUFFIX = ".mod"
HALF = np.array([0.5, 0.5, 0.0])
_OURS = "tomogram "


def read(path: Path, format: str | None, asked: Asked) -> list[Picks]:  # noqa: A002
    """Return the picks of each object with points in a model, or in every .mod file of a folder."""
    return [table for one in files_in(path, SUFFIX) for table in _read_one(one, format or "imod", asked)]


def render(picks: Sequence[Picks], format: str, asked: Asked, name: str) -> dict[str, bytes]:  # noqa: A002
    """Return a model for each tomogram."""
    del format
    return {file: _render_one(tables, asked) for file, tables in places(picks, name, SUFFIX).items()}


def matrices_of(angles: Floats) -> Floats:
    """Return the (n, 3, 3) matrices from particle to tomogram of (n, 3) slicer angles x, y, z in degrees."""
    if not len(angles):
        return np.zeros((0, 3, 3))
    return np.asarray(Rotation.from_euler("zyx", angles[:, ::-1], degrees=True).inv().as_matrix())


def angles_of(matrices: Floats) -> Floats:
    """Return slicer angles x, y, z in degrees, x from -90 to 90 as the slicer has it."""
    if not len(matrices):
        return np.zeros((0, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # gimbal lock: one angle is 0 then, the matrix is right
        try:
            angles = Rotation.from_matrix(matrices).inv().as_euler("zyx", degrees=True)[:, ::-1].copy()
        except ValueError as error:
            raise FormatError(
                f"rotations that are none ({error})",
                expected="orthogonal matrices of determinant 1",
                remedy="give proper rotations, or none",
            ) from error
    beyond = np.abs(angles[:, 0]) > 90
    other = np.column_stack([angles[:, 0] + 180, 180 - angles[:, 1], angles[:, 2] + 180])
    angles[beyond] = (other[beyond] + 180) % 360 - 180
    return np.asarray(angles)


def _read_one(path: Path, format: str, asked: Asked) -> list[Picks]:  # noqa: A002
    model = read_model(path)
    half = HALF if asked.half_voxel else np.zeros(3)
    ours = model.name.startswith(_OURS)
    name = model.name[len(_OURS) :] if ours else path.name.removesuffix(SUFFIX)
    size = asked.of(name, model.pixel_size)
    if np.abs(model.shift).max() > 1e-3 and np.abs(model.shift).max() < max(*model.image, 1):
        warnings.warn(
            f"{path} was drawn on a part of its image, which began {model.shift} voxels (x, y, z) away: "
            "its points are read as they are; save it on the whole image for the whole image's voxels",
            stacklevel=4,
        )
    shape = size.shape
    if shape is None and ours and min(model.image) > 0:
        shape = (model.image[2], model.image[1], model.image[0])

    def table(points: Floats, score: Floats, kind: str, rotations: Floats | None) -> Picks:
        return Picks(
            zyx=(points - half)[:, ::-1],
            score=score.astype(np.float32),
            rotations=rotations,
            voxel_size=size.voxel_size,
            tomogram=name,
            shape=shape,
            particle=kind,
        )

    if format == "imod_slicer":
        if not len(model.slicers):
            raise FormatError(
                f"{path} has no slicer angles",
                expected="slicer angles (SLAN), whose centres are the picks",
                remedy='leave the format out, or pass format="imod", for the points of contours',
            )
        rotations = matrices_of(model.slicers[:, :3])
        return [table(model.slicers[:, 3:], np.ones(len(rotations)), "", rotations)]
    kinds = _kinds(model, path)
    turned = _turned(model, np.concatenate([points for points, _ in kinds.values()]), path)
    tables, before = [], 0
    for kind, (points, score) in kinds.items():
        rows = slice(before, before + len(points))
        before += len(points)
        tables.append(table(points, score, kind, None if turned is None else turned[rows]))
    return tables


def _kinds(model: Model, path: Path) -> dict[str, tuple[Floats, Floats]]:
    """Return points and scores by kind: the name of the object, or its number where several have none."""
    full = {
        number: one
        for number, one in enumerate(model.objects, start=1)
        if any(len(contour.points) for contour in one.contours)
    }
    if not full:
        meshes = sum(one.meshes for one in model.objects)
        if meshes:
            raise FormatError(
                f"{path} has {meshes} meshes and no point",
                expected="points in contours",
                remedy="pick points: a surface says not where particles are",
            )
        names = [one.name for one in model.objects] or [""]
        return {names[0]: (np.zeros((0, 3)), np.zeros(0))}
    nameless = sum(not one.name for one in full.values())
    found: dict[str, list[Contour]] = {}
    for number, one in full.items():
        kind = one.name or (f"object {number}" if nameless > 1 or len(full) > 1 else "")
        found.setdefault(kind, []).extend(one.contours)
    return {
        kind: (
            np.concatenate([contour.points for contour in contours]),
            np.concatenate([_scores(contour) for contour in contours]),
        )
        for kind, contours in found.items()
    }


def _scores(contour: Contour) -> Floats:
    if contour.values is None:
        return np.ones(len(contour.points))
    return np.where(np.isfinite(contour.values), contour.values, 1.0).astype(np.float64)


def _turned(model: Model, points: Floats, path: Path) -> Floats | None:
    """Return a matrix for each point where each has a slicer angle of its own."""
    if not len(model.slicers) or not len(points):
        return None
    rows, angles = same_places(points, model.slicers[:, 3:], within=1.0)
    if len(rows) == len(points):
        order = np.empty(len(points), np.intp)
        order[rows] = angles
        return matrices_of(model.slicers[order, :3])
    if len(rows):
        warnings.warn(
            f"{len(points) - len(rows)} of {len(points)} points of {path} have no slicer angle: "
            "all are read without rotations",
            stacklevel=5,
        )
    return None


def _render_one(tables: Sequence[Picks], asked: Asked) -> bytes:
    half = HALF if asked.half_voxel else np.zeros(3)
    first = tables[0]
    turned = [table for table in tables if len(table)]
    if len({table.rotations is None for table in turned}) > 1:
        raise FormatError(
            f"picks of {first.tomogram} with rotations beside picks without",
            expected="rotations for all picks of a model, or for none",
            remedy="write them to two files, or drop the rotations",
        )
    kinds = {table.particle for table in tables}
    if len(kinds) < len(tables) or len({(table.voxel_size, table.shape) for table in tables}) > 1:
        raise FormatError(
            f"several tables of one kind, voxel size or shape for {first.tomogram}",
            expected="one table for each kind, all in the same voxels",
            remedy="join the tables, or write them to two files",
        )
    objects, slicers = [], [np.zeros((0, 6))]
    for table in tables:
        xyz = table.zyx[:, ::-1] + half
        contours = [Contour(xyz, values=table.score)] if len(table) else []
        objects.append(Object(_fitting(table.particle, 63, "particle"), contours, radius=asked.radius))
        if table.rotations is not None:
            slicers.append(np.hstack([angles_of(table.rotations), xyz]))
    z, y, x = first.shape or (0, 0, 0)
    name = _fitting(f"{_OURS}{first.tomogram}", 127, "tomogram")
    return render_model(name, (x, y, z), first.voxel_size, objects, np.concatenate(slicers))


def _fitting(name: str, most: int, what: str) -> str:
    if len(name.encode()) > most or not name.isprintable() or name != name.strip():
        raise FormatError(
            f"the {what} name {name!r}",
            expected=f"at most {most} bytes of printable characters",
            remedy=f"give it a shorter one: dataclasses.replace(picks, {what}=...)",
        )
    return name
