// Dense linear algebra of one block of threads: where its matrices lie, products, Cholesky factors, triangular solves.
//
// Matrices lie in shared memory or in the workspace, rows a multiple of four apart and padded with zeros. Every
// function here is called by all threads of a block; those that end without a barrier say so.
#pragma once

#include "cuda/linalg/device.cuh"
#include "cuda/kernels.h"

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

// ---- space ---------------------------------------------------------------------------------------------------------

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

// ---- sides of a product, and pieces of a row -----------------------------------------------------------------------

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

template <class T>
__device__ Side side_of(const Batch<T>& batch, int64_t b) {
  return {element(batch, b), batch.stride[1], batch.stride[2]};
}

__device__ inline Codes codes_of(const Batch<const float>& batch, int64_t type, int64_t b) {
  const int64_t first = b * batch.stride[0];
  const void* const data = type == kFloat32 ? static_cast<const void*>(batch.data + first)
                                            : reinterpret_cast<const uint16_t*>(batch.data) + first;
  return {data, batch.stride[1], batch.stride[2], type};
}

__device__ inline Side transposed(const Side& side) { return {side.data, side.inner, side.outer}; }
__device__ inline Codes transposed(const Codes& side) { return {side.data, side.inner, side.outer, side.type}; }

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

__device__ inline void copy(float* to, const float* from, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += kThreads) to[i] = from[i];
  __syncthreads();
}

// ---- blocks that share a piece of work -----------------------------------------------------------------------------

// Whether this block is the last of `count` to come here, on one ticket that starts at zero. What the others wrote
// before is then visible to it. No float is ever added by two blocks at once: the last one adds, in a fixed order.
__device__ inline bool last_to_arrive(unsigned* ticket, unsigned count, Block& block) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    block.last = atomicAdd(ticket, 1) == count - 1;
    __threadfence();
  }
  __syncthreads();
  return block.last;
}

// ---- sums ----------------------------------------------------------------------------------------------------------

// Of one number a thread.
__device__ inline double block_sum(double mine, Block& block) {
  for (int offset = 16; offset > 0; offset /= 2) mine += __shfl_xor_sync(~0u, mine, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) block.sum[threadIdx.x / 32] = mine;
  __syncthreads();
  double total = 0;
  for (int warp = 0; warp < kWarps; ++warp) total += block.sum[warp];
  return total;
}

// Σ of squares of a row of shared memory, by one warp.
__device__ inline float warp_squares(const float* row, int count) {
  float sum = 0;
  for (int k = threadIdx.x % 32; k < count; k += 32) sum += row[k] * row[k];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  return sum;
}

// ---- products ------------------------------------------------------------------------------------------------------

template <int kOuter>
struct SliceLoader {
  static constexpr int kItems = kOuter * kSlice / 4, kEach = (kItems + kThreads - 1) / kThreads;
  static constexpr int kLd = kOuter + kStagePadding;
  static_assert(kLd % 32 == 8 || kLd % 32 == 24, "fragments read four rows of a slice at once");
  float4 held[kEach];

  template <class From>
  __device__ static bool along_inner(const From& side) {
    return side.inner == 1;
  }

  template <class From>
  __device__ void fetch(const From& side, int first, int size, int from, int length) {
    const bool inwards = along_inner(side);
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
      const int item = static_cast<int>(threadIdx.x) + n * kThreads;
      const int outer = first + (inwards ? item / (kSlice / 4) : item % (kOuter / 4) * 4);
      const int inner = from + (inwards ? item % (kSlice / 4) * 4 : item / (kOuter / 4));
      const bool inside = item < kItems && outer < size && inner < length;
      const int room = inside ? (inwards ? length - inner : size - outer) : 0;
      held[n] = side.four(outer, inner, inwards ? side.inner : side.outer, room);
    }
  }

  template <class From>
  __device__ void stage(const From& side, float* to) const {
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
      const int item = static_cast<int>(threadIdx.x) + n * kThreads;
      if (item >= kItems) break;
      if (along_inner(side)) {
        float* at = to + item % (kSlice / 4) * 4 * kLd + item / (kSlice / 4);
        at[0] = held[n].x, at[kLd] = held[n].y, at[2 * kLd] = held[n].z, at[3 * kLd] = held[n].w;
      } else {
        *reinterpret_cast<float4*>(to + item / (kOuter / 4) * kLd + item % (kOuter / 4) * 4) = held[n];
      }
    }
  }
};

// How a product is compiled: for exact float32, for tensor cores (refined or not, as the block's precision says), or
// for both, where a kernel is too large to be compiled twice.
enum Rounding { kExact, kTensor, kEither };

// What one thread holds of a tile, and how slices [kSlice, kRows] and [kSlice, kColumns] are added to it: on the cores
// that every float32 goes through, or on tensor cores. `store(row, column, values)` gets neighbouring columns together.
template <int kRows, int kColumns>
struct Tile {
  static constexpr int kWide = kColumns / 4, kDeep = kThreads / kWide, kEach = kRows / kDeep;
  static_assert(kEach * kDeep == kRows, "the threads cover the tile");
  float sum[kEach][4] = {};

  __device__ void add(const float* a, int lda, const float* b, int ldb, const Block&) {
    const int column = threadIdx.x % kWide * 4, row = threadIdx.x / kWide * kEach;
#pragma unroll 4
    for (int k = 0; k < kSlice; ++k) {
      const float4 right = *reinterpret_cast<const float4*>(b + k * ldb + column);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const float left = a[k * lda + row + i];
        sum[i][0] += left * right.x, sum[i][1] += left * right.y;
        sum[i][2] += left * right.z, sum[i][3] += left * right.w;
      }
    }
  }

  template <class Store>
  __device__ void store(const Store& store) const {
    const int column = threadIdx.x % kWide * 4, row = threadIdx.x / kWide * kEach;
#pragma unroll
    for (int i = 0; i < kEach; ++i) store(row + i, column, sum[i]);
  }
};

template <int kRows, int kColumns>
struct TensorTile {
  static constexpr int kDown = kRows / 16, kAcross = kWarps / kDown, kEach = kColumns / kAcross / 8;
  static_assert(kDown * kAcross == kWarps && kEach * kAcross * 8 == kColumns, "the warps cover the tile");
  float sum[kEach][4] = {};

  // The part of x that tf32 holds; and of the rest the part that it holds.
  __device__ static uint32_t low_part(float x, uint32_t high) { return to_tf32(x - __uint_as_float(high)); }

  __device__ void add(const float* a, int lda, const float* b, int ldb, const Block& block) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, member = lane % 4;
    const int row = warp % kDown * 16 + group, column = warp / kDown * kEach * 8 + group;
    const bool refined = block.precision == kTf32x3;
#pragma unroll 1
    for (int k = 0; k < kSlice; k += 8) {
      float left[4];
      uint32_t left_high[4], left_low[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        left[n] = a[(k + member + n / 2 * 4) * lda + row + n % 2 * 8];
        left_high[n] = to_tf32(left[n]);
        left_low[n] = low_part(left[n], left_high[n]);
      }
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        float right[2];
        uint32_t right_high[2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          right[n] = b[(k + member + n * 4) * ldb + column + 8 * j];
          right_high[n] = to_tf32(right[n]);
        }
        if (refined) {
          const uint32_t right_low[2] = {low_part(right[0], right_high[0]), low_part(right[1], right_high[1])};
          mma_tf32(sum[j], left_low, right_high);
          mma_tf32(sum[j], left_high, right_low);
        }
        mma_tf32(sum[j], left_high, right_high);
      }
    }
  }

  template <class Store>
  __device__ void store(const Store& store) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = warp % kDown * 16 + lane / 4, column = warp / kDown * kEach * 8 + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const float upper[2] = {sum[j][0], sum[j][1]}, lower[2] = {sum[j][2], sum[j][3]};
      store(row, column + 8 * j, upper);
      store(row + 8, column + 8 * j, lower);
    }
  }
};

template <Rounding kRounding, int kRows, int kColumns>
struct TileOf {
  using Type = Tile<kRows, kColumns>;
};
template <int kRows, int kColumns>
struct TileOf<kTensor, kRows, kColumns> {
  using Type = TensorTile<kRows, kColumns>;
};

// One tile of C = A Bᵀ in the sense of sides: C(i, j) = Σ A(i, k) B(j, k) for rows from i0 and columns from j0 on,
// given to `store` a few neighbouring columns at a time; rows are inside, columns may reach past `columns`. A slice is
// fetched while the one before it is multiplied. Ends without a barrier; the stage is free after the next one.
template <Rounding kRounding, int kRows, int kColumns, class A, class B, class Store>
__device__ __forceinline__ void product_tile(int i0, int j0, int rows, int columns, int length, const A& a, const B& b,
                                             Block& block, const Store& store) {
  constexpr int kLdA = SliceLoader<kRows>::kLd, kLdB = SliceLoader<kColumns>::kLd;
  float *stage_a = block.stage, *stage_b = block.stage + kSlice * kLdA;
  typename TileOf<kRounding, kRows, kColumns>::Type tile;
  SliceLoader<kRows> left;
  SliceLoader<kColumns> right;
  left.fetch(a, i0, rows, 0, length);
  right.fetch(b, j0, columns, 0, length);
  for (int k = 0; k < length; k += kSlice) {
    __syncthreads();
    left.stage(a, stage_a);
    right.stage(b, stage_b);
    __syncthreads();
    if (k + kSlice < length) {
      left.fetch(a, i0, rows, k + kSlice, length);
      right.fetch(b, j0, columns, k + kSlice, length);
    }
    tile.add(stage_a, kLdA, stage_b, kLdB, block);
  }
  tile.store([&](int i, int j, const auto& values) {
    if (i0 + i < rows && j0 + j < columns) store(i0 + i, j0 + j, values);
  });
}

// All of C. With `lower`, tiles wholly above the diagonal are left out.
template <Rounding kRounding, int kRows, int kColumns, class A, class B, class Store>
__device__ __forceinline__ void product(int rows, int columns, int length, const A& a, const B& b, Block& block,
                                        bool lower, const Store& store) {
  if constexpr (kRounding == kEither) {
    if (block.precision == kIeee)
      product<kExact, kRows, kColumns>(rows, columns, length, a, b, block, lower, store);
    else
      product<kTensor, kRows, kColumns>(rows, columns, length, a, b, block, lower, store);
  } else {
    for (int i0 = 0; i0 < rows; i0 += kRows)
      for (int j0 = 0; j0 < columns && !(lower && j0 > i0 + kRows - 1); j0 += kColumns)
        product_tile<kRounding, kRows, kColumns>(i0, j0, rows, columns, length, a, b, block, store);
    __syncthreads();
  }
}

// The lower triangle of A Aᵀ for a matrix A of at most kOnePassRows rows, and with `kWithOther` B Aᵀ for at most 16
// rows B: every entry is read once, where `product` reads a row once for each tile it is a part of. The sums are the
// same to the last bit.
constexpr int kOnePassRows = 128;

template <bool kWithOther, class StoreGram, class StoreOther>
__device__ __forceinline__ void products_in_one_pass(int rows, int length, const Side& a, int count, const Side& b,
                                                     Block& block, const StoreGram& store_gram,
                                                     const StoreOther& store_other) {
  constexpr int kLdA = SliceLoader<kOnePassRows>::kLd, kLdB = SliceLoader<16>::kLd;
  static_assert(kSlice * (kLdA + kLdB) <= kStageFloats, "both slices fit the stage");
  static_assert(kOnePassRows == 2 * 64, "three tiles cover the lower triangle");
  float *stage_a = block.stage, *stage_b = block.stage + kSlice * kLdA;
  Tile<64, 64> first, below, second;
  Tile<16, kOnePassRows> other;
  SliceLoader<kOnePassRows> of_a;
  SliceLoader<16> of_b;
  of_a.fetch(a, 0, rows, 0, length);
  if (kWithOther) of_b.fetch(b, 0, count, 0, length);
  for (int k = 0; k < length; k += kSlice) {
    __syncthreads();
    of_a.stage(a, stage_a);
    if (kWithOther) of_b.stage(b, stage_b);
    __syncthreads();
    if (k + kSlice < length) {
      of_a.fetch(a, 0, rows, k + kSlice, length);
      if (kWithOther) of_b.fetch(b, 0, count, k + kSlice, length);
    }
    first.add(stage_a, kLdA, stage_a, kLdA, block);
    if (rows > 64) {
      below.add(stage_a + 64, kLdA, stage_a, kLdA, block);
      second.add(stage_a + 64, kLdA, stage_a + 64, kLdA, block);
    }
    if (kWithOther) other.add(stage_b, kLdB, stage_a, kLdA, block);
  }
  const auto store_tile = [&](const auto& tile, int i0, int j0) {
    tile.store([&](int i, int j, const auto& values) {
      if (i0 + i < rows && j0 + j < rows) store_gram(i0 + i, j0 + j, values);
    });
  };
  store_tile(first, 0, 0);
  if (rows > 64) store_tile(below, 64, 0), store_tile(second, 64, 64);
  if (kWithOther)
    other.store([&](int i, int j, const auto& values) {
      if (i < count && j < rows) store_other(i, j, values);
    });
  __syncthreads();
}

// M += factor · Σ_t (x_t y_tᵀ), rows of x and y [count, ·] `ld` apart, the part [first, end)² of M, whose rows are `ld`
// apart as well; with `kLower` only tiles that touch the lower triangle. `first` and `end` are multiples of four.
// Called with y = x it leaves M as symmetric as it was, to the last bit. No barrier.
template <bool kLower>
__device__ void add_outer_part(float* m, int first, int end, int ld, float factor, int count, const float* x,
                               const float* y) {
  const int across = (end - first) / 4;
  for (int64_t tile = threadIdx.x; tile < int64_t(across) * across; tile += kThreads) {
    const int i = first + static_cast<int>(tile / across) * 4, j = first + static_cast<int>(tile % across) * 4;
    if (kLower && j > i) continue;
    float4 sum[4] = {};
#pragma unroll 4
    for (int t = 0; t < count; ++t) {
      const float4 left = *reinterpret_cast<const float4*>(x + int64_t(t) * ld + i);
      const float4 right = *reinterpret_cast<const float4*>(y + int64_t(t) * ld + j);
      const float each[4] = {left.x, left.y, left.z, left.w};
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        sum[n].x += each[n] * right.x, sum[n].y += each[n] * right.y;
        sum[n].z += each[n] * right.z, sum[n].w += each[n] * right.w;
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      float4* at = reinterpret_cast<float4*>(m + int64_t(i + n) * ld + j);
      float4 old = *at;
      old.x += factor * sum[n].x, old.y += factor * sum[n].y, old.z += factor * sum[n].z, old.w += factor * sum[n].w;
      *at = old;
    }
  }
}

__device__ FASTKM_OUT_OF_LINE inline void add_outer(float* m, int width, float factor, int count, const float* x,
                                                    const float* y) {
  add_outer_part<false>(m, 0, width, width, factor, count, x, y);
}

// ---- symmetric matrices --------------------------------------------------------------------------------------------

// Not symmetric, by more than rounding explains; or not finite, which no positive definite matrix is. Into the status.
__device__ FASTKM_OUT_OF_LINE inline void check_symmetry(const float* m, int size, int width, Block& block) {
  float scale = 0, gap = 0, total = 0;
  for (int64_t n = threadIdx.x; n < int64_t(size) * size; n += kThreads) {
    const int64_t i = n / size, j = n % size;
    if (j > i) continue;
    const float entry = fabsf(m[i * width + j]), difference = fabsf(m[i * width + j] - m[j * width + i]);
    scale = fmaxf(scale, entry);
    gap = fmaxf(gap, difference);
    total += entry + difference;
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    scale = fmaxf(scale, __shfl_xor_sync(~0u, scale, offset));
    gap = fmaxf(gap, __shfl_xor_sync(~0u, gap, offset));
    total += __shfl_xor_sync(~0u, total, offset);
  }
  if (threadIdx.x % 32 == 0) {
    float* mine = block.part[threadIdx.x / 32];
    mine[0] = scale, mine[1] = gap, mine[2] = total;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int n = 1; n < kWarps; ++n) {
      scale = fmaxf(scale, block.part[n][0]);
      gap = fmaxf(gap, block.part[n][1]);
      total += block.part[n][2];
    }
    const float allowed = 3.4526698e-4f * scale;  // √ε
    block.status = total - total != 0 ? kNotPositiveDefinite : gap <= allowed ? kGood : kAsymmetric;
  }
  __syncthreads();
}

// L and L⁻¹ of a 16 × 16 block, completed by the identity, into `lower` and `root`, by one warp: lane i holds row i. A
// pivot has to be positive; or, with `floors`, above its floor less the slack, and it is raised to its floor.
__device__ FASTKM_OUT_OF_LINE inline void factor_root(const float* from, int64_t ld, int size, Block& block,
                                                      const float* floors = nullptr, const float* slack = nullptr) {
  const int lane = threadIdx.x % 32, i = lane % kRoot;
  float row[kRoot];
#pragma unroll
  for (int j = 0; j < kRoot; ++j) row[j] = i < size && j <= i ? from[i * ld + j] : i == j ? 1.f : 0.f;
#pragma unroll
  for (int j = 0; j < kRoot; ++j) {
    float pivot = __shfl_sync(~0u, row[j], j);
    const float floor = floors && j < size ? floors[j] : 0.f;
    const bool holds = floors && j < size ? pivot >= floor - slack[j] : pivot > 0;
    if (!(holds && pivot - pivot == 0)) {
      if (lane == 0) block.positive = false;
      pivot = 1;
    } else if (pivot < floor) {
      pivot = floor;
    }
    const float root = sqrtf(pivot);
    row[j] = i == j ? root : row[j] / root;
#pragma unroll
    for (int k = j + 1; k < kRoot; ++k) row[k] -= row[j] * __shfl_sync(~0u, row[j], k);
  }
  if (lane < kRoot)
#pragma unroll
    for (int j = 0; j < kRoot; ++j) block.lower[i][j] = j <= i ? row[j] : 0;
  __syncwarp();
  // Lane i solves for column i.
  float column[kRoot];
#pragma unroll
  for (int j = 0; j < kRoot; ++j) {
    float sum = i == j ? 1.f : 0.f;
#pragma unroll
    for (int k = 0; k < j; ++k) sum -= block.lower[j][k] * column[k];
    column[j] = sum / block.lower[j][j];
    __syncwarp();  // or all of L would be loaded at once, into more registers than there are
  }
  if (lane < kRoot)
#pragma unroll
    for (int j = 0; j < kRoot; ++j) block.root[j][i] = column[j];
}

// A symmetric positive definite matrix [size, size], rows `width` apart and padded with zeros to width × width; after
// cholesky, L below its diagonal and Lᵀ above it, so that either solve reads whole rows.
struct Square {
  float* data;
  float* roots;  // [blocks, 16, 16], the inverses of the diagonal blocks of L
  int size, width;

  __host__ __device__ static int64_t root_floats(int size) { return int64_t(round_up(size, kRoot)) * kRoot; }
};

// Rows [first, first + count) of X ← their product with a diagonal block's inverse or its transpose. A thread computes
// four of the sixteen entries of a column.
template <bool kTransposed>
__device__ void apply_root(const float* root, int count, float* x, int ld, int columns) {
  for (int column0 = 0; column0 < columns; column0 += kThreads / 4) {
    const int column = column0 + static_cast<int>(threadIdx.x) % (kThreads / 4);
    const int quarter = static_cast<int>(threadIdx.x) / (kThreads / 4) * 4;
    float result[4] = {};
    if (column < columns) {
      const int from = kTransposed ? quarter : 0, to = kTransposed ? count : min(count, quarter + 4);
      for (int k = from; k < to; ++k) {
        const float given = x[int64_t(k) * ld + column];
#pragma unroll
        for (int n = 0; n < 4; ++n)
          result[n] += (kTransposed ? root[k * kRoot + quarter + n] : root[(quarter + n) * kRoot + k]) * given;
      }
    }
    __syncthreads();
    if (column < columns)
#pragma unroll
      for (int n = 0; n < 4; ++n)
        if (quarter + n < count) x[int64_t(quarter + n) * ld + column] = result[n];
  }
  __syncthreads();
}

// A = L Lᵀ in place, from the lower triangle. `positive` says whether every pivot was positive; if not, the factor is
// finite but meaningless.
__device__ inline void cholesky(const Square& a, Block& block) {
  if (threadIdx.x == 0) block.positive = true;
  __syncthreads();
  for (int first = 0; first < a.size; first += kRoot) {
    const int count = min(kRoot, a.size - first), after = first + count, below = a.size - after;
    float* const panel = a.data + int64_t(first) * a.width;  // rows of Lᵀ
    float* const root = a.roots + int64_t(first) * kRoot;
    if (threadIdx.x < 32) factor_root(panel + first, a.width, count, block);
    __syncthreads();
    const int i = threadIdx.x / kRoot, j = threadIdx.x % kRoot;
    static_assert(kThreads == kRoot * kRoot, "a thread an entry");
    root[threadIdx.x] = j <= i ? block.root[i][j] : 0;
    if (i < count && j <= i)
      panel[int64_t(i) * a.width + first + j] = panel[int64_t(j) * a.width + first + i] = block.lower[i][j];

    // Right of the block, L₁₁⁻¹ A₂₁ᵀ = L₂₁ᵀ; and L₂₁ below it.
    for (int n = threadIdx.x; n < below * kRoot; n += kThreads) {
      const int row = after + n / kRoot, column = n % kRoot;
      panel[int64_t(column) * a.width + row] = a.data[int64_t(row) * a.width + first + column];
    }
    __syncthreads();
    apply_root<false>(root, count, panel + after, a.width, below);
    for (int n = threadIdx.x; n < below * kRoot; n += kThreads) {
      const int row = after + n / kRoot, column = n % kRoot;
      a.data[int64_t(row) * a.width + first + column] = panel[int64_t(column) * a.width + row];
    }

    // What is left: A₂₂ − L₂₁ L₂₁ᵀ, its lower triangle.
    if (below > 0) add_outer_part<true>(a.data, after, a.width, a.width, -1, kRoot, panel, panel);
    __syncthreads();
  }
}

// Rows [begin, end) of X lose Mᵀ X₁: rows of M, kRoot of them, are those of L or Lᵀ next to a diagonal block, and X₁
// are the rows just solved for. A thread takes four rows and four columns. Ends with a barrier.
__device__ inline void eliminate(const float* m, int width, int count, const float* solved, float* x, int ld, int begin,
                                 int end, int columns) {
  const int across = (columns + 3) / 4, down = (end - begin + 3) / 4;
  for (int tile = static_cast<int>(threadIdx.x); tile < across * down; tile += kThreads) {
    const int i = begin + tile / across * 4, j = tile % across * 4;
    float4 sum[4] = {};
#pragma unroll 4
    for (int t = 0; t < count; ++t) {
      const float4 left = *reinterpret_cast<const float4*>(m + int64_t(t) * width + i);
      const float4 right = *reinterpret_cast<const float4*>(solved + int64_t(t) * ld + j);
      const float each[4] = {left.x, left.y, left.z, left.w};
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        sum[n].x += each[n] * right.x, sum[n].y += each[n] * right.y;
        sum[n].z += each[n] * right.z, sum[n].w += each[n] * right.w;
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      float4* at = reinterpret_cast<float4*>(x + int64_t(i + n) * ld + j);
      float4 old = *at;
      old.x -= sum[n].x, old.y -= sum[n].y, old.z -= sum[n].z, old.w -= sum[n].w;
      *at = old;
    }
  }
  __syncthreads();
}

// X ← L⁻¹ X for X [size, columns], with `width` rows of room, `ld` apart.
__device__ inline void solve_lower(const Square& a, float* x, int ld, int columns) {
  for (int first = 0; first < a.size; first += kRoot) {
    const int count = min(kRoot, a.size - first);
    float* const rows = x + int64_t(first) * ld;
    apply_root<false>(a.roots + int64_t(first) * kRoot, count, rows, ld, columns);
    eliminate(a.data + int64_t(first) * a.width, a.width, count, rows, x, ld, first + count, a.size, columns);
  }
}

// X ← L⁻ᵀ X.
__device__ inline void solve_lower_transposed(const Square& a, float* x, int ld, int columns) {
  for (int first = (a.size - 1) / kRoot * kRoot; first >= 0 && a.size > 0; first -= kRoot) {
    const int count = min(kRoot, a.size - first);
    float* const rows = x + int64_t(first) * ld;
    apply_root<true>(a.roots + int64_t(first) * kRoot, count, rows, ld, columns);
    eliminate(a.data + int64_t(first) * a.width, a.width, count, rows, x, ld, 0, first, columns);
  }
}

// X ← A⁻¹ X.
__device__ inline void solve(const Square& a, float* x, int ld, int columns) {
  solve_lower(a, x, ld, columns);
  solve_lower_transposed(a, x, ld, columns);
}

}  // namespace
}  // namespace fastkm
