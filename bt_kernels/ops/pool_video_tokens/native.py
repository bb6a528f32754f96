"""pool_video_tokens in C++ for CPU (csrc/cpu/pool_video_tokens.cpp)."""


def forward(*args):
    raise NotImplementedError


def backward(*args):
    raise NotImplementedError
