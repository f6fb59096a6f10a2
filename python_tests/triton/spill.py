"""Resource use of one kernel, first as it is, then with too few registers: one JSON object a line."""

import json

import torch
import triton
import triton.language as tl
from compile_kernels import AbsentGpu, resources
from triton.runtime import driver


@triton.jit
def crowded(left, right, result):
    at = tl.arange(0, 32)
    place = at[:, None] * 32 + at[None, :]
    tl.store(result + place, tl.dot(tl.load(left + place), tl.load(right + place), input_precision="ieee"))


driver.set_active(AbsentGpu(90))
for options in ({}, {"maxnreg": 24}):
    tensor = torch.empty(1024, device="meta")
    binary = crowded.warmup(tensor, tensor, tensor, grid=(1,), num_warps=4, **options)
    print(json.dumps(resources(binary.asm["cubin"])))
