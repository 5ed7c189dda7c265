"""A causal language model of the transformers library without weights, which come block by block."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from penjing.backends.torch.decoder.decoder_block import (
    Block,
    Call,
    named_arguments,
    parent_of,
    replace_transposed_linear,
    set_tensor,
    tensor_at,
    transposed_linear_class,
)
from penjing.backends.torch.decoder.shards import Shards
from penjing.backends.torch.hooks import EndOfPass
from penjing.core.errors import Refused
from penjing.core.extras import need


@dataclass(frozen=True)
class Source:
    """The tensor of the files that a tensor of the model comes from.

    Attributes:
        name: in the files.
        turned: whether the files hold its transpose.
    """

    name: str
    turned: bool = False


POSITIONS = 256
"""Of a sequence whose logits are computed at once."""


def _given(hidden: torch.Tensor, index: int, *given: Any, **named: Any) -> torch.Tensor:
    """Be a block that gives what is known already."""
    return hidden


class Decoder:
    """A causal language model whose weights stay in their files until they are asked for.

    Attributes:
        shards: of the checkpoint.
        model: the transformers model; parameters are on the meta device, but for small ones without values.
        path: name of the list of its blocks.
        sources: where each tensor of the state comes from; tied ones come from the same.
    """

    def __init__(self, shards: Shards, model: nn.Module, path: str) -> None:
        self.shards, self.model, self.path = shards, model, path
        self.sources = _sources(model, shards)

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.model.get_submodule(self.path))

    @property
    def vocabulary(self) -> int:
        """Tokens that there are."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def longest(self) -> int | None:
        """Tokens that a sequence may have; None where the configuration does not say."""
        found = getattr(self.model.config, "max_position_embeddings", None)
        return found if isinstance(found, int) and found > 0 else None

    @property
    def width(self) -> int:
        """Length of a hidden state."""
        return int(self.model.config.hidden_size)

    def linear_layers(self) -> list[str]:
        """Return the names of the linear layers in the blocks."""
        kinds = (nn.Linear, transposed_linear_class())
        blocks = self.model.get_submodule(self.path)
        return [f"{self.path}.{name}" for name, x in blocks.named_modules() if isinstance(x, kinds)]

    def tensors_of(self, index: int) -> dict[str, Source]:
        """Return the sources of the tensors of one block, by their names in the model."""
        prefix = f"{self.path}.{index}."
        return {name: source for name, source in self.sources.items() if name.startswith(prefix)}

    def rest(self) -> list[str]:
        """Return the names of all tensors of the files that belong to no block."""
        inside = {s.name for index in range(len(self)) for s in self.tensors_of(index).values()}
        return [name for name in self.shards.stored if name not in inside]

    def block(self, index: int, call: Call) -> Block:
        """Return one block with its weights, in float32; layers are named as in the model."""
        name = f"{self.path}.{index}"
        module = copy.deepcopy(self.model.get_submodule(name))
        replace_transposed_linear(module)
        for tensor, source in self.tensors_of(index).items():
            set_tensor(module, tensor.removeprefix(f"{name}."), self._read(source))
        return Block(name, module.eval(), call)

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Hold the weights outside of the blocks, in float32, for as long as the context lasts."""
        prefix = f"{self.path}."
        names = [name for name in self.sources if not name.startswith(prefix)]
        shared: dict[Source, nn.Parameter] = {}
        before = {name: tensor_at(self.model, name) for name in names}
        try:
            for name in names:
                source = self.sources[name]
                if source not in shared:
                    shared[source] = nn.Parameter(self._read(source), requires_grad=False)
                set_tensor(self.model, name, shared[source])
            yield
        finally:
            for name, tensor in before.items():
                set_tensor(self.model, name, tensor)

    def start(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[Call]]:
        """Return what the first block takes, and what else each block takes, within `outside`.

        Args:
            ids: tokens `[n, length]`; with one sequence, what blocks take fits any number of them.

        Raises:
            Refused: blocks do not follow each other, each once, on one tensor.
        """
        states: list[torch.Tensor] = []
        order: list[int] = []
        calls: list[Call] = []
        blocks = self.model.get_submodule(self.path)

        def record(index: int, *given: Any, **named: Any) -> torch.Tensor:
            hidden: torch.Tensor = given[0] if given else named.pop("hidden_states")
            order.append(index)
            states.append(hidden)
            calls.append(named_arguments(type(blocks[index]), given[1:]) | named)
            if index == len(self) - 1:
                raise EndOfPass
            return hidden

        with contextlib.suppress(EndOfPass):
            self._run(ids, record)
        if order != list(range(len(self))) or any(not torch.equal(states[0], x) for x in states):
            raise Refused(
                "blocks must follow each other, each once, on what the one before gives",
                value=f"{type(self.model).__name__}: {order}"[:200],
                place=self.path,
                fix="quantize the whole model in memory, as a torch.nn.Module",
            )
        return states[0], calls

    def losses(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return the negative log-likelihood of every token but the first, in nats, within `outside`.

        Args:
            ids: tokens `[n, length]`.
            hidden: what the last block gave, `[n, length, width]`.

        Returns:
            `[n, length - 1]`, float32.
        """
        found = []
        for start in range(0, ids.shape[1] - 1, POSITIONS):
            part = slice(start, min(start + POSITIONS, ids.shape[1] - 1))
            logits = self._run(ids[:, part], partial(_given, hidden[:, part])).logits.float()
            wanted = ids[:, part.start + 1 : part.stop + 1]
            found.append(nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none"))
        return torch.cat(found, dim=1)

    def _run(self, ids: torch.Tensor, instead: Callable[..., torch.Tensor]) -> Any:
        """Run the model with a function in the place of every block; it gets the block's number first."""
        blocks = list(self.model.get_submodule(self.path))
        try:
            for index, block in enumerate(blocks):
                block.forward = partial(instead, index)
            with torch.no_grad():
                return self.model(input_ids=ids, use_cache=False)
        finally:
            for block in blocks:
                del block.forward

    def _read(self, source: Source) -> torch.Tensor:
        tensor = self.shards.read(source.name)
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        return tensor.T.contiguous() if source.turned else tensor


def open_decoder(folder: Path) -> Decoder:
    """Read the configuration and the headers of a checkpoint folder; no code from it is run.

    Raises:
        Refused: transformers is missing; the folder has no configuration of a causal language model that the
            library knows, or is quantized; as `Shards`; no list of blocks is found, or a tensor is missing or
            of another shape.
    """
    need("language", "a checkpoint of a language model")
    config = _config(folder)
    shards = Shards(folder)
    from transformers import AutoModelForCausalLM

    try:
        with _EmptyOnMeta():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    except ValueError as error:
        raise Refused(
            "the architecture must be a causal language model",
            value=getattr(config, "model_type", config),
            place=str(folder / "config.json"),
            fix="choose a decoder, such as llama",
        ) from error
    return Decoder(shards, model, _block_list(model, folder))


def _config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise Refused(
            "the checkpoint must have a configuration",
            value="no config.json",
            place=str(folder),
            fix="give the folder that save_pretrained wrote",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoConfig
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Refused(
            "the architecture must be one that the transformers library knows",
            value=first[:200],
            place=str(folder / "config.json"),
            fix="update transformers, or choose another checkpoint: code that comes with one is never run",
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise Refused(
            "the model must not be quantized yet",
            value="config.json has quantization_config",
            place=str(folder),
            fix="start from the float model",
        )
    return config


def _block_list(model: nn.Module, folder: Path) -> str:
    """Return the name of the list of blocks."""
    count = getattr(model.config, "num_hidden_layers", None)
    lists: dict[str, nn.ModuleList] = {n: x for n, x in model.named_modules() if isinstance(x, nn.ModuleList)}
    found = [
        name for name, x in lists.items() if 0 < len(x) == count and all(_has_linear(block) for block in x)
    ]
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outer) != 1:
        seen = ", ".join(f"{name} of {len(x)}" for name, x in lists.items()) or "no lists"
        raise Refused(
            f"one list must hold the {count} decoder blocks of the configuration, each with linear layers",
            value=f"{type(model).__name__} has {seen}",
            place=str(folder),
            fix="quantize the whole model in memory, as a torch.nn.Module",
        )
    return str(outer[0])


def _has_linear(block: nn.Module) -> bool:
    return any(isinstance(module, (nn.Linear, transposed_linear_class())) for module in block.modules())


def _sources(model: nn.Module, shards: Shards) -> dict[str, Source]:
    """Return where each tensor of the model's state comes from.

    Raises:
        Refused: a tensor is in no file, under none of its names, or of another shape there.
    """
    state: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    prefix = f"{model.base_model_prefix}."
    owners: dict[int, str] = {}
    for name, tensor in state.items():
        stored = next((x for x in (name, name.removeprefix(prefix), prefix + name) if x in shards.stored), "")
        if stored:
            owners.setdefault(id(tensor), stored)
    lacking = [name for name, tensor in state.items() if id(tensor) not in owners]
    if lacking:
        some = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
        raise Refused(
            "the files must hold every tensor of the model",
            value=f"no {some}",
            place=str(shards.folder),
            fix="the checkpoint is of another architecture, or its architecture is stored under "
            "other names than it has in memory, which is not read here",
        )
    found = {}
    for name, tensor in state.items():
        stored, turned = owners[id(tensor)], isinstance(parent_of(model, name), transposed_linear_class())
        shape = shards.stored[stored].shape
        if shape != tuple(tensor.shape):
            raise Refused(
                f"{name} must have shape {tuple(tensor.shape)}, as the configuration says",
                value=shape,
                place=str(shards.folder),
                fix="copy config.json and the files again, from one checkpoint",
            )
        found[name] = Source(stored, turned and tensor.ndim == 2)
    return found


class _EmptyOnMeta(TorchFunctionMode):  # type: ignore[misc]
    """Tensors that are made without values have no memory either: weights, but no buffers."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if function is torch.empty and named.get("device") is None:
            named["device"] = "meta"
        return function(*args, **named)
