"""Images of faces, one identity per folder."""
