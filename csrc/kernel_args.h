// What the CPU kernels compute, and the table through which a processor's best build of them is reached.
//
// No torch here: a binding (<family>_binding.cpp) fills the arguments and calls through the table, a kernel
// (<family>_kernel.h) does the mathematics for a range of memories. Letters as in fastkm/state.py: B memories,
// T patterns, Q queries, K rows, C columns.
#pragma once

#include <cstdint>

namespace fastkm {

// A batch of matrices in the caller's memory, with whatever strides it has.
template <class Real>
struct Batch {
  Real* data = nullptr;
  int64_t stride[3] = {0, 0, 0};  // memory, row, column; in elements

  Real* at(int64_t b, int64_t row = 0, int64_t column = 0) const {
    return data + b * stride[0] + row * stride[1] + column * stride[2];
  }
  Batch from_row(int64_t row) const { return {at(0, row), {stride[0], stride[1], stride[2]}}; }
};

// How a GPU may round the products with codes; an index into PRECISIONS of fastkm/_check.py. CPUs are always exact.
enum Precision : int64_t { kIeee = 0, kTf32x3 = 1, kTf32 = 2 };

// What the entries of codes are, on a GPU; on a CPU they are of the memory's type.
enum Element : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// The status of a memory, as fastkm/_check.py reads it.
enum Status : int32_t { kGood = 0, kAsymmetric = 1, kNotPositiveDefinite = 2 };

template <class Real>
struct PosteriorArgs {
  int64_t K, C, T_;
  Batch<const Real> mean;        // [B, K, C]
  Batch<const Real> cov;         // [B, K, K]
  Batch<const Real> weights;     // [B, T, K]
  Batch<const Real> values;      // [B, T, C]
  Batch<const Real> noise_var;   // [B, T]
  Batch<const bool> mask;        // [B, T], or null
  Batch<Real> new_mean;          // [B, K, C]
  Batch<Real> new_cov;           // [B, K, K]
  Batch<Real> innovation_var;    // [B, T]
  Batch<Real> kl;                // [B, T]
  Real* log_evidence = nullptr;  // [B], of an update
  int32_t* info = nullptr;       // [B]
  int64_t precision = kIeee;
  int64_t weights_type = kFloat32, values_type = kFloat32;  // Element, only on a GPU

  bool unmasked(int64_t b, int64_t t) const { return !mask.data || *mask.at(b, t); }
};

// Cotangents of an update's outputs, null where zero, and those of its inputs.
template <class Real>
struct PosteriorGrads {
  Batch<const Real> mean, cov;           // [B, K, C], [B, K, K]
  Batch<const Real> innovation_var, kl;  // [B, T]
  Batch<const Real> log_evidence;        // [B]
  Batch<Real> to_mean, to_cov;           // like mean and cov
  Batch<Real> to_weights, to_values;     // [B, T, K], [B, T, C]
  Batch<Real> to_noise_var;              // [B, T]
};

template <class Real>
struct WritingArgs {
  PosteriorArgs<Real> posterior;  // its weights are not read: they are found here
  Batch<const Real> ridge;        // [B]
  int64_t num_opt_iters;
  bool squared_gram;
  Batch<Real> new_weights;  // [B, T, K]
};

template <class Real>
struct WritingGrads {
  PosteriorGrads<Real> posterior;  // without log_evidence and to_weights
  Batch<const Real> weights;       // [B, T, K]
  Batch<Real> to_ridge;            // [B]
};

template <class Real>
struct ReadingArgs {
  int64_t K, C, Q;
  Batch<const Real> mean;     // [B, K, C]
  Batch<const Real> queries;  // [B, Q, C]
  Batch<const Real> ridge;    // [B]
  int64_t num_iters;
  bool squared_gram;
  Batch<Real> values;       // [B, Q, C], or null: then only the weights are wanted
  Batch<Real> weights;      // [B, Q, K]
  int32_t* info = nullptr;  // [B]
  int64_t precision = kIeee;
  int64_t queries_type = kFloat32;  // Element, only on a GPU
};

// Cotangents of what a read returns, null where zero, and those of its arguments.
template <class Real>
struct ReadingGrads {
  Batch<const Real> values, weights;  // [B, Q, C], [B, Q, K]
  Batch<Real> to_mean, to_queries;    // [B, K, C], [B, Q, C]
  Real* to_ridge = nullptr;           // [B]
};

template <class Real>
struct MatrixNormalArgs {
  int64_t K, C;
  Batch<const Real> mean, cov;              // [B, K, C], [B, K, K]
  Batch<const Real> prior_mean, prior_cov;  // likewise; null where only ln|cov| is wanted
  Real* result = nullptr;                   // [B], KL or ln|cov|
  int32_t* info = nullptr;                  // [B]
};

// Cotangent of the result, and those of the arguments.
template <class Real>
struct MatrixNormalGrads {
  Batch<const Real> result;                 // [B]
  Batch<Real> to_mean, to_cov;              // [B, K, C], [B, K, K]
  Batch<Real> to_prior_mean, to_prior_cov;  // likewise
};

// Every kernel computes memories [begin, end) on the calling thread.
template <class Real>
struct Kernels {
  void (*update_posterior)(const PosteriorArgs<Real>&, int64_t begin, int64_t end);
  void (*write)(const WritingArgs<Real>&, int64_t begin, int64_t end);
  void (*update_posterior_backward)(const PosteriorArgs<Real>&, const PosteriorGrads<Real>&, int64_t begin,
                                    int64_t end);
  void (*write_backward)(const WritingArgs<Real>&, const WritingGrads<Real>&, int64_t begin, int64_t end);
  void (*read_memories)(const ReadingArgs<Real>&, int64_t begin, int64_t end);
  // Reading in two phases, so that many queries of few memories are spread over the threads.
  int64_t (*factor_size)(const ReadingArgs<Real>&);  // elements of one memory's factor
  void (*factor_memories)(const ReadingArgs<Real>&, Real* factors, int64_t begin, int64_t end);
  void (*read_tiles)(const ReadingArgs<Real>&, Real* factors, int64_t begin, int64_t end);  // tiles, not memories
  void (*kl_memory)(const MatrixNormalArgs<Real>&, int64_t begin, int64_t end);
  void (*logdet)(const MatrixNormalArgs<Real>&, int64_t begin, int64_t end);
  void (*read_backward)(const ReadingArgs<Real>&, const ReadingGrads<Real>&, int64_t begin, int64_t end);
  void (*kl_memory_backward)(const MatrixNormalArgs<Real>&, const MatrixNormalGrads<Real>&, int64_t begin, int64_t end);
  void (*logdet_backward)(const MatrixNormalArgs<Real>&, const MatrixNormalGrads<Real>&, int64_t begin, int64_t end);
};

// Queries a tile of `read_tiles`; a batch has B * ceil(Q / kQueryTile) of them.
constexpr int64_t kQueryTile = 64;

// Instruction sets the same source is built for.
enum Level : int64_t { kBase = 0, kAvx2 = 1, kAvx512 = 2 };

namespace base {
template <class Real>
const Kernels<Real>& kernels();
}
namespace avx2 {
template <class Real>
const Kernels<Real>& kernels();
}
namespace avx512 {
template <class Real>
const Kernels<Real>& kernels();
}

// The table of the level in use: the highest this processor runs, unless a lower limit was set.
template <class Real>
const Kernels<Real>& kernels();
Level select_level(int64_t limit);

}  // namespace fastkm
