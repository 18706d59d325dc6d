"""Rotations, packed integers and the flat view of tensors: the algebra that codecs stand on."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codecs.base import Section, Sections, WireContext, checked_scales
from protocol.codecs.feedback import compensated, residual
from protocol.codecs.flat import FlatReader, FlatWriter
from protocol.codecs.packing import pack, packed_size, unpack
from protocol.codecs.rotation import (
    BLOCK_SIZES,
    Chunk,
    chunks_of,
    hadamard,
    rotate_blocks,
    rotate_whole,
    unrotate_blocks,
    unrotate_whole,
)
from protocol.errors import ReplyRejected
from protocol.tensors import layout_of

SEED = b"seed"


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 2, 4, 8, 32, 64, 1024])
def test_butterflies_are_the_hadamard_matrix(size: int) -> None:
    rows = gaussian(3, size)
    expected = rows.double().numpy() @ scipy.linalg.hadamard(size)
    np.testing.assert_allclose(hadamard(rows.clone()).numpy(), expected, atol=1e-4 * math.sqrt(size))


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_a_block_comes_back_from_its_rotation(size: int) -> None:
    chunk, values = Chunk(3, 2, size), gaussian(2 * size)
    rotated = rotate_blocks(values.clone(), chunk, SEED)
    torch.testing.assert_close(rotated.norm(dim=1), values.view(2, size).norm(dim=1))
    torch.testing.assert_close(unrotate_blocks(rotated, chunk, SEED).view(-1), values, atol=1e-5, rtol=1e-5)
    other = rotate_blocks(values.clone(), Chunk(4, 2, size), SEED)
    assert not torch.allclose(rotate_blocks(values.clone(), chunk, SEED), other)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 5000), st.integers(0, 99))
def test_a_whole_row_comes_back_whatever_its_size(size: int, seed: int) -> None:
    values = gaussian(size, seed=seed)
    rotated = rotate_whole(values.clone(), SEED)
    assert float(rotated.double().norm()) == pytest.approx(float(values.double().norm()), rel=1e-5)
    torch.testing.assert_close(unrotate_whole(rotated, SEED), values, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("size", "spike"), [(1000, 0), (1000, 999), (1025, 3), (1025, 1024), (2047, 1000)])
def test_no_coordinate_of_a_whole_rotation_has_a_large_share(size: int, spike: int) -> None:
    """Variance at most 2/n of the squared norm, over the rotation, for a spike anywhere. 4000 rotations: ± 2 %."""
    x, total = torch.zeros(size), torch.zeros(size)
    x[spike] = 1
    for number in range(400):
        total += rotate_whole(x.clone(), number.to_bytes(8, "little")).square() / 400
    assert float(total.mean()) == pytest.approx(1 / size, rel=1e-4)
    assert float(total.max()) <= 2 / size * 1.35


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 3_000_000))
def test_chunks_cover_all_values_with_little_padding(values: int) -> None:
    chunks = list(chunks_of(values))
    covered = sum(chunk.values for chunk in chunks)
    assert 0 <= covered - values < BLOCK_SIZES[-1]
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    assert all(chunk.values <= 2**18 for chunk in chunks)
    assert sum(chunk.blocks for chunk in chunks) <= values // BLOCK_SIZES[0] + 12


@pytest.mark.parametrize("bits", range(17))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_packed_integers_come_back(bits: int, count: int) -> None:
    drawn = np.random.default_rng(bits).integers(0, 2**bits, count)
    codes = drawn.astype(np.uint16 if bits > 8 else np.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.size == packed_size(count, bits) == math.ceil(count / 8) * bits
    np.testing.assert_array_equal(unpack(packed, count, bits), codes)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 8), st.binary(min_size=24, max_size=24))
def test_any_bytes_unpack_to_integers_in_range(bits: int, raw: bytes) -> None:
    packed = np.frombuffer(raw, dtype=np.uint8)[: 3 * bits]
    codes = unpack(packed, 24, bits)
    assert codes.max() < 2**bits
    np.testing.assert_array_equal(pack(codes, bits), packed)


def test_bits_lie_in_order() -> None:
    """The first integer in the lowest bits, little-endian: the format, written down."""
    assert pack(np.arange(8, dtype=np.uint8), 3).tobytes() == bytes([0b10001000, 0b11000110, 0b11111010])
    assert pack(np.array([1, 2] * 4, dtype=np.uint8), 4).tobytes() == b"\x21" * 4


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 9), max_size=5), st.integers(1, 7))
def test_tensors_are_read_and_written_in_pieces(sizes: list[int], piece: int) -> None:
    tensors = {f"t{number}": gaussian(size, 2, seed=number) for number, size in enumerate(sizes)}
    reader, writer = FlatReader(tensors), FlatWriter(layout_of(tensors))
    total = reader.left
    while reader.left:
        writer.write(reader.read(piece))
    back = writer.tensors()
    assert total == 2 * sum(sizes)
    assert list(back) == list(tensors)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_sections_are_compared_before_they_are_read() -> None:
    sections = [Section(3, "u1"), Section(2, "<f4")]
    message = Sections(sections)
    message.write(0, np.array([1, 2, 3]))
    message.write(1, np.array([0.5, -2.0]))
    back = Sections(sections, message.body)
    assert back.read(0).tolist() == [1, 2, 3]
    assert back.read(1).tolist() == [0.5, -2.0]
    with pytest.raises(ReplyRejected, match="the payload has 10 bytes after its header, expected 11"):
        Sections(sections, message.body[:-1])


@pytest.mark.parametrize(
    ("scale", "code", "complaint"),
    [
        (math.nan, "not_finite", "a scale of the payload is NaN or infinite"),
        (math.inf, "not_finite", "a scale of the payload is NaN or infinite"),
        (-1.0, "malformed_payload", r"a scale of the payload is not in \[0, 1e\+33\]"),
        (1e34, "malformed_payload", r"a scale of the payload is not in \[0, 1e\+33\]"),
    ],
)
def test_scales_are_checked(scale: float, code: str, complaint: str) -> None:
    with pytest.raises(ReplyRejected, match=complaint) as rejected:
        checked_scales(np.array([1.0, scale], dtype=np.float32))
    assert rejected.value.code == code


def test_every_part_of_a_context_gives_another_seed() -> None:
    base = WireContext("run", 1, "harbor", "up")
    others = [
        WireContext("run2", 1, "harbor", "up"),
        WireContext("run", 2, "harbor", "up"),
        WireContext("run", 1, "northgate", "up"),
        WireContext("run", 1, "harbor", "down"),
    ]
    seeds = {context.seed("rotation") for context in (base, *others)} | {base.seed("rounding")}
    assert len(seeds) == 6
    assert base.seed("rotation") == WireContext("run", 1, "harbor", "up").seed("rotation")
    assert base.seed("rotation", of_site=False) == others[2].seed("rotation", of_site=False)
    assert base.seed("rotation", of_site=False) != others[1].seed("rotation", of_site=False)


def test_rounding_is_repeatable() -> None:
    first, second = (WireContext("run", 1, "harbor", "up").rounding() for _ in range(2))
    assert torch.equal(torch.rand(9, generator=first), torch.rand(9, generator=second))


def test_what_was_left_out_comes_later() -> None:
    update, decoded = {"x": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([0.0, 2.5])}
    left = residual(update, decoded)
    assert left["x"].tolist() == [1.0, -0.5]
    assert compensated(update, left)["x"].tolist() == [2.0, 1.5]
    assert compensated(update, {})["x"].tolist() == [1.0, 2.0]
