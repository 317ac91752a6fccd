from __future__ import annotations

import bz2
import gzip
import os
import pickle
import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from typing import TYPE_CHECKING, Any

import mrcfile
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageSequence

from tests.mrc_writer import mrc_header, write_mrc
from tomocpt_stream.errors import BrokenSourceError, SourceError
from tomocpt_stream.files import LocalFile
from tomocpt_stream.mrc import MrcFile
from tomocpt_stream.mrc_header import HEADER_BYTES, IMOD_STAMP, parse_header

if TYPE_CHECKING:
    from pathlib import Path

    from tomocpt_stream.frame import Box

ALL: Box = (slice(0, 6), slice(0, 5), slice(0, 4))


def open_mrc(path: Path) -> MrcFile:
    return MrcFile(LocalFile(path))


def ramp(kind: str = "f4", shape: tuple[int, int, int] = (6, 5, 4)) -> npt.NDArray[Any]:
    """Every voxel its own value, over the whole range of the smaller integers."""
    values = np.arange(np.prod(shape)).reshape(shape)
    if kind in ("i1", "i2"):
        values = values - 60
    return values.astype(kind)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["i1", "i2", "f4", "u2", "f2"])
def test_reads_every_mode_in_both_byte_orders(tmp_path: Path, kind: str, order: str) -> None:
    voxels = ramp(kind)
    file = open_mrc(write_mrc(tmp_path / "a.mrc", voxels, order))
    assert file.shape == (6, 5, 4)
    assert file.dtype.kind == voxels.dtype.kind
    assert file.dtype.itemsize == voxels.dtype.itemsize
    found = file.read(ALL)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    assert found.flags.writeable
    assert found.flags.owndata
    np.testing.assert_array_equal(found, voxels.astype(np.float32))
    np.testing.assert_array_equal(
        file.read((slice(1, 4), slice(2, 3), slice(1, 4))), voxels[1:4, 2:3, 1:4].astype(np.float32)
    )
    assert file.remarks() == []
    assert file.facts()["byte_order"] == ("little" if order == "<" else "big")


@pytest.mark.parametrize("kind", ["i1", "i2", "f4", "u2", "f2"])
def test_agrees_with_mrcfile(tmp_path: Path, kind: str) -> None:
    voxels = ramp(kind)
    with mrcfile.new(tmp_path / "a.mrc") as file:
        file.set_data(voxels)
        file.set_volume()
        file.voxel_size = 10.52
    found = open_mrc(tmp_path / "a.mrc")
    np.testing.assert_array_equal(found.read(ALL), voxels.astype(np.float32))
    assert found.header.voxel_sizes == (10.52, 10.52, 10.52)
    assert found.dtype == voxels.dtype


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["i1", "i2", "f4"])
def test_without_a_machine_stamp_the_sizes_tell_the_byte_order(tmp_path: Path, kind: str, order: str) -> None:
    voxels = ramp(kind)
    path = write_mrc(tmp_path / "a.mrc", voxels, order, stamp=b"\x00" * 4, map_id=b"\x00" * 4)
    file = open_mrc(path)
    np.testing.assert_array_equal(file.read(ALL), voxels.astype(np.float32))
    (remark,) = file.remarks()
    assert "no machine stamp" in remark
    assert ("little" if order == "<" else "big") in remark


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_wrong_machine_stamp_gives_way_to_the_sizes(tmp_path: Path, order: str) -> None:
    stamp = b"\x11\x11\x00\x00" if order == "<" else b"DD\x00\x00"
    file = open_mrc(write_mrc(tmp_path / "a.mrc", ramp(), order, stamp=stamp))
    np.testing.assert_array_equal(file.read(ALL), ramp())
    assert "contradicts the sizes" in file.remarks()[0]


@pytest.mark.parametrize("order", ["<", ">"])
def test_where_both_byte_orders_make_sense_the_files_size_decides(order: str) -> None:
    # 256 is 65536 the other way round; mode 0 and an axis order that was never filled in say nothing.
    raw = mrc_header((256, 256, 256), 0, order, stamp=b"\x00" * 4, axes=(0, 0, 0))
    header = parse_header(raw, "a", HEADER_BYTES + 256**3)
    assert header.file_shape == (256, 256, 256)
    assert header.byte_order == order


def test_an_extended_header_is_skipped_and_described(tmp_path: Path) -> None:
    path = write_mrc(
        tmp_path / "a.mrc", ramp(), extended=768, extended_type=b"FEI1", label=b"made for a test"
    )
    file = open_mrc(path)
    np.testing.assert_array_equal(file.read(ALL), ramp())
    facts = file.facts()
    assert facts["extended_header_bytes"] == 768
    assert facts["extended_header_type"] == "FEI1"
    assert facts["labels"] == ["made for a test"]
    assert (facts["stated_minimum"], facts["stated_maximum"], facts["stated_mean"]) == (0, 119, 59.5)
    assert facts["mode"] == 2
    assert facts["stated_voxel_sizes"] == [10, 10, 10]


@pytest.mark.parametrize("axes", list(permutations((1, 2, 3))))
def test_any_axis_order_is_exposed_as_z_y_x(tmp_path: Path, axes: tuple[int, int, int]) -> None:
    truth = ramp()  # z, y, x
    along = {1: 2, 2: 1, 3: 0}  # the axis of `truth` that x, y, z are
    columns, rows, sections = (along[axis] for axis in axes)
    cell = (4 * 2.0, 5 * 3.0, 6 * 5.0)  # Å along x, y, z, whatever lies along the columns
    path = write_mrc(
        tmp_path / "a.mrc", truth.transpose(sections, rows, columns), axes=axes, cell=cell, sampling=(4, 5, 6)
    )
    file = open_mrc(path)
    assert file.shape == truth.shape
    assert file.header.voxel_sizes == (5.0, 3.0, 2.0)
    np.testing.assert_array_equal(file.read(ALL), truth)
    box = (slice(1, 3), slice(2, 5), slice(0, 3))
    np.testing.assert_array_equal(file.read(box), truth[box])
    assert file.read(box).flags.c_contiguous
    assert sorted(file.chunks) == sorted(truth.shape)


def test_a_deposited_map_with_axis_order_3_1_2(shared_data: Path) -> None:
    path = shared_data / "mrc" / "EMD-3001.map"
    file = open_mrc(path)
    with mrcfile.open(path, permissive=True) as peer:
        truth = peer.data.transpose(2, 0, 1)  # sections y, rows x, columns z
        sizes = peer.voxel_size
        np.testing.assert_allclose(file.header.voxel_sizes or (), (sizes.z, sizes.y, sizes.x), rtol=1e-6)
    assert file.shape == (73, 25, 43)
    assert file.header.extended_bytes == 160
    np.testing.assert_array_equal(file.read((slice(5, 70), slice(0, 25), slice(2, 43))), truth[5:70, :, 2:])


@pytest.mark.parametrize("name", ["EMD-3197.map.bz2", "emd_3197.map.gz"])
def test_compressed_maps_equal_the_plain_one(shared_data: Path, name: str) -> None:
    box: Box = (slice(3, 17), slice(0, 20), slice(9, 10))
    plain = open_mrc(shared_data / "mrc" / "EMD-3197.map")
    packed = open_mrc(shared_data / "mrc" / name)
    assert packed.header == plain.header
    np.testing.assert_array_equal(packed.read(box), plain.read(box))


@pytest.mark.parametrize(("pack", "suffix"), [(gzip.compress, ".gz"), (bz2.compress, ".bz2")])
def test_opening_a_compressed_file_unpacks_only_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: Any, suffix: str
) -> None:
    voxels = np.random.default_rng(0).integers(-128, 128, (64, 128, 128)).astype("i1")
    plain = write_mrc(tmp_path / "a.mrc", voxels)
    path = tmp_path / f"a.mrc{suffix}"
    path.write_bytes(pack(plain.read_bytes()))
    monkeypatch.setattr("tomocpt_stream.mrc._unpack", None)
    file = open_mrc(path)
    assert file.shape == voxels.shape
    assert file.dtype == np.int8
    assert file.facts()["kind"].startswith("MRC, ")
    monkeypatch.undo()
    copies = []

    def unpack(*arguments: Any) -> Any:
        copies.append(unpacked(*arguments))
        return copies[-1]

    from tomocpt_stream import mrc

    unpacked = mrc._unpack
    monkeypatch.setattr(mrc, "_unpack", unpack)
    boxes = [(slice(z, z + 8), slice(3, 100), slice(0, 128)) for z in range(0, 64, 8)]
    with ThreadPoolExecutor(4) as threads:
        for box, found in zip(boxes, threads.map(file.read, boxes), strict=True):
            np.testing.assert_array_equal(found, voxels[box])
    assert len(copies) == 1
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.mrc", path.name]
    again = pickle.loads(pickle.dumps(file))
    np.testing.assert_array_equal(again.read(boxes[2]), voxels[boxes[2]])
    assert len(copies) == 2
    del file
    assert [copy.closed for copy in copies] == [True, False]


@pytest.mark.parametrize(("pack", "suffix"), [(gzip.compress, ".gz"), (bz2.compress, ".bz2")])
def test_a_truncated_compressed_file_is_an_error_at_the_read(tmp_path: Path, pack: Any, suffix: str) -> None:
    voxels = np.random.default_rng(0).normal(size=(32, 200, 200)).astype("f4")
    whole = write_mrc(tmp_path / "a.mrc", voxels).read_bytes()
    path = tmp_path / f"b.mrc{suffix}"
    packed = pack(whole)
    path.write_bytes(packed[: len(packed) - len(packed) // 8])
    file = open_mrc(path)
    with pytest.raises(SourceError, match="cannot be unpacked"):
        file.read((slice(0, 1), slice(0, 1), slice(0, 1)))
    path.write_bytes(pack(whole[:-1000]))  # a whole archive of a truncated file
    with pytest.raises(
        SourceError, match=f"truncated: it holds {len(whole) - 1000} bytes; expected {len(whole)}"
    ):
        open_mrc(path).read((slice(0, 1), slice(0, 1), slice(0, 1)))
    path.write_bytes(packed[:40])
    with pytest.raises(SourceError, match=r"cannot be read|holds"):
        open_mrc(path)


def test_a_plain_file_with_a_compressed_name_is_read_as_what_it_is(tmp_path: Path) -> None:
    file = open_mrc(write_mrc(tmp_path / "a.mrc.gz", ramp()))
    np.testing.assert_array_equal(file.read(ALL), ramp())


def test_opening_and_reading_a_huge_file_touches_only_the_box(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (2000, 5000, 5000)
    path = tmp_path / "huge.mrc"
    with path.open("wb") as out:
        out.write(mrc_header(shape, 1))
        out.truncate(HEADER_BYTES + 2 * 2000 * 5000 * 5000)  # 100 GB of a hole
        out.seek(HEADER_BYTES + 2 * ((1500 * 5000 + 4000) * 5000 + 4990))
        out.write(struct.pack("<3h", -3, 7, 1234))
    assert path.stat().st_size == 100_000_001_024
    maps: list[tuple[int, tuple[int, ...]]] = []
    memmap = np.memmap

    def watched(source: Any, dtype: Any, mode: Any, offset: int, shape: tuple[int, ...]) -> Any:
        maps.append((offset, shape))
        return memmap(source, dtype, mode, offset, shape)

    monkeypatch.setattr(np, "memmap", watched)
    tracemalloc.start()
    file = open_mrc(path)
    assert maps == []
    found = file.read((slice(1499, 1502), slice(3998, 4002), slice(4988, 5000)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert found[1, 2].tolist() == [0, 0, -3, 7, 1234] + [0] * 7
    assert np.count_nonzero(found) == 3
    assert maps == [(HEADER_BYTES + 2 * 1499 * 5000 * 5000, (3, 5000, 5000))]
    assert file.chunks == (1, 5000, 5000)


def test_opening_reads_no_more_than_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_mrc(tmp_path / "a.mrc", ramp("u1"), stated=(0, 163, 150), map_id=b"\x00" * 4)
    monkeypatch.setattr(MrcFile, "_map", None)
    file = open_mrc(path)
    assert file.dtype == np.uint8
    assert file.facts()["stated_maximum"] == 163
    assert file.chunks == (6, 5, 4)
    assert len(file.remarks()) == 1
    with pytest.raises(TypeError):
        file.read(ALL)


def test_a_legacy_reconstruction_with_unsigned_bytes(shared_data: Path) -> None:
    file = open_mrc(shared_data / "real" / "tardis" / "rec3D.rec")
    assert not file.header.has_map_id
    assert file.dtype == np.uint8
    assert any("unsigned" in remark and "163" in remark for remark in file.remarks())
    assert any("no machine stamp" in remark for remark in file.remarks())
    with Image.open(shared_data / "real" / "tardis" / "tif3D.tif") as tif:
        truth = np.stack([np.array(page) for page in ImageSequence.Iterator(tif)])
    assert file.shape == truth.shape
    found = file.read((slice(0, truth.shape[0]), slice(0, truth.shape[1]), slice(0, truth.shape[2])))
    np.testing.assert_array_equal(found, truth)


@pytest.mark.parametrize(
    ("words", "signed"),
    [
        ({"imod": (IMOD_STAMP, 1)}, True),
        ({"imod": (IMOD_STAMP, 0)}, False),
        ({"imod": (IMOD_STAMP, 1), "stated": (0, 200, 100)}, True),  # the flag is plain, the range may be old
        ({"imod": (IMOD_STAMP, 0), "map_id": b"\x00" * 4}, False),
        ({"imod": (1, 0)}, True),
        ({"stated": (-20, 100, 0)}, True),
        ({"stated": (0, 100, 50)}, True),
        ({"stated": (0, 128, 50)}, False),
        ({"stated": (0, 255, 300)}, True),  # a mean outside the range: nothing is stated
        ({"stated": (0, 3000, 200)}, True),  # the range of another file
        ({"stated": (0, -1, -2)}, True),  # how MRC2014 says "not determined"
        ({"stated": (float("nan"),) * 3}, True),
        ({"stated": (0, 255, 120), "map_id": b"\x00" * 4}, False),
        ({"stated": (-128, 127, 0), "map_id": b"\x00" * 4}, True),
    ],
)
def test_whether_bytes_are_signed(tmp_path: Path, words: dict[str, Any], signed: bool) -> None:
    file = open_mrc(write_mrc(tmp_path / "a.mrc", ramp("i1"), **words))
    assert file.dtype == (np.int8 if signed else np.uint8)
    assert file.read(ALL).min() == (-60 if signed else 0)


@pytest.mark.parametrize(("kind", "centre"), [("i1", 0), ("i1", 40), ("u1", 128), ("u1", 90), ("u1", 200)])
def test_old_bytes_without_any_statement_are_read_with_the_smaller_spread(
    tmp_path: Path, kind: str, centre: int
) -> None:
    info = np.iinfo(kind)
    values = np.random.default_rng(1).normal(centre, 20, (6, 40, 50)).clip(info.min, info.max).astype(kind)
    path = write_mrc(tmp_path / "a.rec", values, stated=(0, 0, 0), map_id=b"\x00" * 4)
    file = open_mrc(path)
    assert file.dtype == kind
    assert any("smaller spread" in remark for remark in file.remarks())
    found = file.read((slice(0, 6), slice(0, 40), slice(0, 50)))
    np.testing.assert_array_equal(found, values.astype(np.float32))


def test_remarks_on_trailing_bytes_and_stacks_of_images(tmp_path: Path) -> None:
    path = write_mrc(tmp_path / "a.mrc", ramp(), space_group=0, sampling=(4, 5, 1))
    with path.open("ab") as out:
        out.write(b"xyz")
    file = open_mrc(path)
    np.testing.assert_array_equal(file.read(ALL), ramp())
    trailing, stack = file.remarks()
    assert trailing == "3 bytes after the last voxel are ignored"
    assert "tilt series" in stack


def test_a_truncated_file_says_what_it_holds_and_should(tmp_path: Path) -> None:
    path = write_mrc(tmp_path / "a.mrc", ramp())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        SourceError, match="truncated: it holds 1503 bytes; expected 1504 bytes: 4 x 5 x 6 voxels"
    ):
        open_mrc(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SourceError, match="holds 1000 bytes; expected an MRC header"):
        open_mrc(path)
    path.write_bytes(b"")
    with pytest.raises(SourceError, match="holds 0 bytes"):
        open_mrc(path)


def test_a_file_that_shrinks_or_goes_after_opening_is_an_error(tmp_path: Path) -> None:
    path = write_mrc(tmp_path / "a.mrc", ramp())
    file = open_mrc(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BrokenSourceError, match="cut short meanwhile"):
        file.read(ALL)
    path.unlink()
    with pytest.raises(BrokenSourceError, match="sections 0 to 6"):
        file.read(ALL)


def test_a_disk_that_fails_may_do_better_at_the_next_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = open_mrc(write_mrc(tmp_path / "a.mrc", ramp()))

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(np, "memmap", fail)
    with pytest.raises(SourceError, match="Input/output error") as caught:
        file.read(ALL)
    assert not caught.value.final


@pytest.mark.parametrize(
    ("mode", "says"), [(3, "complex 16-bit"), (4, "complex 32-bit"), (16, "RGB"), (101, "4-bit")]
)
def test_modes_that_are_no_tomogram(tmp_path: Path, mode: int, says: str) -> None:
    path = tmp_path / "a.mrc"
    path.write_bytes(mrc_header((6, 5, 4), mode) + bytes(4 * 120))
    with pytest.raises(SourceError, match=f"mode {mode} .{says}"):
        open_mrc(path)


@pytest.mark.parametrize("shape", [(1, 5, 4), (6, 1, 4), (6, 5, 1)])
def test_a_single_image_is_refused(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    with pytest.raises(SourceError, match="single image"):
        open_mrc(write_mrc(tmp_path / "a.mrc", ramp(shape=shape)))


def test_a_micrograph_of_another_program_is_refused(shared_data: Path) -> None:
    with pytest.raises(SourceError, match="single image"):
        open_mrc(shared_data / "mrc" / "float16.mrc")


def test_a_stack_of_volumes_is_refused(tmp_path: Path) -> None:
    with mrcfile.new(tmp_path / "a.mrc") as file:
        file.set_data(np.zeros((2, 3, 5, 4), "f4"))
    with pytest.raises(SourceError, match=r"stack of volumes .space group 401, 6 sections in volumes of 3"):
        open_mrc(tmp_path / "a.mrc")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"mode": 37}, "mode 37"),
        ({"shape": (0, 5, 4)}, "4, 5, 0"),
        ({"shape": (6, -5, 4)}, "4, -5, 6"),
        ({"axes": (1, 1, 3)}, "1, 1, 3"),
        ({"extended": -1}, "-1 bytes of extended header"),
    ],
)
def test_headers_that_make_no_sense_are_quoted(words: dict[str, Any], says: str) -> None:
    raw = mrc_header(words.pop("shape", (6, 5, 4)), words.pop("mode", 2), **words)
    with pytest.raises(SourceError, match=says):
        parse_header(raw, "a.mrc")


@pytest.mark.parametrize(
    ("start", "kind"),
    [(b"II*\x00", "TIFF"), (b"\x89HDF\r\n", "HDF5"), (b"PK\x03\x04", "zip"), (b"\x89PNG", "PNG")],
)
def test_other_kinds_of_file_are_named(tmp_path: Path, start: bytes, kind: str) -> None:
    path = tmp_path / "a.mrc"
    path.write_bytes(start + b"\xff" * 2000)
    with pytest.raises(SourceError, match=f"is an? {kind}"):
        open_mrc(path)


@pytest.mark.parametrize(
    ("cell", "sampling"),
    [
        ((0, 0, 0), (4, 5, 6)),
        ((40, 50, 60), (0, 0, 0)),
        ((40, float("nan"), 60), (4, 5, 6)),
        ((-4, 5, 6), (4, 5, 6)),
    ],
)
def test_no_voxel_size_is_none(tmp_path: Path, cell: Any, sampling: Any) -> None:
    assert (
        open_mrc(write_mrc(tmp_path / "a.mrc", ramp(), cell=cell, sampling=sampling)).header.voxel_sizes
        is None
    )


def test_nan_and_infinity_come_back_as_they_are(tmp_path: Path) -> None:
    voxels = ramp()
    voxels[0, 0, :3] = np.nan, np.inf, -np.inf
    path = write_mrc(tmp_path / "a.mrc", voxels, stated=(0, 1, 0.5))
    np.testing.assert_array_equal(open_mrc(path).read(ALL), voxels)


def test_two_writes_of_one_name_have_two_identities(tmp_path: Path) -> None:
    path = write_mrc(tmp_path / "a.mrc", ramp())
    first = open_mrc(path).identity()
    assert first == open_mrc(path).identity()
    os.utime(path, ns=(1, 1))
    assert open_mrc(path).identity() != first


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=0, max_size=1100))
def test_random_bytes_are_a_source_error_or_a_header(raw: bytes) -> None:
    try:
        header = parse_header(raw, "random")
    except SourceError as error:
        found = str(error)
    else:
        found = str(header.data_bytes)
    assert found.startswith("random ") or int(found) > 0


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_a_damaged_header_is_a_source_error_or_a_header_that_can_be_used(data: st.DataObject) -> None:
    raw = bytearray(
        mrc_header((6, 5, 4), data.draw(st.sampled_from([0, 1, 2, 6, 12])), data.draw(st.sampled_from("<>")))
    )
    for _ in range(data.draw(st.integers(1, 6))):
        word = data.draw(st.integers(0, 55)) * 4
        raw[word : word + 4] = data.draw(st.binary(min_size=4, max_size=4))
    try:
        header = parse_header(bytes(raw), "damaged", 1024 + 480)
    except SourceError:
        return
    assert sorted(header.shape) == sorted(header.file_shape)
    assert all(n > 1 for n in header.shape)
    assert header.data_bytes > 0
    assert header.voxel_sizes is None or all(size > 0 for size in header.voxel_sizes)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("any") / "a.mrc"
    whole = mrc_header((6, 5, 4), 2) + ramp().tobytes()
    raw = bytearray(gzip.compress(whole) if data.draw(st.booleans()) else whole)
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        file = open_mrc(path)
        found = file.read((slice(0, 1), slice(0, file.shape[1]), slice(0, file.shape[2])))
    except SourceError:
        return
    assert found.shape == (1, *file.shape[1:])
