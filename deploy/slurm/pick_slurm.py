"""Picks tomograms on workers that are SLURM jobs of their own; dask-jobqueue submits them.

    python pick_slurm.py --jobs 8 --partition gpu tomograms/*.mrc --diameter 290

What is not an option of this script goes to `tomocpt-stream pick`. The script itself does little
and must live until the end: run it in a small job, or where long programs are allowed.
"""

from __future__ import annotations

import argparse

from dask_jobqueue import SLURMCluster

from tomocpt_stream.__main__ import main as tomocpt_stream
from tomocpt_stream.cluster import THREADS


def arguments() -> argparse.ArgumentParser:
    """Return the options of this script."""
    parser = argparse.ArgumentParser(description="Pick tomograms on SLURM jobs.", allow_abbrev=False)
    parser.add_argument("--jobs", type=int, default=4, help="worker jobs at once, one GPU each")
    parser.add_argument("--partition", help="partition of the worker jobs")
    parser.add_argument("--account", help="account that pays for them")
    parser.add_argument("--gpus", type=int, default=1, choices=(0, 1), help="GPUs of a worker job")
    parser.add_argument("--cpus", type=int, default=8, help="CPUs of a worker job")
    parser.add_argument("--memory-per-job", default="32 GB", help="memory of a worker job")
    return parser


def main() -> None:
    """Start the worker jobs, pick on them, end them."""
    asked, words = arguments().parse_known_args()
    with SLURMCluster(
        queue=asked.partition,
        account=asked.account,
        processes=1,
        cores=THREADS,  # threads of the worker; what the job reserves is job_cpu
        job_cpu=asked.cpus,
        memory=asked.memory_per_job,
        walltime="02:00:00",
        # Workers leave before the walltime, not all at once.
        worker_extra_args=["--lifetime", "110m", "--lifetime-stagger", "5m", "--no-dashboard"],
        job_extra_directives=["--gpus=1"] if asked.gpus else [],
        log_directory="slurm-logs",
        scheduler_options={"dashboard_address": ":0"},
    ) as cluster:
        # Unlike `scale`, `adapt` submits a new job for each worker that has left.
        cluster.adapt(minimum_jobs=asked.jobs, maximum_jobs=asked.jobs)
        tomocpt_stream.main(["pick", "--scheduler", cluster.scheduler_address, *words], "tomocpt-stream")


if __name__ == "__main__":
    main()
