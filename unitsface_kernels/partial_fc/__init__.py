"""Class weights sharded over ranks: sampling of the classes that take part in a step."""
