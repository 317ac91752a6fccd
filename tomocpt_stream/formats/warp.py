"""What a Warp project says of its tomograms: sizes from a .settings file, names from *.tomostar."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from tomocpt_stream.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_LARGEST_SETTINGS = 1 << 20
_PARAMETERS = {"Import": ("PixelSize",), "Tomo": ("DimensionsX", "DimensionsY", "DimensionsZ")}


def read_settings(path: Path) -> tuple[float, tuple[float, float, float]]:
    """Return the unbinned pixel size in Å and the size (x, y, z) in such pixels of a project's tomograms.

    `WarpTools create_settings` wrote them there as --angpix and --tomo_dimensions; BinTimes, by which
    Warp bins what it loads, changes neither. Raises FormatError where the file does not say them.
    """
    root = _xml(path)
    found = {
        name: _positive(path, name, element.get("Value", ""))
        for section, names in _PARAMETERS.items()
        for element in root.findall(f"./{section}/Param")
        if (name := element.get("Name", "")) in names
    }
    missing = [name for names in _PARAMETERS.values() for name in names if name not in found]
    if missing:
        raise FormatError(
            f"{path} without {', '.join(missing)}",
            expected="the .settings of tilt series, with PixelSize and the dimensions of the tomograms",
            remedy="pass the file that WarpTools create_settings made with --tomo_dimensions",
        )
    return found["PixelSize"], (found["DimensionsX"], found["DimensionsY"], found["DimensionsZ"])


def tomostar_names(paths: Iterable[Path]) -> list[str]:
    """Return the names of tilt series that have a .tomostar file, in their order."""
    return sorted(path.name.removesuffix(".tomostar") for path in paths)


def _xml(path: Path) -> ET.Element:
    if path.stat().st_size > _LARGEST_SETTINGS:
        raise _unreadable(path, f"it has more than {_LARGEST_SETTINGS} bytes")
    data = path.read_bytes()
    if b"<!" in data.replace(b"\0", b"").replace(b"<!--", b""):  # no entities, which can grow without bound
        raise _unreadable(path, "it declares a document type")
    try:
        return ET.fromstring(data)
    except (ET.ParseError, LookupError, ValueError) as error:
        raise _unreadable(path, str(error)) from error


def _unreadable(path: Path, why: str) -> FormatError:
    return FormatError(
        f"{path} cannot be read as settings of Warp: {why}",
        expected="the XML file that WarpTools create_settings writes",
        remedy="check that it is the .settings file of the tilt series",
    )


def _positive(path: Path, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise FormatError(
            f"{path} has {name} {text!r}", expected="a positive number", remedy="correct it, or pass sizes"
        )
    return value
