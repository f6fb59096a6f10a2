#pragma once

#include "../support_attention.h"

// Launches on `stream`, which belongs to the current device; null, or what CUDA has to say against the launch.
namespace lcr2s::cuda {

const char* support_attention(const SupportAttentionArgs& args, void* stream);
const char* support_attention_backward(const SupportAttentionBackwardArgs& args, void* stream);

}  // namespace lcr2s::cuda
