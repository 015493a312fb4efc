// write on a GPU: one thread block a memory, from the first pattern to the last in one launch.
//
// For each chunk of 16 patterns:
//   1. Find the weights (search.cuh; search_refactored.cuh where num_opt_iters > 1 or the Gram matrix is squared).
//   2. Condition the memory on the chunk (conditioning.cuh) and report s and KL of each pattern.
//
// Bytes a memory: while R fits on chip beside the matrices of the search, up to K = 64 at C = 200, every input is read
// and every output written once, the least possible. Beyond, R is read three times a chunk and written once: for the
// inner products, for Z − W R, and to be updated. At K = 128, C = 200, T = 64 that is 4.4 times the least.
#include "cuda/linalg/reduce.cuh"
#include "cuda/linalg/variance_divergence.cuh"
#include "cuda/writing/search_refactored.cuh"

namespace fastkm {
namespace {

struct Write : Chunk {
  Search search;
  Refactored refactored;
  float* own_mean;   // R [K, columns] while it fits on chip; otherwise null, and the mean is updated where it is stored
  int held[kChunk];  // float32 holds the variance along the pattern
};

// The buffers of a thread block, most used first.
__host__ __device__ void lay_out(Write& chunk, Arena& arena, const WritingArgs<float>& args) {
  set_sizes(chunk, args.posterior);
  Search& search = chunk.search;
  const int64_t rows = kChunk * chunk.width, square = int64_t(chunk.width) * chunk.width;
  chunk.a = arena.allocate(chunk.width);
  search.residual = arena.allocate(chunk.width);
  search.product = arena.allocate(chunk.width);
  chunk.w = arena.allocate(rows);
  chunk.c = arena.allocate(rows);
  search.p = arena.allocate(rows);
  search.q = arena.allocate(rows);
  search.x = arena.allocate(rows);
  search.y = arena.allocate(rows);
  chunk.values = arena.allocate(kChunk * chunk.columns);
  search.inverse = arena.allocate(square);
  chunk.cov = arena.allocate(square);
  search.system = arena.allocate(square);
  if (needs_refactoring(args)) allocate_refactored(chunk.refactored, arena, args, chunk.width);
  const int64_t mean = int64_t(chunk.K) * chunk.columns;
  chunk.own_mean = arena.fits(mean) ? arena.allocate(mean) : nullptr;
}

// Store s and KL of each pattern, from rows of Δ in `values`, and find the status of the chunk. A warp computes a
// pattern.
__device__ void store_reports(const PosteriorArgs<float>& args, Write& chunk, int64_t b, int64_t first) {
  for (int t = threadIdx.x / 32; t < chunk.count; t += kWarps) {
    const float energy = squared_norm_by_warp(chunk.values + t * chunk.columns, chunk.C);
    const float s = chunk.s[t], noise = chunk.noise[t], beta = chunk.explained[t] / s;
    const bool held = holds_variance(chunk.row(chunk.w, t), chunk.cov, chunk.K, chunk.width, chunk.explained[t], noise);
    if (threadIdx.x % 32 != 0) continue;
    chunk.held[t] = held;
    *element(args.innovation_var, b, first + t) = s;
    // KL_t = ½ [C (ln(s/σ²) − β) + β ‖δ‖²/s] with β = wᵀUw/s
    *element(args.kl, b, first + t) =
        0.5f * (static_cast<float>(chunk.C) * variance_divergence(noise / s, -beta) + beta * energy / s);
  }
  __syncthreads();
  if (threadIdx.x == 0 && chunk.status == kGood) chunk.status = chunk_status(true, chunk.held, chunk.count);
}

template <bool kRefactor>
__device__ void find_weights(Write& chunk) {
  Search& search = chunk.search;
  if constexpr (kRefactor) {
    inner_products<false>(chunk, search, search.system, 0);
    search_refactored(chunk, search, chunk.refactored);
  } else {
    const int K = chunk.K, width = chunk.width;
    inner_products<true>(chunk, search, search.system, search.ridge);
    copy(search.inverse, search.system, int64_t(width) * width);
    if (!invert(search.inverse, K, width, search.p, chunk)) mask_chunk(chunk);
    product<kCudaCores, 16, 128>(StoreRows{search.y, width, K}, {chunk.count, K, K}, Operand{search.x, width, 1},
                                 Operand{search.inverse, width, 1}, chunk);
    search_weights<kFind>(chunk, search);
  }
}

// Δ, then R + Cᵀ Δ and U − Cᵀ diag(s) C.
__device__ void condition_on_chunk(Write& chunk, const PosteriorArgs<float>& args, int64_t b, int64_t first) {
  const int K = chunk.K, width = chunk.width, C = chunk.C, columns = chunk.columns;
  whiten(chunk);
  store_reports(args, chunk, b, first);
  const Operand mean = chunk.mean, new_mean = chunk.own_mean ? mean : operand_of(args.new_mean, b);
  const auto add_to_mean = [&](int i, int j, const auto& sums) {
    store_sum(const_cast<float*>(new_mean.at(i, j)), mean.at(i, j), mean.inner, 1, sums, C - j);
  };
  product<kAnyCores, 64, 64>(add_to_mean, {K, C, chunk.count}, Operand{chunk.c, 1, width},
                             Operand{chunk.values, 1, columns}, chunk);
  scale_to_gain(chunk, chunk.c);
  add_outer(chunk.cov, width, -1, chunk.count, chunk.c, chunk.c);
  if (threadIdx.x == 0) chunk.mean = new_mean;
  __syncthreads();
}

__device__ void load_memory(Write& chunk, const WritingArgs<float>& args, int64_t b) {
  const PosteriorArgs<float>& posterior = args.posterior;
  if (threadIdx.x == 0) {
    chunk.search.ridge = *element(args.ridge, b);
    chunk.mean = chunk.own_mean ? Operand{chunk.own_mean, chunk.columns, 1} : operand_of(posterior.mean, b);
  }
  if (chunk.own_mean)
    load_rows(chunk.own_mean, chunk.K, chunk.C, chunk.K, chunk.columns, operand_of(posterior.mean, b));
  load_rows(chunk.cov, chunk.K, chunk.K, chunk.width, chunk.width, operand_of(posterior.cov, b));
  __syncthreads();
}

__device__ void store_memory(const Write& chunk, const PosteriorArgs<float>& args, int64_t b) {
  const int K = chunk.K, C = chunk.C;
  if (chunk.own_mean)
    store_rows(args.new_mean, b, K, C, chunk.own_mean, chunk.columns);
  else if (args.T == 0)
    for (int64_t n = threadIdx.x; n < int64_t(K) * C; n += kThreads)
      *element(args.new_mean, b, n / C, n % C) = *element(args.mean, b, n / C, n % C);
  for (int64_t n = threadIdx.x; n < int64_t(K) * K; n += kThreads)
    *element(args.new_cov, b, n / K, n % K) = chunk.cov[n / K * chunk.width + n % K];
  if (threadIdx.x == 0) args.info[b] = chunk.status;
}

template <bool kRefactor>
__global__ void __launch_bounds__(kThreads, 1)
    write_kernel(FASTKM_IN_PLACE WritingArgs<float> args, int64_t B, FASTKM_IN_PLACE Workspace workspace) {
  const PosteriorArgs<float>& posterior = args.posterior;
  Write& chunk = *reinterpret_cast<Write*>(dynamic_shared());
  if (threadIdx.x == 0) {
    Arena arena = arena_behind<Write>(workspace);
    lay_out(chunk, arena, args);
    chunk.precision = posterior.precision;
  }
  clear_buffers<Write>(workspace);
  const int K = chunk.K, width = chunk.width;
  for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
    load_memory(chunk, args, b);
    check_symmetry(chunk.cov, K, width, chunk);
    for (int64_t first = 0; first < posterior.T; first += kChunk) {
      load_patterns(chunk, posterior, b, first);
      find_weights<kRefactor>(chunk);
      for (int64_t n = threadIdx.x; n < int64_t(chunk.count) * K; n += kThreads)
        *element(args.new_weights, b, first + n / K, n % K) = chunk.w[n / K * width + n % K];
      condition_on_chunk(chunk, posterior, b, first);
    }
    store_memory(chunk, posterior, b);
    __syncthreads();
  }
}

template <bool kRefactor>
const char* start(const WritingArgs<float>& args, int64_t B, cuda::Context& context) {
  const Device device = current_device();
  const auto layout = [&](Write& head, Arena& arena) { lay_out(head, arena, args); };
  Workspace workspace = measure_workspace<Write>(device, layout);
  const int64_t blocks = min(B, resident_blocks(device, write_kernel<kRefactor>, workspace));
  if (workspace.block_floats > 0) workspace.data = context.allocate(context, blocks * workspace.block_floats);
  return launch(write_kernel<kRefactor>, blocks, kThreads, workspace.shared_bytes(), context.stream, args, B,
                workspace);
}

}  // namespace

const char* cuda::write(const WritingArgs<float>& args, int64_t B, Context& context) {
  if (B == 0) return nullptr;
  return needs_refactoring(args) ? start<true>(args, B, context) : start<false>(args, B, context);
}

}  // namespace fastkm
