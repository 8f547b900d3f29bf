"""The stages of a GRPO iteration, one folder each, over immutable, content-addressed artifacts."""
