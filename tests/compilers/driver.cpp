// The CPU kernels of one level in a program without torch: it reads calls of the operators of fastkm/_runtime/schema.py
// from its standard input and writes their results to its standard output, until the input ends. operators.py is the
// other side. So the tests of the package can hold kernels of any compiler, and of another processor, to the truth.
//
// All numbers are int64 in the order of bytes of the machine. A call is the name of an operator, the number of threads,
// the arguments, and the results without their data. An argument is a Kind and what it needs.

#include FASTKM_LEVEL_SOURCE

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cpu/linalg/arena.cpp"

namespace {

using namespace fastkm;

void receive(void* to, size_t bytes) {
  if (bytes > 0 && std::fread(to, bytes, 1, stdin) != 1) std::exit(1);
}

int64_t receive_number() {
  int64_t number;
  receive(&number, sizeof number);
  return number;
}

enum Kind : int64_t { kNone = 0, kNumber = 1, kTensor = 2 };

// An argument or a result. The memory of a tensor ends with its last element.
struct Value {
  Kind kind = kNone;
  int64_t number = 0;
  int64_t element = 0, count = 0;  // bytes of an element; elements from the first to the last
  int64_t size[3] = {1, 1, 1}, stride[3] = {};
  std::unique_ptr<char[]> data;

  size_t bytes() const { return static_cast<size_t>(element * count); }
};

// A value without the data of a tensor, whose memory is filled with NaN.
Value receive_value() {
  Value value;
  value.kind = static_cast<Kind>(receive_number());
  if (value.kind == kNumber) value.number = receive_number();
  if (value.kind != kTensor) return value;
  value.element = receive_number();
  value.count = receive_number();
  receive(value.size, sizeof value.size);
  receive(value.stride, sizeof value.stride);
  value.data = std::make_unique<char[]>(value.bytes());
  std::memset(value.data.get(), 0xFF, value.bytes());
  return value;
}

struct Call {
  std::string name;
  int64_t threads;
  std::vector<Value> arguments, results;

  const int64_t* size(size_t i) const { return arguments[i].size; }
  int64_t number(size_t i) const { return arguments[i].number; }

  template <class Real>
  Batch<const Real> in(size_t i) const {
    const Value& value = arguments[i];
    return {reinterpret_cast<const Real*>(value.data.get()), {value.stride[0], value.stride[1], value.stride[2]}};
  }
  template <class Real>
  Batch<Real> out(size_t i) const {
    const Value& value = results[i];
    return {reinterpret_cast<Real*>(value.data.get()), {value.stride[0], value.stride[1], value.stride[2]}};
  }

  // compute(begin, end) for n memories or tiles, spread over the threads.
  template <class F>
  void over_threads(int64_t n, const F& compute) const {
    const int64_t share = (n + threads - 1) / threads;
    std::vector<std::thread> others;
    for (int64_t begin = share; begin < n; begin += share)
      others.emplace_back([&compute, begin, end = std::min(begin + share, n)] { compute(begin, end); });
    if (n > 0) compute(int64_t{0}, std::min(share, n));
    for (std::thread& other : others) other.join();
  }
};

bool receive_call(Call& call) {
  int64_t length;
  if (std::fread(&length, sizeof length, 1, stdin) != 1) return false;
  call.name.resize(static_cast<size_t>(length));
  receive(call.name.data(), call.name.size());
  call.threads = receive_number();
  call.arguments.resize(static_cast<size_t>(receive_number()));
  for (Value& value : call.arguments) {
    value = receive_value();
    receive(value.data.get(), value.bytes());
  }
  call.results.resize(static_cast<size_t>(receive_number()));
  for (Value& value : call.results) value = receive_value();
  return true;
}

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

template <class Real>
ReadingArgs<Real> reading_args(const Call& call, int64_t num_iters, size_t squared_gram, int32_t* info) {
  return {.K = call.size(0)[1],
          .C = call.size(0)[2],
          .Q = call.size(1)[1],
          .mean = call.in<Real>(0),
          .queries = call.in<Real>(1),
          .ridge = call.in<Real>(2),
          .num_iters = num_iters,
          .squared_gram = call.number(squared_gram) != 0,
          .values = {},
          .weights = {},
          .info = info};
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

template <class Real, class Run>
bool answer_reading(const Call& call, const Kernels<Real>& table, const Run& run) {
  if (call.name == "solve_addressing" || call.name == "read") {
    const bool whole = call.name == "read";
    int32_t* info = call.out<int32_t>(whole ? 2 : 1).data;
    ReadingArgs<Real> args = reading_args<Real>(call, whole ? call.number(3) : 1, whole ? 4 : 3, info);
    if (whole) args.values = call.out<Real>(0);
    args.weights = call.out<Real>(whole ? 1 : 0);
    run(table.read, args);
    return true;
  }
  if (call.name != "read_backward") return false;
  std::vector<int32_t> info(static_cast<size_t>(call.size(0)[0]));
  const ReadingGrads<Real> grads{.values = call.in<Real>(6),
                                 .weights = call.in<Real>(7),
                                 .to_mean = call.out<Real>(0),
                                 .to_queries = call.out<Real>(1),
                                 .to_ridge = call.out<Real>(2).data};
  return run(table.read_backward, reading_args<Real>(call, call.number(3), 4, info.data()), grads);
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
    call.over_threads(call.size(0)[0], [&](int64_t begin, int64_t end) { kernel(args..., begin, end); });
    return true;
  };
  return answer_conditioning(call, table, run) || answer_living(call, table, run) || answer_reading(call, table, run) ||
         answer_matrix_normal(call, table, run);
}

}  // namespace

int main() {
  for (Call call; receive_call(call);) {
    if (!(call.arguments[0].element == sizeof(float) ? answer<float>(call) : answer<double>(call))) {
      std::fprintf(stderr, "there is no %s\n", call.name.c_str());
      return 1;
    }
    for (const Value& value : call.results) std::fwrite(value.data.get(), 1, value.bytes(), stdout);
    std::fflush(stdout);
  }
}
