from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner, Result

from tests.blobs import NamedBlobPicker
from tomocpt_stream import curriculum, picker, train_command, training
from tomocpt_stream.__main__ import main
from tomocpt_stream.augmentation import Augmentation
from tomocpt_stream.loop import Step
from tomocpt_stream.network import named_architecture

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the functions behind the commands were asked for; they train nothing."""
    asked: dict[str, Any] = {}

    class Trained:
        def save(self, path: Path) -> None:
            path.write_text("weights")

    def stand_in(*first: Any, **settings: Any) -> Trained:
        asked.update(settings, first=first)
        return Trained()

    monkeypatch.setattr(curriculum, "train_base", stand_in)
    monkeypatch.setattr(training, "train", stand_in)
    monkeypatch.setattr(training, "fine_tune", stand_in)
    return asked


def _run(words: str, code: int = 0) -> Result:
    done = CliRunner().invoke(main, words.split())
    assert done.exit_code == code, done.output
    return done


def _table() -> None:
    Path("mine.csv").write_text("tomogram,picks,diameter\nTS_1.mrc,TS_1.star,100\nTS_2.mrc,TS_2.star,100\n")


OUT = "--folder lessons --output mine.safetensors"


def test_train_follows_the_recipe(seen: dict[str, Any]) -> None:
    _run(f"train {OUT} --steps 7 --tomograms 5 --validation 2 --seed 3 --workers 1")
    recipe = seen["recipe"]
    assert (recipe.tomograms, recipe.validation, recipe.seed) == (5, 2, 3)
    assert recipe.options == curriculum.base_options(steps=7, seed=3)
    assert (seen["first"], seen["workers"], seen["devices"]) == ((Path("lessons"),), 1, 1)
    assert Path("mine.safetensors").read_text() == "weights"


def test_train_simulates_density_maps_and_goes_on_from_a_picker(seen: dict[str, Any]) -> None:
    for folder, names in {"maps": ("b.mrc", "a.mrc", "notes.txt"), "held": ("c.mrc",), "none": ()}.items():
        Path(folder).mkdir()
        for name in names:
            Path(folder, name).touch()
    _run(f"train {OUT} --maps maps --held-maps held --picker base")
    assert (seen["recipe"].maps, seen["recipe"].held_maps) == (("maps/a.mrc", "maps/b.mrc"), ("held/c.mrc",))
    assert seen["start"].address == "base"
    assert "none without a map" in _run(f"train {OUT} --maps none --held-maps held", code=1).stderr
    assert "expected maps of different proteins" in _run(f"train {OUT} --maps maps", code=1).stderr


def test_train_takes_a_table(seen: dict[str, Any]) -> None:
    _table()
    shown = _run(f"train --table mine.csv {OUT} --architecture paper --augment none --no-calibrate").output
    assert "picker, trained on 2 tomograms -> mine.safetensors" in shown
    assert [one.tomogram for one in seen["first"][0]] == ["TS_1.mrc", "TS_2.mrc"]
    assert (seen["architecture"], seen["calibrate"], seen["augmentation"]) == ("paper", False, Augmentation())
    # The paper's, where nothing else was asked for.
    assert (seen["epochs"], seen["learning_rate"], seen["batch_size"]) == (150, 4e-4, 10)
    assert (seen["schedule"], seen["patience"], seen["stop_after"]) == ("plateau", 6, 36)
    assert (seen["weight_decay"], seen["average"], seen["precision"]) == (1e-10, 0.0, "float32")


@pytest.mark.parametrize("command", ["finetune", "train"])
def test_tomograms_of_the_portal_join_those_of_a_table(
    seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    asked: list[Any] = []

    def found(settings: dict[str, Any], output: Path, *, particle_radius: float) -> list[Any]:
        portal, *_ = (settings.pop(name) for name in ("portal", "truth", "refresh", "offline"))
        asked.append((portal, output, particle_radius))
        return ["from the portal"] * len(portal)

    monkeypatch.setattr(train_command, "portal_examples", found)
    monkeypatch.setattr(picker, "load_picker", lambda *_, **__: NamedBlobPicker(particle_radius=4.0))
    _table()
    table = "mine.csv" if command == "finetune" else "--table mine.csv --particle-radius 8"
    _run(f"{command} {table} {OUT} --portal dataset=10003")
    assert len(seen["first"][0]) == 3
    assert seen["first"][0][-1] == "from the portal"
    assert asked == [(("dataset=10003",), Path("mine.safetensors"), 4.0 if command == "finetune" else 8.0)]
    _run(f"{command} {OUT} --portal dataset=10003")
    assert seen["first"][0] == ["from the portal"]
    assert "portal" not in seen


@pytest.mark.parametrize("command", ["finetune mine.csv", "train --table mine.csv"])
def test_nothing_is_kept_aside_where_asked(seen: dict[str, Any], command: str) -> None:
    _table()
    for word, kept in {"": True, "--no-validate": False, "--validate": True}.items():
        _run(f"{command} {OUT} {word}")
        assert seen["validation"] is kept
        assert "validate" not in seen


def test_fine_tuning_without_tomograms_is_refused(seen: dict[str, Any]) -> None:
    assert "Give TABLE.csv or --portal" in _run(f"finetune {OUT}", code=2).stderr
    assert not seen


def test_fine_tuning_passes_its_options_on(seen: dict[str, Any]) -> None:
    _table()
    words = "--precision bfloat16 --average 0.99 --augment full --devices 2 --schedule plateau --stop-after 5"
    _run(f"finetune mine.csv {OUT} {words} --partial")
    assert all(one.partial for one in seen["first"][0])
    assert "partial" not in seen
    assert (seen["precision"], seen["average"], seen["devices"]) == ("bfloat16", 0.99, 2)
    assert (seen["schedule"], seen["stop_after"], seen["calibrate"]) == ("plateau", 5, True)
    assert min(seen["augmentation"].noise, seen["augmentation"].tilt) > 0
    assert (seen["epochs"], seen["learning_rate"], seen["picker"]) == (20, 5e-5, "base")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--table mine.csv --steps 7 --workers 2", "--steps, --workers with --table or --portal"),
        ("--epochs 7 --label binary", "--epochs, --label without --table or --portal"),
        ("--no-calibrate", "--calibrate without --table or --portal"),
        ("--no-validate", "--validate without --table or --portal"),
        ("--table mine.csv --validation 3", "--validation with --table or --portal"),
    ],
)
def test_options_that_would_decide_nothing_are_refused(
    seen: dict[str, Any], words: str, message: str
) -> None:
    _table()
    assert message in _run(f"train {OUT} {words}", code=1).stderr
    assert not seen


def test_outputs_of_another_kind_or_in_the_way_are_refused(seen: dict[str, Any]) -> None:
    _table()
    for words in ("train --table mine.csv", "train", "finetune mine.csv"):
        shown = _run(f"{words} --folder lessons --output mine.pt", code=1).stderr
        assert "ends in .safetensors" in shown
        shown = _run(f"{words} --folder lessons --output ./lessons/run/best.safetensors", code=1).stderr
        assert "among the checkpoints" in shown
        shown = _run(f"{words} --folder lessons --output mine.csv/a/new.safetensors", code=1).stderr
        assert "where nothing can be written" in shown
    Path("own.safetensors").touch()
    words = "finetune mine.csv --folder lessons --output own.safetensors --picker own.safetensors"
    assert "own.safetensors" in _run(words, code=1).stderr
    Path("base").mkdir()
    _run("train --folder lessons --output base/mine.safetensors --picker base")  # which is not that folder
    seen.clear()
    Path("maps").mkdir()
    Path("maps/one.safetensors").touch()
    for words in ("--picker own.safetensors --output own", "--maps maps --output maps/one"):
        shown = _run(f"train --folder lessons {words}.safetensors", code=1).stderr
        assert words.rpartition(" ")[2] in shown
        assert "is an input" in shown
    assert not seen


@pytest.mark.parametrize("words", ["finetune mine.csv", "train --table mine.csv"])
def test_changes_of_crops_are_chosen_one_by_one(seen: dict[str, Any], words: str) -> None:
    _table()
    _run(f"{words} {OUT} --augment none,wedge=45,gamma=0.1")
    assert seen["augmentation"] == Augmentation(wedge=45, gamma=0.1)
    _run(f"{words} {OUT} --augment full,noise=0")
    assert (seen["augmentation"].turns, seen["augmentation"].noise, seen["augmentation"].tilt) == (
        True,
        0,
        15,
    )
    seen.clear()
    for wrong in ("some", "full,", "full,tilt", "full,tilt=x", "turns,tilt=20", "turns,sharp=1"):
        assert "--augment" in _run(f"{words} {OUT} --augment {wrong}", code=2).stderr
    assert not seen


def test_train_simulates_for_another_network(seen: dict[str, Any]) -> None:
    _run(f"train {OUT} --architecture paper --batch-size 8")
    options = seen["recipe"].options
    assert (options.architecture, options.batch_size) == (named_architecture("paper"), 8)


@pytest.mark.parametrize("words", ["finetune mine.csv", "train --table mine.csv", "train"])
def test_a_run_ends_when_its_minutes_are_over(
    seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    _table()
    told: list[int] = []

    def steps(*_: Any, **asked: Any) -> None:
        tell = asked["on_step"] if "on_step" in asked else asked["listeners"][-1].step
        for number in range(1, 5):
            told.append(number)
            tell(Step(number, 4, 1, 0.5, 0.5, 0.0, 1.0, 1e-3, 1.0, 0.0, 0.5 if number == 2 else None))

    for place, name in ((curriculum, "train_base"), (training, "train"), (training, "fine_tune")):
        monkeypatch.setattr(place, name, steps)
    now: Iterator[float] = iter([0.0, 31.0])
    monkeypatch.setattr(train_command, "monotonic", lambda: next(now))
    shown = _run(f"{words} {OUT} --minutes 0.5", code=75)
    assert "0.5 minutes are over; the same command goes on" in shown.output
    assert told == [1]
    told.clear()
    now = iter([0.0, 59.0, 61.0])  # asked for at the beginning and after each step
    _run(f"{words} {OUT} --minutes 1", code=75)
    assert told == [1, 2]
    assert not Path("mine.safetensors").exists()


def test_a_calibration_is_not_ended_in_between(seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps nothing of its parts, so that one that takes longer would never end."""
    _table()
    told: list[str] = []

    def stages(*_: Any, progress: Any, **__: Any) -> Any:
        for stage in ("calibrate", "fill", "ingest", "calibrate"):
            told.append(stage)
            progress(stage, 1, 2)

    monkeypatch.setattr(training, "fine_tune", stages)
    now = iter([0.0, 61.0])
    monkeypatch.setattr(train_command, "monotonic", lambda: next(now))
    _run(f"finetune mine.csv {OUT} --minutes 1", code=75)
    assert told == ["calibrate", "fill", "ingest"]
