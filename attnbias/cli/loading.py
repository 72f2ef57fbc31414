"""Models, tokenizers and texts for the commands: local folders and hub names, one-line errors."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

from attnbias.errors import AttnbiasError, Refused

DTYPES = ("auto", "float32", "float64", "bfloat16", "float16")


def add_loading(parser: argparse.ArgumentParser) -> None:
    """How a model is loaded: the same options for every command that loads one."""
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: as stored")
    parser.add_argument("--revision", help="commit, branch or tag of a hub model")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the model brings (off)"
    )


def text_of(path: str, option: str = "--text") -> str:
    """A file (or "-" for standard input) as text in UTF-8.

    Raises:
        AttnbiasError: missing, a folder, not UTF-8, or without a word.
    """
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise AttnbiasError(f"{option} {path!r} cannot be read: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AttnbiasError(
            f"{option} {path!r} is not UTF-8 text (byte {error.start}); convert it first"
        ) from error
    if not text.strip():
        raise AttnbiasError(f"{option} {path!r} holds no word; give a file with some text")
    return text


def device_of(name: str) -> Any:
    """A torch device that can be used here."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).partition("\n")[0]
        raise AttnbiasError(f"--device {name!r} cannot be used here: {first}") from error
    return device


def load(
    name: str,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> tuple[Any, Any, str]:
    """A text encoder or decoder in evaluation mode, its tokenizer, and what identifies its weights.

    Decoders are loaded with their language-model head (AutoModelForCausalLM), encoders without
    (AutoModel). Weights come from safetensors, or from PyTorch files read as weights only, which
    cannot run code. The third result is the commit of a hub model or the SHA-256 of a local file.

    Raises:
        AttnbiasError: nothing of that name. Refused: a model that does not read plain text.
    """
    import torch

    where = device_of(device)
    quiet()
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    given = _place(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    try:
        config = AutoConfig.from_pretrained(given, **options)
        decoder = _check_kind(name, config)
        tokenizer = AutoTokenizer.from_pretrained(given, **options)
        kind = AutoModelForCausalLM if decoder else AutoModel
        wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
        model = kind.from_pretrained(
            given, config=config, dtype=wanted, weights_only=True, **options
        )
    except AttnbiasError:
        raise
    except Exception as error:
        raise AttnbiasError(f"{name!r} could not be loaded: {_sentence(error)}") from error
    return model.to(where).eval(), tokenizer, _identity(given, config)


def load_for(
    kind: str,
    name: str,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> tuple[Any, Any, str]:
    """As `load`, for a kind of input.

    Args:
        kind: "text", "image-text" (a model that writes about images, with its processor) or
            "vision" (an image model, with its class head where it has one, and image processor), or
            "dual" (an encoder of images beside one of text, such as CLIP, with its processor).

    Raises:
        AttnbiasError: nothing of that name. Refused: a model that does not take that input.
    """
    if kind == "text":
        return load(
            name, device=device, dtype=dtype, trust_remote_code=trust_remote_code, revision=revision
        )
    import torch

    where = device_of(device)
    quiet()
    import transformers

    given = _place(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    try:
        config = transformers.AutoConfig.from_pretrained(given, **options)
        loader, reader = _seeing(name, config, kind)
        processor = getattr(transformers, reader).from_pretrained(given, **options)
        wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
        model = getattr(transformers, loader).from_pretrained(
            given, config=config, dtype=wanted, weights_only=True, **options
        )
    except AttnbiasError:
        raise
    except Exception as error:
        raise AttnbiasError(f"{name!r} could not be loaded: {_sentence(error)}") from error
    return model.to(where).eval(), processor, _identity(given, config)


def load_writer(name: str, *, images: bool, **options: Any) -> tuple[Any, Any]:
    """A model with what prepares its prompts; one that reads images too, where there are some.

    Args:
        images: whether the prompt holds images. options: as `load` takes them.
    """
    if images:
        return load_for("image-text", name, **options)[:2]
    try:
        return load_for("text", name, **options)[:2]
    except Refused as refused:
        try:
            return load_for("image-text", name, **options)[:2]
        except Refused:
            raise refused from None


def _seeing(name: str, config: Any, kind: str) -> tuple[str, str]:
    """The names of the classes that load the model and what prepares its input."""
    from transformers.models.auto import modeling_auto as auto

    if kind == "image-text":
        if config.model_type in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            return "AutoModelForImageTextToText", "AutoProcessor"
        raise Refused(
            f"{name!r} ({config.model_type}) does not write about images, and this data has images;"
            " give a model such as LLaVA or Qwen2-VL"
        )
    if kind == "dual":
        if hasattr(config, "vision_config") and hasattr(config, "text_config"):
            return "AutoModel", "AutoProcessor"
        raise Refused(f"{name!r} ({config.model_type}) does not encode images beside text")
    if not (hasattr(config, "image_size") or hasattr(config, "patch_size")):
        raise Refused(f"{name!r} ({config.model_type}) takes no images alone; give a vision model")
    names = tuple(getattr(config, "architectures", None) or ())
    head = any(one.endswith("ForImageClassification") for one in names)
    return ("AutoModelForImageClassification" if head else "AutoModel"), "AutoImageProcessor"


def quiet() -> None:
    """No progress bars, warnings or load reports of transformers on the terminal."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _place(name: str) -> str:
    path = Path(name).expanduser()
    local = path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    if not local:
        return name
    if not path.is_dir():
        raise AttnbiasError(
            f"model {name!r}: no such folder; give a folder with config.json or a hub name"
        )
    if not (path / "config.json").is_file():
        raise AttnbiasError(f"model {name!r}: the folder holds no config.json")
    return str(path)


def _check_kind(name: str, config: Any) -> bool:
    """Whether the model is a decoder; refuses what does not read a plain text."""
    from transformers.models.auto import modeling_auto as auto

    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise Refused(
            f"{name!r} is an encoder-decoder ({kind}), and this command reads one text with an "
            "encoder or a decoder; use attnbias.observe in Python for it"
        )
    causal = kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    sees = hasattr(config, "vision_config") or hasattr(config, "image_size")
    if sees or hasattr(config, "audio_config"):
        raise Refused(
            f"{name!r} is not a text model ({kind}), and this command reads text; use "
            "attnbias.observe in Python with its own inputs"
        )
    names = tuple(getattr(config, "architectures", None) or ())
    head = any(one.endswith(("ForCausalLM", "LMHeadModel")) for one in names)
    return causal and (head or not masked)


def _identity(given: str, config: Any) -> str:
    commit = getattr(config, "_commit_hash", None)
    if commit:
        return f"commit {commit}"
    folder = Path(given)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            digest = hashlib.sha256()
            with open(folder / name, "rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
            return f"{name}, SHA-256 {digest.hexdigest()}"
    return ""


def _sentence(error: Exception) -> str:
    """The first sentence of an error of another library, on one line."""
    words = " ".join(str(error).split()) or type(error).__name__
    offline = os.environ.get("HF_HUB_OFFLINE") == "1"
    hint = " (HF_HUB_OFFLINE=1 forbids the hub)" if offline else ""
    return words[:300].split(". ")[0].rstrip(".") + hint
