#pragma once

#include <cstdint>

#include "element.h"

// Panels: how the tile products (tile.h) want their operands. Rows are cut into tiles of 128, columns into chunks of
// 128 bytes (64 elements of 2 bytes, 32 floats, 16 doubles). A panel is one tile of rows by one chunk of columns: 16
// KiB, contiguous, the panels of one row tile one after the other. A row of a panel is eight packs of 16 bytes, pack p
// of row r at place p ^ (r % 8): the 128-byte swizzle of wgmma, with which ldmatrix and 16-byte loads of eight
// neighbouring rows meet no bank twice. Rows and columns are padded with zeros, so that products need no masks. The
// base is aligned to 1024 bytes.
namespace lcr2s::cuda {

constexpr int kPanelRows = 128;
constexpr int kPanelRowBytes = 128;
constexpr int kPanelBytes = kPanelRows * kPanelRowBytes;
constexpr int kPackBytes = 16;

struct Panels {
  char* base;
  int64_t rows;
  int64_t width;
  // Panels of one row tile.
  int64_t k_chunks;
};

LCR2S_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements of one chunk.
template <class T>
constexpr int kPanelColumns = kPanelRowBytes / static_cast<int>(sizeof(T));

LCR2S_HOST_DEVICE constexpr int64_t panel_row_tiles(int64_t rows) { return ceil_div(rows, kPanelRows); }
LCR2S_HOST_DEVICE constexpr int64_t panel_chunks(int64_t width, int64_t element_bytes) {
  return ceil_div(width * element_bytes, kPanelRowBytes);
}
// Memory that the panels of a rows x width matrix take.
LCR2S_HOST_DEVICE constexpr int64_t panels_bytes(int64_t rows, int64_t width, int64_t element_bytes) {
  return panel_row_tiles(rows) * panel_chunks(width, element_bytes) * kPanelBytes;
}
LCR2S_HOST_DEVICE constexpr Panels make_panels(void* base, int64_t rows, int64_t width, int64_t element_bytes) {
  return Panels{static_cast<char*>(base), rows, width, panel_chunks(width, element_bytes)};
}

// Byte inside a panel of byte `byte` of row `row`; both count from the panel's own corner.
LCR2S_HOST_DEVICE constexpr int panel_offset(int row, int byte) {
  return row * kPanelRowBytes + ((byte & ~(kPackBytes - 1)) ^ ((row & 7) * kPackBytes)) + (byte & (kPackBytes - 1));
}

// The panel of row tile `tile` and chunk `chunk`.
LCR2S_HOST_DEVICE char* panel_at(const Panels& panels, int64_t tile, int64_t chunk) {
  return panels.base + (tile * panels.k_chunks + chunk) * kPanelBytes;
}

// Element (row, column) of the whole matrix, also where it is padding.
template <class T>
LCR2S_HOST_DEVICE T* panel_element(const Panels& panels, int64_t row, int64_t column) {
  char* panel = panel_at(panels, row / kPanelRows, column / kPanelColumns<T>);
  return reinterpret_cast<T*>(panel + panel_offset(static_cast<int>(row % kPanelRows),
                                                   static_cast<int>(column % kPanelColumns<T>) * int{sizeof(T)}));
}

// Which tile of a row_tiles x column_tiles matrix block `block` works on: down strips of `kStrip` row tiles, so that
// blocks that run at the same time share rows and columns in the cache.
struct TileIndex {
  int64_t row;
  int64_t column;
};
LCR2S_HOST_DEVICE TileIndex tile_of_block(int64_t block, int64_t row_tiles, int64_t column_tiles) {
  constexpr int64_t kStrip = 8;
  const int64_t strip = block / (kStrip * column_tiles);
  const int64_t first = strip * kStrip;
  const int64_t rows = row_tiles - first < kStrip ? row_tiles - first : kStrip;
  const int64_t inside = block - first * column_tiles;
  return TileIndex{first + inside % rows, inside / rows};
}

}  // namespace lcr2s::cuda
