// write on a GPU: one block a memory, from the first pattern to the last in one launch.
#include "cuda/writing/search_refactored.cuh"

namespace fastkm {
namespace {

struct Forward : Chunk {
  Attempts attempts;
  float* state;  // R [K, columns] while it fits on chip, else null: then the new mean is worked on where it goes
};

// Where the buffers of a block are; most used first.
__host__ __device__ void lay_out(Forward& chunk, Space& space, const WritingArgs<float>& args) {
  set_sizes(chunk, args.posterior);
  const int64_t panel = kChunk * chunk.width, square = int64_t(chunk.width) * chunk.width;
  chunk.a = space.take(chunk.width), chunk.v = space.take(chunk.width), chunk.product = space.take(chunk.width);
  chunk.w = space.take(panel), chunk.c = space.take(panel), chunk.p = space.take(panel), chunk.q = space.take(panel);
  chunk.x = space.take(panel), chunk.y = space.take(panel), chunk.values = space.take(kChunk * chunk.columns);
  chunk.inverse = space.take(square), chunk.cov = space.take(square), chunk.system = space.take(square);
  if (!factors_once(args)) take_attempts(chunk.attempts, space, args, chunk.width);
  const int64_t state = int64_t(chunk.K) * chunk.columns;
  chunk.state = space.fits(state) ? space.take(state) : nullptr;
}

// What the write reports of each pattern, a warp a pattern; rows of Δ stand in `values`.
__device__ void report(const WritingArgs<float>& args, const Chunk& chunk, int64_t b, int64_t first) {
  const int lane = threadIdx.x % 32;
  for (int t = threadIdx.x / 32; t < chunk.count; t += kWarps) {
    float energy = 0;
    for (int k = lane; k < chunk.C; k += 32) {
      const float delta = chunk.values[t * chunk.columns + k];
      energy += delta * delta;
    }
    for (int offset = 16; offset > 0; offset /= 2) energy += __shfl_xor_sync(~0u, energy, offset);
    const float s = chunk.s[t], noise = chunk.noise[t], beta = 1 - noise / s;
    if (lane != 0) continue;
    *element(args.posterior.innovation_var, b, first + t) = s;
    // KL_t = ½ [C (ln(s/σ²) − β) + β ‖δ‖²/s] with β = 1 − σ²/s
    *element(args.posterior.kl, b, first + t) =
        0.5f * (static_cast<float>(chunk.C) * (logf(s / noise) - beta) + beta * energy / s);
  }
}

// Bytes a memory: while R fits on chip beside the matrices of the search, up to K = 64 at C = 200, every input is read
// and every output written once, the least possible. Beyond, R is read three times a chunk and written once: for the
// inner products, for Z − W R, and to be updated; at K = 128, C = 200, T = 64 that is 4.4 times the least.
template <bool kAfresh>
__global__ void __launch_bounds__(kThreads, 1)
    write_kernel(FASTKM_IN_PLACE WritingArgs<float> args, int64_t B, FASTKM_IN_PLACE Workspace workspace) {
  const PosteriorArgs<float>& shared = args.posterior;
  Forward& chunk = *reinterpret_cast<Forward*>(dynamic_shared());
  if (threadIdx.x == 0) {
    Space space = space_of_block<Forward>(workspace);
    lay_out(chunk, space, args);
    chunk.precision = shared.precision;
  }
  clear_space<Forward>(workspace);
  const int K = chunk.K, width = chunk.width, C = chunk.C, columns = chunk.columns;
  for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
    if (threadIdx.x == 0) {
      chunk.ridge = *element(args.ridge, b);
      chunk.mean = chunk.state ? Side{chunk.state, columns, 1} : side_of(shared.mean, b);
    }
    if (chunk.state) load_rows(chunk.state, K, C, K, columns, side_of(shared.mean, b));
    load_rows(chunk.cov, K, K, width, width, side_of(shared.cov, b));
    __syncthreads();
    check_symmetry(chunk.cov, K, width, chunk);
    for (int64_t first = 0; first < shared.T_; first += kChunk) {
      load_patterns(chunk, shared, b, first);

      // Find the weights.
      if constexpr (kAfresh) {
        take_inner_products<false>(chunk, chunk.system, 0);
        search_afresh(chunk, chunk.attempts);
      } else {
        take_inner_products<true>(chunk, chunk.system, chunk.ridge);
        copy(chunk.inverse, chunk.system, int64_t(width) * width);
        if (!invert(chunk.inverse, K, width, chunk.p, chunk)) hide_patterns(chunk);
        product<kExact, 16, 128>(chunk.count, K, K, Side{chunk.x, width, 1}, Side{chunk.inverse, width, 1}, chunk,
                                 false,
                                 [&](int i, int j, const auto& sums) { put(chunk.row(chunk.y, i) + j, sums, K - j); });
        search<kFind>(chunk);
      }
      for (int64_t n = threadIdx.x; n < int64_t(chunk.count) * K; n += kThreads)
        *element(args.new_weights, b, first + n / K, n % K) = chunk.w[n / K * width + n % K];

      // Condition on the chunk: Δ, then R + Cᵀ Δ and U − Cᵀ diag(s) C.
      whiten(chunk);
      report(args, chunk, b, first);
      const Side mean = chunk.mean, new_mean = chunk.state ? mean : side_of(shared.new_mean, b);
      product<kEither, 64, 64>(K, C, chunk.count, Side{chunk.c, 1, width}, Side{chunk.values, 1, columns}, chunk, false,
                               [&](int i, int j, const auto& sums) {
                                 put_sum(const_cast<float*>(new_mean.at(i, j)), mean.at(i, j), mean.inner, 1, sums,
                                         C - j);
                               });
      scale_rows(chunk, chunk.c);
      add_outer(chunk.cov, width, -1, chunk.count, chunk.c, chunk.c);
      if (threadIdx.x == 0) chunk.mean = new_mean;
      __syncthreads();
    }
    if (chunk.state)
      store_rows(shared.new_mean, b, K, C, chunk.state, columns);
    else if (shared.T_ == 0)
      for (int64_t n = threadIdx.x; n < int64_t(K) * C; n += kThreads)
        *element(shared.new_mean, b, n / C, n % C) = *element(shared.mean, b, n / C, n % C);
    for (int64_t n = threadIdx.x; n < int64_t(K) * K; n += kThreads)
      *element(shared.new_cov, b, n / K, n % K) = chunk.cov[n / K * width + n % K];
    if (threadIdx.x == 0) shared.info[b] = chunk.status;
    __syncthreads();
  }
}

template <bool kAfresh>
const char* start(const WritingArgs<float>& args, int64_t B, cuda::Context& context) {
  const Device device = current_device();
  Workspace workspace = measure<Forward>(device, [&](Forward& head, Space& space) { lay_out(head, space, args); });
  const int64_t blocks = min(B, resident_blocks(device, write_kernel<kAfresh>, workspace));
  if (workspace.block_floats > 0) workspace.data = context.allocate(context, blocks * workspace.block_floats);
  return launch(write_kernel<kAfresh>, blocks, kThreads, workspace.shared_bytes(), context.stream, args, B, workspace);
}

}  // namespace

const char* cuda::write(const WritingArgs<float>& args, int64_t B, Context& context) {
  if (B == 0) return nullptr;
  return factors_once(args) ? start<false>(args, B, context) : start<true>(args, B, context);
}

}  // namespace fastkm
