"""What tokenizing did to a site's rows, for the people of that site."""

from __future__ import annotations

from dataclasses import dataclass

from finetuning.rows import Place, named
from finetuning.tokenizing import SpecialsInText

__all__ = ["TokenizationReport", "counted"]

_SPECIALS: dict[SpecialsInText, str] = {
    "text": "read as text; set data.special_tokens=parsed if the records were rendered by a chat template",
    "parsed": "read as the model's own, as data.special_tokens=parsed says",
}


@dataclass(frozen=True, slots=True)
class TokenizationReport:
    """What tokenizing did to the rows. All of it is private to the site that holds them.

    ================== ======================================================================
    rows               rows given
    kept               rows that became examples
    truncated          rows cut to `max_length`, whether kept or not
    emptied            row numbers (from 1) with nothing to learn: left out
    emptied_at         the same rows, where they stand in their source
    tokens             tokens in the kept examples
    trained_tokens     those that are learned
    max_length         the bound that was applied; None: no bound
    merged             rows whose prompt, tokenized alone, ends in other tokens
    specials           special tokens of the model that the text of the rows spells
    rows_with_specials rows with one or more of these
    special_tokens     what was made of them: `text`, or `parsed` as the tokens they spell
    ================== ======================================================================
    """

    rows: int
    kept: int
    truncated: int
    emptied: tuple[int, ...]
    emptied_at: tuple[Place, ...]
    tokens: int
    trained_tokens: int
    max_length: int | None
    merged: int = 0
    specials: int = 0
    rows_with_specials: int = 0
    special_tokens: SpecialsInText = "text"

    @property
    def has_incidents(self) -> bool:
        """Whether any row was not learned exactly as it stands."""
        return bool(self.truncated or self.emptied or self.merged or self.specials)

    def counts(self) -> dict[str, int | None]:
        """Return the report as plain values, without the numbers of the rows."""
        return {
            "rows": self.rows,
            "kept": self.kept,
            "truncated": self.truncated,
            "left_out": len(self.emptied),
            "special_tokens": self.specials,
            "merged": self.merged,
            "max_length": self.max_length,
        }

    def sentences(self) -> list[str]:
        """Return the report as lines for a person; rows are named, at most ten of them."""
        lines = [f"{self.kept} of {counted(self.rows, 'row')} kept: {counted(self.tokens, 'token')}"]
        lines[0] += f", {self.trained_tokens} of them learned" if self.trained_tokens else ""
        if self.truncated:
            lines.append(f"{counted(self.truncated, 'row')} cut to data.max_length={self.max_length} tokens")
        if self.emptied:
            lines.append(
                f"{counted(len(self.emptied), 'row')} left out, with nothing to learn (empty, or cut before the "
                f"completion): {named(self.emptied_at)}"
            )
        if self.specials:
            spelled = f"{counted(self.rows_with_specials, 'row')} with special tokens of the model in the text "
            spelled += f"({self.specials} in all): "
            lines.append(spelled + _SPECIALS[self.special_tokens])
        if self.merged:
            lines.append(
                f"{counted(self.merged, 'row')} whose prompt ends inside a token, often with a space: asked with that "
                "prompt alone, the model meets other tokens than it learned from; end prompts before the space"
            )
        return lines


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where that is due."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
