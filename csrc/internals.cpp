// bt_kernels._internals: internal C++ functions of the kernels, applied to NumPy arrays by element, for the tests. Only
// an editable install builds it, for its own Python. Wheels do not contain it, and the kernels do not need it.
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
