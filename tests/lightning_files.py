"""Files of the structure of tomoCPT's checkpoints, as Lightning writes them, without either program.

Their classes are made here under the names that the program gave them, and are gone again once the
file is written.
"""

from __future__ import annotations

import enum
import sys
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tomocpt_stream.network import build_network, named_architecture

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# The published networks have 36 features, windows of 7 and two blocks a stage.
TINY = named_architecture("paper") | {"feature_size": 12, "window": 4, "depths": [1, 1, 1, 1]}
_CLASSES = {
    "tomocpt.mainConfig": ["MainConfig"],
    "tomocpt.defaultConfigs.prepdata_config": ["PrepdataConfig"],
    "tomocpt.defaultConfigs.train_config": ["TrainConfig"],
    "tomocpt.defaultConfigs.infer_config": ["InferConfig"],
}


def network(architecture: Mapping[str, Any] = TINY, seed: int = 0) -> nn.Module:
    """Return a network with weights of a seed and no entry that is 0 or 1 everywhere."""
    torch.manual_seed(seed)
    built = build_network(architecture).eval()
    with torch.no_grad():
        for value in built.parameters():
            value.add_(0.05 * torch.randn_like(value))
    return built


def state_of(network: nn.Module) -> OrderedDict[str, torch.Tensor]:
    """Return the state_dict of a Lightning module that calls its network `model`."""
    state: OrderedDict[str, torch.Tensor] = OrderedDict()
    for key, value in network.state_dict().items():
        state[f"model.{key}"] = value.clone()
    return state


def write_checkpoint(
    path: Path,
    state: Mapping[str, torch.Tensor],
    *,
    era: str = "refactor",
    target: float | None = 20,
    chunk: int | None = 64,
    mode: str = "picking",
    **top: Any,
) -> Path:
    """Write a checkpoint: era "refactor" or "paper" has the settings of that time, "early" has none."""
    with _their_classes() as classes:
        modes = classes["TrainingModes"]
        train: dict[str, Any] = {"mode": modes(mode), "model_dir": PurePosixPath("/models")}
        infer: dict[str, Any] = {"confidence_threshold": 0.3}
        if chunk is not None:
            train["CHUNK_SIZE"] = chunk
        if era == "refactor":
            train["n_cpus_for_preprocessing"] = 8
        if era == "paper":
            train["n_cpus_for_train"] = 8
            infer["oversubscribe_factor"] = 1
        prepared: dict[str, Any] = {"particle_length_ang": "250,240"}
        if target is not None:
            prepared["desired_particle_pixel_size"] = target
        config = classes["MainConfig"]()
        config.prepData = _filled(classes["PrepdataConfig"], prepared)
        config.train = _filled(classes["TrainConfig"], train)
        config.infer = _filled(classes["InferConfig"], infer)
        settings = {"constants_dict": {"LOGGER": "x"}, "config": config, "train_continue": None}
        optimiser = torch.optim.RAdam([nn.Parameter(torch.zeros(3))], lr=4e-4)
        found = {
            "epoch": 31,
            "global_step": 4032,
            "pytorch-lightning_version": "2.4.0",
            "state_dict": state,
            "loops": {"fit_loop": {"state_dict": {}}},
            "callbacks": {"EarlyStopping{'monitor': 'val_loss'}": {"best_score": torch.tensor(0.1)}},
            "optimizer_states": [optimiser.state_dict()],
            "lr_schedulers": [{"factor": 0.5, "patience": 9, "best": float("inf")}],
            "hparams_name": None,
            "hyper_parameters": {} if era == "early" else settings,
        }
        torch.save(found | top, path)
    return path


def _filled(kind: Any, fields: Mapping[str, Any]) -> Any:
    made = kind()
    made.__dict__.update(fields)
    return made


@contextmanager
def _their_classes() -> Iterator[dict[str, Any]]:
    """Make the program's classes importable for as long as a file is written."""
    names = ["tomocpt", "tomocpt.defaultConfigs", *_CLASSES]
    assert not any(name in sys.modules for name in names)
    modules = {name: ModuleType(name) for name in names}
    classes: dict[str, Any] = {}
    for module, members in _CLASSES.items():
        for member in members:
            classes[member] = type(member, (), {"__module__": module})
            setattr(modules[module], member, classes[member])
    TrainingModes = enum.Enum("TrainingModes", {"PICKING": "picking", "SELF": "selfSupervised"})
    TrainingModes.__module__ = "tomocpt.defaultConfigs.train_config"
    modules[TrainingModes.__module__].TrainingModes = TrainingModes  # type: ignore[attr-defined]
    sys.modules.update(modules)
    try:
        yield classes | {"TrainingModes": TrainingModes}
    finally:
        for name in names:
            del sys.modules[name]
