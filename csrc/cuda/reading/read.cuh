// What a read and its backward share on a GPU: the factor of a memory, and a tile of queries that never leaves K.
#pragma once

#include "cuda/linalg/product.cuh"
#include "cuda/linalg/solve.cuh"

namespace fastkm {
namespace {

constexpr int kQueries = 64;     // a tile; rows of its matrices [K, kQueries] are `kLdQueries` apart
constexpr int kLdQueries = 68;   // so that queries written out pattern by pattern meet fewer banks twice
constexpr int kFusedRows = 128;  // the most rows of a memory whose queries are answered where it is factored

// Factors of all memories, where another launch made them.
struct Factors {
  float *squares, *roots, *grams;  // [B, width, width], [B, ·], [B, width, width]

  __device__ Square square(int64_t b, int K, int width) const {
    return {squares + b * width * width, roots + b * Square::root_floats(K), K, width};
  }
};

struct Addressed : Block {
  int K, C, width, columns;  // columns: C in whole vectors
  float ridge;
  float* own_mean;     // R [K, columns] while it fits on chip, else null
  Side mean;           // R, wherever it is read
  Square own, square;  // A = L Lᵀ: this block's space for it, and the one in use
  float *own_gram, *gram;
};

__host__ __device__ inline void set_sizes(Addressed& block, const ReadingArgs<float>& args) {
  block.K = static_cast<int>(args.K), block.width = round_up(block.K, 4);
  block.C = static_cast<int>(args.C), block.columns = round_up(block.C, 4);
}

// Space for R, after everything else.
__host__ __device__ inline void take_mean(Addressed& block, Space& space) {
  const int64_t state = int64_t(block.K) * block.columns;
  block.own_mean = space.fits(state) ? space.take(state) : nullptr;
}

// Space for a factor of its own.
__host__ __device__ inline void take_factor(Addressed& block, Space& space, bool squared_gram) {
  const int64_t area = int64_t(block.width) * block.width;
  float* const roots = space.take(Square::root_floats(block.K));
  block.own = {space.take(area), roots, block.K, block.width};
  if (squared_gram) block.own_gram = space.take(area);
}

// Floats of the factors of all memories.
inline Factors allocate_factors(cuda::Context& context, const ReadingArgs<float>& args, int64_t B) {
  const int width = round_up(static_cast<int>(args.K), 4);
  const int64_t area = int64_t(width) * width;
  return {context.allocate(context, B * area),
          context.allocate(context, B * Square::root_floats(static_cast<int>(args.K))),
          args.squared_gram ? context.allocate(context, B * area) : nullptr};
}

// A = G + λI, or G² + λI, and its factor.
__device__ inline void factor_memory(Addressed& block, const ReadingArgs<float>& args) {
  const int K = block.K, width = block.width;
  const Square& a = block.square;
  const Side mean = block.mean;
  float* const gram = args.squared_gram ? block.gram : a.data;
  for (int n = threadIdx.x; n < (width - K) * width; n += kThreads) {
    const int64_t outside = K + n / width, inside = n % width;
    gram[outside * width + inside] = gram[inside * width + outside] = 0;
    a.data[outside * width + inside] = a.data[inside * width + outside] = 0;
  }
  const auto store = [&](int i, int j, const auto& sums) {
    int n = 0;
    for (float sum : sums) {
      const int column = j + n++;
      if (column <= i) gram[int64_t(i) * width + column] = gram[int64_t(column) * width + i] = sum;
    }
  };
  if (K <= kOnePassRows)
    products_in_one_pass<false>(K, block.C, mean, 0, mean, block, store, store);
  else
    product<kExact, 64, 64>(K, K, block.C, mean, mean, block, true, store);
  if (args.squared_gram) {
    const Side side{gram, width, 1};
    product<kExact, 64, 64>(K, K, K, side, side, block, true,
                            [&](int i, int j, const auto& sums) { put(a.data + int64_t(i) * width + j, sums, K - j); });
  }
  for (int i = threadIdx.x; i < K; i += kThreads) a.data[int64_t(i) * (width + 1)] += block.ridge;
  __syncthreads();
  cholesky(a, block);
}

// A factor the caller brings: mirrored, and the inverses of its diagonal blocks.
__device__ inline void take_given(Addressed& block, const Side& lower) {
  const Square& a = block.square;
  for (int64_t n = threadIdx.x; n < int64_t(a.width) * a.width; n += kThreads) {
    const int row = static_cast<int>(n / a.width), column = static_cast<int>(n % a.width);
    const bool inside = row < a.size && column < a.size;
    a.data[n] = inside ? lower.one(max(row, column), min(row, column)) : 0;
  }
  __syncthreads();
  // A thread solves for one column of one block's inverse.
  for (int n = threadIdx.x; n < round_up(a.size, kRoot); n += kThreads) {
    const int first = n / kRoot * kRoot, column = n % kRoot, count = min(kRoot, a.size - first);
    const float* const from = a.data + int64_t(first) * a.width + first;
    float* const root = a.roots + int64_t(first) * kRoot + column;
    for (int i = 0; i < kRoot; ++i) {
      float sum = i == column ? 1.f : 0.f;
      if (i < count) {
        for (int j = column; j < i; ++j) sum -= from[int64_t(i) * a.width + j] * root[j * kRoot];
        sum /= from[int64_t(i) * (a.width + 1)];
      }
      root[i * kRoot] = sum;
    }
  }
  __syncthreads();
}

// x [K, count] = R Zᵀ for queries from `first` on.
template <Rounding kRounding>
__device__ __forceinline__ void project(Addressed& block, const ReadingArgs<float>& args, int64_t b, int64_t first,
                                        int count, float* x) {
  Codes queries = codes_of(args.queries, args.queries_type, b);
  queries.skip(first);
  product<kRounding, 64, 64>(block.K, count, block.C, block.mean, queries, block, false,
                             [&](int k, int q, const auto& sums) { put(x + k * kLdQueries + q, sums, kQueries - q); });
}

// y = G x
__device__ __forceinline__ void multiply_gram(Addressed& block, const float* x, float* y, int count) {
  product<kExact, 64, 64>(block.K, count, block.K, Side{block.gram, block.width, 1}, Side{x, 1, kLdQueries}, block,
                          false,
                          [&](int k, int q, const auto& sums) { put(y + k * kLdQueries + q, sums, kQueries - q); });
}

// Which memory the block works with; its factor is of another launch, or the block's own.
__device__ inline void choose_memory(Addressed& block, const Factors& factors, const ReadingArgs<float>& args,
                                     int64_t b) {
  if (threadIdx.x == 0) {
    const bool given = factors.squares != nullptr;
    const int64_t area = int64_t(block.width) * block.width;
    block.square = given ? factors.square(b, block.K, block.width) : block.own;
    block.gram = given ? factors.grams + (factors.grams ? b * area : 0) : block.own_gram;
    block.ridge = args.ridge.data ? *element(args.ridge, b) : 0;
    block.mean = block.own_mean ? Side{block.own_mean, block.columns, 1} : side_of(args.mean, b);
  }
  if (block.own_mean) load_rows(block.own_mean, block.K, block.C, block.K, block.columns, side_of(args.mean, b));
  __syncthreads();
}

}  // namespace
}  // namespace fastkm
