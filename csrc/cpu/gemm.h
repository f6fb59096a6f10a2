#pragma once

#include "parallel.h"
#include "simd.h"

// Blocked matrix product for the kernels of this folder: C (m x n) = or += A (m x k) B (k x n) with any strides of A
// and B. Every element of C is summed over k in one fixed order that depends on k alone, neither on its place in a tile
// nor on the number of threads: the same pair of rows gives the same bits everywhere.
namespace lcr2s::cpu::LCR2S_ISA {

// Micro-tile: kMr rows x two vectors; its accumulators, two vectors of B and one broadcast fit the register file.
constexpr int kMr = LCR2S_VECTOR_BYTES == 64 ? 14 : 6;
template <class T>
constexpr int kNr = 2 * kLanes<T>;
// Elements of a cache line.
template <class T>
constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
constexpr int64_t kKc = 256;
// Rows of A that one task packs: a multiple of kMr near 100.
constexpr int64_t kMc = kMr * (LCR2S_VECTOR_BYTES == 64 ? 8 : 16);

// What a step of the product does with an element of A, the same for all lanes, and a vector of B.
template <class T>
struct Operand {
  using Sum = T;
  using Vector = Vec<T>;

  LCR2S_INLINE static void multiply_add(Vec<T>& sum, T a, Vector b) { sum += a * b; }
};

// Two bfloat16, neighbours in k, as one element: a product at the double rate where the processor has it (AVX512_BF16).
using Pair = int32_t;

template <>
struct Operand<Pair> {
  using Sum = float;
  using Vector = Mask<float>;

  LCR2S_INLINE static void multiply_add(Vec<float>& sum, Pair a, Vector b) {
    const Vector left = Vector{} + a;
#ifdef __AVX512F__
    // By its name: nothing else of this copy may use the extension.
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(left), "v"(b));
#else
    // What that instruction computes, subnormal numbers apart.
    constexpr int32_t high = -65536;
    sum += (Vec<float>)(left & high) * (Vec<float>)(b & high);
    sum += (Vec<float>)(left << 16) * (Vec<float>)(b << 16);
#endif
  }
};

template <class T>
using Sum = typename Operand<T>::Sum;

// Four consecutive elements of four rows, transposed: column q goes to dst + q * ld.
template <class T>
LCR2S_INLINE void transpose4(const T* src, int64_t row_stride, T* dst, int64_t ld) {
  typedef T Four __attribute__((vector_size(4 * sizeof(T))));
  Four row[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) __builtin_memcpy(&row[i], src + i * row_stride, sizeof(Four));
  const Four ab_low = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
  const Four ab_high = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  const Four cd_low = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
  const Four cd_high = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  const Four column[4] = {
      __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5), __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7),
      __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5), __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7)};
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) __builtin_memcpy(dst + q * ld, &column[q], sizeof(Four));
}

// B packed in column panels of kNr, each k x kNr and contiguous, the last one padded with zeros.
template <class T>
LCR2S_INLINE int64_t packed_size(int64_t k, int64_t n) {
  return ceil_div(n, kNr<T>) * kNr<T> * k;
}

// Element (p, j) of B is b[p * row_stride + j * col_stride].
template <class T>
static void pack_panels(const Parallel& parallel, const T* b, int64_t row_stride, int64_t col_stride, int64_t k,
                        int64_t n, T* packed) {
  constexpr int nr = kNr<T>;
  parallel.for_each(ceil_div(n, nr), [=](int64_t panel) {
    T* dst = packed + panel * nr * k;
    const int width = static_cast<int>(n - panel * nr < nr ? n - panel * nr : nr);
    const T* src = b + panel * nr * col_stride;
    if (width < nr) {
      for (int64_t p = 0; p < k; ++p)
        for (int j = 0; j < nr; ++j) dst[p * nr + j] = j < width ? src[p * row_stride + j * col_stride] : T{0};
    } else if (col_stride == 1) {
      // Rows lie a stride apart that no hardware prefetches.
      constexpr int64_t ahead = 16;
      for (int64_t p = 0; p < k; ++p) {
        if (p + ahead < k) __builtin_prefetch(src + (p + ahead) * row_stride);
        __builtin_memcpy(dst + p * nr, src + p * row_stride, nr * sizeof(T));
      }
    } else {
      const int64_t quads = row_stride == 1 ? k / 4 * 4 : 0;
      for (int64_t p = 0; p < quads; p += 4)
        for (int j = 0; j < nr; j += 4) transpose4(src + p + j * col_stride, col_stride, dst + p * nr + j, nr);
      for (int64_t p = quads; p < k; ++p)
        for (int j = 0; j < nr; ++j) dst[p * nr + j] = src[p * row_stride + j * col_stride];
    }
  });
}

// acc (kMr x kNr) += a column of A (kMr) . a row of B (kNr)
template <class T>
LCR2S_INLINE void outer_product(const T* __restrict a, const T* __restrict b, Vec<Sum<T>> (&acc)[kMr][2]) {
  typename Operand<T>::Vector b0, b1;
  __builtin_memcpy(&b0, b, sizeof(b0));
  __builtin_memcpy(&b1, b + kLanes<T>, sizeof(b1));
#pragma GCC unroll 14
  for (int i = 0; i < kMr; ++i) {
    Operand<T>::multiply_add(acc[i][0], a[i], b0);
    Operand<T>::multiply_add(acc[i][1], a[i], b1);
  }
}

// acc (kMr x kNr) = A panel (kc x kMr) . B panel (kc x kNr)
template <class T>
LCR2S_INLINE void micro_kernel(int64_t kc, const T* __restrict a, const T* __restrict b, Vec<Sum<T>> (&acc)[kMr][2]) {
  // Of a sixth of a loop's instructions the multiplications have no use: a processor whose core is shared notices.
  constexpr int unroll = kMr > 8 ? 4 : 8;
#pragma GCC unroll 14
  for (int i = 0; i < kMr; ++i) acc[i][0] = acc[i][1] = Vec<Sum<T>>{};
  int64_t p = 0;
  for (; p + unroll <= kc; p += unroll)
#pragma GCC unroll 8
    for (int q = 0; q < unroll; ++q) outer_product<T>(a + (p + q) * kMr, b + (p + q) * kNr<T>, acc);
  for (; p < kc; ++p) outer_product<T>(a + p * kMr, b + p * kNr<T>, acc);
}

// Rows [0, m) and columns [0, kc) of A in strips of kMr rows: element (row i of strip s, column p) goes to
// dst[(s * kc + p) * kMr + i]; rows beyond m are zero.
template <class T>
LCR2S_INLINE void pack_strips(const T* a, int64_t a_row, int64_t a_col, int64_t m, int64_t kc, T* dst) {
  const int64_t full = m / kMr * kMr;
  if (a_row == 1) {
    // A few columns of A, which are contiguous, at a time: strip by strip would come back to every cache line, column
    // by column would write strips, which lie a multiple of the cache's sets apart, in pieces. Columns lie far apart as
    // well, where no hardware prefetches.
    constexpr int64_t columns = 8;
    for (int64_t begin = 0; begin < kc; begin += columns) {
      const int64_t end = kc - begin < columns ? kc : begin + columns;
      for (int64_t p = end; p < end + columns && p < kc; ++p)
        for (int64_t i = 0; i < full; i += kLine<T>) __builtin_prefetch(a + i + p * a_col);
      for (int64_t i = 0; i < full; i += kMr)
        for (int64_t p = begin; p < end; ++p)
          __builtin_memcpy(dst + i * kc + p * kMr, a + i + p * a_col, kMr * sizeof(T));
    }
  } else {
    constexpr int quad_rows = kMr / 4 * 4;
    const int64_t quads = a_col == 1 ? kc / 4 * 4 : 0;
    for (int64_t i0 = 0; i0 < full; i0 += kMr) {
      const T* src = a + i0 * a_row;
      T* strip = dst + i0 * kc;
      for (int64_t p = 0; p < quads; p += 4) {
#pragma GCC unroll 4
        for (int i = 0; i < quad_rows; i += 4) transpose4(src + i * a_row + p, a_row, strip + p * kMr + i, kMr);
#pragma GCC unroll 4
        for (int i = quad_rows; i < kMr; ++i)
          for (int q = 0; q < 4; ++q) strip[(p + q) * kMr + i] = src[i * a_row + p + q];
      }
      for (int64_t p = quads; p < kc; ++p)
        for (int i = 0; i < kMr; ++i) strip[p * kMr + i] = src[i * a_row + p * a_col];
    }
  }
  if (full < m) {
    const T* src = a + full * a_row;
    T* strip = dst + full * kc;
    for (int64_t p = 0; p < kc; ++p)
      for (int i = 0; i < kMr; ++i) strip[p * kMr + i] = full + i < m ? src[i * a_row + p * a_col] : T{0};
  }
}

// C (m x n) = or += strips (m x kc) . B, whose first panel begins at `panel` and whose panels lie panel_stride apart.
template <class T>
static void multiply_strips(const T* strips, int64_t m, int64_t kc, const T* panel, int64_t panel_stride, int64_t n,
                            Sum<T>* c, int64_t ldc, bool add) {
  constexpr int nr = kNr<T>;
  for (int64_t j0 = 0; j0 < n; j0 += nr, panel += panel_stride) {
    const int width = static_cast<int>(n - j0 < nr ? n - j0 : nr);
    // The next panel is on its way from a farther cache while this one is used; each strip asks for its share.
    const T* coming = panel + panel_stride;
    const T* coming_end = coming + (j0 + nr < n ? kc * nr : 0);
    const int64_t share = ceil_div(kc * nr, ceil_div(m, kMr) * kLine<T>) * kLine<T>;
    for (int64_t i0 = 0; i0 < m; i0 += kMr) {
      for (int64_t at = 0; at < share && coming < coming_end; at += kLine<T>, coming += kLine<T>)
        __builtin_prefetch(coming, 0, 2);
      Sum<T>* out = c + i0 * ldc + j0;
      const int rows = static_cast<int>(m - i0 < kMr ? m - i0 : kMr);
      if (add)
        for (int i = 0; i < rows; ++i) __builtin_prefetch(out + i * ldc, 1);
      Vec<Sum<T>> acc[kMr][2];
      micro_kernel<T>(kc, strips + i0 * kc, panel, acc);
      if (rows == kMr && width == nr) {
#pragma GCC unroll 14
        for (int i = 0; i < kMr; ++i) {
          Sum<T>* row = out + i * ldc;
          store(row, add ? load(row) + acc[i][0] : acc[i][0]);
          store(row + kLanes<T>, add ? load(row + kLanes<T>) + acc[i][1] : acc[i][1]);
        }
      } else {
        alignas(64) Sum<T> edge[kMr][nr];
#pragma GCC unroll 14
        for (int i = 0; i < kMr; ++i) {
          store(edge[i], acc[i][0]);
          store(edge[i] + kLanes<T>, acc[i][1]);
        }
        for (int i = 0; i < rows; ++i)
          for (int j = 0; j < width; ++j) out[i * ldc + j] = add ? out[i * ldc + j] + edge[i][j] : edge[i][j];
      }
    }
  }
}

// One task's share: m <= kMc rows of C, columns [0, n), B packed by pack_panels (packed points at the first panel
// wanted). Single-threaded; call it inside a task to work on the tile while it is hot.
template <class T>
static void gemm_tile(const T* a, int64_t a_row, int64_t a_col, int64_t m, int64_t k, const T* packed, int64_t n, T* c,
                      int64_t ldc, bool accumulate) {
  alignas(64) T strips[kMc * kKc];
  if (k == 0 && !accumulate) {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) c[i * ldc + j] = T{0};
  }
  for (int64_t k0 = 0; k0 < k; k0 += kKc) {
    const int64_t kc = k - k0 < kKc ? k - k0 : kKc;
    pack_strips(a + k0 * a_col, a_row, a_col, m, kc, strips);
    multiply_strips(strips, m, kc, packed + k0 * kNr<T>, kNr<T> * k, n, c, ldc, accumulate || k0 > 0);
  }
}

// The rows of A for many such tasks, packed once: kMc rows at a time, each k x kMc and contiguous.
template <class T>
LCR2S_INLINE int64_t packed_rows_size(int64_t m, int64_t k) {
  return ceil_div(m, kMc) * kMc * k;
}

template <class T>
static void pack_rows(const Parallel& parallel, const T* a, int64_t a_row, int64_t a_col, int64_t m, int64_t k,
                      T* packed) {
  parallel.for_each(ceil_div(m, kMc), [=](int64_t task) {
    const int64_t i0 = task * kMc;
    for (int64_t k0 = 0; k0 < k; k0 += kKc)
      pack_strips(a + i0 * a_row + k0 * a_col, a_row, a_col, m - i0 < kMc ? m - i0 : kMc, k - k0 < kKc ? k - k0 : kKc,
                  packed + i0 * k + k0 * kMc);
  });
}

// As gemm_tile, for rows packed by pack_rows (packed_rows points at the first of kMc).
template <class T>
static void gemm_tile_packed(const T* packed_rows, int64_t m, int64_t k, const T* packed, int64_t n, Sum<T>* c,
                             int64_t ldc) {
  for (int64_t k0 = 0; k0 < k; k0 += kKc)
    multiply_strips(packed_rows + k0 * kMc, m, k - k0 < kKc ? k - k0 : kKc, packed + k0 * kNr<T>, kNr<T> * k, n, c, ldc,
                    k0 > 0);
}

// The whole product, cut into tasks of kMc rows; wide ones, which pack A less often, where there are enough.
template <class T>
static void gemm(const Parallel& parallel, const T* a, int64_t a_row, int64_t a_col, int64_t m, int64_t k,
                 const T* packed, int64_t n, T* c, int64_t ldc, bool accumulate) {
  constexpr int64_t narrow = 256, wide = 512, enough = 32;
  static_assert(narrow % kNr<T> == 0 && wide % kNr<T> == 0);
  const int64_t columns = ceil_div(m, kMc) * ceil_div(n, wide) >= enough ? wide : narrow;
  const int64_t col_tasks = ceil_div(n, columns);
  parallel.for_each(ceil_div(m, kMc) * col_tasks, [=](int64_t task) {
    const int64_t i0 = task / col_tasks * kMc;
    const int64_t j0 = task % col_tasks * columns;
    gemm_tile(a + i0 * a_row, a_row, a_col, m - i0 < kMc ? m - i0 : kMc, k, packed + j0 * k,
              n - j0 < columns ? n - j0 : columns, c + i0 * ldc + j0, ldc, accumulate);
  });
}

}  // namespace lcr2s::cpu::LCR2S_ISA
