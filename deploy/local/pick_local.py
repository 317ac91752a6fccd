"""Picks tomograms on this machine with several worker processes; writes a STAR file for each.

    python pick_local.py TS_01.mrc TS_02.mrc --diameter 290

Run again after it was killed, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys

from tomocpt_stream import ActionableError, PickOptions, load_picker, open_tomogram, pick, write_picks
from tomocpt_stream.cluster import local_cluster
from tomocpt_stream.destinations import destinations


def arguments() -> argparse.ArgumentParser:
    """Return what the script is asked with."""
    parser = argparse.ArgumentParser(description="Pick tomograms with several worker processes.")
    parser.add_argument("tomograms", nargs="+", metavar="TOMOGRAM")
    parser.add_argument("--diameter", type=float, required=True, help="longest axis of the particle, Å")
    parser.add_argument("--picker", default="base", help="the shipped picker or a picker file")
    parser.add_argument("--workers", type=int, help="processes; one for each GPU or two cores when left out")
    parser.add_argument("--memory", help='memory budget of each worker, such as "4 GB"')
    parser.add_argument("--scratch", default="scratch", help="keeps what is done, for a run that was killed")
    parser.add_argument("--output", default="picks", help="folder of the STAR files")
    return parser


def main() -> int:
    """Pick the tomograms one after the other, each on all the workers; return the exit code."""
    asked = arguments().parse_args()
    picker = load_picker(asked.picker)
    options = PickOptions(diameter=asked.diameter)
    targets = destinations(asked.tomograms, f"{asked.output}/")
    failed = 0
    with local_cluster(asked.workers) as client:
        for source, target in targets.items():
            try:
                tomogram = open_tomogram(source, name=target.name)
                picks = pick(
                    tomogram, picker, options, scratch=asked.scratch, memory=asked.memory, client=client
                )
                write_picks(picks, target.picks)
            except (ActionableError, OSError) as error:  # one bad tomogram must not cost the others
                print(f"{source}: {error}", file=sys.stderr)
                failed += 1
            else:
                print(f"{len(picks)} picks -> {target.picks}")
    return 1 if failed else 0


# Workers are spawned: each of them reads this file again, and must not start workers of its own.
if __name__ == "__main__":
    sys.exit(main())
