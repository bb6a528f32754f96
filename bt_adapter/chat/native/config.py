"""Configurations of chat models with a BT-Adapter branch, one class per family."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from transformers import Blip2Config, InstructBlipConfig, LlavaConfig, LlavaNextConfig, VipLlavaConfig

from bt_adapter.model.config import RUN_TIME_FIELDS, BTAdapterConfig
from bt_adapter.model.time_steps import Long, check_long


@dataclass(kw_only=True)
class VideoFields:
    """Configuration fields that a video chat model adds to those of its image chat model.

    Attributes:
        bt_adapter: the branch: under "branch" the fields of :class:`bt_adapter.BTAdapterConfig` (``recompute`` and
            ``fused``, which folders of earlier versions contain, and ``products`` are used but not saved again), under
            "layers" the number of stored branch layers (video tokens need depth - 1), and under "tower_name" the CLIP
            that the branch was trained with.
        video_token_index: id of the token that represents a video in ``input_ids``. It needs no row in the embedding
            table.
        use_branch: False: video tokens are the mean over the frames of the frozen tower's tokens, the baseline
            without the branch. The ``use_branch`` argument of a call overrides it.
        long_videos: treatment of videos with more frames than the branch has trained time steps: "average" averages
            neighbouring frames, "interpolate" interpolates the trained rows of the time table, "published" reads all
            rows as they are stored (:func:`bt_adapter.model.time_steps.plan_steps`).
    """

    bt_adapter: dict[str, Any] | None = None
    video_token_index: int | None = None
    use_branch: bool = True
    long_videos: Long = "average"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        cls.attribute_map = cls.attribute_map | {"video_token_id": "video_token_index"}  # type: ignore[attr-defined]
        super().__init_subclass__(**kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        check_long(self.long_videos)
        if self.bt_adapter is not None:
            unknown = set(self.bt_adapter) - {"branch", "layers", "tower_name"}
            if unknown or "branch" not in self.bt_adapter:
                raise ValueError(
                    "bt_adapter must be a dict with 'branch' and, where known, 'layers' and 'tower_name', but has "
                    f"{sorted(self.bt_adapter)}"
                )
            self.branch_config()

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as a dict for JSON, of the branch's those that are saved (``BTAdapterConfig.to_dict``)."""
        values = super().to_dict()  # type: ignore[misc]
        if about := values.get("bt_adapter"):
            branch = {name: value for name, value in about["branch"].items() if name not in RUN_TIME_FIELDS}
            values["bt_adapter"] = about | {"branch": branch}
        return values

    def branch_config(self) -> BTAdapterConfig:
        """Return the branch's configuration. Raises ValueError if there is none, or one of its values is invalid."""
        if self.bt_adapter is None:
            raise ValueError(f"bt_adapter must be given in a {type(self).__name__}: it describes the branch")
        return BTAdapterConfig(**self.bt_adapter["branch"])


VIDEO_FIELDS = {field.name: field.default for field in fields(VideoFields)}


class BTAdapterLlavaConfig(VideoFields, LlavaConfig):
    """The configuration of LLaVA-1.5 (or a converted LLaVA v1) with a branch."""

    model_type = "bt_adapter_llava"


class BTAdapterLlavaNextConfig(VideoFields, LlavaNextConfig):
    """The configuration of LLaVA-NeXT with a branch."""

    model_type = "bt_adapter_llava_next"


class BTAdapterVipLlavaConfig(VideoFields, VipLlavaConfig):
    """The configuration of ViP-LLaVA with a branch."""

    model_type = "bt_adapter_vipllava"


class BTAdapterBlip2Config(VideoFields, Blip2Config):
    """The configuration of BLIP-2 with a branch."""

    model_type = "bt_adapter_blip_2"


class BTAdapterInstructBlipConfig(VideoFields, InstructBlipConfig):
    """The configuration of InstructBLIP with a branch."""

    model_type = "bt_adapter_instructblip"
