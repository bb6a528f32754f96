// The passes over rows of alignment_loss on the CPU; torch computes the matrix products between them.
//   gather_norm: LayerNorm of the tower's token at the place of each row of the branch; rows without one become zeros.
//   cosine: a = LayerNorm(y), loss = sum of 2 - 2 cos(a, b); gradients in y, and in bias, gain and shift summed over rows.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../common.h"
#include "row_sums.h"
#include "target_clones.h"

namespace bt {
namespace {

// Rows of one partial sum: a constant, so the result does not depend on the number of threads.
constexpr int64_t kRows = 32;
constexpr int64_t kGrain = 32768;  // least number of elements per thread

template <typename T, typename A = accumulate_t<T>>
inline void norm_row(const T* x, const A* weight, const A* bias, int64_t n, A eps, A* out) {
  const Moments<A> m = moments(x, n, eps);
  for (int64_t i = 0; i < n; ++i) out[i] = (load(x[i]) - m.mean) * m.rstd * weight[i] + bias[i];
}

BT_TARGET_CLONES void norm(const float* x, const float* w, const float* b, int64_t n, float eps, float* out) {
  norm_row(x, w, b, n, eps, out);
}
BT_TARGET_CLONES void norm(const double* x, const double* w, const double* b, int64_t n, double eps, double* out) {
  norm_row(x, w, b, n, eps, out);
}
BT_TARGET_CLONES void norm(const torch::headeronly::BFloat16* x, const float* w, const float* b, int64_t n, float eps,
                           float* out) {
  norm_row(x, w, b, n, eps, out);
}
BT_TARGET_CLONES void norm(const torch::headeronly::Half* x, const float* w, const float* b, int64_t n, float eps,
                           float* out) {
  norm_row(x, w, b, n, eps, out);
}

// Returns the loss of one row. If grad_y is not null, writes the gradient in y and adds the row's share of the
// gradients [bias, gain, shift], F each, to sums. a is scratch of F elements.
template <typename A>
inline A cosine_row(const A* y, const A* b, const A* gain, const A* shift, int64_t n, A eps, A* a, A* grad_y,
                    A* sums) {
  const Moments<A> m = moments(y, n, eps);
  for (int64_t i = 0; i < n; ++i) a[i] = (y[i] - m.mean) * m.rstd * gain[i] + shift[i];
  const A least = A(1e-12);
  const A length = std::max(std::sqrt(sum_over<A>(n, [&](int64_t i) { return a[i] * a[i]; })), least);
  const A other = std::max(std::sqrt(sum_over<A>(n, [&](int64_t i) { return b[i] * b[i]; })), least);
  const A cosine = sum_over<A>(n, [&](int64_t i) { return a[i] * b[i]; }) / (length * other);
  if (!grad_y) return 2 - 2 * cosine;
  const A to_a = 2 * cosine / (length * length), to_b = -2 / (length * other);
  for (int64_t i = 0; i < n; ++i) {
    const A grad = to_a * a[i] + to_b * b[i], normed = (y[i] - m.mean) * m.rstd;
    sums[n + i] += grad * normed;
    sums[2 * n + i] += grad;
    grad_y[i] = grad * gain[i];
  }
  const A mean = sum_over<A>(n, [&](int64_t i) { return grad_y[i]; }) / static_cast<A>(n);
  const A along =
      sum_over<A>(n, [&](int64_t i) { return grad_y[i] * ((y[i] - m.mean) * m.rstd); }) / static_cast<A>(n);
  for (int64_t i = 0; i < n; ++i) {
    const A back = m.rstd * (grad_y[i] - mean - (y[i] - m.mean) * m.rstd * along);
    grad_y[i] = back;
    sums[i] += back;
  }
  return 2 - 2 * cosine;
}

BT_TARGET_CLONES float cosine(const float* y, const float* b, const float* gain, const float* shift, int64_t n,
                              float eps, float* a, float* grad_y, float* sums) {
  return cosine_row(y, b, gain, shift, n, eps, a, grad_y, sums);
}
BT_TARGET_CLONES double cosine(const double* y, const double* b, const double* gain, const double* shift, int64_t n,
                               double eps, double* a, double* grad_y, double* sums) {
  return cosine_row(y, b, gain, shift, n, eps, a, grad_y, sums);
}

// The places p*T + t of the rows of the branch, B*(1+N); those of index [B, N], and -1 of a video's first row, CLS.
class Places {
 public:
  explicit Places(const Tensor& index) : index_(index.const_data_ptr<int64_t>()), rows_(1 + index.size(1)) {}
  int64_t video(int64_t row) const { return row / rows_; }
  int64_t operator[](int64_t row) const {
    const int64_t token = row % rows_;
    return token ? index_[video(row) * (rows_ - 1) + token - 1] : -1;
  }

 private:
  const int64_t* index_;
  int64_t rows_;
};

void check_rows(const Tensor& index, int64_t first, int64_t count) {
  STD_TORCH_CHECK(index.is_contiguous(), "alignment_loss: index must be contiguous");
  STD_TORCH_CHECK(first >= 0 && first + count <= index.size(0) * (1 + index.size(1)),
                  "alignment_loss: rows past the end of the branch");
}

// target [B, T, 1+P, D], index [B, N]; rows [first, first + count) of the branch.
Tensor gather_norm(const Tensor& target_in, const Tensor& index, int64_t first, int64_t count, const Tensor& weight,
                   const Tensor& bias, double eps) {
  const char* op = "alignment_loss";
  const Tensor target = adjacent_rows(target_in);
  const int64_t frames = target.size(1), patches = target.size(2) - 1, width = target.size(3);
  check_rows(index, first, count);
  STD_TORCH_CHECK(index.size(0) == target.size(0), op, ": index and target must have the same batch size");
  const Places place(index);
  for (int64_t i = first; i < first + count; ++i) {
    STD_TORCH_CHECK(place[i] < frames * patches, op, ": index holds ", place[i],
                    ", expected -1 or a value below P*T = ", frames * patches);
  }
  Tensor out = empty_like_shape(target, {count, width}, wide_type(target));
  dispatch_float(target.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const T* from = static_cast<const T*>(target.const_data_ptr());
    const A *w = weight.const_data_ptr<A>(), *b = bias.const_data_ptr<A>();
    A* to = out.mutable_data_ptr<A>();
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width));
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = place[first + i];
        if (at < 0) {
          std::fill_n(to + i * width, width, A(0));
          continue;
        }
        const T* x = from + place.video(first + i) * target.stride(0) + at % frames * target.stride(1) +
                     (1 + at / frames) * target.stride(2);
        norm(x, w, b, width, static_cast<A>(eps), to + i * width);
      }
    });
  });
  return out;
}

// y and b [count, F] of rows [first, first + count). Returns the sum of the losses, and with grads the gradients in y
// [count, F] and, summed over the rows, in bias, gain and shift [3, F].
std::tuple<Tensor, Tensor, Tensor> cosine_rows(const Tensor& y_in, const Tensor& b_in, const Tensor& index,
                                               int64_t first, const Tensor& gain, const Tensor& shift, double eps,
                                               bool grads) {
  const char* op = "alignment_loss";
  const Tensor y = torch::stable::contiguous(y_in), b = torch::stable::contiguous(b_in);
  const int64_t count = y.size(0), width = y.size(1), parts = (count + kRows - 1) / kRows;
  check_rows(index, first, count);
  const Places place(index);
  Tensor loss = empty_like_shape(y, {});
  Tensor grad_y = grads ? empty_like_shape(y, {count, width}) : empty_like_shape(y, {0});
  Tensor sums = grads ? empty_like_shape(y, {3, width}) : empty_like_shape(y, {0});
  const int64_t each = 4 * width + 1;  // of a part: three sums, one row and the loss
  Tensor scratch = empty_like_shape(y, {parts, each});
  dispatch_float(y.scalar_type(), op, [&](auto zero) {
    using A = decltype(zero);
    if constexpr (std::is_same_v<A, float> || std::is_same_v<A, double>) {
      const A *from = y.const_data_ptr<A>(), *other = b.const_data_ptr<A>();
      const A *w = gain.const_data_ptr<A>(), *s = shift.const_data_ptr<A>();
      A* partial = scratch.mutable_data_ptr<A>();
      A* to = grads ? grad_y.mutable_data_ptr<A>() : nullptr;
      torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
          A *sum = partial + part * each, *row = sum + 3 * width, *lost = row + width;
          std::fill_n(sum, each, A(0));
          for (int64_t i = part * kRows; i < std::min(count, (part + 1) * kRows); ++i) {
            if (place[first + i] >= 0) {
              *lost += cosine(from + i * width, other + i * width, w, s, width, static_cast<A>(eps), row,
                              to ? to + i * width : nullptr, sum);
            } else if (to) {
              std::fill_n(to + i * width, width, A(0));
            }
          }
        }
      });
      double total = 0;
      for (int64_t part = 0; part < parts; ++part) total += partial[(part + 1) * each - 1];
      *loss.mutable_data_ptr<A>() = static_cast<A>(total);
      if (!grads) return;
      A* to_sums = sums.mutable_data_ptr<A>();
      std::fill_n(to_sums, 3 * width, A(0));
      for (int64_t part = 0; part < parts; ++part) {
        for (int64_t i = 0; i < 3 * width; ++i) to_sums[i] += partial[part * each + i];
      }
    } else {
      STD_TORCH_CHECK(false, op, ": y must be float32 or float64");
    }
  });
  return {loss, grad_y, sums};
}

}  // namespace
}  // namespace bt

STABLE_TORCH_LIBRARY_FRAGMENT(bt_kernels_native, m) {
  m.def(
      "alignment_gather_norm(Tensor target, Tensor index, int first, int count, Tensor weight, Tensor bias, "
      "float eps) -> Tensor");
  m.def(
      "alignment_cosine(Tensor y, Tensor b, Tensor index, int first, Tensor gain, Tensor shift, float eps, bool grads) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(bt_kernels_native, CPU, m) {
  m.impl("alignment_gather_norm", TORCH_BOX(&bt::gather_norm));
  m.impl("alignment_cosine", TORCH_BOX(&bt::cosine_rows));
}
