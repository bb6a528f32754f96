"""temporal_attention in C++ for CPU (csrc/cpu/temporal_attention.cpp)."""


def forward(*args):
    raise NotImplementedError


def backward(*args):
    raise NotImplementedError
