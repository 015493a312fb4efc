// Binds solve_addressing, read and their backward to torch.ops.fastkm on the CPU: one factor a memory, any number of
// queries.
#include <tuple>

#include "binding.h"

namespace fastkm {

template <class T>
static ReadingArgs<T> reading_args(const Tensor& mean, const Tensor& queries, const Tensor& ridge, int64_t num_iters,
                                   bool squared_gram, int64_t precision, const Tensor& info) {
  const int64_t B = mean.size(0), K = mean.size(1), C = mean.size(2), Q = queries.size(1);
  expect(queries, "queries", {B, Q, C}, mean.scalar_type());
  expect(ridge, "ridge", {B}, mean.scalar_type());
  STD_TORCH_CHECK(num_iters >= 1, "fastkm: num_iters must be at least 1, got ", num_iters);
  return {.K = K,
          .C = C,
          .Q = Q,
          .mean = batch_of<const T>(mean),
          .queries = batch_of<const T>(queries),
          .ridge = batch_of<const T>(ridge),
          .num_iters = num_iters,
          .squared_gram = squared_gram,
          .info = data_of<int32_t>(info),
          .precision = precision};
}

static Tensor run_read(const Tensor& mean, const Tensor& queries, const Tensor& ridge, int64_t num_iters,
                       bool squared_gram, int64_t precision, const Tensor& weights, const Tensor* values) {
  const int64_t B = mean.size(0), Q = queries.size(1);
  const Tensor info = make(mean, {B}, ScalarType::Int);
  for_dtype(mean.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    const Kernels<T>& table = kernels<T>();
    ReadingArgs<T> args = reading_args<T>(mean, queries, ridge, num_iters, squared_gram, precision, info);
    args.weights = batch_of<T>(weights);
    if (values) args.values = batch_of<T>(*values);
    if (B >= static_cast<int64_t>(torch::stable::get_num_threads())) {
      over_threads(B, [&](int64_t begin, int64_t end) { table.read_memories(args, begin, end); });
      return;
    }
    const Tensor factors = make(mean, {B, table.factor_size(args)});
    T* at = data_of<T>(factors);
    over_threads(B, [&](int64_t begin, int64_t end) { table.factor_memories(args, at, begin, end); });
    const int64_t tiles = B * ((Q + kQueryTile - 1) / kQueryTile);
    over_threads(tiles, [&](int64_t begin, int64_t end) { table.read_tiles(args, at, begin, end); });
  });
  return info;
}

static std::tuple<Tensor, Tensor> solve_addressing(const Tensor& mean, const Tensor& queries, const Tensor& ridge,
                                                   bool squared_gram) {
  const Tensor weights = make(mean, {mean.size(0), queries.size(1), mean.size(1)});
  const Tensor info = run_read(mean, queries, ridge, 1, squared_gram, kIeee, weights, nullptr);
  return {weights, info};
}

static std::tuple<Tensor, Tensor, Tensor> read(const Tensor& mean, const Tensor& queries, const Tensor& ridge,
                                               int64_t num_iters, bool squared_gram, int64_t precision) {
  const Tensor weights = make(mean, {mean.size(0), queries.size(1), mean.size(1)});
  const Tensor values = make(mean, {queries.size(0), queries.size(1), queries.size(2)});
  const Tensor info = run_read(mean, queries, ridge, num_iters, squared_gram, precision, weights, &values);
  return {values, weights, info};
}

// Serves solve_addressing as well: one iteration, no grad_values.
static std::tuple<Tensor, Tensor, Tensor> read_backward(const Tensor& mean, const Tensor& queries, const Tensor& ridge,
                                                        int64_t num_iters, bool squared_gram, int64_t precision,
                                                        const std::optional<Tensor>& grad_values,
                                                        const std::optional<Tensor>& grad_weights) {
  const int64_t B = mean.size(0), K = mean.size(1), C = mean.size(2), Q = queries.size(1);
  const Tensor to_mean = make(mean, {B, K, C}), to_queries = make(mean, {B, Q, C}), to_ridge = make(mean, {B});
  const Tensor info = make(mean, {B}, ScalarType::Int);
  for_dtype(mean.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    const ReadingArgs<T> args = reading_args<T>(mean, queries, ridge, num_iters, squared_gram, precision, info);
    const ReadingGrads<T> grads{.values = cotangent_of<T>(grad_values, "grad_values", {B, Q, C}, mean),
                                .weights = cotangent_of<T>(grad_weights, "grad_weights", {B, Q, K}, mean),
                                .to_mean = batch_of<T>(to_mean),
                                .to_queries = batch_of<T>(to_queries),
                                .to_ridge = data_of<T>(to_ridge)};
    const auto& run = kernels<T>().read_backward;
    over_threads(B, [&](int64_t begin, int64_t end) { run(args, grads, begin, end); });
  });
  return {to_mean, to_queries, to_ridge};
}

STABLE_TORCH_LIBRARY_IMPL(fastkm, CPU, m) {
  m.impl("solve_addressing", TORCH_BOX(&solve_addressing));
  m.impl("read", TORCH_BOX(&read));
  m.impl("read_backward", TORCH_BOX(&read_backward));
}

}  // namespace fastkm
