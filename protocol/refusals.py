"""Why a site says no: each code, the one sentence that a server is told with it, and what to do.

The sentence is fixed. Nothing of the records, the site file or an exception is ever added to it, so a refusal tells a
server the code and no more; the figures are in the site's own log. `docs/errors.md` holds the same table.

Beside them, the codes of what a server finds in a reply. `protocol.errors` takes no other code for a refusal, and
`tests/unit/protocol/test_refusals.py` finds the others in the source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["REFUSALS", "REJECTIONS", "Refusal", "sentence"]


@dataclass(frozen=True)
class Refusal:
    """What is told, and what whoever reads the site's or the server's log can do."""

    told: str
    fix: str


REFUSALS: Mapping[str, Refusal] = {
    # the plan against the site's policy
    "no_policy": Refusal(
        "this site's file has no policy, so nothing is allowed",
        "site: write the `policy` section (`cloister site init` makes one)",
    ),
    "no_privacy": Refusal(
        "this site takes no part in runs that protect nothing",
        "server: set privacy; site: `policy.allow_no_privacy`",
    ),
    "mode_not_allowed": Refusal(
        "this site's policy does not allow the plan's kind of privacy",
        "server: another `privacy`; site: `policy.privacy_modes`",
    ),
    "no_trust_in_server_noise": Refusal(
        "this site does not leave the noise to the server",
        "server: set `privacy.local`; site: `policy.trust_server_noise`",
    ),
    "insecure_seed": Refusal(
        "this site takes no part in runs with repeatable noise",
        "server: `privacy.insecure_seed=null`; the setting is for simulations",
    ),
    "noise_too_small": Refusal(
        "the plan's noise is below what this site's policy demands",
        "server: a smaller ε or more noise; site: `policy.min_noise_multiplier`",
    ),
    "clip_norm_too_large": Refusal(
        "the plan's clip norm is above what this site's policy allows",
        "server: a smaller `clip_norm`; site: `policy.max_clip_norm`",
    ),
    "epsilon_per_run": Refusal(
        "the whole run would cost more than this site's policy allows one run",
        "server: a smaller ε, fewer rounds; site: `policy.max_epsilon_per_run`",
    ),
    "epsilon_per_round": Refusal(
        "a round would cost more than this site's policy allows one round",
        "server: fewer steps a round, more noise; site: `policy.max_epsilon_per_round`",
    ),
    "loss_not_allowed": Refusal(
        "this site's policy keeps the training loss, noised or not",
        "server: `privacy.loss_noise_multiplier=null`; site: `policy.release_noisy_loss`",
    ),
    "wrong_task": Refusal(
        "the plan's task is not this site's own",
        "make `task` of the site file and of the experiment equal, labels and their order included",
    ),
    "dtype_not_allowed": Refusal(
        "this site's policy does not allow the precision that the plan computes in",
        "server: `model.dtype=fp32`; site: `policy.dtypes`",
    ),
    "strategy_not_allowed": Refusal(
        "this site's policy does not allow the plan's strategy",
        "server: another `strategy`; site: `policy.strategies`",
    ),
    "objective_not_allowed": Refusal(
        "this site's policy does not allow the plan's objective",
        "server: another `objective`; site: `policy.objectives`",
    ),
    "server_rule_not_allowed": Refusal(
        "this site's policy does not allow how the server combines or steps",
        "server: another `server_optimizer` or `robust`; site: `policy.server_optimizers`, `policy.robust_rules`",
    ),
    "quantization_not_allowed": Refusal(
        "this site's policy does not allow the plan's quantization",
        "server: another `quantization`; site: `policy.quantization`",
    ),
    "base_not_allowed": Refusal(
        "this site's policy does not allow the plan's base",
        "site: compare `policy.bases` with the digest that `cloister site check` prints",
    ),
    "too_many_rounds": Refusal(
        "the plan has more rounds than this site's policy allows",
        "server: fewer `federation.rounds`; site: `policy.max_rounds`",
    ),
    "too_many_steps": Refusal(
        "the plan has more steps per round than this site's policy allows",
        "server: fewer `federation.local.steps`; site: `policy.max_steps_per_round`",
    ),
    "rank_too_large": Refusal(
        "the plan's LoRA rank is above what this site's policy allows",
        "server: a smaller `peft.rank`; site: `policy.max_rank`",
    ),
    "rank_above_limit": Refusal(
        "the plan's LoRA rank is above what this site trains, and the strategy cannot combine different ranks",
        "server: a strategy that takes ranks (docs/strategies.md), or a smaller `peft.rank`; site: `trained_rank`, "
        "`memory_mib`",
    ),
    "round_out_of_plan": Refusal("the round is beyond the rounds of the plan", "a fault of the server; report it"),
    "outside_hours": Refusal(
        "this site works at other hours", "server: try again later, with more `reply_timeout_s`; site: `policy.hours`"
    ),
    "not_approved": Refusal(
        "somebody at this site must approve the experiment first",
        "site: `cloister site pending`, then `cloister site approve DIGEST`; server: run it again",
    ),
    # the budget
    "no_budget": Refusal(
        "this site has no privacy budget",
        "site: set `budget` in the site file, or `site_budget` if the server adds the noise",
    ),
    "wrong_unit": Refusal(
        "this site's budget counts another unit than the plan protects",
        "server: example_level for records, user_level for users; site: `budget.unit`",
    ),
    "no_users": Refusal(
        "this site publishes no count of users, so it takes no part in user-level runs",
        "site: `published_users` and `data.user_column`",
    ),
    "budget_exceeded": Refusal(
        "the round would exceed this site's budget",
        "nothing was trained. The run cannot go on here; a higher budget is the site's decision "
        "(`cloister ledger set-budget`)",
    ),
    "budget_expired": Refusal(
        "this site's budget has expired", "site: a new `expires` in `budget` or `site_budget`, if that is decided"
    ),
    "no_release_claim": Refusal(
        "the server does not say how it noises the sum, so this site cannot book it",
        "server and site differ in version, or the server is not Cloister's",
    ),
    "wrong_release_claim": Refusal(
        "what the server says of its noise does not fit the plan",
        "server and site differ in version, or the server is not Cloister's",
    ),
    "delta_below_budget": Refusal(
        "the plan asks for a smaller delta than this site keeps its budget at",
        "server: the sites' δ, or null; site: `site_budget.delta`",
    ),
    "participation_limit": Refusal(
        "this site has taken part in the run as often, or as lately, as the plan's noise allows",
        "a fault of the server, which keeps to these limits itself; report it",
    ),
    "round_repeated": Refusal(
        "this site has answered the round already, from other inputs or with another result",
        "correlated noise must not lie on two sums: server: start a new run",
    ),
    # the site's own condition
    "busy": Refusal(
        "this site is at work on another instruction",
        "wait for it, or stop the other run; one site file serves one run at a time",
    ),
    "stopping": Refusal("this site is shutting down", "site: start `cloister site serve` again"),
    "ledger_unusable": Refusal(
        "this site's ledger cannot be used",
        "site: `cloister ledger verify --site site.yaml`, with a `site_budget` also `--ledger STATE/site_ledger.db` "
        "(STATE: `state_directory`); restore the newest copy, keys and heads included",
    ),
    "ledger_set_back": Refusal(
        "this site's ledger lacks an entry that the site stated before",
        "site: restore the newest copy of state_directory; an older one would forget what was spent since",
    ),
    "clock": Refusal(
        "this site's clock is behind its own ledger",
        "site: set the clock (NTP); `cloister site check` compares",
    ),
    "no_space": Refusal("this site has too little disk space", "site: free the disk of `state_directory`"),
    "site_error": Refusal(
        "the site could not do it; its own log says why",
        "site: read the log of `cloister site serve`; `cloister site check` finds most causes",
    ),
    # the relay to the site's process
    "no_site": Refusal(
        "this node has no site; start it with: cloister site start --config site.yaml",
        "site: start the SuperNode that way; it names the socket to the relay",
    ),
    "site_down": Refusal(
        "this node's site process does not answer", "site: start `cloister site serve --config site.yaml`"
    ),
    "site_silent": Refusal(
        "this node's site process stopped answering", "site: the process hangs; read its log, then restart it"
    ),
    # the instruction itself
    "malformed_instruction": Refusal(
        "the instruction cannot be read", "server and site differ in version, or the server sent something else"
    ),
    "oversized_frame": Refusal(
        "the message is larger than this site accepts", "site: `serve.max_message_mib`, if the adapter is that large"
    ),
    "plan_digest": Refusal("the plan does not match its digest", "server and site differ in version; compare them"),
    "adapter_digest": Refusal(
        "the adapter does not match its digest", "server and site differ in version, or the adapter was damaged"
    ),
    "wrong_base": Refusal(
        "this site's base is another than the server's", "install the same model files on both ends; compare digests"
    ),
    "unknown_reference": Refusal(
        "this site does not hold the adapter that a change was sent of",
        "nothing: the server sends the whole adapter in its next round",
    ),
    "replay_mismatch": Refusal(
        "this round of this run was answered already, for another instruction or on other records",
        "server: start a run under a new name; nothing more is answered for that round",
    ),
    "malformed_payload": Refusal(
        "the adapter, or a change of it, does not decode", "server and site differ in version, or it was damaged"
    ),
    "missing_tensor": Refusal("the adapter lacks a tensor", "model, PEFT settings or version differ"),
    "unknown_tensor": Refusal("the adapter has a tensor too many", "model, PEFT settings or version differ"),
    "wrong_dtype": Refusal("a tensor of the adapter is not float32", "server and site differ in version"),
    "wrong_shape": Refusal("a tensor of the adapter has another shape", "model, PEFT settings or version differ"),
    "not_finite": Refusal(
        "the adapter holds NaN, infinity, or a value that no training gives",
        "server: the run has diverged; lower the learning rate",
    ),
}

REJECTIONS = frozenset(
    {
        "no_reply",
        "not_sent",
        "flower_error",
        "refused",
        "malformed_reply",
        "malformed_card",
        "wrong_key",
        "malformed_payload",
        "wrong_site",
        "wrong_round",
        "wrong_plan_digest",
        "wrong_base_digest",
        "wrong_adapter_digest",
        "wrong_steps",
        "wrong_metric",
        "missing_tensor",
        "unknown_tensor",
        "wrong_dtype",
        "wrong_shape",
        "not_finite",
        "no_loss",
        "norm_above_clip",
        "missing_bit",
        "stale",
    }
)
"""What a server finds in a reply, or in place of one. What to do is in docs/errors.md alone."""


def sentence(code: str) -> str:
    """Return what a server is told with a code; an unknown code says as little as `site_error`."""
    return REFUSALS.get(code, REFUSALS["site_error"]).told
