// LayerNorm of the patch rows that a gather has written, and its backward: out [B, 1+N, D], index [B, N] with -1 for
// padding, whose rows become zeros and are not read. mean, rstd [B, N] have the type of sums.
#include "../common.h"

#include <algorithm>

#include "row_sums.h"
#include "target_clones.h"

namespace bt {
namespace {

constexpr int64_t kGrain = 32768;  // least number of elements per thread
constexpr int64_t kRows = 32;      // rows of one partial sum: independent of the number of threads

template <typename T, typename A = accumulate_t<T>>
inline void norm_row(const T* x, const T* weight, const T* bias, int64_t n, A eps, T* to, A* mean, A* rstd) {
  const Moments<A> m = moments(x, n, eps);
  for (int64_t i = 0; i < n; ++i) {
    to[i] = store<T>((load(x[i]) - m.mean) * m.rstd * load(weight[i]) + load(bias[i]));
  }
  *mean = m.mean;
  *rstd = m.rstd;
}

// total = grad + rstd (y - mean(y) - x^ mean(y x^)) with y = weight * up; adds up * x^ and up to sums[0:n], sums[n:2n].
template <typename T, typename A = accumulate_t<T>>
inline void norm_row_backward(const T* grad, const T* up, const T* x, const T* weight, A mean, A rstd, int64_t n,
                              T* total, A* sums) {
  const A centre = sum_over<A>(n, [&](int64_t i) { return load(up[i]) * load(weight[i]); }) / static_cast<A>(n);
  const A along = sum_over<A>(n, [&](int64_t i) {
                    return load(up[i]) * load(weight[i]) * ((load(x[i]) - mean) * rstd);
                  }) / static_cast<A>(n);
  for (int64_t i = 0; i < n; ++i) {
    const A normed = (load(x[i]) - mean) * rstd;
    const A back = rstd * (load(up[i]) * load(weight[i]) - centre - normed * along);
    total[i] = store<T>((grad ? load(grad[i]) : A(0)) + back);
    sums[i] += load(up[i]) * normed;
    sums[n + i] += load(up[i]);
  }
}

#define BT_ROW_NORM(T)                                                                                             \
  BT_TARGET_CLONES void run(const T* x, const T* weight, const T* bias, int64_t n, accumulate_t<T> eps, T* to,     \
                            accumulate_t<T>* mean, accumulate_t<T>* rstd) {                                        \
    norm_row(x, weight, bias, n, eps, to, mean, rstd);                                                             \
  }                                                                                                                \
  BT_TARGET_CLONES void run_backward(const T* grad, const T* up, const T* x, const T* weight, accumulate_t<T> mean, \
                                     accumulate_t<T> rstd, int64_t n, T* total, accumulate_t<T>* sums) {           \
    norm_row_backward(grad, up, x, weight, mean, rstd, n, total, sums);                                            \
  }
BT_ROW_NORM(float)
BT_ROW_NORM(double)
BT_ROW_NORM(torch::headeronly::BFloat16)
BT_ROW_NORM(torch::headeronly::Half)
#undef BT_ROW_NORM

void check(const char* op, const Tensor& out, const Tensor& weight, const Tensor& index) {
  STD_TORCH_CHECK(out.dim() == 3 && index.dim() == 2 && out.size(0) == index.size(0) && out.size(1) == 1 + index.size(1),
                  op, ": out must be [B, 1+N, D] for index [B, N]");
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == out.size(2), op, ": norm_weight must have shape [D]");
  check_same(op, "norm_weight", weight, out);
}

std::tuple<Tensor, Tensor, Tensor> row_norm(const Tensor& out_in, const Tensor& weight_in, const Tensor& bias_in,
                                            const Tensor& index_in, double eps) {
  const char* op = "row_norm";
  check(op, out_in, weight_in, index_in);
  const Tensor out = torch::stable::contiguous(out_in), index = torch::stable::contiguous(index_in);
  const Tensor weight = torch::stable::contiguous(weight_in), bias = torch::stable::contiguous(bias_in);
  const int64_t batch = out.size(0), tokens = index.size(1), width = out.size(2);
  Tensor normed = empty_like_shape(out, {batch, tokens, width});
  Tensor mean = empty_like_shape(out, {batch, tokens}, wide_type(out));
  Tensor rstd = empty_like_shape(out, {batch, tokens}, wide_type(out));
  const int64_t* place = index.const_data_ptr<int64_t>();
  dispatch_float(out.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const T *x = static_cast<const T*>(out.const_data_ptr()), *w = static_cast<const T*>(weight.const_data_ptr());
    const T* b = static_cast<const T*>(bias.const_data_ptr());
    T* to = static_cast<T*>(normed.mutable_data_ptr());
    A *means = mean.mutable_data_ptr<A>(), *scales = rstd.mutable_data_ptr<A>();
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width));
    torch::stable::parallel_for(0, batch * tokens, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (place[i] < 0) {
          std::fill_n(to + i * width, width, T(0.0f));
          means[i] = scales[i] = 0;
          continue;
        }
        run(x + (i + i / tokens + 1) * width, w, b, width, static_cast<A>(eps), to + i * width, means + i, scales + i);
      }
    });
  });
  return {normed, mean, rstd};
}

// Returns the gradient of out, from grad_out (or none) and grad_normed, and those of weight and bias.
std::tuple<Tensor, Tensor, Tensor> row_norm_backward(const std::optional<Tensor>& grad_in, const Tensor& up_in,
                                                     const Tensor& out_in, const Tensor& weight_in,
                                                     const Tensor& index_in, const Tensor& mean_in,
                                                     const Tensor& rstd_in) {
  const char* op = "row_norm_backward";
  check(op, out_in, weight_in, index_in);
  const Tensor out = torch::stable::contiguous(out_in), index = torch::stable::contiguous(index_in);
  const Tensor weight = torch::stable::contiguous(weight_in), up = adjacent_rows(up_in);
  const Tensor mean = torch::stable::contiguous(mean_in), rstd = torch::stable::contiguous(rstd_in);
  std::optional<Tensor> grad;
  if (grad_in) grad = adjacent_rows(*grad_in);
  const int64_t batch = out.size(0), tokens = index.size(1), width = out.size(2), rows = 1 + tokens;
  const int64_t all = batch * rows, parts = (all + kRows - 1) / kRows;
  Tensor total = empty_like_shape(out, {batch, rows, width});
  Tensor grad_weight = empty_like_shape(out, {width}), grad_bias = empty_like_shape(out, {width});
  const Tensor scratch = empty_like_shape(out, {parts, 2, width}, wide_type(out));
  const int64_t* place = index.const_data_ptr<int64_t>();
  dispatch_float(out.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const T *x = static_cast<const T*>(out.const_data_ptr()), *w = static_cast<const T*>(weight.const_data_ptr());
    const T* ups = static_cast<const T*>(up.const_data_ptr());
    const T* own = grad ? static_cast<const T*>(grad->const_data_ptr()) : nullptr;
    const A *means = mean.const_data_ptr<A>(), *scales = rstd.const_data_ptr<A>();
    T* to = static_cast<T*>(total.mutable_data_ptr());
    A* partial = static_cast<A*>(scratch.mutable_data_ptr());
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        A* sums = partial + part * 2 * width;
        std::fill_n(sums, 2 * width, A(0));
        for (int64_t i = part * kRows; i < std::min(all, (part + 1) * kRows); ++i) {
          const int64_t b = i / rows, r = i % rows, n = b * tokens + r - 1;
          const T* from = own ? own + b * grad->stride(0) + r * grad->stride(1) : nullptr;
          T* row = to + i * width;
          if (r == 0 && from) {
            std::copy_n(from, width, row);
          } else if (r == 0 || place[n] < 0) {
            std::fill_n(row, width, T(0.0f));
          } else {
            run_backward(from, ups + b * up.stride(0) + (r - 1) * up.stride(1), x + i * width, w, means[n], scales[n],
                         width, row, sums);
          }
        }
      }
    });
    T *to_weight = static_cast<T*>(grad_weight.mutable_data_ptr()), *to_bias = static_cast<T*>(grad_bias.mutable_data_ptr());
    for (int64_t d = 0; d < width; ++d) {
      A weight_sum = 0, bias_sum = 0;
      for (int64_t part = 0; part < parts; ++part) {
        weight_sum += partial[part * 2 * width + d];
        bias_sum += partial[part * 2 * width + width + d];
      }
      to_weight[d] = store<T>(weight_sum);
      to_bias[d] = store<T>(bias_sum);
    }
  });
  return {total, grad_weight, grad_bias};
}

}  // namespace
}  // namespace bt

STABLE_TORCH_LIBRARY_FRAGMENT(bt_kernels_native, m) {
  m.def("row_norm(Tensor out, Tensor weight, Tensor bias, Tensor index, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "row_norm_backward(Tensor? grad, Tensor grad_normed, Tensor out, Tensor weight, Tensor index, Tensor mean, "
      "Tensor rstd) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(bt_kernels_native, CPU, m) {
  m.impl("row_norm", TORCH_BOX(&bt::row_norm));
  m.impl("row_norm_backward", TORCH_BOX(&bt::row_norm_backward));
}
