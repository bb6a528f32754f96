// Launchers of temporal_attention on CUDA: bfloat16 and float16 on a regular grid of at most 64 slots, heads of a width
// that is a multiple of 8 up to 128. Other backends run other calls. The index is not needed.
#include "temporal_attention.cuh"

#include "call.h"

namespace bt {
namespace {

// Returns the tensor if its rows are whole vectors of 16 bytes, else a copy with such rows.
Tensor in_vectors(const Tensor& tensor) {
  const auto fits = [](const Tensor& t) {
    bool all = in_vectors_of(8, {t.const_data_ptr()}, {}) && t.stride(t.dim() - 1) == 1;
    for (int64_t i = 0; i + 1 < t.dim(); ++i) all = all && t.stride(i) % 8 == 0;
    return all;
  };
  if (fits(tensor)) return tensor;
  const Tensor adjacent = torch::stable::contiguous(tensor);
  return fits(adjacent) ? adjacent : torch::stable::clone(adjacent);
}

void check_temporal(const char* op, const Tensor& qkv, const Tensor& index, const std::optional<int64_t>& slots) {
  STD_TORCH_CHECK(qkv.dim() == 5 && qkv.size(2) == 3, op, ": qkv must have shape [B, N, 3, H, E]");
  check_shape(op, "index", index, {qkv.size(0), qkv.size(1)});
  STD_TORCH_CHECK(qkv.scalar_type() == ScalarType::BFloat16 || qkv.scalar_type() == ScalarType::Half, op,
                  ": the CUDA kernel takes bfloat16 and float16, got ",
                  torch::headeronly::toString(qkv.scalar_type()));
  STD_TORCH_CHECK(slots.has_value(), op, ": the CUDA kernel takes regular grids, got the ragged form");
  STD_TORCH_CHECK(*slots >= 1 && *slots <= kMostSlots && qkv.size(1) % *slots == 0, op,
                  ": the CUDA kernel takes 1 to ", kMostSlots, " slots that divide N, got ", *slots);
  STD_TORCH_CHECK(qkv.size(4) % 8 == 0 && qkv.size(4) >= 8 && qkv.size(4) <= kMostWidth, op,
                  ": the CUDA kernel takes heads of a width that is a multiple of 8 up to ", kMostWidth, ", got ",
                  qkv.size(4));
  // One head of a row takes at least 48 bytes: more than 100 GB.
  STD_TORCH_CHECK(qkv.size(0) * qkv.size(1) * std::max<int64_t>(qkv.size(3), 1) <= INT_MAX - kMostSlots, op,
                  ": B*N*H is more than 32 bits hold, split the batch");
}

template <typename F>
void dispatch_halves(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::BFloat16) return f(__nv_bfloat16{});
  f(__half{});
}

template <typename T>
TemporalDevice<T> device_call(const Tensor& qkv, const Tensor* grad, int64_t slots) {
  TemporalDevice<T> a = temporal_device<T>(data_of<T>(qkv), grad ? data_of<T>(*grad) : nullptr, qkv.size(0),
                                           qkv.size(1), slots, qkv.size(3), qkv.size(4));
  a.qkv_batch = qkv.stride(0), a.qkv_row = qkv.stride(1), a.qkv_part = qkv.stride(2), a.qkv_head = qkv.stride(3);
  if (grad) a.grad_batch = grad->stride(0), a.grad_row = grad->stride(1), a.grad_head = grad->stride(2);
  return a;
}

Tensor temporal_attention_cuda(const Tensor& qkv_in, const Tensor& index, int64_t, std::optional<int64_t> slots) {
  const char* op = "temporal_attention";
  check_temporal(op, qkv_in, index, slots);
  const Launch on(op, qkv_in.get_device_index());
  const Tensor qkv = in_vectors(qkv_in);
  Tensor out = empty_like_shape(qkv, {qkv.size(0), qkv.size(1), qkv.size(3), qkv.size(4)});
  if (!out.numel()) return out;
  dispatch_halves(qkv.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    launch_temporal_forward(on, device_call<T>(qkv, nullptr, *slots), static_cast<T*>(out.mutable_data_ptr()));
  });
  return out;
}

Tensor temporal_attention_backward_cuda(const Tensor& grad_in, const Tensor& qkv_in, const Tensor& index, int64_t,
                                        std::optional<int64_t> slots) {
  const char* op = "temporal_attention_backward";
  check_temporal(op, qkv_in, index, slots);
  check_shape(op, "grad", grad_in, {qkv_in.size(0), qkv_in.size(1), qkv_in.size(3), qkv_in.size(4)});
  check_same(op, "grad", grad_in, qkv_in);
  const Launch on(op, qkv_in.get_device_index());
  const Tensor qkv = in_vectors(qkv_in), grad = in_vectors(grad_in);
  Tensor grad_qkv = empty_like_shape(qkv, {qkv.size(0), qkv.size(1), 3, qkv.size(3), qkv.size(4)});
  if (!grad_qkv.numel()) return grad_qkv;
  dispatch_halves(qkv.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    launch_temporal_backward(on, device_call<T>(qkv, &grad, *slots), static_cast<T*>(grad_qkv.mutable_data_ptr()));
  });
  return grad_qkv;
}

}  // namespace
}  // namespace bt

STABLE_TORCH_LIBRARY_IMPL(bt_kernels_native, CUDA, m) {
  m.impl("temporal_attention", TORCH_BOX(&bt::temporal_attention_cuda));
  m.impl("temporal_attention_backward", TORCH_BOX(&bt::temporal_attention_backward_cuda));
}
