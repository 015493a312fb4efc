// Memory of a thread block: its fixed part, the buffers behind it, and the workspace of a launch.
//
// Matrices lie in shared memory while they fit, and in the workspace beyond. Their rows are a multiple of four apart
// and padded with zeros. All threads of a thread block call every function of linalg/ together. A function that ends
// without a barrier says so.
#pragma once

#include "cuda/kernels.h"
#include "cuda/linalg/device.cuh"

namespace fastkm {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlock = 16;  // rows of a block of a factorisation; one warp factors it
constexpr float kEpsilon = std::numeric_limits<float>::epsilon();

__host__ __device__ inline int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

template <class T>
__device__ T* element(const Batch<T>& batch, int64_t b, int64_t i = 0, int64_t j = 0) {
  return batch.data + b * batch.stride[0] + i * batch.stride[1] + j * batch.stride[2];
}

constexpr int kSlice = 16;  // terms of a product's sum that are staged at once
// Rows of a staged slice are eight banks apart, so that tensor cores read their fragments without bank conflicts.
constexpr int kStagePadding = 8;
constexpr int kStageFloats = kSlice * (16 + 128 + 2 * kStagePadding);
static_assert(kStageFloats >= kSlice * (64 + 64 + 2 * kStagePadding), "both tile shapes share one stage");

// What linalg/ needs at the start of shared memory. A kernel derives from it and adds its own sizes and buffers.
struct alignas(16) ThreadBlock {
  alignas(16) float stage[kStageFloats];
  float factor[kBlock][kBlock + 1], inverse_factor[kBlock][kBlock + 1];  // L of one diagonal block, and L⁻¹
  double warp_sum[kWarps];
  float warp_part[kWarps][3];
  int64_t precision;  // of products with codes
  int status;
  bool positive, last;
};

// Hands out buffers one behind the other: from shared memory while they fit, then from the workspace. Allocate first
// what is used most. The host runs the same layout function with null pointers to learn the sizes.
struct Arena {
  float *shared, *global;
  int64_t shared_left, shared_used = 0, global_used = 0;

  __host__ __device__ Arena(float* shared, int64_t shared_floats, float* global)
      : shared(shared), global(global), shared_left(shared_floats) {}

  __host__ __device__ float* allocate(int64_t count) {
    count = (count + 3) / 4 * 4;  // every buffer starts on 16 bytes
    if (count > shared_left) return allocate_global(count);
    float* const at = shared + shared_used;
    shared_used += count;
    shared_left -= count;
    return at;
  }

  // Whether the next buffer would be in shared memory.
  __host__ __device__ bool fits(int64_t count) const { return (count + 3) / 4 * 4 <= shared_left; }

  // A buffer of the workspace, for what is large or rarely used.
  __host__ __device__ float* allocate_global(int64_t count) {
    float* const at = global + global_used;
    global_used += (count + 3) / 4 * 4;
    return at;
  }
};

// The memory of a launch; every thread block has an equal part of it.
struct Workspace {
  float* data;
  int64_t block_floats, shared_floats;  // of one thread block

  __device__ float* of_block() const { return data + blockIdx.x * block_floats; }
  int64_t shared_bytes() const { return shared_floats * static_cast<int64_t>(sizeof(float)); }
};

template <class Head>
constexpr int64_t kHeadFloats = sizeof(Head) / sizeof(float);

// The sizes of a thread block that starts with a Head and whose buffers `lay_out(head, arena)` allocates.
template <class Head, class LayOut>
Workspace measure_workspace(const Device& device, const LayOut& lay_out) {
  static_assert(alignof(Head) % 16 == 0, "buffers behind it start on 16 bytes");
  Head head;
  Arena arena(nullptr, device.shared_bytes / static_cast<int64_t>(sizeof(float)) - kHeadFloats<Head>, nullptr);
  lay_out(head, arena);
  return {nullptr, arena.global_used, kHeadFloats<Head> + arena.shared_used};
}

template <class Head>
__device__ Arena arena_behind(const Workspace& workspace) {
  return {dynamic_shared() + kHeadFloats<Head>, workspace.shared_floats - kHeadFloats<Head>, workspace.of_block()};
}

// Thread blocks of a kernel that the device runs at the same time.
template <class Kernel>
int64_t resident_blocks(const Device& device, Kernel kernel, const Workspace& workspace) {
  return int64_t(device.multiprocessors) * blocks_per_multiprocessor(kernel, kThreads, workspace.shared_bytes());
}

// No barrier.
__device__ inline void fill_zero(float* to, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += kThreads) to[i] = 0;
}

// Zero all buffers. Nothing writes to the padding of a matrix afterwards, so it stays zero.
template <class Head>
__device__ void clear_buffers(const Workspace& workspace) {
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
