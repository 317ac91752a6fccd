"""Pick particles in cryo-electron tomograms: stream, score, stitch, find peaks, write picks.

The names below are the public ones; each is loaded when it is first used, so that importing the
package has no effect and loads none of torch, zarr, dask and distributed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tomocpt_stream import cluster as cluster
    from tomocpt_stream import portal as portal
    from tomocpt_stream.blocks import BlockPlan as BlockPlan
    from tomocpt_stream.blocks import Task as Task
    from tomocpt_stream.blocks import Window as Window
    from tomocpt_stream.blocks import plan_blocks as plan_blocks
    from tomocpt_stream.curves import sweep as sweep
    from tomocpt_stream.errors import ActionableError as ActionableError
    from tomocpt_stream.errors import CheckpointError as CheckpointError
    from tomocpt_stream.errors import FormatError as FormatError
    from tomocpt_stream.errors import JobError as JobError
    from tomocpt_stream.errors import PlanError as PlanError
    from tomocpt_stream.errors import PortalError as PortalError
    from tomocpt_stream.errors import SourceError as SourceError
    from tomocpt_stream.evaluation import Evaluation as Evaluation
    from tomocpt_stream.evaluation import Match as Match
    from tomocpt_stream.evaluation import evaluate as evaluate
    from tomocpt_stream.evaluation import match as match
    from tomocpt_stream.formats import read_picks as read_picks
    from tomocpt_stream.formats import write_picks as write_picks
    from tomocpt_stream.heatmap import Heatmap as Heatmap
    from tomocpt_stream.heatmap import PickOptions as PickOptions
    from tomocpt_stream.heatmap import open_heatmap as open_heatmap
    from tomocpt_stream.heatmap import predict as predict
    from tomocpt_stream.label_queries import LabelQuery as LabelQuery
    from tomocpt_stream.labelled import LabelledTomogram as LabelledTomogram
    from tomocpt_stream.lazy import heatmap_lazy as heatmap_lazy
    from tomocpt_stream.peaks import find_peaks as find_peaks
    from tomocpt_stream.phantom import simulate_tomogram as simulate_tomogram
    from tomocpt_stream.picker import Picker as Picker
    from tomocpt_stream.picker import load_picker as load_picker
    from tomocpt_stream.picks import Picks as Picks
    from tomocpt_stream.pipeline import pick as pick
    from tomocpt_stream.portal_labels import find_labelled as find_labelled
    from tomocpt_stream.targets import paint_targets as paint_targets
    from tomocpt_stream.tomogram import Tomogram as Tomogram
    from tomocpt_stream.tomogram import open_tomogram as open_tomogram
    from tomocpt_stream.training import fine_tune as fine_tune
    from tomocpt_stream.training import train as train
    from tomocpt_stream.volume import Volume as Volume
    from tomocpt_stream.volume import ingest as ingest
    from tomocpt_stream.volume import open_volume as open_volume

_HOME = {
    "blocks": ("BlockPlan", "Task", "Window", "plan_blocks"),
    "errors": (
        "ActionableError",
        "CheckpointError",
        "FormatError",
        "JobError",
        "PlanError",
        "PortalError",
        "SourceError",
    ),
    "curves": ("sweep",),
    "evaluation": ("Evaluation", "Match", "evaluate", "match"),
    "formats": ("read_picks", "write_picks"),
    "heatmap": ("Heatmap", "PickOptions", "open_heatmap", "predict"),
    "label_queries": ("LabelQuery",),
    "labelled": ("LabelledTomogram",),
    "lazy": ("heatmap_lazy",),
    "peaks": ("find_peaks",),
    "phantom": ("simulate_tomogram",),
    "picker": ("Picker", "load_picker"),
    "picks": ("Picks",),
    "pipeline": ("pick",),
    "portal_labels": ("find_labelled",),
    "targets": ("paint_targets",),
    "tomogram": ("Tomogram", "open_tomogram"),
    "training": ("fine_tune", "train"),
    "volume": ("Volume", "ingest", "open_volume"),
}
# Modules whose names are public with the module's own in front: portal.find_tomograms.
_ROOMS = ("cluster", "portal")
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> object:
    """Load the module that a public name lives in."""
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted({*globals(), *__all__})
