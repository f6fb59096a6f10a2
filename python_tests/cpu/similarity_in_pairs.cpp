// The similarity losses at the vector width that the test compiles them for, with and without the product of bfloat16
// pairs.
#include <stdlib.h>
#include <string.h>

#include "cpu/similarity.cpp"

using namespace lcr2s::cpu;

namespace {

Isa isa;

const Parallel kSerial{[](int64_t tasks, Parallel::Body body, void* context) {
  for (int64_t task = 0; task < tasks; ++task) body(task, context);
}};

struct Blocks {
  void* blocks[256];
  int count = 0;

  ~Blocks() {
    for (int i = 0; i < count; ++i) free(blocks[i]);
  }
  static void* take(int64_t bytes, void* context) {
    Blocks& self = *static_cast<Blocks*>(context);
    if (self.count == 256) abort();
    return self.blocks[self.count++] = aligned_alloc(64, static_cast<size_t>(bytes + 64) / 64 * 64);
  }
};

}  // namespace

Isa lcr2s::cpu::current_isa() { return isa; }

extern "C" void similarity_loss(bool in_pairs, int kind, const void* image, const void* text, int64_t rows,
                                int64_t columns, int64_t width, const int32_t* image_labels, const int32_t* text_labels,
                                const int32_t* image_positives, const int32_t* text_positives, float scale,
                                int64_t workspace_bytes, float* loss, float* grad_image, float* grad_text,
                                float* grad_scale) {
  isa = in_pairs ? Isa::avx512_bf16 : Isa::avx512;
  Blocks blocks;
  SimilarityArgs args{};
  args.kind = static_cast<SimilarityLoss>(kind);
  args.image = {image, lcr2s::DType::bfloat16, rows, width, width};
  args.text = {text, lcr2s::DType::bfloat16, columns, width, width};
  args.image_labels = image_labels;
  args.text_labels = text_labels;
  args.image_positives = image_positives;
  args.text_positives = text_positives;
  args.logit_scale = &scale;
  args.eps = 1e-8;
  args.margin = 0.1;
  args.tau = 0.02;
  args.workspace_bytes = workspace_bytes;
  args.memory = {&Blocks::take, &blocks};
  args.loss = loss;
  args.grad_image = grad_image;
  args.grad_text = grad_text;
  args.grad_scale = grad_scale;
  LCR2S_ISA::similarity(args, kSerial);
}
