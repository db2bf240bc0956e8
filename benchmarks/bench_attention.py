"""kv_attention_ against torch: write the new keys and values by index, build the mask, scaled_dot_product_attention.

invoke benchmark --only attention
"""

import pytest
import torch
from cases import Attention, attention_inputs

from gptcore import kernels

GRID = [
    Attention(
        lengths=(n_keys - n_new,) * n_row,
        n_head=12,
        n_kv_head=n_kv_head,
        n_new=n_new,
        d_head=d,
        n_context=max(1024, n_keys),
    )
    for n_row, n_kv_head, n_new, d in ((1, 12, 1, 64), (1, 4, 1, 128), (8, 12, 1, 64), (1, 12, 4, 64), (1, 12, 64, 64))
    for n_keys in (64, 256, 1024, 4096)
    if n_row == 1 or n_keys <= 1024
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", GRID, ids=str)
def bench_kv_attention(race, benchmark, case, dtype):
    args, rules = attention_inputs(case, dtype)
    n_keys = rules["n_keys"]
    n_bytes = 2 * len(case.lengths) * case.n_kv_head * n_keys * case.d_head * dtype.itemsize
    benchmark.group = f"kv_attention {case} {str(dtype)[6:]}, {torch.get_num_threads()} threads"
    benchmark.extra_info["n_bytes"] = n_bytes

    def way(mode):
        def call():
            with kernels.using(mode):
                return kernels.kv_attention_(*args, **rules)

        return call

    ways = {mode: way(mode) for mode in ("native", "reference")}
    unit = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(ways["native"](), ways["reference"](), rtol=unit, atol=unit)
    cache = torch.cat([x[:, :, :n_keys].flatten() for x in args[3:5]]).view(torch.int32)
    with torch.no_grad():
        race(ways | {"read": lambda: cache.sum(dtype=torch.int32)})
