#pragma once

#include "../support_attention.h"

// Launches on `stream`, which belongs to the current device; null, or what CUDA has to say against the launch.
namespace lcr2s::cuda {

const char* support_attention(const SupportAttentionArgs& args, void* stream);

// Bytes of device memory, aligned to 16, that the backward works in.
int64_t support_attention_backward_workspace(const SupportAttentionShape& shape);
const char* support_attention_backward(const SupportAttentionBackwardArgs& args, void* workspace, void* stream);

}  // namespace lcr2s::cuda
