"""Built-in attention plugins; registered by entry points like anyone else's."""
