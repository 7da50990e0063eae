"""Every exception mechicl raises.

All derive from `MechiclError`, and each is also the built-in a caller would expect (ValueError, KeyError, ...), so that
`except ValueError` keeps working in scripts that do not know mechicl. Messages read
"<name> must be <rule>; got <value>. <what to do>."
"""


class MechiclError(Exception):
    """Base of every error mechicl raises on purpose."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class EpisodeError(MechiclError, ValueError):
    """An episode cannot be used: no shots, one class only, an answer that is not a candidate, ..."""


class ImageError(MechiclError, ValueError):
    """A picture cannot be read or is not a picture."""


class RenderError(MechiclError, ValueError):
    """An episode cannot be turned into tokens with exact spans."""


class ContextLengthError(MechiclError, ValueError):
    """A prompt is longer than the model's context."""


class EmptySpanError(MechiclError, ValueError):
    """A measure needs a span (a label, an image, ...) that a prompt does not have."""


class MissingInputError(MechiclError, ValueError):
    """The processor's mapping lacks an input without which the model is silently wrong."""


class UnsupportedModelError(MechiclError, ValueError):
    """A model or family that cannot be hooked, refused by name with the reason."""


class ParityError(MechiclError, ValueError):
    """The hooked model does not reproduce the plain model."""


class HookNameError(MechiclError, KeyError):
    """A hook name that the model does not have."""


class HookNotFiredError(MechiclError, ValueError):
    """A hook was asked for by name and the forward pass never reached it."""


class HeadIndexError(MechiclError, IndexError):
    """A (layer, head) pair that the model does not have."""


class DeviceError(MechiclError, ValueError):
    """A device or dtype that this machine does not offer."""


class NotFiniteError(MechiclError, ValueError):
    """A NaN or an infinity where a finite number is needed."""


class OutputPathError(MechiclError, ValueError):
    """A file that must be written cannot be written there."""


class OptionError(MechiclError, ValueError):
    """An option outside its documented range."""


class PaddingError(OptionError):
    """Prompts of several lengths in one batch, in a family whose logits padding moves. Analyses go on with fewer prompts at a time."""


class CheckpointError(MechiclError, ValueError):
    """A folder that is not a usable checkpoint, or a run that cannot be resumed from it."""
