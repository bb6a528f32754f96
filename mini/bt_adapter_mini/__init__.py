"""Weights of the small stack of bt-adapter: data alone, read by bt_adapter.mini."""
