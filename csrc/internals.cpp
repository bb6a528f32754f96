// bt_kernels._internals: C++ functions inside the kernels, element by element over NumPy arrays, for the tests. Built for
// the Python at hand in a checkout alone; no wheel holds it and nothing needs it to run.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>

#include "cpu/convert.h"

using torch::headeronly::Half;

PYBIND11_MODULE(_internals, m) {
  m.doc() = "C++ functions inside the kernels of bt_kernels, for tests.";
  m.def("half_to_float", pybind11::vectorize([](uint16_t bits) { return bt::load(Half(bits, Half::from_bits())); }),
        "float32 values of float16 numbers given by their bits (uint16).", pybind11::arg("bits"));
  m.def("float_to_half", pybind11::vectorize([](float value) -> uint16_t { return bt::store<Half>(value).x; }),
        "Bits (uint16) of float32 values rounded to float16, to the nearest, ties to even.", pybind11::arg("values"));
}
