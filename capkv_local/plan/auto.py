"""``kv_budget="auto"``: as many cells as the machine has room for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from capkv_local.errors import BudgetError
from capkv_local.models.header import ModelHeader
from capkv_local.plan.memory import SHARE, available_memory
from capkv_local.plan.planner import Planner, Settings


def auto_budget(model: str | Path, settings: Settings, *, offloads: bool) -> int:
    """The budget that ``kv_budget="auto"`` stands for.

    The largest multiple of :data:`~capkv_local.plan.planner.STEP` cells with which the session
    takes no more than :data:`~capkv_local.plan.memory.SHARE` of the memory that is available before
    the model is loaded; the context itself if all of it fits.

    Parameters
    ----------
    model, settings
        As they will be loaded; an ``n_ctx`` of 0 is the trained context.
    offloads
        Whether layers go to other devices, whose memory is not counted here.

    Raises
    ------
    BudgetError
        Not even the smallest budget fits, or layers go to a device.
    ModelFileError, UnsupportedModel
        As :class:`~capkv_local.models.header.ModelHeader` and
        :class:`~capkv_local.plan.planner.Planner`.
    """
    if offloads:
        raise BudgetError(
            "kv_budget='auto' knows the main memory only, and layers go to other devices: name a "
            "number of cells (2048) or an amount of memory ('512MiB')"
        )
    with ModelHeader(model) as header:
        if settings.n_ctx == 0:
            settings = replace(settings, n_ctx=header.n_ctx_train)
        # What this program takes is not available any more.
        planner = Planner(header, settings, program=0)
        memory = int(SHARE * available_memory())
        budget = planner.largest_budget(memory)
        if budget is None:
            least = planner.need(planner.least_budget)
            raise BudgetError(
                f"kv_budget='auto': {planner.least_budget} cells need "
                f"{least.total / 2**20:,.0f} MiB ({least.weights / 2**20:,.0f} for the weights), "
                f"and {memory / 2**20:,.0f} MiB can be used ({SHARE:.0%} of what is available): "
                "close other programs, or use a smaller model or cache type (type_k, type_v)"
            )
        return budget
