"""This package's video decoder as a video loader of vLLM."""

from __future__ import annotations

from typing import Any

from vllm.multimodal.video import VideoLoader

from bt_adapter.vllm.frames import decode


class BTAdapterVideoLoader(VideoLoader):
    """A video loader that decodes and samples with :func:`bt_adapter.vllm.frames.decode`."""

    @classmethod
    def load_bytes(cls, data: bytes, **options: Any) -> tuple[Any, dict[str, Any]]:
        """Decode a video; ``options`` come from ``--media-io-kwargs`` and requests."""
        return decode(data, **options)
