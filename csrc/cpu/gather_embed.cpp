// gather_embed on the CPU. With m the tower's token, out = m + pos[1+p] + time[t]; row 0 of a video is
// (mean of the real frames' CLS + cls_token + pos[0]) / 2. Rows of index -1 become zeros and are not read.
// The gradient of the tower is computed as in gather_merge without a gate (bt_kernels/ops/gather_embed/native.py).
#include <algorithm>
#include <vector>

#include "../gather_merge.h"
#include "convert.h"
#include "target_clones.h"

namespace bt {
namespace {

constexpr int64_t kTile = 128;     // columns summed together; their accumulators fit the first-level cache
constexpr int64_t kGrain = 32768;  // least number of elements per thread

template <typename T>
inline void embed_row(const T* tower, const T* pos, const T* time, int64_t n, T* to) {
  for (int64_t d = 0; d < n; ++d) to[d] = store<T>(load(tower[d]) + load(pos[d]) + load(time[d]));
}

// `frames` CLS tokens at a distance of `stride`.
template <typename T, typename A = accumulate_t<T>>
inline void embed_cls(const T* tower, int64_t frames, int64_t stride, const T* cls, const T* pos, int64_t n, T* to) {
  for (int64_t from = 0; from < n; from += kTile) {
    const int64_t width = std::min(kTile, n - from);
    A sum[kTile] = {};
    for (int64_t t = 0; t < frames; ++t) {
      for (int64_t d = 0; d < width; ++d) sum[d] += load(tower[t * stride + from + d]);
    }
    const A scale = frames > 0 ? A(1) / static_cast<A>(frames) : A(0);
    for (int64_t d = 0; d < width; ++d) {
      to[from + d] = store<T>(A(0.5) * (sum[d] * scale + load(cls[from + d]) + load(pos[from + d])));
    }
  }
}

template <typename T, typename A = accumulate_t<T>>
inline void add_row(const T* x, A scale, int64_t n, A* sum) {
  for (int64_t d = 0; d < n; ++d) sum[d] += scale * load(x[d]);
}

#define BT_EMBED(T)                                                                                                 \
  BT_TARGET_CLONES void run_row(const T* tower, const T* pos, const T* time, int64_t n, T* to) {                   \
    embed_row(tower, pos, time, n, to);                                                                            \
  }                                                                                                                \
  BT_TARGET_CLONES void run_cls(const T* tower, int64_t frames, int64_t stride, const T* cls, const T* pos, int64_t n, \
                                T* to) {                                                                           \
    embed_cls(tower, frames, stride, cls, pos, n, to);                                                             \
  }                                                                                                                \
  BT_TARGET_CLONES void run_add(const T* x, accumulate_t<T> scale, int64_t n, accumulate_t<T>* sum) {              \
    add_row(x, scale, n, sum);                                                                                     \
  }
BT_EMBED(float)
BT_EMBED(double)
BT_EMBED(torch::headeronly::BFloat16)
BT_EMBED(torch::headeronly::Half)
#undef BT_EMBED

struct Places {
  Tensor index;
  const int64_t* at;

  Places(const char* op, const Tensor& index_in, int64_t limit) : index(torch::stable::contiguous(index_in)) {
    STD_TORCH_CHECK(index.dim() == 2 && index.scalar_type() == ScalarType::Long, op, ": index must be int64 [B, N]");
    at = index.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < index.numel(); ++i) {
      STD_TORCH_CHECK(at[i] >= -1 && at[i] < limit, op, ": index holds ", at[i], ", expected -1 or a value below P*T = ",
                      limit);
    }
  }
};

Tensor gather_embed(const Tensor& backbone_in, const Tensor& cls_in, const Tensor& pos_in, const Tensor& time_in,
                    const Tensor& index_in, const std::optional<Tensor>& counts_in) {
  const char* op = "gather_embed";
  STD_TORCH_CHECK(backbone_in.dim() == 4 && pos_in.dim() == 2 && time_in.dim() == 2 && cls_in.dim() == 1, op,
                  ": expected backbone [B, T, 1+P, D], cls_token [D], pos [1+P, D] and time [M, D]");
  const Tensor backbone = adjacent_rows(backbone_in), pos = adjacent_rows(pos_in), time = adjacent_rows(time_in);
  const Tensor cls = torch::stable::contiguous(cls_in);
  const int64_t batch = backbone.size(0), frames = backbone.size(1), patches = backbone.size(2) - 1;
  const int64_t width = backbone.size(3), rows = 1 + index_in.size(1);
  STD_TORCH_CHECK(pos.size(0) == 1 + patches && time.size(0) >= frames && pos.size(1) == width &&
                      time.size(1) == width && cls.size(0) == width && index_in.size(0) == batch,
                  op, ": sizes of backbone, cls_token, pos, time and index do not match");
  for (const Tensor* each : {&cls, &pos, &time}) check_same(op, "cls_token, pos or time", *each, backbone);
  const Places places(op, index_in, patches * frames);
  std::optional<Tensor> counts;
  if (counts_in) counts = torch::stable::contiguous(*counts_in);
  const int64_t* count = counts ? counts->const_data_ptr<int64_t>() : nullptr;
  Tensor out = empty_like_shape(backbone, {batch, rows, width});
  dispatch_float(backbone.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    const T* tower = static_cast<const T*>(backbone.const_data_ptr());
    const T *position = static_cast<const T*>(pos.const_data_ptr()), *step = static_cast<const T*>(time.const_data_ptr());
    const T* own = static_cast<const T*>(cls.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width));
    torch::stable::parallel_for(0, batch * rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / rows, r = i % rows;
        const T* video = tower + b * backbone.stride(0);
        if (r == 0) {
          const int64_t real = count ? std::clamp<int64_t>(count[b], 0, frames) : frames;
          run_cls(video, real, backbone.stride(1), own, position, width, to + i * width);
          continue;
        }
        const int64_t place = places.at[b * (rows - 1) + r - 1];
        if (place < 0) {
          std::fill_n(to + i * width, width, T(0.0f));
          continue;
        }
        const int64_t p = 1 + place / frames, t = place % frames;
        run_row(video + t * backbone.stride(1) + p * backbone.stride(2), position + p * pos.stride(0),
                step + t * time.stride(0), width, to + i * width);
      }
    });
  });
  return out;
}

// Gradients of the three tables. A task takes some columns of all rows, so threads do not change the order of sums.
std::tuple<Tensor, Tensor, Tensor> gather_embed_tables_backward(const Tensor& grad_in, const Tensor& index_in,
                                                                int64_t patches, int64_t frames, int64_t time_rows,
                                                                bool need_cls, bool need_pos, bool need_time) {
  const char* op = "gather_embed_backward";
  const Tensor grad = adjacent_rows(grad_in);
  const Places places(op, index_in, patches * frames);
  const int64_t batch = grad.size(0), rows = grad.size(1), width = grad.size(2), tokens = rows - 1;
  STD_TORCH_CHECK(places.index.size(0) == batch && places.index.size(1) == tokens, op, ": grad must be [B, 1+N, D]");
  // One table of sums with rows for CLS, the positions of patches, and the frames.
  const int64_t time_at = 1 + (need_pos ? patches : 0), table_rows = time_at + time_rows;
  Tensor to_cls = empty_like_shape(grad, {need_cls ? width : 0});
  Tensor to_pos = need_pos ? empty_like_shape(grad, {1 + patches, width}) : empty_like_shape(grad, {0});
  Tensor to_time = need_time ? empty_like_shape(grad, {time_rows, width}) : empty_like_shape(grad, {0});
  dispatch_float(grad.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const T* from = static_cast<const T*>(grad.const_data_ptr());
    T *cls = static_cast<T*>(to_cls.mutable_data_ptr()), *pos = static_cast<T*>(to_pos.mutable_data_ptr());
    T* time = static_cast<T*>(to_time.mutable_data_ptr());
    torch::stable::parallel_for(0, (width + kTile - 1) / kTile, 1, [&](int64_t begin, int64_t end) {
      std::vector<A> table(table_rows * kTile);
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t column = tile * kTile, n = std::min(kTile, width - column);
        std::fill(table.begin(), table.end(), A(0));
        for (int64_t b = 0; b < batch; ++b) {
          const T* video = from + b * grad.stride(0) + column;
          run_add(video, A(0.5), n, table.data());
          if (!need_pos && !need_time) continue;
          for (int64_t i = 0; i < tokens; ++i) {
            const int64_t place = places.at[b * tokens + i];
            if (place < 0) continue;
            const T* row = video + (1 + i) * grad.stride(1);
            if (need_pos) run_add(row, A(1), n, table.data() + (1 + place / frames) * kTile);
            if (need_time) run_add(row, A(1), n, table.data() + (time_at + place % frames) * kTile);
          }
        }
        const auto write = [&](int64_t row, T* to) {
          for (int64_t d = 0; d < n; ++d) to[column + d] = store<T>(table[row * kTile + d]);
        };
        if (need_cls) write(0, cls);
        for (int64_t p = 0; need_pos && p <= patches; ++p) write(p, pos + p * width);
        for (int64_t t = 0; need_time && t < time_rows; ++t) write(time_at + t, time + t * width);
      }
    });
  });
  return {to_cls, to_pos, to_time};
}

}  // namespace
}  // namespace bt

STABLE_TORCH_LIBRARY_FRAGMENT(bt_kernels_native, m) {
  m.def(
      "gather_embed(Tensor backbone, Tensor cls_token, Tensor pos, Tensor time, Tensor index, Tensor? frame_counts) -> "
      "Tensor");
  m.def(
      "gather_embed_backward(Tensor grad, Tensor backbone, Tensor cls_token, Tensor pos, Tensor time, Tensor index, "
      "Tensor? frame_counts, bool need_backbone, bool need_cls_token, bool need_pos, bool need_time) -> "
      "(Tensor, Tensor, Tensor, Tensor)");  // CUDA only; the CPU has the gradients of the tables only
  m.def(
      "gather_embed_tables_backward(Tensor grad, Tensor index, int patches, int frames, int time_rows, bool need_cls, "
      "bool need_pos, bool need_time) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(bt_kernels_native, CPU, m) {
  m.impl("gather_embed", TORCH_BOX(&bt::gather_embed));
  m.impl("gather_embed_tables_backward", TORCH_BOX(&bt::gather_embed_tables_backward));
}
