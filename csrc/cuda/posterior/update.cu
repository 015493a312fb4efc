// update_posterior on a GPU: a factor phase that does not depend on C, and an apply phase that streams tiles of C.
//
// Factor, chunk of 16 patterns by chunk:   V = W U   S = V Wᵀ + diag(σ²) = L Lᵀ   G = L⁻¹ V   U ← U − Gᵀ G
// Apply, on a tile of columns of R that stays on chip through all chunks:   E = L⁻¹ (Z − W R)   R ← R + Gᵀ E
//
// One launch does both up to K = 128; where memories alone do not fill the chip, several blocks share one, each with
// the factor phase for itself and some of the tiles. Beyond, the factor phase is a launch of its own.
#include "cuda/linalg/cholesky.cuh"
#include "cuda/linalg/product.cuh"
#include "cuda/linalg/reduce.cuh"
#include "cuda/linalg/symmetric.cuh"
#include "cuda/posterior/chunk.cuh"

namespace fastkm {
namespace {

constexpr int kLdWeights = kChunk + kStagePadding;
constexpr int kFusedRows = 128;  // the most rows of a memory that is updated in one launch

// What the two phases of one memory share.
struct Factored {
  float* gains;   // G [T, width]
  float* roots;   // L⁻¹ of each chunk [chunks, 16, 16]
  float* pivots;  // s [T]
};

// How the work is laid out over blocks and launches.
struct Plan {
  bool factor, apply;
  int64_t blocks_each;  // that share the tiles of one memory
  int64_t tiles;        // of columns
  Factored factored;    // of all memories, where the phases are two launches
  float* energies;      // ‖E_t‖² of each tile [B, tiles, T]
  unsigned* tickets;    // [B]
  Workspace workspace;
};

struct Update : Block {
  int K, C, width, rows, ld_gain;  // width, rows: K in whole vectors, in whole tiles
  int64_t T, chunks;
  Factored own;  // where the phases share a launch
  Factored at;   // of the memory in hand
  float* energies;
  float* cov;                  // U [width, width]
  float *weights, *projected;  // W and V of a chunk [16, width]; G in the place of V
  float* tile;                 // R [rows, kColumns + padding]
  float* by_row;               // Wᵀ of a chunk [rows, 16 + padding]
  float* gain;                 // G of a chunk [16, ld_gain]
  float* error;                // E of a chunk [16, kColumns + padding]
  float noise[kChunk], slack[kChunk];
  float predictive[kChunk][kChunk];  // S
  bool seen[kChunk];
};

__host__ __device__ inline Factored of_memory(const Factored& all, int64_t b, int64_t T, int width) {
  return {all.gains + b * T * width, all.roots + b * chunks_of(T) * kChunk * kChunk, all.pivots + b * T};
}

// Where the buffers of a block are; most used first.
template <int kColumns>
__host__ __device__ void lay_out(Update& block, Space& space, const PosteriorArgs<float>& args, const Plan& plan) {
  block.K = static_cast<int>(args.K), block.C = static_cast<int>(args.C);
  block.width = round_up(block.K, 4), block.rows = round_up(block.K, 32);
  block.ld_gain = block.rows + kStagePadding;
  block.T = args.T_, block.chunks = chunks_of(args.T_);
  constexpr int kLd = kColumns + kStagePadding;
  if (plan.apply) {
    block.error = space.take(kChunk * kLd);
    block.tile = space.take(int64_t(block.rows) * kLd);
    block.by_row = space.take(int64_t(block.rows) * kLdWeights);
    block.gain = space.take(int64_t(kChunk) * block.ld_gain);
  }
  if (plan.factor) {
    block.weights = space.take(kChunk * block.width), block.projected = space.take(kChunk * block.width);
    block.cov = space.take(int64_t(block.width) * block.width);
  }
  if (plan.factor && plan.apply)
    block.own = {space.take(block.T * block.width), space.take(block.chunks * kChunk * kChunk), space.take(block.T)};
}

// What is known of a chunk's patterns; completed by hidden ones.
__device__ int load_chunk(Update& block, const PosteriorArgs<float>& args, int64_t b, int64_t first) {
  const int count = static_cast<int>(min(int64_t(kChunk), block.T - first)), t = threadIdx.x;
  if (t < kChunk) {
    block.noise[t] = t < count ? *element(args.noise_var, b, first + t) : 1.f;
    block.seen[t] = t < count && seen(args, b, first + t);
  }
  __syncthreads();
  return count;
}

// ---- factor --------------------------------------------------------------------------------------------------------

// Bytes: U is read once and written once; of W, K numbers a pattern are read. U itself stays on chip while it fits.
__device__ void factor(Update& block, const PosteriorArgs<float>& args, int64_t b, bool reports) {
  const Factored& out = block.at;
  const int K = block.K, width = block.width;
  load_rows(block.cov, K, K, width, width, side_of(args.cov, b));
  __syncthreads();
  check_symmetry(block.cov, K, width, block);
  const Codes all_weights = codes_of(args.weights, args.weights_type, b);
  for (int64_t first = 0; first < block.T; first += kChunk) {
    // A hidden pattern has no weights, whatever stands there, even NaN.
    const int count = load_chunk(block, args, b, first);
    const int across = width / 4;
    for (int n = threadIdx.x; n < kChunk * across; n += kThreads) {
      const int t = n / across, k = n % across * 4;
      const int room = block.seen[t] ? K - k : 0;
      reinterpret_cast<float4*>(block.weights)[n] = all_weights.four(first + t, k, all_weights.inner, room);
    }
    __syncthreads();

    // V = W U, of which the padding is that of U, and S.
    const Side weights{block.weights, width, 1}, projected{block.projected, width, 1};
    product<kExact, 16, 128>(
        kChunk, width, K, weights, Side{block.cov, width, 1}, block, false,
        [&](int i, int j, const auto& sums) { put(block.projected + i * width + j, sums, width - j); });
    product<kExact, 16, 128>(kChunk, kChunk, K, projected, weights, block, false,
                             [&](int i, int j, const auto& sums) { put(block.predictive[i] + j, sums, kChunk - j); });
    if (threadIdx.x < kChunk) {
      float& variance = block.predictive[threadIdx.x][threadIdx.x];
      variance += block.noise[threadIdx.x];
      block.slack[threadIdx.x] = 4 * static_cast<float>(K + count) * kEpsilon * fabsf(variance);
    }
    if (threadIdx.x == 0) block.positive = true;
    __syncthreads();
    if (threadIdx.x < 32) factor_root(block.predictive[0], kChunk, count, block, block.noise, block.slack);
    __syncthreads();

    // G in the place of V, and what the apply phase needs.
    const int i = threadIdx.x / kChunk, j = threadIdx.x % kChunk;
    float* const root = out.roots + first * kChunk;
    root[threadIdx.x] = j <= i ? block.root[i][j] : 0;
    if (i == j && i < count) {
      const float pivot = block.lower[i][i], noise = block.noise[i];
      out.pivots[first + i] = block.seen[i] ? fmaxf(pivot * pivot, noise) : noise;
    }
    if (threadIdx.x == 0 && !block.positive && block.status == kGood) block.status = kNotPositiveDefinite;
    __syncthreads();
    apply_root<false>(root, kChunk, block.projected, width, width);
    for (int n = threadIdx.x; n < count * width; n += kThreads) out.gains[first * width + n] = block.projected[n];
    add_outer(block.cov, width, -1, kChunk, block.projected, block.projected);
    __syncthreads();
  }
  if (!reports) return;
  store_rows(args.new_cov, b, K, K, block.cov, width);
  if (threadIdx.x == 0) args.info[b] = block.status;
}

// ---- apply ---------------------------------------------------------------------------------------------------------

// One tile of columns through all chunks. W comes transposed, so that sums over K run over its rows and those of R.
//
// Bytes: of R and Z each entry is read once and of the new mean each is written once, the least possible; W and G are
// read once a tile, from the second tile on from the cache.
template <Rounding kRounding, int kColumns>
__device__ void apply(Update& block, const PosteriorArgs<float>& args, int64_t b, int tile) {
  const Factored& from = block.at;
  constexpr int kLd = kColumns + kStagePadding, kAcross = kColumns / 4;
  using Whitening = typename TileOf<kRounding, 16, kColumns>::Type;
  using Moving = typename TileOf<kRounding, 32, kColumns>::Type;
  const int K = block.K, column0 = tile * kColumns, columns = min(kColumns, block.C - column0);
  const Codes all_weights = codes_of(args.weights, args.weights_type, b);
  const Codes all_values = codes_of(args.values, args.values_type, b);
  const Side mean = side_of(args.mean, b);
  for (int n = threadIdx.x; n < block.rows * kAcross; n += kThreads) {
    const int row = n / kAcross, column = n % kAcross * 4;
    const int room = row < K ? columns - column : 0;
    *reinterpret_cast<float4*>(block.tile + row * kLd + column) = mean.four(row, column0 + column, mean.inner, room);
  }
  for (int64_t first = 0; first < block.T; first += kChunk) {
    const int count = load_chunk(block, args, b, first);
    for (int n = threadIdx.x; n < kChunk * (block.rows / 4); n += kThreads) {
      const int t = n % kChunk, k = n / kChunk * 4;
      const int room = block.seen[t] ? K - k : 0;
      const float4 w = all_weights.four(first + t, k, all_weights.inner, room);
      float* const to = block.by_row + k * kLdWeights + t;
      to[0] = w.x, to[kLdWeights] = w.y, to[2 * kLdWeights] = w.z, to[3 * kLdWeights] = w.w;
    }
    for (int n = threadIdx.x; n < kChunk * (block.rows / 4); n += kThreads) {
      const int t = n / (block.rows / 4), k = n % (block.rows / 4) * 4;
      *reinterpret_cast<float4*>(block.gain + t * block.ld_gain + k) =
          four(from.gains + (first + t) * block.width + k, 1, t < count ? block.width - k : 0);
    }
    for (int n = threadIdx.x; n < kChunk * kAcross; n += kThreads) {
      const int t = n / kAcross, column = n % kAcross * 4;
      const int room = block.seen[t] ? columns - column : 0;
      *reinterpret_cast<float4*>(block.error + t * kLd + column) =
          all_values.four(first + t, column0 + column, all_values.inner, room);
    }
    __syncthreads();

    // E = L⁻¹ (Z − W R)
    Whitening whitening;
    for (int k = 0; k < block.rows; k += kSlice)
      whitening.add(block.by_row + k * kLdWeights, kLdWeights, block.tile + k * kLd, kLd, block);
    whitening.store([&](int t, int column, const auto& sums) {
      float* const at = block.error + t * kLd + column;
      put_sum(at, at, 1, -1, sums, kColumns);
    });
    __syncthreads();
    apply_root<false>(from.roots + first * kChunk, kChunk, block.error, kLd, kColumns);
    for (int t = threadIdx.x / 32; t < count; t += kWarps) {
      const float energy = warp_squares(block.error + t * kLd, columns);
      if (threadIdx.x % 32 == 0) block.energies[tile * block.T + first + t] = energy;
    }

    // R ← R + Gᵀ E
    for (int row0 = 0; row0 < block.rows; row0 += 32) {
      Moving moving;
      moving.add(block.gain + row0, block.ld_gain, block.error, kLd, block);
      moving.store([&](int row, int column, const auto& sums) {
        float* const at = block.tile + (row0 + row) * kLd + column;
        put_sum(at, at, 1, 1, sums, kColumns);
      });
    }
    __syncthreads();
  }
  for (int n = threadIdx.x; n < K * kAcross; n += kThreads) {
    const int row = n / kAcross, column = n % kAcross * 4;
    float entries[4];
    get(block.tile + row * kLd + column, 1, entries, 4);
    put(element(args.new_mean, b, row, column0 + column), entries, columns - column);
  }
  __syncthreads();
}

// What an update reports of each pattern, from its energy in every tile.
__device__ void report(Update& block, const PosteriorArgs<float>& args, int64_t b, int64_t tiles) {
  constexpr float kTwoPi = 6.283185307179586f;
  const float C = static_cast<float>(block.C);
  double log_evidence = 0;
  for (int64_t t = threadIdx.x; t < block.T; t += kThreads) {
    float energy = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) energy += block.energies[tile * block.T + t];
    const float s = block.at.pivots[t], noise = *element(args.noise_var, b, t), beta = 1 - noise / s;
    *element(args.innovation_var, b, t) = s;
    // KL_t = ½ [C (ln(s/σ²) − β) + β ‖E_t‖²] with β = 1 − σ²/s
    *element(args.kl, b, t) = 0.5f * (C * (logf(s / noise) - beta) + beta * energy);
    if (seen(args, b, t)) log_evidence -= 0.5f * (C * logf(kTwoPi * s) + energy);
  }
  log_evidence = block_sum(log_evidence, block);
  if (threadIdx.x == 0) args.log_evidence[b] = static_cast<float>(log_evidence);
  __syncthreads();
}

template <Rounding kRounding, int kColumns>
__global__ void __launch_bounds__(kThreads, 1) update_kernel(PosteriorArgs<float> args, int64_t B, Plan plan) {
  Update& block = *reinterpret_cast<Update*>(dynamic_shared());
  if (threadIdx.x == 0) {
    Space space = space_of_block<Update>(plan.workspace);
    lay_out<kColumns>(block, space, args, plan);
    block.precision = args.precision;
  }
  __syncthreads();
  for (int64_t item = blockIdx.x; item < B * plan.blocks_each; item += gridDim.x) {
    const int64_t b = item / plan.blocks_each, share = item % plan.blocks_each;
    if (threadIdx.x == 0) {
      const bool alone = plan.factor && plan.apply;
      block.at = alone ? block.own : of_memory(plan.factored, b, block.T, block.width);
      block.energies = plan.energies + b * plan.tiles * block.T;
    }
    __syncthreads();
    if (plan.factor) factor(block, args, b, share == 0);
    __syncthreads();
    if (!plan.apply) continue;
    for (int64_t tile = share; tile < plan.tiles; tile += plan.blocks_each)
      apply<kRounding, kColumns>(block, args, b, static_cast<int>(tile));
    if (last_to_arrive(plan.tickets + b, static_cast<unsigned>(plan.blocks_each), block))
      report(block, args, b, plan.tiles);
    __syncthreads();
  }
}

template <Rounding kRounding, int kColumns>
const char* start(const Device& device, const PosteriorArgs<float>& args, int64_t B, Plan plan,
                  cuda::Context& context) {
  plan.workspace =
      measure<Update>(device, [&](Update& head, Space& space) { lay_out<kColumns>(head, space, args, plan); });
  const auto kernel = update_kernel<kRounding, kColumns>;
  const int64_t resident = resident_blocks(device, kernel, plan.workspace);
  plan.blocks_each = plan.apply ? min(plan.tiles, max(int64_t(1), resident / B)) : 1;
  const int64_t blocks = min(B * plan.blocks_each, resident);
  if (plan.workspace.block_floats > 0)
    plan.workspace.data = context.allocate(context, blocks * plan.workspace.block_floats);
  return launch(kernel, blocks, kThreads, plan.workspace.shared_bytes(), context.stream, args, B, plan);
}

template <int kColumns>
const char* start(const Device& device, const PosteriorArgs<float>& args, int64_t B, const Plan& plan,
                  cuda::Context& context) {
  const bool exact = !plan.apply || args.precision == kIeee;
  return exact ? start<kExact, kColumns>(device, args, B, plan, context)
               : start<kTensor, kColumns>(device, args, B, plan, context);
}

}  // namespace

const char* cuda::update_posterior(const PosteriorArgs<float>& args, int64_t B, Context& context) {
  if (B == 0) return nullptr;
  const Device device = current_device();
  const int width = round_up(static_cast<int>(args.K), 4);
  const bool fused = args.K <= kFusedRows;

  // Narrow tiles where wide ones would leave multiprocessors idle, or would not fit on chip.
  const int64_t wide_tiles = (args.C + 127) / 128;
  const bool narrow = args.K > 256 || B * wide_tiles < device.multiprocessors;
  Plan plan{};
  plan.tiles = max(int64_t(1), narrow ? (args.C + 63) / 64 : wide_tiles);
  plan.energies = context.allocate(context, max(int64_t(1), B * plan.tiles * args.T_));
  plan.tickets = reinterpret_cast<unsigned*>(context.allocate(context, B));
  if (const char* error = fill_zero_bytes(plan.tickets, B * static_cast<int64_t>(sizeof(unsigned)), context.stream))
    return error;
  if (!fused) {
    plan.factored = {context.allocate(context, max(int64_t(1), B * args.T_ * width)),
                     context.allocate(context, max(int64_t(1), B * chunks_of(args.T_) * kChunk * kChunk)),
                     context.allocate(context, max(int64_t(1), B * args.T_))};
    plan.factor = true;
    if (const char* error = start<64>(device, args, B, plan, context)) return error;
  }
  plan.factor = fused;
  plan.apply = true;
  return narrow ? start<64>(device, args, B, plan, context) : start<128>(device, args, B, plan, context);
}

}  // namespace fastkm
