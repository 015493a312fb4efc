// Codes in the caller's memory: float32, bfloat16 or float16. They are widened to float32 as they are loaded.
#pragma once

#include "cuda/linalg/matrix.cuh"

namespace fastkm {
namespace {

// The same interface as Operand.
struct Codes {
  const void* data;
  int64_t outer, inner;
  int64_t type;  // Element

  __device__ void skip_rows(int64_t rows) {
    const int64_t bytes = rows * outer * (type == kFloat32 ? 4 : 2);
    data = static_cast<const char*>(data) + bytes;
  }
  __device__ static float widen(unsigned bits, bool bfloat) {
    return bfloat ? __uint_as_float(bits << 16) : half_to_float(static_cast<uint16_t>(bits));
  }
  __device__ float4 load_four(int64_t i, int64_t k, int64_t step, int room) const {
    const int64_t first = i * outer + k * inner;
    if (type == kFloat32) return fastkm::load_four(static_cast<const float*>(data) + first, step, room);
    const uint16_t* const at = static_cast<const uint16_t*>(data) + first;
    const bool bfloat = type == kBFloat16;
    if (room >= 4 && step == 1 && is_aligned(at, 8)) {
      const uint2 both = *reinterpret_cast<const uint2*>(at);
      return {widen(both.x & 0xFFFF, bfloat), widen(both.x >> 16, bfloat), widen(both.y & 0xFFFF, bfloat),
              widen(both.y >> 16, bfloat)};
    }
    return {room > 0 ? widen(at[0], bfloat) : 0, room > 1 ? widen(at[step], bfloat) : 0,
            room > 2 ? widen(at[2 * step], bfloat) : 0, room > 3 ? widen(at[3 * step], bfloat) : 0};
  }
};

__device__ inline Codes codes_of(const Batch<const float>& batch, int64_t type, int64_t b) {
  const int64_t first = b * batch.stride[0];
  const void* const data = type == kFloat32 ? static_cast<const void*>(batch.data + first)
                                            : reinterpret_cast<const uint16_t*>(batch.data) + first;
  return {data, batch.stride[1], batch.stride[2], type};
}

__device__ inline Codes transposed(const Codes& codes) { return {codes.data, codes.inner, codes.outer, codes.type}; }

}  // namespace
}  // namespace fastkm
