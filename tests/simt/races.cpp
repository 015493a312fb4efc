// Runs every launcher on a few shapes in a program of its own, for the sanitizers: which bytes are touched, and in what
// order, does not depend on the values. Still every result must be there and finite.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cuda/kernels.h"

using namespace fastkm;

namespace {

std::mt19937 random_bits(0);

// A tensor on the heap, of exactly its size, so that a sanitizer sees what is touched beside it.
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
  if (error) std::printf("%s: %s\n", operation, error), std::exit(1);
  for (const Array* result : results)
    for (int64_t i = 0; i < result->count(); ++i)
      if (!std::isfinite(result->data[i])) std::printf("%s: a result is missing\n", operation), std::exit(1);
}

void run(int64_t B, int64_t T, int64_t Q, int64_t K, int64_t C, bool masked, int64_t precision) {
  cuda::Context context;
  context.allocate = allocate;
  Array mean(B, K, C), cov(B, K, K), weights(B, T, K), values(B, T, C), noise(B, T), ridge(B), queries(B, Q, C);
  mean.draw(0.3f), cov.diagonal(1.5f), weights.draw(0.3f), values.draw(1), noise.fill(0.7f), ridge.fill(0.9f);
  queries.draw(1);
  bool* mask = new bool[static_cast<size_t>(B * T)];
  for (int64_t i = 0; i < B * T; ++i) mask[i] = i % 3 != 1;
  std::vector<int32_t> info(static_cast<size_t>(B));

  Array new_mean(B, K, C), new_cov(B, K, K), s(B, T), kl(B, T), evidence(B), new_weights(B, T, K);
  PosteriorArgs<float> update{};
  update.K = K, update.C = C, update.T_ = T;
  update.mean = mean.read(), update.cov = cov.read(), update.weights = weights.read(), update.values = values.read();
  update.noise_var = {noise.data, {T, 1, 0}};
  if (masked) update.mask = {mask, {T, 1, 0}};
  update.new_mean = new_mean.batch(), update.new_cov = new_cov.batch();
  update.innovation_var = {s.data, {T, 1, 0}}, update.kl = {kl.data, {T, 1, 0}};
  update.log_evidence = evidence.data, update.info = info.data(), update.precision = precision;
  expect("update_posterior", cuda::update_posterior(update, B, context), {&new_mean, &new_cov, &s, &kl, &evidence});

  Array to_mean(B, K, C), to_cov(B, K, K), to_weights(B, T, K), to_values(B, T, C), to_noise(B, T), to_ridge(B);
  PosteriorGrads<float> update_grads{};
  update_grads.mean = new_mean.read(), update_grads.cov = new_cov.read(), update_grads.kl = {kl.data, {T, 1, 0}};
  update_grads.to_mean = to_mean.batch(), update_grads.to_cov = to_cov.batch();
  update_grads.to_weights = to_weights.batch(), update_grads.to_values = to_values.batch();
  update_grads.to_noise_var = {to_noise.data, {T, 1, 0}};
  expect("update_posterior_backward", cuda::update_posterior_backward(update, update_grads, B, context),
         {&to_mean, &to_cov, &to_weights, &to_values, &to_noise});

  for (int64_t attempts = 1; attempts <= 2; ++attempts) {
    WritingArgs<float> write{update, {ridge.data, {1, 0, 0}}, attempts, attempts == 2, new_weights.batch()};
    expect("write", cuda::write(write, B, context), {&new_mean, &new_cov, &new_weights, &s, &kl});
    write.posterior.weights = new_weights.read();
    const WritingGrads<float> write_grads{update_grads, weights.read(), {to_ridge.data, {1, 0, 0}}};
    expect("write_backward", cuda::write_backward(write, write_grads, B, context),
           {&to_mean, &to_cov, &to_values, &to_noise, &to_ridge});
  }

  Array read_values(B, Q, C), read_weights(B, Q, K), to_queries(B, Q, C), factor(B, K, K);
  ReadingArgs<float> read{};
  read.K = K, read.C = C, read.Q = Q, read.mean = mean.read(), read.queries = queries.read();
  read.ridge = {ridge.data, {1, 0, 0}}, read.num_iters = 2, read.squared_gram = masked;
  read.values = read_values.batch(), read.weights = read_weights.batch(), read.info = info.data();
  read.precision = precision;
  expect("read", cuda::read(read, B, context), {&read_values, &read_weights});
  const ReadingGrads<float> read_grads{queries.read(), read_weights.read(), to_mean.batch(), to_queries.batch(),
                                       to_ridge.data};
  expect("read_backward", cuda::read_backward(read, read_grads, B, context), {&to_mean, &to_queries, &to_ridge});
  read.num_iters = 1, read.squared_gram = false;
  expect("factor_addressing", cuda::factor_addressing(read, factor.batch(), B, context), {&factor});
  read.values = {}, read.info = nullptr;
  expect("solve_factored", cuda::solve_factored(read, factor.read(), B, context), {&read_weights});

  Array prior_mean(B, K, C), prior_cov(B, K, K), distance(B), to_prior_mean(B, K, C), to_prior_cov(B, K, K);
  prior_mean.draw(0.3f), prior_cov.diagonal(2);
  MatrixNormalArgs<float> normal{
      K, C, mean.read(), cov.read(), prior_mean.read(), prior_cov.read(), distance.data, info.data()};
  expect("kl_memory", cuda::kl_memory(normal, B, context), {&distance});
  MatrixNormalGrads<float> normal_grads{
      {ridge.data, {1, 0, 0}}, to_mean.batch(), to_cov.batch(), to_prior_mean.batch(), to_prior_cov.batch()};
  expect("kl_memory_backward", cuda::kl_memory_backward(normal, normal_grads, B, context),
         {&to_mean, &to_cov, &to_prior_mean, &to_prior_cov});
  expect("logdet", cuda::logdet(normal, B, context), {&distance});
  expect("logdet_backward", cuda::logdet_backward(normal, normal_grads, B, context), {&to_cov});
  delete[] mask;
}

}  // namespace

int main() {
  run(2, 5, 5, 7, 9, true, kIeee);
  run(1, 18, 70, 20, 70, false, kTf32x3);
  if (std::getenv("FASTKM_SIMT_LARGE")) run(1, 2, 3, 132, 8, false, kIeee);
  std::printf("clean\n");
}
