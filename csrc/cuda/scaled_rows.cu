#include "scaled_rows.h"

#include "loss_common.h"

namespace lcr2s::cuda {

namespace {

constexpr int kThreads = 256;

// One warp a row, 16 bytes of the operand a lane.
template <class Element>
__global__ void __launch_bounds__(kThreads) scaled_rows_kernel(const __grid_constant__ ScaledRowsArgs args) {
  using T = Accumulate<Element>;
  constexpr int kPack = kPackBytes / static_cast<int>(sizeof(Element));
  int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + warp_index();
  int at = 0;
  while (at < args.count && row >= padded_rows(args.sides[at].features.rows))
    row -= padded_rows(args.sides[at++].features.rows);
  if (at == args.count) return;
  const ScaledRows& side = args.sides[at];
  const Features& features = side.features;
  const int lane = lane_index();
  const bool inside = row < features.rows;
  const int64_t source = inside && side.order != nullptr ? side.order[row] : row;
  const double inverse = inside ? inverse_norm(features, source, lane) : 0;
  const int exponent = row_exponent(inverse);
  // 2^exponent may leave the range of double.
  const double first = scalbn(1.0, exponent / 2), second = scalbn(1.0, exponent - exponent / 2);
  if (lane == 0) {
    static_cast<T*>(side.factor)[row] = static_cast<T>(inverse / first / second);
    if (side.not_finite != nullptr && inverse != inverse) *side.not_finite = 1;
  }
  const Panels panels = make_panels(side.panels, features.rows, features.width, sizeof(Element));
  const int64_t packs = panels.k_chunks * (kPanelRowBytes / kPackBytes);
  Element* operand = side.operand == nullptr || row >= side.operand_rows
                         ? nullptr
                         : static_cast<Element*>(side.operand) + row * side.operand_stride;
  for (int64_t pack = lane; pack < packs; pack += kWarp) {
    double x[kPack] = {};
    if (inside) elements_at(features, source, pack * kPack, x);
    Pack<Element, kPack> out;
#pragma unroll
    for (int u = 0; u < kPack; ++u) out.at[u] = narrowed<Element>(x[u] * first * second);
    store_pack(panel_element<Element>(panels, row, pack * kPack), out);
    if (operand != nullptr && pack * kPack < side.operand_stride) store_pack(operand + pack * kPack, out);
  }
}

template <class Element>
const char* launch_for(const ScaledRowsArgs& args, void* stream) {
  int64_t rows = 0;
  for (int at = 0; at < args.count; ++at) rows += padded_rows(args.sides[at].features.rows);
  return launch(scaled_rows_kernel<Element>, ceil_div(rows, kThreads / kWarp), kThreads, 0, stream, args);
}

}  // namespace

const char* scaled_rows(const ScaledRowsArgs& args, void* stream) {
  switch (args.element) {
    case DType::float32:
      return launch_for<float>(args, stream);
    case DType::float64:
      return launch_for<double>(args, stream);
    case DType::bfloat16:
      return launch_for<BFloat16>(args, stream);
    case DType::float16:
      return launch_for<Half>(args, stream);
  }
  return "unknown dtype";
}

}  // namespace lcr2s::cuda
