"""Models that turn pictures or texts into rows: one class a library, found by the word before the colon.

Nothing is fetched from the network unless a model's name is one of the hub's, and no code comes with a model.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .config import StreamConfig

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Encoder", "FunctionEncoder", "ModelEncoder", "Words", "encoder_of", "name_on_hub", "patch_size", "pool"]

BLOCKS = (nn.ModuleList, nn.Sequential)
PREPROCESSING = "EXIF orientation applied, transparent parts on white, RGB"


class Encoder(ABC):
    """A model that looks at pictures, or reads texts."""

    def __init__(self) -> None:
        self.about: dict[str, Any] = {}
        """What the manifest says of it."""
        self.pooled = ""
        """How its tokens became a row, as the first batch showed."""

    def prepare(self, picture: Image) -> Any:
        """A picture as `encode` takes it; called from several threads."""
        return picture

    @abstractmethod
    def encode(self, batch: Sequence[Any]) -> Tensor:
        """Rows of prepared pictures, or of texts, float [n, D], or [n, T, D]."""


class Words(NamedTuple):
    """A text's words, and of every token the number of its word, or -1: a mark of the model's, or padding."""

    words: list[str]
    of_tokens: list[int]


class FunctionEncoder(Encoder):
    """A function of one's own, from a batch of PIL pictures, or of strings, to [n, D] or [n, T, D]."""

    def __init__(self, function: Callable[[Sequence[Any]], Any], name: str) -> None:
        super().__init__()
        self._function, self._name = function, name
        with_source = inspect.isfunction(function) and inspect.getsourcefile(function)
        if with_source:
            self.about["module_sha256"] = hashlib.sha256(Path(with_source).read_bytes()).hexdigest()

    @classmethod
    def of(cls, name: str, folder: Path) -> FunctionEncoder:
        """``module:function``; the module may lie in the folder."""
        module, _, attribute = name.partition(":")
        with _importable(folder):
            try:
                found = getattr(import_module(module), attribute)
            except ModuleNotFoundError as error:
                if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                    raise
                families = ", ".join(f"{family}:" for family in _FAMILIES)
                raise ValueError(
                    f"model must begin with {families} or name a function that can be imported, got {name!r}: {error}"
                ) from error
            except AttributeError as error:
                raise ValueError(f"model must name a function of its module, got {name!r}: {error}") from error
        if not callable(found):
            raise ValueError(f"model must name a function, got {name!r}, a {type(found).__name__}")
        return cls(found, name)

    @torch.inference_mode()
    def encode(self, batch: Sequence[Any]) -> Tensor:
        given = self._function(batch)
        try:
            rows = torch.as_tensor(given).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{self._name} must give a tensor or an array, got {type(given).__name__}: {error}"
            ) from None
        if rows.ndim not in (2, 3) or len(rows) != len(batch) or not rows.is_floating_point():
            raise ValueError(
                f"{self._name} must give floats [{len(batch)}, D] or [{len(batch)}, T, D], "
                f"got {str(rows.dtype).removeprefix('torch.')} {list(rows.shape)}"
            )
        return rows


class ModelEncoder(Encoder):
    """A torch module; bfloat16 inside on a GPU."""

    def __init__(self, model: nn.Module, stream: StreamConfig, device: torch.device, *packages: str) -> None:
        super().__init__()
        self.model: Any = model.eval().requires_grad_(False).to(device)
        self.stream, self.device = stream, device
        self.about = {
            "weights_sha256": _fingerprint(model),
            "computed_in": "bfloat16" if device.type == "cuda" else "float32",
            "versions": {package: _version(package) for package in packages},
        }

    def precision(self) -> AbstractContextManager[Any]:
        """That of what the model computes."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    _transform: Callable[[Image], Any]
    """A picture as the library prepares it."""

    def prepare(self, picture: Image) -> Any:
        return self._transform(picture)

    @torch.inference_mode()
    def encode(self, batch: Sequence[Any]) -> Tensor:
        with self.precision():
            return self._rows(batch).float().cpu()

    def _rows(self, batch: Sequence[Any]) -> Tensor:
        return self.run(self.inputs(batch))

    def inputs(self, batch: Sequence[Any]) -> Any:
        """A batch as `run` takes it: pictures [n, 3, H, W], or what a tokenizer makes of texts."""
        if self.stream.modality == "text":
            return self._tokens(batch)
        if len({picture.shape for picture in batch}) > 1:
            raise ValueError(f"{self.stream.model} must prepare all pictures in one size, got several")
        return torch.stack(list(batch)).to(self.device)

    def _tokens(self, texts: Sequence[str]) -> Any:
        raise NotImplementedError

    @abstractmethod
    def run(self, inputs: Any) -> Tensor:
        """Rows, through which gradients flow."""

    def words(self, texts: Sequence[str]) -> list[Words]:
        """Of each text its words, and to which each token belongs."""
        if self.stream.modality == "image":
            raise ValueError(f"{self.stream.model} must read texts to have words, got a model of pictures")
        return self._words(texts)

    def _words(self, texts: Sequence[str]) -> list[Words]:
        raise NotImplementedError

    def _pooled(self, features: Tensor, pictures: Tensor, tower: nn.Module, channels_last: bool = False) -> Tensor:
        """What is asked for, of a tower's features of pictures: tokens [n, T, D], or maps [n, D, H, W]."""
        prefix = 0
        if features.ndim == 4:
            features = features.flatten(1, 2) if channels_last else features.flatten(2).mT
        else:
            size, (height, width) = patch_size(tower), pictures.shape[-2:]
            patches = 0 if size is None else (height // size[0]) * (width // size[1])
            prefix = max(0, features.shape[1] - patches)
        pooling = self.stream.pooling
        if pooling == "model":
            pooling = "cls" if prefix else "mean"
        self.pooled = pooling
        return pool(features, pooling, prefix)

    def _captured(self, tower: nn.Module, run: Callable[[], Any], layer: int) -> Any:
        """What `run` gives for layer 0, otherwise the output of that block while it runs."""
        if not layer:
            return run()
        blocks = blocks_of(tower)
        if not 1 <= abs(layer) <= len(blocks):
            raise ValueError(f"layer must be 1 to {len(blocks)}, or -1 back, of {self.stream.model}, got {layer}")
        caught: list[Tensor] = []
        block = blocks[layer - 1 if layer > 0 else layer]
        hook = block.register_forward_hook(lambda _m, _i, out: caught.append(out[0] if isinstance(out, tuple) else out))
        try:
            run()
        finally:
            hook.remove()
        return caught[-1]


class HuggingFaceEncoder(ModelEncoder):
    """transformers, from a folder or a name on the hub: AutoModel with its image processor or tokenizer."""

    def __init__(self, name: str, stream: StreamConfig, folder: Path, device: torch.device) -> None:
        transformers = _library("transformers")
        where, hub = _place(name, folder)
        source = {"pretrained_model_name_or_path": where, "local_files_only": not hub}
        source |= {"revision": stream.revision} if stream.revision else {}
        model = transformers.AutoModel.from_pretrained(**source, trust_remote_code=False, dtype=torch.float32)
        super().__init__(model, stream, device, "transformers", "tokenizers")
        self.about["revision"] = getattr(model.config, "_commit_hash", None) or stream.revision or None
        if stream.modality == "image":
            processor = transformers.AutoImageProcessor.from_pretrained(**source)
            self._transform = lambda picture: processor(images=picture, return_tensors="pt")["pixel_values"][0]
            self.about["preprocessing"] = {"first": PREPROCESSING, **_plain(processor.to_dict())}
            return
        self._tokenizer = tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        config = getattr(model.config, "text_config", model.config)
        longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or 512)
        # a text tower that is given no mask, as SigLIP's, was trained on texts padded to full length
        masked = "attention_mask" in tokenizer.model_input_names and "siglip" not in model.config.model_type
        self._options = {"padding": True if masked else "max_length", "truncation": True, "max_length": longest}
        self._tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self.about["preprocessing"] = {"tokenizer": type(tokenizer).__name__, **self._options}

    def _tokens(self, texts: Sequence[str]) -> Any:
        return dict(self._tokenizer(list(texts), return_tensors="pt", **self._options).to(self.device))

    def _words(self, texts: Sequence[str]) -> list[Words]:
        return _words_by(self._tokenizer, texts, **self._options)

    def run(self, inputs: Any) -> Tensor:
        stream, sees = self.stream, self.stream.modality == "image"
        given: Mapping[str, Tensor] = {"pixel_values": inputs} if sees else inputs
        embedding = f"get_{stream.modality}_features"
        if stream.pooling == "model" and not stream.layer and hasattr(self.model, embedding):
            self.pooled = embedding
            return _tensor(getattr(self.model, embedding)(**given))
        tower: Any = getattr(self.model, "vision_model" if sees else "text_model", self.model)
        found = self._captured(tower, lambda: tower(**given).last_hidden_state, stream.layer)
        if sees:
            return self._pooled(found, inputs, tower)
        self.pooled = pooling = "mean" if stream.pooling == "model" else stream.pooling
        return pool(found, pooling, 0, given.get("attention_mask"))


class TimmEncoder(ModelEncoder):
    """timm, with published weights or those of a file."""

    def __init__(self, name: str, stream: StreamConfig, folder: Path, device: torch.device) -> None:
        if stream.modality == "text":
            raise ValueError(f"modality must be image with {stream.model}, got text")
        timm = _library("timm")
        weights = _weights(stream, folder)
        model = timm.create_model(name, pretrained=not weights, checkpoint_path=weights, num_classes=0)
        super().__init__(model, stream, device, "timm")
        options = timm.data.resolve_model_data_config(model)
        self._transform = timm.data.create_transform(**options, is_training=False)
        self.about["revision"] = model.pretrained_cfg.get("hf_hub_id") if not weights else None
        self.about["preprocessing"] = {"first": PREPROCESSING, **_plain(options)}

    def run(self, x: Any) -> Tensor:
        model = self.model
        features = self._captured(model, lambda: model.forward_features(x), self.stream.layer)
        if self.stream.pooling == "model" and not self.stream.layer:
            self.pooled = "forward_head"
            found: Tensor = model.forward_head(features, pre_logits=True)
            return found
        return self._pooled(features, x, model, getattr(model, "output_fmt", "") == "NHWC")


class OpenClipEncoder(ModelEncoder):
    """open_clip, with published weights or those of a file."""

    def __init__(self, name: str, stream: StreamConfig, folder: Path, device: torch.device) -> None:
        open_clip = _library("open_clip")
        architecture, _, tag = name.partition("/")
        weights = _weights(stream, folder)
        if not weights and not tag:
            raise ValueError(f"model must be open_clip:ARCHITECTURE/WEIGHTS, or weights a file, got open_clip:{name}")
        model, _, self._transform = open_clip.create_model_and_transforms(architecture, pretrained=weights or tag)
        super().__init__(model, stream, device, "open_clip_torch")
        if stream.modality == "image":
            self.about["preprocessing"] = {"first": PREPROCESSING, **_plain(model.visual.preprocess_cfg)}
        elif stream.pooling != "model" or stream.layer:
            raise ValueError(f"pooling must be model, and layer 0, of the texts of open_clip, got {stream.pooling!r}")
        else:
            self._tokenizer = open_clip.get_tokenizer(architecture)

    def _tokens(self, texts: Sequence[str]) -> Any:
        return self._tokenizer(list(texts)).to(self.device)

    def _words(self, texts: Sequence[str]) -> list[Words]:
        tokenizer = self._tokenizer
        if (inner := getattr(tokenizer, "tokenizer", None)) is not None:  # one of transformers'
            length = {"padding": "max_length", "truncation": True, "max_length": tokenizer.context_length}
            return _words_by(inner, [tokenizer.clean_fn(text) for text in texts], **length)
        return [_words_by_ends(tokenizer, row) for row in tokenizer(list(texts)).tolist()]

    def run(self, x: Any) -> Tensor:
        model = self.model
        if self.stream.modality == "text":
            self.pooled = "encode_text"
            return _tensor(model.encode_text(x))
        if self.stream.pooling == "model" and not self.stream.layer:
            self.pooled = "encode_image"
            return _tensor(model.encode_image(x))
        visual: Any = model.visual
        if (trunk := getattr(visual, "trunk", None)) is not None:  # one of timm's
            features = self._captured(trunk, lambda: trunk.forward_features(x), self.stream.layer)
            return self._pooled(features, x, trunk, getattr(trunk, "output_fmt", "") == "NHWC")
        features = self._captured(visual, lambda: visual(x), self.stream.layer or -1)
        if not visual.transformer.batch_first:
            features = features.transpose(0, 1)
        return self._pooled(features if self.stream.layer else visual.ln_post(features), x, visual)


class SentenceEncoder(ModelEncoder):
    """sentence-transformers, from a folder or a name on the hub."""

    def __init__(self, name: str, stream: StreamConfig, folder: Path, device: torch.device) -> None:
        if stream.modality != "text" or stream.pooling != "model" or stream.layer:
            raise ValueError(
                f"modality must be text, pooling model and layer 0 with sentence-transformers, "
                f"got {stream.modality}, {stream.pooling} and {stream.layer}"
            )
        library = _library("sentence_transformers")
        where, hub = _place(name, folder)
        model = library.SentenceTransformer(
            where,
            device=str(device),
            trust_remote_code=False,
            local_files_only=not hub,
            revision=stream.revision or None,
        )
        super().__init__(model, stream, device, "sentence-transformers", "transformers", "tokenizers")
        self.about["revision"] = stream.revision or None

    def _rows(self, batch: Sequence[str]) -> Tensor:
        found: Tensor = self.model.encode(
            list(batch), batch_size=len(batch), convert_to_tensor=True, show_progress_bar=False
        )
        return found

    def _tokens(self, texts: Sequence[str]) -> Any:
        if self.model.default_prompt_name:
            raise ValueError(f"{self.stream.model} must read texts without a prompt to be looked into, got one")
        given = self.model.tokenize(list(texts))
        return {name: x.to(self.device) if isinstance(x, Tensor) else x for name, x in given.items()}

    def run(self, inputs: Any) -> Tensor:
        found: Tensor = self.model(dict(inputs))["sentence_embedding"]
        return found

    def _words(self, texts: Sequence[str]) -> list[Words]:
        length = {"padding": True, "truncation": True, "max_length": self.model.max_seq_length}
        return _words_by(self.model.tokenizer, [text.strip() for text in texts], **length)


_FAMILIES: Mapping[str, Callable[[str, StreamConfig, Path, torch.device], Encoder]] = {
    "timm": TimmEncoder,
    "hf": HuggingFaceEncoder,
    "open_clip": OpenClipEncoder,
    "sentence-transformers": SentenceEncoder,
}


def encoder_of(stream: StreamConfig, folder: Path, device: torch.device) -> Encoder:
    """The model of a stream; relative paths and modules of one's own are those of `folder`.

    Raises:
        ValueError: the name, or what is asked of the model, is not one it has.
        ImportError: its library is missing.
    """
    family, _, name = stream.model.partition(":")
    if family in _FAMILIES:
        try:
            return _FAMILIES[family](name, stream, folder, device)
        except (RuntimeError, AssertionError, EOFError) as error:  # unknown names, weights of another model, or none
            raise ValueError(f"model must be one that {family} can make, got {stream.model}: {error}") from error
    if stream.layer or stream.pooling != "model" or stream.revision or stream.weights:
        raise ValueError(
            f"layer, pooling, revision and weights must be left to the function, with model={stream.model!r}"
        )
    return FunctionEncoder.of(stream.model, folder)


def is_of_library(stream: StreamConfig) -> bool:
    """Whether its model is one of a library's, and not a function."""
    return stream.model.partition(":")[0] in _FAMILIES


def name_on_hub(stream: StreamConfig, folder: Path) -> str:
    """The name by which a library fetches a stream's model from a hub, unless it is cached; "" where it does not."""
    family, _, name = stream.model.partition(":")
    if family in ("hf", "sentence-transformers"):
        return name if _place(name, folder)[1] else ""
    return name if family in _FAMILIES and not stream.weights else ""


def pool(tokens: Tensor, pooling: str, prefix: int, mask: Tensor | None = None) -> Tensor:
    """[n, D] of tokens [n, T, D], of which the first `prefix` are no patches; [n, T - prefix, D] of "tokens".

    `mask`, [n, T]: which are there; padding counts nowhere.
    """
    if pooling == "cls":
        return tokens[:, 0]
    if pooling == "tokens":
        return tokens[:, prefix:]
    if pooling == "mean" and mask is None:
        return tokens[:, prefix:].mean(1)
    mask = torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device) if mask is None else mask
    if pooling == "mean":
        return (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    last = tokens.shape[1] - 1 - mask.flip(1).argmax(1)
    return tokens[torch.arange(len(tokens), device=tokens.device), last]


def blocks_of(tower: nn.Module) -> Sequence[nn.Module]:
    """The longest run of modules of one class in it: what comes one after the other in any transformer."""
    runs = [list(m) for m in tower.modules() if isinstance(m, BLOCKS) and len(m) > 0 and len({type(b) for b in m}) == 1]
    if not runs:
        raise ValueError("layer must be 0 for a model without blocks")
    return max(runs, key=len)


def patch_size(tower: nn.Module) -> tuple[int, int] | None:
    """Height and width of patches: the first convolution that steps by its own size cuts the picture up."""
    for m in tower.modules():
        if isinstance(m, nn.Conv2d) and m.stride == m.kernel_size and m.stride[0] > 1:
            return int(m.stride[0]), int(m.stride[1])
    return None


def _words_by(tokenizer: Any, texts: Sequence[str], **options: Any) -> list[Words]:
    """As a tokenizer of transformers splits texts before it looks for tokens."""
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer must be one that says where its tokens are, got {type(tokenizer).__name__}")
    encoded = tokenizer(list(texts), **options)
    found = []
    for n, text in enumerate(texts):
        ends: dict[int, tuple[int, int]] = {}
        numbers = encoded.word_ids(n)
        for word, (start, stop) in zip(numbers, encoded.encodings[n].offsets, strict=True):
            if word is not None:
                first, last = ends.get(word, (start, stop))
                ends[word] = min(first, start), max(last, stop)
        places = {word: place for place, word in enumerate(ends)}
        words = [text[start:stop].strip() for start, stop in ends.values()]
        found.append(Words(words, [-1 if word is None else places[word] for word in numbers]))
    return found


def _words_by_ends(tokenizer: Any, row: Sequence[int]) -> Words:
    """By the marks that CLIP's own tokens have at the end of a word."""
    words: list[str] = []
    of_tokens = [-1] * len(row)
    marks, is_open = set(tokenizer.all_special_ids), False
    for place, token in enumerate(row):
        if token in marks:
            if place:  # the end; padding follows
                break
            continue
        piece = tokenizer.decoder[token]
        if is_open:
            words[-1] += piece
        else:
            words.append(piece)
        of_tokens[place] = len(words) - 1
        is_open = not piece.endswith("</w>")
    as_text = [
        bytearray(tokenizer.byte_decoder[c] for c in w.replace("</w>", "")).decode("utf-8", "replace") for w in words
    ]
    return Words(as_text, of_tokens)


def _tensor(found: Any) -> Tensor:
    """Libraries give a tensor, or something that holds it."""
    pooled: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return pooled


def _fingerprint(model: nn.Module) -> str:
    """Of all weights: the same model wherever it came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _place(name: str, folder: Path) -> tuple[str, bool]:
    """(a folder or a name on the hub, whether it is the latter)."""
    for path in (folder / name, Path(name)):
        if path.is_dir():
            return str(path.resolve()), False
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"model must be a folder or a name on the hub, but there is no folder {name}")
    return name, True


def _weights(stream: StreamConfig, folder: Path) -> str:
    path = folder / stream.weights
    if stream.weights and not path.is_file():
        raise FileNotFoundError(f"weights must be a file, but there is none at {path}")
    return str(path) if stream.weights else ""


def _library(module: str) -> Any:
    _torchvision()
    try:
        return import_module(module)
    except ImportError as error:
        package = {"open_clip": "open_clip_torch"}.get(module, module.replace("_", "-"))
        raise ImportError(
            f"the model needs {package}: pip install {package}, or 'sparc_fast[models]' ({error})"
        ) from error


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that JSON can hold, others as text."""
    return {
        key: value if isinstance(value, str | int | float | bool | None) else
        list(value) if isinstance(value, list | tuple) else dict(value) if isinstance(value, Mapping) else str(value)
        for key, value in settings.items()
    }  # fmt: skip


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


_named: list[Any] = []


def _torchvision() -> None:
    """Let torchvision be imported beside a torch that it was not compiled for.

    Libraries of models take from it what is written in Python, but its import also names operators of its compiled
    half, which is built for CUDA where it comes from PyPI; beside a CPU torch these are not there until they are named.
    """
    try:
        import_module("torchvision")
    except RuntimeError as error:
        if _named or "torchvision::nms" not in str(error):
            raise
        for module in [module for module in sys.modules if module.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
        library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _named.append(library)
    except ImportError:  # transformers does without
        return
