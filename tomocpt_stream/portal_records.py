"""What was found on the CZ CryoET Data Portal, as plain data: records of tomograms, and a selection of them.

Sizes are x, y, z as the portal states them; shapes are z, y, x as everywhere in this package.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tomocpt_stream.errors import FormatError
from tomocpt_stream.whole import write_whole

LEVELS = 3
"""The levels of a tomogram's zarr on the portal, each binned twice from the one before."""

_FORMAT = "tomocpt-stream selection of portal tomograms"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class TomogramRecord:
    """One tomogram of the portal: numbers and addresses, nothing that is open.

    `run_id` and `dataset_id` are 0 where the portal names none. A flag is None where the portal does not
    say. `deposition_id` is that of the tomogram, which may be a later one than that of its dataset.
    """

    id: int
    name: str
    run: str
    run_id: int
    dataset_id: int
    deposition_id: int
    voxel_spacing: float
    """Å; it wins over what the header of the file says."""
    size: tuple[int, int, int]
    """Voxels along x, y, z."""
    processing: str
    """"raw", "filtered", "denoised", "filtered_even" or "filtered_odd"."""
    reconstruction: str
    """"WBP", "SART", "SIRT", "Fourier_Space" or "Unknown"."""
    alignment_id: int | None = None
    voxel_spacing_id: int | None = None
    processing_software: str | None = None
    reconstruction_software: str | None = None
    ctf_corrected: bool | None = None
    is_portal_standard: bool | None = None
    is_author_submitted: bool | None = None
    is_visualization_default: bool | None = None
    alignment_is_portal_standard: bool | None = None
    s3_zarr: str | None = None
    https_zarr: str | None = None
    s3_mrc: str | None = None
    https_mrc: str | None = None
    bytes_zarr: float | None = None
    """Bytes of all levels together."""
    bytes_mrc: float | None = None
    last_modified: str = ""
    """ISO 8601; empty where the portal does not say."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along z, y, x."""
        x, y, z = self.size
        return z, y, x

    @property
    def source(self) -> str | None:
        """The address to open: that of the zarr, or else of the MRC file; None where there is neither."""
        return self.s3_zarr or self.s3_mrc

    def shape_at(self, level: int) -> tuple[int, int, int]:
        """Return the voxels of a level along z, y, x; odd sizes are rounded up."""
        z, y, x = (math.ceil(size / 2**level) for size in self.shape)
        return z, y, x

    def bytes_at(self, level: int) -> float:
        """Return about how many bytes are stored for a level.

        A zarr's bytes cover three levels, of which level 0 holds 64/73. Where the portal states no
        bytes, those of uncompressed float32 voxels are returned. An MRC file has level 0 only.
        """
        if self.s3_zarr and self.bytes_zarr:
            return self.bytes_zarr * 0.125**level / sum(0.125**each for each in range(LEVELS))
        if not self.s3_zarr and self.bytes_mrc:
            return self.bytes_mrc
        return 4.0 * math.prod(self.shape_at(level))

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain data for JSON."""
        return {**asdict(self), "size": list(self.size)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TomogramRecord:
        """Return the record that `to_json` was called on.

        Raises
        ------
        FormatError
            A field is missing, unknown or of another kind.
        """
        known = {field.name: str(field.type) for field in fields(cls)}
        needed = {field.name for field in fields(cls) if str(field.type) in _PLAIN} - {"last_modified"}
        problems = [f"no {name}" for name in sorted(needed - data.keys())]
        problems += [f"an unknown {name}" for name in sorted(data.keys() - known.keys())]
        problems += [
            f"{name} {value!r}"
            for name, value in data.items()
            if name in known and not _fits(value, known[name])
        ]
        if problems:
            raise FormatError(
                f"a record of a tomogram with {', '.join(problems)}",
                expected="the fields of a TomogramRecord",
                remedy="write it again with this version",
            )
        return cls(**{**data, "size": tuple(data["size"])})


@dataclass(frozen=True)
class LeftOut:
    """A tomogram that was not selected; `why` is a phrase such as "processing is denoised"."""

    record: TomogramRecord
    why: str


@dataclass(frozen=True)
class Selection:
    """The tomograms that were selected, in stable order, and an account of how.

    `notes` are whole sentences: what a deposition was taken to mean, by which preference one tomogram of
    each run was taken, what was decided in a tie. `ties` are those of the notes that somebody should see
    even if nobody asked: there a choice was made that the preference does not settle.
    """

    records: tuple[TomogramRecord, ...]
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    ties: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    def to_json(self) -> dict[str, Any]:
        """Return the selection as plain data for JSON."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "notes": list(self.notes),
            "ties": list(self.ties),
            "records": [record.to_json() for record in self.records],
            "left_out": [{"record": each.record.to_json(), "why": each.why} for each in self.left_out],
        }

    @classmethod
    def from_json(cls, data: Any) -> Selection:
        """Return the selection that `to_json` was called on.

        Raises
        ------
        FormatError
            The data are something else, or of a later version.
        """
        if not isinstance(data, dict) or data.get("format") != _FORMAT or data.get("version") != _VERSION:
            raise FormatError(
                "JSON that is no selection of portal tomograms, or one of another version",
                expected=f'"format": "{_FORMAT}", "version": {_VERSION}',
                remedy="write the selection again with this version",
            )
        try:
            return cls(
                records=tuple(map(TomogramRecord.from_json, data["records"])),
                left_out=tuple(
                    LeftOut(TomogramRecord.from_json(each["record"]), str(each["why"]))
                    for each in data["left_out"]
                ),
                notes=tuple(map(str, data["notes"])),
                ties=tuple(map(str, data["ties"])),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise FormatError(
                f"a selection of portal tomograms that is not whole ({type(error).__name__}: {error})",
                expected="records, left_out, notes and ties",
                remedy="write the selection again",
            ) from error

    def write(self, path: str | Path) -> None:
        """Write the selection as JSON, whole or not at all, for later runs to take as it is."""
        write_whole(Path(path), json.dumps(self.to_json(), indent=1, allow_nan=False))

    @classmethod
    def read(cls, path: str | Path) -> Selection:
        """Return the selection that was written to a file.

        Raises
        ------
        FormatError
            The file holds something else.
        OSError
            It cannot be read.
        """
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, FormatError) as error:
            found = error.found if isinstance(error, FormatError) else f"no JSON ({error})"
            raise FormatError(
                f"{path}: {found}",
                expected="a selection that was written by this package",
                remedy="write the selection again",
            ) from error


_PLAIN = {
    "int": (int,),
    "str": (str,),
    "float": (int, float),
}


def _fits(value: Any, kind: str) -> bool:
    """Return whether a value of JSON is what a field holds, whose type is given as text."""
    if value is None:
        return kind.endswith("| None")
    kind = kind.removesuffix(" | None")
    if kind == "bool":
        return isinstance(value, bool)
    if kind.startswith("tuple"):
        return (
            isinstance(value, list | tuple) and len(value) == 3 and all(_fits(each, "int") for each in value)
        )
    return isinstance(value, _PLAIN[kind]) and not isinstance(value, bool)


def by_place(record: TomogramRecord) -> tuple[Any, ...]:
    """Return the sort key of the stable order: dataset, run name as people count, run, tomogram."""
    return record.dataset_id, natural(record.run), record.run_id, record.id


def natural(text: str) -> tuple[Any, ...]:
    """Return a sort key by which TS_2 comes before TS_10."""
    parts = re.split(r"([0-9]+)", text)
    # Every second part is a number; those of more digits are greater, leading zeros apart.
    key = [
        (len(part.lstrip("0")), part.lstrip("0")) if place % 2 else (0, part.casefold())
        for place, part in enumerate(parts)
    ]
    return (*key, (0, text))
