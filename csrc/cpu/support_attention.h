#pragma once

#include "../support_attention.h"
#include "dispatch.h"

namespace lcr2s::cpu {

LCR2S_KERNEL(support_attention, SupportAttentionArgs)
LCR2S_KERNEL(support_attention_backward, SupportAttentionBackwardArgs)

}  // namespace lcr2s::cpu
