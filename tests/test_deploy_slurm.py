"""The SLURM recipes: the job script runs with stand-ins for the programs of the cluster."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from tests.command_lines import (
    DEPLOY,
    SBATCH,
    SRUN,
    check_words,
    keywords,
    load_script,
    run,
    split,
    stand_in,
    takes,
    text,
)
from tomocpt_stream.__main__ import main

if TYPE_CHECKING:
    from pathlib import Path

# Of SLURMCluster and its `adapt`, dask-jobqueue 0.9.
SLURM_CLUSTER = takes(
    "queue account walltime job_cpu job_mem cores memory processes interface nanny local_directory "
    "death_timeout worker_command worker_extra_args job_script_prologue job_directives_skip "
    "job_extra_directives log_directory shebang python config_name name n_workers silence_logs asynchronous "
    "security scheduler_options scheduler_cls shared_temp_directory"
)
ADAPT = takes("minimum maximum minimum_jobs maximum_jobs minimum_memory maximum_memory interval")
JOB = DEPLOY / "slurm" / "pick.sbatch"
# Each stands in for a program of the cluster, and writes down what it was called with.
PROGRAMS = {
    "activate": 'PATH="$LOG/bin:$PATH"',
    "squeue": 'echo "$SQUEUE"',
    "srun": """
        while [[ $1 == --* ]]; do echo "$1" >> "$LOG/srun.$$"; shift; done
        trap 'kill $(jobs -p)' TERM
        for ((task = 0; task < SLURM_NTASKS; task++)); do "$@" & done
        wait""",
    "dask": """
        printf '%s\\n' "$@" > "$LOG/$1.$$"
        [ "$1" = worker ] && exec sleep "$WORKER_LIVES"
        [ -n "$SCHEDULER_FAILS" ] && exit 1
        sleep 0.3
        echo fresh > "$3"
        exec sleep 60""",
    "tomocpt-stream": """
        printf '%s\\n' "$@" > "$LOG/pick.$$"
        cat "$3" > "$LOG/address"
        trap 'kill $!; exit 143' TERM
        sleep "$PICK_LIVES" & wait
        touch "$LOG/picked"
        exit "$PICK_CODE" """,
}


def directives() -> dict[str, str]:
    """Return the options that the job script asks SLURM for."""
    lines = [line for line in JOB.read_text().splitlines() if line.startswith("#SBATCH ")]
    given, rest = split([line.split(maxsplit=1)[1] for line in lines], SBATCH)
    assert not rest
    return given


def submit(folder: Path, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run the job script as SLURM does, with stand-ins for the programs that it starts."""
    place = folder / "bin"
    place.mkdir()
    for name, body in PROGRAMS.items():
        (place / name).write_text(f"#!/bin/bash\n{textwrap.dedent(body)}\n")
        (place / name).chmod(0o755)
    asked = directives()
    settings = {
        "LOG": str(folder),
        "TOMOCPT_ENV": str(folder),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_END_TIME": str(int(time.time()) + 4000),
        "SLURM_CPUS_PER_TASK": asked["--cpus-per-task"],
        "SLURM_MEM_PER_CPU": str(1024 * int(asked["--mem-per-cpu"].removesuffix("G"))),
        "SLURM_NTASKS": str(int(asked["--nodes"]) * int(asked["--ntasks-per-node"])),
        "WORKER_LIVES": "60",
        "PICK_LIVES": "0",
        "PICK_CODE": "0",
        "SCHEDULER_FAILS": "",
        **changes,
    }
    return run(["bash", JOB, *words], folder, **settings)


def called(folder: Path, program: str) -> list[list[str]]:
    """Return the words that each call of a program had."""
    return [path.read_text().splitlines() for path in folder.glob(f"{program}.[0-9]*")]


def minutes(walltime: str) -> float:
    hours, minute, second = (int(part) for part in walltime.split(":"))
    return hours * 60 + minute + second / 60


def test_the_job_script_is_bash_and_asks_for_what_slurm_has() -> None:
    subprocess.run(["bash", "-n", JOB], check=True)
    asked = directives()
    assert asked["--gpus-per-task"] == "1"
    assert minutes(asked["--time"]) > 10


def test_the_job_starts_a_scheduler_workers_and_the_pick(tmp_path: Path) -> None:
    (tmp_path / "scheduler-77.json").write_text("of a run before it was requeued")
    done = submit(tmp_path, "a b.mrc", "--diameter", "290")
    assert done.returncode == 0, done.stderr
    ((_, *scheduler),) = called(tmp_path, "scheduler")
    workers = called(tmp_path, "worker")
    (pick,) = called(tmp_path, "pick")
    for words in (["dask", "scheduler", *scheduler], ["dask", *workers[0]], ["tomocpt-stream", *pick]):
        check_words(words)
    assert len(workers) == 4
    (given,) = called(tmp_path, "srun")
    assert split(given, SRUN)[0]["--cpus-per-task"] == "8"
    assert "32768MiB" in workers[0]
    assert 3850 <= int(workers[0][workers[0].index("--lifetime") + 1].removesuffix("s")) <= 3880
    assert pick[-3:] == ["a b.mrc", "--diameter", "290"]
    assert (tmp_path / "address").read_text() == "fresh\n"
    assert not list(tmp_path.glob("*.json"))


def test_the_job_ends_as_its_pick_does(tmp_path: Path) -> None:
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 4000))
    done = submit(tmp_path, "a.mrc", PICK_CODE="3", SLURM_JOB_END_TIME="", SQUEUE=end)
    assert done.returncode == 3, done.stderr
    lifetime = called(tmp_path, "worker")[0]
    assert 3850 <= int(lifetime[lifetime.index("--lifetime") + 1].removesuffix("s")) <= 3880


def test_the_job_ends_when_its_workers_have_left(tmp_path: Path) -> None:
    done = submit(tmp_path, "a.mrc", WORKER_LIVES="0.2", PICK_LIVES="50")
    assert done.returncode == 1
    assert "submit again" in done.stderr
    assert not (tmp_path / "picked").exists()
    assert not list(tmp_path.glob("*.json"))


def test_the_job_ends_when_there_is_no_scheduler(tmp_path: Path) -> None:
    done = submit(tmp_path, "a.mrc", SCHEDULER_FAILS="yes")
    assert done.returncode == 1
    assert "scheduler-77.log" in done.stderr
    assert not called(tmp_path, "pick")


class Cluster:
    """A SLURMCluster without SLURM."""

    scheduler_address = "tcp://127.0.0.1:8786"
    made: ClassVar[list[Cluster]] = []

    def __init__(self, **settings: Any) -> None:
        self.settings, self.open = settings, True
        self.adapted: dict[str, int] = {}
        self.made.append(self)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.open = False

    def adapt(self, **settings: int) -> None:
        self.adapted = settings


def test_workers_as_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    source = text("slurm", "pick_slurm.py")
    assert keywords(source, "SLURMCluster") <= set(SLURM_CLUSTER)
    assert keywords(source, "adapt") <= set(ADAPT)
    seen: list[tuple[dict[str, Any], bool]] = []

    def refuse(**asked: Any) -> None:
        seen.append((asked, Cluster.made[-1].open))
        raise SystemExit(1)

    monkeypatch.setattr(main.commands["pick"], "callback", refuse)
    monkeypatch.setitem(sys.modules, "dask_jobqueue", stand_in("dask_jobqueue", SLURMCluster=Cluster))
    script = load_script(DEPLOY / "slurm" / "pick_slurm.py")
    words = "--jobs 3 --partition gpu a.mrc --memory 4GB --diameter 290 --scratch s"
    monkeypatch.setattr(sys, "argv", ["pick_slurm.py", *words.split()])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 1
    ((asked, was_open),) = seen
    (cluster,) = Cluster.made
    assert was_open
    assert not cluster.open
    assert (asked["tomograms"], asked["memory"]) == (("a.mrc",), "4GB")
    assert asked["scheduler"] == cluster.scheduler_address
    assert cluster.adapted == {"minimum_jobs": 3, "maximum_jobs": 3}
    settings = cluster.settings
    assert (settings["queue"], settings["job_extra_directives"]) == ("gpu", ["--gpus=1"])
    extra = settings["worker_extra_args"]
    check_words(
        ["dask", "worker", "tcp://a:1", "--nthreads", str(settings["cores"]), "--memory-limit", "1GB", *extra]
    )
    lives, stagger = (
        int(extra[extra.index(name) + 1].removesuffix("m")) for name in ("--lifetime", "--lifetime-stagger")
    )
    assert lives + stagger < minutes(settings["walltime"])
