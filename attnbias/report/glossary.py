"""The words that a page uses, for a reader who is not an expert."""

from __future__ import annotations

GLOSSARY = (
    ("Attention", "For every token, a head gives each token it may see a share; the shares of one "
     "token add up to 100%. The token then reads the others in these proportions."),
    ("Bias", "A tilt of these shares that does not come from what the text says: towards a place, "
     "a distance, a kind of token."),
    ("Control", "The same measurement where the thing looked for cannot be: with the words in "
     "random order, and in the same architecture with random weights."),
    ("Even share", "What a token would receive if every token spread its attention evenly over "
     "the tokens it can see."),
    ("Head, layer", "A layer holds several heads that attend side by side; layers follow one "
     "another."),
    ("Interval", "The 95% interval of a head's number: blocks of neighbouring query positions of "
     "this text are drawn again and again with replacement, and the middle 95% of the results are "
     "given. It says how much the number hangs on the places of this text, not on other texts."),
    ("Previous-token head", "A head that gives most of its attention to the token right before "
     "the one that looks; some heads do the same with the next token or the token itself."),
    ("Random weights", "The untrained model: same build, weights drawn anew from a fixed seed."),
    ("Sink", "A token, often the first, that receives much attention whatever it is: a place to "
     "put attention that has nowhere else to go."),
    ("Token", "The piece of text a model reads: a word, a part of one, a sign, or a special token "
     "such as [CLS] that the tokenizer adds."),
)  # fmt: skip
