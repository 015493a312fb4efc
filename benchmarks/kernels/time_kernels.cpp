// Single CPU kernels of one revision, in float32 on the calling thread, timed where torch and Python take no part.
//
// __main__.py builds this file once for each revision, as a library of its own around that revision's source of one
// instruction level (FASTKM_LEVEL_SOURCE), and calls both libraries in turn in one process. Arguments are given by
// position, so that any revision will do whose structs have the same order, whatever it calls their fields.

#include FASTKM_LEVEL_SOURCE
#include FASTKM_ARENA_SOURCE

#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

namespace {

using Real = float;

// Becomes a batch of matrices [B, rows, columns] of whichever revision, read-only or not.
struct Matrices {
  Real* data;
  int64_t rows, columns;

  template <class Batch>
  operator Batch() const {
    return Batch{data, {rows * columns, columns, 1}};
  }
};

// The inputs of every kernel at one size, the results and the cotangents. A result is the cotangent of itself.
class Problem {
 public:
  Problem(int64_t B, int64_t K, int64_t C, int64_t T, int64_t Q) : B(B), K(K), C(C), T(T), Q(Q) {
    for (int64_t i = 0; i < B * K * K; ++i) cov.data[i] = 1.0f / K + (i / K % K == i % K);  // I + 1 1ᵀ / K
    for (int64_t i = 0; i < B; ++i) (*this)("write");  // what the backward of a write takes from it
  }

  // One call of a kernel for every memory; false if there is no kernel of that name.
  bool operator()(const std::string& name) {
    const auto& table = fastkm::FASTKM_LEVEL_NAME::kernels<Real>();
    const auto call = [&](auto kernel, const auto&... args) { kernel(args..., 0, B); };
    using namespace fastkm;
    const Matrices used = name == "write_backward" ? new_weights : weights;
    const PosteriorArgs<Real> update{
        K, C, T, mean, cov, used, values, noise, {}, new_mean, new_cov, variance, kl, evidence.data(), info.data()};
    const WritingArgs<Real> write{update, ridge, 1, false, new_weights};
    const ReadingArgs<Real> read{K, C, Q, mean, queries, ridge, 10, false, read_values, read_weights, info.data()};
    const MatrixNormalArgs<Real> divergence{K, C, mean, cov, new_mean, identity, evidence.data(), info.data()};
    const MatrixNormalArgs<Real> volume{K, C, mean, cov, {}, {}, evidence.data(), info.data()};
    const PosteriorGrads<Real> update_grads{mean,    cov,    noise,      noise,     one,
                                            to_mean, to_cov, to_weights, to_values, to_noise};
    const PosteriorGrads<Real> write_part{mean, cov, noise, noise, {}, to_mean, to_cov, {}, to_values, to_noise};
    const WritingGrads<Real> write_grads{write_part, weights, to_one};
    const ReadingGrads<Real> read_grads{queries, asked, to_mean, to_queries, to_one.data};
    const MatrixNormalGrads<Real> divergence_grads{one, to_mean, to_cov, to_prior_mean, to_prior_cov};
    const MatrixNormalGrads<Real> volume_grads{one, {}, to_cov, {}, {}};

    if (name == "update_posterior") return call(table.update_posterior, update), true;
    if (name == "update_posterior_backward") return call(table.update_posterior_backward, update, update_grads), true;
    if (name == "write") return call(table.write, write), true;
    if (name == "write_backward") return call(table.write_backward, write, write_grads), true;
    if (name == "read") return call(table.read, read), true;
    if (name == "read_backward") return call(table.read_backward, read, read_grads), true;
    if (name == "kl_memory") return call(table.kl_memory, divergence), true;
    if (name == "kl_memory_backward") return call(table.kl_memory_backward, divergence, divergence_grads), true;
    if (name == "logdet") return call(table.logdet, volume), true;
    if (name == "logdet_backward") return call(table.logdet_backward, volume, volume_grads), true;
    return false;
  }

 private:
  int64_t B, K, C, T, Q;
  std::vector<std::vector<Real>> blocks;
  std::mt19937 generator{0};
  std::vector<int32_t> info = std::vector<int32_t>(B);
  std::vector<Real> evidence = std::vector<Real>(B);

  Matrices normal(int64_t rows, int64_t columns, double scale, double level = 0) {
    std::normal_distribution<Real> draw;
    blocks.emplace_back(B * rows * columns);
    for (Real& x : blocks.back()) x = level + scale * draw(generator);
    return {blocks.back().data(), rows, columns};
  }

  Matrices mean = normal(K, C, 1), cov = normal(K, K, 0), weights = normal(T, K, 1 / std::sqrt(K));
  Matrices values = normal(T, C, 1), queries = normal(Q, C, 1), asked = normal(Q, K, 1);
  Matrices noise = normal(T, 1, 0, 1), ridge = normal(1, 1, 0, 1), one = normal(1, 1, 0, 1);
  Matrices new_mean = normal(K, C, 1), new_cov = normal(K, K, 0), variance = normal(T, 1, 0), kl = normal(T, 1, 0);
  Matrices new_weights = normal(T, K, 0), read_values = normal(Q, C, 0), read_weights = normal(Q, K, 0);
  Matrices to_mean = normal(K, C, 0), to_cov = normal(K, K, 0), to_weights = normal(T, K, 0);
  Matrices to_values = normal(T, C, 0), to_noise = normal(T, 1, 0), to_queries = normal(Q, C, 0);
  Matrices to_prior_mean = normal(K, C, 0), to_prior_cov = normal(K, K, 0), to_one = normal(1, 1, 0);
  Matrices identity = identities();

  Matrices identities() {
    const Matrices made = normal(K, K, 0);
    for (int64_t i = 0; i < B * K; ++i) made.data[i * K + i % K] = 1;
    return made;
  }
};

}  // namespace

// Seconds a call of a kernel on `sizes` (B, K, C, T, Q); negative if there is no such kernel.
extern "C" __attribute__((visibility("default"))) double seconds_a_call(const char* name, const int64_t* sizes,
                                                                        int64_t calls) {
  static std::map<std::vector<int64_t>, Problem> problems;
  const std::vector<int64_t> key(sizes, sizes + 5);
  Problem& problem = problems.try_emplace(key, key[0], key[1], key[2], key[3], key[4]).first->second;
  const std::string kernel = name;
  if (!problem(kernel)) return -1;  // the call that is not timed
  const auto begin = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < calls; ++i) problem(kernel);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / calls;
}
