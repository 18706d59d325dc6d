"""Our weighted mean against Flower's own FedAvg on the same arrays."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from strategies.base import Contribution
from strategies.mean import WeightedMean

SHAPES = {"q.lora_A.weight": (4, 32), "q.lora_B.weight": (32, 4), "score.weight": (3, 32), "score.bias": (3,)}


def update(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def reply(node: int, tensors: dict[str, torch.Tensor], examples: int) -> Message:
    asked = Message(RecordDict({"config": ConfigRecord({})}), node, MessageType.TRAIN)
    # What Flower's runtime sets when it sends a message, and requires of one that is answered.
    asked.metadata._message_id = f"message-{node}"
    content = RecordDict(
        {
            "arrays": ArrayRecord(OrderedDict((name, Array(tensor.numpy())) for name, tensor in tensors.items())),
            "metrics": MetricRecord({"num-examples": examples}),
        }
    )
    return Message(content, reply_to=asked)


@pytest.mark.parametrize("counts", [(10, 10, 10), (1, 250, 37), (5,), (3, 1, 4, 1, 5, 9, 2, 6)])
def test_weighted_mean_equals_flowers_fedavg(counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for field, value in (("_run_id", 1), ("_node_id", 0), ("_task_id", 1)):
        monkeypatch.setattr(TaskIdentity, field, value)
    updates = [update(seed) for seed in range(len(counts))]
    ours = WeightedMean()
    for each, count in zip(updates, counts, strict=True):
        ours.accumulate(Contribution(each, count))
    replies = [reply(node, each, count) for node, (each, count) in enumerate(zip(updates, counts, strict=True), 1)]
    arrays, _ = FedAvg().aggregate_train(1, replies)
    assert arrays is not None
    theirs = {name: array.numpy() for name, array in arrays.items()}
    result = ours.result()
    assert result.keys() == theirs.keys()
    for name, tensor in result.items():
        np.testing.assert_allclose(tensor.numpy(), theirs[name], rtol=1e-5, atol=1e-6)
    if len(set(counts)) > 1:
        plain = torch.stack([each["score.weight"] for each in updates]).mean(0)
        assert not torch.allclose(plain, result["score.weight"], atol=1e-3), "the weights make no difference"
