"""The report of ``scripts/check-gpu``: Markdown that can be read as it is and put into docs/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# What the GPU part was made to reach; measured, not enforced.
MOST_DECIDING = 0.03  # of prefill: scoring, selecting and evicting
LEAST_DECODE = 0.95  # of the speed in a fresh context as long as the budget


@dataclass
class Section:
    """What one step found.

    Attributes
    ----------
    said
        A sentence, or the reason of a failure.
    table, block
        Markdown that stands below it; lines that are shown as they are.
    """

    title: str = ""
    command: str = ""
    said: str = ""
    table: str = ""
    block: str = ""
    ok: bool = False
    seconds: float = 0.0

    @property
    def summary(self) -> str:
        """For the terminal."""
        return "\n".join(part for part in (self.said, self.table) if part)

    def text(self) -> str:
        head, *more = self.said.splitlines() or [""]
        parts = [f"## {self.title}: {'passed' if self.ok else '**FAILED**'}"]
        if self.command:
            parts.append(f"`{self.command}` ({self.seconds:.0f} s)")
        parts.append(head)
        if more:
            parts.append(_fenced(more))
        if self.table:
            parts.append(self.table)
        if self.block:
            parts.append(_fenced(self.block.splitlines()))
        return "\n\n".join(parts)


@dataclass
class Report:
    """All of it."""

    title: str
    built_for: str = ""
    devices: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)
    drivers: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)

    def text(self) -> str:
        n_failed = sum(not section.ok for section in self.sections)
        verdict = (
            f"**{n_failed} of {len(self.sections)} steps failed.**" if n_failed else "All passed."
        )
        if self.built_for == "RPC":
            verdict += (
                " **No GPU was checked**: the cache was in the memory of RPC servers, where the "
                "tests of single operators do not reach."
            )
        rows = [*self.about.items(), ("built for", self.built_for), *self.settings.items()]
        facts = table(("", ""), [(name, f"`{value}`" if value else "") for name, value in rows])
        drivers = _fenced(self.drivers or ["no tool of a GPU maker is installed here"])
        parts = [f"# {self.title}", verdict, facts, self.devices, drivers]
        return "\n\n".join([*parts, *(section.text() for section in self.sections)]) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def device_table(devices: Sequence[Mapping[str, object]]) -> str:
    """Return the devices that llama.cpp sees, with their memory."""
    rows = []
    for device in devices:
        free, size = (int(str(device[name])) / 2**30 for name in ("n_bytes_free", "n_bytes"))
        memory = f"{free:.1f} of {size:.1f} GiB free"
        rows.append((str(device["name"]), str(device["description"]), str(device["kind"]), memory))
    return table(("device", "", "kind", "memory"), rows)


def benchmark_table(result: Mapping[str, object], *, judged: bool = True) -> tuple[str, str, bool]:
    """Return what ``bench-decode --json`` found: a table, a sentence, whether it evicted at all.

    ``judged``: with the goals, which are those of a GPU.
    """

    def number(name: str) -> float:
        return float(str(result[name]))

    share, decode = number("score_select_evict_share"), number("decode_ratio_to_stock_short")
    speeds = result["decode_tokens_per_s"]
    assert isinstance(speeds, Mapping)
    tokens, budget = result["tokens"], result["budget"]
    rows = [
        (
            "prefill",
            f"{result['prefill_ours_s']} s",
            f"{result['prefill_stock_s']} s",
            f"{number('prefill_ratio'):.2f}x",
        ),
        (
            "of it scoring, selecting, evicting",
            f"{100 * share:.1f}%",
            "",
            _goal(judged, share <= MOST_DECIDING, f"at most {MOST_DECIDING:.0%}"),
        ),
        ("of it scoring", f"{100 * number('score_share'):.1f}%", "", ""),
        (
            f"decode at {tokens} tokens",
            f"{speeds['ours']} tokens/s",
            f"{speeds['full']} tokens/s",
            f"{number('decode_ratio_to_stock_full'):.2f}x",
        ),
        (
            f"decode, stock at {budget} tokens",
            f"{speeds['ours']} tokens/s",
            f"{speeds['short']} tokens/s",
            f"{decode:.3f}x" + _goal(judged, decode >= LEAST_DECODE, f"at least {LEAST_DECODE}x"),
        ),
        ("KV memory", f"{result['kv_MiB']} MiB", f"{result['kv_MiB_full']} MiB", ""),
    ]
    said = (
        f"{result['model']}, {tokens} tokens, {budget} cells, policy {result['policy']}, "
        f"{result['evictions']} evictions"
    )
    return table(("", "this cache", "stock", ""), rows), said, number("evictions") > 0


def _goal(judged: bool, met: bool, goal: str) -> str:
    if not judged:
        return ""
    return f" (goal {goal}: {'met' if met else '**not met**'})"


def _fenced(lines: Sequence[str]) -> str:
    return "\n".join(["```", *lines, "```"])
