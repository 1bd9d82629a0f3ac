"""Length proxies on disk: weights in Orbax's format, settings as JSON beside them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chameleon_jax.checkpoints import orbax
from chameleon_jax.models.length_proxy import LengthProxy, LengthProxyConfig, abstract_model

_SETTINGS = "length_proxy.json"


def save(proxy: LengthProxy, directory: str | Path) -> None:
    """Write a directory that `load` reads; an earlier proxy in it is replaced."""
    directory = Path(directory).absolute()
    orbax.write_tensors(directory, {name: np.asarray(tensor) for name, tensor in _flat(proxy.params).items()})
    settings = {"class_lens": proxy.class_lens.tolist(), "confusion": proxy.confusion.tolist()}
    (directory / _SETTINGS).write_text(json.dumps({"config": dataclasses.asdict(proxy.config), **settings}, indent=2))


def load(directory: str | Path) -> LengthProxy:
    """Read a directory that `save` wrote; raise ValueError where it is none or its parts do not fit together."""
    directory = Path(directory).absolute()
    file = directory / _SETTINGS
    if not file.is_file() or not orbax.is_checkpoint(directory):
        raise ValueError(f"{directory} has no {_SETTINGS} or no {orbax.WEIGHTS}: not a length proxy")
    try:
        settings = json.loads(file.read_text())
        config = LengthProxyConfig(**settings["config"])
        class_lens, confusion = np.array(settings["class_lens"], int), np.array(settings["confusion"], int)
    except (ValueError, TypeError, KeyError) as error:  # no JSON or a bad value; an unknown field; a missing one
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not class_lens.shape == confusion.shape[:1] == confusion.shape[1:] == (config.num_classes,):
        raise ValueError(f"{file}: class_lens or confusion is not of the {config.num_classes} classes that the config says")
    tensors = orbax.read_tensors(directory)
    _, params = nnx.split(abstract_model(config))
    wanted = _flat(params)
    for name, tensor in wanted.items():
        if name not in tensors:
            raise ValueError(f"{directory / orbax.WEIGHTS} has no tensor {name}")
        if tensors[name].shape != tensor.shape:
            raise ValueError(f"tensor {name} is {list(tensors[name].shape)}; the config says {list(tensor.shape)}")
    pure = nnx.to_pure_dict(params)
    nnx.replace_by_pure_dict(params, jax.tree.unflatten(jax.tree.structure(pure), [jnp.asarray(tensors[n]) for n in wanted]))
    return LengthProxy(config, params, class_lens, confusion)


def _flat(params: Any) -> dict[str, Any]:
    """Collect tensors by path, such as `blocks.0.qkv.kernel`."""
    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(params))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
