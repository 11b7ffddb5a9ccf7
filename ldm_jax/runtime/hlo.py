"""Counts of a compiled program from XLA's text of it (HLO): bytes from and to memory, and collectives."""

import math
import re
from collections import Counter, defaultdict
from typing import NamedTuple

BYTES = {"pred": 1, "c64": 8, "c128": 16}  # of the types whose name does not end in its number of bits
ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = ")
CALLED = re.compile(r"(calls|body|condition|to_apply|branch_computations)=(\{[^}]*\}|%?[\w.-]+)")
TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
ON_CHIP = "S(1)"  # in a layout: the array is in a TPU's vector memory, not in HBM

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# They move no bytes by themselves: what they hand on is counted where it is made and read.
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all",
        "partition-id", "replica-id", "iota", "opt-barrier", "copy-done", "slice-done", "async-done"}  # fmt: skip
FREE_CALLS = ("AllocateBuffer", "ConcatBitcast")  # targets of a TPU's custom calls, likewise
PARTS = {"dynamic-slice", "slice", "gather"}  # they read as much as they write
# A TPU's asynchronous collective is in a chain of fusions between these custom calls, each with other work.
STARTED, DONE = "AsyncCollectiveStart", "AsyncCollectiveDone"
ALIASING = re.compile(r"output_to_operand_aliasing=\{(.*?\))\}")


class Instruction(NamedTuple):
    """An instruction: name = shape opcode(operands), attributes."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


class Collective(NamedTuple):
    """The collectives of one kind: how many, their bytes on each device, and the bytes that each device sends."""

    count: int
    bytes: int
    sent: float


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of a program by name, and the name of the one that it starts with."""
    computations: dict[str, list[Instruction]] = {}
    name = entry = ""
    for line in text.splitlines():
        if line.endswith("{") and " -> " in line and not line.startswith(" "):
            is_entry = line.startswith("ENTRY ")
            name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
            entry = name if is_entry else entry
            computations[name] = []
        elif name and (found := INSTRUCTION.match(line)):
            computations[name].append(_instruction(found[1], line[found.end() :]))
    return computations, entry


def _instruction(name: str, rest: str) -> Instruction:
    shape, rest = _split(rest) if rest.startswith("(") else rest.split(" ", 1)
    opcode, _, _ = rest.strip().partition("(")
    operands, attributes = _split(rest[rest.index("(") :])
    names = tuple(re.findall(r"%([\w.-]+)", operands)) or tuple(re.findall(r"([A-Za-z_][\w.-]*)(?:,|\)$)", operands))
    return Instruction(name, shape, opcode, names, attributes)


def _split(text: str) -> tuple[str, str]:
    """A text that starts with "(", split after the matching ")"."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return text[: place + 1], text[place + 1 :]
    return text, ""


def shape_bytes(shape: str, *, on_chip: bool = True) -> int:
    """The bytes of an array or of a tuple of arrays; without `on_chip` those that are in HBM."""
    return sum(
        math.prod(map(int, filter(None, axes.split(",")))) * _item_bytes(kind)
        for kind, axes, layout in ARRAY.findall(shape)
        if on_chip or ON_CHIP not in layout
    )


def _item_bytes(kind: str) -> float:
    bits = re.match(r"[a-z]+(\d+)", kind)
    return BYTES.get(kind) or (int(bits[1]) / 8 if bits else 0)  # 0: token


def executions(computations: dict[str, list[Instruction]], entry: str) -> tuple[Counter, set[str]]:
    """How often each computation runs, and those within fusions; a loop of unknown length counts once."""
    times, fused = Counter({entry: 1}), set()
    edges: dict[str, list[tuple[str, int, bool]]] = defaultdict(list)
    for name, instructions in computations.items():
        for each in instructions:
            trips = int(found[1]) if (found := TRIPS.search(each.attributes)) else 1
            for role, callees in CALLED.findall(each.attributes):
                for callee in re.findall(r"[\w.-]+", callees):
                    fuses = each.opcode == "fusion" or role == "to_apply"
                    edges[name].append((callee, trips if role == "body" else 1, fuses))
    for name in _callers_first(edges, entry):
        for callee, trips, fuses in edges[name]:
            times[callee] += times[name] * trips
            if fuses or name in fused:
                fused.add(callee)
    return times, fused


def _callers_first(edges: dict[str, list[tuple[str, int, bool]]], entry: str) -> list[str]:
    done: dict[str, None] = {}

    def visit(name: str) -> None:
        for callee, _, _ in edges.get(name, ()):
            if callee not in done:
                visit(callee)
        done[name] = None

    visit(entry)
    return [*done][::-1]


def memory_traffic(text: str) -> int:
    """The bytes that a program reads from and writes to memory on each device.

    Each instruction, or fusion of several, reads its operands and writes its result once, but for results that are
    the memory of an operand: a fusion that goes on with an asynchronous collective hands its arrays on in place.
    """
    computations, entry = parse(text)
    times, fused = executions(computations, entry)
    total = 0
    for name, instructions in computations.items():
        shapes = {each.name: each.shape for each in instructions}
        for each in instructions if name not in fused and times[name] else ():
            target = _target(each, computations)
            is_free_call = each.opcode == "custom-call" and target in FREE_CALLS
            if each.opcode in FREE or each.opcode.endswith("-done") or target == DONE or is_free_call:
                continue
            total += times[name] * _moved(each, shapes, starts=target == STARTED)
    return round(total)


def _target(each: Instruction, computations: dict[str, list[Instruction]]) -> str:
    """The target of a custom call, or of that which a fusion ends with; "" if there is none."""
    if each.opcode == "fusion" and (found := re.search(r"calls=%?([\w.-]+)", each.attributes)):
        each = computations[found[1]][-1]
    found = re.search(r'custom_call_target="(\w+)"', each.attributes)
    return found[1] if found else ""


def _moved(each: Instruction, shapes: dict[str, str], *, starts: bool) -> float:
    """The bytes that an instruction reads and writes; `starts`: an asynchronous collective, which reads its operand."""
    if each.opcode == "copy-start":  # its shape is (copy, original, context)
        return shape_bytes(each.shape, on_chip=False)
    if each.opcode == "slice-start":  # ((original), slice, context)
        return shape_bytes(each.shape) - sum(shape_bytes(shapes.get(operand, "")) for operand in each.operands)
    aliased = found[1] if (found := ALIASING.search(each.attributes)) else ""
    pairs = re.findall(r"\{(\d*)\}: \((\d+), ", aliased)  # result {"" if it is the only one}, operand
    kept, handed_on = {int(result or 0) for result, _ in pairs}, {int(operand) for _, operand in pairs}
    results = [found[0] for found in ARRAY.finditer(each.shape)]
    operands = [shapes.get(operand, "") for operand in each.operands]
    written = sum(shape_bytes(array, on_chip=False) for i, array in enumerate(results) if i not in kept)
    read = sum(shape_bytes(array, on_chip=False) for i, array in enumerate(operands) if starts or i not in handed_on)
    return written + (min(read, written) if each.opcode in PARTS else read)


def count_collectives(text: str) -> dict[str, Collective]:
    """The collectives of a program by kind, e.g. "all-gather".

    The bytes are those of the larger side: the whole array of an all-gather and of a reduce-scatter. Each device sends
    (n - 1) / n of them, in an all-reduce twice that, on rings of n devices (Thakur 2005).
    """
    computations, entry = parse(text)
    times, fused = executions(computations, entry)
    totals: dict[str, list[float]] = {}
    counted = set()
    for name, instructions in computations.items():
        shapes = {each.name: each.shape for each in instructions}
        for each in instructions:
            kind, n = each.opcode.removesuffix("-start"), _group_size(each.attributes)
            if kind not in COLLECTIVES or n == 1 or not times[name]:
                continue
            if name in fused:  # a TPU's asynchronous collective is in several fusions, in each as a whole
                channel = re.search(r"channel_id=\d+", each.attributes)
                same = channel and (channel[0], each.shape)
                if same in counted:
                    continue
                counted.add(same or each.name)
            size = _larger_side(each, kind, shapes)
            share = 1.0 if kind == "collective-permute" else (n - 1) / n * (2 if kind == "all-reduce" else 1)
            total = totals.setdefault(kind, [0, 0, 0.0])
            for place, value in enumerate((1, size, size * share)):
                total[place] += times[name] * value
    return {kind: Collective(int(count), int(size), sent) for kind, (count, size, sent) in sorted(totals.items())}


def _larger_side(each: Instruction, kind: str, shapes: dict[str, str]) -> float:
    """The bytes of a collective's operands or of its result, whichever are more."""
    operands, result = sum(shape_bytes(shapes.get(operand, "")) for operand in each.operands), shape_bytes(each.shape)
    if each.opcode.endswith("-start") and kind != "all-reduce":  # its shape is (operands, result)
        result -= operands
    return max(operands, result)


def _group_size(attributes: str) -> int:
    """The number of devices in each group of a collective, in any of the notations of `replica_groups`."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(found[2])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([\w.-]+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([\w.-]+)'", found[2]))
    pairs = re.search(r"source_target_pairs=\{([^=]*)\}\}", attributes)
    return pairs[1].count("{") if pairs else 1
