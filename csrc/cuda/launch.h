// Launching kernels on torch's current stream of a tensor's device.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <climits>

#include "../common.h"

// Weak, because a torch without CUDA lacks it and the library must load there too.
#pragma weak aoti_torch_get_current_cuda_stream

namespace bt {

// Makes a device current for its lifetime; launches use torch's current stream of that device.
class Launch {
 public:
  Launch(const char* op, int32_t device) : op_(op), guard_(device) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, op, ": this torch has no CUDA");
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS, op,
                    ": torch gave no current stream for device ", device);
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // One-dimensional grid; nothing is launched for zero blocks.
  template <typename... Parameters, typename... Arguments>
  void run(void (*kernel)(Parameters...), int64_t blocks, int threads, Arguments... arguments) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks <= INT_MAX, op_, ": ", blocks, " blocks are more than a grid holds, split the batch");
    kernel<<<static_cast<unsigned>(blocks), threads, 0, stream_>>>(arguments...);
    check(cudaGetLastError());
  }

  void zero(void* data, size_t bytes) const {
    if (bytes) check(cudaMemsetAsync(data, 0, bytes, stream_));
  }

 private:
  void check(cudaError_t error) const {
    STD_TORCH_CHECK(error == cudaSuccess, op_, ": ", cudaGetErrorName(error), ", ", cudaGetErrorString(error));
  }

  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace bt
