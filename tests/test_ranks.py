from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.volumes import two_balls
from tomocpt_stream.blocks import Window
from tomocpt_stream.crops import Example, Sampling
from tomocpt_stream.epochs import Epochs
from tomocpt_stream.errors import PlanError, SourceError
from tomocpt_stream.loop import OnStep, Step, learn
from tomocpt_stream.network import build_network, named_architecture
from tomocpt_stream.ranks import Alone, Ranks, check_devices, start
from tomocpt_stream.train_options import TrainOptions

if TYPE_CHECKING:
    from pathlib import Path

    from tomocpt_stream.picker import Picker

WINDOW = Window((32, 32, 64), (4, 4, 8))
SAMPLING = Sampling(window=WINDOW, radius=6.0)


class _Lost:
    """Voxels that some process cannot read: any but the one that made them."""

    def __init__(self, array: npt.NDArray[np.float32]) -> None:
        self.shape, self.percentiles, self._array = array.shape, (-1.0, 0.0, 1.0), array

    @property
    def array(self) -> npt.NDArray[np.float32]:
        if self._array.size == 0:
            raise SourceError("no volume", expected="a volume", remedy="mount the disk")
        return self._array

    def __reduce__(self) -> tuple[object, ...]:
        return (_gone, (self.shape,))


def _gone(shape: tuple[int, int, int]) -> _Lost:
    lost = _Lost(np.zeros((0, 0, 0), dtype=np.float32))
    lost.shape = shape
    return lost


def _weights(picker: Picker) -> torch.Tensor:
    network = build_network(picker.metadata["architecture"])
    picker.copy_weights(network)
    return torch.cat([value.detach().flatten() for value in network.parameters()])


@pytest.mark.slow
def test_two_devices_learn_what_one_learns(tmp_path: Path) -> None:
    examples, held = Epochs([two_balls(0)], SAMPLING), Epochs([two_balls(1)], SAMPLING)
    options = TrainOptions(
        architecture=named_architecture("small") | {"depths": [1, 1, 1, 1]},
        steps=4,
        batch_size=5,
        warm_up=1,
        learning_rate=1e-4,
        sampling=SAMPLING,
        checkpoint_every=2,
        validation_crops=3,
    )
    told: dict[int, list[Step]] = {1: [], 2: []}
    pickers = {
        devices: learn(
            examples,
            validation=held,
            options=options,
            folder=tmp_path / str(devices),
            devices=devices,
            listeners=[OnStep(steps.append)],
        )
        for devices, steps in told.items()
    }
    for name in ("loss", "weighted", "gradient", "norm"):
        one, two = ([getattr(step, name) for step in told[devices]] for devices in (1, 2))
        np.testing.assert_allclose(one, two, rtol=1e-4)
    assert told[1][-1].validation == pytest.approx(told[2][-1].validation, rel=1e-4)
    # AdamW's first steps go by the sign of a gradient, so that one near 0 may go either way.
    apart = (_weights(pickers[1]) - _weights(pickers[2])).abs()
    assert float((apart > 2e-5).float().mean()) < 0.01
    # Two devices go on where one stopped, and rank 0 alone has written.
    assert sorted(path.name for path in (tmp_path / "2").iterdir()) == sorted(
        path.name for path in (tmp_path / "1").iterdir()
    )


@pytest.mark.slow
def test_what_another_device_fails_of_is_raised_here(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((40, 48, 80), dtype=np.float32)
    examples = Epochs([Example(_Lost(array), np.array([[20.0, 20.0, 20.0]]))], SAMPLING)
    options = TrainOptions(
        architecture=named_architecture("small") | {"depths": [1, 1, 1, 1]}, steps=2, sampling=SAMPLING
    )
    with pytest.raises(SourceError, match="no volume"):
        learn(examples, options=options, folder=tmp_path, devices=2)
    assert not (tmp_path / "state.pt").exists()


class _Unreadable:
    """What no new process can read, as a script without a guard."""

    def __call__(self, ranks: Ranks) -> None:
        raise AssertionError

    def __reduce__(self) -> tuple[object, ...]:
        return (_fail, ())


def _fail() -> None:
    raise RuntimeError("cannot be read here")


@pytest.mark.slow
def test_a_process_that_ends_at_its_start_is_not_waited_for() -> None:
    with pytest.raises(PlanError, match="ended at its start"), start(2, _Unreadable()):
        raise AssertionError


def test_one_device_needs_no_company() -> None:
    with start(1, partial(_unasked)) as ranks:
        assert (ranks.rank, ranks.count) == (0, 1)
        values = torch.tensor([1.0, 2.0])
        assert torch.equal(ranks.sum(values), values)
        network = torch.nn.Linear(1, 1)
        assert ranks.join(network) is network
        ranks.backward(network(torch.ones(1, 1)).sum())
        assert network.weight.grad is not None
        ranks.wait()


def _unasked(ranks: Ranks) -> None:
    raise AssertionError(ranks)


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match="0 devices"):
        check_devices(0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(PlanError, match="from 1 to 2, the GPUs here"):
        check_devices(3)
    check_devices(1)
    monkeypatch.setitem(sys.modules, "lightning.fabric", None)
    with pytest.raises(PlanError, match=r"tomocpt-stream\[train\]"):
        check_devices(2)
    assert Alone(torch.device("cpu")).device.type == "cpu"
