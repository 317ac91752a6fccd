from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from tomocpt_stream.errors import PlanError
from tomocpt_stream.train_options import Pace, TrainOptions

OPTIONS = TrainOptions(steps=100, warm_up=10, learning_rate=1.0)


def test_learning_rate_rises_then_falls() -> None:
    rates = [Pace().learning_rate(OPTIONS, step) for step in range(100)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[10] == 1.0
    assert rates[-1] < 0.012
    assert Pace().learning_rate(replace(OPTIONS, schedule="constant"), 99) == 1.0


def test_the_rate_is_halved_after_six_looks_without_a_lower_loss() -> None:
    options = replace(OPTIONS, schedule="plateau", patience=6, stop_after=36)
    pace = Pace()
    assert pace.look(1.0, options)
    factors = []
    for _ in range(35):
        assert not pace.look(1.0, options)  # as low as before is not lower
        factors.append(pace.factor)
    assert factors == [1.0] * 5 + [0.5] * 6 + [0.25] * 6 + [0.125] * 6 + [0.0625] * 6 + [1 / 32] * 6
    assert pace.learning_rate(options, 50) == 1 / 32
    assert not pace.over(options)
    assert not pace.look(2.0, options)
    assert pace.over(options)
    # A lower one starts the count again and leaves the rate.
    assert pace.look(0.9, options)
    assert (pace.since_best, pace.factor, pace.over(options)) == (0, 1 / 64, False)


def test_no_other_schedule_follows_the_looks() -> None:
    pace = Pace()
    pace.look(1.0, OPTIONS)
    for _ in range(100):
        pace.look(2.0, OPTIONS)
    assert pace.factor == 1.0
    assert not pace.over(OPTIONS)
    assert not pace.look(float("nan"), OPTIONS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("average", 1.0),
        ("learning_rate", float("nan")),
        ("weight_decay", -1.0),
        ("patience", 0),
        ("stop_after", -1),
        ("precision", "float16"),
        ("schedule", "linear"),
        ("seed", 2**32),
    ],
)
def test_options_that_no_run_can_have_are_refused(name: str, value: object) -> None:
    changed: dict[str, object] = {name: value}
    with pytest.raises(PlanError, match=f"{name} {value}"):
        TrainOptions(**changed)  # type: ignore[arg-type]
