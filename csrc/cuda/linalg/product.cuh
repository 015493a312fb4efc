// Products of matrices through shared memory, on the cores of every float32 or on tensor cores.
#pragma once

#include "cuda/linalg/codes.cuh"

namespace fastkm {
namespace {

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

}  // namespace
}  // namespace fastkm
