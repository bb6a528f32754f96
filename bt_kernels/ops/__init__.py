"""The ops, one folder each: the public function, its reference and its kernels."""
