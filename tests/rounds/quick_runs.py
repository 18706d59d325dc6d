"""The settings of runs in which only what becomes of messages matters."""

QUICK = (
    "experiment=smoke",
    "privacy=none",
    "data.max_records=60",
    "data.max_length=64",
    "federation.rounds=2",
    "federation.local.steps=1",
    "federation.local.expected_batch_size=8",  # an empty draw, whose update is zero, is as good as impossible
    "evaluation.every=0",
    "runtime.threads=1",
)
