// Launchers of gather_embed on CUDA. They do not wait for the device, so they do not check the values of index and
// frame_counts: a place past the end gives a row of NaN.
#include "gather_embed.cuh"

#include "call.h"

namespace bt {
namespace {

// The tensors of a call in the layout that kernels require.
struct EmbedCall {
  Tensor backbone, cls_token, pos, time;
  PlacesCall at;

  EmbedCall(const char* op, const Tensor& backbone_in, const Tensor& cls_token_in, const Tensor& pos_in,
            const Tensor& time_in, const Tensor& index, const std::optional<Tensor>& frame_counts)
      : backbone(checked(op, backbone_in)),
        cls_token(torch::stable::contiguous(cls_token_in)),
        pos(torch::stable::contiguous(pos_in)),
        time(torch::stable::contiguous(time_in)),
        at(op, index, frame_counts, backbone, backbone.size(0), backbone.size(2) - 1, backbone.size(1),
           backbone.size(3)) {
    const int64_t width = backbone.size(3);
    check_shape(op, "cls_token", cls_token, {width});
    check_shape(op, "pos", pos, {backbone.size(2), width});
    check_shape(op, "time", time, {time.dim() == 2 ? std::max(time.size(0), backbone.size(1)) : 0, width});
    check_same(op, "cls_token", cls_token, backbone);
    check_same(op, "pos", pos, backbone);
    check_same(op, "time", time, backbone);
  }

 private:
  static Tensor checked(const char* op, const Tensor& backbone) {
    STD_TORCH_CHECK(backbone.dim() == 4, op, ": backbone has ", backbone.dim(),
                    " dimensions, expected 4 [B, T, 1+P, D]");
    return adjacent_rows(backbone);
  }
};

Tensor gather_embed_cuda(const Tensor& backbone, const Tensor& cls_token, const Tensor& pos, const Tensor& time,
                         const Tensor& index, const std::optional<Tensor>& frame_counts) {
  const char* op = "gather_embed";
  const EmbedCall call(op, backbone, cls_token, pos, time, index, frame_counts);
  const Places& s = call.at.places;
  const Launch on(op, backbone.get_device_index());
  Tensor out = empty_like_shape(backbone, {s.batch, 1 + s.tokens, s.width});
  dispatch_rows(backbone.scalar_type(), op, s.width, {&call.backbone, &call.cls_token, &call.pos, &call.time},
                [&](auto zero, auto vector) {
                  using T = decltype(zero);
                  const EmbedDevice<T> a{s, tower_of<T>(call.backbone), data_of<T>(call.cls_token),
                                         data_of<T>(call.pos), data_of<T>(call.time)};
                  launch_embed_forward<T, vector>(on, a, static_cast<T*>(out.mutable_data_ptr()));
                });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gather_embed_backward_cuda(
    const Tensor& grad_in, const Tensor& backbone, const Tensor& cls_token, const Tensor& pos, const Tensor& time,
    const Tensor& index, const std::optional<Tensor>& frame_counts, bool need_backbone, bool need_cls_token,
    bool need_pos, bool need_time) {
  const char* op = "gather_embed_backward";
  const EmbedCall call(op, backbone, cls_token, pos, time, index, frame_counts);
  const Places& s = call.at.places;
  check_shape(op, "grad", grad_in, {s.batch, 1 + s.tokens, s.width});
  check_same(op, "grad", grad_in, backbone);
  const Tensor grad = adjacent_rows(grad_in);
  const Launch on(op, backbone.get_device_index());
  const auto none = [&] { return empty_like_shape(backbone, {0}); };
  Tensor grad_backbone =
      need_backbone ? empty_like_shape(backbone, {s.batch, s.frames, 1 + s.patches, s.width}) : none();
  Tensor grad_cls_token = need_cls_token ? empty_like_shape(backbone, {s.width}) : none();
  Tensor grad_pos = need_pos ? empty_like_shape(backbone, {1 + s.patches, s.width}) : none();
  Tensor grad_time = need_time ? empty_like_shape(backbone, {time.size(0), s.width}) : none();
  const Tensor row_of = need_pos || need_backbone ? call.at.row_of() : empty_like_shape(index, {0}, ScalarType::Int);

  dispatch_rows(grad.scalar_type(), op, s.width, {&grad}, [&](auto zero, auto vector) {
    using T = decltype(zero);
    const EmbedSums sums(s, vector, need_time, need_cls_token || need_pos);
    const Tensor partial = empty_like_shape(backbone, {sums.size(s.width)}, sum_type<T>);
    const EmbedGrad<T> a{s, rows_of<T>(grad), result_of<int32_t>(row_of)};
    launch_embed_backward<T, vector>(on, a, sums, time.size(0), result_of<int32_t>(row_of),
                                     result_of<sum_t<T>>(partial), result_of<T>(grad_backbone),
                                     result_of<T>(grad_cls_token), result_of<T>(grad_pos), result_of<T>(grad_time));
  });
  return {grad_backbone, grad_cls_token, grad_pos, grad_time};
}

}  // namespace
}  // namespace bt

STABLE_TORCH_LIBRARY_IMPL(bt_kernels_native, CUDA, m) {
  m.impl("gather_embed", TORCH_BOX(&bt::gather_embed_cuda));
  m.impl("gather_embed_backward", TORCH_BOX(&bt::gather_embed_backward_cuda));
}
