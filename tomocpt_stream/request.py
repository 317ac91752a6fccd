"""What `tomocpt-stream pick` was asked for, and the doing of it: workers, tomograms, files."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tomocpt_stream.errors import PlanError
from tomocpt_stream.formats import FORMATS
from tomocpt_stream.options import LENGTH, add_options, one_or_all, tomograms_option
from tomocpt_stream.terminal import (
    cluster_line,
    contrast_line,
    count,
    facts_line,
    plan_line,
    rate,
    say_failure,
    show_progress,
    traffic_line,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from zarr.abc.store import Store

    from tomocpt_stream.blocks import Stitch
    from tomocpt_stream.destinations import Destination, Place
    from tomocpt_stream.formats import Format
    from tomocpt_stream.frame import Frame
    from tomocpt_stream.heatmap import Contrast, Level, PickOptions, Scorer
    from tomocpt_stream.picks import Picks
    from tomocpt_stream.portal_records import TomogramRecord
    from tomocpt_stream.tomogram import BeamAxis, Tomogram
    from tomocpt_stream.zarrays import Missing

_LOGGER = logging.getLogger(__name__)
# Loggers that tell what goes on inside dask; those named have levels of their own.
_NOISY = ("distributed", "distributed.client", "asyncio")
# What sets the first one's level in the workers.
_NOISE = "DASK_LOGGING__DISTRIBUTED"
# Said where workers had to be killed, by the process that then clears up after them.
_LEAKS = "ignore:resource_tracker"


def storage_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option that says how object stores are reached."""
    return click.option(
        "--storage-option",
        "storage_options",
        multiple=True,
        metavar="KEY=VALUE",
        callback=_pairs,
        help="For addresses, repeatable: endpoint, region, access_key_id, secret_access_key, "
        "skip_signature, cache_bytes. For one provider, that of the first address given, never for the "
        "portal's bucket.  "
        "[default: from the environment]",
    )(command)


def contrast_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option that says how protein looks."""
    return click.option(
        "--contrast",
        type=click.Choice(["auto", "dark", "bright"]),
        default="auto",
        help="How protein looks. auto: a few windows are scored both ways, the one with more to pick is it.",
    )(command)


def format_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how picks are written."""
    options: list[Callable[[Callable[..., Any]], Callable[..., Any]]] = [
        click.option(
            "--format",
            type=click.Choice([name for name, kind in FORMATS.items() if kind.writes]),
            default="relion31",
            help="Of the picks; README has frame, units, scores and angles of each.",
        ),
        click.option("--particle", default="", metavar="NAME", help="What the picks are called."),
        tomograms_option("sizes"),
        click.option(
            "--pixel-size",
            type=LENGTH,
            metavar="Å",
            help="Unbinned pixel size of the tilt series, where no tomograms.star says it.",
        ),
        click.option(
            "--name-pattern",
            metavar="PATTERN",
            help="Finds the tilt series in a tomogram's name: {} is the series, * anything.",
        ),
    ]
    return add_options(options)(command)


def _pairs(ctx: click.Context, option: click.Parameter, value: tuple[str, ...]) -> dict[str, str]:
    del ctx, option
    if any("=" not in text for text in value):  # which may be a secret: not repeated
        raise click.BadParameter("each is KEY=VALUE")
    return dict(text.split("=", 1) for text in value)


@dataclass(frozen=True)
class PickRequest:
    """What `tomocpt-stream pick` was asked for: a field for each of its options."""

    tomograms: tuple[str, ...]
    diameter: float
    output: str
    picker: str
    stitch: Stitch
    tta: bool
    batch_size: int
    memory: str | None
    device: str
    contrast: Contrast = "auto"
    threshold: float = 0.3
    min_distance: float | None = None
    margin: float = 0.0
    mask: str | None = None
    format: Format = "relion31"
    particle: str = ""
    sizes: tuple[str, ...] = ()
    pixel_size: float | None = None
    name_pattern: str | None = None
    keep_heatmap: str | None = None
    scratch: str | None = None
    verify: bool = False
    workers: int | None = None
    scheduler: str | None = None
    picture: bool = True
    voxel_size: float | None = None
    beam_axis: BeamAxis = "z"
    level: Level = "given"
    missing: Missing = "error"
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    # Of tomograms of the portal: their records, names and masks, by address. No option is for these.
    records: Mapping[str, TomogramRecord] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    masks: Mapping[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse two clusters at once."""
        if self.workers is not None and self.scheduler is not None:
            raise click.UsageError("--workers starts workers here and --scheduler uses those of a cluster.")

    def options(self) -> PickOptions:
        """Return the options of the package's `pick`."""
        from tomocpt_stream.heatmap import PickOptions

        return PickOptions(
            diameter=self.diameter,
            threshold=self.threshold,
            min_distance=self.min_distance,
            contrast=self.contrast,
            stitch=self.stitch,
            tta=self.tta,
            batch_size=self.batch_size,
            margin=self.margin,
            level=self.level,
        )

    def options_for(self, place: object) -> dict[str, Any]:
        """Return the storage options for a tomogram, a mask, or a place for output.

        They are meant for one provider: that of the first address of an object store among tomograms,
        scratch, output, maps and mask, which is never the portal. Elsewhere the environment says all.
        """
        every = [*(source for source in self.tomograms if source not in self.records)]
        every += [str(one) for one in (self.scratch, self.output, self.keep_heatmap, self.mask) if one]
        return options_for(str(place), every, self.storage_options, others=self.records)

    def mask_for(self, source: str, frame: Frame) -> str | Tomogram | None:
        """Return the mask of a tomogram: one at an address is opened, with options of its own."""
        from tomocpt_stream.mask import open_mask_file
        from tomocpt_stream.remote import is_remote

        own = self.masks.get(source)
        mask = own or self.mask
        if mask is None or not is_remote(mask):
            return mask
        return open_mask_file(mask, frame, {} if own else self.options_for(mask))

    def destinations(self) -> dict[str, Destination]:
        """Return where the answer for each tomogram goes."""
        from tomocpt_stream.destinations import destinations

        kept = [name for name in (self.mask, self.picker) if name is not None]
        return destinations(
            self.tomograms,
            self.output,
            heatmaps=self.keep_heatmap,
            inputs=[*kept, *(one for one in self.sizes if not Path(one).is_dir())],
            names=self.names,
            kind=FORMATS[self.format],
        )

    def written(self) -> dict[str, Any]:
        """Return what `write_picks` is told beside picks and place."""
        return {
            "format": self.format,
            "tomograms": one_or_all(self.sizes),
            "pixel_size": self.pixel_size,
            "name_pattern": self.name_pattern,
        }


def options_for(
    place: str, addresses: Sequence[str], options: Mapping[str, Any], *, others: Collection[str] = ()
) -> dict[str, Any]:
    """Return the storage options for a place: whole ones for the provider of the first of some addresses.

    `others` are addresses that they are not meant for, whoever provides them, such as those of the portal.
    """
    from tomocpt_stream.remote import is_remote, provider, without_credentials

    providers = (provider(one) for one in (*addresses, place) if is_remote(one))
    meant = next((one for one in providers if one not in ("web", "portal")), None)
    if is_remote(place) and place not in others and provider(place) == meant:
        return dict(options)
    return without_credentials(options)


def pick_all(asked: PickRequest, picker: Scorer | None = None) -> list[Picks]:
    """Pick every tomogram of a request, write what was asked for, and return the picks.

    `picker` is that of the request where it is loaded already.

    A tomogram that cannot be picked is reported with its reason and the others are done; SystemExit
    with 1 follows at the end.
    """
    from tomocpt_stream.picker import load_picker
    from tomocpt_stream.remote import shown

    options, targets = asked.options(), asked.destinations()
    _refuse_unwritten(asked, targets)
    picker = picker or load_picker(
        asked.picker, device=asked.device, storage_options=asked.options_for(asked.picker)
    )
    _refuse_unwritable(asked, targets)
    done: list[Picks] = []
    failed = []
    with workers(asked) as client:
        for source, target in targets.items():
            if client is not None and client.status == "closed":  # the scheduler is gone, as was said
                failed.append(source)
                continue
            try:
                _pick_one(source, target, asked, options, picker, client, done)
            except Exception as error:  # one bad tomogram must not cost the picks of the others
                failed.append(source)
                say_failure(shown(source), error)
    if done:
        _say_what_follows(asked, targets, done)
    if failed:
        names = ", ".join(map(shown, failed))
        click.echo(f"{len(failed)} of {len(targets)} tomograms were not done: {names}", err=True)
        raise SystemExit(1)
    return done


@contextmanager
def workers(asked: PickRequest) -> Iterator[Any]:
    """Yield a client of the workers that were asked for; None where this process is to do the work.

    Raises
    ------
    JobError
        No scheduler answers.
    PlanError
        The workers cannot see the temporary folder of this machine, and there is no other.
    """
    if asked.workers is None and asked.scheduler is None:
        yield None
        return
    from tomocpt_stream.cluster import dashboard, local_cluster
    from tomocpt_stream.connection import await_worker, connect

    with ExitStack() as stack:
        stack.enter_context(_quiet_dask())
        if asked.scheduler is None:
            client = stack.enter_context(local_cluster(asked.workers))
        else:
            client = stack.enter_context(connect(asked.scheduler))
        _refuse_unseen(asked, client)
        if not client.nthreads():
            _LOGGER.info("waiting for the first worker of %s", client.scheduler.address)
            await_worker(client)
        click.echo(cluster_line(client.nthreads(), client.scheduler.address, dashboard(client)))
        yield client


@contextmanager
def _quiet_dask() -> Iterator[None]:
    """Keep dask from printing the traceback of each try, unless DASK_LOGGING__DISTRIBUTED asks for it.

    A task that fails every time is named in the end; of a run that was stopped nothing is to be said.
    """
    if _NOISE in os.environ:
        yield
        return
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    filters = os.environ.get("PYTHONWARNINGS")
    os.environ[_NOISE] = "critical"
    os.environ["PYTHONWARNINGS"] = f"{filters},{_LEAKS}" if filters else _LEAKS
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        del os.environ[_NOISE], os.environ["PYTHONWARNINGS"]
        if filters is not None:
            os.environ["PYTHONWARNINGS"] = filters
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _refuse_unseen(asked: PickRequest, client: Any) -> None:
    """Refuse workers on other machines where the working files would go into a temporary folder."""
    from tomocpt_stream.connection import on_this_machine

    if asked.scratch is None and not on_this_machine(client):
        raise PlanError(
            f"--scheduler {asked.scheduler} without --scratch: its workers cannot see the temporary folder "
            "of this machine",
            expected="--scratch with a folder that this machine and every worker see under the same path",
            remedy="add --scratch DIR on a shared file system",
        )


def _pick_one(
    source: str,
    target: Destination,
    asked: PickRequest,
    options: PickOptions,
    picker: Scorer,
    client: Any,
    done: list[Picks],
) -> None:
    """Pick one tomogram, write its STAR, then its picture; `done` are the picks of those before it."""
    from tomocpt_stream.formats import write_picks
    from tomocpt_stream.pipeline import level_for, min_distance, pick, plan_pick
    from tomocpt_stream.tomogram import open_tomogram

    tomogram = open_tomogram(
        asked.records.get(source, source),
        voxel_size=asked.voxel_size,
        beam_axis=asked.beam_axis,
        name=target.name,
        missing=asked.missing,
        storage_options=asked.options_for(source),
    )
    tomogram = level_for(tomogram, picker, options)
    grid, plan = plan_pick(tomogram, picker, options, memory=asked.memory, workers=_count(client))
    click.echo(facts_line(tomogram))
    click.echo(plan_line(grid, plan, workers=_count(client)))
    click.echo(contrast_line(options, plan))
    click.echo(f"  spacing {min_distance(options):g} Å, threshold {options.threshold:g}")
    began = time.perf_counter()
    with show_progress(tomogram.name) as progress:
        picks = pick(
            tomogram,
            picker,
            options,
            mask=asked.mask_for(source, tomogram.frame),
            scratch=asked.scratch,
            keep_heatmap=_map_store(target, asked),
            memory=asked.memory,
            verify=asked.verify,
            client=client,
            progress=progress,
            storage_options=asked.options_for(asked.scratch),
        )
    seconds = time.perf_counter() - began
    picks = replace(picks, particle=asked.particle)
    done.append(picks)
    table = done if target.shared else picks
    write_picks(table, target.picks, **asked.written(), storage_options=asked.options_for(target.picks))
    click.echo(
        f"  {count(len(picks), 'pick')} in {seconds:.1f} s ({rate(tomogram, seconds)}) -> {target.picks}"
    )
    if asked.picture:
        click.echo(f"  picture -> {_draw(tomogram, picks, target, asked)}")
    if tomogram.traffic is not None:
        click.echo(traffic_line(tomogram.traffic))


def _refuse_unwritten(asked: PickRequest, targets: Mapping[str, Destination]) -> None:
    """Raise before anything is picked where the format lacks a name, a size or a pixel size.

    No picks at all are rendered under the names that there will be; what only a tomogram's header says
    is made up.
    """
    import numpy as np

    from tomocpt_stream.formats import render_picks
    from tomocpt_stream.picks import Picks

    empty = Picks(np.zeros((0, 3)), np.zeros(0, np.float32), None, 10.0, shape=(1, 1, 1))
    tables = [replace(empty, tomogram=target.name, particle=asked.particle) for target in targets.values()]
    shared = any(target.shared for target in targets.values())
    for some in [tables] if shared else [[table] for table in tables]:
        render_picks(some, next(iter(targets.values())).picks, **asked.written())


def _say_what_follows(asked: PickRequest, targets: Mapping[str, Destination], done: Sequence[Picks]) -> None:
    """Print the command of the program that goes on from the picks."""
    from tomocpt_stream.formats.handover import next_command

    paths = list(dict.fromkeys(str(target.picks) for target in targets.values()))
    sizes = next((name for name in asked.sizes if name.endswith(".star")), None)
    command = next_command(
        asked.format,
        paths[0],
        done,
        diameter=asked.diameter,
        pixel_size=_pixel_size(asked),
        tomograms=sizes,
        settings=next((name for name in asked.sizes if name.endswith(".settings")), None),
    )
    if command:
        click.echo(f"next{'' if len(paths) == 1 else ', for each file'}:")
        for line in command.splitlines():
            click.echo(f"  {line}")


def _pixel_size(asked: PickRequest) -> float | None:
    """Return the pixel size of the tilt series, as was said or as the files of sizes have it for all."""
    if asked.pixel_size is not None or not asked.sizes:
        return asked.pixel_size
    from tomocpt_stream.formats.extents import tomogram_extents

    listed = tomogram_extents(asked.sizes)
    found = {one.pixel_size for one in (*listed.values(), listed.every)} - {None}
    return found.pop() if len(found) == 1 else None


def _refuse_unwritable(asked: PickRequest, targets: Mapping[str, Destination]) -> None:
    """Raise before anything is picked where an object store takes no output."""
    from tomocpt_stream.receipts import delete_object, put_object

    for star in sorted({target.picks for target in targets.values() if isinstance(target.picks, str)})[:1]:
        probe, options = f"{star}.probe", asked.options_for(star)
        put_object(probe, b"", options)
        with suppress(Exception):  # who may not delete has an empty object more
            delete_object(probe, options)


def _map_store(target: Destination, asked: PickRequest) -> Path | Store | None:
    """Return where the map of a tomogram is kept."""
    if not isinstance(target.heatmap, str):
        return target.heatmap
    from tomocpt_stream.receipts import as_store

    return as_store(target.heatmap, asked.options_for(target.heatmap))


def _draw(tomogram: Tomogram, picks: Picks, target: Destination, asked: PickRequest) -> Place:
    """Draw the picture of a tomogram's picks; return where it is."""
    from tomocpt_stream.report import draw_picks

    draw = partial(draw_picks, tomogram, picks, diameter=asked.diameter)
    return draw_at(target.picture, draw, asked.options_for(target.picture))


def draw_at(place: Place, draw: Callable[[Path], Path], storage_options: Mapping[str, Any]) -> Place:
    """Draw a picture where it belongs, on a disk or at an address; return where it is."""
    from tomocpt_stream.receipts import put_object

    if isinstance(place, Path):
        return draw(place)
    with tempfile.TemporaryDirectory(prefix="tomocpt-stream-") as folder:
        put_object(place, draw(Path(folder, "picture.png")).read_bytes(), storage_options)
    return place


def _count(client: Any) -> int:
    if client is None:
        return 1
    from tomocpt_stream.cluster import worker_count

    return worker_count(client)
