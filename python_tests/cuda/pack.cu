#include "pack.h"

#include "cuda/launch.h"
#include "cuda/warp.h"

namespace lcr2s::cuda {

namespace {

constexpr int kPackThreads = 256;

// One warp a row, whose source elements are S; T has 16 / sizeof(T) elements in the 16 bytes that a lane writes at
// once.
template <class S, class T>
class RowPacker {
 public:
  static constexpr int kPack = kPackBytes / static_cast<int>(sizeof(T));

  __device__ RowPacker(const PackArgs& args, int64_t row)
      : width_(args.features.width),
        packs_(ceil_div(width_, kPack)),
        source_(static_cast<const S*>(args.features.data) + row * args.features.stride),
        aligned_(reinterpret_cast<uintptr_t>(source_) % sizeof(Pack<S, kPack>) == 0) {}

  __device__ int64_t packs() const { return packs_; }

  __device__ void load(int64_t pack, double (&x)[kPack]) const {
    const int64_t begin = pack * kPack;
    if (aligned_ && begin + kPack <= width_) {
      const Pack<S, kPack> values = load_pack<S, kPack>(source_ + begin);
#pragma unroll
      for (int i = 0; i < kPack; ++i) x[i] = static_cast<double>(to_accumulate(values.at[i]));
    } else {
#pragma unroll
      for (int i = 0; i < kPack; ++i)
        x[i] = begin + i < width_ ? static_cast<double>(to_accumulate(source_[begin + i])) : 0.0;
    }
  }

  // Of factor times the row.
  __device__ double sum_of_squares(double factor) const {
    double sum = 0;
    for (int64_t pack = lane_index(); pack < packs_; pack += kWarp) {
      double x[kPack];
      load(pack, x);
#pragma unroll
      for (int i = 0; i < kPack; ++i) sum += (factor * x[i]) * (factor * x[i]);
    }
    return warp_sum(sum);
  }

 private:
  int64_t width_;
  int64_t packs_;
  const S* source_;
  bool aligned_;
};

template <class S, class T>
__global__ void __launch_bounds__(kPackThreads) pack_unit_rows_kernel(const __grid_constant__ PackArgs args) {
  using Packer = RowPacker<S, T>;
  constexpr int kPack = Packer::kPack;
  const cpu::Features& features = args.features;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kPackThreads / kWarp) + warp_index();
  const Panels panels = make_panels(args.panels, features.rows, features.width, sizeof(T));
  if (row >= features.rows) {
    if (args.panels == nullptr || row >= panel_row_tiles(features.rows) * kPanelRows) return;
    for (int64_t pack = lane_index(); pack < panels.k_chunks * (kPanelRowBytes / kPackBytes); pack += kWarp)
      store_pack(panel_element<T>(panels, row, pack * kPack), Pack<T, kPack>{});
    return;
  }
  const Packer packer(args, row);
  double inverse = 1;
  double norm = 1;
  if (args.normalise || args.norms != nullptr) {
    double factor = 1;
    double sum = packer.sum_of_squares(factor);
    if (sum < 0x1p-900 || sum > 0x1p900) {
      // Squares of float64 features may leave the range.
      factor = sum < 1 ? 0x1p500 : 0x1p-500;
      sum = packer.sum_of_squares(factor);
      if (sum > 0x1p1000) sum = static_cast<double>(float_of_bits(0x7fc00000u));
    }
    norm = sqrt(sum) / factor;
    inverse = sum == 0 ? 0.0 : factor / sqrt(sum);
  }
  if (args.norms != nullptr && lane_index() == 0)
    static_cast<Accumulate<T>*>(args.norms)[row] = static_cast<Accumulate<T>>(norm);
  if (!args.normalise) inverse = 1;
  T* unit = args.unit == nullptr ? nullptr : static_cast<T*>(args.unit) + row * args.unit_stride;
  const int64_t packs = args.panels == nullptr ? packer.packs() : panels.k_chunks * (kPanelRowBytes / kPackBytes);
  for (int64_t pack = lane_index(); pack < packs; pack += kWarp) {
    double x[kPack];
    packer.load(pack, x);
    Pack<T, kPack> out;
#pragma unroll
    for (int i = 0; i < kPack; ++i) out.at[i] = from_accumulate<T>(static_cast<Accumulate<T>>(x[i] * inverse));
    const int64_t begin = pack * kPack;
    // Padding stays zero in a row of NaN.
    if (begin + kPack > features.width)
#pragma unroll
      for (int i = 0; i < kPack; ++i)
        if (begin + i >= features.width) out.at[i] = T{};
    if (args.panels != nullptr) store_pack(panel_element<T>(panels, row, begin), out);
    if (unit == nullptr) continue;
    if (begin + kPack <= features.width && reinterpret_cast<uintptr_t>(unit) % kPackBytes == 0) {
      store_pack(unit + begin, out);
    } else {
#pragma unroll
      for (int i = 0; i < kPack; ++i)
        if (begin + i < features.width) unit[begin + i] = out.at[i];
    }
  }
}

template <class S, class T>
const char* launch_pack(const PackArgs& args, void* stream) {
  const int64_t rows =
      args.panels == nullptr ? args.features.rows : panel_row_tiles(args.features.rows) * int64_t{kPanelRows};
  return launch(pack_unit_rows_kernel<S, T>, ceil_div(rows, kPackThreads / kWarp), kPackThreads, 0, stream, args);
}

}  // namespace

const char* pack_unit_rows(const PackArgs& args, void* stream) {
  const DType from = args.features.dtype;
  switch (args.element) {
    case DType::float64:
      switch (from) {
        case DType::float32:
          return launch_pack<float, double>(args, stream);
        case DType::float64:
          return launch_pack<double, double>(args, stream);
        case DType::bfloat16:
          return launch_pack<BFloat16, double>(args, stream);
        case DType::float16:
          return launch_pack<Half, double>(args, stream);
      }
      break;
    case DType::float32:
      if (from == DType::float32) return launch_pack<float, float>(args, stream);
      if (from == DType::bfloat16) return launch_pack<BFloat16, float>(args, stream);
      if (from == DType::float16) return launch_pack<Half, float>(args, stream);
      break;
    case DType::bfloat16:
      if (from == DType::bfloat16) return launch_pack<BFloat16, BFloat16>(args, stream);
      break;
    case DType::float16:
      if (from == DType::float16) return launch_pack<Half, Half>(args, stream);
      break;
  }
  return "pack_unit_rows: the elements of the panels are narrower than the features";
}

}  // namespace lcr2s::cuda
