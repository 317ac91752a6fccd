"""Picking on workers from the command: which ones, what they are handed, and what is said of them."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from tests.blobs import NamedBlobPicker, blobs
from tomocpt_stream import cluster, connection, picker, pipeline, terminal
from tomocpt_stream.__main__ import main
from tomocpt_stream.errors import JobError
from tomocpt_stream.formats import read_picks
from tomocpt_stream.phantom import write_mrc
from tomocpt_stream.picks import Picks
from tomocpt_stream.progress_log import log_progress
from tomocpt_stream.request import PickRequest, workers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distributed import Client

    from tomocpt_stream.tomogram import Tomogram

ROOT = Path(__file__).parents[1]
SHAPE = (30, 50, 44)
CENTRES = np.array([[8.0, 10.3, 9.0], [20.6, 12.0, 33.2], [15.0, 36.4, 20.5], [22.0, 40.0, 38.0]])
DISTANT = "tcp://10.0.0.1:8786"
NEAR = "tcp://127.0.0.1:8786"


@dataclass
class Workers:
    """A client of three workers that do nothing."""

    address: str = NEAR
    count: int = 3
    status: str = "running"
    waited: int = 0
    opened: list[Any] = field(default_factory=list)

    @property
    def scheduler(self) -> SimpleNamespace:
        return SimpleNamespace(address=self.address)

    @property
    def dashboard_link(self) -> str:
        return "http://there:8787/status"

    def nthreads(self) -> dict[str, int]:
        return {f"tcp://10.0.0.{index}:1": 2 for index in range(self.count)}

    @contextmanager
    def open(self, asked: Any) -> Iterator[Workers]:
        self.opened.append(asked)
        self.status = "running"
        try:
            yield self
        finally:
            self.status = "closed"

    def wait(self, client: Workers) -> None:
        assert client is self
        self.waited += 1
        self.count = 1


@dataclass
class Calls:
    """Calls of `pick` and `plan_pick`. `error` is raised by `pick`, which may lose its workers."""

    settings: list[dict[str, Any]] = field(default_factory=list)
    plans: list[int] = field(default_factory=list)
    error: BaseException | None = None
    lose: Workers | None = None

    def pick(self, tomogram: Tomogram, model: Any, options: Any, **settings: Any) -> Picks:
        self.settings.append(settings)
        if self.error is not None:
            if self.lose is not None:
                self.lose.status = "closed"
            raise self.error
        settings["progress"]("predict", 0, 2)
        settings["progress"]("predict", 1, 2)
        score = np.ones(len(CENTRES), np.float32)
        return Picks(CENTRES, score, voxel_size=10.0, tomogram=tomogram.name, shape=SHAPE)

    def plan(self, *words: Any, workers: int = 1, **settings: Any) -> Any:
        self.plans.append(workers)
        return _PLAN(*words, workers=workers, **settings)


_PLAN = pipeline.plan_pick


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with two tomograms, and a stand-in for the shipped picker."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(picker, "load_picker", lambda *_, **__: NamedBlobPicker())
    for name in ("a.mrc", "b.mrc"):
        write_mrc(Path(name), blobs(SHAPE, CENTRES), 10.0)


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> Workers:
    """The workers that every cluster has."""
    found = Workers()
    monkeypatch.setattr(cluster, "local_cluster", found.open)
    monkeypatch.setattr(connection, "connect", found.open)
    monkeypatch.setattr(connection, "await_worker", found.wait)
    return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What `pick` is called with."""
    found = Calls()
    monkeypatch.setattr(pipeline, "pick", found.pick)
    monkeypatch.setattr(pipeline, "plan_pick", found.plan)
    return found


def run(*words: str, code: int = 0) -> Result:
    """Pick a.mrc, without a picture."""
    every = ["pick", "a.mrc", "--diameter", "80", "--no-picture", *words]
    result = CliRunner().invoke(main, every)
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def request(**settings: Any) -> PickRequest:
    plain: dict[str, Any] = {"output": "picks/", "picker": "base", "stitch": "hann", "tta": False}
    plain |= {"batch_size": 4, "memory": None, "device": "auto", "diameter": 80.0}
    return PickRequest(tomograms=("a.mrc",), **plain | settings)


def test_without_workers_this_process_does_the_work(clients: Workers, calls: Calls) -> None:
    shown = run().output
    assert (calls.settings[0]["client"], calls.settings[0]["verify"]) == (None, False)
    assert (calls.plans, clients.opened) == ([1], [])
    assert "worker" not in shown


@pytest.mark.parametrize(
    ("words", "opened"),
    [(["--workers", "3"], 3), (["--scheduler", NEAR], NEAR), (["--scheduler", "s.json"], "s.json")],
)
def test_workers_are_handed_on_and_dismissed(
    clients: Workers, calls: Calls, words: list[str], opened: object
) -> None:
    shown = run("b.mrc", *words, "--verify", "--memory", "2 GB").output
    assert clients.opened == [opened]
    assert [settings["client"] for settings in calls.settings] == [clients, clients]
    assert [settings["verify"] for settings in calls.settings] == [True, True]
    assert calls.plans == [3, 3]
    assert shown.count(f"3 workers, 6 threads at {NEAR}; dashboard http://there:8787/status\n") == 1
    assert shown.count(" in each of 3 workers\n") == 2
    assert clients.status == "closed"
    assert clients.waited == 0


def test_lines_of_the_log_name_the_tomogram(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "log_progress", partial(log_progress, every=0.0))
    shown = run("b.mrc").stderr
    assert [line.split(" ", 2)[2] for line in shown.splitlines()][0::2] == [
        "predict a: 0.0 %",
        "predict b: 0.0 %",
    ]


def test_one_cluster_at_a_time(clients: Workers, calls: Calls) -> None:
    shown = run("--workers", "2", "--scheduler", NEAR, code=2).stderr
    assert "--workers" in shown
    assert "--scheduler" in shown
    assert (clients.opened, calls.settings) == ([], [])
    run("--workers", "0", code=2)


def test_distant_workers_need_a_folder_that_they_see(clients: Workers, calls: Calls) -> None:
    clients.address = DISTANT
    shown = run("--scheduler", DISTANT, code=1).stderr
    assert re.match(f"Error: --scheduler {DISTANT} without --scratch", shown)
    assert len(shown.splitlines()) == 1
    assert (calls.settings, clients.status, clients.waited) == ([], "closed", 0)
    run("--scheduler", DISTANT, "--scratch", "scratch")
    assert calls.settings[0]["scratch"] == "scratch"


def test_the_wait_for_a_first_worker_is_said(clients: Workers, calls: Calls) -> None:
    clients.count = 0
    result = run("--scheduler", NEAR)
    assert re.search(rf"^[-\d]+ [:\d]+ waiting for the first worker of {NEAR}$", result.stderr, re.MULTILINE)
    assert clients.waited == 1
    assert calls.plans == [1]
    assert "1 worker, 2 threads" in result.stdout


def test_a_scheduler_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = run("--scheduler", "nowhere", code=1).stderr
    assert re.fullmatch(r"Error: 'nowhere' is no address of a scheduler .*\n", shown)


def test_the_cluster_is_closed_when_the_user_has_had_enough(clients: Workers, calls: Calls) -> None:
    calls.error = KeyboardInterrupt()
    shown = run("--workers", "2", code=1).stderr
    assert "Aborted!" in shown
    assert clients.status == "closed"


def test_without_its_scheduler_no_other_tomogram_is_tried(clients: Workers, calls: Calls) -> None:
    calls.error, calls.lose = JobError("the scheduler is gone", expected="one", remedy="start it"), clients
    shown = run("b.mrc", "--scheduler", NEAR, code=1).stderr
    assert len(calls.settings) == 1
    assert "a.mrc: JobError: the scheduler is gone" in shown
    assert "2 of 2 tomograms were not done: a.mrc, b.mrc" in shown


def test_a_tomogram_that_fails_leaves_the_workers_to_the_next(clients: Workers, calls: Calls) -> None:
    calls.error = ValueError("odd")
    run("b.mrc", "--scheduler", NEAR, code=1)
    assert len(calls.settings) == 2


def test_the_same_request_in_python_is_refused_too() -> None:
    with pytest.raises(click.UsageError, match="--workers"):
        request(workers=2, scheduler=NEAR)


def levels() -> list[int]:
    return [logging.getLogger(name).level for name in ("distributed", "distributed.client", "asyncio")]


@pytest.mark.parametrize("filters", [None, "error"])
def test_dask_is_quiet_while_there_are_workers(
    clients: Workers, monkeypatch: pytest.MonkeyPatch, filters: str | None
) -> None:
    monkeypatch.delenv("DASK_LOGGING__DISTRIBUTED", raising=False)
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    if filters is not None:
        monkeypatch.setenv("PYTHONWARNINGS", filters)
    before, environment = levels(), dict(os.environ)
    with workers(request(workers=3)):
        assert set(levels()) == {logging.CRITICAL}
        assert os.environ["DASK_LOGGING__DISTRIBUTED"] == "critical"
        assert os.environ["PYTHONWARNINGS"].split(",") == [
            *filter(None, [filters]),
            "ignore:resource_tracker",
        ]
    assert levels() == before
    assert dict(os.environ) == environment


def test_dask_says_what_it_is_asked_for(clients: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASK_LOGGING__DISTRIBUTED", "info")
    before = levels()
    with workers(request(workers=3)):
        assert levels() == before
        assert os.environ["DASK_LOGGING__DISTRIBUTED"] == "info"


def test_inspect_plans_for_workers_too() -> None:
    write_mrc(Path("wide.mrc"), np.zeros((40, 200, 300), np.float32), 10.0)
    words = ["inspect", "wide.mrc", "--diameter", "80", "--no-picture", "--workers", "4"]
    plans = [line for line in CliRunner().invoke(main, words).stdout.splitlines() if " windows of " in line]
    assert len(plans) == 2
    assert "1 task" in plans[0]
    assert plans[1].endswith("in each of 4 workers")
    assert int(re.findall(r"(\d+) tasks", plans[1])[0]) >= 4


def test_picks_of_a_cluster_are_those_of_one_process(
    workers: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = str(workers.scheduler_info(n_workers=0)["address"])
    run("--output", "here/", "--keep-heatmap", "here")
    run("--output", "there/", "--keep-heatmap", "there", "--scheduler", address, "--verify")
    assert Path("here/a.star").read_bytes() == Path("there/a.star").read_bytes()
    assert len(read_picks("there/a.star")["a"]) == len(CENTRES)
    assert len(workers.nthreads()) == 2


def test_the_command_starts_workers_and_ends_them(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(size=(16, 48, 48)).astype(np.float32)
    write_mrc(Path("good.mrc"), noise, 10.0)
    write_mrc(Path("flat.mrc"), np.zeros_like(noise), 10.0)
    words = "flat.mrc good.mrc --diameter 200 --contrast dark --workers 1 --no-picture --batch-size 1"
    done = subprocess.run(
        [sys.executable, "-m", "tomocpt_stream", "pick", *words.split()],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1
    assert "1 worker, 2 threads at tcp://127.0.0.1:" in done.stdout
    assert "picks/good.star" in done.stdout
    failed, summary = done.stderr.splitlines()  # and nothing of dask's
    assert re.match("flat.mrc: .*SourceError: .* every voxel is fill", failed)
    assert summary == "1 of 2 tomograms were not done: flat.mrc"
