// What the CPU kernels compute, and the table through which a processor's best build of them is reached.
//
// No torch here: a binding (<family>_binding.cpp) fills the arguments and calls through the table, a kernel
// (<family>_kernel.h) does the mathematics for a range of memories. Letters as in fastkm/state.py: B memories,
// T patterns, Q queries, K rows, C columns.
#pragma once

#include <cstdint>

namespace fastkm {

// A batch of matrices in the caller's memory, with whatever strides it has.
template <class T>
struct Batch {
  T* data = nullptr;
  int64_t stride[3] = {0, 0, 0};  // memory, row, column; in elements

  T* at(int64_t b, int64_t row = 0, int64_t column = 0) const {
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

template <class T>
struct PosteriorArgs {
  int64_t K, C, T_;
  Batch<const T> mean;        // [B, K, C]
  Batch<const T> cov;         // [B, K, K]
  Batch<const T> weights;     // [B, T, K]
  Batch<const T> values;      // [B, T, C]
  Batch<const T> noise_var;   // [B, T]
  Batch<const bool> mask;     // [B, T], or null
  Batch<T> new_mean;          // [B, K, C]
  Batch<T> new_cov;           // [B, K, K]
  Batch<T> innovation_var;    // [B, T]
  Batch<T> kl;                // [B, T]
  T* log_evidence = nullptr;  // [B], of an update
  int32_t* info = nullptr;    // [B]
  int64_t precision = kIeee;
  int64_t weights_type = kFloat32, values_type = kFloat32;  // Element, only on a GPU

  bool seen(int64_t b, int64_t t) const { return !mask.data || *mask.at(b, t); }
};

// Cotangents of an update's outputs, null where zero, and those of its inputs.
template <class T>
struct PosteriorGrads {
  Batch<const T> mean, cov;           // [B, K, C], [B, K, K]
  Batch<const T> innovation_var, kl;  // [B, T]
  Batch<const T> log_evidence;        // [B]
  Batch<T> to_mean, to_cov;           // like mean and cov
  Batch<T> to_weights, to_values;     // [B, T, K], [B, T, C]
  Batch<T> to_noise_var;              // [B, T]
};

template <class T>
struct WritingArgs {
  PosteriorArgs<T> posterior;  // its weights are not read: they are found here
  Batch<const T> ridge;        // [B]
  int64_t num_opt_iters;
  bool squared_gram;
  Batch<T> new_weights;  // [B, T, K]
};

template <class T>
struct WritingGrads {
  PosteriorGrads<T> posterior;  // without log_evidence and to_weights
  Batch<const T> weights;       // [B, T, K]
  Batch<T> to_ridge;            // [B]
};

template <class T>
struct ReadingArgs {
  int64_t K, C, Q;
  Batch<const T> mean;     // [B, K, C]
  Batch<const T> queries;  // [B, Q, C]
  Batch<const T> ridge;    // [B]
  int64_t num_iters;
  bool squared_gram;
  Batch<T> values;          // [B, Q, C], or null: then only the weights are wanted
  Batch<T> weights;         // [B, Q, K]
  int32_t* info = nullptr;  // [B]
  int64_t precision = kIeee;
  int64_t queries_type = kFloat32;  // Element, only on a GPU
};

// Cotangents of what a read returns, null where zero, and those of its arguments.
template <class T>
struct ReadingGrads {
  Batch<const T> values, weights;  // [B, Q, C], [B, Q, K]
  Batch<T> to_mean, to_queries;    // [B, K, C], [B, Q, C]
  T* to_ridge = nullptr;           // [B]
};

template <class T>
struct MatrixNormalArgs {
  int64_t K, C;
  Batch<const T> mean, cov;              // [B, K, C], [B, K, K]
  Batch<const T> prior_mean, prior_cov;  // likewise; null where only ln|cov| is wanted
  T* result = nullptr;                   // [B], KL or ln|cov|
  int32_t* info = nullptr;               // [B]
};

// Cotangent of the result, and those of the arguments.
template <class T>
struct MatrixNormalGrads {
  Batch<const T> result;                 // [B]
  Batch<T> to_mean, to_cov;              // [B, K, C], [B, K, K]
  Batch<T> to_prior_mean, to_prior_cov;  // likewise
};

// Every kernel computes memories [begin, end) on the calling thread.
template <class T>
struct Kernels {
  void (*update_posterior)(const PosteriorArgs<T>&, int64_t begin, int64_t end);
  void (*write)(const WritingArgs<T>&, int64_t begin, int64_t end);
  void (*update_posterior_backward)(const PosteriorArgs<T>&, const PosteriorGrads<T>&, int64_t begin, int64_t end);
  void (*write_backward)(const WritingArgs<T>&, const WritingGrads<T>&, int64_t begin, int64_t end);
  void (*read_memories)(const ReadingArgs<T>&, int64_t begin, int64_t end);
  // Reading in two phases, so that many queries of few memories are spread over the threads.
  int64_t (*factor_size)(const ReadingArgs<T>&);  // elements of one memory's factor
  void (*factor_memories)(const ReadingArgs<T>&, T* factors, int64_t begin, int64_t end);
  void (*read_tiles)(const ReadingArgs<T>&, T* factors, int64_t begin, int64_t end);  // tiles, not memories
  void (*kl_memory)(const MatrixNormalArgs<T>&, int64_t begin, int64_t end);
  void (*logdet)(const MatrixNormalArgs<T>&, int64_t begin, int64_t end);
  void (*read_backward)(const ReadingArgs<T>&, const ReadingGrads<T>&, int64_t begin, int64_t end);
  void (*kl_memory_backward)(const MatrixNormalArgs<T>&, const MatrixNormalGrads<T>&, int64_t begin, int64_t end);
  void (*logdet_backward)(const MatrixNormalArgs<T>&, const MatrixNormalGrads<T>&, int64_t begin, int64_t end);
};

// Queries a tile of `read_tiles`; a batch has B * ceil(Q / kQueryTile) of them.
constexpr int64_t kQueryTile = 64;

// Instruction sets the same source is built for.
enum Level : int64_t { kBase = 0, kAvx2 = 1, kAvx512 = 2 };

namespace base {
template <class T>
const Kernels<T>& kernels();
}
namespace avx2 {
template <class T>
const Kernels<T>& kernels();
}
namespace avx512 {
template <class T>
const Kernels<T>& kernels();
}

// The table of the level in use: the highest this processor runs, unless a lower limit was set.
template <class T>
const Kernels<T>& kernels();
Level select_level(int64_t limit);

}  // namespace fastkm
