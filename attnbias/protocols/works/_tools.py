"""What several protocols share: heads drawn for controls, towers of models with images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from attnbias.errors import AttnbiasError, Refused
from attnbias.protocols import answering
from attnbias.protocols.base import Bench, Item, Rules
from attnbias.steer import Rule

Pairs = tuple[tuple[int, int], ...]


def one(rules: Rules, kind: type[Any]) -> Any:
    """The rule of a kind among the rules of a run."""
    return next(rule for rule in rules if isinstance(rule, kind))


def shape(bench: Bench) -> tuple[int, int]:
    """Layers and heads of the tower that writes (or of the only one)."""
    config = bench.model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(config.num_hidden_layers), int(config.num_attention_heads)


def pairs(bench: Bench, rule: Rule) -> Pairs:
    """The heads of a rule, one by one."""
    layers, heads = shape(bench)
    return tuple(
        (layer, head)
        for layer in range(layers)
        if rule.layers == "all" or layer in rule.layers
        for head in _numbers(rule, layer, heads)
    )


def _numbers(rule: Rule, layer: int, heads: int) -> Sequence[int]:
    found = rule.heads_at(layer)
    return range(heads) if isinstance(found, str) else found


def drawn(bench: Bench, chosen: Pairs) -> Pairs:
    """As many heads of the same layers, drawn; none of the chosen where there are enough others."""
    _, heads = shape(bench)
    made = []
    for layer, count in sorted(Counter(layer for layer, _ in chosen).items()):
        others = [head for head in range(heads) if (layer, head) not in chosen]
        rest = others if len(others) >= count else list(range(heads))
        made += [(layer, head) for head in sorted(bench.random.sample(rest, count))]
    return tuple(made)


def drawn_anywhere(bench: Bench, chosen: Pairs) -> Pairs:
    """As many heads of any layer, drawn from the others where there are enough."""
    layers, heads = shape(bench)
    every = [(layer, head) for layer in range(layers) for head in range(heads)]
    others = [pair for pair in every if pair not in chosen]
    rest = others if len(others) >= len(chosen) else every
    return tuple(sorted(bench.random.sample(rest, len(chosen))))


def towers(bench: Bench) -> tuple[str, ...] | None:
    """The tower that writes, where the model has several."""
    from attnbias.hub import sites

    names = list(dict.fromkeys(site.tower for site in sites(bench.model)))
    if len(names) < 2:
        return None
    found = [name for name in names if name in ("text", "decoder")]
    return (found[0],) if found else (names[-1],)


def gold(bench: Bench, item: Item) -> tuple[int, int]:
    """Where the document with the answer stands.

    Raises:
        AttnbiasError: an item without "gold".
    """
    if item.get("gold") is None:
        raise AttnbiasError("items set aside to fit on need 'gold', the number of the document")
    start, stop = bench.ask(item).spans["gold"]
    return start, stop


def answer_tokens(bench: Bench, item: Item) -> tuple[int, ...]:
    """The tokens of the first right answer, as they follow the prompt."""
    tokenizer = getattr(bench.processor, "tokenizer", bench.processor)
    return tuple(answering.continuation(tokenizer, " " + item["answers"][0].strip()))


def examples(bench: Bench) -> list[Any]:
    """The items set aside, as `Example` records of the first token of each choice."""
    from attnbias.steer.rules import Example

    tokenizer = getattr(bench.processor, "tokenizer", bench.processor)
    made = []
    for item in bench.examples:
        first = [answering.continuation(tokenizer, choice)[0] for choice in item["choices"]]
        inputs = answering.on_device(bench.model, bench.ask(item))
        made.append(Example(inputs, first[item["answer"]], tuple(dict.fromkeys(first))))
    return made


def shuffled(bench: Bench, directions: Any) -> Any:
    """Directions whose numbers are in another order: the same lengths."""
    return tuple(
        replace(
            one,
            vectors=tuple(tuple(bench.random.sample(v, len(v))) for v in one.vectors),
        )
        for one in directions
    )


def from_recipe(work: str, line: str) -> Rules:
    """Refuse a work whose rule this data cannot fit.

    Raises:
        Refused: always, with the lines that make the recipe.
    """
    raise Refused(
        f"the rule of {work} is fitted on data of another kind: run {line}, save it by "
        'attnbias.Recipe.of(model, rule).save("r.json") and add --recipe r.json'
    )
