"""Records of tomograms from the rows of a small world, without asking anybody."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tomocpt_stream.portal_records import TomogramRecord

if TYPE_CHECKING:
    from collections.abc import Iterable


def records(rows: dict[str, list[dict[str, Any]]], ids: Iterable[int]) -> list[TomogramRecord]:
    """Return records of some tomograms of a world, in the order given."""
    tomograms = {row["id"]: row for row in rows["tomograms"]}
    runs = {row["id"]: row for row in rows["runs"]}
    return [
        TomogramRecord(
            id=number,
            name=runs[tomograms[number]["runId"]]["name"],
            run=runs[tomograms[number]["runId"]]["name"],
            run_id=tomograms[number]["runId"],
            dataset_id=runs[tomograms[number]["runId"]]["datasetId"],
            deposition_id=tomograms[number]["depositionId"],
            voxel_spacing=tomograms[number]["voxelSpacing"],
            size=(tomograms[number]["sizeX"], tomograms[number]["sizeY"], tomograms[number]["sizeZ"]),
            processing=tomograms[number]["processing"],
            reconstruction=tomograms[number]["reconstructionMethod"],
            alignment_id=tomograms[number]["alignmentId"],
            voxel_spacing_id=tomograms[number]["tomogramVoxelSpacingId"],
        )
        for number in ids
    ]
