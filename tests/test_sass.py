"""The parser of machine code, its loop search and its cycle model, against code counted by hand."""

import pytest

from bench import sass

# One loop whose barrier wait retries out of line, as ptxas writes it: .L_x_3 jumps back into the loop's body.
HOPPER_LOOP = """
	.section	.text.toy,"ax",@progbits
.text.toy:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_0:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8+0x18000], R5 ;
        /*0030*/              @!P0 BRA `(.L_x_3) ;
.L_x_1:
        /*0040*/                   WARPGROUP.ARRIVE ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20].tnspB, R24 ;
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R88, R4, gdesc[UR28].tnspB, R88, gsb0 ;
        /*0070*/                   FFMA R5, R5, R6, R7 ;
        /*0080*/                   FMNMX R5, R5, R6, !PT ;
        /*0090*/                   MUFU.EX2 R5, R28 ;
        /*00a0*/                   IMAD R5, R5, R6, R7 ;
        /*00b0*/               @P3 SYNCS.ARRIVE.TRANS64 RZ, [UR41+0x10000], R5 ;
        /*00c0*/               @P1 BRA `(.L_x_4) ;
        /*00d0*/                   FADD R5, R5, R6 ;
.L_x_4:
        /*00e0*/               @P2 BRA `(.L_x_0) ;
.L_x_2:
        /*00f0*/                   EXIT ;
.L_x_3:
        /*0100*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8+0x18000], R5 ;
        /*0110*/              @!P0 BRA `(.L_x_3) ;
        /*0120*/                   BRA `(.L_x_1) ;
.L_x_5:
        /*0130*/                   BRA `(.L_x_5);
"""


def one_iteration(listing, arch="sm_90"):
    return [i.opcode for i in sass.hottest_loop(sass.parse(listing), arch).instructions]


def test_parse_splits_at_labels_and_branches():
    blocks = sass.parse(HOPPER_LOOP)
    assert [len(b.instructions) for b in blocks] == [2, 2, 9, 1, 1, 1, 2, 1, 1]
    assert [b.successors for b in blocks] == [[1, 5], [2, 6], [3, 4], [4], [1, 5], [], [6, 7], [2], [8]]
    guarded = blocks[1].instructions[-1]
    assert (guarded.address, guarded.guard, guarded.op) == (0x30, "@!P0", "BRA")


def test_dominators():
    masks = sass.dominators(sass.parse(HOPPER_LOOP))
    assert [bin(m).count("1") for m in masks] == [1, 2, 3, 4, 4, 2, 3, 4, 0]
    assert masks[6] == 0b1000011, "the retry is reached through the entry and the wait"


def test_the_loop_leaves_out_retries_and_conditional_code():
    blocks = sass.parse(HOPPER_LOOP)
    found = sass.natural_loops(blocks)
    assert found[1] == ({1, 2, 3, 4, 6, 7}, {4}) and found[6] == ({6}, {6})
    opcodes = one_iteration(HOPPER_LOOP)
    assert len(opcodes) == 2 + 9 + 1
    assert "FADD" not in opcodes, "it stands behind a branch"
    assert sum("TRYWAIT" in op for op in opcodes) == 1, "the wait once, its retry never"


def test_cycles_of_a_hopper_iteration_counted_by_hand():
    """8 warps, two groups of four. Tensor: 2 * (2*64*128*16 + 2*64*64*16) FLOP / 4096. Shared memory: both operands of
    the first HGMMA, (64 + 128) rows * 32 bytes, and B of the second, 64 * 32, for two groups, / 128. MUFU 8 * 32 / 16.
    fp32: FFMA and IMAD on 128 lanes, 4, but IMAD alone on its 64: 4. ALU: FMNMX on 64. Issue: 12 * 8 / 4. L2: what the
    one barrier announces, whatever the number of warps."""
    blocks = sass.parse(HOPPER_LOOP, [388])
    demand = sass.cycles(sass.hottest_loop(blocks, "sm_90").instructions, "sm_90", num_warps=8)
    assert demand == pytest.approx(
        {"tensor": 192, "mufu": 16, "fp32": 4, "alu": 4, "shared": 128, "l2": 10, "memory": 0, "issue": 24}
    )
    limit = sass.bound(blocks, "sm_90", num_warps=8)
    assert (limit.limit, limit.peak, limit.share, limit.is_loop) == ("tensor", "tensor", 1.0, True)
    assert limit.in_step_share == 1.0, "nothing waits for the products"


SOFTMAX_LOOP = """
.text.toy:
.L_x_0:
        /*0000*/                   WARPGROUP.ARRIVE ;
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR20], R24, gsb0 ;
{before}
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, {pending} ;
{after}
        /*0050*/               @P2 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("before", "pending", "after", "expected"),
    [
        # 8 warps, 2 cycles an instruction. The product takes 64 from cycle 2; a second MUFU waits for the first's 16.
        ("", "0x0", "", 2 + 64 + 2 + 2),
        ("", "0x0", "MUFU MUFU", 2 + 64 + 2 + 16 + 2 + 2),
        ("MUFU MUFU", "0x0", "", 2 + 64 + 2 + 2),
        ("MUFU MUFU MUFU MUFU MUFU", "0x0", "FADD", 5 * 16),  # more of them than the product hides
        ("MUFU", "0x1", "MUFU", 64),  # it waits for the product of the iteration before: back to back
    ],
)
def test_in_step_hides_what_stands_between_a_product_and_its_wait(before, pending, after, expected):
    lines = [
        "\n".join(f"        /*00{i}{j:x}*/                   {op}.X R1, R2 ;" for j, op in enumerate(ops.split()))
        for i, ops in ((2, before), (4, after))
    ]
    blocks = sass.parse(SOFTMAX_LOOP.format(before=lines[0], pending=pending, after=lines[1]))
    loop = sass.hottest_loop(blocks, "sm_90")
    assert sass.in_step(loop.instructions, "sm_90", num_warps=8) == pytest.approx(expected)
    limit = sass.bound(blocks, "sm_90", num_warps=8)
    assert limit.in_step_share == pytest.approx(min(1.0, 64 / expected))
    assert limit.wgmma_waits == 1.0


AMPERE_LOOP = """
.text.toy:
.L_x_0:
        /*0000*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR6][R4.64] ;
        /*0010*/                   LDSM.16.M88.4 R60, [R19+0x4000] ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/                   HMMA.1688.F32.TF32 R4, R8, R12, R4 ;
        /*0040*/                   FADD R1, R2, R3 ;
        /*0050*/                   HFMA2.BF16_V2 R1, R2, R3, R4 ;
        /*0060*/                   MUFU.EX2 R5, R28 ;
        /*0070*/                   SHFL.BFLY PT, R1, R2, 0x1, 0x1f ;
        /*0080*/                   BRA.U UP0, `(.L_x_0) ;
        /*0090*/                   EXIT ;
"""


def test_cycles_of_an_ampere_iteration_counted_by_hand():
    """4 warps. Tensor: 4 * (4096 / 2048 + 2048 / 1024). Shared: LDGSTS and LDSM 512 bytes each, a shuffle one cycle:
    4 * (4 + 4 + 1). fp32: FADD 32/64, packed bf16 32/64. 4 * 512 bytes come through L2 (or, were there no matmul, from
    memory)."""
    blocks = sass.parse(AMPERE_LOOP)
    demand = sass.cycles(sass.hottest_loop(blocks, "sm_80").instructions, "sm_80", num_warps=4)
    assert demand == pytest.approx(
        {
            "tensor": 16,
            "mufu": 8,
            "fp32": 4,
            "alu": 0,
            "shared": 36,
            "l2": 2048 / 47.4,
            "memory": 2048 / 13.4,
            "issue": 9,
        }
    )
    limit = sass.bound(blocks, "sm_80", num_warps=4)
    assert (limit.limit, limit.peak) == ("l2", "tensor") and limit.share == pytest.approx(16 * 47.4 / 2048)
    assert "memory" not in limit.cycles


def test_mma_sync_on_hopper_is_slower_than_wgmma():
    instruction = sass.Instruction(0, "", "HMMA.16816.F32.BF16", "R4, R8, R12, R4")
    assert sass.cycles([instruction], "sm_90", 4)["tensor"] == pytest.approx(4 * 4096 / (0.62 * 4096))


NESTED = """
.text.toy:
        /*0000*/                   MOV R1, R2 ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR6][R4.64] ;
.L_x_1:
        /*0020*/                   LDG.E.U16 R4, desc[UR6][R4.64] ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
        /*0040*/                   STG.E.64 desc[UR6][R4.64], R8 ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
"""


def test_an_outer_loop_is_counted_without_its_inner_one():
    found = sorted([i.opcode for i in loop.instructions] for loop in sass.loops(sass.parse(NESTED)))
    assert found == [["LDG.E.128", "STG.E.64", "BRA"], ["LDG.E.U16", "BRA"]]
    assert one_iteration(NESTED) == ["LDG.E.128", "STG.E.64", "BRA"], "no matmul: the loop that moves the most bytes"


TWO_LOOPS = """
.text.toy:
.L_x_0:
        /*0000*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0010*/                   FSEL R1, R2, R3, P0 ;
        /*0020*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0050*/                   FADD R1, R2, R3 ;
        /*0060*/                   FADD R1, R2, R3 ;
        /*0070*/                   FADD R1, R2, R3 ;
        /*0080*/               @P0 BRA `(.L_x_2) ;
        /*0090*/                   EXIT ;
"""


def test_of_two_equal_matmul_loops_the_shorter_is_hot():
    assert len(sass.loops(sass.parse(TWO_LOOPS))) == 3
    assert one_iteration(TWO_LOOPS, "sm_80") == ["HMMA.16816.F32.BF16", "BRA"]


def test_without_a_loop_the_kernel_is_the_iteration():
    listing = "\n".join(line for line in NESTED.splitlines() if "BRA" not in line and ".L" not in line)
    limit = sass.bound(sass.parse(listing), "sm_90", num_warps=4)
    assert not limit.is_loop and (limit.limit, limit.peak, limit.share) == ("memory", "memory", 1.0)
    assert limit.cycles["memory"] == pytest.approx(4 * 32 * (16 + 2 + 8) / 13.9)


def test_reconvergence_goes_where_bssy_said():
    listing = """
.text.toy:
        /*0000*/                   BSSY B0, `(.L_x_1) ;
        /*0010*/               @P0 BRA `(.L_x_0) ;
        /*0020*/                   BSYNC B0 ;
.L_x_0:
        /*0030*/                   MOV R1, R2 ;
.L_x_1:
        /*0040*/                   EXIT ;
"""
    assert [b.successors for b in sass.parse(listing)] == [[1, 2], [3], [3], []]


@pytest.mark.parametrize(
    "opcode, size",
    [("LDG.E.128", 16), ("LDG.E.64.CONSTANT", 8), ("STG.E", 4), ("LDG.E.U16", 2), ("LDS.U8", 1), ("LDSM.16.M88.2", 8),
     ("LDSM.16.MT88.4", 16), ("LDSM.16.M88", 4)],
)  # fmt: skip
def test_access_bytes(opcode, size):
    assert sass.access_bytes(sass.Instruction(0, "", opcode, "")) == size


def test_bytes_of_tma_loads_come_from_the_ptx():
    ptx = """
	@%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r62], 16384;
	@%p9 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r65], 8192;
	@%p9 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r65], 8192;
"""
    assert sass.expected_bytes(ptx) == [16384, 8192, 8192]
    arrive = "/*0000*/ SYNCS.ARRIVE.TRANS64 RZ, [UR8], R5 ;\n"
    silent = "/*0000*/ SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR8], RZ ;\n"
    sizes = [i.tma_bytes for i in sass.parse(arrive + silent + arrive * 2, [16384, 8192, 8192])[0].instructions]
    assert sizes == [16384, 0, 8192, 8192]
    sizes = [i.tma_bytes for i in sass.parse(arrive * 4, [16384, 8192, 8192])[0].instructions]
    assert sizes == [8192] * 4, "one was copied: the commonest size stands for all"
