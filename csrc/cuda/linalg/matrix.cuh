// Strided matrices: pieces of a row, and whole matrices in and out.
#pragma once

#include "cuda/linalg/workspace.cuh"

namespace fastkm {
namespace {

__device__ inline bool on_bytes(const void* at, int bytes) { return reinterpret_cast<uintptr_t>(at) % bytes == 0; }

// Neighbouring entries `step` apart, of which `room` are there; zero for the rest.
__device__ inline float4 four(const float* at, int64_t step, int room) {
  if (room >= 4 && step == 1 && on_bytes(at, 16)) return *reinterpret_cast<const float4*>(at);
  return {room > 0 ? at[0] : 0, room > 1 ? at[step] : 0, room > 2 ? at[2 * step] : 0, room > 3 ? at[3 * step] : 0};
}

// One side of a product: element (outer, inner), of which `inner` is summed over.
struct Side {
  const float* data;
  int64_t outer, inner;

  __device__ const float* at(int64_t i, int64_t k) const { return data + i * outer + k * inner; }
  __device__ float4 four(int64_t i, int64_t k, int64_t step, int room) const {
    return fastkm::four(data + i * outer + k * inner, step, room);
  }
  __device__ float one(int64_t i, int64_t k) const { return *at(i, k); }
};

template <class T>
__device__ Side side_of(const Batch<T>& batch, int64_t b) {
  return {element(batch, b), batch.stride[1], batch.stride[2]};
}

__device__ inline Side transposed(const Side& side) { return {side.data, side.inner, side.outer}; }

// Write neighbouring columns, in one piece where they are aligned and all inside.
template <int N>
__device__ void put(float* to, const float (&values)[N], int room) {
  if (room >= N && on_bytes(to, 4 * N)) {
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
__device__ void get(const float* from, int64_t step, float (&values)[N], int room) {
  if (room >= N && step == 1 && on_bytes(from, 4 * N)) {
    if constexpr (N == 4) {
      const float4 all = *reinterpret_cast<const float4*>(from);
      values[0] = all.x, values[1] = all.y, values[2] = all.z, values[3] = all.w;
    } else {
      const float2 all = *reinterpret_cast<const float2*>(from);
      values[0] = all.x, values[1] = all.y;
    }
  } else {
#pragma unroll
    for (int n = 0; n < N; ++n) values[n] = n < room ? from[n * step] : 0;
  }
}

// to = from + factor · values
template <int N>
__device__ void put_sum(float* to, const float* from, int64_t step, float factor, const float (&values)[N], int room) {
  float entries[N];
  get(from, step, entries, room);
#pragma unroll
  for (int n = 0; n < N; ++n) entries[n] += factor * values[n];
  put(to, entries, room);
}

// Bring a matrix in, padded with zeros to [padded_rows, ld]. No barrier.
template <class From>
__device__ void load_rows(float* to, int rows, int columns, int padded_rows, int ld, const From& from) {
  const int across = ld / 4;
  for (int64_t n = threadIdx.x; n < int64_t(padded_rows) * across; n += kThreads) {
    const int row = static_cast<int>(n / across), column = static_cast<int>(n % across) * 4;
    const int room = row < rows ? columns - column : 0;
    reinterpret_cast<float4*>(to)[n] = from.four(row, column, from.inner, room);
  }
}

// And out again, the rows as they stand in memory. No barrier.
__device__ inline void store_rows(const Batch<float>& to, int64_t b, int rows, int columns, const float* from, int ld) {
  const int across = (columns + 3) / 4;
  for (int64_t n = threadIdx.x; n < int64_t(rows) * across; n += kThreads) {
    const int row = static_cast<int>(n / across), column = static_cast<int>(n % across) * 4;
    float entries[4];
    get(from + int64_t(row) * ld + column, 1, entries, 4);
    put(element(to, b, row, column), entries, columns - column);
  }
}

}  // namespace
}  // namespace fastkm
