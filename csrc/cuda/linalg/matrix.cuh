// Strided matrices: pieces of a row, and whole matrices in and out of shared memory or the workspace.
#pragma once

#include "cuda/linalg/workspace.cuh"

namespace fastkm {
namespace {

__device__ inline bool is_aligned(const void* at, int bytes) { return reinterpret_cast<uintptr_t>(at) % bytes == 0; }

// Four entries `step` apart, of which the first `room` exist. The rest is zero.
__device__ inline float4 load_four(const float* at, int64_t step, int room) {
  if (room >= 4 && step == 1 && is_aligned(at, 16)) return *reinterpret_cast<const float4*>(at);
  return {room > 0 ? at[0] : 0, room > 1 ? at[step] : 0, room > 2 ? at[2 * step] : 0, room > 3 ? at[3 * step] : 0};
}

// A matrix as a product reads it: entry (outer, inner), where the product sums over `inner`. Both members are strides.
struct Operand {
  const float* data;
  int64_t outer, inner;

  __device__ const float* at(int64_t i, int64_t k) const { return data + i * outer + k * inner; }
  __device__ float4 load_four(int64_t i, int64_t k, int64_t step, int room) const {
    return fastkm::load_four(data + i * outer + k * inner, step, room);
  }
  __device__ float load_one(int64_t i, int64_t k) const { return *at(i, k); }
};

template <class T>
__device__ Operand operand_of(const Batch<T>& batch, int64_t b) {
  return {element(batch, b), batch.stride[1], batch.stride[2]};
}

__device__ inline Operand transposed(const Operand& operand) { return {operand.data, operand.inner, operand.outer}; }

// Change the sign of each of `count` numbers. Ends with a barrier.
__device__ inline void negate(float* x, int count) {
  for (int n = threadIdx.x; n < count; n += kThreads) x[n] = -x[n];
  __syncthreads();
}

// Store N neighbouring columns of which `room` exist, as one vector where they are aligned and all exist.
template <int N>
__device__ void store_columns(float* to, const float (&values)[N], int room) {
  if (room >= N && is_aligned(to, 4 * N)) {
    if constexpr (N == 4)
      *reinterpret_cast<float4*>(to) = {values[0], values[1], values[2], values[3]};
    else
      *reinterpret_cast<float2*>(to) = {values[0], values[1]};
  } else {
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (n < room) to[n] = values[n];
  }
}

template <int N>
__device__ void load_columns(const float* from, int64_t step, float (&values)[N], int room) {
  if (room >= N && step == 1 && is_aligned(from, 4 * N)) {
    if constexpr (N == 4) {
      const float4 all = *reinterpret_cast<const float4*>(from);
      values[0] = all.x;
      values[1] = all.y;
      values[2] = all.z;
      values[3] = all.w;
    } else {
      const float2 all = *reinterpret_cast<const float2*>(from);
      values[0] = all.x;
      values[1] = all.y;
    }
  } else {
#pragma unroll
    for (int n = 0; n < N; ++n) values[n] = n < room ? from[n * step] : 0;
  }
}

// to = from + factor · values
template <int N>
__device__ void store_sum(float* to, const float* from, int64_t step, float factor, const float (&values)[N],
                          int room) {
  float entries[N];
  load_columns(from, step, entries, room);
#pragma unroll
  for (int n = 0; n < N; ++n) entries[n] += factor * values[n];
  store_columns(to, entries, room);
}

// Destinations of a product: the first stores it, the second adds `factor` times it. Rows are `ld` apart.
struct StoreRows {
  float* to;
  int ld, columns;

  template <int N>
  __device__ void operator()(int i, int j, const float (&values)[N]) const {
    store_columns(to + i * ld + j, values, columns - j);
  }
};

struct AddRows {
  float* to;
  int ld, columns;
  float factor;

  template <int N>
  __device__ void operator()(int i, int j, const float (&values)[N]) const {
    float* const at = to + i * ld + j;
    store_sum(at, at, 1, factor, values, columns - j);
  }
};

// Load a matrix and pad it with zeros to [padded_rows, ld]. No barrier.
template <class From>
__device__ void load_rows(float* to, int rows, int columns, int padded_rows, int ld, const From& from) {
  const int across = ld / 4;
  for (int64_t n = threadIdx.x; n < int64_t(padded_rows) * across; n += kThreads) {
    const int row = static_cast<int>(n / across), column = static_cast<int>(n % across) * 4;
    const int room = row < rows ? columns - column : 0;
    reinterpret_cast<float4*>(to)[n] = from.load_four(row, column, from.inner, room);
  }
}

// Store a matrix; the caller's rows are contiguous. No barrier.
__device__ inline void store_rows(const Batch<float>& to, int64_t b, int rows, int columns, const float* from, int ld) {
  const int across = (columns + 3) / 4;
  for (int64_t n = threadIdx.x; n < int64_t(rows) * across; n += kThreads) {
    const int row = static_cast<int>(n / across), column = static_cast<int>(n % across) * 4;
    float entries[4];
    load_columns(from + int64_t(row) * ld + column, 1, entries, 4);
    store_columns(element(to, b, row, column), entries, columns - column);
  }
}

}  // namespace
}  // namespace fastkm
