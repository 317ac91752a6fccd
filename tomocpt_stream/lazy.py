"""The heat map as a dask array: a chunk is scored when it is asked for.

All chunks wait for one node of the graph, which brings the tomogram onto the working grid: every score
depends on the percentiles of the whole. What the graph holds beside addresses and boxes, the tomogram
and the picker, travels sealed, so that a scheduler that passes it on unpickles neither.
"""

from __future__ import annotations

import atexit
import os
import pickle
import shutil
import socket
import tempfile
import threading
import uuid
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import cloudpickle
import numpy as np
from zarr.storage import LocalStore

from tomocpt_stream.assignment import picker_name
from tomocpt_stream.contrast import find_contrast, is_negated
from tomocpt_stream.errors import PlanError
from tomocpt_stream.mask import MaskLike, open_mask
from tomocpt_stream.pipeline import VOLUME, level_for, plan_pick, rule_of, scratch_folder
from tomocpt_stream.receipts import as_store, config_hash, within
from tomocpt_stream.scan import Scoring, Turns, score_chunk
from tomocpt_stream.stages import residents
from tomocpt_stream.volume import ingest, open_volume

if TYPE_CHECKING:
    from collections.abc import Mapping

    import dask.array as da  # noqa: TID251 - dask is loaded only by who asks for it
    import numpy.typing as npt
    from zarr.abc.store import Store

    from tomocpt_stream.blocks import BlockPlan, Index
    from tomocpt_stream.frame import Rule
    from tomocpt_stream.heatmap import PickOptions, Scorer
    from tomocpt_stream.mask import Mask
    from tomocpt_stream.tomogram import Tomogram

# The turns of pickers without a name, by their id: as long as a map holds both.
_NAMELESS: WeakValueDictionary[int, Turns] = WeakValueDictionary()
_NAMELESS_LOCK = threading.Lock()


def heatmap_lazy(
    tomogram: Tomogram,
    picker: Scorer,
    options: PickOptions,
    *,
    mask: MaskLike | None = None,
    scratch: str | Path | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> da.Array:
    """Return the scores of a tomogram as a dask array (z, y, x) on the working grid, float32.

    The chunks are those of the map that `pick` stores, and equal to them bit for bit when they are
    computed; voxels that are never scored are 0. Now only the header is read (an array in memory is
    hashed). The first chunk to be computed has the whole tomogram brought onto the working grid before
    it, by one process: into the folder below `scratch` that `pick` would take, which is taken up where
    it is there already, and which all workers of a cluster must see. Without `scratch` it is a temporary
    folder of this machine that is removed when this process ends. `storage_options` are as for `pick`.

    This is for parts of a map, and for what dask does with them. Each chunk scores all windows that
    contribute to it. With `stitch="crop"` no other chunk needs them; with windows that are blended the
    network sees a voxel of a large volume about 19 times, against 3.5 times in `predict`, which is the
    way to a whole map. With contrast "auto" the process that brings the tomogram onto the grid also finds
    the contrast there, as `pick` does.

    Of the chunks that a process computes at a time one is scored and one other reads ahead; the rest
    wait. A picker is loaded once by each process. What is in memory (a tomogram or a mask from an array,
    a picker without an address) travels to a cluster inside the graph; files go by their address.

    Raises
    ------
    PlanError
        When computed: a worker does not see the folder.
    SourceError
        The mask is not one of this tomogram. When computed: voxels or scores are not numbers.
    """
    import dask.array as da  # noqa: TID251
    from dask.delayed import delayed  # noqa: TID251

    tomogram = level_for(tomogram, picker, options)
    grid, plan = plan_pick(tomogram, picker, options)
    plan = replace(plan, group=(1, 1, 1))  # every chunk is a task of its own
    allowed = None if mask is None else open_mask(mask, tomogram.frame, grid, storage_options)
    volume = within(
        within(
            _own_folder() if scratch is None else scratch, scratch_folder(tomogram, grid, rule_of(picker))
        ),
        VOLUME,
    )
    store = as_store(volume, storage_options)
    name = picker_name(picker, otherwise=str(uuid.uuid4()))
    negate = None if options.contrast == "auto" else is_negated(picker, options.contrast)
    token = config_hash(
        {
            "volume": str(store),
            "picker": name,
            "plan": repr(plan),
            "negate": negate,
            "mask": None if allowed is None else allowed.fingerprint,
        }
    )[:32]
    packed = _Parcel(name, picker, lasts=getattr(picker, "fingerprint", None) is not None)
    scores = _Scores(store, packed, plan, allowed, negate=negate)
    source = _Source(tomogram, grid.voxel_size, rule_of(picker), scores, temporary=scratch is None)
    ingested = delayed(_ingested, pure=True)(_Parcel(token, source), dask_key_name=f"ingest-{token}")
    found: da.Array = da.map_blocks(
        _score,
        ingested,
        chunks=da.core.normalize_chunks(plan.chunk, plan.shape),
        dtype=np.float32,
        meta=np.empty((0, 0, 0), np.float32),
        name=f"score-{token}",
    )
    return found


class _Parcel:
    """A thing that leaves this process as bytes, which are unpickled only where they are opened."""

    def __init__(self, name: str, thing: Any, *, lasts: bool = False) -> None:
        self.name, self.lasts = name, lasts
        self._thing = thing

    def __reduce__(self) -> tuple[object, ...]:
        # The class of a picker may live in a script or a notebook, which other processes cannot import.
        return (_Sealed, (self.name, cloudpickle.dumps(self._thing), self.lasts))

    def open(self) -> Any:
        """Return the thing itself."""
        return self._thing


class _Sealed:
    """A parcel that has travelled; one that `lasts` is unpickled once by each process and stays there."""

    def __init__(self, name: str, data: bytes, lasts: bool) -> None:  # noqa: FBT001  (as pickle calls it)
        self.name, self.lasts = name, lasts
        self._data = data

    def open(self) -> Any:
        """Return this process' copy of the thing."""
        return residents.named(self.name, self._unpack) if self.lasts else self._unpack()

    def _unpack(self) -> Any:
        return pickle.loads(self._data)


class _Scores:
    """What the chunks of one map are scored with: addresses, opened once by each process that has them."""

    def __init__(
        self,
        store: Store,
        picker: _Parcel | _Sealed,
        plan: BlockPlan,
        mask: Mask | None,
        *,
        negate: bool | None,
    ) -> None:
        self.store, self._picker, self._plan, self._mask = store, picker, plan, mask
        self._negate = negate
        self._opening = threading.Lock()
        self._opened: Scoring | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Keep the addresses; what is open belongs to one process."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_opening", "_opened")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Come back with nothing open."""
        self.__dict__.update(state, _opening=threading.Lock(), _opened=None)

    def chunk(self, place: Index) -> npt.NDArray[np.float32]:
        """Return the scores of the chunk at a place of the grid of chunks."""
        scoring = self._open()
        counts = tuple(len(axis) for axis in scoring.plan.tasks.axes)
        return score_chunk(scoring.plan.tasks[int(np.ravel_multi_index(place, counts))], scoring)

    def settled(self) -> _Scores:
        """Return this with the contrast that the picker finds, where none was given."""
        if self._negate is not None:
            return self
        picker = self._picker.open()
        turns = _turns(picker, self._picker.name if self._picker.lasts else None)
        finding = find_contrast(open_volume(self.store), picker, self._plan, turns=turns)
        negate = is_negated(picker, finding.contrast)
        return _Scores(self.store, self._picker, self._plan, self._mask, negate=negate)

    def _open(self) -> Scoring:
        with self._opening:
            if self._opened is None:
                if isinstance(self.store, LocalStore):
                    _refuse_unseen(self.store.root)
                picker = self._picker.open()
                self._opened = Scoring(
                    volume=open_volume(self.store),
                    picker=picker,
                    plan=self._plan,
                    negate=bool(self._negate),
                    mask=self._mask,
                    turns=_turns(picker, self._picker.name if self._picker.lasts else None),
                )
            return self._opened


@dataclass(frozen=True)
class _Source:
    """What the working volume of a map is made from."""

    tomogram: Tomogram
    voxel_size: float
    rule: Rule
    scores: _Scores
    temporary: bool


def _ingested(parcel: _Parcel | _Sealed) -> _Scores:
    """Bring the tomogram onto the working grid, where that is not done; return what scores it.

    With contrast "auto" that is also where its contrast is found, once for all chunks.
    """
    source: _Source = parcel.open()
    store = source.scores.store
    if source.temporary and isinstance(store, LocalStore):
        _refuse_unseen(store.root.parent.parent)
    ingest(source.tomogram, store, voxel_size=source.voxel_size, rule=source.rule)
    return source.scores.settled()


def _score(scores: _Scores, block_id: Index) -> npt.NDArray[np.float32]:
    """Return one block of the dask array."""
    return scores.chunk(block_id)


def _turns(picker: Scorer, name: str | None) -> Turns:
    """Return the turns of a picker: one thread at a time calls it, whatever the number of its maps.

    Those of a picker with a name are its turns in `predict` too.
    """
    if name is not None:
        found: Turns = residents.named(f"turns of {name}", Turns)
        return found
    with _NAMELESS_LOCK:
        return _NAMELESS.setdefault(id(picker), Turns())


def _refuse_unseen(folder: Path) -> None:
    if not folder.is_dir():
        raise PlanError(
            f"{socket.gethostname()} does not see the folder {folder}",
            expected="a folder that all workers see",
            remedy="pass scratch, a folder on a disk that all machines share",
        )


@lru_cache(maxsize=1)
def _own_folder() -> Path:
    """Return the temporary folder of this process, which goes when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="tomocpt-stream-"))
    atexit.register(_remove, folder, os.getpid())
    return folder


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not where a fork of the process ends
        shutil.rmtree(folder, ignore_errors=True)
