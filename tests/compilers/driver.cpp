// The CPU kernels of one level in a program without torch: it reads calls of the operators of fastkm/_runtime/schema.py
// from its standard input and writes their results to its standard output, until the input ends. operators.py is the
// other side. So the tests of the package can hold kernels of any compiler, and of another processor, to the truth.

#include FASTKM_LEVEL_SOURCE

#include <array>
#include <cstdio>
#include <vector>

#include "call.h"
#include "cpu/linalg/arena.cpp"

namespace {

using namespace fastkm;

// mean, cov, [weights,] values and noise_var are the first arguments of an update and of a write.
template <class Real>
PosteriorArgs<Real> posterior_args(const Call& call, size_t values, size_t mask) {
  PosteriorArgs<Real> args{};
  args.K = call.size(0)[1], args.C = call.size(0)[2], args.T = call.size(values)[1];
  args.mean = call.in<Real>(0), args.cov = call.in<Real>(1);
  args.values = call.in<Real>(values), args.noise_var = call.in<Real>(values + 1);
  args.mask = call.in<bool>(mask);
  return args;
}

template <class Real>
PosteriorArgs<Real> update_args(const Call& call) {
  PosteriorArgs<Real> args = posterior_args<Real>(call, 3, 5);
  args.weights = call.in<Real>(2);
  return args;
}

template <class Real>
FilteringArgs<Real> filtering_args(const Call& call) {
  PosteriorArgs<Real> posterior = posterior_args<Real>(call, 3, 10);
  posterior.weights = call.in<Real>(2), posterior.noise_var = call.in<Real>(5);
  return {.posterior = posterior,
          .queries = call.in<Real>(4),
          .retention = call.in<Real>(6),
          .forgetting = call.in<Real>(8),
          .prior_var = call.in<Real>(7),
          .read_before = call.number(9) != 0,
          .read_values = {},
          .variance = {}};
}

template <class Real>
WritingArgs<Real> writing_args(const Call& call) {
  return {.posterior = posterior_args<Real>(call, 2, 7),
          .ridge = call.in<Real>(4),
          .num_opt_iters = call.number(5),
          .squared_gram = call.number(6) != 0,
          .new_weights = {}};
}

// The mean, the queries and the ridge are the first arguments of a read.
template <class Real>
ReadingArgs<Real> reading_args(const Call& call, int64_t num_iters, bool squared_gram, int32_t* info) {
  return {.K = call.size(0)[1],
          .C = call.size(0)[2],
          .Q = call.size(1)[1],
          .mean = call.in<Real>(0),
          .queries = call.in<Real>(1),
          .ridge = call.in<Real>(2),
          .num_iters = num_iters,
          .squared_gram = squared_gram,
          .values = {},
          .weights = {},
          .info = info,
          .queries_type = call.arguments[1].type};
}

// Each returns whether the call is of its family.
template <class Real, class Run>
bool answer_conditioning(const Call& call, const Kernels<Real>& table, const Run& run) {
  const auto in = [&](size_t i) { return call.in<Real>(i); };
  const auto out = [&](size_t i) { return call.out<Real>(i); };
  if (call.name == "update_posterior") {
    PosteriorArgs<Real> args = update_args<Real>(call);
    args.new_mean = out(0), args.new_cov = out(1), args.innovation_var = out(2), args.kl = out(3);
    args.log_evidence = out(4).data, args.info = call.out<int32_t>(5).data;
    return run(table.update_posterior, args);
  }
  if (call.name == "update_posterior_backward") {
    const PosteriorGrads<Real> grads{.mean = in(7),
                                     .cov = in(8),
                                     .innovation_var = in(9),
                                     .kl = in(10),
                                     .log_evidence = in(11),
                                     .to_mean = out(0),
                                     .to_cov = out(1),
                                     .to_weights = out(2),
                                     .to_values = out(3),
                                     .to_noise_var = out(4)};
    return run(table.update_posterior_backward, update_args<Real>(call), grads);
  }
  if (call.name == "filter_posterior") {
    FilteringArgs<Real> args = filtering_args<Real>(call);
    args.posterior.new_mean = out(0), args.posterior.new_cov = out(1);
    args.read_values = out(2), args.variance = out(3), args.posterior.innovation_var = out(4);
    args.posterior.log_evidence = out(5).data, args.posterior.info = call.out<int32_t>(6).data;
    return run(table.filter_posterior, args);
  }
  if (call.name == "filter_posterior_backward") {
    FilteringGrads<Real> grads{};
    grads.posterior.mean = in(12), grads.posterior.cov = in(13), grads.read_values = in(14), grads.variance = in(15);
    grads.posterior.innovation_var = in(16), grads.posterior.log_evidence = in(17);
    grads.posterior.to_mean = out(0), grads.posterior.to_cov = out(1), grads.posterior.to_weights = out(2);
    grads.posterior.to_values = out(3), grads.to_queries = out(4), grads.posterior.to_noise_var = out(5);
    grads.to_retention = out(6), grads.to_prior_var = out(7), grads.to_forgetting = out(8);
    return run(table.filter_posterior_backward, filtering_args<Real>(call), grads);
  }
  if (call.name == "write") {
    WritingArgs<Real> args = writing_args<Real>(call);
    args.posterior.new_mean = out(0), args.posterior.new_cov = out(1), args.new_weights = out(2);
    args.posterior.innovation_var = out(3), args.posterior.kl = out(4);
    args.posterior.info = call.out<int32_t>(5).data;
    return run(table.write, args);
  }
  if (call.name == "write_backward") {
    WritingArgs<Real> args = writing_args<Real>(call);
    args.posterior.weights = in(9);
    WritingGrads<Real> grads{};
    grads.posterior.mean = in(10), grads.posterior.cov = in(11), grads.weights = in(12);
    grads.posterior.innovation_var = in(13), grads.posterior.kl = in(14);
    grads.posterior.to_mean = out(0), grads.posterior.to_cov = out(1), grads.posterior.to_values = out(2);
    grads.posterior.to_noise_var = out(3), grads.to_ridge = out(4);
    return run(table.write_backward, args, grads);
  }
  return false;
}

template <class Real, class Run>
bool answer_products(const Call& call, const Kernels<Real>& table, const Run& run) {
  if (call.name != "write_gram") return false;
  GramWritingArgs<Real> args{};
  PosteriorArgs<Real>& posterior = args.writing.posterior;
  posterior.K = call.size(1)[1], posterior.T = call.size(0)[1] - posterior.K, posterior.C = call.number(4);
  posterior.cov = call.in<Real>(1), posterior.noise_var = call.in<Real>(2), posterior.mask = call.in<bool>(6);
  args.gram = call.in<Real>(0), args.writing.ridge = call.in<Real>(3), args.writing.num_opt_iters = call.number(5);
  posterior.new_cov = call.out<Real>(0), args.writing.new_weights = call.out<Real>(1);
  posterior.innovation_var = call.out<Real>(2), posterior.kl = call.out<Real>(3), args.pivots = call.out<Real>(4);
  posterior.info = call.out<int32_t>(5).data;
  return run(table.write_gram, args);
}

// The cotangents of a memory and of patterns, at these places.
template <class Real>
PosteriorGrads<Real> patterns_grads(const Call& call, size_t grad_mean, const std::array<size_t, 5>& to) {
  PosteriorGrads<Real> grads{};
  grads.mean = call.in<Real>(grad_mean), grads.cov = call.in<Real>(grad_mean + 1);
  grads.to_mean = call.out<Real>(to[0]), grads.to_cov = call.out<Real>(to[1]);
  grads.to_weights = call.out<Real>(to[2]), grads.to_values = call.out<Real>(to[3]);
  grads.to_noise_var = call.out<Real>(to[4]);
  return grads;
}

template <class Real>
PosteriorArgs<Real> replacing_args(const Call& call) {
  PosteriorArgs<Real> args = posterior_args<Real>(call, 5, 8);
  args.weights = call.in<Real>(4);
  return args;
}

// As csrc/bindings/removal.cpp: through the memory between the update and the removal.
template <class Real, class Run>
bool replace_backward(const Call& call, const Kernels<Real>& table, const Run& run) {
  PosteriorArgs<Real> args = replacing_args<Real>(call);
  const int64_t B = call.size(0)[0], K = args.K, C = args.C, T = args.T;
  std::vector<Real> held(static_cast<size_t>(B * (2 * K * C + 2 * K * K + 2 * T + 1)));
  std::vector<int32_t> info(static_cast<size_t>(B));
  Real* next = held.data();
  const auto take = [&](int64_t rows, int64_t columns) {
    const Batch<Real> taken{next, {rows * columns, columns, 1}};
    next += B * rows * columns;
    return taken;
  };
  const auto read_only = [](const Batch<Real>& of) {
    return Batch<const Real>{of.data, {of.stride[0], of.stride[1], of.stride[2]}};
  };
  args.new_mean = take(K, C), args.new_cov = take(K, K), args.innovation_var = take(T, 1), args.kl = take(T, 1);
  args.log_evidence = take(1, 1).data, args.info = info.data();
  run(table.update_posterior, args);
  PosteriorArgs<Real> old = args;
  old.mean = read_only(args.new_mean), old.cov = read_only(args.new_cov);
  old.weights = call.in<Real>(2), old.values = call.in<Real>(3), old.noise_var = call.in<Real>(7);
  PosteriorGrads<Real> grads = patterns_grads<Real>(call, 9, {0, 1, 2, 3, 7});
  grads.to_mean = take(K, C), grads.to_cov = take(K, K);
  run(table.remove_patterns_backward, old, grads);
  PosteriorGrads<Real> new_grads = patterns_grads<Real>(call, 9, {0, 1, 4, 5, 6});
  new_grads.mean = read_only(grads.to_mean), new_grads.cov = read_only(grads.to_cov);
  return run(table.update_posterior_backward, args, new_grads);
}

template <class Real, class Run>
bool answer_living(const Call& call, const Kernels<Real>& table, const Run& run) {
  const auto with_results = [&](PosteriorArgs<Real> args) {
    args.new_mean = call.out<Real>(0), args.new_cov = call.out<Real>(1), args.info = call.out<int32_t>(2).data;
    return args;
  };
  if (call.name == "remove_patterns") return run(table.remove_patterns, with_results(update_args<Real>(call)));
  if (call.name == "update_square_root") return run(table.update_square_root, with_results(update_args<Real>(call)));
  if (call.name == "replace_patterns")
    return run(table.replace_patterns, ReplacingArgs<Real>{with_results(replacing_args<Real>(call)), call.in<Real>(2),
                                                           call.in<Real>(3), call.in<Real>(7)});
  if (call.name == "replace_patterns_backward") return replace_backward(call, table, run);
  if (call.name != "remove_patterns_backward" && call.name != "update_square_root_backward") return false;
  const bool removal = call.name == "remove_patterns_backward";
  return run(removal ? table.remove_patterns_backward : table.update_square_root_backward, update_args<Real>(call),
             patterns_grads<Real>(call, 6, {0, 1, 2, 3, 4}));
}

// Results of a read or of addressing alone.
template <class Real>
ReadingArgs<Real> with_results(const Call& call, ReadingArgs<Real> args) {
  const bool whole = call.results.size() == 3;
  if (whole) args.values = call.out<Real>(0), args.values_type = call.results[0].type;
  args.weights = call.out<Real>(whole ? 1 : 0), args.info = call.out<int32_t>(whole ? 2 : 1).data;
  return args;
}

template <class Real>
ReadingGrads<Real> reading_grads(const Call& call, size_t first) {
  return {.values = call.in<Real>(first),
          .weights = call.in<Real>(first + 1),
          .to_mean = call.out<Real>(0),
          .to_queries = call.out<Real>(1),
          .to_ridge = call.out<Real>(2).data};
}

template <class Real, class Run>
bool answer_reading(const Call& call, const Kernels<Real>& table, const Run& run) {
  std::vector<int32_t> info(static_cast<size_t>(call.size(0)[0]));
  const auto args = [&](int64_t num_iters, bool squared_gram) {
    return reading_args<Real>(call, num_iters, squared_gram, info.data());
  };
  if (call.name == "solve_addressing") return run(table.read, with_results(call, args(1, call.number(3) != 0)));
  if (call.name == "read") return run(table.read, with_results(call, args(call.number(3), call.number(4) != 0)));
  if (call.name == "read_backward")
    return run(table.read_backward, args(call.number(3), call.number(4) != 0), reading_grads<Real>(call, 6));
  return false;
}

// As csrc/bindings/reading.cpp: a gram without rows means that the solve is not the squared-Gram one.
template <class Real, class Run>
bool answer_factored(const Call& call, const Kernels<Real>& table, const Run& run) {
  if (call.name == "factor_addressing") {
    const bool squared_gram = call.number(2) != 0;
    const AddressingFactors<Real> factors{.lower = call.out<Real>(1),
                                          .pseudoinverse = call.out<Real>(0),
                                          .gram = squared_gram ? call.out<Real>(2) : Batch<Real>{}};
    const ReadingArgs<Real> args{.K = call.size(0)[1],
                                 .C = call.size(0)[2],
                                 .Q = call.size(0)[2],
                                 .mean = call.in<Real>(0),
                                 .queries = {},
                                 .ridge = call.in<Real>(1),
                                 .num_iters = 1,
                                 .squared_gram = squared_gram,
                                 .values = {},
                                 .weights = {},
                                 .info = call.out<int32_t>(3).data};
    return run(table.factor_addressing, args, factors);
  }
  if (call.name != "solve_factored" && call.name != "read_factored" && call.name != "read_factored_backward")
    return false;
  const bool squared_gram = call.size(5)[1] > 0;
  const AddressingFactors<const Real> factors{.lower = call.in<Real>(3),
                                              .pseudoinverse = call.in<Real>(4),
                                              .gram = squared_gram ? call.in<Real>(5) : Batch<const Real>{}};
  std::vector<int32_t> info(static_cast<size_t>(call.size(0)[0]));
  const int64_t num_iters = call.name == "solve_factored" ? 1 : call.number(6);
  const ReadingArgs<Real> args = reading_args<Real>(call, num_iters, squared_gram, info.data());
  if (call.name == "read_factored_backward")
    return run(table.read_factored_backward, args, factors, reading_grads<Real>(call, 8));
  return run(table.read_factored, with_results(call, args), factors);
}

// Operators that change their arguments, as csrc/bindings/{posterior,writing,streaming}.cpp.
template <class Real, class Run>
bool answer_in_place(const Call& call, const Kernels<Real>& table, const Run& run) {
  if (call.name == "update_posterior_into") {
    PosteriorArgs<Real> args = update_args<Real>(call);
    args.new_mean = call.inout<Real>(7), args.new_cov = call.inout<Real>(8), args.keeps_refused = true;
    args.innovation_var = call.out<Real>(0), args.kl = call.out<Real>(1);
    args.log_evidence = call.out<Real>(2).data, args.info = call.out<int32_t>(3).data;
    return run(table.update_posterior_into, args);
  }
  if (call.name == "write_into") {
    WritingArgs<Real> args = writing_args<Real>(call);
    PosteriorArgs<Real>& posterior = args.posterior;
    posterior.new_mean = call.inout<Real>(9), posterior.new_cov = call.inout<Real>(10), posterior.keeps_refused = true;
    args.new_weights = call.out<Real>(0), posterior.innovation_var = call.out<Real>(1);
    posterior.kl = call.out<Real>(2), posterior.info = call.out<int32_t>(3).data;
    return run(table.write, args);
  }
  StreamingArgs<Real> args{};
  args.K = call.size(0)[1], args.mean = call.inout<Real>(0);
  if (call.name == "refresh_streams") {
    args.C = call.size(0)[2], args.inverse = call.inout<Real>(1), args.cov = args.inverse;
    args.ridge = call.in<Real>(2), args.info = call.out<int32_t>(0);
    return run(table.refresh_streams, args);
  }
  if (call.name != "stream_patterns") return false;
  args.T = call.size(5)[1], args.C = call.size(5)[2];
  args.cov = call.inout<Real>(1), args.inverse = call.inout<Real>(2), args.refreshes = call.inout<int64_t>(3);
  args.weights = call.in<Real>(4), args.values = call.in<Real>(5), args.noise_var = call.in<Real>(6);
  args.ridge = call.in<Real>(7), args.num_opt_iters = call.number(8), args.mask = call.in<bool>(9);
  args.new_weights = call.out<Real>(0), args.innovation_var = call.out<Real>(1), args.kl = call.out<Real>(2);
  args.log_evidence = call.out<Real>(3).data, args.info = call.out<int32_t>(4);
  return run(table.stream_patterns, args);
}

template <class Real, class Run>
bool answer_matrix_normal(const Call& call, const Kernels<Real>& table, const Run& run) {
  const bool divergence = call.name.starts_with("kl_memory"), backward = call.name.ends_with("_backward");
  if (!divergence && !call.name.starts_with("logdet")) return false;
  const auto in = [&](size_t i) { return call.in<Real>(i); };
  const auto out = [&](size_t i) { return call.out<Real>(i); };
  MatrixNormalArgs<Real> args{};
  args.K = call.size(0)[1], args.C = divergence ? call.size(0)[2] : 0;
  if (divergence) {
    args.mean = in(0), args.cov = in(1), args.prior_mean = in(2), args.prior_cov = in(3);
  } else {
    args.cov = in(0);
  }
  if (!backward) {
    args.result = out(0).data, args.info = call.out<int32_t>(1).data;
    return run(divergence ? table.kl_memory : table.logdet, args);
  }
  MatrixNormalGrads<Real> grads{};
  grads.result = in(divergence ? 4 : 1);
  if (divergence) {
    grads.to_mean = out(0), grads.to_cov = out(1), grads.to_prior_mean = out(2), grads.to_prior_cov = out(3);
  } else {
    grads.to_cov = out(0);
  }
  return run(divergence ? table.kl_memory_backward : table.logdet_backward, args, grads);
}

template <class Real>
bool answer(const Call& call) {
  const Kernels<Real>& table = FASTKM_LEVEL_NAME::kernels<Real>();
  const auto run = [&](auto kernel, const auto&... args) {
    Call::over_threads(call.size(0)[0], [&](int64_t begin, int64_t end) { kernel(args..., begin, end); });
    return true;
  };
  return answer_conditioning(call, table, run) || answer_living(call, table, run) || answer_reading(call, table, run) ||
         answer_factored(call, table, run) || answer_in_place(call, table, run) || answer_products(call, table, run) ||
         answer_matrix_normal(call, table, run);
}

}  // namespace

int main() {
  for (Call call; receive_call(call);) {
    if (!(call.arguments[0].element == sizeof(float) ? answer<float>(call) : answer<double>(call))) {
      std::fprintf(stderr, "there is no %s\n", call.name.c_str());
      return 1;
    }
    send_results(call);
  }
}
