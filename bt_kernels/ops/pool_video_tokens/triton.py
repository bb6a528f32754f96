"""pool_video_tokens in Triton."""


def forward(*args):
    raise NotImplementedError


def backward(*args):
    raise NotImplementedError
