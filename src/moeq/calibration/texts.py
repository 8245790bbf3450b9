"""Several calibration texts with weights, as an option names them: `c4.txt:0.5,code.jsonl:0.5`.

Each text is a domain: it gets its share of the samples, and what was used of it is told apart.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moeq.errors import OptionError

NO_TEXT: Final = "none"
"""What stands for no text at all."""
BUNDLED: Final = "bundled"
"""What stands for the texts that come with moeq (`src/moeq/texts`), each half."""
BUNDLED_TEXTS: Final = ("web", "mixture")
_FOLDER: Final = Path(__file__).parent.parent / "texts"
_WEIGHTED: Final = re.compile(r"(.+):((?:\d+\.?\d*|\.\d+)(?:e-?\d+)?)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A text to calibrate on.

    Attributes:
        name: for reports, without the directory where that tells texts apart.
        source: a file, a directory of files, or a hub dataset.
        share: of the samples; those of all texts add up to 1.
    """

    name: str
    source: str
    share: float


def parse_texts(given: str) -> tuple[Text, ...]:
    """The texts of an option, equal shares where no weight is given.

    Args:
        given: sources with commas between them, each with ":weight" or without. The name of a file that exists is one
            source, whatever is in it. "bundled" are the texts that come with moeq, "bundled-web" is one of them.

    Raises:
        OptionError: a text is named twice, or nothing is; a weight is zero or no number; some texts have weights and
            others none.
    """
    pieces = [given] if Path(given).exists() else [piece.strip() for piece in given.split(",")]
    sources: list[str] = []
    weights: list[float | None] = []
    for piece in pieces:
        match = None if Path(piece).exists() else _WEIGHTED.fullmatch(piece)
        sources.append(match[1] if match else piece)
        weights.append(float(match[2]) if match else None)
    if not all(sources):
        raise _refused(f"a text has no name in {given!r}", "write texts as a.txt:0.5,b.jsonl:0.5")
    for source in sources:
        name, colon, weight = source.rpartition(":")
        if colon and not Path(source).exists() and Path(name).exists():
            raise _refused(f"{weight!r} is no weight of {name}", "give a positive number, as a.txt:0.5")
    places = [str(Path(source).resolve()) if Path(source).exists() else source for source in sources]
    twice = next((source for source, place in zip(sources, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise _refused(f"{twice} is named twice", "name it once, with a larger weight")
    known = [weight for weight in weights if weight is not None]
    if known and len(known) < len(weights):
        raise _refused("some texts have weights and others none", "give each text a weight, or none")
    if any(weight == 0 for weight in known):
        raise _refused("a text has weight 0", "leave it out")
    values = known or [1.0] * len(sources)
    short = [Path(source).name for source in sources]
    found: list[Text] = []
    for name, source, value in zip(short, sources, values, strict=True):
        share, own = value / sum(values), _bundled(source)
        named = name if short.count(name) == 1 else source
        found += [
            Text(name=f"bundled {each}", source=str(_FOLDER / f"{each}.jsonl"), share=share / len(own)) for each in own
        ] or [Text(name=named, source=source, share=share)]
    again = next((text.name for text in found if sum(other.source == text.source for other in found) > 1), None)
    if again is not None:
        raise _refused(f"{again} is named twice", "name it once, with a larger weight")
    return tuple(found)


def _bundled(source: str) -> tuple[str, ...]:
    """The bundled texts that a source stands for; none if it is no name of such."""
    if Path(source).exists() or not (source == BUNDLED or source.startswith(f"{BUNDLED}-")):
        return ()
    name = source.removeprefix(BUNDLED).removeprefix("-")
    if name and name not in BUNDLED_TEXTS:
        choices = ", ".join(f"{BUNDLED}-{each}" for each in BUNDLED_TEXTS)
        raise _refused(f"moeq comes with no text called {name!r}", f"choose one of {choices}, or {BUNDLED} for all")
    return (name,) if name else BUNDLED_TEXTS


def samples_of(shares: tuple[float, ...], total: int) -> tuple[int, ...]:
    """Whole samples of each share, `total` together: largest remainders, at least one each.

    Raises:
        OptionError: there are fewer samples than texts.
    """
    if total < len(shares):
        message = f"{total} samples cannot be taken from {len(shares)} texts"
        raise OptionError(message, option="nsamples", fix=f"give {len(shares)} or more")
    free = total - len(shares)
    exact = [share * total - 1 for share in shares]
    counts = [max(0, int(value)) for value in exact]
    while sum(counts) > free:
        counts[counts.index(max(counts))] -= 1
    while sum(counts) < free:
        rest = [value - count for value, count in zip(exact, counts, strict=True)]
        counts[rest.index(max(rest))] += 1
    return tuple(count + 1 for count in counts)


def interleaved(counts: tuple[int, ...]) -> tuple[int, ...]:
    """The text of each sample, spread so that any stretch of samples has all texts in their shares."""
    places = [((place + 0.5) / count, text) for text, count in enumerate(counts) for place in range(count)]
    return tuple(text for _, text in sorted(places))


def _refused(message: str, fix: str) -> OptionError:
    return OptionError(message, option="calibration", fix=fix)
