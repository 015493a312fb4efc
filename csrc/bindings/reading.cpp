// Binds solve_addressing, read and their backward to torch.ops.fastkm, and the same in two steps: what a memory needs
// is computed once, and then any number of queries is answered.
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
  const int64_t queries_type = expect_low_codes(queries, "queries", {B, Q, C}, mean);
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

// The type of values that a caller asks for, an Element; that of the memory if there is none.
static ScalarType values_type_of(const Tensor& mean, std::optional<int64_t> element) {
  const bool low = element && *element != kFloat32;
  STD_TORCH_CHECK(!low || (mean.scalar_type() == ScalarType::Float && (*element == kBFloat16 || *element == kFloat16)),
                  "fastkm: values have the type of the memory, or bfloat16 or float16 beside float32");
  return !low ? mean.scalar_type() : *element == kBFloat16 ? ScalarType::BFloat16 : ScalarType::Half;
}

template <class Place>
static Tensor make_values(const Place& place, const Tensor& queries, ScalarType type) {
  return make_tensor(queries, {queries.size(0), queries.size(1), queries.size(2)}, place.stored_type(type));
}

template <class Real>
static void set_values(ReadingArgs<Real>& args, const Tensor* values) {
  if (!values) return;
  args.values = batch_of<Real>(*values);
  args.values_type = element_of(values->scalar_type());
}

template <class Place>
static Tensor run_read(const Place& place, const Tensor& mean, const Tensor& queries, const Tensor& ridge,
                       const ReadingOptions& options, const Tensor& weights, const Tensor* values) {
  const Tensor info = make_tensor(mean, {mean.size(0)}, ScalarType::Int);
  place.for_dtype(mean.scalar_type(), [&](auto scalar) {
    using Real = decltype(scalar);
    ReadingArgs<Real> args = reading_args<Real>(place, mean, queries, ridge, options, info);
    args.weights = batch_of<Real>(weights);
    set_values(args, values);
    place.run(mean.size(0), &Kernels<Real>::read, FASTKM_LAUNCHER(read), args);
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
                                               int64_t num_iters, bool squared_gram, int64_t precision,
                                               std::optional<int64_t> values_type) {
  const Place place(mean, queries, ridge);
  const Tensor weights = make_tensor(mean, {mean.size(0), queries.size(1), mean.size(1)});
  const ScalarType type = values_type_of(mean, values_type);
  const Tensor values = make_values(place, queries, type);
  const Tensor info = run_read(place, mean, queries, ridge, {num_iters, squared_gram, precision}, weights, &values);
  return {place.as_type(values, type), weights, info};
}

// Checks the arguments of a backward, makes its results, and calls compute(args, grads).
template <class Place, class Compute>
static std::tuple<Tensor, Tensor, Tensor> run_backward(const Place& place, const Tensor& mean, const Tensor& queries,
                                                       const Tensor& ridge, const ReadingOptions& options,
                                                       const std::optional<Tensor>& grad_values,
                                                       const std::optional<Tensor>& grad_weights,
                                                       const Compute& compute) {
  const int64_t B = mean.size(0), K = mean.size(1), C = mean.size(2), Q = queries.size(1);
  const Tensor to_mean = make_tensor(mean, {B, K, C}), to_ridge = make_tensor(mean, {B}),
               to_queries = make_tensor(mean, {B, Q, C}, place.stored_type(queries.scalar_type()));
  const Tensor info = make_tensor(mean, {B}, ScalarType::Int);
  expect(ridge, "ridge", {B}, mean.scalar_type());
  place.for_dtype(mean.scalar_type(), [&](auto scalar) {
    using Real = decltype(scalar);
    const ReadingArgs<Real> args = reading_args<Real>(place, mean, queries, ridge, options, info);
    const ReadingGrads<Real> grads{.values = cotangent_of<Real>(grad_values, "grad_values", {B, Q, C}, mean),
                                   .weights = cotangent_of<Real>(grad_weights, "grad_weights", {B, Q, K}, mean),
                                   .to_mean = batch_of<Real>(to_mean),
                                   .to_queries = batch_of<Real>(to_queries),
                                   .to_ridge = data_of<Real>(to_ridge)};
    compute(args, grads);
  });
  return {to_mean, place.like_codes(to_queries, queries), to_ridge};
}

// Serves solve_addressing as well: one iteration, no grad_values.
template <class Place>
static std::tuple<Tensor, Tensor, Tensor> read_backward(const Tensor& mean, const Tensor& queries, const Tensor& ridge,
                                                        int64_t num_iters, bool squared_gram, int64_t precision,
                                                        const std::optional<Tensor>& grad_values,
                                                        const std::optional<Tensor>& grad_weights) {
  const Place place(mean, queries, ridge, grad_values, grad_weights);
  return run_backward(place, mean, queries, ridge, {num_iters, squared_gram, precision}, grad_values, grad_weights,
                      [&]<class Real>(const ReadingArgs<Real>& args, const ReadingGrads<Real>& grads) {
                        place.run(mean.size(0), &Kernels<Real>::read_backward, FASTKM_LAUNCHER(read_backward), args,
                                  grads);
                      });
}

template <class Place>
static std::tuple<Tensor, Tensor, Tensor, Tensor> factor_addressing(const Tensor& mean, const Tensor& ridge,
                                                                    bool squared_gram) {
  const Place place(mean, ridge);
  const int64_t B = mean.size(0), K = mean.size(1), C = mean.size(2);
  expect(mean, "mean", {B, K, C}, mean.scalar_type());
  const Tensor lower = make_tensor(mean, {B, K, K}), pseudoinverse = make_tensor(mean, {B, C, K}),
               gram = make_tensor(mean, {B, squared_gram ? K : 0, K}), info = make_tensor(mean, {B}, ScalarType::Int);
  place.for_dtype(mean.scalar_type(), [&](auto scalar) {
    using Real = decltype(scalar);
    const ReadingArgs<Real> args{.K = K,
                                 .C = C,
                                 .Q = C,
                                 .mean = batch_of<const Real>(mean),
                                 .queries = {},
                                 .ridge = positive_numbers_of<Real>(place, ridge, "ridge", {B}, mean),
                                 .num_iters = 1,
                                 .squared_gram = squared_gram,
                                 .info = data_of<int32_t>(info)};
    const AddressingFactors<Real> factors{.lower = batch_of<Real>(lower),
                                          .pseudoinverse = batch_of<Real>(pseudoinverse),
                                          .gram = squared_gram ? batch_of<Real>(gram) : Batch<Real>{}};
    place.run(B, &Kernels<Real>::factor_addressing, FASTKM_LAUNCHER(factor_addressing), args, factors);
  });
  return {pseudoinverse, lower, gram, info};
}

// The tensors of a factor, as a caller gives them. A gram without rows means that the solve is not the squared-Gram
// one.
struct GivenFactors {
  const Tensor &mean, &lower, &pseudoinverse, &gram;

  bool squared_gram() const { return gram.dim() == 3 && gram.size(1) > 0; }

  template <class Real>
  AddressingFactors<const Real> check() const {
    const int64_t B = mean.size(0), K = mean.size(1), C = mean.size(2);
    expect(lower, "lower", {B, K, K}, mean.scalar_type());
    expect(pseudoinverse, "pseudoinverse", {B, C, K}, mean.scalar_type());
    expect(gram, "gram", {B, squared_gram() ? K : 0, K}, mean.scalar_type());
    return {.lower = batch_of<const Real>(lower),
            .pseudoinverse = batch_of<const Real>(pseudoinverse),
            .gram = squared_gram() ? batch_of<const Real>(gram) : Batch<const Real>{}};
  }
};

template <class Place>
static Tensor run_read_factored(const Place& place, const GivenFactors& given, const Tensor& queries,
                                const Tensor& ridge, const ReadingOptions& options, const Tensor& weights,
                                const Tensor* values) {
  const Tensor& mean = given.mean;
  const Tensor info = make_tensor(mean, {mean.size(0)}, ScalarType::Int);
  place.for_dtype(mean.scalar_type(), [&](auto scalar) {
    using Real = decltype(scalar);
    ReadingArgs<Real> args = reading_args<Real>(place, mean, queries, ridge, options, info);
    const AddressingFactors<const Real> factors = given.check<Real>();
    args.weights = batch_of<Real>(weights);
    set_values(args, values);
    place.run(mean.size(0), &Kernels<Real>::read_factored, FASTKM_LAUNCHER(read_factored), args, factors);
  });
  return info;
}

template <class Place>
static std::tuple<Tensor, Tensor> solve_factored(const Tensor& mean, const Tensor& queries, const Tensor& ridge,
                                                 const Tensor& lower, const Tensor& pseudoinverse, const Tensor& gram) {
  const Place place(mean, queries, ridge, lower, pseudoinverse, gram);
  const GivenFactors given{mean, lower, pseudoinverse, gram};
  const Tensor weights = make_tensor(mean, {mean.size(0), queries.size(1), mean.size(1)});
  const Tensor info =
      run_read_factored(place, given, queries, ridge, {1, given.squared_gram(), kIeee}, weights, nullptr);
  return {weights, info};
}

template <class Place>
static std::tuple<Tensor, Tensor, Tensor> read_factored(const Tensor& mean, const Tensor& queries, const Tensor& ridge,
                                                        const Tensor& lower, const Tensor& pseudoinverse,
                                                        const Tensor& gram, int64_t num_iters, int64_t precision,
                                                        std::optional<int64_t> values_type) {
  const Place place(mean, queries, ridge, lower, pseudoinverse, gram);
  const GivenFactors given{mean, lower, pseudoinverse, gram};
  const Tensor weights = make_tensor(mean, {mean.size(0), queries.size(1), mean.size(1)});
  const ScalarType type = values_type_of(mean, values_type);
  const Tensor values = make_values(place, queries, type);
  const Tensor info =
      run_read_factored(place, given, queries, ridge, {num_iters, given.squared_gram(), precision}, weights, &values);
  return {place.as_type(values, type), weights, info};
}

// Serves solve_factored as well: one iteration, no grad_values.
template <class Place>
static std::tuple<Tensor, Tensor, Tensor> read_factored_backward(const Tensor& mean, const Tensor& queries,
                                                                 const Tensor& ridge, const Tensor& lower,
                                                                 const Tensor& pseudoinverse, const Tensor& gram,
                                                                 int64_t num_iters, int64_t precision,
                                                                 const std::optional<Tensor>& grad_values,
                                                                 const std::optional<Tensor>& grad_weights) {
  const Place place(mean, queries, ridge, lower, pseudoinverse, gram, grad_values, grad_weights);
  const GivenFactors given{mean, lower, pseudoinverse, gram};
  return run_backward(place, mean, queries, ridge, {num_iters, given.squared_gram(), precision}, grad_values,
                      grad_weights, [&]<class Real>(const ReadingArgs<Real>& args, const ReadingGrads<Real>& grads) {
                        place.run(mean.size(0), &Kernels<Real>::read_factored_backward,
                                  FASTKM_LAUNCHER(read_factored_backward), args, given.check<Real>(), grads);
                      });
}

template <class Place, class Library>
static void register_reading(Library& m) {
  m.impl("solve_addressing", TORCH_BOX(&solve_addressing<Place>));
  m.impl("read", TORCH_BOX(&read<Place>));
  m.impl("read_backward", TORCH_BOX(&read_backward<Place>));
  m.impl("factor_addressing", TORCH_BOX(&factor_addressing<Place>));
  m.impl("solve_factored", TORCH_BOX(&solve_factored<Place>));
  m.impl("read_factored", TORCH_BOX(&read_factored<Place>));
  m.impl("read_factored_backward", TORCH_BOX(&read_factored_backward<Place>));
}
FASTKM_REGISTER(register_reading)

}  // namespace fastkm
