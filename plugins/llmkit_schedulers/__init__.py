"""Built-in schedulers plugins; registered by entry points like anyone else's."""
