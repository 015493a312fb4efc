// Patterns of a memory, a chunk at a time.
#pragma once

#include "cuda/linalg/codes.cuh"

namespace fastkm {
namespace {

constexpr int kChunk = 16;  // as on the CPU: small chunks round less
static_assert(kChunk == kRoot && kChunk == kSlice, "a chunk is one diagonal block, and one slice of a product");

__host__ __device__ inline int64_t chunks_of(int64_t T) { return (T + kChunk - 1) / kChunk; }

__device__ inline bool seen(const PosteriorArgs<float>& args, int64_t b, int64_t t) {
  return !args.mask.data || *element(args.mask, b, t);
}

}  // namespace
}  // namespace fastkm
