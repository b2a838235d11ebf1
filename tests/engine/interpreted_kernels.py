"""The Triton kernels against torch, in Triton's interpreter: `test_gpu_kernels` runs this as a process of its own."""

import random

import torch
import torch.nn.functional as F
from torch import nn

from app.engine.blocks import BLOCK_SIZE, blocks_for
from app.engine.kernels import CachedLayer
from app.engine.kernels.few_rows import FewRows
from app.engine.kernels.paged_attention import PagedAttention
from app.models.quantization.int8 import Int8Dynamic, Int8Weight

CPU = torch.device("cpu")


def check_attention(width: int, *, heads: int, kv_heads: int, lengths: list[int], dtype: torch.dtype, is_new: bool):
    draw = random.Random(width)
    num_blocks = sum(blocks_for(length) for length in lengths) + 3
    free = draw.sample(range(num_blocks), num_blocks)
    longest = blocks_for(max(lengths)) + 2
    tables = torch.zeros(len(lengths), longest, dtype=torch.int32)
    for row, length in enumerate(lengths):
        for number in range(blocks_for(length)):
            tables[row, number] = free.pop()
    keys = torch.randn(num_blocks, kv_heads, width, BLOCK_SIZE).to(dtype)
    values = torch.randn(num_blocks, kv_heads, BLOCK_SIZE, width).to(dtype)
    q = torch.randn(heads, len(lengths), width).transpose(0, 1)
    k, v = (torch.randn(len(lengths), kv_heads, width).to(dtype).float() for _ in "kv")  # the interpreter cuts bits off
    expected_keys, expected_values = keys.clone(), values.clone()
    if is_new:
        for row, length in enumerate(lengths):
            if length:
                block = tables[row, (length - 1) // BLOCK_SIZE]
                expected_keys[block, :, :, (length - 1) % BLOCK_SIZE] = k[row].to(dtype)
                expected_values[block, :, (length - 1) % BLOCK_SIZE] = v[row].to(dtype)
    expected = torch.zeros(len(lengths), heads, width)
    for row, length in enumerate(lengths):
        if length:
            blocks = tables[row, : blocks_for(length)]
            seen_keys = expected_keys[blocks].permute(1, 0, 3, 2).flatten(1, 2)[:, :length].float()
            seen_values = expected_values[blocks].permute(1, 0, 2, 3).flatten(1, 2)[:, :length].float()
            group = heads // kv_heads
            seen_keys, seen_values = (part.repeat_interleave(group, 0) for part in (seen_keys, seen_values))
            expected[row] = F.scaled_dot_product_attention(q[row].unsqueeze(1), seen_keys, seen_values).squeeze(1)
    out = torch.full((len(lengths), heads, width), float("nan"))
    attention = PagedAttention(max_rows=len(lengths), num_heads=heads, head_width=width, device=CPU)
    seen = torch.tensor(lengths, dtype=torch.int32)
    for _ in range(2):  # the second time finds the counters of splits as the first did
        if is_new:
            attention.attend_new(q, k, v, CachedLayer(keys, values), out, tables=tables, seen=seen)
        else:
            attention.attend(q, CachedLayer(keys, values), out, tables=tables, seen=seen)
        has_seen = seen > 0
        torch.testing.assert_close(out[has_seen], expected[has_seen], rtol=1e-5, atol=1e-5)
        assert out.isfinite().all()
    assert torch.equal(keys, expected_keys) and torch.equal(values, expected_values)


def check_write(dtype: torch.dtype) -> None:
    keys, values = torch.randn(5, 2, 24, BLOCK_SIZE).to(dtype), torch.randn(5, 2, BLOCK_SIZE, 24).to(dtype)
    expected = keys.clone(), values.clone()
    k, v = (torch.randn(2, 3, 24).to(dtype).float().transpose(0, 1) for _ in "kv")
    blocks, offsets = torch.tensor([4, 0, 4]), torch.tensor([3, 15, 4])
    expected[0][blocks, :, :, offsets], expected[1][blocks, :, offsets] = k.to(dtype), v.to(dtype)
    attention = PagedAttention(max_rows=1, num_heads=2, head_width=24, device=CPU)
    attention.write(k, v, CachedLayer(keys, values), blocks=blocks, offsets=offsets)
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])


def check_linear(inputs: int, outputs: int, *, rows: int, bias: bool) -> None:
    few_rows = FewRows()
    linear = nn.Linear(inputs, outputs, bias=bias)
    x, residual = torch.randn(rows, inputs), torch.randn(rows, outputs)
    layer_norm, rms_norm = nn.LayerNorm(inputs), nn.RMSNorm(inputs)
    nn.init.normal_(layer_norm.weight)
    nn.init.normal_(layer_norm.bias)
    nn.init.normal_(rms_norm.weight)
    for layer in (linear, *(quantized(linear, kind) for kind in (Int8Weight, Int8Dynamic))):
        for norm in (None, layer_norm, rms_norm):
            expected = layer(x if norm is None else norm(x))
            result = few_rows.linear(layer, x, norm=norm)
            if isinstance(layer, Int8Dynamic) and norm is not None:  # a rounding may fall to the other side
                assert (result - expected).norm() <= 0.01 * expected.norm()
            else:
                torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
        result = few_rows.linear(layer, x, is_gelu=True, residual=residual)
        expected = F.gelu(layer(x), approximate="tanh") + residual
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def quantized(linear: nn.Linear, kind) -> nn.Module:
    layer = kind(linear.in_features, linear.out_features, bias=linear.bias is not None)
    layer.store(linear.weight)
    if linear.bias is not None:
        layer.bias = linear.bias.data
    return layer


def check_tokens() -> None:
    few_rows = FewRows()
    tokens, positions = torch.randn(70, 24), torch.randn(9, 24)
    inputs = torch.tensor([[5, 1, 9], [69, 9, 9], [0, 0, 9]], dtype=torch.int32)
    ids, seen = inputs[:, 0], inputs[:, 1]
    embedded = few_rows.embed(ids, seen, tokens, positions)
    torch.testing.assert_close(embedded, tokens[ids.long()] + positions[torch.tensor([0, 8, 0])])
    torch.testing.assert_close(few_rows.embed(ids, seen, tokens, None), tokens[ids.long()])
    logits = torch.randn(3, 9000).round()  # with ties
    chosen = torch.empty(3, dtype=torch.int32)
    few_rows.take_largest(logits, chosen, ids, seen)
    assert torch.equal(chosen.long(), logits.argmax(dim=-1)) and torch.equal(ids, chosen)
    assert inputs[:, 1:].tolist() == [[2, 9], [10, 9], [0, 9]]


with torch.no_grad():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        check_attention(64, heads=3, kv_heads=3, lengths=[1, 17, 160, 0], dtype=dtype, is_new=True)
        check_write(dtype)
    check_attention(16, heads=2, kv_heads=2, lengths=[1, 16, 33], dtype=torch.float32, is_new=False)
    check_attention(24, heads=4, kv_heads=2, lengths=[5, 130], dtype=torch.float32, is_new=True)
    check_attention(128, heads=2, kv_heads=1, lengths=[70], dtype=torch.float32, is_new=True)
    check_attention(64, heads=1, kv_heads=1, lengths=[257], dtype=torch.float32, is_new=True)
    check_attention(16, heads=2, kv_heads=1, lengths=[900], dtype=torch.float32, is_new=True)  # split
    check_linear(64, 40, rows=1, bias=True)
    check_linear(50, 19, rows=3, bias=False)
    check_tokens()
