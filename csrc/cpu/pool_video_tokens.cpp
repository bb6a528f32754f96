// pool_video_tokens on the CPU: out[p] = (mean over frames of tower[t, 1+p] + mean of the branch's rows of patch p) / 2,
// out[P] = (mean over frames of tower[t, 0] + branch[0]) / 2. Padding frames and rows of index -1 are not read.
#include <algorithm>
#include <vector>

#include "../common.h"
#include "convert.h"
#include "target_clones.h"

namespace bt {
namespace {

constexpr int64_t kTile = 512;  // columns summed together: long reads; accumulators fit the first-level cache

// sum += the `count` rows that at(0), at(1), ... point to; four at a time, so that four reads overlap.
template <typename T, typename A = accumulate_t<T>, typename F>
inline void add_rows(int64_t count, int64_t width, A* sum, const F& at) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const T *a = at(i), *b = at(i + 1), *c = at(i + 2), *e = at(i + 3);
    // Prefetches the next rows: the hardware prefetcher stops at a page boundary, and a row is about one page.
    for (const T* row : {a, b, c, e}) {
      for (int64_t byte = 0; byte < 256; byte += 64) __builtin_prefetch(reinterpret_cast<const char*>(row + width) + byte);
    }
    for (int64_t d = 0; d < width; ++d) sum[d] += (load(a[d]) + load(b[d])) + (load(c[d]) + load(e[d]));
  }
  for (; i < count; ++i) {
    const T* a = at(i);
    for (int64_t d = 0; d < width; ++d) sum[d] += load(a[d]);
  }
}

// to = (mean of `frames` rows at a distance of `stride` + mean of the branch's `count` listed rows) / 2
template <typename T, typename A = accumulate_t<T>>
inline void pool_row(const T* tower, int64_t frames, int64_t stride, const T* branch, const int64_t* rows, int64_t count,
                     int64_t row_stride, int64_t n, T* to) {
  const A of_tower = frames > 0 ? A(0.5) / static_cast<A>(frames) : A(0);
  const A of_branch = count > 0 ? A(0.5) / static_cast<A>(count) : A(0);
  for (int64_t from = 0; from < n; from += kTile) {
    const int64_t width = std::min(kTile, n - from);
    A sum[kTile] = {}, own[kTile] = {};
    add_rows<T>(frames, width, sum, [&](int64_t t) { return tower + t * stride + from; });
    add_rows<T>(count, width, own, [&](int64_t i) { return branch + rows[i] * row_stride + from; });
    for (int64_t d = 0; d < width; ++d) to[from + d] = store<T>(sum[d] * of_tower + own[d] * of_branch);
  }
}

template <typename T>
inline void scale_row(const T* x, accumulate_t<T> scale, int64_t n, T* to) {
  for (int64_t d = 0; d < n; ++d) to[d] = store<T>(load(x[d]) * scale);
}

#define BT_POOL(T)                                                                                                    \
  BT_TARGET_CLONES void run_pool(const T* tower, int64_t frames, int64_t stride, const T* branch, const int64_t* rows, \
                                 int64_t count, int64_t row_stride, int64_t n, T* to) {                               \
    pool_row(tower, frames, stride, branch, rows, count, row_stride, n, to);                                          \
  }                                                                                                                   \
  BT_TARGET_CLONES void run_scale(const T* x, accumulate_t<T> scale, int64_t n, T* to) { scale_row(x, scale, n, to); }
BT_POOL(float)
BT_POOL(double)
BT_POOL(torch::headeronly::BFloat16)
BT_POOL(torch::headeronly::Half)
#undef BT_POOL

// The branch's rows of each patch: rows [starts[p], starts[p+1]) of `rows` are 1 + n of the n with index[n] / frames = p.
struct PatchRows {
  std::vector<int64_t> starts, rows;

  PatchRows(const char* op, const int64_t* index, int64_t tokens, int64_t patches, int64_t frames)
      : starts(patches + 1, 0), rows(tokens) {
    for (int64_t n = 0; n < tokens; ++n) {
      STD_TORCH_CHECK(index[n] >= -1 && index[n] < patches * frames, op, ": index holds ", index[n],
                      ", expected -1 or a value below P*T = ", patches * frames);
      if (index[n] >= 0) ++starts[index[n] / frames + 1];
    }
    for (int64_t p = 0; p < patches; ++p) starts[p + 1] += starts[p];
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t n = 0; n < tokens; ++n) {
      if (index[n] >= 0) rows[next[index[n] / frames]++] = 1 + n;
    }
  }
};

// The lists and counts of a call.
struct PoolCall {
  Tensor index;
  std::optional<Tensor> counts;
  std::vector<PatchRows> videos;

  PoolCall(const char* op, const Tensor& index_in, const std::optional<Tensor>& counts_in, int64_t patches,
           int64_t frames)
      : index(torch::stable::contiguous(index_in)) {
    if (counts_in) counts = torch::stable::contiguous(*counts_in);
    const int64_t* at = index.const_data_ptr<int64_t>();
    for (int64_t b = 0; b < index.size(0); ++b) {
      videos.emplace_back(op, at + b * index.size(1), index.size(1), patches, frames);
    }
  }
  int64_t frames_of(int64_t b, int64_t all) const {
    return counts ? std::clamp<int64_t>(counts->const_data_ptr<int64_t>()[b], 0, all) : all;
  }
};

Tensor pool(const Tensor& backbone_in, const Tensor& branch_in, const Tensor& index_in,
            const std::optional<Tensor>& counts_in, int64_t patches, int64_t frames) {
  const char* op = "pool_video_tokens";
  STD_TORCH_CHECK(backbone_in.dim() == 4 && branch_in.dim() == 3 && index_in.dim() == 2 &&
                      backbone_in.size(2) == 1 + patches && branch_in.size(1) == 1 + index_in.size(1) &&
                      branch_in.size(2) == backbone_in.size(3) && branch_in.size(0) == backbone_in.size(0) &&
                      index_in.size(0) == backbone_in.size(0),
                  op, ": expected backbone [B, T, 1+P, D], branch [B, 1+N, D] and index [B, N]");
  check_same(op, "branch", branch_in, backbone_in);
  const Tensor backbone = adjacent_rows(backbone_in), branch = adjacent_rows(branch_in);
  const PoolCall call(op, index_in, counts_in, patches, frames);
  const int64_t batch = backbone.size(0), width = backbone.size(3), tokens = 1 + patches;
  Tensor out = empty_like_shape(branch, {batch, tokens, width});
  dispatch_float(branch.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    const T *tower = static_cast<const T*>(backbone.const_data_ptr()), *own = static_cast<const T*>(branch.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, batch * tokens, 4, [&](int64_t begin, int64_t end) {
      const int64_t cls = 0;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / tokens, token = i % tokens;  // token 0 is CLS
        const PatchRows& list = call.videos[b];
        const int64_t* rows = token ? list.rows.data() + list.starts[token - 1] : &cls;
        const int64_t count = token ? list.starts[token] - list.starts[token - 1] : 1;
        run_pool(tower + b * backbone.stride(0) + token * backbone.stride(2), call.frames_of(b, backbone.size(1)),
                 backbone.stride(1), own + b * branch.stride(0), rows, count, branch.stride(1), width,
                 to + (b * tokens + (token ? token - 1 : patches)) * width);
      }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> pool_backward(const Tensor& grad_in, const Tensor& backbone, const Tensor& branch,
                                         const Tensor& index_in, const std::optional<Tensor>& counts_in,
                                         int64_t patches, int64_t frames, bool need_backbone, bool need_branch) {
  const char* op = "pool_video_tokens_backward";
  const Tensor grad = adjacent_rows(grad_in);
  const PoolCall call(op, index_in, counts_in, patches, frames);
  const int64_t batch = branch.size(0), rows = branch.size(1), width = branch.size(2), tokens = 1 + patches;
  const int64_t all = backbone.size(1);
  Tensor to_tower = need_backbone ? empty_like_shape(branch, {batch, all, tokens, width}) : empty_like_shape(branch, {0});
  Tensor to_branch = need_branch ? empty_like_shape(branch, {batch, rows, width}) : empty_like_shape(branch, {0});
  dispatch_float(branch.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const T* from = static_cast<const T*>(grad.const_data_ptr());
    const auto grad_row = [&](int64_t b, int64_t token) {
      return from + b * grad.stride(0) + (token ? token - 1 : patches) * grad.stride(1);
    };
    T *tower = static_cast<T*>(to_tower.mutable_data_ptr()), *own = static_cast<T*>(to_branch.mutable_data_ptr());
    const int64_t* at = call.index.const_data_ptr<int64_t>();
    if (need_branch) {
      torch::stable::parallel_for(0, batch * rows, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = i / rows, r = i % rows, place = r ? at[b * (rows - 1) + r - 1] : 0;
          if (place < 0) {
            std::fill_n(own + i * width, width, T(0.0f));
            continue;
          }
          const int64_t token = r ? 1 + place / frames : 0;
          const std::vector<int64_t>& starts = call.videos[b].starts;
          const int64_t count = token ? starts[token] - starts[token - 1] : 1;
          run_scale(grad_row(b, token), A(0.5) / static_cast<A>(count), width, own + i * width);
        }
      });
    }
    if (need_backbone) {
      torch::stable::parallel_for(0, batch * all * tokens, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = i / tokens / all, t = i / tokens % all, real = call.frames_of(b, all);
          if (t >= real) {
            std::fill_n(tower + i * width, width, T(0.0f));
          } else {
            run_scale(grad_row(b, i % tokens), A(0.5) / static_cast<A>(real), width, tower + i * width);
          }
        }
      });
    }
  });
  return {to_tower, to_branch};
}

}  // namespace
}  // namespace bt

STABLE_TORCH_LIBRARY_FRAGMENT(bt_kernels_native, m) {
  m.def(
      "pool_video_tokens(Tensor backbone, Tensor branch, Tensor index, Tensor? frame_counts, int patches, int frames) -> "
      "Tensor");
  m.def(
      "pool_video_tokens_backward(Tensor grad, Tensor backbone, Tensor branch, Tensor index, Tensor? frame_counts, "
      "int patches, int frames, bool need_backbone, bool need_branch) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(bt_kernels_native, CPU, m) {
  m.impl("pool_video_tokens", TORCH_BOX(&bt::pool));
  m.impl("pool_video_tokens_backward", TORCH_BOX(&bt::pool_backward));
}
