"""What ``accelerate`` says that it did."""

from __future__ import annotations

from dataclasses import dataclass, field

NOTHING = "nothing in this model is of a class that ple_fast knows (docs/migration has the list)"


@dataclass(frozen=True)
class Replaced:
    """A module whose trunk runs fused now."""

    path: str
    """Its name in the model; empty for the model itself."""
    library: str
    """Library and class."""
    parameters: dict[str, tuple[str, ...]]
    """Per new parameter the names of the old ones that it holds: for rules by name or by number of dimensions."""
    unread: tuple[str, ...] = ()
    """Tensors that the library keeps and never reads: still in the state dict, and no parameters any more. What a
    penalty trains all the same is in ``parameters``."""


@dataclass(frozen=True)
class Left:
    """A module of a known class that was left as it is."""

    path: str
    library: str
    why: str


@dataclass(frozen=True)
class Report:
    """What ``accelerate`` did."""

    replaced: tuple[Replaced, ...] = ()
    left: tuple[Left, ...] = ()
    parameters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Of all replaced modules together, by their names in the model."""
    already: tuple[str, ...] = ()
    """Names of modules that an earlier call has replaced."""

    def __str__(self) -> str:
        lines = []
        for site in self.replaced:
            lines.append(f"replaced {site.path or 'the model'} ({site.library})")
            if site.unread:
                lines.append(f"  kept, and no longer trained, because nothing reads them: {', '.join(site.unread)}")
        lines += [f"left {site.path or 'the model'} ({site.library}): {site.why}" for site in self.left]
        lines += [f"{path or 'the model'} runs fused already" for path in self.already]
        return "\n".join(lines) or NOTHING
