// Backward of filter_posterior on a GPU: one launch, one thread block a memory, from the last chunk to the first.
//
// S̄ sums over all columns of the values in every chunk, so that thread blocks that shared a memory would have to meet
// in every chunk. A first pass goes through the sequence and keeps the memory at the start of each segment of 16 steps,
// in the workspace. A second pass goes back: it takes a segment's memory, with forgetting keeps those of the segment's
// chunks too, computes each chunk again and pulls the cotangents through it.
//
// Bytes a memory: inputs and cotangents are read once, W and Z a second time in the first pass, and the gradients are
// written once. K (K + C) numbers a segment go to the workspace and come back. While U, R and their cotangents fit on
// chip, K = C = 64 in 151 KiB and K = 64, C = 128 in 199 KiB, nothing else does.
//
// The equations are those of chunk_backward.cuh and decay_backward.cuh.
#include "cuda/filtering/decay_backward.cuh"
#include "cuda/linalg/symmetric.cuh"

namespace fastkm {
namespace {

__host__ __device__ inline int64_t count_segments(int64_t T) { return (T + kChunk - 1) / kChunk; }

// The buffers of a thread block, most used first.
__host__ __device__ void lay_out(FilterBackward& chunk, Arena& arena, const FilteringArgs<float>& args) {
  set_sizes(chunk, args, 0, args.posterior.C);
  const int64_t rows = kChunk * chunk.width, codes = kChunk * chunk.columns;
  const int64_t square = int64_t(chunk.width) * chunk.width, mean = int64_t(chunk.K) * chunk.columns;
  chunk.inputs = arena.allocate(2 * rows);
  chunk.projected = arena.allocate(2 * rows);
  chunk.gain = arena.allocate(rows);
  chunk.residual = arena.allocate(2 * codes);
  chunk.to_projected = arena.allocate(2 * rows);
  chunk.to_inputs = arena.allocate(2 * rows);
  chunk.to_gain = arena.allocate(rows);
  chunk.to_values = arena.allocate(2 * codes);
  chunk.cov = arena.allocate(square);
  chunk.grad_cov = arena.allocate(square);
  chunk.mean = arena.allocate(mean);
  chunk.grad_mean = arena.allocate(mean);
  chunk.plain = chunk.retains ? arena.allocate(2 * rows) : nullptr;
  const int64_t memories = count_segments(args.posterior.T) + (chunk.forgets ? kChunk : 0);
  chunk.saved = arena.allocate_global(memories * (square + mean));
}

// Memory `n` of those that are kept: to its place, or back from it.
__device__ void keep_memory(const FilterBackward& chunk, int64_t n, bool back) {
  const int64_t square = int64_t(chunk.width) * chunk.width, mean = int64_t(chunk.K) * chunk.columns;
  float* const at = chunk.saved + n * (square + mean);
  copy(back ? chunk.cov : at, back ? at : chunk.cov, square);
  copy(back ? chunk.mean : at + square, back ? at + square : chunk.mean, mean);
}

// The memory before the first step, and the cotangents of the one after the last.
__device__ void load_memory(FilterBackward& chunk, const FilteringArgs<float>& args, const FilteringGrads<float>& grads,
                            int64_t b) {
  const int K = chunk.K, C = chunk.C, width = chunk.width, columns = chunk.columns;
  const PosteriorGrads<float>& given = grads.posterior;
  load_rows(chunk.cov, K, K, width, width, operand_of(args.posterior.cov, b));
  load_rows(chunk.mean, K, C, K, columns, operand_of(args.posterior.mean, b));
  load_rows(chunk.grad_cov, given.cov.data ? K : 0, K, width, width, operand_of(given.cov, b));
  load_rows(chunk.grad_mean, given.mean.data ? K : 0, C, K, columns, operand_of(given.mean, b));
  if (threadIdx.x == 0) chunk.to_prior_var = 0;
  __syncthreads();
  symmetrise(chunk.grad_cov, K, width);
}

// The memory after a chunk, in the place of the one before it.
__device__ void pass_chunk(FilterBackward& chunk, const FilteringArgs<float>& args, int64_t b, int64_t first,
                           int count) {
  load_steps(chunk, args, b, first, count);
  project_steps<kWeights>(chunk);
  factor_steps(chunk);
  find_gain(chunk);
  find_errors<kAnyCores, kWeights>(chunk, args, b);
  advance_memory<kAnyCores>(chunk);
  __syncthreads();
}

// The first pass. Leaves the memory at the start of the last segment.
__device__ void keep_segments(FilterBackward& chunk, const FilteringArgs<float>& args, int64_t b) {
  const int64_t last = (count_segments(args.posterior.T) - 1) * kChunk;
  for (int64_t first = 0; first < last;) {
    if (first % kChunk == 0) keep_memory(chunk, first / kChunk, false);
    const int count = chunk_size(args, b, first);
    pass_chunk(chunk, args, b, first, count);
    first += count;
  }
}

// Where the chunks of the segment start that begins at `first`; returns how many there are. Leaves the memory at the
// start of the last one, and keeps those of the others.
__device__ int keep_chunks(FilterBackward& chunk, const FilteringArgs<float>& args, int64_t b, int64_t first) {
  const int64_t end = min(first + kChunk, args.posterior.T), segments = count_segments(args.posterior.T);
  int chunks = 0;
  for (int64_t at = first; at < end; ++chunks) {
    const int count = chunk_size(args, b, at);
    if (threadIdx.x == 0) chunk.starts[chunks] = static_cast<int>(at - first);
    if (at + count < end) {
      keep_memory(chunk, segments + chunks, false);
      pass_chunk(chunk, args, b, at, count);
    }
    at += count;
  }
  if (threadIdx.x == 0) chunk.starts[chunks] = static_cast<int>(end - first);
  __syncthreads();
  return chunks;
}

// The gradients of weights, queries, values and noise. Nothing flows back to a pattern that is masked.
__device__ void store_steps(FilterBackward& chunk, const FilteringGrads<float>& grads, int64_t b) {
  const int width = chunk.width, columns = chunk.columns, across = width / 4, across_values = columns / 4;
  for (int n = threadIdx.x; n < 2 * chunk.count * across; n += kThreads) {
    const int t = n / across % chunk.count, k = n % across * 4;
    const bool query = n / across >= chunk.count;
    float entries[4];
    load_columns(chunk.to_inputs + ((query ? kChunk : 0) + t) * width + k, 1, entries,
                 query || chunk.written[t] ? 4 : 0);
    float* const to = query ? element(grads.to_queries, b, chunk.first + t, k)
                            : element(grads.posterior.to_weights, b, chunk.first + t, k);
    store_columns(to, entries, chunk.K - k);
  }
  for (int n = threadIdx.x; n < chunk.count * across_values; n += kThreads) {
    const int t = n / across_values, c = n % across_values * 4;
    float entries[4];
    load_columns(chunk.to_values + t * columns + c, 1, entries, chunk.written[t] ? 4 : 0);
#pragma unroll
    for (int k = 0; k < 4; ++k) entries[k] *= -chunk.value_scale[t];
    store_columns(element(grads.posterior.to_values, b, chunk.first + t, c), entries, chunk.C - c);
  }
  const int t = threadIdx.x;
  if (t >= chunk.count) return;
  *element(grads.posterior.to_noise_var, b, chunk.first + t) =
      chunk.to_squares[t][t] + (chunk.explained[t] > 0 ? 0 : chunk.to_innovation[t]);
}

// One chunk, from the memory before it.
__device__ void filter_chunk_backward(FilterBackward& chunk, const FilteringArgs<float>& args,
                                      const FilteringGrads<float>& grads, int64_t b, int64_t first, int count) {
  load_steps(chunk, args, b, first, count);
  project_steps<kAllRows>(chunk);
  factor_steps(chunk);
  find_gain(chunk);
  find_read_gain(chunk);
  find_errors<kAnyCores, kAllRows>(chunk, args, b);
  if (chunk.forgets) find_reads<kAnyCores>(chunk);

  load_reported(chunk, grads, b);
  begin_decay(chunk);
  back_through_memory(chunk);
  back_through_factor(chunk);
  if (chunk.forgets) back_through_values_scale(chunk, args, b);
  if (chunk.retains) back_through_relaxation(chunk);
  back_through_projections(chunk);
  back_to_memory(chunk);
  if (chunk.retains || chunk.forgets) back_through_inputs_scale(chunk);
  if (chunk.retains) {
    back_through_drift(chunk);
    add_drift_rows(chunk);
  }
  if (chunk.retains || chunk.forgets)
    store_decay_cotangents(chunk, chunk.retains ? grads.to_retention : grads.to_forgetting, b);
  store_steps(chunk, grads, b);
  __syncthreads();
}

__device__ void filter_memory_backward(FilterBackward& chunk, const FilteringArgs<float>& args,
                                       const FilteringGrads<float>& grads, int64_t b) {
  const int64_t segments = count_segments(args.posterior.T);
  load_memory(chunk, args, grads, b);
  keep_segments(chunk, args, b);
  for (int64_t segment = segments - 1; segment >= 0; --segment) {
    const int64_t first = segment * kChunk;
    if (segment + 1 < segments) keep_memory(chunk, segment, true);
    const int chunks = keep_chunks(chunk, args, b, first);
    for (int n = chunks - 1; n >= 0; --n) {
      if (n + 1 < chunks) keep_memory(chunk, segments + n, true);
      const int start = chunk.starts[n], count = chunk.starts[n + 1] - start;
      filter_chunk_backward(chunk, args, grads, b, first + start, count);
    }
  }
  store_rows(grads.posterior.to_mean, b, chunk.K, chunk.C, chunk.grad_mean, chunk.columns);
  store_symmetrised(grads.posterior.to_cov, b, chunk.grad_cov, chunk.K, chunk.width);
  if (threadIdx.x == 0) *element(grads.to_prior_var, b) = static_cast<float>(chunk.to_prior_var);
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads, 1)
    filter_backward_kernel(FASTKM_IN_PLACE FilteringArgs<float> args, FASTKM_IN_PLACE FilteringGrads<float> grads,
                           int64_t B, FASTKM_IN_PLACE Workspace workspace) {
  FilterBackward& chunk = *reinterpret_cast<FilterBackward*>(dynamic_shared());
  if (threadIdx.x == 0) {
    Arena arena = arena_behind<FilterBackward>(workspace);
    lay_out(chunk, arena, args);
    chunk.precision = args.posterior.precision;
  }
  __syncthreads();
  for (int64_t b = blockIdx.x; b < B; b += gridDim.x) filter_memory_backward(chunk, args, grads, b);
}

}  // namespace

const char* cuda::filter_posterior_backward(const FilteringArgs<float>& args, const FilteringGrads<float>& grads,
                                            int64_t B, Context& context) {
  if (B == 0) return nullptr;
  const Device device = current_device();
  const auto layout = [&](FilterBackward& head, Arena& arena) { lay_out(head, arena, args); };
  Workspace workspace = measure_workspace<FilterBackward>(device, layout);
  const int64_t blocks = min(B, resident_blocks(device, filter_backward_kernel, workspace));
  if (workspace.block_floats > 0) workspace.data = context.allocate(context, blocks * workspace.block_floats);
  return launch(filter_backward_kernel, blocks, kThreads, workspace.shared_bytes(), context.stream, args, grads, B,
                workspace);
}

}  // namespace fastkm
