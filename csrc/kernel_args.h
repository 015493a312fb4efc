// The contract between bindings/, cpu/ and cuda/: the arguments of every kernel, and the table of the CPU kernels.
//
// A binding checks torch tensors, fills a struct of arguments and calls a kernel with it. A kernel computes from that
// alone; it knows nothing of torch, and cpu/ and cuda/ know nothing of each other. What an operation computes is said
// in the kernel's own file, under the same name in both wings.
//
// Letters as in fastkm/state.py: B memories, T patterns, Q queries, K rows of a memory, C columns of a code. A comment
// after a field gives its shape.
#pragma once

#include <cstdint>

// Such flags drop NaN and reorder sums. GCC 11 and clang do not tell of -funsafe-math-optimizations alone.
#if defined(__FAST_MATH__) || __FINITE_MATH_ONLY__ > 0 || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__)
#error \
    "fastkm: remove -Ofast, -ffast-math and their parts from CXXFLAGS and CFLAGS; they drop checks for NaN and digits"
#endif

namespace fastkm {

// A batch of matrices in the caller's memory, with any strides. Vectors are matrices of one column. A null `data` means
// that the argument is missing.
template <class Real>
struct Batch {
  Real* data = nullptr;
  int64_t stride[3] = {0, 0, 0};  // memory, row, column; in elements

  Real* at(int64_t b, int64_t row = 0, int64_t column = 0) const {
    return data + b * stride[0] + row * stride[1] + column * stride[2];
  }
  Batch from_row(int64_t row) const { return {at(0, row), {stride[0], stride[1], stride[2]}}; }
};

// How a GPU rounds products with codes: an index into PRECISIONS of fastkm/_runtime/options.py. A CPU always does as
// kIeee.
enum Precision : int64_t { kIeee = 0, kTf32x3 = 1, kTf32 = 2 };

// The type of codes: that of the memory, or a type of 16 bits beside a memory of float32. On a CPU only reads take the
// latter. A pointer to such codes has the type of the memory; its strides count elements.
enum Element : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// What a kernel reports of each memory, in `info`. fastkm/_runtime/status.py turns it into words.
enum Status : int32_t {
  kGood = 0,
  kAsymmetric = 1,
  kNotPositiveDefinite = 2,
  kLost = 3,
  kOutOfRange = 4,
  kNotWritten = 5,
  kUntold = 6
};

// An update of memories with given weights. It is part of a write too.
template <class Real>
struct PosteriorArgs {
  int64_t K, C, T;
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
  Real* log_evidence = nullptr;  // [B]; a write has none
  int32_t* info = nullptr;       // [B]
  bool keeps_refused = false;    // whether a memory that is refused comes out as it came in
  int64_t precision = kIeee;
  int64_t weights_type = kFloat32, values_type = kFloat32;  // Element; only a GPU reads it

  bool unmasked(int64_t b, int64_t t) const { return !mask.data || *mask.at(b, t); }
};

// The backward of an update: cotangents of its results, where null means zero, and the cotangents of its arguments,
// which it computes. It reads no results of the update.
template <class Real>
struct PosteriorGrads {
  Batch<const Real> mean, cov;           // [B, K, C], [B, K, K]
  Batch<const Real> innovation_var, kl;  // [B, T]
  Batch<const Real> log_evidence;        // [B]
  Batch<Real> to_mean, to_cov;           // like mean and cov
  Batch<Real> to_weights, to_values;     // [B, T, K], [B, T, C]
  Batch<Real> to_noise_var;              // [B, T]
};

// Patterns that take the place of others: `posterior` has the new ones, and no reports.
template <class Real>
struct ReplacingArgs {
  PosteriorArgs<Real> posterior;
  Batch<const Real> old_weights;    // [B, T, K]
  Batch<const Real> old_values;     // [B, T, C]
  Batch<const Real> old_noise_var;  // [B, T]
};

// A write. Its forward finds the weights, so `posterior.weights` is null; its backward reads the weights there that the
// forward found.
template <class Real>
struct WritingArgs {
  PosteriorArgs<Real> posterior;
  Batch<const Real> ridge;  // [B]
  int64_t num_opt_iters;
  bool squared_gram;
  Batch<Real> new_weights;  // [B, T, K]
};

// A write of which only inner products are known. Its `posterior` has no mean, no values and no new mean; C counts the
// columns that were summed over.
template <class Real>
struct GramWritingArgs {
  WritingArgs<Real> writing;
  Batch<const Real> gram;  // [B, K + T, K + T], Y Yᵀ with the rows of the mean and the patterns in Y
  Batch<Real> pivots;      // [B, K + T], or null
};

// The backward of a write.
template <class Real>
struct WritingGrads {
  PosteriorGrads<Real> posterior;  // without log_evidence and to_weights
  Batch<const Real> weights;       // [B, T, K]
  Batch<Real> to_ridge;            // [B]
};

// A filter: every step of a sequence updates the memory and reads it. `posterior` has no kl.
template <class Real>
struct FilteringArgs {
  PosteriorArgs<Real> posterior;
  Batch<const Real> queries;                // [B, T, K]
  Batch<const Real> retention, forgetting;  // [B, T], or null; at most one of them is given
  Batch<const Real> prior_var;              // [B]
  bool read_before;
  Batch<Real> read_values;          // [B, T, C]
  Batch<Real> variance;             // [B, T]
  int64_t queries_type = kFloat32;  // Element; only a GPU reads it

  // The factor of a step: 1 without decay, and where the step is masked.
  Real decay(const Batch<const Real>& factors, int64_t b, int64_t t) const {
    return factors.data && posterior.unmasked(b, t) ? *factors.at(b, t) : 1;
  }
};

// The backward of a filter.
template <class Real>
struct FilteringGrads {
  PosteriorGrads<Real> posterior;           // without kl
  Batch<const Real> read_values;            // [B, T, C]
  Batch<const Real> variance;               // [B, T]
  Batch<Real> to_queries;                   // [B, T, K]
  Batch<Real> to_retention, to_forgetting;  // [B, T], or null like the arguments
  Batch<Real> to_prior_var;                 // [B]
};

// A read: addressing, iterated, and the values at the address. Addressing alone is one iteration without values.
template <class Real>
struct ReadingArgs {
  int64_t K, C, Q;
  Batch<const Real> mean;     // [B, K, C]
  Batch<const Real> queries;  // [B, Q, C]
  Batch<const Real> ridge;    // [B]
  int64_t num_iters;
  bool squared_gram;
  Batch<Real> values;       // [B, Q, C], or null for addressing alone
  Batch<Real> weights;      // [B, Q, K]
  int32_t* info = nullptr;  // [B]
  int64_t precision = kIeee;
  int64_t queries_type = kFloat32, values_type = kFloat32;  // Element; values_type belongs to `values`
};

// What addressing needs of memories, computed once for many reads; A and G as in cpu/reading/read.h.
template <class Real>
struct AddressingFactors {
  Batch<Real> lower;          // [B, K, K], L with L Lᵀ = A, zero above its diagonal
  Batch<Real> pseudoinverse;  // [B, C, K], Rᵀ A⁻¹, or Rᵀ G A⁻¹
  Batch<Real> gram;           // [B, K, K], G, or null if the solve is not the squared-Gram one
};

// The backward of a read: cotangents of its results, where null means zero, and those of its arguments.
template <class Real>
struct ReadingGrads {
  Batch<const Real> values, weights;  // [B, Q, C], [B, Q, K]
  Batch<Real> to_mean, to_queries;    // [B, K, C], [B, Q, C]
  Real* to_ridge = nullptr;           // [B]
};

// The divergence of memories from their priors, or the log-determinant of their covariances.
template <class Real>
struct MatrixNormalArgs {
  int64_t K, C;
  Batch<const Real> mean, cov;              // [B, K, C], [B, K, K]
  Batch<const Real> prior_mean, prior_cov;  // likewise; null for ln|cov|, which does not read `mean` either
  Real* result = nullptr;                   // [B], KL or ln|cov|
  int32_t* info = nullptr;                  // [B]
};

// The backward of either: the cotangent of the result, and those of the arguments that the operation has.
template <class Real>
struct MatrixNormalGrads {
  Batch<const Real> result;                 // [B]
  Batch<Real> to_mean, to_cov;              // [B, K, C], [B, K, K]
  Batch<Real> to_prior_mean, to_prior_cov;  // likewise
};

// Patterns that are written to memories in place, one after the other, with H = (R Rᵀ + λI)⁻¹ carried along. Rows of
// the three matrices are padded to a multiple of kStreamPadding numbers, and hold zeros there.
constexpr int64_t kStreamPadding = 16;
template <class Real>
struct StreamingArgs {
  int64_t K, C, T;
  Batch<Real> mean, cov, inverse;  // [B, K, C], [B, K, K], [B, K, K], H
  Batch<const Real> weights;       // [B, T, K], or null if the kernel finds them
  Batch<const Real> values;        // [B, T, C]
  Batch<const Real> noise_var;     // [B]
  Batch<const Real> ridge;         // [B]
  Batch<const bool> mask;          // [B, T], or null
  int64_t num_opt_iters;
  Batch<Real> new_weights;         // [B, T, K]
  Batch<Real> innovation_var, kl;  // [B, T]
  Real* log_evidence = nullptr;    // [B]
  Batch<int32_t> info;             // [B, T]
  Batch<int64_t> refreshes;        // [B], how often H was computed anew is added

  bool unmasked(int64_t b, int64_t t) const { return !mask.data || *mask.at(b, t); }
};

// Threads that share the work inside a memory. `share` calls part(context, begin, end) for disjoint parts that cover
// [0, count), and returns when all of them have returned.
using Part = void (*)(const void* context, int64_t begin, int64_t end);
struct Team {
  int64_t threads;
  void (*share)(int64_t count, Part part, const void* context);
};

// The team of the calling thread; null if it works alone, which is the default. Kernels ask for it; a caller that has
// more threads than memories sets it around a kernel.
const Team*& current_team();

// The CPU kernels. Each computes memories [begin, end) on the calling thread and its team. A team shares rows and
// columns, never a sum, so results do not depend on the number of threads.
template <class Real>
struct Kernels {
  void (*update_posterior)(const PosteriorArgs<Real>&, int64_t begin, int64_t end);
  void (*write)(const WritingArgs<Real>&, int64_t begin, int64_t end);
  void (*write_gram)(const GramWritingArgs<Real>&, int64_t begin, int64_t end);
  void (*update_posterior_backward)(const PosteriorArgs<Real>&, const PosteriorGrads<Real>&, int64_t begin,
                                    int64_t end);
  void (*write_backward)(const WritingArgs<Real>&, const WritingGrads<Real>&, int64_t begin, int64_t end);
  void (*remove_patterns)(const PosteriorArgs<Real>&, int64_t begin, int64_t end);
  void (*remove_patterns_backward)(const PosteriorArgs<Real>&, const PosteriorGrads<Real>&, int64_t begin, int64_t end);
  void (*replace_patterns)(const ReplacingArgs<Real>&, int64_t begin, int64_t end);
  void (*update_square_root)(const PosteriorArgs<Real>&, int64_t begin, int64_t end);  // `cov` is a root
  void (*update_square_root_backward)(const PosteriorArgs<Real>&, const PosteriorGrads<Real>&, int64_t begin,
                                      int64_t end);
  void (*filter_posterior)(const FilteringArgs<Real>&, int64_t begin, int64_t end);
  void (*filter_posterior_backward)(const FilteringArgs<Real>&, const FilteringGrads<Real>&, int64_t begin,
                                    int64_t end);
  void (*read)(const ReadingArgs<Real>&, int64_t begin, int64_t end);
  void (*factor_addressing)(const ReadingArgs<Real>&, const AddressingFactors<Real>&, int64_t begin, int64_t end);
  void (*read_factored)(const ReadingArgs<Real>&, const AddressingFactors<const Real>&, int64_t begin, int64_t end);
  void (*kl_memory)(const MatrixNormalArgs<Real>&, int64_t begin, int64_t end);
  void (*logdet)(const MatrixNormalArgs<Real>&, int64_t begin, int64_t end);
  void (*read_backward)(const ReadingArgs<Real>&, const ReadingGrads<Real>&, int64_t begin, int64_t end);
  void (*read_factored_backward)(const ReadingArgs<Real>&, const AddressingFactors<const Real>&,
                                 const ReadingGrads<Real>&, int64_t begin, int64_t end);
  void (*kl_memory_backward)(const MatrixNormalArgs<Real>&, const MatrixNormalGrads<Real>&, int64_t begin, int64_t end);
  void (*logdet_backward)(const MatrixNormalArgs<Real>&, const MatrixNormalGrads<Real>&, int64_t begin, int64_t end);
  void (*update_posterior_into)(const PosteriorArgs<Real>&, int64_t begin, int64_t end);  // `new_mean` may be `mean`
  void (*stream_patterns)(const StreamingArgs<Real>&, int64_t begin, int64_t end);
  void (*refresh_streams)(const StreamingArgs<Real>&, int64_t begin, int64_t end);  // H alone; info is [B, 1]
};

// The instruction sets that cpu/ is compiled for, each in a namespace of its own. FASTKM_LEVELS is how many of them
// this build has, the lowest first. A build for a compiler that cannot make the highest defines it as 2 or 1. A
// processor that is not an x86-64 has one level: neon on aarch64, base elsewhere.
#if !defined(__x86_64__)
#undef FASTKM_LEVELS
#define FASTKM_LEVELS 1
#elif !defined(FASTKM_LEVELS)
#define FASTKM_LEVELS 3
#endif
enum Level : int64_t { kLowest = 0, kAvx2 = 1, kAvx512 = 2 };

namespace base {
template <class Real>
const Kernels<Real>& kernels();
}
namespace neon {
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

// The table of the level in use: the highest that this processor has, unless select_level set a lower one. select_level
// returns the level that it chose.
template <class Real>
const Kernels<Real>& kernels();
Level select_level(int64_t limit);

// What this build is made of. The name of the i-th level that was compiled: base or NEON, then AVX2 and AVX-512. It is
// null past the last.
const char* level_name(int64_t i);
// The compiler and its version, as "g++ 12.2.0" or "clang++ 19.1.7".
const char* compiler();

}  // namespace fastkm
