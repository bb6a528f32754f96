// Device code of gather_merge. ../gather_merge.h has formula and shapes, rows.cuh the loops over rows.
#pragma once

#include "rows.cuh"

namespace bt {

template <typename T>
struct MergeDevice {
  Places places;
  Tower<T> backbone;
  Rows<T> branch, grad;
  const T* gate;  // null: out = branch + m
};

// Returns the gate at column d, or ones for a sum.
template <typename T, int V>
__device__ __forceinline__ void read_gate(const MergeDevice<T>& a, int64_t d, sum_t<T> (&gate)[V]) {
  if (a.gate) {
    read<T, V>(a.gate + d, gate);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) gate[i] = 1;
  }
}

// Computes column d of one row: out = (1 - gate) * branch + gate * m.
template <typename T, int V>
__device__ __forceinline__ void merge_at(const MergeDevice<T>& a, const T* branch, int64_t d, const sum_t<T> (&m)[V],
                                         T* out) {
  sum_t<T> x[V], gate[V];
  read<T, V>(branch + d, x);
  read_gate<T, V>(a, d, gate);
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = a.gate ? (1 - gate[i]) * x[i] + gate[i] * m[i] : x[i] + m[i];
  write<T, V>(out + d, x);
}

// Grid: B * row_blocks(N).
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) merge_forward(const MergeDevice<T> a, T* __restrict__ out) {
  const int64_t tokens = a.places.tokens, width = a.places.width, blocks = row_blocks(tokens);
  const int64_t b = blockIdx.x / static_cast<unsigned>(blocks), part = blockIdx.x - b * blocks;
  T* to = out + b * (1 + tokens) * width;
  if (part == 0) {
    const T* branch = a.branch.at(b, 0);
    const int frames = a.places.real_frames(b);
    for (int64_t d = threadIdx.x * V; d < width; d += kThreads * V) {
      sum_t<T> mean[V];
      mean_over_frames<T, V>(a.backbone, b, 0, d, frames, mean);
      merge_at<T, V>(a, branch, d, mean, to);
    }
    return;
  }
  const int64_t n = (part - 1) * kWarps + threadIdx.x / kWarp;
  if (n >= tokens) return;
  const int64_t first = threadIdx.x % kWarp * V, step = kWarp * V;
  const int64_t place = a.places.at(b, n);
  to += (1 + n) * width;
  if (place < 0 || a.places.outside(place)) {
    const sum_t<T> value = place < 0 ? sum_t<T>(0) : static_cast<sum_t<T>>(nanf(""));
    for (int64_t d = first; d < width; d += step) fill<T, V>(to + d, value);
    return;
  }
  const T* branch = a.branch.at(b, 1 + n);
  const T* from = token_at(a.backbone, a.places, b, place);
#pragma unroll 4
  for (int64_t d = first; d < width; d += step) {
    sum_t<T> m[V];
    read<T, V>(from + d, m);
    merge_at<T, V>(a, branch, d, m, to);
  }
}

// Writes grad_branch (null: not needed) and the partial sums [partials, D] of grad_gate (null: not needed). Block
// (tile, partial) has kWarp * V columns of rows_each adjacent rows; a warp takes every kWarps-th of these rows.
// Grid: tiles * partials, tile fastest. Every sum has a fixed order.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    merge_backward_rows(const MergeDevice<T> a, int64_t tiles, int64_t rows_each, T* __restrict__ grad_branch,
                        sum_t<T>* __restrict__ partial) {
  __shared__ sum_t<T> of_warp[kWarps][kWarp * V];
  const int64_t part = blockIdx.x / static_cast<unsigned>(tiles), tile = blockIdx.x - part * tiles;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t d = (tile * kWarp + lane) * V, rows = 1 + a.places.tokens, width = a.places.width;
  const int64_t end = min((part + 1) * rows_each, a.places.batch * rows);
  sum_t<T> sum[V] = {}, gate[V];
  if (d < width) {
    read_gate<T, V>(a, d, gate);
    const int64_t begin = part * rows_each + warp;
    int64_t b = begin / rows, r = begin - b * rows;
    for (int64_t i = begin; i < end; i += kWarps, r += kWarps) {
      for (; r >= rows; r -= rows) ++b;
      const int64_t place = r == 0 ? 0 : a.places.at(b, r - 1);
      if (place < 0 || (r > 0 && a.places.outside(place))) {
        const sum_t<T> value = place < 0 ? sum_t<T>(0) : static_cast<sum_t<T>>(nanf(""));
        if (grad_branch) fill<T, V>(grad_branch + i * width + d, value);
        continue;
      }
      sum_t<T> grad[V], x[V], m[V];
      read<T, V>(a.grad.at(b, r) + d, grad);
      if (grad_branch) {
#pragma unroll
        for (int k = 0; k < V; ++k) x[k] = a.gate ? (1 - gate[k]) * grad[k] : grad[k];
        write<T, V>(grad_branch + i * width + d, x);
      }
      if (!partial) continue;
      read<T, V>(a.branch.at(b, r) + d, x);
      if (r == 0) {
        mean_over_frames<T, V>(a.backbone, b, 0, d, a.places.real_frames(b), m);
      } else {
        read<T, V>(token_at(a.backbone, a.places, b, place) + d, m);
      }
#pragma unroll
      for (int k = 0; k < V; ++k) sum[k] += grad[k] * (m[k] - x[k]);
    }
  }
  if (!partial) return;
#pragma unroll
  for (int k = 0; k < V; ++k) of_warp[warp][lane * V + k] = sum[k];
  __syncthreads();
  const int64_t column = tile * kWarp * V + threadIdx.x;
  if (threadIdx.x >= kWarp * V || column >= width) return;
  sum_t<T> total = 0;
  for (int w = 0; w < kWarps; ++w) total += of_warp[w][threadIdx.x];
  partial[part * width + column] = total;
}

// grad_gate[d] = sum of partial[:, d]. Grid: ceil(D / kWarp).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    merge_gate_reduce(const sum_t<T>* __restrict__ partial, int64_t partials, int64_t width,
                      T* __restrict__ grad_gate) {
  const int64_t d = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x % kWarp;
  const sum_t<T> total = sum_of_partials(partial, partials, width, d);
  if (threadIdx.x < kWarp && d < width) grad_gate[d] = static_cast<T>(total);
}

// Writes grad_backbone [B, T, 1+P, D], which must hold zeros. The places of a video are distinct, so no two warps write
// the same token. The grid is that of the forward.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) merge_backward_backbone(const MergeDevice<T> a, T* __restrict__ out) {
  const int64_t tokens = a.places.tokens, width = a.places.width, blocks = row_blocks(tokens);
  const int64_t b = blockIdx.x / static_cast<unsigned>(blocks), part = blockIdx.x - b * blocks;
  const int64_t frame = (1 + a.places.patches) * width;
  out += b * a.places.frames * frame;
  sum_t<T> g[V], gate[V];
  if (part == 0) {
    const int frames = a.places.real_frames(b);
    for (int64_t d = threadIdx.x * V; d < width; d += kThreads * V) {
      read<T, V>(a.grad.at(b, 0) + d, g);
      read_gate<T, V>(a, d, gate);
#pragma unroll
      for (int k = 0; k < V; ++k) g[k] *= gate[k] / static_cast<sum_t<T>>(frames);
      for (int t = 0; t < frames; ++t) write<T, V>(out + t * frame + d, g);
    }
    return;
  }
  const int64_t n = (part - 1) * kWarps + threadIdx.x / kWarp;
  const int64_t place = n < tokens ? a.places.at(b, n) : -1;
  if (place < 0 || a.places.outside(place)) return;
  const T* grad = a.grad.at(b, 1 + n);
  const int p = a.places.patch(place), t = static_cast<int>(place) - p * a.places.frames;
  out += t * frame + (1 + p) * width;
  for (int64_t d = threadIdx.x % kWarp * V; d < width; d += kWarp * V) {
    read<T, V>(grad + d, g);
    read_gate<T, V>(a, d, gate);
#pragma unroll
    for (int k = 0; k < V; ++k) g[k] *= gate[k];
    write<T, V>(out + d, g);
  }
}

// `On` is class Launch, or the emulator of the tests.
template <typename T, int V, typename On>
void launch_merge_forward(const On& on, const MergeDevice<T>& a, T* out) {
  on.run(merge_forward<T, V>, a.places.batch * row_blocks(a.places.tokens), kThreads, a, out);
}

// Null: not needed. `partial` has one row of D for each rows_each rows if grad_gate is needed, else it is null.
template <typename T, int V, typename On>
void launch_merge_backward(const On& on, const MergeDevice<T>& a, int64_t rows_each, T* grad_backbone, T* grad_branch,
                           T* grad_gate, sum_t<T>* partial) {
  const Places& s = a.places;
  const int64_t partials = parts(s.batch * (1 + s.tokens), rows_each), tiles = parts(s.width, kWarp * V);
  if (grad_branch || grad_gate) {
    on.run(merge_backward_rows<T, V>, tiles * partials, kThreads, a, tiles, rows_each, grad_branch, partial);
  }
  if (grad_gate) {
    on.run(merge_gate_reduce<T>, parts(s.width, kWarp), kThreads, static_cast<const sum_t<T>*>(partial), partials,
           s.width, grad_gate);
  }
  if (grad_backbone) {
    on.zero(grad_backbone, s.batch * s.frames * (1 + s.patches) * s.width * sizeof(T));
    on.run(merge_backward_backbone<T, V>, s.batch * row_blocks(s.tokens), kThreads, a, grad_backbone);
  }
}

}  // namespace bt
