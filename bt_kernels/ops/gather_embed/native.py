"""gather_embed in C++ for CPU (csrc/cpu/gather_embed.cpp)."""


def forward(*args):
    raise NotImplementedError


def backward(*args):
    raise NotImplementedError


def forward_norm(*args):
    raise NotImplementedError


def backward_norm(*args):
    raise NotImplementedError
