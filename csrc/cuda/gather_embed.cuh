// Device code of gather_embed; rows.cuh has the loops over rows. With CLS first in out, backbone and pos:
//   out[b, 0]   = (mean of backbone[b, t, 0] over real frames + cls_token + pos[0]) / 2
//   out[b, 1+n] = backbone[b, t, 1+p] + pos[1+p] + time[t]   for row n at place p*T + t, zeros for padding.
// backbone [B, T, 1+P, D], cls_token [D], pos [1+P, D], time [M, D] with M >= T, out and grad [B, 1+N, D].
#pragma once

#include "rows.cuh"

namespace bt {

template <typename T>
struct EmbedDevice {
  Places places;
  Tower<T> backbone;
  const T* cls_token;  // the tables are contiguous
  const T* pos;
  const T* time;
};

// Grid: B * row_blocks(N).
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) embed_forward(const EmbedDevice<T> a, T* __restrict__ out) {
  const int64_t tokens = a.places.tokens, width = a.places.width, blocks = row_blocks(tokens);
  const int64_t b = blockIdx.x / static_cast<unsigned>(blocks), part = blockIdx.x - b * blocks;
  T* to = out + b * (1 + tokens) * width;
  sum_t<T> x[V], pos[V], third[V];
  if (part == 0) {
    const int frames = a.places.real_frames(b);
    for (int64_t d = threadIdx.x * V; d < width; d += kThreads * V) {
      mean_over_frames<T, V>(a.backbone, b, 0, d, frames, x);
      read<T, V>(a.cls_token + d, third);
      read<T, V>(a.pos + d, pos);
#pragma unroll
      for (int i = 0; i < V; ++i) x[i] = (x[i] + third[i] + pos[i]) / 2;
      write<T, V>(to + d, x);
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
  const int p = a.places.patch(place), t = static_cast<int>(place) - p * a.places.frames;
  const T* from = a.backbone.at(b, t, 1 + p);
  const T* pos_row = a.pos + (1 + p) * width;
  const T* time_row = a.time + t * width;
#pragma unroll 4
  for (int64_t d = first; d < width; d += step) {
    read<T, V>(from + d, x);
    read<T, V>(pos_row + d, pos);
    read<T, V>(time_row + d, third);
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] += pos[i] + third[i];
    write<T, V>(to + d, x);
  }
}

template <typename T>
struct EmbedGrad {
  Places places;
  Rows<T> grad;
  const int32_t* row_of;  // [B, P*T] from rows_of_places; only for the gradients of pos and backbone
};

// Sums the rows of grad by class: class t < T is the patch rows of frame t, class T the CLS rows. A warp sums one class
// over rows_each adjacent rows of [B * (1+N)] and kWarp * V columns, into partial [partials, classes, D]. It reads only
// rows of its class, so grad is read once in total; the index is read once per class, from cache. Order of warps: class
// fastest, then tile, then partial. Every sum has a fixed order.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    embed_class_sums(const EmbedGrad<T> a, int first_class, int classes, int64_t tiles, int64_t partials,
                     int64_t rows_each, sum_t<T>* __restrict__ partial) {
  const int64_t task = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (task >= partials * tiles * classes) return;
  const int64_t part = task / (tiles * classes), tile = task / classes - part * tiles;
  const int row_class = static_cast<int>(task % classes), wanted = first_class + row_class;
  const int lane = threadIdx.x % kWarp;
  const int64_t rows = 1 + a.places.tokens, width = a.places.width, d = (tile * kWarp + lane) * V;
  const int64_t begin = part * rows_each, end = min(begin + rows_each, a.places.batch * rows);
  int64_t b = (begin + lane) / rows, r = begin + lane - b * rows;
  sum_t<T> sum[V] = {};
  for (int64_t i = begin; i < end; i += kWarp, r += kWarp) {
    for (; r >= rows; r -= rows) ++b;
    int found = -1;
    if (i + lane < end) {
      const int64_t place = r == 0 ? 0 : a.places.at(b, r - 1);
      if (r == 0) {
        found = a.places.frames;
      } else if (place >= 0 && !a.places.outside(place)) {
        found = static_cast<int>(place) - a.places.patch(place) * a.places.frames;
      }
    }
    const unsigned chosen = __ballot_sync(kAllLanes, found == wanted);
    add_rows<T, V>(a.grad.data, chosen, b * a.grad.batch + r * a.grad.row, d, d < width, sum);
  }
  if (d >= width) return;
  sum_t<T>* to = partial + (part * classes + row_class) * width + d;
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = sum[i];
}

// Writes grad_time [T, D] (null: not needed), and half of the CLS class to grad_cls_token [D] and grad_pos[0] (null:
// not needed). Grid: ceil(classes * D / kWarp).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    embed_reduce(const sum_t<T>* __restrict__ partial, int64_t partials, int first_class, int classes, int frames,
                 int64_t width, T* __restrict__ grad_time, T* __restrict__ grad_cls_token, T* __restrict__ grad_pos) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x % kWarp;
  const sum_t<T> total = sum_of_partials(partial, partials, classes * width, column);
  if (threadIdx.x >= kWarp || column >= classes * width) return;
  const int64_t at = first_class * width + column, cls = at - frames * width;
  if (cls < 0) {
    if (grad_time) grad_time[at] = static_cast<T>(total);
    return;
  }
  if (grad_cls_token) grad_cls_token[cls] = static_cast<T>(total / 2);
  if (grad_pos) grad_pos[cls] = static_cast<T>(total / 2);
}

// Writes grad_pos[1+p] of every patch: the sum of its rows over videos and frames. A warp has one patch and
// kWarp * V columns, tile fastest.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    embed_backward_pos(const EmbedGrad<T> a, int64_t tiles, T* __restrict__ grad_pos) {
  const int64_t task = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t p = task / tiles, tile = task - p * tiles;
  if (p >= a.places.patches) return;
  const int lane = threadIdx.x % kWarp;
  const int frames = a.places.frames;
  const int64_t d = (tile * kWarp + lane) * V, width = a.places.width, all = a.places.batch * frames;
  sum_t<T> sum[V] = {};
  for (int64_t i = 0; i < all; i += kWarp) {
    const int64_t b = (i + lane) / frames, t = i + lane - b * frames;
    const int32_t row = i + lane < all ? a.row_of[(b * a.places.patches + p) * frames + t] : 0;
    const unsigned chosen = __ballot_sync(kAllLanes, row > 0);
    add_rows<T, V>(a.grad.data, chosen, b * a.grad.batch + row * a.grad.row, d, d < width, sum);
  }
  if (d < width) write<T, V>(grad_pos + (1 + p) * width + d, sum);
}

// Writes grad_backbone [B, T, 1+P, D], every token once: its row's gradient, its share of the CLS row's, or zeros.
// A warp has one token.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) embed_backward_backbone(const EmbedGrad<T> a, T* __restrict__ out) {
  const int64_t task = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t each = 1 + a.places.patches, width = a.places.width, frame = task / each, k = task - frame * each;
  const int64_t b = frame / a.places.frames, t = frame - b * a.places.frames;
  if (b >= a.places.batch) return;
  int64_t row = 0;
  sum_t<T> scale = 1;
  bool used = true;
  if (k == 0) {
    const int real = a.places.real_frames(b);
    used = t < real;
    scale = sum_t<T>(0.5) / static_cast<sum_t<T>>(real);
  } else {
    row = a.row_of[(b * a.places.patches + k - 1) * a.places.frames + t];
    used = row > 0;
  }
  const T* from = a.grad.at(b, row);
  out += task * width;
#pragma unroll 2
  for (int64_t d = threadIdx.x % kWarp * V; d < width; d += kWarp * V) {
    if (!used) {
      fill<T, V>(out + d, 0);
      continue;
    }
    sum_t<T> x[V];
    read<T, V>(from + d, x);
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] *= scale;
    write<T, V>(out + d, x);
  }
}

// Sums needed for the gradients of time, cls_token and pos[0]: the classes of rows and the number of partial sums.
struct EmbedSums {
  int first_class, classes;
  int64_t partials, rows_each;

  // Only sizes decide, so results do not depend on the device. About 2,048 warps occupy a device, and at least 64 rows
  // of each class per partial sum keep the memory traffic of partial sums at 3 % or less.
  EmbedSums(const Places& s, int vector, bool of_time, bool of_cls)
      : first_class(of_time ? 0 : s.frames), classes((of_time ? s.frames : 0) + (of_cls ? 1 : 0)) {
    const int64_t rows = s.batch * (1 + s.tokens), warps = classes * parts(s.width, kWarp * vector);
    const int64_t most = warps ? parts(2048, warps) : 1, least_rows = 64 * static_cast<int64_t>(s.frames);
    rows_each = parts(rows, most) > least_rows ? parts(rows, most) : least_rows;
    partials = parts(rows, rows_each);
  }
  int64_t size(int64_t width) const { return partials * classes * width; }
};

// `On` is class Launch, or the emulator of the tests.
template <typename T, int V, typename On>
void launch_embed_forward(const On& on, const EmbedDevice<T>& a, T* out) {
  on.run(embed_forward<T, V>, a.places.batch * row_blocks(a.places.tokens), kThreads, a, out);
}

// Null: not needed. grad_time has `time_rows` rows. partial has sums.size(D) elements. a.row_of is filled
// here, through `row_of`; grad_pos and grad_backbone need it.
template <typename T, int V, typename On>
void launch_embed_backward(const On& on, const EmbedGrad<T>& a, const EmbedSums& sums, int64_t time_rows,
                           int32_t* row_of, sum_t<T>* partial, T* grad_backbone, T* grad_cls_token, T* grad_pos,
                           T* grad_time) {
  const Places& s = a.places;
  const int64_t tiles = parts(s.width, kWarp * V);
  if (grad_time) on.zero(grad_time + s.frames * s.width, (time_rows - s.frames) * s.width * sizeof(T));
  if (sums.classes) {
    on.run(embed_class_sums<T, V>, parts(sums.partials * tiles * sums.classes, kWarps), kThreads, a, sums.first_class,
           sums.classes, tiles, sums.partials, sums.rows_each, partial);
    on.run(embed_reduce<T>, parts(sums.classes * s.width, kWarp), kThreads, static_cast<const sum_t<T>*>(partial),
           sums.partials, sums.first_class, sums.classes, s.frames, s.width, grad_time, grad_cls_token, grad_pos);
  }
  if (grad_pos || grad_backbone) launch_rows_of_places(on, s, row_of);
  if (grad_pos) on.run(embed_backward_pos<T, V>, parts(s.patches * tiles, kWarps), kThreads, a, tiles, grad_pos);
  if (grad_backbone) {
    on.run(embed_backward_backbone<T, V>, parts(s.batch * s.frames * (1 + s.patches), kWarps), kThreads, a,
           grad_backbone);
  }
}

}  // namespace bt
