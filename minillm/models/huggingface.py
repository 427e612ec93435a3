"""Exchange with Hugging Face: GPT-2, Llama, Mistral and Mixtral models and folders, in and out.

``load`` and ``save`` read and write the files themselves (config.json and safetensors); ``from_transformers`` reads the
object it is given; only ``to_transformers`` imports the library.
"""

import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minillm.models.config import TransformerConfig
from minillm.models.huggingface_gpt2 import GPT2
from minillm.models.huggingface_layout import Layout
from minillm.models.huggingface_llama import LLAMA
from minillm.models.huggingface_mistral import MISTRAL
from minillm.models.huggingface_mixtral import MIXTRAL
from minillm.models.transformer import Transformer

_LAYOUTS = {"gpt2": GPT2, "llama": LLAMA, "mistral": MISTRAL, "mixtral": MIXTRAL}


def from_transformers(model: Any) -> Transformer:
    """A :class:`Transformer` that computes what ``model`` computes, with copies of its weights.

    Args:
        model: ``GPT2LMHeadModel``, ``LlamaForCausalLM``, ``MistralForCausalLM``, ``MixtralForCausalLM`` (or, if tied,
            the model without head).

    Mixtral's router_aux_loss_coef becomes the balance_loss as it stands; there it multiplies one loss over all layers
    together, which is k times ours, and here one in each layer.

    Returns it on the same device, in the same dtype and mode. Raises ValueError for what :class:`Transformer` has not:
    another model_type, activation, scaled attention, attention biases, unequal dropouts and the like, each by name.
    """
    fields = model.config.to_dict()
    layout = _layout_named(fields.get("model_type"))
    tensors = layout.from_memory(model.state_dict())
    result = _build(layout, layout.read_config(fields), tensors.keys(), tensors.__getitem__, None, None)
    return result.train(model.training)


def to_transformers(model: Transformer) -> Any:
    """The GPT-2, Llama (for RoPE), Mistral (and a window) or Mixtral (experts) that computes what ``model`` does.

    It has copies of the weights. Raises ImportError if ``transformers`` is not installed, and ValueError if that layout
    cannot hold the config.
    """
    layout = _layout_of(model.config)
    fields = layout.write_config(model.config)
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "to_transformers needs the transformers package (pip install transformers); "
            "huggingface.save writes a folder that it can load without it"
        ) from error
    weight = model.token_embedding.weight
    # Left out, they would default to ids that this vocabulary may not have.
    no_tokens: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = transformers.AutoConfig.for_model(**fields, **no_tokens)
    result = getattr(transformers, layout.architecture)(config).to(device=weight.device, dtype=weight.dtype)
    tensors = dict(layout.to_memory(_foreign_tensors(layout, model)))
    if model.config.tied_embeddings:  # the same parameter under another name
        tensors["lm_head.weight"] = weight.detach()
    result.load_state_dict(tensors)
    return result.train(model.training)


def load(folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: str = "cpu") -> Transformer:
    """Read a model folder in Hugging Face's layout: config.json and model.safetensors, or its shards and their index.

    Args:
        folder: as written by :func:`save`, by transformers' ``save_pretrained``, or as downloaded.
        dtype: of the parameters; None is that of the file's embedding.
        device: where to put them.

    Returns the model in evaluation mode. One tensor at a time is read beside the model itself. Raises FileNotFoundError
    for missing files and ValueError for what the files hold that :class:`Transformer` cannot, by name.
    """
    folder = Path(folder)
    fields = _read_json(folder / "config.json")
    layout = _layout_named(fields.get("model_type"))
    try:
        config = layout.read_config(fields)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} is no config of {layout.architecture}: {error!r}") from None
    owner = _weight_files(folder)
    files = {file: _open(folder / file) for file in set(owner.values())}
    for name, file in owner.items():
        if name not in files[file].keys():  # noqa: SIM118 (not a dict)
            raise ValueError(f"{folder / file} does not hold {name}, though the index says so")
    return _build(layout, config, owner.keys(), lambda name: files[owner[name]].get_tensor(name), dtype, device).eval()


def save(
    model: Transformer,
    folder: str | os.PathLike[str],
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> Path:
    """Write ``model`` as a folder that :func:`load` and transformers' ``from_pretrained`` read; returns the folder.

    Args:
        folder: made if needed. Both files are written beside their places, flushed to disk and then renamed, so that no
            reader and no crash meets a half-written one.
        bos_token_id, eos_token_id: noted in config.json, where transformers' ``generate`` looks for its stop token.
    """
    layout = _layout_of(model.config)
    dtype = str(model.token_embedding.weight.dtype).removeprefix("torch.")
    fields = {
        "architectures": [layout.architecture],
        **layout.write_config(model.config),
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "dtype": dtype,
    }
    tensors = {name: tensor.contiguous().cpu() for name, tensor in _foreign_tensors(layout, model).items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights, config = folder / "model.safetensors", folder / "config.json"
    unfinished = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in (weights, config)}
    try:
        save_file(tensors, unfinished[weights], metadata={"format": "pt"})
        unfinished[config].write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        for path, temporary in unfinished.items():
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        for temporary in unfinished.values():
            temporary.unlink(missing_ok=True)
    return folder


def _layout_of(config: TransformerConfig) -> Layout:
    """The layout that could hold this config; the details are checked by its ``write_config``."""
    if config.moe is not None:
        return MIXTRAL
    if config.positions == "rope":
        return LLAMA if config.window is None else MISTRAL
    return GPT2


def _layout_named(model_type: object) -> Layout:
    if not isinstance(model_type, str) or model_type not in _LAYOUTS:
        raise ValueError(f"model_type must be one of {', '.join(_LAYOUTS)}, got {model_type!r}")
    return _LAYOUTS[model_type]


def _build(
    layout: Layout,
    config: TransformerConfig,
    names: Collection[str],
    get: Callable[[str], Tensor],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Transformer:
    """Make the model and fill it from the foreign tensors ``names``, which ``get`` fetches one at a time."""
    # Said before anything of that size is made.
    for what, number in (("layers", config.n_layers), ("experts", 0 if config.moe is None else config.moe.n_experts)):
        if number > len(names):
            raise ValueError(f"the config has {number} {what}, but the weights are only {len(names)} tensors")
    foreign = {name.removeprefix(layout.prefix): name for name in names}
    sources = layout.sources(config)
    expected = {name for source in sources.values() for name in source.names}
    allowed = {"lm_head.weight"} if config.tied_embeddings else set()
    missing = sorted(expected - set(foreign))
    extra = sorted(name for name in set(foreign) - expected - allowed if not layout.ignored.fullmatch(name))
    if missing or extra:
        raise ValueError(
            f"the weights are not those of a {layout.architecture} with this config: "
            f"missing {_some(missing)}; not known {_some(extra)}"
        )
    embedding = get(foreign[sources["token_embedding.weight"].names[0]])
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype or embedding.dtype).to_empty(device=device or embedding.device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            source = sources[name]
            for theirs, part in source.parts(parameter):
                tensor = get(foreign[theirs])
                tensor = tensor.t() if source.transposed and tensor.dim() == 2 else tensor
                if tensor.shape != part.shape:
                    raise ValueError(
                        f"{foreign[theirs]} must have the shape {_shape(part, source.transposed)} by the config, "
                        f"got {_shape(tensor, source.transposed)}"
                    )
                part.copy_(tensor)
    return model


def _foreign_tensors(layout: Layout, model: Transformer) -> dict[str, Tensor]:
    """The model's weights under the layout's names: views where that is possible."""
    tensors = {}
    sources = layout.sources(model.config)
    for name, parameter in model.named_parameters():
        source = sources[name]
        for theirs, part in source.parts(parameter.detach()):
            full = theirs if theirs == "lm_head.weight" else layout.prefix + theirs
            tensors[full] = part.t() if source.transposed else part
    return tensors


def _weight_files(folder: Path) -> dict[str, str]:
    """For each tensor's name the file in ``folder`` that holds it."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return dict.fromkeys(_open(single).keys(), single.name)
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder} holds neither model.safetensors nor model.safetensors.index.json; other formats are not read "
            "(a pickled pytorch_model.bin can run any code)"
        )
    owner = _read_json(index).get("weight_map")
    if not isinstance(owner, dict) or not owner:
        raise ValueError(f"{index} has no weight_map")
    for file in set(owner.values()):
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{index} must name files of its own folder, got {file!r}")
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file} is missing, though {index.name} names it")
    return owner


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is no intact safetensors file: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: not a model folder in Hugging Face's layout")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(fields).__name__}")
    return fields


def _shape(tensor: Tensor, transposed: bool) -> tuple[int, ...]:
    return tuple(tensor.t().shape if transposed and tensor.dim() == 2 else tensor.shape)


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
