"""The numbers of one report, as plain frozen data: no tensor, no model, no library behind them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from attnbias.errors import AttnbiasError

Grid = tuple[tuple[float, ...], ...]


class Cell(NamedTuple):
    """One head of a map: its value, the two controls, and the value of even attention."""

    layer: int
    head: int
    values: float
    shuffled: float
    random: float
    even: float


@dataclass(frozen=True)
class Map:
    """One statistic for every layer and head of one tower, with the same for the two controls.

    Attributes:
        statistic: short name, the key of the statistic ("first_token").
        tower: tower of the model ("text").
        title: what a reader sees over the map.
        unit: unit of the values ("share of attention", "nats", "tokens").
        meaning: one plain sentence on what the number is.
        layers: number of the layer of each row, counted from 0 within the tower.
        values: layers x heads; rows may differ in length; nan where nothing was measured.
        shuffled: the same for the same text with its words shuffled.
        random: the same for the same architecture with random weights.
        even: for each layer, the value of attention spread evenly over the visible tokens.
    """

    statistic: str
    tower: str
    title: str
    unit: str
    meaning: str
    layers: tuple[int, ...]
    values: Grid
    shuffled: Grid
    random: Grid
    even: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("values", "shuffled", "random"):
            grid: Grid = getattr(self, name)
            if [len(row) for row in grid] != [len(row) for row in self.values] or len(grid) != len(
                self.layers
            ):
                raise AttnbiasError(
                    f"Map.{name} of {self.statistic!r}: has {[len(row) for row in grid]} heads per "
                    f"layer, expected {[len(row) for row in self.values]} for {len(self.layers)} "
                    f"layers"
                )
        if len(self.even) != len(self.layers):
            raise AttnbiasError(
                f"Map.even of {self.statistic!r}: has {len(self.even)} values, expected one for "
                f"each of {len(self.layers)} layers"
            )

    def cells(self) -> list[Cell]:
        """Every head that was measured."""
        rows = zip(self.layers, self.even, self.values, self.shuffled, self.random, strict=True)
        return [
            Cell(layer, head, value, shuffled, random, even)
            for layer, even, *grids in rows
            for head, (value, shuffled, random) in enumerate(zip(*grids, strict=True))
            if not math.isnan(value)
        ]


@dataclass(frozen=True)
class Word:
    """A word of the text and the attention that its tokens receive together.

    Received attention is given in times the even share: the sum, over all queries, of the attention
    that goes to the tokens of the word, over the same sum for attention spread evenly over the
    tokens that each query can see; 1 is even. It is the mean over the measured heads.

    Attributes:
        text: the word as it stands in the text, or the name of a special token.
        special: added by the tokenizer, not in the text.
        tokens: (start, stop) token positions.
        share: mean over the real queries of the attention to this word, 0 to 1.
        received: times the even share, mean over layers and heads.
        by_layer: the same for each layer (rows as in `ReportData.layers`), mean over its heads.
        shuffled: `received` of the same tokens in their place in the shuffled text.
        in_place: `received` of what stands in this place in the shuffled text.
        random: `received` with random weights.
        gap: the white space that follows it in the text.
    """

    text: str
    special: bool
    tokens: tuple[int, int]
    share: float
    received: float
    by_layer: tuple[float, ...]
    shuffled: float
    in_place: float
    random: float
    gap: str = " "


@dataclass(frozen=True)
class ReportData:
    """Everything that a page, a figure, a table or a summary is made of.

    Attributes:
        model: model id or folder name; revision: commit or hash of the weights file, "" if unknown.
        architecture: class of the model; causal: a token sees only the tokens before it.
        text: the text as the model saw it (decoded from the file, cut where `settings` says so).
        tokens: the tokens, special ones too; words: the words they make up, in order.
        layers: (tower, layer) of each entry of `Word.by_layer`.
        maps: one for each statistic and tower.
        version: version of attnbias; settings: (name, value) in the order to be shown.
    """

    model: str
    revision: str
    architecture: str
    causal: bool
    text: str
    tokens: tuple[str, ...]
    words: tuple[Word, ...]
    layers: tuple[tuple[str, int], ...]
    maps: tuple[Map, ...]
    version: str
    settings: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not self.maps:
            raise AttnbiasError("maps: none came; a report needs at least one statistic")
        if not self.words:
            raise AttnbiasError("words: none came; a report needs a text of at least one word")
        for word in self.words:
            if len(word.by_layer) != len(self.layers):
                raise AttnbiasError(
                    f"words: {word.text!r} has received attention for {len(word.by_layer)} layers, "
                    f"expected {len(self.layers)}"
                )

    @property
    def text_hash(self) -> str:
        """SHA-256 of the text in UTF-8, hexadecimal."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def towers(self) -> tuple[str, ...]:
        """Towers in the order of their first map."""
        return tuple(dict.fromkeys(one.tower for one in self.maps))

    def map(self, statistic: str, tower: str | None = None) -> Map | None:
        """The map of one statistic (of the first tower that has it, unless told), or None."""
        for one in self.maps:
            if one.statistic == statistic and tower in (None, one.tower):
                return one
        return None

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; nan becomes None."""
        from dataclasses import asdict

        def plain(value: Any) -> Any:
            if isinstance(value, float) and not math.isfinite(value):
                return None
            if isinstance(value, dict):
                return {key: plain(one) for key, one in value.items()}
            if isinstance(value, (list, tuple)):
                return [plain(one) for one in value]
            return value

        found: dict[str, Any] = plain(asdict(self))
        return {**found, "settings": dict(self.settings), "text_sha256": self.text_hash}
