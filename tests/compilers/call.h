// A call of an operator, as operators.py sends it, and the threads that compute it.
//
// All numbers are int64 in the order of bytes of the machine. A call is the name of an operator, the number of threads,
// the arguments, the results without their data, and the places of the arguments that the operator changes. An argument
// is a Kind and what it needs. The answer is the data of the results and then of the changed arguments.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "kernel_args.h"

namespace fastkm {

inline void receive(void* to, size_t bytes) {
  if (bytes > 0 && std::fread(to, bytes, 1, stdin) != 1) std::exit(1);
}

inline int64_t receive_number() {
  int64_t number;
  receive(&number, sizeof number);
  return number;
}

// kSame is the tensor of an earlier argument, whose place is the number.
enum Kind : int64_t { kNone = 0, kNumber = 1, kTensor = 2, kSame = 3 };

// An argument or a result. The memory of a tensor ends with its last element.
struct Value {
  Kind kind = kNone;
  int64_t number = 0;
  int64_t type = kFloat32;         // an Element, of codes
  int64_t element = 0, count = 0;  // bytes of an element; elements from the first to the last
  int64_t size[3] = {1, 1, 1}, stride[3] = {};
  std::shared_ptr<char[]> data;

  size_t bytes() const { return static_cast<size_t>(element * count); }
};

// A value without the data of a tensor, whose memory is filled with NaN.
inline Value receive_value() {
  Value value;
  value.kind = static_cast<Kind>(receive_number());
  if (value.kind == kNumber || value.kind == kSame) value.number = receive_number();
  if (value.kind != kTensor) return value;
  value.type = receive_number();
  value.element = receive_number();
  value.count = receive_number();
  receive(value.size, sizeof value.size);
  receive(value.stride, sizeof value.stride);
  value.data.reset(new char[value.bytes()]);
  std::memset(value.data.get(), 0xFF, value.bytes());
  return value;
}

inline int64_t threads_of_call = 1;

// The team of csrc/bindings/cpu_place.h on threads of this program.
inline void share_among_threads(int64_t count, Part part, const void* context) {
  const int64_t share = (count + threads_of_call - 1) / threads_of_call;
  std::vector<std::thread> others;
  for (int64_t begin = share; begin < count; begin += share)
    others.emplace_back(part, context, begin, std::min(begin + share, count));
  if (count > 0) part(context, 0, std::min(share, count));
  for (std::thread& other : others) other.join();
}

struct Call {
  std::string name;
  std::vector<Value> arguments, results;
  std::vector<size_t> changed;  // arguments

  const int64_t* size(size_t i) const { return arguments[i].size; }
  int64_t number(size_t i) const { return arguments[i].number; }
  bool has(size_t i) const { return arguments[i].kind == kTensor; }

  template <class Real>
  static Batch<Real> batch_of(const Value& value) {
    return {reinterpret_cast<Real*>(value.data.get()), {value.stride[0], value.stride[1], value.stride[2]}};
  }
  template <class Real>
  Batch<const Real> in(size_t i) const {
    return batch_of<const Real>(arguments[i]);
  }
  template <class Real>
  Batch<Real> inout(size_t i) const {
    return batch_of<Real>(arguments[i]);
  }
  template <class Real>
  Batch<Real> out(size_t i) const {
    return batch_of<Real>(results[i]);
  }

  // compute(begin, end) for n memories: spread over the threads, or all threads share one memory after the other.
  template <class F>
  static void over_threads(int64_t n, const F& compute) {
    const auto part = [](const void* context, int64_t begin, int64_t end) {
      (*static_cast<const F*>(context))(begin, end);
    };
    if (n >= threads_of_call) return share_among_threads(n, part, &compute);
    const Team team{threads_of_call, &share_among_threads};
    current_team() = &team;
    compute(int64_t{0}, n);
    current_team() = nullptr;
  }
};

inline bool receive_call(Call& call) {
  int64_t length;
  if (std::fread(&length, sizeof length, 1, stdin) != 1) return false;
  call.name.resize(static_cast<size_t>(length));
  receive(call.name.data(), call.name.size());
  threads_of_call = receive_number();
  call.arguments.resize(static_cast<size_t>(receive_number()));
  for (Value& value : call.arguments) {
    value = receive_value();
    if (value.kind == kSame)
      value = call.arguments[static_cast<size_t>(value.number)];
    else
      receive(value.data.get(), value.bytes());
  }
  call.results.resize(static_cast<size_t>(receive_number()));
  for (Value& value : call.results) value = receive_value();
  call.changed.resize(static_cast<size_t>(receive_number()));
  for (size_t& place : call.changed) place = static_cast<size_t>(receive_number());
  return true;
}

inline void send_results(const Call& call) {
  const auto send = [](const Value& value) { std::fwrite(value.data.get(), 1, value.bytes(), stdout); };
  for (const Value& value : call.results) send(value);
  for (const size_t place : call.changed) send(call.arguments[place]);
  std::fflush(stdout);
}

}  // namespace fastkm
