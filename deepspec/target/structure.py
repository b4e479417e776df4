"""Where the parts of a causal language model are, found by what they are and not by their names."""

from typing import Any, NamedTuple

from torch import nn

from deepspec.errors import ConfigError


class Structure(NamedTuple):
    """The parts of a model that are tapped or read."""

    decoder: Any  # takes token ids; its `last_hidden_state` is after the final norm
    layers: nn.ModuleList  # as many as the text config's `num_hidden_layers`
    embedding: Any  # its `weight` is [V, D]
    lm_head: Any  # the same


def find_structure(model: Any) -> Structure:
    """The text decoder of a model of transformers, which may read images as well.

    The decoder is the innermost model that holds both the embedding of tokens and a list of
    `num_hidden_layers` modules; the layers are the list that is nested least.

    Raises:
        ConfigError: there is no such list, or no output head.
    """
    count = model.config.get_text_config().num_hidden_layers
    embedding, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
    decoder = model
    while inner := [part for part in decoder.children() if _decodes(part, embedding, count)]:
        decoder = inner[0]
    lists = _lists_of(decoder, count)
    if not lists or lm_head is None:
        missing = "output head" if lists else f"list of {count} decoder layers"
        raise ConfigError(
            f"{type(model).__name__} has no {missing}",
            where="target.model",
            fix="choose a causal language model whose decoder layers are modules of one list",
        )
    layers = lists[min(lists, key=lambda name: name.count("."))]
    return Structure(decoder, layers, embedding, lm_head)


def _lists_of(module: nn.Module, count: int) -> dict[str, nn.ModuleList]:
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) == count
    }


def _decodes(module: nn.Module, embedding: nn.Module, count: int) -> bool:
    """Whether it is a model of its own, with the embedding and a list of so many modules."""
    holds = any(part is embedding for part in module.modules())
    return holds and hasattr(module, "config") and bool(_lists_of(module, count))
