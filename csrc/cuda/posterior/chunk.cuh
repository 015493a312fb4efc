// The patterns of a memory in chunks.
#pragma once

#include "cuda/linalg/codes.cuh"

namespace fastkm {
namespace {

constexpr int kChunk = 16;  // patterns of a chunk, as on the CPU: small chunks round less
static_assert(kChunk == kBlock && kChunk == kSlice, "a chunk is one block of a factorisation, and one slice");

__host__ __device__ inline int64_t count_chunks(int64_t T) { return (T + kChunk - 1) / kChunk; }

__device__ inline bool is_unmasked(const PosteriorArgs<float>& args, int64_t b, int64_t t) {
  return !args.mask.data || *element(args.mask, b, t);
}

}  // namespace
}  // namespace fastkm
