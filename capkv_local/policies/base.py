"""What a policy is, how one is found by name, and the few array helpers that policies share.

A policy turns statistics of the cached cells into scores; it never touches the cache. The
statistics come through :class:`KVStats`, so a policy runs on the native cache, on plain arrays or
on another library's cache alike. To add one, put a file with a ``@register`` class in this
package: nothing else has to change.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from capkv_local.errors import PolicyError, unknown_name

F32 = NDArray[np.float32]
Reduce = Literal["mean", "max", "second_moment"]

NEEDS = frozenset({"queries", "mean_query", "probe"})
"""What a policy may ask to have observed during prefill; ``"probe"``: it cannot do without."""


class KVStats(Protocol):
    """Statistics of the cached cells of one sequence, fetched when asked for.

    Attributes
    ----------
    n_layer, n_head_kv, n_head, n_cells : int
        Shape of the cache; query head ``h`` reads KV head ``h // (n_head // n_head_kv)``.
    n_tokens : int
        Logical tokens seen so far, at positions ``0 .. n_tokens - 1``; at least ``n_cells``.
    n_queries : int
        Queries in the observation window.
    positions : int32 [n_layer, n_head_kv, n_cells]
        Token position that each cell holds, ascending along the cells. Heads may hold different
        numbers of cells; a head that holds fewer lacks the first ones: they are -1, and 0 in all
        statistics. Their scores do not matter.
    carried : float32 [n_layer, n_head_kv, n_cells] or None
        What this policy handed to :meth:`carry` in the round before, moved with its cells; 0 for
        cells that are new since, None in the first round.
    """

    @property
    def n_layer(self) -> int: ...
    @property
    def n_head_kv(self) -> int: ...
    @property
    def n_head(self) -> int: ...
    @property
    def n_cells(self) -> int: ...
    @property
    def n_tokens(self) -> int: ...
    @property
    def n_queries(self) -> int: ...
    @property
    def positions(self) -> NDArray[np.int32]: ...
    @property
    def carried(self) -> F32 | None: ...

    def window_attention(self, *, reduce: Reduce = "mean", per_query_head: bool = False) -> F32:
        """Attention of the observed queries on every cell, softmax over all cells, causal.

        Returns
        -------
        float32 [n_layer, n_head_kv, n_cells], or [n_layer, n_head, n_cells] per query head
            Over the window's queries: mean of a, max of a or mean of a²; averaged over the
            query heads of a KV head unless `per_query_head`.
        """

    def probe_attention(self, *, reduce: Reduce = "mean") -> F32 | None:
        """Attention while the text since the last round is repeated; None if nothing repeats it.

        The softmax is over all cells and the repetition itself, as far as it has come.

        Returns
        -------
        float32 [n_layer, n_head_kv, n_cells] or None
            Sum of a, sum of a² or maximum of a over the repeated tokens; sums are averaged over
            the query heads of a KV head, the maximum is over them. Each `reduce` repeats anew.
        """

    def anchor(self, *, kind: Literal["cosine", "dot"] = "cosine", n_future: int = 512) -> F32:
        """Alignment of the mean query with every cached key.

        The mean of the un-rotated queries (first ``n_sinks`` tokens left out) is rotated by the
        RoPE averaged over positions ``n_tokens .. n_tokens + n_future - 1``. ``"dot"`` carries
        the model's attention scale.

        Returns
        -------
        float32 [n_layer, n_head, n_cells]
        """

    def key_norm(self) -> F32:
        """Euclidean norm of the cached keys, float32 [n_layer, n_head_kv, n_cells]."""

    def value_norm(self) -> F32:
        """Euclidean norm of the cached values, float32 [n_layer, n_head_kv, n_cells]."""

    def key_cosine(self) -> F32:
        """Cosine of each key with the mean of the unit keys, [n_layer, n_head_kv, n_cells]."""

    def leverage(
        self, of: Literal["key", "value"], weights: F32 | None = None, noise: float = 1.0
    ) -> F32:
        """Ridge leverage ``w_i u_i' (noise I + sum_j w_j u_j u_j')^-1 u_i`` of every cell.

        Parameters
        ----------
        of
            Which rows of the cache are ``u``.
        weights
            float32 [n_layer, n_head_kv or n_head, n_cells], not negative; None means all 1. A
            cell of weight 0 is out of the sum and scores 0. Scores of weights per query head are
            averaged over the query heads of a KV head.
        noise
            Ridge, in units of ``w ||u||²``.

        Returns
        -------
        float32 [n_layer, n_head_kv, n_cells], each in [0, 1)
        """

    def carry(self, relevance: F32) -> None:
        """Keep this relevance, [n_layer, n_head_kv, n_cells], with its cells for next round."""


@runtime_checkable
class Policy(Protocol):
    """What the eviction loop asks of a policy; see :class:`BasePolicy` for the usual start."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]

    @property
    def n_sinks(self) -> int: ...
    @property
    def n_recent(self) -> int: ...
    @property
    def n_window(self) -> int: ...

    def score(self, stats: KVStats) -> F32:
        """Score every cell, float32 [n_layer, n_head_kv, n_cells]; higher means keep."""


@dataclasses.dataclass(frozen=True)
class BasePolicy:
    """Fields that every policy has, checked when the policy is made.

    Parameters
    ----------
    n_sinks
        First cells, kept by every head whatever their score.
    n_recent
        Last cells, kept by every head whatever their score.
    n_window
        How many of the last queries are observed (only for policies that need queries).

    Raises
    ------
    PolicyError
        On a field out of range.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    evicts: ClassVar[bool] = True
    # Default way to share the budget among heads, a name of capkv_local.budget.allocate.
    allocation: ClassVar[str] = "uniform"

    n_sinks: int = 4
    n_recent: int = 32
    n_window: int = 64

    def __post_init__(self) -> None:
        self._require("n_sinks", self.n_sinks >= 0, "0 or more")
        # The newest cell has to stay: the next token is decoded against it.
        self._require("n_recent", self.n_recent >= 1, "1 or more")
        self._require("n_window", self.n_window >= 1, "1 or more")

    @property
    def n_recent_probed(self) -> int:
        """Last cells that are kept where the text is repeated, at most ``n_recent``."""
        return self.n_recent

    def _require(self, field: str, ok: bool, allowed: str) -> None:
        """Raise PolicyError unless `ok`, naming the field, its value and what is allowed."""
        if not ok:
            value = getattr(self, field)
            raise PolicyError(f"Policy '{self.name}': {field}={value!r} must be {allowed}.")


# --- registry ---------------------------------------------------------------------------------

_POLICIES: dict[str, type[Any]] = {}
_PolicyClass = TypeVar("_PolicyClass", bound=type[BasePolicy])


def register(cls: _PolicyClass) -> _PolicyClass:
    """Make a policy findable by its ``name``; use as a class decorator above ``@dataclass``.

    Raises
    ------
    PolicyError
        If the name is taken by another class, or `cls` lacks a name or a ``score``, or needs
        something that nobody observes.
    """
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not callable(getattr(cls, "score", None)):
        raise PolicyError(f"{cls.__qualname__} is no policy: give it a 'name' and a 'score'.")
    if unknown := cls.needs - NEEDS:
        raise PolicyError(
            f"Policy '{name}' needs {sorted(unknown)}; only {sorted(NEEDS)} can be observed."
        )
    taken = _POLICIES.get(name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (
        cls.__module__,
        cls.__qualname__,
    ):
        raise PolicyError(
            f"Policy name '{name}' is taken by {taken.__module__}.{taken.__qualname__}: "
            f"choose another for {cls.__qualname__}."
        )
    _POLICIES[name] = cls
    return cls


def policy_names() -> list[str]:
    """Names that :func:`get_policy` knows, in alphabetical order."""
    return sorted(_POLICIES)


def get_policy(policy: str | Policy, **params: Any) -> Policy:
    """Make a policy from its name, or check one that is already made.

    Parameters
    ----------
    policy
        A name of :func:`policy_names`, or an object with the attributes of :class:`Policy`.
    **params
        Fields to set, e.g. ``n_recent=128``; on an object they give a changed copy.

    Raises
    ------
    PolicyError
        Unknown name or field, field out of range, or an object that is no policy.

    Examples
    --------
    >>> from capkv_local.policies import get_policy
    >>> get_policy("snapkv", n_recent=128).n_recent
    128
    """
    if isinstance(policy, str):
        cls = _find(policy)
        _check_fields(policy, cls, params)
        return _made(policy, lambda: cls(**params))
    if isinstance(policy, type) or not isinstance(policy, Policy):
        raise PolicyError(
            f"{policy!r} is no policy: pass a name ({', '.join(policy_names())}) or an object "
            "with name, needs, n_sinks, n_recent, n_window and score(stats)."
        )
    if not params:
        return policy
    if not dataclasses.is_dataclass(policy):
        raise PolicyError(f"Policy '{policy.name}' is no dataclass: set {sorted(params)} yourself.")
    _check_fields(policy.name, type(policy), params)
    made = policy
    return _made(policy.name, lambda: dataclasses.replace(made, **params))


def _find(name: str) -> type[Policy]:
    if name in _POLICIES:
        found: type[Policy] = _POLICIES[name]
        return found
    raise PolicyError(unknown_name("policy", name, policy_names()))


def _check_fields(name: str, cls: type, params: dict[str, Any]) -> None:
    fields = [field.name for field in dataclasses.fields(cls) if field.init]
    for param in params:
        if param not in fields:
            raise PolicyError(
                f"Policy '{name}' has no field '{param}': it has {', '.join(fields)}."
            )


def _made(name: str, make: Any) -> Policy:
    try:
        made: Policy = make()
    except TypeError as error:  # a field compared with a value of the wrong type
        raise PolicyError(f"Policy '{name}' cannot be made: {error}.") from error
    return made


# --- helpers for policies ---------------------------------------------------------------------


def pool_cells(x: NDArray[Any], kernel: int, *, kind: Literal["mean", "max"] = "mean") -> F32:
    """Smooth along the cells (last axis) with a centred window, same length.

    Parameters
    ----------
    x
        [..., n_cells], not negative.
    kernel
        Odd number of cells; 1 changes nothing.
    kind
        ``"mean"`` counts cells beyond the ends as zeros, ``"max"`` ignores them.

    Returns
    -------
    float32, shape of `x`
    """
    if kernel == 1:
        return np.asarray(x, np.float32)
    if x.ndim > 2:  # layer by layer: what is in between is in float64
        return np.stack([pool_cells(layer, kernel, kind=kind) for layer in x])
    half, n = kernel // 2, x.shape[-1]
    padded = np.pad(x.astype(np.float64), [(0, 0)] * (x.ndim - 1) + [(half, half)])
    pooled = padded[..., :n].copy()
    combine = np.maximum if kind == "max" else np.add
    # Shifted copies: several times faster than a reduction over windows.
    for i in range(1, kernel):
        shifted = padded[..., i : i + n]
        combine(pooled, shifted, out=pooled)
    return np.asarray(pooled if kind == "max" else pooled / kernel, np.float32)


def group_mean(x: NDArray[Any], n_head_kv: int) -> NDArray[Any]:
    """Average over the query heads of each KV head: [.., n_head, n] to [.., n_head_kv, n]."""
    *lead, n_head, n = x.shape
    mean: NDArray[Any] = x.reshape(*lead, n_head_kv, n_head // n_head_kv, n).mean(axis=-2)
    return mean


def window_mask(stats: KVStats) -> NDArray[np.bool_]:
    """Cells that hold the tokens of the observation window, [n_layer, n_head_kv, n_cells]."""
    mask: NDArray[np.bool_] = stats.positions >= stats.n_tokens - stats.n_queries
    return mask


def exp_below_peak(x: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[Any]:
    """``exp(x - max)`` along the cells in `mask`, 0 outside: a softmax before it is normalised."""
    x = np.where(mask, x, -np.inf)
    out: NDArray[Any] = np.exp(x - x.max(axis=-1, keepdims=True))
    return out


def above_all(scores: NDArray[Any], cells: NDArray[np.bool_] | slice) -> F32:
    """Copy of `scores` with `cells` set to the layer's largest score plus 1: always kept.

    Parameters
    ----------
    scores
        [n_layer, n_head_kv, n_cells]
    cells
        Mask of the shape of `scores`, or a slice of the last axis.
    """
    out = np.array(scores, np.float32)
    for index, layer in enumerate(out):
        mask = np.zeros(layer.shape, bool)
        if isinstance(cells, slice):
            mask[..., cells] = True
        else:
            mask |= cells[index]
        rest = np.where(mask, np.float32(-np.inf), layer).max()
        layer[mask] = (rest if np.isfinite(rest) else np.float32(0)) + np.float32(1)
    return out
