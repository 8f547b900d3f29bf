"""Built-in reward functions. Each names the parameters it wants: `prompts`, `completions`, `completion_ids`, columns."""
