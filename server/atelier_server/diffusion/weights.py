"""A model's weights by the names of its layers, read from its files when they are asked for.

For comparing whole bases: nothing but the tensor asked for is in memory, and no model is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors import safe_open
from torch import Tensor

from atelier_server import pocket
from atelier_server.diffusion.component import tensor_shapes, weights
from atelier_server.diffusion.families import UnsupportedModel
from atelier_server.diffusion.loading import downloaded, downloaded_as_anybody

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
# Of a single file: the first text encoder, which has transformers' own names there.
_ENCODERS = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")


class ModelWeights:
    """The U-Net and the text encoders of a base; of a single file the U-Net and the first text encoder.

    `components`: those that are there.
    """

    def __init__(self, keys: Mapping[str, tuple[Path, str]]) -> None:
        self._keys = keys
        self._open: dict[Path, Any] = {}

    @classmethod
    def of(cls, reference: str, unet_config: Mapping[str, Any], *, public: bool = False) -> ModelWeights:
        """`reference` as `serve --model` takes it. Raises UnsupportedModel or OSError.

        `unet_config`: the U-Net's, by which a single file's layers are named. `public`: only what everybody
        may read, neither this machine's files nor what its token opens.
        """
        if public and reference != "pocket":
            return cls(_of_folder(downloaded_as_anybody(reference)))
        path = pocket.path() if reference == "pocket" else Path(reference)
        if path.suffix == ".safetensors":
            return cls(_of_file(path, unet_config))
        return cls(_of_folder(path if path.is_dir() else downloaded(reference)))

    @cached_property
    def components(self) -> frozenset[str]:
        return frozenset(name.partition(".")[0] for name in self._keys)

    def get(self, name: str) -> Tensor | None:
        """The weight of the layer `name` ("unet.conv_in"), None if there is no such layer."""
        component, _, layer = name.partition(".")
        # transformers 5 has dropped `text_model` from its names, and files from before have it.
        for inner in (layer, f"text_model.{layer}", layer.removeprefix("text_model.")):
            if (found := self._keys.get(f"{component}.{inner}.weight")) is not None:
                path, key = found
                if path not in self._open:
                    self._open[path] = safe_open(path, framework="pt")
                return self._open[path].get_tensor(key)  # type: ignore[no-any-return]
        return None


def _of_folder(folder: Path) -> dict[str, tuple[Path, str]]:
    if not (folder / "unet").is_dir():
        raise UnsupportedModel(f"{folder.name} has no unet/")
    found: dict[str, tuple[Path, str]] = {}
    for component in COMPONENTS:
        if (folder / component).is_dir():
            for path in weights(folder / component)[0]:
                found |= {f"{component}.{key}": (path, key) for key in tensor_shapes(path)}
    return found


def _of_file(path: Path, unet_config: Mapping[str, Any]) -> dict[str, tuple[Path, str]]:
    if not path.is_file():
        raise UnsupportedModel("there is no such file")
    keys = list(tensor_shapes(path))
    # The converter only renames: given each key as its value, it tells the key of each of diffusers' names.
    renamed = convert_ldm_unet_checkpoint({key: key for key in keys}, config=dict(unet_config))
    if not renamed:
        raise UnsupportedModel(f"{path.name} is no checkpoint of a whole model")
    found = {f"unet.{name}": (path, key) for name, key in renamed.items()}
    for prefix in _ENCODERS:
        names = {key: key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
        found |= {f"text_encoder.{name}": (path, key) for key, name in names.items()}
    return found
