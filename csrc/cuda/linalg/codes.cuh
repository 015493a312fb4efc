// Matrices of codes, which may be of low precision.
#pragma once

#include "cuda/linalg/matrix.cuh"

namespace fastkm {
namespace {

// Codes may be of low precision.
struct Codes {
  const void* data;
  int64_t outer, inner;
  int64_t type;  // Element

  // Go on to a later row.
  __device__ void skip(int64_t rows) {
    const int64_t bytes = rows * outer * (type == kFloat32 ? 4 : 2);
    data = static_cast<const char*>(data) + bytes;
  }
  __device__ static float widened(unsigned bits, bool bfloat) {
    return bfloat ? __uint_as_float(bits << 16) : half_to_float(static_cast<uint16_t>(bits));
  }
  __device__ float one(int64_t i, int64_t k) const {
    const int64_t at = i * outer + k * inner;
    if (type == kFloat32) return static_cast<const float*>(data)[at];
    return widened(static_cast<const uint16_t*>(data)[at], type == kBFloat16);
  }
  __device__ float4 four(int64_t i, int64_t k, int64_t step, int room) const {
    const int64_t first = i * outer + k * inner;
    if (type == kFloat32) return fastkm::four(static_cast<const float*>(data) + first, step, room);
    const uint16_t* const at = static_cast<const uint16_t*>(data) + first;
    const bool bfloat = type == kBFloat16;
    if (room >= 4 && step == 1 && on_bytes(at, 8)) {
      const uint2 both = *reinterpret_cast<const uint2*>(at);
      return {widened(both.x & 0xFFFF, bfloat), widened(both.x >> 16, bfloat), widened(both.y & 0xFFFF, bfloat),
              widened(both.y >> 16, bfloat)};
    }
    return {room > 0 ? widened(at[0], bfloat) : 0, room > 1 ? widened(at[step], bfloat) : 0,
            room > 2 ? widened(at[2 * step], bfloat) : 0, room > 3 ? widened(at[3 * step], bfloat) : 0};
  }
};

__device__ inline Codes codes_of(const Batch<const float>& batch, int64_t type, int64_t b) {
  const int64_t first = b * batch.stride[0];
  const void* const data = type == kFloat32 ? static_cast<const void*>(batch.data + first)
                                            : reinterpret_cast<const uint16_t*>(batch.data) + first;
  return {data, batch.stride[1], batch.stride[2], type};
}

__device__ inline Codes transposed(const Codes& side) { return {side.data, side.inner, side.outer, side.type}; }

}  // namespace
}  // namespace fastkm
