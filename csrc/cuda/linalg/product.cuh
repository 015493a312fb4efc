// Matrix products of one thread block: C(i, j) = Σ_k A(i, k) B(j, k).
//
// A and B are read through views that give entry (outer, inner), so either may be transposed, strided, or of low
// precision. C goes to a callback `store(i, j, values)`, which gets two or four neighbouring columns of a row; its rows
// exist, its columns may reach past the last one.
//
// 1. A slice of 16 terms of each operand is loaded into registers while the slice before it is multiplied.
// 2. It is staged in shared memory with the terms as rows.
// 3. Every thread adds the slice to its part of a tile of C, which stays in registers until the sum is complete.
//
// CUDA cores sum in float32, in the order of k. Tensor cores round the operands to tf32: once ("tf32"), or into a high
// and a low part whose three larger products are summed ("tf32x3"). Their sums depend on the shape of the instruction.
#pragma once

#include "cuda/linalg/codes.cuh"

namespace fastkm {
namespace {

// Which cores a product is compiled for. kAnyCores compiles both and lets the precision of the thread block decide; it
// is for kernels that are too large to be compiled twice.
enum Cores { kCudaCores, kTensorCores, kAnyCores };

// The shape of a product, and whether tiles wholly above the diagonal are left out.
struct ProductShape {
  int rows, columns, length;  // length: terms of each sum
  bool lower = false;
};

// Moves slices of one operand: from the caller's memory to registers, from registers to the stage.
template <int kOuter>
struct SliceLoader {
  static constexpr int kVectors = kOuter * kSlice / 4, kEach = (kVectors + kThreads - 1) / kThreads;
  static constexpr int kLd = kOuter + kStagePadding;
  static_assert(kLd % 32 == 8 || kLd % 32 == 24, "fragments read four rows of a slice at once");
  float4 held[kEach];

  // Vectors run along `inner` where it is contiguous, along `outer` otherwise.
  template <class From>
  __device__ static bool runs_along_inner(const From& operand) {
    return operand.inner == 1;
  }

  template <class From>
  __device__ void load(const From& operand, int first, int size, int from, int length) {
    const bool along_inner = runs_along_inner(operand);
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
      const int vector = static_cast<int>(threadIdx.x) + n * kThreads;
      const int outer = first + (along_inner ? vector / (kSlice / 4) : vector % (kOuter / 4) * 4);
      const int inner = from + (along_inner ? vector % (kSlice / 4) * 4 : vector / (kOuter / 4));
      const bool inside = vector < kVectors && outer < size && inner < length;
      const int room = inside ? (along_inner ? length - inner : size - outer) : 0;
      held[n] = operand.load_four(outer, inner, along_inner ? operand.inner : operand.outer, room);
    }
  }

  template <class From>
  __device__ void stage(const From& operand, float* to) const {
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
      const int vector = static_cast<int>(threadIdx.x) + n * kThreads;
      if (vector >= kVectors) break;
      if (runs_along_inner(operand)) {
        float* at = to + vector % (kSlice / 4) * 4 * kLd + vector / (kSlice / 4);
        at[0] = held[n].x;
        at[kLd] = held[n].y;
        at[2 * kLd] = held[n].z;
        at[3 * kLd] = held[n].w;
      } else {
        *reinterpret_cast<float4*>(to + vector / (kOuter / 4) * kLd + vector % (kOuter / 4) * 4) = held[n];
      }
    }
  }
};

// A thread's part of a tile of C on CUDA cores. `add` adds slices [kSlice, kRows] and [kSlice, kColumns].
template <int kRows, int kColumns>
struct Tile {
  static constexpr int kWide = kColumns / 4, kDeep = kThreads / kWide, kEach = kRows / kDeep;
  static_assert(kEach * kDeep == kRows, "the threads cover the tile");
  float sum[kEach][4] = {};

  __device__ void add(const float* a, int lda, const float* b, int ldb, const ThreadBlock&) {
    const int column = threadIdx.x % kWide * 4, row = threadIdx.x / kWide * kEach;
#pragma unroll 4
    for (int k = 0; k < kSlice; ++k) {
      const float4 right = *reinterpret_cast<const float4*>(b + k * ldb + column);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const float left = a[k * lda + row + i];
        sum[i][0] += left * right.x;
        sum[i][1] += left * right.y;
        sum[i][2] += left * right.z;
        sum[i][3] += left * right.w;
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

// The same on tensor cores: a warp computes 16 rows and a share of the columns, eight at a time.
template <int kRows, int kColumns>
struct TensorTile {
  static constexpr int kDown = kRows / 16, kAcross = kWarps / kDown, kEach = kColumns / kAcross / 8;
  static_assert(kDown * kAcross == kWarps && kEach * kAcross * 8 == kColumns, "the warps cover the tile");
  float sum[kEach][4] = {};

  // What tf32 keeps of the rest of x after its high part.
  __device__ static uint32_t low_part(float x, uint32_t high) { return to_tf32(x - __uint_as_float(high)); }

  __device__ void add(const float* a, int lda, const float* b, int ldb, const ThreadBlock& thread_block) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, member = lane % 4;
    const int row = warp % kDown * 16 + group, column = warp / kDown * kEach * 8 + group;
    const bool refined = thread_block.precision == kTf32x3;
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

template <Cores kCores, int kRows, int kColumns>
struct TileOf {
  using Type = Tile<kRows, kColumns>;
};
template <int kRows, int kColumns>
struct TileOf<kTensorCores, kRows, kColumns> {
  using Type = TensorTile<kRows, kColumns>;
};

// The tile of C that starts at (i0, j0). Ends without a barrier; the stage is free after the next one.
template <Cores kCores, int kRows, int kColumns, class A, class B, class Store>
__device__ __forceinline__ void product_tile(int i0, int j0, const ProductShape& shape, const A& a, const B& b,
                                             ThreadBlock& thread_block, const Store& store) {
  constexpr int kLdA = SliceLoader<kRows>::kLd, kLdB = SliceLoader<kColumns>::kLd;
  float *stage_a = thread_block.stage, *stage_b = thread_block.stage + kSlice * kLdA;
  typename TileOf<kCores, kRows, kColumns>::Type tile;
  SliceLoader<kRows> slice_a;
  SliceLoader<kColumns> slice_b;
  slice_a.load(a, i0, shape.rows, 0, shape.length);
  slice_b.load(b, j0, shape.columns, 0, shape.length);
  for (int k = 0; k < shape.length; k += kSlice) {
    __syncthreads();
    slice_a.stage(a, stage_a);
    slice_b.stage(b, stage_b);
    __syncthreads();
    if (k + kSlice < shape.length) {
      slice_a.load(a, i0, shape.rows, k + kSlice, shape.length);
      slice_b.load(b, j0, shape.columns, k + kSlice, shape.length);
    }
    tile.add(stage_a, kLdA, stage_b, kLdB, thread_block);
  }
  tile.store([&](int i, int j, const auto& values) {
    if (i0 + i < shape.rows && j0 + j < shape.columns) store(i0 + i, j0 + j, values);
  });
}

// All of C, tile by tile. Ends with a barrier.
template <Cores kCores, int kRows, int kColumns, class Store, class A, class B>
__device__ __forceinline__ void product(const Store& store, const ProductShape& shape, const A& a, const B& b,
                                        ThreadBlock& thread_block) {
  if constexpr (kCores == kAnyCores) {
    if (thread_block.precision == kIeee)
      product<kCudaCores, kRows, kColumns>(store, shape, a, b, thread_block);
    else
      product<kTensorCores, kRows, kColumns>(store, shape, a, b, thread_block);
  } else {
    for (int i0 = 0; i0 < shape.rows; i0 += kRows)
      for (int j0 = 0; j0 < shape.columns && !(shape.lower && j0 > i0 + kRows - 1); j0 += kColumns)
        product_tile<kCores, kRows, kColumns>(i0, j0, shape, a, b, thread_block, store);
    __syncthreads();
  }
}

// The lower triangle of A Aᵀ for a matrix A of at most kOnePassRows rows and, with `kWithOther`, B Aᵀ for at most 16
// rows B. Every entry of A is read once, whereas `product` reads a row once for each of its tiles. The sums are equal
// to the last bit.
constexpr int kOnePassRows = 128;

template <bool kWithOther, class StoreGram, class StoreOther>
__device__ __forceinline__ void products_in_one_pass(const StoreGram& store_gram, const StoreOther& store_other,
                                                     const ProductShape& shape, const Operand& a, const Operand& b,
                                                     ThreadBlock& thread_block) {
  constexpr int kLdA = SliceLoader<kOnePassRows>::kLd, kLdB = SliceLoader<16>::kLd;
  static_assert(kSlice * (kLdA + kLdB) <= kStageFloats, "both slices fit the stage");
  static_assert(kOnePassRows == 2 * 64, "three tiles cover the lower triangle");
  float *stage_a = thread_block.stage, *stage_b = thread_block.stage + kSlice * kLdA;
  const int rows = shape.columns, other_rows = shape.rows, length = shape.length;
  Tile<64, 64> first, below, second;
  Tile<16, kOnePassRows> other;
  SliceLoader<kOnePassRows> slice_a;
  SliceLoader<16> slice_b;
  slice_a.load(a, 0, rows, 0, length);
  if (kWithOther) slice_b.load(b, 0, other_rows, 0, length);
  for (int k = 0; k < length; k += kSlice) {
    __syncthreads();
    slice_a.stage(a, stage_a);
    if (kWithOther) slice_b.stage(b, stage_b);
    __syncthreads();
    if (k + kSlice < length) {
      slice_a.load(a, 0, rows, k + kSlice, length);
      if (kWithOther) slice_b.load(b, 0, other_rows, k + kSlice, length);
    }
    first.add(stage_a, kLdA, stage_a, kLdA, thread_block);
    if (rows > 64) {
      below.add(stage_a + 64, kLdA, stage_a, kLdA, thread_block);
      second.add(stage_a + 64, kLdA, stage_a + 64, kLdA, thread_block);
    }
    if (kWithOther) other.add(stage_b, kLdB, stage_a, kLdA, thread_block);
  }
  const auto store_tile = [&](const auto& tile, int i0, int j0) {
    tile.store([&](int i, int j, const auto& values) {
      if (i0 + i < rows && j0 + j < rows) store_gram(i0 + i, j0 + j, values);
    });
  };
  store_tile(first, 0, 0);
  if (rows > 64) {
    store_tile(below, 64, 0);
    store_tile(second, 64, 64);
  }
  if (kWithOther)
    other.store([&](int i, int j, const auto& values) {
      if (i < other_rows && j < rows) store_other(i, j, values);
    });
  __syncthreads();
}

}  // namespace
}  // namespace fastkm
