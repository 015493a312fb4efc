// Backward of solve_addressing and read on a GPU: one factor serves the solves of both directions.
//
// Blocks that share a memory each sum over their own queries; the last one to finish adds the sums up in order.
#include "cuda/linalg/reduce.cuh"
#include "cuda/reading/read.cuh"

namespace fastkm {
namespace {

// What the queries of one block add up to; a bar marks a cotangent.
struct Sums {
  float* mean;    // R̄ [K, columns], at first without what comes through G
  float* solved;  // Ā [width, width]
  float* target;  // Σ v (R z)ᵀ [width, width], then Ḡ, for the squared-Gram solve
  float* ridge;   // λ̄, a double
};

struct Reverse : Addressed {
  Sums sums;
  float* solutions;                              // w₁, y₁, y₂, … [n, width, kQueries]
  float *weights, *cotangent, *solved, *target;  // [width, kQueries]
};

struct Plan {
  bool factor, answer;
  int64_t blocks_each;
  Factors factors;
  unsigned* tickets;
  Workspace workspace;
};

__host__ __device__ int64_t tile_floats(const Addressed& block) { return int64_t(block.width) * kLdQueries; }

// Where the buffers of a block are; most used first. Sums that another block adds up are in the workspace.
__host__ __device__ void lay_out(Reverse& block, Space& space, const ReadingArgs<float>& args, const Plan& plan) {
  set_sizes(block, args);
  const int64_t area = int64_t(block.width) * block.width, tile = tile_floats(block);
  const auto take_sum = [&](int64_t count) {
    return plan.blocks_each > 1 ? space.take_global(count) : space.take(count);
  };
  if (plan.answer) {
    block.sums.ridge = take_sum(4);
    block.cotangent = space.take(tile), block.solved = space.take(tile);
    block.solutions = space.take(args.num_iters * tile);
  }
  if (plan.factor && !plan.factors.squares) take_factor(block, space, args.squared_gram);
  if (plan.answer) {
    block.weights = space.take(tile);
    if (args.squared_gram) block.target = space.take(tile);
    block.sums.solved = take_sum(area);
    if (args.squared_gram) block.sums.target = take_sum(area);
    block.sums.mean = take_sum(int64_t(block.K) * block.columns);
  }
  take_mean(block, space);
}

// m [K, ·] += sign · x yᵀ over the queries of a tile.
template <Rounding kRounding, class Other>
__device__ void accumulate(Reverse& block, float* m, int columns, int ld, float sign, const float* x,
                           const Other& other, int count) {
  product<kRounding, 64, 64>(block.K, columns, count, Side{x, kLdQueries, 1}, other, block, false,
                             [&](int i, int j, const auto& sums) {
                               float* const at = m + int64_t(i) * ld + j;
                               put_sum(at, at, 1, sign, sums, columns - j);
                             });
}

// Σ of the products of entries of two tiles.
__device__ double inner_product(Reverse& block, const float* x, const float* y, int count) {
  double sum = 0;
  for (int n = threadIdx.x; n < block.K * count; n += kThreads) {
    const int at = n / count * kLdQueries + n % count;
    sum += x[at] * y[at];
  }
  return block_sum(sum, block);
}

__device__ void subtract_ridge(Reverse& block, double product) {
  if (threadIdx.x == 0) *reinterpret_cast<double*>(block.sums.ridge) -= product;
}

__device__ void tile_backward(Reverse& block, const ReadingArgs<float>& args, const ReadingGrads<float>& grads,
                              int64_t b, int64_t first, int count) {
  const int K = block.K, C = block.C, width = block.width, columns = round_up(count, 4);
  const int64_t tile = tile_floats(block), used = int64_t(K) * kLdQueries;
  const float ridge = block.ridge;
  const Side mean = block.mean;
  float* const cotangent = block.cotangent;
  float* const solved = block.solved;

  // Read again: w₁ = A⁻¹ x with x = R z or G R z, then yᵢ = A⁻¹ wᵢ and wᵢ₊₁ = wᵢ − λ yᵢ.
  project<kEither>(block, args, b, first, count, args.squared_gram ? block.target : block.solutions);
  if (args.squared_gram) multiply_gram(block, block.target, block.solutions, count);
  solve(block.square, block.solutions, kLdQueries, columns);
  copy(block.weights, block.solutions, used);
  for (int64_t n = 1; n < args.num_iters; ++n) {
    float* const y = block.solutions + n * tile;
    copy(y, block.weights, used);
    solve(block.square, y, kLdQueries, columns);
    for (int64_t i = threadIdx.x; i < used; i += kThreads) block.weights[i] -= ridge * y[i];
    __syncthreads();
  }

  // Back through the decoding ẑ = Rᵀ wₙ.
  for (int n = threadIdx.x; n < K * count; n += kThreads) {
    const int q = n / K, k = n % K;
    cotangent[k * kLdQueries + q] = grads.weights.data ? *element(grads.weights, b, first + q, k) : 0;
  }
  __syncthreads();
  if (grads.values.data) {
    const Side values{element(grads.values, b, first), grads.values.stride[1], grads.values.stride[2]};
    product<kEither, 64, 64>(K, count, C, mean, values, block, false, [&](int k, int q, const auto& sums) {
      float* const at = cotangent + k * kLdQueries + q;
      put_sum(at, at, 1, 1, sums, kQueries - q);
    });
    accumulate<kEither>(block, block.sums.mean, C, block.columns, 1, block.weights, transposed(values), count);
  }

  // Back through the iterations: u = λ A⁻¹ w̄, Ā += u yᵀ, w̄ ← w̄ − u. The trace of Ā belongs to λ̄ as well, and
  // subtracting it before rather than after the sum over w̄ y leaves the new w̄ there.
  for (int64_t n = args.num_iters - 1; n > 0; --n) {
    const float* const y = block.solutions + n * tile;
    copy(solved, cotangent, used);
    solve(block.square, solved, kLdQueries, columns);
    for (int64_t i = threadIdx.x; i < used; i += kThreads) {
      solved[i] *= ridge;
      cotangent[i] -= solved[i];
    }
    __syncthreads();
    accumulate<kExact>(block, block.sums.solved, K, width, 1, solved, Side{y, kLdQueries, 1}, count);
    subtract_ridge(block, inner_product(block, cotangent, y, count));
  }

  // Back through the address: v = A⁻¹ w̄ = x̄, Ā −= v w₁ᵀ.
  solve(block.square, cotangent, kLdQueries, columns);
  accumulate<kExact>(block, block.sums.solved, K, width, -1, cotangent, Side{block.solutions, kLdQueries, 1}, count);
  subtract_ridge(block, inner_product(block, cotangent, block.solutions, count));
  if (args.squared_gram) {
    accumulate<kExact>(block, block.sums.target, K, width, 1, cotangent, Side{block.target, kLdQueries, 1}, count);
    multiply_gram(block, cotangent, solved, count);
  }
  const float* const projected = args.squared_gram ? solved : cotangent;  // cotangent of R z
  Codes queries = codes_of(args.queries, args.queries_type, b);
  queries.skip(first);
  accumulate<kEither>(block, block.sums.mean, C, block.columns, 1, projected, transposed(queries), count);
  product<kEither, 64, 64>(
      count, C, K, Side{projected, 1, kLdQueries}, transposed(mean), block, false,
      [&](int q, int c, const auto& sums) { put(element(grads.to_queries, b, first + q, c), sums, C - c); });
}

// m ← m + mᵀ
__device__ void add_transpose(float* m, int size, int width) {
  for (int64_t n = threadIdx.x; n < int64_t(size) * size; n += kThreads) {
    const int64_t i = n / size, j = n % size;
    if (j > i) continue;
    m[i * width + j] = m[j * width + i] = m[i * width + j] + m[j * width + i];
  }
  __syncthreads();
}

// Into the sums of this block, those of all blocks that share the memory, in the order of the blocks.
__device__ void gather(Reverse& block, const ReadingArgs<float>& args, const Plan& plan, int64_t b) {
  if (plan.blocks_each == 1) return;
  float* const first = plan.workspace.data + b * plan.blocks_each * plan.workspace.block_floats;
  float* const mine = plan.workspace.of_block();
  const int64_t area = int64_t(block.width) * block.width;
  const auto add_up = [&](float* sum, int64_t count) {
    const int64_t offset = sum - mine;
    for (int64_t n = threadIdx.x; n < count; n += kThreads) {
      float total = 0;
      for (int64_t share = 0; share < plan.blocks_each; ++share)
        total += first[share * plan.workspace.block_floats + offset + n];
      sum[n] = total;
    }
  };
  add_up(block.sums.mean, int64_t(block.K) * block.columns);
  add_up(block.sums.solved, area);
  if (args.squared_gram) add_up(block.sums.target, area);
  if (threadIdx.x == 0) {
    double total = 0;
    for (int64_t share = 0; share < plan.blocks_each; ++share)
      total += *reinterpret_cast<double*>(first + share * plan.workspace.block_floats + (block.sums.ridge - mine));
    *reinterpret_cast<double*>(block.sums.ridge) = total;
  }
  __syncthreads();
}

// Back through the Gram matrix: R̄ += (Ḡ + Ḡᵀ) R with Ḡ = Ā, or Ḡ = Ā G + G Ā + Σ v (R z)ᵀ.
__device__ void gram_backward(Reverse& block, const ReadingArgs<float>& args, const ReadingGrads<float>& grads,
                              int64_t b) {
  const int K = block.K, C = block.C, width = block.width;
  const Sums& sums = block.sums;
  add_transpose(sums.solved, K, width);
  if (args.squared_gram) {
    product<kExact, 64, 64>(K, K, K, Side{sums.solved, width, 1}, Side{block.gram, width, 1}, block, false,
                            [&](int i, int j, const auto& values) {
                              float* const at = sums.target + int64_t(i) * width + j;
                              put_sum(at, at, 1, 1, values, K - j);
                            });
    add_transpose(sums.target, K, width);
  }
  const Side gram{args.squared_gram ? sums.target : sums.solved, width, 1};
  product<kExact, 64, 64>(K, C, K, gram, transposed(block.mean), block, false, [&](int i, int j, const auto& values) {
    put_sum(element(grads.to_mean, b, i, j), sums.mean + int64_t(i) * block.columns + j, 1, 1, values, C - j);
  });
  if (threadIdx.x == 0) grads.to_ridge[b] = static_cast<float>(*reinterpret_cast<double*>(sums.ridge));
}

// Bytes: queries and the cotangent of the values are read twice, everything else once while R fits on chip, 1.4 times
// the least at K = 32, C = 100. Where it does not, R is read for its Gram matrix, twice a tile and once for Ḡ R.
__global__ void __launch_bounds__(kThreads, 1)
    read_backward_kernel(FASTKM_IN_PLACE ReadingArgs<float> args, FASTKM_IN_PLACE ReadingGrads<float> grads, int64_t B,
                         FASTKM_IN_PLACE Plan plan) {
  Reverse& block = *reinterpret_cast<Reverse*>(dynamic_shared());
  if (threadIdx.x == 0) {
    Space space = space_of_block<Reverse>(plan.workspace);
    lay_out(block, space, args, plan);
    block.precision = args.precision;
  }
  __syncthreads();
  const int64_t area = int64_t(block.width) * block.width;
  for (int64_t item = blockIdx.x; item < B * plan.blocks_each; item += gridDim.x) {
    const int64_t b = item / plan.blocks_each, share = item % plan.blocks_each;
    choose_memory(block, plan.factors, args, b);
    if (plan.factor) {
      factor_memory(block, args);
      if (!block.positive)  // without a factor there is no gradient
        for (int64_t n = threadIdx.x; n < Square::root_floats(block.K); n += kThreads)
          block.square.roots[n] = __uint_as_float(0x7FC00000u);
      __syncthreads();
    }
    if (!plan.answer) continue;
    fill_zero(block.sums.mean, int64_t(block.K) * block.columns);
    fill_zero(block.sums.solved, area);
    fill_zero(block.sums.ridge, 2);
    if (args.squared_gram) fill_zero(block.sums.target, area);
    __syncthreads();
    for (int64_t first = share * kQueries; first < args.Q; first += plan.blocks_each * kQueries)
      tile_backward(block, args, grads, b, first, static_cast<int>(min(int64_t(kQueries), args.Q - first)));
    if (plan.blocks_each == 1 || last_to_arrive(plan.tickets + b, static_cast<unsigned>(plan.blocks_each), block)) {
      gather(block, args, plan, b);
      gram_backward(block, args, grads, b);
    }
    __syncthreads();
  }
}

const char* start(const Device& device, const ReadingArgs<float>& args, const ReadingGrads<float>& grads, int64_t B,
                  Plan plan, cuda::Context& context) {
  plan.workspace = measure<Reverse>(device, [&](Reverse& head, Space& space) { lay_out(head, space, args, plan); });
  // Blocks that share a memory leave their sums to the last of them, so none may go on to another item.
  const int64_t items = B * plan.blocks_each;
  const int64_t blocks =
      plan.blocks_each > 1 ? items : min(items, resident_blocks(device, read_backward_kernel, plan.workspace));
  if (plan.workspace.block_floats > 0)
    plan.workspace.data = context.allocate(context, blocks * plan.workspace.block_floats);
  return launch(read_backward_kernel, blocks, kThreads, plan.workspace.shared_bytes(), context.stream, args, grads, B,
                plan);
}

}  // namespace

const char* cuda::read_backward(const ReadingArgs<float>& args, const ReadingGrads<float>& grads, int64_t B,
                                Context& context) {
  if (B == 0) return nullptr;
  const Device device = current_device();
  const int64_t tiles = (args.Q + kQueries - 1) / kQueries;
  Plan plan{};
  plan.factor = true;
  plan.blocks_each = 1;
  if (args.K > kFusedRows) {
    plan.factors = allocate_factors(context, args, B);
    if (const char* error = start(device, args, grads, B, plan, context)) return error;
    plan.factor = false;
  }
  plan.answer = true;
  plan.blocks_each = max(int64_t(1), min(tiles, device.multiprocessors / B));
  if (plan.blocks_each > 1) {
    plan.tickets = reinterpret_cast<unsigned*>(context.allocate(context, B));
    if (const char* error = fill_zero_bytes(plan.tickets, B * static_cast<int64_t>(sizeof(unsigned)), context.stream))
      return error;
  }
  return start(device, args, grads, B, plan, context);
}

}  // namespace fastkm
