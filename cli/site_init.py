"""`cloister site init`: a site file with every line of the policy in it, and what each means."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import date
from typing import get_args

from conf.schema.strategy import Strategy

__all__ = ["Answers", "site_yaml"]


@dataclass(frozen=True)
class Answers:
    """What was asked."""

    name: str
    data: str
    columns: str
    published_records: int
    model: str
    base_digest: str | None
    epsilon: float
    delta: float
    expires: date | None
    state: str
    superlink: str | None
    root_certificates: str | None


def site_yaml(answers: Answers) -> str:
    """Return the site file."""
    bases = "null  # any digest, as long as it lies at model_path"
    if answers.base_digest is not None:
        bases = f"[{answers.base_digest}]"
    return _TEMPLATE.format(
        name=_quoted(answers.name),
        data=_quoted(answers.data),
        columns=_quoted(answers.columns),
        published_records=answers.published_records,
        model=_quoted(answers.model),
        bases=bases,
        strategies=", ".join(each.model_fields["kind"].default for each in get_args(get_args(Strategy)[0])),
        epsilon=f"{answers.epsilon:g}",
        delta=f"{answers.delta:.3g}" if "." in f"{answers.delta:.3g}" else f"{answers.delta:.1e}",
        expires=answers.expires.isoformat() if answers.expires else "null",
        state=_quoted(answers.state),
        node=_node(answers),
    )


def _node(answers: Answers) -> str:
    if answers.superlink is None:
        return (
            "# node:                       # the SuperNode; needed by `cloister site start`\n#   superlink: host:port\n"
        )
    certificate = "null" if answers.root_certificates is None else _quoted(answers.root_certificates)
    return (
        "node:                         # the SuperNode, `cloister site start`\n"
        f"  superlink: {_quoted(answers.superlink)}\n"
        f"  root_certificates: {certificate}     # the CA of the server; null: the system's\n"
        "  private_key: null           # node authentication; the server must know the public key\n"
        "  user: null                  # another operating-system user (root only); then set serve.socket too\n"
    )


def _quoted(text: str) -> str:
    """Return a YAML string: JSON is YAML, whatever the text holds."""
    return json.dumps(text, ensure_ascii=False)


_TEMPLATE = """\
# A site's own file. No server can change or weaken it; the stricter of this file and an instruction holds.
# Everything not listed is in conf/schema/site.py. Check it with: cloister site check
name: {name}
published_records: {published_records}    # public, rounded up; the true count stays a secret
# published_users: 200        # to take part in user-level runs; needs data.user_column
# trained_rank: 8             # the most LoRA rank trained here, where the strategy can mix ranks
# memory_mib: 2048            # the same by memory: of the adapter and its training, beside the base
model_path: {model}
task: {{kind: causal_lm}}

data:                         # stays here
  source: {{path: {data}}}
  columns: {{kind: {columns}}}  # text, instruction, chat, prompt_completion or labelled; then the columns' names
  # user_column: patient      # who a record is about: the privacy unit of user-level runs
  # split_column: split       # keeps held-out records out of training

budget:                       # of each record (or user), over all runs of all servers together
  unit: record                # or user
  epsilon: {epsilon}
  delta: {delta}
  expires: {expires}          # last day on which it may be spent

policy:                       # without this section nothing is allowed
  require_approval: true      # cloister site pending; cloister site approve DIGEST
  privacy_modes: [example_level, user_level]
  allow_no_privacy: false
  trust_server_noise: false   # client-level runs without protection of this site's own
  min_noise_multiplier: 0.3
  max_clip_norm: 10.0
  max_epsilon_per_run: {epsilon}
  max_epsilon_per_round: null # null: the run's limit
  release_noisy_loss: true    # with noise, and charged to the budget
  release_training_loss: false
  bases: {bases}
  dtypes: [fp32, bf16]        # precision of the base; fp16 overflows
  strategies: [{strategies}]
  objectives: null            # local objectives; null any
  server_optimizers: null     # the server's business, after the noise; null any
  robust_rules: null          # the same
  quantization: []            # codecs an update may leave in; [] plain float32 alone, null any
  max_rounds: 200
  max_steps_per_round: 200
  max_rank: 64
  hours: null                 # or {{timezone: Europe/Berlin, days: [mon, tue], start: "20:00", end: "06:00"}}

state_directory: {state}      # keys, ledger, stored replies: back it up
log_level: info

serve:                        # this site's own process, `cloister site serve`
  stop_grace_s: 30
{node}"""
