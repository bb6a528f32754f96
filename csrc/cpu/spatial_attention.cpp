// spatial_attention on the CPU, forward and backward: attention of each head (attention_head.h) over CLS and the
// visible patches of each frame. Shapes: ../attention.h, and
//   frame_weight w [B, S] or none: 1/(real frames)        out, grad [B, 1+N, H, E]: row 0 = sum over s of w * cls_out
//   cls_out [B, S, H, E] result of the CLS query          lse [B, S, H, 1+G] log-sum-exp of each query's scores, CLS
//   of each frame                                         first, 0 where nothing is visible
// The gradients of the CLS row are stored for each frame and added in the order of frames, in float64 for accuracy.
#include <algorithm>
#include <vector>

#include "../attention.h"
#include "attention_head.h"
#include "attention_scratch.h"

namespace bt {
namespace {

// Rows of every frame: of video b's frame s, list[begin[b*S + s] .. begin[b*S + s + 1]); CLS, row 0, is first.
struct FrameRows {
  std::vector<int64_t> begin, list;
  std::vector<int64_t> lse_place;  // for each entry of list: 0 for CLS, else 1 + group (grid) or 1 + patch (ragged)
  int64_t longest = 0;

  int64_t count(int64_t frame) const { return begin[frame + 1] - begin[frame]; }
};

// Reads the values of index, which needs no device wait on a CPU.
FrameRows find_frames(const char* op, const AttentionShape& s, int64_t patches, const int64_t* index) {
  const int64_t steps = s.steps();
  const auto step_of = [&](int64_t b, int64_t n) {
    return s.ragged() ? index[b * s.tokens + n] % s.frames : n % s.slots;  // -1: padding
  };
  FrameRows found;
  found.begin.assign(s.batch * steps + 1, 0);
  for (int64_t i = 0; i < s.batch * steps; ++i) found.begin[i + 1] = 1;  // CLS
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t n = 0; n < s.tokens; ++n) {
      const int64_t place = s.ragged() ? index[b * s.tokens + n] : 0;
      STD_TORCH_CHECK(place >= -1 && place < patches * s.frames, op, ": index holds ", place,
                      ", expected -1 or a value below P*T = ", patches * s.frames);
      if (place >= 0) ++found.begin[b * steps + step_of(b, n) + 1];
    }
  }
  for (int64_t i = 0; i < s.batch * steps; ++i) {
    found.longest = std::max(found.longest, found.begin[i + 1]);
    found.begin[i + 1] += found.begin[i];
  }
  found.list.assign(found.begin.back(), 0);
  found.lse_place.assign(found.begin.back(), 0);
  std::vector<int64_t> next(found.begin.begin(), found.begin.end() - 1);
  for (int64_t& at : next) ++at;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t n = 0; n < s.tokens; ++n) {
      const int64_t place = s.ragged() ? index[b * s.tokens + n] : 0;
      if (place < 0) continue;
      const int64_t at = next[b * steps + step_of(b, n)]++;
      found.list[at] = 1 + n;
      found.lse_place[at] = 1 + (s.ragged() ? place / s.frames : n / s.slots);
    }
  }
  return found;
}

// The inputs of a call in the layout that kernels require.
struct SpatialCall {
  AttentionShape shape;
  int64_t places;  // 1 + G: queries of a frame in lse
  Tensor qkv, index;
  std::optional<Tensor> frame_weight, frame_counts;
  PackedStrides stride;
  FrameRows frames;

  SpatialCall(const char* op, const Tensor& qkv_in, const std::optional<Tensor>& weight_in, const Tensor& index_in,
              const std::optional<Tensor>& counts_in, int64_t patches, int64_t frames_in, std::optional<int64_t> slots)
      : shape(check_attention(op, qkv_in, index_in, 1, frames_in, slots)),
        places(1 + (shape.ragged() ? patches : shape.tokens / shape.slots)),
        qkv(adjacent_rows(qkv_in)),
        index(torch::stable::contiguous(index_in)),
        stride(packed_strides(qkv)),
        frames(find_frames(op, shape, patches, index.const_data_ptr<int64_t>())) {
    if (weight_in) {
      STD_TORCH_CHECK(weight_in->dim() == 2 && weight_in->size(0) == shape.batch &&
                          weight_in->size(1) == shape.steps(),
                      op, ": frame_weight must have shape [", shape.batch, ", ", shape.steps(), "]");
      frame_weight = torch::stable::contiguous(*weight_in);
    }
    if (counts_in) {
      STD_TORCH_CHECK(counts_in->dim() == 1 && counts_in->size(0) == shape.batch &&
                          counts_in->scalar_type() == ScalarType::Long,
                      op, ": frame_counts must be int64 of shape [", shape.batch, "]");
      frame_counts = torch::stable::contiguous(*counts_in);
    }
  }

  // [B, S]
  template <typename A>
  std::vector<A> weights(const char* op) const {
    const int64_t steps = shape.steps();
    std::vector<A> weight(shape.batch * steps);
    if (frame_weight) {
      dispatch_float(frame_weight->scalar_type(), op, [&](auto zero) {
        const auto* from = static_cast<const decltype(zero)*>(frame_weight->const_data_ptr());
        for (size_t i = 0; i < weight.size(); ++i) weight[i] = static_cast<A>(from[i]);
      });
      return weight;
    }
    for (int64_t b = 0; b < shape.batch; ++b) {
      const int64_t real =
          frame_counts ? std::clamp<int64_t>(frame_counts->const_data_ptr<int64_t>()[b], 0, steps) : steps;
      for (int64_t t = 0; t < steps; ++t) weight[b * steps + t] = t < real ? A(1) / static_cast<A>(real) : A(0);
    }
    return weight;
  }

  template <typename T>
  HeadRows<const T> head_of_qkv(int64_t video, int64_t head) const {
    return {static_cast<const T*>(qkv.const_data_ptr()) + video * stride.batch + head * stride.head, stride.row,
            stride.part};
  }

  // Calls f(frame of B·S, head, scratch, its lse) for each frame and head, divided among the threads.
  template <typename A, typename F>
  void for_each_head(int64_t scratch_size, const F& f) const {
    const int64_t tasks = shape.batch * shape.steps() * shape.heads;
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      const ScratchMemory<A> scratch(scratch_size);
      std::vector<A> lse(frames.longest);
      for (int64_t i = begin; i < end; ++i) f(i / shape.heads, i % shape.heads, scratch.get(), lse.data());
    });
  }

  // Sets the padding rows of a contiguous [B, 1+N, width] to zero.
  template <typename T>
  void clear_padding(T* to, int64_t width) const {
    if (!shape.ragged()) return;
    const int64_t* place = index.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < shape.batch * shape.tokens; ++i) {
      if (place[i] < 0) std::fill_n(to + (i + i / shape.tokens + 1) * width, width, T(0.0f));
    }
  }
};

std::tuple<Tensor, Tensor, Tensor> spatial_attention_cpu(const Tensor& qkv, const std::optional<Tensor>& frame_weight,
                                                         const Tensor& index, const std::optional<Tensor>& frame_counts,
                                                         int64_t patches, int64_t frames,
                                                         std::optional<int64_t> slots) {
  const char* op = "spatial_attention";
  const SpatialCall call(op, qkv, frame_weight, index, frame_counts, patches, frames, slots);
  const AttentionShape& s = call.shape;
  const int64_t steps = s.steps(), dim = s.heads * s.width;
  const ScalarType sums = qkv.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor out = empty_like_shape(qkv, {s.batch, s.rows(), s.heads, s.width});
  Tensor lse = empty_like_shape(qkv, {s.batch, steps, s.heads, call.places}, sums);
  Tensor cls_out = empty_like_shape(qkv, {s.batch, steps, s.heads, s.width}, sums);
  dispatch_float(qkv.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    T* to = static_cast<T*>(out.mutable_data_ptr());
    A* lse_to = static_cast<A*>(lse.mutable_data_ptr());
    A* cls = static_cast<A*>(cls_out.mutable_data_ptr());
    call.clear_padding(to, dim);
    if (s.ragged()) std::fill_n(lse_to, s.batch * steps * s.heads * call.places, A(0));
    const int64_t scratch_size = forward_scratch(call.frames.longest, s.width);
    call.for_each_head<A>(scratch_size, [&](int64_t frame, int64_t head, A* scratch, A* frame_lse) {
      const int64_t video = frame / steps, begin = call.frames.begin[frame], count = call.frames.count(frame);
      attention_head<T>(HeadForward<T>{.count = count,
                                       .width = s.width,
                                       .rows = call.frames.list.data() + begin,
                                       .qkv = call.head_of_qkv<T>(video, head),
                                       .out = {to + video * s.rows() * dim + head * s.width, dim, 0},
                                       .lse = frame_lse,
                                       .first_out = cls + (frame * s.heads + head) * s.width,
                                       .scratch = scratch});
      A* lse_row = lse_to + (frame * s.heads + head) * call.places;
      for (int64_t i = 0; i < count; ++i) lse_row[call.frames.lse_place[begin + i]] = frame_lse[i];
    });
    const std::vector<A> weight = call.weights<A>(op);
    torch::stable::parallel_for(0, s.batch * s.heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * s.width; i < end * s.width; ++i) {
        const int64_t b = i / dim, d = i % dim;
        double sum = 0;
        for (int64_t t = b * steps; t < (b + 1) * steps; ++t) sum += double(weight[t]) * double(cls[t * dim + d]);
        to[b * s.rows() * dim + d] = static_cast<T>(static_cast<A>(sum));
      }
    });
  });
  return {out, lse, cls_out};
}

Tensor spatial_attention_backward_cpu(const Tensor& grad_in, const Tensor& qkv,
                                      const std::optional<Tensor>& frame_weight, const Tensor& index,
                                      const std::optional<Tensor>& frame_counts, int64_t patches, int64_t frames,
                                      std::optional<int64_t> slots, const Tensor&, const Tensor& lse_in,
                                      const Tensor&) {
  const char* op = "spatial_attention_backward";
  const SpatialCall call(op, qkv, frame_weight, index, frame_counts, patches, frames, slots);
  const AttentionShape& s = call.shape;
  const int64_t steps = s.steps(), dim = s.heads * s.width;
  const ScalarType sums = qkv.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_attention_grad(op, grad_in, qkv, s);
  STD_TORCH_CHECK(lse_in.scalar_type() == sums && lse_in.dim() == 4 &&
                      lse_in.numel() == s.batch * steps * s.heads * call.places,
                  op, ": lse must be that of the forward, [", s.batch, ", ", steps, ", ", s.heads, ", ", call.places,
                  "]");
  const Tensor grad = adjacent_rows(grad_in), lse = torch::stable::contiguous(lse_in);
  Tensor grad_qkv = empty_like_shape(qkv, {s.batch, s.rows(), 3, s.heads, s.width});
  const Tensor cls_grads = empty_like_shape(qkv, {s.batch, steps, s.heads, 3, s.width}, sums);
  dispatch_float(qkv.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const T* from = static_cast<const T*>(grad.const_data_ptr());
    const A* lse_from = static_cast<const A*>(lse.const_data_ptr());
    T* to = static_cast<T*>(grad_qkv.mutable_data_ptr());
    A* cls = static_cast<A*>(cls_grads.mutable_data_ptr());
    const std::vector<A> weight = call.weights<A>(op);
    call.clear_padding(to, 3 * dim);
    const int64_t scratch_size = backward_scratch(call.frames.longest, s.width) + padded(s.width);
    call.for_each_head<A>(scratch_size, [&](int64_t frame, int64_t head, A* scratch, A* frame_lse) {
      const int64_t video = frame / steps, begin = call.frames.begin[frame], count = call.frames.count(frame);
      const A* lse_row = lse_from + (frame * s.heads + head) * call.places;
      for (int64_t i = 0; i < count; ++i) frame_lse[i] = lse_row[call.frames.lse_place[begin + i]];
      const T* grad_start = from + video * grad.stride(0) + head * grad.stride(2);
      A* cls_grad = scratch;
      for (int64_t e = 0; e < s.width; ++e) cls_grad[e] = weight[frame] * static_cast<A>(grad_start[e]);
      T* grad_qkv_start = to + video * s.rows() * 3 * dim + head * s.width;
      attention_head<T>(HeadBackward<T>{.count = count,
                                        .width = s.width,
                                        .rows = call.frames.list.data() + begin,
                                        .qkv = call.head_of_qkv<T>(video, head),
                                        .grad = {grad_start, grad.stride(1), 0},
                                        .grad_qkv = {grad_qkv_start, 3 * dim, dim},
                                        .lse = frame_lse,
                                        .first_grad = cls_grad,
                                        .first_grad_qkv = cls + (frame * s.heads + head) * 3 * s.width,
                                        .scratch = scratch + padded(s.width)});
    });
    torch::stable::parallel_for(0, s.batch * s.heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / s.heads, head = i % s.heads;
        for (int64_t j = 0; j < 3 * s.width; ++j) {
          double sum = 0;
          for (int64_t t = b * steps; t < (b + 1) * steps; ++t) sum += cls[(t * s.heads + head) * 3 * s.width + j];
          const int64_t part = j / s.width, e = j % s.width;
          to[b * s.rows() * 3 * dim + part * dim + head * s.width + e] = static_cast<T>(static_cast<A>(sum));
        }
      }
    });
  });
  return grad_qkv;
}

}  // namespace
}  // namespace bt

STABLE_TORCH_LIBRARY_FRAGMENT(bt_kernels_native, m) {
  m.def(
      "spatial_attention(Tensor qkv, Tensor? frame_weight, Tensor index, Tensor? frame_counts, int patches, "
      "int frames, int? slots) -> (Tensor, Tensor, Tensor)");
  m.def(
      "spatial_attention_backward(Tensor grad, Tensor qkv, Tensor? frame_weight, Tensor index, Tensor? frame_counts, "
      "int patches, int frames, int? slots, Tensor out, Tensor lse, Tensor cls_out) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bt_kernels_native, CPU, m) {
  m.impl("spatial_attention", TORCH_BOX(&bt::spatial_attention_cpu));
  m.impl("spatial_attention_backward", TORCH_BOX(&bt::spatial_attention_backward_cpu));
}
