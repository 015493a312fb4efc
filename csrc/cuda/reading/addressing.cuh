// What a read and its backward share: the factor of a memory's Gram matrix, and tiles of queries in the space of K.
//
//   (1)  G = R Rᵀ      A = G + λI, or G² + λI for the squared-Gram solve      A = L Lᵀ
//   (2)  x = R z for a tile of 64 queries z, as columns
//   (3)  wᵢ₊₁ = wᵢ − λ A⁻¹ wᵢ      ẑ = Rᵀ wₙ
#pragma once

#include "cuda/linalg/product.cuh"
#include "cuda/linalg/solve.cuh"

namespace fastkm {
namespace {

constexpr int kQueries = 64;  // of a tile
constexpr int kLdQueries =
    68;  // rows of a tile [K, kQueries] are this far apart: stores by query meet fewer banks twice
constexpr int kFusedRows = 128;  // the most rows of a memory that is factored in the launch that reads it

// Factors of all memories, where another launch made them.
struct Factors {
  float *data, *inverse_blocks, *grams;  // [B, width, width], [B, ·], [B, width, width]

  __device__ Factor of_memory(int64_t b, int K, int width) const {
    return {data + b * width * width, inverse_blocks + b * Factor::inverse_floats(K), K, width};
  }
};

// A memory as queries address it. It lies in shared memory.
struct AddressedMemory : ThreadBlock {
  int K, C, width, columns;  // width and columns are K and C in whole vectors
  float ridge;
  float* own_mean;            // R [K, columns] while it fits on chip; otherwise null
  Operand mean;               // R: own_mean, or the caller's
  Factor own_factor, factor;  // of A: the buffers of this thread block, and the factor in use
  float *own_gram, *gram;     // G [width, width], only for the squared-Gram solve
};

__host__ __device__ inline void set_sizes(AddressedMemory& memory, const ReadingArgs<float>& args) {
  memory.K = static_cast<int>(args.K);
  memory.width = round_up(memory.K, 4);
  memory.C = static_cast<int>(args.C);
  memory.columns = round_up(memory.C, 4);
}

// The buffer of R. Allocate it last.
__host__ __device__ inline void allocate_mean(AddressedMemory& memory, Arena& arena) {
  const int64_t mean = int64_t(memory.K) * memory.columns;
  memory.own_mean = arena.fits(mean) ? arena.allocate(mean) : nullptr;
}

__host__ __device__ inline void allocate_factor(AddressedMemory& memory, Arena& arena, bool squared_gram) {
  const int64_t square = int64_t(memory.width) * memory.width;
  float* const inverse_blocks = arena.allocate(Factor::inverse_floats(memory.K));
  memory.own_factor = {arena.allocate(square), inverse_blocks, memory.K, memory.width};
  if (squared_gram) memory.own_gram = arena.allocate(square);
}

// Device memory for the factors of all memories.
inline Factors allocate_factors(cuda::Context& context, const ReadingArgs<float>& args, int64_t B) {
  const int width = round_up(static_cast<int>(args.K), 4);
  const int64_t square = int64_t(width) * width;
  return {context.allocate(context, B * square),
          context.allocate(context, B * Factor::inverse_floats(static_cast<int>(args.K))),
          args.squared_gram ? context.allocate(context, B * square) : nullptr};
}

// Start on memory b. Its factor is that of another launch, or the thread block's own.
__device__ inline void select_memory(AddressedMemory& memory, const Factors& factors, const ReadingArgs<float>& args,
                                     int64_t b) {
  if (threadIdx.x == 0) {
    const bool factored = factors.data != nullptr;
    const int64_t square = int64_t(memory.width) * memory.width;
    memory.factor = factored ? factors.of_memory(b, memory.K, memory.width) : memory.own_factor;
    memory.gram = factored ? factors.grams + (factors.grams ? b * square : 0) : memory.own_gram;
    memory.ridge = args.ridge.data ? *element(args.ridge, b) : 0;
    memory.mean = memory.own_mean ? Operand{memory.own_mean, memory.columns, 1} : operand_of(args.mean, b);
  }
  if (memory.own_mean)
    load_rows(memory.own_mean, memory.K, memory.C, memory.K, memory.columns, operand_of(args.mean, b));
  __syncthreads();
}

// (1)
__device__ inline void factor_memory(AddressedMemory& memory, const ReadingArgs<float>& args) {
  const int K = memory.K, width = memory.width;
  const Factor& a = memory.factor;
  const Operand mean = memory.mean;
  float* const gram = args.squared_gram ? memory.gram : a.data;
  for (int n = threadIdx.x; n < (width - K) * width; n += kThreads) {
    const int64_t outside = K + n / width, inside = n % width;
    gram[outside * width + inside] = gram[inside * width + outside] = 0;
    a.data[outside * width + inside] = a.data[inside * width + outside] = 0;
  }
  const auto store_both = [&](int i, int j, const auto& sums) {
    int n = 0;
    for (float sum : sums) {
      const int column = j + n++;
      if (column <= i) gram[int64_t(i) * width + column] = gram[int64_t(column) * width + i] = sum;
    }
  };
  if (K <= kOnePassRows)
    products_in_one_pass<false>(store_both, store_both, {0, K, memory.C}, mean, mean, memory);
  else
    product<kCudaCores, 64, 64>(store_both, {K, K, memory.C, true}, mean, mean, memory);
  if (args.squared_gram) {
    const Operand rows{gram, width, 1};
    product<kCudaCores, 64, 64>(StoreRows{a.data, width, K}, {K, K, K, true}, rows, rows, memory);
  }
  for (int i = threadIdx.x; i < K; i += kThreads) a.data[int64_t(i) * (width + 1)] += memory.ridge;
  __syncthreads();
  cholesky(a, memory);
}

// Load a factor that the caller brings, mirror it, and invert its diagonal blocks.
__device__ inline void load_factor(AddressedMemory& memory, const Operand& lower) {
  const Factor& a = memory.factor;
  for (int64_t n = threadIdx.x; n < int64_t(a.width) * a.width; n += kThreads) {
    const int row = static_cast<int>(n / a.width), column = static_cast<int>(n % a.width);
    const bool inside = row < a.size && column < a.size;
    a.data[n] = inside ? lower.load_one(max(row, column), min(row, column)) : 0;
  }
  __syncthreads();
  // A thread solves for one column of the inverse of one block.
  for (int n = threadIdx.x; n < round_up(a.size, kBlock); n += kThreads) {
    const int first = n / kBlock * kBlock, column = n % kBlock, count = min(kBlock, a.size - first);
    const float* const from = a.data + int64_t(first) * a.width + first;
    float* const inverse = a.inverse_blocks + int64_t(first) * kBlock + column;
    for (int i = 0; i < kBlock; ++i) {
      float sum = i == column ? 1.f : 0.f;
      if (i < count) {
        for (int j = column; j < i; ++j) sum -= from[int64_t(i) * a.width + j] * inverse[j * kBlock];
        sum /= from[int64_t(i) * (a.width + 1)];
      }
      inverse[i * kBlock] = sum;
    }
  }
  __syncthreads();
}

// (2) for queries [first, first + count).
template <Cores kCores>
__device__ __forceinline__ void project_queries(float* x, AddressedMemory& memory, const ReadingArgs<float>& args,
                                                int64_t b, int64_t first, int count) {
  Codes queries = codes_of(args.queries, args.queries_type, b);
  queries.skip_rows(first);
  product<kCores, 64, 64>(StoreRows{x, kLdQueries, kQueries}, {memory.K, count, memory.C}, memory.mean, queries,
                          memory);
}

// y = G x
__device__ __forceinline__ void product_gram(float* y, AddressedMemory& memory, const float* x, int count) {
  product<kCudaCores, 64, 64>(StoreRows{y, kLdQueries, kQueries}, {memory.K, count, memory.K},
                              Operand{memory.gram, memory.width, 1}, Operand{x, 1, kLdQueries}, memory);
}

// Iterations of (3) for the columns of x; y is overwritten.
__device__ __forceinline__ void iterate(float* x, float* y, AddressedMemory& memory, int64_t num_iters, int columns) {
  for (int64_t n = 1; n < num_iters; ++n) {
    copy(y, x, int64_t(memory.K) * kLdQueries);
    solve_cholesky(y, kLdQueries, columns, memory.factor);
    for (int i = threadIdx.x; i < memory.K * kLdQueries; i += kThreads) x[i] -= memory.ridge * y[i];
    __syncthreads();
  }
}

// Store the weights of queries [first, first + count), and the values of (3) where they are wanted.
template <Cores kCores>
__device__ __forceinline__ void store_answers(const float* x, AddressedMemory& memory, const ReadingArgs<float>& args,
                                              int64_t b, int64_t first, int count) {
  const int K = memory.K;
  for (int n = threadIdx.x; n < count * K; n += kThreads)
    *element(args.weights, b, first + n / K, n % K) = x[n % K * kLdQueries + n / K];
  if (!args.values.data) return;
  const auto store_values = [&](int q, int c, const auto& sums) {
    store_columns(element(args.values, b, first + q, c), sums, memory.C - c);
  };
  product<kCores, 64, 64>(store_values, {count, memory.C, K}, Operand{x, 1, kLdQueries}, transposed(memory.mean),
                          memory);
}

}  // namespace
}  // namespace fastkm
