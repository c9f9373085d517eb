"""The machine code of a compiled kernel: its loops, and the least time its hottest loop can take.

`parse` reads the listing of `nvdisasm -c` into a control-flow graph; `hottest_loop` finds the loop that does the work;
`cycles` asks each part of the multiprocessor how long one iteration of one program keeps it busy:

    cycles[part] = operations per warp * warps / (operations per cycle per multiprocessor)

Parts run side by side, so an iteration takes at least the largest of them, and the tensor cores (or, in a kernel with
no matmul, the memory) reach at most their own cycles / the largest. That is a bound, not a prediction: it knows neither
latency nor dependences, so it is met only if enough warps are ready to fill every part's gaps.

`in_step` is the other end: one program alone, its warps issuing every instruction together and in the order of the
code. An instruction waits until its part has finished the one before; only wgmma runs on by itself, from its issue to
the wait (WARPGROUP.DEPBAR) that asks for it. It tells code that multiplies during its softmax from code that takes
turns. Several programs on a multiprocessor fill each other's gaps: they reach between `in_step` and the bound.

Operations per cycle and multiprocessor, and where they are from:

                                      sm_80   sm_90   source
    tensor cores, bf16/fp16 FLOP       2048    4096   data sheets: 312e12 / (108 * 1.41e9), 989.4e12 / (132 * 1.83e9)
    tensor cores, tf32 FLOP            1024    2048   data sheets: half of that
    mma.sync on sm_90, of wgmma's              0.62   arXiv 2402.13499: only wgmma reaches the peak
    warp instructions issued              4       4   tuning guides: four schedulers, one instruction a cycle each
    fp32 add, multiply, FMA lanes        64     128   CUDA programming guide, throughput of arithmetic instructions
    packed 16-bit add, FMA lanes        128     128   the same table (256 results, two a lane); bf16 on sm_80: 64
    integer multiply-add lanes           64      64   the same table; they share the fp32 lanes
    compare, integer, logic, convert     64      64   the same table
    MUFU (exp2, rcp, rsqrt), popc        16      16   the same table
    shared memory bytes, shuffles       128     128   32 banks of 4 bytes; a shuffle takes their path for a cycle
    bytes read through L2              47.4    38.8   A100 whitepaper: 5120 a cycle for 108; assumed the same for 132
    device memory bytes                13.4    13.9   data sheets: 2039e9 / (108 * 1.41e9), 3350e9 / (132 * 1.83e9)

What counts as one iteration: the blocks of a natural loop that dominate all its back edges and belong to no inner loop.
Code behind an `if`, and the out-of-line retries of barrier waits, is left out, which keeps the bound a bound. The
hottest loop has the most tensor-core work; among equals (a masked and an unmasked copy) the one with fewer
instructions, which runs more often. With no tensor-core work it is the loop that moves the most bytes; with no loop at
all the kernel itself is the one iteration. What a matmul loop loads is asked of L2, where other programs' loads have
put it; what other kernels load and store, of the device memory. HGMMA operands taken from shared memory count as its
bytes. The machine code does not say how many bytes a TMA load brings, but the PTX it was assembled from does, at the
barrier that waits for it. Work that a tile's shape makes warps do twice (mma.sync with fewer than 16 rows a warp, wgmma
with fewer than 64 a group) is found by comparing the matrix FLOP of the loop with those that the tile needs: the share
counts only the latter. The warps asked for are taken to run the loop: of a program whose warps part ways these are the
consumers; what its producer loads is in a loop of its own and in no bound, and turns that consumers take are not seen.
"""

import re
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Rates:
    """What one multiprocessor does in a cycle; lanes are results, 32 to a warp instruction."""

    tensor: int  # FLOP, dense bf16 or fp16
    mma_sync: float  # the part of `tensor` that HMMA reaches
    fp32: int
    half2: int
    bf16x2: int
    l2: float  # bytes
    memory: float  # bytes
    issue: int = 4
    imad: int = 64
    alu: int = 64
    mufu: int = 16
    shared: int = 128  # bytes


PARTS = ("tensor", "mufu", "fp32", "alu", "shared", "l2", "memory", "issue")
RATES = {
    "sm_80": Rates(tensor=2048, mma_sync=1.0, fp32=64, half2=128, bf16x2=64, l2=47.4, memory=13.4),
    "sm_90": Rates(tensor=4096, mma_sync=0.62, fp32=128, half2=128, bf16x2=128, l2=38.8, memory=13.9),
}

IN_ORDER = ("tensor", "mufu", "fp32", "alu", "shared")  # parts that take a warp's instructions one after the other

MATRIX_OPS = {"HMMA", "HGMMA"}
FP32_OPS = {"FFMA", "FADD", "FMUL", "FFMA32I", "FADD32I", "FMUL32I"}
HALF_OPS = {"HFMA2", "HADD2", "HMUL2", "HFMA2.MMA"}
MUFU_OPS = {"MUFU", "POPC", "FLO", "BREV"}
SHUFFLE_OPS = {"SHFL"}
SHARED_OPS = {"LDS", "STS", "LDSM", "STSM", "ATOMS", "LDGSTS"}
GLOBAL_OPS = {"LDG", "STG", "LDGSTS", "RED", "REDG", "ATOMG"}
# Moves, control, barriers, the uniform datapath (U...) and memory take an issue slot and nothing else counted here.
ISSUE_ONLY = re.compile(
    r"^(U\w+|MOV|CS2R|S2R|S2UR|R2UR|LDC|LDCU|LDL|STL|NOP|BRA|BRX|EXIT|RET|CALL|BAR|DEPBAR|LDGDEPBAR|SYNCS|FENCE|WARP\w*"
    r"|BSSY|BSYNC|BREAK|YIELD|ELECT|ERRBAR|MEMBAR|CCTL|VOTE|VOTEU|ARRIVES|ACQBULK|NANOSLEEP|KILL|BPT|DEPBAR|PREEXIT|UCGABAR\w*)$"
)


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # predicate with its sign, "" if none
    opcode: str
    operands: str
    tma_bytes: int = 0  # of the bulk loads that a barrier instruction announces

    @property
    def op(self):
        return self.opcode.split(".")[0]


@dataclass
class Block:
    instructions: list
    successors: list = field(default_factory=list)


@dataclass(frozen=True)
class Loop:
    instructions: tuple  # of one iteration
    is_loop: bool = True  # False: the whole straight-line kernel


# ---- the listing -----------------------------------------------------------------------------------------------------

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"^(\.L_\w+):")
EXPECTS = re.compile(r"\], (?:R\d+|UR\d+)$")  # an arrival that announces bytes names a register of them
TARGET = re.compile(r"`\((\.L_\w+)\)")


def expected_bytes(ptx):
    """Bytes of the TMA loads that each barrier waits for, in the order of the PTX."""
    return [int(size) for size in re.findall(r"mbarrier\.arrive\.expect_tx\.[^;]*, (\d+);", ptx)]


def parse(listing, tma_bytes=()):
    """Basic blocks, the entry first, of the first function in a listing of `nvdisasm -c`. `tma_bytes`: what
    `expected_bytes` found in its PTX; its order survives the assembler."""
    instructions, labels, pending = [], {}, []
    for line in listing.splitlines():
        if line.startswith(".text.") and instructions:
            break
        if match := LABEL.match(line):
            pending.append(match[1])
        elif match := INSTRUCTION.match(line):
            labels.update(dict.fromkeys(pending, len(instructions)))
            pending = []
            instructions.append(Instruction(int(match[1], 16), match[2] or "", match[3], match[4]))
    return _blocks(_with_tma_bytes(instructions, tma_bytes), labels)


def _with_tma_bytes(instructions, sizes):
    """Instructions with each announced size at its barrier; the commonest at all if some were copied or dropped."""
    barriers = [
        i for i, x in enumerate(instructions) if x.opcode == "SYNCS.ARRIVE.TRANS64" and EXPECTS.search(x.operands)
    ]
    if sizes and len(sizes) != len(barriers):
        sizes = [max(sizes, key=sizes.count)] * len(barriers)
    for i, size in zip(barriers, sizes, strict=bool(sizes)):
        instructions[i] = replace(instructions[i], tma_bytes=size)
    return instructions


def _blocks(instructions, labels):
    targets = _branch_targets(instructions, labels)
    starts = {0, *(t for ts in targets.values() for t in ts), *(i + 1 for i in targets)}
    starts = sorted(s for s in starts if s < len(instructions))
    number = {start: b for b, start in enumerate(starts)}
    blocks = []
    for start, end in zip(starts, [*starts[1:], len(instructions)], strict=True):
        block = Block(instructions[start:end])
        following = [*targets.get(end - 1, ())]
        if _falls_through(block.instructions[-1]) and end < len(instructions):
            following.append(end)
        block.successors = sorted({number[t] for t in following})
        blocks.append(block)
    return blocks


def _branch_targets(instructions, labels):
    """{index of an instruction that ends a block: indices it may jump to}; BSYNC goes where its BSSY said."""
    targets, reconverge = {}, {}
    for i, instruction in enumerate(instructions):
        match = TARGET.search(instruction.operands)
        label = labels.get(match[1]) if match else None
        if instruction.op == "BSSY" and label is not None:
            reconverge[instruction.operands.split(",")[0]] = label
        elif instruction.op == "BSYNC":
            targets[i] = [t for t in [reconverge.get(instruction.operands.strip())] if t is not None]
        elif instruction.op == "BRA":
            targets[i] = [] if label is None else [label]
        elif instruction.op in ("EXIT", "RET", "BRX", "KILL"):
            targets[i] = []
    return targets


def _falls_through(instruction):
    if instruction.op not in ("BRA", "BSYNC", "EXIT", "RET", "BRX", "KILL"):
        return True
    # `BRA.U UP0, x` and `BRA.DIV UR4, x` carry their condition as an operand
    conditional_operand = instruction.op == "BRA" and "," in instruction.operands
    return bool(instruction.guard) or conditional_operand


# ---- loops -----------------------------------------------------------------------------------------------------------


def dominators(blocks):
    """For each block the set of blocks on every path to it (itself included) as a bit mask; 0 if unreachable."""
    predecessors = [[] for _ in blocks]
    for b, block in enumerate(blocks):
        for s in block.successors:
            predecessors[s].append(b)
    everything = (1 << len(blocks)) - 1
    masks = [1, *[everything] * (len(blocks) - 1)]
    changed = True
    while changed:
        changed = False
        for b in range(1, len(blocks)):
            common = everything
            for p in predecessors[b]:
                common &= masks[p]
            mask = common | 1 << b if predecessors[b] else 0
            changed, masks[b] = changed or mask != masks[b], mask
    reachable = _reachable(blocks)
    return [mask if b in reachable else 0 for b, mask in enumerate(masks)]


def _reachable(blocks):
    seen, stack = {0}, [0]
    while stack:
        for s in blocks[stack.pop()].successors:
            if s not in seen:
                seen.add(s)
                stack.append(s)
    return seen


def natural_loops(blocks):
    """{header: (blocks of the loop, blocks that jump back)}, back edges being those to a dominator."""
    masks = dominators(blocks)
    predecessors = [[] for _ in blocks]
    for b, block in enumerate(blocks):
        for s in block.successors:
            predecessors[s].append(b)
    loops = {}
    for latch, block in enumerate(blocks):
        for header in block.successors:
            if not masks[latch] >> header & 1:
                continue
            body, latches = loops.setdefault(header, ({header}, set()))
            latches.add(latch)
            stack = [latch]
            while stack:
                b = stack.pop()
                if b not in body:
                    body.add(b)
                    stack.extend(p for p in predecessors[b] if masks[p])
    return loops


def loops(blocks):
    """The code of one iteration of every loop: blocks that all its back edges pass, less those of inner loops."""
    masks, found = dominators(blocks), natural_loops(blocks)
    result = []
    for header, (body, latches) in found.items():
        inner = set()
        for other, (other_body, _) in found.items():
            if other != header and other in body:
                inner |= other_body
        kept = [b for b in sorted(body - inner) if all(masks[latch] >> b & 1 for latch in latches)]
        result.append(Loop(tuple(i for b in kept for i in blocks[b].instructions)))
    return result


def hottest_loop(blocks, arch):
    """The loop that does the work (see the module's docstring), or the whole kernel where there is none."""
    candidates = loops(blocks)
    if not candidates:
        reachable = sorted(_reachable(blocks))
        return Loop(tuple(i for b in reachable for i in blocks[b].instructions), is_loop=False)

    def heat(loop):
        demand = cycles(loop.instructions, arch, num_warps=4)
        if demand["tensor"]:
            return demand["tensor"], 0, -demand["issue"]
        return 0, demand["memory"], demand["issue"]

    return max(candidates, key=heat)


# ---- the model -------------------------------------------------------------------------------------------------------


def count_instructions(blocks):
    """{opcode without its suffixes: how often it stands in the kernel}."""
    counts = {}
    for block in blocks:
        for instruction in block.instructions:
            counts[instruction.op] = counts.get(instruction.op, 0) + 1
    return counts


def wide_loads(blocks):
    """How many loads from global memory bring 16 bytes to every lane."""
    loads = (i for block in blocks for i in block.instructions if i.op in ("LDG", "LDGSTS"))
    return sum(access_bytes(load) == 16 for load in loads)


def cycles(instructions, arch, num_warps):
    """{part of the multiprocessor: cycles that one pass of `num_warps` warps over `instructions` keeps it busy}."""
    rates = RATES[arch]
    demand = dict.fromkeys(PARTS, 0.0)
    imad = 0.0
    for instruction in instructions:
        op = instruction.op
        demand["issue"] += 1 / rates.issue
        demand["l2"] += instruction.tma_bytes / rates.l2 / num_warps  # once per program
        if op in MATRIX_OPS:
            demand["tensor"] += _mma_flops(instruction) / _mma_rate(instruction, rates)
            demand["shared"] += _mma_shared_bytes(instruction) / rates.shared
        elif op in FP32_OPS:
            demand["fp32"] += 32 / rates.fp32
        elif op == "IMAD":
            demand["fp32"] += 32 / rates.fp32
            imad += 32 / rates.imad
        elif op in HALF_OPS:
            demand["fp32"] += 32 / (rates.bf16x2 if "BF16" in instruction.opcode else rates.half2)
        elif op in MUFU_OPS:
            demand["mufu"] += 32 / rates.mufu
        elif op in SHUFFLE_OPS:
            demand["shared"] += 1
        elif op in SHARED_OPS or op in GLOBAL_OPS:
            size = 32 * access_bytes(instruction)
            demand["shared"] += size / rates.shared if op in SHARED_OPS else 0
            demand["memory"] += size / rates.memory if op in GLOBAL_OPS else 0
            demand["l2"] += size / rates.l2 if op in GLOBAL_OPS else 0
        elif not ISSUE_ONLY.match(op):
            demand["alu"] += 32 / rates.alu
    demand["fp32"] = max(demand["fp32"], imad)
    return {part: value * num_warps for part, value in demand.items()}


def in_step(instructions, arch, num_warps):
    """Cycles of an iteration if one program has the multiprocessor and its warps issue each instruction together."""
    costs = [cycles([i], arch, num_warps) for i in instructions]
    clock, wgmma, committed = 0.0, 0.0, []  # when the last wgmma so far is done, and each group of them
    free = dict.fromkeys(IN_ORDER, 0.0)
    for _ in range(4):  # until an iteration begins with what the one before left in flight
        begin = clock
        for i, cost in zip(instructions, costs, strict=True):
            if i.op == "HGMMA":
                wgmma = max(wgmma, clock) + cost["tensor"]
                if "gsb0" in i.operands:
                    committed.append(wgmma)
            elif i.opcode.startswith("WARPGROUP.DEPBAR"):
                pending = int(i.operands.split(",")[1], 16)
                clock = max([clock, *committed[: max(0, len(committed) - pending)]])
            elif i.op not in GLOBAL_OPS:
                parts = [part for part in IN_ORDER if cost[part]]
                clock = max([clock, *(free[part] for part in parts)])
                free.update({part: clock + cost[part] for part in parts})
            clock += cost["issue"]
    return clock - begin


def _mma_shape(instruction):
    """(M, N, K) of an HMMA, per warp, or an HGMMA, per group of four warps."""
    shape = instruction.opcode.split(".")[1]
    if "x" in shape:
        return tuple(int(size) for size in shape.split("x"))
    return {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}[shape]


def _mma_flops(instruction):
    m, n, k = _mma_shape(instruction)
    return 2 * m * n * k / (4 if instruction.op == "HGMMA" else 1)


def _mma_rate(instruction, rates):
    rate = rates.tensor * (rates.mma_sync if instruction.op == "HMMA" else 1)
    return rate / 2 if "TF32" in instruction.opcode else rate


def _mma_shared_bytes(instruction):
    """Bytes per warp that an HGMMA reads from shared memory: B always, A unless it comes in registers."""
    if instruction.op != "HGMMA":
        return 0
    m, n, k = _mma_shape(instruction)
    itemsize = 4 if "TF32" in instruction.opcode else 2
    first_source = instruction.operands.split(",")[1].strip()
    rows = n if first_source.startswith("R") else n + m
    return rows * k * itemsize / 4


def access_bytes(instruction):
    """Bytes per lane of a load or store: LDG.E.128, LDS.U16, LDSM.16.M88.4..."""
    parts = instruction.opcode.split(".")
    if instruction.op in ("LDSM", "STSM"):
        return 4 * int(parts[-1]) if parts[-1] in ("2", "4") else 4
    for suffix, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if suffix in parts[1:]:
            return size
    return 4


@dataclass(frozen=True)
class Bound:
    """Cycles per iteration of one program by part, the part that takes longest, and what it leaves of the peak."""

    cycles: dict
    limit: str  # the part with the most cycles
    peak: str  # "tensor" or "memory": whose peak `share` speaks of
    share: float  # of that peak, all parts overlapped
    in_step_share: float | None  # of the tensor peak, one program alone with its warps in step
    flops: float  # that the tensor cores do in an iteration, wanted or not
    is_loop: bool
    wgmma_waits: float  # per wgmma of the loop; 1: ptxas makes each wait for the one before


def bound(blocks, arch, num_warps):
    """The Bound of a kernel's hottest loop."""
    loop = hottest_loop(blocks, arch)
    demand = cycles(loop.instructions, arch, num_warps)
    peak = "tensor" if demand["tensor"] else "memory"
    unused = "memory" if peak == "tensor" else "l2"
    parts = {part: value for part, value in demand.items() if part != unused}
    limit = max(parts, key=parts.get)
    largest = parts[limit]
    share = parts[peak] / largest if largest else 0.0
    alone = None
    if peak == "tensor":  # operands from shared memory are in the bound only
        alone = min(share, parts["tensor"] / in_step(loop.instructions, arch, num_warps))
    flops = num_warps * sum(_mma_flops(i) for i in loop.instructions if i.op in MATRIX_OPS)
    waits = sum(i.opcode.startswith("WARPGROUP.DEPBAR") for i in loop.instructions)
    wgmmas = sum(i.op == "HGMMA" for i in loop.instructions)
    return Bound(parts, limit, peak, share, alone, flops, loop.is_loop, waits / max(1, wgmmas))
