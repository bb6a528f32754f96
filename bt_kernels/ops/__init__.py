"""The ops, one folder each, with the public function, its reference and its kernels."""
