// Binds solve_addressing, read and their backward to torch.ops.fastkm, and for GPUs addressing in two steps: one factor
// a memory, any number of queries.
#include <tuple>
#include <type_traits>

#include "bindings/make_tensor.h"
#include "bindings/register.h"
#include "bindings/tensor_args.h"

namespace fastkm {

struct ReadingOptions {
  int64_t num_iters;
  bool squared_gram;
  int64_t precision;
};

template <class Real, class Place>
static ReadingArgs<Real> reading_args(const Place& place, const Tensor& mean, const Tensor& queries,
                                      const Tensor& ridge, const ReadingOptions& options, const Tensor& info) {
  const int64_t B = mean.size(0), K = mean.size(1), C = mean.size(2), Q = queries.size(1);
  const int64_t queries_type = place.expect_codes(queries, "queries", {B, Q, C}, mean);
  expect(mean, "mean", {B, K, C}, mean.scalar_type());
  STD_TORCH_CHECK(options.num_iters >= 1, "fastkm: num_iters must be at least 1, got ", options.num_iters);
  return {.K = K,
          .C = C,
          .Q = Q,
          .mean = batch_of<const Real>(mean),
          .queries = batch_of<const Real>(queries),
          .ridge = positive_numbers_of<Real>(place, ridge, "ridge", {B}, mean),
          .num_iters = options.num_iters,
          .squared_gram = options.squared_gram,
          .info = data_of<int32_t>(info),
          .precision = options.precision,
          .queries_type = queries_type};
}

// On the CPU, many memories are spread over the threads as a whole, and few with their queries.
template <class Real>
static void read_on(const Cpu& place, const ReadingArgs<Real>& args, const Tensor& mean) {
  const int64_t B = mean.size(0);
  const Kernels<Real>& table = kernels<Real>();
  const int64_t factor_size = table.factor_size(args);
  if (factor_size == 0 || B >= static_cast<int64_t>(torch::stable::get_num_threads())) {
    place.over_threads(B, [&](int64_t begin, int64_t end) { table.read_memories(args, begin, end); });
    return;
  }
  const Tensor factors = make_tensor(mean, {B, factor_size});
  Real* at = data_of<Real>(factors);
  place.over_threads(B, [&](int64_t begin, int64_t end) { table.factor_memories(args, at, begin, end); });
  const int64_t tiles = B * ((args.Q + kQueryTile - 1) / kQueryTile);
  place.over_threads(tiles, [&](int64_t begin, int64_t end) { table.read_tiles(args, at, begin, end); });
}

template <class Real, class Place>
static void read_on(const Place& place, const ReadingArgs<Real>& args, const Tensor& mean) {
  place.launch(FASTKM_LAUNCHER(read), args, mean.size(0));
}

template <class Place>
static Tensor run_read(const Place& place, const Tensor& mean, const Tensor& queries, const Tensor& ridge,
                       const ReadingOptions& options, const Tensor& weights, const Tensor* values) {
  const Tensor info = make_tensor(mean, {mean.size(0)}, ScalarType::Int);
  place.for_dtype(mean.scalar_type(), [&](auto scalar) {
    using Real = decltype(scalar);
    ReadingArgs<Real> args = reading_args<Real>(place, mean, queries, ridge, options, info);
    args.weights = batch_of<Real>(weights);
    if (values) args.values = batch_of<Real>(*values);
    read_on(place, args, mean);
  });
  return info;
}

template <class Place>
static std::tuple<Tensor, Tensor> solve_addressing(const Tensor& mean, const Tensor& queries, const Tensor& ridge,
                                                   bool squared_gram) {
  const Place place(mean, queries, ridge);
  const Tensor weights = make_tensor(mean, {mean.size(0), queries.size(1), mean.size(1)});
  const Tensor info = run_read(place, mean, queries, ridge, {1, squared_gram, kIeee}, weights, nullptr);
  return {weights, info};
}

template <class Place>
static std::tuple<Tensor, Tensor, Tensor> read(const Tensor& mean, const Tensor& queries, const Tensor& ridge,
                                               int64_t num_iters, bool squared_gram, int64_t precision) {
  const Place place(mean, queries, ridge);
  const Tensor weights = make_tensor(mean, {mean.size(0), queries.size(1), mean.size(1)});
  const Tensor values = make_tensor(mean, {queries.size(0), queries.size(1), queries.size(2)});
  const Tensor info = run_read(place, mean, queries, ridge, {num_iters, squared_gram, precision}, weights, &values);
  return {values, weights, info};
}

// Serves solve_addressing as well: one iteration, no grad_values.
template <class Place>
static std::tuple<Tensor, Tensor, Tensor> read_backward(const Tensor& mean, const Tensor& queries, const Tensor& ridge,
                                                        int64_t num_iters, bool squared_gram, int64_t precision,
                                                        const std::optional<Tensor>& grad_values,
                                                        const std::optional<Tensor>& grad_weights) {
  const Place place(mean, queries, ridge, grad_values, grad_weights);
  const int64_t B = mean.size(0), K = mean.size(1), C = mean.size(2), Q = queries.size(1);
  const Tensor to_mean = make_tensor(mean, {B, K, C}), to_queries = make_tensor(mean, {B, Q, C}),
               to_ridge = make_tensor(mean, {B});
  const Tensor info = make_tensor(mean, {B}, ScalarType::Int);
  expect(ridge, "ridge", {B}, mean.scalar_type());
  place.for_dtype(mean.scalar_type(), [&](auto scalar) {
    using Real = decltype(scalar);
    const ReadingArgs<Real> args =
        reading_args<Real>(place, mean, queries, ridge, {num_iters, squared_gram, precision}, info);
    const ReadingGrads<Real> grads{.values = cotangent_of<Real>(grad_values, "grad_values", {B, Q, C}, mean),
                                   .weights = cotangent_of<Real>(grad_weights, "grad_weights", {B, Q, K}, mean),
                                   .to_mean = batch_of<Real>(to_mean),
                                   .to_queries = batch_of<Real>(to_queries),
                                   .to_ridge = data_of<Real>(to_ridge)};
    place.run(B, &Kernels<Real>::read_backward, FASTKM_LAUNCHER(read_backward), args, grads);
  });
  return {to_mean, place.like_codes(to_queries, queries), to_ridge};
}

template <class Place>
static std::tuple<Tensor, Tensor> factor_addressing(const Tensor& mean, const Tensor& ridge) {
  const Place place(mean, ridge);
  const int64_t B = mean.size(0), K = mean.size(1);
  const Tensor factor = make_tensor(mean, {B, K, K}), info = make_tensor(mean, {B}, ScalarType::Int);
  place.for_dtype(mean.scalar_type(), [&](auto scalar) {
    using Real = decltype(scalar);
    const ReadingArgs<Real> args{.K = K,
                                 .C = mean.size(2),
                                 .Q = 0,
                                 .mean = batch_of<const Real>(mean),
                                 .queries = {},
                                 .ridge = positive_numbers_of<Real>(place, ridge, "ridge", {B}, mean),
                                 .num_iters = 1,
                                 .squared_gram = false,
                                 .info = data_of<int32_t>(info)};
    place.launch(FASTKM_LAUNCHER(factor_addressing), args, batch_of<Real>(factor), B);
  });
  return {factor, info};
}

template <class Place>
static Tensor solve_factored(const Tensor& mean, const Tensor& factor, const Tensor& queries) {
  const Place place(mean, factor, queries);
  const int64_t B = mean.size(0), K = mean.size(1), C = mean.size(2), Q = queries.size(1);
  expect(factor, "factor", {B, K, K}, mean.scalar_type());
  const int64_t queries_type = place.expect_codes(queries, "queries", {B, Q, C}, mean);
  const Tensor weights = make_tensor(mean, {B, Q, K});
  place.for_dtype(mean.scalar_type(), [&](auto scalar) {
    using Real = decltype(scalar);
    const ReadingArgs<Real> args{.K = K,
                                 .C = C,
                                 .Q = Q,
                                 .mean = batch_of<const Real>(mean),
                                 .queries = batch_of<const Real>(queries),
                                 .ridge = {},
                                 .num_iters = 1,
                                 .squared_gram = false,
                                 .weights = batch_of<Real>(weights),
                                 .queries_type = queries_type};
    place.launch(FASTKM_LAUNCHER(solve_factored), args, batch_of<const Real>(factor), B);
  });
  return weights;
}

template <class Place, class Library>
static void register_reading(Library& m) {
  m.impl("solve_addressing", TORCH_BOX(&solve_addressing<Place>));
  m.impl("read", TORCH_BOX(&read<Place>));
  m.impl("read_backward", TORCH_BOX(&read_backward<Place>));
  if constexpr (!std::is_same_v<Place, Cpu>) {
    m.impl("factor_addressing", TORCH_BOX(&factor_addressing<Place>));
    m.impl("solve_factored", TORCH_BOX(&solve_factored<Place>));
  }
}
FASTKM_REGISTER(register_reading)

}  // namespace fastkm
