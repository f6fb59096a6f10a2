"""The tests of the kernels' paths need a GPU, or the build whose CPU tensors run the CUDA kernels (`make emulate`)."""

import torch

from lcr2s_ext.ops import _library

RUNS_CUDA_KERNELS = _library.compiled() and (torch.ops.lcr2s.emulates_cuda() or torch.cuda.is_available())

collect_ignore_glob = [] if RUNS_CUDA_KERNELS else ["test_*_paths.py"]
