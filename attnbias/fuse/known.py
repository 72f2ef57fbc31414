"""What is known of the classes of transformers that carry an attention bias: done, or why not."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any, Literal

from attnbias.fuse.scan import Seen, model_files, reached, reaching, read

_MODELS = "transformers.models."
# Reason -> the classes, as "model.Class": the file is modeling_<model>.py unless it is named.
_WHY: dict[str, tuple[str, ...]] = {
    "its bias is a product of each query with tables of rows and columns; ab.forms.ViTDet computes "
    "it, but no family hands it over yet.": (
        "deepseek_ocr2.DeepseekOcr2SamVisionAttention",
        "deepseek_ocr2.DeepseekOcr2SamVisionSdpaAttention",
        "got_ocr2.GotOcr2VisionAttention",
        "pp_formulanet.PPFormulaNetVisionAttention",
        "sam.SamVisionAttention",
        "sam.SamVisionSdpaAttention",
        "sam_hq.SamHQVisionAttention",
        "sam_hq.SamHQVisionSdpaAttention",
        "seggpt.SegGptAttention",
        "slanext.SLANeXtVisionAttention",
        "unlimited_ocr.UnlimitedOcrSamVisionAttention",
        "unlimited_ocr.UnlimitedOcrSamVisionSdpaAttention",
        "vitdet.VitDetAttention",
    ),
    "it adds products of queries and of keys with embeddings of their distance (disentangled "
    "attention), which no structure holds.": (
        "deberta.DisentangledSelfAttention",
        "deberta_v2.DisentangledSelfAttention",
        "sew_d.DisentangledSelfAttention",
    ),
    "it adds products of each query with embeddings of the distance (Transformer-XL); "
    "ab.forms.TransformerXL computes it, but no family hands it over yet.": (
        "fastspeech2_conformer.FastSpeech2ConformerAttention",
        "funnel.FunnelRelMultiheadAttention",
        "nemotron_asr_streaming.NemotronAsrStreamingEncoderAttention",
        "parakeet.ParakeetEncoderAttention",
        "seamless_m4t.SeamlessM4TConformerSelfAttention",
        "wav2vec2_bert.Wav2Vec2BertSelfAttention",
        "wav2vec2_conformer.Wav2Vec2ConformerSelfAttention",
        "xlnet.XLNetRelativeAttention",
    ),
    "it adds products of each query with embeddings of the distance (Shaw); ab.forms.Shaw computes "
    "it, but no family hands it over yet.": (
        "seamless_m4t_v2.SeamlessM4Tv2ConformerSelfAttention",
        "speecht5.SpeechT5Attention",
        "inkling.InklingAttention",
        "inkling2.Inkling2FullAttention",
        "inkling2.Inkling2SlidingAttention",
    ),
    "it adds embeddings of the distance to the values, too, which is no bias of the scores.": (
        "vits.VitsAttention",
    ),
    "it attends within short blocks, with products of each query and embeddings of the distance; "
    "no family hands them over.": (
        "gemma3n.Gemma3nAudioAttention",
        "gemma3n.Gemma3nAudioRelativePositionEmbedding",
        "gemma4.Gemma4AudioAttention",
        "granite_speech.GraniteSpeechConformerAttention",
        "granite_speech5.GraniteSpeech5EncoderAttention",
        "granite_speech_plus.GraniteSpeechPlusConformerAttention",
    ),
    "each query scales the table of distances by a gate of its own, which no structure holds.": (
        "wavlm.WavLMAttention",
    ),
    "its bias reads the buckets of two streams of predicted tokens from each query.": (
        "prophetnet.ProphetNetNgramSelfAttention",
    ),
    "its table is read over a grid with fewer queries than keys and cached by the model itself; no "
    "family hands it over.": (
        "levit.LevitAttention",
        "levit.LevitAttentionSubsample",
    ),
    "its buckets depend on the segments of each text, so the bias differs from row to row of a "
    "batch; no family hands it over.": ("cpmant.CpmAntAttention",),
    "its bias travels inside the mask; no family takes it apart.": (
        "phi4_multimodal.Phi4MultimodalAudioAttention",
    ),
    "it attends to compressed keys beside the others, with a mask of its own for them.": (
        "deepseek_v4.DeepseekV4Attention",
    ),
    "its relative positions enter features of pairs, not the scores of an attention.": (
        "esmfold2.EsmFold2ConfidenceHead",
    ),
    "its mask is a sliding window over atoms and it adds no bias.": (
        "esmfold2.EsmFold2AtomAttention",
    ),
    "the model makes its pair bias once for all steps of the sampler and hands it to sdpa as its "
    "mask; nothing is made anew.": ("esmfold2.EsmFold2DiffusionAttention",),
    "its sinks stand beside keys that each query picks by an index of its own.": (
        "hy_v4.HYV4Attention",
    ),
    "it adds a bias between boxes that is made by a network for each page; no family hands it "
    "over.": ("pp_doclayout_v2.PPDocLayoutV2ReadingOrderSelfAttention",),
    "its position bias weighs the slots of a compressor, not the keys of an attention.": (
        "deepseek_v4.DeepseekV4CSACompressor",
        "deepseek_v4.DeepseekV4HCACompressor",
        "deepseek_v4.DeepseekV4Indexer",
    ),
}


def _path(short: str) -> str:
    model, _, name = short.partition(".")
    return f"{_MODELS}{model}.modeling_{model}.{name}"


REFUSED: dict[str, str] = {
    _path(short): reason for reason, names in _WHY.items() for short in names
}

Status = Literal["fused", "carries", "refused", "unknown"]


@dataclass(frozen=True)
class Row:
    """One class of the installed transformers, or of a family.

    Attributes:
        path: dotted. status: "fused" (a family computes it), "carries" (it makes or passes a bias
            that another class attends with), "refused", or "unknown" (nobody has looked at it).
        family: whose code computes it, directly or below it. why: the bias in words, what it is
            handed to, or the reason. signs: names in its code that speak of a bias.
        oldest: the oldest transformers that its family works on, as far as it was run.
    """

    path: str
    status: Status
    family: str
    why: str
    signs: tuple[str, ...] = ()
    oldest: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@functools.cache
def versions() -> dict[str, Any]:
    """What `python -m tests.versions` has recorded; empty before its first run."""
    file = resources.files("attnbias.fuse").joinpath("versions.json")
    return dict(json.loads(file.read_text("utf-8"))) if file.is_file() else {}


def oldest(path: str, family: str) -> str:
    """The oldest transformers on which the cases of a class passed, else those of its family."""
    found = versions()
    row = found.get("classes", {}).get(path) or found.get("families", {}).get(family, {})
    return str(row.get("oldest") or "")


def table() -> list[Row]:
    """Every class of the installed transformers that makes a relative bias or passes one on.

    Their source is parsed, nothing of it imported: what a newer version adds shows up as unknown.
    Classes that families know are there in any case.
    """
    rows: dict[str, Row] = {}
    families = _families()
    gone = set()  # classes that only other versions of transformers have
    for module, (classes, names) in _files().items():
        for row in _rows(classes):
            rows[row.path] = row
        for path in families:
            home, _, name = path.rpartition(".")
            if home == module and name not in names:
                gone.add(path)
    for path, (name, form) in families.items():
        if path not in rows and path not in gone:
            rows[path] = Row(path, "fused", name, form, (), oldest(path, name))
    return [rows[path] for path in sorted(rows, key=lambda one: (one.rpartition(".")[0], one))]


@functools.cache
def _files() -> dict[str, tuple[dict[str, Seen], frozenset[str]]]:
    """Of each model file: its classes, where one has a bias, and the names of all."""
    found = {}
    for module, file in model_files():
        text = file.read_text("utf-8")
        names = frozenset(re.findall(r"^class (\w+)", text, flags=re.M))
        found[module] = (read(text, module), names)
    return found


def _families() -> dict[str, tuple[str, str]]:
    from attnbias.fuse.families import FAMILIES

    return {
        path: (family.name, family.form)
        for family in FAMILIES
        for path in (*family.modules, *family.parts)
    }


def _rows(classes: dict[str, Seen]) -> Iterable[Row]:
    biased = [one for one in classes.values() if one.signs]
    users: dict[str, Seen] = {one.path: one for one in biased if one.attends}
    carriers: list[tuple[Seen, list[Seen]]] = []
    for one in biased:
        if one.attends:
            continue
        below = reached(one, classes) or reaching(one, classes)
        for base in one.bases:
            below = below or (reaching(classes[base], classes) if base in classes else [])
        below = [user for user in below if user.signs or _decided(user, classes)] or below
        carriers.append((one, below))
        users.update((user.path, user) for user in below)
    for user in users.values():
        yield _attending(user, classes)
    for one, below in carriers:
        yield _carrying(one, [_attending(user, classes) for user in below])


def _decided(one: Seen, classes: dict[str, Seen]) -> bool:
    return _attending(one, classes).status != "unknown"


def _attending(one: Seen, classes: dict[str, Seen]) -> Row:
    """A class that computes attention: by its own path, or that of a class it derives from."""
    families = _families()
    if one.path in families:
        name, form = families[one.path]
        return Row(one.path, "fused", name, form, one.signs, oldest(one.path, name))
    if one.path in REFUSED:
        return Row(one.path, "refused", "", REFUSED[one.path], one.signs)
    for base in one.bases:
        if base in classes and base != one.name:
            above = _attending(classes[base], classes)
            if above.status == "fused" and one.own - {"__init__"}:
                names = ", ".join(sorted(one.own - {"__init__"}))
                why = f"it has {names} of its own, other than {base}."
                return Row(one.path, "refused", "", why, one.signs)
            if above.status != "unknown":
                return Row(one.path, above.status, above.family, above.why, one.signs, above.oldest)
    why = "nobody has looked at it."
    return Row(one.path, "unknown", "", why, one.signs)


def _carrying(one: Seen, below: list[Row]) -> Row:
    if one.path in REFUSED:
        return Row(one.path, "refused", "", REFUSED[one.path], one.signs)
    if not below:
        return Row(one.path, "unknown", "", "nobody has looked at it.", one.signs)
    names = ", ".join(row.path.rpartition(".")[2] for row in below)
    families = sorted({row.family for row in below if row.family})
    return Row(one.path, "carries", ", ".join(families), f"for {names}", one.signs)
