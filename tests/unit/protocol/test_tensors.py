"""Named tensors: digests, arithmetic, and what a receiver refuses."""

import pytest
import torch

from protocol.errors import ReplyRejected
from protocol.tensors import TensorShape, add, byte_count, digest, layout_of, subtract, verify


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"b": torch.randn(3, 2, generator=generator), "a": torch.randn(4, generator=generator)}


def test_what_was_asked_for_passes() -> None:
    verify(tensors(), layout_of(tensors()))
    verify({}, {})


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"a": None}, "missing_tensor", r"1 tensor\(s\) are missing, first a"),
        ({"a": None, "b": None}, "missing_tensor", r"2 tensor\(s\) are missing, first a"),
        ({"c": torch.zeros(1)}, "unknown_tensor", r"1 tensor\(s\) were not asked for, first c"),
        ({"a": torch.zeros(4).double()}, "wrong_dtype", r"a has dtype torch\.float64, expected torch\.float32"),
        ({"a": torch.zeros(4).half()}, "wrong_dtype", r"a has dtype torch\.float16"),
        ({"a": torch.zeros(4).long()}, "wrong_dtype", r"a has dtype torch\.int64"),
        ({"a": torch.zeros(2, 2)}, "wrong_shape", r"a has shape \(2, 2\), expected \(4,\)"),
        ({"b": torch.zeros(2, 3)}, "wrong_shape", r"b has shape \(2, 3\), expected \(3, 2\)"),
        ({"a": torch.zeros(0)}, "wrong_shape", r"a has shape \(0,\)"),
        ({"a": torch.tensor([0.0, float("nan"), 0, 0])}, "not_finite", "a holds NaN or infinity"),
        ({"a": torch.tensor([0.0, -1.1e9, 0, 0])}, "not_finite", r"or a value above 1e\+09 in size"),
        ({"b": torch.full((3, 2), float("inf"))}, "not_finite", "b holds NaN or infinity"),
        ({"a": torch.tensor([0.0, 0, 0, float("-inf")])}, "not_finite", "a holds NaN or infinity"),
    ],
)
def test_anything_else_is_rejected(change: dict[str, torch.Tensor | None], code: str, message: str) -> None:
    given = {name: tensor for name, tensor in (tensors() | change).items() if tensor is not None}
    with pytest.raises(ReplyRejected, match=message) as rejected:
        verify(given, layout_of(tensors()))
    assert rejected.value.code == code


def test_the_layout_is_shape_and_dtype() -> None:
    assert layout_of({"x": torch.zeros(2, 3, dtype=torch.int8)}) == {"x": TensorShape((2, 3), torch.int8)}


def test_the_digest_ignores_order_and_memory_layout() -> None:
    given = tensors()
    assert len(digest(given)) == 64
    assert digest(dict(reversed(given.items()))) == digest(given)
    assert digest({name: tensor.clone() for name, tensor in given.items()}) == digest(given)
    assert digest(given | {"b": given["b"].T.contiguous().T}) == digest(given)
    assert digest({name: torch.nn.Parameter(tensor) for name, tensor in given.items()}) == digest(given)


def test_the_digest_sees_every_difference() -> None:
    given = tensors()
    flipped = given["a"].clone()
    flipped[2] = torch.nextafter(flipped[2], torch.tensor(1e9))
    others = [
        given | {"a": flipped},
        given | {"a": given["a"].double()},
        given | {"a": given["a"].reshape(2, 2)},
        given | {"b": given["b"].T},
        {"a": given["a"]},
        {"a": given["a"], "c": given["b"]},
        given | {"c": torch.zeros(0)},
        {},
    ]
    assert len({digest(given), *map(digest, others)}) == len(others) + 1


def test_a_name_cannot_pose_as_a_tensor() -> None:
    """A name that spells out another tensor's header and bytes must not collide with that tensor."""
    two = {"a": torch.zeros(1), "b": torch.ones(1)}
    one = {"a|(1,)|torch.float32|\x00\x00\x00\x00b": torch.ones(1)}
    assert digest(two) != digest(one)


def test_an_update_is_after_minus_before() -> None:
    before, after = tensors(), {name: tensor + 2 for name, tensor in tensors().items()}
    update = subtract(after, before, frozenset({"b"}))
    assert update.keys() == {"b"}
    torch.testing.assert_close(update["b"], torch.full((3, 2), 2.0))
    moved = add(before, update)
    torch.testing.assert_close(moved["b"], after["b"])
    assert torch.equal(moved["a"], before["a"])
    assert torch.equal(before["b"], tensors()["b"]), "adding leaves its arguments alone"
    assert add(before, {}).keys() == before.keys()


def test_bytes_are_counted_without_framing() -> None:
    assert byte_count(tensors()) == 4 * (6 + 4)
    assert byte_count({"x": torch.zeros(3, dtype=torch.float16)}) == 6
    assert byte_count({}) == 0
