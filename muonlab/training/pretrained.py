"""A model that others have made: a folder in the hub's layout, a pinned repository of the hub, or a package.

    hub        its files of the pinned revision are brought into the cache, and then it is a folder
    folder     config.json, and model.safetensors or model.safetensors.index.json with its shards
    package    one GGUF file, whose quantised weights are read as float32

so that whatever works with a folder works with the hub. Weights are read from safetensors alone, and no code that
comes with a model is ever run. Weights and configuration must belong together: a parameter that the files do not hold
would be drawn at random in silence, so it is refused.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from muonlab.registry.errors import UsageError
from muonlab.registry.settings import PretrainedSettings, WorkloadSettings
from muonlab.training import gguf_header, hub, packages
from muonlab.training.model_inputs import CONFIG_FILE, INDEX_FILE, SETTING, WEIGHTS_FILE, config_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

REVISION = "model.revision"


class _Source(NamedTuple):
    """Where a model lies. `gguf` is a file of `folder`, or None for safetensors."""

    folder: Path
    gguf: str | None


def empty(settings: PretrainedSettings, workload: WorkloadSettings) -> PreTrainedModel:
    """The model's architecture in float32, its weights drawn from torch's global generator.

    Raises UsageError where there is no such model, or it does not fit the workload.
    """
    source = _find(settings)
    return _fresh(_config(source, settings, workload))


def load(settings: PretrainedSettings, workload: WorkloadSettings) -> PreTrainedModel:
    """The model with its weights, in float32 on the CPU. Raises UsageError as `empty` does."""
    from transformers import AutoModelForCausalLM

    source = _find(settings)
    config = _config(source, settings, workload)
    named: dict[str, Any] = {"gguf_file": source.gguf} if source.gguf else {"config": config, "use_safetensors": True}
    if source.gguf is None and not any((source.folder / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE)):
        raise UsageError(
            f"{SETTING}: {source.folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}, and no other format is read; "
            f"save the model with `save_pretrained`, or set model.start to random."
        )
    with _one_sentence(settings, "its weights cannot be read"), _quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.folder,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **named,
        )
    model: PreTrainedModel
    found: dict[str, Any]
    model, found = loaded
    strange = [f"{len(found[kind])} {what}" for kind, what in _STRANGE.items() if found.get(kind)]
    if strange:
        raise UsageError(
            f"{SETTING}: the weights of {settings.pretrained} are not those of its {CONFIG_FILE} "
            f"({', '.join(strange)}, such as {_first(found)}); save both with `save_pretrained`."
        )
    if source.gguf is None:
        return model
    # A model that transformers has read from GGUF stays marked as quantised.
    fresh = _fresh(config)
    fresh.load_state_dict(model.state_dict())
    return fresh


_STRANGE = {
    "missing_keys": "parameters missing",
    "unexpected_keys": "too many",
    "mismatched_keys": "of another shape",
    "error_msgs": "errors",
}


def _first(found: dict[str, Any]) -> str:
    return str(next(sorted(map(str, found[kind]))[0] for kind in _STRANGE if found.get(kind)))


def _find(settings: PretrainedSettings) -> _Source:
    name = settings.pretrained
    if packages.is_package(name):
        file = packages.gguf_file(SETTING, name, settings.revision)
        return _Source(file.parent, file.name)
    folder = hub.local_folder(name, _root_with(name))
    if folder is None:
        return _Source(_download(settings), None)
    if settings.revision is not None:
        raise UsageError(f"{REVISION}: {name} is a folder, which has no revisions; set it to null.")
    return _Source(folder, None)


def _root_with(name: str) -> Path:
    """The repository that holds the folder `name`: this one or, in DVC's temporary copy, the one it is a copy of."""
    here = Path.cwd()
    roots = [folder for folder in (here, *here.parents) if (folder / "params.yaml").is_file()]
    return next((root for root in roots if (root / name).is_dir()), here)


def _download(settings: PretrainedSettings) -> Path:
    """Bring the files of the pinned revision into the hub's cache, where they are not there yet."""
    name = settings.pretrained
    revision = hub.pinned(REVISION, name, settings.revision)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [CONFIG_FILE] + ([WEIGHTS_FILE, INDEX_FILE, "*.safetensors"] if settings.start == "pretrained" else [])
    offline = hub.go_offline_if_unreachable()
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=offline)
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise hub.missing(
            "the model", f"{name}@{revision}", setting=SETTING, offline=offline, reason=_line(error)
        ) from None
    return Path(folder)


def _config(source: _Source, settings: PretrainedSettings, workload: WorkloadSettings) -> PretrainedConfig:
    """The model's configuration, once it is known to fit. Raises UsageError."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    name = settings.pretrained
    if source.gguf is None:
        config_file(source.folder)
    what = f"its {source.gguf or CONFIG_FILE} describes no model that transformers knows"
    with _one_sentence(settings, what), _quiet():
        config: PretrainedConfig = AutoConfig.from_pretrained(
            source.folder,
            local_files_only=True,
            trust_remote_code=False,
            **({"gguf_file": source.gguf} if source.gguf else {}),
        )
        if source.gguf:
            _refuse_a_larger_model(config, source.folder / source.gguf)
    made_for = config.architectures or []
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or any(not _writes_on(kind) for kind in made_for):
        raise UsageError(
            f"{SETTING}: {name} is a {', '.join(made_for) or config.model_type}; only models that continue a text "
            "(...ForCausalLM) are trained here."
        )
    data = workload.data
    if config.vocab_size != data.vocab_size:
        raise UsageError(
            f"data.vocab_size: found {data.vocab_size}, but {name} has {config.vocab_size}; set it to that, and "
            "data.tokenizer to the model's own tokenizer."
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and data.sequence_length > longest:
        raise UsageError(
            f"data.sequence_length: found {data.sequence_length}, but {name} is made for {longest} tokens at most; "
            "shorten it."
        )
    drops = [key for key, value in config.to_dict().items() if _is_rate_of_dropout(key, value)]
    if drops:
        raise UsageError(
            f"{SETTING}: {name} has {', '.join(drops)} above 0 in its {CONFIG_FILE}; a step here is a function of seed "
            "and step, so set them to 0 in a folder of your own."
        )
    config.use_cache = False
    return config


def _refuse_a_larger_model(config: PretrainedConfig, file: Path) -> None:
    """Raise ValueError where a GGUF file's settings describe a model of more weights than its tensors hold.

    Such a model would take memory that the file's size does not tell.
    """
    held = gguf_header.read(file)
    layers = config.num_hidden_layers
    if layers > held.tensors:
        raise ValueError(f"its settings say {layers:,} layers, and it holds {held.tensors:,} tensors")
    with torch.device("meta"):  # sizes without memory
        described = sum(weight.numel() for weight in _fresh(config).parameters())
    if described > held.elements:
        raise ValueError(f"its settings describe {described:,} weights, and its tensors hold {held.elements:,}")


def _writes_on(architecture: str) -> bool:
    return architecture.endswith(("ForCausalLM", "LMHeadModel"))


def _is_rate_of_dropout(key: str, value: object) -> bool:
    # GPT-2 and its kin say attn_pdrop.
    return (key.endswith(("dropout", "pdrop", "_drop"))) and isinstance(value, float) and value > 0


def _fresh(config: PretrainedConfig) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    drawn: Any = AutoModelForCausalLM
    model: PreTrainedModel = drawn.from_config(config, dtype=torch.float32, trust_remote_code=False)
    return model


_UNFIT = (OSError, ValueError, LookupError, RuntimeError, TypeError, ImportError, ArithmeticError, AttributeError)
"""What transformers raises for files that are not a model, or settings that make none."""


@contextlib.contextmanager
def _one_sentence(settings: PretrainedSettings, what: str) -> Iterator[None]:
    """Turn what transformers raises for files that are not a model into a sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except (*_UNFIT, SafetensorError) as error:
        raise UsageError(
            f"{SETTING}: {settings.pretrained}: {what} ({_line(error)}); supply it in the hub's layout, as "
            "`save_pretrained` writes it."
        ) from None


def _line(error: BaseException) -> str:
    """The first line of an error's text, cut."""
    text = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {text[:200]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bars and advice off the screen."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    with contextlib.redirect_stderr(io.StringIO()):
        yield
