// Where the matrices of a thread block lie: shared memory while they fit, the workspace of the launch beyond.
//
// Rows are a multiple of four apart and padded with zeros. Every function of linalg/ is called by all threads of a
// block; those that end without a barrier say so.
#pragma once

#include "cuda/kernels.h"
#include "cuda/linalg/device.cuh"

namespace fastkm {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRoot = 16;  // rows of a diagonal block, which one warp factors
constexpr float kEpsilon = std::numeric_limits<float>::epsilon();

__host__ __device__ inline int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

template <class T>
__device__ T* element(const Batch<T>& batch, int64_t b, int64_t i = 0, int64_t j = 0) {
  return batch.data + b * batch.stride[0] + i * batch.stride[1] + j * batch.stride[2];
}

constexpr int kSlice = 16;  // of the sum of a product, brought to shared memory at once
// Rows of a staged slice are eight banks apart, so the fragments of a tensor core are read without conflicts.
constexpr int kStagePadding = 8;
constexpr int kStageFloats = kSlice * (16 + 128 + 2 * kStagePadding);
static_assert(kStageFloats >= kSlice * (64 + 64 + 2 * kStagePadding), "both tile shapes share one stage");

// What the functions below need, at the start of a block's shared memory; kernels add their own.
struct alignas(16) Block {
  alignas(16) float stage[kStageFloats];
  float lower[kRoot][kRoot + 1], root[kRoot][kRoot + 1];  // a diagonal block of L, and its inverse
  double sum[kWarps];
  float part[kWarps][3];
  int64_t precision;  // of products with codes
  int status;
  bool positive, last;
};

// Buffers of a block, most used first: in shared memory as long as they fit, the rest in its part of the workspace.
// The host walks the same path with null pointers to learn the sizes.
struct Space {
  float *shared, *global;
  int64_t shared_left, shared_used = 0, global_used = 0;

  __host__ __device__ Space(float* shared, int64_t shared_floats, float* global)
      : shared(shared), global(global), shared_left(shared_floats) {}

  __host__ __device__ float* take(int64_t count) {
    count = (count + 3) / 4 * 4;  // every buffer starts on 16 bytes
    if (count > shared_left) return take_global(count);
    float* const at = shared + shared_used;
    shared_used += count;
    shared_left -= count;
    return at;
  }

  // What may stay where it is unless there is room for it.
  __host__ __device__ bool fits(int64_t count) const { return (count + 3) / 4 * 4 <= shared_left; }

  // For what is too large or too rarely used.
  __host__ __device__ float* take_global(int64_t count) {
    float* const at = global + global_used;
    global_used += (count + 3) / 4 * 4;
    return at;
  }
};

// The memory of a launch.
struct Workspace {
  float* data;
  int64_t block_floats, shared_floats;  // of one block

  __device__ float* of_block() const { return data + blockIdx.x * block_floats; }
  int64_t shared_bytes() const { return shared_floats * static_cast<int64_t>(sizeof(float)); }
};

template <class Head>
constexpr int64_t kHeadFloats = sizeof(Head) / sizeof(float);

// What a block that starts with a Head needs, with `lay_out(head, space)` to take it.
template <class Head, class LayOut>
Workspace measure(const Device& device, const LayOut& lay_out) {
  static_assert(alignof(Head) % 16 == 0, "buffers behind it start on 16 bytes");
  Head head;
  Space space(nullptr, device.shared_bytes / static_cast<int64_t>(sizeof(float)) - kHeadFloats<Head>, nullptr);
  lay_out(head, space);
  return {nullptr, space.global_used, kHeadFloats<Head> + space.shared_used};
}

template <class Head>
__device__ Space space_of_block(const Workspace& workspace) {
  return {dynamic_shared() + kHeadFloats<Head>, workspace.shared_floats - kHeadFloats<Head>, workspace.of_block()};
}

// Blocks of a kernel that run at the same time.
template <class Kernel>
int64_t resident_blocks(const Device& device, Kernel kernel, const Workspace& workspace) {
  return int64_t(device.multiprocessors) * blocks_held(kernel, kThreads, workspace.shared_bytes());
}

__device__ inline void fill_zero(float* to, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += kThreads) to[i] = 0;
}

// Zero once is zero for ever in the padding: nobody writes there.
template <class Head>
__device__ void clear_space(const Workspace& workspace) {
  fill_zero(dynamic_shared() + kHeadFloats<Head>, workspace.shared_floats - kHeadFloats<Head>);
  fill_zero(workspace.of_block(), workspace.block_floats);
  __syncthreads();
}

__device__ inline void copy(float* to, const float* from, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += kThreads) to[i] = from[i];
  __syncthreads();
}

}  // namespace
}  // namespace fastkm
