// read_factored and solve_factored on a GPU: reads with what factor_addressing has computed.
//
// For a tile of 64 queries z, with the pseudo-inverse R⁺ that the caller brings:
//   (1)  w₁ = z R⁺      wᵢ₊₁ = wᵢ − λ A⁻¹ wᵢ      ẑ = Rᵀ wₙ
//
// One launch. Bytes: queries are read once and weights and values written once, the least possible; R⁺ and R are read
// once a tile, from the second tile on from the cache. Iterations read the caller's factor once a thread block.
#include "cuda/reading/addressing.cuh"

namespace fastkm {
namespace {

struct FactoredReader : AddressedMemory {
  float *x, *y;  // [width, kQueries]; y only for iterations
};

struct Plan {
  int64_t blocks_per_memory;  // thread blocks that share the queries of one memory
  AddressingFactors<const float> factors;
  Workspace workspace;
};

// The buffers of a thread block, most used first.
__host__ __device__ void lay_out(FactoredReader& reader, Arena& arena, const ReadingArgs<float>& args) {
  set_sizes(reader, args);
  const int64_t tile = int64_t(reader.width) * kLdQueries;
  reader.x = arena.allocate(tile);
  if (args.num_iters > 1) {
    allocate_factor(reader, arena, false);
    reader.y = arena.allocate(tile);
  }
  allocate_mean(reader, arena);
}

// (1) for queries [first, first + count).
template <Cores kCores>
__device__ void answer(FactoredReader& reader, const ReadingArgs<float>& args, const Operand& pseudoinverse, int64_t b,
                       int64_t first, int count) {
  Codes queries = codes_of(args.queries, args.queries_type, b);
  queries.skip_rows(first);
  product<kCores, 64, 64>(StoreRows{reader.x, kLdQueries, kQueries}, {reader.K, count, reader.C},
                          transposed(pseudoinverse), queries, reader);
  iterate(reader.x, reader.y, reader, args.num_iters, round_up(count, 4));
  store_answers<kCores>(reader.x, reader, args, b, first, count);
}

template <Cores kCores>
__global__ void __launch_bounds__(kThreads, 1) read_factored_kernel(ReadingArgs<float> args, int64_t B, Plan plan) {
  FactoredReader& reader = *reinterpret_cast<FactoredReader*>(dynamic_shared());
  if (threadIdx.x == 0) {
    Arena arena = arena_behind<FactoredReader>(plan.workspace);
    lay_out(reader, arena, args);
    reader.precision = args.precision;
  }
  __syncthreads();
  for (int64_t task = blockIdx.x; task < B * plan.blocks_per_memory; task += gridDim.x) {
    const int64_t b = task / plan.blocks_per_memory, share = task % plan.blocks_per_memory;
    select_memory(reader, {}, args, b);
    if (args.num_iters > 1) load_factor(reader, operand_of(plan.factors.lower, b));
    if (share == 0 && threadIdx.x == 0) args.info[b] = kGood;
    for (int64_t first = share * kQueries; first < args.Q; first += plan.blocks_per_memory * kQueries)
      answer<kCores>(reader, args, operand_of(plan.factors.pseudoinverse, b), b, first,
                     static_cast<int>(min(int64_t(kQueries), args.Q - first)));
    __syncthreads();
  }
}

template <Cores kCores>
const char* start(const ReadingArgs<float>& args, const AddressingFactors<const float>& factors, int64_t B,
                  cuda::Context& context) {
  const Device device = current_device();
  Plan plan{};
  plan.factors = factors;
  plan.workspace = measure_workspace<FactoredReader>(
      device, [&](FactoredReader& head, Arena& arena) { lay_out(head, arena, args); });
  const auto kernel = read_factored_kernel<kCores>;
  const int64_t resident = resident_blocks(device, kernel, plan.workspace), tiles = (args.Q + kQueries - 1) / kQueries;
  plan.blocks_per_memory = max(int64_t(1), min(tiles, resident / B));
  const int64_t blocks = min(B * plan.blocks_per_memory, resident);
  if (plan.workspace.block_floats > 0)
    plan.workspace.data = context.allocate(context, blocks * plan.workspace.block_floats);
  return launch(kernel, blocks, kThreads, plan.workspace.shared_bytes(), context.stream, args, B, plan);
}

}  // namespace

const char* cuda::read_factored(const ReadingArgs<float>& args, const AddressingFactors<const float>& factors,
                                int64_t B, Context& context) {
  if (B == 0) return nullptr;
  return args.precision == kIeee ? start<kCudaCores>(args, factors, B, context)
                                 : start<kTensorCores>(args, factors, B, context);
}

}  // namespace fastkm
