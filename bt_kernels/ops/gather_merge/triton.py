"""gather_merge in Triton."""


def forward(*args):
    raise NotImplementedError


def backward(*args):
    raise NotImplementedError


def forward_norm(*args):
    raise NotImplementedError


def backward_norm(*args):
    raise NotImplementedError
