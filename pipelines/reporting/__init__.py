"""A report on a model that a person can look at: one document, as HTML, Markdown and JSON."""
