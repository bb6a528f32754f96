// bt_kernels._C: facts of the build. Importing it registers the CPU kernels, whose static initialisers live here too.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "build_facts.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of bt_kernels: importing it registers the CPU kernels of torch.ops.bt_kernels_native.";
  m.def(
      "build_facts",
      [] {
        return std::map<std::string, std::string>{
            {"compiler", BT_COMPILER},
            {"flags", BT_COMPILER_FLAGS},
            {"torch", BT_BUILD_TORCH},
            {"cuda_compiler", BT_CUDA_COMPILER},
            {"cuda_archs", BT_CUDA_ARCHITECTURES},
            {"why_no_cuda", BT_CUDA_REASON},
        };
      },
      "Compiler, flags, torch version and CUDA targets of the build; an empty string where there is none.");
}
