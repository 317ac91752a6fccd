"""From a tomogram to its picks: the calls of the package in order."""

from __future__ import annotations

import re
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tomocpt_stream.blocks import BlockPlan, plan_blocks
from tomocpt_stream.connection import on_this_machine
from tomocpt_stream.contrast import find_contrast
from tomocpt_stream.errors import PlanError
from tomocpt_stream.frame import Grid, working_grid
from tomocpt_stream.heatmap import PickOptions, Scorer, predict
from tomocpt_stream.mask import MaskLike, open_mask
from tomocpt_stream.peaks import find_peaks
from tomocpt_stream.progress import Progress, silent
from tomocpt_stream.receipts import StoreLike, config_hash, within
from tomocpt_stream.remote import is_remote
from tomocpt_stream.volume import ingest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tomocpt_stream.frame import Rule
    from tomocpt_stream.mask import Mask
    from tomocpt_stream.picks import Picks
    from tomocpt_stream.tomogram import Tomogram

KEEP_GRID_WITHIN = 0.05
"""The source grid is kept where the working voxel size differs from the source's by at most this."""

VOLUME = "volume.zarr"
"""The store of the working volume in the folder of a tomogram."""


def pick(  # noqa: PLR0913  (the public signature of the design)
    tomogram: Tomogram,
    picker: Scorer,
    options: PickOptions,
    *,
    mask: MaskLike | None = None,
    scratch: str | Path | None = None,
    keep_heatmap: StoreLike | None = None,
    memory: int | str | None = None,
    client: Any = None,
    verify: bool = False,
    progress: Progress = silent,
    storage_options: Mapping[str, Any] | None = None,
) -> Picks:
    """Return the picks of a tomogram: ingest, plan, predict, find peaks.

    The working volume and the map go below `scratch`, into a folder named after the tomogram and
    what is asked of it, so that the same call after a kill goes on where that one stopped. Without
    `scratch` they go into a temporary folder (TMPDIR says where) that is removed at the end.
    `keep_heatmap` is the path of the zarr store that keeps the map. `memory`, bytes or "4 GB", is
    the budget of `plan_blocks`.

    `mask`, `scratch` and `keep_heatmap` may be addresses; `storage_options` are theirs, as the tomogram
    has its own already. Where they differ, pass the mask as `open_tomogram(mask, storage_options=...)`
    and for `keep_heatmap` what `remote.connect` returns. Credentials travel to the workers in their
    tasks and are written nowhere.

    With a `client` of a dask cluster its workers do the work, `memory` is the budget of each of them,
    and the folders must be seen by all of them. The picks are the same. `verify` reads everything that
    was stored again and compares it with its receipts.

    With contrast "auto" a few windows of the working volume are scored at both signs first, and the map is
    that of the sign at which the picker finds more; see `contrast.find_contrast`.

    Picks nearer than `options.margin` Å to a face of the volume are left out; the face lies half a
    voxel outside the centre of the outermost voxel.

    Raises
    ------
    PlanError
        Nothing fits into `memory`, or the workers are elsewhere and there is no `scratch`.
    SourceError, JobError
        A part of the work could not be done; what is done is kept in `scratch`.
    CheckpointError
        What an earlier run left is not of this tomogram and picker, or is damaged.
    """
    tomogram = level_for(tomogram, picker, options)
    grid, plan = _plan_for(client, tomogram, picker, options, memory)
    allowed = None if mask is None else open_mask(mask, tomogram.frame, grid, storage_options)
    with ExitStack() as stack:
        if scratch is None:
            _refuse_distant(client)
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="tomocpt-stream-"))
        folder = within(scratch, scratch_folder(tomogram, grid, rule_of(picker)))
        if keep_heatmap is None and getattr(picker, "fingerprint", None) is None:
            # Nothing says that the next picker is this one, so that its map would only be in the way.
            keep_heatmap = stack.enter_context(_passing_folder(folder))
        volume = ingest(
            tomogram,
            within(folder, VOLUME),
            voxel_size=grid.voxel_size,
            rule=rule_of(picker),
            client=client,
            progress=progress,
            storage_options=storage_options,
        )
        finding = None
        if options.contrast == "auto":
            finding = find_contrast(volume, picker, plan, client=client, progress=progress)
        contrast = options.contrast if finding is None else finding.contrast
        heatmap = predict(
            volume,
            picker,
            plan,
            store=keep_heatmap or within(folder, _map_name(picker, contrast, options, allowed)),
            options=options,
            mask=None if allowed is None else allowed.tomogram,
            client=client,
            finding=finding,
            progress=progress,
            storage_options=storage_options,
        )
        # Rounded, so that a whole number of voxels stays one: a pick at exactly the distance is kept.
        spacing = round(min_distance(options) / grid.voxel_size, 9)
        if verify:
            from tomocpt_stream.verification import refuse_damaged

            for store in (volume.store, heatmap.store):
                refuse_damaged(store, client=client, progress=progress)
        picks = find_peaks(heatmap, threshold=options.threshold, min_distance=spacing)
    return inside(picks, tomogram, options.margin)


def _plan_for(
    client: Any, tomogram: Tomogram, picker: Scorer, options: PickOptions, memory: int | str | None
) -> tuple[Grid, BlockPlan]:
    """Return the working grid and the plan for the workers that there are, within their memory limits."""
    if client is None:
        return plan_pick(tomogram, picker, options, memory=memory)
    from tomocpt_stream.cluster import room, worker_count

    workers, limit = worker_count(client), room(client)
    grid, plan = plan_pick(tomogram, picker, options, memory=memory, workers=workers)
    if limit is None or plan.projected_bytes <= limit:
        return grid, plan
    if memory is not None:
        raise PlanError(
            f"tasks of up to {plan.projected_bytes / 1e6:.0f} MB on workers that have room for "
            f"{limit / 1e6:.0f} MB, their memory limit less what an idle worker holds",
            expected="workers that are not ended for their memory",
            remedy="raise the workers' memory limit, start fewer of them, or lower the budget `memory`",
        )
    return plan_pick(tomogram, picker, options, memory=limit, workers=workers)


def _refuse_distant(client: Any) -> None:
    """Refuse a temporary folder of this machine where the workers are on others."""
    if client is not None and not on_this_machine(client):
        raise PlanError(
            "a client whose workers are on other machines, and no scratch",
            expected="a folder that all workers see",
            remedy="pass scratch",
        )


def level_for(tomogram: Tomogram, picker: Scorer, options: PickOptions) -> Tomogram:
    """Return a tomogram at the level that `pick` reads."""
    if options.level == "given":
        return tomogram
    return tomogram.coarsest(options.diameter / (2 * picker.particle_radius) * (1 + KEEP_GRID_WITHIN))


def plan_pick(
    tomogram: Tomogram,
    picker: Scorer,
    options: PickOptions,
    *,
    memory: int | str | None = None,
    workers: int = 1,
) -> tuple[Grid, BlockPlan]:
    """Return the working grid and the plan that `pick` follows on so many workers; no voxel is read.

    The working voxel size is diameter / (2 particle_radius), or the tomogram's own where the two
    differ by at most 5 %. The grid is that of the picker's rule.

    Raises
    ------
    PlanError
        Where nothing fits into `memory`, or the particle is smaller than a voxel.
    """
    if options.diameter < tomogram.voxel_size:
        raise PlanError(
            f"a particle of {options.diameter:g} Å in voxels of {tomogram.voxel_size:g} Å",
            expected="a particle that is longer than a voxel",
            remedy="give its diameter in Å, or check the voxel size",
        )
    voxel_size = options.diameter / (2 * picker.particle_radius)
    if abs(voxel_size / tomogram.voxel_size - 1) <= KEEP_GRID_WITHIN + 1e-9:
        voxel_size = tomogram.voxel_size
    grid = working_grid(tomogram.shape, tomogram.voxel_size, voxel_size, rule_of(picker))
    plan = plan_blocks(
        grid.shape,
        picker.window,
        stitch=options.stitch,
        batch_size=options.batch_size,
        tta=options.tta,
        bytes_per_window=getattr(picker, "bytes_per_window", None),
        memory=memory,
        workers=workers,
    )
    return grid, plan


def min_distance(options: PickOptions) -> float:
    """Return the least distance between two picks in Å, centre to centre."""
    return 0.75 * options.diameter if options.min_distance is None else options.min_distance


def inside(picks: Picks, tomogram: Tomogram, margin: float) -> Picks:
    """Return the picks at least `margin` Å away from every face of the tomogram's file."""
    if margin == 0:
        return picks
    frame = tomogram.frame
    from_face = np.minimum(picks.zyx + 0.5, np.asarray(frame.file_shape) - 0.5 - picks.zyx)
    return picks.take(from_face.min(axis=1) * frame.file_voxel_size >= margin)


def safe_name(name: str) -> str:
    """Return a name from outside as the name of a file: letters, digits, dots, dashes, underscores."""
    plain = re.sub(r"[^\w.-]+", "_", name).lstrip(".-")
    return plain.encode()[:120].decode(errors="ignore") or "tomogram"


def rule_of(picker: Scorer) -> Rule:
    """Return how the working grid of a picker is sampled: as in its training."""
    rule: Rule = getattr(picker, "rule", "bspline")
    return rule


def scratch_folder(tomogram: Tomogram, grid: Grid, rule: Rule = "bspline") -> str:
    """Return the name of a tomogram's folder on a working grid; another source, grid or rule has another."""
    asked = {"source": tomogram.fingerprint, "grid": grid.to_json()}
    key = config_hash(asked if rule == "bspline" else asked | {"rule": rule})
    return f"{safe_name(tomogram.name)}-{key[:12]}"


def _passing_folder(folder: str) -> tempfile.TemporaryDirectory[str]:
    """Return a folder for a map that nobody can use again."""
    if is_remote(folder):
        raise PlanError(
            "a picker without a fingerprint, and scratch on an object store",
            expected="a place from which its map is deleted afterwards",
            remedy="pass keep_heatmap, or a folder on a disk as scratch",
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix="heatmap-", dir=folder)


def _map_name(picker: Scorer, contrast: str, options: PickOptions, mask: Mask | None) -> str:
    """Return the name of a map beside others of the same volume; `predict` holds the full account.

    `contrast` is "dark" or "bright": what was found has the map of what was said.
    """
    asked = {
        "picker": getattr(picker, "fingerprint", None),
        "numerics": getattr(picker, "numerics", None),
        "contrast": contrast,
        "stitch": options.stitch,
        "tta": options.tta,
        "batch_size": options.batch_size,
        "mask": None if mask is None else mask.fingerprint,
    }
    return f"heatmap-{config_hash(asked)[:12]}.zarr"
