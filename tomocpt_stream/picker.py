"""A picker: a trained network with everything that is needed to feed it, in one safetensors file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import nn

from tomocpt_stream.blocks import Window
from tomocpt_stream.errors import CheckpointError, PlanError
from tomocpt_stream.frame import RULES
from tomocpt_stream.network import build_network, bytes_per_window, place, shift_answers
from tomocpt_stream.whole import settle, whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tomocpt_stream.frame import Rule

Float32 = npt.NDArray[np.float32]
DType = Literal["float32", "bfloat16"]

FORMAT_VERSION = 1
# The one key of the safetensors metadata; its value is JSON, so that nothing in a file is executed.
_KEY = "tomocpt_stream.picker"
# Threads change the last bit of a score, so their number is the same everywhere unless somebody says.
_THREADS = 2
_NORMALISATION = {"rule": "percentiles", "low": 5, "middle": 50, "high": 95, "clip": 3.0}
_REQUIRED = ("architecture", "particle_radius", "window", "halo", "normalisation", "contrast", "label")


class Picker:
    """Scores windows of normalised intensities: near 1 at the centre of a particle, else near 0.

    `metadata` is plain data: architecture, particle_radius (voxels), window and halo (voxels zyx),
    normalisation, contrast ("dark" or "bright": how protein looked in training), label (kind and
    widths), provenance and, where it is not "bspline", resampling. `dtype` and `threads` are its
    numerics: on a CPU every batch is scored with `threads` threads. `address` is where it was loaded
    from, None for one that was just trained.
    """

    def __init__(
        self,
        network: nn.Module,
        metadata: Mapping[str, Any],
        *,
        device: str = "cpu",
        address: str | None = None,
    ) -> None:
        self.metadata: dict[str, Any] = json.loads(json.dumps(dict(metadata)))
        _require(self.metadata, address or "a picker")
        self.address = address
        self.device = torch.device(device)
        self.placement = "auto"  # the device that was asked for; a copy in another process finds its own
        self.storage_options: dict[str, Any] = {}  # for its address; they go along when it is pickled
        self.threads = _THREADS
        self.dtype: DType = "float32"
        self.fingerprint = _fingerprint(network, self.metadata)
        self._network = place(network, self.device).eval()

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by address, or with the weights where there is none; "auto" is the reader's own device."""
        state: dict[str, Any] = {"dtype": self.dtype, "threads": self.threads}
        state |= {"fingerprint": self.fingerprint, "placement": self.placement}
        state["storage_options"] = self.storage_options
        if self.address is None:
            return (_revive, (self._serialised(), None, state))
        local = self.address != "base" and "://" not in self.address
        return (_revive, (None, str(Path(self.address).absolute()) if local else self.address, state))

    @property
    def window(self) -> Window:
        """What the network sees at once."""
        shape, halo = self.metadata["window"], self.metadata["halo"]
        return Window((shape[0], shape[1], shape[2]), (halo[0], halo[1], halo[2]))

    @property
    def particle_radius(self) -> float:
        """Half of the particle's longest axis in working voxels."""
        return float(self.metadata["particle_radius"])

    @property
    def contrast(self) -> str:
        """How protein looked in training: "dark" or "bright"."""
        return str(self.metadata["contrast"])

    @property
    def rule(self) -> Rule:
        """How the working grid was sampled in training; see `ingest`."""
        return "tomocpt" if self.metadata.get("resampling") == "tomocpt" else "bspline"

    @property
    def numerics(self) -> dict[str, Any]:
        """What the last bits of a score depend on, as plain data."""
        return {"dtype": self.dtype, "threads": self.threads}

    @property
    def bytes_per_window(self) -> int:
        """Bytes of activations that one window needs at the peak of an inference."""
        return bytes_per_window(self.metadata["architecture"], self.window.shape)

    def score(self, batch: Float32) -> Float32:
        """Return the scores, in [0, 1], of a batch (n, z, y, x) of normalised intensities.

        A window's score depends on the window and the size of the batch, not on its slot or neighbours.
        Raises PlanError where the batch is not of float32 windows.
        """
        if batch.ndim != 4 or batch.shape[1:] != self.window.shape or batch.dtype != np.float32:
            raise PlanError(
                f"a batch of shape {batch.shape} and type {batch.dtype}",
                expected=f"(n, z, y, x) windows of {self.window.shape} voxels, float32",
                remedy="cut the volume by the windows of a plan made for this picker",
            )
        # torch shares memory with the array and warns of one that is read-only.
        array = batch if batch.flags.writeable and batch.flags.c_contiguous else batch.copy()
        return self.score_device(torch.from_numpy(array).to(self.device)).cpu().numpy()

    def score_device(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the scores of a float32 batch (n, z, y, x) that is already on the picker's device."""
        channels = batch.unsqueeze(1).contiguous(memory_format=torch.channels_last_3d)
        half = self.dtype == "bfloat16"
        with torch.inference_mode(), _numerics(self.device, self.threads):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                logits = self._network(channels)
            scores: torch.Tensor = torch.sigmoid(logits.float()).squeeze(1)
            return scores.contiguous()

    def copy_weights(self, network: nn.Module) -> None:
        """Copy the weights into a network of the same architecture; CheckpointError where it differs."""
        fill_network(network, dict(self._network.named_parameters()), self.address or "the picker")

    def shifted(self, logits: float, **provenance: Any) -> Picker:
        """Return a picker whose logits are higher by a constant; `provenance` is added to its own."""
        network = build_network(self.metadata["architecture"])
        self.copy_weights(network)
        shift_answers(network, logits)
        kept = self.metadata["provenance"] | provenance
        return Picker(network, self.metadata | {"provenance": kept}, device=str(self.device))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the picker to one safetensors file; the file appears whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as temporary:
            # save_file would leave a file that only its owner can read, whatever the umask.
            temporary.write_bytes(self._serialised())
            settle(temporary)

    def _serialised(self) -> bytes:
        """Return the bytes of the picker's file."""
        weights = {
            name: value.detach().to("cpu", torch.float32).contiguous()
            for name, value in self._network.named_parameters()
        }
        text = json.dumps({"format_version": FORMAT_VERSION} | self.metadata, sort_keys=True)
        return serialise(weights, metadata={_KEY: text})


def load_picker(
    source: str | os.PathLike[str] = "base",
    *,
    device: str = "auto",
    storage_options: Mapping[str, Any] | None = None,
) -> Picker:
    """Return the picker "base", which ships in the package, or the one in a safetensors file.

    `source` may be an address (s3://, gs://, az://, https://, file://), with `storage_options` as those of
    `remote.connect`; its file is fetched whole. `device`: "auto" (CUDA where there is a device, else the
    CPU) or a torch device such as "cuda:1".
    Raises CheckpointError where the file is missing, foreign, damaged or of a newer format.
    """
    from tomocpt_stream.receipts import local_path
    from tomocpt_stream.remote import canonical, is_remote

    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    address = os.fspath(source)
    if address == "base":
        with as_file(files("tomocpt_stream") / "weights" / "base.safetensors") as path:
            picker = _load(path, address, chosen)
    elif is_remote(address):
        picker = _fetch(canonical(address), chosen, storage_options)
        picker.storage_options = dict(storage_options or {})
    else:
        address = local_path(address)
        picker = _load(Path(address), address, chosen)
    picker.placement = device
    return picker


def _fetch(address: str, device: str, storage_options: Mapping[str, Any] | None) -> Picker:
    from tomocpt_stream.receipts import get_object

    data = get_object(address, storage_options, CheckpointError)
    if data is None:
        raise CheckpointError(
            f"no object at {address}",
            expected="a picker (.safetensors)",
            remedy="check the address, or use 'base'",
        )
    with tempfile.TemporaryDirectory(prefix="tomocpt-stream-") as folder:
        path = Path(folder, "picker.safetensors")
        path.write_bytes(data)
        return _load(path, address, device)


def _revive(weights: bytes | None, address: str | None, state: dict[str, Any]) -> Picker:
    """Return a picker that was pickled, on the device of this process; its weights must be the same."""
    if weights is None:
        picker = load_picker(
            address or "base", device=state["placement"], storage_options=state["storage_options"]
        )
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "picker.safetensors"
            path.write_bytes(weights)
            picker = load_picker(path, device=state["placement"])
        picker.address = None
    if picker.fingerprint != state["fingerprint"]:
        raise CheckpointError(
            f"the picker {address or 'that was sent'} has the fingerprint {picker.fingerprint[:12]} here",
            expected=f"{state['fingerprint'][:12]}, as where it was loaded first",
            remedy="give every machine the same file and the same version of the package",
        )
    picker.dtype, picker.threads = state["dtype"], state["threads"]
    return picker


def picker_metadata(
    architecture: Mapping[str, Any], *, window: Window, particle_radius: float = 10.0, **fields: Any
) -> dict[str, Any]:
    """Return the metadata of a picker; `fields` are those that are not the usual."""
    return {
        "architecture": dict(architecture),
        "particle_radius": particle_radius,
        "window": list(window.shape),
        "halo": list(window.halo),
        "normalisation": dict(_NORMALISATION),
        "contrast": "dark",
        "label": {"kind": "gaussian", "widths": [0.95, 0.5]},
        "provenance": {},
    } | fields


def _load(path: Path, address: str, device: str) -> Picker:
    text, weights = _read(path, address)
    metadata = _parse(text, address)
    version = metadata.pop("format_version", None)
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{address} of format version {version}",
            expected=f"format version {FORMAT_VERSION} or older",
            remedy="use a newer version of the package, or another picker",
        )
    _require(metadata, address)
    network = build_network(metadata["architecture"])
    fill_network(network, weights, address)
    return Picker(network, metadata, device=device, address=address)


def _read(path: Path, address: str) -> tuple[str, dict[str, torch.Tensor]]:
    """Return the metadata text and the tensors of a file."""
    if not path.is_file():
        raise CheckpointError(
            f"no file at {address}",
            expected="a picker (.safetensors)",
            remedy="check the path, or use 'base'",
        )
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{address} cannot be read ({error})",
            expected="a whole safetensors file",
            remedy="take the file from its source again; it is damaged or of another kind",
        ) from error
    if text is None:
        raise CheckpointError(
            f"{address} has no picker's metadata",
            expected=f"the metadata key {_KEY!r}",
            remedy="take a file that Picker.save wrote; weights alone do not say how to feed the network",
        )
    return text, weights


def _parse(text: str, address: str) -> dict[str, Any]:
    try:
        metadata = json.loads(text)
    except ValueError as error:
        raise _unusable(address, f"metadata that are no JSON ({error})") from error
    if not isinstance(metadata, dict):
        raise _unusable(address, "metadata that are no table")
    return metadata


def _require(metadata: Mapping[str, Any], address: str) -> None:
    """Refuse metadata that do not say how to feed the network."""
    missing = [key for key in _REQUIRED if key not in metadata]
    if missing:
        raise _unusable(address, f"metadata without {missing}")
    if metadata["contrast"] not in ("dark", "bright"):
        raise _unusable(address, f"contrast {metadata['contrast']!r}")
    if metadata["normalisation"] != _NORMALISATION:
        raise _unusable(address, f"normalisation {metadata['normalisation']!r}")
    if metadata.get("resampling", "bspline") not in RULES:
        raise _unusable(address, f"resampling {metadata['resampling']!r}")
    radius = metadata["particle_radius"]
    if not isinstance(radius, int | float) or not math.isfinite(radius) or radius <= 0:
        raise _unusable(address, f"a particle radius of {radius!r} voxels")
    for key in ("window", "halo"):
        if not isinstance(metadata[key], list) or len(metadata[key]) != 3:
            raise _unusable(address, f"a {key} of {metadata[key]!r}")


def _unusable(address: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{address} has {what}",
        expected="the metadata that Picker.save writes",
        remedy="take the file from its source again, or use a newer version of the package",
    )


def fill_network(network: nn.Module, weights: Mapping[str, torch.Tensor], address: str) -> None:
    """Copy the weights into the network; every parameter once, in its own shape, else CheckpointError."""
    wanted = dict(network.named_parameters())
    missing, unknown = sorted(set(wanted) - set(weights)), sorted(set(weights) - set(wanted))
    shapes = sorted(
        f"{name} {tuple(weights[name].shape)} for {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in weights and weights[name].shape != value.shape
    )
    faults = {"missing": missing, "unknown": unknown, "of another shape": shapes}
    faults["not floating"] = sorted(name for name, value in weights.items() if not value.is_floating_point())
    found = "; ".join(
        f"{len(names)} tensors {what} ({_some(names)})" for what, names in faults.items() if names
    )
    if found:
        raise CheckpointError(
            f"{address} has {found}",
            expected="one tensor for each parameter of the architecture in its metadata",
            remedy="take the file from its source again",
        )
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(weights[name])
    broken = sorted(name for name, value in wanted.items() if not bool(torch.isfinite(value).all()))
    if broken:
        raise _unusable(address, f"weights that are not finite ({_some(broken)})")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _fingerprint(network: nn.Module, metadata: Mapping[str, Any]) -> str:
    """Return the sha256 of all that decides a score: weights, architecture, scale, normalisation."""
    plain = {key: metadata[key] for key in (*_REQUIRED, "resampling") if key in metadata}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name, value in sorted(network.named_parameters()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _numerics(device: torch.device, threads: int) -> Iterator[None]:
    """Hold what the last bits depend on: threads on a CPU, no TF32 on a GPU."""
    if device.type == "cuda":
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
