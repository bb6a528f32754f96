// Device code of pool_video_tokens; rows.cuh has the loops over rows.
//   out[b, p] = (mean of backbone[b, t, 1+p] over real frames + mean of branch[b, 1+n] over the rows n of patch p) / 2
//   out[b, P] = (mean of backbone[b, t, 0]   over real frames + branch[b, 0]) / 2;   an empty mean is 0.
// backbone [B, T', 1+P, D], branch [B, 1+N, D], out and grad [B, P+1, D]. T' may differ from the T of the places.
#pragma once

#include "rows.cuh"

namespace bt {

template <typename T>
struct PoolDevice {
  Places places;
  Tower<T> backbone;      // null in the backward pass, like branch: their values are not needed
  int tower_frames;       // T'
  Rows<T> branch, grad;   // grad is null in the forward pass
  const int32_t* row_of;  // [B, P*T] from rows_of_places
};

// A warp has one row of out and kWarp * V columns, tile fastest.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    pool_forward(const PoolDevice<T> a, int64_t tiles, T* __restrict__ out) {
  const int64_t task = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t patches = a.places.patches, width = a.places.width;
  const int64_t i = task / tiles, b = i / (patches + 1), p = i - b * (patches + 1);
  if (b >= a.places.batch) return;
  const int lane = threadIdx.x % kWarp, frames = a.places.frames;
  const int64_t d = ((task - i * tiles) * kWarp + lane) * V;
  const bool inside = d < width, cls = p == patches;
  sum_t<T> tower[V] = {}, sum[V] = {};
  if (inside) {
    mean_over_frames<T, V>(a.backbone, b, cls ? 0 : 1 + p, d, a.places.real_frames(b, a.tower_frames), tower);
  }
  int count = 0;
  if (cls) {
    count = 1;
    if (inside) read<T, V>(a.branch.at(b, 0) + d, sum);
  } else {
    for (int t = lane; t - lane < frames; t += kWarp) {
      const int32_t row = t < frames ? a.row_of[(b * patches + p) * frames + t] : 0;
      const unsigned chosen = __ballot_sync(kAllLanes, row > 0);
      count += __popc(chosen);
      add_rows<T, V>(a.branch.at(b, 0), chosen, row * a.branch.row, d, inside, sum);
    }
  }
  if (!inside) return;
  const sum_t<T> scale = count ? sum_t<T>(1) / static_cast<sum_t<T>>(count) : sum_t<T>(0);
#pragma unroll
  for (int k = 0; k < V; ++k) sum[k] = (tower[k] + sum[k] * scale) / 2;
  write<T, V>(out + i * width + d, sum);
}

// Computes out = scale * from for one row.
template <typename T, int V>
__device__ __forceinline__ void write_scaled(const T* from, sum_t<T> scale, int64_t width, T* out) {
#pragma unroll 4
  for (int64_t d = threadIdx.x % kWarp * V; d < width; d += kWarp * V) {
    sum_t<T> x[V];
    read<T, V>(from + d, x);
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] *= scale;
    write<T, V>(out + d, x);
  }
}

template <typename T, int V>
__device__ __forceinline__ void fill_row(sum_t<T> value, int64_t width, T* out) {
  for (int64_t d = threadIdx.x % kWarp * V; d < width; d += kWarp * V) fill<T, V>(out + d, value);
}

// Writes grad_branch [B, 1+N, D]; a warp has one row. The rows of a patch are mostly adjacent, so all but the first
// read its gradient from cache.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) pool_backward_branch(const PoolDevice<T> a, T* __restrict__ out) {
  const int64_t task = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t rows = 1 + a.places.tokens, width = a.places.width, b = task / rows, r = task - b * rows;
  if (b >= a.places.batch) return;
  out += task * width;
  if (r == 0) return write_scaled<T, V>(a.grad.at(b, a.places.patches), sum_t<T>(0.5), width, out);
  const int64_t place = a.places.at(b, r - 1);
  if (place < 0) return fill_row<T, V>(0, width, out);
  if (a.places.outside(place)) return fill_row<T, V>(static_cast<sum_t<T>>(nanf("")), width, out);
  const int p = a.places.patch(place), frames = a.places.frames, lane = threadIdx.x % kWarp;
  int count = 0;
  for (int t = lane; t - lane < frames; t += kWarp) {
    const bool visible = t < frames && a.row_of[(b * a.places.patches + p) * frames + t] > 0;
    count += __popc(__ballot_sync(kAllLanes, visible));
  }
  write_scaled<T, V>(a.grad.at(b, p), sum_t<T>(0.5) / static_cast<sum_t<T>>(count), width, out);
}

// Writes grad_backbone [B, T', 1+P, D]; a warp has one token.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) pool_backward_backbone(const PoolDevice<T> a, T* __restrict__ out) {
  const int64_t task = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t patches = a.places.patches, width = a.places.width;
  const int64_t frame = task / (patches + 1), k = task - frame * (patches + 1);
  const int64_t b = frame / a.tower_frames, t = frame - b * a.tower_frames;
  if (b >= a.places.batch) return;
  out += task * width;
  const int real = a.places.real_frames(b, a.tower_frames);
  if (t >= real) return fill_row<T, V>(0, width, out);
  write_scaled<T, V>(a.grad.at(b, k == 0 ? patches : k - 1), sum_t<T>(0.5) / static_cast<sum_t<T>>(real), width, out);
}

// `On` is class Launch, or the emulator of the tests. a.row_of is filled here, through `row_of`.
template <typename T, int V, typename On>
void launch_pool_forward(const On& on, const PoolDevice<T>& a, int32_t* row_of, T* out) {
  const int64_t tiles = parts(a.places.width, kWarp * V);
  launch_rows_of_places(on, a.places, row_of);
  on.run(pool_forward<T, V>, parts(a.places.batch * (a.places.patches + 1) * tiles, kWarps), kThreads, a, tiles, out);
}

// Null: not needed. Only grad_branch needs row_of.
template <typename T, int V, typename On>
void launch_pool_backward(const On& on, const PoolDevice<T>& a, int32_t* row_of, T* grad_backbone, T* grad_branch) {
  const Places& s = a.places;
  if (grad_branch) {
    launch_rows_of_places(on, s, row_of);
    on.run(pool_backward_branch<T, V>, parts(s.batch * (1 + s.tokens), kWarps), kThreads, a, grad_branch);
  }
  if (grad_backbone) {
    on.run(pool_backward_backbone<T, V>, parts(s.batch * a.tower_frames * (1 + s.patches), kWarps), kThreads, a,
           grad_backbone);
  }
}

}  // namespace bt
