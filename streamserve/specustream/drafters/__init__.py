"""Drafters: one file each, its case in `_make_drafter` of `streamserve.llm`."""

from streamserve.specustream.drafters.base import Drafter, DraftRows, without_pages
from streamserve.specustream.drafters.draft_model import draft_model
from streamserve.specustream.drafters.ngram import ngram
from streamserve.specustream.drafters.none import none
from streamserve.specustream.drafters.suffix import suffix
from streamserve.specustream.drafters.tli import tli_fns

__all__ = ["DraftRows", "Drafter", "draft_model", "ngram", "none", "suffix", "tli_fns", "without_pages"]
