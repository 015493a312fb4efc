// An update on a GPU: a factor phase that does not depend on C, and an apply phase that streams tiles of C.
//
// For each chunk of 16 patterns:
//   Factor   V = W U      S = V Wᵀ + diag(σ²) = L Lᵀ      G = L⁻¹ V      U ← U − Gᵀ G
//   Apply    E = L⁻¹ (Z − W R)      R ← R + Gᵀ E      on a tile of columns of R that stays on chip through all chunks
//
// A removal is the update of −U: V = −W U, and U ← U + Gᵀ G. The apply phase is the same, without reports.
//
// Up to K = 128 one launch does both. Where the memories alone do not fill the chip, several thread blocks share a
// memory: each computes the factor phase for itself and some of the tiles. Beyond, the factor phase is a launch of its
// own.
//
// Bytes: the factor phase reads and writes U once and reads K numbers a pattern of W. The apply phase reads every entry
// of R and Z once and writes the new mean once, the least possible; W and G are read once a tile, from the second tile
// on from the cache.
#pragma once

#include "cuda/linalg/cholesky.cuh"
#include "cuda/linalg/product.cuh"
#include "cuda/linalg/reduce.cuh"
#include "cuda/linalg/symmetric.cuh"
#include "cuda/linalg/variance_divergence.cuh"
#include "cuda/posterior/chunk.cuh"

namespace fastkm {
namespace {

constexpr int kLdWeights = kChunk + kStagePadding;
constexpr int kFusedRows = 128;  // the most rows of a memory that one launch updates

// What the factor phase leaves for the apply phase.
struct Factored {
  float* gains;           // G [T, width]
  float* inverse_blocks;  // L⁻¹ of each chunk [chunks, 16, 16]
  float* pivots;          // s [T]
  float* explained;       // wᵀUw [T]
};

// How the work is spread over thread blocks and launches.
struct Plan {
  bool factor, apply;         // the phases of this launch
  bool keeps_failures;        // whether a bad status of a call before stays
  int64_t blocks_per_memory;  // thread blocks that share the tiles of one memory
  int64_t tiles;              // of columns
  Factored factored;          // of all memories, where the phases are two launches
  float* energies;            // ‖E_t‖² of each tile [B, tiles, T]
  unsigned* tickets;          // [B]
  Workspace workspace;
};

struct Update : ThreadBlock {
  int K, C, width, rows, ld_gain;  // width and rows are K in whole vectors and in whole tiles
  int64_t T, chunks;
  Factored own_factored;  // where the phases share a launch
  Factored factored;      // of the current memory
  float* energies;
  float* cov;                  // U [width, width]
  float *weights, *projected;  // W of a chunk; V, then G [16, width]
  float* tile;                 // R [rows, kColumns + padding]
  float* weights_transposed;   // Wᵀ of a chunk [rows, 16 + padding]
  float* gain;                 // G of a chunk [16, ld_gain]
  float* whitened;             // Z, then E of a chunk [16, kColumns + padding]
  float noise[kChunk], slack[kChunk], explained[kChunk];
  int held[kChunk];                      // float32 holds the variance along the pattern; of a removal, its Status
  float innovation_cov[kChunk][kChunk];  // S
  bool unmasked[kChunk];
};

__host__ __device__ inline Factored of_memory(const Factored& all, int64_t b, int64_t T, int width) {
  return {all.gains + b * T * width, all.inverse_blocks + b * count_chunks(T) * kChunk * kChunk, all.pivots + b * T,
          all.explained + b * T};
}

// The buffers of a thread block, most used first.
template <int kColumns>
__host__ __device__ void lay_out(Update& update, Arena& arena, const PosteriorArgs<float>& args, const Plan& plan) {
  update.K = static_cast<int>(args.K);
  update.C = static_cast<int>(args.C);
  update.width = round_up(update.K, 4);
  update.rows = round_up(update.K, 32);
  update.ld_gain = update.rows + kStagePadding;
  update.T = args.T;
  update.chunks = count_chunks(args.T);
  constexpr int kLd = kColumns + kStagePadding;
  if (plan.apply) {
    update.whitened = arena.allocate(kChunk * kLd);
    update.tile = arena.allocate(int64_t(update.rows) * kLd);
    update.weights_transposed = arena.allocate(int64_t(update.rows) * kLdWeights);
    update.gain = arena.allocate(int64_t(kChunk) * update.ld_gain);
  }
  if (plan.factor) {
    update.weights = arena.allocate(kChunk * update.width);
    update.projected = arena.allocate(kChunk * update.width);
    update.cov = arena.allocate(int64_t(update.width) * update.width);
  }
  if (plan.factor && plan.apply) {
    update.own_factored.gains = arena.allocate(update.T * update.width);
    update.own_factored.inverse_blocks = arena.allocate(update.chunks * kChunk * kChunk);
    update.own_factored.pivots = arena.allocate(update.T);
    update.own_factored.explained = arena.allocate(update.T);
  }
}

// Load the noise and mask of a chunk. Patterns past the last one count as masked. Returns how many there are.
__device__ int load_chunk(Update& update, const PosteriorArgs<float>& args, int64_t b, int64_t first) {
  const int count = static_cast<int>(min(int64_t(kChunk), update.T - first)), t = threadIdx.x;
  if (t < kChunk) {
    update.noise[t] = t < count ? *element(args.noise_var, b, first + t) : 1.f;
    update.unmasked[t] = t < count && is_unmasked(args, b, first + t);
  }
  __syncthreads();
  return count;
}

// ---- factor --------------------------------------------------------------------------------------------------------

// S = V Wᵀ + diag(σ²), its factor and wᵀUw.
__device__ __forceinline__ void factor_variances(Update& update, int count) {
  if (threadIdx.x < kChunk) {
    const float variance = update.innovation_cov[threadIdx.x][threadIdx.x] + update.noise[threadIdx.x];
    update.slack[threadIdx.x] = rounding_slack(update.K, count, variance);
  }
  if (threadIdx.x == 0) update.positive = true;
  __syncthreads();
  if (threadIdx.x < 32)
    factor_block(update, update.innovation_cov[0], kChunk, count,
                 AddedDiagonal{update.noise, update.slack, update.explained});
  __syncthreads();
  for (int t = threadIdx.x / 32; t < count; t += kWarps) {
    const bool held = holds_variance(update.weights + t * update.width, update.cov, update.K, update.width,
                                     update.explained[t], update.noise[t]);
    if (threadIdx.x % 32 == 0) update.held[t] = held;
  }
  __syncthreads();
}

// S = diag(σ²) − W U Wᵀ, its factor, and the status of each pattern, by a warp.
__device__ __forceinline__ void factor_removal(Update& update, int count) {
  if (threadIdx.x < kChunk) update.innovation_cov[threadIdx.x][threadIdx.x] += update.noise[threadIdx.x];
  if (threadIdx.x == 0) update.positive = true;
  __syncthreads();
  if (threadIdx.x < 32) factor_block(update, update.innovation_cov[0], kChunk, count);
  __syncthreads();
  for (int t = threadIdx.x / 32; t < count; t += kWarps) {
    const float scale = weighted_norm(update.weights + t * update.width, update.cov, update.K, update.width);
    float inverse_variance = 0;  // (S⁻¹)_tt
    for (int i = t; i < count; ++i) inverse_variance += update.inverse_factor[i][t] * update.inverse_factor[i][t];
    const float root = update.factor[t][t];
    const int status = removal_status(root * root, inverse_variance, scale, update.noise[t], update.K, count);
    if (threadIdx.x % 32 == 0) update.held[t] = status;
  }
  __syncthreads();
}

// V, whose padding is that of U, and the factor of S. W of a masked pattern counts as zero: it may hold NaN.
template <Direction kDirection>
__device__ __forceinline__ void factor_chunk(Update& update, const Codes& all_weights, int64_t first, int count) {
  const int K = update.K, width = update.width, across = width / 4;
  for (int n = threadIdx.x; n < kChunk * across; n += kThreads) {
    const int t = n / across, k = n % across * 4;
    const int room = update.unmasked[t] ? K - k : 0;
    reinterpret_cast<float4*>(update.weights)[n] = all_weights.load_four(first + t, k, all_weights.inner, room);
  }
  __syncthreads();
  const Operand weights{update.weights, width, 1}, projected{update.projected, width, 1};
  product<kCudaCores, 16, 128>(StoreRows{update.projected, width, width}, {kChunk, width, K}, weights,
                               Operand{update.cov, width, 1}, update);
  if constexpr (kDirection == Direction::kOut) negate(update.projected, kChunk * width);
  product<kCudaCores, 16, 128>(StoreRows{update.innovation_cov[0], kChunk, kChunk}, {kChunk, kChunk, K}, projected,
                               weights, update);
  if constexpr (kDirection == Direction::kOut)
    factor_removal(update, count);
  else
    factor_variances(update, count);
}

// The factor phase of one memory. Several thread blocks may compute it; the one that `reports` stores U and the status.
template <Direction kDirection>
__device__ void factor_memory(Update& update, const PosteriorArgs<float>& args, int64_t b, bool reports, bool keeps) {
  constexpr bool kRemoves = kDirection == Direction::kOut;
  const Factored& out = update.factored;
  const int K = update.K, width = update.width;
  load_rows(update.cov, K, K, width, width, operand_of(args.cov, b));
  __syncthreads();
  check_symmetry(update.cov, K, width, update);
  const Codes all_weights = codes_of(args.weights, args.weights_type, b);
  for (int64_t first = 0; first < update.T; first += kChunk) {
    const int count = load_chunk(update, args, b, first);
    factor_chunk<kDirection>(update, all_weights, first, count);
    const int i = threadIdx.x / kChunk, j = threadIdx.x % kChunk;
    float* const inverse = out.inverse_blocks + first * kChunk;
    inverse[threadIdx.x] = j <= i ? update.inverse_factor[i][j] : 0;
    if (!kRemoves && i == j && i < count) {
      out.explained[first + i] = update.explained[i];
      out.pivots[first + i] = update.explained[i] + update.noise[i];
    }
    if (threadIdx.x == 0 && update.status == kGood)
      update.status = kRemoves ? removed_chunk_status(update.positive, update.held, count)
                               : chunk_status(update.positive, update.held, count);
    __syncthreads();

    // G in the place of V, and U ← U − Gᵀ G, or plus it
    apply_inverse_block<false>(update.projected, width, kChunk, width, inverse);
    for (int n = threadIdx.x; n < count * width; n += kThreads) out.gains[first * width + n] = update.projected[n];
    add_outer(update.cov, width, kRemoves ? 1 : -1, kChunk, update.projected, update.projected);
    __syncthreads();
  }
  if (!reports) return;
  store_rows(args.new_cov, b, K, K, update.cov, width);
  if (threadIdx.x == 0 && !(kRemoves && keeps && args.info[b] != kGood)) args.info[b] = update.status;
}

// ---- apply ---------------------------------------------------------------------------------------------------------

// Columns [column0, column0 + columns) of Z, and Wᵀ and G of a chunk. W is transposed so that sums over K run over its
// rows and those of R. No barrier.
template <int kColumns>
__device__ __forceinline__ void load_apply_chunk(Update& update, const Codes& all_weights, const Codes& all_values,
                                                 int64_t first, int count, int column0, int columns) {
  constexpr int kLd = kColumns + kStagePadding, kAcross = kColumns / 4;
  const int K = update.K, across_rows = update.rows / 4;
  for (int n = threadIdx.x; n < kChunk * across_rows; n += kThreads) {
    const int t = n % kChunk, k = n / kChunk * 4;
    const float4 w = all_weights.load_four(first + t, k, all_weights.inner, update.unmasked[t] ? K - k : 0);
    float* const to = update.weights_transposed + k * kLdWeights + t;
    to[0] = w.x;
    to[kLdWeights] = w.y;
    to[2 * kLdWeights] = w.z;
    to[3 * kLdWeights] = w.w;
  }
  for (int n = threadIdx.x; n < kChunk * across_rows; n += kThreads) {
    const int t = n / across_rows, k = n % across_rows * 4;
    const float* const from = update.factored.gains + (first + t) * update.width + k;
    *reinterpret_cast<float4*>(update.gain + t * update.ld_gain + k) =
        load_four(from, 1, t < count ? update.width - k : 0);
  }
  for (int n = threadIdx.x; n < kChunk * kAcross; n += kThreads) {
    const int t = n / kAcross, column = n % kAcross * 4;
    const int room = update.unmasked[t] ? columns - column : 0;
    *reinterpret_cast<float4*>(update.whitened + t * kLd + column) =
        all_values.load_four(first + t, column0 + column, all_values.inner, room);
  }
}

// The apply phase of one tile of columns.
template <Cores kCores, int kColumns, Direction kDirection>
__device__ void apply_to_tile(Update& update, const PosteriorArgs<float>& args, int64_t b, int tile) {
  constexpr int kLd = kColumns + kStagePadding, kAcross = kColumns / 4;
  using WhiteningTile = typename TileOf<kCores, 16, kColumns>::Type;
  using MeanTile = typename TileOf<kCores, 32, kColumns>::Type;
  const int K = update.K, column0 = tile * kColumns, columns = min(kColumns, update.C - column0);
  const Codes all_weights = codes_of(args.weights, args.weights_type, b);
  const Codes all_values = codes_of(args.values, args.values_type, b);
  const Operand mean = operand_of(args.mean, b);
  for (int n = threadIdx.x; n < update.rows * kAcross; n += kThreads) {
    const int row = n / kAcross, column = n % kAcross * 4;
    const int room = row < K ? columns - column : 0;
    *reinterpret_cast<float4*>(update.tile + row * kLd + column) =
        mean.load_four(row, column0 + column, mean.inner, room);
  }
  for (int64_t first = 0; first < update.T; first += kChunk) {
    const int count = load_chunk(update, args, b, first);
    load_apply_chunk<kColumns>(update, all_weights, all_values, first, count, column0, columns);
    __syncthreads();

    // E = L⁻¹ (Z − W R)
    WhiteningTile whitening;
    for (int k = 0; k < update.rows; k += kSlice)
      whitening.add(update.weights_transposed + k * kLdWeights, kLdWeights, update.tile + k * kLd, kLd, update);
    whitening.store(AddRows{update.whitened, kLd, kColumns, -1});
    __syncthreads();
    apply_inverse_block<false>(update.whitened, kLd, kChunk, kColumns, update.factored.inverse_blocks + first * kChunk);
    for (int t = threadIdx.x / 32; kDirection == Direction::kIn && t < count; t += kWarps) {
      const float energy = squared_norm_by_warp(update.whitened + t * kLd, columns);
      if (threadIdx.x % 32 == 0) update.energies[tile * update.T + first + t] = energy;
    }

    // R ← R + Gᵀ E
    for (int row0 = 0; row0 < update.rows; row0 += 32) {
      MeanTile change;
      change.add(update.gain + row0, update.ld_gain, update.whitened, kLd, update);
      change.store(AddRows{update.tile + row0 * kLd, kLd, kColumns, 1});
    }
    __syncthreads();
  }
  for (int n = threadIdx.x; n < K * kAcross; n += kThreads) {
    const int row = n / kAcross, column = n % kAcross * 4;
    float entries[4];
    load_columns(update.tile + row * kLd + column, 1, entries, 4);
    store_columns(element(args.new_mean, b, row, column0 + column), entries, columns - column);
  }
  __syncthreads();
}

// Store s and KL of each pattern and the log-evidence, from the energies of all tiles.
__device__ void store_reports(Update& update, const PosteriorArgs<float>& args, int64_t b, int64_t tiles) {
  constexpr float kTwoPi = 6.283185307179586f;
  const float C = static_cast<float>(update.C);
  double log_evidence = 0;
  for (int64_t t = threadIdx.x; t < update.T; t += kThreads) {
    float energy = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) energy += update.energies[tile * update.T + t];
    const float s = update.factored.pivots[t], noise = *element(args.noise_var, b, t);
    const float beta = update.factored.explained[t] / s;
    *element(args.innovation_var, b, t) = s;
    // KL_t = ½ [C (ln(s/σ²) − β) + β ‖E_t‖²] with β = wᵀUw/s
    *element(args.kl, b, t) = 0.5f * (C * variance_divergence(noise / s, -beta) + beta * energy);
    if (is_unmasked(args, b, t)) log_evidence -= 0.5f * (C * logf(kTwoPi * s) + energy);
  }
  log_evidence = block_sum(log_evidence, update);
  if (threadIdx.x == 0) args.log_evidence[b] = static_cast<float>(log_evidence);
  __syncthreads();
}

template <Cores kCores, int kColumns, Direction kDirection>
__device__ __forceinline__ void update_memories(const PosteriorArgs<float>& args, int64_t B, const Plan& plan) {
  Update& update = *reinterpret_cast<Update*>(dynamic_shared());
  if (threadIdx.x == 0) {
    Arena arena = arena_behind<Update>(plan.workspace);
    lay_out<kColumns>(update, arena, args, plan);
    update.precision = args.precision;
  }
  __syncthreads();
  for (int64_t task = blockIdx.x; task < B * plan.blocks_per_memory; task += gridDim.x) {
    const int64_t b = task / plan.blocks_per_memory, share = task % plan.blocks_per_memory;
    if (threadIdx.x == 0) {
      const bool fused = plan.factor && plan.apply;
      update.factored = fused ? update.own_factored : of_memory(plan.factored, b, update.T, update.width);
      update.energies = plan.energies + b * plan.tiles * update.T;
    }
    __syncthreads();
    if (plan.factor) factor_memory<kDirection>(update, args, b, share == 0, plan.keeps_failures);
    __syncthreads();
    if (!plan.apply) continue;
    for (int64_t tile = share; tile < plan.tiles; tile += plan.blocks_per_memory)
      apply_to_tile<kCores, kColumns, kDirection>(update, args, b, static_cast<int>(tile));
    if constexpr (kDirection == Direction::kIn) {
      if (last_to_arrive(plan.tickets + b, static_cast<unsigned>(plan.blocks_per_memory), update))
        store_reports(update, args, b, plan.tiles);
    }
    __syncthreads();
  }
}

using UpdateKernel = void (*)(PosteriorArgs<float>, int64_t B, Plan);

// The kernels of an operation: of the factor phase alone, with tiles of 64 columns, and with tiles of 128.
struct UpdateKernels {
  UpdateKernel factor, narrow, wide;
};

template <int kColumns>
const char* start(UpdateKernel kernel, const Device& device, const PosteriorArgs<float>& args, int64_t B, Plan plan,
                  cuda::Context& context) {
  const auto layout = [&](Update& head, Arena& arena) { lay_out<kColumns>(head, arena, args, plan); };
  plan.workspace = measure_workspace<Update>(device, layout);
  const int64_t resident = resident_blocks(device, kernel, plan.workspace);
  plan.blocks_per_memory = plan.apply ? min(plan.tiles, max(int64_t(1), resident / B)) : 1;
  const int64_t blocks = min(B * plan.blocks_per_memory, resident);
  if (plan.workspace.block_floats > 0)
    plan.workspace.data = context.allocate(context, blocks * plan.workspace.block_floats);
  return launch(kernel, blocks, kThreads, plan.workspace.shared_bytes(), context.stream, args, B, plan);
}

inline const char* allocate_reports(Plan& plan, const PosteriorArgs<float>& args, int64_t B, cuda::Context& context) {
  plan.energies = context.allocate(context, max(int64_t(1), B * plan.tiles * args.T));
  plan.tickets = reinterpret_cast<unsigned*>(context.allocate(context, B));
  return fill_zero_bytes(plan.tickets, B * static_cast<int64_t>(sizeof(unsigned)), context.stream);
}

template <Direction kDirection>
const char* launch_update(const UpdateKernels& kernels, const PosteriorArgs<float>& args, int64_t B, Plan plan,
                          cuda::Context& context) {
  const Device device = current_device();
  const int width = round_up(static_cast<int>(args.K), 4);
  const bool fused = args.K <= kFusedRows;

  // Tiles are narrow where wide ones would leave multiprocessors idle or would not fit on chip.
  const int64_t wide_tiles = (args.C + 127) / 128;
  const bool narrow = args.K > 256 || B * wide_tiles < device.multiprocessors;
  plan.tiles = max(int64_t(1), narrow ? (args.C + 63) / 64 : wide_tiles);
  if constexpr (kDirection == Direction::kIn)
    if (const char* error = allocate_reports(plan, args, B, context)) return error;
  if (!fused) {
    plan.factored = {context.allocate(context, max(int64_t(1), B * args.T * width)),
                     context.allocate(context, max(int64_t(1), B * count_chunks(args.T) * kChunk * kChunk)),
                     context.allocate(context, max(int64_t(1), B * args.T)),
                     context.allocate(context, max(int64_t(1), B * args.T))};
    plan.factor = true;
    if (const char* error = start<64>(kernels.factor, device, args, B, plan, context)) return error;
  }
  plan.factor = fused;
  plan.apply = true;
  return narrow ? start<64>(kernels.narrow, device, args, B, plan, context)
                : start<128>(kernels.wide, device, args, B, plan, context);
}

}  // namespace
}  // namespace fastkm
