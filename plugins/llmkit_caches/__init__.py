"""Built-in caches plugins; registered by entry points like anyone else's."""
