// Sums over a row of adjacent elements, and LayerNorm's moments, written so that compilers vectorise them.
#pragma once

#include <cmath>
#include <cstdint>

#include "convert.h"

namespace bt {

// The number of lanes is that of the widest vectors, because the compiler must not reorder one chain of additions.
constexpr int kLanes = 16;

template <typename A, typename F>
inline A sum_over(int64_t n, const F& term) {
  A lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += term(i + l);
  }
  A sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += lanes[l];
  for (; i < n; ++i) sum += term(i);
  return sum;
}

template <typename A>
struct Moments {
  A mean, rstd;
};

template <typename T, typename A = accumulate_t<T>>
inline Moments<A> moments(const T* x, int64_t n, A eps) {
  const A mean = sum_over<A>(n, [&](int64_t i) { return load(x[i]); }) / static_cast<A>(n);
  const A var =
      sum_over<A>(n, [&](int64_t i) { return (load(x[i]) - mean) * (load(x[i]) - mean); }) / static_cast<A>(n);
  return {mean, A(1) / std::sqrt(var + eps)};
}

inline ScalarType wide_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace bt
