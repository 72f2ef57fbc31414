"""The rules, one class per work."""

from __future__ import annotations

from attnbias.steer.directions import Direction
from attnbias.steer.documents import Ranking, rank_documents
from attnbias.steer.lookback import Detector, LabelledText
from attnbias.steer.rules.act import ACT, Selected
from attnbias.steer.rules.adatp import AdaTP, Clip
from attnbias.steer.rules.alfar import ALFAR
from attnbias.steer.rules.attention_modulation import AttentionModulation, Entity
from attnbias.steer.rules.avisc import AVISC
from attnbias.steer.rules.block_heads import BlockHeads
from attnbias.steer.rules.dagcd import DAGCD, ContextExample
from attnbias.steer.rules.decore import DeCoRe, Needle
from attnbias.steer.rules.focus_directions import FocusDirections, FocusExample, FocusFit
from attnbias.steer.rules.found_in_the_middle import FoundInTheMiddle
from attnbias.steer.rules.game import GAME
from attnbias.steer.rules.hard_pattern import HardPattern
from attnbias.steer.rules.key_shift import KeyShift
from attnbias.steer.rules.loco_re import LocoRE
from attnbias.steer.rules.lookback_lens import LookbackLens
from attnbias.steer.rules.paint import PAINT
from attnbias.steer.rules.pasta import PASTA
from attnbias.steer.rules.persona_vector import PersonaVector, Response
from attnbias.steer.rules.re_ground import ReGround
from attnbias.steer.rules.sgrs import SGRS
from attnbias.steer.rules.split_softmax import SplitSoftmax
from attnbias.steer.rules.streaming_llm import StreamingLLM
from attnbias.steer.rules.test_time_registers import RegisterFit, TestTimeRegisters
from attnbias.steer.rules.var import VAR, SinkFit
from attnbias.steer.rules.vhr import VHR
from attnbias.steer.rules.vti import VTI, VTIFit, masked_copies
from attnbias.steer.rules.zero_tuning import Example, Fitted, ZeroTuning

__all__ = [
    "ACT",
    "ALFAR",
    "AVISC",
    "DAGCD",
    "GAME",
    "PAINT",
    "PASTA",
    "SGRS",
    "VAR",
    "VHR",
    "VTI",
    "AdaTP",
    "AttentionModulation",
    "BlockHeads",
    "Clip",
    "ContextExample",
    "DeCoRe",
    "Detector",
    "Direction",
    "Entity",
    "Example",
    "Fitted",
    "FocusDirections",
    "FocusExample",
    "FocusFit",
    "FoundInTheMiddle",
    "HardPattern",
    "KeyShift",
    "LabelledText",
    "LocoRE",
    "LookbackLens",
    "Needle",
    "PersonaVector",
    "Ranking",
    "ReGround",
    "RegisterFit",
    "Response",
    "Selected",
    "SinkFit",
    "SplitSoftmax",
    "StreamingLLM",
    "TestTimeRegisters",
    "VTIFit",
    "ZeroTuning",
    "masked_copies",
    "rank_documents",
]
