"""What a comparison teaches and how it is asked back: examples, generated tasks, scoring, and what was forgotten."""
