// Device code of gather_merge: no torch header, so it compiles alone. Formula and shapes: ../gather_merge.h.
//
// A warp takes one row (one token of one video) and walks its columns in vectors of 16 bytes; V is the number of
// elements of a vector, 1 where a row is not a whole number of them. Grids have one dimension: y and z end at 65,535.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace bt {

constexpr int kWarp = 32;
constexpr int kWarps = 8;                  // warps of a block
constexpr int kThreads = kWarp * kWarps;

template <typename T>
struct Sum {
  using type = float;
};
template <>
struct Sum<double> {
  using type = double;
};
template <typename T>
using sum_t = typename Sum<T>::type;

template <typename T>
struct MergeDevice {
  const T* backbone;
  const T* branch;
  const T* gate;  // null: out = branch + m
  const T* grad;
  const int64_t* index;
  const int64_t* frame_counts;  // null: all frames are real
  int frames;  // 32 bits: a place is divided by it in every row, and 64-bit division costs registers
  int64_t batch, patches, width, tokens;
  // Strides, in elements.
  int64_t backbone_batch, backbone_frame, backbone_token, branch_batch, branch_row, grad_batch, grad_row;

  // Real frames, never more than there are: a wrong count must not read past the tensor.
  __device__ int frames_of(int64_t b) const {
    if (!frame_counts) return frames;
    const int64_t count = frame_counts[b];
    return count < 0 ? 0 : (count < frames ? static_cast<int>(count) : frames);
  }
  // Element offset of place = p*T + t in a video of the given strides. The launcher checks that P*T fits 32 bits.
  __device__ int64_t offset(int64_t place, int64_t frame_stride, int64_t token_stride) const {
    const int p = static_cast<int>(place) / frames, t = static_cast<int>(place) - p * frames;
    return t * frame_stride + (1 + p) * token_stride;
  }
  __device__ int64_t token(int64_t b, int64_t place) const {
    return b * backbone_batch + offset(place, backbone_frame, backbone_token);
  }
  // Places past the end give rows of NaN: reading them is not safe, and zeros would hide the mistake.
  __device__ bool outside(int64_t place) const { return place >= frames * patches; }
};

template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  T at[V];
};

template <typename T, int V>
__device__ __forceinline__ void read(const T* from, sum_t<T> (&to)[V]) {
  const Vector<T, V> v = *reinterpret_cast<const Vector<T, V>*>(from);
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = static_cast<sum_t<T>>(v.at[i]);
}

template <typename T, int V>
__device__ __forceinline__ void write(T* to, const sum_t<T> (&from)[V]) {
  Vector<T, V> v;
#pragma unroll
  for (int i = 0; i < V; ++i) v.at[i] = static_cast<T>(from[i]);
  *reinterpret_cast<Vector<T, V>*>(to) = v;
}

template <typename T, int V>
__device__ __forceinline__ void fill(T* to, sum_t<T> value) {
  sum_t<T> all[V];
#pragma unroll
  for (int i = 0; i < V; ++i) all[i] = value;
  write<T, V>(to, all);
}

// Mean of the CLS tokens over the real frames of video b, at column d.
template <typename T, int V>
__device__ __forceinline__ void mean_cls(const MergeDevice<T>& a, int64_t b, int64_t d, sum_t<T> (&mean)[V]) {
  const int frames = a.frames_of(b);
  const T* cls = a.backbone + b * a.backbone_batch + d;
#pragma unroll
  for (int i = 0; i < V; ++i) mean[i] = 0;
  for (int t = 0; t < frames; ++t) {
    sum_t<T> value[V];
    read<T, V>(cls + t * a.backbone_frame, value);
#pragma unroll
    for (int i = 0; i < V; ++i) mean[i] += value[i];
  }
  const sum_t<T> scale = frames > 0 ? sum_t<T>(1) / static_cast<sum_t<T>>(frames) : sum_t<T>(0);
#pragma unroll
  for (int i = 0; i < V; ++i) mean[i] *= scale;
}

// The gate at column d, or all ones for a sum.
template <typename T, int V>
__device__ __forceinline__ void read_gate(const MergeDevice<T>& a, int64_t d, sum_t<T> (&gate)[V]) {
  if (a.gate) {
    read<T, V>(a.gate + d, gate);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) gate[i] = 1;
  }
}

// Column d of one row: out = (1 - gate) * branch + gate * m.
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

// Which video and row a warp has: block (b, 0) the CLS row of video b, block (b, 1 + j) kWarps of its patch rows.
// Grid: B * merge_blocks(N).
__host__ __device__ inline int64_t merge_blocks(int64_t tokens) { return 1 + (tokens + kWarps - 1) / kWarps; }

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) merge_forward(const MergeDevice<T> a, T* __restrict__ out) {
  const int64_t blocks = merge_blocks(a.tokens);
  const int64_t b = blockIdx.x / static_cast<unsigned>(blocks), part = blockIdx.x - b * blocks;
  const T* branch = a.branch + b * a.branch_batch;
  T* to = out + b * (1 + a.tokens) * a.width;
  if (part == 0) {
    for (int64_t d = threadIdx.x * V; d < a.width; d += kThreads * V) {
      sum_t<T> mean[V];
      mean_cls<T, V>(a, b, d, mean);
      merge_at<T, V>(a, branch, d, mean, to);
    }
    return;
  }
  const int64_t n = (part - 1) * kWarps + threadIdx.x / kWarp;
  if (n >= a.tokens) return;
  const int64_t first = threadIdx.x % kWarp * V, step = kWarp * V;
  const int64_t place = a.index[b * a.tokens + n];
  branch += (1 + n) * a.branch_row;
  to += (1 + n) * a.width;
  if (place < 0 || a.outside(place)) {
    const sum_t<T> value = place < 0 ? sum_t<T>(0) : static_cast<sum_t<T>>(nanf(""));
    for (int64_t d = first; d < a.width; d += step) fill<T, V>(to + d, value);
    return;
  }
  const T* from = a.backbone + a.token(b, place);
#pragma unroll 4
  for (int64_t d = first; d < a.width; d += step) {
    sum_t<T> m[V];
    read<T, V>(from + d, m);
    merge_at<T, V>(a, branch, d, m, to);
  }
}

// grad_branch (null: not needed) and the partial sums [partials, D] of grad_gate (null: not needed). Block (tile,
// partial) has kWarp * V columns of rows_each neighbouring rows; a warp takes every kWarps-th of these rows.
// Grid: tiles * partials, tile fastest. Every sum has a fixed order.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    merge_backward_rows(const MergeDevice<T> a, int64_t tiles, int64_t rows_each, T* __restrict__ grad_branch,
                        sum_t<T>* __restrict__ partial) {
  __shared__ sum_t<T> of_warp[kWarps][kWarp * V];
  const int64_t part = blockIdx.x / static_cast<unsigned>(tiles), tile = blockIdx.x - part * tiles;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t d = (tile * kWarp + lane) * V, rows = 1 + a.tokens;
  const int64_t end = min((part + 1) * rows_each, a.batch * rows);
  sum_t<T> sum[V] = {}, gate[V];
  if (d < a.width) {
    read_gate<T, V>(a, d, gate);
    const int64_t begin = part * rows_each + warp;
    int64_t b = begin / rows, r = begin - b * rows;
    for (int64_t i = begin; i < end; i += kWarps, r += kWarps) {
      for (; r >= rows; r -= rows) ++b;
      const int64_t place = r == 0 ? 0 : a.index[b * a.tokens + r - 1];
      if (place < 0 || (r > 0 && a.outside(place))) {
        const sum_t<T> value = place < 0 ? sum_t<T>(0) : static_cast<sum_t<T>>(nanf(""));
        if (grad_branch) fill<T, V>(grad_branch + i * a.width + d, value);
        continue;
      }
      sum_t<T> grad[V], x[V], m[V];
      read<T, V>(a.grad + b * a.grad_batch + r * a.grad_row + d, grad);
      if (grad_branch) {
#pragma unroll
        for (int k = 0; k < V; ++k) x[k] = a.gate ? (1 - gate[k]) * grad[k] : grad[k];
        write<T, V>(grad_branch + i * a.width + d, x);
      }
      if (!partial) continue;
      read<T, V>(a.branch + b * a.branch_batch + r * a.branch_row + d, x);
      if (r == 0) {
        mean_cls<T, V>(a, b, d, m);
      } else {
        read<T, V>(a.backbone + a.token(b, place) + d, m);
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
  if (threadIdx.x >= kWarp * V || column >= a.width) return;
  sum_t<T> total = 0;
  for (int w = 0; w < kWarps; ++w) total += of_warp[w][threadIdx.x];
  partial[part * a.width + column] = total;
}

// grad_gate[d] = sum of partial[:, d]. Grid: ceil(D / kWarp).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    merge_gate_reduce(const sum_t<T>* __restrict__ partial, int64_t partials, int64_t width,
                      T* __restrict__ grad_gate) {
  __shared__ sum_t<T> of_warp[kWarps][kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t d = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  sum_t<T> total = 0;
  if (d < width) {
    for (int64_t i = warp; i < partials; i += kWarps) total += partial[i * width + d];
  }
  of_warp[warp][lane] = total;
  __syncthreads();
  if (warp > 0 || d >= width) return;
  for (int w = 1; w < kWarps; ++w) total += of_warp[w][lane];
  grad_gate[d] = static_cast<T>(total);
}

// grad_backbone [B, T, 1+P, D], filled with zeros before; the places of a video are distinct, so no two warps meet.
// Grid as the forward's.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) merge_backward_backbone(const MergeDevice<T> a, T* __restrict__ out) {
  const int64_t blocks = merge_blocks(a.tokens);
  const int64_t b = blockIdx.x / static_cast<unsigned>(blocks), part = blockIdx.x - b * blocks;
  const int64_t frame = (1 + a.patches) * a.width;
  const T* grad = a.grad + b * a.grad_batch;
  out += b * a.frames * frame;
  sum_t<T> g[V], gate[V];
  if (part == 0) {
    const int frames = a.frames_of(b);
    for (int64_t d = threadIdx.x * V; d < a.width; d += kThreads * V) {
      read<T, V>(grad + d, g);
      read_gate<T, V>(a, d, gate);
#pragma unroll
      for (int k = 0; k < V; ++k) g[k] *= gate[k] / static_cast<sum_t<T>>(frames);
      for (int t = 0; t < frames; ++t) write<T, V>(out + t * frame + d, g);
    }
    return;
  }
  const int64_t n = (part - 1) * kWarps + threadIdx.x / kWarp;
  const int64_t place = n < a.tokens ? a.index[b * a.tokens + n] : -1;
  if (place < 0 || a.outside(place)) return;
  grad += (1 + n) * a.grad_row;
  out += a.offset(place, frame, a.width);
  for (int64_t d = threadIdx.x % kWarp * V; d < a.width; d += kWarp * V) {
    read<T, V>(grad + d, g);
    read_gate<T, V>(a, d, gate);
#pragma unroll
    for (int k = 0; k < V; ++k) g[k] *= gate[k];
    write<T, V>(out + d, g);
  }
}

}  // namespace bt
