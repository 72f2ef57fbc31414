"""The numbers of one report, as plain frozen data: no tensor, no model, no library behind them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from attnbias.errors import AttnbiasError

SCHEMA = "attnbias.report/2"

Grid = tuple[tuple[float, ...], ...]


class Cell(NamedTuple):
    """One head of a map: its value, the two controls, even attention, the interval (or nan)."""

    layer: int
    head: int
    values: float
    shuffled: float
    random: float
    even: float
    low: float = math.nan
    high: float = math.nan


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
        low, high: for each head the 95% interval of `values`, from a bootstrap over blocks of query
            positions; empty where the statistic is no mean over queries.
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
    low: Grid = ()
    high: Grid = ()

    def __post_init__(self) -> None:
        for name in ("values", "shuffled", "random", *(("low", "high") if self.low else ())):
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
        none = tuple(tuple(math.nan for _ in row) for row in self.values)
        grids = (self.values, self.shuffled, self.random, self.low or none, self.high or none)
        return [
            Cell(layer, head, value, shuffled, random, even, low, high)
            for layer, even, *rows in zip(self.layers, self.even, *grids, strict=True)
            for head, (value, shuffled, random, low, high) in enumerate(zip(*rows, strict=True))
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
        low, high: 95% interval of `received` from a bootstrap over the heads; nan for all but the
            words that receive most.
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
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Profile:
    """One head on this text: which tokens receive, at which distance, and on short texts its map.

    Attributes:
        tower, layer, head: which one.
        received: share of the head's attention that goes to each bin of token positions
            (`ReportData.bins`), mean over the queries; adds up to 1.
        top: the keys that receive most, at most 64: (token position, share), largest first.
        near: share of attention at each signed distance (`ReportData.gaps`); adds up to 1.
        near_shuffled, near_random: the same for the two controls.
        map: on short texts the map over the tokens, queries x keys, as base64 of one byte for each
            weight w, 255 sqrt(w) rounded; "" else.
    """

    tower: str
    layer: int
    head: int
    received: tuple[float, ...]
    top: tuple[tuple[int, float], ...]
    near: tuple[float, ...]
    near_shuffled: tuple[float, ...] = ()
    near_random: tuple[float, ...] = ()
    map: str = ""


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
        profiles: one for each head measured, or none.
        bins: first token position of each bin of `Profile.received`.
        even_received: for each of `layers`, what even attention would give each bin.
        gaps: (smallest, largest) of each bin of `Profile.near`, in tokens; above 0 is back in the
            text. even_near: for each of `layers`, what even attention would give each.
        blocks: how many blocks of query positions the intervals were drawn from.
        sampled: how many query positions `Profile.near` was read from.
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
    profiles: tuple[Profile, ...] = ()
    bins: tuple[int, ...] = ()
    even_received: Grid = ()
    gaps: tuple[tuple[int, int], ...] = ()
    even_near: Grid = ()
    blocks: int = 0
    sampled: int = 0

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

    def profile(self, layer: int, head: int, tower: str | None = None) -> Profile | None:
        """The profile of one head (of the first tower, unless told), or None."""
        tower = self.towers[0] if tower is None else tower
        for one in self.profiles:
            if (one.tower, one.layer, one.head) == (tower, layer, head):
                return one
        return None

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary of the schema `SCHEMA`; nan becomes None."""
        from dataclasses import asdict

        found: dict[str, Any] = _plain(asdict(self))
        settings = dict(self.settings)
        return {"schema": SCHEMA, **found, "settings": settings, "text_sha256": self.text_hash}

    @classmethod
    def from_dict(cls, given: Any) -> ReportData:
        """The report that `as_dict` wrote.

        Raises:
            AttnbiasError: something else, an older schema, or a text that is not the one hashed.
        """
        schema = given.get("schema") if isinstance(given, dict) else None
        if schema != SCHEMA:
            raise AttnbiasError(
                f"a saved report has the schema {SCHEMA!r}, got {schema!r}; make it again with "
                "attnbias observe MODEL --text FILE --json FILE"
            )
        try:
            made = _Reader().report(given)
        except (KeyError, TypeError, ValueError) as error:
            raise AttnbiasError(f"a saved report is damaged: {error!r}") from None
        if made.text_hash != given["text_sha256"]:
            raise AttnbiasError("a saved report is damaged: its text is not the one it was made of")
        return made

    def _repr_html_(self) -> str:
        from attnbias.report.notebook import shown

        return shown(self)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value


class _Reader:
    """Plain JSON back into frozen data: lists become tuples, None a nan."""

    def report(self, given: dict[str, Any]) -> ReportData:
        known = {f.name for f in fields(ReportData)}
        found = {name: self.tuples(one) for name, one in given.items() if name in known}
        found["settings"] = tuple((str(k), str(v)) for k, v in given["settings"].items())
        for name, kind in (("maps", Map), ("words", Word), ("profiles", Profile)):
            found[name] = tuple(kind(**self.tuples(one)) for one in given[name])
        return ReportData(**found)

    def tuples(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self.tuples(one) for name, one in value.items()}
        if isinstance(value, list):
            return tuple(self.tuples(one) for one in value)
        return math.nan if value is None else value
