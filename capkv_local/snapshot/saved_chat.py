"""What a snapshot of a chat holds, what it is bound to, and how the chat goes on from it.

Bound to: the model, the cache types, the context, how it was observed, and the native functions
that wrote the cells. Another policy, budget or allocation may be asked for on opening.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from capkv_local import __version__, native
from capkv_local.documents.sources import SourceMap
from capkv_local.errors import CapKVError, StateError
from capkv_local.models import fingerprint
from capkv_local.snapshot.file import Array, read_snapshot, write_snapshot

if TYPE_CHECKING:
    from typing_extensions import Self

    from capkv_local.llama import CompactedState, Llama

Place = Literal["start", "user", "answer"]

_AGAIN = "read the documents again"
# What a snapshot cannot go on without, and the option that would change it.
_BOUND = {
    "n_ctx": "--n-ctx",
    "type_k": "--type-k",
    "type_v": "--type-v",
    "kv_observe": "--observe",
    "probe_stride": "--probe-stride",
}


@dataclass(frozen=True)
class SavedSettings:
    """The header of a snapshot; every field is written, and checked when it is read."""

    model: str
    model_fingerprint: str
    kv_policy: str
    kv_budget: int
    kv_allocation: str | None
    kv_observe: str
    probe_stride: int
    type_k: str
    type_v: str
    n_ctx: int
    n_tokens: int
    n_repeated: int
    n_protected: int
    kv_room: int
    seed: int
    place: str
    pending: list[int]
    # What others know of the documents; comes back as it was given.
    extra: dict[str, Any] = field(default_factory=dict)
    abi: int = native.ABI
    version: str = __version__
    created: str = ""  # ISO 8601, UTC

    @classmethod
    def of_header(cls, path: str | Path, header: Mapping[str, Any]) -> SavedSettings:
        """Check the header of a snapshot; what it has beyond the fields is left alone.

        Raises
        ------
        StateError
            A field is missing or impossible.
        """
        known = {name: header[name] for name in cls.__dataclass_fields__ if name in header}
        try:
            saved = cls(**known)
            for name, field_ in cls.__dataclass_fields__.items():
                value, kind = getattr(saved, name), str(field_.type).partition("[")[0]
                if type(value).__name__ not in kind.replace("None", "NoneType"):
                    raise ValueError(f"{name} is {value!r}")
            numbers = (
                saved.n_ctx,
                saved.n_tokens,
                saved.n_repeated,
                saved.n_protected,
                saved.seed,
                *saved.pending,
            )
            if not all(type(n) is int and 0 <= n < 2**32 for n in numbers):
                raise ValueError("a number is out of range")
            if max(
                saved.n_repeated, saved.n_protected
            ) > saved.n_tokens or saved.place not in get_args(Place):
                raise ValueError("the conversation stands nowhere")
        except (TypeError, ValueError) as error:
            raise StateError(f"{path} is no chat that can go on ({error}): {_AGAIN}") from error
        return saved

    def check(self, path: str | Path, given: Mapping[str, Any]) -> Path:
        """The model to load, if settings and model are those that the file is bound to.

        Raises
        ------
        StateError
            Others: with the reason.
        ModelFileError
            The model cannot be read.
        """
        if self.abi != native.ABI:
            raise StateError(
                f"{path} was written with version {self.abi} of the native functions, this capkv "
                f"has {native.ABI}: {_AGAIN}"
            )
        for name, option in _BOUND.items():
            saved, asked = getattr(self, name), given.get(name)
            asked = asked.lower() if isinstance(asked, str) else asked
            if asked is not None and asked != saved:
                raise StateError(
                    f"{path} was read with {name}={saved!r}, not {asked!r}, and can only go on so: "
                    f"leave {option} out, or {_AGAIN}"
                )
        model = Path(given.get("model") or self.model)
        if not model.exists():
            raise StateError(
                f"{path} was read with the model {self.model}, and there is no {model}: "
                "say where it is with --model"
            )
        if fingerprint(model) != self.model_fingerprint:
            raise StateError(
                f"{path} was read with another model than {model}: give the one that was used "
                f"({self.model}) with --model, or {_AGAIN}"
            )
        return model


class SavedChat:
    """The part of :class:`~capkv_local.chat.DocumentChat` that writes and reads snapshots.

    Attributes
    ----------
    extra
        What is kept in a snapshot beside the chat, as JSON: names of the documents, sources.
    """

    llama: Llama
    extra: dict[str, Any]
    _place: Place
    _pending: list[int]
    _sources: SourceMap
    _types: tuple[str | None, str | None]
    _fingerprint: str  # of the model as it was loaded

    def save(self, path: str | Path, *, private: bool = False) -> int:
        """Write the conversation to a file that :meth:`load` continues; returns its bytes.

        Parameters
        ----------
        private
            Nobody else may read the file.

        Raises
        ------
        StateError
            The file cannot be written.
        """
        llama = self.llama
        state: CompactedState = llama.save_state()  # type: ignore[assignment]
        stats = llama.kv_stats()
        assert state.policy is not None
        type_k, type_v = ((name or "f16").lower() for name in self._types)
        settings = SavedSettings(
            model=os.path.abspath(llama.model_path),
            model_fingerprint=self._fingerprint,
            kv_policy=state.policy,
            kv_budget=stats.budget,
            kv_allocation=stats.allocation,
            kv_observe=llama.kv_observe,
            probe_stride=llama.probe_stride,
            type_k=type_k,
            type_v=type_v,
            n_ctx=llama.n_ctx(),
            n_tokens=state.n_tokens,
            n_repeated=state.n_repeated,
            n_protected=state.n_protected,
            kv_room=llama.kv_room,
            seed=state.seed,
            place=self._place,
            pending=[int(token) for token in self._pending],
            extra={**self.extra, "sources": self._sources.to_json()},
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )
        arrays: dict[str, Array] = {
            "input_ids": np.asarray(state.input_ids, dtype="<i4"),
            "llama_state": np.frombuffer(state.llama_state, dtype=np.uint8),
        }
        if state.carried is not None:
            arrays["carried"] = np.asarray(state.carried, dtype="<f4")
        if state.copy is not None:
            arrays["copy"] = np.frombuffer(state.copy, dtype=np.uint8)
        return write_snapshot(path, asdict(settings), arrays, private=private)

    @classmethod
    def load(cls, path: str | Path, **settings: Any) -> Self:
        """Continue a conversation that :meth:`save` wrote.

        Parameters
        ----------
        **settings
            As the constructor; what is left out is taken from the file.

        Raises
        ------
        StateError
            Damaged, of another model, or of other settings that cannot change.
        """
        header, arrays = read_snapshot(path)
        saved = SavedSettings.of_header(path, header)
        given = {name: value for name, value in settings.items() if value is not None}
        model = saved.check(path, given)
        policy, budget = given.pop("kv_policy", None), given.pop("kv_budget", None)
        allocation = given.pop("kv_allocation", None)
        bound = {name: getattr(saved, name) for name in _BOUND}
        kept = {name: getattr(saved, name) for name in ("kv_policy", "kv_budget", "kv_allocation")}
        chat = cls(
            **{
                "seed": saved.seed,
                "kv_room": saved.kv_room,
                **given,
                **bound,
                **kept,
                "model": model,
            }
        )
        try:
            chat._go_on(path, saved, arrays, seed=given.get("seed", saved.seed))
            if budget is not None:  # first: another policy has observed nothing yet
                chat.llama.set_kv_budget(budget)
            if policy is not None and policy != saved.kv_policy:
                chat.llama.set_kv_policy(policy)
            if allocation is not None:
                chat.llama.set_kv_allocation(allocation)
        except BaseException:
            chat.llama.close()
            raise
        return chat

    def _go_on(
        self, path: str | Path, saved: SavedSettings, arrays: Mapping[str, Array], *, seed: int
    ) -> None:
        from capkv_local.llama import CompactedState

        llama = self.llama
        tokens, data = arrays.get("input_ids"), arrays.get("llama_state")
        carried, copy = arrays.get("carried"), arrays.get("copy")
        try:
            if tokens is None or tokens.shape != (saved.n_tokens,) or tokens.dtype != np.int32:
                raise StateError("its tokens are not those of a text")
            if data is None or data.ndim != 1 or data.dtype != np.uint8:
                raise StateError("it has no cells")
            if not ((tokens >= 0) & (tokens < llama.n_vocab())).all() or not all(
                token < llama.n_vocab() for token in saved.pending
            ):
                raise StateError("the model has no such tokens")
            if copy is not None and (copy.ndim != 1 or copy.dtype != np.uint8):
                raise StateError("the copy of the document is none")
            if carried is not None and not _fits(carried, llama):
                raise StateError("what the policy had found is of other heads")
            state = CompactedState(
                input_ids=tokens,
                scores=np.empty((0, 0), dtype=np.single),
                n_tokens=saved.n_tokens,
                llama_state=data,  # type: ignore[arg-type]
                llama_state_size=len(data),
                seed=seed,
            )
            state.policy, state.carried = saved.kv_policy, carried
            state.n_repeated, state.n_protected = saved.n_repeated, saved.n_protected
            state.copy = None if copy is None else copy.tobytes()
            llama.load_state(state)
            if "sources" in saved.extra:
                self._sources = SourceMap.from_json(saved.extra["sources"])
        except CapKVError as error:
            raise StateError(f"{path} cannot go on ({error}): {_AGAIN}") from error
        self._place, self._pending = saved.place, list(saved.pending)  # type: ignore[assignment]
        self.extra = {name: value for name, value in saved.extra.items() if name != "sources"}


def _fits(carried: Array, llama: Llama) -> bool:
    """Whether ``carried`` is a relevance, ``[n_layer, n_head_kv, n_cells]``, of this model."""
    if carried.ndim != 3 or carried.dtype != np.float32:
        return False
    heads = llama.kv_positions().shape[:2]
    return carried.shape[:2] == heads and bool(np.isfinite(carried).all())
