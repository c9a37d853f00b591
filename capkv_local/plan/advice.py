"""What to take: cache type and budget for a model, a context and a memory, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from capkv_local.errors import UnsupportedModel
from capkv_local.models.header import ModelHeader
from capkv_local.plan.measured import MEASURED, Measured
from capkv_local.plan.planner import STEP, Need, Planner, Settings
from capkv_local.policies import get_policy

TYPES = ("f16", "q8_0", "q4_0")


@dataclass(frozen=True)
class TypeFit:
    """What fits with one cache type: without eviction, and with it; None: nothing."""

    type: str
    bytes_per_token: int
    whole: Need
    largest_context: int | None
    largest_budget: int | None


@dataclass(frozen=True)
class BudgetFit:
    """What a budget takes, and what was measured at about this share of the cells."""

    budget: int
    need: Need
    fits: bool
    measured: Measured | None


@dataclass(frozen=True)
class Choice:
    """A session that fits. ``budget`` None: all cells are kept (policy ``full``)."""

    type: str
    budget: int | None
    n_ctx: int
    need: Need

    def options(self) -> list[str]:
        """Options of ``capkv chat``."""
        kept = ["--policy", "full"] if self.budget is None else ["--budget", str(self.budget)]
        types = [] if self.type == "f16" else ["--type-k", self.type, "--type-v", self.type]
        return ["--n-ctx", str(self.n_ctx), *kept, *types]


@dataclass(frozen=True)
class Advice:
    """All answers for one model, context and memory; ``shape`` is that of what is evicted."""

    shape: dict[str, int]
    types: Sequence[TypeFit]
    table_type: str
    budgets: Sequence[BudgetFit]
    choice: Choice | None
    least: Choice


def advise(header: ModelHeader, n_ctx: int, memory: int) -> Advice:
    """Plan a chat: policy ``capkv`` with a probe.

    The first of these that fits, in the order of what was measured to be lost (docs/evaluation.md,
    "With quantised rows"): all cells in f16, all in q8_0, half of them or more in q8_0, all in
    q4_0, as many as fit in q8_0, as many as fit in q4_0.

    Parameters
    ----------
    header
        The model.
    n_ctx
        Tokens that document and conversation have together.
    memory
        Bytes that there are, for weights and all.

    Raises
    ------
    UnsupportedModel
        The model cannot be evicted per head.
    """
    settings = Settings(n_ctx).with_policy(get_policy("capkv"), probe=True)
    first = Planner(header, settings)  # says why, if the model is not supported
    planners = {}
    for name in TYPES:
        try:
            planners[name] = first.using(type_k=name, type_v=name)
        except UnsupportedModel:  # heads that are no multiple of the type's blocks
            continue
    types = [_type_fit(name, planner, memory) for name, planner in planners.items()]
    choice = _choose({fit.type: fit for fit in types}, planners, memory)
    table_type = choice.type if choice else types[-1].type
    planner = planners[table_type]
    budgets = [_budget_fit(m, planner, memory) for m in MEASURED if m.share * n_ctx >= STEP]
    names = ("n_layer", "n_head_kv", "n_head", "n_embd_head_k", "n_embd_head_v")
    shape = {name: int(getattr(first.cache, name)) for name in names}
    return Advice(shape, types, table_type, budgets, choice, _least(planners[types[-1].type]))


def _type_fit(name: str, planner: Planner, memory: int) -> TypeFit:
    n_ctx = planner.settings.n_ctx
    return TypeFit(
        type=name,
        bytes_per_token=planner.bytes_per_cell,
        whole=planner.whole(n_ctx).need(n_ctx),
        largest_context=planner.largest_context(memory),
        largest_budget=planner.largest_budget(memory),
    )


def _choose(fits: dict[str, TypeFit], planners: dict[str, Planner], memory: int) -> Choice | None:
    def whole(name: str) -> Choice | None:
        if name not in fits or fits[name].whole.total > memory:
            return None
        return Choice(name, None, planners[name].settings.n_ctx, fits[name].whole)

    def part(name: str, least: float = 0) -> Choice | None:
        budget = fits[name].largest_budget if name in fits else None
        if budget is None or budget < least * planners[name].settings.n_ctx:
            return None
        return Choice(name, budget, planners[name].settings.n_ctx, planners[name].need(budget))

    return (
        whole("f16")
        or whole("q8_0")
        or part("q8_0", least=0.5)
        or whole("q4_0")
        or part("q8_0")
        or part("q4_0")
        or part("f16")  # heads that no block of the others fits
    )


def _budget_fit(measured: Measured, planner: Planner, memory: int) -> BudgetFit:
    budget = int(measured.share * planner.settings.n_ctx) // STEP * STEP
    need = planner.need(budget)
    return BudgetFit(budget, need, need.total <= memory, measured)


def _least(planner: Planner) -> Choice:
    """The smallest session that there is with this cache type, for this context."""
    budget = planner.least_budget
    return Choice(planner.settings.type_k, budget, planner.settings.n_ctx, planner.need(budget))
