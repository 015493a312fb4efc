// solve_addressing, read, and addressing in two steps on a GPU: one factor a memory, any number of queries.
//
// Up to K = 128 one launch does all: a block factors its memory on chip and answers tiles of queries with it; few
// memories with many queries are shared by several blocks, each with the factor for itself, which costs about as much
// as one tile. Beyond, factors are made by a launch of their own.
#include "cuda/reading/read.cuh"

namespace fastkm {
namespace {

struct Reader : Addressed {
  float *x, *y;  // [width, kQueries]
};

struct Plan {
  bool factor, answer;
  int64_t blocks_each;       // that share the queries of one memory
  Factors factors;           // of all memories, where they are made by another launch
  Batch<const float> given;  // the caller's factors, or null
  Batch<float> to_factor;    // for the caller, or null
  Workspace workspace;
};

// Where the buffers of a block are; most used first.
__host__ __device__ void lay_out(Reader& block, Space& space, const ReadingArgs<float>& args, const Plan& plan) {
  set_sizes(block, args);
  const int64_t tile = int64_t(block.width) * kLdQueries;
  if (plan.answer) block.x = space.take(tile);
  if (plan.factor && !plan.factors.squares) take_factor(block, space, args.squared_gram);
  if (plan.answer && (args.num_iters > 1 || args.squared_gram)) block.y = space.take(tile);
  take_mean(block, space);
}

// Queries [first, first + count): w₁ = A⁻¹ R z, w ← w − λ A⁻¹ w, ẑ = Rᵀ w.
//
// Bytes: queries are read once, weights and values written once, the least possible; R is read twice a tile unless it
// stays on chip, from the second tile on from the cache.
template <Rounding kRounding>
__device__ void answer(Reader& block, const ReadingArgs<float>& args, int64_t b, int64_t first, int count) {
  const int K = block.K, columns = round_up(count, 4);
  float* x = block.x;
  float* y = block.y;
  project<kRounding>(block, args, b, first, count, x);
  if (args.squared_gram) {
    multiply_gram(block, x, y, count);
    float* const target = y;
    y = x, x = target;
  }
  solve(block.square, x, kLdQueries, columns);
  for (int64_t n = 1; n < args.num_iters; ++n) {
    copy(y, x, int64_t(K) * kLdQueries);
    solve(block.square, y, kLdQueries, columns);
    for (int i = threadIdx.x; i < K * kLdQueries; i += kThreads) x[i] -= block.ridge * y[i];
    __syncthreads();
  }
  for (int n = threadIdx.x; n < count * K; n += kThreads)
    *element(args.weights, b, first + n / K, n % K) = x[n % K * kLdQueries + n / K];
  if (!args.values.data) return;
  product<kRounding, 64, 64>(
      count, block.C, K, Side{x, 1, kLdQueries}, transposed(block.mean), block, false,
      [&](int q, int c, const auto& sums) { put(element(args.values, b, first + q, c), sums, block.C - c); });
}

// Bytes of the factor phase: R is read once for its Gram matrix, up to K = 128, the least possible. Where it then stays
// on chip, up to K = 64 at C = 200, a whole call reads and writes everything once.
template <Rounding kRounding>
__global__ void __launch_bounds__(kThreads, 1) read_kernel(ReadingArgs<float> args, int64_t B, Plan plan) {
  Reader& block = *reinterpret_cast<Reader*>(dynamic_shared());
  if (threadIdx.x == 0) {
    Space space = space_of_block<Reader>(plan.workspace);
    lay_out(block, space, args, plan);
    block.precision = args.precision;
  }
  __syncthreads();
  for (int64_t item = blockIdx.x; item < B * plan.blocks_each; item += gridDim.x) {
    const int64_t b = item / plan.blocks_each, share = item % plan.blocks_each;
    choose_memory(block, plan.factors, args, b);
    if (plan.factor) {
      if (plan.given.data)
        take_given(block, side_of(plan.given, b));
      else
        factor_memory(block, args);
      if (share == 0 && threadIdx.x == 0 && args.info) args.info[b] = block.positive ? kGood : kNotPositiveDefinite;
      if (plan.to_factor.data)
        for (int64_t n = threadIdx.x; n < args.K * args.K; n += kThreads) {
          const int64_t i = n / args.K, j = n % args.K;
          *element(plan.to_factor, b, i, j) = j <= i ? block.square.data[i * block.width + j] : 0;
        }
    }
    if (plan.answer)
      for (int64_t first = share * kQueries; first < args.Q; first += plan.blocks_each * kQueries)
        answer<kRounding>(block, args, b, first, static_cast<int>(min(int64_t(kQueries), args.Q - first)));
    __syncthreads();
  }
}

template <Rounding kRounding>
const char* start(const Device& device, const ReadingArgs<float>& args, int64_t B, Plan plan, cuda::Context& context) {
  plan.workspace = measure<Reader>(device, [&](Reader& head, Space& space) { lay_out(head, space, args, plan); });
  const auto kernel = read_kernel<kRounding>;
  const int64_t resident = resident_blocks(device, kernel, plan.workspace), tiles = (args.Q + kQueries - 1) / kQueries;
  plan.blocks_each = plan.answer ? max(int64_t(1), min(tiles, resident / B)) : 1;
  const int64_t blocks = min(B * plan.blocks_each, resident);
  if (plan.workspace.block_floats > 0)
    plan.workspace.data = context.allocate(context, blocks * plan.workspace.block_floats);
  return launch(kernel, blocks, kThreads, plan.workspace.shared_bytes(), context.stream, args, B, plan);
}

const char* run(const ReadingArgs<float>& args, const Batch<const float>& given, int64_t B, cuda::Context& context) {
  if (B == 0) return nullptr;
  const Device device = current_device();
  Plan plan{};
  plan.given = given;
  plan.factor = true;
  if (args.K > kFusedRows) {
    plan.factors = allocate_factors(context, args, B);
    if (const char* error = start<kExact>(device, args, B, plan, context)) return error;
    plan.factor = false;
  }
  plan.answer = true;
  return args.precision == kIeee ? start<kExact>(device, args, B, plan, context)
                                 : start<kTensor>(device, args, B, plan, context);
}

}  // namespace

const char* cuda::read(const ReadingArgs<float>& args, int64_t B, Context& context) {
  return run(args, {}, B, context);
}

const char* cuda::solve_factored(const ReadingArgs<float>& args, const Batch<const float>& factor, int64_t B,
                                 Context& context) {
  return run(args, factor, B, context);
}

const char* cuda::factor_addressing(const ReadingArgs<float>& args, const Batch<float>& factor, int64_t B,
                                    Context& context) {
  if (B == 0) return nullptr;
  Plan plan{};
  plan.factor = true;
  plan.to_factor = factor;
  return start<kExact>(current_device(), args, B, plan, context);
}

}  // namespace fastkm
