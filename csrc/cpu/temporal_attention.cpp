// temporal_attention on the CPU, forward and backward: attention of each head (attention_head.h) over the rows of each
// group of a regular grid, or of each patch when ragged. Shapes: ../attention.h; out, grad [B, N, H, E]. The
// forward saves nothing; the backward recomputes the probabilities.
#include <algorithm>
#include <numeric>
#include <vector>

#include "../attention.h"
#include "attention_head.h"
#include "attention_scratch.h"

namespace bt {
namespace {

// Adjacent rows of video `batch` that attend to each other.
struct Sequence {
  int64_t batch, begin, count;
};

struct Sequences {
  std::vector<Sequence> list;
  std::vector<Sequence> padding;  // rows of index -1
  std::vector<int64_t> rows;      // 0 to N - 1
  int64_t longest = 0;
};

// Reads the values of index, which needs no device wait on a CPU.
Sequences find_sequences(const char* op, const AttentionShape& s, const int64_t* index) {
  Sequences found;
  found.rows.resize(s.tokens);
  std::iota(found.rows.begin(), found.rows.end(), int64_t(0));
  for (int64_t b = 0; b < s.batch; ++b) {
    const int64_t* place = index + b * s.tokens;
    const auto patch = [&](int64_t row) { return place[row] < 0 ? -1 : place[row] / s.frames; };
    for (int64_t begin = 0, end; begin < s.tokens; begin = end) {
      end = begin + (s.ragged() ? 1 : s.slots);
      while (s.ragged() && end < s.tokens && patch(end) == patch(begin)) ++end;
      (s.ragged() && place[begin] < 0 ? found.padding : found.list).push_back({b, begin, end - begin});
      STD_TORCH_CHECK(!s.ragged() || place[begin] >= -1, op, ": index holds ", place[begin],
                      ", expected -1 or a place");
    }
  }
  for (const Sequence& each : found.list) found.longest = std::max(found.longest, each.count);
  return found;
}

// The inputs of a call in the layout that kernels require.
struct TemporalCall {
  AttentionShape shape;
  Tensor qkv, index;
  PackedStrides stride;
  Sequences sequences;

  TemporalCall(const char* op, const Tensor& qkv_in, const Tensor& index_in, int64_t frames,
               std::optional<int64_t> slots)
      : shape(check_attention(op, qkv_in, index_in, 0, frames, slots)),
        qkv(adjacent_rows(qkv_in)),
        index(torch::stable::contiguous(index_in)),
        stride(packed_strides(qkv)),
        sequences(find_sequences(op, shape, index.const_data_ptr<int64_t>())) {}

  template <typename T>
  HeadRows<const T> head_of_qkv(const Sequence& sequence, int64_t head) const {
    return {static_cast<const T*>(qkv.const_data_ptr()) + sequence.batch * stride.batch + head * stride.head,
            stride.row, stride.part};
  }

  // Calls f(sequence, head, scratch) for each sequence and head, divided among the threads. A thread takes adjacent
  // rows and all heads of a sequence in turn, so rows are read once and in order.
  template <typename A, typename F>
  void for_each_head(int64_t scratch_size, const F& f) const {
    const int64_t tasks = static_cast<int64_t>(sequences.list.size()) * shape.heads, grain = 8;
    torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      const ScratchMemory<A> scratch(scratch_size);
      for (int64_t i = begin; i < end; ++i) {
        f(sequences.list[i / shape.heads], i % shape.heads, scratch.get());
      }
    });
  }

  // Sets the padding rows of a contiguous [B, N, width] to zero.
  template <typename T>
  void clear_padding(T* to, int64_t width) const {
    for (const Sequence& each : sequences.padding) {
      std::fill_n(to + (each.batch * shape.tokens + each.begin) * width, each.count * width, T(0.0f));
    }
  }
};

Tensor temporal_attention_cpu(const Tensor& qkv, const Tensor& index, int64_t frames, std::optional<int64_t> slots) {
  const char* op = "temporal_attention";
  const TemporalCall call(op, qkv, index, frames, slots);
  const AttentionShape& s = call.shape;
  Tensor out = empty_like_shape(qkv, {s.batch, s.tokens, s.heads, s.width});
  dispatch_float(qkv.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const int64_t dim = s.heads * s.width;
    T* to = static_cast<T*>(out.mutable_data_ptr());
    call.clear_padding(to, dim);
    const int64_t scratch_size = forward_scratch(call.sequences.longest, s.width);
    call.for_each_head<A>(scratch_size, [&](const Sequence& sequence, int64_t head, A* scratch) {
      attention_head<T>(HeadForward<T>{.count = sequence.count,
                                       .width = s.width,
                                       .rows = call.sequences.rows.data() + sequence.begin,
                                       .qkv = call.head_of_qkv<T>(sequence, head),
                                       .out = {to + sequence.batch * s.tokens * dim + head * s.width, dim, 0},
                                       .lse = nullptr,
                                       .first_out = nullptr,
                                       .scratch = scratch});
    });
  });
  return out;
}

Tensor temporal_attention_backward_cpu(const Tensor& grad_in, const Tensor& qkv, const Tensor& index, int64_t frames,
                                       std::optional<int64_t> slots) {
  const char* op = "temporal_attention_backward";
  const TemporalCall call(op, qkv, index, frames, slots);
  const AttentionShape& s = call.shape;
  check_attention_grad(op, grad_in, qkv, s);
  const Tensor grad = adjacent_rows(grad_in);
  Tensor grad_qkv = empty_like_shape(qkv, {s.batch, s.tokens, 3, s.heads, s.width});
  dispatch_float(qkv.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const int64_t dim = s.heads * s.width;
    const T* from = static_cast<const T*>(grad.const_data_ptr());
    T* to = static_cast<T*>(grad_qkv.mutable_data_ptr());
    call.clear_padding(to, 3 * dim);
    const int64_t scratch_size = backward_scratch(call.sequences.longest, s.width);
    call.for_each_head<A>(scratch_size, [&](const Sequence& sequence, int64_t head, A* scratch) {
      const T* grad_start = from + sequence.batch * grad.stride(0) + head * grad.stride(2);
      T* grad_qkv_start = to + sequence.batch * s.tokens * 3 * dim + head * s.width;
      attention_head<T>(HeadBackward<T>{.count = sequence.count,
                                        .width = s.width,
                                        .rows = call.sequences.rows.data() + sequence.begin,
                                        .qkv = call.head_of_qkv<T>(sequence, head),
                                        .grad = {grad_start, grad.stride(1), 0},
                                        .grad_qkv = {grad_qkv_start, 3 * dim, dim},
                                        .lse = nullptr,
                                        .first_grad = nullptr,
                                        .first_grad_qkv = nullptr,
                                        .scratch = scratch});
    });
  });
  return grad_qkv;
}

}  // namespace
}  // namespace bt

STABLE_TORCH_LIBRARY_FRAGMENT(bt_kernels_native, m) {
  m.def("temporal_attention(Tensor qkv, Tensor index, int frames, int? slots) -> Tensor");
  m.def("temporal_attention_backward(Tensor grad, Tensor qkv, Tensor index, int frames, int? slots) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bt_kernels_native, CPU, m) {
  m.impl("temporal_attention", TORCH_BOX(&bt::temporal_attention_cpu));
  m.impl("temporal_attention_backward", TORCH_BOX(&bt::temporal_attention_backward_cpu));
}
