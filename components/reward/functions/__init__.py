"""Built-in reward functions. Each names what it wants: `prompts`, `completions`, `completion_ids`, columns."""
