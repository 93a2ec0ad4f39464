"""Edits of pictures of any size: inpainting, outpainting, object removal, image-to-image."""

from darkroom.editing.editor import Edited, Editor, EditSettings, edit

__all__ = ["EditSettings", "Edited", "Editor", "edit"]
