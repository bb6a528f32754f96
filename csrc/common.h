// Checks and dtype dispatch shared by the CPU and the CUDA launchers. Only libtorch's stable ABI is used, so that one
// build serves several torch versions.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace bt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Type of sums: float32 for the 16-bit types and float32, float64 for float64.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using accumulate_t = typename Accumulate<T>::type;

// Calls f(T{}) with the C++ type of dtype.
template <typename F>
void dispatch_float(ScalarType dtype, const char* op, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return f(torch::headeronly::Half{});
    default:
      STD_TORCH_CHECK(false, op, ": expected float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(dtype));
  }
}

// Kernels read rows of adjacent elements; every other dimension may have any stride.
inline Tensor adjacent_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor empty_like_shape(const Tensor& like, std::initializer_list<int64_t> shape,
                               std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}

inline void check_same(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), op, ": ", name, " has dtype ",
                  torch::headeronly::toString(tensor.scalar_type()), ", expected that of backbone, ",
                  torch::headeronly::toString(like.scalar_type()));
  STD_TORCH_CHECK(tensor.device() == like.device(), op, ": ", name, " is on another device than backbone");
}

}  // namespace bt
