"""What torch.compile sees of each operator, for a GPU that is not there: one JSON object a line.

Runs as a process of its own, without TRITON_INTERPRET, on meta tensors.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from aot_cases import CASES
from compile_kernels import AbsentGpu
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch.fx import GraphModule
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from lcr2s_ext.ops import _registration
from lcr2s_ext.triton import MODULES, _launch


def trace(call: Callable[..., torch.Tensor], arguments: tuple[Any, ...]) -> list[list[str]]:
    """The calls in the graph of the forward, and in that of the backward if there is one."""
    graphs: list[list[str]] = []

    def keep(module: GraphModule, inputs: list[Any]) -> Any:
        graphs.append([str(node.target) for node in module.graph.nodes if node.op == "call_function"])
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    out = torch.compile(call, fullgraph=True, dynamic=True, backend=backend)(*arguments)
    if out.requires_grad:
        out.sum().backward()
    return graphs


def few_rows(argument: Any) -> Any:
    """A tensor's first rows: more of them are more slabs of the same kernels."""
    return argument[:512].clone() if isinstance(argument, torch.Tensor) and argument.dim() else argument


def main() -> None:
    driver.set_active(AbsentGpu(90))
    _launch.off_cuda_capability = 90
    for op, module in MODULES.items():
        _registration._load_triton(module)
        operator = getattr(torch.ops.lcr2s_triton, op)
        arguments = next(case for case in CASES if case.op == op).arguments()
        if module != "support_attention":  # whose index fixes every size
            arguments = tuple(few_rows(argument) for argument in arguments)
        if module != "retrieval":
            for features in arguments[:2]:
                features.requires_grad_()
        forward, *backward = trace(lambda *a, operator=operator: operator(*a)[0], arguments)
        # What a graph keeps beside its tensors is the same at every call.
        constants = [value for kept in kernel_side_table.constant_args.values() for value in kept.values()]
        baked = sum(isinstance(value, TensorDescriptor) for value in constants)
        print(json.dumps({"op": op, "forward": forward, "backward": backward, "baked": baked}), flush=True)


if __name__ == "__main__":
    main()
