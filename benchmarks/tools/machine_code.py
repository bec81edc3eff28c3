"""What a GPU issues for a piece of work, read off a kernel's machine code.

A way goes forward from block to block, so that it is through every loop at most once. The shortest of those that hold
what the work cannot do without, so many loads of 16 bytes, say, is what runs where rows are aligned and nothing rare
happens: the code beside it handles what is not aligned, divides by what is not normal, and so on.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

Needs = Mapping[str, int]
"""Regular expression of an opcode -> how many instructions a way must hold of it, at least."""

LABEL = re.compile(r"\s*(\.L\w+):")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
TARGET = re.compile(r"`\((\.L\w+)\)|\b0x([0-9a-f]+)$")
OPCODE = re.compile(r"^(?:@\S+\s+)?([A-Z][A-Z0-9_.]*)")
ENDS = ("BRA", "EXIT", "RET", "BRX", "KILL")


@dataclass(frozen=True)
class Way:
    """Opcodes in order, with their modifiers."""

    opcodes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.opcodes)

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, opcode) is not None for opcode in self.opcodes)

    @cached_property
    def accesses(self) -> Counter[str]:
        """Of global memory, and of how many bytes each: "LDG 16" -> how many."""
        return Counter(f"{o.split('.')[0]} {width(o)}" for o in self.opcodes if o.startswith(("LDG", "STG")))

    @property
    def tensor_cores(self) -> str:
        """The first instruction for them, or nothing."""
        return next((o for o in self.opcodes if re.match(r"(?:[HIQO]G?MMA|UTC\w*MMA)\b", o)), "")


def width(opcode: str) -> int:
    """Bytes that an access moves for a thread."""
    found = re.search(r"\.(128|64|[US]?16|[US]?8)(?=\.|$)", opcode)
    return 4 if found is None else int(found[1].lstrip("US")) // 8


class Code:
    """The instructions of one function, as ``nvdisasm -c`` or ``cuobjdump -sass`` prints them."""

    def __init__(self, assembly: str) -> None:
        self.opcodes: list[str] = []
        texts, labels = [], {}
        for line in assembly.splitlines():
            if found := LABEL.match(line):
                labels[found[1]] = len(texts)
            elif (found := INSTRUCTION.search(line)) and (opcode := OPCODE.match(found[2])):
                labels[found[1].lstrip("0") or "0"] = len(texts)
                texts.append(found[2])
                self.opcodes.append(opcode[1])
        jumps = {i: _jump(texts[i], opcode) for i, opcode in enumerate(self.opcodes) if opcode.startswith(ENDS)}
        goals = {i: labels[to] for i, (to, _) in jumps.items() if to in labels}
        self.starts = sorted({0, *goals.values(), *(i + 1 for i in jumps if i + 1 < len(texts))})
        self.next: list[list[int]] = []
        """The blocks that may follow each."""
        for _, end in self._spans():
            last = end - 1
            follows = [goals[last]] if last in goals else []
            if (last not in jumps or jumps[last][1]) and end < len(texts):
                follows.append(end)
            self.next.append([bisect_left(self.starts, at) for at in follows])

    def _spans(self) -> Iterator[tuple[int, int]]:
        return zip(self.starts, [*self.starts[1:], len(self.opcodes)], strict=True)

    @cached_property
    def blocks(self) -> list[list[str]]:
        return [[o for o in self.opcodes[a:b] if o != "NOP"] for a, b in self._spans()]

    @cached_property
    def loops(self) -> list[tuple[int, int]]:
        """(first block, block that goes back to it) of every loop; a jump to itself ends the code."""
        back = ((to, i) for i, follows in enumerate(self.next) for to in follows if to <= i)
        return sorted((to, i) for to, i in back if to != i or len(self.blocks[i]) > 1)

    def loop(self, needs: Needs) -> Way:
        """The shortest way once round a loop that holds these."""
        found = [way for begin, end in self.loops if (way := self._shortest(begin, [end], needs)) is not None]
        if not found:
            raise LookupError(f"no loop holds {dict(needs)}")
        return min(found, key=len)

    def whole(self, needs: Needs) -> Way:
        """The shortest way from the first instruction to the end that holds these."""
        ends = [i for i, block in enumerate(self.blocks) if any(o.startswith("EXIT") for o in block[-1:])]
        way = self._shortest(0, ends, needs)
        if way is None:
            raise LookupError(f"no way through holds {dict(needs)}")
        return way

    def _shortest(self, begin: int, ends: Sequence[int], needs: Needs) -> Way | None:
        patterns, wanted = [re.compile(p) for p in needs], tuple(needs.values())
        last = max(ends)
        counts = {
            i: tuple(sum(p.search(opcode) is not None for opcode in self.blocks[i]) for p in patterns)
            for i in range(begin, last + 1)
        }
        if any(sum(c[at] for c in counts.values()) < many for at, many in enumerate(wanted)):
            return None
        # of each block, the fewest instructions before it for what has been counted by then, and where from
        State = tuple[int, ...]
        before: dict[int, dict[State, tuple[int, tuple[int, State] | None]]] = {begin: {(0,) * len(wanted): (0, None)}}
        best: tuple[int, int, State] | None = None
        for i in range(begin, last + 1):
            for state, (length, _) in before.get(i, {}).items():
                now = tuple(min(s + c, w) for s, c, w in zip(state, counts[i], wanted, strict=True))
                after = length + len(self.blocks[i])
                if i in ends and now == wanted and (best is None or after < best[0]):
                    best = after, i, state
                for to in self.next[i]:
                    if to > i and after < before.setdefault(to, {}).get(now, (after + 1,))[0]:
                        before[to][now] = after, (i, state)
        if best is None:
            return None
        way, at = [], (best[1], best[2])
        while at is not None:
            way.append(self.blocks[at[0]])
            at = before[at[0]][at[1]][1]
        return Way(tuple(o for block in reversed(way) for o in block))


def _jump(text: str, opcode: str) -> tuple[str | None, bool]:
    """(where it goes, if that is known, whether it may go on instead)."""
    found = TARGET.search(text)
    may_fall = text.startswith("@") or opcode != opcode.split(".")[0] or bool(re.match(r"\S+\s+!?U?P\d", text))
    return (found[1] or found[2].lstrip("0") or "0") if found else None, may_fall
