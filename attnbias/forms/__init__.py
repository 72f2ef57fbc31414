"""Named biases of the literature: a form makes a `Bias` for given lengths."""

from attnbias.forms.alibi import ALiBi, alibi_slopes
from attnbias.forms.t5 import T5, t5_buckets

__all__ = ["T5", "ALiBi", "alibi_slopes", "t5_buckets"]
