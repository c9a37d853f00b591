"""What users give to :class:`~capkv_local.Llama`: checked, with its defaults."""

from __future__ import annotations

from typing import Any, Literal

import llama_cpp

from capkv_local import native
from capkv_local.budget.allocate import get_allocator
from capkv_local.budget.parse import parse_budget
from capkv_local.cache.compact import evicts, fewest_cells
from capkv_local.errors import BudgetError, PolicyError, UnsupportedModel
from capkv_local.plan.planner import Settings
from capkv_local.policies import Policy

Budget = int | float | str
Observe = Literal["tail", "probe"]

DEFAULT_BUDGET = 2048


def allocation_name(name: str | None, policy: Policy) -> str:
    """An allocation that there is; None is what suits the policy."""
    if name is None:
        name = str(getattr(policy, "allocation", "uniform"))
    get_allocator(name)
    return name


def budget_cells(value: Budget | None, n_ctx: int, bytes_per_cell: int, policy: Policy) -> int:
    """Cells per head that a budget means; a policy that never evicts has them all."""
    if not evicts(policy):
        return n_ctx
    return parse_budget(
        min(DEFAULT_BUDGET, n_ctx) if value is None else value,
        n_ctx=n_ctx,
        bytes_per_cell=bytes_per_cell,
        minimum=fewest_cells(policy),
    )


def session_settings(n_ctx: int, n_batch: int, kv_room: int, kwargs: dict[str, Any]) -> Settings:
    """What of the arguments decides the memory of a session."""
    return Settings(
        n_ctx,
        type_k=native.cache_type_name(kwargs.get("type_k")),
        type_v=native.cache_type_name(kwargs.get("type_v")),
        n_batch=n_batch,
        n_ubatch=kwargs.get("n_ubatch", 512),
        kv_room=kv_room,
        swa_full=kwargs.get("swa_full"),
        logits_all=bool(kwargs.get("logits_all")),
    )


def check_observe(kv_observe: str, policy: Policy) -> None:
    """See that the policy finds what it needs; else :class:`PolicyError`."""
    if kv_observe not in ("tail", "probe"):
        raise PolicyError(f"kv_observe={kv_observe!r} must be 'tail' or 'probe'")
    if kv_observe == "tail" and "probe" in policy.needs:
        raise PolicyError(f"policy '{policy.name}' needs kv_observe='probe'")


def check_settings(flash_attn: bool | None, kwargs: dict[str, Any], kv_room: int) -> None:
    """See that rows can be evicted per head with these arguments."""
    if flash_attn is False:
        raise UnsupportedModel(
            "flash_attn=False stores values transposed, which cannot be evicted per head: "
            "leave flash_attn out, or use kv_policy=None"
        )
    if kwargs.get("split_mode") == llama_cpp.LLAMA_SPLIT_MODE_TENSOR:
        raise UnsupportedModel(
            "split_mode=LLAMA_SPLIT_MODE_TENSOR shares the heads of every layer out over the "
            "devices, which a cache of rows per head does not follow: leave split_mode out (whole "
            "layers), or use kv_policy=None"
        )
    if kwargs.get("embedding"):
        raise UnsupportedModel("embedding=True needs the stock cache: use kv_policy=None")
    if kv_room < 0:
        raise BudgetError(f"kv_room={kv_room} must be 0 or more cells")
