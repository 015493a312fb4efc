// Runs every launcher on two shapes, for the sanitizers. Which bytes a kernel touches, and in which order, does not
// depend on the values. Every result must be written and finite.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cuda/kernels.h"

using namespace fastkm;

namespace {

std::mt19937 random_bits(0);

// A tensor on the heap of exactly its size, so that a sanitizer sees accesses beside it. It holds NaN at first.
struct Array {
  int64_t size[3];
  float* data;

  Array(int64_t a, int64_t b = 1, int64_t c = 1) : size{a, b, c}, data(new float[a * b * c]) {
    for (int64_t i = 0; i < a * b * c; ++i) data[i] = NAN;
  }
  Array(const Array&) = delete;
  ~Array() { delete[] data; }

  int64_t count() const { return size[0] * size[1] * size[2]; }
  Array& draw(float scale) {
    std::normal_distribution<float> normal(0, scale);
    for (int64_t i = 0; i < count(); ++i) data[i] = normal(random_bits);
    return *this;
  }
  Array& fill(float value) {
    for (int64_t i = 0; i < count(); ++i) data[i] = value;
    return *this;
  }
  Array& diagonal(float value) {
    for (int64_t i = 0; i < count(); ++i) data[i] = i / size[2] % size[1] == i % size[2] ? value : 0.01f;
    return *this;
  }
  Batch<float> batch() const { return {data, {size[1] * size[2], size[2], 1}}; }
  Batch<const float> read() const { return {data, {size[1] * size[2], size[2], 1}}; }
};

void* allocated[16];
int allocations = 0;

float* allocate(cuda::Context&, int64_t floats) {
  float* memory = new float[floats];
  for (int64_t i = 0; i < floats; ++i) memory[i] = NAN;
  allocated[allocations++] = memory;
  return memory;
}

void expect(const char* operation, const char* error, std::initializer_list<const Array*> results) {
  while (allocations > 0) delete[] static_cast<float*>(allocated[--allocations]);
  for (const Array* result : results)
    for (int64_t i = 0; !error && i < result->count(); ++i)
      if (!std::isfinite(result->data[i])) error = "a result is missing";
  if (!error) return;
  std::printf("%s: %s\n", operation, error);
  std::exit(1);
}

// Sizes of a call, and the memory and patterns that all operations share.
struct Case {
  int64_t B, T, Q, K, C;
  bool masked;
  int64_t precision;
  Array mean{B, K, C}, cov{B, K, K}, weights{B, T, K}, values{B, T, C}, noise{B, T}, ridge{B}, queries{B, Q, C};
  // Results that several operations write.
  Array new_mean{B, K, C}, new_cov{B, K, K}, s{B, T}, kl{B, T}, new_weights{B, T, K};
  Array to_mean{B, K, C}, to_cov{B, K, K}, to_weights{B, T, K}, to_values{B, T, C}, to_noise{B, T}, to_ridge{B};
  std::vector<uint8_t> mask = std::vector<uint8_t>(static_cast<size_t>(B * T));
  std::vector<int32_t> info = std::vector<int32_t>(static_cast<size_t>(B));
  cuda::Context context{nullptr, allocate};

  void draw() {
    mean.draw(0.3f);
    cov.diagonal(1.5f);
    weights.draw(0.3f);
    values.draw(1);
    noise.fill(0.7f);
    ridge.fill(0.9f);
    queries.draw(1);
    for (size_t i = 0; i < mask.size(); ++i) mask[i] = i % 3 != 1;
  }
  Batch<float> by_pattern(const Array& array) const { return {array.data, {T, 1, 0}}; }
  Batch<const float> read_by_pattern(const Array& array) const { return {array.data, {T, 1, 0}}; }
};

PosteriorArgs<float> posterior_args(Case& c) {
  PosteriorArgs<float> args{};
  args.K = c.K;
  args.C = c.C;
  args.T = c.T;
  args.mean = c.mean.read();
  args.cov = c.cov.read();
  args.weights = c.weights.read();
  args.values = c.values.read();
  args.noise_var = c.read_by_pattern(c.noise);
  if (c.masked) args.mask = {reinterpret_cast<const bool*>(c.mask.data()), {c.T, 1, 0}};
  args.new_mean = c.new_mean.batch();
  args.new_cov = c.new_cov.batch();
  args.innovation_var = c.by_pattern(c.s);
  args.kl = c.by_pattern(c.kl);
  args.info = c.info.data();
  args.precision = c.precision;
  return args;
}

PosteriorGrads<float> posterior_grads(Case& c) {
  PosteriorGrads<float> grads{};
  grads.mean = c.new_mean.read();
  grads.cov = c.new_cov.read();
  grads.kl = c.read_by_pattern(c.kl);
  grads.to_mean = c.to_mean.batch();
  grads.to_cov = c.to_cov.batch();
  grads.to_weights = c.to_weights.batch();
  grads.to_values = c.to_values.batch();
  grads.to_noise_var = c.by_pattern(c.to_noise);
  return grads;
}

// Less than any memory holds, so that every factor exists.
void run_removal(Case& c, const PosteriorGrads<float>& grads) {
  PosteriorArgs<float> removal = posterior_args(c);
  removal.kl = removal.innovation_var = {};
  Array small(c.B, c.T, c.K), evidence(c.B), mean(c.B, c.K, c.C), cov(c.B, c.K, c.K);
  small.draw(0.01f);
  removal.weights = small.read();
  expect("remove_patterns", cuda::remove_patterns(removal, c.B, c.context), {&c.new_mean, &c.new_cov});
  expect("remove_patterns_backward", cuda::remove_patterns_backward(removal, grads, c.B, c.context),
         {&c.to_mean, &c.to_cov, &c.to_weights, &c.to_values, &c.to_noise});
  PosteriorArgs<float> update = posterior_args(c);
  update.log_evidence = evidence.data;
  update.new_mean = mean.batch();
  update.new_cov = cov.batch();
  removal.mean = mean.read();
  removal.cov = cov.read();
  expect("replace_patterns", cuda::replace_patterns(update, removal, c.B, c.context), {&c.new_mean, &c.new_cov});
}

void run_update_and_write(Case& c) {
  PosteriorArgs<float> update = posterior_args(c);
  Array evidence(c.B);
  update.log_evidence = evidence.data;
  expect("update_posterior", cuda::update_posterior(update, c.B, c.context),
         {&c.new_mean, &c.new_cov, &c.s, &c.kl, &evidence});
  const PosteriorGrads<float> grads = posterior_grads(c);
  expect("update_posterior_backward", cuda::update_posterior_backward(update, grads, c.B, c.context),
         {&c.to_mean, &c.to_cov, &c.to_weights, &c.to_values, &c.to_noise});
  run_removal(c, grads);
  for (int64_t num_solves = 1; num_solves <= 2; ++num_solves) {
    WritingArgs<float> write{
        posterior_args(c), {c.ridge.data, {1, 0, 0}}, num_solves, num_solves == 2, c.new_weights.batch()};
    expect("write", cuda::write(write, c.B, c.context), {&c.new_mean, &c.new_cov, &c.new_weights, &c.s, &c.kl});
    write.posterior.weights = c.new_weights.read();
    const WritingGrads<float> write_grads{grads, c.weights.read(), {c.to_ridge.data, {1, 0, 0}}};
    expect("write_backward", cuda::write_backward(write, write_grads, c.B, c.context),
           {&c.to_mean, &c.to_cov, &c.to_values, &c.to_noise, &c.to_ridge});
  }
}

// The law of decay: none, retention or forgetting.
void run_filter(Case& c, int law) {
  Array factors(c.B, c.T), prior_var(c.B), read_values(c.B, c.T, c.C), variance(c.B, c.T), evidence(c.B);
  Array to_queries(c.B, c.T, c.K), to_factors(c.B, c.T), to_prior_var(c.B);
  factors.fill(0.9f);
  prior_var.fill(1.2f);
  FilteringArgs<float> filter{.posterior = posterior_args(c),
                              .queries = c.weights.read(),
                              .retention = law == 1 ? c.read_by_pattern(factors) : Batch<const float>{},
                              .forgetting = law == 2 ? c.read_by_pattern(factors) : Batch<const float>{},
                              .prior_var = {prior_var.data, {1, 0, 0}},
                              .read_before = c.masked,
                              .read_values = read_values.batch(),
                              .variance = c.by_pattern(variance)};
  filter.posterior.log_evidence = evidence.data;
  expect("filter_posterior", cuda::filter_posterior(filter, c.B, c.context),
         {&c.new_mean, &c.new_cov, &read_values, &variance, &c.s, &evidence});
  FilteringGrads<float> grads{.posterior = posterior_grads(c),
                              .read_values = read_values.read(),
                              .variance = c.read_by_pattern(variance),
                              .to_queries = to_queries.batch(),
                              .to_retention = law == 1 ? c.by_pattern(to_factors) : Batch<float>{},
                              .to_forgetting = law == 2 ? c.by_pattern(to_factors) : Batch<float>{},
                              .to_prior_var = {to_prior_var.data, {1, 0, 0}}};
  grads.posterior.kl = {};
  grads.posterior.log_evidence = {evidence.data, {1, 0, 0}};
  if (law == 0) to_factors.fill(0);
  expect("filter_posterior_backward", cuda::filter_posterior_backward(filter, grads, c.B, c.context),
         {&c.to_mean, &c.to_cov, &c.to_weights, &c.to_values, &to_queries, &c.to_noise, &to_factors, &to_prior_var});
}

void run_read(Case& c) {
  Array values(c.B, c.Q, c.C), weights(c.B, c.Q, c.K), to_queries(c.B, c.Q, c.C);
  Array lower(c.B, c.K, c.K), pseudoinverse(c.B, c.C, c.K), gram(c.B, c.K, c.K);
  ReadingArgs<float> read{};
  read.K = c.K;
  read.C = c.C;
  read.Q = c.Q;
  read.mean = c.mean.read();
  read.queries = c.queries.read();
  read.ridge = {c.ridge.data, {1, 0, 0}};
  read.num_iters = 2;
  read.squared_gram = c.masked;
  read.values = values.batch();
  read.weights = weights.batch();
  read.info = c.info.data();
  read.precision = c.precision;
  expect("read", cuda::read(read, c.B, c.context), {&values, &weights});
  const ReadingGrads<float> grads{c.queries.read(), weights.read(), c.to_mean.batch(), to_queries.batch(),
                                  c.to_ridge.data};
  expect("read_backward", cuda::read_backward(read, grads, c.B, c.context), {&c.to_mean, &to_queries, &c.to_ridge});
  ReadingArgs<float> unit_codes = read;
  unit_codes.Q = c.C;
  unit_codes.queries = {};
  unit_codes.values = {};
  unit_codes.num_iters = 1;
  const AddressingFactors<float> made{lower.batch(), pseudoinverse.batch(),
                                      read.squared_gram ? gram.batch() : Batch<float>{}};
  expect("factor_addressing", cuda::factor_addressing(unit_codes, made, c.B, c.context), {&lower, &pseudoinverse});
  const AddressingFactors<const float> given{lower.read(), pseudoinverse.read(),
                                             read.squared_gram ? gram.read() : Batch<const float>{}};
  for (read.num_iters = 1; read.num_iters <= 2; ++read.num_iters) {
    expect("read_factored", cuda::read_factored(read, given, c.B, c.context), {&values, &weights});
    expect("read_factored_backward", cuda::read_factored_backward(read, given, grads, c.B, c.context),
           {&c.to_mean, &to_queries, &c.to_ridge});
  }
}

void run_matrix_normal(Case& c) {
  Array prior_mean(c.B, c.K, c.C), prior_cov(c.B, c.K, c.K), result(c.B);
  Array to_prior_mean(c.B, c.K, c.C), to_prior_cov(c.B, c.K, c.K);
  prior_mean.draw(0.3f);
  prior_cov.diagonal(2);
  const MatrixNormalArgs<float> args{
      c.K, c.C, c.mean.read(), c.cov.read(), prior_mean.read(), prior_cov.read(), result.data, c.info.data()};
  expect("kl_memory", cuda::kl_memory(args, c.B, c.context), {&result});
  const MatrixNormalGrads<float> grads{
      {c.ridge.data, {1, 0, 0}}, c.to_mean.batch(), c.to_cov.batch(), to_prior_mean.batch(), to_prior_cov.batch()};
  expect("kl_memory_backward", cuda::kl_memory_backward(args, grads, c.B, c.context),
         {&c.to_mean, &c.to_cov, &to_prior_mean, &to_prior_cov});
  expect("logdet", cuda::logdet(args, c.B, c.context), {&result});
  expect("logdet_backward", cuda::logdet_backward(args, grads, c.B, c.context), {&c.to_cov});
}

void run(Case&& c) {
  c.draw();
  run_update_and_write(c);
  for (int law = 0; law < 3; ++law) run_filter(c, law);
  run_read(c);
  run_matrix_normal(c);
}

}  // namespace

int main() {
  run({2, 5, 5, 7, 9, true, kIeee});
  run({1, 18, 70, 20, 70, false, kTf32x3});
  std::printf("clean\n");
}
