"""The small stack of bt-adapter: weights and clips, data alone, read by bt_adapter.mini."""
