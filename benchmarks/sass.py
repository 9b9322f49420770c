"""What machine code says of a product's speed before anything runs: its inner loop, and a roofline of it.

The loop is the shortest one that holds tensor-core instructions. Two clocks tick in it: the four schedulers of a
multiprocessor issue an instruction of a warp each a cycle, and the tensor cores multiply. Blocks that share a multiprocessor
overlap one's issue with another's products; so does a loop that leaves products pending while it goes on. A block alone whose
loop waits for its products first (`WARPGROUP.DEPBAR.LE gsb0, 0x0`) takes both times one after the other.

The share of the tensor cores' peak that comes of it is a bound: memory, its latency, and what stands outside the loop cost
more. So bytes are told beside it: those that a block fetches in the cycles of its products, while all others do, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TENSOR_CORES = r"\b(?:U?T?C?[IHQBO](?:G?MMA))\b[.A-Z0-9a-z]*"
FENCES = r"\bMEMBAR(?:\.[A-Z]+)*\.GPU\b"
"""What makes a thread wait until all its writes are seen by the whole device."""
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"^(\.L\w+):")
_BRANCH = re.compile(r"\bBRA(?:\.\w+)*\s+(?:\w+,\s*)?`\((\.L\w+)\)")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE\s+\w+,\s*(0x[0-9a-f]+|\d+)")

MULTIPLY_ADDS = {
    "int8": {8.0: 2048, 8.9: 1024, 9.0: 4096, 10.0: 8192},
    "float8": {8.9: 1024, 9.0: 4096, 10.0: 8192},
}
"""Dense multiply-adds a cycle of a multiprocessor, by what is multiplied and capability, from NVIDIA's data sheets of A100, RTX
4090, H100 and B200 (peak / multiprocessors / clock / 2)."""
_SHARED = {8.0: 164 << 10, 8.9: 100 << 10, 9.0: 228 << 10, 10.0: 228 << 10}
_THREADS = {8.0: 2048, 8.9: 1536, 9.0: 2048, 10.0: 2048}


@dataclass(frozen=True)
class Loop:
    """The inner loop of a product.

    Attributes:
        instructions: of a warp, an iteration.
        products: tensor-core instructions among them.
        pending: groups of products that may go on when a warp waits; None where products are not waited for by groups.
    """

    instructions: int
    products: int
    pending: int | None


def instructions(code: str) -> tuple[list[str], dict[str, int]]:
    """The instructions of `nvdisasm -c`, and where each label stands among them."""
    found: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif instruction := _INSTRUCTION.match(line):
            found.append(instruction[2])
    return found, labels


def inner_loop(code: str) -> Loop | None:
    """The shortest loop that holds tensor-core instructions; None where there is none."""
    found, labels = instructions(code)
    bodies = []
    for at, instruction in enumerate(found):
        branch = _BRANCH.search(instruction)
        first = labels.get(branch[1], at + 1) if branch else at + 1
        body = [one for one in found[first : at + 1] if not one.startswith("NOP")]
        if any(re.search(TENSOR_CORES, one) for one in body):
            bodies.append(body)
    if not bodies:
        return None
    body = min(bodies, key=len)
    waits = [int(wait[1], 0) for one in body if (wait := _WAIT.search(one))]
    return Loop(len(body), sum(bool(re.search(TENSOR_CORES, one)) for one in body), min(waits, default=None))


def blocks(capability: float, registers: int, shared: int, warps: int) -> int:
    """Blocks that a multiprocessor holds at once: its 65,536 registers, shared memory and threads."""
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    return min(by_registers, _SHARED[capability] // (shared + 1024), _THREADS[capability] // (32 * warps), 32)


def roofline(
    loop: Loop, tile: tuple[int, int, int], kind: str, capability: float, warps: int, together: int
) -> dict[str, float]:
    """Cycles of an iteration of one block: issue, tensor; the share of the tensor cores' peak that they leave; and the bytes
    that are fetched a cycle at that peak, a byte a code.

    Args:
        tile: m, n, k of an iteration.
        kind: of `MULTIPLY_ADDS`.
        together: blocks that share a multiprocessor.
    """
    m, n, k = tile
    issue, tensor = loop.instructions * warps / 4, m * n * k / MULTIPLY_ADDS[kind][capability]
    apart = together == 1 and loop.pending == 0
    share = tensor / (issue + tensor if apart else max(issue, tensor))
    return {"issue": issue, "tensor": tensor, "share": share, "bytes": (m + n) * k / tensor}
