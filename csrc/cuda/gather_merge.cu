// Launchers of gather_merge on CUDA. They do not wait for the device, so they do not check the values of index and
// frame_counts: a place past the end gives a row of NaN.
#include "gather_merge.cuh"

#include "../gather_merge.h"
#include "call.h"

namespace bt {
namespace {

// A call in the form that device code takes.
struct CudaMergeCall : MergeCall {
  CudaMergeCall(const char* op, const Tensor& backbone_in, const Tensor& branch_in,
                const std::optional<Tensor>& gate_in, const Tensor& index_in, const std::optional<Tensor>& counts_in,
                const Tensor* grad_in)
      : MergeCall(op, backbone_in, branch_in, gate_in, index_in, counts_in, grad_in) {
    STD_TORCH_CHECK(shape.frames * std::max<int64_t>(shape.patches, 1) <= INT_MAX, op,
                    ": P*T is more than 32 bits hold");
  }

  // Calls f(args, V) with the kernels' arguments and vector length.
  template <typename F>
  void dispatch(const char* op, const F& f) const {
    const Tensor& gate_or_any = gate ? *gate : branch;
    dispatch_rows(branch.scalar_type(), op, shape.width, {&backbone, &branch, &grad, &gate_or_any},
                  [&](auto zero, auto vector) {
                    using T = decltype(zero);
                    f(MergeDevice<T>{{index.const_data_ptr<int64_t>(),
                                      frame_counts ? frame_counts->const_data_ptr<int64_t>() : nullptr,
                                      static_cast<int>(shape.frames), shape.batch, shape.patches, shape.tokens,
                                      shape.width},
                                     tower_of<T>(backbone),
                                     rows_of<T>(branch),
                                     rows_of<T>(grad),
                                     gate ? data_of<T>(*gate) : nullptr},
                      zero, vector);
                  });
  }
};

Tensor gather_merge_cuda(const Tensor& backbone, const Tensor& branch, const std::optional<Tensor>& gate,
                         const Tensor& index, const std::optional<Tensor>& frame_counts) {
  const char* op = "gather_merge";
  const CudaMergeCall call(op, backbone, branch, gate, index, frame_counts, nullptr);
  const MergeShape& s = call.shape;
  const Launch on(op, branch.get_device_index());
  Tensor out = empty_like_shape(branch, {s.batch, s.rows(), s.width});
  call.dispatch(op, [&](const auto& a, auto zero, auto vector) {
    using T = decltype(zero);
    launch_merge_forward<T, vector>(on, a, static_cast<T*>(out.mutable_data_ptr()));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gather_merge_backward_cuda(const Tensor& grad, const Tensor& backbone,
                                                              const Tensor& branch, const std::optional<Tensor>& gate,
                                                              const Tensor& index,
                                                              const std::optional<Tensor>& frame_counts,
                                                              bool need_backbone, bool need_branch, bool need_gate) {
  const char* op = "gather_merge_backward";
  const CudaMergeCall call(op, backbone, branch, gate, index, frame_counts, &grad);
  const MergeShape& s = call.shape;
  const Launch on(op, branch.get_device_index());
  need_gate = need_gate && gate.has_value();
  const auto none = [&] { return empty_like_shape(branch, {0}); };
  Tensor grad_backbone = need_backbone ? empty_like_shape(branch, {s.batch, s.frames, 1 + s.patches, s.width}) : none();
  Tensor grad_branch = need_branch ? empty_like_shape(branch, {s.batch, s.rows(), s.width}) : none();
  Tensor grad_gate = need_gate ? empty_like_shape(branch, {s.width}) : none();

  const int64_t rows_each = merge_rows_per_partial(s.batch * s.rows());
  call.dispatch(op, [&](const auto& a, auto zero, auto vector) {
    using T = decltype(zero);
    const int64_t partials = need_gate ? parts(s.batch * s.rows(), rows_each) : 0;
    const Tensor sums = empty_like_shape(branch, {partials, s.width}, sum_type<T>);
    launch_merge_backward<T, vector>(on, a, rows_each, result_of<T>(grad_backbone), result_of<T>(grad_branch),
                                     result_of<T>(grad_gate), result_of<sum_t<T>>(sums));
  });
  return {grad_backbone, grad_branch, grad_gate};
}

}  // namespace
}  // namespace bt

STABLE_TORCH_LIBRARY_IMPL(bt_kernels_native, CUDA, m) {
  m.impl("gather_merge", TORCH_BOX(&bt::gather_merge_cuda));
  m.impl("gather_merge_backward", TORCH_BOX(&bt::gather_merge_backward_cuda));
}
