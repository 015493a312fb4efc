// solve_addressing, read and factor_addressing on a GPU.
//
// For a tile of 64 queries z, with A = G + λI or G² + λI and G = R Rᵀ:
//   (1)  w₁ = A⁻¹ R z, or A⁻¹ G R z      wᵢ₊₁ = wᵢ − λ A⁻¹ wᵢ      ẑ = Rᵀ wₙ
// factor_addressing stores A's factor, and w₁ of all unit codes, which are the rows of Rᵀ A⁻¹ or Rᵀ G A⁻¹.
//
// Up to K = 128 one launch does all: a thread block factors its memory on chip and answers tiles of queries with it.
// Few memories with many queries are shared by several thread blocks; each makes the factor for itself, which costs
// about as much as one tile. Beyond, a launch of its own makes the factors.
//
// Bytes: queries are read once and weights and values written once, the least possible. The factor phase reads R once
// up to K = 128. Where R then stays on chip, up to K = 64 at C = 200, a whole call reads and writes everything once;
// beyond, R is read twice a tile, from the second tile on from the cache.
#include "cuda/reading/addressing.cuh"

namespace fastkm {
namespace {

struct Reader : AddressedMemory {
  float *x, *y;  // [width, kQueries]
};

// How the work is spread over thread blocks and launches.
struct Plan {
  bool factor, answer;          // the phases of this launch
  int64_t blocks_per_memory;    // thread blocks that share the queries of one memory
  Factors factors;              // of all memories, where another launch makes them
  bool unit_codes;              // these are the queries
  Batch<float> lower, to_gram;  // for the caller, or null
  Workspace workspace;
};

// The buffers of a thread block, most used first.
__host__ __device__ void lay_out(Reader& reader, Arena& arena, const ReadingArgs<float>& args, const Plan& plan) {
  set_sizes(reader, args);
  const int64_t tile = int64_t(reader.width) * kLdQueries;
  if (plan.answer) reader.x = arena.allocate(tile);
  if (plan.factor && !plan.factors.data) allocate_factor(reader, arena, args.squared_gram);
  if (plan.answer && (args.num_iters > 1 || args.squared_gram)) reader.y = arena.allocate(tile);
  allocate_mean(reader, arena);
}

// x = R z for unit codes [first, first + count): columns of R.
__device__ void load_columns_of_mean(float* x, const Reader& reader, int64_t first, int count) {
  const int columns = round_up(count, 4);
  for (int n = threadIdx.x; n < reader.K * columns; n += kThreads) {
    const int k = n / columns, q = n % columns;
    x[k * kLdQueries + q] = q < count ? reader.mean.load_one(k, first + q) : 0;
  }
  __syncthreads();
}

// (1) for queries [first, first + count).
template <Cores kCores>
__device__ void answer(Reader& reader, const ReadingArgs<float>& args, bool unit_codes, int64_t b, int64_t first,
                       int count) {
  const int columns = round_up(count, 4);
  float* x = reader.x;
  float* y = reader.y;
  if (unit_codes)
    load_columns_of_mean(x, reader, first, count);
  else
    project_queries<kCores>(x, reader, args, b, first, count);
  if (args.squared_gram) {
    product_gram(y, reader, x, count);
    float* const target = y;
    y = x;
    x = target;
  }
  solve_cholesky(x, kLdQueries, columns, reader.factor);
  iterate(x, y, reader, args.num_iters, columns);
  store_answers<kCores>(x, reader, args, b, first, count);
}

// Make the factor of memory b, report its status, and store it where the caller wants it.
__device__ void factor_phase(Reader& reader, const ReadingArgs<float>& args, const Plan& plan, int64_t b,
                             int64_t share) {
  factor_memory(reader, args);
  if (share > 0) return;
  if (threadIdx.x == 0) args.info[b] = reader.positive ? kGood : kNotPositiveDefinite;
  const int64_t K = args.K;
  for (int64_t n = threadIdx.x; plan.lower.data && n < K * K; n += kThreads)
    *element(plan.lower, b, n / K, n % K) = n % K <= n / K ? reader.factor.data[n / K * reader.width + n % K] : 0;
  for (int64_t n = threadIdx.x; plan.to_gram.data && n < K * K; n += kThreads)
    *element(plan.to_gram, b, n / K, n % K) = reader.gram[n / K * reader.width + n % K];
}

template <Cores kCores>
__global__ void __launch_bounds__(kThreads, 1) read_kernel(ReadingArgs<float> args, int64_t B, Plan plan) {
  Reader& reader = *reinterpret_cast<Reader*>(dynamic_shared());
  if (threadIdx.x == 0) {
    Arena arena = arena_behind<Reader>(plan.workspace);
    lay_out(reader, arena, args, plan);
    reader.precision = args.precision;
  }
  __syncthreads();
  for (int64_t task = blockIdx.x; task < B * plan.blocks_per_memory; task += gridDim.x) {
    const int64_t b = task / plan.blocks_per_memory, share = task % plan.blocks_per_memory;
    select_memory(reader, plan.factors, args, b);
    if (plan.factor) factor_phase(reader, args, plan, b, share);
    if (plan.answer)
      for (int64_t first = share * kQueries; first < args.Q; first += plan.blocks_per_memory * kQueries)
        answer<kCores>(reader, args, plan.unit_codes, b, first,
                       static_cast<int>(min(int64_t(kQueries), args.Q - first)));
    __syncthreads();
  }
}

template <Cores kCores>
const char* start(const Device& device, const ReadingArgs<float>& args, int64_t B, Plan plan, cuda::Context& context) {
  const auto layout = [&](Reader& head, Arena& arena) { lay_out(head, arena, args, plan); };
  plan.workspace = measure_workspace<Reader>(device, layout);
  const auto kernel = read_kernel<kCores>;
  const int64_t resident = resident_blocks(device, kernel, plan.workspace), tiles = (args.Q + kQueries - 1) / kQueries;
  plan.blocks_per_memory = plan.answer ? max(int64_t(1), min(tiles, resident / B)) : 1;
  const int64_t blocks = min(B * plan.blocks_per_memory, resident);
  if (plan.workspace.block_floats > 0)
    plan.workspace.data = context.allocate(context, blocks * plan.workspace.block_floats);
  return launch(kernel, blocks, kThreads, plan.workspace.shared_bytes(), context.stream, args, B, plan);
}

const char* run(const ReadingArgs<float>& args, int64_t B, Plan plan, cuda::Context& context) {
  if (B == 0) return nullptr;
  const Device device = current_device();
  plan.factor = true;
  if (args.K > kFusedRows) {
    plan.factors = allocate_factors(context, args, B);
    if (const char* error = start<kCudaCores>(device, args, B, plan, context)) return error;
    plan.factor = false;
  }
  plan.answer = true;
  return args.precision == kIeee ? start<kCudaCores>(device, args, B, plan, context)
                                 : start<kTensorCores>(device, args, B, plan, context);
}

}  // namespace

const char* cuda::read(const ReadingArgs<float>& args, int64_t B, Context& context) {
  return run(args, B, Plan{}, context);
}

const char* cuda::factor_addressing(const ReadingArgs<float>& args, const AddressingFactors<float>& factors, int64_t B,
                                    Context& context) {
  Plan plan{};
  plan.unit_codes = true;
  plan.lower = factors.lower;
  plan.to_gram = factors.gram;
  ReadingArgs<float> unit_codes = args;
  unit_codes.weights = factors.pseudoinverse;
  return run(unit_codes, B, plan, context);
}

}  // namespace fastkm
