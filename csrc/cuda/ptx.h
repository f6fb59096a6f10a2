#pragma once

#include <cuda_runtime.h>

#include "element.h"

// Instructions without an intrinsic, one function each, named after what they do; the PTX ISA says the rest. With
// LCR2S_EMULATE_CUDA the same functions are carried out on the host, from the ISA's description.
//
// LCR2S_WGMMA is 1 where wgmma, mbarrier and bulk copies exist: on sm_90a and in the emulation. Elsewhere those
// functions are not defined, and code that calls them stands in `#if LCR2S_WGMMA`.
#ifdef LCR2S_EMULATE_CUDA

#define LCR2S_WGMMA 1
#include "../emulation/ptx.h"

#else

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define LCR2S_WGMMA 1
#else
#define LCR2S_WGMMA 0
#endif

namespace lcr2s::cuda::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8 x 8 matrices of 2-byte elements; lane i names row i % 8 of matrix i / 8, 16 bytes of shared memory. Of matrix
// q the lane gets, in out[q], elements 2 (lane % 4) and the next of row lane / 4; transposed, of column lane / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b: mma.m16n8k16 with float accumulators. T is BFloat16 or Half.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma<Half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// cp.async of 16 bytes; `bytes` of them are read, the rest are zero.
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kPending of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#if LCR2S_WGMMA

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes barrier_init visible to bulk copies.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Orders ordinary accesses to shared and global memory, this thread's and those it has synchronised with, before what
// wgmma and bulk copies do there.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and lets the phase also wait for `bytes` of bulk copies.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Until the phase of this parity is complete.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
  const uint32_t address = shared_address(barrier);
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
  }
}

// Contiguous bytes, a multiple of 16 and aligned to 16, whose arrival counts on `barrier`.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending groups of wgmma are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// After wgmma_wait: keeps the compiler, which takes the accumulators for ready since wgmma, from reading them before
// it.
template <int kCount>
__device__ __forceinline__ void hold(float (&c)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

// c (64 x 2N, N accumulators a thread) = or += A (64 x 16) B (16 x 2N), both by descriptor.
template <class T>
__device__ __forceinline__ void wgmma(float (&c)[64], uint64_t a, uint64_t b, bool accumulate);
template <class T>
__device__ __forceinline__ void wgmma(float (&c)[32], uint64_t a, uint64_t b, bool accumulate);

// clang-format off
#define LCR2S_C8(c, i) \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define LCR2S_WGMMA_N64(T, type)                                                                              \
  template <>                                                                                                 \
  __device__ __forceinline__ void wgmma<T>(float (&c)[32], uint64_t a, uint64_t b, bool accumulate) {         \
    asm volatile(                                                                                             \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                                          \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {"                                      \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                              \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                   \
        "%32, %33, p, 1, 1, 0, 0;\n}"                                                                         \
        : LCR2S_C8(c, 0), LCR2S_C8(c, 8), LCR2S_C8(c, 16), LCR2S_C8(c, 24)                                    \
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                                 \
  }
#define LCR2S_WGMMA_N128(T, type)                                                                             \
  template <>                                                                                                 \
  __device__ __forceinline__ void wgmma<T>(float (&c)[64], uint64_t a, uint64_t b, bool accumulate) {         \
    asm volatile(                                                                                             \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                          \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {"                                     \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                              \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                    \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                    \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                   \
        "%64, %65, p, 1, 1, 0, 0;\n}"                                                                         \
        : LCR2S_C8(c, 0), LCR2S_C8(c, 8), LCR2S_C8(c, 16), LCR2S_C8(c, 24), LCR2S_C8(c, 32), LCR2S_C8(c, 40), \
          LCR2S_C8(c, 48), LCR2S_C8(c, 56)                                                                    \
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                                 \
  }
// clang-format on
LCR2S_WGMMA_N64(BFloat16, "bf16")
LCR2S_WGMMA_N64(Half, "f16")
LCR2S_WGMMA_N128(BFloat16, "bf16")
LCR2S_WGMMA_N128(Half, "f16")
#undef LCR2S_WGMMA_N64
#undef LCR2S_WGMMA_N128
#undef LCR2S_C8

#endif  // LCR2S_WGMMA

}  // namespace lcr2s::cuda::ptx

#endif  // LCR2S_EMULATE_CUDA

#if LCR2S_WGMMA
namespace lcr2s::cuda::ptx {

// Matrix in shared memory for wgmma: K-major with the 128-byte swizzle, groups of eight rows 1024 bytes apart.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* matrix) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kStride = uint64_t{1024 >> 4} << 32;
  constexpr uint64_t kLeading = uint64_t{1} << 16;
  return kSwizzle128 | kStride | kLeading | ((shared_address(matrix) & 0x3ffffu) >> 4);
}

}  // namespace lcr2s::cuda::ptx
#endif
