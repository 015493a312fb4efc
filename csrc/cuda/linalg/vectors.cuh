// Dot products of the rows of a matrix with a vector.
#pragma once

#include "cuda/linalg/workspace.cuh"

namespace fastkm {
namespace {

__device__ inline float dot4(float4 x, float4 y) { return x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w; }

// out_i = row i of M · x. M and x are padded with zeros to `width`, a multiple of four. A few lanes share a row and sum
// four rows at once; each exchange halves the sums that a lane still holds. No barrier.
__device__ FASTKM_OUT_OF_LINE inline void dot_rows(float* out, const float* m, int64_t ld, int rows, int width,
                                                   const float* x) {
  int lanes = 4;
  while (lanes < 32 && 4 * lanes < width) lanes *= 2;
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = kThreads / lanes;
  for (int first = 0; first < rows; first += 4 * groups) {
    float sum[4] = {};
    for (int k = 4 * lane; k < width; k += 4 * lanes) {
      const float4 piece = *reinterpret_cast<const float4*>(x + k);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int i = first + group + n * groups;
        if (i < rows) sum[n] += dot4(*reinterpret_cast<const float4*>(m + i * ld + k), piece);
      }
    }
    const bool upper = lane & (lanes / 2), upper_half = lane & (lanes / 4);
    const float from_pair[2] = {upper ? sum[0] : sum[2], upper ? sum[1] : sum[3]};
    float pair[2] = {upper ? sum[2] : sum[0], upper ? sum[3] : sum[1]};
    for (int n = 0; n < 2; ++n) pair[n] += __shfl_xor_sync(~0u, from_pair[n], lanes / 2);
    float one = upper_half ? pair[1] : pair[0];
    one += __shfl_xor_sync(~0u, upper_half ? pair[0] : pair[1], lanes / 4);
    for (int offset = lanes / 8; offset > 0; offset /= 2) one += __shfl_xor_sync(~0u, one, offset);
    const int i = first + group + (2 * upper + upper_half) * groups;
    if (lane % (lanes / 4) == 0 && i < rows) out[i] = one;
  }
}

}  // namespace
}  // namespace fastkm
