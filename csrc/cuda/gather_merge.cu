// Launchers of gather_merge on CUDA. No launcher waits for the device, and so none checks the values in index or
// frame_counts: a place past the end gives a row of NaN.
#include "gather_merge.cuh"

#include <algorithm>
#include <climits>
#include <type_traits>

#include "../gather_merge.h"
#include "launch.h"

namespace bt {
namespace {

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

// A call as device code takes it.
struct CudaCall : MergeCall {
  CudaCall(const char* op, const Tensor& backbone_in, const Tensor& branch_in, const std::optional<Tensor>& gate_in,
           const Tensor& index_in, const std::optional<Tensor>& counts_in, const Tensor* grad_in)
      : MergeCall(op, backbone_in, branch_in, gate_in, index_in, counts_in, grad_in) {
    STD_TORCH_CHECK(shape.frames * std::max<int64_t>(shape.patches, 1) <= INT_MAX, op,
                    ": P*T is more than 32 bits hold");
  }

  template <typename T>
  MergeDevice<T> args() const {
    return {static_cast<const T*>(backbone.const_data_ptr()),
            static_cast<const T*>(branch.const_data_ptr()),
            gate ? static_cast<const T*>(gate->const_data_ptr()) : nullptr,
            static_cast<const T*>(grad.const_data_ptr()),
            index.const_data_ptr<int64_t>(),
            frame_counts ? frame_counts->const_data_ptr<int64_t>() : nullptr,
            static_cast<int>(shape.frames), shape.batch, shape.patches, shape.width, shape.tokens,
            stride.backbone_batch, stride.backbone_frame, stride.backbone_token,
            stride.branch_batch, stride.branch_row, stride.grad_batch, stride.grad_row};
  }

  // Whether every row starts on a multiple of `elements` elements and of 16 bytes.
  bool in_vectors_of(int64_t elements) const {
    for (int64_t step : {shape.width, stride.backbone_batch, stride.backbone_frame, stride.backbone_token,
                         stride.branch_batch, stride.branch_row, stride.grad_batch, stride.grad_row}) {
      if (step % elements) return false;
    }
    return aligned(backbone) && aligned(branch) && aligned(grad) && (!gate || aligned(*gate));
  }

  static bool aligned(const Tensor& tensor) {
    return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  }

  // Calls f(T{}, V) with the kernel's element type and vector length, an integral constant.
  template <typename F>
  void dispatch(const char* op, const F& f) const {
    dispatch_float(branch.scalar_type(), op, [&](auto zero) {
      using T = typename DeviceType<decltype(zero)>::type;
      constexpr int whole = 16 / sizeof(T);
      if (in_vectors_of(whole)) {
        f(T{}, std::integral_constant<int, whole>{});
      } else {
        f(T{}, std::integral_constant<int, 1>{});
      }
    });
  }
};

Tensor gather_merge_cuda(const Tensor& backbone, const Tensor& branch, const std::optional<Tensor>& gate,
                         const Tensor& index, const std::optional<Tensor>& frame_counts) {
  const char* op = "gather_merge";
  const CudaCall call(op, backbone, branch, gate, index, frame_counts, nullptr);
  const MergeShape& s = call.shape;
  const Launch on(op, branch.get_device_index());
  Tensor out = empty_like_shape(branch, {s.batch, s.rows(), s.width});
  call.dispatch(op, [&](auto zero, auto vector) {
    using T = decltype(zero);
    on.run(merge_forward<T, vector>, s.batch * merge_blocks(s.tokens), kThreads, call.args<T>(),
           static_cast<T*>(out.mutable_data_ptr()));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gather_merge_backward_cuda(const Tensor& grad, const Tensor& backbone,
                                                              const Tensor& branch, const std::optional<Tensor>& gate,
                                                              const Tensor& index,
                                                              const std::optional<Tensor>& frame_counts,
                                                              bool need_backbone, bool need_branch, bool need_gate) {
  const char* op = "gather_merge_backward";
  const CudaCall call(op, backbone, branch, gate, index, frame_counts, &grad);
  const MergeShape& s = call.shape;
  const Launch on(op, branch.get_device_index());
  need_gate = need_gate && gate.has_value();
  const auto none = [&] { return empty_like_shape(branch, {0}); };
  Tensor grad_backbone = need_backbone ? empty_like_shape(branch, {s.batch, s.frames, 1 + s.patches, s.width}) : none();
  Tensor grad_branch = need_branch ? empty_like_shape(branch, {s.batch, s.rows(), s.width}) : none();
  Tensor grad_gate = need_gate ? empty_like_shape(branch, {s.width}) : none();

  const int64_t rows = s.batch * s.rows(), each = merge_rows_per_partial(rows), partials = (rows + each - 1) / each;
  call.dispatch(op, [&](auto zero, auto vector) {
    using T = decltype(zero);
    if (need_branch || need_gate) {
      const ScalarType sum_type = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
      const Tensor sums = empty_like_shape(branch, {need_gate ? partials : 0, s.width}, sum_type);
      auto* partial = need_gate ? static_cast<sum_t<T>*>(sums.mutable_data_ptr()) : nullptr;
      const int64_t columns = kWarp * vector, tiles = (s.width + columns - 1) / columns;
      on.run(merge_backward_rows<T, vector>, tiles * partials, kThreads, call.args<T>(), tiles, each,
             need_branch ? static_cast<T*>(grad_branch.mutable_data_ptr()) : nullptr, partial);
      if (need_gate) {
        on.run(merge_gate_reduce<T>, (s.width + kWarp - 1) / kWarp, kThreads, static_cast<const sum_t<T>*>(partial),
               partials, s.width, static_cast<T*>(grad_gate.mutable_data_ptr()));
      }
    }
    if (need_backbone) {
      on.zero(grad_backbone.mutable_data_ptr(), grad_backbone.numel() * sizeof(T));
      on.run(merge_backward_backbone<T, vector>, s.batch * merge_blocks(s.tokens), kThreads, call.args<T>(),
             static_cast<T*>(grad_backbone.mutable_data_ptr()));
    }
  });
  return {grad_backbone, grad_branch, grad_gate};
}

}  // namespace
}  // namespace bt

STABLE_TORCH_LIBRARY_IMPL(bt_kernels_native, CUDA, m) {
  m.impl("gather_merge", TORCH_BOX(&bt::gather_merge_cuda));
  m.impl("gather_merge_backward", TORCH_BOX(&bt::gather_merge_backward_cuda));
}
