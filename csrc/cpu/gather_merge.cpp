// gather_merge on the CPU, forward and backward. Formula and shapes: ../gather_merge.h.
#include "../gather_merge.h"

#include <algorithm>
#include <type_traits>

#include "convert.h"
#include "target_clones.h"

namespace bt {
namespace {

// Columns that summing loops take together: this many accumulators fit the first-level cache.
constexpr int64_t kTile = 128;
// Least number of elements per thread.
constexpr int64_t kGrain = 32768;

template <typename T>
struct MergeArgs {
  const T* backbone;
  const T* branch;
  const T* gate;  // null: out = branch + m
  const T* grad;
  const int64_t* index;
  const int64_t* frame_counts;  // null: all frames are real
  MergeShape shape;
  MergeStrides stride;

  int64_t frames_of(int64_t b) const { return frame_counts ? frame_counts[b] : shape.frames; }
  const T* branch_row(int64_t b, int64_t r) const {
    return branch + b * stride.branch_batch + r * stride.branch_row;
  }
  const T* grad_row(int64_t b, int64_t r) const {
    return grad + b * stride.grad_batch + r * stride.grad_row;
  }
  const T* token(int64_t b, int64_t place) const {  // place = p*T + t
    return backbone + b * stride.backbone_batch + (place % shape.frames) * stride.backbone_frame +
           (1 + place / shape.frames) * stride.backbone_token;
  }
};

// mean[0:width] = mean of columns [from, from + width) of the CLS tokens of the real frames; 0 if there are none.
template <typename T, typename A = accumulate_t<T>>
void mean_cls(const MergeArgs<T>& a, int64_t b, int64_t from, int64_t width, A* mean) {
  std::fill_n(mean, width, A(0));
  const int64_t frames = a.frames_of(b);
  for (int64_t t = 0; t < frames; ++t) {
    const T* cls = a.backbone + b * a.stride.backbone_batch + t * a.stride.backbone_frame + from;
    for (int64_t d = 0; d < width; ++d) mean[d] += load(cls[d]);
  }
  const A scale = frames > 0 ? A(1) / static_cast<A>(frames) : A(0);
  for (int64_t d = 0; d < width; ++d) mean[d] *= scale;
}

template <typename T, typename M, typename A = accumulate_t<T>>
void merge_row(const T* branch, const M* m, const T* gate, int64_t width, T* out) {
  if (gate) {
    for (int64_t d = 0; d < width; ++d) {
      const A g = load(gate[d]);
      out[d] = store<T>((A(1) - g) * load(branch[d]) + g * load(m[d]));
    }
  } else {
    for (int64_t d = 0; d < width; ++d) out[d] = store<T>(load(branch[d]) + load(m[d]));
  }
}

// Computes rows [begin, end) of the B*(1+N) rows of out.
template <typename T>
void forward_rows(const MergeArgs<T>& a, int64_t begin, int64_t end, T* out) {
  using A = accumulate_t<T>;
  const int64_t rows = a.shape.rows(), width = a.shape.width;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / rows, r = i % rows;
    T* to = out + i * width;
    if (r == 0) {
      A mean[kTile];
      for (int64_t from = 0; from < width; from += kTile) {
        const int64_t n = std::min(kTile, width - from);
        mean_cls(a, b, from, n, mean);
        merge_row(a.branch_row(b, 0) + from, mean, a.gate ? a.gate + from : nullptr, n, to + from);
      }
      continue;
    }
    const int64_t place = a.index[b * a.shape.tokens + r - 1];
    if (place < 0) {
      std::fill_n(to, width, T(0.0f));
    } else {
      merge_row(a.branch_row(b, r), a.token(b, place), a.gate, width, to);
    }
  }
}

template <typename T, typename M, typename A = accumulate_t<T>>
void add_gate_grad(const T* grad, const M* m, const T* branch, int64_t width, A* sum) {
  for (int64_t d = 0; d < width; ++d) {
    sum[d] += load(grad[d]) * (load(m[d]) - load(branch[d]));
  }
}

// Computes grad_branch (null: not needed) of rows [begin, end) and their part of grad_gate, sum[D] (null: not needed).
template <typename T, typename A = accumulate_t<T>>
void backward_rows(const MergeArgs<T>& a, int64_t begin, int64_t end, T* grad_branch, A* sum) {
  const int64_t rows = a.shape.rows(), width = a.shape.width;
  if (sum) std::fill_n(sum, width, A(0));
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / rows, r = i % rows;
    const int64_t place = r == 0 ? 0 : a.index[b * a.shape.tokens + r - 1];
    T* to = grad_branch ? grad_branch + i * width : nullptr;
    if (place < 0) {
      if (to) std::fill_n(to, width, T(0.0f));
      continue;
    }
    const T* grad = a.grad_row(b, r);
    if (to && a.gate) {
      for (int64_t d = 0; d < width; ++d) {
        to[d] = store<T>((A(1) - load(a.gate[d])) * load(grad[d]));
      }
    } else if (to) {
      std::copy_n(grad, width, to);
    }
    if (!sum) continue;
    const T* branch = a.branch_row(b, r);
    if (r > 0) {
      add_gate_grad(grad, a.token(b, place), branch, width, sum);
      continue;
    }
    A mean[kTile];
    for (int64_t from = 0; from < width; from += kTile) {
      const int64_t n = std::min(kTile, width - from);
      mean_cls(a, b, from, n, mean);
      add_gate_grad(grad + from, mean, branch + from, n, sum + from);
    }
  }
}

// Computes the columns of one tile of grad_backbone of video b. One thread has the whole tile, so rows can add to it.
template <typename T>
void backbone_tile(const MergeArgs<T>& a, int64_t b, int64_t from, T* grad_backbone) {
  using A = accumulate_t<T>;
  const MergeShape& s = a.shape;
  const int64_t width = std::min(kTile, s.width - from), tokens = 1 + s.patches;
  T* video = grad_backbone + b * s.frames * tokens * s.width + from;
  for (int64_t i = 0; i < s.frames * tokens; ++i) std::fill_n(video + i * s.width, width, T(0.0f));
  const T* gate = a.gate ? a.gate + from : nullptr;

  const int64_t frames = a.frames_of(b);
  const A scale = frames > 0 ? A(1) / static_cast<A>(frames) : A(0);
  const T* cls_grad = a.grad_row(b, 0) + from;
  for (int64_t t = 0; t < frames; ++t) {
    T* to = video + t * tokens * s.width;
    for (int64_t d = 0; d < width; ++d) {
      to[d] = store<T>(load(cls_grad[d]) * (gate ? load(gate[d]) : A(1)) * scale);
    }
  }
  for (int64_t n = 0; n < s.tokens; ++n) {
    const int64_t place = a.index[b * s.tokens + n];
    if (place < 0) continue;
    const T* grad = a.grad_row(b, 1 + n) + from;
    T* to = video + ((place % s.frames) * tokens + 1 + place / s.frames) * s.width;
    for (int64_t d = 0; d < width; ++d) {
      const A g = gate ? load(gate[d]) : A(1);
      to[d] = store<T>(load(to[d]) + g * load(grad[d]));
    }
  }
}

// The clones are plain functions, one set per dtype, because compilers do not clone templates.
#define BT_MERGE_CLONES(T)                                                                                      \
  BT_TARGET_CLONES void run_forward(const MergeArgs<T>& a, int64_t begin, int64_t end, T* out) {                \
    forward_rows(a, begin, end, out);                                                                           \
  }                                                                                                             \
  BT_TARGET_CLONES void run_backward(const MergeArgs<T>& a, int64_t begin, int64_t end, T* to,                  \
                                     accumulate_t<T>* sum) {                                                    \
    backward_rows(a, begin, end, to, sum);                                                                      \
  }                                                                                                             \
  BT_TARGET_CLONES void run_backbone(const MergeArgs<T>& a, int64_t b, int64_t from, T* to) {                   \
    backbone_tile(a, b, from, to);                                                                              \
  }
BT_MERGE_CLONES(float)
BT_MERGE_CLONES(double)
BT_MERGE_CLONES(torch::headeronly::BFloat16)
BT_MERGE_CLONES(torch::headeronly::Half)
#undef BT_MERGE_CLONES

void check_values(const char* op, const Tensor& index, const std::optional<Tensor>& frame_counts,
                  const MergeShape& s) {
  const auto* place = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < s.batch * s.tokens; ++i) {
    STD_TORCH_CHECK(place[i] >= -1 && place[i] < s.patches * s.frames, op, ": index holds ", place[i],
                    ", expected -1 or a value below P*T = ", s.patches * s.frames);
  }
  if (!frame_counts) return;
  const auto* count = frame_counts->const_data_ptr<int64_t>();
  for (int64_t b = 0; b < s.batch; ++b) {
    STD_TORCH_CHECK(count[b] >= 0 && count[b] <= s.frames, op, ": frame_counts holds ", count[b],
                    ", expected 0 to T = ", s.frames);
  }
}

// A call as these kernels take it. It checks the values of index, since reading them needs no device wait on a CPU.
struct CpuCall : MergeCall {
  CpuCall(const char* op, const Tensor& backbone_in, const Tensor& branch_in, const std::optional<Tensor>& gate_in,
          const Tensor& index_in, const std::optional<Tensor>& counts_in, const Tensor* grad_in)
      : MergeCall(op, backbone_in, branch_in, gate_in, index_in, counts_in, grad_in) {
    check_values(op, index, frame_counts, shape);
  }

  template <typename T>
  MergeArgs<T> args() const {
    return {static_cast<const T*>(backbone.const_data_ptr()),
            static_cast<const T*>(branch.const_data_ptr()),
            gate ? static_cast<const T*>(gate->const_data_ptr()) : nullptr,
            static_cast<const T*>(grad.const_data_ptr()),
            index.const_data_ptr<int64_t>(),
            frame_counts ? frame_counts->const_data_ptr<int64_t>() : nullptr,
            shape,
            stride};
  }
};

Tensor gather_merge_cpu(const Tensor& backbone, const Tensor& branch, const std::optional<Tensor>& gate,
                        const Tensor& index, const std::optional<Tensor>& frame_counts) {
  const char* op = "gather_merge";
  const CpuCall call(op, backbone, branch, gate, index, frame_counts, nullptr);
  const MergeShape& s = call.shape;
  Tensor out = empty_like_shape(branch, {s.batch, s.rows(), s.width});
  dispatch_float(branch.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    const MergeArgs<T> a = call.args<T>();
    T* to = static_cast<T*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, s.batch * s.rows(), std::max<int64_t>(1, kGrain / std::max<int64_t>(1, s.width)),
                                [&](int64_t begin, int64_t end) { run_forward(a, begin, end, to); });
  });
  return out;
}

template <typename T>
void gate_and_branch_grads(const MergeArgs<T>& a, T* grad_branch, T* grad_gate, const Tensor& like) {
  using A = accumulate_t<T>;
  const int64_t rows = a.shape.batch * a.shape.rows(), width = a.shape.width;
  const int64_t each = merge_rows_per_partial(rows), partials = (rows + each - 1) / each;
  const ScalarType sum_type = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  const Tensor sums = empty_like_shape(like, {grad_gate ? partials : 0, width}, sum_type);
  A* sum = grad_gate ? static_cast<A*>(sums.mutable_data_ptr()) : nullptr;
  torch::stable::parallel_for(0, partials, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      run_backward(a, i * each, std::min(rows, (i + 1) * each), grad_branch, sum ? sum + i * width : nullptr);
    }
  });
  if (!grad_gate) return;
  for (int64_t d = 0; d < width; ++d) {
    A total = 0;
    for (int64_t i = 0; i < partials; ++i) total += sum[i * width + d];
    grad_gate[d] = store<T>(total);
  }
}

std::tuple<Tensor, Tensor, Tensor> gather_merge_backward_cpu(const Tensor& grad, const Tensor& backbone,
                                                             const Tensor& branch, const std::optional<Tensor>& gate,
                                                             const Tensor& index,
                                                             const std::optional<Tensor>& frame_counts,
                                                             bool need_backbone, bool need_branch, bool need_gate) {
  const char* op = "gather_merge_backward";
  const CpuCall call(op, backbone, branch, gate, index, frame_counts, &grad);
  const MergeShape& s = call.shape;
  need_gate = need_gate && gate.has_value();
  Tensor grad_backbone = need_backbone
                             ? empty_like_shape(branch, {s.batch, s.frames, 1 + s.patches, s.width})
                             : empty_like_shape(branch, {0});
  Tensor grad_branch = need_branch ? empty_like_shape(branch, {s.batch, s.rows(), s.width})
                                   : empty_like_shape(branch, {0});
  Tensor grad_gate = need_gate ? empty_like_shape(branch, {s.width}) : empty_like_shape(branch, {0});
  dispatch_float(branch.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    const MergeArgs<T> a = call.args<T>();
    if (need_branch || need_gate) {
      gate_and_branch_grads(a, need_branch ? static_cast<T*>(grad_branch.mutable_data_ptr()) : nullptr,
                            need_gate ? static_cast<T*>(grad_gate.mutable_data_ptr()) : nullptr, branch);
    }
    if (need_backbone) {
      T* to = static_cast<T*>(grad_backbone.mutable_data_ptr());
      const int64_t tiles = (s.width + kTile - 1) / kTile;
      torch::stable::parallel_for(0, s.batch * tiles, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) run_backbone(a, i / tiles, i % tiles * kTile, to);
      });
    }
  });
  return {grad_backbone, grad_branch, grad_gate};
}

}  // namespace
}  // namespace bt

STABLE_TORCH_LIBRARY(bt_kernels_native, m) {
  m.def("gather_merge(Tensor backbone, Tensor branch, Tensor? gate, Tensor index, Tensor? frame_counts) -> Tensor");
  m.def(
      "gather_merge_backward(Tensor grad, Tensor backbone, Tensor branch, Tensor? gate, Tensor index, "
      "Tensor? frame_counts, bool need_backbone, bool need_branch, bool need_gate) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(bt_kernels_native, CPU, m) {
  m.impl("gather_merge", TORCH_BOX(&bt::gather_merge_cpu));
  m.impl("gather_merge_backward", TORCH_BOX(&bt::gather_merge_backward_cpu));
}
