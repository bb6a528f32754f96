// Operations of a whole warp, matrix products, and all other inline assembly of the kernels. Warp-wide assembly is
// volatile, so the compiler does not move it into code that only some lanes run. Tests compile the device code for the
// CPU with BT_EMULATED defined; tests/cuda_emulator/emulator.h then replaces all of this.
//
// Below, lane = 4 * g + t, so g is 0..7 and t is 0..3.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#ifndef BT_EMULATED

namespace bt {

constexpr unsigned kAllLanes = 0xffffffffu;

// c[16, 8] += a[16, 16] * b[16, 8] in float32. The fragments of a lane; a pair is two adjacent elements in a register:
//   a: rows g, g+8, g, g+8 at columns 2t, 2t, 2t+8, 2t+8 (pairs along the row);
//   b: rows 2t and 2t+8 (pairs along the column) at column g;
//   c: row g at columns 2t and 2t+1, row g+8 at columns 2t and 2t+1.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                            uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply_add<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Transposes an 8 x 8 matrix of 16-bit elements; every lane holds columns 2t and 2t+1 of row g.
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}

// Computes 2^x in one instruction, with a relative error below 2^-22; 0 for minus infinity.
__device__ __forceinline__ float power_of_two(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// Stores 16 bytes at once; the compiler may split the store of a struct of registers.
__device__ __forceinline__ void store_vector(void* to, const uint32_t (&v)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

// The emulator of the tests reports an address that is not a multiple of `bytes`; a GPU raises a fault itself.
__device__ __forceinline__ void check_aligned(const void*, size_t) {}

}  // namespace bt

#endif
