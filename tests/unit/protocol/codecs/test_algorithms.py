"""What is particular to single codecs."""

import math

import constriction
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codecs.base import ENCODED, HEADER_BYTES, Codec, WireContext
from protocol.codecs.blockwise import Blockwise
from protocol.codecs.eden import Eden
from protocol.codecs.feedback import compensated, residual
from protocol.codecs.half_precision import HalfPrecision
from protocol.codecs.lattice import Lattice
from protocol.codecs.nf4 import NF4
from protocol.codecs.signsgd import SignSGD
from protocol.codecs.topk import TopK
from protocol.codecs.uniform_entropy import UniformEntropy
from protocol.errors import ReplyRejected
from protocol.tensors import layout_of


def context(number: int = 1, site: str = "harbor") -> WireContext:
    return WireContext("run", number, site, "up")


def gaussian(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def through(codec: Codec, x: torch.Tensor, number: int = 1) -> torch.Tensor:
    encoded = codec.encode({"x": x}, context(number), context(number).rounding())
    return codec.decode(encoded, layout_of({"x": x}), context(number))["x"]


@pytest.mark.parametrize("codec", [Eden(1), Eden(0.5), UniformEntropy(1), Lattice(8, 9.0, 1)])
@pytest.mark.parametrize("shape", ["spike", "two spikes", "ramp"])
def test_the_mean_of_many_messages_is_the_input(codec: Codec, shape: str) -> None:
    """Of sparse inputs too, where one Hadamard pass is blind: the error of the mean is 1/n of one message's."""
    x = {"spike": torch.zeros(256), "two spikes": torch.zeros(256), "ramp": torch.arange(256.0)}[shape]
    x[3] = 1.0
    if shape == "two spikes":
        x[77] = -2.0
    x, messages = x / x.norm(), 200
    total, single = torch.zeros(256, dtype=torch.float64), 0.0
    for number in range(messages):
        decoded = through(codec, x, number).double()
        total += decoded / messages
        single += float((decoded - x).square().sum()) / messages
    assert float((total - x).square().sum()) <= 1.5 * single / messages


def test_a_site_without_the_context_decodes_noise() -> None:
    x = gaussian(5000)
    encoded = Eden(8).encode({"x": x}, context(1), context(1).rounding())
    wrong = Eden(8).decode(encoded, layout_of({"x": x}), context(2))["x"]
    assert float((wrong - x).norm() / x.norm()) > 1


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4000), st.floats(1, 8), st.integers(0, 99))
def test_the_entropy_coder_loses_nothing(size: int, bits: float, seed: int) -> None:
    """What is decoded is exactly the integers times step and scale: encoding it again gives the same message."""
    codec = UniformEntropy(bits)
    x = gaussian(size, seed)
    message = codec.encode({"x": x}, context(), context().rounding())
    first = codec.decode(message, layout_of({"x": x}), context())
    second = codec.decode({ENCODED: message[ENCODED].clone()}, layout_of({"x": x}), context())
    assert torch.equal(first["x"], second["x"])
    # Lloyd's cosine: far below it one garbled integer would show.
    assert float(torch.nn.functional.cosine_similarity(first["x"], x, dim=0)) > (0.6 if size < 256 else 0.78)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 40), max_size=300))
def test_the_library_codes_without_loss(integers: list[int]) -> None:
    """Of improbable integers too, under a model that does not fit them."""
    model = constriction.stream.model.Categorical(np.array([2.0**22] + [1.0] * 40, dtype=np.float32), perfect=False)
    symbols = np.array(integers, dtype=np.int32)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(symbols, model)
    back = constriction.stream.stack.AnsCoder(coder.get_compressed())
    np.testing.assert_array_equal(back.decode(model, symbols.size), symbols)
    assert back.is_empty()


def test_an_entropy_coded_part_must_end_where_its_values_end() -> None:
    x = gaussian(256)
    raw = UniformEntropy(2).encode({"x": x}, context(), context().rounding())[ENCODED].clone()
    words = int(raw[HEADER_BYTES : HEADER_BYTES + 4].numpy().view("<u4")[0])
    longer = torch.cat([raw, torch.tensor([1, 2, 3, 4], dtype=torch.uint8)])
    longer[HEADER_BYTES] = words + 1
    layout = layout_of({"x": x})
    with pytest.raises(ReplyRejected, match="does not end where its values end"):
        UniformEntropy(2).decode({ENCODED: longer}, layout, context())
    zeroed = raw.clone()
    zeroed[-4:] = 0
    with pytest.raises(ReplyRejected, match="is empty, or ends in a zero word"):
        UniformEntropy(2).decode({ENCODED: zeroed}, layout, context())
    with pytest.raises(ReplyRejected, match="4 bytes more than it needs"):
        UniformEntropy(2).decode({ENCODED: torch.cat([raw, raw[:4]])}, layout, context())


def test_half_precision_rounds_to_the_nearest() -> None:
    x = torch.cat([gaussian(999), torch.tensor([0.0, 1e20, -1e-20])])
    assert torch.equal(through(HalfPrecision("bf16"), x), x.bfloat16().float())
    small = x[:-2] * 1e-9  # would vanish in half precision
    torch.testing.assert_close(through(HalfPrecision("fp16"), small), small, rtol=2**-11, atol=1e-16)


@pytest.mark.parametrize(("codec", "exponent"), [(HalfPrecision("fp16"), 101), (HalfPrecision("bf16"), 1)])
def test_an_exponent_that_is_not_sent_is_rejected(codec: Codec, exponent: int) -> None:
    raw = codec.encode({"x": gaussian(9)}, context(), context().rounding())[ENCODED].clone()
    raw[HEADER_BYTES : HEADER_BYTES + 4] = torch.frombuffer(
        bytearray(exponent.to_bytes(4, "little")), dtype=torch.uint8
    )
    with pytest.raises(ReplyRejected, match=f"the payload's exponent {exponent} is not one that is sent"):
        codec.decode({ENCODED: raw}, layout_of({"x": gaussian(9)}), context())


def test_not_a_number_in_half_precision_is_rejected() -> None:
    raw = HalfPrecision("bf16").encode({"x": gaussian(9)}, context(), context().rounding())[ENCODED].clone()
    raw[-2:] = 0xFF
    with pytest.raises(ReplyRejected, match="the payload holds NaN, infinity or a value above 2e30") as rejected:
        HalfPrecision("bf16").decode({ENCODED: raw}, layout_of({"x": gaussian(9)}), context())
    assert rejected.value.code == "not_finite"


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_are_rounded_to_their_neighbors(bits: int) -> None:
    codec, x = Blockwise(bits, 64), gaussian(6400)  # type: ignore[arg-type]
    steps = x.view(-1, 64).abs().amax(1, keepdim=True) * (1 + 2**-7) / codec.levels
    assert bool(((through(codec, x).view(-1, 64) - x.view(-1, 64)).abs() <= steps).all())


def test_a_level_that_is_not_sent_is_rejected() -> None:
    raw = Blockwise(4, 64).encode({"x": gaussian(64)}, context(), context().rounding())[ENCODED].clone()
    raw[-1] = 0xFF
    with pytest.raises(ReplyRejected, match="the payload has a code above 14"):
        Blockwise(4, 64).decode({ENCODED: raw}, layout_of({"x": gaussian(64)}), context())


def test_nf4_finds_the_nearest_of_its_levels() -> None:
    """Every level, as published, comes back as itself."""
    levels = torch.tensor([-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0])
    x = torch.cat(
        [levels, torch.tensor([0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.562617, 0.7229568, 1.0])]
    )
    torch.testing.assert_close(through(NF4(16), x), x, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(through(NF4(16), x * 1.01)[1:-1], x[1:-1] * 1.01, rtol=1e-6, atol=1e-7)


def test_signs_and_their_mean_size() -> None:
    x = torch.tensor([3.0, -1.0, 0.0, -4.0])
    assert through(SignSGD(), x).tolist() == [2.0, -2.0, 2.0, -2.0]
    assert through(SignSGD(), torch.ones(3000)).tolist() == [1.0] * 3000


def test_the_largest_values_are_exact_and_the_rest_is_zero() -> None:
    x = gaussian(200_000)
    decoded = through(TopK(0.01), x)
    kept = decoded != 0
    assert int(kept.sum()) == 2000
    assert torch.equal(decoded[kept], x[kept])
    assert float(x[~kept].abs().max()) <= float(x[kept].abs().min())


def test_positions_must_ascend_and_add_up() -> None:
    layout = layout_of({"x": torch.zeros(10)})
    raw = TopK(0.2).encode({"x": torch.arange(10.0)}, context(), context().rounding())[ENCODED]
    counts, positions, values = HEADER_BYTES, HEADER_BYTES + 4, HEADER_BYTES + 8
    for where, byte, complaint in (
        (counts, 3, "the payload counts 3 values, not 2"),
        (positions, 9, "positions do not ascend"),
        (positions + 2, 10, "positions do not ascend"),
        (values + 3, 0x7F, "NaN, infinity or a value above"),
    ):
        forged = raw.clone()
        forged[where] = byte
        with pytest.raises(ReplyRejected, match=complaint):
            TopK(0.2).decode({ENCODED: forged}, layout, context())


@pytest.mark.parametrize("codec", [TopK(0.1), SignSGD()])
def test_feedback_makes_the_sum_right(codec: Codec) -> None:
    """What was sent in all rounds is the sum of all updates, up to the last residual, which stays bounded."""
    updates = [gaussian(2000, 1) / 10 + gaussian(2000, number + 2) / 10 for number in range(60)]
    left: dict[str, torch.Tensor] = {}
    sent = torch.zeros(2000)
    for update in updates:
        wanted = compensated({"x": update}, left)
        decoded = through(codec, wanted["x"])
        left = residual(wanted, {"x": decoded})
        sent += decoded
    total = torch.stack(updates).sum(0)
    torch.testing.assert_close(sent + left["x"], total, atol=1e-3, rtol=1e-3)
    plain = torch.stack([through(codec, update) for update in updates]).sum(0)
    assert float((sent - total).norm()) < 0.5 * float((plain - total).norm())


@pytest.mark.parametrize("sites", [1, 2, 7, 16])
@pytest.mark.parametrize("size", [1, 10, 3000])
def test_a_sum_of_residues_decodes_to_the_sum(sites: int, size: int) -> None:
    """The same inputs at all sites too, which is where a sum is largest."""
    codec, layout = Lattice(16, 1.0, 16), layout_of({"x": torch.zeros(size)})
    for seeds in ([0] * sites, range(sites)):
        updates = [gaussian(size, seed) for seed in seeds]
        updates = [update / update.norm() for update in updates]
        total = np.zeros(size, dtype=np.uint16)
        for number, update in enumerate(updates):
            here = context(site=f"site{number}")
            total += codec.residues({"x": update}, here, here.rounding())
        decoded = codec.total(total, layout, context(site="whoever"))["x"]
        step = codec.step(size)
        exact = torch.stack(updates).sum(0)
        assert float((decoded - exact).norm()) <= step * math.sqrt(size * sites) + 1e-5 * sites


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 400), st.floats(1e-3, 100), st.integers(4, 16), st.integers(0, 99))
def test_an_integer_vector_is_as_short_as_promised(size: int, length: float, bits: int, seed: int) -> None:
    """The clip comes before rounding, and rounding is drawn again while it is too long: the sensitivity of a sum."""
    codec = Lattice(bits, 2.0, 1)
    x = gaussian(size, seed)
    residues = codec.residues({"x": x / x.norm() * length}, context(), context().rounding()).astype(np.int64)
    centered = np.where(residues >= codec.modulus // 2, residues - codec.modulus, residues)
    norm = float(np.sqrt((centered.astype(np.float64) ** 2).sum())) * codec.step(size)
    assert norm <= codec.norm_inflation(size) * 2.0 * (1 + 1e-6)
    assert int(np.abs(centered).max()) <= codec.largest
