// filter_posterior on a GPU: one launch, from the first chunk of 16 steps to the last.
//
// A memory is a head, and heads are fewer than multiprocessors. So several thread blocks share a memory: each keeps U
// and some columns of R, computes for itself what does not depend on values, and reads and writes its own columns. With
// one tile of 64 columns, C ≤ 64, a memory has one thread block. No result depends on how many there are.
//
// Bytes: U, R, W, Q and Z are read once and every result is written once, the least possible, by one thread block a
// memory; each further one reads U, W and Q too. While U, the columns of R and a chunk fit on chip, K = C = 64 in 87
// KiB and K = 128 with 64 columns in 179 KiB, nothing goes to the workspace. Beyond, U or R is read and written once a
// chunk there.
//
// The equations are those of chunk.cuh.
#include "cuda/filtering/chunk.cuh"
#include "cuda/linalg/symmetric.cuh"

namespace fastkm {
namespace {

constexpr int kTile = 64;  // columns; thread blocks share a memory by whole tiles

struct Filter : FilterChunk {
  float* energies;  // ‖E_t‖², with forgetting divided by a_t² [tiles of this thread block, 16]
  int tiles;
  int64_t b;         // the memory; in shared memory, because registers are few
  bool reports;      // whether this thread block stores what does not depend on values
  double* evidence;  // of this memory
};

// How the work is spread over thread blocks.
struct Sharing {
  int64_t tiles;              // of a memory
  int64_t tiles_each;         // of a thread block, but for the last one of a memory
  int64_t blocks_per_memory;  // thread blocks
  double* evidence;           // of each tile, and that of the pivots [B, tiles + 1]
  unsigned* tickets;          // [B]
  Workspace workspace;
};

// The buffers of a thread block, most used first.
__host__ __device__ void lay_out(Filter& chunk, Arena& arena, const FilteringArgs<float>& args,
                                 const Sharing& sharing) {
  set_sizes(chunk, args, 0, min(args.posterior.C, sharing.tiles_each * kTile));
  const int64_t rows = kChunk * chunk.width, codes = kChunk * chunk.columns;
  chunk.inputs = arena.allocate(2 * rows);
  chunk.projected = arena.allocate(2 * rows);
  chunk.gain = arena.allocate(rows);
  chunk.residual = arena.allocate(2 * codes);
  chunk.energies = arena.allocate(sharing.tiles_each * kChunk);
  chunk.cov = arena.allocate(int64_t(chunk.width) * chunk.width);
  chunk.mean = arena.allocate(int64_t(chunk.K) * chunk.columns);
  chunk.plain = chunk.retains ? arena.allocate(2 * rows) : nullptr;
}

__device__ void load_memory(Filter& chunk, const FilteringArgs<float>& args) {
  const int K = chunk.K, width = chunk.width;
  const int64_t b = chunk.b;
  Operand mean = operand_of(args.posterior.mean, b);
  mean.data += chunk.column0 * mean.inner;
  load_rows(chunk.cov, K, K, width, width, operand_of(args.posterior.cov, b));
  load_rows(chunk.mean, K, chunk.own, K, chunk.columns, mean);
  __syncthreads();
  check_symmetry(chunk.cov, K, width, chunk);
}

// ‖E_t‖² of each tile, a warp a step.
__device__ void find_energies(Filter& chunk) {
  for (int n = threadIdx.x / 32; n < chunk.tiles * kChunk; n += kWarps) {
    const int tile = n / kChunk, t = n % kChunk, columns = min(kTile, chunk.own - tile * kTile);
    const float energy = squared_norm_by_warp(chunk.residual + int64_t(t) * chunk.columns + tile * kTile, columns);
    const float a = chunk.value_scale[t];
    if (threadIdx.x % 32 == 0) chunk.energies[n] = chunk.written[t] ? energy / (a * a) : 0;
  }
}

// The reads of a chunk to the caller's memory.
__device__ FASTKM_OUT_OF_LINE void store_reads(const Filter& chunk, const FilteringArgs<float>& args) {
  const int across = chunk.columns / 4;
  for (int n = threadIdx.x; n < chunk.count * across; n += kThreads) {
    const int t = n / across, column = n % across * 4;
    const float* const from = chunk.residual + int64_t(kChunk + t) * chunk.columns + column;
    float entries[4];
    load_columns(from, 1, entries, 4);
#pragma unroll
    for (int k = 0; k < 4; ++k) entries[k] /= chunk.value_scale[t];
    store_columns(element(args.read_values, chunk.b, chunk.first + t, chunk.column0 + column), entries,
                  chunk.own - column);
  }
}

// v and s of a chunk to the caller's memory.
__device__ void store_variances(const Filter& chunk, const FilteringArgs<float>& args) {
  const int t = threadIdx.x;
  if (t >= chunk.count) return;
  *element(args.variance, chunk.b, chunk.first + t) = chunk.variance[t] > 0 ? chunk.variance[t] : 0;
  *element(args.posterior.innovation_var, chunk.b, chunk.first + t) = chunk.pivots[t];
}

// The log evidence of each tile, and of the pivots. A thread adds to one sum, in the order of the steps.
__device__ void add_evidence(const Filter& chunk, int64_t tiles_of_memory) {
  constexpr float kTwoPi = 6.283185307179586f;
  const int64_t first = chunk.column0 / kTile;
  for (int tile = threadIdx.x; tile < chunk.tiles; tile += kThreads) {
    double sum = 0;
    for (int t = 0; t < kChunk; ++t) sum -= 0.5f * chunk.energies[tile * kChunk + t];
    chunk.evidence[first + tile] += sum;
  }
  if (!chunk.reports || threadIdx.x != kThreads - 1) return;
  double sum = 0;
  for (int t = 0; t < kChunk; ++t)
    if (chunk.written[t]) sum -= 0.5f * static_cast<float>(chunk.C) * logf(kTwoPi * chunk.pivots[t]);
  chunk.evidence[tiles_of_memory] += sum;
}

template <Cores kCores>
__device__ __forceinline__ void filter_memory(Filter& chunk, const FilteringArgs<float>& args, const Sharing& sharing) {
  for (int64_t first = 0, T = args.posterior.T; first < T;) {
    const int count = chunk_size(args, chunk.b, first);
    load_steps(chunk, args, chunk.b, first, count);
    project_steps<kAllRows>(chunk);
    factor_steps(chunk);
    find_gain(chunk);
    find_read_gain(chunk);
    find_errors<kCores, kAllRows>(chunk, args, chunk.b);
    find_energies(chunk);
    find_reads<kCores>(chunk);
    store_reads(chunk, args);
    if (chunk.reports) store_variances(chunk, args);
    add_evidence(chunk, sharing.tiles);
    advance_memory<kCores>(chunk);
    if (threadIdx.x == 0 && chunk.status == kGood) chunk.status = chunk.now;
    __syncthreads();
    first += count;
  }
}

__device__ void store_memory(const Filter& chunk, const PosteriorArgs<float>& args) {
  const int64_t b = chunk.b;
  Batch<float> mean = args.new_mean;
  mean.data += chunk.column0 * mean.stride[2];
  store_rows(mean, b, chunk.K, chunk.own, chunk.mean, chunk.columns);
  if (!chunk.reports) return;
  store_rows(args.new_cov, b, chunk.K, chunk.K, chunk.cov, chunk.width);
  if (threadIdx.x == 0) args.info[b] = chunk.status;
}

template <Cores kCores>
__global__ void __launch_bounds__(kThreads, 2)
    filter_kernel(FASTKM_IN_PLACE FilteringArgs<float> args, int64_t B, FASTKM_IN_PLACE Sharing sharing) {
  Filter& chunk = *reinterpret_cast<Filter*>(dynamic_shared());
  if (threadIdx.x == 0) {
    Arena arena = arena_behind<Filter>(sharing.workspace);
    lay_out(chunk, arena, args, sharing);
    chunk.precision = args.posterior.precision;
  }
  __syncthreads();
  for (int64_t task = blockIdx.x; task < B * sharing.blocks_per_memory; task += gridDim.x) {
    if (threadIdx.x == 0) {
      const int64_t share = task % sharing.blocks_per_memory;
      chunk.b = task / sharing.blocks_per_memory;
      chunk.reports = share == 0;
      chunk.evidence = sharing.evidence + chunk.b * (sharing.tiles + 1);
      const int64_t tile = share * sharing.tiles_each, tiles = min(sharing.tiles_each, sharing.tiles - tile);
      set_sizes(chunk, args, tile * kTile, min(args.posterior.C - tile * kTile, tiles * kTile));
      chunk.tiles = static_cast<int>(tiles);
    }
    __syncthreads();
    load_memory(chunk, args);
    filter_memory<kCores>(chunk, args, sharing);
    store_memory(chunk, args.posterior);
    const unsigned sharers = static_cast<unsigned>(sharing.blocks_per_memory);
    if (last_to_arrive(sharing.tickets + chunk.b, sharers, chunk) && threadIdx.x == 0) {
      double sum = 0;
      for (int64_t tile = 0; tile <= sharing.tiles; ++tile) sum += chunk.evidence[tile];
      args.posterior.log_evidence[chunk.b] = static_cast<float>(sum);
    }
    __syncthreads();
  }
}

template <Cores kCores>
const char* start(const FilteringArgs<float>& args, int64_t B, cuda::Context& context) {
  const Device device = current_device();
  Sharing sharing{};
  sharing.tiles = max(int64_t(1), (args.posterior.C + kTile - 1) / kTile);
  sharing.tiles_each = max(int64_t(1), sharing.tiles * B / device.multiprocessors);
  sharing.tiles_each = min(sharing.tiles_each, sharing.tiles);
  sharing.blocks_per_memory = (sharing.tiles + sharing.tiles_each - 1) / sharing.tiles_each;

  // The sums of the evidence and the tickets start at zero.
  const int64_t sums = B * (sharing.tiles + 1), floats = 2 * sums + B;
  sharing.evidence = reinterpret_cast<double*>(context.allocate(context, floats));
  sharing.tickets = reinterpret_cast<unsigned*>(sharing.evidence + sums);
  const int64_t bytes = floats * static_cast<int64_t>(sizeof(float));
  if (const char* error = fill_zero_bytes(sharing.evidence, bytes, context.stream)) return error;

  const auto layout = [&](Filter& head, Arena& arena) { lay_out(head, arena, args, sharing); };
  sharing.workspace = measure_workspace<Filter>(device, layout);
  const int64_t resident = resident_blocks(device, filter_kernel<kCores>, sharing.workspace);
  const int64_t blocks = min(B * sharing.blocks_per_memory, resident);
  if (sharing.workspace.block_floats > 0)
    sharing.workspace.data = context.allocate(context, blocks * sharing.workspace.block_floats);
  return launch(filter_kernel<kCores>, blocks, kThreads, sharing.workspace.shared_bytes(), context.stream, args, B,
                sharing);
}

}  // namespace

const char* cuda::filter_posterior(const FilteringArgs<float>& args, int64_t B, Context& context) {
  if (B == 0) return nullptr;
  return args.posterior.precision == kIeee ? start<kCudaCores>(args, B, context)
                                           : start<kTensorCores>(args, B, context);
}

}  // namespace fastkm
