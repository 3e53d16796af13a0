"""Drafters: one file each, its case in `_make_drafter` of `streamserve.llm`."""

from streamserve.specustream.drafters.base import Drafter, DraftRows
from streamserve.specustream.drafters.draft_model import draft_model
from streamserve.specustream.drafters.none import none

__all__ = ["DraftRows", "Drafter", "draft_model", "none"]
