// Codes of 16 bits in the caller's memory: bfloat16 and float16 beside a memory of float32.
//
// A kernel widens the codes of a tile when it needs them, and narrows a tile of results. Nothing converts a whole
// tensor. Rounding is to the nearest, ties to even; NaN stays NaN.
#pragma once

#include "cpu/linalg/matrix.h"

namespace fastkm::FASTKM_LEVEL {

typedef uint32_t Words [[gnu::vector_size(FASTKM_VECTOR_BYTES)]];
typedef uint16_t HalfWords [[gnu::vector_size(FASTKM_VECTOR_BYTES / 2)]];

inline Vec<float> as_float(Words bits) { return reinterpret_cast<Vec<float>>(bits); }
inline Words as_words(Vec<float> vec) { return reinterpret_cast<Words>(vec); }

// The exponent e of a float, in its place.
constexpr uint32_t exponent(int e) { return static_cast<uint32_t>(127 + e) << 23; }

// Vectors of one type of 16 bits, in the low halves of words.
template <Element TYPE>
inline Vec<float> widen(Words code) {
  if constexpr (TYPE == kBFloat16) return as_float(code << 16);
  const Words sign = (code & 0x8000u) << 16, magnitude = code & 0x7fffu, shifted = magnitude << 13;
  constexpr uint32_t kBias = (127 - 15) << 23;
  const Words denormal = as_words(as_float(shifted + exponent(-14)) - as_float(Words{} + exponent(-14)));
  const Words normal = shifted + (magnitude >= Words{} + 0x7c00u ? Words{} + 2 * kBias : Words{} + kBias);
  return as_float(sign | (magnitude < Words{} + 0x400u ? denormal : normal));
}

template <Element TYPE>
inline Words narrow(Vec<float> vec) {
  const Words bits = as_words(vec);
  if constexpr (TYPE == kBFloat16) {
    const Words rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return (bits & 0x7fffffffu) > Words{} + 0x7f800000u ? (bits >> 16 | 0x40u) : rounded;
  }
  const Words magnitude = bits & 0x7fffffffu;
  const Words large = magnitude > Words{} + 0x7f800000u ? Words{} + 0x7e00u : Words{} + 0x7c00u;
  // Adding 2⁻¹ moves the last bit of a denormal to that of the sum, which the addition rounds.
  const Words denormal = as_words(as_float(magnitude) + as_float(Words{} + exponent(-1))) - exponent(-1);
  const Words normal = (magnitude - exponent(-15) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const Words small = magnitude < Words{} + exponent(-14) ? denormal : normal;
  return (bits >> 16 & 0x8000u) | (magnitude >= Words{} + exponent(16) ? large : small);
}

// Call f with a constant that is the type.
template <class F>
void for_element(int64_t type, const F& f) {
  if (type == kBFloat16)
    f(std::integral_constant<Element, kBFloat16>{});
  else
    f(std::integral_constant<Element, kFloat16>{});
}

template <Element TYPE>
void widen_row(float* to, const uint16_t* from, int64_t stride, int64_t count) {
  constexpr int64_t W = kLanes<float>;
  for (int64_t j = 0; j < count; j += W) {
    HalfWords codes = {};
    if (stride == 1 && j + W <= count)
      __builtin_memcpy(&codes, from + j, sizeof codes);
    else
      for (int64_t lane = 0; lane < smaller(W, count - j); ++lane) codes[lane] = from[(j + lane) * stride];
    store<float>(to + j, widen<TYPE>(__builtin_convertvector(codes, Words)));
  }
}

template <Element TYPE>
void narrow_row(uint16_t* to, const float* from, int64_t count) {
  constexpr int64_t W = kLanes<float>;
  for (int64_t j = 0; j < count; j += W) {
    const HalfWords codes = __builtin_convertvector(narrow<TYPE>(load(from + j)), HalfWords);
    if (j + W <= count)
      __builtin_memcpy(to + j, &codes, sizeof codes);
    else
      for (int64_t lane = 0; lane < count - j; ++lane) to[j + lane] = codes[lane];
  }
}

// Copy rows of codes, from row `first` on, into working memory of as many rows.
template <class Real>
void load_codes(const Matrix<Real>& to, const Batch<const Real>& from, int64_t type, int64_t b, int64_t first) {
  if (type == kFloat32) return load_matrix(to, from.from_row(first), b);
  if constexpr (std::is_same_v<Real, float>)
    for_element(type, [&](auto element) {
      const uint16_t* const codes = reinterpret_cast<const uint16_t*>(from.data) + b * from.stride[0];
      share_rows(to, [&](int64_t i) {
        widen_row<element>(to.row(i), codes + (first + i) * from.stride[1], from.stride[2], to.columns);
      });
    });
}

// Copy rows of results to the caller's codes, whose columns are contiguous. The rows are padded.
template <class Real>
void store_codes(const Batch<Real>& to, int64_t type, int64_t b, int64_t first, const Matrix<Real>& from) {
  if (type == kFloat32) return store_matrix(to.from_row(first), b, from);
  if constexpr (std::is_same_v<Real, float>)
    for_element(type, [&](auto element) {
      uint16_t* const codes = reinterpret_cast<uint16_t*>(to.data) + b * to.stride[0];
      share_rows(
          from, [&](int64_t i) { narrow_row<element>(codes + (first + i) * to.stride[1], from.row(i), from.columns); });
    });
}

}  // namespace fastkm::FASTKM_LEVEL
