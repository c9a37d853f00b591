"""A chat that goes on from a snapshot is the one that wrote it; other settings are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capkv_local.chat import DocumentChat
from capkv_local.documents import Document
from capkv_local.errors import ModelFileError, StateError
from capkv_local.models import fingerprint
from capkv_local.snapshot import read_header, read_snapshot, write_snapshot
from tests.model import tiny
from tests.model.conftest import TEXT

QUESTION = "Who may copy this licence?"
PART = Document("part.txt", TEXT.read_text(encoding="utf-8")[:1200], "text")
MORE = Document("more.txt", TEXT.read_text(encoding="utf-8")[9000:9700], "text")


def answer(chat: DocumentChat) -> str:
    return "".join(chat.ask(QUESTION, max_tokens=12))


def read(**settings: Any) -> DocumentChat:
    chat = DocumentChat(**{"kv_budget": 96, "n_ctx": 2048, **settings})
    chat.ingest([PART])
    return chat


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot at q8_0, read with the tail."""
    file = tmp_path_factory.mktemp("saved") / "part.capkv"
    chat = read(kv_observe="tail", type_k="q8_0", type_v="q8_0")
    chat.extra["note"] = [[0, "of others"]]
    chat.save(file)
    chat.set_budget(64)
    np.save(file.with_suffix(".npy"), chat.llama.kv_positions())
    chat.close()
    return file


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_answers_are_those_of_the_chat_that_wrote_it(kv_type: str, tmp_path: Path) -> None:
    chat = read(kv_observe="probe", type_k=kv_type, type_v=kv_type)
    assert chat.stats().evictions
    file = tmp_path / "part.capkv"
    chat.save(file)
    again = DocumentChat.load(file)
    assert np.array_equal(again.llama.kv_positions(), chat.llama.kv_positions())
    assert answer(again) == answer(chat)

    # What the policy had found comes along: both evict the same when they read on.
    for each in (chat, again):
        each.ingest([MORE])
    assert np.array_equal(again.llama.kv_positions(), chat.llama.kv_positions())
    assert answer(again) == answer(chat)

    # Behind an answer, too, with the token that was sampled but not decoded.
    again.save(file)
    again.close()
    third = DocumentChat.load(file)
    assert answer(third) == answer(chat)
    third.close()
    chat.close()


def test_sources_and_what_others_note_come_back(saved: Path, tmp_path: Path) -> None:
    chat = DocumentChat.load(saved)
    assert chat.extra == {"note": [[0, "of others"]]}
    source = chat._sources.at(100)
    assert source is not None
    assert source.document == PART.name
    chat.save(tmp_path / "again.capkv")
    chat.close()
    extra = read_header(tmp_path / "again.capkv")["extra"]
    assert extra == read_header(saved)["extra"]
    assert extra["sources"]["documents"] == [PART.name]


def test_an_eviction_right_after_opening_keeps_the_same_cells(saved: Path) -> None:
    chat = DocumentChat.load(saved)
    chat.set_budget(64)
    assert np.array_equal(chat.llama.kv_positions(), np.load(saved.with_suffix(".npy")))
    chat.close()


def test_nothing_read_yet_is_saved_too(tmp_path: Path) -> None:
    chat = DocumentChat(kv_budget=96, n_ctx=2048, kv_observe="tail", kv_room=300)
    chat.save(tmp_path / "empty.capkv")
    again = DocumentChat.load(tmp_path / "empty.capkv")
    assert again.stats().n_tokens == 0
    assert again.llama.kv_room == 300  # not the default of where it is opened
    assert answer(again) == answer(chat)
    again.close()
    chat.close()


def test_policy_allocation_and_budget_may_change(saved: Path) -> None:
    settings = {"kv_policy": "snapkv", "kv_allocation": "uniform", "kv_budget": 64}
    chat = DocumentChat.load(saved, type_k="Q8_0", n_ctx=2048, **settings)
    stats = chat.stats()
    assert (stats.policy, stats.allocation, stats.budget) == ("snapkv", "uniform", 64)
    assert stats.n_cells <= 64
    chat.close()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"type_k": "f16"}, "type_k='q8_0', not 'f16'.*leave --type-k out"),
        ({"n_ctx": 4096}, "n_ctx=2048, not 4096.*leave --n-ctx out"),
        ({"kv_observe": "probe"}, "kv_observe='tail'.*leave --observe out"),
        ({"model": "/gone.gguf"}, "no /gone.gguf.*--model"),
    ],
)
def test_other_settings_are_refused_before_a_model_loads(
    saved: Path, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(StateError, match=reason):
        DocumentChat.load(saved, **settings)


def test_another_model_or_native_version_is_refused(saved: Path, tmp_path: Path) -> None:
    model = tiny.llama(tmp_path / "tiny.gguf")
    with pytest.raises(StateError, match=r"another model than .*tiny.gguf.*--model"):
        DocumentChat.load(saved, model=model)
    with pytest.raises(ModelFileError, match="not a GGUF"):
        DocumentChat.load(saved, model=TEXT)
    header, arrays = read_snapshot(saved)
    other = tmp_path / "other.capkv"
    write_snapshot(other, {**header, "abi": header["abi"] + 1}, arrays)
    with pytest.raises(StateError, match=r"version .* of the native functions"):
        DocumentChat.load(other)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_ctx", "many"),
        ("n_ctx", -1),
        ("pending", ["x"]),
        ("place", "nowhere"),
        ("n_repeated", 10**6),
        ("model", None),
    ],
)
def test_a_header_that_cannot_be_is_refused(
    saved: Path, tmp_path: Path, field: str, value: Any
) -> None:
    header, arrays = read_snapshot(saved)
    file = tmp_path / "a.capkv"
    write_snapshot(file, {**header, field: value}, arrays)
    with pytest.raises(StateError, match="no chat that can go on"):
        DocumentChat.load(file)
    del header[field]
    write_snapshot(file, header, arrays)
    with pytest.raises(StateError, match="no chat that can go on"):
        DocumentChat.load(file)


def test_cells_tokens_and_carried_state_that_do_not_fit_are_refused(
    saved: Path, tmp_path: Path
) -> None:
    header, arrays = read_snapshot(saved)
    tokens, state, carried = (arrays[name] for name in ("input_ids", "llama_state", "carried"))
    wrong = [
        {"input_ids": np.full_like(tokens, 10**6)},
        {"input_ids": tokens[:-1]},
        {"input_ids": tokens.astype(np.float32)},
        {"llama_state": state[:-1]},
        {"llama_state": state[:0]},
        {"carried": carried[:1]},
        {"carried": np.full_like(carried, np.nan)},
    ]
    file = tmp_path / "a.capkv"
    for changed in wrong:
        write_snapshot(file, header, {**arrays, **changed})
        with pytest.raises(StateError, match="cannot go on"):
            DocumentChat.load(file)


# ---- what identifies a model -------------------------------------------------------------------


def test_a_fingerprint_sees_metadata_and_every_tensor(tmp_path: Path) -> None:
    model = tiny.llama(tmp_path / "a.gguf")
    first = fingerprint(model)
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(model.read_bytes())
    assert fingerprint(copy) == first
    assert fingerprint(tiny.llama(tmp_path / "b.gguf", n_head=2)) != first

    import gguf

    tensors = gguf.GGUFReader(model).tensors
    whole = model.read_bytes()
    places = {t.name: t.data_offset + t.n_bytes // 2 for t in tensors}
    places["metadata"] = whole.index(b"context_length") + len("context_length") + 4
    for name, at in places.items():
        copy.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert fingerprint(copy) != first, name
    copy.write_bytes(whole[:200])
    with pytest.raises(ModelFileError, match="damaged"):
        fingerprint(copy)


def test_all_parts_of_a_split_model_count(tmp_path: Path) -> None:
    parts = [tmp_path / f"m-{i:05}-of-00002.gguf" for i in (1, 2)]
    for i, part in enumerate(parts):
        tiny.llama(part, n_layer=1 + i)
    first = fingerprint(parts[0])
    tiny.llama(parts[1], n_layer=3)
    assert fingerprint(parts[0]) != first
    parts[1].unlink()
    with pytest.raises(ModelFileError, match=r"00002-of-00002.gguf cannot be read"):
        fingerprint(parts[0])
