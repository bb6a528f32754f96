// Launchers of pool_video_tokens on CUDA. They do not wait for the device, so they do not check the values of index and
// frame_counts: the forward ignores a place past the end, the backward gives a row of NaN for it.
#include "pool_video_tokens.cuh"

#include "call.h"

namespace bt {
namespace {

// The tensors of a call in the layout that kernels require.
struct PoolCall {
  Tensor backbone, branch;
  PlacesCall at;

  PoolCall(const char* op, const Tensor& backbone_in, const Tensor& branch_in, const Tensor& index,
           const std::optional<Tensor>& frame_counts, int64_t patches, int64_t frames)
      : backbone(adjacent_rows(checked(op, "backbone", backbone_in, 4))),
        branch(adjacent_rows(checked(op, "branch", branch_in, 3))),
        at(op, index, frame_counts, backbone, backbone.size(0), patches, frames, backbone.size(3)) {
    const Places& s = at.places;
    const int64_t tower_frames = frame_counts ? frames : backbone.size(1);
    check_shape(op, "backbone", backbone, {s.batch, tower_frames, 1 + patches, s.width});
    check_shape(op, "branch", branch, {s.batch, 1 + s.tokens, s.width});
    check_same(op, "branch", branch, backbone);
    STD_TORCH_CHECK(tower_frames >= 1 && tower_frames <= INT_MAX, op, ": backbone needs at least one frame");
  }

  template <typename T>
  PoolDevice<T> args(const Tensor& row_of) const {
    return {at.places,         tower_of<T>(backbone), static_cast<int>(backbone.size(1)), rows_of<T>(branch), {},
            result_of<int32_t>(row_of)};
  }

 private:
  static const Tensor& checked(const char* op, const char* name, const Tensor& tensor, int64_t dimensions) {
    STD_TORCH_CHECK(tensor.dim() == dimensions, op, ": ", name, " has ", tensor.dim(), " dimensions, expected ",
                    dimensions);
    return tensor;
  }
};

Tensor pool_video_tokens_cuda(const Tensor& backbone, const Tensor& branch, const Tensor& index,
                              const std::optional<Tensor>& frame_counts, int64_t patches, int64_t frames) {
  const char* op = "pool_video_tokens";
  const PoolCall call(op, backbone, branch, index, frame_counts, patches, frames);
  const Places& s = call.at.places;
  const Launch on(op, backbone.get_device_index());
  const Tensor row_of = call.at.row_of();
  Tensor out = empty_like_shape(branch, {s.batch, s.patches + 1, s.width});
  dispatch_rows(branch.scalar_type(), op, s.width, {&call.backbone, &call.branch}, [&](auto zero, auto vector) {
    using T = decltype(zero);
    launch_pool_forward<T, vector>(on, call.args<T>(row_of), result_of<int32_t>(row_of),
                                   static_cast<T*>(out.mutable_data_ptr()));
  });
  return out;
}

std::tuple<Tensor, Tensor> pool_video_tokens_backward_cuda(const Tensor& grad_in, const Tensor& backbone,
                                                           const Tensor& branch, const Tensor& index,
                                                           const std::optional<Tensor>& frame_counts, int64_t patches,
                                                           int64_t frames, bool need_backbone, bool need_branch) {
  const char* op = "pool_video_tokens_backward";
  const PoolCall call(op, backbone, branch, index, frame_counts, patches, frames);
  const Places& s = call.at.places;
  check_shape(op, "grad", grad_in, {s.batch, s.patches + 1, s.width});
  check_same(op, "grad", grad_in, backbone);
  const Tensor grad = adjacent_rows(grad_in);
  const Launch on(op, backbone.get_device_index());
  const auto none = [&] { return empty_like_shape(branch, {0}); };
  Tensor grad_backbone =
      need_backbone ? empty_like_shape(branch, {s.batch, backbone.size(1), 1 + s.patches, s.width}) : none();
  Tensor grad_branch = need_branch ? empty_like_shape(branch, {s.batch, 1 + s.tokens, s.width}) : none();
  const Tensor row_of = need_branch ? call.at.row_of() : empty_like_shape(index, {0}, ScalarType::Int);
  dispatch_rows(grad.scalar_type(), op, s.width, {&grad}, [&](auto zero, auto vector) {
    using T = decltype(zero);
    PoolDevice<T> a = call.args<T>(row_of);
    a.grad = rows_of<T>(grad);
    launch_pool_backward<T, vector>(on, a, result_of<int32_t>(row_of), result_of<T>(grad_backbone),
                                    result_of<T>(grad_branch));
  });
  return {grad_backbone, grad_branch};
}

}  // namespace
}  // namespace bt

STABLE_TORCH_LIBRARY_IMPL(bt_kernels_native, CUDA, m) {
  m.impl("pool_video_tokens", TORCH_BOX(&bt::pool_video_tokens_cuda));
  m.impl("pool_video_tokens_backward", TORCH_BOX(&bt::pool_video_tokens_backward_cuda));
}
