#include "relation_kl.h"

#include "relation.h"
#include "tile_simt.h"
#include "tile_wgmma.h"

namespace lcr2s::cuda {

namespace {

template <template <class> class Launch, class Args>
const char* with_tile(DType element, const Args& args, int64_t tiles, void* stream) {
  switch (element) {
    case DType::float32:
      return Launch<TileSimt<float, kKlColumns>>::run(args, tiles, stream);
    case DType::float64:
      return Launch<TileSimt<double, kKlColumns>>::run(args, tiles, stream);
    case DType::bfloat16:
      return wgmma_runs_on(current_device().capability)
                 ? Launch<TileWgmma<BFloat16, kKlColumns>>::run(args, tiles, stream)
                 : Launch<TileMma<BFloat16, kKlColumns>>::run(args, tiles, stream);
    case DType::float16:
      return wgmma_runs_on(current_device().capability) ? Launch<TileWgmma<Half, kKlColumns>>::run(args, tiles, stream)
                                                        : Launch<TileMma<Half, kKlColumns>>::run(args, tiles, stream);
  }
  return "unknown dtype";
}

template <class Tile>
struct LaunchSums {
  static const char* run(const RelationKlSums& args, int64_t tiles, void* stream) {
    constexpr int kShared = kKlSumsBytes<Tile> > Tile::kSharedBytes ? kKlSumsBytes<Tile> : Tile::kSharedBytes;
    // An engine may keep something of its own behind its scratch memory.
    static_assert(kKlSumsBytes<Tile> <= Tile::kScratchBytes || Tile::kSharedBytes == Tile::kScratchBytes);
    return launch(relation_kl_sums_kernel<Tile>, tiles, Tile::kThreads, kShared, stream, args);
  }
};

template <class Tile>
struct LaunchSlopes {
  static const char* run(const RelationKlSlopes& args, int64_t tiles, void* stream) {
    return launch(relation_kl_slopes_kernel<Tile>, tiles, Tile::kThreads, KlTileMemory<Tile>::kSharedBytes, stream,
                  args);
  }
};

}  // namespace

const char* relation_kl_sums(const RelationKlSums& args, void* stream) {
  return with_tile<LaunchSums>(args.element, args, 2 * args.row_tiles * args.column_tiles, stream);
}

const char* relation_kl_slopes(const RelationKlSlopes& args, void* stream) {
  return with_tile<LaunchSlopes>(args.element, args, args.row_tiles * args.column_tiles, stream);
}

const char* relation_kl_lines(const RelationKlLines& args, void* stream) {
  const int64_t blocks = ceil_div(args.sides[0].padded + args.sides[1].padded, kRelationThreads);
  return args.wide ? launch(relation_kl_lines_kernel<double>, blocks, kRelationThreads, 0, stream, args)
                   : launch(relation_kl_lines_kernel<float>, blocks, kRelationThreads, 0, stream, args);
}

const char* relation_kl_total(const RelationKlTotal& args, void* stream) {
  return args.wide ? launch(relation_kl_total_kernel<double>, 1, kRelationThreads, kWarp * sizeof(double), stream, args)
                   : launch(relation_kl_total_kernel<float>, 1, kRelationThreads, kWarp * sizeof(double), stream, args);
}

}  // namespace lcr2s::cuda
