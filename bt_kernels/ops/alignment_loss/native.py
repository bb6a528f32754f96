"""alignment_loss in C++ for CPU (csrc/cpu/alignment_loss.cpp)."""


def forward(*args):
    raise NotImplementedError


def backward(*args):
    raise NotImplementedError
