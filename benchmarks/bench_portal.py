"""Listing a deposition of the portal: this package beside the public client, against the stand-in.

    python benchmarks/bench_portal.py
    python benchmarks/bench_portal.py --tomograms 300 --write

The stand-in serves the API's schema on loopback, so that what is measured are requests and what becomes of
their answers, not a network: add the round trip of one for each request. "Traversal" walks deposition,
datasets, runs, voxel spacings and tomograms through the client's attributes, as its examples do; "find" is
one query of the client for all of them. Needs the extra `dev`.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench_pipeline import RESULTS, versions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cryoet_data_portal as public

from tests.portal_rows import OWN_TOMOGRAMS, many
from tests.portal_server import portal_server
from tomocpt_stream.portal import PortalAPI, select_tomograms

if TYPE_CHECKING:
    from collections.abc import Callable


def ours(url: str) -> int:
    """Select one tomogram of each run."""
    found = select_tomograms(deposition=OWN_TOMOGRAMS, near=10.0, api=PortalAPI(url, cache=False))
    return len(found) + len(found.left_out)


def find(url: str) -> int:
    """Ask the public client for every tomogram at once."""
    client = public.Client(url)
    asked = [public.Tomogram.run.dataset.deposition_id == OWN_TOMOGRAMS]
    return len(public.Tomogram.find(client, asked))


def traversal(url: str) -> int:
    """Walk down from the deposition through the public client."""
    deposition = public.Deposition.get_by_id(public.Client(url), OWN_TOMOGRAMS)
    return sum(
        len(spacing.tomograms)
        for dataset in deposition.datasets
        for run in dataset.runs
        for spacing in run.tomogram_voxel_spacings
    )


def main() -> None:
    """Print one Markdown page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tomograms", type=int, default=3000, help="in the deposition, two of each run")
    parser.add_argument("--write", action="store_true", help="also write the page below benchmarks/results")
    parser.add_argument(
        "--hardware", default=f"{platform.machine()}-{os.cpu_count()}cpu", help="for the page's name"
    )
    asked = parser.parse_args()
    ways: dict[str, Callable[[str], int]] = {
        "this package": ours,
        "public client, find": find,
        "public client, traversal": traversal,
    }
    rows = []
    with portal_server(many(asked.tomograms, config=10_000)) as server:
        for name, way in ways.items():
            server.reset()
            began = time.perf_counter()
            found = way(server.url)
            seconds = time.perf_counter() - began
            rows.append(f"| {name} | {found} | {len(server.requests)} | {seconds:.1f} |")
            print(rows[-1], flush=True)
    text = "\n".join(
        [
            "# Listing a deposition of the portal",
            "",
            *versions("bench_portal.py", "cryoet-data-portal", "requests"),
            "",
            f"A deposition of {asked.tomograms} tomograms, each with 10 kB of viewer settings.",
            "",
            "| way | tomograms | requests | s |",
            "|---|---:|---:|---:|",
            *rows,
            "",
        ]
    )
    print(text)
    if asked.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"portal_{asked.hardware}_{dt.datetime.now(tz=dt.UTC):%Y%m}.md").write_text(text)


if __name__ == "__main__":
    main()
