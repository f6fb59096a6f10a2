"""Resource use of one kernel, first as it is, then with too few registers: one JSON object a line."""

import json

import torch
import triton
import triton.language as tl
from compile_kernels import AbsentGpu, resources
from triton.runtime import driver


@triton.jit
def crowded(source, result, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(source + at)
    tl.store(result + at, tl.sort(x) * tl.cumsum(x))


driver.set_active(AbsentGpu(90))
for options in ({}, {"maxnreg": 24}):
    tensor = torch.empty(4096, device="meta")
    binary = crowded.warmup(tensor, tensor, BLOCK=4096, grid=(1,), num_warps=4, **options)
    print(json.dumps(resources(binary.asm["cubin"])))
