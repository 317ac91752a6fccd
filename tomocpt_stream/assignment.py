"""What a worker needs to score the tasks of a map, by address: stores, a plan, the name of a picker.

The address travels with every task, in a few kB; what it names is opened once per process. The picker
is loaded once per worker, before any task, and stays on its device for every map that it scores.
"""

from __future__ import annotations

import socket
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import zarr

from tomocpt_stream.blocks import CODEC_CONCURRENCY
from tomocpt_stream.decoded import DECODED
from tomocpt_stream.errors import PlanError
from tomocpt_stream.patience import PatientStore
from tomocpt_stream.receipts import read_json
from tomocpt_stream.scan import Turns
from tomocpt_stream.scoremap import member
from tomocpt_stream.scoring import Work
from tomocpt_stream.stages import Here, residents
from tomocpt_stream.volume import open_volume
from tomocpt_stream.voxels import shared

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zarr.abc.store import Store

    from tomocpt_stream.blocks import BlockPlan
    from tomocpt_stream.mask import Mask
    from tomocpt_stream.stages import Address


@dataclass(frozen=True)
class WorkAddress:
    """The address of a `Work`: the stores of volume and map, and what is not in them.

    `picker` is the name under which the workers hold the picker.
    """

    volume: Store
    store: Store
    picker: str
    plan: BlockPlan
    floor: float
    negate: bool
    config: str
    mask: Mask | None
    token: str

    def open(self) -> Work:
        """Return the work on the picker that this process holds."""
        zarr.config.set({"async.concurrency": CODEC_CONCURRENCY})  # as the plan's bytes assume
        DECODED.forget()  # what the plan does not count
        if read_json(self.store, "zarr.json") is None:
            raise PlanError(
                f"{socket.gethostname()} does not find the map that is being made in {self.store}",
                expected="a store that every worker can read and write",
                remedy="give a path on a disk that all workers see, or the store of a bucket",
            )
        group = zarr.open_group(PatientStore(self.store), mode="r+")
        return Work(
            volume=open_volume(self.volume),
            picker=residents.named(self.picker),
            plan=self.plan,
            scores=member(group, "0"),
            marks=member(group, "marks") if "marks" in group else None,
            floor=self.floor,
            negate=self.negate,
            config=self.config,
            mask=self.mask,
            turns=residents.named(f"turns of {self.picker}", Turns),
        )


@contextmanager
def assigned(work: Work, client: Any) -> Iterator[Address[Work]]:
    """Yield the address of `work` for the workers of `client`, who hold its picker meanwhile.

    Without a client it is the work itself. Raises PlanError for a store that other processes cannot see.
    """
    if client is None:
        try:
            yield Here(work)
        finally:
            work.turns.close()
        return
    from tomocpt_stream.cluster import hold_on_workers

    store, volume = shared(work.scores.store), shared(work.volume.store)
    mask = work.mask
    if mask is not None and not mask.tomogram.travels:
        mask = mask.stored(store, "mask")
    fingerprint = getattr(work.picker, "fingerprint", None)
    name = picker_name(work.picker, otherwise=work.config)
    address = WorkAddress(
        volume=volume,
        store=store,
        picker=name,
        plan=work.plan,
        floor=work.floor,
        negate=work.negate,
        config=work.config,
        mask=mask,
        # Never equal to an earlier one's: the same stores may have other credentials by now.
        token=uuid.uuid4().hex,
    )
    # A picker without a fingerprint is of no use to any later map.
    with hold_on_workers(client, name, work.picker, for_good=fingerprint is not None):
        yield address


def picker_name(picker: Any, *, otherwise: str) -> str:
    """Return the name under which a process holds a picker; `otherwise` is for one without a fingerprint."""
    fingerprint = getattr(picker, "fingerprint", None)
    return f"picker {fingerprint or otherwise} {getattr(picker, 'numerics', '')}"
