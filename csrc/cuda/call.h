// Helpers of all launchers that use torch: element types, alignment, checks.
#pragma once

#include <algorithm>
#include <climits>
#include <string>
#include <type_traits>

#include "../common.h"
#include "launch.h"
#include "rows.cuh"

namespace bt {

template <typename T>
struct DeviceType {
  using type = T;
};
template <>
struct DeviceType<torch::headeronly::BFloat16> {
  using type = __nv_bfloat16;
};
template <>
struct DeviceType<torch::headeronly::Half> {
  using type = __half;
};

template <typename T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// Returns null for a tensor of size 0, which stands for a result that is not needed.
template <typename T>
T* result_of(const Tensor& tensor) {
  return tensor.numel() ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

// Calls f(T{}, V) with the kernels' element type and vector length, an integral constant. V gives vectors of 16 bytes
// if the width of a row and all strides of the tensors (except the last) are multiples of it, else V is 1.
template <typename F>
void dispatch_rows(ScalarType dtype, const char* op, int64_t width, std::initializer_list<const Tensor*> tensors,
                   const F& f) {
  dispatch_float(dtype, op, [&](auto zero) {
    using T = typename DeviceType<decltype(zero)>::type;
    constexpr int whole = 16 / sizeof(T);
    bool vectors = in_vectors_of(whole, {}, {width});
    for (const Tensor* tensor : tensors) {
      vectors = vectors && in_vectors_of(whole, {tensor->const_data_ptr()}, {});
      for (int64_t i = 0; i + 1 < tensor->dim(); ++i) vectors = vectors && tensor->stride(i) % whole == 0;
    }
    if (vectors) {
      f(T{}, std::integral_constant<int, whole>{});
    } else {
      f(T{}, std::integral_constant<int, 1>{});
    }
  });
}

template <typename T>
Tower<T> tower_of(const Tensor& t) {
  return {data_of<T>(t), t.stride(0), t.stride(1), t.stride(2)};
}

template <typename T>
Rows<T> rows_of(const Tensor& t) {
  return {data_of<T>(t), t.stride(0), t.stride(1)};
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (int64_t i = 0; same && i < tensor.dim(); ++i) same = tensor.size(i) == shape.begin()[i];
  if (same) return;
  std::string expected;
  for (int64_t size : shape) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
  STD_TORCH_CHECK(false, op, ": ", name, " must have shape [", expected, "]");
}

// index and frame_counts in the layout that kernels require.
struct PlacesCall {
  Tensor index;
  std::optional<Tensor> frame_counts;
  Places places;

  PlacesCall(const char* op, const Tensor& index_in, const std::optional<Tensor>& counts_in, const Tensor& like,
             int64_t batch, int64_t patches, int64_t frames, int64_t width)
      : index(torch::stable::contiguous(index_in)) {
    check_shape(op, "index", index_in, {batch, index_in.dim() == 2 ? index_in.size(1) : 0});
    check_list(op, "index", index_in, like);
    if (counts_in) {
      check_shape(op, "frame_counts", *counts_in, {batch});
      check_list(op, "frame_counts", *counts_in, like);
      frame_counts = torch::stable::contiguous(*counts_in);
    }
    STD_TORCH_CHECK(frames >= 1 && patches >= 0, op, ": expected at least one frame and no negative number of patches");
    STD_TORCH_CHECK(frames * std::max<int64_t>(patches, 1) <= INT_MAX, op, ": P*T is more than 32 bits hold");
    places = {index.const_data_ptr<int64_t>(), frame_counts ? frame_counts->const_data_ptr<int64_t>() : nullptr,
              static_cast<int>(frames), batch, patches, index.size(1), width};
  }

  // Allocates the memory for rows_of_places.
  Tensor row_of() const {
    return empty_like_shape(index, {places.batch, places.patches * places.frames}, ScalarType::Int);
  }

 private:
  static void check_list(const char* op, const char* name, const Tensor& list, const Tensor& like) {
    STD_TORCH_CHECK(list.scalar_type() == ScalarType::Long, op, ": ", name, " has dtype ",
                    torch::headeronly::toString(list.scalar_type()), ", expected int64");
    STD_TORCH_CHECK(list.device() == like.device(), op, ": ", name, " is on another device than the tensors");
  }
};

template <typename T>
constexpr ScalarType sum_type = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

}  // namespace bt
