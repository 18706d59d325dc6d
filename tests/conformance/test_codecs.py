"""What every codec promises, asked of every codec that can be configured."""

import math
import typing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from conf.schema import wire
from protocol.codecs.base import ENCODED, HEADER_BYTES, Codec, Encoded, WireContext
from protocol.codecs.build import CODECS, build_codec
from protocol.errors import ReplyRejected
from protocol.tensors import NamedTensors, byte_count, digest, layout_of, subtract

KINDS: tuple[type[BaseModel], ...] = typing.get_args(typing.get_args(wire.Quantization)[0])
MORE = (
    wire.Eden(bits=0.5),
    wire.Eden(bits=1),
    wire.Eden(bits=2.3),
    wire.Eden(bits=8),
    wire.Eden(bits=2, scale="min_mse"),
    wire.UniformEntropy(bits=1),
    wire.UniformEntropy(bits=8, scale="min_mse"),
    wire.Int4(block_size=8),
    wire.TopK(fraction=0.01),
    *(wire.Lattice(bits=bits, max_summands=4) for bits in (4, 5, 7, 8, 9, 16)),
)
CONFIGS = (*(kind() for kind in KINDS), *MORE)
CODECS_UNDER_TEST = [build_codec(config) for config in CONFIGS]
every_codec = pytest.mark.parametrize("codec", CODECS_UNDER_TEST, ids=repr)
quantized = pytest.mark.parametrize(
    "codec", [codec for codec in CODECS_UNDER_TEST if codec.bits_per_value < 32], ids=repr
)
unbiased = pytest.mark.parametrize("codec", [codec for codec in CODECS_UNDER_TEST if codec.is_unbiased], ids=repr)
unbiased_with_errors = pytest.mark.parametrize(
    "codec", [codec for codec in CODECS_UNDER_TEST if codec.is_unbiased and codec.bits_per_value < 32], ids=repr
)
fits_its_step = pytest.mark.parametrize(
    "codec", [codec for codec in CODECS_UNDER_TEST if codec.bits_per_value < 32 and not codec.is_summable], ids=repr
)
"""Not the summable ones, whose step is a public constant."""

LARGE = {"b.lora_B": (1500, 16), "a.lora_A": (16, 5000), "head": (101,), "empty": (0, 3)}
SMALL = {"b": (3, 5), "a": (7,), "scalar": ()}


def tensors_of(shapes: dict[str, tuple[int, ...]], seed: int, heavy: bool = False) -> dict[str, torch.Tensor]:
    """Return tensors of norm 1 together: Gaussian, or Student's t with 3 degrees of freedom."""
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if heavy:
            values = values / torch.randn((3, *shape), generator=generator).square().mean(0).sqrt()
        drawn[name] = values
    whole = norm(drawn)
    return {name: tensor / whole for name, tensor in drawn.items()}


def norm(tensors: NamedTensors) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def context(number: int = 1) -> WireContext:
    return WireContext("run", number, "harbor", "up")


def through(codec: Codec, tensors: NamedTensors, number: int = 1) -> dict[str, torch.Tensor]:
    encoded = codec.encode(tensors, context(number), context(number).rounding())
    return codec.decode(encoded, layout_of(tensors), context(number))


def forged(encoded: Encoded, position: int, value: bytes) -> Encoded:
    raw = bytearray(encoded[ENCODED].numpy().tobytes())
    raw[position : position + len(value)] = value
    return {ENCODED: torch.frombuffer(raw, dtype=torch.uint8)}


def test_there_are_codecs_and_each_variant_is_built() -> None:
    assert len(KINDS) >= 11
    assert set(KINDS) == set(CODECS)


@every_codec
@pytest.mark.parametrize("shapes", [LARGE, SMALL, {}, {"empty": (0,)}], ids=["large", "small", "none", "empty"])
def test_names_shapes_and_types_come_back(codec: Codec, shapes: dict[str, tuple[int, ...]]) -> None:
    tensors = tensors_of(shapes, 0)
    decoded = through(codec, tensors)
    assert list(decoded) == list(tensors)
    assert layout_of(decoded) == layout_of(tensors)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in decoded.values())


@every_codec
def test_zeros_are_zeros(codec: Codec) -> None:
    zeros = {name: torch.zeros(shape) for name, shape in (LARGE | SMALL).items()}
    assert all(not bool(tensor.any()) for tensor in through(codec, zeros).values())


@every_codec
def test_the_same_message_twice(codec: Codec) -> None:
    """Nothing is drawn from a global generator, and the input is left alone."""
    tensors = tensors_of(LARGE, 0)
    before = digest(tensors)
    torch.manual_seed(1)
    first = codec.encode(tensors, context(), context().rounding())
    torch.manual_seed(2)
    second = codec.encode(tensors, context(), context().rounding())
    assert digest(tensors) == before
    assert all(torch.equal(first[name], second[name]) for name in first)
    layout = layout_of(tensors)
    assert digest(codec.decode(first, layout, context())) == digest(codec.decode(second, layout, context()))


@every_codec
def test_the_order_of_names_and_of_memory_does_not_matter(codec: Codec) -> None:
    tensors = tensors_of(LARGE, 0)
    odd = {name: tensors[name].T.contiguous().T for name in reversed(list(tensors)) if tensors[name].dim() == 2}
    plain = {name: tensors[name] for name in sorted(odd)}
    assert digest(through(codec, odd)) == digest(through(codec, plain))


@every_codec
def test_the_bytes_are_as_stated(codec: Codec) -> None:
    """Above 100,000 values header, scales and padding are within 2 % of the nominal rate."""
    tensors = tensors_of(LARGE, 0)
    assert sum(tensor.numel() for tensor in tensors.values()) == 104_101
    encoded = codec.encode(tensors, context(), context().rounding())
    assert byte_count(encoded) * 8 / 104_101 == pytest.approx(codec.bits_per_value, rel=0.02)


@every_codec
@pytest.mark.parametrize("heavy", [False, True], ids=["gaussian", "heavy"])
def test_the_norm_grows_no_more_than_stated(codec: Codec, heavy: bool) -> None:
    for seed in range(3):
        for shapes in (LARGE, SMALL):
            tensors = tensors_of(shapes, seed, heavy)
            values = sum(tensor.numel() for tensor in tensors.values())
            assert norm(through(codec, tensors, seed)) <= codec.norm_inflation(values) * (1 + 1e-5)


@every_codec
@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from([0.0, 1.0, -1.0, 1e-3, 0.5, -7.0, 1e-12, 0.49999]), min_size=1, max_size=300),
    st.integers(1, 99),
)
def test_the_norm_of_odd_vectors_too(codec: Codec, values: list[float], number: int) -> None:
    """Spikes, ties and zeros are where a rotation does not help."""
    tensors = {"x": torch.tensor(values, dtype=torch.float32)}
    whole = norm(tensors)
    if whole:
        tensors = {"x": tensors["x"] / whole}
    decoded = norm(through(codec, tensors, number))
    assert decoded <= codec.norm_inflation(len(values)) * (1 + 1e-5)


@quantized
@pytest.mark.parametrize("size", [1e-45, 1.5e-42, 1e-38, 1e-36, 1e-34])
def test_the_norm_of_next_to_nothing_stays_so(codec: Codec, size: float) -> None:
    """Subnormal scales have a few bits, and their inverses are infinite."""
    tensors = {"x": torch.tensor([size, 0.0, -size, size / 3] * 20)}
    decoded = through(codec, tensors)
    assert bool(torch.isfinite(decoded["x"]).all())
    assert norm(decoded) <= max(codec.norm_inflation(80) * norm(tensors) * (1 + 1e-2), 1e-37)


@unbiased_with_errors
def test_the_error_of_a_mean_of_n_falls_as_one_over_n(codec: Codec) -> None:
    """Unbiased, with independent randomness by site: 64 sites that send the same tensors err 1/64 as much as one."""
    tensors, sites = tensors_of({"x": (70, 100)}, 5), 64
    total, single = torch.zeros(70, 100, dtype=torch.float64), 0.0
    for number in range(sites):
        error = subtract(through(codec, tensors, number), tensors, frozenset(tensors))["x"].double()
        total += error
        single += float(error.square().sum()) / sites
    of_mean = float((total / sites).square().sum())
    # The ratio's standard deviation is about √(2/7000) + 1/√64 x that of one error; a bias of a tenth would give 1.6.
    assert of_mean / (single / sites) == pytest.approx(1, rel=0.15)


@quantized
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_what_is_not_finite_is_never_sent_in_disguise(codec: Codec, bad: float) -> None:
    tensors = {"x": torch.tensor([1.0, bad, 0.0])}
    with pytest.raises(ValueError, match=r"cannot encode values that are not finite, or above 1e\+30 in size"):
        codec.encode(tensors, context(), context().rounding())


@fits_its_step
@pytest.mark.parametrize("exponent", [-80, -20, 83])
def test_the_size_of_values_does_not_matter(codec: Codec, exponent: int) -> None:
    """A power of two scales what is decoded, and nothing else."""
    tensors = tensors_of({"x": (4000,)}, 1)
    scaled = {"x": tensors["x"] * 2.0**exponent}
    assert torch.equal(through(codec, scaled)["x"], through(codec, tensors)["x"] * 2.0**exponent)


@quantized
@pytest.mark.parametrize(
    ("position", "value", "complaint"),
    [
        (0, b"XX", "magic is b'XX'"),
        (2, b"\x02", "version is 2"),
        (3, b"\x77", "codec is 119"),
        (4, b"\xff" * 8, "count of values is 18446744073709551615"),
    ],
)
def test_a_forged_header_is_rejected(codec: Codec, position: int, value: bytes, complaint: str) -> None:
    tensors = tensors_of(SMALL, 0)
    encoded = codec.encode(tensors, context(), context().rounding())
    with pytest.raises(ReplyRejected, match=complaint) as rejected:
        codec.decode(forged(encoded, position, value), layout_of(tensors), context())
    assert rejected.value.code == "malformed_payload"


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("kind", [wire.Eden, wire.UniformEntropy])
def test_a_spike_at_the_largest_scale_is_not_decoded_to_infinity(kind: type[BaseModel], bits: int) -> None:
    """Who knows the rotation, and everybody does, can have all codes of a block meet in one coordinate."""
    codec = build_codec(kind(bits=bits))  # type: ignore[arg-type]
    spike = {"w": torch.zeros(1 << 14)}
    spike["w"][0] = 9e29
    encoded = codec.encode(spike, context(), context().rounding())
    at = HEADER_BYTES + (0 if kind is wire.Eden else 4)
    louder = encoded[ENCODED].clone()
    louder[at : at + 4] = torch.tensor([1e33]).view(torch.uint8)
    assert bool(torch.isfinite(codec.decode(encoded, layout_of(spike), context())["w"]).all())
    with pytest.raises(ReplyRejected, match="decodes to NaN, or to values beyond float32") as rejected:
        codec.decode({ENCODED: louder}, layout_of(spike), context())
    assert rejected.value.code == "not_finite"


@quantized
def test_another_length_is_rejected(codec: Codec) -> None:
    tensors = tensors_of(LARGE, 0)
    raw = codec.encode(tensors, context(), context().rounding())[ENCODED]
    for cut in (raw[:-1], raw[: HEADER_BYTES + 5], raw[:HEADER_BYTES], raw[:3], raw[:0], torch.cat([raw, raw[:4]])):
        with pytest.raises(ReplyRejected, match="payload") as rejected:
            codec.decode({ENCODED: cut}, layout_of(tensors), context())
        assert rejected.value.code == "malformed_payload"


@quantized
def test_a_message_of_another_codec_is_rejected(codec: Codec) -> None:
    tensors, refused = tensors_of(LARGE, 0), 0
    for other in CODECS_UNDER_TEST:
        if other == codec:
            continue
        encoded = other.encode(tensors, context(), context().rounding())
        try:
            codec.decode(encoded, layout_of(tensors), context())
        except ReplyRejected:
            refused += 1
    # Settings that change no byte (the two scales of a rotation) may pass; every other codec may not.
    assert refused >= len(CODECS_UNDER_TEST) - 2


@quantized
@pytest.mark.parametrize(
    "encoded",
    [
        {},
        {"x": torch.zeros(40, dtype=torch.uint8)},
        {ENCODED: torch.zeros(40, dtype=torch.uint8), "x": torch.zeros(3)},
        {ENCODED: torch.zeros(40)},
        {ENCODED: torch.zeros(5, 8, dtype=torch.uint8)},
    ],
    ids=["nothing", "another name", "more", "floats", "two dimensions"],
)
def test_what_is_no_message_is_rejected(codec: Codec, encoded: Encoded) -> None:
    with pytest.raises(ReplyRejected, match=r"expected one tensor 'encoded'|no row of at least 12 bytes"):
        codec.decode(encoded, layout_of(tensors_of(SMALL, 0)), context())


@quantized
def test_a_short_message_costs_no_memory_however_large_the_layout(codec: Codec) -> None:
    """10^10 float32 values are 40 GB: allocating them would fail here."""
    layout = layout_of({"x": torch.empty(10**10, device="meta", dtype=torch.float32)})
    header = codec.encode({}, context(), context().rounding())[ENCODED]
    message = forged(
        {ENCODED: torch.cat([header, torch.zeros(99, dtype=torch.uint8)])}, 4, (10**10).to_bytes(8, "little")
    )
    with pytest.raises(ReplyRejected, match=r"expected|too early"):
        codec.decode(message, layout, context())


@quantized
@settings(deadline=None, max_examples=50)
@given(st.data())
def test_damaged_messages_are_rejected_or_harmless(codec: Codec, data: st.DataObject) -> None:
    """Whatever the bytes: finite tensors of the layout, or a rejection; nothing else may happen."""
    tensors = tensors_of({"x": (300,), "y": (20, 20)}, 0)
    raw = codec.encode(tensors, context(), context().rounding())[ENCODED]
    damaged: Encoded = {ENCODED: raw}
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(HEADER_BYTES, raw.numel() - 1))
        damaged = forged(damaged, position, data.draw(st.binary(min_size=1, max_size=min(9, raw.numel() - position))))
    try:
        decoded = codec.decode(damaged, layout_of(tensors), context())
    except ReplyRejected as rejected:
        assert rejected.code in ("malformed_payload", "not_finite")  # noqa: PT017
        return
    assert layout_of(decoded) == layout_of(tensors)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in decoded.values())


@quantized
@settings(deadline=None, max_examples=25)
@given(st.binary(max_size=400))
def test_random_bodies_are_rejected_or_harmless(codec: Codec, body: bytes) -> None:
    layout = layout_of({"x": torch.zeros(60)})
    raw = codec.encode({"x": torch.zeros(60)}, context(), context().rounding())[ENCODED].numpy().tobytes()
    for message in (body, raw[:HEADER_BYTES] + body, raw[:HEADER_BYTES] + body.ljust(len(raw) - HEADER_BYTES, b"\x7f")):
        buffer = (
            torch.frombuffer(bytearray(message), dtype=torch.uint8) if message else torch.zeros(0, dtype=torch.uint8)
        )
        try:
            decoded = codec.decode({ENCODED: buffer}, layout, context())
        except ReplyRejected:
            continue
        assert bool(torch.isfinite(decoded["x"]).all())


@quantized
def test_scales_that_are_no_numbers_are_rejected(codec: Codec) -> None:
    """Every four bytes of a small message are made NaN in turn: no NaN comes out."""
    tensors = tensors_of(SMALL, 0)
    encoded = codec.encode(tensors, context(), context().rounding())
    for position in range(HEADER_BYTES, encoded[ENCODED].numel() - 3):
        try:
            decoded = codec.decode(forged(encoded, position, b"\x00\x00\xc0\x7f"), layout_of(tensors), context())
        except ReplyRejected:
            continue
        assert all(bool(torch.isfinite(tensor).all()) for tensor in decoded.values())
