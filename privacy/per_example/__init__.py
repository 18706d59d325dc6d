"""Exact per-example gradients in one ordinary backward pass.

The gradient of a small factor W over a batch is a sum over examples, dW = Σᵢ gᵢᵀ xᵢ. Left unsummed it costs the same
arithmetic. So the forward of every layer that trains is replaced by one whose backward leaves the summands, [examples,
*parameter shape], and never their sum: no weight gradient is computed twice, and one `losses.sum().backward()` does it,
also under gradient checkpointing.

=============  ==========================================================================================
recorder.py    takes the summands during one backward pass, and checks that none is missing or counted twice
linear.py      linear layers (LoRA's A and B, heads) and GPT-2's Conv1D, with their biases
scale.py       layer norms and RMS norms
embedding.py   embeddings, and LoRA on embeddings
dora.py        DoRA's magnitude vector
cores.py       square cores between LoRA's frozen factors
layers.py      which layer has which rule, and the exchange of forwards
=============  ==========================================================================================
"""

from privacy.per_example.layers import IndependentRows, PatchedForwards, couples_examples, layers_without_native_rule
from privacy.per_example.recorder import ONE_BY_ONE, Recorder

__all__ = [
    "ONE_BY_ONE",
    "IndependentRows",
    "PatchedForwards",
    "Recorder",
    "couples_examples",
    "layers_without_native_rule",
]
