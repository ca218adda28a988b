"""Loading that refuses a checkpoint whose weights are not exactly those that its config describes.

This file is copied into every saved MLLM: it imports nothing that the copy would not have.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from align.common.errors import DamagedError


class StrictModel(PreTrainedModel):
    """A PreTrainedModel whose weights come from a file or from its builder, and are never drawn while loading."""

    def _init_weights(self, module: nn.Module) -> None:
        """Leave every weight as it is: transformers would draw those that it takes for missing."""

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Return the model saved in `folder`, in eval mode; with `output_loading_info=True`, (model, info) as in transformers.

        Raises DamagedError if a weight is missing, unexpected or of another shape.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # all reported in `info`, and refused below
        loaded: Any = super().from_pretrained(folder, *args, **kwargs)
        model, info = loaded
        wrong = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
        if wrong:
            raise DamagedError(f"{folder} does not hold the weights its config describes: {wrong}; restore it or make it again")
        return (model, info) if wants_info else model
