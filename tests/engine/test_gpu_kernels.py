"""The engine's Triton kernels, where there is no GPU: their numbers in Triton's interpreter, and that they compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ATTENTION = {
    "q": "*bf16", "k": "*bf16", "v": "*bf16", "keys": "*bf16", "values": "*bf16", "out": "*bf16", "tables": "*i32",
    "seen": "*i32", "partial": "*fp32", "arrived": "*i32", "q_row": "i32", "q_head": "i32", "k_row": "i32",
    "k_head": "i32", "v_row": "i32", "v_head": "i32", "out_row": "i32", "out_head": "i32", "table_row": "i32",
    "seen_row": "i32", "scale": "fp32",
}  # fmt: skip
LINEAR = {
    "x": "*bf16", "weight": "*bf16", "scale": "*fp32", "bias": "*bf16", "norm_weight": "*bf16", "norm_bias": "*bf16",
    "residual": "*bf16", "y": "*bf16", "num_rows": "i32", "in_features": "i32", "out_features": "i32",
    "epsilon": "fp32", "smallest": "fp32",
}  # fmt: skip


def test_the_kernels_match_torch_in_tritons_interpreter() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when a kernel is defined, so: a process of its own
    script = Path(__file__).with_name("interpreted_kernels.py")
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


def compile_for(capability: int, kernel, signature: dict[str, str], constants: dict[str, object], num_warps: int):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
    assert f".target sm_{capability}" in compiled.asm["ptx"] and compiled.asm["cubin"]
    return compiled


@pytest.fixture(params=[(80, False), (90, True)], ids=["sm_80", "sm_90, overlapping"])
def target(request, tmp_path, monkeypatch) -> tuple[int, bool]:
    pytest.importorskip("triton", reason="needs Triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return request.param


@pytest.mark.parametrize(("width", "splits", "has_new"), [(64, 16, True), (24, 1, False)])
def test_the_attention_kernel_compiles_without_a_gpu(target, width: int, splits: int, has_new: bool) -> None:
    from app.engine.kernels import paged_attention as module

    capability, overlaps = target
    padded = 1 << (width - 1).bit_length()
    constants = {
        "HAS_NEW": has_new, "HEADS": 4, "KV_HEADS": 2, "WIDTH": width, "PADDED_WIDTH": padded,
        "BLOCKS": module.blocks_at_once(padded), "BLOCK_SIZE": 16, "SPLITS": splits, "SPLIT_PLACES": 256,
        "OVERLAPS": overlaps,
    }  # fmt: skip
    compiled = compile_for(capability, module.paged_attention_kernel, ATTENTION, constants, module.NUM_WARPS)
    assert ("griddepcontrol.wait" in compiled.asm["ptx"]) == overlaps


@pytest.mark.parametrize("weights", ["bf16", "i8"])
def test_the_kernel_for_few_rows_compiles_without_a_gpu(target, weights: str) -> None:
    from app.engine.kernels import few_rows as module

    capability, overlaps = target
    block_out, block_in, num_warps = module.tile_of(2304, 768)
    is_int8 = weights == "i8"
    constants = {
        "NORM": 1, "GELU": True, "HAS_SCALE": is_int8, "ROUNDS": is_int8, "HAS_BIAS": True, "HAS_NORM_BIAS": True,
        "HAS_RESIDUAL": True, "BLOCK_OUT": block_out, "BLOCK_IN": block_in, "OVERLAPS": overlaps,
    }  # fmt: skip
    compile_for(capability, module.linear_kernel, {**LINEAR, "weight": f"*{weights}"}, constants, num_warps)


def test_the_kernels_for_tokens_compile_without_a_gpu(target) -> None:
    from app.engine.kernels import few_rows as module

    capability, overlaps = target
    embed = {"ids": "*i32", "seen": "*i32", "tokens": "*bf16", "positions": "*bf16", "y": "*bf16", "ids_row": "i32"}
    constants = {"HAS_POSITIONS": True, "BLOCK": 1024, "OVERLAPS": overlaps}
    compile_for(capability, module.embed_kernel, {**embed, "width": "i32"}, constants, 4)
    found = {"maxima": "*fp32", "places": "*i32"}
    sizes = {"logits_row": "i32", "vocab_size": "i32", "num_chunks": "i32"}
    largest = {"logits": "*bf16", **found, **sizes}
    compile_for(capability, module.largest_of_chunk_kernel, largest, {"CHUNK": 4096, "OVERLAPS": overlaps}, 8)
    taken = {**found, "tokens": "*i32", "ids": "*i32", "seen": "*i32", "ids_row": "i32", "num_chunks": "i32"}
    compile_for(capability, module.take_largest_kernel, taken, {"CHUNKS": 16, "OVERLAPS": overlaps}, 1)
