// Backward of solve_addressing and read on a GPU: one factor serves the solves of both directions. It is made here, or
// the caller brings it.
//
// A bar marks a cotangent; columns are queries. Forward, for a tile of queries z:
//   (1)  w₁ = A⁻¹ x with x = R z, or G R z      yᵢ = A⁻¹ wᵢ      wᵢ₊₁ = wᵢ − λ yᵢ      ẑ = Rᵀ wₙ
// Backward:
//   (2)  w̄ₙ += R ẑ̄      R̄ += wₙ ẑ̄ᵀ
//   (3)  u = λ A⁻¹ w̄      Ā += u yᵀ      w̄ ← w̄ − u      λ̄ −= w̄ · y, with the new w̄: this includes the trace of u yᵀ
//   (4)  x̄ = A⁻¹ w̄₁      Ā −= x̄ w₁ᵀ      λ̄ −= x̄ · w₁
//   (5)  R̄ += p̄ zᵀ      z̄ = Rᵀ p̄, where p̄ is the cotangent of R z: x̄, or G x̄ and Ḡ += x̄ (R z)ᵀ
// and once a memory
//   (6)  R̄ += (Ḡ + Ḡᵀ) R with Ḡ = Ā, or Ḡ += Ā G + G Ā
//
// Thread blocks that share a memory each sum over their own queries. The last one to finish adds the sums in order.
//
// Bytes: queries and ẑ̄ are read twice and everything else once while R fits on chip, 1.4 times the least at K = 32,
// C = 100. Beyond, R is read for its Gram matrix, twice a tile, and once for (6).
#include "cuda/linalg/reduce.cuh"
#include "cuda/linalg/symmetric.cuh"
#include "cuda/reading/addressing.cuh"

namespace fastkm {
namespace {

// Sums over the queries of one thread block.
struct Sums {
  float* mean;   // R̄ [K, columns], without (6)
  float* a;      // Ā [width, width]
  float* gram;   // Ḡ [width, width], only for the squared-Gram solve
  float* ridge;  // λ̄, a double
};

struct ReadBackward : AddressedMemory {
  Sums sums;
  float* solutions;                                 // w₁, y₁, y₂, … [num_iters, width, kQueries]
  float *weights, *cotangent, *solved, *projected;  // wₙ; w̄, then x̄; u, then G x̄; R z [width, kQueries]
};

// How the work is spread over thread blocks and launches.
struct Plan {
  bool factor, answer;
  int64_t blocks_per_memory;
  Factors factors;                       // of all memories, where another launch makes them
  AddressingFactors<const float> given;  // the caller's, or null
  unsigned* tickets;
  Workspace workspace;
};

// Queries [first, first + count) of memory b.
struct QueryTile {
  int64_t b, first;
  int count;
};

__host__ __device__ int64_t tile_floats(const AddressedMemory& memory) { return int64_t(memory.width) * kLdQueries; }

// The buffers of a thread block, most used first. Sums that another thread block adds are in the workspace.
__host__ __device__ void lay_out(ReadBackward& reader, Arena& arena, const ReadingArgs<float>& args, const Plan& plan) {
  set_sizes(reader, args);
  const int64_t square = int64_t(reader.width) * reader.width, tile = tile_floats(reader);
  const auto allocate_sum = [&](int64_t count) {
    return plan.blocks_per_memory > 1 ? arena.allocate_global(count) : arena.allocate(count);
  };
  if (plan.answer) {
    reader.sums.ridge = allocate_sum(4);
    reader.cotangent = arena.allocate(tile);
    reader.solved = arena.allocate(tile);
    reader.solutions = arena.allocate(args.num_iters * tile);
  }
  if (plan.factor && !plan.factors.data) allocate_factor(reader, arena, args.squared_gram);
  if (plan.answer) {
    reader.weights = arena.allocate(tile);
    if (args.squared_gram) reader.projected = arena.allocate(tile);
    reader.sums.a = allocate_sum(square);
    if (args.squared_gram) reader.sums.gram = allocate_sum(square);
    reader.sums.mean = allocate_sum(int64_t(reader.K) * reader.columns);
  }
  allocate_mean(reader, arena);
}

// Where a sum over queries goes: `to` has rows `ld` apart and `columns` columns.
template <Cores kCores, class Other>
__device__ void add_over_queries(const AddRows& to, ReadBackward& reader, const float* x, const Other& other,
                                 int count) {
  product<kCores, 64, 64>(to, {reader.K, to.columns, count}, Operand{x, kLdQueries, 1}, other, reader);
}

// λ̄ −= Σ of the products of the entries of two tiles.
__device__ void subtract_from_ridge(ReadBackward& reader, const float* x, const float* y, int count) {
  double sum = 0;
  for (int n = threadIdx.x; n < reader.K * count; n += kThreads) {
    const int at = n / count * kLdQueries + n % count;
    sum += x[at] * y[at];
  }
  sum = block_sum(sum, reader);
  if (threadIdx.x == 0) *reinterpret_cast<double*>(reader.sums.ridge) -= sum;
}

// (1)
__device__ __forceinline__ void read_again(ReadBackward& reader, const ReadingArgs<float>& args,
                                           const QueryTile& tile) {
  const int columns = round_up(tile.count, 4);
  const int64_t used = int64_t(reader.K) * kLdQueries;
  float* const projected = args.squared_gram ? reader.projected : reader.solutions;
  project_queries<kAnyCores>(projected, reader, args, tile.b, tile.first, tile.count);
  if (args.squared_gram) product_gram(reader.solutions, reader, projected, tile.count);
  solve_cholesky(reader.solutions, kLdQueries, columns, reader.factor);
  copy(reader.weights, reader.solutions, used);
  for (int64_t n = 1; n < args.num_iters; ++n) {
    float* const y = reader.solutions + n * tile_floats(reader);
    copy(y, reader.weights, used);
    solve_cholesky(y, kLdQueries, columns, reader.factor);
    for (int64_t i = threadIdx.x; i < used; i += kThreads) reader.weights[i] -= reader.ridge * y[i];
    __syncthreads();
  }
}

// (2)
__device__ __forceinline__ void decoding_backward(ReadBackward& reader, const ReadingGrads<float>& grads,
                                                  const QueryTile& tile) {
  const int K = reader.K, C = reader.C, count = tile.count;
  float* const cotangent = reader.cotangent;
  for (int n = threadIdx.x; n < K * count; n += kThreads) {
    const int q = n / K, k = n % K;
    cotangent[k * kLdQueries + q] = grads.weights.data ? *element(grads.weights, tile.b, tile.first + q, k) : 0;
  }
  __syncthreads();
  if (!grads.values.data) return;
  const Operand values{element(grads.values, tile.b, tile.first), grads.values.stride[1], grads.values.stride[2]};
  product<kAnyCores, 64, 64>(AddRows{cotangent, kLdQueries, kQueries, 1}, {K, count, C}, reader.mean, values, reader);
  add_over_queries<kAnyCores>({reader.sums.mean, reader.columns, C, 1}, reader, reader.weights, transposed(values),
                              count);
}

// (3)
__device__ __forceinline__ void iterations_backward(ReadBackward& reader, int64_t num_iters, int count) {
  const int columns = round_up(count, 4);
  const int64_t used = int64_t(reader.K) * kLdQueries;
  float *const cotangent = reader.cotangent, *const solved = reader.solved;
  for (int64_t n = num_iters - 1; n > 0; --n) {
    const float* const y = reader.solutions + n * tile_floats(reader);
    copy(solved, cotangent, used);
    solve_cholesky(solved, kLdQueries, columns, reader.factor);
    for (int64_t i = threadIdx.x; i < used; i += kThreads) {
      solved[i] *= reader.ridge;
      cotangent[i] -= solved[i];
    }
    __syncthreads();
    add_over_queries<kCudaCores>({reader.sums.a, reader.width, reader.K, 1}, reader, solved, Operand{y, kLdQueries, 1},
                                 count);
    subtract_from_ridge(reader, cotangent, y, count);
  }
}

// (4) and (5)
__device__ __forceinline__ void addressing_backward(ReadBackward& reader, const ReadingArgs<float>& args,
                                                    const ReadingGrads<float>& grads, const QueryTile& tile) {
  const int K = reader.K, C = reader.C, width = reader.width, count = tile.count;
  float *const cotangent = reader.cotangent, *const solved = reader.solved;
  solve_cholesky(cotangent, kLdQueries, round_up(count, 4), reader.factor);
  add_over_queries<kCudaCores>({reader.sums.a, width, K, -1}, reader, cotangent,
                               Operand{reader.solutions, kLdQueries, 1}, count);
  subtract_from_ridge(reader, cotangent, reader.solutions, count);
  if (args.squared_gram) {
    add_over_queries<kCudaCores>({reader.sums.gram, width, K, 1}, reader, cotangent,
                                 Operand{reader.projected, kLdQueries, 1}, count);
    product_gram(solved, reader, cotangent, count);
  }
  const float* const grad_projected = args.squared_gram ? solved : cotangent;
  Codes queries = codes_of(args.queries, args.queries_type, tile.b);
  queries.skip_rows(tile.first);
  add_over_queries<kAnyCores>({reader.sums.mean, reader.columns, C, 1}, reader, grad_projected, transposed(queries),
                              count);
  const auto store_grad_queries = [&](int q, int c, const auto& sums) {
    store_columns(element(grads.to_queries, tile.b, tile.first + q, c), sums, C - c);
  };
  product<kAnyCores, 64, 64>(store_grad_queries, {count, C, K}, Operand{grad_projected, 1, kLdQueries},
                             transposed(reader.mean), reader);
}

// Add the sums of all thread blocks that share the memory, in their order, into those of this one.
__device__ void add_shares(ReadBackward& reader, const ReadingArgs<float>& args, const Plan& plan, int64_t b) {
  if (plan.blocks_per_memory == 1) return;
  float* const first = plan.workspace.data + b * plan.blocks_per_memory * plan.workspace.block_floats;
  float* const mine = plan.workspace.of_block();
  const int64_t square = int64_t(reader.width) * reader.width;
  const auto add = [&](float* sum, int64_t count) {
    const int64_t offset = sum - mine;
    for (int64_t n = threadIdx.x; n < count; n += kThreads) {
      float total = 0;
      for (int64_t share = 0; share < plan.blocks_per_memory; ++share)
        total += first[share * plan.workspace.block_floats + offset + n];
      sum[n] = total;
    }
  };
  add(reader.sums.mean, int64_t(reader.K) * reader.columns);
  add(reader.sums.a, square);
  if (args.squared_gram) add(reader.sums.gram, square);
  if (threadIdx.x == 0) {
    double total = 0;
    for (int64_t share = 0; share < plan.blocks_per_memory; ++share)
      total += *reinterpret_cast<double*>(first + share * plan.workspace.block_floats + (reader.sums.ridge - mine));
    *reinterpret_cast<double*>(reader.sums.ridge) = total;
  }
  __syncthreads();
}

// (6)
__device__ void gram_backward(ReadBackward& reader, const ReadingArgs<float>& args, const ReadingGrads<float>& grads,
                              int64_t b) {
  const int K = reader.K, C = reader.C, width = reader.width;
  const Sums& sums = reader.sums;
  add_transpose(sums.a, K, width);
  if (args.squared_gram) {
    product<kCudaCores, 64, 64>(AddRows{sums.gram, width, K, 1}, {K, K, K}, Operand{sums.a, width, 1},
                                Operand{reader.gram, width, 1}, reader);
    add_transpose(sums.gram, K, width);
  }
  const Operand gram{args.squared_gram ? sums.gram : sums.a, width, 1};
  const auto store_grad_mean = [&](int i, int j, const auto& values) {
    store_sum(element(grads.to_mean, b, i, j), sums.mean + int64_t(i) * reader.columns + j, 1, 1, values, C - j);
  };
  product<kCudaCores, 64, 64>(store_grad_mean, {K, C, K}, gram, transposed(reader.mean), reader);
  if (threadIdx.x == 0) grads.to_ridge[b] = static_cast<float>(*reinterpret_cast<double*>(sums.ridge));
}

// Make the factor of memory b, or load the caller's. A memory without a factor has no gradient.
__device__ void factor_phase(ReadBackward& reader, const ReadingArgs<float>& args, const Plan& plan, int64_t b) {
  if (plan.given.lower.data) {
    load_factor(reader, operand_of(plan.given.lower, b));
    if (args.squared_gram)
      load_rows(reader.gram, reader.K, reader.K, reader.width, reader.width, operand_of(plan.given.gram, b));
  } else {
    factor_memory(reader, args);
    if (!reader.positive) poison_factor(reader.factor);
  }
  __syncthreads();
}

__device__ void clear_sums(ReadBackward& reader, bool squared_gram) {
  const int64_t square = int64_t(reader.width) * reader.width;
  fill_zero(reader.sums.mean, int64_t(reader.K) * reader.columns);
  fill_zero(reader.sums.a, square);
  fill_zero(reader.sums.ridge, 2);
  if (squared_gram) fill_zero(reader.sums.gram, square);
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads, 1)
    read_backward_kernel(FASTKM_IN_PLACE ReadingArgs<float> args, FASTKM_IN_PLACE ReadingGrads<float> grads, int64_t B,
                         FASTKM_IN_PLACE Plan plan) {
  ReadBackward& reader = *reinterpret_cast<ReadBackward*>(dynamic_shared());
  if (threadIdx.x == 0) {
    Arena arena = arena_behind<ReadBackward>(plan.workspace);
    lay_out(reader, arena, args, plan);
    reader.precision = args.precision;
  }
  __syncthreads();
  for (int64_t task = blockIdx.x; task < B * plan.blocks_per_memory; task += gridDim.x) {
    const int64_t b = task / plan.blocks_per_memory, share = task % plan.blocks_per_memory;
    select_memory(reader, plan.factors, args, b);
    if (plan.factor) factor_phase(reader, args, plan, b);
    if (!plan.answer) continue;
    clear_sums(reader, args.squared_gram);
    for (int64_t first = share * kQueries; first < args.Q; first += plan.blocks_per_memory * kQueries) {
      const QueryTile tile{b, first, static_cast<int>(min(int64_t(kQueries), args.Q - first))};
      read_again(reader, args, tile);
      decoding_backward(reader, grads, tile);
      iterations_backward(reader, args.num_iters, tile.count);
      addressing_backward(reader, args, grads, tile);
    }
    const auto sharers = static_cast<unsigned>(plan.blocks_per_memory);
    if (plan.blocks_per_memory == 1 || last_to_arrive(plan.tickets + b, sharers, reader)) {
      add_shares(reader, args, plan, b);
      gram_backward(reader, args, grads, b);
    }
    __syncthreads();
  }
}

const char* start(const Device& device, const ReadingArgs<float>& args, const ReadingGrads<float>& grads, int64_t B,
                  Plan plan, cuda::Context& context) {
  const auto layout = [&](ReadBackward& head, Arena& arena) { lay_out(head, arena, args, plan); };
  plan.workspace = measure_workspace<ReadBackward>(device, layout);
  // A thread block that shares a memory leaves its sums to the last one, so it may not go on to another task.
  const int64_t tasks = B * plan.blocks_per_memory;
  const int64_t blocks =
      plan.blocks_per_memory > 1 ? tasks : min(tasks, resident_blocks(device, read_backward_kernel, plan.workspace));
  if (plan.workspace.block_floats > 0)
    plan.workspace.data = context.allocate(context, blocks * plan.workspace.block_floats);
  return launch(read_backward_kernel, blocks, kThreads, plan.workspace.shared_bytes(), context.stream, args, grads, B,
                plan);
}

const char* run(const ReadingArgs<float>& args, const AddressingFactors<const float>& given,
                const ReadingGrads<float>& grads, int64_t B, cuda::Context& context) {
  if (B == 0) return nullptr;
  const Device device = current_device();
  const int64_t tiles = (args.Q + kQueries - 1) / kQueries;
  Plan plan{};
  plan.given = given;
  plan.factor = true;
  plan.blocks_per_memory = 1;
  if (args.K > kFusedRows) {
    plan.factors = allocate_factors(context, args, B);
    if (const char* error = start(device, args, grads, B, plan, context)) return error;
    plan.factor = false;
  }
  plan.answer = true;
  plan.blocks_per_memory = max(int64_t(1), min(tiles, device.multiprocessors / B));
  if (plan.blocks_per_memory > 1) {
    plan.tickets = reinterpret_cast<unsigned*>(context.allocate(context, B));
    if (const char* error = fill_zero_bytes(plan.tickets, B * static_cast<int64_t>(sizeof(unsigned)), context.stream))
      return error;
  }
  return start(device, args, grads, B, plan, context);
}

}  // namespace

const char* cuda::read_backward(const ReadingArgs<float>& args, const ReadingGrads<float>& grads, int64_t B,
                                Context& context) {
  return run(args, {}, grads, B, context);
}

const char* cuda::read_factored_backward(const ReadingArgs<float>& args, const AddressingFactors<const float>& factors,
                                         const ReadingGrads<float>& grads, int64_t B, Context& context) {
  return run(args, factors, grads, B, context);
}

}  // namespace fastkm
