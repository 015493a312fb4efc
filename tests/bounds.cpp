// Every CPU kernel on memory of the caller's that ends where its last row does, under sanitizers: kernels work in the
// caller's own rows, which have no padding. `bounds short` plants a bug: the codes end one entry early.

#include FASTKM_LEVEL_SOURCE

#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "cpu/linalg/arena.cpp"

namespace {

using namespace fastkm;

// Tensors whose memory ends with them.
template <class Real>
class Tensors {
 public:
  Tensors(int64_t B, bool short_codes) : B_(B), short_codes_(short_codes) {}

  Real* filled(int64_t count, double scale, double level = 0) {
    blocks_.push_back(std::make_unique<Real[]>(static_cast<size_t>(B_ * count)));
    std::normal_distribution<double> draw;
    for (int64_t i = 0; i < B_ * count; ++i) blocks_.back()[i] = static_cast<Real>(level + scale * draw(generator_));
    return blocks_.back().get();
  }
  Batch<Real> matrices(int64_t rows, int64_t columns, double scale = 1) {
    return {filled(rows * columns, scale), {rows * columns, columns, 1}};
  }
  Batch<Real> numbers(int64_t count, double scale = 1, double level = 0) {
    return {filled(count, scale, level), {count, 1, 0}};
  }
  Batch<Real> identities(int64_t n) {
    const Batch<Real> batch = matrices(n, n, 0);
    for (int64_t b = 0; b < B_; ++b)
      for (int64_t i = 0; i < n; ++i) *batch.at(b, i, i) = 1;
    return batch;
  }
  Batch<Real> codes(int64_t rows, int64_t C) {
    Batch<Real> batch = matrices(rows, C);
    if (!short_codes_) return batch;
    const size_t count = static_cast<size_t>(B_ * rows * C) - 1;
    blocks_.push_back(std::make_unique<Real[]>(count));
    std::memcpy(blocks_.back().get(), batch.data, count * sizeof(Real));
    batch.data = blocks_.back().get();
    return batch;
  }

 private:
  int64_t B_;
  bool short_codes_;
  std::vector<std::unique_ptr<Real[]>> blocks_;
  std::mt19937 generator_{0};
};

template <class Real>
Batch<const Real> read_only(const Batch<Real>& batch) {
  return {batch.data, {batch.stride[0], batch.stride[1], batch.stride[2]}};
}

template <class Real>
void run(int64_t K, int64_t C, int64_t patterns, int64_t Q, bool masked, bool short_codes) {
  constexpr int64_t B = 2;
  const Kernels<Real>& kernels = FASTKM_LEVEL_NAME::kernels<Real>();
  Tensors<Real> make(B, short_codes);
  std::vector<int32_t> info(B);
  const auto seen = std::make_unique<bool[]>(static_cast<size_t>(B * patterns));
  for (int64_t t = 0; t < B * patterns; ++t) seen[t] = t % 3 > 0;

  PosteriorArgs<Real> update{};
  update.K = K, update.C = C, update.T = patterns;
  update.mean = read_only(make.matrices(K, C, 0.3)), update.cov = read_only(make.identities(K));
  update.weights = read_only(make.matrices(patterns, K, 0.3)), update.values = read_only(make.codes(patterns, C));
  update.noise_var = read_only(make.numbers(patterns, 0, 1));
  if (masked) update.mask = {seen.get(), {patterns, 1, 0}};
  update.new_mean = make.matrices(K, C), update.new_cov = make.matrices(K, K);
  update.innovation_var = make.numbers(patterns), update.kl = make.numbers(patterns);
  update.log_evidence = make.filled(1, 0), update.info = info.data();
  kernels.update_posterior(update, 0, B);

  PosteriorGrads<Real> grads{};
  grads.mean = read_only(make.matrices(K, C)), grads.cov = read_only(make.matrices(K, K));
  grads.innovation_var = read_only(make.numbers(patterns)), grads.kl = read_only(make.numbers(patterns));
  grads.log_evidence = read_only(make.numbers(1));
  grads.to_mean = make.matrices(K, C), grads.to_cov = make.matrices(K, K);
  grads.to_weights = make.matrices(patterns, K), grads.to_values = make.matrices(patterns, C);
  grads.to_noise_var = make.numbers(patterns);
  kernels.update_posterior_backward(update, grads, 0, B);

  kernels.remove_patterns(update, 0, B);
  kernels.remove_patterns_backward(update, grads, 0, B);
  kernels.replace_patterns({update, update.weights, update.values, update.noise_var}, 0, B);
  kernels.update_square_root(update, 0, B);
  kernels.update_square_root_backward(update, grads, 0, B);

  FilteringArgs<Real> filter{};
  filter.posterior = update, filter.queries = read_only(make.matrices(patterns, K));
  filter.prior_var = read_only(make.numbers(1, 0, 1));
  filter.read_values = make.matrices(patterns, C), filter.variance = make.numbers(patterns);
  FilteringGrads<Real> filter_grads{};
  filter_grads.posterior = grads, filter_grads.read_values = read_only(make.matrices(patterns, C));
  filter_grads.variance = read_only(make.numbers(patterns)), filter_grads.to_queries = make.matrices(patterns, K);
  filter_grads.to_prior_var = make.numbers(1);
  const Batch<const Real> factors = read_only(make.numbers(patterns, 0, Real(0.9)));
  for (const int law : {0, 1, 2}) {
    filter.retention = law == 1 ? factors : Batch<const Real>{};
    filter.forgetting = law == 2 ? factors : Batch<const Real>{};
    filter_grads.to_retention = filter_grads.to_forgetting = law ? make.numbers(patterns) : Batch<Real>{};
    kernels.filter_posterior(filter, 0, B);
    kernels.filter_posterior_backward(filter, filter_grads, 0, B);
  }

  WritingArgs<Real> write{};
  write.posterior = update, write.ridge = read_only(make.numbers(1, 0, 1));
  write.new_weights = make.matrices(patterns, K);
  WritingGrads<Real> write_grads{};
  write_grads.posterior = grads, write_grads.posterior.log_evidence = {};
  write_grads.weights = read_only(make.matrices(patterns, K)), write_grads.to_ridge = make.numbers(1);
  for (int64_t solves : {1, 2}) {
    write.num_opt_iters = solves, write.squared_gram = solves > 1;
    kernels.write(write, 0, B);
    kernels.write_backward(write, write_grads, 0, B);
  }

  ReadingArgs<Real> read{};
  read.K = K, read.C = C, read.Q = Q, read.num_iters = 3, read.squared_gram = false;
  read.mean = update.mean, read.queries = read_only(make.codes(Q, C)), read.ridge = write.ridge;
  read.values = make.matrices(Q, C), read.weights = make.matrices(Q, K), read.info = info.data();
  kernels.read(read, 0, B);
  ReadingGrads<Real> read_grads{};
  read_grads.values = read_only(make.matrices(Q, C)), read_grads.weights = read_only(make.matrices(Q, K));
  read_grads.to_mean = make.matrices(K, C), read_grads.to_queries = make.matrices(Q, C);
  read_grads.to_ridge = make.filled(1, 0);
  kernels.read_backward(read, read_grads, 0, B);

  MatrixNormalArgs<Real> divergence{};
  divergence.K = K, divergence.C = C, divergence.mean = update.mean, divergence.cov = update.cov;
  divergence.prior_mean = read_only(make.matrices(K, C)), divergence.prior_cov = read_only(make.identities(K));
  divergence.result = make.filled(1, 0), divergence.info = info.data();
  MatrixNormalGrads<Real> divergence_grads{};
  divergence_grads.result = read_only(make.numbers(1));
  divergence_grads.to_mean = make.matrices(K, C), divergence_grads.to_cov = make.matrices(K, K);
  divergence_grads.to_prior_mean = make.matrices(K, C), divergence_grads.to_prior_cov = make.matrices(K, K);
  kernels.kl_memory(divergence, 0, B);
  kernels.kl_memory_backward(divergence, divergence_grads, 0, B);
  kernels.logdet(divergence, 0, B);
  kernels.logdet_backward(divergence, divergence_grads, 0, B);
}

}  // namespace

int main(int count, char** arguments) {
  const bool short_codes = count > 1 && std::strcmp(arguments[1], "short") == 0;
  // K, C, patterns and queries around whole vectors, chunks and tiles; queries few, and so many that reads fold.
  const int64_t shapes[][4] = {{1, 1, 1, 1},      {3, 5, 2, 7},       {8, 8, 16, 100},    {9, 40, 17, 5},
                               {15, 17, 33, 200}, {16, 16, 16, 80},   {17, 31, 40, 130},  {32, 100, 32, 600},
                               {50, 70, 37, 9},   {128, 128, 33, 20}, {130, 144, 35, 17}, {7, 256, 5, 1100},
                               {32, 16, 1, 4}};
  for (const auto& [K, C, patterns, queries] : shapes)
    for (const bool masked : {false, true}) {
      run<float>(K, C, patterns, queries, masked, short_codes);
      run<double>(K, C, patterns, queries, masked, short_codes);
    }
  std::puts("within bounds");
}
