"""Records of tomograms that are made up, and a way to the stand-in of the portal that does not wait."""

from __future__ import annotations

from itertools import count
from typing import Any

from tomocpt_stream.portal_records import TomogramRecord

_NUMBERS = count(1000)


def record(run: str = "TS_1", **fields: Any) -> TomogramRecord:
    """Return a raw tomogram of 10.012 Å, of another id each time; its run's id follows from the name."""
    number = fields.pop("id", None) or next(_NUMBERS)
    usual: dict[str, Any] = {
        "name": run,
        "run_id": sum(map(ord, run)),
        "dataset_id": 10440,
        "deposition_id": 10310,
        "voxel_spacing": 10.012,
        "size": (630, 620, 184),
        "processing": "raw",
        "reconstruction": "WBP",
        "s3_zarr": f"s3://bucket/10440/{run}/{number}.zarr",
        "bytes_zarr": 73e6,
        "last_modified": "2024-11-05T00:00:00+00:00",
    }
    return TomogramRecord(id=number, run=run, **(usual | fields))
